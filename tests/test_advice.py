"""Each rule on an evaluation that it must speak about and on one that it must not; and the code that it shows runs."""

import math

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.advice import Advice, advise, chance_of
from bayesguard.predictive import Predictive
from bayesguard.results import Evaluation

COUNT = 4000


def logits_and_labels(count: int = COUNT, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of a model that is exactly calibrated, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return logits, logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)


def evaluated(factor: float = 1.0, count: int = COUNT, **settings: object) -> Evaluation:
    logits, labels = logits_and_labels(count)
    return bg.evaluate(Predictive.from_logits(factor * logits), labels, **settings)  # type: ignore[arg-type]


def rules(evaluation: Evaluation) -> list[str]:
    return [advice.rule for advice in advise(evaluation)]


def given(evaluation: Evaluation, rule: str) -> Advice:
    return next(advice for advice in advise(evaluation) if advice.rule == rule)


class Noise(nn.Module):
    """A shift that makes inputs of an over-confident network wilder."""

    severity = 3.0

    def __init__(self, size: float, name: str = "noise") -> None:
        super().__init__()
        self.size, self.name = size, name

    def forward(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return inputs + self.size * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


@pytest.fixture(scope="module")
def honest() -> Evaluation:
    return evaluated(count=20_000, metrics=["nll", "ece", "accuracy"])


def test_nothing_is_said_of_an_honest_model(honest: Evaluation) -> None:
    assert rules(honest) == []


def test_over_and_under_confident(honest: Evaluation) -> None:
    over, under = evaluated(2.0), evaluated(0.5)
    assert "over-confident" in rules(over)
    assert "under-confident" in rules(under)
    assert "under-confident" not in rules(over)
    assert not {"over-confident", "under-confident"} & set(rules(honest))
    assert over.answers is not None
    gap = 100 * (over.answers.confidence - over.answers.right).mean().item()
    assert f"by {gap:.1f} points" in given(over, "over-confident").finding


def test_a_gap_that_is_clear_but_tiny_is_not_worth_a_word() -> None:
    probs = torch.tensor([[0.985, 0.015]], dtype=torch.float64).expand(20_000, 2)
    labels = (torch.arange(20_000) % 50 == 0).long()  # 98 % are right, five standard errors below 98.5 %
    assert rules(bg.evaluate(Predictive.from_probs(probs), labels, metrics=["accuracy"])) == ["errors not found"]


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    """Over 60 honest data sets of 500 the gap is called at most as often as 5 % allows, with five standard errors."""
    called = 0
    for seed in range(60):
        logits, labels = logits_and_labels(500, seed)
        found = rules(bg.evaluate(Predictive.from_logits(logits), labels, metrics=["accuracy"]))
        called += bool({"over-confident", "under-confident"} & set(found))
    assert called / 60 < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 60)


def test_unevenly_wrong(honest: Evaluation) -> None:
    # Half of the answers promise too much, half too little; the mean is right.
    high, low = torch.tensor([0.9, 0.1]).expand(1000, 2), torch.tensor([0.6, 0.4]).expand(1000, 2)
    labels = torch.cat([(torch.arange(1000) % 4 == 0).long(), (torch.arange(1000) % 4 == 0).long()])
    uneven = bg.evaluate(Predictive.from_probs(torch.cat([high, low])), labels)
    assert "unevenly wrong" in rules(uneven)
    assert not {"over-confident", "under-confident"} & set(rules(uneven))
    # Yes in 50 % where 30 % are promised, and in 90 % where 70 % are.
    truth = (torch.arange(2000) % 10 < torch.tensor([5] * 1000 + [9] * 1000)).long()
    yes = bg.evaluate(Predictive.from_probs(torch.tensor([0.3] * 1000 + [0.7] * 1000)), truth)
    assert "unevenly wrong" in rules(yes)
    assert "BetaCalibration" in given(yes, "unevenly wrong").code
    assert "unevenly wrong" not in rules(honest)


def test_few_examples(honest: Evaluation) -> None:
    few = evaluated(count=200)
    assert "few examples" in rules(few)
    chance = chance_of(few)
    assert chance is not None
    assert f"{chance.mean.item():.3f} on average" in given(few, "few examples").finding
    assert "few examples" not in rules(honest)
    assert "few examples" not in rules(evaluated(3.0))  # far beyond what chance would give


def test_errors_not_found_or_too_few(honest: Evaluation) -> None:
    generator = torch.Generator().manual_seed(0)
    top = 0.5 + 0.5 * torch.rand(2000, generator=generator)
    probs = torch.stack([top, 1 - top], -1)
    blind = (torch.rand(2000, generator=generator) < 0.25).long()  # wrong for no reason
    assert "errors not found" in rules(bg.evaluate(Predictive.from_probs(probs), blind))
    assert "few errors" in rules(bg.evaluate(Predictive.from_probs(probs), (torch.arange(2000) < 5).long()))
    assert not {"errors not found", "few errors"} & set(rules(honest))


def test_falls_apart_under_shift() -> None:
    logits, labels = logits_and_labels()
    network = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    network.weight.data = torch.eye(4, dtype=torch.float64)
    for size, expected in ((4.0, True), (0.01, False)):
        evaluation = bg.evaluate(bg.Deterministic(network), (logits, labels), shifts=[Noise(size)])
        assert ("falls apart under shift" in rules(evaluation)) == expected


def test_coverage_under_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=generator)
    network = nn.Linear(1, 1)
    network.weight.data, network.bias.data = torch.ones(1, 1), torch.zeros(1)
    targets = x + torch.randn(2000, 1, generator=generator)
    predictor = bg.Deterministic(network, likelihood=bg.likelihoods.Gaussian())
    for size, expected in ((3.0, True), (0.01, False)):
        evaluation = bg.evaluate(predictor, (x, targets), shifts=[Noise(size)])
        assert ("falls apart under shift" in rules(evaluation)) == expected


def test_class_shares(honest: Evaluation) -> None:
    logits, labels = logits_and_labels()
    moved = logits + torch.tensor([1.0, 0, 0, 0])
    evaluation = bg.evaluate(Predictive.from_logits(moved), labels)
    assert given(evaluation, "class shares").finding.startswith("Class 0 is promised more often than it comes")
    assert "class shares" not in rules(honest)


def test_a_group_that_is_off() -> None:
    logits, labels = logits_and_labels(seed=1)
    odd = torch.arange(COUNT) % 10 == 0
    groups = ["odd" if is_odd else "rest" for is_odd in odd.tolist()]
    sure = Predictive.from_logits(torch.where(odd[:, None], 4 * logits, logits))
    assert "In group odd confidence is too high" in given(bg.evaluate(sure, labels, groups=groups), "group off").finding
    assert "group off" not in rules(bg.evaluate(Predictive.from_logits(logits), labels, groups=groups))
    # All groups alike: that is over-confidence, not a matter of groups.
    assert "group off" not in rules(bg.evaluate(Predictive.from_logits(2 * logits), labels, groups=groups))


def test_a_group_that_is_worse() -> None:
    logits, labels = logits_and_labels()
    hard = torch.arange(COUNT) % 5 == 0
    groups = ["hard" if is_hard else "rest" for is_hard in hard.tolist()]
    shuffled = torch.where(hard, labels.flip(0), labels)
    worse = bg.evaluate(Predictive.from_logits(logits), shuffled, groups=groups)
    assert "Group hard is worse than the rest" in given(worse, "worse group").finding
    assert "worse group" not in rules(bg.evaluate(Predictive.from_logits(logits), labels, groups=groups))


def test_intervals_too_narrow_or_wide() -> None:
    targets = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for scale, expected in ((0.5, ["intervals too narrow"]), (1.0, []), (2.0, ["intervals too wide"])):
        assert (
            rules(bg.evaluate(Predictive.from_normal(torch.zeros(2000), torch.full((2000,), scale)), targets))
            == expected
        )


def test_dense_predictions_have_no_chance_level() -> None:
    probs = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert chance_of(bg.evaluate(Predictive.from_probs(probs), torch.zeros(6, 4, dtype=torch.long))) is None


def ran(code: str, **names: object) -> dict[str, object]:
    space: dict[str, object] = {"bg": bg, **names}
    exec(code, space)
    return space


def test_the_code_runs_and_helps() -> None:
    logits, labels = logits_and_labels()
    network = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    network.weight.data = 2 * torch.eye(4, dtype=torch.float64)
    predictor = bg.Deterministic(network)
    probs = (2 * logits[2000:]).softmax(-1)
    advice = given(bg.evaluate(predictor, (logits, labels)), "over-confident")
    arrays = {"held_out_probs": (2 * logits[:2000]).softmax(-1), "held_out_labels": labels[:2000], "probs": probs}
    space = ran(advice.code, predictor=predictor, held_out=(logits[:2000], labels[:2000]), **arrays)
    after = bg.evaluate(predictor, (logits[2000:], labels[2000:]))
    assert "over-confident" not in rules(after)
    calibrated = space["calibrated"]
    assert isinstance(calibrated, Predictive)
    assert "over-confident" not in rules(bg.evaluate(calibrated, labels[2000:]))


def test_all_other_code_names_what_there_is() -> None:
    from bayesguard import advice

    logits, labels = logits_and_labels(300)
    held_out = (logits.float(), labels)
    for code in (advice._VECTOR, advice._ISOTONIC, "predictor.calibrate(held_out, bg.calibration.PriorCorrection())"):
        ran(code, predictor=bg.Deterministic(nn.Linear(4, 4)), held_out=held_out)
    ran(
        advice._SHIFT,
        predictor=bg.Deterministic(nn.Linear(4, 4)),
        held_out=held_out,
        perturbations=[Noise(1.0), Noise(2.0, "more")],
    )
    ran(advice._ENSEMBLE, make_network=lambda seed: nn.Linear(4, 4))
    yes = bg.Deterministic(nn.Linear(4, 1), likelihood=bg.likelihoods.Bernoulli())
    ran(advice._BINARY, predictor=yes, held_out=(logits.float(), (labels > 1).long()[:, None]))
    pred, groups = Predictive.from_logits(logits), (torch.arange(300) % 2)
    ran(advice._BY_GROUP, held_out_pred=pred, held_out_labels=labels, held_out_groups=groups, pred=pred, groups=groups)
    for line in advice._INTERVALS.splitlines():
        numbers = bg.Deterministic(nn.Linear(4, 1), likelihood=bg.likelihoods.Gaussian())
        ran(line, predictor=numbers, held_out=(logits.float(), logits[:, :1].float()))
