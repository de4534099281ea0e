"""The same jobs over a Ray cluster: learning from sums that can be added, and scoring.

A data set is cut into slices of rows. Workers (Ray Data's streaming executor, an actor a core) open it by its name,
send their slices through the backbone, and make either a learner of the slice or its labels. Learners of slices are
added up eight at a time, in a tree. What a slice gives does not depend on who works on it, or how often: a worker that
is lost costs its slice once more, and the result is that of one process, to rounding.

It works on ``ray.init()`` on one machine and on a running cluster by its address; data, and backbones that are folders,
must be there under the same name on every node.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Scored", "Source", "learn", "predict", "tree_merge"]

FAN_IN = 8  # learners that are added up at a time
MERGEABLE = ("GACIL", "TEEN")

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Source:
    """A data set as every worker opens it.

    Attributes
    ----------
    data, split : as `shoestring.data.load` takes them
    content, label : columns, as `shoestring.data.features.find_columns` takes them
    backbone : name or folder of the encoder, or None for features
    device : of the backbone
    """

    data: str
    split: str = "train"
    content: str | None = None
    label: str | None = None
    backbone: str | None = None
    device: str = "cpu"

    @cached_property
    def rows(self) -> Any:
        from shoestring.data import load

        return load(self.data, split=self.split)

    def chunks(self, positions: Sequence[int] | np.ndarray, size: int = 256) -> Iterator[Any]:
        """Chunks of features of these rows."""
        from shoestring.data.features import chunks, find_columns

        columns = find_columns(self.rows, self.content, self.label)
        yield from chunks(self.rows.select(positions), columns, self._encoder, size=size)

    @cached_property
    def _encoder(self) -> Any:
        from shoestring import backbones

        return None if self.backbone is None else backbones.load(self.backbone, device=self.device)


@dataclass(frozen=True)
class Scored:
    """Labels for the rows that could be read, in their order.

    Attributes
    ----------
    positions : ndarray of int64, which rows
    row_names : list of str, the file of an image, else "row 17"
    labels : ndarray, of the highest probability
    probabilities : ndarray of float, of that label
    given : ndarray of the labels that the data set has, or None
    skipped : list of (name, reason), rows that could not be read
    """

    positions: np.ndarray
    row_names: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    given: np.ndarray | None
    skipped: list[tuple[str, str]]


def learn(
    source: Source,
    learner: Any,
    *,
    positions: np.ndarray | None = None,
    rows_per_slice: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> tuple[Any, list[tuple[str, str]]]:
    """Teach a learner all rows of a data set, on all workers.

    Parameters
    ----------
    source : Source
        Must have labels.
    learner : GACIL or TEEN
        Untaught, or taught already: then the rows come on top. It is not changed. (TEEN: name its ``base_classes``,
        which are otherwise those of the first chunk, and with many workers there is no first.)
    positions : ndarray of int64, optional
        Which rows. Default: all.
    rows_per_slice : int, optional
        Default: four slices a core, of 256 to 8192 rows.
    address : str, optional
        Of a running cluster. Default: the one this process is connected to, else one is begun on this machine.
    progress : callable, optional
        Called with the share done and a text.

    Returns
    -------
    learner
        A new one, with the rows added: equal to one that was taught them in one process, to rounding.
    skipped : list of (name, reason)
        Rows that could not be read.

    Raises
    ------
    TypeError, ValueError
        If the learner cannot be merged, or the data set has no rows or no labels.
    """
    kind = type(learner)
    if kind.__name__ not in MERGEABLE:
        raise TypeError(f"learner must be one of {', '.join(MERGEABLE)}, whose sums can be added, got {kind.__name__}")
    if kind.__name__ == "TEEN" and learner.base_classes is None and not learner.__sklearn_is_fitted__():
        raise ValueError("learner must have base_classes: which worker's rows come first is chance")
    from sklearn.base import clone

    from shoestring.data.features import find_columns

    if find_columns(source.rows, source.content, source.label).label is None:
        raise ValueError(f"{source.data} has no labels to learn")
    if rows_per_slice is not None and rows_per_slice < 1:
        raise ValueError(f"rows_per_slice must be >= 1, got {rows_per_slice}")
    ray = _connected(address)
    work = (kind, clone(learner).get_params())
    made = _over_slices(ray, source, _Learn, work, positions, rows_per_slice)
    slices = made.count_of_slices
    while slices > FAN_IN:
        made.data = made.data.map_batches(_merge_batch, batch_size=FAN_IN, fn_kwargs={"kind": kind})
        slices = -(-slices // FAN_IN)
    parts, skipped, done = [], [], 0
    for row in made.data.iter_rows():
        parts.append(row["model"])
        skipped += json.loads(row["skipped"])
        done += int(row["rows"])
        _report(progress, done, made.total)
    learnt = tree_merge([part for part in parts if part], kind)
    if learnt is None:
        raise ValueError(f"{source.data}: not one row could be read")
    if learner.__sklearn_is_fitted__():
        learnt = tree_merge([_dump(learner), _dump(learnt)], kind)
    return learnt, [(name, reason) for name, reason in skipped]


def predict(
    source: Source,
    learner: Any,
    *,
    rows_per_slice: int | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Label all rows of a data set, on all workers.

    Parameters are those of `learn`; the learner is any of the room that has ``save`` and ``predict_proba``.
    """
    ray = _connected(address)
    stored = ray.put(_dump(learner))
    made = _over_slices(ray, source, _Predict, (type(learner), stored), None, rows_per_slice)
    parts, done = [], 0
    for row in made.data.iter_rows():
        parts.append((int(row["start"]), row["positions"], row["best"], row["probability"], json.loads(row["told"])))
        done += int(row["rows"])
        _report(progress, done, made.total)
    parts.sort(key=lambda part: part[0])
    positions, best, probabilities = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    names, given, skipped = ([one for part in parts for one in part[4][key]] for key in ("names", "given", "skipped"))
    return Scored(
        positions,
        names,
        learner.classes_[best],
        probabilities,
        np.array(given) if given else None,
        [(name, reason) for name, reason in skipped],
    )


def tree_merge(parts: Sequence[bytes], kind: Any) -> Any:
    """Add up learners saved as bytes, pairwise; None for none.

    Examples
    --------
    >>> from shoestring.learn import TEEN
    >>> models = [TEEN(base_classes=[0]).fit([[float(i), 1.0]], [0]) for i in range(5)]
    >>> tree_merge([_dump(model) for model in models], TEEN).class_count_
    array([5])
    """
    models = [_load(kind, part) for part in parts]
    while len(models) > 1:
        pairs = [models[i : i + 2] for i in range(0, len(models), 2)]
        models = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return models[0] if models else None


# ---- what workers do


class _Learn:
    """An actor: slices of rows to learners of them."""

    def __init__(self, source: Source, work: tuple[Any, dict[str, Any]]) -> None:
        _one_thread()
        self.source, (self.kind, self.params) = source, work

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        out: dict[str, list[Any]] = {"model": [], "rows": [], "skipped": []}
        for positions in batch["positions"]:
            model, skipped = self.kind(**self.params), []
            for chunk in self.source.chunks(positions):
                skipped += chunk.skipped
                if len(chunk.names):
                    model.partial_fit(chunk.X, chunk.y)
            out["model"].append(_dump(model) if model.__sklearn_is_fitted__() else b"")
            out["rows"].append(len(positions))
            out["skipped"].append(json.dumps(skipped))
        return out


class _Predict:
    """An actor: slices of rows to their labels."""

    def __init__(self, source: Source, work: tuple[Any, Any]) -> None:
        import ray

        _one_thread()
        kind, stored = work
        self.source, self.model = source, _load(kind, ray.get(stored))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        out: dict[str, list[Any]] = {name: [] for name in ("start", "positions", "best", "probability", "rows", "told")}
        for positions in batch["positions"]:
            read, best, probability = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
            told: dict[str, list[Any]] = {"names": [], "given": [], "skipped": []}
            for chunk in self.source.chunks(positions):
                told["skipped"] += chunk.skipped
                if not len(chunk.names):
                    continue
                proba = self.model.predict_proba(chunk.X)
                rows = positions[chunk.positions]
                read.append(rows)
                best.append(proba.argmax(1))
                probability.append(proba.max(1))
                own = [name == f"row {i}" for name, i in zip(chunk.names, chunk.positions, strict=True)]
                told["names"] += [
                    f"row {row}" if number else name for name, number, row in zip(chunk.names, own, rows, strict=True)
                ]
                told["given"] += [] if chunk.y is None else chunk.y.tolist()
            out["start"].append(positions[0])
            out["positions"].append(np.concatenate(read))
            out["best"].append(np.concatenate(best))
            out["probability"].append(np.concatenate(probability))
            out["rows"].append(len(positions))
            out["told"].append(json.dumps(told))
        return out


def _merge_batch(batch: dict[str, Any], kind: Any) -> dict[str, Any]:
    _one_thread()
    merged = tree_merge([part for part in batch["model"] if part], kind)
    skipped = [one for part in batch["skipped"] for one in json.loads(part)]
    return {
        "model": [b"" if merged is None else _dump(merged)],
        "rows": [batch["rows"].sum()],
        "skipped": [json.dumps(skipped)],
    }


# ---- inside


@dataclass
class _Sliced:
    data: Any  # ray.data.Dataset
    count_of_slices: int
    total: int


def _over_slices(
    ray: Any, source: Source, actor: Any, work: Any, positions: np.ndarray | None, rows_per_slice: int | None
) -> _Sliced:
    rows = np.arange(len(source.rows)) if positions is None else np.asarray(positions, dtype=np.int64)
    if not len(rows):
        raise ValueError(f"{source.data}: there are no rows")
    cores = int(ray.cluster_resources().get("CPU", 1))
    size = rows_per_slice or int(np.clip(-(-len(rows) // (4 * cores)), 256, 8192))
    items = [{"positions": part} for part in np.split(rows, range(size, len(rows), size))]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    workers = min(cores, len(items))
    mapped = data.map_batches(
        actor,
        batch_size=1,
        fn_constructor_args=(source, work),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    return _Sliced(mapped, len(items), len(rows))


def _connected(address: str | None) -> Any:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ImportError("jobs on a cluster need ray: pip install 'shoestring[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # or every job would tell of its plan, on stderr
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done / total, f"{done:,} of {total:,} rows")


def _one_thread() -> None:
    """A worker a core, and a thread a worker."""
    import torch

    torch.set_num_threads(1)


def _dump(model: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        model.save(path)
        return path.read_bytes()


def _load(kind: Any, saved: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        path.write_bytes(saved)
        return kind.load(path)
