"""What is checked of a model before a method of any room touches it."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["check_model"]


def check_model(model: Any) -> None:
    """Raise unless `model` is a module whose weights are there and finite."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"model is on the meta device ({name} has no values): load its weights first")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"model holds NaN or infinity in {name}")
