"""Training with a named augmentation: soft targets by hand, the loss of mixup, and what the commands keep of the choice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks import cifar10_c, noise, recipes
from bayesguard.benchmarks.augmentation import mixup
from bayesguard.benchmarks.augmented import AUGMENTATIONS, SoftCategorical, training_batches
from bayesguard.benchmarks.cells import Cell, Record
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.recipes import METHODS, Plan
from bayesguard.cli import main
from bayesguard.errors import BadInput
from bayesguard.likelihoods import Categorical
from bayesguard.sampling import stream

IMAGES = torch.rand(12, 3, 8, 8, generator=stream("cpu", 0, "images"))
LABELS = torch.arange(12) % 3


def tiny() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def test_the_loss_of_a_mixed_pair_is_that_of_both_classes_by_their_shares() -> None:
    mixed = mixup(IMAGES.double(), LABELS, stream("cpu", 1, "pairs"))
    logits = torch.randn(12, 3, generator=stream("cpu", 2, "logits"))
    losses = [-Categorical().log_prob(logits, labels).double() for labels in (mixed.first, mixed.second)]
    expected = (mixed.share * losses[0] + (1 - mixed.share) * losses[1]).mean()
    found = SoftCategorical().loss(logits, mixed.soft_targets(3))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(found) != pytest.approx(float(losses[0].mean()), rel=1e-3)
    # Labels are what they are elsewhere.
    torch.testing.assert_close(SoftCategorical().log_prob(logits, LABELS), Categorical().log_prob(logits, LABELS))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Shares are often all but 0 or 1: five images in a row may not be mixed at all."""
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((2, 2), 0.5), r"the shape of the logits, \(2, 3\), got \(2, 2\)"),
        (torch.full((2, 3), 0.5), "must be probabilities"),
        (torch.tensor([[1.5, -0.5, 0.0], [1.0, 0.0, 0.0]]), "must be probabilities"),
    ],
)
def test_targets_that_are_no_probabilities(targets: Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        SoftCategorical().log_prob(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("kind", [bg.Deterministic, bg.Variational, bg.DeepEnsemble])
def test_likelihoods_take_soft_targets_while_training_only(kind: Any) -> None:
    predictor = bg.DeepEnsemble([tiny(), tiny()]) if kind is bg.DeepEnsemble else kind(tiny())
    before = [parameter.clone() for parameter in predictor.parameters()]
    with training_batches(predictor, IMAGES, LABELS, 5, AUGMENTATIONS["mixup"]) as batches:
        (images, targets), *_ = batches
        assert (images.shape, targets.shape) == ((5, 3, 8, 8), (5, 3))
        torch.testing.assert_close(targets.sum(1), torch.ones(5))
        assert bool(((targets > 0) & (targets < 1)).any())
        predictor.fit(batches, epochs=1, batch_size=None)
    owners = [module for module in predictor.modules() if isinstance(module, bg.predictor.Predictor)]
    assert all(type(owner.likelihood) is Categorical for owner in owners)
    assert not all(torch.equal(old, new) for old, new in zip(before, predictor.parameters(), strict=True))
    with pytest.raises(RuntimeError), training_batches(predictor, IMAGES, LABELS, 5, AUGMENTATIONS["mixup"]):
        raise RuntimeError
    assert type(predictor.likelihood) is Categorical


def test_mixup_is_what_is_minimised() -> None:
    """One step of plain gradient descent, beside the gradient of the mixed loss."""
    predictor = bg.Deterministic(tiny(), seed=0)
    network = predictor.network
    first = {name: parameter.detach().clone().requires_grad_() for name, parameter in network.named_parameters()}
    seen: list[tuple[Tensor, Tensor]] = []

    with training_batches(predictor, IMAGES, LABELS, 12, AUGMENTATIONS["mixup"]) as batches:
        mix = batches.mix
        assert mix is not None

        def noted(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            seen.append(mix(images, labels, generator))
            return seen[-1]

        batches.mix = noted
        predictor.fit(batches, epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    images, targets = seen[-1]
    logits = torch.func.functional_call(network, first, (images,))
    slopes = torch.autograd.grad(-(targets * logits.log_softmax(-1)).sum() / 12, list(first.values()))
    for (name, new), slope in zip(network.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(new, first[name] - 0.5 * slope)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("method", ["deterministic", "dropout_ensemble"])
def test_recipes_train_with_each(augment: str, method: str) -> None:
    part = IMAGES, LABELS
    plan = Plan("small_cnn", ImageSet("cifar10", part, part, part, 3), torch.device("cpu"), 3, 1, 2, 2, augment)
    assert METHODS[method].build(plan).predict(IMAGES).probs.isfinite().all()


def test_the_recipe_with_augmix_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(recipes, "fit", lambda predictor, part, *, augment, **_: asked.append(augment))
    part = IMAGES, LABELS
    plan = Plan("small_cnn", ImageSet("cifar10", part, part, part, 3), torch.device("cpu"), 3, 8, 2, 2, "mixup")
    METHODS["augmix_last_layer"].build(plan)
    METHODS["deterministic"].build(plan)
    assert asked == [AUGMENTATIONS["augmix"], AUGMENTATIONS["augmix"], AUGMENTATIONS["mixup"]]


def test_cells_of_the_default_say_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}

    def measured(measure: Any, cells: list[Cell], *, settings: Any, **_: object) -> list[Record]:
        kept.update({cell.method: settings(cell) if callable(settings) else settings for cell in cells})
        raise KeyboardInterrupt

    for module, arguments in ((cifar10_c, {}), (noise, {"labels": "cifar10h"})):
        monkeypatch.setattr(module, "measure_all", measured)
        for augment in (None, "mixup"):
            kept.clear()
            with pytest.raises(KeyboardInterrupt):
                module.run(**arguments, **({} if augment is None else {"augment": augment}))
            for method, settings in kept.items():
                own = augment if method != "augmix_last_layer" else None
                assert settings.get("augment") == own


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["shift", "--data", "digits", "--augment", "mixup"], "--augment is for --data cifar10"),
        (["shift", "--data", "cifar10", "--augment", "cutout"], "augment must be one of none, flip_crop"),
        (["shift", "--data", "mnist", "--shift", "rotation", "--augment", "none"], "--augment is not for --shift"),
        (["shift", "--data", "mnist", "--shift", "labels", "--augment", "none"], "--augment is not for --shift"),
        (["noise", "--augment", "cutout"], "augment must be one of none, flip_crop"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["benchmark", *options])
        assert done.value.code == 2
        assert message in capsys.readouterr().err
