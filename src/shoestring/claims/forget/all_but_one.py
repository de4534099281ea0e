"""Guidance-term erasure after Hong et al. against ESD, its own loss without preservation, and gradient ascent: a colour
erased from tiny-t2i."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all

CLAIM = (
    "Updating the guidance term alone, with the drift of the unconditional score constrained, erases a concept in "
    "favour of a chosen alternative and keeps other prompts nearer to what they were than ESD does, at comparable "
    "erasure (no figures were at hand; the loss is reconstructed)."
)
RULE = (
    "Of the prompts for red (alternative: blue), the share that judge-colour still calls red; of prompts for seven "
    "other colours, the squared change of the image from equal noise; and the squared change of the unconditional "
    "prediction. holds: at most 0.1 red in the mean, no more than 0.1 above ESD, and for every seed less change of "
    "other images, and of the unconditional prediction, than ESD and than lambda = 0. partly: at most 0.2 red in the "
    "mean, and in the mean less change of the unconditional prediction than both. Otherwise: not at this scale."
)
OURS, FREE, ESD, ASCENT = "all-but-one", "all-but-one, lambda = 0", "ESD", "gradient ascent"
ARMS = (OURS, FREE, ESD, ASCENT)
BEFORE, ASKED = "unchanged model", "unchanged model, asked for blue"
RATES = (2.5e-4, 1e-3)
RED, BLUE = 0, 5
STILL, INSTEAD, GARMENT = "red prompts judged red", "red prompts judged blue", "garment of red prompts right"
COLOUR, CHANGE = "colour of other prompts right", "change of other images"
DRIFT, DRIFT_TOLD = "change of the unconditional prediction", "change of predictions for other prompts"
SIZE = {"steps": 16, "batch": 4, "trajectories": 8, "sampling_steps": 6, "garments": 10, "colours": 8}
FAST = {"steps": 1, "batch": 2, "trajectories": 2, "sampling_steps": 2, "garments": 2, "colours": 3}


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    size, rates = (FAST, RATES[1:]) if fast else (SIZE, RATES)
    processes = 1 if fast else None
    grid = [(arm, rate, 0, size) for arm in ARMS for rate in rates] if len(rates) > 1 else []
    found = run_all(erase, grid, lambda d, t: progress(0.4 * d, t), "rates", processes=processes) if grid else []
    best = {
        arm: _chosen([(f, rate) for (a, rate, _, _), f in zip(grid, found, strict=True) if a == arm])
        if grid
        else rates[0]
        for arm in ARMS
    }
    runs = [(arm, best.get(arm, 0.0), seed, size) for arm in (*ARMS, BEFORE, ASKED) for seed in range(1, seeds + 1)]
    found = run_all(erase, runs, lambda d, t: progress(0.4 + 0.6 * d, t), "seeds", processes=processes)
    rows = []
    for arm in (*ARMS, BEFORE, ASKED):
        figures = [f for (a, *_), f in zip(runs, found, strict=True) if a == arm]
        rows += [Row.of(arm, metric, [f[metric] for f in figures]) for metric in figures[0]]
    progress(1.0, "done")
    return Result(
        slug="all-but-one",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="tiny-t2i and the judges of garment and colour; no images are read",
        note=f"{size['steps']} steps of batch {size['batch']} on cross-attention, Adam; states of guided DDIM with "
        f"{size['sampling_steps']} steps. Ten red prompts in two wordings are trained on; figures are of a third. Rate "
        f"of every arm from {', '.join(f'{r:g}' for r in RATES)} on another wording and other noise: of those with at "
        "most 0.2 red the one that changes other images least, else the least red. ESD: eta = 1. Gradient ascent: on "
        "the model's own pictures of red prompts. Retraining is impossible within a claim (23 minutes); in its place "
        "the unchanged model asked for blue, which is what an ideal erasure shows for red. The card expected the drift "
        "to be smaller for certain, the change of other images likely. Seen before, after the rule was written: seed 0 "
        "of all-but-one at 2e-3, which erased, roughly (so that the grid went lower). Chosen: "
        + ", ".join(f"{arm} {rate:g}" for arm, rate in best.items())
        + ".",
    )


def verdict(rows: Sequence[Row]) -> str:
    red = find(rows, OURS, STILL).value
    rivals = (ESD, FREE)
    if red > 0.2 or any(find(rows, OURS, DRIFT).value >= find(rows, arm, DRIFT).value for arm in rivals):
        return "not at this scale"
    everywhere = all(
        ours < theirs
        for metric in (CHANGE, DRIFT)
        for arm in rivals
        for ours, theirs in zip(find(rows, OURS, metric).seeds, find(rows, arm, metric).seeds, strict=True)
    )
    return "holds" if everywhere and red <= 0.1 and red <= find(rows, ESD, STILL).value + 0.1 else "partly"


def _chosen(found: list[tuple[dict[str, float], float]]) -> float:
    """The rate that erases and changes other images least; if none erases, the one that comes nearest to it."""
    erased = [(figures[CHANGE], rate) for figures, rate in found if figures[STILL] <= 0.2]
    return min(erased or [(figures[STILL], rate) for figures, rate in found])[1]


def erase(arm: str, rate: float, seed: int, size: dict[str, int]) -> dict[str, float]:
    """Train one arm and look at what came out; seed 0 looks at the validation prompts."""
    pipeline = _loaded("tiny-t2i")
    unet = pipeline.unet if arm in (BEFORE, ASKED) else _trained(arm, rate, seed, size, pipeline)
    return _figures(pipeline, unet, seed, size, asked=BLUE if arm == ASKED else RED)


@cache
def _loaded(name: str) -> Any:
    """A model of the zoo, which no arm changes."""
    from shoestring import zoo

    return zoo.load(name)


def _trained(arm: str, rate: float, seed: int, size: dict[str, int], pipeline: Any) -> Any:
    import torch

    from shoestring.forget.all_but_one import GuidanceTermEraser
    from shoestring.loop import fit
    from shoestring.zoo.train.tiny_t2i import sample, states

    def told(captions: list[str]) -> torch.Tensor:
        return states(pipeline.text_encoder, pipeline.tokenizer, captions)

    garments = range(size["garments"])
    red, blue = ([_words(g, c, form) for g in garments for form in ("{}", "{} in the middle")] for c in (RED, BLUE))
    esd = arm == ESD
    eraser = GuidanceTermEraser(
        pipeline.unet,
        pipeline.scheduler,
        erase=told(red),
        alternative=None if esd else told(blue),
        null=told([""]),
        eta=1.0 if esd else 0.0,
        preserve_weight=0.0 if arm == FREE else 1.0,
        lr=rate,
        steps=size["steps"],
        batch_size=size["batch"],
        sampling_steps=size["sampling_steps"],
        trajectories=size["trajectories"],
    )
    generator = torch.Generator().manual_seed(seed)
    if arm in (OURS, FREE):
        return eraser.fit(generator)

    unet = copy.deepcopy(pipeline.unet).requires_grad_(False)
    chosen = [p.requires_grad_(True) for name, p in unet.named_parameters() if "attn2" in name]
    if esd:
        pool = eraser.draw_states(generator)

        def step(unet: Any, rows: torch.Tensor) -> torch.Tensor:
            eps = unet(pool.x_t[rows], pool.t[rows], encoder_hidden_states=eraser.erase[pool.row[rows]]).sample
            return (eps - pool.frozen_null[rows] - pool.target[rows]).square().mean()

        n = len(pool.t)
    else:
        images = sample(pipeline, red[::2], steps=size["sampling_steps"], seed=seed)
        latents = _encoded(pipeline, images)

        def step(unet: Any, rows: torch.Tensor) -> torch.Tensor:
            noise, t = (
                torch.randn(latents[rows].shape, generator=generator),
                torch.randint(1000, (len(rows),), generator=generator),
            )
            eps = unet(
                pipeline.scheduler.add_noise(latents[rows], noise, t), t, encoder_hidden_states=eraser.erase[2 * rows]
            ).sample
            return -(eps - noise).square().mean()

        n = len(images)
    order = torch.randint(n, (size["steps"], size["batch"]), generator=generator)
    fit(unet, list(order), step, torch.optim.Adam(chosen, rate), progress=False)
    return unet


def _figures(pipeline: Any, unet: Any, seed: int, size: dict[str, int], asked: int) -> dict[str, float]:
    import torch

    from shoestring.zoo.train._common import judged
    from shoestring.zoo.train.tiny_t2i import sample, states

    garments, steps, original = size["garments"], size["sampling_steps"], pipeline.unet
    form, some = _form(seed), range(garments)
    erased = [_words(g, asked, form) for g in some]
    others, before = _before(seed, garments, size["colours"], steps)
    kept = [_words(g, c, form) for g, c in others]
    pipeline.unet = unet
    red, after = (
        sample(pipeline, words, steps=steps, seed=start + seed) for words, start in ((erased, 2000), (kept, 1000))
    )
    pipeline.unet = original

    colour, garment = _loaded("judge-colour"), _loaded("judge-garment")
    answers = judged(colour, red)[0]
    right = judged(garment, red)[0] == list(some)
    kept_right = judged(colour, after)[0] == [c for _, c in others]

    generator = torch.Generator().manual_seed(seed)
    latents = _encoded(pipeline, before)
    noise, t = torch.randn(latents.shape, generator=generator), torch.randint(1000, (len(kept),), generator=generator)
    x_t = pipeline.scheduler.add_noise(latents, noise, t)
    changes = []
    with torch.no_grad():
        for captions in ([""] * len(kept), kept):
            told = states(pipeline.text_encoder, pipeline.tokenizer, captions)
            new, old = (net(x_t, t, encoder_hidden_states=told).sample for net in (unet, original))
            changes.append(float((new - old).square().mean()))
    return {
        STILL: float((answers == RED).mean()),
        INSTEAD: float((answers == BLUE).mean()),
        GARMENT: float(right.mean()),
        COLOUR: float(kept_right.mean()),
        CHANGE: float((after - before).square().mean()),
        DRIFT: changes[0],
        DRIFT_TOLD: changes[1],
    }


def _form(seed: int) -> str:
    return "a picture of {}" if seed == 0 else "a photo of {}"


@cache
def _before(seed: int, garments: int, colours: int, steps: int) -> tuple[list[tuple[int, int]], Any]:
    """Garment and colour of the prompts that are to stay, and what the unchanged model draws for them."""
    from shoestring.zoo.train.tiny_t2i import sample

    others = [((3 * c + k) % garments, c) for c in range(colours) if c != RED for k in (0, 5)[: garments // 2]]
    words = [_words(g, c, _form(seed)) for g, c in others]
    return others, sample(_loaded("tiny-t2i"), words, steps=steps, seed=1000 + seed)


def _words(garment: int, colour: int, form: str) -> str:
    import numpy as np

    from shoestring.data import world

    one = [(part, -1) for part in (garment, colour, 1, 4)]
    return form.format(world.caption(*one, rng=np.random.default_rng(0), mention=0, synonyms=False))


def _encoded(pipeline: Any, images: Any) -> Any:
    import torch

    with torch.no_grad():
        return pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
