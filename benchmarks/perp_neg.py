"""What Perp-Neg costs beside the network, as ratios in one run.

1. Time in the guider outside the network calls, as a share of a step, on tiny-t2i: Perp-Neg with one and with three
   auxiliary prompts, single pictures and batches, beside diffusers' CFG.
2. `perp_neg` against plain composition in three lines, e_u + s (p + w n), on latents of SDXL.

    python benchmarks/perp_neg.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from shoestring import guide, zoo
from shoestring.guide.perp_neg import PerpNegGuidance, perp_neg
from shoestring.zoo.train import tiny_t2i

SHARE = 2.0  # % of a step: issue 8
PLAIN = 2.5  # set before the first run: inner product, norm and projection over three sums of plain composition


def shares(pipe: Any, batch: int, steps: int, repeats: int) -> None:
    texts = ["a red bag", "", "a red bag in the middle", "a red bag on the left", "a red bag on top"]
    told = [tiny_t2i.states(pipe.text_encoder, pipe.tokenizer, [text] * batch) for text in texts]
    noise = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    guiders = {
        "CFG": (ClassifierFreeGuidance(3.0), 2),
        "Perp-Neg": (PerpNegGuidance(3.0, -1.0), 3),
        "Perp-Neg, three negatives": (PerpNegGuidance(3.0, [-1.0, -1.0, 0.5]), 5),
    }
    spent: dict[str, list[float]] = {name: [] for name in guiders}
    for _ in range(repeats):
        for name, (guider, prompts) in guiders.items():
            out = guide.sample(pipe.unet, pipe.scheduler, guider, noise, told[:prompts], num_inference_steps=steps)
            spent[name].append(100 * out.seconds_guider / out.seconds)
    median = {name: sorted(values)[len(values) // 2] for name, values in spent.items()}
    print(f"tiny-t2i, batch {batch}: " + ", ".join(f"{name} {share:.2f} %" for name, share in median.items()))
    for name in ("Perp-Neg", "Perp-Neg, three negatives"):
        report(f"tiny-t2i, batch {batch}: {name}, % of a step outside the network", median[name], SHARE)


def plain(e_u: Tensor, e_p: Tensor, e_n: Tensor, w: float, s: float) -> Tensor:
    p = e_p - e_u
    d = p + w * (e_n - e_u)
    return e_u + s * d


def latents(batch: int, dtype: torch.dtype, repeats: int) -> None:
    e_u, e_p, e_n = torch.randn(3, batch, 4, 128, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        perp_neg(e_u, e_p, [e_n], [-1.0], 7.5)
        s = race(
            repeats,
            ours=lambda: perp_neg(e_u, e_p, [e_n], [-1.0], 7.5),
            plain=lambda: plain(e_u, e_p, e_n, -1.0, 7.5),
        )
    name = f"{batch} x 4 x 128 x 128, {str(dtype).removeprefix('torch.')}"
    print(f"{name}: perp_neg {1000 * s['ours']:.2f} ms, plain composition {1000 * s['plain']:.2f} ms")
    report(f"{name}: perp_neg / plain composition", s["ours"] / s["plain"], PLAIN)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    quick = parser.parse_args().quick
    pipeline = zoo.load("tiny-t2i")
    for batch in (1, 8):
        shares(pipeline, batch, 5 if quick else 10, 3 if quick else 9)
    for batch in (1, 4):
        latents(batch, torch.float32, 21 if quick else 201)
    if not quick:
        record("perp_neg", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
