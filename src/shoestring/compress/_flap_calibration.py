"""What FLAP calibrates on: tensors, batches or texts, as the keyword arguments of forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

BATCH = 8  # sequences in a forward pass


def batches_of(
    calibration: Any, main: str, tokenizer: Any, length: int, most: int
) -> tuple[Iterator[dict[str, Tensor]], int]:
    """The batches, and how many they are, 0 if that is not known; `main` is the name of the model's main input."""
    total = len(calibration) if isinstance(calibration, list | tuple) else 0
    if isinstance(calibration, Tensor):
        if calibration.ndim == 1 and not calibration.is_floating_point():
            total = -(-min(most, len(calibration) // length) // BATCH)
            calibration = _windows([calibration.tolist()], length, most)
        elif calibration.ndim < 2:
            raise ValueError(f"calibration must be (sequences, length) or (tokens,), got {tuple(calibration.shape)}")
        else:
            calibration = calibration.split(BATCH) if len(calibration) else ()
            total = len(calibration)
    elif isinstance(calibration, str | Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be a tensor, or an iterable of tensors, dicts or texts, got {type(calibration).__name__}"
        )
    return _each(calibration, main, tokenizer, length, most), total if tokenizer is None else 0


def _each(items: Iterable[Any], main: str, tokenizer: Any, length: int, most: int) -> Iterator[dict[str, Tensor]]:
    iterator = iter(items)
    first = next(iterator, None)
    if first is None:
        raise ValueError("calibration is empty")
    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("calibration by texts needs a tokenizer, got None")
        texts = (text for part in ([first], iterator) for text in part)
        iterator = _windows((_ids(tokenizer, text) for text in texts), length, most)
        first = next(iterator)
    for item in (batch for part in ([first], iterator) for batch in part):
        if isinstance(item, Tensor):
            yield {main: item[None] if item.ndim == 1 else item}
        elif isinstance(item, Mapping):
            yield {key: value for key, value in item.items() if isinstance(value, Tensor) and key != "labels"}
        else:
            raise TypeError(f"calibration must hold tensors, dicts or texts, got {type(item).__name__}")


def _ids(tokenizer: Any, text: Any) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"calibration began with a text, got {type(text).__name__} after it")
    return tokenizer(text)["input_ids"]


def _windows(pieces: Iterable[list[int]], length: int, most: int) -> Iterator[Tensor]:
    """Batches of windows of joined tokens; what is left over at the end is dropped."""
    tokens: list[int] = []
    count = 0

    def windows() -> Iterator[list[int]]:
        nonlocal tokens
        for piece in pieces:
            tokens += piece
            whole = len(tokens) // length * length
            yield from (tokens[start : start + length] for start in range(0, whole, length))
            tokens = tokens[whole:]

    stream = islice(windows(), most)
    while batch := list(islice(stream, BATCH)):
        count += len(batch)
        yield torch.tensor(batch)
    if not count:
        raise ValueError(f"calibration must hold at least sequence_length = {length} tokens, got {len(tokens)}")
