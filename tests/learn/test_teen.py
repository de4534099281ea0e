"""TEEN: the calibration of prototypes, and the classifier around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.learn._prototypes import class_sums
from shoestring.learn.teen import TEEN, calibrate_prototypes

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS / 16.0
BASE = LABELS < 6


@pytest.fixture
def prototypes():
    rng = np.random.default_rng(0)
    return rng.gamma(1.0, size=(4, 7)), rng.gamma(1.0, size=(5, 7))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_the_letter(new, base, a, tau, normalize=True):
    """The module's equations, one class at a time."""
    found = []
    for c in new:
        v = c / np.sqrt(c @ c)
        u = [b / np.sqrt(b @ b) for b in base]
        e = np.exp([tau * (v @ ub) for ub in u])
        delta = sum(wb * ub for wb, ub in zip(e / e.sum(), u, strict=True))
        if normalize:
            delta = delta / np.sqrt(delta @ delta)
        found.append((1 - a) * v + a * delta)
    return np.array(found)


@parametrize_with_checks([TEEN(), TEEN(shift=0.1, normalize_delta=False)])
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [0.0, 1.0, 16.0])
def test_calibration_is_the_equation(prototypes, a, tau, normalize):
    new, base = prototypes
    expected = by_the_letter(new, base, a, tau, normalize)
    found = calibrate_prototypes(new, base, a, tau, normalize_delta=normalize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    tensors = [torch.from_numpy(rows) for rows in (new, base)]
    found = calibrate_prototypes(*tensors, a, tau, normalize_delta=normalize)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)


def test_shift_zero_is_the_nearest_class_mean_by_cosine():
    model = TEEN(shift=0).fit(DIGITS[BASE], LABELS[BASE]).partial_fit(DIGITS[~BASE], LABELS[~BASE])
    means = np.stack([DIGITS[k == LABELS].mean(0) for k in range(10)])
    expected = cdist(DIGITS, means, "cosine").argmin(1)
    assert np.array_equal(model.predict(DIGITS), expected)


def test_shift_one_is_the_mixture_alone(prototypes):
    new, base = prototypes
    p = calibrate_prototypes(new, base, 1.0)
    np.testing.assert_allclose(np.linalg.norm(p, axis=1), 1, rtol=1e-12)
    assert np.linalg.matrix_rank(np.vstack([p, base])) == len(base)  # nothing of the new ones is left


def test_infinite_temperature_takes_the_most_similar_and_zero_takes_all_alike(prototypes):
    new, base = prototypes
    nearest = unit(base)[(unit(new) @ unit(base).T).argmax(1)]
    np.testing.assert_allclose(calibrate_prototypes(new, base, 1.0, 1e6), nearest, atol=1e-12)
    mean = unit(unit(base).mean(0, keepdims=True))
    np.testing.assert_allclose(calibrate_prototypes(new, base, 1.0, 0.0), mean.repeat(4, 0), atol=1e-12)


def test_one_base_class_is_the_mixture(prototypes):
    new, base = prototypes
    p = calibrate_prototypes(new, base[:1], 0.25, 3.0)
    np.testing.assert_allclose(p, 0.75 * unit(new) + 0.25 * unit(base[:1]), atol=1e-12)


def test_weights_sum_to_one(prototypes):
    """Equal base directions: whatever the weights, their mixture is that direction, with the length of their sum."""
    new, base = prototypes
    alike = base[:1] * np.array([[1.0], [2.0], [0.5]])
    p = calibrate_prototypes(new, alike, 1.0, 16.0, normalize_delta=False)
    np.testing.assert_allclose(p, unit(base[:1]).repeat(4, 0), atol=1e-12)


def test_permutations_and_rotations_go_through(prototypes):
    new, base = prototypes
    p = calibrate_prototypes(new, base, 0.4, 5.0)
    np.testing.assert_allclose(calibrate_prototypes(new, base[::-1], 0.4, 5.0), p, atol=1e-13)
    np.testing.assert_allclose(calibrate_prototypes(new[::-1], base, 0.4, 5.0), p[::-1], atol=1e-13)
    R = ortho_group.rvs(7, random_state=0)
    np.testing.assert_allclose(calibrate_prototypes(new @ R, base @ R, 0.4, 5.0), p @ R, atol=1e-12)


def test_the_nearest_base_comes_nearer(prototypes):
    new, base = prototypes
    similar = unit(new) @ unit(base).T
    after = unit(calibrate_prototypes(new, base, 0.3, 1e4)) @ unit(base).T
    nearest = similar.argmax(1)
    rows = np.arange(len(new))
    assert (after[rows, nearest] >= similar[rows, nearest]).all()


def test_scale_of_features_and_sessions_do_not_matter():
    few = np.concatenate([np.flatnonzero(k == LABELS)[:5] for k in range(6, 10)])
    one = TEEN().fit(DIGITS[BASE], LABELS[BASE]).partial_fit(DIGITS[few], LABELS[few])
    many = TEEN().fit(1000 * DIGITS[BASE], LABELS[BASE])
    for k in (9, 7, 6, 8):
        shots = few[LABELS[few] == k]
        many.partial_fit(1000 * DIGITS[shots], LABELS[shots])
    np.testing.assert_allclose(one.prototypes_, many.prototypes_, rtol=0, atol=1e-12)
    assert np.array_equal(one.predict(DIGITS), many.predict(1000 * DIGITS))


def test_base_scores_do_not_change_by_a_bit():
    model = TEEN().fit(DIGITS[BASE], LABELS[BASE])
    before = model.decision_function(DIGITS)
    model.partial_fit(DIGITS[~BASE], LABELS[~BASE])
    assert np.array_equal(model.prototypes_[:6], TEEN().fit(DIGITS[BASE], LABELS[BASE]).prototypes_)
    np.testing.assert_allclose(model.decision_function(DIGITS)[:, :6], before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_equal_one_fit(chunk):
    whole = TEEN(base_classes=range(6)).fit(DIGITS, LABELS)
    stream = TEEN(base_classes=range(6))
    for start in range(0, 300 if chunk == 1 else len(LABELS), chunk):
        stream.partial_fit(DIGITS[start : start + chunk], LABELS[start : start + chunk])
    if chunk == 1:
        whole = TEEN(base_classes=range(6)).fit(DIGITS[:300], LABELS[:300])
    np.testing.assert_allclose(stream.prototypes_, whole.prototypes_, rtol=0, atol=1e-13)
    assert np.array_equal(stream.class_count_, whole.class_count_)


def test_merged_equals_together_and_forgotten_equals_never_seen():
    options = {"base_classes": range(6)}
    together = TEEN(**options).fit(DIGITS, LABELS)
    half = np.arange(len(LABELS)) % 2 == 0
    merged = TEEN(**options).fit(DIGITS[half], LABELS[half])
    merged += TEEN(**options).fit(DIGITS[~half], LABELS[~half])
    np.testing.assert_allclose(merged.prototypes_, together.prototypes_, rtol=0, atol=1e-13)
    gone = (LABELS == 3) | half
    never = TEEN(**options).fit(DIGITS[~gone], LABELS[~gone])
    together.forget(DIGITS[gone], LABELS[gone])
    assert together.classes_.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    np.testing.assert_allclose(together.prototypes_, never.prototypes_, rtol=0, atol=1e-13)


def test_a_dropped_class_was_never_there():
    model = TEEN().fit(DIGITS[BASE], LABELS[BASE]).partial_fit(DIGITS[~BASE], LABELS[~BASE])
    rest = (LABELS != 3) & (LABELS != 8)
    never = TEEN().fit(DIGITS[BASE & rest], LABELS[BASE & rest]).partial_fit(DIGITS[~BASE & rest], LABELS[~BASE & rest])
    model.forget_class(3).forget_class(8)
    assert np.array_equal(model.prototypes_, never.prototypes_)
    with pytest.raises(ValueError, match="label 3 is unknown"):
        model.forget_class(3)
    with pytest.raises(ValueError, match="last base class"):
        TEEN(base_classes=[0]).fit(DIGITS, LABELS).forget_class(0)


def test_class_sums_of_float32_are_those_of_float64():
    X = np.random.default_rng(0).normal(1e3, 1, (5000, 3)).astype(np.float32)
    sums, counts = class_sums(X, np.repeat([1, 4], 2500), np.array([0, 1, 4]))
    assert counts.tolist() == [0, 2500, 2500]
    np.testing.assert_allclose(sums[1:], X.astype(np.float64).reshape(2, 2500, 3).sum(1), rtol=1e-12)
    assert (sums[0] == 0).all()


def test_linear_layer_gives_the_cosines():
    model = TEEN().fit(DIGITS[BASE], LABELS[BASE]).partial_fit(DIGITS[~BASE], LABELS[~BASE])
    rows = torch.from_numpy(unit(DIGITS)).float()
    np.testing.assert_allclose(model.to_linear()(rows).detach(), model.decision_function(DIGITS), atol=1e-6)


def test_a_row_of_zeros_gets_an_answer():
    model = TEEN().fit(DIGITS[BASE], LABELS[BASE])
    assert (model.decision_function(np.zeros((1, 64))) == 0).all()
    assert np.isfinite(model.predict_proba(np.zeros((1, 64)))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 1.5}, r"shift must be in \[0, 1\], got 1.5"),
        ({"shift": float("nan")}, "shift must be"),
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"base_classes": [77]}, "no base class"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TEEN(**options).fit(DIGITS, LABELS)


def test_bad_rows_leave_the_model_as_it_was():
    model = TEEN().fit(DIGITS[BASE], LABELS[BASE])
    before = model.prototypes_.copy()
    bad = DIGITS[:3].copy()
    bad[1, 1] = np.nan
    for X, y, error in (
        (bad, [0, 1, 2], ValueError),
        (DIGITS[:3, :5], [0, 1, 2], ValueError),
        (DIGITS[:0], [], ValueError),
        (DIGITS[:3], [0, 1], ValueError),
        (DIGITS[:3], ["a", "b", "c"], TypeError),
        (DIGITS[:3], [0.5, 1, 2], ValueError),
    ):
        with pytest.raises(error):
            model.partial_fit(X, y)
    with pytest.raises(ValueError, match="no row of that class was seen"):
        model.forget(DIGITS[:1], [9])
    with pytest.raises(ValueError, match=r"cannot forget 2000 rows of 0: 178 came"):
        model.forget(DIGITS[:1].repeat(2000, 0), np.zeros(2000, int))
    with pytest.raises(ValueError, match="last base class"):
        model.forget(DIGITS[BASE], LABELS[BASE])
    with pytest.raises(TypeError, match="other must be a TEEN"):
        model.merge(3)
    with pytest.raises(ValueError, match="other was fitted on 5 features"):
        model.merge(TEEN().fit(DIGITS[:, :5], LABELS))
    with pytest.raises(ValueError, match="which is not in classes"):
        model.partial_fit(DIGITS[:3], [0, 1, 2], classes=[0, 1])
    assert np.array_equal(model.prototypes_, before)
    with pytest.raises(ValueError, match="new must be"):
        calibrate_prototypes(np.ones((2, 3)), np.ones((2, 4)))
