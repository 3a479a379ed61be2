"""The contract that every predictor keeps, ours and yours: `check_predictor(predictor, inputs, targets)`.

Each check is a function `check_*(case)` that raises AssertionError with what was expected and what came.
"""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayesguard.data import split_inputs
from bayesguard.errors import BayesguardError
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictor import Predictor
from bayesguard.simulation_based_calibration import simulation_based_calibration as simulation_based_calibration


class Case(NamedTuple):
    """A predictor with a batch to try it on."""

    predictor: Predictor
    inputs: Any
    targets: Tensor

    def predict(self, inputs: Any = None, **settings: Any) -> Predictive:
        """Call the predictor on the batch, or on other inputs of the same structure."""
        positional, keywords = split_inputs(self.inputs if inputs is None else inputs)
        predictive: Predictive = self.predictor(*positional, **keywords, **settings)
        return predictive

    def rows(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Return the inputs with every tensor of N rows changed."""
        rows = len(self.targets)
        return pytree.tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf,
            self.inputs,
        )


def check_predictor(
    predictor: Predictor,
    inputs: Any,
    targets: Tensor,
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Run every check of the contract on a predictor.

    Args:
        predictor: Any predictor, yours included; it is copied first.
        inputs: A tensor `[N, ...]`, a tuple of them, or a mapping of keyword inputs; at least 4 rows.
        targets: What its likelihood takes, `[N, ...]`.
        expected_failures: Names of checks that this predictor is known not to pass, each with the reason. A check
            that passes all the same is reported, so that the list stays true.

    Raises:
        AssertionError: Some checks failed; the message has a line for each.

    Examples:
        >>> import torch, bayesguard as bg
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 3))
        >>> check_predictor(bg.MCDropout(network), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    """
    known = dict(expected_failures or {})
    failures = []
    for check in CHECKS:
        case = Case(deepcopy(predictor), inputs, targets)
        try:
            check(case)
        except (AssertionError, BayesguardError, RuntimeError) as error:
            if check.__name__ not in known:
                failures.append(f"{check.__name__}: {type(error).__name__}: {error}")
        else:
            if check.__name__ in known:
                failures.append(f"{check.__name__} passes, though it was expected to fail: {known[check.__name__]}")
    unknown = known.keys() - {check.__name__ for check in CHECKS}
    if unknown:
        failures.append(f"expected_failures names no check: {', '.join(sorted(unknown))}")
    if failures:
        raise AssertionError("\n".join(failures))


def check_answer_is_a_predictive(case: Case) -> None:
    """Calling gives a Predictive over the examples, whose weights are those of a mixture."""
    pred = case.predict()
    _expect(isinstance(pred, Predictive), "calling gives a Predictive", type(pred).__name__)
    _expect(pred.batch_shape == case.targets.shape, f"batch shape {tuple(case.targets.shape)}", pred.batch_shape)
    _expect(abs(pred.weights.sum().item() - 1) < 1e-9, "weights that sum to 1", pred.weights.sum().item())
    log_prob = pred.log_prob(case.targets)
    _expect(log_prob.shape == case.targets.shape, "a log density for each target", tuple(log_prob.shape))
    _expect(not log_prob.isnan().any(), "log densities that are numbers", "NaN")
    _expect(not log_prob.requires_grad, "an answer without a gradient", "one that requires it")


def check_answer_is_float32_at_least(case: Case) -> None:
    """Probabilities and means are float32 or wider, and probabilities sum to one."""
    pred = case.predict()
    _expect(pred.mean.dtype in (torch.float32, torch.float64), "float32 or float64", pred.mean.dtype)
    if isinstance(pred, CategoricalPredictive):
        error = (pred.probs.sum(dim=-1) - 1).abs().max().item()
        _expect(error < 1e-6, "probabilities that sum to 1", f"an error of {error}")


def check_same_seed_repeats(case: Case) -> None:
    """The same seed gives the same answer bit for bit, also without a seed of the caller's."""
    for settings in ({}, {"seed": 7}):
        first, second = case.predict(**settings), case.predict(**settings)
        _expect(torch.equal(first.mean, second.mean), f"the same answer twice for {settings}", "two answers")


def check_random_state_is_untouched(case: Case) -> None:
    """A prediction draws nothing from the caller's generator."""
    before = torch.get_rng_state()
    case.predict(seed=3)
    _expect(torch.equal(before, torch.get_rng_state()), "the caller's random state as it was", "another")


def check_nothing_changes(case: Case) -> None:
    """A prediction changes no parameter, buffer, mode or gradient."""

    def state() -> dict[str, Tensor]:
        return {**dict(case.predictor.named_parameters()), **dict(case.predictor.named_buffers())}

    before = {name: value.detach().clone() for name, value in state().items()}
    modes = [module.training for module in case.predictor.modules()]
    case.predict()
    for name, value in state().items():
        _expect(torch.equal(before[name], value), f"{name} as it was", "another value")
    _expect(modes == [module.training for module in case.predictor.modules()], "modes as they were", "others")
    _expect(all(p.grad is None for p in case.predictor.parameters()), "no gradients", "some")


def check_draws_can_be_continued(case: Case) -> None:
    """Where a method says so, draws that start at number 8 are the draws from number 8 on, in chunks as asked."""
    if not case.predictor.can_continue:
        return
    positional, keywords = split_inputs(case.inputs)

    def draws(**settings: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(case.predictor.output_chunks(*positional, seed=5, **settings, **keywords))

    whole, later = torch.cat(draws(num_samples=20)), draws(num_samples=12, first_draw=8, draws_per_chunk=8)
    _expect(all(len(part) <= 8 for part in later), "chunks of 8 draws at most", [len(part) for part in later])
    _expect(len(torch.cat(later)) == 12, "12 further draws", len(torch.cat(later)))
    _expect(_close(torch.cat(later), whole[8:]), "the same draws as in one go", "others")


def check_blocks_are_whole(case: Case) -> None:
    """Chunks of draws end where a block of dependent draws does."""
    positional, keywords = split_inputs(case.inputs)
    block = case.predictor.draws_per_block
    with torch.no_grad():
        chunks = case.predictor.output_chunks(*positional, num_samples=4 * block + 1, seed=5, **keywords)
        sizes = [len(chunk) for chunk in chunks]
    _expect(all(size % block == 0 for size in sizes[:-1]), f"multiples of {block} draws", sizes)


def check_uncertainty_adds_up(case: Case) -> None:
    """Total uncertainty is aleatoric plus epistemic, and none of them is negative."""
    total, aleatoric, epistemic = case.predict().uncertainty()
    for name, part in (("total", total), ("aleatoric", aleatoric), ("epistemic", epistemic)):
        _expect(bool((part >= 0).all()), f"{name} uncertainty of 0 at least", part.min().item())
    _expect(
        torch.allclose(total, aleatoric + epistemic, rtol=1e-6),
        "total = aleatoric + epistemic",
        "another sum",
    )


def check_draw_is_one_function(case: Case) -> None:
    """`draw(seed)` is deterministic and treats an example alike in any batch."""
    function = case.predictor.draw(5)
    positional, keywords = split_inputs(case.inputs)
    with torch.no_grad():
        whole = function(*positional, **keywords)
        _expect(torch.equal(whole, function(*positional, **keywords)), "the same function twice", "two functions")
        positional, keywords = split_inputs(case.rows(lambda value: value[:2]))
        part = function(*positional, **keywords)
    _expect(_close(whole[:2], part), "the same output in a smaller batch", (whole[:2] - part).abs().max().item())


def check_streaming_agrees(case: Case) -> None:
    """`predict` over batches gives what one call gives, and its reduced form the same numbers."""
    whole = case.predict()
    data = [(case.rows(partial(_cut, rows=rows)), case.targets[rows]) for rows in _thirds(case)]
    for keep_draws in (True, False):
        streamed, targets = case.predictor.predict_with_targets(iter(data), keep_draws=keep_draws)
        _expect(torch.equal(targets, case.targets.cpu()), "targets in their order", "others")
        _expect(
            _close(streamed.mean, whole.mean),
            "the mean of one call",
            (streamed.mean - whole.mean).abs().max(),
        )
        for name, a, b in zip(whole.uncertainty()._fields, streamed.uncertainty(), whole.uncertainty(), strict=True):
            _expect(_close(a, b), f"the {name} uncertainty of one call", (a - b).abs().max().item())


def check_one_row_and_none(case: Case) -> None:
    """One example keeps its axis; no examples give an empty answer."""
    for rows in (1, 0):
        pred = case.predict(case.rows(partial(_cut, rows=slice(rows))))
        _expect(pred.batch_shape == (rows, *case.targets.shape[1:]), f"{rows} rows", tuple(pred.batch_shape))
        _expect(pred.uncertainty().total.shape == pred.batch_shape, f"uncertainty of {rows} rows", "another shape")


def check_strides_do_not_matter(case: Case) -> None:
    """Inputs that lie otherwise in memory give the same answer."""
    strided = case.rows(lambda value: torch.stack([value, value], dim=-1)[..., 0])
    _expect(_close(case.predict(strided).mean, case.predict().mean), "the same answer", "another")


def check_loss_trains_every_parameter(case: Case) -> None:
    """The training objective is a finite number that moves every parameter that may move."""
    case.predictor.train()
    loss = case.predictor.loss(case.inputs, case.targets, num_data=len(case.targets))
    _expect(loss.dim() == 0 and bool(loss.isfinite()), "a finite number", loss)
    loss.backward()
    for name, parameter in case.predictor.named_parameters():
        if parameter.requires_grad:
            _expect(parameter.grad is not None, f"a gradient for {name}", "none")
        else:
            _expect(parameter.grad is None, f"no gradient for the frozen {name}", "one")


def check_training_mode_is_refused(case: Case) -> None:
    """Predicting with a network in training mode is an error, not an answer."""
    case.predictor.train()
    _refuses(lambda: case.predict(), "training mode")


def check_bad_rows_are_named(case: Case) -> None:
    """An input that is not finite is an error with its row, never an answer."""

    def spoil(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        value = value.clone()
        value[2] = torch.nan
        return value

    spoiled = case.rows(spoil)
    leaves = pytree.tree_leaves(spoiled)
    if any(isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()) for leaf in leaves):
        _refuses(lambda: case.predict(spoiled), "row 2")


def check_calibration_keeps_the_interface(case: Case) -> None:
    """A calibrated classifier answers as before, with a pooled NLL that is no worse on what it was fitted to."""
    pred = case.predict()
    if not hasattr(pred, "probs"):
        return
    before = -pred.log_prob(case.targets).mean().item()
    data = [(case.inputs, case.targets)]
    with warnings.catch_warnings():
        # A handful of rows may well be separable, and the temperature then ends at its bound.
        warnings.simplefilter("ignore")
        case.predictor.calibrate(data)
    after = -case.predict().log_prob(case.targets).mean().item()
    _expect(after <= before + 1e-6, f"an NLL of at most {before}", after)
    check_uncertainty_adds_up(case)


def check_copies_agree(case: Case) -> None:
    """A deep copy answers alike, to rounding: it may find another way of computing the same draws faster."""
    copied = case._replace(predictor=deepcopy(case.predictor))
    ours, theirs = case.predict().mean, copied.predict().mean
    _expect(torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5), "a copy with the same answer", "another")


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_answer_is_a_predictive,
    check_answer_is_float32_at_least,
    check_same_seed_repeats,
    check_random_state_is_untouched,
    check_nothing_changes,
    check_draws_can_be_continued,
    check_blocks_are_whole,
    check_uncertainty_adds_up,
    check_draw_is_one_function,
    check_streaming_agrees,
    check_one_row_and_none,
    check_strides_do_not_matter,
    check_loss_trains_every_parameter,
    check_training_mode_is_refused,
    check_bad_rows_are_named,
    check_calibration_keeps_the_interface,
    check_copies_agree,
)


def _expect(holds: bool, wanted: str, came: object) -> None:
    if not holds:
        raise AssertionError(f"expected {wanted}, got {came}")


def _refuses(call: Callable[[], object], word: str) -> None:
    try:
        call()
    except BayesguardError as error:
        _expect(word in str(error), f"an error that says {word!r}", error)
    else:
        raise AssertionError(f"expected an error that says {word!r}, got an answer")


def _cut(value: Tensor, rows: slice) -> Tensor:
    return value[rows]


def _close(a: Tensor, b: Tensor) -> bool:
    # Another batch size means another kernel and a few roundings of the network's dtype.
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5)


def _thirds(case: Case) -> list[slice]:
    rows = len(case.targets)
    step = max(1, -(-rows // 3))
    return [slice(start, start + step) for start in range(0, rows, step)]
