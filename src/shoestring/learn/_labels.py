"""Class labels that arrive over time: integers or strings, in any order, never announced."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils import column_or_1d


def check_labels(y: Any, known: np.ndarray | None = None) -> np.ndarray:
    """Labels as an int64, bool or str array (N,), of the same kind as the `known` classes.

    Raises
    ------
    TypeError
        If y mixes kinds, holds neither integers nor strings, or differs in kind from the known classes.
    ValueError
        If y holds floats that are not whole numbers, integers beyond int64, or is not 1-d.

    Examples
    --------
    >>> check_labels(["cat", "dog"])
    array(['cat', 'dog'], dtype='<U3')
    """
    y = column_or_1d(y, warn=True)
    if y.dtype.kind == "f":  # whole numbers pass, as everywhere in scikit-learn
        odd = y[~(np.isfinite(y) & (y == np.round(y)) & (np.abs(y) < 2**53))]
        if len(odd):
            raise ValueError(
                f"Unknown label type: y holds {odd[0]!s}; class labels are integers or strings, not floats"
            )
        y = y.astype(np.int64)
    if y.dtype.kind == "O":
        y = _from_objects(y)
    if y.dtype.kind in "iu":
        if y.dtype.kind == "u" and len(y) and y.max() > np.iinfo(np.int64).max:
            raise ValueError(f"y holds labels beyond int64, the largest is {y.max()}; give them as strings")
        y = y.astype(np.int64)
    elif y.dtype.kind == "T":
        y = y.astype(str)
    elif y.dtype.kind not in "Ub":
        raise TypeError(f"y must hold integer or string labels, got dtype {y.dtype}")
    if known is not None and len(known) and known.dtype.kind != y.dtype.kind:
        raise TypeError(f"y holds {_NAMES[y.dtype.kind]}, but the classes known so far are {_NAMES[known.dtype.kind]}")
    return y


def check_announced(y: Any, classes: Any) -> None:
    """Raise unless `classes`, where ``partial_fit`` is given any, holds all of y."""
    if classes is None:
        return
    unannounced = np.setdiff1d(check_labels(y), check_labels(classes))
    if len(unannounced):
        raise ValueError(f"y holds {unannounced[0].item()!r}, which is not in classes")


def check_seen(y: np.ndarray, labels: np.ndarray) -> None:
    """Raise unless every label of rows that are to be forgotten is among those seen."""
    unknown = np.setdiff1d(y, labels)
    if len(unknown):
        raise ValueError(f"cannot forget rows of {unknown[0].item()!r}: no row of that class was seen")


def union(labels: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Labels, then those of y that are not among them."""
    return np.concatenate([labels, np.setdiff1d(y, labels)])


def ids_of(labels: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Position in `labels` (any order) of each of y."""
    order = np.argsort(labels)
    return order[np.searchsorted(labels, y, sorter=order)]


_NAMES = {"i": "integers", "U": "strings", "b": "booleans"}


def _from_objects(y: np.ndarray) -> np.ndarray:
    kinds = {
        "strings" if isinstance(label, str)
        else "booleans" if isinstance(label, bool | np.bool_)
        else "integers" if isinstance(label, int | np.integer)
        else type(label).__name__
        for label in y
    }  # fmt: skip
    if kinds == {"strings"}:
        return y.astype(str)
    if kinds == {"booleans"}:
        return y.astype(bool)
    if kinds == {"integers"}:
        try:
            return np.array([int(label) for label in y], dtype=np.int64)
        except OverflowError:
            raise ValueError("y holds integer labels beyond int64; give them as strings") from None
    raise TypeError(f"y must hold labels of one kind, integers or strings; got {', '.join(sorted(kinds)) or 'none'}")
