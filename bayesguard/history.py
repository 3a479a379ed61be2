"""What a training came to, epoch by epoch."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data came to.

    Attributes:
        epoch: Its number, from 1.
        train_loss: Mean of the objective over the rows, in nats, as it was while training.
        validation_nll: Mean NLL of the held-out data after the epoch, in nats; None without such data.
        learning_rate: Learning rate of the optimizer's first group during the epoch.
        seconds: Wall-clock time, validation included; left out of comparisons.
    """

    epoch: int
    train_loss: float
    validation_nll: float | None
    learning_rate: float
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class History:
    """The epochs of one training, or of all members of an ensemble.

    Attributes:
        epochs: One record an epoch.
        stopped_early: Whether training ended for want of a better validation NLL.
        members: The histories of an ensemble's members, where each has its own.
    """

    epochs: tuple[Epoch, ...] = ()
    stopped_early: bool = False
    members: tuple["History", ...] = ()

    def __len__(self) -> int:
        return len(self.epochs)

    @property
    def best_epoch(self) -> int | None:
        """Number of the first epoch with the lowest validation NLL; without validation data, of the last."""
        scored = [(epoch.validation_nll, epoch.epoch) for epoch in self.epochs if epoch.validation_nll is not None]
        return min(scored)[1] if scored else self.epochs[-1].epoch if self.epochs else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, ready for JSON."""
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "members": [member.to_dict() for member in self.members],
        }
