"""judge-garment: which garment is in a scene of the captioned world.

Two basic blocks at each of 32, 64 and 128 channels behind a stem of 64, 0.7 M parameters; its 128 pooled features are
also what Frechet distances of generated scenes are measured in. Trained on 60,000 scenes with shifts of 2 pixels, for
small garments are 13 to 15 pixels wide and hard to tell apart: pullover, coat and shirt most of all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.data.world import GARMENTS
from shoestring.zoo.train._world_judges import DATA as DATA
from shoestring.zoo.train._world_judges import LICENCE as LICENCE
from shoestring.zoo.train._world_judges import judge_quality, train_judge

WHAT = "ResNet classifier: which of ten garments is in a 32 x 32 scene with one object"
SEED = 1002


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, Any]:
    """Train and save the judge."""
    return train_judge(
        out,
        "garment",
        GARMENTS,
        seed=SEED,
        stem=64,
        widths=(32, 64, 128),
        depth=2,
        scenes=60_000,
        steps=2200,
        shift=2,
        smoke=smoke,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None = None) -> dict[str, float]:
    """Accuracy on scenes of garments that no model of the zoo was trained on."""
    return judge_quality(load, "garment", fast=fast)
