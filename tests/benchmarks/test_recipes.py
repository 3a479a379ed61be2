"""The recipe for CIFAR-10, and what each method trains with it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import bayesguard as bg
from bayesguard.benchmarks.augmentation import AugmentedBatches
from bayesguard.benchmarks.augmented import Augmentation
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.recipes import METHODS, Plan, fit, warm_cosine
from bayesguard.benchmarks.shift import SETTINGS, train
from bayesguard.predictor import Predictor
from bayesguard.sampling import stream

PIXELS = torch.rand(12, 3, 8, 8, generator=stream("cpu", 0, "images"))
PART = PIXELS, torch.arange(12) % 3
IMAGES = ImageSet("cifar10", PART, PART, PART, 3)


def plan(network: str = "small_cnn") -> Plan:
    return Plan(network, IMAGES, torch.device("cpu"), seed=3, epochs=1, members=2, draws=2)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    factors = [warm_cosine(epoch, 80) for epoch in range(81)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[42] == pytest.approx(0.5)
    assert factors[80] == pytest.approx(0)
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert [warm_cosine(epoch, 2) for epoch in (0, 1)] == pytest.approx([1, 0.5])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_built_and_answers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def a_second(call: Callable[[], Any], device: torch.device) -> float:
        call()
        return 1.0

    # Which strategy is the fastest is measured, and strategies differ in the last bit: here all take as long.
    for module in ("choice", "planning"):
        monkeypatch.setattr(f"bayesguard.sampling.{module}.seconds_of", a_second)
    predictor = METHODS[method].build(plan())
    pred = predictor.predict(PIXELS)
    assert pred.probs.shape == (12, 3)
    assert pred.probs.isfinite().all()
    again = METHODS[method].build(plan()).predict(PIXELS)
    torch.testing.assert_close(again.probs, pred.probs, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["variational", "last_layer_variational", "augmix_last_layer", "mc_dropout"])
def test_on_the_residual_network(method: str) -> None:
    predictor = METHODS[method].build(plan("resnet20"))
    assert predictor.predict(PIXELS).probs.isfinite().all()
    if isinstance(predictor, bg.Variational) and method != "variational":
        assert predictor.weights.size == 64 * 3 + 3


def test_only_the_last_layer_moves_after_augmix() -> None:
    first = METHODS["augmix_last_layer"].build(plan())
    assert isinstance(first, bg.Variational)
    moving = {name for name, parameter in first.network.named_parameters() if parameter.requires_grad}
    assert moving == {"head.5.weight", "head.5.bias"}


def test_members_of_an_ensemble_see_orders_of_their_own() -> None:
    orders: list[list[float]] = []

    def noted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        orders.append(images[:, 0, 0, 0].tolist())
        return images

    ensemble = bg.DeepEnsemble(plan().make, num_members=2)
    fit(ensemble, PART, epochs=1, device=torch.device("cpu"), augment=Augmentation(noted), adam=True)
    first, second = orders[1], orders[3]  # Each counts its rows in a pass before.
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("method", ["deterministic", "mc_dropout", "variational", "last_layer_variational"])
def test_training_under_autocast(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: bfloat16, and channels last."""
    plain = Predictor.fit

    def as_on_cuda(self: Predictor, data: AugmentedBatches, **settings: Any) -> Any:
        data.channels_last = True
        return plain(self, data, **{**settings, "precision": "bfloat16"})

    monkeypatch.setattr(Predictor, "fit", as_on_cuda)
    predictor = METHODS[method].build(plan("resnet20"))
    assert predictor.predict(PIXELS).probs.isfinite().all()


@pytest.mark.parametrize("kind", [bg.Deterministic, partial(bg.Variational, num_samples=2)])
def test_other_benchmarks_train_on_cifar10_by_the_recipe(kind: type[bg.Deterministic]) -> None:
    predictor = kind(SETTINGS["cifar10"].network(3, 3, 8))
    train(IMAGES, SETTINGS["cifar10"], 1, torch.device("cpu"), predictor)
    assert predictor.predict(PIXELS).probs.isfinite().all()
