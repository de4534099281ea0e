"""What the methods of this room check before they touch a model."""

from __future__ import annotations

from numbers import Real
from typing import Any


def check_ratio(name: str, value: Any) -> float:
    """Raise unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0 <= float(value) < 1:  # NaN too
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return float(value)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Raise unless `value` is a whole number in [low, high]."""
    wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number {wanted}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value
