"""What several training scripts share: which rows are in a batch, averaged weights, a schedule, and two figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.loop import State


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator of the CPU from `seed`, as first weights are drawn from it; afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: `decay` for matrices, none for biases, scales of norms and temperatures."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def zero_last_layers(model: nn.Module, names: tuple[str, ...]) -> None:
    """Set to zero what ends a residual branch: the modules whose names end with one of these."""
    for name, module in model.named_modules():
        if name.endswith(names):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def byte_level_bpe(texts: Iterable[str], size: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE of `size` tokens, `special` ones first. Any text comes back from it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def to_tensor(images: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def contrastive_loss(logits: Tensor) -> Tensor:
    """CLIP's: which of B texts belongs to which of B images, and the reverse; logits (B, B) -> 0-d."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def clamp_scale(state: State) -> None:
    """Callback: the temperature's logarithm is at most ln 100.

    On the parameter, not in the forward pass: there the gradient would vanish beyond the bound.
    """
    scale: Any = state.model.logit_scale
    with torch.no_grad():
        scale.clamp_(max=math.log(100))


def share(right: Tensor) -> float:
    """How much of a boolean tensor is True."""
    return float(right.double().mean())


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
