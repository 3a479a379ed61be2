"""Networks that tests share: small, and each with one habit that wrappers get wrong."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """Tokens `[N, T]` -> logits `[N, 3]`; the encoder has a fast path in eval mode that skips dropout modules."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        if self.batch_first:
            return self.head(self.encoder(embedded).mean(dim=1))
        return self.head(self.encoder(embedded.transpose(0, 1)).mean(dim=0))


class Attention(nn.Module):
    """Features `[N, T, 8]` -> logits `[N, 3]`; dropout only on the attention weights."""

    def __init__(self, need_weights: bool = False, dropout: float = 0.3) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.need_weights = need_weights
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(attended.mean(dim=1))


class Recurrent(nn.Module):
    """Sequences `[N, T, 4]` -> logits `[N, 3]`; dropout only between the layers of the stack."""

    def __init__(self, kind: Any = nn.LSTM, batch_first: bool = True, packed: bool = False, layers: int = 3) -> None:
        super().__init__()
        self.batch_first, self.packed = batch_first, packed
        self.stack = kind(4, 6, layers, dropout=0.4 if layers > 1 else 0.0, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        if self.packed and lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.stack(packed)[0], batch_first=True)
            return self.head(out[:, 0])
        out, _ = self.stack(x)
        return self.head(out[:, -1] if self.batch_first else out[-1])


class FunctionalDropout(nn.Module):
    """`F.dropout` called with the module's own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.5, training=self.training))


class HiddenDropout(nn.Module):
    """Dropout behind `if self.training`: no call shows it."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.p = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.training else x


class Residual(nn.Module):
    """Images `[N, 1, 8, 8]` -> logits `[N, 5]`, with BatchNorm, a residual branch and in-place dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.channels = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.3)
        self.hidden, self.drop, self.head = (
            nn.Linear(256, 16),
            nn.Dropout(0.5, inplace=True),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        trunk = F.relu(self.norm(self.first(x)))
        trunk = trunk + self.channels(F.relu(self.second(trunk)))
        return self.head(F.relu(self.drop(self.hidden(trunk.flatten(1)))))


class DropPath(nn.Module):
    """Stochastic depth as the image models write it: gated by the module's flag, with a mask of its own."""

    def __init__(self, drop_prob: float = 0.5) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty(x.shape[0], *(1 for _ in x.shape[1:])).bernoulli_(1 - self.drop_prob)
        return x * mask / (1 - self.drop_prob)


def mlp(*modules: nn.Module, features: int = 8, classes: int = 3) -> nn.Sequential:
    """A two-layer perceptron with `modules` between the layers."""
    return nn.Sequential(nn.Linear(features, 32), nn.ReLU(), *modules, nn.Linear(32, classes))


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that a prediction might change."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "modes": [child.training for child in module.modules()],
        "grads": [parameter.grad is None for parameter in module.parameters()],
        "hooks": [len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules()],
        "requires": [parameter.requires_grad for parameter in module.parameters()],
    }


def unchanged(before: dict[str, Any], module: nn.Module) -> bool:
    """Whether a module is bit for bit what it was."""
    after = snapshot(module)
    same_state = before["state"].keys() == after["state"].keys() and all(
        torch.equal(value, after["state"][name]) for name, value in before["state"].items()
    )
    return same_state and all(before[key] == after[key] for key in before if key != "state")
