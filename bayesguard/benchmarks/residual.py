"""Residual networks for images of 32 pixels, as the papers that the benchmarks are set beside use them."""

from functools import partial
from typing import Protocol

from torch import Tensor, nn

from bayesguard.benchmarks.networks import Block, ResNet20, SmallCNN
from bayesguard.errors import BadInput


class ResNet18(nn.Module):
    """The ResNet of 18 layers (He et al. 2016, CVPR) with the stem for small images: a 3 x 3 convolution, no pooling.

    11.17 million parameters for ten classes.

    Args:
        channels: Of the images.
        num_classes: Logits.
        rate: Dropout between the convolutions of each block.
        head_rate: Dropout before the last layer.
    """

    def __init__(self, channels: int, num_classes: int, rate: float = 0.0, head_rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        blocks, before = [], 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Block(before, width, stride, rate), Block(width, width, 1, rate)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _head(before, num_classes, head_rate)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits


class WideResNet(nn.Module):
    """WRN-depth-widening (Zagoruyko and Komodakis 2016, BMVC): blocks that normalise and rectify before each convolution.

    For ten classes WRN-16-4 has 2.75 million parameters and WRN-28-10 36.5 million.

    Args:
        channels: Of the images.
        num_classes: Logits.
        depth: 6 n + 4 layers, for n blocks in each of three groups.
        widening: Factor on the widths 16, 32, 64.
        rate: Dropout between the convolutions of each block, as in the paper.
        head_rate: Dropout before the last layer.

    Raises:
        BadInput: A depth of another form.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        depth: int,
        widening: int,
        rate: float = 0.0,
        head_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise BadInput(f"depth must be 6 n + 4 (10, 16, 22, 28, ...), got {depth}")
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, before = [], 16
        for width, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(before, width, stride if index == 0 else 1, rate))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.head = _head(before, num_classes, head_rate)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.stem(images))))
        return logits


class WideBlock(nn.Module):
    """Normalise, rectify, convolve, twice; the shortcut starts from the rectified input where the shape changes."""

    def __init__(self, before: int, width: int, stride: int, rate: float) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *([nn.Dropout(rate)] if rate else []),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        changes = stride != 1 or before != width
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm(x)
        out: Tensor = self.branch(active) + (x if self.shortcut is None else self.shortcut(active))
        return out


def _head(width: int, num_classes: int, rate: float) -> nn.Sequential:
    dropout = [nn.Dropout(rate)] if rate else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *dropout, nn.Linear(width, num_classes))


class MakeNetwork(Protocol):
    """What makes a network for images, with a dropout rate inside and one before the last layer."""

    def __call__(
        self, channels: int, num_classes: int, side: int, rate: float = 0.0, head_rate: float = 0.0
    ) -> nn.Module:
        """Return the network."""


def _small_cnn(channels: int, num_classes: int, side: int, rate: float = 0.0, head_rate: float = 0.0) -> nn.Module:
    # It has one rate for both of its places.
    return SmallCNN(channels, num_classes, side, max(rate, head_rate))


def _resnet20(channels: int, num_classes: int, side: int, rate: float = 0.0, head_rate: float = 0.0) -> nn.Module:
    return ResNet20(channels, num_classes, side, head_rate, rate)


def _resnet18(channels: int, num_classes: int, side: int, rate: float = 0.0, head_rate: float = 0.0) -> nn.Module:
    return ResNet18(channels, num_classes, rate, head_rate)


def _wide(
    depth: int,
    widening: int,
    channels: int,
    num_classes: int,
    side: int,
    rate: float = 0.0,
    head_rate: float = 0.0,
) -> nn.Module:
    return WideResNet(channels, num_classes, depth=depth, widening=widening, rate=rate, head_rate=head_rate)


NETWORKS: dict[str, MakeNetwork] = {
    "small_cnn": _small_cnn,
    "resnet20": _resnet20,
    "resnet18": _resnet18,
    "wrn-16-4": partial(_wide, 16, 4),
    "wrn-28-10": partial(_wide, 28, 10),
}


def num_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters, each shared one once.

    Examples:
        >>> num_parameters(nn.Linear(4, 3))
        15
    """
    return sum(parameter.numel() for parameter in module.parameters())
