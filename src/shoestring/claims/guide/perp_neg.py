"""Perp-Neg against plain guidance, plain composition and a negative prompt for the empty one, on tiny-t2i.

Prompt "a red bag", negative prompt "a red bag in the middle": they share garment and colour, and where the object is
must change alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all

CLAIM = (
    "A negative prompt that overlaps with the prompt removes what it names and leaves what they share; subtracted "
    "plainly it takes the prompt with it (Stable Diffusion, requested view shown: side 42.0 % -> 73.1 %, back 14.6 % "
    "-> 40.4 %; plain composition 12.7 % and 2.0 %)."
)
RULE = (
    "partly: at weight -2 Perp-Neg's colour accuracy is at most 5 points below CFG's in the mean, plain composition's "
    "at least 10 points below Perp-Neg's for every seed, and Perp-Neg has at most half as many objects in the middle "
    "as CFG in the mean. holds: also, each arm at its own best strength, no other has a larger mean share of pictures "
    "of the right colour with nothing in the middle than Perp-Neg. Otherwise: not at this scale."
)
SCALE = 3.0  # of tiny-t2i's card
STRONG = -2.0
SCALES, WEIGHTS = (1.5, 3.0, 6.0), (-0.5, -1.0, -2.0)
STRENGTHS = {
    "Perp-Neg": WEIGHTS,
    "plain composition": WEIGHTS,
    "negative for empty prompt": SCALES,
    "CFG": SCALES,
}
SUCCESS, COLOUR, GARMENT, MIDDLE = "colour right, not in the middle", "colour right", "garment right", "in the middle"
FRECHET, CALLS = "Frechet distance to scenes with nothing in the middle", "network calls"
CENTRE = 4  # of world.POSITIONS


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    n, few, steps = (3, 3, 3) if fast else (24, 10, 8)
    processes = 1 if fast else None
    grid = [
        (arm, strength, 0, few, steps)
        for arm, strengths in STRENGTHS.items()
        for strength in (strengths[1:2] if fast else strengths)
    ]
    found = run_all(pictures, grid, lambda d, t: progress(0.4 * d, t), "strengths", processes=processes)
    best = {
        arm: max((f[SUCCESS], -abs(run[1]), run[1]) for run, f in zip(grid, found, strict=True) if run[0] == arm)[2]
        for arm in STRENGTHS
    }
    tested = {
        f"Perp-Neg, weight {STRONG:g}": ("Perp-Neg", STRONG, steps),
        f"plain composition, weight {STRONG:g}": ("plain composition", STRONG, steps),
        f"CFG, {3 * steps // 2} steps": ("CFG", best["CFG"], 3 * steps // 2),  # as many calls as Perp-Neg
        **{arm: (arm, best[arm], steps) for arm in STRENGTHS},
    }
    runs = sorted({(a, s, seed, n, t) for a, s, t in tested.values() for seed in range(1, seeds + 1)}, key=_cost)
    figures = dict(
        zip(
            runs,
            run_all(pictures, runs, lambda d, t: progress(0.4 + 0.6 * d, t), "seeds", processes=processes),
            strict=True,
        )
    )
    rows = []
    for name, (arm, strength, t) in tested.items():
        own = [figures[arm, strength, seed, n, t] for seed in range(1, seeds + 1)]
        for metric, unit in ((SUCCESS, "%"), (COLOUR, "%"), (GARMENT, "%"), (MIDDLE, "%"), (FRECHET, ""), (CALLS, "")):
            rows.append(Row.of(name, metric, [f[metric] for f in own], unit=unit))
    progress(1.0, "done")
    return Result(
        slug="perp-neg",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data=f"{n} prompts of tiny-t2i (seen garments in seen colours, place unspoken), the same noise for every arm, "
        f"{steps} steps of DPM-Solver++; judge-colour, judge-position, judge-garment",
        note="Strength of every arm: the best of three (weights, at scale 3; scales for the two without a weight) by "
        f"that share on seed 0 and {few} prompts: " + ", ".join(f"{arm} {s:g}" for arm, s in best.items()) + ". "
        "Known beforehand: the card's expectation that plain composition loses 10 to 50 points of class accuracy. "
        "After the rule was written, one look at 15 prompts of another seed; nothing was changed after it. "
        "A first full run with 30 prompts (15 to choose) took 106 s and said partly; prompts were cut for time. "
        "Colour is what must be kept, as the model itself gets 73 % of garments right. Views and 3D are not to be had "
        "at this scale: the published figures are of views.",
    )


def verdict(rows: Sequence[Row]) -> str:
    strong, plain = f"Perp-Neg, weight {STRONG:g}", f"plain composition, weight {STRONG:g}"
    kept = find(rows, strong, COLOUR).value >= find(rows, "CFG", COLOUR).value - 5
    lost = all(
        p <= k - 10 for p, k in zip(find(rows, plain, COLOUR).seeds, find(rows, strong, COLOUR).seeds, strict=True)
    )
    removed = find(rows, strong, MIDDLE).value <= find(rows, "CFG", MIDDLE).value / 2
    if not (kept and lost and removed):
        return "not at this scale"
    others = [find(rows, name, SUCCESS).value for name in {row.method for row in rows} - {strong, plain, "Perp-Neg"}]
    return "holds" if find(rows, "Perp-Neg", SUCCESS).value >= max(others) else "partly"


def _cost(run: tuple[str, float, int, int, int]) -> tuple[Any, ...]:
    """Longest first."""
    return -run[4] * (2 if run[0] in ("CFG", "negative for empty prompt") else 3), run


@torch.no_grad()
def pictures(arm: str, strength: float, seed: int, n: int, steps: int) -> dict[str, float]:
    """Figures of n pictures; the noise depends on seed and n alone."""
    from diffusers import DPMSolverMultistepScheduler

    from shoestring import guide
    from shoestring.metrics import frechet_distance
    from shoestring.zoo.train import tiny_t2i
    from shoestring.zoo.train._common import judged

    pipe, judges = models()
    captions, garments, colours = tiny_t2i.prompts("seen")
    chosen = torch.arange(n) * len(captions) // n
    told = [captions[i] for i in chosen.tolist()]
    prompt, empty, negative = (
        tiny_t2i.states(pipe.text_encoder, pipe.tokenizer, texts)
        for texts in (told, [""] * n, [f"{caption} in the middle" for caption in told])
    )
    conditions = {
        "CFG": (prompt, empty),
        "negative for empty prompt": (prompt, negative),
    }.get(arm, (prompt, empty, negative))
    noise = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    out = guide.sample(pipe.unet, scheduler, guider(arm, strength), noise, conditions, num_inference_steps=steps)
    images = pipe.vae.decode(out.sample / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    answers = {name: judged(judge, images) for name, judge in judges.items()}
    right = answers["colour"][0] == colours[chosen]
    middle = answers["position"][0] == CENTRE
    return {
        SUCCESS: 100 * float((right & ~middle).mean()),
        COLOUR: 100 * float(right.mean()),
        GARMENT: 100 * float((answers["garment"][0] == garments[chosen]).mean()),
        MIDDLE: 100 * float(middle.mean()),
        FRECHET: frechet_distance(answers["garment"][1], wanted()),
        CALLS: out.num_calls,
    }


def guider(arm: str, strength: float) -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    from shoestring.guide.perp_neg import PerpNegGuidance

    if arm == "Perp-Neg":
        return PerpNegGuidance(SCALE, strength)
    if arm == "plain composition":
        return PerpNegGuidance(SCALE, strength, eps=1e30)  # nothing is projected
    return ClassifierFreeGuidance(strength)


@cache
def models() -> tuple[Any, dict[str, Any]]:
    from shoestring import zoo

    return zoo.load("tiny-t2i"), {name: zoo.load(f"judge-{name}") for name in ("colour", "position", "garment")}


@cache
def wanted() -> Any:
    """Features of test scenes with one object that is not in the middle."""
    from shoestring.data import world
    from shoestring.zoo.train._common import judged, to_tensor

    scenes = world.draw(1000, split="test", seed=1, two=0, pairs="seen")
    images: Tensor = to_tensor(scenes.images[scenes.position[:, 0] != CENTRE])
    return judged(models()[1]["garment"], images)[1]
