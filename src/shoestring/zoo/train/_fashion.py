"""The garments of the ``fashion`` bundle as tensors, and the ResNets that are trained to name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from shoestring import data
from shoestring.loop import fit
from shoestring.zoo.train._common import index_batches, seeded, warmup_cosine

DATA = "fashion (the bundle): 20,000 training images, shifted and mirrored; measured on the 5,000 test images"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"


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


def new_resnet(seed: int, *, stem: int, widths: list[int], depths: list[int]) -> Any:
    """An untrained ResNet with basic blocks, one channel in, the bundle's classes out."""
    names = class_names()
    config = ResNetConfig(
        num_channels=1,
        embedding_size=stem,
        hidden_sizes=widths,
        depths=depths,
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with seeded(seed):
        return ResNetForImageClassification(config)


def fit_resnet(
    model: Any,
    out: Path,
    *,
    seed: int,
    steps: int,
    batch: int,
    smoothing: float,
    save_every: int,
    smoke: bool,
    device: str,
    checkpoint: Path | None,
    progress: bool | None,
) -> dict[str, object]:
    """Train on shifted and mirrored garments with AdamW and half a cosine, and save."""
    images, labels = garments("train[:512]" if smoke else "train")
    model = model.to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)

    def step(model: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.cpu()
        logits = model(shifted(images[rows], generator).to(device)).logits
        return nn.functional.cross_entropy(logits, labels[rows].to(device), label_smoothing=smoothing)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    fit(
        model,
        index_batches(len(images), batch, steps, seed),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(200, steps)),
        max_steps=steps,
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else save_every,
        progress=progress,
    )
    model.half().save_pretrained(out)
    return {"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def scores_of_test(model: Any, fast: bool) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 10) of the test images, or of 2,000 of them, and their labels (n,)."""
    images, labels = garments("test[:2000]" if fast else "test")
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).logits.softmax(1).cpu() for part in images.split(500)]), labels


def accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Of all, and of the class that is named worst."""
    right = scores.argmax(1) == labels
    return {
        "accuracy": right.float().mean().item(),
        "accuracy of the worst class": min(right[labels == k].float().mean().item() for k in range(10)),
    }
