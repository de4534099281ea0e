"""tiny-class-ddpm-weak: the weaker twin of tiny-class-ddpm: half its width, half of its training.

The same format, classes, schedule, data and loss (see `shoestring.zoo.train.tiny_class_ddpm`) with 8, 16 and 32
channels and heads of 16. It is for claims about an imperfect model, and for guidance of a model by a worse version
of itself (Karras et al. 2024, arXiv 2406.02507): it makes the same kinds of error, more of them.
"""

from __future__ import annotations

from pathlib import Path

from shoestring.zoo.train import tiny_class_ddpm as twin
from shoestring.zoo.train.tiny_class_ddpm import DATA, LICENCE, quality, sheet

__all__ = ["DATA", "LICENCE", "SEED", "WHAT", "quality", "sheet", "train"]

WHAT = "half as wide and shortly trained twin of tiny-class-ddpm, same format and null class; weak on purpose"
SEED = 5

STEPS, LR = 2000, 2e-3
CHANNELS, HEAD = (8, 16, 32), 16


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Train and save the network and its scheduler."""
    unet = twin.new_unet(CHANNELS, HEAD, SEED)
    steps = 4 if smoke else STEPS
    return twin.fit_unet(
        unet, out, steps, LR, SEED, smoke=smoke, device=device, checkpoint=checkpoint, progress=progress
    )
