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

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from shoestring.loop import fit
from shoestring.zoo.train._common import index_batches, warmup_cosine
from shoestring.zoo.train.judge_fashion import class_names, garments, shifted

WHAT = "ResNet in the layout of ResNet-18, a third as wide, that names the class of a 28 x 28 grey garment in [-1, 1]"
DATA = "fashion (the bundle): 20,000 training images, shifted and mirrored; measured on the 5,000 test images"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"
SEED = 2001

STEPS, BATCH, SAVE_EVERY = 3800, 128, 400


def new_model() -> ResNetForImageClassification:
    names = class_names()
    config = ResNetConfig(
        num_channels=1,
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 160],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ResNetForImageClassification(config)


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
    images, labels = garments("train[:512]" if smoke else "train")
    steps = steps or (4 if smoke else STEPS)
    model: nn.Module = new_model()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(SEED)

    def step(model: nn.Module, rows: Tensor) -> Tensor:
        rows = rows.cpu()
        batch = shifted(images[rows], generator, by=1).to(device)
        return nn.functional.cross_entropy(model(batch).logits, labels[rows].to(device))

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
        checkpoint_every=SAVE_EVERY if checkpoint else None,
        progress=progress,
    )
    model.half().save_pretrained(out)  # type: ignore[operator]
    return {"steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


@torch.no_grad()
def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """Accuracy on the test images, and that of the worst class."""
    model = load()
    images, labels = garments("test[:2000]" if fast else "test")
    device = next(model.parameters()).device
    right = torch.cat([model(part.to(device)).logits.argmax(1).cpu() for part in images.split(500)]) == labels
    return {
        "accuracy": right.float().mean().item(),
        "accuracy of the worst class": min(right[labels == k].float().mean().item() for k in range(10)),
    }
