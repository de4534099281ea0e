"""What the forgetting of classifiers and of regressors shares: batches of any form, features, overlaps, seeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LABELS = ("labels", "label")


def inputs_of(batch: Any) -> Any:
    """What a batch gives to the model: x of x, of (x, y) or [x, y], or a dict without its labels."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABELS}
    return batch[0] if isinstance(batch, tuple | list) else batch


def targets_of(batch: Any, name: str) -> Tensor:
    """The y of (x, y), or "labels" of a dict; `name` is the loader's, for the error."""
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABELS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise ValueError(f"{name} must yield (x, y), or dicts with 'labels', got {_kind(batch)} without targets")
    return found


def call(model: nn.Module, inputs: Any) -> Tensor:
    """The prediction: what the model returns, or its ``logits``."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, or an output with logits, got {type(output).__name__}")
    return output


@contextmanager
def activations(model: nn.Module, names: Sequence[str], argument: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block every call of the model leaves the outputs of the named modules in the dict it yields.

    The tensors are not copied: if the next layer works in place, they are what it made of them.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        known = ", ".join(name for name in modules if name)
        raise ValueError(f"{argument} must name modules of the model, got {unknown[0]!r}; there are {known[:500]}")
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
        kept[name] = output

    hooks = [
        modules[name].register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Layers that are made or reset on the CPU inside draw from `generator`; torch's own generator stays as it was."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the dtype and on the device of `like`, drawn on the generator's device."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def wide(x: Tensor) -> Tensor:
    """float32 for the half precisions: norms and inner products of these overflow or lose digits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_loader(name: str, loader: Any) -> None:
    if not isinstance(loader, Iterable) or isinstance(loader, str | Mapping | Tensor):
        raise TypeError(f"{name} must be a DataLoader or a list of batches, got {type(loader).__name__}")
    if isinstance(loader, Iterator):
        raise TypeError(f"{name} is read several times: pass a DataLoader or a list, not an iterator")


def check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_finite(loss: Tensor, what: str) -> None:
    """Raise before the step is taken, so that the weights stay the last good ones."""
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the {what} is {loss.item()}; the weights are those before this step")


def row_keys(inputs: Any) -> NDArray[np.int64]:
    """A number for every row, equal for equal rows: sums modulo 2^64 over the bits, with odd weights."""
    tensors = [inputs] if isinstance(inputs, Tensor) else []
    if isinstance(inputs, Mapping):
        tensors = [inputs[name] for name in sorted(inputs) if isinstance(inputs[name], Tensor)]
    total: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(len(tensor), -1)
        bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.to(torch.int64)
        bits = bits ^ (bits >> 29)  # small whole numbers have their bits at the top of a float64 only
        weights = torch.arange(bits.shape[1], dtype=torch.int64) * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1D
        keys = (bits * (weights | 1)).sum(1)
        total = keys if total is None else total * 0x100000001B3 + keys
    return np.zeros(0, np.int64) if total is None else total.numpy()


def warn_of_overlap(forget: NDArray[np.int64], retain: NDArray[np.int64]) -> None:
    """Say how many rows are to be forgotten and to be kept."""
    if count := int(np.isin(forget, retain).sum()):
        warnings.warn(
            f"{count} of {len(forget)} rows of forget_loader are in retain_loader as well: they are forgotten and kept "
            "at once. Take them out of retain_loader",
            UserWarning,
            stacklevel=4,
        )


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(repr, batch))}"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
