"""judge-position: where the object in a scene of the captioned world is: left, right, top, bottom or centre.

One basic block at each of 16, 32 and 64 channels behind a stem of 32. Shifts of one pixel only: more would move
objects towards the next place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.data.world import POSITIONS
from shoestring.zoo.train._world_judges import DATA as DATA
from shoestring.zoo.train._world_judges import LICENCE as LICENCE
from shoestring.zoo.train._world_judges import judge_quality, train_judge

WHAT = "ResNet classifier: in which of five places the object in a 32 x 32 scene is"
SEED = 1004


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, Any]:
    """Train and save the judge."""
    return train_judge(
        out,
        "position",
        POSITIONS,
        seed=SEED,
        stem=32,
        widths=(16, 32, 64),
        depth=1,
        scenes=20_000,
        steps=1000,
        shift=1,
        smoke=smoke,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None = None) -> dict[str, float]:
    """Accuracy on scenes of garments that no model of the zoo was trained on."""
    return judge_quality(load, "position", fast=fast)
