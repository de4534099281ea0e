r"""FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning.

Petit, Popescu, Schindler, Picard, Delezoide. WACV 2023. arXiv 2211.13131.

Idea
----
Behind a frozen encoder, of every past class only the centroid is kept. When new classes come, the rows of the new class
most similar to a past one are moved onto the past centroid and play its rows; a linear classifier is then fitted on all
classes, real rows of the new ones and pseudo-rows of the old ones.

Equations
---------
mu_p the centroid of past class p, F_c the rows of new class c, mu_c their mean::

    q(p)   = argmax_{c new} cos(mu_p, mu_c)                the k-th most similar for FeTrIL^k
    Fhat_p = F_{q(p)} - mu_{q(p)} + mu_p
    fit a linear classifier on { rows / ||rows|| } of {(F_c, c)} and {(Fhat_p, p)}

Code and paper
--------------
* The paper compares centroids by cosine, the official code by Euclidean distance: `metric`, the paper's by default.
* The official code leaves the first 512 rows unnormalised; here every row is brought to length 1, once translated.
* Paper and code know states of new classes only. Here a class may come back: the classes of a chunk have their real
  rows in it, all others are past, and a centroid is the mean of all rows of its class so far. (Ours.)
* FeTrIL_fc, a softmax layer trained by SGD, is ``estimator=SGDClassifier(loss="log_loss")``, ``normalize=False``.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.svm import LinearSVC
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from shoestring.learn._labels import check_announced, check_labels
from shoestring.learn._model_file import read, restore, write
from shoestring.learn._prototypes import add_sums, class_sums, unit

__all__ = ["FeTrIL", "choose_sources", "pseudo_features", "translate"]

FORMAT, VERSION = "shoestring.fetril", 1
SAVED = {"LinearSVC": LinearSVC, "LogisticRegression": LogisticRegression, "SGDClassifier": SGDClassifier}


def translate(F: np.ndarray, mu_src: np.ndarray, mu_dst: np.ndarray) -> np.ndarray:
    """Rows F (n, d) around mu_src (d,), moved to lie around mu_dst (d,).

    Examples
    --------
    >>> translate(np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([2.0, 0.0]), np.array([0.0, 5.0]))
    array([[-1.,  5.],
           [ 1.,  5.]])
    """
    return F + (mu_dst - mu_src)


def choose_sources(
    past: np.ndarray, new: np.ndarray, metric: Literal["cosine", "euclidean"] = "cosine", k: int = 1
) -> np.ndarray:
    """For each past centroid the place of its k-th most similar new one (the last, where there are fewer than k).

    Parameters
    ----------
    past, new : ndarrays of shape (P, d) and (N, d), N >= 1
    metric : {"cosine", "euclidean"}, default="cosine"
        The paper's, or the official code's.
    k : int >= 1, default=1
        The paper's FeTrIL^k; its main tables have 1.

    Returns
    -------
    ndarray of shape (P,), int64
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if metric == "cosine":
        similarity = unit(past) @ unit(new).T  # (P, N)
    else:
        similarity = past @ new.T - 0.5 * np.square(new).sum(1)  # as -||past - new||^2 / 2, but for a constant a row
    order = np.argsort(-similarity, axis=1, kind="stable")
    return order[:, min(k, len(new)) - 1]


def pseudo_features(
    F: np.ndarray, y: np.ndarray, past: np.ndarray, past_labels: np.ndarray, metric: str = "cosine", k: int = 1
) -> tuple[np.ndarray, np.ndarray, dict[Any, Any]]:
    """Pseudo-rows of every past class, made of rows of the new ones.

    Parameters
    ----------
    F : ndarray of shape (n, d)
        Rows of the new classes.
    y : ndarray of shape (n,)
        Their labels.
    past : ndarray of shape (P, d)
        Centroids of the past classes.
    past_labels : ndarray of shape (P,)
    metric, k : as for `choose_sources`

    Returns
    -------
    X : ndarray of shape (sum over p of n_{q(p)}, d), of the dtype of F
    labels : ndarray, the past class each row plays
    sources : dict, past label -> label of the new class its rows come from

    Examples
    --------
    >>> F = np.array([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0]])
    >>> X, labels, sources = pseudo_features(F, np.array([7, 7, 8]), np.array([[1.0, 5.0]]), np.array([3]))
    >>> X, labels, sources
    (array([[1., 4.],
           [1., 6.]]), array([3, 3]), {3: 7})
    """
    classes, ids = np.unique(y, return_inverse=True)
    sums, counts = class_sums(F, y, classes)
    mu = sums / counts[:, None]  # (N, d)
    q = choose_sources(past, mu, metric, k)  # type: ignore[arg-type]
    rows_of = np.split(np.argsort(ids, kind="stable"), np.cumsum(counts)[:-1])
    taken = np.concatenate([rows_of[c] for c in q]) if len(q) else np.empty(0, dtype=np.int64)
    played = np.repeat(np.arange(len(past)), counts[q])  # which past class each row plays
    X = translate(F[taken], mu[q][played], past[played]).astype(F.dtype, copy=False)
    sources = dict(zip(past_labels.tolist(), classes[q].tolist(), strict=True))
    return X, past_labels[played], sources


class FeTrIL(ClassifierMixin, BaseEstimator):
    """Linear classifier that learns new classes from their rows and the centroids of all others.

    Parameters
    ----------
    estimator : scikit-learn classifier, optional
        Fitted anew after every chunk. Default: ``LinearSVC(C=1.0, dual=False)``, as in the official code.
    metric : {"cosine", "euclidean"}, default="cosine"
        How the new class most similar to a past one is found: paper, or official code.
    k : int, default=1
        Take the k-th most similar (the paper's FeTrIL^k).
    normalize : bool, default=True
        Bring all rows to length 1 before the classifier sees them.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), sorted labels
    centroids_ : ndarray of shape (n_classes, n_features), float64
    class_count_ : ndarray of shape (n_classes,), rows of each class so far
    sources_ : dict, past label -> label whose rows played it in the last chunk
    estimator_ : the fitted classifier; None while there is only one class
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    One call of `partial_fit` is one state: it fits `estimator` on the rows given and, for each class that is not among
    them, as many pseudo-rows as its source has. So a chunk should hold all the rows of its classes; small mixed chunks
    cost a fit each and see few rows. Memory kept: 8 C d bytes and the classifier, whatever the number of rows.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = FeTrIL().fit(X[y < 5], y[y < 5])
    >>> for digit in (5, 6, 7, 8, 9):
    ...     model = model.partial_fit(X[y == digit], y[y == digit])
    >>> bool(model.score(X, y) > 0.8)
    True
    """

    classes_: np.ndarray
    sums_: np.ndarray
    class_count_: np.ndarray

    def __init__(
        self,
        estimator: Any = None,
        *,
        metric: Literal["cosine", "euclidean"] = "cosine",
        k: int = 1,
        normalize: bool = True,
    ) -> None:
        self.estimator = estimator
        self.metric = metric
        self.k = k
        self.normalize = normalize

    def fit(self, X: ArrayLike, y: ArrayLike) -> FeTrIL:
        """Forget everything and learn these rows, as the first state.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), integers or strings
        """
        return self._learn(X, y, first=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, *, classes: ArrayLike | None = None) -> FeTrIL:
        """Learn a state: all rows of some classes. A call that raises leaves the model as it was.

        `classes`, which scikit-learn's own learners need, is not needed; if given, y must keep to it.
        """
        check_announced(y, classes)
        return self._learn(X, y, first=not hasattr(self, "sums_"))

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """What the classifier's own gives on the (normalised) rows."""
        X = self._rows(X)
        return np.zeros(len(X)) if self.estimator_ is None else self.estimator_.decision_function(X)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,)."""
        X = self._rows(X)
        return self.classes_.repeat(len(X)) if self.estimator_ is None else self.estimator_.predict(X)

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """The classifier's own probabilities (n_samples, n_classes); of one that has none, the softmax of its scores.

        (Not in the paper. One-vs-rest scores are no log-probabilities: read that softmax as an order.)
        """
        X = self._rows(X)
        if self.estimator_ is None:
            return np.ones((len(X), 1))
        if hasattr(self.estimator_, "predict_proba"):
            return self.estimator_.predict_proba(X)
        scores = self.estimator_.decision_function(X)
        return softmax(np.c_[-scores, scores] / 2 if scores.ndim == 1 else scores, axis=1)

    @property
    def centroids_(self) -> np.ndarray:
        check_is_fitted(self)
        return self.sums_ / self.class_count_[:, None]

    @property
    def n_samples_seen_(self) -> int:
        """Rows learnt."""
        check_is_fitted(self)
        return int(self.class_count_.sum())

    def save(self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically; its metadata hold the parameters, the classes and `extra` as JSON.

        Raises
        ------
        TypeError
            If `estimator` is none of `LinearSVC`, `LogisticRegression`, `SGDClassifier`: others cannot be restored from
            their weights.
        """
        check_is_fitted(self)
        fitted = self.estimator_
        name = type(fitted).__name__
        if fitted is not None and name not in SAVED:
            raise TypeError(f"estimator must be one of {', '.join(SAVED)} to be saved, got {name}")
        params = {**self.get_params(deep=False), "estimator": None}
        tensors = {"sums": torch.from_numpy(self.sums_), "class_count": torch.from_numpy(self.class_count_)}
        if fitted is not None:
            params["estimator"] = [name, fitted.get_params()]
            tensors |= {"coef": torch.tensor(fitted.coef_), "intercept": torch.tensor(fitted.intercept_)}
        params["default estimator"] = self.estimator is None
        write(path, self, self.classes_, tensors, format=FORMAT, version=VERSION, params=params, extra=extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeTrIL:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file; if it is truncated, not a model of this class, or of a newer version.
        """
        meta, tensors = read(path, format=FORMAT, version=VERSION)
        params = dict(meta["params"])
        default, described = params.pop("default estimator"), params.pop("estimator")
        fitted = None if described is None else SAVED[described[0]](**described[1])
        model = cls(None if default or fitted is None else clone(fitted), **params)
        labels = restore(model, meta)
        if fitted is not None:
            fitted.coef_, fitted.intercept_ = tensors["coef"].numpy(), tensors["intercept"].numpy()
            fitted.classes_, fitted.n_features_in_ = labels, model.n_features_in_
        model.estimator_, model.sources_ = fitted, {}
        model.classes_, model.sums_, model.class_count_ = (
            labels,
            tensors["sums"].numpy(),
            tensors["class_count"].numpy(),
        )
        return model

    def _learn(self, X: Any, y: Any, first: bool) -> FeTrIL:
        X = validate_data(self, X, reset=first, dtype=[np.float64, np.float32])
        y = check_labels(y, None if first else self.classes_)
        check_consistent_length(X, y)
        present = np.unique(y)
        classes, sums, counts = present, *class_sums(X, y, present)
        rows, labels = X, y
        sources: dict[Any, Any] = {}
        if not first:
            past = ~np.isin(self.classes_, present)
            moved, played, sources = pseudo_features(
                X, y, self.centroids_[past], self.classes_[past], self.metric, self.k
            )
            rows, labels = np.concatenate([X, moved]), np.concatenate([y, played])
            classes, sums, counts = add_sums((self.classes_, self.sums_, self.class_count_), (classes, sums, counts))
        else:
            choose_sources(X[:0], X[:1], self.metric, self.k)  # its checks
        fitted = None
        if len(classes) > 1:
            plain = LinearSVC(C=1.0, dual=False) if self.estimator is None else clone(self.estimator)
            fitted = plain.fit(unit(rows) if self.normalize else rows, labels)
        self.estimator_, self.sources_ = fitted, sources
        self.classes_, self.sums_, self.class_count_ = classes, sums, counts
        return self

    def _rows(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return unit(X) if self.normalize else X

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "sums_")
