"""emoji-clip: locked-image tuning on emoji and their names (Zhai et al. 2022, LiT, arXiv 2111.07991).

Architecture: `shoestring.zoo._emoji_clip.EmojiCLIP`. EfficientNet-Lite0 (1280 features, ImageNet) and MiniLM (384, of
sentences) stay frozen and are not stored; trained are a hidden layer of 512 on the images, a linear map on the texts,
both to 192 features, and a temperature. Both towers are locked, as 1,500 names would spoil either.

Data: the emoji bundle, two drawings of each of 1906 emoji. By a hash of its name an emoji, in both drawings, is one of
the 80 % that train or of the 20 % that are never seen (`held_out`).

Recipe: the symmetric contrastive loss in batches of 256 different emoji, each in a random drawing; AdamW with a strong
decay, dropout and normal noise on the features, because there are so few. Features are extracted once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoestring import backbones, data, loop
from shoestring.data import world
from shoestring.zoo._emoji_clip import EmojiCLIP
from shoestring.zoo.train._common import (
    clamp_scale,
    contrastive_loss,
    index_batches,
    seeded,
    share,
    warmup_cosine,
)

WHAT = "dual encoder of pictures and short texts: trained projections of frozen EfficientNet-Lite0 and MiniLM"
DATA = "bundle emoji: names and two drawings (google, twitter) of 1906 emoji, of which a fifth, by name, is never seen"
LICENCE = "Noto Emoji: Apache 2.0 and OFL 1.1; Twemoji: CC BY 4.0 (see the bundle's licence file)"
SEED = 0

STYLES = ("google", "twitter")
STEPS = 1000
BATCH = 256
RATE = 1e-3
DECAY = 0.3
NOISE = 0.3  # in units of each feature's deviation


def held_out(names: np.ndarray) -> np.ndarray:
    """(n,) bool: whether an emoji of this name is one of the fifth that training never sees."""
    return np.array([zlib.crc32(name.encode()) % 5 == 0 for name in names.tolist()])


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, int]:
    steps, size = (5, 32) if smoke else (STEPS, BATCH)
    drawn = [world.emoji(style) for style in STYLES]
    rows = np.flatnonzero(~held_out(drawn[0]["captions"]))[: 64 if smoke else None]
    image_encoder, text_encoder = (
        backbones.load("efficientnet-lite0", device=device),
        backbones.load("minilm", device=device),
    )
    images = torch.stack([torch.from_numpy(image_encoder.extract(one["images"][rows])) for one in drawn]).to(device)
    texts = torch.from_numpy(text_encoder.extract(drawn[0]["captions"][rows].tolist())).to(device)
    spread = [images.std((0, 1)), texts.std(0)]
    with seeded(SEED):
        model = EmojiCLIP().to(device)
    generator = torch.Generator().manual_seed(SEED)  # on the CPU, so that all devices train on the same noise

    def noisy(features: Tensor, deviation: Tensor) -> Tensor:
        return features + NOISE * deviation * torch.randn(features.shape, generator=generator).to(device)

    def step(model: EmojiCLIP, batch: Tensor) -> Tensor:
        style = torch.randint(len(STYLES), batch.shape, generator=generator).to(device)
        return contrastive_loss(model(noisy(images[style, batch], spread[0]), noisy(texts[batch], spread[1])))

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    with seeded(SEED):  # dropout draws from the global generator
        loop.fit(
            model,
            index_batches(len(rows), size, steps, SEED),
            step,
            optimizer,
            scheduler=warmup_cosine(optimizer, steps, warmup=min(50, steps // 2)),
            max_steps=steps,
            callbacks=[clamp_scale],
            generators=[generator],
            checkpoint=checkpoint,
            checkpoint_every=None if checkpoint is None else 200,
            progress=progress,
        )
    model.half().save_pretrained(out)
    return {"steps": steps, "parameters": sum(parameter.numel() for parameter in model.parameters())}


@torch.no_grad()
def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """All on the emoji never seen; `fast` is as good as all of it, being a few hundred."""
    model = load("model")
    figures, images = {}, {}
    for style in STYLES:
        drawn = world.emoji(style)
        unseen = held_out(drawn["captions"])
        images[style] = model.get_image_features(drawn["images"][unseen])
        texts = model.get_text_features(drawn["captions"][unseen].tolist())
        scores = texts @ images[style].T  # (n, n)
        rank = (scores > scores.diagonal()[:, None]).sum(1)
        for k in (1, 10):
            figures[f"recall@{k}, name to image among {len(rank)} unseen emoji, {style}"] = share(rank < k)
        categories = model.get_text_features(_categories())
        answers = (images[style] @ categories.T).argmax(1).cpu()
        figures[f"accuracy over {len(categories)} category names, unseen emoji, {style}"] = share(
            answers == torch.from_numpy(drawn["category"][unseen])
        )
    scores = images["google"] @ images["twitter"].T
    figures["recall@1, google to twitter drawing, unseen emoji"] = share(
        scores.argmax(1).cpu() == torch.arange(len(scores))
    )
    return figures


def _categories() -> list[str]:
    names = data.load("emoji", split="google").features["category"].names
    return [name.lower().replace("&", "and") for name in names]
