"""Augmentation of whole batches of images `[N, C, H, W]` in [0, 1], on the device where they are.

Every image of a batch draws its own operation and its own strength, from the generator that is handed in.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from bayesguard.benchmarks.image_operations import AUGMIX, RANDAUGMENT, applied
from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.sampling import stream

Augment = Callable[[Tensor, Generator], Tensor]
Mix = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]

# Largest strength of an operation of AugMix, of 10: the severity 3 of the published code.
_AUGMIX_LEVEL = 0.3


def flip(images: Tensor, generator: Generator, probability: float = 0.5) -> Tensor:
    """Mirror each image from left to right with a probability."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < probability
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Cut from each image, with a border of zeros around it, a window of its own size."""
    check_count(padding, "padding", minimum=0)
    count, _, height, width = images.shape
    size = (2, count, 1, 1)
    top, left = torch.randint(2 * padding + 1, size, generator=generator, device=images.device)
    rows = top + torch.arange(height, device=images.device).view(1, -1, 1)
    columns = left + torch.arange(width, device=images.device).view(1, 1, -1)
    first = torch.arange(count, device=images.device).view(-1, 1, 1)
    windows = pad(images, [padding] * 4).permute(0, 2, 3, 1)[first, rows, columns]
    return windows.permute(0, 3, 1, 2)


def flip_and_crop(images: Tensor, generator: Generator) -> Tensor:
    """Mirror at random and cut at random from a border of four zeros: the augmentation of He et al. (2016)."""
    return random_crop(flip(images, generator), generator)


class Mixed(NamedTuple):
    """Pairs of images mixed: the images, the classes of both, and the share `[N]` of the first."""

    images: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    def soft_targets(self, num_classes: int) -> Tensor:
        """Return the probability of each class `[N, K]`."""
        classes = torch.arange(num_classes, device=self.first.device)
        first, second = ((labels.unsqueeze(1) == classes).to(self.share) for labels in (self.first, self.second))
        return torch.lerp(second, first, self.share.unsqueeze(1))


def mixup(images: Tensor, labels: Tensor, generator: Generator, alpha: float = 1.0) -> Mixed:
    """Mix each image with another one of the batch, with shares of Beta(alpha, alpha).

    H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz (2018). mixup: beyond empirical risk minimization. ICLR.

    `augmented.training_batches` trains a predictor with it.
    """
    if not alpha > 0:
        raise BadInput(f"alpha must be above 0, got {alpha}")
    share = beta(alpha, len(images), generator).to(images)
    # On the images' device, as the generator is.
    other = torch.randperm(len(images), generator=generator, device=images.device)
    mixed = torch.lerp(images[other], images, share.view(-1, 1, 1, 1))
    return Mixed(mixed, labels, labels[other], share)


def augmix(images: Tensor, generator: Generator, *, width: int = 3, depth: int | None = None) -> Tensor:
    """Mix each image with `width` chains of operations of its own.

    D. Hendrycks, N. Mu, E. D. Cubuk, B. Zoph, J. Gilmer, B. Lakshminarayanan (2020). AugMix. ICLR. The chains are mixed with
    shares of Dirichlet(1, ..., 1) and their mixture with the image by a share of Beta(1, 1). The nine operations are those
    of the paper, without the ones that overlap with the corruptions of CIFAR-10-C (colour, contrast, brightness, sharpness).

    Args:
        images: `[N, C, H, W]` in [0, 1].
        generator: On the device of the images.
        width: Chains.
        depth: Operations in each chain; None for 1, 2 or 3 at random.

    Returns:
        Images of the same shape, in [0, 1].
    """
    check_count(width, "width")
    if depth is not None:
        check_count(depth, "depth")
    count, device = len(images), images.device
    shares = dirichlet(width, count, generator).to(images)
    depths = torch.randint(1, 4, (width, count), generator=generator, device=device)
    mixture = torch.zeros_like(images)
    for chain in range(width):
        moved = images
        for step in range(3 if depth is None else depth):
            kinds = torch.randint(len(AUGMIX), (count,), generator=generator, device=device)
            uniform = torch.rand(count, generator=generator, device=device)
            # Strengths from 0.1 of 10 on, as published.
            levels = 0.01 + (_AUGMIX_LEVEL - 0.01) * uniform
            further = applied(moved, kinds, levels, AUGMIX, generator)
            going = (step < depths[chain]) if depth is None else torch.ones_like(kinds, dtype=torch.bool)
            moved = torch.where(going.view(-1, 1, 1, 1), further, moved)
        mixture += shares[:, chain].view(-1, 1, 1, 1) * moved
    weight = torch.rand(count, generator=generator, device=device).to(images).view(-1, 1, 1, 1)
    return torch.lerp(images, mixture, weight).clamp(0, 1)


def randaugment(images: Tensor, generator: Generator, *, num_operations: int = 2, level: float = 0.3) -> Tensor:
    """Apply to each image some operations of its own, all of one strength.

    E. D. Cubuk, B. Zoph, J. Shlens, Q. V. Le (2020). RandAugment. NeurIPS. Some of its operations are corruptions of
    CIFAR-10-C: networks that are trained with it have seen part of those.

    Args:
        images: `[N, C, H, W]` in [0, 1].
        generator: On the device of the images.
        num_operations: One after another.
        level: Strength, from 0 to 1 (the magnitude of the paper divided by 30).
    """
    check_count(num_operations, "num_operations", minimum=0)
    if not 0 <= level <= 1:
        raise BadInput(f"level must be from 0 to 1, got {level}")
    levels = torch.full((len(images),), level, device=images.device)
    for _ in range(num_operations):
        kinds = torch.randint(len(RANDAUGMENT), (len(images),), generator=generator, device=images.device)
        images = applied(images, kinds, levels, RANDAUGMENT, generator)
    return images


def augmix_flip_and_crop(images: Tensor, generator: Generator) -> Tensor:
    """Mirror, cut, then AugMix, in the order of the published code."""
    return augmix(flip_and_crop(images, generator), generator)


def jensen_shannon(logits: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence between what is said to several views of the same images, in nats.

    The consistency loss of AugMix, whose views are the image and two mixtures of it, with a factor of 12.

    Args:
        logits: `[V, N, K]`, V views.
    """
    log_probs = logits.log_softmax(-1)
    mean = (log_probs.exp().mean(0)).clamp_min(1e-7).log()
    return (log_probs.exp() * (log_probs - mean)).sum(-1).mean()


def dirichlet(size: int, count: int, generator: Generator) -> Tensor:
    """Draw `[count, size]` shares that are uniform on the simplex."""
    weights = torch.empty(count, size, device=generator.device).exponential_(generator=generator)
    return weights / weights.sum(1, keepdim=True)


def beta(alpha: float, count: int, generator: Generator) -> Tensor:
    """Draw `[count]` shares of Beta(alpha, alpha)."""
    # torch's distributions take no generator. In float64, since both of two small gammas may underflow.
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=generator.device)
    first, second = torch._standard_gamma(shape, generator=generator).clamp_min(torch.finfo(torch.float64).tiny)
    return first / (first + second)


class AugmentedBatches:
    """Images in a new order and augmented anew on each pass, as `(images, labels)`, for `Predictor.fit`.

    The images lie on one device as a whole and are augmented there. `fit` counts the rows in one pass more.

    Args:
        images: `[N, C, H, W]` in [0, 1].
        labels: `[N]`.
        batch_size: Rows a batch; the last may have fewer.
        augment: `(images, generator) -> images`; None for the new order only.
        seed: With it, passes follow from it and the epoch (`set_epoch`). None: each pass follows torch's default generator at
            its beginning, as that of a DataLoader does; `fit` seeds that for each epoch and member of an ensemble.
        mix: `(images, labels, generator) -> (images, targets)`, after `augment`; None for the labels as they are.
        channels_last: Lay batches out with the channels last in memory, which tensor cores are faster with.

    Raises:
        BadInput: Images and labels of different numbers, or none.

    Examples:
        >>> batches = AugmentedBatches(torch.rand(10, 3, 8, 8), torch.arange(10), 4, flip, seed=0)
        >>> len(batches), [len(labels) for _, labels in batches]
        (3, [4, 4, 2])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        augment: Augment | None = None,
        seed: int | None = None,
        *,
        mix: Mix | None = None,
        channels_last: bool = False,
    ) -> None:
        if images.dim() != 4 or not len(images) or labels.shape != images.shape[:1]:
            raise BadInput(
                f"images must be [N, C, H, W] and labels [N], with N of 1 or more; got shapes {tuple(images.shape)} and "
                f"{tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels.to(images.device)
        self.batch_size, self.augment = check_count(batch_size, "batch_size"), augment
        self.seed, self.mix, self.channels_last = seed, mix, channels_last
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    @property
    def sampler(self) -> "AugmentedBatches":
        """Where training looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # As a DataLoader: one number of the default generator for a whole pass.
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed
        generator = stream(self.images.device, seed, "pass", self.epoch)
        order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
        for rows in order.split(self.batch_size):
            images, targets = self.images[rows], self.labels[rows]
            if self.augment is not None:
                images = self.augment(images, generator)
            if self.mix is not None:
                images, targets = self.mix(images, targets, generator)
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            yield images.contiguous(memory_format=layout), targets
