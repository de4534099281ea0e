"""judge-fashion: names the class of a 28 x 28 grey garment. A judge: no method may use it as its guide.

A `transformers.ResNetForImageClassification` with basic blocks: stem to 64 channels at 7 x 7 (the library's stem, a
7 x 7 convolution and a max-pool, quarters the size), then two blocks of 64 channels at 7 x 7 and one of 128 at 4 x 4:
few and wide, as the stem leaves so few pixels. Samples are compared with images in the 128 pooled features.

Data: the ``fashion`` bundle's 20,000 training images, (n, 1, 28, 28) in [-1, 1], shifted by up to one pixel and
mirrored at random, as generated garments must be named wherever they stand. AdamW, cosine, a little label smoothing:
its confidence shall mean something. The seed is its own (1001), so that it errs differently from a classifier that
a claim trains as a guide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.metrics import expected_calibration_error
from shoestring.zoo.train import _fashion
from shoestring.zoo.train._fashion import DATA as DATA
from shoestring.zoo.train._fashion import LICENCE as LICENCE

WHAT = "ResNet with basic blocks that names the class of a 28 x 28 grey garment in [-1, 1]; an independent judge"
SEED = 1001

STEPS, BATCH = 2000, 128


def new_model() -> Any:
    return _fashion.new_resnet(SEED, stem=64, widths=[64, 128], depths=[2, 1])


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Train and save the judge."""
    return _fashion.fit_resnet(
        new_model(),
        out,
        seed=SEED,
        steps=4 if smoke else STEPS,
        batch=BATCH,
        smoothing=0.05,
        save_every=250,
        smoke=smoke,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
    )


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """On the test images: accuracy, that of the worst class, and how far confidence is from accuracy (ECE)."""
    scores, labels = _fashion.scores_of_test(load(), fast)
    error = expected_calibration_error(labels.numpy(), scores.numpy())
    return _fashion.accuracies(scores, labels) | {"expected calibration error": error}
