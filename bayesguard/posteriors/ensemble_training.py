"""How the members of an ensemble are trained: together, one after another, or in processes of their own.

Whether `joint="auto"` trains together follows from the number of parameters alone and never from a clock: members that
train together share batches, so that a choice by measured time would change the result from run to run. The limits
come from this table: time of an epoch of five members together / one after another, both with fused Adam, on one CPU
thread, for networks of dense layers as one batched product.

    network              parameters   batch 32   128   512
    13-50-2                     802       0.27     -   0.51
    784-64-64-10             55,050       0.44  0.53   0.66
    100-200-200-10           62,410          -  0.60      -
    784-256-256-10          269,322          -  0.76      -
    784-400-400-10          478,410       0.83  0.85   0.99
    784-1024-1024-10      1,863,690       1.00  0.97      -

What has no batched form runs under vmap, which costs more, and convolutions lose in either form.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesguard.data import Batch, batches, is_one_shot, to_device
from bayesguard.history import History
from bayesguard.joint import Trial, fit_jointly, try_jointly
from bayesguard.predictor import join_inputs
from bayesguard.sampling import derive_seed, seeded_default_generators
from bayesguard.training import fit
from bayesguard.training_setup import generators_of

if TYPE_CHECKING:
    from bayesguard.posteriors.ensemble import DeepEnsemble

_LOG = logging.getLogger(__name__)

# Parameters of a member up to which training together is the faster way; see the table above.
_LARGEST_BATCHED = 500_000
_LARGEST_VMAPPED = 100_000


def fit_members(ensemble: "DeepEnsemble", data: Any, **settings: Any) -> History:
    """Train every member of `ensemble`; settings as in `Predictor.fit`."""
    if _train_jointly(ensemble, data, settings):
        return fit_jointly(
            ensemble.members,
            data,
            validation_loss=_validation_loss,
            **_common(ensemble, derive_seed(ensemble.seed, "fit")),
            **settings,
        )
    jobs = [(index, _member_settings(index, settings)) for index in range(len(ensemble.members))]
    if ensemble.n_jobs == 1:
        histories = [_fit_member(ensemble, index, data, own) for index, own in jobs]
    else:
        histories = _fit_in_processes(ensemble, data, jobs)
    return History(members=tuple(histories))


def _train_jointly(ensemble: "DeepEnsemble", data: Any, settings: dict[str, Any]) -> bool:
    """Tell whether one vectorised pass gives the same training and is likely to pay."""
    apart = ensemble.bootstrap or ensemble.adversarial_epsilon is not None or ensemble.n_jobs > 1
    if ensemble.joint is False or apart or len(ensemble.members) == 1:
        return False
    if ensemble.joint == "auto" and not _may_pay(ensemble.members[0], _LARGEST_BATCHED):
        return False
    if is_one_shot(data):
        trial = Trial("data can be read only once", False)
    else:
        batch = _first_batch(ensemble, data, settings.get("batch_size"))
        trial = try_jointly(ensemble.members, batch, optimizer=settings.get("optimizer"))
    if trial.reason and ensemble.joint is True:
        _LOG.warning("members are trained one after another: %s", trial.reason)
    if trial.reason or ensemble.joint is True:
        return not trial.reason
    return trial.is_batched or _may_pay(ensemble.members[0], _LARGEST_VMAPPED)


def _may_pay(member: nn.Module, most: int) -> bool:
    convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in member.modules())
    return not convolutions and sum(parameter.numel() for parameter in member.parameters()) <= most


def _first_batch(ensemble: "DeepEnsemble", data: Any, batch_size: int | None) -> Batch:
    # A loader's iterator draws from the default generator, and from its own: both go back to where they were.
    own = generators_of(data)
    states = [generator.get_state() for generator in own]
    with seeded_default_generators(torch.device("cpu"), ensemble.seed):
        stream = batches(
            data,
            batch_size=batch_size or 256,
            input_key=ensemble.input_key,
            target_key=ensemble.target_key,
            numpy_dtype=next(ensemble.parameters()).dtype,
        )
        batch = to_device(next(stream), next(ensemble.parameters()).device)
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    return batch


def _validation_loss(member: nn.Module, data: Any) -> float:
    return member.validation_loss(data)  # type: ignore[operator]


def _common(ensemble: "DeepEnsemble", seed: int) -> dict[str, Any]:
    return {"seed": seed, "input_key": ensemble.input_key, "target_key": ensemble.target_key}


def _fit_member(ensemble: "DeepEnsemble", index: int, data: Any, settings: dict[str, Any]) -> History:
    member = ensemble.members[index]

    def objective(batch: Batch, num_data: int) -> Tensor:
        return ensemble.member_loss(member, join_inputs(batch), batch.targets, num_data)  # type: ignore[arg-type]

    return fit(
        member,
        objective,
        ensemble.member_data(data, index),
        validation_loss=member.validation_loss,
        **_common(ensemble, derive_seed(ensemble.seed, "fit", index)),
        **settings,
    )


def _fit_in_processes(ensemble: "DeepEnsemble", data: Any, jobs: list[tuple[int, dict[str, Any]]]) -> list[History]:
    from joblib import Parallel, delayed

    trained = Parallel(n_jobs=ensemble.n_jobs)(
        delayed(_fit_and_return)(ensemble, index, data, own, torch.get_num_threads()) for index, own in jobs
    )
    for member, (state, _) in zip(ensemble.members, trained, strict=True):
        member.load_state_dict(state)
    return [history for _, history in trained]


def _fit_and_return(
    ensemble: "DeepEnsemble", index: int, data: Any, settings: dict[str, Any], threads: int
) -> tuple[dict[str, Tensor], History]:
    # Workers together use the cores that the caller would have used.
    torch.set_num_threads(max(1, threads // ensemble.n_jobs))
    history = _fit_member(ensemble, index, data, settings)
    return ensemble.members[index].state_dict(), history


def _member_settings(index: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Give every member a checkpoint file of its own: `weights.ckpt` becomes `weights-0.ckpt` and so on."""
    checkpoint = settings.get("checkpoint")
    if checkpoint is None:
        return settings
    path = Path(checkpoint)
    return {**settings, "checkpoint": path.with_name(f"{path.stem}-{index}{path.suffix}")}
