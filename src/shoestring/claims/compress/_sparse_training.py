"""The task of the claims of pdp and nm-decay: an MLP on Fashion-MNIST at 14 x 14, trained to sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoestring import data
from shoestring.loop import fit

BATCH = 256
Part = tuple[Tensor, Tensor]


@cache
def images(rows: int) -> tuple[Part, Part, Part]:
    """The first `rows` rows to train on, 4,000 to choose by, and those to test: (n, 196), standardised, and labels."""
    splits = []
    for split in (f"train[:{rows + 4000}]", "test" if rows > 5000 else "test[:2000]"):  # few rows: the fast form
        part = data.load("fashion", split=split)
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in part["image"]]) / 255
        pixels = pixels.reshape(len(pixels), 14, 2, 14, 2).mean((2, 4)).reshape(len(pixels), -1)
        splits.append((torch.from_numpy((pixels - 0.286) / 0.353), torch.tensor(part["label"][:])))
    (X, y), test = splits
    return (X[:rows], y[:rows]), (X[rows:], y[rows:]), test


def mlp(hidden: int, seed: int) -> nn.Sequential:
    """196 inputs, `hidden` layers of 256 units, 10 classes; layer i is module 2 i."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        widths = [196, *[256] * hidden]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(256, 10))


def train(
    model: nn.Module,
    rate: float,
    seed: int,
    epochs: int,
    rows: int,
    callbacks: Sequence[Callable[[Any], Any]] = (),
    epoch_callbacks: Sequence[Callable[[Any], Any]] = (),
) -> torch.optim.Optimizer:
    """Adam, cosine to zero, with batches that follow `seed`."""
    X, y = images(rows)[0]
    generator = torch.Generator().manual_seed(seed + 1000)
    orders = torch.stack([torch.randperm(len(X), generator=generator) for _ in range(epochs)])
    batches = _Epochs([[(X[i], y[i]) for i in order.split(BATCH)] for order in orders])
    steps = epochs * steps_per_epoch(rows)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    options: dict[str, Any] = {"callbacks": callbacks, "epoch_callbacks": epoch_callbacks, "progress": False}
    fit(model, batches, _loss, optimizer, scheduler=cosine, epochs=epochs, **options)
    return optimizer


def steps_per_epoch(rows: int) -> int:
    return math.ceil(rows / BATCH)


@torch.no_grad()
def accuracies(model: nn.Module, rows: int) -> tuple[float, float]:
    """Per cent right on the rows to choose by, and on those to test."""
    validation, test = (100 * float((model(X).argmax(1) == y).float().mean()) for X, y in images(rows)[1:])
    return validation, test


class _Epochs:
    """Other batches in every pass."""

    def __init__(self, epochs: list[list[Part]]) -> None:
        self.epochs, self.passes = epochs, 0

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.epochs[(self.passes - 1) % len(self.epochs)])


def _loss(model: nn.Module, batch: Part) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
