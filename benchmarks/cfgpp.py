"""CFG++: what the guider itself takes of a step, and a whole run against CFG in diffusers' own loop, in one run.

1. Time in the guider outside network calls, as a share of a step, in `shoestring.guide.sample`: tiny-class-ddpm and the
   network of tiny-t2i, and for comparison diffusers' own ClassifierFreeGuidance there.
2. The denoising loop of diffusers' modular pipeline: with CFGPlusPlusGuidance against ClassifierFreeGuidance.

    python benchmarks/cfgpp.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from diffusers.guiders import ClassifierFreeGuidance

from shoestring import guide, zoo
from shoestring.guide.cfgpp import CFGPlusPlusGuidance

SHARE, LOOP = 0.02, 1.05  # issue 8; the second of the brief


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def networks() -> dict[str, tuple[Any, Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """Of each: network, scheduler, noise, conditions."""
    pipe = zoo.load("tiny-t2i")
    prompts = ["a large red bag", "a small blue shirt", "a green dress on the left", "a yellow sandal"] * 2
    told = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=[""] * 8)
    labels = torch.arange(8), torch.full((8,), 10)
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    return {
        "tiny-class-ddpm": (model, scheduler, noise(8, 1, 28, 28), labels),
        "tiny-t2i": (pipe.unet, pipe.scheduler, noise(8, 4, 16, 16), told),
    }


def share(what: str, network: Any, steps: int, repeats: int) -> None:
    model, scheduler, latents, conditions = network
    shares: dict[str, list[float]] = {"CFG++": [], "CFG": []}
    for _ in range(repeats):
        for name, guider in (("CFG++", CFGPlusPlusGuidance(0.6)), ("CFG", ClassifierFreeGuidance(3.0))):
            out = guide.sample(model, scheduler, guider, latents, conditions, num_inference_steps=steps)
            shares[name].append(out.seconds_guider / out.seconds)
    own, peer = (statistics.median(shares[name]) for name in ("CFG++", "CFG"))
    print(f"{what}, batch {len(latents)}: {100 * own:.2f} % of a step in the guider, of CFG {100 * peer:.2f} %")
    report(f"{what}: time in the guider / time of a step", own, SHARE)


def modular(unet: Any, scheduler: Any, guider: Any, latents: torch.Tensor, told: Any, steps: int) -> Callable[[], Any]:
    """One run of the denoising loop that diffusers' modular SDXL pipeline has; any UNet that is told a text fits."""
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    pipe.update_components(unet=unet, scheduler=scheduler, guider=guider)
    pipe._blocks.set_progress_bar_config(disable=True)
    cond, uncond = told

    def run() -> Any:
        scheduler.set_timesteps(steps)
        return pipe(
            latents=latents,
            timesteps=scheduler.timesteps,
            num_inference_steps=steps,
            denoiser_input_fields={"prompt_embeds": cond, "negative_prompt_embeds": uncond},
            output="latents",
        )

    return run


def loop(network: Any, steps: int, repeats: int) -> None:
    unet, scheduler, latents, told = network
    ours = CFGPlusPlusGuidance(0.6)
    ours.set_scheduler(scheduler)
    runs = {
        "ours": modular(unet, scheduler, ours, latents, told, steps),
        "theirs": modular(unet, scheduler, ClassifierFreeGuidance(3.0), latents, told, steps),
    }
    for run in runs.values():
        run()
    s = race(repeats, **runs)
    print(f"modular loop, tiny-t2i: CFG++ {s['ours']:.3f} s, CFG {s['theirs']:.3f} s for {steps} steps")
    report("diffusers' modular loop, tiny-t2i: CFG++ / CFG", s["ours"] / s["theirs"], LOOP)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    quick = parser.parse_args().quick
    steps, repeats = (5, 3) if quick else (20, 11)
    found = networks()
    for name, network in found.items():
        share(name, network, steps, repeats)
    loop(found["tiny-t2i"], steps, repeats)
    if not quick:
        record("cfgpp", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
