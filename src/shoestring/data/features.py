"""From a data set to chunks of (features, labels): the one way rows reach a learner."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from shoestring.backbones import Backbone

__all__ = ["Chunk", "Columns", "chunks", "find_columns", "label_column", "row_hashes"]


@dataclass(frozen=True)
class Columns:
    """Which column of a data set is what.

    Attributes
    ----------
    kind : "features", "image" or "text"
    content : name of that column
    label : name of the label column, or None
    """

    kind: str
    content: str
    label: str | None


@dataclass(frozen=True)
class Chunk:
    """Some rows as features.

    Attributes
    ----------
    X : ndarray of shape (n, d), float32
    y : ndarray of shape (n,), class names or numbers, or None
    names : list of n str, the file of an image, else "row 17"
    positions : ndarray of shape (n,), int64, which rows of the data set these are
    skipped : list of (name, reason), the rows that could not be read
    hashes : ndarray of shape (n, 16), uint8, what the rows hold, as `row_hashes`; None where nobody asked
    """

    X: np.ndarray
    y: np.ndarray | None
    names: list[str]
    positions: np.ndarray
    skipped: list[tuple[str, str]]
    hashes: np.ndarray | None = None


def find_columns(rows: Any, content: str | None = None, label: str | None = None) -> Columns:
    """Tell the columns of a data set apart by their type and name.

    Parameters
    ----------
    rows : datasets.Dataset or datasets.IterableDataset
    content : column of features, images or texts; by default the only one of its kind, features before images
        before text
    label : label column; by default ``y``, ``label``, ``labels`` or the only column of class labels, if there is one

    Raises
    ------
    ValueError
        If a named column does not exist or nothing in the data set can be learnt from.

    Examples
    --------
    >>> from shoestring.data import load
    >>> find_columns(load("fashion", split="test"))
    Columns(kind='image', content='image', label='label')
    """
    features = rows.features or {}
    for name in (content, label):
        if name is not None and name not in features:
            raise ValueError(f"there is no column {name!r}; columns are {', '.join(features) or 'unknown'}")
    label = label or label_column(features, content)
    kinds = {name: _kind(feature) for name, feature in features.items() if name != label}
    if content is not None:
        if kinds.get(content) is None:
            raise ValueError(f"column {content!r} holds neither features nor images nor text")
        return Columns(kinds[content] or "", content, label)
    for kind in ("features", "image", "text"):
        found = [name for name, k in kinds.items() if k == kind]
        if len(found) > 1 and kind != "features":
            raise ValueError(f"several columns hold {kind}: {', '.join(found)}; say which")
        if found:
            return Columns(kind, "X" if "X" in found else found[0], label)
    raise ValueError(f"no column holds features, images or text; columns are {', '.join(features) or 'unknown'}")


def label_column(features: Any, content: str | None = None) -> str | None:
    """``y``, ``label``, ``labels`` or the only column of class labels, other than `content`; None if there is none."""
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("y", "label", "labels") if name in features and name != content]
    return next(iter(usual or (classes if len(classes) == 1 else [])), None)


def chunks(
    rows: Any,
    columns: Columns,
    backbone: Backbone | None = None,
    *,
    size: int = 256,
    strict: bool = False,
    known: Callable[[np.ndarray], bool] | None = None,
) -> Iterator[Chunk]:
    """Walk through a data set in chunks of features.

    Parameters
    ----------
    rows : datasets.Dataset or datasets.IterableDataset
    columns : as `find_columns` says
    backbone : frozen encoder; needed unless columns.kind is "features"
    size : rows a chunk
    strict : raise at the first image that does not decode, instead of skipping and naming it
    known : is asked with the `row_hashes` of each chunk, rows that cannot be read included; a chunk for which it says
        True is left out, before the backbone

    Raises
    ------
    ValueError
        If the backbone is missing or of the wrong kind, or, if `strict`, for an image that does not decode.
    """
    if columns.kind != "features":
        if backbone is None:
            raise ValueError(f"column {columns.content!r} holds {columns.kind}: a backbone is needed")
        if backbone.kind != columns.kind:
            raise ValueError(
                f"backbone {backbone.name} takes {backbone.kind}, column {columns.content!r} is {columns.kind}"
            )
    before = 0
    for items, labels in _parts(rows, columns, size):
        hashes = None if known is None else _hash(items, labels, columns.kind)
        if known is None or not known(hashes):  # type: ignore[arg-type]
            names = [_name(item, before + i) for i, item in enumerate(items)]
            kept, X, skipped = _features(items, columns.kind, backbone, names, strict)
            y = None if labels is None else labels[kept]
            asked = None if hashes is None else hashes[kept]
            yield Chunk(X, y, [names[i] for i in kept], before + kept, skipped, asked)
        before += len(items)


def row_hashes(rows: Any, columns: Columns, size: int = 1024) -> Iterator[np.ndarray]:
    """Walk through a data set as `chunks` does, and tell rows by what they hold: no backbone is needed.

    A hash is BLAKE2b over the label and the features (as float32), the encoded image or the text; not over names or
    places, so that a copy of a file has the same.

    Yields
    ------
    ndarray of shape (n, 16), uint8

    Examples
    --------
    >>> from shoestring.data import load
    >>> rows = load("kjv", split="train[:3]")
    >>> [part.shape for part in row_hashes(rows, find_columns(rows, "text"), size=2)]
    [(2, 16), (1, 16)]
    """
    for items, labels in _parts(rows, columns, size):
        yield _hash(items, labels, columns.kind)


def _parts(rows: Any, columns: Columns, size: int) -> Iterator[tuple[Any, np.ndarray | None]]:
    """The raw contents of `size` rows at a time, and their labels: class names or numbers."""
    import datasets

    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    int2str = getattr((rows.features or {}).get(columns.label), "int2str", None)
    rows = rows.select_columns([name for name in (columns.content, columns.label) if name is not None])
    if columns.kind == "image":
        rows = rows.cast_column(columns.content, datasets.Image(decode=False))
    rows = rows.with_format("numpy" if columns.kind == "features" else None)
    for part in rows.iter(size):
        labels = None if columns.label is None else part[columns.label]
        yield (
            part[columns.content],
            None if labels is None else np.asarray(int2str(list(labels)) if int2str else labels),
        )


def _hash(items: Any, labels: np.ndarray | None, kind: str) -> np.ndarray:
    if kind == "features":
        items = np.ascontiguousarray(items, dtype=np.float32)
    named = [""] * len(items) if labels is None else [f"{labels.dtype.kind}{label}" for label in labels.tolist()]
    found = bytearray()
    for item, label in zip(items, named, strict=True):
        hashed = hashlib.blake2b(f"{kind} {len(label)} {label} ".encode(), digest_size=16)
        for piece in _content(item, kind):
            hashed.update(piece)
        found += hashed.digest()
    return np.frombuffer(found, np.uint8).reshape(len(items), 16)


def _content(item: Any, kind: str) -> Iterator[Any]:
    """What a row holds, in pieces."""
    if kind == "features":
        yield item.data
    elif kind == "text":
        yield str(item).encode()
    elif item is None:
        return
    elif item["bytes"] is not None:
        yield item["bytes"]
    else:
        try:
            with open(item["path"], "rb") as file:
                while piece := file.read(1 << 20):
                    yield piece
        except OSError:  # the backbone will say so
            yield item["path"].encode()


def _features(
    items: Any, kind: str, backbone: Backbone | None, names: list[str], strict: bool
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Positions kept, their features, and (name, reason) of the others."""
    if kind == "features":
        return np.arange(len(items)), np.asarray(items, dtype=np.float32), []
    assert backbone is not None
    broken: list[tuple[str, str]] = []
    parts = list(backbone.extract_batches(items, skipped=None if strict else broken))
    kept = np.concatenate([np.empty(0, np.int64), *(positions for positions, _ in parts)])
    X = np.concatenate([np.empty((0, backbone.dim), np.float32), *(features for _, features in parts)])
    left_out = np.setdiff1d(np.arange(len(items)), kept)
    return kept, X, [(names[i], reason) for i, (_, reason) in zip(left_out, broken, strict=True)]


def _kind(feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Value):
        return "text" if feature.dtype in ("string", "large_string") else None
    inner = getattr(feature, "feature", None)  # a list of something
    if isinstance(inner, datasets.Value) and inner.dtype.startswith(("float", "int", "uint")):
        return "features"
    return None


def _name(item: Any, number: int) -> str:
    path = item.get("path") if isinstance(item, dict) else None
    return path or f"row {number}"
