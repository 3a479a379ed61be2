"""Augmentations by name, and training with them: on images that are changed, or on pairs that are mixed, whose targets are soft."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from bayesguard.benchmarks.augmentation import (
    Augment,
    AugmentedBatches,
    augmix_flip_and_crop,
    flip_and_crop,
    mixup,
    randaugment,
)
from bayesguard.errors import BadInput
from bayesguard.likelihoods import Categorical
from bayesguard.predictor import Predictor


class Augmentation(NamedTuple):
    """What is done to the images of a batch, and whether pairs of them are then mixed (`mixup`)."""

    images: Augment | None
    mixes: bool = False


def randaugment_flip_and_crop(images: Tensor, generator: Generator) -> Tensor:
    """Mirror, cut, then RandAugment."""
    return randaugment(flip_and_crop(images, generator), generator)


AUGMENTATIONS = {
    "none": Augmentation(None),
    "flip_crop": Augmentation(flip_and_crop),
    "augmix": Augmentation(augmix_flip_and_crop),
    "randaugment": Augmentation(randaugment_flip_and_crop),
    "mixup": Augmentation(flip_and_crop, mixes=True),
}


def check_augment(name: str) -> None:
    """Raise BadInput for an unknown augmentation."""
    if name not in AUGMENTATIONS:
        raise BadInput(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {name!r}")


class SoftCategorical(Categorical):
    """`Categorical` whose targets may be probabilities `[N, K]` as well as labels `[N]`.

    The log density of an example is then the mean log probability under its target, minus the loss of mixup: of a pair with
    shares s and 1 - s, s times that of one class and 1 - s times that of the other.

    Examples:
        >>> SoftCategorical().loss(torch.zeros(1, 4), torch.tensor([[0.25, 0.75, 0.0, 0.0]])).item()  # log 4
        1.3862943649291992
    """

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return labels, or probabilities that sum to 1."""
        if not targets.is_floating_point():
            return super().check_targets(outputs, targets)
        shape = self.logits(outputs).shape
        if targets.shape != shape:
            raise BadInput(
                f"soft targets must have the shape of the logits, {tuple(shape)}, got {tuple(targets.shape)}"
            )
        sums = targets.sum(-1)
        if bool((targets < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            raise BadInput("soft targets must be probabilities: at least 0, with a sum of 1 in each row")
        return targets

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean log probability under each target, in nats `[N]`."""
        if not targets.is_floating_point():
            return super().log_prob(outputs, targets)
        # As for labels: autocast never lowers the precision of a loss.
        with torch.autocast(outputs.device.type, enabled=False):
            log_probs = self.logits(outputs).float().log_softmax(-1)
            return (self.check_targets(outputs, targets) * log_probs).sum(-1)


@contextmanager
def training_batches(
    predictor: Predictor,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    augmentation: Augmentation,
    *,
    channels_last: bool = False,
) -> Iterator[AugmentedBatches]:
    """Yield the batches to train on; where pairs are mixed, the predictor's likelihood takes soft targets meanwhile.

    Args:
        predictor: To be trained, an ensemble with all its members.
        images: `[N, C, H, W]` in [0, 1].
        labels: `[N]`, all classes among them.
        batch_size: Rows a batch.
        augmentation: One of `AUGMENTATIONS`.
        channels_last: As of `AugmentedBatches`.
    """
    batches = partial(AugmentedBatches, images, labels, batch_size, augmentation.images, channels_last=channels_last)
    if not augmentation.mixes:
        yield batches()
        return
    owners = [module for module in predictor.modules() if isinstance(module, Predictor)]
    before = [owner.likelihood for owner in owners]
    try:
        for owner in owners:
            owner.likelihood = SoftCategorical()
        yield batches(mix=partial(_mixed, int(labels.max()) + 1))
    finally:
        for owner, likelihood in zip(owners, before, strict=True):
            owner.likelihood = likelihood


def _mixed(num_classes: int, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    mixed = mixup(images, labels, generator)
    return mixed.images, mixed.soft_targets(num_classes)
