r"""Unsupervised Learning under Latent Label Shift (DDFA: Discriminate-Discretize-Factorize-Adjust).

Roberts, Mani, Garg, Lipton. NeurIPS 2022. arXiv 2207.13179.

Idea
----
Unlabelled rows come from several domains (clinics, seasons, shops) in which the same classes occur in different
proportions. Whatever tells the domains apart is then the class and nothing else: a classifier of *domains*, factorised,
gives the classes, without one label.

Equations
---------
k classes, r >= k domains of equal weight p(d) = 1/r, p(x|y) the same in all of them. Then the output of an ideal domain
classifier is a mixture of k points of the simplex, the columns of D = [p(d|y)] (r, k)::

    q(x) = p(d|x) = sum_y p(d|y) p(y|x) = D p(y|x)                                          Discriminate

Cluster q(x) into m >= k clusters c and count::

    B[c, d] = p(c|d) = sum_y p(c|y) p(y|d) = (C A)[c, d],     C (m, k), A (k, r)            Discretize, Factorize
    D[d, y] = A[y, d] / sum_d' A[y, d']

A row x, from nowhere in particular and from domain d (Bayes' rule)::

    p(y|x) = pinv(D) q(x),     p(y|x, d) = D[d, y] p(y|x) / sum_y' D[d, y'] p(y'|x)         Adjust

Two ways to B = C A. ``"nmf"``, the paper's experiments: least squares with C, A >= 0. It is unique only if every class
also has a domain without it and without others hiding it: on exact tables with anchors it can reach a residual of 0
with a wrong A. ``"spa"``, the argument of the paper's proof: if every class has an anchor, inputs (here: a cluster)
where only it occurs, the columns of D are the vertices of the hull of all p(d|c), which successive projection finds.
Then p(y|c) = pinv(D) p(d|c), C[c, y] = p(y|c) p(c) / p(y), and A solves B = C A by least squares with A >= 0.

Code and paper
--------------
* The official repository factorises by NMF from one random start of 200 iterations. Here it is `n_init` starts of up to
  2000, and the least residual wins: one start often ends in a poor minimum.
* There, pinv(D) q(x) is multiplied and normalised as it is, so that a negative sum turns every sign. Here values below
  0 are 0, the rest is divided by its sum; where nothing is left all classes are equally likely.
* There, domains are sampled to equal size. Here any sizes are taken, and q(d|x) is divided by the p(d) it was
  trained with.
* There, q may come from rows it was trained on. Here q on the rows of `fit` is always cross-fitted.
* Ours: what is said when the assumptions look violated (`IdentifiabilityWarning`). The condition number of D, the
  paper's measure of difficulty, does not tell by itself: where the domains do not differ at all, noise made into a D
  has condition 2 to 10 by NMF and 3 to 22 by SPA (measured). The number of classes that stand out of the sampling noise
  of the counts does, see `visible_classes`.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, check_cv
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from shoestring.classify._fit import all_or_nothing

__all__ = [
    "IdentifiabilityWarning",
    "LatentLabelShift",
    "PrefitDiscriminator",
    "cluster_given_domain",
    "domain_given_class",
    "factorize_nmf",
    "factorize_spa",
    "p_y_given_x",
    "p_y_given_x_and_d",
    "successive_projection",
    "to_simplex",
    "to_uniform_domains",
    "visible_classes",
]

MIN_SHARE = 0.005  # of the rows; smaller clusters are no candidates for anchors: their p(d|c) is mostly noise
MAX_CONDITION = 100.0  # of D: beyond, pinv(D) multiplies errors of q by up to this (ours)
MAX_RESIDUAL = 0.1  # beyond sampling noise; measured: 0 on data of the model, .4 to .7 where looks differ too (ours)


class IdentifiabilityWarning(UserWarning):
    """The data do not look as the method assumes: its classes may be arbitrary."""


class LatentLabelShift(BaseEstimator):
    """Discover classes, and predict them, from unlabelled rows of domains whose class proportions differ.

    Classes are numbered 0 to n_classes - 1 in no particular order: which of them is which cannot be known without
    labels. Use it where domains differ strongly and nearness misleads; where classes are clusters, cluster.

    Parameters
    ----------
    n_classes : int
        k >= 2, at most the number of domains.
    discriminator : classifier with predict_proba, optional
        Tells the domains apart; it must be calibrated. Default ``LogisticRegression(max_iter=1000)`` (ours; the paper
        trains a ResNet). Prefit: scikit-learn's ``FrozenEstimator``, or `PrefitDiscriminator` for any function; it
        should not have been trained on the rows of `fit`.
    n_clusters : int or "auto", default="auto"
        m of k-means on q(x); less than n_classes is raised to it, with a warning. ``"auto"``: 6 n_classes, or the
        number of rows if that is less.
    clusterer : clusterer with fit_predict, optional
        In the place of k-means (5 starts of 100 iterations, as in the official code); `n_clusters` is then unused.
        Noise (label -1) counts as one more cluster.
    factorizer : {"spa", "nmf"}, default="spa"
        ``"spa"`` needs an anchor cluster for every class, ``"nmf"`` besides that domains in which classes are missing,
        or it may fit perfectly and be wrong. ``"nmf"`` is the paper's choice, and in our recorded claim, where noise
        outweighs such theory, the more accurate by 0 to 4 points.
    n_init : int, default=10
        Random starts of ``"nmf"``.
    cv : int or splitter, default=5
        How q(x) of the rows of `fit` is cross-fitted. An int is stratified and shuffled, with fewer folds if the
        smallest domain has fewer rows.
    discriminator_prior : {"empirical", "uniform"} or array-like of shape (r,), default="empirical"
        The p(d) with which the discriminator was trained, in the order of `domains_`, and which is divided out.
        ``"empirical"``: the shares of the domains in `fit`. ``"uniform"`` if it has balanced them itself
        (``class_weight="balanced"``, or a network trained on equal batches).
    random_state : int, RandomState instance or None, default=None
        Of folds, k-means and NMF. Discriminator and clusterer have their own.

    Attributes
    ----------
    domains_ : ndarray of shape (r,)
        Domain ids, sorted.
    class_priors_ : ndarray of shape (r, k)
        p(y|d).
    domain_given_class_ : ndarray of shape (r, k)
        D, p(d|y) under equally likely domains.
    cluster_given_class_ : ndarray of shape (m, k)
        C, p(c|y).
    labels_ : ndarray of shape (n_samples,), int64
        Class of each row of `fit` in its domain, from the cross-fitted q (`predict` uses `discriminator_`).
    cluster_labels_ : ndarray of shape (n_samples,), int64
        Cluster of each row of `fit`, a row of `cluster_given_class_`.
    discriminator_ : classifier
        Fitted on all rows; used by `predict`.
    domain_prior_ : ndarray of shape (r,)
        p(d) that is divided out.
    condition_number_ : float
        Of D.
    residual_ : float
        Share of ||B||_F that C A leaves, beyond what sampling explains.
    n_visible_classes_ : int
        How many classes the counts speak of, see `visible_classes`.
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Warns
    -----
    IdentifiabilityWarning
        If `condition_number_` > 100, `residual_` > 0.1, or `n_visible_classes_` is not `n_classes`.

    Notes
    -----
    ``fit(X, d)`` and ``fit(X, domains=d)`` are the same: without `domains`, y is taken for the domain ids, so that
    any pipeline can be used. With `domains`, y is ignored, as in scikit-learn's clusterers: it may hold true classes
    for a scorer. `domains` is metadata for `set_fit_request`, `set_predict_request` and `set_predict_proba_request`.

    Examples
    --------
    Two classes in three clinics, 90, 50 and 10 % of the first; the class is x > 0, which no clustering would guess:

    >>> import numpy as np
    >>> from shoestring.classify.latent_label_shift import LatentLabelShift
    >>> rng = np.random.default_rng(0)
    >>> clinic = np.repeat(["a", "b", "c"], 1000)
    >>> sick = rng.random(3000) < np.repeat([0.9, 0.5, 0.1], 1000)
    >>> X = np.c_[np.where(sick, 1, -1) * rng.random(3000), 5 * rng.choice([-1, 1], 3000)]
    >>> model = LatentLabelShift(2, random_state=0).fit(X, domains=clinic)
    >>> share = (model.predict(X, domains=clinic) == sick).mean()
    >>> bool(max(share, 1 - share) > 0.9)
    True
    >>> np.sort(model.class_priors_[0]).round(1)
    array([0.1, 0.9])
    """

    domains_: np.ndarray

    def __init__(
        self,
        n_classes: int,
        *,
        discriminator: Any = None,
        n_clusters: int | Literal["auto"] = "auto",
        clusterer: Any = None,
        factorizer: Literal["spa", "nmf"] = "spa",
        n_init: int = 10,
        cv: Any = 5,
        discriminator_prior: Literal["empirical", "uniform"] | ArrayLike = "empirical",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_classes = n_classes
        self.discriminator = discriminator
        self.n_clusters = n_clusters
        self.clusterer = clusterer
        self.factorizer = factorizer
        self.n_init = n_init
        self.cv = cv
        self.discriminator_prior = discriminator_prior
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike | None = None, domains: ArrayLike | None = None) -> LatentLabelShift:
        """Discover the classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), optional
            The domain ids if `domains` is None; otherwise ignored.
        domains : array-like of shape (n_samples,), integers or strings, optional
            The domain of each row; at least n_classes different ones, of at least 2 rows each.

        Raises
        ------
        ValueError, TypeError
            If an argument is not as described; there are fewer domains, rows or clusters than classes; a domain is
            empty (an unused category) or has one row; or the discriminator does not return probabilities of exactly
            these domains. A fitted model is then unchanged.
        """
        with all_or_nothing(self):
            self._fit(X, y, domains)
        self._warn()
        return self

    def predict(self, X: ArrayLike, domains: ArrayLike | None = None) -> np.ndarray:
        """Classes (n_samples,), int64: the most likely by `predict_proba`."""
        return self.predict_proba(X, domains).argmax(1)

    def predict_proba(self, X: ArrayLike, domains: ArrayLike | None = None) -> np.ndarray:
        """p(y|x, d), or p(y|x) for a row from no known domain.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        domains : array-like of shape (n_samples,), optional
            Domain ids as in `fit`. None: all domains equally likely.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64

        Raises
        ------
        ValueError, TypeError
            If a domain was not in `fit`, or an argument is not as described.
        """
        check_is_fitted(self)
        rows: np.ndarray = validate_data(self, X, dtype=[np.float64, np.float32], order="C", reset=False)
        d = None if domains is None else self._domain_index(domains, len(rows))
        q = to_uniform_domains(_domain_probabilities(self.discriminator_, rows, self.domains_), self.domain_prior_)
        p = to_simplex(p_y_given_x(q, self.domain_given_class_))
        return p if d is None else p_y_given_x_and_d(p, self.domain_given_class_.take(d, 0))

    # ---- inside

    def _fit(self, X: Any, y: Any, domains: Any) -> None:
        k = self._check_parameters()
        X = validate_data(self, X, dtype=[np.float64, np.float32], order="C", ensure_min_samples=2)
        ids = self._check_domains(y, domains, len(X))
        self.domains_, d = np.unique(ids, return_inverse=True)
        sizes = np.bincount(d)
        self.domain_prior_ = self._domain_prior(sizes)
        random_state = check_random_state(self.random_state)

        discriminator = LogisticRegression(max_iter=1000) if self.discriminator is None else self.discriminator
        q = _cross_fit(discriminator, X, ids, self.domains_, self._folds(sizes, random_state))  # (n, r)
        q = to_uniform_domains(q, self.domain_prior_)
        self.discriminator_ = clone(discriminator).fit(X, ids)
        _domain_probabilities(self.discriminator_, X[:1], self.domains_)  # of these domains, too?

        self.cluster_labels_ = clusters = self._cluster(q, random_state)
        B = cluster_given_domain(clusters, d)  # (m, r)
        if len(B) < k:
            raise ValueError(f"q(x) must fall into at least n_classes = {k} clusters, got {len(B)}")
        if self.factorizer == "spa":
            large = np.bincount(clusters) >= MIN_SHARE * len(X)
            C, A = factorize_spa(B, k, candidates=large if large.sum() >= k else None)
        else:
            C, A = factorize_nmf(B, k, n_init=self.n_init, random_state=random_state)
        D = domain_given_class(A)
        self.cluster_given_class_, self.class_priors_, self.domain_given_class_ = C, A.T, D

        self.labels_ = p_y_given_x_and_d(to_simplex(p_y_given_x(q, D)), D[d]).argmax(1)
        self.condition_number_ = float(np.linalg.cond(D))
        self.residual_ = _residual_beyond_sampling(B, C @ A, sizes)
        self.n_visible_classes_ = visible_classes(clusters, d)

    def _check_domains(self, y: Any, domains: Any, n: int) -> np.ndarray:
        """Domain ids (n,) of fit."""
        name, given = ("y", y) if domains is None else ("domains", domains)
        if given is None:
            raise ValueError(
                "LatentLabelShift needs the domain of every row, as domains=... or in the place of y: without domains "
                "it requires y to be passed, but the target y is None"
            )
        ids = _domain_ids(given, n, name)
        found, sizes = np.unique(ids, return_counts=True)
        if len(found) < self.n_classes:
            raise ValueError(
                f"{name} must hold at least n_classes = {self.n_classes} different domains, got {len(found)}: fewer "
                "domains than classes cannot tell the classes apart"
            )
        if sizes.min() < 2:
            single = found[sizes.argmin()].item()
            raise ValueError(
                f"{name} must hold every domain at least twice, to cross-fit q; got domain {single!r} once"
            )
        return ids

    def _check_parameters(self) -> int:
        k, m, n_init = self.n_classes, self.n_clusters, self.n_init
        if not _is_int(k) or k < 2:
            raise ValueError(f"n_classes must be an integer >= 2, got {k!r}")
        if not (isinstance(m, str) and m == "auto") and (not _is_int(m) or m < 1):
            raise ValueError(f"n_clusters must be 'auto' or an integer >= n_classes = {k}, got {m!r}")
        if self.factorizer not in ("spa", "nmf"):
            raise ValueError(f"factorizer must be 'spa' or 'nmf', got {self.factorizer!r}")
        if not _is_int(n_init) or n_init < 1:
            raise ValueError(f"n_init must be an integer >= 1, got {n_init!r}")
        if self.discriminator is not None and not hasattr(self.discriminator, "predict_proba"):
            raise TypeError(f"discriminator must have predict_proba, got {self.discriminator!r}")
        if self.clusterer is not None and not hasattr(self.clusterer, "fit_predict"):
            raise TypeError(f"clusterer must have fit_predict, got {self.clusterer!r}")
        return int(k)

    def _domain_prior(self, sizes: np.ndarray) -> np.ndarray:
        given, r = self.discriminator_prior, len(sizes)
        if isinstance(given, str):
            if given not in ("empirical", "uniform"):
                raise ValueError(f"discriminator_prior must be 'empirical', 'uniform' or {r} shares, got {given!r}")
            return sizes / sizes.sum() if given == "empirical" else np.full(r, 1 / r)
        prior = np.asarray(given, dtype=np.float64)
        if prior.shape != (r,) or not (prior > 0).all() or not np.isclose(prior.sum(), 1):
            raise ValueError(f"discriminator_prior must be {r} shares > 0 of sum 1, one a domain, got {given!r}")
        return prior

    def _folds(self, sizes: np.ndarray, random_state: np.random.RandomState) -> Any:
        if not _is_int(self.cv):
            return check_cv(self.cv)
        if self.cv < 2:
            raise ValueError(f"cv must be at least 2 folds, got {self.cv}")
        return StratifiedKFold(min(self.cv, sizes.min()), shuffle=True, random_state=random_state.randint(2**31 - 1))

    def _cluster(self, q: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Cluster (n,) of each row of q (n, r), numbered without gaps."""
        if self.clusterer is not None:
            found = np.asarray(clone(self.clusterer).fit_predict(q))
            if found.shape != (len(q),):
                raise ValueError(f"clusterer must return one label a row, ({len(q)},), got shape {found.shape}")
        else:
            m = min(6 * self.n_classes, len(q)) if self.n_clusters == "auto" else self.n_clusters
            if m < self.n_classes:  # scikit-learn's checks set 1
                warnings.warn(f"n_clusters = {m} is raised to n_classes = {self.n_classes}", UserWarning, stacklevel=4)
                m = self.n_classes
            if m > len(q):
                raise ValueError(f"n_clusters must be at most the number of rows, {len(q)}, got {m}")
            with warnings.catch_warnings():  # fewer different q(x) than clusters is no mistake
                warnings.simplefilter("ignore", ConvergenceWarning)
                kmeans = KMeans(m, n_init=5, max_iter=100, random_state=random_state.randint(2**31 - 1))
                found = kmeans.fit_predict(q)
        return np.unique(found, return_inverse=True)[1]

    def _domain_index(self, domains: ArrayLike, n: int) -> np.ndarray:
        ids = _domain_ids(domains, n, "domains")
        if (ids.dtype.kind == "U") != (self.domains_.dtype.kind == "U"):
            raise TypeError(f"domains must be of the kind given to fit, {self.domains_.dtype}, got {ids.dtype}")
        unknown = np.setdiff1d(ids, self.domains_)
        if len(unknown):
            raise ValueError(f"domains must be among those of fit, {self.domains_.tolist()}, got {unknown[0].item()!r}")
        return np.searchsorted(self.domains_, ids)

    def _warn(self) -> None:
        seen, k = self.n_visible_classes_, self.n_classes
        found = []
        if seen < k:
            found.append(
                f"the domains differ as if there were only {seen} of n_classes = {k} classes: their proportions are "
                "too alike, the discriminator too weak, or the rows too few"
            )
        if seen > k:
            found.append(
                f"the domains differ as if there were at least {seen} classes, not n_classes = {k}: there are more, or "
                "the domains differ in looks too"
            )
        if self.condition_number_ > MAX_CONDITION:
            found.append(f"the condition number of p(d|y) is {self.condition_number_:.3g}, above {MAX_CONDITION:g}")
        if self.residual_ > MAX_RESIDUAL:
            found.append(f"C A leaves {self.residual_:.2f} of p(c|d) unexplained, above {MAX_RESIDUAL:g}")
        if found:
            warnings.warn("classes may be arbitrary: " + "; ".join(found), IdentifiabilityWarning, stacklevel=3)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True  # as domain ids, where none are routed
        return tags


class PrefitDiscriminator(ClassifierMixin, BaseEstimator):
    """A function that returns domain probabilities, as a discriminator that needs no fit.

    Parameters
    ----------
    probabilities : callable
        From X (n, n_features) to p(d|x), (n, r), rows >= 0 of sum 1; an array, or a torch tensor on the CPU that
        needs no gradient.
    domains : array-like of shape (r,)
        Domain ids in the order of the columns.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Softmax(1)).requires_grad_(False)
    >>> q = PrefitDiscriminator(lambda X: net(torch.as_tensor(X).float()), ["a", "b", "c"])
    >>> q.predict_proba([[0.0, 1.0]]).shape
    (1, 3)
    """

    def __init__(self, probabilities: Callable[[np.ndarray], Any], domains: ArrayLike) -> None:
        self.probabilities = probabilities
        self.domains = domains

    def __sklearn_clone__(self) -> PrefitDiscriminator:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def classes_(self) -> np.ndarray:
        return np.asarray(self.domains)

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> PrefitDiscriminator:
        """Nothing."""
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """p(d|x), (n, r), float64."""
        return np.asarray(self.probabilities(np.asarray(X)), dtype=np.float64)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The likeliest domain (n,)."""
        return self.classes_[self.predict_proba(X).argmax(1)]


# ---- the equations


def to_uniform_domains(q: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """p(d|x) under equally likely domains, from p(d|x) under `prior`: q(d|x) / prior(d), normalised.

    Parameters
    ----------
    q : ndarray of shape (n, r)
    prior : ndarray of shape (r,), > 0

    Examples
    --------
    >>> to_uniform_domains(np.array([[0.9, 0.1]]), np.array([0.9, 0.1]))
    array([[0.5, 0.5]])
    """
    weighted = q / prior
    return weighted / _row_sums(weighted)[:, None]


def cluster_given_domain(
    clusters: np.ndarray, domains: np.ndarray, n_clusters: int | None = None, n_domains: int | None = None
) -> np.ndarray:
    """B[c, d] = p(c|d) (m, r), from counts: columns sum to 1.

    Parameters
    ----------
    clusters, domains : int ndarrays of shape (n,), numbered from 0
    n_clusters, n_domains : int, optional
        By default as many as occur.

    Raises
    ------
    ValueError
        If a domain is empty.

    Examples
    --------
    >>> cluster_given_domain(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])).round(2)
    array([[0.67, 0.  ],
           [0.33, 1.  ]])
    """
    N = _counts(clusters, domains, n_clusters, n_domains)
    empty = np.flatnonzero(N.sum(0) == 0)
    if len(empty):
        raise ValueError(f"every domain must have rows, got domain {empty[0]} empty")
    return N / N.sum(0)


def successive_projection(points: np.ndarray, n_vertices: int) -> np.ndarray:
    """Which points are the vertices of the simplex that the others lie in: SPA.

    Takes the longest point, projects all onto what is orthogonal to it, and so on. Exact if the vertices are among the
    points and linearly independent. If the points span fewer dimensions, the last choices are arbitrary.

    Parameters
    ----------
    points : ndarray of shape (n, r)
    n_vertices : int, at most n and r

    Returns
    -------
    int ndarray of shape (n_vertices,), all different, in the order found

    Examples
    --------
    >>> successive_projection(np.array([[0.5, 0.5], [1.0, 0.0], [0.3, 0.7], [0.1, 0.9]]), 2)
    array([1, 3])
    """
    R = np.array(points, dtype=np.float64)
    if R.ndim != 2 or not 1 <= n_vertices <= min(R.shape):
        raise ValueError(
            f"n_vertices must be from 1 to the number of points and dimensions, {R.shape}, got {n_vertices}"
        )
    chosen: list[int] = []
    for _ in range(n_vertices):
        length = (R**2).sum(1)
        length[chosen] = -1.0  # zero but for rounding
        chosen.append(int(length.argmax()))
        u = R[chosen[-1]]
        if length.max() > 0:
            R = R - np.outer(R @ u, u) / (u @ u)
    return np.array(chosen)


def factorize_spa(B: np.ndarray, n_classes: int, candidates: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """B = C A by anchors: C (m, k) = p(c|y), A (k, r) = p(y|d), columns sum to 1.

    Exact if every class has an anchor, a cluster in which no other occurs, and D has rank k.

    Parameters
    ----------
    B : ndarray of shape (m, r)
        p(c|d), no row all zero.
    n_classes : k
    candidates : bool ndarray of shape (m,), optional
        Clusters that may be anchors; all by default.

    Examples
    --------
    >>> C, A = factorize_spa(np.array([[0.5, 0.0], [0.0, 0.6], [0.5, 0.4]]) @ np.array([[0.8, 0.2], [0.2, 0.8]]), 2)
    >>> A.round(2)  # clusters 0 and 1 are the anchors
    array([[0.8, 0.2],
           [0.2, 0.8]])
    """
    p_c = B.mean(1)  # p(c) under equally likely domains
    if not (p_c > 0).all():
        raise ValueError(f"every cluster must have rows, got row {p_c.argmin()} of B all zero")
    Q = B / (p_c[:, None] * B.shape[1])  # p(d|c)
    among = np.arange(len(B)) if candidates is None else np.flatnonzero(candidates)
    anchors = among[successive_projection(Q[among], n_classes)]
    C = to_simplex(p_y_given_x(Q, Q[anchors].T)) * p_c[:, None]  # p(y|c) p(c), (m, k)
    C = C / C.sum(0)
    A = p_y_given_x(B.T, C).T  # least squares; of least norm, so that classes that cannot be told apart share alike
    for d in np.flatnonzero((A < 0).any(0)):
        A[:, d] = nnls(C, B[:, d])[0]
    return C, _normalised(A)


def factorize_nmf(
    B: np.ndarray,
    n_classes: int,
    *,
    n_init: int = 10,
    max_iter: int = 2000,
    tol: float = 1e-6,
    random_state: int | np.random.RandomState | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """B ~ C A by least squares with C, A >= 0, the best of several random starts; scaled as in `factorize_spa`.

    Parameters
    ----------
    B : ndarray of shape (m, r)
        p(c|d).
    n_classes : k
    n_init, max_iter : int
        Starts, and iterations of each.
    tol : float
        Where a start ends before, as in scikit-learn's NMF. It converges slowly: on exact tables that determine A, 2000
        iterations leave up to .07 of summed L1 in p(y|d), tol=1e-10 and 20,000 leave .02 or less.
    random_state : int, RandomState instance or None

    Returns
    -------
    C : ndarray of shape (m, k), A : ndarray of shape (k, r)
        A component that vanished is zero in both.
    """
    seeds = check_random_state(random_state).randint(2**31 - 1, size=n_init)
    fits = []
    for seed in seeds.tolist():
        nmf = NMF(n_classes, init="random", tol=tol, max_iter=max_iter, random_state=seed)
        with warnings.catch_warnings():  # unfinished starts lose to finished ones
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits.append((nmf.fit_transform(B), nmf.components_))
    C, A = min(fits, key=lambda fit: np.linalg.norm(B - fit[0] @ fit[1]))
    return _normalised(C), _normalised(A * C.sum(0)[:, None])


def domain_given_class(A: np.ndarray) -> np.ndarray:
    """D[d, y] = p(d|y) (r, k) under equally likely domains, from A[y, d] = p(y|d) (k, r).

    A class that occurs nowhere has a column of zeros, and is never predicted.

    Examples
    --------
    >>> domain_given_class(np.array([[0.9, 0.1], [0.1, 0.9]]))
    array([[0.9, 0.1],
           [0.1, 0.9]])
    """
    return _normalised(np.asarray(A).T)


def p_y_given_x(q: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Solve q(x) = D p(y|x) for p(y|x), row by row: pinv(D) q(x). (n, r), (r, k) -> (n, k).

    If q(x) lies outside the convex hull of D's columns, so do the results outside the simplex: see `to_simplex`.

    Examples
    --------
    >>> p_y_given_x(np.array([[0.7, 0.3]]), np.array([[0.9, 0.4], [0.1, 0.6]])).round(6)
    array([[0.6, 0.4]])
    """
    return q @ np.linalg.pinv(D).T


def to_simplex(p: np.ndarray) -> np.ndarray:
    """Rows (n, k) as probabilities: 0 for what is negative, divided by their sum; all equal where nothing is left.

    Examples
    --------
    >>> to_simplex(np.array([[1.5, 0.5, -0.1], [-1.0, 0.0, 0.0]])).round(2)
    array([[0.75, 0.25, 0.  ],
           [0.33, 0.33, 0.33]])
    """
    p = np.maximum(p, 0.0)
    total = _row_sums(p)
    p[total == 0] = 1.0
    total[total == 0] = p.shape[1]
    return p / total[:, None]


def p_y_given_x_and_d(p: np.ndarray, D_d: np.ndarray) -> np.ndarray:
    """Bayes' rule with the domain: p(y|x, d) = p(d|y) p(y|x), normalised; (n, k), (n, k) -> (n, k).

    Where both exclude each other, p(d|y) alone decides.

    Parameters
    ----------
    p : ndarray of shape (n, k)
        p(y|x) under equally likely domains.
    D_d : ndarray of shape (n, k)
        The row D[d] for the domain of each row.

    Examples
    --------
    >>> p_y_given_x_and_d(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.9, 0.1], [0.0, 0.2]]))
    array([[0.9, 0.1],
           [0. , 1. ]])
    """
    joint = D_d * p
    nothing = _row_sums(joint) == 0
    joint[nothing] = D_d[nothing]
    return to_simplex(joint)


def visible_classes(clusters: np.ndarray, domains: np.ndarray) -> int:
    """How many classes of different proportions the counts of clusters by domains speak of: their rank beyond noise.

    k classes make p(c|d) a matrix of rank k. Of the counts N, (N - E) / sqrt(E) with E what independence expects has
    k - 1 singular values of signal; the others are noise, for large counts at most sqrt(m - 1) + sqrt(r - 1), the edge
    of the Marchenko-Pastur law, to which 10 % are added. Clusters of less than 0.5 % of the rows are left out. Ours.

    Parameters
    ----------
    clusters, domains : int ndarrays of shape (n,), numbered from 0; every domain has rows

    Examples
    --------
    >>> domains = np.repeat([0, 1], 100)
    >>> visible_classes(domains, domains), visible_classes(np.tile([0, 1], 100), domains)
    (2, 1)
    """
    N = _counts(clusters, domains)
    N = N[N.sum(1) >= max(1, MIN_SHARE * N.sum())]
    E = np.outer(N.sum(1), N.sum(0)) / N.sum()
    E = np.maximum(E, np.finfo(float).tiny)  # a domain all of whose clusters are small
    signal = np.linalg.svd((N - E) / np.sqrt(E), compute_uv=False)
    edge = np.sqrt(len(N) - 1) + np.sqrt(N.shape[1] - 1)
    return 1 + int((signal > 1.1 * edge).sum())


def _residual_beyond_sampling(B: np.ndarray, fitted: np.ndarray, sizes: np.ndarray) -> float:
    """||B - C A||_F / ||B||_F, less (in squares) what drawing sizes[d] rows a domain leaves on average."""
    noise = (B * (1 - B) / sizes).sum()
    return float(np.sqrt(max(0.0, ((B - fitted) ** 2).sum() - noise) / (B**2).sum()))


def _counts(
    clusters: np.ndarray, domains: np.ndarray, n_clusters: int | None = None, n_domains: int | None = None
) -> np.ndarray:
    N = np.zeros((n_clusters or clusters.max() + 1, n_domains or domains.max() + 1))
    np.add.at(N, (clusters, domains), 1)
    return N


def _row_sums(M: np.ndarray) -> np.ndarray:
    """M.sum(1), five times as fast where rows are short."""
    return M @ np.ones(M.shape[1])


def _normalised(M: np.ndarray) -> np.ndarray:
    """Columns divided by their sums; those of zeros stay."""
    total = M.sum(0)
    return M / np.where(total > 0, total, 1.0)


# ---- the discriminator and its domains


def _cross_fit(discriminator: Any, X: np.ndarray, ids: np.ndarray, names: np.ndarray, folds: Any) -> np.ndarray:
    """q (n, r) of every row from a discriminator that has not seen it."""
    q = np.full((len(X), len(names)), np.nan)
    for train, test in folds.split(X, ids):
        fitted = clone(discriminator).fit(X[train], ids[train])
        q[test] = _domain_probabilities(fitted, X[test], names)
    if np.isnan(q).any():
        raise ValueError("cv must hold out every row, got a splitter that leaves some out")
    return q


def _domain_probabilities(discriminator: Any, X: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Checked predict_proba (n, r), columns in the order of `names`."""
    q = np.asarray(discriminator.predict_proba(X), dtype=np.float64)
    known = np.asarray(discriminator.classes_)
    if q.shape != (len(X), len(known)) or not (
        q.min() >= 0 and np.abs(_row_sums(q) - 1).max() <= 1e-4
    ):  # NaN is neither
        raise ValueError(
            f"discriminator must return probabilities of shape {(len(X), len(known))}, >= 0 and of sum 1; got shape "
            f"{q.shape}" + (f", values {q.min():.3g} to {q.max():.3g}" if q.size else "")
        )
    if len(known) != len(names) or not (np.sort(known) == names).all():
        raise ValueError(f"discriminator must know exactly the domains {names.tolist()}, got {known.tolist()}")
    return q if (known == names).all() else q[:, np.argsort(known)]


def _domain_ids(domains: Any, n: int, name: str) -> np.ndarray:
    """Domain ids (n,) as numbers or str; anything else raises."""
    categories = getattr(getattr(domains, "dtype", None), "categories", None)  # pandas
    ids = np.asarray(domains)
    if ids.ndim != 1:
        raise ValueError(f"{name} must have shape (n_samples,), one domain a row, got shape {ids.shape}")
    if len(ids) != n:
        raise ValueError(f"{name} must have one domain a row of X, {n}, got {len(ids)}")
    if ids.dtype.kind in "OT":
        kinds = {"integers" if isinstance(v, numbers.Integral) else type(v).__name__ for v in ids.tolist()}
        if kinds not in ({"str"}, {"integers"}):
            raise TypeError(f"{name} must be all integers or all strings, got {', '.join(sorted(kinds))}")
        ids = ids.astype(str if kinds == {"str"} else np.int64)
    if ids.dtype.kind not in "Uiubf":
        raise TypeError(f"{name} must be integers or strings, got dtype {ids.dtype}")
    if ids.dtype.kind == "f" and not np.isfinite(ids).all():
        raise ValueError(f"{name} must not hold NaN or infinity, got {ids[~np.isfinite(ids)][0]}")
    if categories is not None and len(categories) > len(np.unique(ids)):
        raise ValueError(f"{name} must have rows of every domain, got an empty category; drop the unused ones")
    return ids


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
