"""Networks put together at random from steps that sampling engines get wrong, for comparisons of fast ways with slow ones."""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, STEPS, CHANNELS, PIXELS = 8, 4, 4, 5
Function = Callable[..., Tensor]


class Step(nn.Module):
    """A function of the input and of some modules."""

    def __init__(self, name: str, function: Function, *modules: nn.Module) -> None:
        super().__init__()
        self.name, self.function, self.parts = name, function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


class RandomNetwork(nn.Module):
    """Two to six steps of one kind of data: vectors, sequences or images; then dropout and a linear layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.choose = random.Random(seed)
        self.kind, own = self.choose.choice((("vectors", _VECTORS), ("sequences", _SEQUENCES), ("images", _IMAGES)))
        steps = (*own, *_PLAIN, *_MASKED)
        self.steps = nn.ModuleList(self.choose.choice(steps)(self.choose) for _ in range(self.choose.randint(2, 6)))
        self.has_prefix = self.choose.random() < 0.5
        shape = {"vectors": (WIDTH,), "sequences": (STEPS, WIDTH), "images": (CHANNELS, PIXELS, PIXELS)}[self.kind]
        self.first = (
            (nn.Conv2d(CHANNELS, CHANNELS, 1) if self.kind == "images" else nn.Linear(WIDTH, WIDTH))
            if self.has_prefix
            else None
        )
        self.shape = shape
        self.last, self.head = (
            nn.Dropout(0.2),
            nn.Linear(shape[0] if self.kind == "images" else WIDTH, 3),
        )
        if self.choose.random() < 0.2:
            self.steps[0].register_forward_hook(lambda module, given, output: output * 1.25)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        self.double().eval()

    def __repr__(self) -> str:
        return " > ".join(str(step.name) for step in self.steps)

    def data(self, rows: int) -> Tensor:
        """Return inputs for that many rows."""
        return torch.randn(rows, *self.shape, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0 if self.first is None else self.first(x)
        for step in self.steps:
            x = step(x)
        if self.kind != "vectors":
            x = x.mean(dim=1 if self.kind == "sequences" else (2, 3))
        logits: Tensor = self.head(self.last(x))
        return logits


Make = Callable[[random.Random], Step]


def _dropped_in_place(x: Tensor, drop: nn.Module) -> Tensor:
    drop(x)
    return x


def _branch(x: Tensor) -> Tensor:
    return x * 2 if x.flatten()[0].item() > 0 else x * 0.5


def _where(x: Tensor) -> Tensor:
    positive = x.flatten(1).sum(1) > 0
    return torch.where(positive.view(-1, *(1 for _ in x.shape[1:])), x, -x)


def _held(x: Tensor) -> Tensor:
    held = torch.zeros_like(x)
    held.add_(x)
    return held.add_(x)


def _tied(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(layer(x).tanh(), layer.weight.t())  # type: ignore[operator]


def _twice(x: Tensor, drop: nn.Module, layer: nn.Module) -> Tensor:
    dropped = drop(x)
    return layer(dropped) + layer(dropped.relu()) + dropped


def _changed_behind(x: Tensor, drop: nn.Module, layer: nn.Module) -> Tensor:
    dropped = drop(x)
    first = layer(dropped)
    dropped.relu_()
    return first + dropped


def _attention(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x, x, x)[0]


def _causal(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
    return (
        F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.25, is_causal=True).transpose(1, 2).flatten(2)
    )


def _units_first(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x.transpose(1, 2)).transpose(1, 2)
    return x


def _chain(x: Tensor, *layers: nn.Module) -> Tensor:
    return nn.Sequential(*layers)(x)


def _of(name: str, function: Function, *makes: Callable[[], nn.Module]) -> Make:
    return lambda choose: Step(name, function, *(make() for make in makes))


def _dropout() -> nn.Module:
    return nn.Dropout(0.5)


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _conv() -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


_MASKED: tuple[Make, ...] = (
    lambda choose: Step("dropout", _chain, nn.Dropout(choose.choice((0.02, 0.3, 0.5)), inplace=choose.random() < 0.3)),
    _of("alpha dropout", _chain, lambda: nn.AlphaDropout(0.3)),
    _of("residual dropout", lambda x, drop: x + drop(x), _dropout),
    _of("two dropouts of one", lambda x, one, other: one(x) + other(x), _dropout, lambda: nn.Dropout(0.3)),
    _of("dropout in place, result ignored", _dropped_in_place, lambda: nn.Dropout(0.4, inplace=True)),
)
_PLAIN: tuple[Make, ...] = (
    _of("relu_", lambda x: F.relu(x, inplace=True)),
    _of("add_ to the input", lambda x: x.add_(0.25)),
    _of("out=", lambda x: torch.add(x, 1.0, out=torch.empty_like(x))),
    _of("branch on a number", _branch),
    _of("where by row", _where),
    _of("sum in place", _held),
)
_VECTORS: tuple[Make, ...] = (
    _of("linear", _chain, _linear),
    _of("narrow", _chain, lambda: nn.Linear(WIDTH, 2), lambda: nn.Linear(2, WIDTH)),
    _of("norms", _chain, lambda: nn.BatchNorm1d(WIDTH), lambda: nn.LayerNorm(WIDTH), lambda: nn.GroupNorm(2, WIDTH)),
    _of("tied", _tied, _linear),
    _of("dropout used twice", _twice, _dropout, _linear),
    _of("dropout changed behind its use", _changed_behind, _dropout, _linear),
    _of("dropout on both sides", _chain, _dropout, _linear, nn.ReLU, _dropout, _linear),
    _of("weight norm", _chain, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
)
_SEQUENCES: tuple[Make, ...] = (
    _of("lstm, dropout", lambda x, layer: layer(x)[0], lambda: nn.LSTM(WIDTH, WIDTH, 2, dropout=0.4, batch_first=True)),
    _of("attention, dropout", _attention, lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)),
    _of("encoder, dropout", _chain, lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.2, batch_first=True)),
    _of("causal attention, dropout", _causal),
    _of("one mask for all steps, dropout", lambda x, drop: x * drop(x.new_ones(len(x), 1, WIDTH)), _dropout),
    _of(
        "steps and rows in one axis, dropout", lambda x, drop: drop(x.flatten(0, 1)).unflatten(0, x.shape[:2]), _dropout
    ),
    _of("convolution, dropout", _units_first, lambda: nn.Dropout1d(0.4), lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
)
_IMAGES: tuple[Make, ...] = (
    _of("convolution", _chain, _conv),
    _of("norms", _chain, lambda: nn.BatchNorm2d(CHANNELS), lambda: nn.GroupNorm(2, CHANNELS)),
    _of(
        "dropout of channels on both sides",
        _chain,
        lambda: nn.Dropout2d(0.5),
        _conv,
        nn.ReLU,
        lambda: nn.Dropout2d(0.5),
        _conv,
    ),
    _of("pooled dropout", _chain, _conv, lambda: nn.Dropout2d(0.5), lambda: nn.MaxPool2d(3, 1, 1), _conv),
    _of("alpha dropout of channels", _chain, lambda: nn.FeatureAlphaDropout(0.3)),
    _of("channels last", lambda x: x.contiguous(memory_format=torch.channels_last)),
    _of(
        "circular dropout",
        _chain,
        lambda: nn.Dropout2d(0.4),
        lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"),
    ),
    _of(
        "transposed dropout",
        _chain,
        lambda: nn.Dropout2d(0.4),
        lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1),
    ),
)
