"""What the estimators of this room share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sklearn.base import BaseEstimator


@contextmanager
def all_or_nothing(model: BaseEstimator) -> Iterator[None]:
    """A fit that raises leaves the model as it was: validation sets n_features_in_ before later checks can fail."""
    before = vars(model).copy()
    try:
        yield
    except BaseException:
        vars(model).clear()
        vars(model).update(before)
        raise
