"""Sums of rows by class: what the learners of this room that live on class means keep of the data."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)
Sums = tuple[np.ndarray, np.ndarray, np.ndarray]  # classes (C,) sorted, sums (C, d), numbers of rows (C,)


def class_sums(X: np.ndarray, y: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (C, d) in float64 and number (C,) of the rows of each class; `classes` is sorted and holds all of y."""
    ids = np.searchsorted(classes, y)
    order = np.argsort(ids, kind="stable")
    present, starts = np.unique(ids[order], return_index=True)
    sums = np.zeros((len(classes), X.shape[1]))
    sums[present] = np.add.reduceat(X[order], starts, axis=0, dtype=np.float64)
    return sums, np.bincount(ids, minlength=len(classes))


def add_sums(*parts: Sums) -> Sums:
    """The sums of several sets of rows together, over the union of their classes."""
    union = np.unique(np.concatenate([classes for classes, _, _ in parts]))
    total = np.zeros((len(union), parts[0][1].shape[1]))
    rows = np.zeros(len(union), dtype=np.int64)
    for classes, sums, counts in parts:
        places = np.searchsorted(union, classes)
        total[places] += sums
        rows[places] += counts
    return union, total, rows


def unit(rows: Array) -> Array:
    """Rows at length 1; a row of zeros stays one."""
    if isinstance(rows, torch.Tensor):
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(length == 0, 1, length)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)
