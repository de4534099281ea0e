r"""Transductive Few-Shot Learning: Clustering is All You Need?

Ziko, Boudiaf, Dolz, Granger, Ben Ayed. 2021, arXiv 2106.09516.

Idea
----
The queries of a few-shot task are labelled together and not one by one: they are clustered, by K-means or K-modes,
with the few labelled rows as constraints, and a Laplacian term asks neighbours for the same label. Nothing is trained.

Equations
---------
n rows x_p, support first, with memberships s_p on the simplex over K classes (support rows: fixed one-hot), prototypes
m_k, W a graph of nearest neighbours::

    E(S, M) = sum_p s_p . a_p  -  (lambda / 2) sum_pq w_pq s_p . s_q
    a_pk = ||x_p - m_k||^2                             prototype="mean"  (K-means)
    a_pk = -exp(-||x_p - m_k||^2 / (2 sigma^2))        prototype="mode"  (K-modes)

Labels: the convex barrier s_p . log s_p is added, the Laplacian term (concave if W is positive semi-definite) is
linearised, and its minimiser is a closed form for all rows at once, repeated until it stands::

    s_p <- softmax(-a_p + lambda sum_q w_pq s_q)       unlabelled p;  support rows are put back to one-hot

Prototypes: m_k is the mean of its members, or the fixed point of mean shift among them, started at the old mode::

    m_k <- sum_p r_pk g_pk x_p / sum_p r_pk g_pk,      g_pk = exp(-||x_p - m_k||^2 / (2 sigma^2))

with r the labels argmax S as one-hot rows (``assignment="hard"``) or S itself (``"soft"``). Before all that
(`transduce`): rows minus the mean of base data, divided by their length ("CL2N"), and queries shifted by
mean(support) - mean(queries). Family: lambda = 0 is K-means or K-modes with constraints; prototypes that stay at the
support means, `relax_labels` alone, is LaplacianShot (Ziko et al., ICML 2020); no iteration at all is SimpleShot.

The certificate
---------------
``energy_`` is E of the memberships that the prototypes are taken from, with the barrier where these are soft, and it
never rises. Three things are needed for that, and none of them is in the official code:

* W is made symmetric, (W + W') / 2, and support rows are clamped in every sweep.
* W, with a zero diagonal, is never positive semi-definite, so the paper's argument does not cover its own graph.
  What does: with c = -lambda_min(W), a sweep lowers the energy by at least KL(S, S+) - (lambda c / 2) ||S+ - S||^2, and
  KL >= ||S+ - S||^2 by Pinsker; so a sweep never raises it while lambda c <= 2 (c was at most 2.34 in 120 tasks of
  garments: lambda up to 0.85), nor does a sweep damped by eta <= 4 / (2 + lambda c) in the logits. `relax_labels` makes
  the paper's sweep, and halves eta of a task whose energy would rise.
* With hard labels the two steps do not minimise the same function: the barrier is there in one and not in the other,
  and the energy the official code watches does rise in real tasks. Here labels that would raise E are refused and the
  iteration ends. With soft memberships both steps minimise one function and nothing has to be refused.

Code and paper
--------------
Read: the official repository imtiazziko/SLK-few-shot at its last commit; of the paper itself, the abstract.

* Official support rows are clamped only before the first sweep, and after the first iteration with lambda = 0 not at
  all. We follow the paper's constraint; therefore no cluster can vanish, for which the official code has to look.
* The official prototypes are those of hard labels at the last commit, and of soft ones (K-means, from the second
  iteration) in the first. The default here is hard. On unit vectors softmax(-a) is nearly uniform, and soft
  prototypes draw close to each other.
* The official sweep has lambda W S where the derivative of its energy has 2 lambda W S: the 1/2 above makes them fit.
* Earlier commits scored after a Hungarian matching of the answers with the true query labels; the last does not.
* sigma^2 = sum_pq w_pq ||x_p - x_q||^2 / (5 n), the official constant, although a row has 2 neighbours.
* Neighbours at equal distance share the places that are left, so that equal rows are treated equally; the official code
  takes whichever comes first.
* A large lambda makes one label for each component of W the minimum, but the sweeps are local: they carry a label along
  a component from neutral costs, not against costs that agree on another one.
* Benchmarks had exactly 15 queries a class, which flatters K-means and the shift; both ask for balance.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from shoestring.classify._transductive_clustering_steps import (
    NeighbourGraph,
    Relaxation,
    bandwidth,
    centre_and_normalise,
    clamped,
    energy,
    mean_prototypes,
    mode_prototypes,
    neighbour_graph,
    one_hot,
    query_shift,
    relax_labels,
    squared_distances,
    unaries,
)

__all__ = [
    "Clustering",
    "ConstrainedPrototypeClustering",
    "NeighbourGraph",
    "Relaxation",
    "bandwidth",
    "centre_and_normalise",
    "cluster",
    "energy",
    "mean_prototypes",
    "mode_prototypes",
    "neighbour_graph",
    "query_shift",
    "relax_labels",
    "squared_distances",
    "transduce",
    "transduce_tasks",
    "unaries",
]

TASKS = 32  # tasks clustered together by `transduce_tasks`: none waits for the slowest of thousands


class ConstrainedPrototypeClustering(ClassifierMixin, BaseEstimator):
    """Labels all unlabelled rows at once, by clustering around prototypes with the labelled rows as constraints.

    Parameters
    ----------
    prototype : {"mean", "mode"}, default="mean"
        K-means or K-modes.
    laplacian : float, default=0.7
        lambda >= 0, how much neighbours agree (official run script; tuned there on validation classes over 0.05 to 1).
        It is on the scale of rows of length 1: squared distances between 0 and 4. Scale other rows first, for example
        with `sklearn.preprocessing.Normalizer`.
    n_neighbors : int, default=2
        Neighbours of a row in the graph, itself not counted (official). Unused if ``laplacian=0``.
    sigma : float or "auto", default="auto"
        Width of the modes' kernel, > 0; ``"auto"``: `bandwidth`. Unused by means.
    align : bool, default=True
        Shift the unlabelled rows so that their mean is that of the labelled ones (the paper's correction of domain
        shift). It supposes that classes are about as frequent in both.
    max_iter : int, default=100
        Outer iterations (official). 0: labels of the nearest prototype, which is SimpleShot.
    tol : float, default=1e-4
        Stop, from the third iteration, when the energy falls by no more than this share of itself (official).
    assignment : {"hard", "soft"}, default="hard"
        What prototypes are taken from: the labels (official), or the memberships S. See the module's docstring.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    transduction_ : ndarray of shape (n_samples,)
        Label of every row of X; the labelled keep theirs.
    label_distributions_ : ndarray of shape (n_samples, n_classes)
        S; one-hot for labelled rows. With ``laplacian=0`` it is softmax(-a).
    prototypes_ : ndarray of shape (n_classes, n_features)
        M, among the shifted rows.
    energy_ : list of float
        E at the start (nearest support mean) and after each iteration. Never rises.
    n_iter_ : int
        Iterations made, the last of which may have changed nothing; 1 if ``max_iter=0``.
    sigma_ : float or None
        The modes' width.
    shift_ : ndarray of shape (n_features,)
        What was added to unlabelled rows; `predict` adds it too.
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    Unlabelled rows have y = -1, as in `sklearn.semi_supervised`. Among string labels the mark is -1 (in an object
    array), ``"-1"`` (what NumPy makes of it in a list of strings) or None. Where y holds exactly -1 and 1, nothing is
    unlabelled: that is the usual coding of two classes, and a warning says so. If no row is unlabelled, the
    prototypes of the classes are all there is to learn.

    Work is done in float64, O(n^2 d) for the graph in blocks of bounded memory, and O(n K d) an iteration.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.preprocessing import normalize
    >>> from shoestring.classify.transductive_clustering import ConstrainedPrototypeClustering
    >>> X, y = load_digits(n_class=5, return_X_y=True)
    >>> X = normalize(X - X.mean(0))
    >>> given = np.concatenate([np.flatnonzero(y == k)[:5] for k in range(5)])  # 5 labels a class, 876 to find
    >>> few = np.full(len(y), -1)
    >>> few[given] = y[given]
    >>> model = ConstrainedPrototypeClustering().fit(X, few)
    >>> print(f"{(model.transduction_ == y).mean():.2f}")
    0.92
    >>> bool(np.all(np.diff(model.energy_) <= 0))
    True
    """

    def __init__(
        self,
        prototype: Literal["mean", "mode"] = "mean",
        laplacian: float = 0.7,
        n_neighbors: int = 2,
        sigma: float | Literal["auto"] = "auto",
        align: bool = True,
        max_iter: int = 100,
        tol: float = 1e-4,
        assignment: Literal["hard", "soft"] = "hard",
    ) -> None:
        self.prototype = prototype
        self.laplacian = laplacian
        self.n_neighbors = n_neighbors
        self.sigma = sigma
        self.align = align
        self.max_iter = max_iter
        self.tol = tol
        self.assignment = assignment

    def fit(self, X: ArrayLike, y: ArrayLike) -> ConstrainedPrototypeClustering:
        """Label the unlabelled rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), integers or strings
            -1 for unlabelled rows; see the notes of the class.

        Raises
        ------
        ValueError, TypeError
            For a parameter out of its range, rows that are not finite numbers, labels of mixed kinds, fewer than two
            classes among the labelled rows, or more neighbours than rows. A model fitted before stays as it was.
        """
        options = self._options()
        if y is None:
            validate_data(self, X, y)  # raises
        rows = check_array(X, dtype=np.float64, estimator=self, input_name="X")
        classes, codes = _encode(y)
        if len(codes) != len(rows):
            raise ValueError(f"y must hold a label for each row of X: X has {len(rows)} rows, y holds {len(codes)}")
        if len(classes) < 2:
            raise ValueError(
                f"y must hold labelled rows of at least 2 classes, got {len(classes)} class(es): {classes.tolist()}"
            )
        data, labels = torch.tensor(rows)[None], torch.tensor(codes)[None]
        shift = query_shift(data, labels) if self.align else torch.zeros_like(data[:, :1])
        found = cluster(torch.where(labels[..., None] < 0, data + shift, data), labels, len(classes), **options)

        validate_data(self, X, reset=True, skip_check_array=True)  # nothing can go wrong any more
        self.classes_ = classes
        self.transduction_ = classes[found.labels[0].numpy()]
        self.label_distributions_ = found.memberships[0].numpy()
        self.prototypes_ = found.prototypes[0].numpy()
        self.energy_: list[float] = found.energy[0, : int(found.n_iter[0]) + 1].tolist()
        self.n_iter_ = max(1, int(found.n_iter[0]))
        self.sigma_ = None if found.sigma is None else float(found.sigma[0])
        self.shift_ = shift[0, 0].numpy()
        if self.max_iter and not found.converged[0]:
            warnings.warn(
                f"max_iter={self.max_iter} iterations were made without convergence; the labels are the last ones",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,) of the nearest prototype, for rows that were not there in `fit`.

        They are taken to come from where the unlabelled rows came from, and are shifted as those were. Rows of `fit`
        may get another label here than in `transduction_`: here they are labelled one by one.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=np.float64)
        shifted = torch.from_numpy(rows + self.shift_)[None]
        return self.classes_[squared_distances(shifted, torch.from_numpy(self.prototypes_)[None])[0].argmin(1).numpy()]

    def _options(self) -> dict[str, Any]:
        if not isinstance(self.align, bool | np.bool_):
            raise ValueError(f"align must be True or False, got {self.align!r}")
        return {
            "prototype": self.prototype,
            "laplacian": self.laplacian,
            "n_neighbors": self.n_neighbors,
            "sigma": self.sigma,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "assignment": self.assignment,
        }


def transduce(
    support: ArrayLike, labels: ArrayLike, query: ArrayLike, base_mean: ArrayLike | None = None, **options: Any
) -> np.ndarray:
    """Labels of the queries of one few-shot task, with the paper's pre-processing.

    Parameters
    ----------
    support : array-like of shape (n_support, d)
        Labelled features, as the encoder gives them.
    labels : array-like of shape (n_support,), integers or strings
    query : array-like of shape (n_query, d)
    base_mean : array-like of shape (d,), optional
        Mean feature of other data of the same encoder ("CL2N"); without it rows are only divided by their length
        ("L2N").
    **options
        Of `ConstrainedPrototypeClustering`.

    Returns
    -------
    ndarray of shape (n_query,)

    Raises
    ------
    ValueError, TypeError
        As in `ConstrainedPrototypeClustering.fit`, or if widths differ or there is nothing to label.

    Examples
    --------
    >>> support, labels = [[1.0, 0.1], [0.0, 1.0]], ["cat", "dog"]
    >>> transduce(support, labels, [[2.0, 0.3], [0.2, 3.0], [1.5, 0.0], [0.1, 1.0]])
    array(['cat', 'dog', 'cat', 'dog'], dtype='<U3')
    """
    S = check_array(support, dtype=np.float64, input_name="support")
    Q = check_array(query, dtype=np.float64, input_name="query")
    classes, codes = _encode(labels, "labels")
    if len(codes) != len(S):
        raise ValueError(f"labels must hold one label for each of the {len(S)} rows of support, got {len(codes)}")
    if codes.min() < 0:
        raise ValueError("labels must name a class for every row of support, got an unlabelled row")
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least 2 classes, got {classes.tolist()}")
    if Q.shape[1] != S.shape[1]:
        raise ValueError(f"query must have the {S.shape[1]} features of support, got {Q.shape[1]}")
    mean = None
    if base_mean is not None:
        mean = check_array(base_mean, dtype=np.float64, ensure_2d=False, input_name="base_mean")
    if mean is not None and mean.shape != S.shape[1:]:
        raise ValueError(f"base_mean must be of shape {S.shape[1:]}, got {mean.shape}")
    one_task = [torch.tensor(rows)[None] for rows in (S, codes, Q)]
    base = None if mean is None else torch.tensor(mean)
    found = transduce_tasks(one_task[0], one_task[1], one_task[2], base, **options)
    return classes[found[0].numpy()]


def transduce_tasks(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    base_mean: Tensor | None = None,
    *,
    align: bool = True,
    **options: Any,
) -> Tensor:
    """Labels of the queries of T few-shot tasks of one size, together: what `transduce` gives for each.

    Parameters
    ----------
    support : Tensor of shape (T, n_support, d), float32 or float64
    labels : Tensor of shape (T, n_support), int64, 0 to K - 1, every class in every task
    query : Tensor of shape (T, n_query, d)
    base_mean : Tensor of shape (d,) or (T, 1, d), optional
    align, **options
        Of `ConstrainedPrototypeClustering`.

    Returns
    -------
    Tensor of shape (T, n_query), int64

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, a value is not finite, or a task lacks a class.

    Examples
    --------
    >>> support = torch.tensor([[[1.0, 0.1], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.1]]])
    >>> query = torch.tensor([[2.0, 0.3], [0.2, 3.0], [1.5, 0.0], [0.1, 1.0]]).expand(2, 4, 2)
    >>> transduce_tasks(support, torch.tensor([[0, 1], [0, 1]]), query).tolist()
    [[0, 1, 0, 1], [1, 0, 1, 0]]
    """
    if support.ndim != 3 or query.ndim != 3 or support.shape[::2] != query.shape[::2] or 0 in query.shape:
        raise ValueError(
            "support and query must be of shape (T, n_support, d) and (T, n_query, d), not empty, "
            f"got {tuple(support.shape)} and {tuple(query.shape)}"
        )
    if support.dtype not in (torch.float32, torch.float64) or query.dtype != support.dtype:
        raise ValueError(f"support and query must both be float32 or float64, got {support.dtype} and {query.dtype}")
    if labels.shape != support.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape {tuple(support.shape[:2])}, got {labels.dtype} of {tuple(labels.shape)}"
        )
    if labels.numel() == 0 or labels.min() < 0:
        raise ValueError("labels must be classes 0 to K - 1 for every row of support")
    X = centre_and_normalise(torch.cat([support, query], 1), base_mean)  # (T, n, d)
    y = torch.nn.functional.pad(labels, (0, query.shape[1]), value=-1)  # (T, n)
    if align:
        X = torch.where(y[..., None] < 0, X + query_shift(X, y), X)
    K = int(labels.max()) + 1
    answers = [cluster(x, l, K, **options).labels for x, l in zip(X.split(TASKS), y.split(TASKS), strict=True)]
    return torch.cat(answers)[:, support.shape[1] :]


# ---- the whole, over tasks


class Clustering(NamedTuple):
    """What `cluster` finds: labels (T, n), memberships (T, n, K), prototypes (T, K, d), energy (T, 1 + iterations),
    where a task's last value is repeated until the last task is done, n_iter (T,), converged (T,), sigma (T,) or None.
    """

    labels: Tensor
    memberships: Tensor
    prototypes: Tensor
    energy: Tensor
    n_iter: Tensor
    converged: Tensor
    sigma: Tensor | None


def cluster(
    X: Tensor,
    y: Tensor,
    n_classes: int,
    *,
    prototype: Literal["mean", "mode"] = "mean",
    laplacian: float = 0.7,
    n_neighbors: int = 2,
    sigma: float | Literal["auto"] = "auto",
    max_iter: int = 100,
    tol: float = 1e-4,
    assignment: Literal["hard", "soft"] = "hard",
    init: Tensor | None = None,
) -> Clustering:
    """Constrained prototype clustering of T tasks at once, each as if it were alone.

    Parameters
    ----------
    X : Tensor of shape (T, n, d), float32 or float64
    y : Tensor of shape (T, n), int64
        0 to n_classes - 1, or -1: unlabelled.
    n_classes : int
        K.
    init : Tensor of shape (T, K, d), optional
        First prototypes; by default the means of the labelled rows, of which every class then needs one. With it y may
        be -1 everywhere: plain clustering. A cluster that loses all its rows keeps its prototype.
    prototype, laplacian, n_neighbors, sigma, max_iter, tol, assignment
        As in `ConstrainedPrototypeClustering`. Rows are taken as they are: neither normalised nor shifted.

    Raises
    ------
    ValueError
        If an option is out of its range, shapes do not fit, a value is not finite, or a class has no labelled row.

    Examples
    --------
    >>> X = torch.tensor([[[0.0], [4.0], [1.0], [2.5], [5.0]]])
    >>> cluster(X, torch.tensor([[0, 1, -1, -1, -1]]), 2, laplacian=0.0).labels
    tensor([[0, 1, 0, 1, 1]])
    """
    _check_options(prototype, laplacian, n_neighbors, sigma, max_iter, tol, assignment)
    _check_rows(X, y, n_classes, n_neighbors if laplacian else 0, init)
    K, hard, eps = n_classes, assignment == "hard", torch.finfo(X.dtype).eps
    origin = X.mean(1, keepdim=True)  # distances do not depend on it, their rounding does
    X = X - origin
    clamp = torch.where(y[..., None] >= 0, torch.nn.functional.one_hot(y.clamp(min=0), K), 0).to(X.dtype)  # (T, n, K)
    M = mean_prototypes(X, clamp) if init is None else init - origin  # (T, K, d)
    graph = neighbour_graph(X, n_neighbors) if laplacian or (prototype == "mode" and sigma == "auto") else None
    width = None
    if prototype == "mode":
        width = bandwidth(X, graph) if graph is not None and sigma == "auto" else X.new_full((len(X),), float(sigma))
    W = graph if laplacian else None

    a = unaries(X, M, width)  # (T, n, K)
    Z, S = -a, clamped(-a, clamp)  # logits, memberships
    R = one_hot(S) if hard else S  # what prototypes are taken from
    E = energy(R, a, W, laplacian)
    energies, n_iter = [E], torch.zeros(len(X), dtype=torch.int64)
    active = torch.ones(len(X), dtype=torch.bool)
    for i in range(max_iter):
        M_next = mean_prototypes(X, R, M) if width is None else mode_prototypes(X, R, M, width)
        M = torch.where(active[:, None, None], M_next, M)
        a = unaries(X, M, width)
        E_kept = energy(R, a, W, laplacian)  # new prototypes, old labels
        relaxed = relax_labels(a, clamp, W, laplacian, start=-a if hard else Z, active=active)
        R_next = one_hot(relaxed.memberships) if hard else relaxed.memberships
        E_next = energy(R_next, a, W, laplacian)
        better = active & (E_next <= E_kept)
        same = (R_next == R).all(2).all(1)
        S, Z, R = (
            torch.where(better[:, None, None], new, old)
            for new, old in [(relaxed.memberships, S), (relaxed.logits, Z), (R_next, R)]
        )
        E_next = torch.where(better, E_next, torch.where(active, E_kept, E))
        n_iter += active
        active = active & better & ~same
        if i > 1:
            active = active & (E - E_next > max(tol, eps) * E_next.abs())
        E = E_next
        energies.append(E)
        if not active.any():
            break
    return Clustering(R.argmax(2), S, M + origin, torch.stack(energies, 1), n_iter, ~active, width)


# ---- what is refused


def _check_options(
    prototype: Any, laplacian: Any, n_neighbors: Any, sigma: Any, max_iter: Any, tol: Any, assignment: Any
) -> None:
    for name, value, choices in [
        ("prototype", prototype, ("mean", "mode")),
        ("assignment", assignment, ("hard", "soft")),
    ]:
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    for name, value, lowest in [("n_neighbors", n_neighbors, 1), ("max_iter", max_iter, 0)]:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < lowest:
            raise ValueError(f"{name} must be an integer >= {lowest}, got {value!r}")
    for name, value in [("laplacian", laplacian), ("tol", tol)]:
        if not _is_number(value) or value < 0:
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    if sigma != "auto" and not (_is_number(sigma) and sigma > 0):
        raise ValueError(f"sigma must be a number > 0 or 'auto', got {sigma!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_rows(X: Tensor, y: Tensor, n_classes: int, n_neighbors: int, init: Tensor | None) -> None:
    if X.ndim != 3 or 0 in X.shape or X.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"X must be float32 or float64 of shape (T, n, d), not empty, got {X.dtype} {tuple(X.shape)}")
    if y.shape != X.shape[:2] or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 of shape {tuple(X.shape[:2])}, got {y.dtype} of {tuple(y.shape)}")
    if not torch.isfinite(X).all():
        raise ValueError("X must be finite, got NaN or infinity")
    if y.max() >= n_classes or y.min() < -1:
        raise ValueError(f"y must be -1 to {n_classes - 1}, got {y.min()} to {y.max()}")
    if init is not None:
        if init.shape != (len(X), n_classes, X.shape[2]) or not torch.isfinite(init).all():
            raise ValueError(f"init must be finite of shape {(len(X), n_classes, X.shape[2])}, got {tuple(init.shape)}")
    else:
        present = (y[:, :, None] == torch.arange(n_classes)).any(1)  # (T, K)
        if not present.all():
            task, k = (~present).nonzero()[0].tolist()
            raise ValueError(f"y must hold a labelled row of every class; task {task} has none of class {k}")
    if n_neighbors >= X.shape[1]:
        raise ValueError(f"n_neighbors must be < the number of rows, got {n_neighbors} for n_samples = {X.shape[1]}")


def _encode(y: Any, name: str = "y") -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes, and for each row the number of its class, or -1: unlabelled."""
    y = column_or_1d(y, warn=True)
    if y.dtype.kind == "O":
        free = np.array([label is None or _is_mark(label) for label in y], dtype=bool)
        kinds = {_kind(label) for label in y[~free]}
        if len(kinds) > 1 or not kinds <= {"str", "int", "bool"}:
            raise TypeError(
                f"{name} must hold labels of one kind, integers or strings, and -1 where a row is unlabelled; "
                f"got {', '.join(sorted(kinds))}"
            )
        given = np.array(y[~free].tolist())
    elif y.dtype.kind in "UT":
        free = y == "-1"
        given = y[~free]
    else:
        check_classification_targets(y)
        free = (y == -1) & (y.dtype.kind != "b")
        if np.array_equal(np.unique(y), [-1, 1]):
            warnings.warn(
                f"{name} holds -1 and 1: taken as two classes, no row is unlabelled. Where rows labelled 1 are to be "
                "the only class, there is nothing to learn; name classes otherwise to have unlabelled rows",
                UserWarning,
                stacklevel=3,
            )
            free = np.zeros(len(y), dtype=bool)
        given = y[~free]
    codes = np.full(len(y), -1, dtype=np.int64)
    classes, codes[~free] = np.unique(given, return_inverse=True)
    return classes, codes


def _is_mark(label: Any) -> bool:
    return label == "-1" if isinstance(label, str) else _kind(label) == "int" and label == -1


def _kind(label: Any) -> str:
    if isinstance(label, bool | np.bool_):
        return "bool"
    return "int" if isinstance(label, numbers.Integral) else "str" if isinstance(label, str) else type(label).__name__
