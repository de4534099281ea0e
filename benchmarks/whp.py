"""WHP's labels and its form without training against plain code, as ratios in one run; tiny-gpt and Esther.

1. Labels of `WHPUnlearner.label` without a dictionary against the equations written out, two models and an argmax:
   share of labels that differ (limit 0), time over that of the two forward passes (limit 1.3).
2. With a dictionary, which needs a third forward pass and an alignment: time over that of the three (limit 1.5).
3. Generation with `ReinforcedLogitsProcessor` against generation by the baseline twice, both with key-value caches
   (limit 1.2), and against muse_bench's way, the reinforced model reading the whole text at each step (limit 0.8).

    python benchmarks/whp.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from datasets import Dataset
from torch import Tensor

from shoestring import zoo
from shoestring.claims.forget.whp import NAMES
from shoestring.forget._token_rows import pad_rows
from shoestring.forget.whp import ReinforcedLogitsProcessor, WHPUnlearner, generic_logits
from shoestring.zoo.train import tiny_gpt

BATCH = 8


def esther(count: int) -> Dataset:
    texts = [text for source, text in tiny_gpt.documents("train") if source == tiny_gpt.MEMORISED][:count]
    return Dataset.from_dict({"input_ids": zoo.load("tiny-gpt", "tokenizer")(texts).input_ids})


def reinforced(rows: Dataset) -> Any:
    whp = WHPUnlearner(zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer"), accumulate=1)
    return whp.reinforce(rows.select(range(BATCH)), epochs=2, lr=3e-4, progress=False)


def labels(count: int, repeats: int) -> None:
    rows = esther(count)
    model, tokenizer, other = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer"), reinforced(rows)
    plain, named = (WHPUnlearner(model, tokenizer, anchors, alpha=5.0, batch_size=BATCH) for anchors in (None, NAMES))
    plain.reinforced = named.reinforced = other
    ids = rows["input_ids"][:]
    batches = [pad_rows([{"input_ids": row} for row in ids[i : i + BATCH]]) for i in range(0, count, BATCH)]
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]

    @torch.no_grad()
    def forwards(*models: Any) -> None:
        for each in models:
            for batch in inputs:
                each(**batch)

    found = plain.label(rows)["labels"][:]
    differ = total = 0
    for i, batch in enumerate(inputs):
        with torch.no_grad():
            v_b, v_r = model(**batch).logits, other(**batch).logits
        said = torch.where(v_r > v_b, v_b - 5.0 * (v_r - v_b), v_b).argmax(-1)
        for row, labels_ in zip(said, found[i * BATCH : (i + 1) * BATCH], strict=True):
            expected = row[: len(labels_) - 1].tolist()
            differ += sum(a != b for a, b in zip(labels_[1:], expected, strict=True))
            total += len(expected)
    report("labels that differ from the equations written out, share", differ / total, 0.0)
    s = race(
        repeats,
        plain=lambda: plain.label(rows),
        two=lambda: forwards(model, other),
        named=lambda: named.label(rows),
        three=lambda: forwards(model, other, model),
    )
    print(f"{count} documents: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in s.items())}")
    report("labelling / two forward passes", s["plain"] / s["two"], 1.3)
    report("labelling with a dictionary / three forward passes", s["named"] / s["three"], 1.5)


def generation(prompt: int, tokens: int, repeats: int) -> None:
    rows = esther(BATCH)
    model, other = zoo.load("tiny-gpt"), reinforced(rows)
    ids = torch.tensor([row[:prompt] for row in rows["input_ids"][:] if len(row) >= prompt][:4])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}

    @torch.no_grad()
    def whole(input_ids: Tensor, scores: Tensor) -> Tensor:
        return generic_logits(scores, other(input_ids).logits[:, -1])

    def said(*processors: Any) -> Tensor:
        return model.generate(ids, logits_processor=[*processors], **options)

    fast = said(ReinforcedLogitsProcessor(other))
    report("tokens that differ with and without a cache, share", float((fast != said(whole)).double().mean()), 0.0)
    s = race(
        repeats,
        processor=lambda: said(ReinforcedLogitsProcessor(other)),
        twice=lambda: (said(), other.generate(ids, **options)),
        whole=lambda: said(whole),
    )
    print(f"{tokens} tokens after {prompt}: {', '.join(f'{name} {1000 * t:.0f} ms' for name, t in s.items())}")
    report("generation with the reinforced model / generation twice", s["processor"] / s["twice"], 1.2)
    report("generation with its cache / reading the whole text each time", s["processor"] / s["whole"], 0.8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    if parser.parse_args().quick:
        labels(8, 1)
        generation(64, 16, 1)
    else:
        labels(24, 5)
        generation(96, 64, 5)
        record("whp", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
