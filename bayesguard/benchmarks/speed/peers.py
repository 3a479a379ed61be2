"""Other libraries, each through its public interface, and each left out with a line where it cannot run."""

import sys
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any, TypeVar
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput

Draws = Callable[[int], Tensor]  # number of draws -> outputs [S, N, K]
DropoutMaker = Callable[[nn.Module, Tensor], Mapping[str, Draws]]

Peer = TypeVar("Peer")
Value = TypeVar("Value")

PACKAGES = (
    *("torch-uncertainty", "bayesian-torch", "blitz-bayesian-pytorch", "posteriors", "pyro-ppl"),
    *("baal", "netcal", "torchmetrics"),
)

_TORCHVISION = tuple(
    "torchvision" + part
    for part in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".utils")
)


def collect(
    makers: Mapping[str, Callable[..., Mapping[str, Peer]]], *arguments: Any, say: Callable[[str], None]
) -> dict[str, Peer]:
    """Return what the makers make, leaving out, with a line, those whose package is missing or refuses."""
    found: dict[str, Peer] = {}
    for name, maker in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.update(maker(*arguments))
        except ImportError as error:
            say(f"skipped {name}: {error}")
        except Exception as error:
            say(f"skipped {name}: it refused with {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return found


def quiet(call: Callable[[], Value]) -> Callable[[], Value]:
    """Return the call with its warnings switched off: they are about the peer's own use of other libraries."""

    def called() -> Value:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return called


def torch_uncertainty(part: str) -> Any:
    """Import a module of torch-uncertainty.

    It imports torchvision for its image transforms, which nothing that is timed here touches; where torchvision does
    not load, an empty stand-in takes its place during this import only.
    """
    import_module("torchmetrics")  # asks whether torchvision is there: before the stand-in is
    try:
        import_module("torchvision")
        missing: tuple[str, ...] = ()
    except Exception:
        missing = _TORCHVISION
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        return import_module(f"torch_uncertainty.{part}")
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def dropout_by_torch_uncertainty(network: nn.Module, inputs: Tensor) -> dict[str, Draws]:
    """Its `mc_dropout`, with the draws in the batch (its default) and in a loop."""
    mc_dropout = torch_uncertainty("methods").mc_dropout
    # Built once here, so that a network without dropout modules is refused now.
    mc_dropout(deepcopy(network), 1)

    def predict(count: int, on_batch: bool) -> Tensor:
        wrapped = wrappers.get((count, on_batch))
        if wrapped is None:
            wrapped = mc_dropout(deepcopy(network), count, on_batch=on_batch).eval()
            wrappers[count, on_batch] = wrapped
        with torch.no_grad():
            outputs: Tensor = wrapped(inputs)
            return outputs.unflatten(0, (count, -1))

    wrappers: dict[tuple[int, bool], Any] = {}
    return {
        "torch-uncertainty, batch": lambda count: predict(count, True),
        "torch-uncertainty, loop": lambda count: predict(count, False),
    }


def dropout_by_baal(network: nn.Module, inputs: Tensor) -> dict[str, Draws]:
    """Its `MCDropoutModule` in a `ModelWrapper`, with the draws in the batch (its default) and in a loop."""
    wrapper = import_module("baal.modelwrapper")
    make = import_module("baal.bayesian.dropout").MCDropoutModule
    if not any(isinstance(module, nn.Dropout) for module in network.modules()):
        raise BadInput("the network has no dropout modules that it could replace")
    module = make(deepcopy(network)).eval()

    def predict(count: int, replicate: bool) -> Tensor:
        settings = wrapper.TrainingArgs(use_cuda=inputs.is_cuda, replicate_in_memory=replicate)
        outputs: Tensor = wrapper.ModelWrapper(module, settings).predict_on_batch(inputs, iterations=count)
        return outputs.movedim(-1, 0)

    return {"baal, batch": lambda count: predict(count, True), "baal, loop": lambda count: predict(count, False)}


def dropout_by_vmap(network: nn.Module, inputs: Tensor) -> dict[str, Draws]:
    """`torch.vmap` over the draws by hand, on the network in training mode with batch norm at rest."""
    training = in_dropout_mode(deepcopy(network))

    def predict(count: int) -> Tensor:
        with torch.no_grad():
            draws = torch.vmap(lambda _: training(inputs), randomness="different")
            return draws(torch.arange(count, device=inputs.device))

    return {"torch.vmap by hand": predict}


def in_dropout_mode(network: nn.Module) -> nn.Module:
    """Put a network in training mode but for its batch norm: what people do by hand to leave dropout on."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    return network


def spread_of_draws(outputs: Tensor) -> float:
    """Return the standard deviation over draws of outputs `[S, N, K]`, its root mean square."""
    return float(outputs.double().var(0).mean().sqrt())


def ensemble_by_torch_uncertainty(networks: list[nn.Module], inputs: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Its `deep_ensembles`."""
    ensemble = torch_uncertainty("methods").deep_ensembles(deepcopy(networks)).eval()

    def predict() -> Tensor:
        with torch.no_grad():
            return ensemble(inputs).softmax(-1).unflatten(0, (len(networks), -1)).mean(0)

    return {"torch-uncertainty": predict}


def ensemble_by_vmap(networks: list[nn.Module], inputs: Tensor) -> dict[str, Callable[[], Tensor]]:
    """`torch.vmap` over stacked parameters by hand; stacking is not timed."""
    state = torch.func.stack_module_state(networks)
    base = deepcopy(networks[0])

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (inputs,))

    def predict() -> Tensor:
        with torch.no_grad():
            return torch.vmap(one)(*state).softmax(-1).mean(0)

    return {"torch.vmap by hand": predict}


def temperature_by_torch_uncertainty(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], float]]:
    """Its `TemperatureScaler`, on one batch that holds everything."""
    scaler = torch_uncertainty("post_processing").TemperatureScaler

    def fit() -> float:
        fitted = scaler(model=nn.Sequential(), device=logits.device)
        fitted.fit([(logits, labels)], progress=False)
        return float(fitted.temperature[0])

    return {"torch-uncertainty": fit}


def temperature_by_netcal(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], float]]:
    """Its `TemperatureScaling`, which takes probabilities as NumPy arrays, here in float64."""
    scaling = import_module("netcal.scaling").TemperatureScaling
    # In float32 its optimiser stays at 1.
    probs, truth = logits.double().softmax(-1).cpu().numpy(), labels.cpu().numpy()

    def fit() -> float:
        fitted = scaling()
        fitted.fit(probs, truth, tensorboard=False)
        return 1 / float(fitted.temperature[0])  # it multiplies the logits by what it calls the temperature

    return {"netcal": fit}


def temperature_by_lbfgs(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], float]]:
    """`torch.optim.LBFGS` by hand, as in the code that came with Guo et al. (2017, ICML), with a line search."""

    def fit() -> float:
        temperature = torch.ones(1, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([temperature], max_iter=50, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(logits / temperature, labels)
            loss.backward()
            return loss

        optimizer.step(objective)
        return float(temperature.detach())

    return {"plain LBFGS": fit}


def ece_by_torchmetrics(probs: Tensor, labels: Tensor) -> dict[str, Callable[[], float]]:
    """Its `multiclass_calibration_error`."""
    error = import_module("torchmetrics.functional.classification").multiclass_calibration_error
    return {"torchmetrics": lambda: float(error(probs, labels, num_classes=probs.shape[1], n_bins=15, norm="l1"))}


def ece_by_netcal(probs: Tensor, labels: Tensor) -> dict[str, Callable[[], float]]:
    """Its `ECE`, which takes NumPy arrays."""
    error = import_module("netcal.metrics").ECE
    array, truth = probs.cpu().numpy(), labels.cpu().numpy()
    return {"netcal": lambda: float(error(15).measure(array, truth))}


DROPOUT: dict[str, DropoutMaker] = {
    "torch-uncertainty": dropout_by_torch_uncertainty,
    "baal": dropout_by_baal,
    "torch.vmap by hand": dropout_by_vmap,
}
ENSEMBLE = {"torch-uncertainty": ensemble_by_torch_uncertainty, "torch.vmap by hand": ensemble_by_vmap}
TEMPERATURE = {
    "torch-uncertainty": temperature_by_torch_uncertainty,
    "netcal": temperature_by_netcal,
    "plain LBFGS": temperature_by_lbfgs,
}
ECE = {"torchmetrics": ece_by_torchmetrics, "netcal": ece_by_netcal}
