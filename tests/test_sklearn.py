"""Estimators of scikit-learn, calibrated: scikit-learn's own checks, who sees which rows, and the promise that follows."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone, is_classifier, is_regressor
from sklearn.cluster import KMeans
from sklearn.ensemble import StackingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, Ridge
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

import bayesguard as bg
from bayesguard.calibration import CDFCalibration, Conformal, MatrixScaling, ShiftAwareScaling, TemperatureScaling
from bayesguard.sklearn import CalibratedModel

Array = npt.NDArray[Any]

COUNTS_ROWS = (
    "the calibrator and the guarantee count every row as one, so that a weight of 2 is not the same as two rows"
)
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": COUNTS_ROWS,
    "check_sample_weight_equivalence_on_sparse_data": COUNTS_ROWS,
}


@pytest.mark.filterwarnings("ignore")  # the checks fit to a few rows of noise, of which calibrators complain
@parametrize_with_checks(  # type: ignore[untyped-decorator]
    [
        CalibratedModel(LogisticRegression()),
        CalibratedModel(LogisticRegression(), "platt", alpha=None),
        CalibratedModel(LinearSVC()),
        CalibratedModel(Ridge()),
    ],
    expected_failed_checks=lambda model: EXPECTED,
)
def test_the_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


# -- estimators whose truth is known


class Sharp(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier whose rows are the true logits, in the order of its sorted classes; it says `factor` times them."""

    def __init__(self, factor: float = 3.0) -> None:
        self.factor = factor

    def fit(self, X: Array, y: Array) -> Sharp:
        self.classes_ = np.unique(y)
        return self

    def predict_proba(self, X: Array) -> Array:
        return probabilities(self.factor * X)


class Remembering(Sharp):
    """The same, without the last column, which is the number of the row; it says which rows it was fitted to."""

    def fit(self, X: Array, y: Array) -> Remembering:
        super().fit(X, y)
        self.rows_ = X[:, -1].astype(int)
        return self

    def predict_proba(self, X: Array) -> Array:
        self.asked_ = X[:, -1].astype(int)
        return super().predict_proba(X[:, :-1])


def probabilities(logits: Array) -> Array:
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def drawn(count: int, seed: int = 0, classes: int = 3) -> tuple[Array, Array]:
    """Logits `[n, K]`, and labels drawn from them."""
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(count, classes))
    return logits, (probabilities(logits).cumsum(-1) < random.random((count, 1))).sum(-1).clip(max=classes - 1)


def excess(probs: Array, logits: Array) -> float:
    """How much log loss the predictions have beyond the truth: its mean Kullback-Leibler divergence to them."""
    truth = probabilities(logits)
    return float((truth * np.log(truth / probs)).sum(-1).mean())


def lines(count: int, columns: int, random: np.random.Generator) -> tuple[Array, Array]:
    X = random.normal(size=(count, columns))
    return X, X.sum(-1) / math.sqrt(columns) + random.standard_t(4, size=count)


# -- calibration


@pytest.mark.parametrize("method", ["temperature", "vector", "dirichlet"])
def test_an_overconfident_classifier_is_mended(method: Any) -> None:
    X, y = drawn(2000)
    new, _ = drawn(4000, seed=1)
    model = CalibratedModel(Sharp(3.0), method, random_state=0).fit(X, y)
    # Twice n times the excess of a maximum likelihood is chi-square of as many degrees as there are parameters: below
    # its mean and 5 standard deviations. 1,600 rows are fitted to.
    parameters = {"temperature": 1, "vector": 5, "dirichlet": 11}[method]
    tolerance = (parameters + 5 * math.sqrt(2 * parameters)) / (2 * 1600)
    assert excess(model.predict_proba(new), new) < tolerance
    assert excess(probabilities(3 * new), new) > 20 * tolerance  # what it was before


def test_an_honest_classifier_stays_as_it_is() -> None:
    X, y = drawn(2000)
    scaling = CalibratedModel(Sharp(1.0), random_state=0).fit(X, y).calibrator_
    assert abs(scaling.temperature - 1) < 5 * scaling.diagnostics["standard_error"]
    assert scaling.diagnostics["num_examples"] == 1600
    overconfident = CalibratedModel(Sharp(3.0), random_state=0).fit(X, y).calibrator_
    assert abs(overconfident.temperature - 3) < 5 * overconfident.diagnostics["standard_error"]


@pytest.mark.parametrize("method", ["isotonic", "histogram", "platt", "beta", "temperature"])
def test_two_classes(method: Any) -> None:
    X, y = drawn(3000, classes=2)
    new, answers = drawn(4000, seed=1, classes=2)
    model = CalibratedModel(Sharp(3.0), method, random_state=0).fit(X, y)
    probs, rows = model.predict_proba(new), np.arange(4000)
    gain = np.log(probs[rows, answers] / probabilities(3 * new)[rows, answers])
    assert gain.mean() > 5 * gain.std() / math.sqrt(4000)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)
    assert isinstance(model.predictive(new), bg.predictive.CategoricalPredictive)
    np.testing.assert_array_equal(model.predict(new), probs.argmax(-1))


@pytest.mark.filterwarnings("ignore:the temperature stopped at the bound")
def test_real_estimators_are_mended_and_their_twin_without_knowledge_becomes_modest() -> None:
    random = np.random.default_rng(0)
    signal = random.normal(size=(3000, 1))
    X = signal + 0.3 * random.normal(size=(3000, 12))  # twelve times the same, which naive Bayes counts twelve times
    y = (signal[:, 0] + random.normal(size=3000) > 0).astype(int)
    for estimator in (GaussianNB(), KNeighborsClassifier(5), DecisionTreeClassifier(random_state=0)):
        model = CalibratedModel(estimator, random_state=0).fit(X[:1500], y[:1500])
        before = np.log(model.estimator_.predict_proba(X[1500:]).clip(1e-6)[range(1500), y[1500:]])
        gain = np.log(model.predict_proba(X[1500:])[range(1500), y[1500:]]) - before
        assert gain.mean() > 5 * gain.std() / math.sqrt(1500), estimator
    twin = CalibratedModel(GaussianNB(), random_state=0).fit(X[:1500], random.permutation(y[:1500]))
    assert twin.predict_proba(X[1500:]).max() < 0.6


# -- the guarantee


def check_coverage(covered: Array, alpha: float, kept: int) -> None:
    """Coverage is Beta distributed over kept rows (Vovk, 2012), and its estimate binomial over new ones."""
    error = math.sqrt(alpha * (1 - alpha) * (1 / kept + 1 / len(covered)))
    assert covered.mean() > 1 - alpha - 5 * error


@pytest.mark.parametrize(
    "estimator",
    [Sharp(3.0), LinearSVC(), SVC(kernel="linear"), GaussianNB(), KNeighborsClassifier(3)],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_sets_cover(estimator: Any, alpha: float) -> None:
    X, y = drawn(1500)
    new, answers = drawn(4000, seed=1)
    model = CalibratedModel(estimator, alpha=alpha, random_state=0).fit(X, y)
    sets = model.predict_set(new)
    assert sets.dtype == bool
    assert sets.shape == (4000, 3)
    check_coverage(sets[range(4000), answers], alpha, 300)
    assert sets.mean() < 0.9  # not by holding everything
    np.testing.assert_array_equal(sets, model.predict_set(new, alpha))
    assert sets.sum() >= model.predict_set(new, 2 * alpha).sum() > 4000 * (1 - 2 * alpha)
    assert sets[range(4000), model.predict(new)].all()
    np.testing.assert_array_equal(model.predictive(new).prediction_set().numpy(), sets)


@pytest.mark.parametrize("method", ["temperature", CDFCalibration()], ids=["gaussian", "cdf"])
def test_intervals_cover(method: Any) -> None:
    random = np.random.default_rng(0)
    X, y = lines(1500, 5, random)
    new, answers = lines(4000, 5, random)
    model = CalibratedModel(Ridge(), method, alpha=0.2, random_state=0).fit(X, y)
    ends = model.predict_interval(new)
    assert ends.shape == (4000, 2)
    covered = (ends[:, 0] <= answers) & (answers <= ends[:, 1])
    check_coverage(covered, 0.2, 300)
    check_coverage(~covered, 0.8 - 1 / 301, 300)  # and not more than it should
    np.testing.assert_array_equal(model.predict(new), model.estimator_.predict(new))
    wider = model.predict_interval(new, 0.05)
    assert (wider[:, 0] < ends[:, 0]).all()
    assert (wider[:, 1] > ends[:, 1]).all()
    np.testing.assert_array_equal(torch.stack(model.predictive(new).interval(), -1).numpy(), ends)


def test_the_gaussian_has_the_spread_of_the_residuals() -> None:
    random = np.random.default_rng(0)
    X, y = lines(2000, 5, random)
    model = CalibratedModel(Ridge(), alpha=None, random_state=0).fit(X, 1e6 * y)
    spread = model.predictive(X[:1]).stddev.item() / 1e6
    # Student's t of 4 degrees has variance 2; its fourth moment is infinite, and the sample's own gives the error.
    residuals = Ridge().fit(X, y).predict(X) - y
    error = (residuals**2).std() / math.sqrt(2000) / (2 * math.sqrt(2))
    assert abs(spread - math.sqrt(2)) < 5 * error


def test_an_unstable_estimator_is_covered_and_scores_of_cross_validation_would_not_do() -> None:
    """40 rows to fit 40 columns to: errors of least squares peak there, and are small with 32 rows, in folds."""
    covered, by_folds, alpha, repeats = [], [], 0.2, 120
    for seed in range(repeats):
        random = np.random.default_rng(seed)
        X, y = lines(50, 40, random)
        new, answers = lines(200, 40, random)
        model = CalibratedModel(LinearRegression(fit_intercept=False), alpha=alpha, random_state=1000 + seed).fit(X, y)
        lower, upper = model.predict_interval(new).T
        covered.append(((lower <= answers) & (answers <= upper)).mean())
        whole, scores = LinearRegression(fit_intercept=False).fit(X[:40], y[:40]), np.empty(40)
        for train, test in KFold(5).split(X[:40]):
            fold = LinearRegression(fit_intercept=False).fit(X[train], y[train])
            scores[test] = abs(y[test] - fold.predict(X[test]))
        bound = np.sort(scores)[math.ceil(41 * (1 - alpha)) - 1]
        by_folds.append((abs(answers - whole.predict(new)) <= bound).mean())
    for values, fails in ((covered, False), (by_folds, True)):
        error = np.std(values) / math.sqrt(repeats)
        assert (np.mean(values) < 1 - alpha - 5 * error) == fails
    assert abs(np.mean(covered) - 9 / 11) < 5 * np.std(covered) / math.sqrt(
        repeats
    )  # the 9th of 10 kept, and a new one


def test_kept_rows_are_seen_by_nothing_but_the_guarantee() -> None:
    X, y = drawn(500)
    X = np.column_stack([X, np.arange(500)])
    model = CalibratedModel(Remembering(), random_state=3).fit(X, y)
    kept = np.setdiff1d(np.arange(500), model.estimator_.rows_)
    assert len(kept) == 100
    np.testing.assert_array_equal(model.estimator_.asked_, kept)
    other = y.copy()
    other[kept] = (other[kept] + 1) % 3
    again = CalibratedModel(Remembering(), random_state=3).fit(X, other)
    assert torch.equal(again.calibrator_.temperature, model.calibrator_.temperature)
    assert not torch.equal(again.conformal_.scores, model.conformal_.scores)
    # Chosen anew by another seed, none without a guarantee.
    assert set(CalibratedModel(Remembering(), random_state=4).fit(X, y).estimator_.rows_) != set(model.estimator_.rows_)
    everything = CalibratedModel(Remembering(), alpha=None, random_state=3).fit(X, y)
    assert everything.conformal_ is None
    assert len(everything.estimator_.rows_) == everything.calibrator_.diagnostics["num_examples"] == 500


def test_the_calibrator_sees_answers_for_rows_that_were_held_out() -> None:
    """One neighbour is always right about the rows it has: fitted to those, the temperature would find no mistake."""
    random = np.random.default_rng(0)
    X, y = random.normal(size=(1000, 3)), random.integers(2, size=1000)
    with pytest.warns(bg.CalibrationWarning, match="stopped at the bound"):
        model = CalibratedModel(KNeighborsClassifier(1), random_state=0).fit(X, y)
    assert model.predict_proba(X).max() < 0.6


# -- estimators that are fitted already


def test_prefit() -> None:
    X, y = drawn(1000)
    fitted = LogisticRegression().fit(X[:200], y[:200])
    model = CalibratedModel(fitted, cv="prefit", random_state=0).fit(X[200:], y[200:])
    assert model.estimator_ is fitted
    assert model.calibrator_.diagnostics["num_examples"] == len(model.conformal_.scores) == 400
    new, answers = drawn(4000, seed=1)
    check_coverage(model.predict_set(new)[range(4000), answers], 0.1, 400)
    whole = CalibratedModel(fitted, cv="prefit", alpha=None).fit(X[200:], y[200:])
    assert whole.calibrator_.diagnostics["num_examples"] == 800

    ridge = Ridge().fit(X[:200], X[:200, 0])
    intervals = CalibratedModel(ridge, cv="prefit").fit(X[200:], X[200:, 0] + y[200:])
    assert len(intervals.conformal_.scores) == 400


def test_prefit_refuses_what_it_cannot_use() -> None:
    X, y = drawn(100)
    fitted = LogisticRegression().fit(X, y)
    with pytest.raises(
        bg.BadInput, match=r"y has label 7, which the estimator does not know; its classes are \[0, 1, 2\]"
    ):
        CalibratedModel(fitted, cv="prefit").fit(X, np.where(y == 2, 7, y))
    with pytest.raises(bg.BadInput, match="sample_weight is for the estimator's fit"):
        CalibratedModel(fitted, cv="prefit").fit(X, y, sample_weight=np.ones(100))
    with pytest.raises(NotFittedError):
        CalibratedModel(LogisticRegression(), cv="prefit").fit(X, y)


# -- labels, weights, kinds of data


@pytest.mark.parametrize("estimator", [LogisticRegression(), LinearSVC()], ids=lambda each: type(each).__name__)
def test_labels_of_any_type_and_order(estimator: Any) -> None:
    X, y = drawn(600)
    names = np.array(["zebra", "ant", "mouse"])
    plain = CalibratedModel(estimator, random_state=0).fit(X, y)
    named = CalibratedModel(estimator, random_state=0).fit(X, names[y])
    assert named.classes_.tolist() == ["ant", "mouse", "zebra"]
    assert set(named.predict(X)) <= set(names)
    # Rows of a class are dealt to folds in the order of the classes, so the two are equal but for the chance of that.
    places = np.searchsorted(named.classes_, names)
    assert abs(named.predict_proba(X)[:, places] - plain.predict_proba(X)).max() < 0.05
    assert named.score(X, names[y]) == pytest.approx(plain.score(X, y), abs=0.02)
    booleans = CalibratedModel(estimator, random_state=0).fit(X, y == 1)
    assert booleans.predict(X).dtype == bool


def test_a_prefit_estimator_with_its_classes_in_another_order() -> None:
    X, y = drawn(400)
    fitted = Sharp(1.0).fit(X, y)
    fitted.classes_ = np.array(["c", "a", "b"])
    model = CalibratedModel(fitted, cv="prefit", random_state=0).fit(X, fitted.classes_[y])
    assert model.classes_.tolist() == ["c", "a", "b"]
    assert model.score(X, fitted.classes_[y]) == (X.argmax(-1) == y).mean()
    assert abs(model.calibrator_.temperature - 1) < 5 * model.calibrator_.diagnostics["standard_error"]


def test_settings_that_name_labels_hold_in_every_fold() -> None:
    X, y = drawn(300, classes=2)
    named = np.array(["no", "yes"])[y]
    model = CalibratedModel(LogisticRegression(class_weight={"no": 1, "yes": 5}), random_state=0).fit(X, named)
    assert model.predictive(X).num_classes == 2


def test_weights_go_to_the_estimator() -> None:
    X, y = drawn(300)
    weights = np.random.default_rng(0).random(300)
    model = CalibratedModel(LogisticRegression(), alpha=None, random_state=0).fit(X, y, sample_weight=weights)
    np.testing.assert_array_equal(model.estimator_.coef_, LogisticRegression().fit(X, y, weights).coef_)
    unweighted = CalibratedModel(LogisticRegression(), alpha=None, random_state=0).fit(X, y)
    assert not torch.equal(unweighted.calibrator_.temperature, model.calibrator_.temperature)  # in the folds, too
    for estimator in (KNeighborsClassifier(), make_pipeline(LogisticRegression())):
        with pytest.raises(bg.BadType, match=r"sample_weight was given, but \w+\.fit takes none"):
            CalibratedModel(estimator).fit(X, y, sample_weight=weights)
    for wrong in (weights[:-1], weights[:, None]):
        with pytest.raises(bg.BadInput, match="sample_weight must have one number for each of the 300 rows"):
            CalibratedModel(LogisticRegression()).fit(X, y, sample_weight=wrong)


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    X, y = drawn(300)
    frame = pandas.DataFrame(X, columns=["a", "b", "c"], index=np.arange(300)[::-1])
    model = CalibratedModel(LogisticRegression(), random_state=0).fit(frame, pandas.Series(y, index=frame.index))
    plain = CalibratedModel(LogisticRegression(), random_state=0).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(frame), plain.predict_proba(X))
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    assert model.n_features_in_ == plain.n_features_in_ == 3
    assert not hasattr(plain, "feature_names_in_")


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, sparse.coo_array])
def test_sparse_matrices(form: Any) -> None:
    X, y = drawn(300)
    X = X * (X > 0)
    model = CalibratedModel(LogisticRegression(), random_state=0).fit(form(X), y)
    plain = CalibratedModel(LogisticRegression(), random_state=0).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(form(X)), plain.predict_proba(X), atol=1e-4)


def test_texts_need_no_array() -> None:
    random = np.random.default_rng(0)
    y = random.integers(2, size=300)
    texts = [" ".join(random.choice(["spam", "ham"], size=3, p=[0.2 + 0.6 * label, 0.8 - 0.6 * label])) for label in y]
    model = CalibratedModel(make_pipeline(CountVectorizer(), MultinomialNB()), random_state=0).fit(texts, y)
    assert model.predict(["spam spam spam", "ham ham ham"]).tolist() == [1, 0]


# -- as an estimator among others


def test_pickle_and_clone() -> None:
    X, y = drawn(300)
    for model in (
        CalibratedModel(LogisticRegression(), "isotonic"),
        CalibratedModel(LogisticRegression(), MatrixScaling(1, 1)),
    ):
        model.set_params(random_state=0, estimator__C=0.5).fit(X, y)
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again.predict_set(X), model.predict_set(X))
        fresh = clone(model)
        assert not hasattr(fresh, "estimator_")
        assert fresh.estimator.C == 0.5
        np.testing.assert_array_equal(fresh.fit(X, y).predict_proba(X), model.predict_proba(X))


def test_in_a_search_and_around_one() -> None:
    X, y = drawn(300)
    search = GridSearchCV(CalibratedModel(LogisticRegression(), random_state=0), {"estimator__C": [0.1, 1.0]}, cv=3)
    assert search.fit(X, y).best_score_ > 0.4
    inside = CalibratedModel(GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=3), cv=3, random_state=0)
    assert inside.fit(X, y).predict_proba(X).shape == (300, 3)
    stacked = StackingClassifier([("bayes", GaussianNB())], cv=3)
    assert CalibratedModel(stacked, cv=3, random_state=0).fit(X, y).predict_proba(X).shape == (300, 3)


def test_methods_are_those_of_the_kind() -> None:
    classifier, regressor = CalibratedModel(LogisticRegression()), CalibratedModel(Ridge())
    assert is_classifier(classifier)
    assert not is_regressor(classifier)
    assert is_regressor(regressor)
    assert not is_classifier(regressor)
    assert hasattr(classifier, "predict_proba")
    assert hasattr(classifier, "predict_set")
    assert not hasattr(classifier, "predict_interval")
    assert hasattr(regressor, "predict_interval")
    assert not hasattr(regressor, "predict_proba")
    assert not hasattr(regressor, "predict_set")


def test_global_random_states_are_left_alone() -> None:
    X, y = drawn(200)
    before, torch_before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    for random_state in (None, 0, np.random.RandomState(0), np.random.default_rng(0)):
        for estimator in (LogisticRegression(), Ridge()):
            CalibratedModel(estimator, random_state=random_state).fit(X, y).predictive(X)
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch_before, torch.get_rng_state())


def test_the_seed_settles_the_rows() -> None:
    X, y = drawn(200)

    def fitted(random_state: Any) -> Array:
        return np.asarray(CalibratedModel(LogisticRegression(), random_state=random_state).fit(X, y).predict_proba(X))

    np.testing.assert_array_equal(fitted(1), fitted(1))
    assert not np.array_equal(fitted(1), fitted(2))
    np.testing.assert_array_equal(fitted(np.random.RandomState(1)), fitted(np.random.RandomState(1)))
    random = np.random.default_rng(0)
    assert not np.array_equal(fitted(random), fitted(random))


def test_a_calibrator_is_copied() -> None:
    X, y = drawn(300)
    given = TemperatureScaling()
    model = CalibratedModel(Sharp(), given, random_state=0).fit(X, y)
    assert not given.fitted
    assert model.method is given
    assert model.calibrator_.temperature > 1.5


def test_splitters() -> None:
    X, y = drawn(400)
    model = CalibratedModel(Sharp(), cv=KFold(4, shuffle=True, random_state=0), random_state=0).fit(X, y)
    assert len(model.conformal_.scores) == 100
    assert model.calibrator_.diagnostics["num_examples"] == 300
    with pytest.raises(bg.BadInput, match="does not test every row exactly once"):
        CalibratedModel(Sharp(), cv=ShuffleSplit(4, random_state=0)).fit(X, y)


# -- few rows


def test_few_rows() -> None:
    X, y = drawn(12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = CalibratedModel(Ridge(), cv=10, random_state=0).fit(X[:11], X[:11, 0])
        ends = model.predict_interval(X)
    assert np.isinf(ends).all()  # one kept row promises nothing
    assert any(
        "8 are needed" in str(each.message) or "are too few for alpha=0.1" in str(each.message) for each in caught
    )
    with pytest.warns(bg.CalibrationWarning, match="cv=10 folds of 8 rows are not possible, and 8 are used"):
        CalibratedModel(Ridge(), cv=10, alpha=None, random_state=0).fit(X[:8], X[:8, 0] + y[:8])
    for rows, cv in ((1, 2), (2, 2), (4, 5)):
        with pytest.raises(bg.BadInput, match=f"X has too few rows, n_samples = {rows}: with cv={cv}"):
            CalibratedModel(Ridge(), cv=cv).fit(X[:rows], X[:rows, 0])
    with pytest.raises(bg.BadInput, match="X has no rows"):
        CalibratedModel(Ridge()).fit(X[:0], X[:0, 0])


def test_rare_classes() -> None:
    X, y = drawn(200)
    y[0] = 3
    for seed in range(6):  # the row is kept in some, fitted to in others
        with pytest.warns(bg.CalibrationWarning, match="class 3 has fewer than 2 rows to fit to"):
            model = CalibratedModel(LogisticRegression(), random_state=seed).fit(X, y)
        assert model.classes_.tolist() == [0, 1, 2, 3]
        assert model.predict_proba(X).shape == (200, 4)
        assert np.isfinite(model.predict_proba(X)).all()
    with pytest.raises(bg.BadInput, match="y has one class only, 1"):
        CalibratedModel(LogisticRegression()).fit(X, np.ones(200, dtype=int))
    with (
        pytest.raises(bg.BadInput, match="are all of class False; give more rows of the other classes"),
        pytest.warns(bg.CalibrationWarning, match="fewer than 2 rows"),
    ):
        CalibratedModel(LogisticRegression(), alpha=None).fit(X, np.arange(200) == 7)


# -- wrong input


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (CalibratedModel(LogisticRegression), bg.BadType, "got the class LogisticRegression; pass an instance"),
        (CalibratedModel("forest"), bg.BadType, "estimator must be a classifier or regressor of scikit-learn, got str"),
        (CalibratedModel(KMeans()), bg.BadType, "got KMeans, which is neither"),
        (
            CalibratedModel(LogisticRegression(), cast(Any, "sigmoid")),
            bg.BadInput,
            "method must be one of 'temperature'.*'sigmoid'",
        ),
        (CalibratedModel(LogisticRegression(), cast(Any, None)), bg.BadType, "method must be one of .*got NoneType"),
        (
            CalibratedModel(LogisticRegression(), Conformal()),
            bg.BadInput,
            "got Conformal; sets and intervals are fitted",
        ),
        (
            CalibratedModel(LogisticRegression(), ShiftAwareScaling(shifts="images")),
            bg.BadInput,
            "got ShiftAwareScaling",
        ),
        (CalibratedModel(LogisticRegression(), "platt"), bg.BadInput, "Only binary classification is supported.*has 3"),
        (CalibratedModel(LogisticRegression(), cv="folds"), bg.BadInput, "'prefit', got 'folds'"),
        (CalibratedModel(LogisticRegression(), cv=1), bg.BadInput, "cv .* must be at least 2, got 1"),
        (CalibratedModel(LogisticRegression(), cv=2.5), bg.BadType, "cv .* must be an integer, got float"),
        (CalibratedModel(LogisticRegression(), alpha=1.0), bg.BadInput, "alpha must be strictly between 0 and 1"),
        (CalibratedModel(LogisticRegression(), random_state=-1), bg.BadInput, "random_state must be at least 0"),
        (CalibratedModel(Ridge(), "isotonic"), bg.BadInput, "method='isotonic' is for classifiers"),
        (
            CalibratedModel(SVC(decision_function_shape="ovo")),
            bg.BadInput,
            'of an SVC, decision_function_shape="ovr"',
        ),
    ],
    ids=str,
)
def test_wrong_settings(model: CalibratedModel, error: Any, message: str) -> None:
    X, y = drawn(200, classes=3)
    with pytest.raises(error, match=message):
        model.fit(X, y)


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("inside", [lambda svc: svc, make_pipeline, lambda svc: GridSearchCV(svc, {"C": [1.0]}, cv=2)])
def test_columns_for_pairs_of_classes_are_refused(inside: Any, classes: int) -> None:
    """Of three classes there are three pairs: the number of columns does not tell."""
    X, y = drawn(200, classes=classes)
    with pytest.raises(bg.BadInput, match=f"for {classes} classes; one column for each"):
        CalibratedModel(inside(SVC(decision_function_shape="ovo"))).fit(X, y)


def test_wrong_data() -> None:
    X, y = drawn(100)
    with pytest.raises(bg.BadInput, match="y is None"):
        CalibratedModel(Ridge()).fit(X, None)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        CalibratedModel(LogisticRegression()).fit(X, y[:-1])
    with pytest.raises(ValueError, match="y contains NaN"):
        CalibratedModel(Ridge()).fit(X, np.where(y == 1, np.nan, 1.0))
    with pytest.raises(bg.BadType, match="y must hold numbers for a regressor"):
        CalibratedModel(Ridge()).fit(X, np.array(["a", "b", "c"])[y])
    with pytest.raises(ValueError, match="y should be a 1d array"):
        CalibratedModel(Ridge()).fit(X, X)
    with pytest.raises(ValueError, match="Unknown label type"):
        CalibratedModel(LogisticRegression()).fit(X, X[:, 0])


def test_what_was_not_fitted_is_not_answered() -> None:
    X, y = drawn(100)
    for name in ("predict", "predict_proba", "predict_set", "predictive"):
        with pytest.raises(NotFittedError):
            getattr(CalibratedModel(LogisticRegression()), name)(X)
    with pytest.raises(NotFittedError):
        CalibratedModel(Ridge()).predict_interval(X)
    for model, name in (
        (CalibratedModel(Sharp(), alpha=None), "set"),
        (CalibratedModel(Ridge(), alpha=None), "interval"),
    ):
        with pytest.raises(bg.BadInput, match="alpha was None in fit, and no rows were kept"):
            getattr(model.fit(X, y), f"predict_{name}")(X)


class OnlyLabels(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Says labels only, though scikit-learn is told that it is a classifier."""

    def __sklearn_tags__(self) -> Any:
        return Perceptron().__sklearn_tags__()

    def fit(self, X: Array, y: Array) -> OnlyLabels:
        return self


def test_labels_alone_cannot_be_calibrated() -> None:
    with pytest.raises(bg.BadType, match="neither predict_proba nor decision_function; only labels cannot"):
        CalibratedModel(OnlyLabels()).fit(*drawn(100))
