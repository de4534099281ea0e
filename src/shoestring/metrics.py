"""The figures that several claims report, each a pure function with its equation and where it comes from.

Continual learning: ``accuracy_on_seen``, ``a_auc``, ``a_avg``, ``a_last``, ``forgetting``.
Confidence: ``expected_calibration_error``, ``area_under_risk_coverage``.
Generated samples: ``frechet_distance``. Unlearning: ``forget_quality``.

All results are plain floats and fractions, not per cent. Every metric of change has a null: a model that did
not change scores exactly "no change" (``forgetting`` 0, ``frechet_distance`` 0, ``forget_quality`` 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "a_auc",
    "a_avg",
    "a_last",
    "accuracy_on_seen",
    "area_under_risk_coverage",
    "expected_calibration_error",
    "forget_quality",
    "forgetting",
    "frechet_distance",
]


def accuracy_on_seen(y_true: ArrayLike, y_pred: ArrayLike, seen: ArrayLike) -> float:
    r"""Accuracy on the test samples whose true class has been seen so far.

    .. math:: a = \frac{\sum_i [y_i \in S]\,[\hat y_i = y_i]}{\sum_i [y_i \in S]}

    What :func:`a_auc`, :func:`a_avg` and :func:`a_last` summarise in Si-Blurry (arXiv 2308.09303).

    Parameters
    ----------
    y_true, y_pred : array-like of int or str, shape (N,)
        True and predicted labels of the whole test set. A prediction outside ``seen`` counts as wrong.
    seen : array-like of int or str, shape (S,)
        The classes S that have appeared in the stream.

    Raises
    ------
    ValueError
        Empty input, different lengths, or no test sample of a class in ``seen``.
    TypeError
        Labels that are neither int nor str, or ints compared with strings.

    Examples
    --------
    >>> accuracy_on_seen([0, 0, 1, 2], [0, 1, 1, 0], seen=[0, 1])
    0.6666666666666666
    """
    true, pred, classes = _labels("y_true", y_true), _labels("y_pred", y_pred), _labels("seen", seen)
    _same_length("y_true", true, "y_pred", pred)
    _same_kind("y_true", true, "y_pred", pred)
    _same_kind("y_true", true, "seen", classes)
    known = np.isin(true, classes)
    if not known.any():
        raise ValueError("y_true must hold at least one sample of a class in seen, got none")
    return float(np.mean(pred[known] == true[known]))


def a_auc(accuracies: ArrayLike) -> float:
    r"""Anytime accuracy A_AUC: mean of the accuracies measured at even spacing along the stream.

    .. math:: A_{AUC} = \frac{1}{K} \sum_{k=1}^{K} a(k\,\Delta n)

    Koh et al., "Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
    Inference", ICLR 2022, arXiv 2110.10031. Published figures measure every 1,000 training samples, at the
    end of the first batch beyond each multiple. It depends on the class order: compare equal streams.

    Parameters
    ----------
    accuracies : array-like of float, shape (K,)
        :func:`accuracy_on_seen` in stream order.

    Raises
    ------
    ValueError
        Not one-dimensional, empty, NaN or infinite.

    Examples
    --------
    >>> a_auc([1.0, 0.5, 0.75])
    0.75
    """
    return float(np.mean(_floats("accuracies", accuracies)))


def a_avg(task_accuracies: ArrayLike) -> float:
    r"""Average accuracy A_Avg: mean over the T tasks of the accuracy at the end of the task.

    .. math:: A_{Avg} = \frac{1}{T} \sum_{t=1}^{T} a_t

    As the official Si-Blurry and GACL code (arXiv 2308.09303, 2403.15706) compute it; the GACL paper prints
    the factor as 1/(K+1) with tasks counted from 0.

    Parameters
    ----------
    task_accuracies : array-like of float, shape (T,)
        :func:`accuracy_on_seen` at the end of each task, in stream order.

    Raises
    ------
    ValueError
        Not one-dimensional, empty, NaN or infinite.

    Examples
    --------
    >>> a_avg([1.0, 0.5])
    0.75
    """
    return float(np.mean(_floats("task_accuracies", task_accuracies)))


def a_last(task_accuracies: ArrayLike) -> float:
    r"""Final accuracy A_Last = a_T: accuracy at the end of the stream (arXiv 2308.09303).

    Parameters
    ----------
    task_accuracies : array-like of float, shape (T,)
        :func:`accuracy_on_seen` at the end of each task, in stream order.

    Raises
    ------
    ValueError
        Not one-dimensional, empty, NaN or infinite.

    Examples
    --------
    >>> a_last([1.0, 0.5])
    0.5
    """
    return float(_floats("task_accuracies", task_accuracies)[-1])


def forgetting(per_class_history: ArrayLike) -> float:
    r"""Forgetting F_last: how far each class ended below its best earlier accuracy, on average.

    .. math:: F = \frac{1}{|S|} \sum_{c \in S} \Big(\max_{t < T} a_{t,c} - a_{T,c}\Big),
              \quad S = \{c : \text{seen before } T\}

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, arXiv 1801.10112, over classes
    instead of tasks as in Si-Blurry (arXiv 2308.09303). Negative when classes gained. The official code
    writes 0 for "not yet seen" and so leaves out seen classes whose best accuracy was 0; here only NaN is unseen.

    Parameters
    ----------
    per_class_history : array-like of float, shape (T, C)
        Accuracy of class c after task t, NaN where c has not been seen yet; T >= 2. Classes first seen in the
        last task have nothing to forget and are left out.

    Raises
    ------
    ValueError
        Not two-dimensional, fewer than two rows, infinite, no class seen before the last row, or a NaN in the
        last row for a class seen before.

    Examples
    --------
    >>> nan = float("nan")
    >>> forgetting([[1.0, nan, nan], [0.75, 0.5, nan], [0.5, 0.5, 1.0]])
    0.25
    """
    history = _floats("per_class_history", per_class_history, ndim=2, nan=True)
    if len(history) < 2:
        raise ValueError(f"per_class_history must have at least 2 rows (tasks), got {len(history)}")
    earlier, last = history[:-1], history[-1]  # (T-1, C), (C,)
    seen = ~np.isnan(earlier).all(axis=0)
    if not seen.any():
        raise ValueError("per_class_history must have a class seen before the last row, got only NaN there")
    if np.isnan(last[seen]).any():
        lost = np.flatnonzero(seen & np.isnan(last)).tolist()
        raise ValueError(f"per_class_history must not turn back to NaN in the last row, got columns {lost}")
    return float(np.mean(np.nanmax(earlier[:, seen], axis=0) - last[seen]))


def expected_calibration_error(y_true: ArrayLike, proba: ArrayLike, n_bins: int = 15) -> float:
    r"""Expected calibration error (ECE): gap between confidence and accuracy, over equal-width bins.

    .. math:: ECE = \sum_{b=1}^{M} \frac{|B_b|}{N}\,\big|\mathrm{acc}(B_b) - \mathrm{conf}(B_b)\big|,
              \quad B_b = \{i : \max_k p_{ik} \in (\tfrac{b-1}{M}, \tfrac{b}{M}]\}

    Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015;
    this top-label form with M = 15: Guo et al., ICML 2017, arXiv 1706.04599. Compare at equal M only.

    Parameters
    ----------
    y_true : array-like of int, shape (N,)
        True class as column number of ``proba``.
    proba : array-like of float, shape (N, K)
        Probabilities; rows sum to 1 within 1e-3. The predicted class is the first largest.
    n_bins : int, default 15
        M, the number of bins.

    Raises
    ------
    ValueError
        Empty input, different lengths, NaN, probabilities outside [0, 1], rows that do not sum to 1, labels
        that are no column number, ``n_bins`` no whole number >= 1.
    TypeError
        ``y_true`` not int.

    Examples
    --------
    >>> round(expected_calibration_error([0, 1], [[0.75, 0.25], [0.75, 0.25]]), 12)
    0.25
    """
    p = _floats("proba", proba, ndim=2)
    y = _labels("y_true", y_true)
    _same_length("y_true", y, "proba", p)
    if y.dtype.kind not in "iu":
        raise TypeError(f"y_true must hold int column numbers of proba, got dtype {y.dtype}")
    if y.min() < 0 or y.max() >= p.shape[1]:
        got = f"{y.min()} to {y.max()}"
        raise ValueError(f"y_true must lie in 0..{p.shape[1] - 1} (columns of proba), got {got}")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"proba must lie in [0, 1], got {p.min():.4g} to {p.max():.4g} (logits?)")
    off = np.abs(p.sum(axis=1) - 1)
    if off.max() > 1e-3:
        row = int(off.argmax())
        raise ValueError(f"proba must have rows that sum to 1, got {p[row].sum():.6g} in row {row}")
    if n_bins != int(n_bins) or n_bins < 1:
        raise ValueError(f"n_bins must be a whole number >= 1, got {n_bins}")

    confidence = p.max(axis=1)  # (N,)
    correct = p.argmax(axis=1) == y
    inner_edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    bins = np.searchsorted(inner_edges, confidence, side="left")  # an edge belongs to the bin below it
    return float(np.abs(np.bincount(bins, weights=correct - confidence)).sum() / len(y))


def area_under_risk_coverage(y_true: ArrayLike, y_pred: ArrayLike, confidence: ArrayLike) -> float:
    r"""Area under the risk-coverage curve (AURC): mean error rate over all coverages, surest samples first.

    .. math:: AURC = \frac{1}{N} \sum_{i=1}^{N} \frac{1}{i} \sum_{j=1}^{i} [\hat y_{(j)} \ne y_{(j)}],
              \quad \text{confidence}_{(1)} \ge \text{confidence}_{(2)} \ge \dots

    Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
    arXiv 1805.08206. Equal confidences get the expectation over their orders, so the order of the samples
    never matters; a constant confidence gives the error rate. Published tables often show 1000 x AURC.

    Parameters
    ----------
    y_true, y_pred : array-like of int or str, shape (N,)
        True and predicted labels.
    confidence : array-like of float, shape (N,)
        Any score that is higher for surer predictions.

    Raises
    ------
    ValueError
        Empty input, different lengths, NaN or infinite confidence.
    TypeError
        Labels that are neither int nor str, or ints compared with strings.

    Examples
    --------
    >>> area_under_risk_coverage([0, 1], [0, 0], [0.9, 0.6])  # wrong where unsure: risks 0 and 1/2
    0.25
    >>> area_under_risk_coverage([0, 1], [0, 0], [0.6, 0.9])  # wrong where sure: risks 1 and 1/2
    0.75
    """
    true, pred = _labels("y_true", y_true), _labels("y_pred", y_pred)
    score = _floats("confidence", confidence)
    _same_length("y_true", true, "y_pred", pred)
    _same_length("y_true", true, "confidence", score)
    _same_kind("y_true", true, "y_pred", pred)

    # groups of equal confidence, surest first
    _, group, counts = np.unique(-score, return_inverse=True, return_counts=True)
    errors = np.bincount(group, weights=true != pred) / counts
    risk = np.cumsum(np.repeat(errors, counts)) / np.arange(1, len(true) + 1)  # (N,), at coverage i/N
    return float(risk.mean())


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    r"""Squared Frechet distance between Gaussians fitted to two sets of features ("FID" with any features).

    .. math:: d^2 = \|\mu_a - \mu_b\|^2 + \operatorname{tr}\,\Sigma_a + \operatorname{tr}\,\Sigma_b
              - 2 \operatorname{tr}\,(\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2})^{1/2}

    Dowson, Landau, J. Multivariate Analysis 12, 1982; Heusel et al., NeurIPS 2017, arXiv 1706.08500.
    Covariances divide by n - 1. With :math:`\Sigma_a = R_a^T R_a` (QR decomposition of the centred features)
    the last trace is the nuclear norm of :math:`R_a R_b^T`: no root of a matrix, no eigenvalues that come out
    negative, and full accuracy with fewer samples than features. A difference of the covariances below the
    rounding error of their traces is 0. Small samples are biased upwards: compare equal sample sizes only.

    Parameters
    ----------
    features_a : array-like of float, shape (n_a, d)
        At least two rows; computed in float64.
    features_b : array-like of float, shape (n_b, d)
        Likewise.

    Raises
    ------
    ValueError
        Not two-dimensional, fewer than two rows, different widths, NaN or infinite values.

    Examples
    --------
    >>> round(frechet_distance([[0.0], [2.0]], [[3.0], [7.0]]), 12)  # (5 - 1)^2 + (8^.5 - 2^.5)^2
    18.0
    """
    a, b = _floats("features_a", features_a, ndim=2), _floats("features_b", features_b, ndim=2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b must have {a.shape[1]} columns as features_a has, got {b.shape[1]}")
    for name, x in (("features_a", a), ("features_b", b)):
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 rows, got {len(x)}")

    R_a = np.linalg.qr(a - a.mean(axis=0), mode="r") / np.sqrt(len(a) - 1)  # (min(n_a, d), d)
    R_b = np.linalg.qr(b - b.mean(axis=0), mode="r") / np.sqrt(len(b) - 1)
    traces = np.sum(R_a**2) + np.sum(R_b**2)
    spread = traces - 2 * np.linalg.svd(R_a @ R_b.T, compute_uv=False).sum()
    rounding = 32 * np.finfo(np.float64).eps * traces  # measured: at most 5 eps, 2 x 1 to 30,000 x 64
    means = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(means + (spread if spread > rounding else 0.0))


def forget_quality(unlearned: ArrayLike, retained: ArrayLike) -> float:
    r"""Forget quality: p-value that an unlearned and a retrained model answer the forget set alike.

    Two-sample, two-sided Kolmogorov-Smirnov test between the truth ratios of the unlearned model and those of
    the model that was trained without the forget set,

    .. math:: D = \sup_x |F_{\text{unlearned}}(x) - F_{\text{retained}}(x)|.

    Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", 2024, arXiv 2401.06121. 1 is
    indistinguishable, below 0.05 the forgetting shows. D does not change under a monotone transform of both
    samples, so truth ratios, their reciprocals (open-unlearning) and their logarithms give the same value.

    Parameters
    ----------
    unlearned : array-like of float, shape (n,)
        Truth ratio of each sample in the forget set under the unlearned model.
    retained : array-like of float, shape (m,)
        The same under the model that never saw the forget set.

    Raises
    ------
    ValueError
        Not one-dimensional, empty, NaN or infinite.

    Examples
    --------
    >>> forget_quality([0.2, 0.4, 0.9], [0.9, 0.2, 0.4])
    1.0
    >>> round(forget_quality([1, 2, 3], [4, 5, 6]), 12)  # D = 1; 2 of the 20 orders are as extreme
    0.1
    """
    a, b = _floats("unlearned", unlearned), _floats("retained", retained)
    from scipy.stats import ks_2samp  # here because it takes about a second to import

    return float(ks_2samp(a, b).pvalue)


def _floats(name: str, values: Any, ndim: int = 1, nan: bool = False) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers with {ndim} dimension(s): {error}") from error
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    bad = np.isinf(array) if nan else ~np.isfinite(array)
    if bad.any():
        place = np.argwhere(bad)[0].tolist()
        raise ValueError(f"{name} must be finite, got {bad.sum()} bad value(s), the first at {place}")
    return array


def _labels(name: str, values: Any) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty")
    if array.dtype.kind == "O":  # such as a column of strings from pandas
        array = np.array(array.tolist())
    if array.dtype.kind not in "biuUST":
        raise TypeError(f"{name} must be labels of int or str, got dtype {array.dtype}")
    return array


def _same_length(name_a: str, a: NDArray[Any], name_b: str, b: NDArray[Any]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{name_a} and {name_b} must have the same length, got {len(a)} and {len(b)}")


def _same_kind(name_a: str, a: NDArray[Any], name_b: str, b: NDArray[Any]) -> None:
    if (a.dtype.kind in "biu") != (b.dtype.kind in "biu"):  # int and str never compare equal
        raise TypeError(f"{name_a} and {name_b} must both be int or both str, got {a.dtype} and {b.dtype}")
