"""The networks of the benchmarks: small, with dropout where their papers have it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesguard.sampling import seeded_default_generators


class SmallCNN(nn.Module):
    """Two convolutions and two dense layers, for grey images of any size: `[N, C, H, W]` -> logits `[N, K]`.

    Dropout after the pooling and before the last layer, as in the LeNet of Ovadia et al. (2019).
    """

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.25) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(rate),
            nn.Linear(32 * (side // 2) ** 2, 64),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class ResNet20(nn.Module):
    """The CIFAR ResNet of 20 layers (He et al. 2016, CVPR, section 4.2), with dropout before the last layer.

    `block_rate` is that of dropout between the convolutions of each block.
    """

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.1, block_rate: float = 0.0) -> None:
        super().__init__()
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        blocks = [
            Block(before if index == 0 else width, width, stride if index == 0 else 1, block_rate)
            for before, width, stride in widths
            for index in range(3)
        ]
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(rate), nn.Linear(64, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits


class Block(nn.Module):
    """Two 3 x 3 convolutions, with dropout of a rate between them, beside a shortcut (1 x 1 where the shape changes)."""

    def __init__(self, before: int, width: int, stride: int, rate: float = 0.0) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *([nn.Dropout(rate)] if rate else []),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        changes = stride != 1 or before != width
        self.shortcut = (
            nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.branch(x) + self.shortcut(x)).relu()
        return out


class LeNet(nn.Sequential):
    """The LeNet of Ovadia et al. (2019): two 3 x 3 convolutions (32, 64), and two dense layers with dropout before each."""

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.2854) -> None:
        super().__init__(
            nn.Conv2d(channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(rate),
            nn.Linear(64 * ((side - 4) // 2) ** 2, 128),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(128, num_classes),
        )


class MLP(nn.Sequential):
    """The MLP of Ovadia et al. (2019): two hidden layers of 200 units, dropout before every dense layer."""

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.2305) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Dropout(rate),
            nn.Linear(channels * side**2, 200),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(200, num_classes),
        )


class LeNet5(nn.Sequential):
    """The LeNet of Daxberger et al. (2021, Laplace redux): 5 x 5 convolutions (6, 16), dense layers (120, 84).

    Theirs has no dropout; here there is one before each of the last two layers, which a rate of 0 leaves out.
    """

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.2) -> None:
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (((side - 4) // 2 - 4) // 2) ** 2, 120),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(84, num_classes),
        )


class WideLeNet5(nn.Sequential):
    """The LeNet-5 of google/uncertainty-baselines: padded 5 x 5 convolutions (6, 16, 120), a dense layer of 84 units."""

    def __init__(self, channels: int, num_classes: int, side: int, rate: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(rate),
            nn.Linear(120 * (side // 4) ** 2, 84),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(84, num_classes),
        )


def seeded(make: Callable[[int], nn.Module], seed: int) -> nn.Module:
    """Return a network whose first weights follow from the seed; torch's own generators go on as they were."""
    with seeded_default_generators(torch.device("cpu"), seed, "network"):
        return make(seed)
