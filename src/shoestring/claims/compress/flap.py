"""FLAP against magnitude-sp, Wanda-sp and itself without its parts, on a small Llama and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoestring import zoo
from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.compress.flap import ColumnStats, column_statistics, flap_prune
from shoestring.zoo.train.tiny_gpt import documents, perplexity

CLAIM = (
    "Without any retraining, removing heads and neurons by fluctuation, over all layers at once, with a bias in their "
    "place, leaves a better language model than Wanda-sp and magnitude of the same size (LLaMA-7B, WikiText-2, dense "
    "12.62; at 20 %: Wanda-sp 22.12, FLAP 14.62; at 50 %: 366.43 and 31.80)."
)
RULE = (
    "Mean perplexity over calibration seeds at 10, 20, 30 and 50 %. holds: at all four FLAP AL-AM is below Wanda-sp, "
    "magnitude-sp, FLAP without bias and FLAP UL-UM in the mean, and below Wanda-sp and magnitude-sp for every seed. "
    "partly: below Wanda-sp and magnitude-sp in the mean at three of the four. Otherwise: not at this scale."
)
FLAP, UNIFORM, BARE, WANDA, MAGNITUDE = "FLAP AL-AM", "FLAP UL-UM", "FLAP without bias", "Wanda-sp", "magnitude-sp"
RATIOS = (0.1, 0.2, 0.3, 0.5)
PAPER = {
    (WANDA, 0.2): 22.12,
    (FLAP, 0.2): 14.62,
    (WANDA, 0.3): 38.88,
    (FLAP, 0.3): 17.62,
    (WANDA, 0.5): 366.43,
    (FLAP, 0.5): 31.80,
}
PERPLEXITY, LEFT, MEANS = "perplexity", "parameters of the blocks left", "squared mean over mean square of inputs"


def magnitude(W: torch.Tensor, stats: ColumnStats) -> torch.Tensor:
    return torch.linalg.vector_norm(W, dim=0)


PLAIN: dict[str, Any] = {"structure": "UL-UM", "bias": False, "attn_power": 1}
ARMS: dict[str, dict[str, Any]] = {
    FLAP: {},
    UNIFORM: {"structure": "UL-UM"},
    BARE: {"bias": False},
    WANDA: {"metric": "WIFN", **PLAIN},
    MAGNITUDE: {"metric": magnitude, **PLAIN},
}


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    ratios = (0.2, 0.5) if fast else RATIOS
    size = {"sequences": 16, "characters": 6_000} if fast else {"sequences": 128, "characters": 30_000}
    runs = [(seed, ratio, size) for seed in range(seeds) for ratio in ratios]
    found = run_all(figures, runs, progress, "calibration seeds and ratios", processes=1 if fast else None)
    rows = [Row.of("dense", PERPLEXITY, [found[0]["dense"][0]], paper=12.62)]
    for ratio in ratios:
        setting = f"{ratio:.0%}"
        for arm in ARMS:
            of_arm = [f[arm] for (_, r, _), f in zip(runs, found, strict=True) if r == ratio]
            rows.append(Row.of(arm, PERPLEXITY, [p for p, _ in of_arm], setting=setting, paper=PAPER.get((arm, ratio))))
            rows.append(Row.of(arm, LEFT, [100 * left for _, left in of_arm], unit="%", setting=setting))
    for kind in ("attention output", "MLP down"):
        rows.append(
            Row.of(
                kind, MEANS, [100 * f[kind][0] for (_, r, _), f in zip(runs, found, strict=True) if r == 0.2], unit="%"
            )
        )
    progress(1.0, "done")
    return Result(
        slug="flap",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="King James Bible and WordNet glosses (bundles kjv, glosses): calibrated on documents that zoo model "
        f"tiny-gpt was trained on, {size['sequences']} sequences of 128 tokens; perplexity of about "
        f"{size['characters']:,} characters of held-out documents",
        note="Nothing is tuned: no method has a hyper-parameter here but the ratio. All arms lose the same share of "
        "the blocks' parameters. Wanda-sp is WIFN, uniform, without bias; unlike its authors' code it takes the "
        "statistics of the unpruned model, as FLAP does. The model has 8 heads in 4 key-value groups a layer, so that "
        "a quarter of a layer's attention goes at a time, and for uniform arms none at 10 %. Its MLP is SiLU-gated: "
        "the share of the mean in its inputs is in the rows, and bounds what the bias can give back.",
    )


def verdict(rows: Sequence[Row]) -> str:
    below_peers, below_all = [], []
    for setting in dict.fromkeys(row.setting for row in rows if row.method == FLAP and row.metric == PERPLEXITY):
        own = find(rows, FLAP, PERPLEXITY, setting)
        others = {arm: find(rows, arm, PERPLEXITY, setting) for arm in ARMS if arm != FLAP}
        peers = (others[WANDA], others[MAGNITUDE])
        below_peers.append(all(own.value < peer.value for peer in peers))
        every_seed = all(f < p for peer in peers for f, p in zip(own.seeds, peer.seeds, strict=True))
        below_all.append(every_seed and all(own.value < other.value for other in others.values()))
    if all(below_all):
        return "holds"
    return "partly" if sum(below_peers) >= 0.75 * len(below_peers) else "not at this scale"


def figures(seed: int, ratio: float, size: dict[str, int]) -> dict[str, tuple[float, ...]]:
    """Of every arm, perplexity and the share of the blocks' parameters left; of the inputs, the share of the mean."""
    model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    unseen = [text for _, text in documents("held_out")]
    unseen = unseen[:: -(-sum(map(len, unseen)) // size["characters"])]
    seen = [text for _, text in documents("train")]
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = (seen[i] for i in order)
    stats = column_statistics(model, texts, tokenizer=tokenizer, max_sequences=size["sequences"])
    whole = parameters(model)
    answer: dict[str, tuple[float, ...]] = {}
    if seed == 0:
        answer["dense"] = (perplexity(model, tokenizer, unseen),)
    for arm, options in ARMS.items():
        small = flap_prune(model, stats, ratio, **options)
        answer[arm] = (perplexity(small, tokenizer, unseen), parameters(small) / whole)
    for kind, of_kind in (("attention output", stats[::2]), ("MLP down", stats[1::2])):
        shares = [float((s.mean**2).sum() / s.mean_square.sum()) for s in of_kind]
        answer[kind] = (sum(shares) / len(shares),)
    return answer


def parameters(model: Any) -> int:
    """Weights of heads and neurons; biases and norms, a few hundred, are left out."""
    return sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
