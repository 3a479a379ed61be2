"""What a network makes of its inputs: the inputs of its last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesguard.data import Data, batches, to_device
from bayesguard.errors import BadInput, BadType
from bayesguard.posteriors import DeepEnsemble, Deterministic, MCDropout
from bayesguard.training_setup import device_of, modes_kept
from bayesguard.weights import last_layer


def features(model: nn.Module, data: Data, *, batch_size: int | None = None) -> Tensor:
    """Return the inputs of the last layer that has parameters, for each row of a data set: features for `density_ratio`.

    Args:
        model: A network, a `Deterministic` or `MCDropout` predictor (dropout is off), or a `DeepEnsemble` (its first
            member's features).
        data: As for `predict`; targets are not used.
        batch_size: Rows a batch, where `data` holds arrays (default 256).

    Returns:
        `[N, F]` on the CPU, in the network's dtype; further axes of the layer's input are flattened.

    Raises:
        BadType: A predictor without one network.
        BadInput: A network that calls its last layer never, or several times for one batch.

    Examples:
        >>> network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> features(network, torch.zeros(4, 2)).shape
        torch.Size([4, 5])
    """
    network = _network(model)
    name = last_layer(network)
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())

    gathered: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with modes_kept(network), torch.no_grad():
            network.eval()
            reference = next(network.parameters())
            for batch in batches(data, batch_size=batch_size, numpy_dtype=reference.dtype):
                batch = to_device(batch, device_of(network))
                network(*batch.inputs, **batch.kwargs)
                if len(seen) != 1:
                    raise BadInput(
                        f"the network calls its last layer, {name!r}, {len(seen)} times for a batch, and has no one input "
                        "of it; compute features by hand"
                    )
                gathered.append(seen.pop().flatten(1).cpu())
    finally:
        handle.remove()
    return torch.cat(gathered)


def _network(model: nn.Module) -> nn.Module:
    if isinstance(model, DeepEnsemble):
        model = model.members[0]
    if isinstance(model, (Deterministic, MCDropout)):
        return model.network
    if hasattr(model, "calibrators") or not isinstance(model, nn.Module):
        raise BadType(
            f"features are those of a network, or of a Deterministic, MCDropout or DeepEnsemble predictor, got a "
            f"{type(model).__name__}"
        )
    return model
