"""Rows of token ids: what is checked of them before a model sees them, and how they become a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset

IGNORE = -100  # label of a position without a loss, as in transformers
Rows = Sequence[Mapping[str, Any]]

CHUNK = 10_000  # rows looked at in one go


def as_dataset(name: str, rows: Any) -> Dataset:
    """`rows` as a `datasets.Dataset` with a column input_ids; a list of dicts is made one.

    Raises
    ------
    TypeError, ValueError
        If they are something else, are none, or have no input_ids.
    """
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        rows = Dataset.from_list([dict(row) for row in rows])
    if not isinstance(rows, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset or a list of dicts, got {type(rows).__name__}")
    if not len(rows):
        raise ValueError(f"{name} must hold at least one row, got none")
    if "input_ids" not in rows.column_names:
        raise ValueError(f"{name} must have a column input_ids (tokenize the text first), got {rows.column_names}")
    return rows


def check_rows(name: str, rows: Dataset, model: nn.Module) -> None:
    """Raise unless `model` can read every row and every row holds a label to learn or to forget."""
    vocabulary, context = vocabulary_and_context(model)
    seen = 0
    for lengths, ids, labels in _columns(rows):
        starts = np.cumsum(lengths) - lengths
        _refuse(name, seen, lengths < 2, "must have at least two tokens, a first one and one to predict", lengths)
        if context is not None:
            what = f"must have at most {context} tokens, the model's context (tokenize with truncation)"
            _refuse(name, seen, lengths > context, what, lengths)
        highest, lowest = np.maximum.reduceat(ids, starts), np.minimum.reduceat(ids, starts)
        if vocabulary is not None:
            what = f"must have token ids below {vocabulary}, the model's vocabulary (is it the model's own tokenizer?)"
            _refuse(name, seen, highest >= vocabulary, what, highest)
        _refuse(name, seen, lowest < 0, "must have token ids >= 0", lowest)
        if labels is not None:
            if len(labels) != len(ids):
                raise ValueError(f"{name} must have as many labels as input_ids, got {len(labels)} and {len(ids)}")
            learnt = labels != IGNORE
            learnt[starts] = False  # nothing predicts the first token
            count = np.add.reduceat(learnt, starts, dtype=np.int64)
            _refuse(name, seen, count == 0, f"must have a label other than {IGNORE} after the first", count)
        seen += len(lengths)


def vocabulary_and_context(model: nn.Module) -> tuple[int | None, int | None]:
    """Rows of the input embedding, and the longest input, as far as the model says."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    config = getattr(model, "config", None)
    return getattr(embedding, "num_embeddings", None), getattr(config, "max_position_embeddings", None)


def warn_of_overlap(forget: Dataset, retain: Dataset, stacklevel: int = 3) -> int:
    """How many rows of `forget` are in `retain` too, to the token; a UserWarning if there are any."""
    kept = set(_keys(retain))
    shared = sum(key in kept for key in _keys(forget))
    if shared:
        warnings.warn(
            f"{shared} of {len(forget)} rows to forget are among the rows to retain: the two pull against each other",
            UserWarning,
            stacklevel=stacklevel,
        )
    return shared


def pad_rows(rows: Rows, pad_token_id: int = 0) -> dict[str, Tensor]:
    """One batch of input_ids, attention_mask and labels, (B, T) int64, padded on the right; other columns are left out.

    Without attention_mask all tokens count, without labels all of these are labels. A padded position has label -100.

    Examples
    --------
    >>> batch = pad_rows([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 7], [8, 9, 0]], [[5, 6, 7], [8, 9, -100]])
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    masks = [torch.as_tensor(row.get("attention_mask", torch.ones_like(i))) for row, i in zip(rows, ids, strict=True)]
    labels = [torch.as_tensor(row.get("labels", i), dtype=torch.int64) for row, i in zip(rows, ids, strict=True)]
    mask = pad_sequence([m.to(torch.int64) for m in masks], batch_first=True)
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE).masked_fill(mask == 0, IGNORE),
    }


class ForgetRetainPairs(TorchDataset[dict[str, Any]]):
    """Each row to forget, with a row to retain that is drawn anew in every epoch.

    Parameters
    ----------
    forget, retain : sequences of rows; retain may be None
    ref_nll : tensor of shape (len(forget),), optional
        Cached `sequence_nll` of the reference.
    seed : int, default 0
        The draw is a function of seed, epoch and row alone, so a run that is resumed sees the same pairs.

    Examples
    --------
    >>> pairs = ForgetRetainPairs([{"input_ids": [1, 2]}], [{"input_ids": [3, 4]}])
    >>> pairs[0]
    {'forget': {'input_ids': [1, 2]}, 'retain': {'input_ids': [3, 4]}}
    """

    def __init__(self, forget: Any, retain: Any = None, *, ref_nll: Tensor | None = None, seed: int = 0) -> None:
        self.forget, self.retain, self.ref_nll, self.seed = forget, retain, ref_nll, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of this epoch."""
        if self.retain is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.partners = torch.randint(len(self.retain), (len(self.forget),), generator=generator)

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, i: int) -> dict[str, Any]:
        pair = {"forget": self.forget[i]}
        if self.ref_nll is not None:
            pair["forget"] = {**pair["forget"], "ref_nll": self.ref_nll[i]}
        if self.retain is not None:
            pair["retain"] = self.retain[int(self.partners[i])]
        return pair


class CollatePairs:
    """{"forget": batch, "retain": batch} of pairs; of plain rows (evaluation), a batch."""

    def __init__(self, collate: Callable[[Rows], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: Rows) -> dict[str, Any]:
        if "forget" not in rows[0]:
            return self.collate(rows)
        forget = [{name: cell for name, cell in row["forget"].items() if name != "ref_nll"} for row in rows]
        batch: dict[str, Any] = {"forget": self.collate(forget)}
        if "ref_nll" in rows[0]["forget"]:
            batch["forget"]["ref_nll"] = torch.stack([row["forget"]["ref_nll"] for row in rows])
        if "retain" in rows[0]:
            batch["retain"] = self.collate([row["retain"] for row in rows])
        return batch


class Pad:
    """`pad_rows` with its option, as an object that travels to the workers of a data loader."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        return pad_rows(rows, self.pad_token_id)


def _columns(rows: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Lengths of the rows, all their token ids and all their labels, one chunk of rows after another."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = [column for column in ("input_ids", "labels") if column in rows.column_names]
    for table in rows.select_columns(kept).with_format("arrow").iter(CHUNK):
        flat = {}
        for column in kept:
            cells = pa.concat_arrays(table[column].chunks)
            flat[column] = pc.list_flatten(cells).to_numpy(zero_copy_only=False)
            if column == "input_ids":
                lengths = pc.list_value_length(cells).to_numpy(zero_copy_only=False).astype(np.int64)
        yield lengths, flat["input_ids"], flat.get("labels")


def _keys(rows: Dataset) -> Iterator[bytes]:
    for lengths, ids, _ in _columns(rows):
        yield from (part.astype(np.int64).tobytes() for part in np.split(ids, np.cumsum(lengths)[:-1]))


def _refuse(name: str, before: int, bad: np.ndarray, what: str, got: np.ndarray) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{name} {what}; row {before + row} has {got[row]}")
