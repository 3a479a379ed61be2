"""The networks that are timed, each with its two parts: what precedes the first dropout, and the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from bayesguard.benchmarks.networks import Block
from bayesguard.sampling import seeded_default_generators


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, inputs for it, and its parts as modules of their own, for the measured limit.

    Args:
        key: Name on the command line.
        title: Name in the table.
        network: The network, with dropout.
        inputs: A batch `[N, ...]`.
        before: What precedes the first dropout; takes `inputs`.
        after: The rest; takes what `before` returns.
    """

    key: str
    title: str
    network: nn.Module
    inputs: Tensor
    before: nn.Module
    after: nn.Module


class Split(nn.Module):
    """Two parts, one after the other."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.after(self.before(inputs))
        return outputs


class States(nn.Module):
    """An LSTM that returns its states `[N, T, H]` only."""

    def __init__(self, size: int, layers: int = 1, rate: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, size, layers, dropout=rate, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.lstm(inputs)[0]
        return states


class LastStep(nn.Module):
    """The last of the steps `[N, T, H]`."""

    def forward(self, states: Tensor) -> Tensor:
        return states[:, -1]


class MeanStep(nn.Module):
    """The mean over the steps `[N, T, H]`."""

    def forward(self, states: Tensor) -> Tensor:
        return states.mean(1)


def _dropout(rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if rate else []


def mlp(sizes: tuple[int, ...] = (784, 1024, 1024, 10), rate: float = 0.5) -> Split:
    """A perceptron with dropout after each hidden ReLU; without dropout modules where the rate is 0."""
    hidden: list[nn.Module] = []
    for before, size in pairwise(sizes[1:-1]):
        hidden += [*_dropout(rate), nn.Linear(before, size), nn.ReLU()]
    after = nn.Sequential(*hidden, *_dropout(rate), nn.Linear(sizes[-2], sizes[-1]))
    return Split(nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU()), after)


def lenet(rate: float = 0.5) -> Split:
    """LeNet-5 (LeCun et al. 1998) for 28 x 28 pixels, with ReLU, max pooling and dropout before each dense layer."""
    before = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    )
    after = nn.Sequential(
        *(*_dropout(rate), nn.Linear(400, 120), nn.ReLU()),
        *(*_dropout(rate), nn.Linear(120, 84), nn.ReLU()),
        *(*_dropout(rate), nn.Linear(84, 10)),
    )
    return Split(before, after)


def resnet18(rate: float = 0.1) -> Split:
    """ResNet-18 (He et al. 2016) with a 3 x 3 stem for 32 x 32 pixels, and dropout before the last layer only."""
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = [block for start, end, stride in widths for block in (Block(start, end, stride), Block(end, end, 1))]
    before = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return Split(before, nn.Sequential(nn.Dropout(rate), nn.Linear(512, 10)))


def transformer(rate: float = 0.1) -> Split:
    """A six-layer encoder, d = 128, four heads, with dropout after the embedding and everywhere inside."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, rate, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return Split(nn.Linear(128, 128), nn.Sequential(nn.Dropout(rate), encoder, MeanStep(), nn.Linear(128, 10)))


def lstm(rate: float = 0.1) -> nn.Module:
    """Two recurrent layers of 128 units with dropout between them."""
    return nn.Sequential(States(128, 2, rate), LastStep(), nn.Linear(128, 10))


def _lstm_parts() -> tuple[nn.Module, nn.Module]:
    # One kernel runs both layers; for the limit each is a module of its own, of the same sizes.
    return States(128), nn.Sequential(States(128), LastStep(), nn.Linear(128, 10))


@dataclass(frozen=True)
class _Recipe:
    title: str
    make: Callable[[], nn.Module]
    rows: int
    shape: tuple[int, ...]


RECIPES = {
    "resnet18": _Recipe("ResNet-18", resnet18, 128, (3, 32, 32)),
    "lenet": _Recipe("LeNet", lenet, 512, (1, 28, 28)),
    "mlp": _Recipe("MLP 784-1024-1024-10", mlp, 512, (784,)),
    "transformer": _Recipe("transformer, 6 layers", transformer, 64, (32, 128)),
    "lstm": _Recipe("LSTM, 2 layers", lstm, 64, (32, 128)),
}


def subject(key: str, device: torch.device, *, quick: bool = False) -> Subject:
    """Build one of `RECIPES` with its inputs; `quick` takes a small part of the rows."""
    recipe = RECIPES[key]
    rows = max(4, recipe.rows // 32) if quick else recipe.rows
    with seeded_default_generators(torch.device("cpu"), 0, "speed", key):
        network = recipe.make()
        before, after = (network.before, network.after) if isinstance(network, Split) else _lstm_parts()
        inputs = torch.randn(rows, *recipe.shape)
    parts = (module.to(device).eval() for module in (network, before, after))
    network, before, after = parts
    return Subject(key, f"{recipe.title}, N={rows}", network, inputs.to(device), before, after)


def members(make: Callable[[], nn.Module], count: int, device: torch.device) -> list[nn.Module]:
    """Build networks that differ by their initialisation, in eval mode."""
    made: list[nn.Module] = []
    for index in range(count):
        with seeded_default_generators(torch.device("cpu"), index, "speed member"):
            made.append(make().to(device).eval())
    return made
