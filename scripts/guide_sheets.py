"""Write the sheets of the room guide into docs/images, to be looked at: python scripts/guide_sheets.py [METHOD ...]

Every row of a sheet starts from the same noise. Beside each row: network calls a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image, ImageDraw
from torch import Tensor

from shoestring import guide, zoo
from shoestring.guide.adaptive_guidance import (
    AdaptiveGuidance,
    LinearAdaptiveGuidance,
    TrajectoryRecorder,
    choose_threshold,
)
from shoestring.guide.cfgpp import CFGPlusPlusGuidance
from shoestring.guide.elucd import ClassifierGuidance
from shoestring.guide.gfcg import GradientFreeClassifierGuidance
from shoestring.guide.perp_neg import PerpNegGuidance

IMAGES = Path(__file__).parent.parent / "docs/images"
N, STEPS, NULL = 10, 20, 10
Row = tuple[str, Tensor, float]  # caption, pictures (N, C, H, W) in [-1, 1], calls


def garments(guider: Any, caption: str, *, model: str = "tiny-class-ddpm", steps: int = STEPS, seed: int = 0) -> Row:
    """One garment of each class."""
    noise = torch.randn(N, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels, nothing = torch.arange(N), torch.full((N,), NULL)
    given = (nothing,) if "unlabelled" in caption else (labels, nothing)
    scheduler = zoo.load("tiny-class-ddpm", "scheduler")
    out = guide.sample(zoo.load(model), scheduler, guider, noise, given, num_inference_steps=steps)
    return caption, out.sample, out.num_calls


def scenes(guider: Any, caption: str, prompt: str, *, negative: str = "", auxiliary: Sequence[str] = ()) -> Row:
    """Pictures of a prompt by the pipeline."""
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(
        N, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2, generator=torch.Generator().manual_seed(0)
    )
    with guide.apply(pipe, guider, auxiliary=auxiliary) as calls:
        made = pipe([prompt] * N, [negative] * N, num_inference_steps=STEPS, latents=noise, output_type="pt").images
    return caption, made * 2 - 1, calls.rows / N


def adaptive_guidance() -> list[Row]:
    record = AdaptiveGuidance(3.0, threshold=2, space="x0", per_sample=True)
    garments(record, "", seed=1)
    threshold = choose_threshold(record.similarities, 0.25)
    recorder = TrajectoryRecorder(3.0)
    garments(recorder, "", seed=2)
    linear = LinearAdaptiveGuidance(3.0).fit([recorder.trajectory])
    cfg = ClassifierFreeGuidance(3.0)
    return [
        garments(cfg, "CFG, 20 steps"),
        garments(
            AdaptiveGuidance(3.0, threshold=threshold, space="x0", per_sample=True), "adaptive guidance, 20 steps"
        ),
        garments(cfg, "CFG, 15 steps", steps=15),
        garments(linear, "linear adaptive guidance, 20 steps"),
        garments(cfg, "CFG, 12 steps", steps=12),
    ]


def cfgpp() -> list[Row]:
    return [
        garments(guider, caption)
        for scales in ((2.0, 0.2), (7.5, 0.6), (12.5, 1.0))
        for guider, caption in (
            (ClassifierFreeGuidance(scales[0]), f"CFG, scale {scales[0]:g}"),
            (CFGPlusPlusGuidance(scales[1]), f"CFG++, scale {scales[1]:g}"),
        )
    ]


def perp_neg() -> list[Row]:
    prompt, negative = "a red bag", "a red bag in the middle"
    return [
        scenes(ClassifierFreeGuidance(3.0), f"CFG: {prompt}", prompt),
        scenes(ClassifierFreeGuidance(3.0), f"CFG, negative prompt: {negative}", prompt, negative=negative),
        scenes(  # without the projection
            PerpNegGuidance(3.0, [-1.5], eps=1e30), f"plain, weight -1.5: {negative}", prompt, auxiliary=[negative]
        ),
        scenes(PerpNegGuidance(3.0, [-1.5]), f"Perp-Neg, weight -1.5: {negative}", prompt, auxiliary=[negative]),
        scenes(PerpNegGuidance(3.0, [-3.0]), f"Perp-Neg, weight -3: {negative}", prompt, auxiliary=[negative]),
    ]


def elucd() -> list[Row]:
    classifier = zoo.load("tiny-resnet")
    wanted = torch.arange(N)
    return [
        garments(None, "unlabelled, no guidance"),
        garments(ClassifierGuidance(classifier, wanted, guidance_scale=1.0), "unlabelled, tiny-resnet guides, scale 1"),
        garments(ClassifierGuidance(classifier, wanted, guidance_scale=3.0), "unlabelled, tiny-resnet guides, scale 3"),
        garments(ClassifierFreeGuidance(3.0), "labelled, CFG"),
    ]


def gfcg() -> list[Row]:
    classifier, weak = zoo.load("tiny-resnet"), "tiny-class-ddpm-weak"
    return [
        garments(None, "weak model, condition alone", model=weak),
        garments(ClassifierFreeGuidance(3.0), "weak model, CFG", model=weak),
        garments(GradientFreeClassifierGuidance(classifier, guidance_scale=3.0), "weak model, GFCG", model=weak),
        garments(GradientFreeClassifierGuidance(classifier, guidance_scale=6.0), "weak model, GFCG, 6", model=weak),
    ]


def sheet(rows: Sequence[Row], size: int = 56) -> Image.Image:
    """Rows of pictures under their captions."""
    line = 16
    canvas = Image.new("RGB", (N * (size + 4) + 4, len(rows) * (size + line + 4) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (caption, pictures, calls) in enumerate(rows):
        top = place * (size + line + 4) + 4
        draw.text((4, top), f"{caption} ({calls:g} calls)", fill="black")
        for column, picture in enumerate(pictures):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            canvas.paste(tile.resize((size, size), Image.Resampling.NEAREST), (4 + column * (size + 4), top + line))
    return canvas


SHEETS: dict[str, Callable[[], list[Row]]] = {
    "adaptive-guidance": adaptive_guidance,
    "cfgpp": cfgpp,
    "perp-neg": perp_neg,
    "elucd": elucd,
    "gfcg": gfcg,
}


def main() -> None:
    for name in sys.argv[1:] or SHEETS:
        sheet(SHEETS[name]()).save(IMAGES / f"guide-{name}.png", optimize=True)
        print(name)


if __name__ == "__main__":
    main()
