"""judge-colour: which colour the object in a scene of the captioned world has.

One basic block at each of 16, 32 and 64 channels behind a stem of 32: colours are easy, and what remains to be learnt
is to answer for pale, dark and imperfect garments too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.data.world import COLOURS
from shoestring.zoo.train._world_judges import DATA as DATA
from shoestring.zoo.train._world_judges import LICENCE as LICENCE
from shoestring.zoo.train._world_judges import judge_quality, train_judge

WHAT = "ResNet classifier: which of eight colours the object in a 32 x 32 scene has"
SEED = 1003


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, Any]:
    """Train and save the judge."""
    return train_judge(
        out,
        "colour",
        COLOURS,
        seed=SEED,
        stem=32,
        widths=(16, 32, 64),
        depth=1,
        scenes=20_000,
        steps=1000,
        shift=2,
        smoke=smoke,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None = None) -> dict[str, float]:
    """Accuracy on scenes of garments that no model of the zoo was trained on."""
    return judge_quality(load, "colour", fast=fast)
