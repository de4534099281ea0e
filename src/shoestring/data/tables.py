"""From a data set of plain columns to a matrix: the one way tables reach an estimator."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

__all__ = ["is_table", "matrix"]

MANY = 100  # values of a column of text beyond which it is rather a name than a category


def is_table(rows: Any, drop: Collection[str] = ()) -> bool:
    """Whether rows hold a column of single numbers, and no column of images or of lists of numbers.

    Parameters
    ----------
    rows : datasets.Dataset
    drop : names of columns that do not count: the label, an identifier

    Examples
    --------
    >>> import datasets
    >>> is_table(datasets.Dataset.from_dict({"age": [41, 7], "colour": ["red", "blue"]}))
    True
    >>> is_table(datasets.Dataset.from_dict({"X": [[1.0, 2.0]], "age": [3]}))
    False
    """
    kinds = [_kind(feature) for name, feature in rows.features.items() if name not in drop]
    return "number" in kinds and "other" not in kinds


def matrix(rows: Any, drop: Collection[str] = ()) -> tuple[np.ndarray, list[str]]:
    """All columns of a table as numbers: numbers as they are, one column of 0 and 1 for each value of text.

    Parameters
    ----------
    rows : datasets.Dataset
    drop : names of columns to leave out

    Returns
    -------
    X : ndarray of shape (n, d), float64
    names : list of d str: ``"age"``, ``"colour=blue"``, ...

    Raises
    ------
    ValueError
        If a value is missing or not finite, a column of text has more than 100 values, or a column holds neither
        numbers nor text. The message names the column.

    Examples
    --------
    >>> import datasets
    >>> matrix(datasets.Dataset.from_dict({"age": [41, 7], "colour": ["red", "blue"], "id": [1, 2]}), drop=["id"])
    (array([[41.,  0.,  1.],
           [ 7.,  1.,  0.]]), ['age', 'colour=blue', 'colour=red'])
    """
    if not len(rows):
        raise ValueError("rows must hold at least one row, got none")
    rows = rows.with_format(None)
    parts, names = [], []
    for name, feature in rows.features.items():
        if name in drop:
            continue
        kind = _kind(feature)
        if kind == "other":
            raise ValueError(f"column {name!r} must hold numbers or text, one a row, got {feature}")
        values = rows[name][:]
        missing = sum(value is None for value in values)
        if missing:
            raise ValueError(f"column {name!r} must have a value in every row, got {missing} without")
        if kind == "number":
            column = np.asarray(values, dtype=np.float64)
            if not np.isfinite(column).all():
                raise ValueError(f"column {name!r} must be finite, got NaN or infinity")
            parts.append(column[:, None])
            names.append(name)
            continue
        found, number = np.unique(np.asarray(values), return_inverse=True)
        if len(found) > MANY:
            raise ValueError(f"column {name!r} must hold at most {MANY} different values, got {len(found)}")
        parts.append(np.eye(len(found))[number])
        names += [f"{name}={value}" for value in found]
    if not parts:
        raise ValueError(f"no column is left; columns are {', '.join(rows.features)}")
    return np.hstack(parts), names


def _kind(feature: Any) -> str:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "text"
    if isinstance(feature, datasets.Value):
        if feature.dtype.startswith(("float", "int", "uint", "bool")):
            return "number"
        if feature.dtype in ("string", "large_string", "null"):
            return "text"
    return "other"
