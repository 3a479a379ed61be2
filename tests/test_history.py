"""The record of a training says which epoch was best, in plain numbers."""

import json
import math

from bayesguard.history import Epoch, History


def test_history_speaks_plainly() -> None:
    epochs = tuple(Epoch(i + 1, 1.0, nll, 0.1, 0.5) for i, nll in enumerate([2.0, 1.0, 1.0, math.inf]))
    history = History(epochs)
    assert (len(history), history.best_epoch) == (4, 2)
    assert json.loads(json.dumps(history.to_dict()))["epochs"][1]["validation_nll"] == 1.0
    assert History().best_epoch is None
    assert History((Epoch(1, 1.0, None, 0.1, 0.5),)).best_epoch == 1
    assert epochs[0] == Epoch(1, 1.0, 2.0, 0.1, 99.0)
