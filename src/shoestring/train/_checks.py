"""What the optimizers of this room check: their hyper-parameters, and gradients they cannot use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_high: bool = False) -> None:
    """Raise unless `value` is a number (or a 0-d tensor, as torch takes for ``lr``) in [low, high], or [low, high).

    A tensor on another device than the CPU is not read: that would wait for it.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    good = low <= value < high if open_high or math.isinf(high) else low <= value <= high
    if not good:  # NaN too
        wanted = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_betas(betas: Any) -> None:
    """Raise unless `betas` is a pair of numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, 0, 1, open_high=True)


def with_gradient(parameters: Iterable[Tensor], owner: str) -> list[Tensor]:
    """The parameters that have a gradient.

    Raises
    ------
    RuntimeError
        If a gradient is sparse.
    """
    found = [p for p in parameters if p.grad is not None]
    for p in found:
        grad = p.grad
        if grad is not None and grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} does not support sparse gradients, got layout {grad.layout} for a parameter of shape "
                f"{tuple(p.shape)}: build its layer with sparse=False"
            )
    return found
