"""Estimators of scikit-learn with calibrated answers, and sets and intervals that keep a promise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier, is_regressor
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import _safe_indexing, assert_all_finite, column_or_1d, indexable
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, has_fit_parameter

from bayesguard.calibration import (
    BetaCalibration,
    Calibrator,
    Conformal,
    ConformalInterval,
    DirichletCalibration,
    HistogramBinning,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    VarianceScaling,
    VectorScaling,
)
from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive

Array = npt.NDArray[Any]
Method = Literal["temperature", "vector", "dirichlet", "isotonic", "histogram", "platt", "beta"]
Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_CALIBRATORS: dict[Any, type[Calibrator]] = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "dirichlet": DirichletCalibration,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "platt": PlattScaling,
    "beta": BetaCalibration,
}
_OF_TWO = (PlattScaling, BetaCalibration)
# What trees and neighbours call impossible happens, and no factor on an infinite logit would mend it.
_LEAST = 1e-6


def _only(allowed: Callable[[Any], bool]) -> Callable[[Decorated], Decorated]:
    """A method that is there for some estimators only."""
    return cast(Callable[[Decorated], Decorated], available_if(allowed))


def _of_classes(model: CalibratedModel) -> bool:
    return bool(is_classifier(model.estimator))


def _of_numbers(model: CalibratedModel) -> bool:
    return bool(is_regressor(model.estimator))


class CalibratedModel(MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """Any classifier or regressor of scikit-learn, calibrated, with prediction sets or intervals that are guaranteed.

    Who sees which rows is what makes the promise true. `fit` shuffles the rows of n, and

    - keeps one of `cv` of them (one of 5: 20 %) for the guarantee. Neither the estimator nor the calibrator sees them;
    - on the others cross-validates the estimator (folds stratified by class) and fits the calibrator to the answers
      that each row got from an estimator that had not seen it;
    - fits the estimator to all of the others: `estimator_`, which answers from then on;
    - scores `estimator_`, calibrated, on the rows that were kept (`bayesguard.calibration.Conformal("lac")`, or
      `ConformalInterval("absolute")`): for new rows that are exchangeable with them, `predict_set` and
      `predict_interval` hold the answer with probability `1 - alpha` at least, whatever the estimator is.

    Scores of cross-validation would need no rows of their own, but they are those of other estimators than the one that
    answers, and prove nothing of it; CV+, which asks all of them, promises `1 - 2 alpha` (Barber et al., 2021). With
    `alpha=None` no row is kept, everything is fitted to all rows, and there are neither sets nor intervals.

    With `cv="prefit"` the estimator is fitted already, to other rows: a random half of what `fit` gets fits the
    calibrator, the other half is for the guarantee.

    Args:
        estimator: A classifier with `predict_proba` or else `decision_function`, or a regressor, of one output.
        method: "temperature", "vector", "dirichlet", "isotonic", "histogram", for two classes also "platt" and "beta",
            or a `bayesguard.calibration.Calibrator`, which is copied. For a regressor "temperature" means
            `VarianceScaling` of a Gaussian around the prediction, and the other names have no meaning.
        cv: Number of folds, 2 at least; or a splitter of scikit-learn whose test sets are a partition, which is asked to
            split the rows that are not kept; or "prefit".
        alpha: Mis-coverage of sets and intervals where none is said. None: no rows are kept for them.
        random_state: Which rows are kept, and the folds: a number from 0; a `numpy` RandomState or Generator, which is
            advanced; or None, for others in each fit. The global random state is neither read nor changed here; what
            the estimator itself draws is its own affair.

    Attributes:
        estimator_: The estimator that answers.
        calibrator_: The fitted calibrator, with its `diagnostics`.
        conformal_: The fitted conformal calibrator; None with `alpha=None`.
        classes_: Of a classifier, the labels in the order of the columns, `[K]`.
        scale_: Of a regressor, the standard deviation of y in the rows that were fitted to, the Gaussian's before
            calibration.
        n_features_in_: The estimator's, if it has it.
        feature_names_in_: The estimator's, if it has it.

    `sample_weight` goes to the estimator's `fit`; the calibrator and the guarantee count every row as one. Probabilities
    below 1e-6, as the zeros of trees and neighbours, count as 1e-6.

    References:
        Vovk, Gammerman, Shafer, 2005, Algorithmic learning in a random world. Sadinle, Lei, Wasserman, 2019, JASA 114.
        Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, 2018, JASA 113. Barber, Candès, Ramdas, Tibshirani, 2021, Annals of
        Statistics 49 (why not cross-validation).

    Examples:
        >>> from sklearn.datasets import make_classification
        >>> from sklearn.naive_bayes import GaussianNB
        >>> X, y = make_classification(1500, weights=[0.6], n_redundant=8, random_state=0)
        >>> model = CalibratedModel(GaussianNB(), random_state=0).fit(X[:1000], y[:1000])
        >>> bool(model.calibrator_.temperature > 2)  # it was over-confident
        True
        >>> sets = model.predict_set(X[1000:], alpha=0.1)
        >>> sets.shape, bool(sets[range(500), y[1000:]].mean() > 0.85)
        ((500, 2), True)
    """

    calibrator_: Any  # whose attributes depend on the method
    conformal_: Any

    def __init__(
        self,
        estimator: Any,
        method: Method | Calibrator = "temperature",
        *,
        cv: Any = 5,
        alpha: float | None = 0.1,
        random_state: Any = None,
    ) -> None:
        self.estimator = estimator
        self.method = method
        self.cv = cv
        self.alpha = alpha
        self.random_state = random_state

    # -- what scikit-learn asks

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if hasattr(self.estimator, "__sklearn_tags__") and not isinstance(self.estimator, type):
            own = copy.deepcopy(self.estimator.__sklearn_tags__())
            tags.estimator_type = own.estimator_type
            tags.classifier_tags, tags.regressor_tags = own.classifier_tags, own.regressor_tags
            tags.input_tags = own.input_tags
            if tags.classifier_tags is not None:
                tags.classifier_tags.multi_label = False
                if self.method in ("platt", "beta") or isinstance(self.method, _OF_TWO):
                    tags.classifier_tags.multi_class = False
        tags.target_tags.required = True
        tags.target_tags.multi_output, tags.target_tags.single_output = False, True
        return tags

    @property
    def _estimator_type(self) -> Any:
        """What the kind was told by before scikit-learn 1.6."""
        return getattr(self.estimator, "_estimator_type", None)

    # -- fitting

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the estimator, the calibrator and the guarantee; see the class for which rows each of them sees.

        Args:
            X: `[n, ...]`: whatever the estimator takes (arrays, DataFrames, sparse matrices, lists of texts).
            y: `[n]`: labels of any type, or numbers.
            sample_weight: `[n]`, for the estimator's `fit`.

        Returns:
            The model itself.

        Raises:
            BadInput: Too few rows, one class only, labels that a prefit estimator does not know, weights for a prefit
                estimator, a splitter that leaves rows out or has them twice.
            BadType: An estimator that is neither a classifier nor a regressor, or that takes no weights though some are
                given.
        """
        classifies = _check_estimator(self.estimator)
        calibrator = _calibrator(self.method, classifies)
        alpha = None if self.alpha is None else check_level(self.alpha, "alpha")
        prefit = _check_cv(self.cv)
        X, y = indexable(X, _targets(y, classifies))
        if not len(y):
            raise BadInput("X has no rows, n_samples = 0; there is nothing to fit to")
        weights = self._check_weights(sample_weight, len(y), prefit)
        random = _generator(self.random_state)
        if prefit:
            check_is_fitted(self.estimator)
        if classifies:
            self.classes_ = _classes_of(self.estimator) if prefit else np.unique(y)
            if len(self.classes_) < 2:
                raise BadInput(
                    f"y has one class only, {self.classes_.tolist()[0]!r}; a classifier needs at least 2 classes"
                )
            if isinstance(calibrator, _OF_TWO) and len(self.classes_) > 2:
                raise BadInput(
                    f"Only binary classification is supported. With method={self.method!r} y may have two classes, and has "
                    f"{len(self.classes_)}; use 'temperature', 'vector' or 'dirichlet'"
                )
        targets = _codes(y, self.classes_) if classifies else y

        kept, rest = self._shared(X, y, alpha, random)
        if not classifies:
            self.scale_ = float(y[rest].std()) or 1.0
        if prefit:
            self.estimator_ = self.estimator
            answers, rows = self._ask(self.estimator_, _safe_indexing(X, rest)), rest
        else:
            answers, rows = self._cross_validated(X, y, targets, weights, rest, random)
            self.estimator_ = self._fitted(X, y, weights, rest)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))

        pred = self._predictive(answers)
        self.calibrator_ = calibrator.fit(_asked_of(calibrator, pred), torch.from_numpy(targets[rows]))
        self.conformal_ = None
        if alpha is not None:
            held = self._calibrated(self._predictive(self._ask(self.estimator_, _safe_indexing(X, kept))))
            conformal = Conformal("lac", alpha) if classifies else ConformalInterval("absolute", alpha)
            self.conformal_ = conformal.fit(held, torch.from_numpy(targets[kept]))
        return self

    def _check_weights(self, sample_weight: Any, count: int, prefit: bool) -> Array | None:
        if sample_weight is None:
            return None
        if prefit:
            raise BadInput(
                'sample_weight is for the estimator\'s fit, and with cv="prefit" nothing is fitted but the calibrator, which '
                "counts every row as one; leave it out"
            )
        if not has_fit_parameter(self.estimator, "sample_weight"):
            raise BadType(
                f"sample_weight was given, but {type(self.estimator).__name__}.fit takes none; leave it out, or use an "
                "estimator that has it (of a Pipeline, the last step by itself)"
            )
        weights = np.asarray(sample_weight, dtype=np.float64)
        if weights.shape != (count,):
            raise BadInput(
                f"sample_weight must have one number for each of the {count} rows, got shape {weights.shape}"
            )
        assert_all_finite(weights, input_name="sample_weight")
        return weights

    def _shared(self, X: Any, y: Array, alpha: float | None, random: np.random.Generator) -> tuple[Array, Array]:
        """The rows that are kept for the guarantee, and the others."""
        count, share = len(y), _share(self.cv, X, y)
        # By chance alone, and not by class: kept rows have to be like new ones.
        order = random.permutation(count)
        size = 0 if alpha is None else count // share
        kept, rest = np.sort(order[:size]), np.sort(order[size:])
        if (alpha is not None and not size) or len(rest) < (1 if self.cv == "prefit" else 2):
            raise BadInput(
                f"X has too few rows, n_samples = {count}: with cv={self.cv!r} one of {share} is kept for the guarantee and "
                "the others are cross-validated. Give more rows, a smaller cv, or alpha=None to keep none"
            )
        return kept, rest

    def _cross_validated(
        self, X: Any, y: Array, targets: Array, weights: Array | None, rest: Array, random: np.random.Generator
    ) -> tuple[Array, Array]:
        """Answers for the rows `rest` from estimators that did not see them, and the row of each."""
        parts, places = [], []
        for train, test in self._folds(X, y, targets, rest, random):
            fitted = self._fitted(X, y, weights, rest[train])
            parts.append(self._ask(fitted, _safe_indexing(X, rest[test])))
            places.append(rest[test])
        rows = np.concatenate(places)
        if not np.array_equal(np.sort(rows), rest):
            raise BadInput(
                f"cv={self.cv!r} does not test every row exactly once; use a number of folds or a splitter that makes a "
                "partition, as KFold does"
            )
        return np.concatenate(parts), rows

    def _folds(
        self, X: Any, y: Array, targets: Array, rest: Array, random: np.random.Generator
    ) -> Iterator[tuple[Array, Array]]:
        if not isinstance(self.cv, (int, np.integer)):
            yield from self.cv.split(_safe_indexing(X, rest), y[rest])
            return
        folds = min(int(self.cv), len(rest))
        if folds < self.cv:
            _warn(f"cv={self.cv} folds of {len(rest)} rows are not possible, and {folds} are used; give more rows")
        # Rows of a class in turn to each fold. (StratifiedKFold would read the global random state, or fix it.)
        order = random.permutation(len(rest))
        if _of_classes(self):
            order = order[np.argsort(targets[rest][order], kind="stable")]
            counts = np.bincount(targets[rest], minlength=len(self.classes_))
            if (counts < 2).any():
                _warn(
                    f"class {self.classes_[counts < 2].tolist()[0]!r} has fewer than 2 rows to fit to, and nothing can be learnt of "
                    "how well it is predicted; give more rows of it"
                )
        fold = np.empty(len(rest), dtype=np.int64)
        fold[order] = np.arange(len(rest)) % folds
        for number in range(folds):
            yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)

    def _fitted(self, X: Any, y: Array, weights: Array | None, rows: Array) -> Any:
        if _of_classes(self) and (y[rows] == y[rows][0]).all():
            raise BadInput(
                f"{len(rows)} of the rows that the estimator would be fitted to are all of class {y[rows].tolist()[0]!r}; give more "
                "rows of the other classes"
            )
        more = {} if weights is None else {"sample_weight": weights[rows]}
        return clone(self.estimator).fit(_safe_indexing(X, rows), y[rows], **more)

    # -- answers

    def _ask(self, estimator: Any, X: Any) -> Array:
        """What the estimator says of the rows: numbers `[N]`, or of each of the model's classes `[N, K]`."""
        if not _of_classes(self):
            return column_or_1d(estimator.predict(X)).astype(np.float64)
        name = _response(estimator)
        answers = np.asarray(getattr(estimator, name)(X), dtype=np.float64)
        if name == "decision_function" and answers.ndim == 1:
            answers = np.stack([-answers / 2, answers / 2], axis=-1)
        own = _classes_of(estimator)
        # Of three classes there are three pairs, too.
        by_pair = name == "decision_function" and len(own) > 2 and _compares_pairs(estimator)
        if by_pair or answers.shape[1:] != (len(own),):
            raise BadInput(
                f"{type(estimator).__name__}.{name} gives shape {answers.shape} for {len(own)} classes; one column for each "
                'is needed (of an SVC, decision_function_shape="ovr")'
            )
        # A class that this estimator has never seen.
        full = np.full((len(answers), len(self.classes_)), 0.0 if name == "predict_proba" else -np.inf)
        full[:, _codes(own, self.classes_)] = answers
        return full

    def _predictive(self, answers: Array) -> Predictive:
        if not _of_classes(self):
            return Predictive.from_normal(torch.from_numpy(answers), self.scale_)
        if _response(self.estimator_) == "decision_function":
            return Predictive.from_logits(torch.from_numpy(answers))
        pred = Predictive.from_probs(torch.from_numpy(answers))
        return CategoricalPredictive(pred.draw_logits.clamp_min(float(np.log(_LEAST))), exact=True)

    def _calibrated(self, pred: Predictive) -> Predictive:
        return _columns_of(self.calibrator_(_asked_of(self.calibrator_, pred)))

    def predictive(self, X: Any) -> Any:
        """Return the calibrated predictive distribution of every row, its sets or intervals guaranteed.

        Args:
            X: `[N, ...]`.

        Returns:
            A `Predictive` over the K classes in the order of `classes_` (also for two), or of numbers.
        """
        check_is_fitted(self)
        pred = self._calibrated(self._predictive(self._ask(self.estimator_, X)))
        return pred if self.conformal_ is None else self.conformal_(pred)

    def predict(self, X: Any) -> Array:
        """Return the most probable label by the calibrated probabilities, or the regressor's prediction, `[N]`."""
        check_is_fitted(self)
        if not _of_classes(self):
            return cast(Array, self.estimator_.predict(X))
        return cast(Array, self.classes_[self.predict_proba(X).argmax(-1)])

    @_only(_of_classes)
    def predict_proba(self, X: Any) -> Array:
        """Return the calibrated probabilities `[N, K]`, float64, in the order of `classes_`."""
        return cast(Array, self.predictive(X).probs.numpy())

    @_only(_of_classes)
    def predict_set(self, X: Any, alpha: float | None = None) -> Array:
        """Return which classes can be the answer, bool `[N, K]`: with probability `1 - alpha` at least the true one is.

        Args:
            X: `[N, ...]`.
            alpha: Mis-coverage; None for the model's own.

        Raises:
            BadInput: The model was fitted with `alpha=None`.
        """
        return cast(Array, self._guaranteed(X).prediction_set(alpha).numpy())

    @_only(_of_numbers)
    def predict_interval(self, X: Any, alpha: float | None = None) -> Array:
        """Return the lower and upper ends `[N, 2]`: with probability `1 - alpha` at least, the answer lies between.

        Args:
            X: `[N, ...]`.
            alpha: Mis-coverage; None for the model's own.

        Raises:
            BadInput: The model was fitted with `alpha=None`.
        """
        return np.stack([end.numpy() for end in self._guaranteed(X).interval(alpha)], axis=-1)

    def _guaranteed(self, X: Any) -> Any:
        check_is_fitted(self)
        if self.conformal_ is None:
            raise BadInput(
                "alpha was None in fit, and no rows were kept for sets and intervals; fit a CalibratedModel with alpha=0.1"
            )
        return self.predictive(X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy of a classifier, R² of a regressor."""
        measure = accuracy_score if _of_classes(self) else r2_score
        return float(measure(y, self.predict(X), sample_weight=sample_weight))


def _check_estimator(estimator: Any) -> bool:
    """Whether the estimator is a classifier, and not a regressor; BadType for all else."""
    if isinstance(estimator, type) or not hasattr(estimator, "fit"):
        given = f"the class {estimator.__name__}" if isinstance(estimator, type) else type(estimator).__name__
        raise BadType(f"estimator must be a classifier or regressor of scikit-learn, got {given}; pass an instance")
    if is_classifier(estimator):
        return True
    if not is_regressor(estimator):
        raise BadType(
            f"estimator must be a classifier or a regressor, got {type(estimator).__name__}, which is neither"
        )
    return False


def _response(estimator: Any) -> str:
    for name in ("predict_proba", "decision_function"):
        if hasattr(estimator, name):
            return name
    raise BadType(
        f"estimator {type(estimator).__name__} has neither predict_proba nor decision_function; only labels cannot be "
        "calibrated"
    )


def _compares_pairs(estimator: Any) -> bool:
    """Whether the columns of `decision_function` are pairs of classes."""
    while (inner := _answering_in(estimator)) is not None:
        estimator = inner
    return getattr(estimator, "decision_function_shape", None) == "ovo"


def _answering_in(estimator: Any) -> Any:
    """The last step of a pipeline, or what a search has found; None for other estimators."""
    return estimator.steps[-1][1] if hasattr(estimator, "steps") else getattr(estimator, "best_estimator_", None)


def _classes_of(estimator: Any) -> Array:
    classes = np.asarray(estimator.classes_)
    if classes.ndim != 1:
        raise BadInput(f"{type(estimator).__name__} has several outputs; a CalibratedModel is for one")
    return classes


def _calibrator(method: Any, classifies: bool) -> Calibrator:
    names = ", ".join(map(repr, get_args(Method)))
    if isinstance(method, Calibrator):
        if method.needs_own_data or method.shifts is not None:
            raise BadInput(
                f"method must be a calibrator of probabilities or scales, got {type(method).__name__}; sets and intervals "
                "are fitted by the CalibratedModel itself, and shifts need a Predictor"
            )
        return copy.deepcopy(method)
    if not isinstance(method, str):
        raise BadType(f"method must be one of {names}, or a fresh Calibrator, got {type(method).__name__}")
    if method not in _CALIBRATORS:
        raise BadInput(f"method must be one of {names}, or a Calibrator, got {method!r}")
    if classifies:
        return _CALIBRATORS[method]()
    if method != "temperature":
        raise BadInput(
            f"method={method!r} is for classifiers; for a regressor leave 'temperature' (VarianceScaling), or pass a "
            "calibrator of numbers, as CDFCalibration()"
        )
    return VarianceScaling()


def _check_cv(cv: Any) -> bool:
    """Whether the estimator is fitted already."""
    if isinstance(cv, str):
        if cv != "prefit":
            raise BadInput(f"cv must be a number of folds, a splitter or 'prefit', got {cv!r}")
        return True
    if not (hasattr(cv, "split") and hasattr(cv, "get_n_splits")):
        check_count(cv, "cv (a number of folds, a splitter or 'prefit')", minimum=2)
    return False


def _share(cv: Any, X: Any, y: Array) -> int:
    """Of how many rows one is kept for the guarantee."""
    if isinstance(cv, str):
        return 2
    return int(cv) if isinstance(cv, (int, np.integer)) else max(2, int(cv.get_n_splits(X, y)))


def _generator(random_state: Any) -> np.random.Generator:
    if isinstance(random_state, np.random.Generator):
        return random_state
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31, size=4))
    return np.random.default_rng(None if random_state is None else check_count(random_state, "random_state", minimum=0))


def _targets(y: Any, classifies: bool) -> Array:
    if y is None:
        raise BadInput("CalibratedModel requires y to be passed, but the target y is None")
    if classifies:
        check_classification_targets(y)
        return cast(Array, column_or_1d(y, warn=True))
    values = column_or_1d(y, warn=True)
    try:
        values = values.astype(np.float64)
    except (TypeError, ValueError):
        raise BadType(f"y must hold numbers for a regressor, got dtype {values.dtype}") from None
    assert_all_finite(values, input_name="y")
    return cast(Array, values)


def _codes(labels: Array, classes: Array) -> Array:
    """The place of every label among the classes."""
    order = np.argsort(classes)
    place = order[np.searchsorted(classes, labels, sorter=order).clip(max=len(classes) - 1)]
    unknown = classes[place] != labels
    if unknown.any():
        raise BadInput(
            f"y has label {labels[unknown].tolist()[0]!r}, which the estimator does not know; its classes are {classes.tolist()}"
        )
    return cast(Array, place)


def _asked_of(calibrator: Calibrator, pred: Predictive) -> Predictive:
    """The predictive as the calibrator takes it: yes or no for those of two classes."""
    if not isinstance(calibrator, _OF_TWO):
        return pred
    log_probs = pred.logits
    return BernoulliPredictive.from_logits(log_probs[:, 1] - log_probs[:, 0])


def _columns_of(pred: Predictive) -> Predictive:
    """Yes or no as a choice of two classes."""
    if not isinstance(pred, BernoulliPredictive):
        return pred
    return Predictive.from_logits(torch.stack([F.logsigmoid(-pred.logits), F.logsigmoid(pred.logits)], dim=-1))


def _warn(message: str) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=4)
