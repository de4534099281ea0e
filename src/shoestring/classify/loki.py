r"""Geometry-Aware Adaptation for Pretrained Models (Loki).

Roberts, Li, Adila, Cromp, Huang, Zhao, Sala. NeurIPS 2023, arXiv 2307.12226.

Idea
----
A classifier that knows K of N labels gives probabilities, and the labels have distances (a tree, a graph, embeddings).
Not the most probable label is answered but the one with the least expected squared distance, the Fréchet mean, so that
labels the classifier never saw can be answered too. Nothing is trained and no example is read.

Equations
---------
Y are all N labels, with a metric d; Lambda the K of them that the classifier knows; P(x) its probabilities::

    S(x, y) = sum_{k in Lambda} P(k | x) d(k, y)^2          Fréchet variance of candidate y
    yhat(x) = argmin_{y in Y} S(x, y)                       Fréchet mean; argmax P if d = 1 - I

As matrices: S = P D2, with the K rows D2 = d[Lambda, :]^2. No N x N matrix is needed. The locus, what can be answered
at all (`locus`, `tree_locus`; Lambda is a "locus cover" if it is all of Y), and what to label next (`next_class`)::

    Pi(Lambda) = {y : y minimises sum_k w_k d(k, y)^2 for some w on the simplex over Lambda}
    on a tree:  Pi(Lambda) = union of the paths between members of Lambda;   next = argmax_y d(y, Pi(Lambda))

For d(i, y) = ||e_i - e_y|| the mean is the e_y nearest to m = sum_k P(k) e_k, at O((K + N) e) a row (our addition)::

    S(y) = ||e_y - m||^2 + sum_k P(k) ||e_k - m||^2

What to expect
--------------
* Where posteriors are broad, a Fréchet mean hedges: expected squared distance falls, accuracy on observed classes can
  fall as well. Measure both (`mean_power_distance`). With over-confident P it is argmax: `temperature` > 1 softens.
* If only the leaves of a tree of equal depth are labels (the subcategories of emoji, the classes of CIFAR-100), no
  unobserved leaf ever beats all observed ones: the observed leaf nearest to it is as near to every observed one as
  it is, or nearer. Then let inner nodes be candidates too; or, with all leaves observed, expect hedging only.
* On the complete graph (no geometry) nothing unobserved can be reached but by ties.

Code and paper
--------------
Read: official repository SprocketLab/loki (scripts; no licence, no README), the abstract and the card of this project;
not the paper's text, so its locus algorithm is not reproduced: ours is one linear programme per label.

* The official helper for trees returns squared distances, and for CLIP plugs in squared norms ||t_i - t_j||^2. Here
  distances are never squared when they come in and always once inside.
* The official PubMed script takes the columns of ``predict_proba`` for the list of most frequent classes, although they
  follow the sorted ``classes_``; its table is suspect. Here labels are always matched through ``classes_``.
* Ties are common on small trees. Official: whichever comes first after rounding. Here values within 32 rounding errors
  are equal and the lowest number wins; `frechet_mean_set` names all.
* Power 1, the Fréchet median, is an option of ours. Official softmax temperature: `temperature`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Bunch, Tags, get_tags
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from shoestring.classify._loki_geometry import (
    bundle_taxonomy,
    check_distances,
    check_power,
    is_structure,
    label_distances,
    locus,
    next_class,
    observed_rows,
    tree_labels,
    tree_locus,
)

__all__ = [
    "FrechetMeanClassifier",
    "LokiHead",
    "bundle_taxonomy",
    "euclidean_frechet_variances",
    "frechet_mean_predict",
    "frechet_mean_set",
    "frechet_variances",
    "label_distances",
    "locus",
    "mean_power_distance",
    "next_class",
    "temper",
    "tree_labels",
    "tree_locus",
]

BLOCK = 2**23  # numbers in a block of variances or of powered distances: 64 MB in float64
FEW_ROWS, CACHE = 16, 2**17  # up to so many rows at once, powers are taken of so many distances at a time: 1 MB
TIE = 32  # variances closer than this many rounding errors are equal

Array = TypeVar("Array", np.ndarray, Tensor)


# ---- the mathematics


def frechet_variances(probs: Array, distances: Any, observed: ArrayLike | None = None, *, power: float = 2.0) -> Array:
    """Fréchet variance ``S = P D^power`` of every candidate label; the lower, the better.

    2 B K N flops. The result has B N entries; `frechet_mean_predict` needs less memory.

    Parameters
    ----------
    probs : ndarray or tensor of shape (B, K), >= 0
        Probabilities, or weights: rows need not sum to 1. Never logits. float32 is computed in float32, else float64.
    distances : array or tensor of shape (N, N) or (K, N), any real dtype, >= 0
        Plain distances, not squared. (K, N): the rows of the observed labels, in the order of the columns of probs.
    observed : array-like of K label numbers, optional
        Which labels the columns of probs are, if distances is (N, N). By default K = N, all in order.
    power : float, default=2.0
        The paper's Fréchet mean; 1.0 is the Fréchet median.

    Returns
    -------
    ndarray or tensor, as probs, of shape (B, N)

    Raises
    ------
    ValueError
        If probs holds negative numbers, NaN, infinity or a row of zeros; distances are negative, not finite, asymmetric
        or not 0 on the diagonal; or shapes do not fit.

    Examples
    --------
    >>> path = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    >>> frechet_variances(np.array([[0.5, 0.5]]), path, observed=[0, 2])
    array([[2., 1., 2.]])
    """
    P, D = _weights_and_rows(probs, distances, observed, power)
    return _variances(P, D, power)


def euclidean_frechet_variances(probs: Array, embeddings: Any, observed: ArrayLike | None = None) -> Array:
    """`frechet_variances` for the distance between label embeddings, by the mean embedding and without any distance.

    ``S(y) = sum_k p_k ||e_k||^2 - 2 (sum_k p_k e_k) . e_y + ||e_y||^2 sum_k p_k``: 2 B (K + N) e flops.

    Parameters
    ----------
    probs : ndarray or tensor of shape (B, K), >= 0
    embeddings : array or tensor of shape (N, e)
    observed : array-like of K label numbers, optional; by default all N in order

    Returns
    -------
    ndarray or tensor, as probs, of shape (B, N)

    Examples
    --------
    >>> points_on_a_line = np.array([[0.0], [1.0], [2.0]])
    >>> euclidean_frechet_variances(np.array([[0.5, 0.5]]), points_on_a_line, observed=[0, 2])
    array([[2., 1., 2.]])
    """
    P = _weights(probs)
    E = _check_embeddings(_like(embeddings, P))
    return _euclidean_variances(P, E, _check_observed(observed, P.shape[1], len(E)))


def frechet_mean_set(probs: Array, distances: Any, observed: ArrayLike | None = None, *, power: float = 2.0) -> Array:
    """All Fréchet means of every row: labels whose variance is the least, to 32 rounding errors.

    Parameters are those of `frechet_variances`.

    Returns
    -------
    ndarray or tensor of shape (B, N), bool

    Examples
    --------
    >>> path = abs(np.subtract.outer(np.arange(4), np.arange(4)))
    >>> frechet_mean_set(np.array([[0.5, 0.5]]), path, observed=[0, 3])
    array([[False,  True,  True, False]])
    """
    return _means(frechet_variances(probs, distances, observed, power=power))


def frechet_mean_predict(
    probs: Array, distances: Any, observed: ArrayLike | None = None, *, power: float = 2.0
) -> Array:
    """The Fréchet mean of every row: the paper's prediction. In a few blocks of 64 MB, whatever B and N are.

    Parameters are those of `frechet_variances`.

    Returns
    -------
    ndarray or tensor of shape (B,), int64
        Label numbers 0 to N - 1; of tied labels the lowest.

    Examples
    --------
    >>> path = abs(np.subtract.outer(np.arange(5), np.arange(5)))  # five ordered labels, the classifier knows the ends
    >>> frechet_mean_predict(np.array([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]), path, observed=[0, 4])
    array([0, 1, 2])
    """
    P, D = _weights_and_rows(probs, distances, observed, power)
    return _predict(P, D.shape[1], lambda rows: _variances(rows, D, power))


def mean_power_distance(true: ArrayLike, predicted: ArrayLike, distances: ArrayLike, *, power: float = 2.0) -> float:
    """Mean of ``d(true, predicted)^power``: the paper's measure (power 2), beside accuracy.

    Parameters
    ----------
    true, predicted : array-like of shape (B,), label numbers
    distances : array-like of shape (N, N)
    power : float, default=2.0

    Examples
    --------
    >>> path = abs(np.subtract.outer(np.arange(5), np.arange(5)))
    >>> mean_power_distance([0, 1, 4], [0, 3, 3], path)
    1.6666666666666667
    """
    check_power(power)
    true, predicted, D = np.asarray(true), np.asarray(predicted), np.asarray(distances)
    check_distances(D)
    if true.shape != predicted.shape or true.ndim != 1 or not len(true):
        raise ValueError(f"true and predicted must be of one shape (B,), got {true.shape} and {predicted.shape}")
    for name, numbered in (("true", true), ("predicted", predicted)):
        if numbered.dtype.kind not in "iu" or numbered.min() < 0 or numbered.max() >= len(D):
            raise ValueError(f"{name} must hold label numbers from 0 to {len(D) - 1}, got {numbered!r}")
    return float((D[true, predicted].astype(np.float64) ** power).mean())


def temper(probs: Array, temperature: float) -> Array:
    """``p^(1/T) / sum p^(1/T)``: softer for T > 1, sharper for T < 1; softmax(logits / T) if p = softmax(logits).

    Parameters
    ----------
    probs : ndarray or tensor of shape (B, K), >= 0
    temperature : T > 0

    Examples
    --------
    >>> temper(np.array([[0.8, 0.2]]), 2.0).round(3)
    array([[0.667, 0.333]])
    """
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    P: Any = _weights(probs)
    if temperature == 1:
        return P / P.sum(1)[:, None]
    P = (P / -_low(-P)[:, None]) ** (1.0 / temperature)  # the largest is 1: no row underflows to zeros
    return P / P.sum(1)[:, None]


# ---- scikit-learn


class FrechetMeanClassifier(ClassifierMixin, BaseEstimator):
    """Let a classifier answer with the Fréchet mean in a distance between labels, also labels it never saw.

    Parameters
    ----------
    estimator : classifier with `predict_proba`, optional
        Cloned and fitted by `fit`. A classifier that is fitted already comes in `sklearn.frozen.FrozenEstimator` and
        is used as it is; `fit` then needs no data. By default `LogisticRegression(max_iter=1000)`.
    distances : array-like, callable, tree or networkx graph, optional
        Distances between labels, not squared.

        - (N, N): rows and columns are `classes`;
        - (K, N): rows are the classes of the estimator, in their order, columns are `classes`;
        - a tree or graph as `label_distances` takes it, with labels for nodes (a dictionary, or networkx): only the K
          rows that are needed are computed;
        - a callable, ``distances(classes) -> (N, N)``.

        By default (with no `embeddings`) the complete graph, every distance 1: the answers of `estimator` itself.
    embeddings : array-like of shape (N, e), optional
        Instead of distances: one row for each of `classes`, Euclidean distance. For very many observed labels.
    classes : array-like of N labels, optional
        The candidates. By default the nodes of the tree or graph, else the classes of the estimator.
    observed : array-like of K labels, optional
        What the classes of the estimator are called among `classes`, in the order of ``estimator.classes_``. By default
        as the estimator calls them.
    power : float, default=2.0
        Exponent of the distance: the paper's. 1.0 is the Fréchet median. With `embeddings` 2.0.
    temperature : float, default=1.0
        Probabilities become ``p^(1/T)``, normalised; > 1 softens an over-confident estimator.

    Attributes
    ----------
    estimator_ : the fitted classifier
    classes_ : ndarray of shape (N,)
        The candidates, in the order given (not sorted, if `classes` or the tree is not).
    observed_ : ndarray of shape (K,), int64
        Places in `classes_` of the estimator's classes; -1 for one that is no candidate.
    distances_ : ndarray of shape (K, N), or None
        Rows of the observed classes; None for the complete graph, and with embeddings.
    n_features_in_, feature_names_in_ : as in scikit-learn, if `estimator_` has them.

    Notes
    -----
    Of labels at distance 0 from each other only the first can be answered. The answers of the estimator are asked for
    all rows of X at once, the variances computed in a few blocks of 64 MB; `decision_function` returns (n_samples, N).

    Examples
    --------
    Ten ordered classes, of which the classifier knows four:

    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from shoestring.classify.loki import FrechetMeanClassifier
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 10, 2000)
    >>> X = y[:, None] + rng.normal(0.0, 1.5, (2000, 1))
    >>> known = np.isin(y, [0, 3, 6, 9])
    >>> path = abs(np.subtract.outer(np.arange(10), np.arange(10)))
    >>> model = FrechetMeanClassifier(LogisticRegression(), distances=path, classes=range(10))
    >>> model = model.fit(X[known], y[known])
    >>> sorted(set(model.predict(X).tolist()))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    >>> model.score(X[~known], y[~known]) > 0.2  # classes never seen: the estimator itself gets 0
    True
    """

    estimator_: Any
    classes_: np.ndarray
    observed_: np.ndarray
    distances_: np.ndarray | None

    def __init__(
        self,
        estimator: Any = None,
        *,
        distances: Any = None,
        embeddings: ArrayLike | None = None,
        classes: ArrayLike | None = None,
        observed: ArrayLike | None = None,
        power: float = 2.0,
        temperature: float = 1.0,
    ) -> None:
        self.estimator = estimator
        self.distances = distances
        self.embeddings = embeddings
        self.classes = classes
        self.observed = observed
        self.power = power
        self.temperature = temperature

    def fit(self, X: Any = None, y: Any = None, **fit_params: Any) -> FrechetMeanClassifier:
        """Fit the estimator, unless it is frozen, and match its classes with the distances.

        Parameters
        ----------
        X, y : rows and labels for `estimator`
            Not needed, and not read, if it is a `FrozenEstimator`.
        **fit_params : passed on to ``estimator.fit``

        Raises
        ------
        ValueError, TypeError
            If a class of the estimator is not among the candidates, distances are bad (see `frechet_variances`), their
            shape does not fit, or the estimator has no probabilities. An earlier fit then stays as it was.
        """
        check_power(self.power)
        temper(np.ones((1, 1)), self.temperature)
        if self.embeddings is not None and (self.distances is not None or self.power != 2):
            raise ValueError("embeddings come instead of distances and with power 2.0, got "
                             + ("both" if self.distances is not None else f"power {self.power}"))  # fmt: skip
        estimator = self._fit_estimator(X, y, fit_params)
        names = _label_array(estimator.classes_, "the classes of the estimator")
        if self.observed is not None:
            renamed = _label_array(self.observed, "observed")
            if len(renamed) != len(names):
                raise ValueError(f"observed must name the {len(names)} classes of the estimator, got {len(renamed)}")
            names = renamed
        classes = self._candidates(names)
        observed = _places(names, classes)
        distances, embeddings = self._geometry(names, classes, observed)
        self.estimator_, self.classes_, self.observed_ = estimator, classes, observed
        self.distances_, self._embeddings = distances, embeddings
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                delattr(self, name)
            if hasattr(estimator, name):
                setattr(self, name, getattr(estimator, name))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels (n_samples,) of the Fréchet means; of tied labels the first in `classes_`."""
        P = self._probabilities(X)
        return self.classes_[_predict(P, len(self.classes_), self._variances)]

    def decision_function(self, X: Any) -> np.ndarray:
        """``-S`` (n_samples, N), the higher the better; for two classes, as in scikit-learn, their difference."""
        S = self._variances(self._probabilities(X))
        return S[:, 0] - S[:, 1] if S.shape[1] == 2 else -S

    def get_metadata_routing(self) -> MetadataRouter:
        """Fit parameters go to the estimator, as scikit-learn's metadata routing wants it."""
        router = MetadataRouter(owner=self)
        return router.add(estimator=self._estimator(), method_mapping=MethodMapping().add(caller="fit", callee="fit"))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        inner = get_tags(self._estimator())
        tags.input_tags = inner.input_tags
        tags.target_tags.required = not isinstance(self.estimator, FrozenEstimator)
        return tags

    # ---- inside

    def _estimator(self) -> Any:
        return LogisticRegression(max_iter=1000) if self.estimator is None else self.estimator

    def _fit_estimator(self, X: Any, y: Any, fit_params: dict[str, Any]) -> Any:
        estimator = self._estimator()
        if not hasattr(estimator, "predict_proba"):
            raise TypeError(
                f"estimator must have predict_proba, {estimator!r} has not; scores without probabilities, such as "
                "those of decision_function, have no Fréchet mean (CalibratedClassifierCV makes some)"
            )
        if isinstance(estimator, FrozenEstimator):
            check_is_fitted(estimator)
            return estimator
        if X is None or y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y is None. To use a "
                "classifier that is fitted already, pass it as sklearn.frozen.FrozenEstimator(classifier)"
            )
        _check_one_kind(y)
        check_classification_targets(y)
        return clone(estimator).fit(X, y, **self._routed(fit_params))

    def _routed(self, fit_params: dict[str, Any]) -> dict[str, Any]:
        if not fit_params or not _routing_enabled():
            return fit_params
        routed: Bunch = process_routing(self, "fit", **fit_params)
        return routed.estimator.fit

    def _candidates(self, names: np.ndarray) -> np.ndarray:
        if self.classes is not None:
            classes = _label_array(self.classes, "classes")
        elif is_structure(self.distances):
            classes = _label_array(_nodes(self.distances), "the nodes of distances")
        else:
            classes = names
        if _KINDS[classes.dtype.kind] != _KINDS[names.dtype.kind]:
            raise TypeError(
                f"classes hold {_KINDS[classes.dtype.kind]}, but the classes of the estimator are "
                f"{_KINDS[names.dtype.kind]}; say in observed what these are among classes"
            )
        return classes

    def _geometry(
        self, names: np.ndarray, classes: np.ndarray, observed: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Checked rows (K, N) of distances, or embeddings (N, e)."""
        distances = self.distances
        if is_structure(distances):
            return label_distances(distances, classes.tolist(), names.tolist()), None
        if callable(distances):
            distances = distances(classes)
        D = None if distances is None else _numbers(distances, "distances")
        if D is not None and D.ndim == 2 and D.shape[1] != len(classes):
            raise ValueError(f"distances must have one column for each of {len(classes)} classes, got shape {D.shape}")
        rows_only = D is not None and D.shape[:1] == (len(names),) and D.shape[0] != D.shape[-1]
        outside = names[observed < 0]
        if len(outside) and not rows_only:
            raise ValueError(
                f"classes must hold all classes of the estimator, but {outside[0].item()!r} is not among them"
            )
        if D is not None:
            check_distances(D)
            return observed_rows(D, None if (observed < 0).any() else observed, len(names)), None
        if self.embeddings is not None:
            E = _check_embeddings(_numbers(self.embeddings, "embeddings"))
            if len(E) != len(classes):
                raise ValueError(f"embeddings must have one row for each of {len(classes)} classes, got {len(E)}")
            return None, E
        return None, None

    def _probabilities(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return temper(np.asarray(self.estimator_.predict_proba(X)), self.temperature)

    def _variances(self, P: np.ndarray) -> np.ndarray:
        if self.distances_ is not None:
            return _variances(P, self.distances_, self.power)
        if self._embeddings is not None:
            return _euclidean_variances(P, self._embeddings, self.observed_)
        S = np.ones((len(P), len(self.classes_)), P.dtype)  # complete graph: S = 1 - P, 1 where not observed
        S[:, self.observed_] -= P
        return S


# ---- torch


class LokiHead(nn.Module):
    """A last layer that turns the K outputs of a network into scores of N labels, ``-S``.

    Differentiable, with no parameter. To predict, take the argmax, or `predict`, which needs less memory.

    Parameters
    ----------
    distances : array-like or tensor of shape (N, N) or (K, N), >= 0, not squared
    observed : array-like of K label numbers, optional
        As in `frechet_variances`.
    power : float, default=2.0
        The paper's; 1.0 is the Fréchet median.
    temperature : float, default=1.0
        T of softmax(logits / T).
    from_logits : bool, default=True
        Whether the network ends in logits. False: in probabilities.

    Shapes
    ------
    input (..., K), output (..., N).

    Attributes
    ----------
    powers : buffer of shape (K, N)
        d^power in float32 (float64 if distances is). ``.half()`` and ``.bfloat16()`` move it with the network and leave
        its precision: squared distances do not fit there.

    Examples
    --------
    >>> path = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    >>> head = LokiHead(path, observed=[0, 2])
    >>> head(torch.tensor([[0.0, 0.0], [5.0, 0.0]])).argmax(1)
    tensor([1, 0])
    >>> model = nn.Sequential(nn.Linear(4, 2), head)  # any network with K = 2 outputs
    >>> model(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """

    powers: Tensor

    def __init__(
        self,
        distances: Any,
        observed: ArrayLike | None = None,
        *,
        power: float = 2.0,
        temperature: float = 1.0,
        from_logits: bool = True,
    ) -> None:
        super().__init__()
        check_power(power)
        temper(np.ones((1, 1)), temperature)
        D = torch.as_tensor(_distances(distances))
        check_distances(D)
        D = observed_rows(D, observed)
        self.power, self.temperature, self.from_logits = float(power), float(temperature), from_logits
        self.register_buffer("powers", D.to(torch.float64 if D.dtype == torch.float64 else torch.float32) ** power)

    def forward(self, outputs: Tensor) -> Tensor:
        return -(self._probabilities(outputs) @ self.powers)

    def predict(self, outputs: Tensor) -> Tensor:
        """Label numbers (B,) of the Fréchet means of outputs (B, K), in blocks; of tied labels the lowest."""
        P = _weights(self._probabilities(outputs))
        return _predict(P, self.powers.shape[1], lambda rows: rows @ self.powers)

    def _probabilities(self, outputs: Tensor) -> Tensor:
        if outputs.ndim < 1 or outputs.shape[-1] != len(self.powers):
            raise ValueError(f"outputs must be of shape (..., {len(self.powers)}), got {tuple(outputs.shape)}")
        outputs = outputs.to(self.powers.dtype)
        if self.from_logits:
            return (outputs / self.temperature).softmax(-1)
        flat = temper(outputs.reshape(-1, outputs.shape[-1]), self.temperature)
        return flat.reshape(outputs.shape)

    def extra_repr(self) -> str:
        K, N = self.powers.shape
        return f"{K}, {N}, power={self.power:g}, temperature={self.temperature:g}, from_logits={self.from_logits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LokiHead:
        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.element_size() >= 4 else t.to(new.device)

        return super()._apply(moved, recurse)


# ---- variances in blocks, for NumPy and torch


def _variances(P: Any, D: Any, power: float) -> Any:
    """S = P D^power, (B, K) @ (K, N), never holding all of D^power if that is large."""
    N, width = D.shape[1], max(1, BLOCK // len(D))
    if len(P) <= FEW_ROWS:  # the product is no dearer than reading D: square it piece by piece in the cache
        step = max(1, CACHE // N)
        return sum(P[:, k : k + step] @ _like(D[k : k + step], P) ** power for k in range(0, len(D), step))
    if width >= N:
        return P @ _like(D, P) ** power
    S = np.empty((len(P), N), P.dtype) if isinstance(P, np.ndarray) else P.new_empty(len(P), N)
    for c in range(0, N, width):
        S[:, c : c + width] = P @ _like(D[:, c : c + width], P) ** power
    return S


def _euclidean_variances(P: Any, E: Any, observed: np.ndarray) -> Any:
    E = _like(E, P)
    E = E - E.mean(0)  # near the origin the three terms cancel least
    norms, known = (E * E).sum(1), E[observed]  # (N,), (K, e)
    S = (P @ norms[observed])[:, None] - 2 * (P @ known) @ E.T + P.sum(1)[:, None] * norms
    return S.clip(0)


def _predict(P: Any, n_labels: int, variances: Callable[[Any], Any]) -> Any:
    size = max(1, BLOCK // n_labels)
    found = [_first(_means(variances(P[i : i + size]))) for i in range(0, len(P), size)]
    return np.concatenate(found) if isinstance(P, np.ndarray) else torch.cat(found)


def _means(S: Any) -> Any:
    eps = float(np.finfo(S.dtype).eps if isinstance(S, np.ndarray) else torch.finfo(S.dtype).eps)
    return S <= _low(S)[:, None] * (1 + TIE * eps)


def _low(S: Any) -> Any:
    return S.min(1) if isinstance(S, np.ndarray) else S.amin(1)


def _first(mask: Any) -> Any:
    return mask.argmax(1) if isinstance(mask, np.ndarray) else mask.to(torch.uint8).argmax(1)


def _like(array: Any, P: Any) -> Any:
    """The array in the kind, dtype and place of P; no copy if it is so already."""
    if isinstance(P, np.ndarray):
        return np.asarray(array.detach().cpu() if isinstance(array, Tensor) else array, dtype=P.dtype)
    return torch.as_tensor(array).to(P)


# ---- checks


def _weights_and_rows(probs: Any, distances: Any, observed: ArrayLike | None, power: float) -> tuple[Any, Any]:
    check_power(power)
    P = _weights(probs)
    D = _distances(distances)
    if isinstance(D, Tensor) != isinstance(P, Tensor):
        D = torch.as_tensor(D) if isinstance(P, Tensor) else D.detach().cpu().numpy()
    return P, observed_rows(D, observed, P.shape[1])


def _weights(probs: Any) -> Any:
    """Probabilities (B, K) in float32 or float64, checked."""
    P: Any
    if isinstance(probs, Tensor):
        P = probs if probs.dtype in (torch.float32, torch.float64) else probs.to(torch.float32)
    else:
        P = _numbers(probs, "probs")
        P = P if P.dtype == np.float32 else P.astype(np.float64, copy=False)
    if P.ndim != 2 or not P.shape[1]:
        raise ValueError(f"probs must be of shape (B, K), got {tuple(P.shape)}")
    if not len(P):
        raise ValueError("probs must hold at least one row, got none")
    low, high = float(P.min()), float(P.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("probs must be finite, got NaN or infinity")
    if low < 0:
        raise ValueError(f"probs must be >= 0, got {low:g}; logits or cosines become probabilities by a softmax")
    if not bool((P.sum(1) > 0).all()):
        raise ValueError("probs must hold a number > 0 in every row, got a row of zeros")
    return P


def _distances(distances: Any) -> Any:
    """An array or tensor of real numbers that can be subtracted."""
    if not isinstance(distances, Tensor):
        return _numbers(distances, "distances")
    if distances.is_complex():
        raise TypeError(f"distances must hold real numbers, got dtype {distances.dtype}")
    return distances.to(torch.float32) if distances.dtype == torch.bool else distances.detach()


def _numbers(array: Any, name: str) -> np.ndarray:
    numbers: np.ndarray
    try:
        numbers = np.asarray(array.detach().cpu() if isinstance(array, Tensor) else array)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array of numbers: {error}") from None
    if numbers.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {numbers.dtype}")
    return numbers.astype(np.float64) if numbers.dtype.kind == "b" else numbers


def _check_embeddings(E: Any) -> Any:
    if E.ndim != 2 or not all(E.shape):
        raise ValueError(f"embeddings must be of shape (N, e), got {tuple(E.shape)}")
    if not math.isfinite(float(abs(E).max())):
        raise ValueError("embeddings must be finite, got NaN or infinity")
    return E


def _check_observed(observed: ArrayLike | None, K: int, N: int) -> np.ndarray:
    numbered = np.arange(N) if observed is None else np.asarray(observed)
    if numbered.ndim != 1 or numbered.dtype.kind not in "iu" or len(numbered) != K:
        raise ValueError(f"observed must hold the label number of each of {K} columns of probs, got {observed!r}")
    if len(np.unique(numbered)) < K or numbered.min() < 0 or numbered.max() >= N:
        raise ValueError(f"observed must hold different label numbers from 0 to {N - 1}, got {numbered.tolist()}")
    return numbered


_KINDS = {"i": "integers", "u": "integers", "U": "strings", "b": "booleans", "f": "floats"}


def _label_array(labels: Any, name: str) -> np.ndarray:
    """Different labels of one kind, as an array (n,)."""
    listed = list(labels.tolist() if isinstance(labels, np.ndarray) else labels)
    kinds = {type(label.item() if isinstance(label, np.generic) else label).__name__ for label in listed}
    if not kinds:
        raise ValueError(f"{name} must hold at least one label, got none")
    if len(kinds) > 1 or not kinds <= {"int", "str", "bool", "float"}:
        raise TypeError(f"{name} must be integers or strings, of one kind; got {', '.join(sorted(kinds))}")
    if len(set(listed)) < len(listed):
        twice = Counter(listed).most_common(1)[0][0]
        raise ValueError(f"{name} must be different labels, got {twice!r} twice")
    return np.asarray(labels if isinstance(labels, np.ndarray) and labels.dtype.kind != "O" else listed)


def _check_one_kind(y: Any) -> None:
    """Refuse y = [1, "a"], which NumPy would make strings of."""
    if not (isinstance(y, list | tuple) or getattr(getattr(y, "dtype", None), "kind", "") == "O"):
        return
    kinds = {isinstance(label, str) for label in y}
    if len(kinds) > 1:
        raise TypeError("y must hold labels of one kind, integers or strings; got both")


def _places(names: np.ndarray, classes: np.ndarray) -> np.ndarray:
    place = {label: i for i, label in enumerate(classes.tolist())}
    return np.array([place.get(name, -1) for name in names.tolist()])


def _nodes(structure: Any) -> list[Any]:
    return tree_labels(structure) if isinstance(structure, Mapping) else list(structure.nodes)


def _routing_enabled() -> bool:
    from sklearn import get_config

    return bool(get_config()["enable_metadata_routing"])
