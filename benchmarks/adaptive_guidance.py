"""Adaptive guidance against full classifier-free guidance: network calls, likeness and the clock, as ratios in one run.

1. tiny-t2i, a StableDiffusionPipeline, through `shoestring.guide.apply`: AG against CFG, and against the pipeline as it
   is, on prompts and noise that the threshold was not chosen on.
2. tiny-class-ddpm through `shoestring.guide.sample`.
3. The guider's own time beside the network's, for small batches.

    python benchmarks/adaptive_guidance.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _race import FAILED, RATIOS, report
from _record import record
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from shoestring import guide, zoo
from shoestring.data import world
from shoestring.guide._ssim import ssim
from shoestring.guide.adaptive_guidance import AdaptiveGuidance, choose_threshold

SCALE, STEPS, SPACE = 3.0, 20, "x0"
AIM = 0.28  # share of the calls that the threshold saves where it is chosen; SAVED of them must be saved elsewhere
SAVED, LIKENESS, POINTS, OVERHEAD = 0.25, 0.95, 0.05, 0.02  # of issue 8
CALIBRATION = (100, 101)  # seeds; the others are 1, 2, ...
Run = Callable[[Any, int], tuple[Tensor, float]]  # (guider or None, seed) -> pictures, network calls a picture


def adaptive(threshold: float) -> AdaptiveGuidance:
    return AdaptiveGuidance(SCALE, threshold, space=SPACE, per_sample=True)


def chosen(run: Run) -> float:
    """The threshold, by runs of CFG on seeds of their own."""
    gammas = []
    for seed in CALIBRATION:
        guider = adaptive(2.0)
        run(guider, seed)
        gammas.append(torch.stack(guider.similarities))  # (T, n)
    return choose_threshold(torch.cat(gammas, 1), AIM)


def t2i(n: int) -> Run:
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)

    def run(guider: Any, seed: int) -> tuple[Tensor, float]:
        prompts = [str(caption) for caption in world.draw(n, split="test", seed=seed).captions]
        noise = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": noise, "output_type": "pt"}
        if guider is None:
            return pipe(prompts, **options).images * 2 - 1, 2.0 * STEPS
        with guide.apply(pipe, guider) as calls:
            return pipe(prompts, **options).images * 2 - 1, calls.rows / n

    return run


def class_ddpm(n: int) -> Run:
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")

    def run(guider: Any, seed: int) -> tuple[Tensor, float]:
        noise = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        conditions = (torch.arange(n) % 10, torch.full((n,), 10))
        out = guide.sample(model, scheduler, guider, noise, conditions, num_inference_steps=STEPS)
        return out.sample.clamp(-1, 1), out.num_calls

    return run


def compare(name: str, run: Run, rounds: int, plain: bool) -> None:
    """AG against CFG, in turns, each round on noise of its own."""
    threshold = chosen(run)
    guiders = {"CFG": ClassifierFreeGuidance(SCALE), "AG": adaptive(threshold)} | ({"plain": None} if plain else {})
    seconds: dict[str, list[float]] = {arm: [] for arm in guiders}
    calls: dict[str, list[float]] = {arm: [] for arm in guiders}
    likeness = []
    for seed in range(1, rounds + 1):
        pictures = {}
        for arm, guider in guiders.items():
            began = time.perf_counter()
            pictures[arm], number = run(guider, seed)
            seconds[arm].append(time.perf_counter() - began)
            calls[arm].append(number)
        likeness += ssim(pictures["AG"], pictures["CFG"]).tolist()
    s = {arm: statistics.median(times) for arm, times in seconds.items()}
    asked = statistics.mean(calls["AG"]) / statistics.mean(calls["CFG"])
    took = statistics.median(a / b for a, b in zip(seconds["AG"], seconds["CFG"], strict=True))
    print(
        f"{name}: threshold {threshold:.5f} in {SPACE}; "
        + ", ".join(f"{arm} {statistics.mean(calls[arm]):.1f} calls {s[arm]:.2f} s" for arm in guiders)
        + f"; lowest SSIM {min(likeness):.3f}"
    )
    report(f"{name}: network calls, AG / CFG", asked, 1 - SAVED)
    report(f"{name}: SSIM of AG to CFG, mean", statistics.mean(likeness), LIKENESS, at_least=True)
    report(f"{name}: wall time, AG / CFG", took, 1 - SAVED + POINTS)
    report(f"{name}: share of time saved and share of calls saved, apart", abs(took - asked), POINTS)
    if plain:  # which asks for both in one call
        report(f"{name}: wall time, AG / the pipeline's own guidance", s["AG"] / s["plain"], 1.0)


def overhead(name: str, model: Any, scheduler: Any, shape: tuple[int, ...], conditions: Any, repeats: int) -> None:
    """Time in the guider, outside the network, as a share of all steps; all steps guided, so that it has most to do."""
    shares = []
    for seed in range(repeats):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        out = guide.sample(model, scheduler, adaptive(2.0), noise, conditions, num_inference_steps=STEPS)
        shares.append(out.seconds_guider / out.seconds)
    report(f"{name}: guider outside the network / a step", statistics.median(shares), OVERHEAD)


def overheads(repeats: int) -> None:
    pipe = zoo.load("tiny-t2i")
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    with torch.no_grad():
        text, empty = pipe.encode_prompt("a large red bag", torch.device("cpu"), 1, True)
    for n in (1, 4, 8):
        labels = (torch.arange(n) % 10, torch.full((n,), 10))
        overhead(f"class, batch of {n}", model, scheduler, (n, 1, 28, 28), labels, repeats)
    for n in (1, 8):
        texts = (text.expand(n, -1, -1), empty.expand(n, -1, -1))
        overhead(f"text, batch of {n}", pipe.unet, pipe.scheduler, (n, 4, 16, 16), texts, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    quick = parser.parse_args().quick
    rounds = 1 if quick else 3
    compare("text to image, in a pipeline", t2i(4 if quick else 16), rounds, plain=True)
    compare("class to image, in the sampler", class_ddpm(4 if quick else 48), max(1, rounds - 1), plain=False)
    overheads(rounds)
    if not quick:
        record("adaptive_guidance", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
