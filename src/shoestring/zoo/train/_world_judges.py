"""What the three judges of the captioned world share: a small ResNet that names one attribute of the object in a scene.

A judge says whether a generated picture shows what was asked for. So it is trained on scenes with one object and all
(garment, colour) pairs, with noise and shifts that make it tolerant of a generator's small faults, and with seeds that
no model which a method could use as its guide has.

``ResNetForImageClassification`` of transformers has one stem, a 7 x 7 convolution of stride 2 and a max-pooling of
stride 2: a 32 x 32 picture becomes 8 x 8 before the first block. A wide stem keeps what that takes away, and the first
stage does not shrink the picture any further: basic blocks at 8 x 8, 4 x 4 and 2 x 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from shoestring import loop
from shoestring.data import world
from shoestring.zoo.train._common import index_batches, judged, seeded, to_tensor, warmup_cosine

BATCH = 128
DATA = (
    "single-object scenes of shoestring.data.world, all pairs, from the train split of the fashion bundle "
    "(Fashion-MNIST)"
)
LICENCE = "weights: the project's; data: Fashion-MNIST, MIT"


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each of (B, 3, H, W) moved by up to `shift` pixels both ways, with noise of its own strength up to 0.15."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (shift,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)  # (B, H), (B, W)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    strength = 0.15 * torch.rand((n, 1, 1, 1), generator=generator)
    return moved.permute(0, 3, 1, 2) + strength * torch.randn(images.shape, generator=generator)


def train_judge(
    out: Path,
    attribute: str,
    names: Sequence[str],
    *,
    seed: int,
    stem: int,
    widths: Sequence[int],
    depth: int,
    scenes: int,
    steps: int,
    shift: int,
    smoke: bool,
    device: str,
    checkpoint: Path | None,
    progress: bool | None,
) -> dict[str, Any]:
    """Train a judge of `attribute` ("garment", "colour" or "position") and save it to `out`."""
    scenes, steps = (256, 4) if smoke else (scenes, steps)
    drawn = world.draw(scenes, seed=seed, two=0, pairs="all")
    images, labels = drawn.images, torch.from_numpy(getattr(drawn, attribute)[:, 0].astype(np.int64))

    config = ResNetConfig(
        num_channels=3, embedding_size=stem, hidden_sizes=list(widths), depths=[depth] * len(widths), layer_type="basic"
    )
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    with seeded(seed):
        model = ResNetForImageClassification(config)
    model.to(device, memory_format=torch.channels_last)  # a quarter faster on the CPU

    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        pixels = augmented(to_tensor(images[rows.cpu().numpy()]), shift, generator).to(
            device, memory_format=torch.channels_last
        )
        logits = model(pixel_values=pixels).logits
        return nn.functional.cross_entropy(logits, labels[rows.cpu()].to(device), label_smoothing=0.05)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    loop.fit(
        model,
        index_batches(scenes, BATCH, steps, seed),
        loss,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=max(1, steps // 20)),
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 200,
        progress=progress,
    )
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(out)
    return {"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


def judge_quality(load: Callable[..., Any], attribute: str, *, fast: bool) -> dict[str, float]:
    """Accuracy on scenes with garments of the test split: of all, of large objects and of small ones."""
    drawn = world.draw(2000 if fast else 10_000, split="test", seed=7, two=0, pairs="all")
    judge = load()
    answers, _ = judged(judge, to_tensor(drawn.images).to(judge.device))
    right, large = answers == getattr(drawn, attribute)[:, 0], drawn.size[:, 0] == 1
    figures = {
        "accuracy": right.mean(),
        "accuracy of large": right[large].mean(),
        "accuracy of small": right[~large].mean(),
    }
    return {name: round(float(figure), 4) for name, figure in figures.items()}
