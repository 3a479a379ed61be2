"""How much likelier inputs are where predictions are wanted than where targets are known: a classifier of the two tells.

S. Bickel, M. Brückner, T. Scheffer (2009). Discriminative learning under covariate shift. JMLR 10, section 3.
M. Sugiyama, T. Suzuki, T. Kanamori (2012). Density ratio estimation in machine learning, chapter 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesguard.calibration.binary_fit import AnswerLikelihood, newton
from bayesguard.checks import check_count, check_finite, check_shape
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.weights import effective_sample_size
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import derive_seed

_FOLDS = 5
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse variances' reciprocals, scikit-learn's C
# Fewer equal rows' worth of weight, or a smaller share of the rows, and an average over them says nothing.
_LEAST_EFFECTIVE, _LEAST_SHARE = 30.0, 0.01
_MOST_BEYOND = 0.5
_LEAST_ROWS = 50


@dataclass(frozen=True)
class DensityRatio:
    """Estimated ratios of the density of the target's inputs to that of the source's; see `density_ratio`.

    Attributes:
        weights: Of the source rows `[N]`, float64, of mean 1; each from a classifier that did not see the row.
        target_weights: Of the target rows `[M]`, in the same way: what weighted conformal prediction needs of rows that
            the ratio was made from.
        effective_size: Kish's effective sample size of `weights`: how many equal rows they are worth.
        auc: Area under the ROC curve of the classifiers on rows they did not see; 0.5 where nothing tells the two apart.
        num_clipped: Source rows whose weight was cut.
        strength: Inverse strength of the ridge that was chosen.
    """

    weights: Tensor
    target_weights: Tensor
    effective_size: float
    auc: float
    num_clipped: int
    strength: float
    _slope: Tensor
    _log_offset: float
    _bound: float

    def __call__(self, features: object) -> Tensor:
        """Return the ratios of new rows `[n]` from their features `[n, F]`, float64, in the units of `weights`.

        Raises:
            BadInput: Another number of features, or NaN.
        """
        values = _checked(features, "features")
        check_shape(values, (len(values), len(self._slope)), "features")
        return (values @ self._slope + self._log_offset).exp().clamp_max(self._bound)


def density_ratio(
    source_features: object, target_features: object, *, clip: float | None = None, seed: int = 0
) -> DensityRatio:
    """Estimate how much likelier inputs are in the target than in the source, from unlabelled rows of both.

    A logistic regression on standardised features tells source from target; its odds, over those of the numbers of rows,
    are the ratio. Every row is weighted by a regression that did not see it (5 folds), the ridge is the one of the
    smallest log loss on rows not seen, and a slope and an offset fitted there make the odds honest. The ratio is
    exp-linear in the features: exact for two Gaussians of one covariance; add squares where spreads differ. It says
    nothing of whether targets depend on inputs as before, which all reweighting assumes.

    Args:
        source_features: Of the labelled held-out rows, `[N, F]`: inputs, or what a network makes of them
            (`bayesguard.features`).
        target_features: Of rows like those that predictions are wanted for, `[M, F]`.
        clip: Quantile of the source's weights beyond which they are cut, as 0.99: a larger effective size for some bias.
        seed: Of the folds.

    Returns:
        The weights, how many rows they are worth, and a function for new rows.

    Raises:
        BadInput: Fewer than 50 rows of either, NaN, other shapes, weights that are worth fewer than 30 equal rows or 1 % of
            the rows, or a target of which half lies beyond all source rows.

    Examples:
        >>> x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> ratio = density_ratio(x[:1000], x[1000:] + torch.tensor([1.0, 0.0]))
        >>> ratio.effective_size < 600, ratio(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).argmax().item()
        (True, 1)
    """
    source, target = _checked(source_features, "source_features"), _checked(target_features, "target_features")
    check_shape(target, (len(target), source.shape[1]), "target_features")
    for rows, name in ((source, "source_features"), (target, "target_features")):
        if len(rows) < _LEAST_ROWS:
            raise BadInput(f"{name} has {len(rows)} rows; a classifier of the two needs {_LEAST_ROWS} of each at least")
    if clip is not None and not 0 < clip < 1:
        raise BadInput(f"clip must be strictly between 0 and 1, a quantile of the weights as 0.99, got {clip}")
    check_count(seed, "seed", minimum=0)

    rows, is_target = torch.cat([source, target]), torch.arange(len(source) + len(target)) >= len(source)
    odds, slope, offset, strength = _cross_fitted(rows, is_target, seed)
    scale, shift = _honest(odds, is_target)
    ratios = (scale * odds + shift).exp()
    own, other = ratios[: len(source)], ratios[len(source) :]
    bound = torch.inf if clip is None else float(own.quantile(clip))
    unit = float(own.clamp_max(bound).mean())  # the mean of the true ratio is 1: of the numbers of rows nothing is left
    weights, target_weights = own.clamp_max(bound) / unit, other.clamp_max(bound) / unit
    effective = _check_worth(weights, target_weights)
    beyond = float((other > own.max()).double().mean())
    if beyond > _MOST_BEYOND:
        raise BadInput(
            f"{beyond:.0%} of the target rows are less like the source than any source row: no weights of those make them "
            "stand for the target. Label some of the target, or take features in which the two overlap"
        )
    return DensityRatio(
        weights,
        target_weights,
        effective,
        _auc(odds, is_target),
        int((own > bound).sum()),
        strength,
        scale * slope,
        scale * offset + shift - math.log(unit),
        bound / unit,
    )


def _checked(features: object, name: str) -> Tensor:
    values = as_given(features, name).detach().cpu().double()
    if values.dim() != 2 or not values.shape[1]:
        raise BadInput(f"{name} must be [rows, features], got shape {tuple(values.shape)}; flatten(1) makes them so")
    check_finite(values, name)
    return values


def _cross_fitted(rows: Tensor, is_target: Tensor, seed: int) -> tuple[Tensor, Tensor, float, float]:
    """Log-odds of every row by a regression that did not see it `[n]`; mean slope, offset, and the ridge."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    labels = is_target.numpy()
    splitter = StratifiedKFold(_FOLDS, shuffle=True, random_state=derive_seed(seed, "density ratio") % 2**32)
    folds = [(torch.as_tensor(seen), torch.as_tensor(unseen)) for seen, unseen in splitter.split(rows.numpy(), labels)]
    best: tuple[float, Any] = (torch.inf, None)
    for strength in _STRENGTHS:
        odds = rows.new_zeros(len(rows))
        slopes, offsets = [], []
        for seen, unseen in folds:
            centre, spread = rows[seen].mean(0), rows[seen].std(0)
            spread = torch.where(spread > 0, spread, 1.0)
            model = LogisticRegression(C=strength, max_iter=1000)
            model.fit(((rows[seen] - centre) / spread).numpy(), labels[seen.numpy()])
            slope = torch.as_tensor(model.coef_[0]) / spread
            offset = float(model.intercept_[0]) - float(slope @ centre)
            odds[unseen] = rows[unseen] @ slope + offset
            slopes.append(slope)
            offsets.append(offset)
        loss = float(torch.nn.functional.binary_cross_entropy_with_logits(odds, is_target.double()))
        if loss < best[0]:
            best = loss, (odds, torch.stack(slopes).mean(0), sum(offsets) / _FOLDS, strength)
    found: tuple[Tensor, Tensor, float, float] = best[1]
    return found


def _honest(odds: Tensor, is_target: Tensor) -> tuple[float, float]:
    """Slope and offset that make the log-odds of unseen rows honest (Platt, 1999, with his targets)."""

    def features(values: Tensor) -> Tensor:
        return torch.stack([values, torch.ones_like(values)], dim=-1)

    side = (2.0 * is_target.double() - 1).unsqueeze(-1)
    likelihood = AnswerLikelihood(
        odds.reshape(1, -1, 1), side, torch.ones_like(side), odds.new_ones(1), features
    ).smoothed()
    scale, shift = newton(likelihood).numbers[0].tolist()
    # Where nothing tells the two apart, regressions guess worse than chance on rows they did not see.
    return (scale, shift) if scale > 0 else (0.0, 0.0)


def _auc(odds: Tensor, is_target: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_target.numpy(), odds.numpy()))


def _check_worth(weights: Tensor, target_weights: Tensor) -> float:
    """Return how many equal rows the source's weights are worth, or raise BadInput where they are too few.

    The target's mean ratio is the source's mean square: it sees what the source has no rows for.
    """
    count = len(weights)
    effective, by_target = float(effective_sample_size(weights)), count / float(target_weights.mean())
    if min(effective, by_target) < max(_LEAST_EFFECTIVE, _LEAST_SHARE * count):
        raise BadInput(
            f"weights of the {count} source rows are worth {min(effective, by_target):.1f} equal ones, too few to stand for "
            f"the target ({_LEAST_EFFECTIVE:.0f}, and {_LEAST_SHARE:.0%} of the rows, are needed): hardly any source row "
            "is like those that predictions are wanted for. Label some of the target, take fewer features, or cut the "
            "largest weights with clip=0.99, which is biased"
        )
    return effective
