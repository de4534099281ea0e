"""Reading batches so that several processes share them, and so that a run can go on in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast_object_list, honor_type
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler


class Reader:
    """The batches of one epoch after another, of each the share of process number `rank` of `world`.

    A DataLoader over a map-style dataset is skipped and shared by its indices, so that nothing is loaded in vain; its
    order is that of process 0. Any other iterable is read in full by every process, which must find the same order.
    """

    def __init__(self, batches: Iterable[Any], rank: int = 0, world: int = 1) -> None:
        self.batches, self.rank, self.world = batches, rank, world
        parts = [batches, *(getattr(batches, name, None) for name in ("dataset", "sampler", "batch_sampler"))]
        parts.append(getattr(parts[-1], "sampler", None))
        self._parts = list({id(part): part for part in parts if part is not None}.values())
        shared = (DistributedSampler, DataLoaderShard, DataLoaderDispatcher)
        if world > 1 and any(isinstance(part, shared) for part in self._parts):
            raise ValueError(
                "batches must not be shared between the processes yet (by a DistributedSampler, or by "
                "Accelerator.prepare): the loop does that itself"
            )
        self._planned: DataLoader[Any] | None = None

    def length(self) -> float:
        """Batches per epoch, infinity if unknown."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return math.inf

    def generators(self) -> list[torch.Generator]:
        """The generators that decide the order of the batches."""
        found = (getattr(part, "generator", None) for part in self._parts)
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers and datasets that want to know."""
        for part in self._parts:
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]

    def epoch(self) -> Iterator[Any]:
        """All batches of the next epoch."""
        if self.world == 1 and self._planned is None:
            return iter(self.batches)  # the caller's own loader, with its workers
        return self.rest_of_epoch(0)

    def rest_of_epoch(
        self, skip: int, start: Callable[[], None] | None = None, then: Callable[[], None] | None = None
    ) -> Iterator[Any]:
        """The batches from number `skip` on.

        `start` is called before the order is drawn, `then` between finding the place in it and reading on.
        """
        if not isinstance(self.batches, DataLoader) or self.batches.batch_sampler is None:
            return self._rest_in_full(skip, then)
        if self._planned is None:
            self._planned = _with_plan(self.batches, _Plan(self.batches.batch_sampler, self.rank, self.world))
        plan: _Plan = self._planned.batch_sampler  # type: ignore[assignment]
        plan.skip, plan.start, plan.then = skip, start, then
        return iter(self._planned)

    def _rest_in_full(self, skip: int, then: Callable[[], None] | None) -> Iterator[Any]:
        batches = iter(self.batches)
        for _ in islice(batches, skip):
            pass
        if then:
            then()
        yield from batches if self.world == 1 else (share(batch, self.rank, self.world) for batch in batches)


class _Plan:
    """A batch sampler that yields this process's share of another one's index lists."""

    def __init__(self, batch_sampler: Iterable[list[Any]], rank: int, world: int) -> None:
        self.batch_sampler, self.rank, self.world = batch_sampler, rank, world
        self.skip = 0
        self.start: Callable[[], None] | None = None
        self.then: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[list[Any]]:
        if self.start:
            self.start()
        batches = iter(self.batch_sampler)
        if self.world > 1:  # process 0 decides, whatever the sampler draws from
            box = [list(batches) if self.rank == 0 else None]
            batches = iter(broadcast_object_list(box)[0])
        for _ in islice(batches, self.skip):
            pass
        if self.then:
            self.then()
        for indices in batches:
            yield indices if self.world == 1 else [indices[i] for i in rows(len(indices), self.rank, self.world)]

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]


def _with_plan(loader: DataLoader[Any], plan: _Plan) -> DataLoader[Any]:
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["generator", "prefetch_factor", "persistent_workers"]
    options = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, batch_sampler=plan, **options)


def rows(length: int, rank: int, world: int) -> list[int]:
    """Indices of the `rank`-th of `world` equal parts of ``range(length)``, which is padded with its own start.

    Examples
    --------
    >>> rows(6, 0, 2), rows(6, 1, 2)
    ([0, 1, 2], [3, 4, 5])
    >>> rows(5, 1, 2)
    [3, 4, 0]
    """
    size = -(-length // world)
    return [i % length for i in range(rank * size, (rank + 1) * size)]


def share(batch: Any, rank: int, world: int) -> Any:
    """The `rank`-th of `world` equal parts of the rows of every tensor, array and list of plain values in `batch`.

    Examples
    --------
    >>> share({"x": torch.arange(4), "text": ["a", "b", "c", "d"], "k": 3}, 1, 2)
    {'x': tensor([2, 3]), 'text': ['c', 'd'], 'k': 3}
    """
    if isinstance(batch, Tensor | np.ndarray):
        return batch[rows(len(batch), rank, world)] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: share(value, rank, world) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        if batch and all(isinstance(value, str | bytes | int | float) for value in batch):
            return type(batch)([batch[i] for i in rows(len(batch), rank, world)])
        return honor_type(batch, (share(value, rank, world) for value in batch))
    return batch
