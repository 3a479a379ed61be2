"""One scaling whose temperature follows how far the input is from what the network knows.

Related: C. Tomani, S. Gruber, M. E. Erdem, D. Cremers, F. Buettner (2021), Post-hoc uncertainty calibration for domain
drift scenarios, CVPR; C. Tomani, F. K. Waseda, Y. Shen, D. Cremers (2023), Beyond in-domain scenarios, ICML. Both learn
on perturbed held-out data; here the temperature is a smooth function of what the predictive itself says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.environments import (
    LOG_BOUND,
    NUM_SIGNS,
    NUM_STATISTICS,
    Group,
    best_temperature,
    checked_accuracies,
    error_and_bound,
    error_at,
    mean_error,
    pooled_log_probs,
    row_weights,
    signs_of,
    statistics_of,
)
from bayesguard.calibration.fitted import check_possible
from bayesguard.checks import check_count, check_labels, check_shape
from bayesguard.errors import BadInput, NotFitted
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.combine import concatenate
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import stream

_RIDGE = 1e-3
_MOST_ROWS = 2000
_FIRST, _SECOND = torch.triu_indices(NUM_SIGNS, NUM_SIGNS, device="cpu").tolist()
_NUM_TERMS = NUM_SIGNS + len(_FIRST)
_PARTS, _CLEAN_PARTS = 4, 16
# Width of the kernel over sets, in median distances between them, and its ridge. So wide a kernel is nearly a polynomial of
# degree two. A narrow one, its ridge chosen by leaving environments out one by one, takes the smallest ridge: neighbours in
# severity give every environment away. It then bends after the chance of which rows are in the parts.
_WIDTH, _SET_RIDGE, _MOST_SHARE = 16.0, 3e-3, 4096
# Weight of undisturbed data to the mean of all perturbed ones. Of 1, 4, 16, 64 and 256, the smallest that cost nothing on
# undisturbed digits and Fashion-MNIST, families of perturbations left out, when the temperature was linear in the signs. With
# the polynomial 4 and 16 leave larger errors on most sets of digits, too.
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
        seed: Of the rows that are used where there are very many, and of the parts that "set" takes statistics of.

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
    settings = ("mode",)
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
            ("centre", torch.zeros(NUM_SIGNS)),
            ("spread", torch.ones(NUM_SIGNS)),
            ("coefficients", torch.zeros(1 + _NUM_TERMS)),
            ("sets", torch.zeros(0, NUM_STATISTICS)),
            ("set_weights", torch.zeros(0)),
            ("set_scale", torch.ones(2, NUM_STATISTICS)),
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
        return self.fit(concatenate(preds), torch.cat([targets] * len(preds)), environments=rows)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        log_probs = pooled_log_probs(pred)
        labels = check_labels(targets, log_probs.shape[:1], log_probs.shape[1])
        environments = as_given(self._environments, "environments").to(labels.device)
        check_shape(environments, labels.shape, "environments")
        possible = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) > -torch.inf
        check_possible(int((~possible).sum()), len(labels))
        pred, log_probs, labels = pred[possible], log_probs[possible], labels[possible]
        environments = environments[possible]
        found = self._groups(pred, log_probs, labels, environments)
        clean = found[0]
        accuracies = checked_accuracies(found)
        self.clean_temperature = log_probs.new_tensor(best_temperature(clean))
        if self.mode == "set":
            self._fit_sets(found)
        else:
            self._fit_points(found)
        self.diagnostics |= accuracies

    def _groups(self, pred: Predictive, log_probs: Tensor, labels: Tensor, environments: Tensor) -> list[Group]:
        numbers = environments.unique().tolist()
        if 0 not in numbers or len(numbers) < 3:
            raise BadInput(
                "environments must have 0 (undisturbed) and two perturbations at least, got "
                f"{', '.join(map(str, numbers[:6]))}"
            )
        signs = signs_of(pred, log_probs)
        found = []
        for number in numbers:
            rows = (environments == number).nonzero().squeeze(-1)
            if len(rows) > _MOST_ROWS:
                order = torch.randperm(len(rows), generator=stream("cpu", self.seed, "rows", int(number)))
                rows = rows[order[:_MOST_ROWS].to(rows.device)]
            found.append(Group(log_probs[rows], labels[rows], signs[rows]))
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "coefficients")
        if isinstance(saved, Tensor) and saved.shape == (1 + NUM_SIGNS,):
            # Of the version whose temperature was linear in the signs: the other terms count nothing.
            state_dict[prefix + "coefficients"] = torch.cat([saved, saved.new_zeros(_NUM_TERMS - NUM_SIGNS)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # One temperature for each example.

    def _fit_points(self, found: list[Group]) -> None:
        clean = found[0]
        signs, weights = torch.cat([group.signs for group in found]), row_weights(found, 1.0).unsqueeze(-1)
        self.centre = (weights * signs).sum(0)
        self.spread = (weights * (signs - self.centre).square()).sum(0).sqrt().clamp_min(1e-6)
        before, upper = error_and_bound(clean, self.clean_temperature.expand(len(clean.labels)), self.seed)

        def fit(share: float) -> float:
            self.coefficients = self._minimised(found, share)
            return error_at(clean, self._of_signs(clean.signs))

        share, after = _share_that_suffices(fit, upper, first=_CLEAN_SHARE, most=16 * _CLEAN_SHARE)
        if after > upper:
            start = torch.zeros_like(self.coefficients)
            start[0] = self.clean_temperature.log()
            self.coefficients, after = start, before
        self.diagnostics = {
            "clean_ece_with_one_temperature": before,
            "clean_ece": after,
            "clean_ece_upper": upper,
            "clean_share": share,
            **self._errors_of_perturbed(found, lambda g: self._of_signs(g.signs)),
        }

    def _errors_of_perturbed(self, found: list[Group], temperatures: Callable[[Group], Tensor]) -> dict[str, float]:
        """Mean calibration error of all perturbations, as one temperature leaves it and as these do."""
        one = self.clean_temperature
        return {
            "perturbed_ece_with_one_temperature": mean_error(found[1:], lambda g: one.expand(len(g.labels))),
            "perturbed_ece": mean_error(found[1:], temperatures),
            "num_environments": len(found),
        }

    def _minimised(self, found: list[Group], share: float) -> Tensor:
        """The coefficients of the smallest NLL, undisturbed data weighted by `share` to the mean of all perturbed."""
        log_probs, labels, signs = (torch.cat(parts) for parts in zip(*found, strict=True))
        weights, masked = row_weights(found, share), log_probs == -torch.inf
        log_probs = log_probs.masked_fill(masked, 0.0)  # the derivative of an infinite number is none
        coefficients = torch.zeros(1 + _NUM_TERMS, dtype=torch.float64, device=self.centre.device)
        coefficients[0] = self.clean_temperature.log()
        coefficients.requires_grad_(True)
        optimizer = torch.optim.LBFGS([coefficients], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

        def objective() -> Tensor:
            optimizer.zero_grad()
            scaled = log_probs / self._of_signs(signs, coefficients).unsqueeze(-1)
            scaled = scaled.masked_fill(masked, -torch.inf).log_softmax(-1)
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
        return (LOG_BOUND * torch.tanh((own[0] + terms @ own[1:]) / LOG_BOUND)).exp()

    # One temperature for a set.

    def _fit_sets(self, found: list[Group]) -> None:
        # Parts of each environment show how far statistics vary by chance; the undisturbed one counts more often.
        parts = [
            part for k, group in enumerate(found) for part in self._parts(group, _CLEAN_PARTS if k == 0 else _PARTS)
        ]
        raw = torch.stack([statistics_of(part.signs, part.log_probs) for part in parts])
        each = [math.log(best_temperature(group)) for group in found]
        counts = torch.tensor([_CLEAN_PARTS] + [_PARTS] * (len(found) - 1))
        wanted = raw.new_tensor(each).repeat_interleave(counts.to(raw.device))
        self.set_scale = torch.stack([raw.mean(0), raw.std(0).clamp_min(1e-6)])
        self.sets = (raw - self.set_scale[0]) / self.set_scale[1]
        distance = torch.cdist(self.sets, self.sets, compute_mode="donot_use_mm_for_euclid_dist")
        width = _WIDTH * distance[distance > 0].median() if bool((distance > 0).any()) else distance.new_ones(())
        kernel = (-0.5 * (distance / width).square()).exp()
        # Of the mean, the width, and how far answers may go: no further than what was seen.
        self.set_range = torch.stack([wanted.mean(), width, wanted.amax()])
        clean, groups = found[0], torch.arange(len(found)).repeat_interleave(counts).to(raw.device)
        before, upper = error_and_bound(clean, self.clean_temperature.expand(len(clean.labels)), self.seed)

        def of_set(group: Group) -> Tensor:
            return self._of_set(group.signs, group.log_probs).expand(len(group.labels))

        inverse = kernel

        def fit(share: float) -> float:
            nonlocal inverse
            # A smaller ridge is more weight.
            ridge = kernel.new_full((len(raw),), _SET_RIDGE)
            ridge[groups == 0] /= share
            inverse = torch.linalg.inv(kernel + ridge.diag())
            self.set_weights = inverse @ (wanted - wanted.mean())
            return error_at(clean, of_set(clean))

        share, after = _share_that_suffices(fit, upper, first=1.0, most=_MOST_SHARE)
        self.temperature = self.clean_temperature.clone()
        self.diagnostics = {
            "log_temperature_rmse": _left_out_error(inverse, self.set_weights, groups),
            "clean_ece_with_one_temperature": before,
            "clean_ece": after,
            "clean_ece_upper": upper,
            "clean_share": share,
            **self._errors_of_perturbed(found, of_set),
        }

    def _parts(self, group: Group, count: int) -> list[Group]:
        """Random halves of an environment's rows."""
        size = max(2, len(group.labels) // 2)
        generator = stream("cpu", self.seed, "parts")
        found = []
        for _ in range(count):
            rows = torch.randperm(len(group.labels), generator=generator)[:size].to(group.labels.device)
            found.append(Group(group.log_probs[rows], group.labels[rows], group.signs[rows]))
        return found

    def _of_set(self, signs: Tensor, log_probs: Tensor) -> Tensor:
        mean, width, highest = self.set_range
        own = (statistics_of(signs, log_probs) - self.set_scale[0]) / self.set_scale[1]
        kernel = (-0.5 * (torch.cdist(own.unsqueeze(0), self.sets)[0] / width).square()).exp()
        return (mean + kernel @ self.set_weights).clamp(-LOG_BOUND, max(float(highest), 0.0)).exp()

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
        log_probs = pooled_log_probs(pred)
        self.temperature = self._of_set(signs_of(pred, log_probs).to(self.centre), log_probs.to(self.centre))
        return self

    def _calibrate(self, pred: Predictive) -> Predictive:
        log_probs = pooled_log_probs(pred)
        if self.mode == "set":
            temperatures = self.temperature.expand(len(log_probs))
        else:
            temperatures = self._of_signs(signs_of(pred, log_probs).to(self.centre))
        scaled = log_probs / temperatures.to(log_probs).unsqueeze(-1)
        return CategoricalPredictive(scaled.to(pred.dtype).unsqueeze(0), exact=pred.exact)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, {'fitted' if self.fitted else 'not fitted'}"


def _share_that_suffices(
    fit: Callable[[float], float], upper: float, *, first: float, most: float
) -> tuple[float, float]:
    """Return the weight of undisturbed data, and the calibration error that a fit with it leaves them.

    The weight doubles until that error is what one temperature would leave, `upper` at most, or until `most`.
    """
    share = first
    while not (after := fit(share)) <= upper and share < most:
        share *= 2
    return share, after


def _left_out_error(inverse: Tensor, solved: Tensor, groups: Tensor) -> float:
    """RMSE where each environment is left out with all its parts, without fitting again (the mean of all stays)."""
    residuals = []
    for group in groups.unique():
        own = groups == group
        residuals.append(torch.linalg.solve(inverse[own][:, own], solved[own]))
    return float(torch.cat(residuals).square().mean().sqrt())
