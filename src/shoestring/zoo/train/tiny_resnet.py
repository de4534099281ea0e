"""tiny-resnet: a ResNet-18 for 28 x 28 grey garments, about a third as wide. It is what methods act on, so not a judge.

A `transformers.ResNetForImageClassification` in the layout of ResNet-18: four stages of two basic blocks, 24, 48, 96
and 160 channels, every convolution followed by batch normalisation. The library's stem (a 7 x 7 convolution and a
max-pool) quarters the size, so the stages see 7 x 7, 4 x 4, 2 x 2 and 1 x 1; as in ResNet-18 the first stage keeps
width and size of the stem and has no projection in its shortcuts.

Data: the ``fashion`` bundle's 20,000 training images, (n, 1, 28, 28) in [-1, 1], shifted by one pixel at most
and mirrored at random. AdamW with weight decay, cosine, plain cross-entropy: the usual network that one finds and wants
smaller, with nothing that makes it easier to prune.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.zoo.train import _fashion
from shoestring.zoo.train._fashion import DATA as DATA
from shoestring.zoo.train._fashion import LICENCE as LICENCE

WHAT = "ResNet in the layout of ResNet-18, a third as wide, that names the class of a 28 x 28 grey garment in [-1, 1]"
SEED = 2001

STEPS, BATCH, SAVE_EVERY = 3800, 128, 400


def new_model() -> Any:
    return _fashion.new_resnet(SEED, stem=24, widths=[24, 48, 96, 160], depths=[2, 2, 2, 2])


def train(
    out: Path,
    *,
    smoke: bool,
    device: str,
    checkpoint: Path | None,
    progress: bool | None,
    steps: int | None = None,
) -> dict[str, object]:
    """Train and save it; `steps` other than the recipe's are for tests."""
    return _fashion.fit_resnet(
        new_model(),
        out,
        seed=SEED,
        steps=steps or (4 if smoke else STEPS),
        batch=BATCH,
        smoothing=0.0,
        save_every=SAVE_EVERY,
        smoke=smoke,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """Accuracy on the test images, and that of the worst class."""
    return _fashion.accuracies(*_fashion.scores_of_test(load(), fast))
