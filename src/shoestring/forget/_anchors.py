"""Anchored terms: their translation in a text, and which token of the text stands where in the translation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Span = tuple[int, int, int, int]  # start and end in the text, start and end in the translation, in characters


@dataclass
class Block:
    """Token ids x of a block and x~ of its translation, with what the labels need to know.

    Attributes
    ----------
    ids, translated : token ids, T and T~ of them, special tokens among them
    aligned : (T,) int64, a(t): the place in `translated` for each place in `ids`, -1 for none
    unlabelled : places in `ids` that are not to be predicted: parts of a term which stood in the block before
    lowered : (place, token ids): from that place on these tokens, which begin a translation, are made less likely
    """

    ids: list[int]
    translated: list[int]
    aligned: np.ndarray
    unlabelled: list[int] = field(default_factory=list)
    lowered: list[tuple[int, list[int]]] = field(default_factory=list)


def translate(text: str, anchors: Mapping[str, str]) -> tuple[str, list[Span], list[str]]:
    """Replace terms, the longest first, where they stand as whole words; upper and lower case are kept apart.

    Returns
    -------
    str, list of spans, list of the terms found, in order

    Examples
    --------
    >>> translate("Haman's sons; Hamans", {"Haman": "Saul"})
    ("Saul's sons; Hamans", [(0, 5, 0, 4)], ['Haman'])
    """
    if not anchors:
        return text, [], []
    terms = sorted(anchors, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, terms))})(?!\w)")
    parts, spans, found, last, length = [], [], [], 0, 0
    for match in pattern.finditer(text):
        replacement = anchors[match[0]]
        parts += [text[last : match.start()], replacement]
        start = length + match.start() - last
        length = start + len(replacement)
        spans.append((match.start(), match.end(), start, length))
        found.append(match[0])
        last = match.end()
    return "".join([*parts, text[last:]]), spans, found


def align(ends: np.ndarray, translated_ends: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """a(t): the token of the translation that ends where token t ends; -1 inside of a replaced term, and if none does.

    The last token of a term is aligned with the last one of its translation: what follows is asked of both.

    Parameters
    ----------
    ends, translated_ends : (T,) and (T~,) int64, not falling
        Where the tokens end, in characters. Tokens that share a character (its bytes) are taken in their order.
    spans : as from `translate`

    Examples
    --------
    >>> align(np.array([2, 4, 7, 9]), np.array([2, 5, 7]), [(2, 7, 2, 5)])
    array([ 0, -1,  1,  2])
    """
    table = np.asarray(spans, dtype=np.int64).reshape(-1, 4)
    passed = np.searchsorted(table[:, 1], ends, side="right")  # terms that end at or before
    shift = np.concatenate([[0], table[:, 3] - table[:, 1]])[passed]
    next_start = np.append(table[:, 0], np.iinfo(np.int64).max)[passed]
    key = _key(ends, ends + shift)
    other = _key(translated_ends, translated_ends)
    place = np.searchsorted(other, key).clip(max=max(len(other) - 1, 0))
    known = (other[place] == key) & (ends <= next_start) if len(other) else np.zeros(len(ends), bool)
    return np.where(known, place, -1)


def blocks_of_text(text: str, tokenizer: Any, size: int, anchors: Mapping[str, str]) -> list[Block]:
    """The text in blocks of at most so many tokens, special tokens included."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(anchors))
    before, after = special_tokens(tokenizer)
    room = size - len(before) - len(after)
    if room < 2:
        raise ValueError(f"block_size must leave room for two tokens beside the special ones, got {size}")
    ids = encoded["input_ids"]
    ends = np.array([end for _, end in encoded["offset_mapping"]]) if anchors else None
    found = []
    for first in range(0, len(ids), room):
        part = slice(first, first + room)
        if ends is None:
            found.append(_plain(before + ids[part] + after))
            continue
        start = int(ends[first - 1]) if first else 0
        piece = text[start : int(ends[part][-1])]
        found.append(_block(before, ids[part], after, ends[part] - start, piece, tokenizer, anchors))
    return [block for block in found if len(block.ids) > 1]


def block_of_ids(ids: Sequence[int], tokenizer: Any, anchors: Mapping[str, str]) -> Block:
    """A row that is tokenized already.

    Raises
    ------
    ValueError
        If its text, tokenized again, is not the row: then terms cannot be found in it.
    """
    ids = [int(i) for i in ids]
    if not anchors:
        return _plain(ids)
    special = set(tokenizer.all_special_ids)
    first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    last = next((i for i in range(len(ids), first, -1) if ids[i - 1] not in special), first)
    text = tokenizer.decode(ids[first:last], clean_up_tokenization_spaces=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != ids[first:last]:
        raise ValueError(
            "rows must be of this tokenizer, each a whole text, to find anchors in them: pass texts instead"
        )
    ends = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    return _block(ids[:first], ids[first:last], ids[last:], ends, text, tokenizer, anchors)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    plain = [i for i, special in enumerate(mask) if not special]
    return ids[: plain[0]], ids[plain[-1] + 1 :]


def first_tokens(tokenizer: Any, term: str) -> list[int]:
    """The tokens that begin a term, after a space and without one; a token of white space alone is passed over."""
    found = []
    for text in (term, f" {term}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found += [next((i for i in ids if tokenizer.decode([i]).strip()), ids[0])]
    return sorted(set(found))


def _plain(ids: list[int]) -> Block:
    return Block(ids, ids, np.arange(len(ids)))


def _block(
    before: list[int],
    ids: list[int],
    after: list[int],
    ends: np.ndarray,
    text: str,
    tokenizer: Any,
    anchors: Mapping[str, str],
) -> Block:
    translated, spans, terms = translate(text, anchors)
    whole = before + ids + after
    if not spans:
        return _plain(whole)
    encoded = tokenizer(translated, add_special_tokens=False, return_offsets_mapping=True)
    middle = align(ends, np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64), spans)
    shifted = np.where(middle < 0, -1, middle + len(before))
    tail = len(before) + len(encoded["input_ids"]) + np.arange(len(after))
    block = Block(whole, before + encoded["input_ids"] + after, np.concatenate([np.arange(len(before)), shifted, tail]))
    seen: set[str] = set()
    for (start, end, _, _), term in zip(spans, terms, strict=True):
        last = len(before) + int(np.searchsorted(ends, end))  # the token that holds the term's last character
        if term in seen:
            block.unlabelled += range(len(before) + int(np.searchsorted(ends, start, side="right")), last + 1)
        else:
            seen.add(term)
            block.lowered.append((last, first_tokens(tokenizer, anchors[term])))
    return block


def _key(ends: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """One number for where a token ends and which of those that end there it is."""
    return moved * 64 + np.arange(len(ends)) - np.searchsorted(ends, ends)
