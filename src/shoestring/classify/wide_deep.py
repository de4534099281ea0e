r"""Wide and Deep Neural Networks Achieve Optimality for Classification.

Radhakrishnan, Belkin, Uhler. PNAS 120(14) e2208779120, 2023, there titled "Wide and Deep Neural Networks Achieve
Consistency for Classification". arXiv 2204.14126.

Idea
----
A network of infinite width, trained to the end, is a kernel machine with the neural tangent kernel; at infinite depth
that machine becomes one of three known classifiers, and two or three numbers of the activation decide which. One can
therefore pick an activation whose infinitely wide and deep network is the Hilbert kernel estimate, which is consistent
for every law of the data and has nothing to tune.

Equations
---------
Rows are scaled to the unit sphere S^d in R^(d+1); xi = <x, x'>. The activation is scaled to E phi(z)^2 = 1 under
z ~ N(0, 1) and written in normalised Hermite polynomials; its dual is a power series::

    phi = sum_i a_i He_i / sqrt(i!),     f(xi) = E[phi(u) phi(v)] = sum_i a_i^2 xi^i,     corr(u, v) = xi
    A = E phi = a_0,     A' = E phi' = a_1,     B' = E phi'^2 = f'(1) = sum_i i a_i^2

Kernels of the network with L hidden layers, and its classifier after training to zero loss (y one-hot)::

    NNGP  S_0 = xi,  S_l = f(S_{l-1})            NTK  K_0 = xi,  K_l = S_l + K_{l-1} f'(S_{l-1})
    m_L(x) = argmax y K_L(X, X)^{-1} K_L(X, x)

As L -> infinity (`taxonomy`):

* A = 0, A' = 0: S_L falls doubly exponentially, ratios of kernel values diverge, m is the nearest neighbour (1-NN).
* A = 0, A' != 0: K_L / (L A'^(2L)) -> h(xi) off the diagonal, which grows as B'^L. So
  m(x) = argmax sum_i y_i h(<x_i, x>), a smoother with a singular kernel; h is the Koenigs function of f, the solution
  of Schroeder's equation::

      h(f(xi)) = A'^2 h(xi),    h(xi) = lim f^L(xi) / A'^(2L) ~ ||x - x'||^-alpha,    alpha = -4 log|A'| / log B'

* A != 0: the same kernel value for all pairs, so the majority vote. For B' > 1 (and, only as 1/L, for B' = 1 as in
  ReLU) because the diagonal outgrows it; for B' < 1 all of K_L tends to 1 / (1 - B'), and it is the majority vote for
  any ridge > 0.

With alpha = d the kernel is that of the Hilbert estimate (Devroye, Gyorfi, Krzyzak 1998), w_i = ||x - x_i||^-d, and m
tends to the Bayes classifier as the number of rows grows. An activation that has it, for d >= 2::

    phi(x) = 2^(-d/4) (x^3 - 3x) / sqrt(6) + sqrt(1 - 2^(1 - d/2)) (x^2 - 1) / sqrt(2) + 2^(-d/4) x

that is a_1^2 = a_3^2 = 2^(-d/2), B' = 2, alpha = d (`explicit_coefficients`).

Code and paper
--------------
* The official code uses the NNGP with its diagonal set to 1, not the NTK, for the singular activations. Both have the
  same limit; here `kernel` chooses, "ntk" being the paper's. At finite depth the NNGP is near the limit as A'^(2L), the
  NTK only as 1 / (L (1 - xi)).
* The official code solves in float64 with kernel values as they are, which over- or underflow (B'^L, A'^(2L)) for deep
  networks. Here they are kept as logarithms, every query is scaled by its largest value, and <x, x> is exactly 1.
* It draws the data again if two training rows coincide. Here rows that coincide are one row with the mean of their
  labels, which is the limit of a small ridge.
* h(xi) (1 - xi)^(alpha/2) tends to no constant but to a function that is periodic in log(1 - xi), with period log B'.
  At d <= 4 it is all but flat; for d = 63 the local slope of log h is off by a tenth, its mean over a period is not.
* A row of zeros has no direction; it gets one of its own, orthogonal to all rows but other rows of zeros.
* The theorems are about xi >= 0 (the non-negative orthant: scale features to [0, 1], say). f^L and h exist for negative
  xi too, where h may be negative, and are used; `nonnegative_` says whether all training features are >= 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from shoestring.classify._fit import all_or_nothing
from shoestring.classify._wide_deep_kernels import (
    Signed,
    Taxonomy,
    check_coefficients,
    check_depth,
    dual_activation,
    dual_derivative,
    explicit_coefficients,
    hermite_coefficients,
    koenigs_kernel,
    koenigs_series,
    log_diagonal,
    log_kernel,
    log_koenigs,
    log_koenigs_kernel,
    nngp_kernel,
    ntk_kernel,
    sphere_dimension,
    sphere_products,
    squared_distances,
    taxonomy,
    unit_rows,
)

__all__ = [
    "HermiteActivation",
    "HilbertKernelClassifier",
    "InfinitelyDeepNTKClassifier",
    "Taxonomy",
    "dual_activation",
    "dual_derivative",
    "explicit_coefficients",
    "hermite_coefficients",
    "hilbert_kernel",
    "koenigs_kernel",
    "log_koenigs_kernel",
    "nngp_kernel",
    "ntk_kernel",
    "taxonomy",
]

QUERIES, ROWS = 256, 1024  # a prediction works on this many queries and training rows at a time
NEAREST = 1e12  # alpha of the 1-NN regime: distances equal to 1e-12 tie
Vote = TypeVar("Vote", bound="_KernelVote")


class _KernelVote(ClassifierMixin, BaseEstimator):
    """What the two classifiers share: checks, labels, and a fit that changes nothing if it raises."""

    classes_: np.ndarray

    def fit(self: Vote, X: ArrayLike, y: ArrayLike) -> Vote:
        """Keep the training rows (and, at finite depth, solve for their coefficients).

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), labels of at least two classes

        Raises
        ------
        TypeError, ValueError
            If a parameter, X or y is not what it must be; the estimator is then as before.
        """
        with all_or_nothing(self):
            rows, labels = validate_data(self, X, y, dtype=np.float64)
            try:
                check_classification_targets(labels)
                self.classes_, codes = np.unique(labels, return_inverse=True)
            except TypeError:
                kinds = sorted({type(label).__name__ for label in labels})
                raise TypeError(f"y must hold labels of one kind, got {', '.join(kinds)}") from None
            if len(self.classes_) < 2:
                raise ValueError("y must hold at least two classes, got one class")
            order = np.argsort(codes, kind="stable")
            self._codes = codes[order]  # sorted, so that votes are sums over runs of columns
            self._learn(rows[order])
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,) with the most votes; ties go to the first in `classes_`."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(axis=1)]

    def _check_queries(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False)

    def _learn(self, X: np.ndarray) -> None:
        raise NotImplementedError

    def _scores(self, X: Any) -> np.ndarray:
        raise NotImplementedError


class HilbertKernelClassifier(_KernelVote):
    """Votes of all training rows, weighted by distance to the power -alpha: consistent, with nothing to tune.

    The Hilbert kernel estimate, and the limit of the infinitely wide and deep network of `explicit_coefficients`. It
    interpolates: at a training row it returns that row's label, or the mean if several coincide.

    Parameters
    ----------
    alpha : float or "dim", default="dim"
        Exponent, > 0. ``"dim"``: d, the dimension of the space the rows lie in: n_features - 1 on the sphere,
        n_features without `normalize`. The only consistent choice if the rows fill that space; give the intrinsic
        dimension if they do not. Large alpha is 1-NN, small alpha the majority vote.
    eps : float, default=0.0
        Weights are ``(||x - x_i||^2 + eps^2)^(-alpha/2)``. Above 0 nothing is singular, nor interpolated.
    normalize : bool, default=True
        Scale rows to the unit sphere, the paper's setting; it drops their lengths. False: distances in R^n_features.

    Attributes
    ----------
    alpha_ : float
        The exponent in use.
    classes_, n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    Prediction costs 2 n_features flops, a logarithm and an exponential a pair of query and training row; working memory
    is a few MB beside the rows and the result. Weights are relative to the query's largest, so no alpha overflows. The
    same as ``KNeighborsClassifier(n, weights=lambda d: d**-alpha, algorithm="brute")`` for n training rows.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_val_score
    >>> X, y = load_iris(return_X_y=True)
    >>> model = HilbertKernelClassifier()
    >>> bool(cross_val_score(model, X, y).mean() > 0.95)
    True
    >>> model.fit(X, y).alpha_
    3.0
    """

    def __init__(self, alpha: float | Literal["dim"] = "dim", eps: float = 0.0, normalize: bool = True) -> None:
        self.alpha = alpha
        self.eps = eps
        self.normalize = normalize

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Shares (n_samples, n_classes) of the votes. Consistent, but noisy where 1-NN would be."""
        return self._scores(X)

    def _learn(self, X: np.ndarray) -> None:
        if not isinstance(self.normalize, bool | np.bool_):
            raise TypeError(f"normalize must be True or False, got {self.normalize!r}")
        self._eps = _number(self.eps, "eps", 0.0, inclusive=True)
        if isinstance(self.alpha, str):
            if self.alpha != "dim":
                raise ValueError(f"alpha must be 'dim' or a number > 0, got {self.alpha!r}")
            self.alpha_ = float(sphere_dimension(X.shape[1]) if self.normalize else X.shape[1])
        else:
            self.alpha_ = _number(self.alpha, "alpha", 0.0, inclusive=False)
        if self.normalize:
            self._rows = unit_rows(X)
        else:  # weights do not change with a shift or scale of the distances; rounding and overflow do
            with np.errstate(over="ignore", invalid="ignore"):
                self._shift = X.mean(axis=0)
                self._scale = float(np.abs(X - self._shift).max()) or 1.0
            if not np.isfinite(self._scale):
                raise ValueError("X must spread less than 1e308, or distances overflow")
            self._rows = (X - self._shift) / self._scale
            self._eps /= self._scale
        self._squares = np.einsum("ij,ij->i", self._rows, self._rows)

    def _scores(self, X: Any) -> np.ndarray:
        X = self._check_queries(X)
        if self.normalize:
            Q = unit_rows(X)
        else:
            Q = (X - self._shift) / self._scale
            if np.abs(Q).max() > 1e150:
                raise ValueError("X must lie within 1e150 times the spread of the training rows, or distances overflow")
        Q2 = np.einsum("ij,ij->i", Q, Q)
        power, eps2 = -self.alpha_ / 2, self._eps**2

        def log_weights(q: slice, r: slice) -> tuple[np.ndarray, None, np.ndarray]:
            D, least = squared_distances(Q[q], self._rows[r], Q2[q], self._squares[r])
            with np.errstate(divide="ignore"):  # log 0 = -inf: a weight of +inf, an exact hit
                if eps2:
                    D += eps2
                np.log(D, out=D)
                D *= power
                return D, None, power * np.log(least + eps2)

        votes, _ = _kernel_votes(log_weights, len(Q), len(self._rows), len(self.classes_), _by_class(self._codes))
        return votes / votes.sum(axis=1, keepdims=True)


class InfinitelyDeepNTKClassifier(_KernelVote):
    """The classifier that a network of infinite width, of any depth up to infinity, becomes when trained to the end.

    Parameters
    ----------
    hermite : array-like of shape (degree + 1,) or "dim", default="dim"
        Normalised Hermite coefficients a_i of the activation, squares summing to 1. ``"dim"``: the paper's activation
        for d = n_features - 1, `explicit_coefficients`, whose limit is consistent.
    activation : callable, optional
        An activation (of tensors or arrays) instead of `hermite`; see `hermite_coefficients`.
    depth : int or inf, default=inf
        Hidden layers L. At infinity nothing is solved; `taxonomy` says what it is.
    ridge : float, default=0.0
        Added to the diagonal of K_L. At infinite depth it matters for A != 0, B' <= 1 only.
    kernel : {"ntk", "nngp"}, default="ntk"
        All layers trained, or the last one only (as the official code has it). The limits are the same.

    Attributes
    ----------
    taxonomy_ : Taxonomy
        A, A', B', alpha and regime of the activation.
    coefs_ : ndarray of shape (degree + 1,)
        Hermite coefficients in use.
    nonnegative_ : bool
        Whether all training features are >= 0, for which the theorems are proved.
    classes_, n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    Infinite depth: fit costs nothing, a prediction about ten evaluations of the dual activation a pair. Finite depth:
    fit takes n^2 numbers and n^3/3 flops; if K_L is singular and ridge 0, the solution of least norm, some 25 times
    that. Working memory of a prediction is a few MB beside the rows and the result.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> deep = InfinitelyDeepNTKClassifier().fit(X[::2], y[::2])
    >>> deep.taxonomy_.regime, round(deep.taxonomy_.alpha, 9)
    ('singular kernel', 3.0)
    >>> bool(deep.score(X[1::2], y[1::2]) > 0.9)
    True
    >>> shallow = InfinitelyDeepNTKClassifier(depth=2, ridge=0.1).fit(X[::2], y[::2])
    >>> bool(shallow.score(X[1::2], y[1::2]) > 0.9)
    True
    """

    def __init__(
        self,
        hermite: ArrayLike | Literal["dim"] = "dim",
        activation: Callable[[Any], Any] | None = None,
        depth: float = math.inf,
        ridge: float = 0.0,
        kernel: Literal["ntk", "nngp"] = "ntk",
    ) -> None:
        self.hermite = hermite
        self.activation = activation
        self.depth = depth
        self.ridge = ridge
        self.kernel = kernel

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Scores (n_samples, n_classes), for two classes their difference (n_samples,).

        Finite depth: y K_L(X, X)^-1 K_L(X, x), the network's outputs for one-hot targets (or that times a positive
        number where it would underflow). Infinite depth: shares of the votes, negative for classes with negative ones.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        if self.depth == math.inf and self.activation is None and not isinstance(self.hermite, str):
            tags.classifier_tags.poor_score = bool(np.ravel(self.hermite)[:1].any())  # A != 0: the majority vote
        return tags

    def _learn(self, X: np.ndarray) -> None:
        if self.kernel not in ("ntk", "nngp"):
            raise ValueError(f"kernel must be 'ntk' or 'nngp', got {self.kernel!r}")
        ridge = _number(self.ridge, "ridge", 0.0, inclusive=True)
        self.nonnegative_ = bool((X >= 0).all())
        self._rows = unit_rows(X)
        sphere_dimension(X.shape[1])
        if self.activation is not None:
            if not isinstance(self.hermite, str):
                raise ValueError("hermite and activation exclude each other, got both")
            if not callable(self.activation):
                raise TypeError(f"activation must be callable, got {self.activation!r}")
            self.taxonomy_ = taxonomy(self.activation)
            self.coefs_ = hermite_coefficients(self.activation)
        else:
            if not isinstance(self.hermite, str):
                self.coefs_ = np.array(self.hermite, dtype=np.float64)
            elif self.hermite == "dim":
                self.coefs_ = explicit_coefficients(sphere_dimension(X.shape[1]))
            else:
                raise ValueError(f"hermite must be 'dim' or coefficients a_0, a_1, ..., got {self.hermite!r}")
            check_coefficients(self.coefs_, "hermite")
            self.taxonomy_ = taxonomy(self.coefs_)
        self._squared_coefs = check_coefficients(self.coefs_)
        if isinstance(self.depth, Real) and self.depth == math.inf:
            self._learn_limit(ridge)
        else:
            self._learn_network(check_depth(self.depth, self._squared_coefs), ridge)

    def _learn_limit(self, ridge: float) -> None:
        kind = self.taxonomy_
        if kind.regime == "linear":
            raise ValueError(
                "activation must not be linear at depth=inf: the kernel stays <x, x'>; give a finite depth"
            )
        rank_one = kind.B_prime < 1 - 1e-9 or (self.kernel == "nngp" and kind.B_prime <= 1 + 1e-9)
        if kind.regime == "majority vote" and rank_one and ridge == 0:
            raise ValueError(
                f"ridge must be > 0 at depth=inf for A = {kind.A:.3g}, B' = {kind.B_prime:.3g}, got 0: all kernel "
                "values tend to the same number, which a ridge makes the majority vote; or give a finite depth"
            )
        _, same, times = np.unique(self._rows, axis=0, return_inverse=True, return_counts=True)
        self._log_times = np.log(times[same.ravel()])
        self._solution: np.ndarray | None = None

    def _learn_network(self, depth: int, ridge: float) -> None:
        self._depth, ntk = depth, self.kernel == "ntk"
        Y = np.zeros((len(self._rows), len(self.classes_)))
        Y[np.arange(len(Y)), self._codes] = 1.0
        self._rows, same, times = np.unique(self._rows, axis=0, return_inverse=True, return_counts=True)
        means = np.zeros((len(self._rows), Y.shape[1]))
        np.add.at(means, same.ravel(), Y)
        means /= times[:, None]
        self._log_diagonal = log_diagonal(self._squared_coefs, depth, ntk)
        K = np.empty((len(self._rows), len(self._rows)))  # over its diagonal
        for q in _blocks(len(K), ROWS):
            log, sign = self._log_kernel(self._rows[q], self._rows)
            K[q] = sign * np.exp(log - self._log_diagonal)
        with np.errstate(over="ignore", under="ignore"):
            K.ravel()[:: len(K) + 1] += ridge * np.exp(-self._log_diagonal) / times
        self._solution = _solve(K, means)

    def _scores(self, X: Any) -> np.ndarray:
        Q = unit_rows(self._check_queries(X))
        share = np.bincount(self._codes) / len(self._codes)
        if self._solution is not None:
            solution = self._solution

            def network(q: slice, r: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
                log, sign = self._log_kernel(Q[q], self._rows[r])
                return log, sign, log.max(axis=1)

            def add(votes: np.ndarray, W: np.ndarray, r: slice) -> None:
                votes += W @ solution[r]

            votes, scale = _kernel_votes(network, len(Q), len(self._rows), len(self.classes_), add)
            return votes * np.exp(np.clip(scale - self._log_diagonal, -600, 0))[:, None]
        if self.taxonomy_.regime == "majority vote":
            return np.tile(share, (len(Q), 1))
        ones = np.ones(max(len(Q), len(self._rows)))
        series = koenigs_series(self._squared_coefs) if self.taxonomy_.regime == "singular kernel" else None

        def log_weights(q: slice, r: slice) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
            if series is None:
                log, _ = squared_distances(Q[q], self._rows[r], ones[: len(Q[q])], ones[: len(self._rows[r])])
                with np.errstate(divide="ignore"):
                    np.log(log, out=log)
                log *= -NEAREST / 2
                sign = None
            else:
                log, sign = log_koenigs(sphere_products(Q[q], self._rows[r]), self._squared_coefs, series)
            log -= self._log_times[r]
            return log, sign, log.max(axis=1)

        votes, _ = _kernel_votes(log_weights, len(Q), len(self._rows), len(self.classes_), _by_class(self._codes))
        total = np.abs(votes).sum(axis=1, keepdims=True)
        return np.where(total > 0, votes / np.where(total > 0, total, 1.0), share)  # orthogonal to all rows: no vote

    def _log_kernel(self, Q: np.ndarray, rows: np.ndarray) -> Signed:
        return log_kernel(sphere_products(Q, rows), self._squared_coefs, self._depth, self.kernel == "ntk")


class HermiteActivation(nn.Module):
    """Activation phi(x) = sum_i a_i He_i(x) / sqrt(i!) for finite networks.

    Meant for pre-activations of unit variance: unit-norm inputs, and layers in the NTK parametrisation (weights
    ~ N(0, 1), divided by the square root of the width).

    Parameters
    ----------
    coefs : array-like of shape (degree + 1,)
        a_0, a_1, ..., squares summing to 1; kept as the buffer `coefs`, not trained.

    Shapes
    ------
    Any shape to the same shape and dtype.

    Examples
    --------
    >>> phi = HermiteActivation(explicit_coefficients(2))  # (He_1 + He_3 / sqrt(6)) / sqrt(2)
    >>> phi(torch.tensor([0.0, 1.0])).round(decimals=4)
    tensor([0.0000, 0.1298])
    """

    coefs: Tensor

    def __init__(self, coefs: ArrayLike) -> None:
        super().__init__()
        check_coefficients(coefs)
        self.register_buffer("coefs", torch.as_tensor(np.asarray(coefs, dtype=np.float64)))

    def forward(self, x: Tensor) -> Tensor:
        a = self.coefs.to(x.dtype)
        before, h = torch.zeros_like(x), torch.ones_like(x)  # He_i / sqrt(i!)
        y = a[0] * h
        for i in range(len(a) - 1):
            before, h = h, (x * h - math.sqrt(i) * before) / math.sqrt(i + 1)
            y = y + a[i + 1] * h
        return y

    def extra_repr(self) -> str:
        return f"degree={len(self.coefs) - 1}"


def hilbert_kernel(
    X: ArrayLike, Y: ArrayLike | None = None, alpha: float | Literal["dim"] = "dim", eps: float = 0.0
) -> np.ndarray:
    """(||x - y||^2 + eps^2)^(-alpha/2) for rows as they are; inf where they coincide and eps = 0.

    Parameters
    ----------
    X : array-like of shape (n, p)
    Y : array-like of shape (m, p), optional; by default X
    alpha : float or "dim", default="dim"; ``"dim"``: p
    eps : float, default=0.0

    Examples
    --------
    >>> hilbert_kernel([[0.0, 0.0]], [[3.0, 4.0], [0.0, 0.0]], alpha=1.0).round(12).tolist()
    [[0.2, inf]]
    """
    X = np.asarray(X, dtype=np.float64)
    Y = X if Y is None else np.asarray(Y, dtype=np.float64)
    if not (X.ndim == Y.ndim == 2 and X.shape[1] == Y.shape[1] and X.size and Y.size):
        raise ValueError(f"X and Y must be of shape (rows >= 1, p) and the same p, got {X.shape} and {Y.shape}")
    if not (np.isfinite(X).all() and np.isfinite(Y).all()):
        raise ValueError("X and Y must be finite, got NaN or infinity")
    power = float(X.shape[1]) if isinstance(alpha, str) and alpha == "dim" else _number(alpha, "alpha", 0.0, False)
    D, _ = squared_distances(X, Y, np.einsum("ij,ij->i", X, X), np.einsum("ij,ij->i", Y, Y))
    D += _number(eps, "eps", 0.0, inclusive=True) ** 2
    with np.errstate(divide="ignore", over="ignore"):
        return D ** (-power / 2)


# ---- inside


def _kernel_votes(
    log_weights: Callable[[slice, slice], tuple[np.ndarray, np.ndarray | None, np.ndarray]],
    n_queries: int,
    n_rows: int,
    n_outputs: int,
    add: Callable[[np.ndarray, np.ndarray, slice], None],
) -> tuple[np.ndarray, np.ndarray]:
    """sum_j w_ij t_j = votes_i exp(scale_i), block by block, with a running maximum as in log-sum-exp.

    Parameters
    ----------
    log_weights : log |w| of a block of queries and rows (overwritten here), signs or None, and maxima (queries,).
        Weights of +inf silence all others.
    add : add weights (queries, rows) times the targets of these rows to votes (queries, n_outputs)
    """
    votes, scale = np.zeros((n_queries, n_outputs)), np.full(n_queries, -np.inf)
    for q in _blocks(n_queries, QUERIES):
        for r in _blocks(n_rows, ROWS):
            W, sign, largest = log_weights(q, r)
            top = np.maximum(scale[q], largest)
            with np.errstate(invalid="ignore", under="ignore"):
                votes[q] *= np.where(scale[q] == top, 1.0, np.exp(scale[q] - top))[:, None]
                hit = np.flatnonzero(top == np.inf)
                W[hit] = np.where(W[hit] == np.inf, 0.0, -np.inf)
                W -= np.where(np.isinf(top), 0.0, top)[:, None]
                np.exp(W, out=W)
            if sign is not None:
                W *= sign
            add(votes[q], W, r)
            scale[q] = top
            del W, sign  # before the next block is made
    return votes, scale


def _by_class(codes: np.ndarray) -> Callable[[np.ndarray, np.ndarray, slice], None]:
    """Adds weights to the class of their row; codes (rows,) must be sorted."""

    def add(votes: np.ndarray, W: np.ndarray, r: slice) -> None:
        here = codes[r]
        starts = np.flatnonzero(np.diff(here, prepend=-1))
        votes[:, here[0] : here[-1] + 1] += np.add.reduceat(W, starts, axis=1)

    return add


def _solve(K: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """K^-1 Y, or the solution of least norm if K is singular to rounding."""
    try:
        factor = cho_factor(K, lower=True)
        pivots = np.abs(np.diag(factor[0]))
        if pivots.min() ** 2 > len(K) * np.finfo(float).eps * pivots.max() ** 2:
            return cho_solve(factor, Y)
    except LinAlgError:
        pass
    values, V = eigh(K)
    keep = values > len(K) * np.finfo(float).eps * values[-1]
    return (V[:, keep] / values[keep]) @ (V[:, keep].T @ Y)


def _blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _number(value: Any, name: str, low: float, inclusive: bool) -> float:
    wanted = f"a finite number {'>=' if inclusive else '>'} {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not math.isfinite(value) or value < low or (value == low and not inclusive):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return float(value)
