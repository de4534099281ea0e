"""Every metric against hand-computed values, an independent computation, its null, and bad input."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg

from shoestring.metrics import (
    a_auc,
    a_avg,
    a_last,
    accuracy_on_seen,
    area_under_risk_coverage,
    expected_calibration_error,
    forget_quality,
    forgetting,
    frechet_distance,
)

nan = float("nan")


# --- continual learning ---------------------------------------------------------------------------------------


def test_accuracy_on_seen_by_hand():
    y_true = np.array([0, 0, 1, 1, 2, 2])
    y_pred = np.array([0, 2, 1, 1, 2, 0])
    assert accuracy_on_seen(y_true, y_pred, [0, 1, 2]) == 4 / 6
    assert accuracy_on_seen(y_true, y_pred, [0, 1]) == 3 / 4  # predicting the unseen class 2 is wrong
    assert accuracy_on_seen(y_true, y_pred, [2, 9]) == 1 / 2
    names = np.array(["ant", "bee", "cat"])
    assert accuracy_on_seen(names[y_true], names[y_pred].astype(object), ["ant", "bee"]) == 3 / 4


def test_stream_summaries_by_hand():
    accuracies = [0.9, 0.6, 0.3]
    assert a_auc(accuracies) == pytest.approx(0.6, abs=1e-15)
    assert a_avg(accuracies) == pytest.approx(0.6, abs=1e-15)
    assert a_last(accuracies) == 0.3
    assert a_auc([0.7] * 10) == pytest.approx(0.7, abs=1e-15)
    assert all(isinstance(f(np.array(accuracies)), float) for f in (a_auc, a_avg, a_last))


def test_forgetting_by_hand():
    history = [
        [0.90, nan, nan, nan],
        [0.80, 0.70, nan, nan],
        [0.95, 0.60, 0.50, nan],
        [0.65, 0.75, 0.50, 0.99],
    ]
    # best earlier - final: 0.95 - 0.65, 0.70 - 0.75 (gained), 0.50 - 0.50; the last class has no earlier value
    assert forgetting(history) == pytest.approx((0.30 - 0.05 + 0.0) / 3, abs=1e-15)


def test_forgetting_is_exactly_zero_for_a_model_that_does_not_change():
    constant = np.tile(np.random.RandomState(0).rand(7), (5, 1))
    assert forgetting(constant) == 0.0
    constant[:3, 4:] = nan  # classes that came later
    constant[:4, 6] = nan
    assert forgetting(constant) == 0.0


def test_forgetting_counts_a_seen_class_that_was_never_right():
    assert forgetting([[0.0, 1.0], [0.0, 0.5]]) == 0.25
    assert forgetting([[nan, 1.0], [0.0, 0.5]]) == 0.5


def test_forgetting_does_not_depend_on_class_order():
    history = np.random.RandomState(1).rand(4, 6)
    history[:2, 3] = nan
    assert forgetting(history[:, ::-1]) == pytest.approx(forgetting(history), abs=1e-15)


# --- confidence -----------------------------------------------------------------------------------------------


def ece_by_loop(y_true, proba, n_bins):
    total = 0.0
    for b in range(n_bins):
        low, high = b / n_bins, (b + 1) / n_bins
        inside = [i for i, row in enumerate(proba) if low < max(row) <= high]
        if inside:
            accuracy = sum(int(np.argmax(proba[i]) == y_true[i]) for i in inside) / len(inside)
            confidence = sum(max(proba[i]) for i in inside) / len(inside)
            total += len(inside) / len(proba) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("n_bins", [1, 2, 10, 15, 100])
def test_ece_equals_the_loop_over_bins(n_bins):
    rng = np.random.RandomState(n_bins)
    proba = rng.dirichlet([0.5] * 4, size=300)
    y_true = rng.randint(4, size=300)
    assert expected_calibration_error(y_true, proba, n_bins) == pytest.approx(
        ece_by_loop(y_true, proba, n_bins), abs=1e-12
    )


def test_ece_by_hand():
    # two bins of (0, 1/2], (1/2, 1]: the edge 0.5 belongs to the lower one
    proba = [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]
    y_true = [0, 1, 0, 0]
    # lower bin: accuracy 1/2, confidence 1/2; upper bin: accuracy 1/2, confidence 0.8
    assert expected_calibration_error(y_true, proba, n_bins=2) == pytest.approx(0.5 * 0.3, abs=1e-15)
    # one bin: accuracy 1/2, confidence 0.65
    assert expected_calibration_error(y_true, proba, n_bins=1) == pytest.approx(0.15, abs=1e-15)
    # three bins: 0.5 and 0.5 together, 0.7 (wrong) and 0.9 (right) together
    assert expected_calibration_error(y_true, proba, n_bins=3) == pytest.approx(0.5 * 0.3, abs=1e-15)
    # ten bins: 0.7 and 0.9 apart
    assert expected_calibration_error(y_true, proba, n_bins=10) == pytest.approx((0.7 + 0.1) / 4, abs=1e-15)


def test_ece_bin_edges_are_closed_on_the_right():
    for n_bins in (4, 8):
        for k in range(n_bins // 2, n_bins):
            edge = k / n_bins
            pair = [[edge, 1 - edge], [edge + 1e-6, 1 - edge - 1e-6]]
            # right at the edge, wrong just above it: in one bin the two errors would cancel
            apart = expected_calibration_error([0, 1], pair, n_bins)
            assert apart == pytest.approx(((1 - edge) + edge) / 2, abs=1e-5)


def test_ece_null_and_extremes():
    assert expected_calibration_error([0, 1, 2], np.eye(3)) == 0.0
    assert expected_calibration_error([1, 2, 0], np.eye(3)) == 1.0
    calibrated = np.tile([0.75, 0.25], (400, 1))
    assert expected_calibration_error([0] * 300 + [1] * 100, calibrated) == pytest.approx(0, abs=1e-12)


def test_ece_does_not_depend_on_sample_order():
    rng = np.random.RandomState(3)
    proba, y_true, order = rng.dirichlet([1] * 5, size=200), rng.randint(5, size=200), rng.permutation(200)
    assert expected_calibration_error(y_true[order], proba[order]) == pytest.approx(
        expected_calibration_error(y_true, proba), abs=1e-14
    )
    assert expected_calibration_error(y_true, proba.astype(np.float32)) == pytest.approx(
        expected_calibration_error(y_true, proba), abs=1e-6
    )


def aurc_by_definition(wrong, confidence):
    """O(n^2): for each sample, the error rate among the samples at least as confident."""
    n = len(wrong)
    return (
        sum(
            sum(wrong[j] for j in range(n) if confidence[j] >= confidence[i])
            / sum(confidence[j] >= confidence[i] for j in range(n))
            for i in range(n)
        )
        / n
    )


def test_aurc_equals_the_definition_over_thresholds():
    rng = np.random.RandomState(0)
    y_true, y_pred, confidence = rng.randint(3, size=80), rng.randint(3, size=80), rng.rand(80)
    assert area_under_risk_coverage(y_true, y_pred, confidence) == pytest.approx(
        aurc_by_definition(y_true != y_pred, confidence), abs=1e-14
    )


def test_aurc_by_hand():
    # surest first: right, wrong, right, wrong -> risks 0, 1/2, 1/3, 1/2
    assert area_under_risk_coverage([0, 1, 0, 1], [0, 0, 0, 0], [9, 8, 7, 6]) == pytest.approx(1 / 3, abs=1e-15)
    assert area_under_risk_coverage(["a", "b"], ["a", "a"], [0.2, 0.1]) == 0.25
    assert area_under_risk_coverage([1, 2, 3], [1, 2, 3], [0.1, 0.2, 0.3]) == 0.0
    assert area_under_risk_coverage([1, 2, 3], [2, 3, 1], [0.1, 0.2, 0.3]) == 1.0


def test_aurc_of_ties_is_the_mean_over_their_orders():
    wrong = np.array([0, 1, 1, 0, 1, 0])
    confidence = np.array([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    orders = [o for o in itertools.permutations(range(6)) if (np.diff(confidence[list(o)]) <= 0).all()]
    assert len(orders) == 1 * 6 * 2
    mean = np.mean([np.mean(np.cumsum(wrong[list(o)]) / np.arange(1, 7)) for o in orders])
    assert area_under_risk_coverage(wrong, np.zeros(6, int), confidence) == pytest.approx(mean, abs=1e-15)


def test_aurc_null_constant_confidence_is_the_error_rate():
    rng = np.random.RandomState(1)
    y_true, y_pred = rng.randint(4, size=100), rng.randint(4, size=100)
    error_rate = np.mean(y_true != y_pred)
    assert area_under_risk_coverage(y_true, y_pred, np.ones(100)) == pytest.approx(error_rate, abs=1e-12)


def test_aurc_invariances():
    rng = np.random.RandomState(2)
    y_true, y_pred = rng.randint(4, size=100), rng.randint(4, size=100)
    confidence = rng.randint(10, size=100) / 10  # with ties
    value = area_under_risk_coverage(y_true, y_pred, confidence)
    order = rng.permutation(100)
    assert area_under_risk_coverage(y_true[order], y_pred[order], confidence[order]) == value
    assert area_under_risk_coverage(y_true, y_pred, np.exp(5 * confidence)) == value


# --- generated samples ----------------------------------------------------------------------------------------


def fit(x):
    return x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))


def test_frechet_closed_form_in_one_dimension():
    rng = np.random.RandomState(0)
    a, b = 2 + 3 * rng.randn(50, 1), -1 + 0.5 * rng.randn(70, 1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_closed_form_for_commuting_covariances():
    """Scaling along the axes of one sample's covariance: tr = sum (sqrt(l_a) - sqrt(l_b))^2."""
    rng = np.random.RandomState(1)
    x = rng.randn(40, 6) @ rng.randn(6, 6)
    mean, covariance = fit(x)
    eigenvalues, axes = np.linalg.eigh(covariance)
    scale, shift = np.array([0.1, 0.5, 1, 2, 3, 10.0]), rng.randn(6)
    y = mean + (x - mean) @ axes * scale @ axes.T + shift
    expected = shift @ shift + np.sum(eigenvalues * (1 - scale) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("n_a", "n_b", "d"), [(200, 150, 8), (400, 30, 16), (100, 100, 2)])
def test_frechet_equals_the_equation_with_matrix_square_roots(n_a, n_b, d):
    rng = np.random.RandomState(d)
    a, b = rng.randn(n_a, d) @ rng.randn(d, d), rng.rand(n_b, d) @ rng.randn(d, d) + 1
    (mean_a, S_a), (mean_b, S_b) = fit(a), fit(b)
    root = scipy.linalg.sqrtm(S_a)
    cross = scipy.linalg.sqrtm(root @ S_b @ root)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(S_a + S_b - 2 * cross).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_samples_than_features():
    """In the span of the samples the problem is small: rotated into 100 dimensions it is the same distance."""
    rng = np.random.RandomState(5)
    a, b = rng.randn(30, 4), 2 * rng.randn(20, 4) + 1
    basis = np.linalg.qr(rng.randn(100, 4))[0].T  # (4, 100), orthonormal rows
    assert frechet_distance(a @ basis, b @ basis) == pytest.approx(frechet_distance(a, b), rel=1e-11)
    # orthogonal supports do not overlap at all: the cross term vanishes
    left, right = np.zeros((5, 40)), np.zeros((6, 40))
    left[:, :20], right[:, 20:] = rng.randn(5, 20), rng.randn(6, 20)
    (mean_a, S_a), (mean_b, S_b) = fit(left), fit(right)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(S_a) + np.trace(S_b)
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 1), (10, 3), (500, 40), (20, 300), (1000, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_frechet_null(shape, scale):
    rng = np.random.RandomState(0)
    x = scale * (rng.randn(*shape) + 10) * np.exp(3 * rng.randn(shape[1]))
    variance = np.trace(fit(x)[1])
    assert frechet_distance(x, x) == 0.0
    assert frechet_distance(x, x.copy()) == 0.0
    assert 0 <= frechet_distance(x, rng.permutation(x)) <= 1e-20 * np.square(x).sum()
    # a small true difference is not swallowed
    assert frechet_distance(x, x * (1 + 1e-5)) == pytest.approx(
        1e-10 * (variance + np.sum(x.mean(axis=0) ** 2)), rel=1e-3
    )


def test_frechet_invariances():
    rng = np.random.RandomState(3)
    a, b = rng.randn(60, 5), rng.rand(50, 5)
    value = frechet_distance(a, b)
    rotation = np.linalg.qr(rng.randn(5, 5))[0]
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(rng.permutation(a), b) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(7 * a, 7 * b) == pytest.approx(49 * value, rel=1e-12)
    # float16 features are computed in float64
    half = a.astype(np.float16)
    assert frechet_distance(half, b) == frechet_distance(half.astype(np.float64), b)


def test_frechet_of_constant_features_is_the_distance_of_means():
    assert frechet_distance(np.zeros((4, 3)), np.full((5, 3), 2.0)) == 12.0


# --- unlearning -----------------------------------------------------------------------------------------------


def test_forget_quality_equals_the_exact_permutation_p_value():
    a, b = [0.1, 0.3, 0.35, 0.8], [0.2, 0.9, 1.1]
    D = lambda u, v: max(abs(np.mean(np.array(u) <= x) - np.mean(np.array(v) <= x)) for x in [*u, *v])  # noqa: E731
    pooled = a + b
    splits = list(itertools.combinations(range(7), 4))
    as_extreme = sum(
        D([pooled[i] for i in s], [pooled[i] for i in range(7) if i not in s]) >= D(a, b) - 1e-12 for s in splits
    )
    assert forget_quality(a, b) == pytest.approx(as_extreme / len(splits), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 40, 400, 20_000])
def test_forget_quality_null_is_exactly_one(n):
    ratios = np.random.RandomState(n).rand(n)
    assert forget_quality(ratios, ratios) == 1.0
    assert forget_quality(ratios, ratios[::-1]) == 1.0


def test_forget_quality_properties():
    rng = np.random.RandomState(0)
    a, b, shifted = rng.rand(400), rng.rand(400), rng.rand(400) + 0.5
    assert forget_quality(a, b) > 0.05
    assert forget_quality(a, shifted) < 1e-10
    assert forget_quality(b, a) == pytest.approx(forget_quality(a, b), rel=1e-12)
    assert forget_quality(1 / (a + 1e-10), 1 / (b + 1e-10)) == pytest.approx(forget_quality(a, b), rel=1e-12)
    assert forget_quality(np.log(a), np.log(b)) == pytest.approx(forget_quality(a, b), rel=1e-12)


# --- bad input ------------------------------------------------------------------------------------------------

proba = [[0.5, 0.5], [0.2, 0.8]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accuracy_on_seen([], [], [0]), ValueError, "y_true must not be empty"),
        (lambda: accuracy_on_seen([0], [0], []), ValueError, "seen must not be empty"),
        (lambda: accuracy_on_seen([0, 1], [0], [0]), ValueError, "same length, got 2 and 1"),
        (lambda: accuracy_on_seen([0, 1], [0, 1], [2]), ValueError, "at least one sample of a class in seen"),
        (lambda: accuracy_on_seen([0.5], [0], [0]), TypeError, "y_true must be labels of int or str"),
        (lambda: accuracy_on_seen([0], ["0"], [0]), TypeError, "y_true and y_pred must both be int or both str"),
        (lambda: accuracy_on_seen([0], [0], ["0"]), TypeError, "y_true and seen must both be"),
        (lambda: accuracy_on_seen([[0]], [0], [0]), ValueError, r"y_true must have 1 dimension, got .*\(1, 1\)"),
        (lambda: a_auc([]), ValueError, "accuracies must not be empty"),
        (lambda: a_auc([0.5, nan]), ValueError, r"accuracies must be finite, .* first at \[1\]"),
        (lambda: a_auc([[0.5]]), ValueError, r"accuracies must have 1 dimension.* got shape \(1, 1\)"),
        (lambda: a_auc(0.5), ValueError, r"got shape \(\)"),
        (lambda: a_auc(["x"]), ValueError, "accuracies must be an array of numbers"),
        (lambda: a_avg([np.inf]), ValueError, "task_accuracies must be finite"),
        (lambda: a_last([]), ValueError, "task_accuracies must not be empty"),
        (lambda: a_last([0.5, nan]), ValueError, "task_accuracies must be finite"),
        (lambda: forgetting([[0.5, 0.5]]), ValueError, "at least 2 rows"),
        (lambda: forgetting([0.5, 0.5]), ValueError, r"2 dimension\(s\), got shape \(2,\)"),
        (lambda: forgetting([[nan], [0.5]]), ValueError, "a class seen before the last row"),
        (lambda: forgetting([[0.5, 0.5], [0.5, nan]]), ValueError, r"NaN in the last row, got columns \[1\]"),
        (lambda: forgetting([[0.5], [np.inf]]), ValueError, "per_class_history must be finite"),
        (lambda: expected_calibration_error([], np.empty((0, 2))), ValueError, "proba must not be empty"),
        (lambda: expected_calibration_error([0], proba), ValueError, "same length, got 1 and 2"),
        (lambda: expected_calibration_error([0, 1], [0.5, 0.5]), ValueError, r"2 dimension\(s\)"),
        (lambda: expected_calibration_error([0, 2], proba), ValueError, r"lie in 0..1 .* got 0 to 2"),
        (lambda: expected_calibration_error([-1, 0], proba), ValueError, r"lie in 0..1 .* got -1 to 0"),
        (lambda: expected_calibration_error(["a", "b"], proba), TypeError, "int column numbers"),
        (lambda: expected_calibration_error([0], [[0.5, 0.6]]), ValueError, "sum to 1, got 1.1 in row 0"),
        (lambda: expected_calibration_error([0], [[-0.5, 1.5]]), ValueError, r"lie in \[0, 1\], got -0.5 to 1.5"),
        (lambda: expected_calibration_error([0], [[nan, 1.0]]), ValueError, "proba must be finite"),
        (lambda: expected_calibration_error([0, 1], proba, 0), ValueError, "n_bins must be .* got 0"),
        (lambda: expected_calibration_error([0, 1], proba, 2.5), ValueError, "n_bins must be .* got 2.5"),
        (lambda: area_under_risk_coverage([0, 1], [0, 1], [0.5]), ValueError, "y_true and confidence .* 2 and 1"),
        (lambda: area_under_risk_coverage([0, 1], [0], [0.5, 0.5]), ValueError, "y_true and y_pred .* 2 and 1"),
        (lambda: area_under_risk_coverage([0], [0], [nan]), ValueError, "confidence must be finite"),
        (lambda: area_under_risk_coverage([], [], []), ValueError, "y_true must not be empty"),
        (lambda: area_under_risk_coverage([0], ["a"], [1]), TypeError, "must both be int or both str"),
        (lambda: frechet_distance(np.ones((1, 2)), np.ones((2, 2))), ValueError, "features_a must have at least 2"),
        (lambda: frechet_distance(np.ones((2, 2)), np.ones((2, 3))), ValueError, "features_b must have 2 columns"),
        (lambda: frechet_distance(np.ones(3), np.ones((2, 3))), ValueError, r"features_a must have 2 dimension"),
        (lambda: frechet_distance([[1.0], [nan]], [[1.0], [2.0]]), ValueError, r"features_a .* first at \[1, 0\]"),
        (lambda: frechet_distance(np.empty((0, 2)), np.ones((2, 2))), ValueError, "features_a must not be empty"),
        (lambda: forget_quality([], [1.0]), ValueError, "unlearned must not be empty"),
        (lambda: forget_quality([1.0], [nan]), ValueError, "retained must be finite"),
        (lambda: forget_quality([[1.0]], [1.0]), ValueError, "unlearned must have 1 dimension"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_inputs_are_left_alone():
    rng = np.random.RandomState(0)
    a, b = rng.rand(10, 3), rng.rand(8, 3)
    history, wrong = rng.rand(3, 4), np.zeros(10, int)
    before = [x.copy() for x in (a, b, history, wrong)]
    frechet_distance(a, b)
    forgetting(history)
    area_under_risk_coverage(wrong, wrong, a[:, 0])
    forget_quality(a[:, 0], b[:, 0])
    assert all(map(np.array_equal, before, (a, b, history, wrong)))


def test_import_is_light():
    code = "import sys, shoestring.metrics; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
