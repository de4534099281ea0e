"""GFCG-style guidance: what the guider itself takes of a step, and a run against CFG and a pass of the classifier.

1. Time in the guider outside network, classifier and decoder calls, as a share of a step of `shoestring.guide.sample`.
   The sampler clocks the guider and the network; the classifier (and the decoder) are clocked here and taken off.
2. A run, every sample of which is pushed in every step, against diffusers' ClassifierFreeGuidance in the same sampler
   plus one pass of the classifier a step.

    python benchmarks/gfcg.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from _clocked import CLOCK, clocked
from _race import FAILED, RATIOS, race, report
from _record import record
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from shoestring import guide, zoo
from shoestring.guide.gfcg import GradientFreeClassifierGuidance

SHARE, RUN = 0.02, 1.15  # issue 8; the brief


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def settings(batch: int) -> dict[str, dict[str, Any]]:
    """Of each: network, scheduler, latents, conditions; classifier, labels and decoder."""
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    labels = torch.arange(batch) % 10
    pipe = zoo.load("tiny-t2i")
    colour = zoo.load("judge-colour")
    names = [colour.config.id2label[k] for k in range(colour.config.num_labels)]
    wanted = torch.arange(batch) % len(names)
    prompts = [[f"a {names[k]} bag" for k in wanted.tolist()], [""] * batch, *([f"a {n} bag"] * batch for n in names)]
    told = [pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach() for prompt in prompts]
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels

    def decode(z: Tensor) -> Tensor:
        picture: Tensor = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
        return picture

    return {
        "tiny-class-ddpm": {
            "run": (model, scheduler, noise(batch, 1, 28, 28), (labels, torch.full((batch,), 10))),
            "classifier": zoo.load("tiny-resnet"),
            "labels": labels,
            "decode": None,
        },
        "tiny-t2i with its decoder": {
            "run": (pipe.unet, pipe.scheduler, noise(batch, channels, size, size), told),
            "classifier": colour,
            "labels": wanted,
            "decode": decode,
        },
    }


def measure(what: str, setting: dict[str, Any], steps: int, repeats: int) -> None:
    model, scheduler, latents, conditions = setting["run"]
    decode = setting["decode"]
    guider = GradientFreeClassifierGuidance(
        clocked(setting["classifier"]),
        setting["labels"],
        decode=None if decode is None else clocked(decode),
        confusion="constant",  # every sample in every step: the dearest case
        start=0.0,
    )
    cfg, shares = ClassifierFreeGuidance(3.0), []

    def gfcg() -> None:
        CLOCK["seconds"] = 0.0
        out = guide.sample(model, scheduler, guider, latents, conditions, num_inference_steps=steps)
        assert out.num_calls == 2 * steps
        shares.append((out.seconds_guider - CLOCK["seconds"]) / out.seconds)

    @torch.no_grad()
    def classifier() -> None:
        for _ in range(steps):
            setting["classifier"](latents if decode is None else decode(latents))

    work = {
        "gfcg": gfcg,
        "cfg": lambda: guide.sample(model, scheduler, cfg, latents, conditions, num_inference_steps=steps),
        "classifier": classifier,
    }
    for call in work.values():
        call()
    shares.clear()
    s = race(repeats, **work)
    own = statistics.median(shares)
    print(f"{what}: {', '.join(f'{name} {1000 * seconds / steps:.1f} ms a step' for name, seconds in s.items())}")
    report(f"{what}: time in the guider / time of a step", own, SHARE)
    report(f"{what}: GFCG / (CFG + a pass of the classifier)", s["gfcg"] / (s["cfg"] + s["classifier"]), RUN)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    arguments = parser.parse_args()
    batch, steps, repeats = (16, 4, 3) if arguments.quick else (32, 6, 5)
    for what, setting in settings(batch).items():
        measure(f"{what}, batch {batch}", setting, steps, repeats)
    if not arguments.quick:
        record("gfcg", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
