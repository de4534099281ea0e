"""tiny-clip: CLIP at 1/100 of its size, on the captioned colour world (Radford et al. 2021, arXiv 2103.00020).

Architecture: `transformers.CLIPModel`. Images of 32 x 32 in patches of 8 x 8, so 16 tokens and the class token, width
128, 4 layers, 4 heads. Texts of at most 32 tokens, width 128, 3 layers, 4 heads. Both are projected to 128 features.
The tokenizer is a `CLIPTokenizer` whose byte-pair merges come from captions of the world: every word of it is one
token, any other text goes by bytes. The end of a text has the largest id, as in CLIP, and pads too.

Data: `shoestring.data.world`, 60,000 scenes with garments of the training split, drawn once, three in ten with two
objects. The withheld (garment, colour) pairs never occur. The caption of a scene is drawn anew whenever the scene is
seen: other synonyms, size and position named or not, a coarse name ("a red shoe") in a tenth and no colour in
another tenth.

Recipe: the symmetric contrastive loss with a learned temperature whose logarithm is held to at most ln 100, AdamW (0.9,
0.98, decay 0.1 of matrices), warm-up, half a cosine. Captions that are equal, or true of another scene of the batch,
are taken as they come, as CLIP does: the best score under this loss is still log p(image | text) / p(image). There are
no augmentations: a mirror image would make "on the left" wrong.

Patches of 8 keep an image at 17 tokens: on one thread the time is better spent on reading the scenes more often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import models, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from shoestring import loop
from shoestring.data import world
from shoestring.zoo.train import _common
from shoestring.zoo.train._common import (
    clamp_scale,
    decay_groups,
    index_batches,
    seeded,
    share,
    to_tensor,
    warmup_cosine,
)

WHAT = "CLIP dual encoder of the captioned colour world, with its own tokenizer and image processor"
DATA = (
    "shoestring.data.world: 60,000 scenes drawn from garments of the fashion bundle's training split, 30 % with two "
    "objects, 16 of 80 (garment, colour) pairs withheld; captions of its grammar"
)
LICENCE = "Fashion-MNIST: MIT"
SEED = 0

SCENES = 60_000
STEPS = 2400
BATCH = 128
RATE = 1e-3
TOKENS = 32  # the longest text
START, END = "<|startoftext|>", "<|endoftext|>"
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "this shows {}")


def make_tokenizer(texts: Iterable[str], merges: int = 500) -> CLIPTokenizer:
    """Byte-pair encoding with at most so many merges, made of lower-case words of the texts. Knows every byte.

    Ids in CLIP's order: bytes, bytes that end a word, merges, start, end.
    """
    empty = CLIPTokenizer()
    backend = empty.backend_tokenizer
    backend.model = models.BPE(end_of_word_suffix="</w>")
    alphabet = sorted(_bytes())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]][:merges]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in found), START, END]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=found,
        model_max_length=TOKENS,
    )


def _bytes() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def make_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Images of any size to 32 x 32 in [-1, 1]; texts by the tokenizer."""
    side = world.SIDE
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def _model(tokenizer: CLIPTokenizer, *, smoke: bool) -> CLIPModel:
    layers = (1, 1) if smoke else (3, 4)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": layers[0],
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": world.SIDE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": layers[1],
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    with seeded(SEED):
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def caption(scenes: world.Scenes, row: int, rng: np.random.Generator) -> str:
    """A caption of one scene for training: now and then with a coarse name or without colours."""
    colour = scenes.colour[row] if rng.random() >= 0.1 else (world.NONE, world.NONE)
    return world.caption(scenes.garment[row], colour, scenes.size[row], scenes.position[row], rng=rng, coarse=0.1)


def contrastive_loss(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Symmetric cross entropy of which text belongs to which image, and the reverse (figure 3 of the paper)."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)  # (B, d)
    texts = F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=1)  # (B, d)
    return _common.contrastive_loss(model.logit_scale.exp() * images @ texts.T)


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, int]:
    steps, size = (8, 64) if smoke else (STEPS, BATCH)
    scenes = world.draw(1000 if smoke else SCENES, seed=SEED, two=0.3, pairs="seen")
    rng = np.random.default_rng(SEED)
    tokenizer = make_tokenizer([caption(scenes, row % len(scenes), rng) for row in range(5000)])
    model: Any = _model(tokenizer, smoke=smoke)
    model.to(device)

    def step(model: Any, batch: tuple[int, Tensor]) -> Tensor:
        number, rows = batch
        rng = np.random.default_rng([SEED, number])  # of the step, so that a resumed run draws the same captions
        captions = [caption(scenes, row, rng) for row in rows.tolist()]
        ids = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
        return contrastive_loss(model, to_tensor(scenes.images[rows.cpu().numpy()]).to(device), ids.to(device))

    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=RATE, betas=(0.9, 0.98))
    loop.fit(
        model,
        list(enumerate(index_batches(len(scenes), size, steps, SEED))),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(100, steps // 2)),
        max_steps=steps,
        clip_grad_norm=1.0,
        callbacks=[clamp_scale],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 100,
        progress=progress,
    )
    model.half().save_pretrained(out)
    make_processor(tokenizer).save_pretrained(out)
    return {"steps": steps, "parameters": model.num_parameters()}


@torch.no_grad()
def image_features(model: CLIPModel, images: np.ndarray) -> Tensor:
    """Unit features (n, d) of images (n, 32, 32, 3) uint8."""
    parts = [images[start : start + 250] for start in range(0, len(images), 250)]
    features = [model.get_image_features(pixel_values=to_tensor(part).to(model.device)).pooler_output for part in parts]
    return F.normalize(torch.cat(features).float(), dim=1).cpu()


@torch.no_grad()
def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Unit features (n, d)."""
    ids = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids.to(model.device)
    features = [model.get_text_features(input_ids=part).pooler_output for part in ids.split(250)]
    return F.normalize(torch.cat(features).float(), dim=1).cpu()


def names() -> list[str]:
    """The 80 names, "an orange t-shirt", in the order 8 garment + colour."""
    return [_name(garment, colour) for garment in range(len(world.GARMENTS)) for colour in range(len(world.COLOURS))]


def _name(garment: int, colour: int) -> str:
    one = (world.NONE, world.NONE)
    rng = np.random.default_rng(0)
    return world.caption((garment, world.NONE), (colour, world.NONE), one, one, rng=rng, mention=0, synonyms=False)


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    model, tokenizer = load("model"), load("tokenizer")

    def prompted(template: str, things: list[str]) -> Tensor:
        return text_features(model, tokenizer, [template.format(thing) for thing in things])

    single = prompted("a photo of {}", names())  # (80, d)
    ensemble = F.normalize(torch.stack([prompted(template, names()) for template in TEMPLATES]).mean(0), dim=1)
    garments = prompted("a photo of {}", [_name(garment, world.NONE) for garment in range(len(world.GARMENTS))])
    figures = {}
    for pairs in ("seen", "withheld"):
        scenes = world.draw(1000 if fast else 5000, split="test", seed=SEED, two=0, pairs=pairs)
        images = image_features(model, scenes.images)
        garment, colour = torch.from_numpy(scenes.garment[:, 0]).long(), torch.from_numpy(scenes.colour[:, 0]).long()
        answers = (images @ single.T).argmax(1)
        for prompts, texts in (("one prompt", single), ("ensemble of prompts", ensemble)):
            right = (images @ texts.T).argmax(1) == 8 * garment + colour
            figures[f"accuracy over 80 names, {pairs} pairs, {prompts}"] = share(right)
        figures[f"colour accuracy over 80 names, {pairs} pairs"] = share(answers % 8 == colour)
        figures[f"garment accuracy over 80 names, {pairs} pairs"] = share(answers // 8 == garment)
        figures[f"garment accuracy over 10 names, {pairs} pairs"] = share((images @ garments.T).argmax(1) == garment)
    recalls = [_recalls(model, tokenizer, seed) for seed in range(1 if fast else 4)]
    for k in (1, 10):
        mean = sum(recall[k] for recall in recalls) / len(recalls)
        figures[f"recall@{k}, full caption to image among 500"] = mean
    return figures


def _recalls(model: CLIPModel, tokenizer: CLIPTokenizer, seed: int) -> dict[int, float]:
    """Captions that name everything, and whether their own image is among the k nearest of 500 test scenes."""
    scenes = world.draw(500, split="test", seed=SEED + 1 + seed, two=0.3, pairs="seen")
    rng = np.random.default_rng([SEED, seed])
    columns = zip(scenes.garment, scenes.colour, scenes.size, scenes.position, strict=True)
    captions = [world.caption(*scene, rng=rng, mention=1) for scene in columns]
    scores = text_features(model, tokenizer, captions) @ image_features(model, scenes.images).T  # (500, 500)
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return {k: share(rank < k) for k in (1, 10)}
