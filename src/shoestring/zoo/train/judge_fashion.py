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

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from shoestring import data
from shoestring.loop import fit
from shoestring.metrics import expected_calibration_error
from shoestring.zoo.train._common import index_batches, warmup_cosine

WHAT = "ResNet with basic blocks that names the class of a 28 x 28 grey garment in [-1, 1]; an independent judge"
DATA = "fashion (the bundle): 20,000 training images, shifted and mirrored; measured on the 5,000 test images"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"
SEED = 1001

STEPS, BATCH = 2000, 128


def garments(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) float32 in [-1, 1] and labels (n,) int64 of the ``fashion`` bundle."""
    rows = data.load("fashion", split=split)
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in rows["image"]]))
    return pixels[:, None].float() / 127.5 - 1, torch.tensor(rows["label"])


def class_names() -> list[str]:
    return data.load("fashion", split="test").features["label"].names


def shifted(images: Tensor, generator: torch.Generator, by: int = 1) -> Tensor:
    """Each image (B, C, H, W) moved by up to `by` pixels both ways, black (-1) filled in, and mirrored or not."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (by, by, by, by), value=-1.0)
    top, left = torch.randint(2 * by + 1, (2, n, 1), generator=generator)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns, columns.flip(1)) + left  # (B, W)
    rows = torch.arange(height) + top  # (B, H)
    i = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[i, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def new_model() -> Any:
    names = class_names()
    config = ResNetConfig(
        num_channels=1,
        embedding_size=64,
        hidden_sizes=[64, 128],
        depths=[2, 1],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ResNetForImageClassification(config)


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Train and save the judge."""
    images, labels = garments("train[:512]" if smoke else "train")
    steps = 4 if smoke else STEPS
    model = new_model().to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(SEED)

    def step(model: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.cpu()
        batch = shifted(images[rows], generator).to(device)
        return nn.functional.cross_entropy(model(batch).logits, labels[rows].to(device), label_smoothing=0.05)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    fit(
        model,
        index_batches(len(images), BATCH, steps, SEED),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(200, steps)),
        max_steps=steps,
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=250 if checkpoint else None,
        progress=progress,
    )
    model.half().save_pretrained(out)
    return {"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """On the test images: accuracy, that of the worst class, and how far confidence is from accuracy (ECE)."""
    model = load()
    images, labels = garments("test[:2000]" if fast else "test")
    device = next(model.parameters()).device
    scores = torch.cat([model(part.to(device)).logits.softmax(1).cpu() for part in images.split(500)])  # (n, 10)
    right = scores.argmax(1) == labels
    return {
        "accuracy": right.float().mean().item(),
        "accuracy of the worst class": min(right[labels == k].float().mean().item() for k in range(10)),
        "expected calibration error": expected_calibration_error(labels.numpy(), scores.numpy()),
    }
