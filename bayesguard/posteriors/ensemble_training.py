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

What has no batched form runs under vmap, which costs more. Convolutions are batched as one in groups, with the
channels last. That pays where a member's own channels do not fill a vector register, of eight float32 numbers; the
table has both ways / a plain loop, five members, batches of 64, one run of three rounds on a busy machine:

    channels of two convolutions   parameters   together   one after another
    6, 16 of 5x5 (LeNet-5)             61,706       0.77                1.01
    8, 16 of 3x3                       96,658       0.80                0.75
    16, 32 of 3x3                     136,874       0.90                0.67
    32, 64 of 3x3                     220,234       1.03                0.72
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesguard.data import Batch, batches, is_one_shot, join_inputs, to_device
from bayesguard.history import History
from bayesguard.joint import Trial, fit_jointly, try_jointly
from bayesguard.sampling import derive_seed, seeded_default_generators
from bayesguard.training import fit
from bayesguard.training_setup import check_trainable, device_of, generators_of

if TYPE_CHECKING:
    from bayesguard.posteriors.ensemble import DeepEnsemble

_LOG = logging.getLogger(__name__)

# Output channels of a convolution that leave a vector register unfilled.
_FEW_CHANNELS = 8

# Parameters of a member up to which training together is the faster way; see the table above.
_LARGEST_BATCHED = 500_000
_LARGEST_VMAPPED = 100_000
_LARGEST_CONVOLUTIONAL = 100_000


@torch.inference_mode(False)
def fit_members(ensemble: "DeepEnsemble", data: Any, **settings: Any) -> History:
    """Train every member of `ensemble`; settings as in `Predictor.fit`."""
    check_trainable(ensemble.parameters())
    if settings.get("epochs") == 1:
        # What can be read once is to serve every member.
        data, settings["validation"] = (_kept(some) for some in (data, settings.get("validation")))
    if trial := _train_jointly(ensemble, data, settings):
        return fit_jointly(
            ensemble.members,
            data,
            validation_loss=_validation_loss,
            compared=trial.is_batched,
            **_common(ensemble, derive_seed(ensemble.seed, "fit")),
            **settings,
        )
    jobs = [(index, _member_settings(index, settings)) for index in range(len(ensemble.members))]
    if ensemble.n_jobs == 1:
        before = _states(data, settings)
        histories = []
        for index, own in jobs:
            _set_states(data, settings, before)
            histories.append(_fit_member(ensemble, index, data, own))
    else:
        histories = _fit_in_processes(ensemble, data, jobs)
    return History(members=tuple(histories))


def _kept(data: Any) -> Any:
    return list(data) if is_one_shot(data) else data


def _train_jointly(ensemble: "DeepEnsemble", data: Any, settings: dict[str, Any]) -> Trial | None:
    """Return the trial of one vectorised pass where that gives the same training and is likely to pay."""
    apart = ensemble.bootstrap or ensemble.adversarial_epsilon is not None or ensemble.n_jobs > 1
    if ensemble.joint is False or apart or len(ensemble.members) == 1:
        return None
    if ensemble.joint == "auto" and not _may_pay(ensemble.members[0], _LARGEST_BATCHED):
        return None
    if is_one_shot(data):
        trial = Trial("data can be read only once", False)
    else:
        batch = _first_batch(ensemble, data, settings.get("batch_size"))
        trial = try_jointly(ensemble.members, batch, optimizer=settings.get("optimizer"))
    if trial.reason and ensemble.joint is True:
        _LOG.warning("members are trained one after another: %s", trial.reason)
    if trial.reason:
        return None
    member = ensemble.members[0]
    pays = trial.is_batched or (not _convolutions(member) and _may_pay(member, _LARGEST_VMAPPED))
    return trial if pays or ensemble.joint is True else None


def _may_pay(member: nn.Module, most: int) -> bool:
    if found := _convolutions(member):
        narrow = any(part.out_channels < _FEW_CHANNELS for part in found)
        if not narrow or device_of(member).type != "cpu":
            return False
        most = min(most, _LARGEST_CONVOLUTIONAL)
    return sum(parameter.numel() for parameter in member.parameters()) <= most


def _convolutions(member: nn.Module) -> list[nn.modules.conv._ConvNd]:
    return [part for part in member.modules() if isinstance(part, nn.modules.conv._ConvNd)]


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
    for generator in _generators(data, settings):
        # Orders of its own, which do not depend on how long the members before it were trained.
        drawn = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        generator.manual_seed(derive_seed(drawn, "member", index))

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
    for member, (state, _, _) in zip(ensemble.members, trained, strict=True):
        member.load_state_dict(state)
    _set_states(data, jobs[-1][1], trained[-1][2])
    return [history for _, history, _ in trained]


def _fit_and_return(
    ensemble: "DeepEnsemble", index: int, data: Any, settings: dict[str, Any], threads: int
) -> tuple[dict[str, Tensor], History, list[Tensor]]:
    # Workers together use the cores that the caller would have used.
    torch.set_num_threads(max(1, threads // ensemble.n_jobs))
    history = _fit_member(ensemble, index, data, settings)
    return ensemble.members[index].state_dict(), history, _states(data, settings)


def _generators(data: Any, settings: dict[str, Any]) -> list[torch.Generator]:
    return generators_of(data, settings.get("validation"))


def _states(data: Any, settings: dict[str, Any]) -> list[Tensor]:
    return [generator.get_state() for generator in _generators(data, settings)]


def _set_states(data: Any, settings: dict[str, Any], states: list[Tensor]) -> None:
    for generator, state in zip(_generators(data, settings), states, strict=True):
        generator.set_state(state)


def _member_settings(index: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Give every member a checkpoint file of its own: `weights.ckpt` becomes `weights-0.ckpt` and so on."""
    checkpoint = settings.get("checkpoint")
    if checkpoint is None:
        return settings
    path = Path(checkpoint)
    return {**settings, "checkpoint": path.with_name(f"{path.stem}-{index}{path.suffix}")}
