"""What the claims of this room share: garments of a class-conditional network, and an independent judge of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

NULL = 10  # "no class" of tiny-class-ddpm


@cache
def network(name: str = "tiny-class-ddpm") -> Any:
    """A network of the zoo, in this process, where diffusers no longer tells that guiders are experimental."""
    from diffusers.utils import logging

    from shoestring import zoo

    logging.set_verbosity_error()
    return zoo.load(name)


def class_labels(n: int) -> Tensor:
    """The ten garments in turn."""
    return torch.arange(n) % 10


def class_samples(
    guider: Any,
    *,
    seed: int,
    n: int,
    steps: int = 20,
    scheduler: str = "ddim",
    model: str = "tiny-class-ddpm",
    conditions: Sequence[Any] | None = None,
    batch: int = 64,
) -> tuple[Tensor, float]:
    """Garments (n, 1, 28, 28) from the noise of `seed`, and the network calls per garment.

    The noise depends on `seed` and `n` alone: all guiders start from the same. A batch of its own goes to each part of
    `n`, so guiders with a state see `batch` samples at a time. `conditions` defaults to (labels, "no class").
    """
    from diffusers import DPMSolverMultistepScheduler

    from shoestring import guide, zoo

    chosen = zoo.load("tiny-class-ddpm", "scheduler")
    if scheduler == "dpm":
        chosen = DPMSolverMultistepScheduler.from_config(chosen.config)
    noise = torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    if conditions is None:
        conditions = (class_labels(n), torch.full((n,), NULL))
    parts, rows = [], 0.0
    for first in range(0, n, batch):
        part = slice(first, first + batch)
        out = guide.sample(
            network(model),
            chosen,
            guider,
            noise[part],
            [condition[part] for condition in conditions],
            num_inference_steps=steps,
        )
        parts.append(out.sample)
        rows += out.num_calls * len(out.sample)
    return torch.cat(parts), rows / n


def judge(images: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (n,) and penultimate features (n, d) of judge-fashion, for garments clipped to [-1, 1]."""
    from shoestring.zoo.train._common import judged

    with torch.no_grad():
        answers, features = judged(network("judge-fashion"), images.clamp(-1, 1))
    return torch.from_numpy(answers), torch.from_numpy(features)


@cache
def real_features() -> Any:
    """Features of 2,000 test garments, 200 or so of each class; more of them would cost more than they tell."""
    from shoestring.zoo.train._fashion import garments

    return judge(garments("test[:2000]")[0])[1].numpy()


def pairs(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share that the judge takes for their class, in %, and Frechet distance to the test garments."""
    from shoestring.metrics import frechet_distance

    answers, features = judge(images)
    right = float((answers == labels).double().mean()) * 100
    return {"accuracy": right, "frechet": frechet_distance(features.numpy(), real_features())}
