"""FeTrIL: translated rows stand for past classes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.learn.fetril import FeTrIL, choose_sources, pseudo_features, translate

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS / 16.0
OLD, NEW = LABELS < 5, LABELS >= 5


@parametrize_with_checks(
    [FeTrIL(), FeTrIL(RidgeClassifier(), metric="euclidean", normalize=False), FeTrIL(LogisticRegression(), k=2)]
)
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


@pytest.fixture
def made():
    past = np.stack([DIGITS[k == LABELS].mean(0) for k in range(5)])
    X, labels, sources = pseudo_features(DIGITS[NEW], LABELS[NEW], past, np.arange(5))
    return past, X, labels, sources


def test_pseudo_rows_have_the_past_centroid_and_the_source_covariance(made):
    past, X, labels, sources = made
    for p in range(5):
        rows, source = X[labels == p], DIGITS[sources[p] == LABELS]
        np.testing.assert_allclose(rows.mean(0), past[p], rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.cov(rows.T), np.cov(source.T), rtol=0, atol=1e-12)
        np.testing.assert_allclose(rows - rows[0], source - source[0], rtol=0, atol=1e-14)


def test_sources_are_the_most_similar_new_classes(made):
    past, _, _, sources = made
    new = np.stack([DIGITS[k == LABELS].mean(0) for k in range(5, 10)])
    for metric in ("cosine", "euclidean"):
        order = cdist(past, new, metric).argsort(1)
        for k in (1, 2, 5):
            assert np.array_equal(choose_sources(past, new, metric, k), order[:, k - 1])
        assert np.array_equal(choose_sources(past, new, metric, 99), order[:, -1])
    assert list(sources.values()) == (5 + cdist(past, new, "cosine").argmin(1)).tolist()


def test_translation_there_and_back_is_nothing():
    rng = np.random.default_rng(0)
    F, a, b = rng.normal(size=(20, 4)), rng.normal(size=4), rng.normal(size=4)
    np.testing.assert_allclose(translate(translate(F, a, b), b, a), F, rtol=0, atol=1e-14)
    assert np.array_equal(translate(F, a, a), F)


def test_without_past_classes_it_is_the_plain_classifier():
    model = FeTrIL().fit(DIGITS, LABELS)
    plain = LinearSVC(C=1.0, dual=False).fit(normalize(DIGITS), LABELS)
    assert np.array_equal(model.estimator_.coef_, plain.coef_)
    assert np.array_equal(model.estimator_.intercept_, plain.intercept_)
    assert np.array_equal(model.decision_function(DIGITS), plain.decision_function(normalize(DIGITS)))
    first = FeTrIL().partial_fit(DIGITS, LABELS)
    assert np.array_equal(first.estimator_.coef_, plain.coef_)
    assert model.sources_ == {}


def test_classes_of_one_shape_give_the_joint_training_set():
    """All classes are translates of one cloud (whole numbers, so that moving them is exact)."""
    rng = np.random.default_rng(0)
    shape = rng.integers(-8, 8, (16, 6))
    shape = np.concatenate([shape, -shape]).astype(float)  # mean 0
    centres = 4.0 * rng.integers(-9, 9, (5, 6))
    rows = np.concatenate([shape + centre for centre in centres])
    y = np.repeat(np.arange(5), len(shape))
    model = FeTrIL().fit(rows[y < 3], y[y < 3]).partial_fit(rows[y >= 3], y[y >= 3])
    X, labels, _ = pseudo_features(rows[y >= 3], y[y >= 3], centres[:3], np.arange(3))
    together = np.concatenate([np.c_[X, labels], np.c_[rows[y >= 3], y[y >= 3]]])
    joint = np.c_[rows, y]
    assert np.array_equal(together[np.lexsort(together.T)], joint[np.lexsort(joint.T)])
    plain = LinearSVC(C=1.0, dual=False, tol=1e-10).fit(normalize(rows), y)
    model = (
        FeTrIL(LinearSVC(C=1.0, dual=False, tol=1e-10)).fit(rows[y < 3], y[y < 3]).partial_fit(rows[y >= 3], y[y >= 3])
    )
    np.testing.assert_allclose(model.estimator_.coef_, plain.coef_, rtol=0, atol=1e-6)


def test_a_shift_of_all_features_shifts_the_training_set(made):
    past = made[0]
    shift = np.linspace(-3, 3, 64)
    moved, same, _ = pseudo_features(DIGITS[NEW] + shift, LABELS[NEW], past + shift, np.arange(5), "euclidean")
    plain, plain_labels, _ = pseudo_features(DIGITS[NEW], LABELS[NEW], past, np.arange(5), "euclidean")
    np.testing.assert_allclose(moved, plain + shift, rtol=0, atol=1e-12)
    assert np.array_equal(same, plain_labels)


def test_a_rotation_of_all_features_changes_no_score():
    R = ortho_group.rvs(64, random_state=0)
    svm = LinearSVC(C=1.0, dual=False, tol=1e-9)
    scores = []
    for X in (DIGITS, DIGITS @ R):
        scores.append(FeTrIL(svm).fit(X[OLD], LABELS[OLD]).partial_fit(X[NEW], LABELS[NEW]).decision_function(X))
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)


def test_rows_are_counted_and_nothing_of_them_is_kept():
    X, _, sources = pseudo_features(DIGITS[NEW], LABELS[NEW], DIGITS[:3], np.array([0, 1, 2]))
    assert len(X) == sum((source == LABELS).sum() for source in sources.values())

    def kept(repeat):
        model = FeTrIL().fit(DIGITS[OLD].repeat(repeat, 0), LABELS[OLD].repeat(repeat))
        model.partial_fit(DIGITS[NEW].repeat(repeat, 0), LABELS[NEW].repeat(repeat))
        arrays = [v for v in vars(model).values() if isinstance(v, np.ndarray)]
        arrays += [v for v in vars(model.estimator_).values() if isinstance(v, np.ndarray)]
        return sum(a.nbytes for a in arrays)

    assert kept(1) == kept(3)


def test_a_class_that_comes_back_has_its_real_rows_and_a_running_centroid():
    some = np.flatnonzero(LABELS == 2)
    model = FeTrIL().fit(DIGITS[OLD & (LABELS != 2)], LABELS[OLD & (LABELS != 2)])
    model.partial_fit(DIGITS[some[:50]], LABELS[some[:50]]).partial_fit(DIGITS[some[50:]], LABELS[some[50:]])
    np.testing.assert_allclose(model.centroids_[2], DIGITS[some].mean(0), rtol=0, atol=1e-13)
    assert 2 not in model.sources_
    assert set(model.sources_) == {0, 1, 3, 4}


def test_the_fully_connected_form_and_float32():
    fc = FeTrIL(SGDClassifier(loss="log_loss", random_state=0), normalize=False)
    fc.fit(DIGITS[OLD], LABELS[OLD]).partial_fit(DIGITS[NEW], LABELS[NEW])
    assert fc.score(DIGITS, LABELS) > 0.6
    X, _, _ = pseudo_features(DIGITS[NEW].astype(np.float32), LABELS[NEW], DIGITS[:3], np.array([0, 1, 2]))
    assert X.dtype == np.float32


def test_one_class_alone():
    model = FeTrIL().fit(DIGITS[LABELS == 4], LABELS[LABELS == 4])
    assert (model.predict(DIGITS[:9]) == 4).all()
    model.partial_fit(DIGITS[LABELS == 7], LABELS[LABELS == 7])
    assert model.score(DIGITS[np.isin(LABELS, [4, 7])], LABELS[np.isin(LABELS, [4, 7])]) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "manhattan"}, "metric must be 'cosine' or 'euclidean', got 'manhattan'"),
        ({"k": 0}, "k must be >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FeTrIL(**options).fit(DIGITS, LABELS)


def test_bad_rows_leave_the_model_as_it_was():
    model = FeTrIL().fit(DIGITS[OLD], LABELS[OLD])
    before = model.decision_function(DIGITS)
    bad = DIGITS[NEW].copy()
    bad[1, 1] = np.inf
    y = LABELS[NEW]
    for X, labels, error in (
        (bad, y, ValueError),
        (DIGITS[NEW][:, :5], y, ValueError),
        (DIGITS[:0], [], ValueError),
        (DIGITS[NEW], y[:-1], ValueError),
        (DIGITS[NEW], y.astype(str), TypeError),
        (DIGITS[NEW], y + 0.5, ValueError),
    ):
        with pytest.raises(error):
            model.partial_fit(X, labels)
    with pytest.raises(ValueError, match="which is not in classes"):
        model.partial_fit(DIGITS[NEW], y, classes=[5, 6])
    assert np.array_equal(model.decision_function(DIGITS), before)
    assert model.classes_.tolist() == [0, 1, 2, 3, 4]
