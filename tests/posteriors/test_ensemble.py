"""Deep ensembles: the mixture by hand, nesting, and every way of training them."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.posteriors import ensemble_prediction
from bayesguard.posteriors.ensemble_training import _train_jointly
from bayesguard.sampling import derive_seed
from bayesguard.sampling.choice import Choice
from tests.chosen_ways import choose_way
from tests.networks import mlp


class Constant(nn.Module):
    """Answers every input with the same outputs."""

    def __init__(self, *outputs: float) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs.expand(len(x), -1)


def test_the_mixture_of_three_members_by_hand() -> None:
    """Probabilities .8, .5, .2 mix to .5; mutual information is log 2 minus the mean entropy."""
    probabilities = torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64)
    members = [Constant(float(p.log()), float((1 - p).log())) for p in probabilities]
    for member in members:
        member.outputs.data += 0.3  # logits, not log-probabilities
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    entropy = -(probabilities * probabilities.log() + (1 - probabilities) * (1 - probabilities).log()).mean()
    parts = pred.uncertainty()
    log2 = torch.tensor(2.0).log()
    assert torch.allclose(pred.probs, torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(parts.total, log2)
    assert torch.allclose(parts.aleatoric.double(), entropy, atol=1e-6)
    assert torch.allclose(parts.epistemic.double(), log2.double() - entropy, atol=1e-6)


def test_c7_probabilities_are_mixed_and_logits_are_not_averaged() -> None:
    members = [Constant(10.0, 0.0), Constant(0.0, 1.0)]
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    mixed = (torch.tensor([10.0, 0.0]).softmax(0) + torch.tensor([0.0, 1.0]).softmax(0)) / 2
    averaged = torch.tensor([5.0, 0.5]).softmax(0)
    assert torch.allclose(pred.probs[0], mixed)
    assert (mixed - averaged).abs().max() > 0.3


def test_a_regression_ensemble_keeps_its_epistemic_variance() -> None:
    """Members say 0, 3 and 6 with noise 1: mean 3, variance 1 + 6 by the law of total variance."""
    members = [Constant(0.0), Constant(3.0), Constant(6.0)]
    pred = bg.DeepEnsemble(members, bg.likelihoods.Gaussian(scale=1.0))(torch.zeros(2, 1))
    assert torch.allclose(pred.mean, torch.full((2, 1), 3.0))
    assert torch.allclose(pred.variance, torch.full((2, 1), 7.0))
    parts = pred.uncertainty()
    assert torch.allclose(parts.aleatoric, torch.ones(2, 1))
    assert torch.allclose(parts.epistemic, torch.full((2, 1), 6.0))


def test_members_keep_noise_of_their_own() -> None:
    ensemble = bg.DeepEnsemble([Constant(0.0), Constant(4.0)], bg.likelihoods.Gaussian())
    for member, scale in zip(ensemble.members, (1.0, 3.0), strict=True):
        member.likelihood.log_scale.data.fill_(torch.tensor(scale).log())  # type: ignore[operator]
    pred = ensemble(torch.zeros(1, 1))
    assert torch.allclose(pred.uncertainty().aleatoric, torch.tensor([[(1.0 + 9.0) / 2]]))


def test_an_ensemble_of_mc_dropout_is_the_mixture_of_all_draws() -> None:
    members = [bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=count) for count in (4, 8)]
    ensemble = bg.DeepEnsemble(members)
    x = torch.randn(3, 8)
    pred = ensemble(x)
    assert pred.num_samples == 12
    # Each member has half of the mass, however many draws it makes.
    assert torch.allclose(pred.weights, torch.tensor([1 / 8] * 4 + [1 / 16] * 8, dtype=torch.float64))
    outputs = ensemble.draw_outputs(x).softmax(dim=-1)
    assert torch.allclose(pred.probs, (outputs[:4].mean(dim=0) + outputs[4:].mean(dim=0)) / 2, atol=1e-6)
    assert torch.allclose(ensemble.predict((x, torch.zeros(3))).probs, pred.probs, atol=1e-6)


def test_a_members_own_calibration_comes_before_the_mixture() -> None:
    members = [bg.Deterministic(Constant(2.0, 0.0)), bg.Deterministic(Constant(0.0, 4.0))]
    data = (torch.zeros(8, 1), torch.tensor([0, 0, 0, 1, 1, 0, 1, 0]))
    members[0].calibrate(data)
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    want = (members[0](torch.zeros(1, 1)).probs + members[1](torch.zeros(1, 1)).probs) / 2
    assert torch.allclose(pred.probs, want)


DATA = (torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)


def trained(**settings: Any) -> bg.DeepEnsemble:
    ensemble = bg.DeepEnsemble(lambda seed: mlp(), num_members=3, **settings)
    ensemble.fit(DATA, epochs=3, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.01))
    return ensemble


@pytest.mark.parametrize("joint", [True, False])
def test_training_lowers_the_loss_of_every_member(joint: bool) -> None:
    fresh = bg.DeepEnsemble(lambda seed: mlp(), num_members=3)
    ensemble = trained(joint=joint)
    for before, after in zip(fresh.members, ensemble.members, strict=True):
        assert after.validation_loss(DATA) < before.validation_loss(DATA)


def test_processes_train_what_one_process_trains() -> None:
    alone, spread = trained(joint=False), trained(joint=False, n_jobs=2)
    for a, b in zip(alone.parameters(), spread.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def _loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(*DATA), batch_size=20, shuffle=True, generator=generator)


def test_members_draw_from_a_loaders_own_generator_whatever_was_trained_before(tmp_path: Path) -> None:
    def fitted(loader: DataLoader[Any], epochs: int, n_jobs: int = 1, path: Path | None = None) -> bg.DeepEnsemble:
        ensemble = bg.DeepEnsemble(lambda seed: mlp(), num_members=3, joint=False, n_jobs=n_jobs)
        ensemble.fit(loader, epochs=epochs, checkpoint=path)
        return ensemble

    straight, spread = _loader(), _loader()
    want = fitted(straight, 4)
    fitted(_loader(), 2, path=tmp_path / "c")
    for other in (fitted(spread, 4, n_jobs=2), fitted(_loader(), 4, path=tmp_path / "c")):
        for a, b in zip(want.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert torch.equal(straight.generator.get_state(), spread.generator.get_state())
    again = [next(iter(straight))[1], next(iter(_loader()))[1]]
    assert not torch.equal(*again)


@pytest.mark.parametrize("joint", [True, False])
def test_an_iterator_serves_every_member_for_one_epoch(joint: bool) -> None:
    batches = [(DATA[0][:20], DATA[1][:20]), (DATA[0][20:], DATA[1][20:])]
    want, got = (bg.DeepEnsemble(lambda seed: mlp(), num_members=2, joint=joint) for _ in range(2))
    want.fit(batches, epochs=1, validation=batches)
    history = got.fit(iter(batches), epochs=1, validation=iter(batches))
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
    assert all(own.epochs[0].validation_nll is not None for own in history.members or (history,))
    with pytest.raises(BadInput, match="run dry"):
        got.fit(iter(batches), epochs=2)


def test_bootstrap_gives_members_different_data() -> None:
    ensemble = bg.DeepEnsemble(lambda seed: mlp(), num_members=2, bootstrap=True)
    first, second = (ensemble.member_data(DATA, index)[0] for index in range(2))
    assert first.shape == DATA[0].shape
    assert not torch.equal(first, second)
    trained(bootstrap=True)


def test_adversarial_smoothing_is_the_mean_of_both_losses() -> None:
    """For a linear model the adversarial example is x + eps * sign(dloss/dx), worked out by hand."""
    epsilon = 0.1
    ensemble = bg.DeepEnsemble([nn.Linear(8, 3)], adversarial_epsilon=epsilon)
    member = ensemble.members[0]
    x, y = DATA
    linear: Any = member.network
    gradient = (linear(x).softmax(dim=-1) - nn.functional.one_hot(y, 3)) @ linear.weight
    twin = x + epsilon * gradient.sign()
    cross = nn.functional.cross_entropy
    want = (cross(linear(x), y) + cross(linear(twin), y)) / 2
    assert torch.allclose(ensemble.loss(x, y, num_data=60), want, atol=1e-6)


def test_checkpoints_become_members(tmp_path: Path) -> None:
    networks = [mlp(), mlp()]
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for network, path in zip(networks, paths, strict=True):
        save_file(network.state_dict(), path)
    ensemble = bg.DeepEnsemble.from_checkpoints(paths, mlp)
    assert torch.equal(ensemble.draw_outputs(DATA[0]), bg.DeepEnsemble(networks).draw_outputs(DATA[0]))
    with pytest.raises(BadInput, match=r"not a .safetensors file"):
        bg.DeepEnsemble.from_checkpoints([tmp_path / "weights.pt"], mlp)


def test_bad_members_are_named() -> None:
    with pytest.raises(BadInput, match="members is empty"):
        bg.DeepEnsemble([])
    with pytest.raises(BadType, match=r"members\[1\] must be a torch.nn.Module"):
        bg.DeepEnsemble([mlp(), "network"])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="likelihood of its own"):
        bg.DeepEnsemble([bg.Deterministic(mlp())], bg.likelihoods.Categorical())


def test_a_draw_is_one_member() -> None:
    ensemble = bg.DeepEnsemble([mlp() for _ in range(3)])
    outputs = ensemble.draw_outputs(DATA[0])
    drawn = [ensemble.draw(seed)(DATA[0]) for seed in range(20)]
    which = [[torch.allclose(own, outputs[index], atol=1e-6) for index in range(3)] for own in drawn]
    assert all(sum(row) == 1 for row in which)
    assert {row.index(True) for row in which} == {0, 1, 2}


def _choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let one way win wherever it is a candidate."""

    def fastest(candidates: dict[str, Any], device: torch.device) -> Choice:
        return Choice(way, {name: float(name != way) for name in candidates})

    monkeypatch.setattr(ensemble_prediction, "fastest", fastest)


def _loop(ensemble: bg.DeepEnsemble, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([member.network(x) for member in ensemble.members])


X = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _batched(monkeypatch: pytest.MonkeyPatch, *members: nn.Module, **options: Any) -> bg.DeepEnsemble:
    _choose(monkeypatch, "batched")
    ensemble = bg.DeepEnsemble(members or [mlp() for _ in range(3)], **options).double()
    ensemble(X)
    return ensemble


def test_the_batched_product_is_the_loop_over_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = _batched(monkeypatch)
    assert "3 members as one batched product (measured: batched 0 ms" in ensemble.strategy
    for rows in (1, 7):
        for _ in range(2):
            assert torch.allclose(ensemble.draw_outputs(X[:rows]), _loop(ensemble, X[:rows]), rtol=0, atol=1e-10)
            want = _loop(ensemble, X[:rows]).softmax(-1).mean(0)
            pred = ensemble(X[:rows])
            assert torch.allclose(pred.probs, want, rtol=0, atol=1e-10)
            assert pred.num_samples == 3
            assert not pred.exact


def test_the_choice_does_not_change_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [mlp() for _ in range(3)]
    fast = _batched(monkeypatch, *networks)
    _choose(monkeypatch, "loop")
    slow = bg.DeepEnsemble(networks).double()
    a, b = fast(X), slow(X)
    assert "one after another" in slow.strategy
    for got, want in (
        (a.probs, b.probs),
        (a.standard_error, b.standard_error),
        (a.weights, b.weights),
        *zip(a.uncertainty(), b.uncertainty(), strict=True),
    ):
        assert torch.allclose(got, want, rtol=0, atol=1e-10)
    streamed, plain = (ensemble.predict((X, torch.zeros(7)), batch_size=3) for ensemble in (fast, slow))
    assert torch.allclose(streamed.probs, plain.probs, rtol=0, atol=1e-10)


def test_what_an_ensemble_costs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways of 1 ms (the batched product) and 6 ms (the loop): three members for half a pass; memory counted by hand."""
    seconds = {"loop": 6e-3, "batched": 1e-3}

    def fastest(candidates: dict[str, Any], device: torch.device) -> Choice:
        own = {way: seconds[way] for way in candidates}
        return Choice(min(own, key=lambda way: own[way]), own)

    monkeypatch.setattr(ensemble_prediction, "fastest", fastest)
    ensemble = bg.DeepEnsemble([mlp() for _ in range(3)]).double()
    assert ensemble.explain().count("\n") == 0
    ensemble(X.repeat(1000, 1))
    # The outputs of all, and the widest layer's 32 numbers an example, in and out, for two members more than one.
    size = 8 * 7000 * (3 * 3 + 2 * 2 * 32) / 2**20
    assert ensemble.explain().splitlines() == [
        f"strategy: {ensemble.strategy}",
        "  cost: 3 members take the time of 0.5 plain passes (one takes 2 ms)",
        f"  memory: {size:.3g} MiB beside that of one pass",
    ]
    seconds["batched"] = 9e-3
    ensemble(X)
    loop = ensemble.explain().splitlines()[1:]
    assert loop[0] == "  cost: 3 members take the time of 3 plain passes (one takes 2 ms)"
    assert loop[1] == f"  memory: {8 * 7 * 9 / 2**20:.3g} MiB beside that of one pass"


def test_a_batched_product_follows_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes in place, training, loading and casting after the first prediction reach the next."""
    ensemble = _batched(monkeypatch)
    before = ensemble.draw_outputs(X)

    def follows() -> bool:
        x = X.to(next(ensemble.parameters()).dtype)
        now = ensemble.draw_outputs(x)
        return torch.allclose(now, _loop(ensemble, x), rtol=0, atol=1e-6) and not torch.equal(now.double(), before)

    linear: Any = ensemble.members[1].network.get_submodule("0")
    linear.weight.data.mul_(3)
    assert follows()
    ensemble.members[2].network.load_state_dict(mlp().double().state_dict())
    assert follows()
    ensemble.fit((DATA[0].double(), DATA[1]), epochs=1)
    assert follows()
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    assert follows()
    ensemble.members[0].network = mlp().double().eval()
    assert follows()
    ensemble.float()
    assert follows()
    assert "batched" in ensemble.strategy


def test_members_in_training_mode_are_refused_after_a_batched_product_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = _batched(monkeypatch)
    ensemble.members[1].network.get_submodule("0").train()
    with pytest.raises(BadInput, match="training mode"):
        ensemble(X)
    with pytest.raises(BadInput, match="training mode"):
        ensemble.draw_outputs(X)


def test_members_that_are_not_copies_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [mlp().eval().double() for _ in range(2)]
    places = [parameter.data_ptr() for network in networks for parameter in network.parameters()]
    ensemble = _batched(monkeypatch, *networks, copy=False)
    assert "copy=False" in ensemble.strategy
    assert places == [parameter.data_ptr() for network in networks for parameter in network.parameters()]


@pytest.mark.parametrize(
    "members",
    [
        lambda: [mlp(), nn.Linear(8, 3)],
        lambda: [mlp(), nn.Sequential(nn.Linear(8, 3), nn.Softsign())],
        lambda: [bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=8) for _ in range(2)],
        lambda: [bg.Deterministic(mlp()), bg.Deterministic(mlp(), output=lambda outputs: 2 * outputs)],
    ],
)
def test_members_that_are_not_alike_are_asked_one_after_another(monkeypatch: pytest.MonkeyPatch, members: Any) -> None:
    ensemble = _batched(monkeypatch, *members())
    want = torch.cat(
        [member.draw_outputs(X, seed=derive_seed(0, "member", i)) for i, member in enumerate(ensemble.members)]
    )
    assert torch.equal(ensemble.draw_outputs(X), want)
    assert "one after another" in ensemble.strategy


def test_calibrators_and_noise_of_members_survive_the_batched_product(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [bg.Deterministic(mlp(), bg.likelihoods.Gaussian()) for _ in range(2)]
    ensemble = _batched(monkeypatch, *members)
    for member, scale in zip(ensemble.members, (1.0, 3.0), strict=True):
        member.likelihood.log_scale.data.fill_(torch.tensor(scale).log())  # type: ignore[operator]
    assert torch.allclose(ensemble(X).uncertainty().aleatoric, torch.full((7, 3), 5.0, dtype=torch.float64), atol=1e-6)
    assert "batched" in ensemble.strategy
    classes = [bg.Deterministic(mlp()).double() for _ in range(2)]
    held_out = torch.randn(300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    answers = torch.multinomial(
        (2 * classes[0].draw_outputs(held_out)[0]).softmax(-1), 1, generator=torch.Generator().manual_seed(3)
    )
    classes[0].calibrate((held_out, answers.squeeze(1)))
    assert not torch.allclose(classes[0](X).probs, classes[0].draw_outputs(X)[0].softmax(-1), atol=1e-3)
    want = (classes[0](X).probs + classes[1](X).probs) / 2
    assert torch.allclose(_batched(monkeypatch, *classes)(X).probs, want, rtol=0, atol=1e-10)


def test_copies_and_gradients_do_not_use_what_belongs_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = _batched(monkeypatch)
    twin = deepcopy(ensemble)
    next(ensemble.members[0].parameters()).data.zero_()
    assert torch.allclose(twin.draw_outputs(X), _loop(twin, X), rtol=0, atol=1e-10)
    assert torch.allclose(ensemble.draw_outputs(X), _loop(ensemble, X), rtol=0, atol=1e-10)
    outputs = torch.cat(list(ensemble.output_chunks(X, num_samples=3, seed=0)))
    assert outputs.requires_grad


class Images(nn.Module):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.convolution, self.head, self.cut = nn.Conv2d(2, 4, 3), nn.Linear(4 * 36, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convolution(x).relu()
        return self.head(hidden.view(len(x), -1) if self.cut else hidden.flatten(1))


@pytest.mark.parametrize("cut", [False, True])
def test_images_with_their_channels_last_are_the_same(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    _choose(monkeypatch, "channels last")
    ensemble = bg.DeepEnsemble([Images(cut) for _ in range(2)]).double()
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.allclose(ensemble.draw_outputs(x), _loop(ensemble, x), rtol=0, atol=1e-10)
    assert ("channels last in memory" in ensemble.strategy) is not cut
    assert all(parameter.is_contiguous() for parameter in ensemble.parameters())


@pytest.mark.parametrize(("width", "together"), [(50, True), (400, True), (900, False)])
def test_training_together_is_decided_by_size_and_never_by_a_clock(width: int, together: bool) -> None:
    ensemble = bg.DeepEnsemble(
        [
            nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
            for _ in range(2)
        ]
    )
    assert (_train_jointly(ensemble, DATA, {}) is not None) is together


def test_what_runs_under_vmap_and_convolutions_are_trained_together_less_often() -> None:
    wide = bg.DeepEnsemble(
        [
            nn.Sequential(nn.Linear(8, 400), nn.BatchNorm1d(400), nn.Linear(400, 400), nn.Linear(400, 3))
            for _ in range(2)
        ]
    )
    assert _train_jointly(wide, DATA, {}) is None
    for channels, together in ((6, True), (16, False)):
        images = bg.DeepEnsemble(
            [
                nn.Sequential(nn.Conv2d(2, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, 3))
                for _ in range(2)
            ]
        )
        trial = _train_jointly(images, (torch.randn(4, 2, 8, 8), torch.arange(4) % 3), {})
        assert (trial is not None) is together


def test_members_of_a_batched_product_are_saved_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ensemble = _batched(monkeypatch)
    for name, module in (("all", ensemble), ("one", ensemble.members[1])):
        save_file(module.state_dict(), tmp_path / name)
        loaded = load_file(tmp_path / name)
        assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())
    written = (tmp_path / "one").stat().st_size
    assert written < 2 * sum(value.nbytes for value in ensemble.members[1].state_dict().values()) + 2000


class Changing(nn.Module):
    """Gives its outputs in the form that it is told to."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.form = nn.Linear(4, 3), "plain"

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.body(x)
        if self.form == "classes":
            return outputs.argmax(-1, keepdim=True).expand(-1, 3)
        return torch.cat([outputs, outputs], -1) if self.form == "wide" else outputs


def test_members_that_answer_in_another_form_later_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "loop")
    x = torch.randn(5, 4)
    for form, changed in (("classes", 3), ("classes", 1), ("wide", 1)):
        ensemble = bg.DeepEnsemble([Changing(seed) for seed in range(3)])
        ensemble(x)
        some: Any = ensemble.members[:changed]
        for member in some:
            member.network.form = form
        for ask in (ensemble, ensemble.draw_outputs, ensemble.predict):
            with pytest.raises((BadInput, BadType), match=r"floating-point numbers|outputs of shapes|of one family"):
                ask(x)
