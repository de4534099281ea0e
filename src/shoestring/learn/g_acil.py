r"""G-ACIL: Analytic Learning for Exemplar-Free Generalized Class Incremental Learning.

Zhuang, Chen, Fang, He, Tong, Wei, Zeng, Chen. NeurIPS 2024, there titled "GACL: Exemplar-Free Generalized Analytic
Continual Learning". arXiv 2403.15706.

Idea
----
Behind a frozen encoder, classification by ridge regression on one-hot labels has a closed form, and that form can be
updated by any chunk of rows: new classes, old classes, any mixture, any size. After every chunk the weights are
exactly those of one joint fit on everything seen, and no row is kept.

Equations
---------
A feature row e (width e) goes through a buffer, a random expansion that is drawn once and never trained (eq. 3)::

    x = relu(e W_B),        W_B (e, M)

The target after k chunks is the joint ridge fit, Y one-hot, 0 for classes that appeared later (eq. 5)::

    W_k = argmin_W ||Y_{1:k} - X_{1:k} W||_F^2 + gamma ||W||_F^2 = (X'X + gamma I)^{-1} X'Y

The recursion of the paper (Theorem 1), R_0 = I / gamma, for a chunk X, Y = [Ybar exposed | Ytilde new]::

    R_k = R_{k-1} - R_{k-1} X' (I + X R_{k-1} X')^{-1} X R_{k-1}
    W_k = [W_{k-1} - R_k X' X W_{k-1} | R_k X' Ytilde]  +  [R_k X' Ybar | 0]
        = W_{k-1} + R_k X' (Y - X W_{k-1})              with W_{k-1} padded by zero columns

The second bracket is the "exposed-class label gain" (ECLG); ACIL (Zhuang et al., NeurIPS 2022, arXiv 2205.14922) is
the case without it, when no class ever re-appears.

What this file does (``solver="gram"``) keeps the sums instead of R and W, which is the same in exact arithmetic,
costs N M^2 flops a chunk instead of 2 N M^2 + N^2 M + N^3, and does not drift::

    G += X'X,   Q += Y'X,   W = Q (G + gamma I)^{-1} by Cholesky, when somebody asks for it

So rows can be taken out (G -= X'X, Q -= Y'X), the sums of two sites added, and gamma chosen after the fact.

Code and paper
--------------
* Algorithm 1 prints R_0 = gamma I, a misprint: eq. 7 and both official repositories have I / gamma.
* W_B: the text says Gaussian; both repositories inherit U(-1/sqrt(e), 1/sqrt(e)) from ``nn.Linear``, and their gamma
  belongs to that. We follow the code (``init="uniform"``); scaling W_B by s is dividing gamma by s^2.
* The GACL repository fits every batch three times, so its gamma of 100 is a gamma of 100/3 here.
* The ACIL repository gives columns to ids that were never seen; their score 0 can win. Here only seen classes compete.

The family, by option: ``buffer="rbf"`` is GKEAL's kernel buffer (Zhuang et al., CVPR 2023); ``compensation=C`` adds
DS-AL's second stream (Zhuang et al., AAAI 2024, arXiv 2403.17503).
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import lapack
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from shoestring.learn._analytic_head import AnalyticHead
from shoestring.learn._buffers import random_projection, rbf_buffer, relu_buffer
from shoestring.learn._labels import check_announced, check_labels, check_seen, ids_of, union
from shoestring.learn._model_file import read, restore, write
from shoestring.learn._ridge import choose_gamma, recursive_update, solve_ridge

__all__ = [
    "GACIL",
    "AnalyticHead",
    "choose_gamma",
    "random_projection",
    "rbf_buffer",
    "recursive_update",
    "relu_buffer",
    "solve_ridge",
]

FORMAT, VERSION = "shoestring.g-acil", 1
PREDICT_BLOCK = 4096  # rows scored at a time


class GACIL(ClassifierMixin, BaseEstimator):
    """Classifier for any stream of labelled features: learns new classes at any time, keeps no row, forgets exactly.

    After every `partial_fit` it is the ridge classifier that one joint fit on everything seen would give; after
    `forget` it is the one that never saw the rows.

    Parameters
    ----------
    n_components : int, default=5000
        M, the width of the buffer (the paper's). Memory is 8 M^2 bytes. Ignored without a buffer.
    gamma : float or "gcv", default=100.0
        Ridge, > 0. The official code's 100 for the uniform buffer. ``"gcv"`` chooses it by generalised
        cross-validation from the sums alone (one eigendecomposition, about 9 M^3 flops, at the next prediction).
    buffer : {"relu", "rbf"} or None, default="relu"
        ``"relu"``: the paper's random expansion. ``"rbf"``: GKEAL's Gaussian kernel to M centres; without `centers`
        they are rows of the first chunk and stay in the model: do not use that where rows may have to be forgotten.
        None: the features themselves.
    init : {"uniform", "normal"}, default="uniform"
        Law of the relu buffer: official code, or paper.
    kernel_width : float, default=10.0
        Sigma of the rbf buffer (GKEAL).
    centers : array-like of shape (M, n_features), optional
        Centres of the rbf buffer.
    compensation : float, optional
        DS-AL's second stream, weighted by this C (0.6 to 1.5 there). Then the model depends on the order of chunks,
        every chunk costs a solve, and `forget`, `forget_class` and `merge` are refused.
    solver : {"gram", "recursive"}, default="gram"
        Sums and one Cholesky factorisation when needed, or the paper's recursion: the same weights to 1e-9.
    dtype : {"float64", "float32"}, default="float64"
        Precision in which rows are expanded and multiplied; sums and solves stay in float64 with solver="gram".
    device : str, default="cpu"
        Where the sums live and the work is done, as torch names it.
    random_state : int, RandomState instance or None, default=0
        Seed of the buffer. Models can be merged only if their buffers are equal, hence the fixed default.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels seen and not forgotten, sorted.
    class_count_ : ndarray of shape (n_classes,)
        Sum of the weights of the rows of each class (without sample_weight: their number).
    coef_ : ndarray of shape (n_classes, M)
        W', one row a class, in the buffer's space; no intercept.
    gamma_ : float
        The ridge in use.
    n_samples_seen_ : int
        Rows learnt and not forgotten.
    n_features_in_, feature_names_in_ : as in scikit-learn.
    head_ : AnalyticHead
        The same classifier as a torch layer; its ids number the classes in order of appearance.

    Notes
    -----
    Learning costs N M^2 + 2 N e M flops for N rows, whatever the number of rows and classes before; the first
    prediction after learning adds a solve of M^3/3. Ctrl-C waits for the end of the chunk in hand.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from shoestring.learn import GACIL
    >>> X, y = load_digits(return_X_y=True)
    >>> model = GACIL(n_components=500, gamma=1.0)
    >>> for digits in ([0, 1, 2], [3, 4, 5, 6], [2, 7, 8, 9]):  # 2 comes back, 7 to 9 are new
    ...     chunk = np.isin(y, digits)
    ...     model = model.partial_fit(X[chunk], y[chunk])
    >>> model.classes_
    array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    >>> model.score(X, y) > 0.98
    True
    >>> _ = model.forget(X[y == 3], y[y == 3])  # now it has never seen a 3
    >>> model.classes_
    array([0, 1, 2, 4, 5, 6, 7, 8, 9])
    """

    head_: AnalyticHead
    classes_: np.ndarray

    def __init__(
        self,
        *,
        n_components: int = 5000,
        gamma: float | Literal["gcv"] = 100.0,
        buffer: Literal["relu", "rbf"] | None = "relu",
        init: Literal["uniform", "normal"] = "uniform",
        kernel_width: float = 10.0,
        centers: ArrayLike | None = None,
        compensation: float | None = None,
        solver: Literal["gram", "recursive"] = "gram",
        dtype: Literal["float64", "float32"] = "float64",
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.n_components = n_components
        self.gamma = gamma
        self.buffer = buffer
        self.init = init
        self.kernel_width = kernel_width
        self.centers = centers
        self.compensation = compensation
        self.solver = solver
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    # ---- learn

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> GACIL:
        """Forget everything and learn these rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), integers or strings
        sample_weight : array-like of shape (n_samples,), >= 0, optional
        """
        self._learn(X, y, sample_weight, first=True)
        return self

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None, *, classes: ArrayLike | None = None
    ) -> GACIL:
        """Learn a chunk of rows on top of what is known. Labels may be new; nothing has to be announced.

        Parameters are those of `fit`. `classes`, which scikit-learn's own learners need, is not needed; if given, y
        must keep to it. A call that raises leaves the model as it was.
        """
        check_announced(y, classes)
        self._learn(X, y, sample_weight, first=not self.__sklearn_is_fitted__())
        return self

    def merge(self, other: GACIL) -> GACIL:
        """Add what `other` has learnt, as if its rows had come here. Classes are matched by label.

        Raises
        ------
        ValueError
            If the two buffers differ (kind, width, seed, centres): their sums cannot be added.
        """
        check_is_fitted(self)
        if not isinstance(other, GACIL):
            raise TypeError(f"other must be a GACIL, got {type(other).__name__}")
        check_is_fitted(other)
        if other.n_features_in_ != self.n_features_in_:
            raise ValueError(
                f"other was fitted on {other.n_features_in_} features, this model on {self.n_features_in_}"
            )
        theirs = check_labels(other._labels, self._labels) if len(other._labels) else other._labels
        labels = union(self._labels, theirs)
        self.head_.merge(other.head_, torch.as_tensor(ids_of(labels, theirs)))
        self._set_labels(labels)
        return self

    def __iadd__(self, other: GACIL) -> GACIL:
        return self.merge(other)

    # ---- forget

    def forget(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> GACIL:
        """Take rows out again: afterwards the model is the one that never saw them, to rounding.

        X, y and sample_weight are the rows as they were given when learnt. A class whose last row goes is gone.

        Raises
        ------
        ValueError
            If more rows of a class would go than came, if a label is unknown, or if the rows cannot have been among
            those seen; the model is then unchanged. (Rows that were never seen but resemble rows that were cannot
            all be told: no rows are kept to compare with.)
        """
        check_is_fitted(self)
        X, y, weight = self._check_rows(X, y, sample_weight, first=False)
        check_seen(y, self._labels)
        self.head_.downdate(_tensor(X), torch.as_tensor(ids_of(self._labels, y)), weight)
        self._keep(self.head_.rows.cpu().numpy() > 0)
        return self

    def forget_class(self, label: Any) -> GACIL:
        """Delete a class: it can be predicted no more, and its scores are gone.

        Without its rows this cannot undo their part in G: what remains is the joint fit in which they carry all-zero
        targets, so they still tell the other classes what they are not. To have never seen them, `forget` the rows.
        """
        check_is_fitted(self)
        self.head_._refuse_compensation("forget")
        keep = self._labels != label
        if np.ndim(label) or np.all(keep):
            raise ValueError(f"label {label!r} is unknown; classes are {self.classes_.tolist()}")
        self._keep(np.asarray(keep))
        return self

    # ---- use

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Scores (n_samples, n_classes); for two classes, as in scikit-learn, their difference (n_samples,)."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,) of the highest score among the classes seen."""
        best = torch.from_numpy(self._scores(X)).argmax(1)  # the first of equals, as NumPy's, and sooner
        return self.classes_[best.numpy()]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probabilities (n_samples, n_classes): softmax(scores / sigma^2), sigma^2 = `head_.noise_variance`.

        The posterior of the class under the Gaussian model of which the ridge fit is the mean. (Not in the paper.)
        """
        logits = self._scores(X)
        logits /= self.head_.noise_variance
        logits -= logits.max(1, keepdims=True)
        proba = np.exp(logits, out=logits)
        proba /= proba.sum(1, keepdims=True)
        return proba

    def settle(self) -> GACIL:
        """Compute now what the first `predict_proba` would have to; `save` keeps it, as long as no row is added.

        That is sigma^2, and gamma if it is to be chosen: about M^3 flops, and at most c M^2 for c classes.
        """
        check_is_fitted(self)
        if len(self._labels):
            self.head_.noise_variance  # noqa: B018 (a property, remembered)
        return self

    @property
    def coef_(self) -> np.ndarray:
        check_is_fitted(self)
        return self.head_.weight[self._order].cpu().numpy()

    @property
    def gamma_(self) -> float:
        check_is_fitted(self)
        return self.head_.gamma_

    @property
    def class_count_(self) -> np.ndarray:
        check_is_fitted(self)
        return self.head_.weights.cpu().numpy()[self._order]

    @property
    def n_samples_seen_(self) -> int:
        check_is_fitted(self)
        return int(self.head_.total[0])

    # ---- keep

    def save(self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically; its metadata hold the parameters, the classes and `extra` as JSON."""
        check_is_fitted(self)
        params = {k: v for k, v in self.get_params().items() if k != "centers"}
        if not isinstance(self.random_state, int | np.integer):
            params["random_state"] = None  # the buffer itself is in the file
        tensors = {name: tensor.cpu() for name, tensor in self.head_.state_dict().items()}
        for name in tensors:
            if name.endswith(".G"):
                tensors[name] = _pack(tensors[name])
            elif name.endswith(".Q"):
                tensors[name] = tensors[name][: self.head_.n_classes]
        solved = {name: value for name, value in self.head_._solved.items() if name in ("gamma", "variance")}
        write(
            path, self, self._labels, tensors, format=FORMAT, version=VERSION, params=params, extra=extra, solved=solved
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> GACIL:
        """Read what `save` wrote, in this or an older version.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file; if it is truncated, not a model of this class, or of a newer version.
        """
        meta, tensors = read(path, format=FORMAT, version=VERSION)
        params = {**meta["params"], "device": device}
        if params["buffer"] == "rbf":
            params["centers"] = tensors["basis"].numpy()
        model = cls(**params)
        model.head_ = model._new_head(meta["n_features"], None)
        try:
            tensors = {name: _unpack(t) if name.endswith(".G") else t for name, t in tensors.items()}
            model.head_.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path}: the tensors do not fit the model described in the file: {error}") from None
        model.head_._solved.update(meta.get("solved", {}))
        if model.head_.n_classes != len(meta["classes"]):
            raise ValueError(f"{path}: holds {model.head_.n_classes} columns for {len(meta['classes'])} classes")
        model._set_labels(restore(model, meta))
        return model

    # ---- inside

    def _learn(self, X: Any, y: Any, sample_weight: Any, first: bool) -> None:
        X, y, weight = self._check_rows(X, y, sample_weight, first)
        head = self._new_head(X.shape[1], X) if first else self.head_
        labels = union(np.empty(0, y.dtype) if first else self._labels, y)
        head.learn_checked(_tensor(X), torch.as_tensor(ids_of(labels, y)), weight)
        self.head_ = head
        self._set_labels(labels)

    def _new_head(self, n_features: int, X: np.ndarray | None) -> AnalyticHead:
        """A head that has seen nothing. X: rows of the first chunk, for the rbf buffer's centres."""
        dtype = {"float64": torch.float64, "float32": torch.float32}.get(self.dtype)
        if dtype is None:
            raise ValueError(f"dtype must be 'float64' or 'float32', got {self.dtype!r}")
        centers = self.centers
        if self.buffer == "rbf" and centers is None:
            assert X is not None
            rows = np.unique(X, axis=0)  # so that neither order nor repetition matters
            n = min(self.n_components, len(rows))
            centers = rows[check_random_state(self.random_state).choice(len(rows), n, replace=False)]
        return AnalyticHead(
            n_features,
            self.n_components,
            gamma=self.gamma,
            buffer=self.buffer,
            init=self.init,
            kernel_width=self.kernel_width,
            centers=None if centers is None else torch.as_tensor(np.array(centers, dtype=np.float64)),
            compensation=self.compensation,
            solver=self.solver,
            dtype=dtype,
            device=self.device,
            random_state=self.random_state,
        )

    def _check_rows(
        self, X: Any, y: Any, sample_weight: Any, first: bool
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor | None]:
        """Validated rows; those of weight zero are dropped, as if they had not been given."""
        X = validate_data(self, X, reset=first, dtype=[np.float64, np.float32], order="C")
        y = check_labels(y, None if first else self._labels)
        check_consistent_length(X, y)
        if sample_weight is None:
            return X, y, None
        w = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not w.any():
            raise ValueError("sample_weight is zero for every row")
        kept = w > 0
        return X[kept], y[kept], torch.as_tensor(w[kept])

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32], order="C")
        if not len(self._labels):
            raise ValueError("every class has been forgotten: learn some rows before predicting")
        with torch.no_grad():
            blocks = [
                self.head_(_tensor(X[start : start + PREDICT_BLOCK]).to(self.head_.total.device, self.head_.dtype))
                for start in range(0, len(X), PREDICT_BLOCK)
            ]
        scores = (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).cpu().numpy()
        return np.take(scores, self._order, axis=1)  # a copy, row by row in memory

    def _set_labels(self, labels: np.ndarray) -> None:
        """Labels in order of appearance (column order of the head), and the order that sorts them."""
        self._labels = labels
        self._order = np.argsort(labels)
        self.classes_ = labels[self._order]

    def _keep(self, kept: np.ndarray) -> None:
        if not kept.all():
            self.head_.keep(torch.as_tensor(np.flatnonzero(kept), device=self.head_.total.device))
            self._set_labels(self._labels[kept])

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "head_")


def _tensor(X: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(X if X.flags.writeable else X.copy())  # torch has no read-only tensors


def _pack(G: torch.Tensor) -> torch.Tensor:
    """The lower triangle, row by row: half the bytes. (LAPACK counts by columns: our lower is its upper.)"""
    return torch.from_numpy(lapack.dtrttp(G.numpy().T, uplo="U")[0])


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    width = math.isqrt(2 * len(packed))
    return torch.from_numpy(np.ascontiguousarray(lapack.dtpttr(width, packed.numpy(), uplo="U")[0].T))
