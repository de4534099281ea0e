"""Rows and fresh models for `shoestring.forget.regression_unlearning`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from shoestring._models import check_model
from shoestring.forget._loaders import inputs_of, row_keys, seeded, targets_of, warn_of_overlap


def survey(retain: DataLoader[Any], forget: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """All targets to forget and to keep, in the order of the datasets, after a look for rows that are in both."""
    targets, keys = [], []
    for name, loader in (("forget_loader", forget), ("retain_loader", retain)):
        found = [(targets_of(batch, name), row_keys(inputs_of(batch))) for batch in _in_order(loader)]
        targets.append(torch.cat([y for y, _ in found]))
        keys.append(np.concatenate([k for _, k in found]))
        if not bool(targets[-1].isfinite().all()):
            raise ValueError(f"targets of {name} must be finite, got NaN or infinity")
    warn_of_overlap(*keys)
    return targets[0], targets[1]


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    # A loader without a generator of its own draws a seed for its workers from the global one.
    own = torch.Generator()
    return DataLoader(loader.dataset, loader.batch_size or 1, collate_fn=loader.collate_fn, generator=own)


class _Numbered(Dataset[Any]):
    """Rows with their numbers, which tell the datasets apart that were put together."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.dataset[i]


def _collate(collate_fn: Callable[[list[Any]], Any], rows: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
    return torch.tensor([number for number, _ in rows]), collate_fn([row for _, row in rows])


def shuffled(loaders: Sequence[DataLoader[Any]], batch_size: int | None, generator: torch.Generator) -> DataLoader[Any]:
    """Batches (numbers, batch) of the rows of all loaders, in an order from `generator`; the last is the model."""
    like = loaders[-1]
    rows: Dataset[Any] = ConcatDataset([loader.dataset for loader in loaders])
    return DataLoader(
        _Numbered(rows),
        batch_size or like.batch_size or 1,
        shuffle=True,
        generator=generator,
        collate_fn=partial(_collate, like.collate_fn),
        num_workers=like.num_workers,
    )


def select(inputs: Any, u: Tensor) -> Any:
    if isinstance(inputs, dict):
        return {name: value[u] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs[u]


def fresh(model: nn.Module, init_fn: Callable[[], nn.Module] | None, generator: torch.Generator) -> nn.Module:
    """The same architecture with weights drawn from `generator`, on the device of `model`."""
    first = next(model.parameters())
    with seeded(generator):
        if init_fn is not None:
            fresh = init_fn()
        elif hasattr(model, "config") and hasattr(model, "save_pretrained"):
            fresh = type(model)(model.config)
        else:
            fresh = copy.deepcopy(model).cpu()
            left = {name for name, _ in fresh.named_parameters()}
            for name, module in fresh.named_modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
                    left -= {f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters()}
            if left:
                raise ValueError(f"init_fn is needed: nothing resets {min(left)} of {type(model).__name__}")
    check_model(fresh)
    return fresh.to(first.device, first.dtype).requires_grad_(True)
