r"""TEEN: Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration.

Wang, Zhou, Zhang, Zhan, Ye. NeurIPS 2023. arXiv 2312.05229.

Idea
----
Behind a frozen encoder a class is the mean of its features, its prototype, and a row belongs to the prototype of
highest cosine. The prototype of a class with five shots is noisy, and its rows are swallowed by large base classes it
resembles: so it is mixed with their prototypes, weighted by how much it resembles them. Nothing is trained.

Equations
---------
c_b, c_n: means of the raw features of base class b, and of the shots of new class n; u_b, v_n: the same at length 1::

    w_{n,b} = softmax_b( tau <v_n, u_b> )                    over base classes only
    delta_n = sum_b w_{n,b} u_b                              (official code: brought to length 1)
    p_n     = (1 - a) v_n + a delta_n
    label   = argmax  cos(f(x), u_b or p_n)

Base prototypes stay as they are; a session writes its own rows only, so sessions do not disturb each other.

Code and paper
--------------
* The paper writes its alpha in front of the original prototype, the code (``shift_weight``) in front of the mixture;
  at 0.5, the paper's value, both are the same. Here it is `shift`, the weight a of the mixture, as in the code, whose
  scripts use 0.5 (CUB, mini-ImageNet) and 0.1 (CIFAR-100). Choose it on held-out base classes played as new ones.
* The code brings delta to length 1, the paper's formula does not; we follow the code, ``normalize_delta=False`` is the
  paper. Without it the length of delta, below 1, makes the shift smaller.
* In the code all shots of a session come in one batch; of several it keeps only the last. Here sums are kept, so that
  shots may come in any portions, and in any order.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import check_is_fitted, validate_data

from shoestring.learn._labels import check_announced, check_labels, check_seen
from shoestring.learn._model_file import read, restore, write
from shoestring.learn._prototypes import Array, add_sums, class_sums, unit

__all__ = ["TEEN", "calibrate_prototypes"]

FORMAT, VERSION = "shoestring.teen", 1
SCALE = 16.0  # of the cosines, in predict_proba: the official T on CIFAR-100; labels do not depend on it


def calibrate_prototypes(
    new: Array, base: Array, shift: float = 0.5, temperature: float = 16.0, *, normalize_delta: bool = True
) -> Array:
    """Prototypes of new classes, pulled towards the base prototypes they resemble.

    Parameters
    ----------
    new : ndarray or tensor of shape (N, d)
        Means of the raw features of the new classes.
    base : ndarray or tensor of shape (B, d)
        Of the base classes.
    shift : float in [0, 1], default=0.5
        a, the weight of the mixture of base prototypes (the paper's 0.5).
    temperature : float >= 0, default=16.0
        tau: 0 mixes all base classes alike, infinity takes the most similar (the paper's 16).
    normalize_delta : bool, default=True
        Whether the mixture is brought to length 1 first, as in the official code.

    Returns
    -------
    ndarray or tensor of shape (N, d)
        p_n; compare by cosine. Costs 4 N B d flops.

    Raises
    ------
    ValueError
        For a shift or temperature out of range, or shapes that do not fit.

    Examples
    --------
    >>> base = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> calibrate_prototypes(np.array([[3.0, 1.0]]), base, shift=0.5, temperature=1000.0).round(3)
    array([[0.974, 0.158]])
    """
    _check(shift, temperature)
    if new.ndim != 2 or base.ndim != 2 or new.shape[1] != base.shape[1] or not len(base):
        raise ValueError(
            f"new must be (N, d) and base (B, d) with B >= 1, got shapes {tuple(new.shape)} and {tuple(base.shape)}"
        )
    v, u = unit(new), unit(base)
    if isinstance(new, torch.Tensor):
        w = torch.softmax(temperature * (v @ u.T), 1)  # (N, B)
    else:
        w = softmax(temperature * (v @ u.T), axis=1)
    delta = w @ u  # (N, d)
    return (1 - shift) * v + shift * (unit(delta) if normalize_delta else delta)


class TEEN(ClassifierMixin, BaseEstimator):
    """Nearest prototype by cosine; prototypes of few-shot classes are calibrated by the base classes.

    What is kept of the data is a sum of features and a count for each class: chunks may come in any order and size,
    models can be merged, and rows can be taken out again.

    Parameters
    ----------
    shift : float in [0, 1], default=0.5
        a, the weight of the base mixture in a new prototype. 0: the nearest class mean by cosine.
    temperature : float >= 0, default=16.0
        tau of the softmax over base classes.
    normalize_delta : bool, default=True
        Official code (True) or the paper's formula.
    base_classes : array-like of labels, optional
        Which classes are base classes. Default: those of `fit`, or of the first call of `partial_fit`. Name them if the
        first chunk of a stream does not hold all of them: a class named here is base whenever it comes.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), sorted labels
    base_classes_ : ndarray of labels, those that are not calibrated
    class_count_ : ndarray of shape (n_classes,), rows of each class
    prototypes_ : ndarray of shape (n_classes, n_features), float64
        u_b of base classes (length 1) and p_n of new ones.
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    Learning costs N d flops, predicting 2 N C d; memory is 8 C d bytes.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = TEEN(shift=0.1).fit(X[y < 6], y[y < 6])
    >>> for digit in (6, 7, 8, 9):
    ...     shots = np.flatnonzero(y == digit)[:5]
    ...     model = model.partial_fit(X[shots], y[shots])
    >>> bool(model.score(X, y) > 0.8)
    True
    """

    classes_: np.ndarray
    _base: np.ndarray

    def __init__(
        self,
        *,
        shift: float = 0.5,
        temperature: float = 16.0,
        normalize_delta: bool = True,
        base_classes: ArrayLike | None = None,
    ) -> None:
        self.shift = shift
        self.temperature = temperature
        self.normalize_delta = normalize_delta
        self.base_classes = base_classes

    def fit(self, X: ArrayLike, y: ArrayLike) -> TEEN:
        """Forget everything and learn the base classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), integers or strings
        """
        return self._learn(X, y, first=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, *, classes: ArrayLike | None = None) -> TEEN:
        """Learn rows of new classes, or more rows of known ones. A call that raises leaves the model as it was.

        `classes`, which scikit-learn's own learners need, is not needed; if given, y must keep to it.
        """
        check_announced(y, classes)
        return self._learn(X, y, first=not hasattr(self, "sums_"))

    def forget(self, X: ArrayLike, y: ArrayLike) -> TEEN:
        """Take rows out again: afterwards the model is the one that never saw them, to rounding.

        A class whose last row goes is gone; of base classes one must stay.

        Raises
        ------
        ValueError
            If more rows of a class would go than came, or a label is unknown; the model is then unchanged.
        """
        check_is_fitted(self)
        X, y = self._check_rows(X, y, first=False)
        check_seen(y, self.classes_)
        sums, counts = class_sums(X, y, self.classes_)
        left = self.class_count_ - counts
        if (left < 0).any():
            k = int(left.argmin())
            label, came = self.classes_[k].item(), self.class_count_[k]
            raise ValueError(f"cannot forget {counts[k]} rows of {label!r}: {came} came")
        self._keep(left > 0, self.sums_ - sums, left)
        return self

    def forget_class(self, label: Any) -> TEEN:
        """Drop a class: exactly as if none of its rows had been seen, since no other class holds anything of them.

        Raises
        ------
        ValueError
            If the label is unknown, or it is the last base class.
        """
        check_is_fitted(self)
        kept = self.classes_ != label
        if np.ndim(label) or np.all(kept):
            raise ValueError(f"label {label!r} is unknown; classes are {self.classes_.tolist()}")
        self._keep(np.asarray(kept), self.sums_, self.class_count_)
        return self

    def merge(self, other: TEEN) -> TEEN:
        """Add what `other` has learnt, as if its rows had come here; a class is base if it is base in either.

        Raises
        ------
        TypeError, ValueError
            If `other` is no TEEN, or was fitted on another number of features.
        """
        check_is_fitted(self)
        if not isinstance(other, TEEN):
            raise TypeError(f"other must be a TEEN, got {type(other).__name__}")
        check_is_fitted(other)
        if other.n_features_in_ != self.n_features_in_:
            raise ValueError(
                f"other was fitted on {other.n_features_in_} features, this model on {self.n_features_in_}"
            )
        check_labels(other.classes_, self.classes_)
        self._base = np.union1d(self._base, other._base)
        self._add(other.classes_, other.sums_, other.class_count_)
        return self

    def __iadd__(self, other: TEEN) -> TEEN:
        return self.merge(other)

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Cosines (n_samples, n_classes); for two classes, as in scikit-learn, their difference (n_samples,)."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,) of the prototypes of highest cosine."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Softmax of 16 times the cosines, (n_samples, n_classes): the cosine classifier of the base training."""
        return softmax(SCALE * self._scores(X), axis=1)

    def to_linear(self) -> torch.nn.Linear:
        """The prototypes, at length 1, as a linear layer without bias: cosines, if its input has length 1."""
        check_is_fitted(self)
        layer = torch.nn.utils.skip_init(torch.nn.Linear, self.n_features_in_, len(self.classes_), bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(unit(self.prototypes_)))
        return layer

    @property
    def n_samples_seen_(self) -> int:
        """Rows learnt and not forgotten."""
        check_is_fitted(self)
        return int(self.class_count_.sum())

    def save(self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically; its metadata hold the parameters, the classes and `extra` as JSON."""
        check_is_fitted(self)
        params = {**self.get_params(), "base_classes": self._base.tolist()}
        tensors = {"sums": torch.from_numpy(self.sums_), "class_count": torch.from_numpy(self.class_count_)}
        write(path, self, self.classes_, tensors, format=FORMAT, version=VERSION, params=params, extra=extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TEEN:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file; if it is truncated, not a model of this class, or of a newer version.
        """
        meta, tensors = read(path, format=FORMAT, version=VERSION)
        model = cls(**meta["params"])
        labels = restore(model, meta)
        model._base = check_labels(model.base_classes, labels)
        model._set(labels, tensors["sums"].numpy(), tensors["class_count"].numpy())
        return model

    # ---- inside

    def _learn(self, X: Any, y: Any, first: bool) -> TEEN:
        _check(self.shift, self.temperature)
        X, y = self._check_rows(X, y, first)
        present = np.unique(y)
        if first:
            named = self.base_classes
            base = present if named is None else np.unique(check_labels(named))
            check_labels(base, present)
            if named is not None and not np.isin(present, base).any():
                raise ValueError(f"the first rows hold no base class: y holds {present.tolist()}")
            self._base = base
            self._set(present, *class_sums(X, y, present))
        else:
            self._add(present, *class_sums(X, y, present))
        return self

    def _check_rows(self, X: Any, y: Any, first: bool) -> tuple[np.ndarray, np.ndarray]:
        X = validate_data(self, X, reset=first, dtype=[np.float64, np.float32])
        y = check_labels(y, None if first else self.classes_)
        check_consistent_length(X, y)
        return X, y

    def _add(self, classes: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        self._set(*add_sums((self.classes_, self.sums_, self.class_count_), (classes, sums, counts)))

    def _keep(self, kept: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        if not kept[np.isin(self.classes_, self._base)].any():
            raise ValueError("cannot forget the last row of the last base class: new prototypes lean on them")
        self._set(self.classes_[kept], sums[kept], counts[kept])

    def _set(self, classes: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
        self.classes_, self.sums_, self.class_count_ = classes, sums, counts
        self._made: list[np.ndarray] = []  # the prototypes, when somebody has asked for them

    @property
    def base_classes_(self) -> np.ndarray:
        check_is_fitted(self)
        return np.intersect1d(self.classes_, self._base)

    @property
    def prototypes_(self) -> np.ndarray:
        check_is_fitted(self)
        if not self._made:
            means = self.sums_ / self.class_count_[:, None]
            base = np.isin(self.classes_, self._base)
            prototypes = unit(means)
            if not base.all():
                prototypes[~base] = calibrate_prototypes(
                    means[~base], means[base], self.shift, self.temperature, normalize_delta=self.normalize_delta
                )
            self._made.append(prototypes)
        return self._made[0]

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        prototypes = unit(self.prototypes_).astype(X.dtype, copy=False)
        return unit(X) @ prototypes.T  # (n, C)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "sums_")


def _check(shift: float, temperature: float) -> None:
    if not 0 <= shift <= 1:
        raise ValueError(f"shift must be in [0, 1], got {shift}")
    if not temperature >= 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
