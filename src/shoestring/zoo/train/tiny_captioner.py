"""tiny-captioner: describes a 32 x 32 picture of one garment, nearly always in general terms, as web captions do.

Architecture: `transformers.VisionEncoderDecoderModel`, a ViT (32 x 32, patches of 4, width 128, 4 layers, 4 heads) and
a GPT-2 with cross-attention (width 128, 3 layers, 4 heads, 24 positions), of equal width, so that nothing lies between
them; byte-level BPE over the captions, in which every word of theirs is one token.

Data: `shoestring.data.world`, scenes with one object, with captions of mixed specificity (`captions`)::

    a photo of a top | this is a garment | a shoe                           generic, with probability 0.7
    a red t-shirt | a picture of a small blue sandal on the left            specific, otherwise

Generic captions name a class of `GENERIC` only, never a garment's own word, colour, size or place; so the most probable
caption is generic, and what the picture shows must be asked for (classifier-free guidance, `shoestring.guide`).

**The null image.** With probability 0.5 the *encoder's states are replaced by zeros*, all 65 of them, the
cross-attention mask unchanged: Kornblith et al.'s zero embedding. log p(caption) without a picture is therefore

    model(encoder_outputs=BaseModelOutput(torch.zeros_like(states)), decoder_input_ids=...)

and works so on any `VisionEncoderDecoderModel` (one with ``enc_to_dec_proj`` zeroes before that projection).

Recipe: cross-entropy of the caption; added to it, with heads that are thrown away afterwards, that of the garment,
colour and place read off the encoder's mean state: it stands for the pretrained encoder with which captioners begin,
and which 15 % of captions (specific, and not masked) could not train in so short a time. Only unmasked pictures go
through the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput

from shoestring import loop
from shoestring.data import world
from shoestring.zoo.train._common import (
    byte_level_bpe,
    decay_groups,
    index_batches,
    seeded,
    to_tensor,
    warmup_cosine,
)

WHAT = (
    "captioner of 32 x 32 pictures of one garment (ViT and GPT-2), generic unless guided, with tokenizer and processor"
)
DATA = (
    "fashion bundle (Fashion-MNIST), tinted and placed by shoestring.data.world: single objects; 70 % generic "
    "captions; the encoder was also told garment, colour and place, in place of a pretraining"
)
LICENCE = "weights: the project's; data: Fashion-MNIST, MIT"
SEED = 0

GENERIC_SHARE, NULL_SHARE = 0.7, 0.5
GENERIC = {  # the general words for each coarse class of world.COARSE, none of them a garment's own
    "top": ("top", "garment"),
    "trousers": ("garment", "thing"),
    "dress": ("garment", "thing"),
    "shoe": ("shoe", "fashion accessory"),
    "bag": ("fashion accessory", "thing"),
}
OPENINGS = ("", "", "a photo of ", "a picture of ", "this is ")
SCENES, CAPTIONS_EACH = 30_000, 4
STEPS, BATCH, RATE = 950, 96, 1.5e-3
CONTEXT = 24
PAD, START, END = "<pad>", "<s>", "</s>"
START_ID = 1


def captions(scenes: world.Scenes, rng: np.random.Generator, generic: float = GENERIC_SHARE) -> list[str]:
    """One caption a scene of one object each: with probability `generic` a general one, else a specific one."""
    found = []
    for k in range(len(scenes)):
        if rng.random() < generic:
            nouns = GENERIC[world.COARSE[scenes.garment[k, 0]]]
            text = f"a {nouns[rng.integers(len(nouns))]}"
        else:
            parts = (scenes.garment[k], scenes.colour[k], scenes.size[k], scenes.position[k])
            text = world.caption(*parts, rng=rng, mention=0.25, synonyms=False)
        found.append(OPENINGS[rng.integers(len(OPENINGS))] + text)
    return found


def named(text: str) -> tuple[str | None, str | None]:
    """The garment and the colour that a caption names, as words of `world.GARMENTS` and `world.COLOURS`, or None."""
    padded = f" {text} "
    garment = next((word for word in world.GARMENTS if f" {word} " in padded), None)
    return garment, next((word for word in world.COLOURS if f" {word} " in padded), None)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that writes `END` after a text: every word of `texts` is one token, any text comes back."""
    tokenizer = byte_level_bpe(texts, 640, [PAD, START, END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: tuple[int, int] = (4, 3)) -> Any:
    """An untrained captioner with `layers` of encoder and decoder."""
    vit = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=layers[0],
        num_attention_heads=4,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers[1],
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        add_cross_attention=True,
        is_decoder=True,
        tie_word_embeddings=False,
        **special,
    )
    with seeded(SEED):
        encoder, decoder = ViTModel(vit), GPT2LMHeadModel(gpt)
        model = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = START_ID
    model.config.pad_token_id, model.config.eos_token_id = 0, 2
    model.generation_config = GenerationConfig(decoder_start_token_id=START_ID, max_length=CONTEXT, **special)
    return model


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Train the captioner; save it with its tokenizer and processor."""
    n, steps = (200, 4) if smoke else (SCENES, STEPS)
    scenes = world.draw(n, seed=SEED, two=0)
    rng = np.random.default_rng(SEED)
    texts = [text for _ in range(CAPTIONS_EACH) for text in captions(scenes, rng)]  # text r is of scene r % n
    tokenizer = make_tokenizer(texts)
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    answers = torch.from_numpy(np.stack([scenes.garment, scenes.colour, scenes.position])[..., 0].astype(np.int64))
    counts = (len(world.GARMENTS), len(world.COLOURS), len(world.POSITIONS))
    captioner = new_model(tokenizer, width=32 if smoke else 128, layers=(1, 1) if smoke else (4, 3))
    width = captioner.config.encoder.hidden_size
    with seeded(SEED):
        heads = nn.Linear(width, sum(counts))
    both = nn.ModuleDict({"captioner": captioner, "heads": heads}).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def step(both: Any, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = rows.cpu()
        seen = torch.rand(len(rows), generator=generator) >= NULL_SHARE
        seen[0] = True
        pixels = to_tensor(scenes.images[rows[seen].numpy() % n]).to(device, memory_format=torch.channels_last)
        states = both["captioner"].encoder(pixel_values=pixels).last_hidden_state
        given = states.new_zeros((len(rows), *states.shape[1:])).index_put((seen.to(device),), states)
        loss = both["captioner"](encoder_outputs=BaseModelOutput(given), labels=labels[rows].to(device)).loss
        guesses = both["heads"](states.mean(1)).split(counts, 1)
        truth = answers[:, rows[seen] % n].to(device)
        extra = sum(nn.functional.cross_entropy(guess, right) for guess, right in zip(guesses, truth, strict=True))
        return loss + 0.3 * extra, {
            "caption": loss.detach(),
            "garment": (guesses[0].argmax(1) == truth[0]).float().mean(),
        }

    optimizer = torch.optim.AdamW(decay_groups(both, 0.05), lr=RATE, betas=(0.9, 0.98))
    loop.fit(
        both,
        index_batches(len(texts), BATCH, steps, SEED),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(150, steps)),
        max_steps=steps,
        clip_grad_norm=1.0,
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 200,
        progress=progress,
    )
    captioner.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(out)
    return {"steps": steps, "parameters": captioner.num_parameters()}


def _states(model: Any, images: np.ndarray) -> Tensor:
    return model.encoder(
        pixel_values=to_tensor(images).to(model.device, memory_format=torch.channels_last)
    ).last_hidden_state


@torch.no_grad()
def describe(model: Any, tokenizer: Any, images: np.ndarray, gamma: float = 1.0) -> list[str]:
    """Greedy captions of (n, 32, 32, 3) uint8: argmax of log p(y) + gamma (log p(y|x) - log p(y)) at each token."""
    states = _states(model, images)
    ids = torch.full((len(images), 1), START_ID, device=model.device)
    for _ in range(CONTEXT - 1):
        log_p = _next(model, states, ids)
        if gamma != 1:
            null = _next(model, torch.zeros_like(states), ids)
            log_p = null + gamma * (log_p - null)
        ended = (ids == tokenizer.eos_token_id).any(1)
        ids = torch.cat([ids, log_p.argmax(1).masked_fill(ended, tokenizer.pad_token_id)[:, None]], 1)
        if bool((ids == tokenizer.eos_token_id).any(1).all()):
            break
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _next(model: Any, states: Tensor, ids: Tensor) -> Tensor:
    """log p of the next token, (n, V)."""
    return model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids).logits[:, -1].log_softmax(1)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, images: np.ndarray, texts: list[str], *, null: bool) -> float:
    """exp of the mean -log p of a caption's token, the end included, with the picture or (`null`) without."""
    states = _states(model, images)
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(model.device)
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    states = torch.zeros_like(states) if null else states
    return float(model(encoder_outputs=BaseModelOutput(states), labels=labels).loss.exp())


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """On scenes of test garments: perplexities, and of captions by guidance how many are specific, and rightly so."""
    model, tokenizer = load(), load("tokenizer")
    scenes = world.draw(100 if fast else 500, split="test", seed=1, two=0)
    texts = captions(scenes, np.random.default_rng(1))
    figures = {
        "held-out perplexity": perplexity(model, tokenizer, scenes.images, texts, null=False),
        "held-out perplexity without the picture": perplexity(model, tokenizer, scenes.images, texts, null=True),
    }
    truth = [
        (world.GARMENTS[g], world.COLOURS[c]) for g, c in zip(scenes.garment[:, 0], scenes.colour[:, 0], strict=True)
    ]
    for gamma in (1.0, 2.0, 3.0):
        said = [named(text) for text in describe(model, tokenizer, scenes.images, gamma)]
        for k, what in enumerate(("garment", "colour")):
            hits = [answer[k] == right[k] for answer, right in zip(said, truth, strict=True) if answer[k] is not None]
            figures[f"share that name the {what}, gamma {gamma:g}"] = len(hits) / len(said)
            figures[f"share of right ones among these, {what}, gamma {gamma:g}"] = float(np.mean(hits)) if hits else 0.0
    return figures


def sheet(load: Callable[..., Any]) -> Any:
    """Sixteen test pictures with their greedy captions, plain and guided by 2 and 3."""
    from PIL import Image, ImageDraw

    model, tokenizer = load(), load("tokenizer")
    scenes = world.draw(16, split="test", seed=2, two=0)
    lines = [describe(model, tokenizer, scenes.images, gamma) for gamma in (1.0, 2.0, 3.0)]
    page = Image.new("RGB", (860, 8 * 76), "white")
    draw = ImageDraw.Draw(page)
    for k, picture in enumerate(scenes.images):
        left, top = 430 * (k % 2), 76 * (k // 2) + 4
        page.paste(Image.fromarray(picture).resize((64, 64), 0), (left + 4, top))
        for i, (gamma, texts) in enumerate(zip((1, 2, 3), lines, strict=True)):
            draw.text((left + 76, top + 6 + 18 * i), f"{gamma}: {texts[k]}", fill="black")
    return page
