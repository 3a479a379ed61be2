"""One scaling whose temperature follows how far the input is from what the network knows.

Related: C. Tomani, S. Gruber, M. E. Erdem, D. Cremers, F. Buettner (2021), Post-hoc uncertainty calibration for domain
drift scenarios, CVPR; C. Tomani, F. K. Waseda, Y. Shen, D. Cremers (2023), Beyond in-domain scenarios, ICML. Both learn
on perturbed held-out data; here the temperature is a smooth function of what the predictive itself says.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.likelihood import PooledLikelihood, minimise
from bayesguard.checks import check_count, check_labels, check_shape
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.functional.calibration import expected_calibration_error
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.combine import concatenate
from bayesguard.predictive.numerics import as_given, wide
from bayesguard.sampling import stream

_LOG_BOUND = math.log(20.0)
_RIDGE = 1e-3
_MOST_ROWS = 2000
_RESAMPLES = 200
_NUM_SIGNS = 3
_NUM_STATISTICS = 2 * _NUM_SIGNS + 1
_FIRST, _SECOND = torch.triu_indices(_NUM_SIGNS, _NUM_SIGNS, device="cpu").tolist()
_NUM_TERMS = _NUM_SIGNS + len(_FIRST)
_PARTS, _CLEAN_PARTS = 4, 16
# Weight of undisturbed data to the mean of all perturbed ones. Of 1, 4, 16, 64 and 256, the smallest that cost nothing on
# undisturbed digits and Fashion-MNIST with families of perturbations left out.
_CLEAN_SHARE = 64.0


class ShiftAwareScaling(Calibrator):
    """Raise the mixture's probabilities to a power that depends on the signs of a shift; the answer stays the same class.

    Fitted on held-out data as they are and under perturbations of rising severity, it learns which temperature goes with
    which entropy, disagreement of draws and margin, and is meant for perturbations that it never saw.

    Args:
        mode: "point": a temperature for each example, a polynomial of degree 2 in three signs, and the most that leaves the
            calibration error of undisturbed data within its interval. "set": one temperature for a whole set of data,
            from the statistics of an unlabelled batch of it (`adapt`).
        shifts: The perturbations that `Predictor.calibrate` passes its data through: the name of a suite, or a list of
            names and `bayesguard.shift` objects. `("images", "content")` for images: some must take accuracy down to
            chance. None where `fit` is called by hand with `environments=`.
        seed: Of the rows that are used where there are very many.

    It acts on the mixture, whose answer is then one distribution: what draws disagreed about is gone.

    Attributes:
        clean_temperature: Best single temperature of the undisturbed data.
        temperature: That of the set that was adapted to last ("set").
        diagnostics: Calibration errors on undisturbed and perturbed data, before and after, the interval that the former had
            to stay in, and accuracy on undisturbed data ("clean_accuracy") and on the worst perturbed ("lowest_accuracy").

    Examples:
        >>> logits = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) * 3
        >>> shift = torch.arange(3000) % 3  # perturbed, and perturbed until hardly anything is left
        >>> noise = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1))
        >>> labels = (logits + 5 * shift.unsqueeze(1) * noise).argmax(-1)
        >>> seen = Predictive.from_logits(logits / (1 + shift.unsqueeze(1)))
        >>> scaling = ShiftAwareScaling().fit(seen, labels, environments=shift)
        >>> bool((scaling(seen).labels == seen.labels).all())
        True
    """

    acts_on: ClassVar[Literal["draws", "pooled"]] = "pooled"
    sized_by_fit = ("sets", "set_weights")
    clean_temperature: Tensor
    temperature: Tensor
    centre: Tensor
    spread: Tensor
    coefficients: Tensor
    sets: Tensor
    set_weights: Tensor

    def __init__(self, mode: Literal["point", "set"] = "point", *, shifts: Any = None, seed: int = 0) -> None:
        super().__init__()
        if mode not in ("point", "set"):
            raise BadInput(f"mode must be 'point' or 'set', got {mode!r}")
        self.mode, self.shifts, self.seed = mode, shifts, check_count(seed, "seed", minimum=0)
        for name, value in (
            ("clean_temperature", torch.ones(())),
            ("temperature", torch.ones(())),
            ("centre", torch.zeros(_NUM_SIGNS)),
            ("spread", torch.ones(_NUM_SIGNS)),
            ("coefficients", torch.zeros(1 + _NUM_TERMS)),
            ("sets", torch.zeros(0, _NUM_STATISTICS)),
            ("set_weights", torch.zeros(0)),
            ("set_scale", torch.ones(2, _NUM_STATISTICS)),
            ("set_range", torch.zeros(3)),
        ):
            self.register_buffer(name, value.double())

    set_scale: Tensor
    set_range: Tensor
    _environments: object = None

    def fit(self, pred: Predictive, targets: object, *, environments: object = None, weights: object = None) -> Self:
        """Fit to predictions for held-out data, undisturbed and perturbed.

        Args:
            pred: All of them.
            targets: Their labels.
            environments: For each row 0 where it is undisturbed, and the number of its perturbation `[N]`, integers.
            weights: Not taken.

        Raises:
            BadInput: No environments, or fewer than two perturbed ones.

        Warns:
            CalibrationWarning: No perturbation takes accuracy below halfway between that of undisturbed data and chance, the
                share of the commonest class.
        """
        if environments is None:
            raise BadInput(
                "ShiftAwareScaling learns from perturbed data: pass environments= (0 for undisturbed rows), or set shifts= "
                "and call predictor.calibrate"
            )
        self._environments = environments
        try:
            return super().fit(pred, targets, weights=weights)
        finally:
            self._environments = None

    def fit_shifted(self, preds: Sequence[Predictive], targets: Tensor) -> Self:
        rows = torch.arange(len(preds)).repeat_interleave(len(targets))
        return self.fit(concatenate(preds), targets.repeat(len(preds)), environments=rows)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        log_probs = _log_probs(pred)
        labels = check_labels(targets, log_probs.shape[:1], log_probs.shape[1])
        environments = as_given(self._environments, "environments").to(labels.device)
        check_shape(environments, labels.shape, "environments")
        found = self._groups(pred, log_probs, labels, environments)
        clean = found[0]
        accuracies = _checked_accuracies(found)
        self.clean_temperature = log_probs.new_tensor(_best_temperature(clean))
        if self.mode == "set":
            self._fit_sets(found)
        else:
            self._fit_points(found)
        self.diagnostics |= accuracies

    def _groups(self, pred: Predictive, log_probs: Tensor, labels: Tensor, environments: Tensor) -> list[_Group]:
        numbers = environments.unique().tolist()
        if 0 not in numbers or len(numbers) < 3:
            raise BadInput(
                "environments must have 0 (undisturbed) and two perturbations at least, got "
                f"{', '.join(map(str, numbers[:6]))}"
            )
        signs = _signs(pred, log_probs)
        found = []
        for number in numbers:
            rows = (environments == number).nonzero().squeeze(-1)
            if len(rows) > _MOST_ROWS:
                order = torch.randperm(len(rows), generator=stream("cpu", self.seed, "rows", int(number)))
                rows = rows[order[:_MOST_ROWS].to(rows.device)]
            found.append(_Group(log_probs[rows], labels[rows], signs[rows]))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "coefficients")
        if isinstance(saved, Tensor) and saved.shape == (1 + _NUM_SIGNS,):
            # Of the version whose temperature was linear in the signs: the other terms count nothing.
            state_dict[prefix + "coefficients"] = torch.cat([saved, saved.new_zeros(_NUM_TERMS - _NUM_SIGNS)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # One temperature for each example.

    def _fit_points(self, found: list[_Group]) -> None:
        clean = found[0]
        signs, weights = torch.cat([group.signs for group in found]), _weights(found, 1.0).unsqueeze(-1)
        self.centre = (weights * signs).sum(0)
        self.spread = (weights * (signs - self.centre).square()).sum(0).sqrt().clamp_min(1e-6)
        before, upper = _error_and_bound(clean, self.clean_temperature.expand(len(clean.labels)), self.seed)
        share = _CLEAN_SHARE
        while True:
            # More weight on undisturbed data, until their calibration error is what one temperature would leave it.
            self.coefficients = self._minimised(found, share)
            after = _error(clean, self._of_signs(clean.signs))
            if after <= upper or share >= 16 * _CLEAN_SHARE:
                break
            share *= 2
        if after > upper:
            start = torch.zeros_like(self.coefficients)
            start[0] = self.clean_temperature.log()
            self.coefficients, after = start, before
        self.diagnostics = {
            "clean_ece_with_one_temperature": before,
            "clean_ece": after,
            "clean_ece_upper": upper,
            "clean_share": share,
            "perturbed_ece_with_one_temperature": _mean_error(
                found[1:], lambda g: self.clean_temperature.expand(len(g.labels))
            ),
            "perturbed_ece": _mean_error(found[1:], lambda g: self._of_signs(g.signs)),
            "num_environments": len(found),
        }

    def _minimised(self, found: list[_Group], share: float) -> Tensor:
        """The coefficients of the smallest NLL, undisturbed data weighted by `share` to the mean of all perturbed."""
        log_probs, labels, signs = (torch.cat(parts) for parts in zip(*found, strict=True))
        weights = _weights(found, share)
        coefficients = torch.zeros(1 + _NUM_TERMS, dtype=torch.float64, device=self.centre.device)
        coefficients[0] = self.clean_temperature.log()
        coefficients.requires_grad_(True)
        optimizer = torch.optim.LBFGS([coefficients], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

        def objective() -> Tensor:
            optimizer.zero_grad()
            scaled = (log_probs / self._of_signs(signs, coefficients).unsqueeze(-1)).log_softmax(-1)
            nll = -(weights * scaled.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).sum()
            loss = nll + _RIDGE * coefficients[1:].square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
        return coefficients.detach()

    def _of_signs(self, signs: Tensor, coefficients: Tensor | None = None) -> Tensor:
        own = self.coefficients if coefficients is None else coefficients
        units = ((signs - self.centre) / self.spread).clamp(-4, 4)
        # Squares and products are no larger than the units themselves.
        terms = torch.cat([units, units[:, _FIRST] * units[:, _SECOND] / 4], dim=-1)
        # Smoothly between the bounds.
        return (_LOG_BOUND * torch.tanh((own[0] + terms @ own[1:]) / _LOG_BOUND)).exp()

    # One temperature for a set.

    def _fit_sets(self, found: list[_Group]) -> None:
        # Parts of each environment show how far statistics vary by chance; the undisturbed one counts more often.
        parts = [
            part for k, group in enumerate(found) for part in self._parts(group, _CLEAN_PARTS if k == 0 else _PARTS)
        ]
        raw = torch.stack([_statistics(part.signs, part.log_probs) for part in parts])
        each = [math.log(_best_temperature(group)) for group in found]
        counts = torch.tensor([_CLEAN_PARTS] + [_PARTS] * (len(found) - 1))
        wanted = torch.tensor(each).repeat_interleave(counts).to(raw)
        self.set_scale = torch.stack([raw.mean(0), raw.std(0).clamp_min(1e-6)])
        self.sets = (raw - self.set_scale[0]) / self.set_scale[1]
        distance = torch.cdist(self.sets, self.sets)
        width = 2 * distance[distance > 0].median() if bool((distance > 0).any()) else distance.new_ones(())
        kernel = (-0.5 * (distance / width).square()).exp()
        groups = torch.arange(len(found)).repeat_interleave(counts).to(raw.device)
        ridge, errors = _chosen_ridge(kernel, wanted - wanted.mean(), groups)
        solved = torch.linalg.solve(kernel + ridge * torch.eye(len(raw)).to(kernel), wanted - wanted.mean())
        self.set_weights = solved
        # Of the mean, the width, and how far answers may go: no further than what was seen.
        self.set_range = torch.stack([wanted.mean(), width, wanted.amax()])
        self.temperature = self.clean_temperature.clone()
        self.diagnostics = {
            "log_temperature_rmse": errors,
            "num_environments": len(found),
            "perturbed_ece_with_one_temperature": _mean_error(
                found[1:], lambda g: self.clean_temperature.expand(len(g.labels))
            ),
            "perturbed_ece": _mean_error(found[1:], lambda g: self._of_set(g.signs, g.log_probs).expand(len(g.labels))),
            "clean_ece": _error(
                found[0], self._of_set(found[0].signs, found[0].log_probs).expand(len(found[0].labels))
            ),
        }

    def _parts(self, group: _Group, count: int) -> list[_Group]:
        """Random halves of an environment's rows."""
        size = max(2, len(group.labels) // 2)
        generator = stream("cpu", self.seed, "parts")
        found = []
        for _ in range(count):
            rows = torch.randperm(len(group.labels), generator=generator)[:size].to(group.labels.device)
            found.append(_Group(group.log_probs[rows], group.labels[rows], group.signs[rows]))
        return found

    def _of_set(self, signs: Tensor, log_probs: Tensor) -> Tensor:
        mean, width, highest = self.set_range
        own = (_statistics(signs, log_probs) - self.set_scale[0]) / self.set_scale[1]
        kernel = (-0.5 * (torch.cdist(own.unsqueeze(0), self.sets)[0] / width).square()).exp()
        return (mean + kernel @ self.set_weights).clamp(-_LOG_BOUND, max(float(highest), 0.0)).exp()

    @property
    def can_adapt(self) -> bool:
        return self.mode == "set"

    @torch.no_grad()
    def adapt(self, pred: Predictive) -> Self:
        """Find the temperature of new data from predictions for an unlabelled batch of them, and use it from now on.

        Args:
            pred: Predictions for a hundred examples at least, all of one kind.

        Raises:
            NotFitted: `fit` comes first.
            BadInput: mode="point", or too few examples.
        """
        if not self.fitted:
            raise NotFitted("this ShiftAwareScaling is not fitted; call fit, or predictor.calibrate")
        if self.mode != "set":
            raise BadInput('adapt is for mode="set"; with mode="point" every example has its own temperature')
        if len(pred) < 100:
            raise BadInput(f"pred has {len(pred)} examples; their statistics need 100 at least")
        log_probs = _log_probs(pred)
        self.temperature = self._of_set(_signs(pred, log_probs).to(self.centre), log_probs.to(self.centre))
        return self

    def _calibrate(self, pred: Predictive) -> Predictive:
        log_probs = _log_probs(pred)
        if self.mode == "set":
            temperatures = self.temperature.expand(len(log_probs))
        else:
            temperatures = self._of_signs(_signs(pred, log_probs).to(self.centre))
        scaled = log_probs / temperatures.to(log_probs).unsqueeze(-1)
        return CategoricalPredictive(scaled.to(pred.dtype).unsqueeze(0), exact=pred.exact)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, {'fitted' if self.fitted else 'not fitted'}"


class _Group(NamedTuple):
    """One environment: pooled log-probabilities `[n, K]`, labels `[n]`, signs `[n, 3]`."""

    log_probs: Tensor
    labels: Tensor
    signs: Tensor


def _log_probs(pred: Predictive) -> Tensor:
    if not isinstance(pred, CategoricalPredictive) or len(pred.batch_shape) != 1:
        raise BadType(f"ShiftAwareScaling is for one class of several an example, got a {type(pred).__name__}")
    return wide(pred.logits).log_softmax(-1)


def _signs(pred: Predictive, log_probs: Tensor) -> Tensor:
    """What tells of a shift: entropy (of 1 at most), square root of the mutual information, and the margin."""
    total, _, epistemic = pred.uncertainty()
    first, second = log_probs.topk(2, dim=-1).values.unbind(-1)
    margin = (first - second).clamp_max(20.0) / 20
    return torch.stack([wide(total) / math.log(log_probs.shape[1]), wide(epistemic).sqrt(), margin.sqrt()], dim=-1)


def _statistics(signs: Tensor, log_probs: Tensor) -> Tensor:
    """What tells of a set: mean and spread of the signs, and how evenly its answers use the classes `[7]`."""
    shares = log_probs.exp().mean(0)
    evenness = -torch.special.xlogy(shares, shares).sum() / math.log(len(shares))
    return torch.cat([signs.mean(0), signs.std(0), evenness.reshape(1)])


def _weights(found: list[_Group], share: float) -> Tensor:
    """Weights of all rows, of sum 1: undisturbed ones together `share` times as much as all perturbed ones together."""
    parts = [share] + [1 / (len(found) - 1)] * (len(found) - 1)
    each = [g.log_probs.new_full((len(g.labels),), part / len(g.labels)) for g, part in zip(found, parts, strict=True)]
    return torch.cat(each) / (1 + share)


def _checked_accuracies(found: list[_Group]) -> dict[str, float]:
    """Accuracy on undisturbed and on the worst perturbed data, with a warning where the latter is far above chance."""
    clean, *perturbed = (float((group.log_probs.argmax(-1) == group.labels).double().mean()) for group in found)
    chance = float(found[0].labels.bincount().max()) / len(found[0].labels)
    if min(perturbed) > (clean + chance) / 2:
        warnings.warn(
            f"the strongest perturbation leaves an accuracy of {min(perturbed):.3f}, of {clean:.3f} undisturbed and {chance:.3f} "
            "by chance: what ShiftAwareScaling learns from is too mild, and it may sharpen answers under stronger shifts; add "
            'perturbations that take the content away, for images shifts=("images", "content")',
            CalibrationWarning,
            stacklevel=4,
        )
    return {"clean_accuracy": clean, "lowest_accuracy": min(perturbed)}


def _best_temperature(group: _Group) -> float:
    """The single temperature of the smallest NLL."""
    one_draw = PooledLikelihood(group.log_probs.unsqueeze(0), group.labels, group.log_probs.new_ones(1))
    return 1 / minimise(one_draw, math.exp(-_LOG_BOUND), math.exp(_LOG_BOUND))


def _scaled(group: _Group, temperatures: Tensor) -> Tensor:
    return (group.log_probs / temperatures.unsqueeze(-1)).softmax(-1)


def _error(group: _Group, temperatures: Tensor) -> float:
    return float(expected_calibration_error(_scaled(group, temperatures), group.labels))


def _mean_error(groups: list[_Group], temperatures: Any) -> float:
    return sum(_error(group, temperatures(group)) for group in groups) / len(groups)


def _error_and_bound(group: _Group, temperatures: Tensor, seed: int) -> tuple[float, float]:
    """Calibration error, and the 97.5 % quantile of it over resampled examples."""
    scores = EVALUATION_METRICS["ece"].scores(_scaled(group, temperatures), group.labels)
    resampled = torch.cat([scores.resample(part) for part in bootstrap_weights(len(group.labels), _RESAMPLES, seed)])
    return scores.value(), float(resampled.quantile(0.975))


def _chosen_ridge(kernel: Tensor, wanted: Tensor, groups: Tensor) -> tuple[float, float]:
    """The ridge with the smallest error where each environment is left out with all its parts, and that error (RMSE)."""
    best = (math.inf, 1.0)
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel)).to(kernel))
        solved = inverse @ wanted
        residuals = []
        for group in groups.unique():
            own = groups == group
            residuals.append(torch.linalg.solve(inverse[own][:, own], solved[own]))
        best = min(best, (float(torch.cat(residuals).square().mean().sqrt()), ridge))
    return best[1], best[0]
