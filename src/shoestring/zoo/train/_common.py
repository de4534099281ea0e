"""What several training scripts share: which rows are in a batch, averaged weights, a schedule, and two figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoestring.loop import State


def index_batches(n: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches of row numbers, (size,) int64 each: one shuffled pass over the n rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(n, generator=generator) for _ in range(math.ceil(steps * size / n))]
    return list(torch.cat(passes)[: steps * size].split(size))


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises linearly for `warmup` steps and falls as half a cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class EMA:
    """Callback of `loop.fit`: w_bar <- d w_bar + (1 - d) w after every step, d = min(decay, (1 + t) / (10 + t)).

    `copy_to` puts the averages into the model. Saved and restored with the loop's checkpoints.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        decay = min(self.decay, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(self.averages, list(state.model.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for parameter, average in zip(model.parameters(), self.averages, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): average for i, average in enumerate(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, average in enumerate(self.averages):
            average.copy_(state[str(i)])


def noise_loss(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor,
    generator: torch.Generator,
    *,
    gamma: float = math.inf,
    **conditions: Any,
) -> Tensor:
    """mean of w_t ||eps - eps_theta(x_t, t)||^2 / d at a random t for each image, w_t = min(1, gamma / SNR_t).

    Without `gamma` Ho et al. 2020, eq. 14; with it the weights of Hang et al. 2023 (arXiv 2303.09556), under which the
    noise levels that decide what is in the picture get their share of a short training.

    Parameters
    ----------
    unet : UNet2DModel or UNet2DConditionModel
    scheduler : diffusers scheduler with ``add_noise`` and ``alphas_cumprod``
    images : (B, C, H, W) float in [-1, 1]
    generator : torch.Generator
        On the CPU, so that all devices train on the same noise.
    """
    t = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    eps = torch.randn(images.shape, generator=generator).to(images.device)
    alpha = scheduler.alphas_cumprod[t]
    weight = (gamma * (1 - alpha) / alpha).clamp(max=1).to(images.device)
    t = t.to(images.device)
    wrong = (unet(scheduler.add_noise(images, eps, t), t, **conditions).sample - eps).square().mean((1, 2, 3))
    return (weight * wrong).mean()


def drop(labels: Tensor, null: int, probability: float, generator: torch.Generator) -> Tensor:
    """Labels (B,) int64 of which each becomes `null` with the probability given."""
    return labels.masked_fill(torch.rand(labels.shape, generator=generator).to(labels.device) < probability, null)


@torch.no_grad()
def judged(judge: nn.Module, images: Tensor, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A judge's answers (n,) int64 and its features (n, d) float32 of images (n, C, H, W) in [-1, 1]."""
    answers, features = [], []
    for part in _parts(images, batch):
        pooled = judge.resnet(part).pooler_output.flatten(1)  # type: ignore[operator]
        features.append(pooled.float().cpu().numpy())
        answers.append(judge.classifier(pooled).argmax(1).cpu().numpy())  # type: ignore[operator]
    return np.concatenate(answers), np.concatenate(features)


def _parts(images: Tensor, batch: int) -> Iterator[Tensor]:
    return iter(images.split(batch))
