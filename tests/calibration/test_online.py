"""Adaptive conformal inference: the bound of the paper on streams of every kind."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import Conformal, ConformalInterval, ConformalQuantile
from bayesguard.calibration.online import AdaptiveConformal, DynamicallyTunedConformal, OnlineConformal
from bayesguard.errors import BadInput, BadType


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(score: Any = "normalised") -> ConformalInterval:
    y = torch.randn(300, generator=generator(0))
    return ConformalInterval(score).fit(bg.Predictive.from_normal(torch.zeros(300), 1.0), y)


STREAMS: dict[str, Tensor] = {
    "calm": torch.ones(3000),
    "a jump": torch.cat([torch.ones(1500), torch.full((1500,), 4.0)]),
    "a drift": torch.linspace(0.3, 4, 3000),
    "hostile": torch.where(torch.arange(3000) % 2 == 0, 0.0, 1e6),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("step_size", [0.005, 0.05])
def test_the_long_run_error_rate_whatever_the_data_do(stream: str, step_size: float) -> None:
    y = STREAMS[stream] * torch.randn(3000, generator=generator(1))
    pred = bg.Predictive.from_normal(torch.zeros(3000), 1.0)
    adaptive = AdaptiveConformal(fitted(), step_size=step_size)
    covered = adaptive.run(pred, y)
    misses = 1 - covered.double().mean().item()
    assert abs(misses - 0.1) <= (1 + step_size) / (3000 * step_size)
    assert adaptive.num_misses == int((~covered).sum())
    lower, upper = fitted()(pred).interval()
    fixed = 1 - ((lower <= y) & (y <= upper)).double().mean().item()
    if stream != "calm":
        assert abs(fixed - 0.1) > (1 + 0.05) / (3000 * 0.05)


def test_classes() -> None:
    logits = 2 * torch.randn(1200, 4, generator=generator(2))
    labels = (0.3 * logits).softmax(-1).multinomial(1, generator=generator(3)).squeeze(-1)
    pred = bg.Predictive.from_logits(logits)
    easy = logits.softmax(-1).multinomial(1, generator=generator(4)).squeeze(-1)
    adaptive = AdaptiveConformal(Conformal("aps").fit(pred[:200], easy[:200]), step_size=0.02)
    covered = adaptive.run(pred[200:], labels[200:])
    assert abs(1 - covered.double().mean().item() - 0.1) <= 1.02 / (1000 * 0.02)


def test_levels_beyond_their_range() -> None:
    adaptive = AdaptiveConformal(fitted(), step_size=0.5)
    adaptive.observe(False)
    lower, upper = adaptive.answer(bg.Predictive.from_normal([0.0], [1.0]))
    assert upper.isinf().all()
    assert lower.isinf().all()
    for _ in range(40):
        adaptive.observe(True)
    assert adaptive.level > 1
    lower, upper = adaptive.answer(bg.Predictive.from_normal([0.0], [1.0]))
    assert upper - lower < 0.1


def test_a_run_is_the_answers_one_by_one() -> None:
    """Every set that is built on the way holds what `run` says without building any."""
    y = STREAMS["a drift"][::10] * torch.randn(300, generator=generator(6))
    pred = bg.Predictive.from_normal(torch.zeros(300), 1.0)
    logits = 2 * torch.randn(300, 4, generator=generator(7))
    labels = (0.3 * logits).softmax(-1).multinomial(1, generator=generator(8)).squeeze(-1)
    classes = bg.Predictive.from_logits(logits)
    cases: list[tuple[Any, Any, Tensor]] = [
        (fitted(), pred, y),
        (Conformal("aps").fit(classes, labels), classes, labels),
    ]
    for conformal, preds, targets in cases:
        for kind in (AdaptiveConformal, DynamicallyTunedConformal):
            online, by_hand = kind(conformal), kind(conformal)
            covered = online.run(preds, targets)
            for row in range(300):
                answer: Any = by_hand.answer(preds[row])
                if isinstance(answer, Tensor):
                    held = bool(answer[0, targets[row]])
                else:
                    held = bool((answer[0] <= targets[row]) & (targets[row] <= answer[1]))
                assert held == covered[row]
                if isinstance(by_hand, AdaptiveConformal):
                    by_hand.observe(held)
                else:
                    by_hand.observe(preds[row], targets[row : row + 1])
            assert torch.equal(online.level, by_hand.level)
            assert online.num_misses == by_hand.num_misses


@pytest.mark.parametrize("kind", [AdaptiveConformal, DynamicallyTunedConformal])
def test_a_state_goes_on_where_it_was(kind: type[OnlineConformal]) -> None:
    y = 3 * torch.randn(400, generator=generator(1))
    pred = bg.Predictive.from_normal(torch.zeros(400), 1.0)
    whole, first, second = kind(fitted()), kind(fitted()), kind(fitted())
    covered = whole.run(pred, y)
    assert torch.equal(first.run(pred[:200], y[:200]), covered[:200])
    second.load_state_dict(load(save(first.state_dict())))
    assert torch.equal(second.run(pred[200:], y[200:]), covered[200:])
    assert torch.equal(second.level, whole.level)
    assert second.num_misses == whole.num_misses
    with pytest.raises(BadInput, match=r"the state is for alpha=0\.1, this .* for 0\.2"):
        kind(fitted(), alpha=0.2).load_state_dict(first.state_dict())
    kind(fitted()).load_state_dict({**first.state_dict(), "_extra_state": {"alpha": 0.1}})


# Dynamically tuned.


def pinball(p_values: Tensor, levels: Tensor, alpha: float = 0.1) -> Tensor:
    gap = p_values - levels
    return alpha * gap - gap.clamp_max(0)


def paths(tuned: DynamicallyTunedConformal, p_values: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Level, experts' levels and weights before each example."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for p_value in p_values:
        found.append((tuned.level.clone(), tuned.levels.clone(), tuned.weights.clone()))
        tuned._take(p_value)
    level, levels, weights = zip(*found, strict=True)
    return torch.stack(level), torch.stack(levels), torch.stack(weights)


def regret_over_bound(p_values: Tensor, tuned: DynamicallyTunedConformal, sigma: float | None = None) -> float:
    """The largest ratio of regret to its bound, over experts and stretches of 20 examples and more."""
    kept_sigma = tuned.sigma
    if sigma is not None:
        tuned.sigma = sigma
    level, levels, weights = paths(tuned, p_values.tolist())
    own, each = pinball(p_values, level), pinball(p_values.unsqueeze(-1), levels)
    gap = torch.cat([torch.zeros(1, 8).double(), (own.unsqueeze(-1) - each).cumsum(0)])
    second = torch.cat([torch.zeros(1).double(), (weights * each.square()).sum(-1).cumsum(0)])
    worst = -math.inf
    for start in range(0, len(p_values), 50):
        for end in range(start + 20, len(p_values), 50):
            count = end - start
            bound = (math.log(8 / kept_sigma) + 2 * kept_sigma * count) / tuned.eta
            bound += tuned.eta / 2 * float(second[end] - second[start])
            worst = max(worst, float((gap[end] - gap[start]).max()) / bound)
    return worst


def test_the_loss_over_every_stretch_is_near_that_of_the_best_expert() -> None:
    """The bound, which holds for any data; weights that may vanish are the twin that must fail."""
    random = torch.rand(3000, generator=generator(3)).double()
    jumps = torch.cat([random[:2000], 0.02 * random[2000:2200], random[2200:]])
    hostile = (torch.arange(3000) // 300 % 2).double()
    for p_values in (random, jumps, hostile):
        assert regret_over_bound(p_values, DynamicallyTunedConformal(fitted(), window=100)) <= 1
    twin = max(
        regret_over_bound(p_values, DynamicallyTunedConformal(fitted(), window=100), sigma=0.0)
        for p_values in (jumps, hostile)
    )
    assert twin > 1


ROWS, CHANGE, REPEATS = 1600, 800, 6


@cache
def covered_streams(kind: str, stream: str) -> tuple[Tensor, Tensor]:
    """What was covered, and the levels before, `[REPEATS, ROWS]`."""
    scale = torch.linspace(0.5, 3, ROWS)
    if stream == "jump":
        scale = torch.where(torch.arange(ROWS) < CHANGE, 1.0, 3.0)
    covered, levels = [], []
    for seed in range(REPEATS):
        y = scale * torch.randn(ROWS, generator=generator(50 + seed))
        online: OnlineConformal
        if kind == "tuned":
            online = DynamicallyTunedConformal(fitted(), window=250)
        else:
            online = AdaptiveConformal(fitted(), step_size=float(kind))
        own = []
        held = []
        for p_value in online._p_values(bg.Predictive.from_normal(torch.zeros(ROWS), 1.0), y):
            own.append(float(online.level))
            held.append(online._take(p_value))
        covered.append(held)
        levels.append(own)
    return torch.tensor(covered).double(), torch.tensor(levels)


@pytest.mark.parametrize("stream", ["drift", "jump"])
def test_the_long_run_error_rate_of_the_mean_level(stream: str) -> None:
    shares = covered_streams("tuned", stream)[0].mean(1)
    error = 5 * (shares.std() / REPEATS**0.5).item()
    assert abs(shares.mean() - 0.9) < 0.015 + error  # the mean of levels is a little careful
    y = torch.linspace(0.5, 3, ROWS) * torch.randn(ROWS, generator=generator(50))
    lower, upper = fitted()(bg.Predictive.from_normal(torch.zeros(ROWS), 1.0)).interval()
    assert abs(((lower <= y) & (y <= upper)).double().mean() - 0.9) > 0.015 + error


def test_after_a_change_it_is_sooner_right_than_a_small_step_and_before_it_steadier_than_a_large_one() -> None:
    after = slice(CHANGE, CHANGE + 300)
    tuned, levels = covered_streams("tuned", "jump")
    small, _ = covered_streams("0.005", "jump")
    _, large = covered_streams("0.128", "jump")
    gain = tuned[:, after].mean(1) - small[:, after].mean(1)
    error = 5 * (gain.std() / REPEATS**0.5).item()
    assert gain.mean() > error
    assert abs(tuned[:, after].mean() - 0.9) < abs(small[:, after].mean() - 0.9) - error / 5
    calm = slice(200, CHANGE)
    # Where the level is below 1 / 301, sets hold everything.
    useless = (large[:, calm] < 1 / 301).double().mean(1) - (levels[:, calm] < 1 / 301).double().mean(1)
    assert useless.mean() > 5 * useless.std() / REPEATS**0.5
    steadier = large[:, calm].std(1) - levels[:, calm].std(1)
    assert steadier.mean() > 5 * steadier.std() / REPEATS**0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdaptiveConformal(ConformalInterval()), BadType, "must be a fitted"),
        (lambda: AdaptiveConformal(fitted(), step_size=0.0), BadInput, "step_size"),
        (lambda: AdaptiveConformal(fitted(), alpha=2.0), BadInput, "alpha"),
        (
            lambda: AdaptiveConformal(fitted()).run(bg.Predictive.from_normal([0.0], [1.0]), torch.zeros(2)),
            BadInput,
            "targets has 2 examples",
        ),
        (
            lambda: AdaptiveConformal(
                ConformalQuantile().fit(bg.Predictive.from_normal(torch.zeros(50), 1.0), torch.randn(50))
            ),
            BadType,
            "one alpha only",
        ),
        (lambda: DynamicallyTunedConformal(fitted(), window=0), BadInput, "window"),
        (
            lambda: DynamicallyTunedConformal(fitted()).observe(bg.Predictive.from_normal([0.0, 0.0], 1.0), [0.0, 0.0]),
            BadInput,
            "observe takes one",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
