"""tiny-t2i: text to image as in Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752), on the colour world.

A `diffusers.StableDiffusionPipeline` of four parts. The autoencoder halves the side: 32 x 32 RGB to 16 x 16 with four
channels, as the denoiser then costs a quarter. The denoiser is a `UNet2DConditionModel` with 32 and 96 channels at
16 x 16 and 8 x 8, one residual block down and two up, self- and cross-attention at both sizes. The text encoder and the
tokenizer are tiny-clip's, frozen; the condition is its last states of 32 tokens. There is no safety checker.

Data: scenes of `shoestring.data.world` with garments of the training split and seen pairs only, a fifth with two
objects; captions drawn anew at every use as for tiny-clip, so that coarse names ("a red shoe") occur too.
With probability `DROP` the caption is the empty text, for classifier-free guidance (arXiv 2207.12598).

Recipe: first the autoencoder, by squared error and a very small KL term, then scaled to latents of unit variance.
Then the denoiser on latents computed once: weighted squared error of the noise (`noise_loss`, gamma 4), 1000 steps,
linear betas up to 0.012 (why: see tiny-class-ddpm). The last layer of every residual branch starts at zero; AdamW,
warm-up, half a cosine; the averaged weights are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shoestring import loop, zoo
from shoestring.data import world
from shoestring.metrics import frechet_distance
from shoestring.zoo.train import tiny_clip
from shoestring.zoo.train._common import (
    EMA,
    index_batches,
    judged,
    noise_loss,
    seeded,
    to_tensor,
    warmup_cosine,
    zero_last_layers,
)

WHAT = "StableDiffusionPipeline of the captioned colour world: 32 x 32 RGB from a caption, epsilon prediction"
DATA = (
    "shoestring.data.world: 40,000 scenes drawn from garments of the fashion bundle's training split, 20 % with two "
    "objects, 16 of 80 (garment, colour) pairs withheld; captions of its grammar"
)
LICENCE = "Fashion-MNIST: MIT"
SEED = 5

SCENES = 40_000
VAE_STEPS, VAE_BATCH, VAE_LR, VAE_CHANNELS = 900, 32, 2e-3, (16, 32)
STEPS, BATCH, LR, CHANNELS, DROP, GAMMA = 3600, 32, 1e-3, (32, 96), 0.12, 4.0
GUIDANCE = 3.0


def new_vae() -> AutoencoderKL:
    with seeded(SEED):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=VAE_CHANNELS,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=world.SIDE,
            mid_block_add_attention=False,
        )


def new_unet(channels: tuple[int, int] = CHANNELS) -> UNet2DConditionModel:
    with seeded(SEED):
        unet = UNet2DConditionModel(
            sample_size=world.SIDE // 2,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=2,  # what diffusers calls so is the number of heads
            norm_num_groups=16,
        )
    zero_last_layers(unet, ("conv2", "proj_out", "conv_out"))
    return unet


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="linear", beta_end=0.012, clip_sample=False, steps_offset=1, timestep_spacing="trailing"
    )


def text_tower(smoke: bool) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """tiny-clip's. A smoke run does without it: an untrained one."""
    if not smoke or "tiny-clip" in zoo.names():
        return zoo.load("tiny-clip").text_model, zoo.load("tiny-clip", "tokenizer")
    tokenizer = tiny_clip.make_tokenizer(world.draw(200, seed=SEED).captions.tolist())
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tiny_clip.TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(SEED):
        return CLIPTextModel(config), tokenizer


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, Any]:
    scenes = world.draw(128 if smoke else SCENES, seed=SEED, two=0.2, pairs="seen")
    vae = new_vae().to(device, memory_format=torch.channels_last)
    _fit_vae(vae, scenes.images, smoke, None if checkpoint is None else checkpoint / "vae", progress)
    latents = _encode(vae, scenes.images)
    scale = 1 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)

    text, tokenizer = text_tower(smoke)
    unet = new_unet((16, 32) if smoke else CHANNELS).to(device, memory_format=torch.channels_last)
    text.to(device).eval()
    _fit_unet(
        unet,
        latents * scale,
        scenes,
        text,
        tokenizer,
        smoke,
        None if checkpoint is None else checkpoint / "unet",
        progress,
    )

    for part in (vae, unet):
        part.to(memory_format=torch.contiguous_format)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(out)
    steps = {"steps": 4 if smoke else STEPS, "steps of the autoencoder": 4 if smoke else VAE_STEPS}
    counts = {f"parameters of {n}": sum(p.numel() for p in m.parameters()) for n, m in (("vae", vae), ("unet", unet))}
    return {**steps, "parameters": sum(counts.values()) + sum(p.numel() for p in text.parameters()), **counts}


def _fit_vae(
    vae: AutoencoderKL, images: np.ndarray, smoke: bool, checkpoint: Path | None, progress: bool | None
) -> None:
    steps = 4 if smoke else VAE_STEPS
    generator = torch.Generator().manual_seed(SEED)

    def step(vae: Any, rows: Tensor) -> Tensor:
        pixels = to_tensor(images[rows.cpu().numpy()]).to(vae.device, memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return nn.functional.mse_loss(decoded, pixels) + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()

    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, weight_decay=0.01)
    loop.fit(
        vae,
        index_batches(len(images), VAE_BATCH, steps, SEED),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(50, steps)),
        clip_grad_norm=1.0,
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 2 if smoke else 150,
        progress=progress,
    )


def _fit_unet(
    unet: UNet2DConditionModel,
    latents: Tensor,
    scenes: world.Scenes,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    smoke: bool,
    checkpoint: Path | None,
    progress: bool | None,
) -> None:
    steps, size = (4, 8) if smoke else (STEPS, BATCH)
    scheduler, generator = new_scheduler(), torch.Generator().manual_seed(SEED)

    def step(unet: Any, batch: tuple[int, Tensor]) -> Tensor:
        number, rows = batch
        rows = rows.cpu()
        rng = np.random.default_rng([SEED, number])  # of the step, so that a resumed run draws the same captions
        captions = ["" if rng.random() < DROP else tiny_clip.caption(scenes, row, rng) for row in rows.tolist()]
        x = latents[rows].to(unet.device, memory_format=torch.channels_last)
        return noise_loss(
            unet, scheduler, x, generator, gamma=GAMMA, encoder_hidden_states=states(text, tokenizer, captions)
        )

    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=0.01)
    average = EMA(unet, 0.995)
    loop.fit(
        unet,
        list(enumerate(index_batches(len(scenes), size, steps, SEED))),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(150, steps)),
        clip_grad_norm=1.0,
        callbacks=[average],
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 2 if smoke else 100,
        progress=progress,
    )
    average.copy_to(unet)


@torch.no_grad()
def states(text: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(B, 32, 128), as the pipeline computes them."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text(ids.to(text.device)).last_hidden_state


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Means of the latents, (n, 4, 16, 16) on the CPU, not yet scaled."""
    starts = range(0, len(images), 250)
    return torch.cat([vae.encode(to_tensor(images[i : i + 250]).to(vae.device)).latent_dist.mean.cpu() for i in starts])


def prompts(pairs: str, size: str | None = None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Every (garment, colour) pair once: its caption, and the numbers of garment and colour."""
    garment, colour = (numbers.ravel() for numbers in np.indices((len(world.GARMENTS), len(world.COLOURS))))
    kept = world.withheld(garment, colour) == (pairs == "withheld")
    garment, colour = garment[kept], colour[kept]
    names = [f"{world.COLOURS[c]} {world.GARMENTS[g]}" for g, c in zip(garment, colour, strict=True)]
    return [_phrase(f"{size} {name}" if size else name) for name in names], garment, colour


def _phrase(name: str) -> str:
    if name.endswith("trousers"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def sample(pipeline: Any, captions: list[str], *, steps: int, seed: int, guidance: float = GUIDANCE) -> Tensor:
    """(n, 3, 32, 32) in [-1, 1], by DDIM, 40 at a time."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i in range(0, len(captions), 40):
        told = captions[i : i + 40]
        made = pipeline(told, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np")
        images.append(torch.from_numpy(made.images).permute(0, 3, 1, 2).contiguous() * 2 - 1)
    return torch.cat(images)


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """Do judges find in samples what was asked for, and how close are the samples to scenes?"""
    pipeline, steps = load(), 12 if fast else 20
    judges = {name: zoo.load(f"judge-{name}") for name in ("garment", "colour", "position")}
    figures: dict[str, float] = {}
    features = []
    for pairs, rounds in (("seen", 1 if fast else 2), ("withheld", 1 if fast else 3)):
        captions, garment, colour = prompts(pairs, "large")
        if fast:
            captions, garment, colour = captions[::2], garment[::2], colour[::2]
        images = sample(pipeline, captions * rounds, steps=steps, seed=SEED)
        answers, feature = judged(judges["garment"], images)
        features.append(feature)
        figures[f"garment accuracy, {pairs} pairs"] = float(np.mean(answers == np.tile(garment, rounds)))
        answers, _ = judged(judges["colour"], images)
        figures[f"colour accuracy, {pairs} pairs"] = float(np.mean(answers == np.tile(colour, rounds)))
    scenes = world.draw(1000, split="test", seed=SEED, two=0, pairs="seen")
    large = to_tensor(scenes.images[scenes.size[:, 0] == 1])
    if not fast:
        _, real = judged(judges["garment"], large[: len(features[0])])
        figures["Frechet distance of large objects to as many test scenes"] = frechet_distance(features[0], real)
        places = [place for place in range(5) for _ in range(8)]
        words = [_place(k, place) for k, place in enumerate(places)]
        answers, _ = judged(judges["position"], sample(pipeline, words, steps=steps, seed=SEED))
        figures["position accuracy"] = float(np.mean(answers == np.array(places)))
    pixels = to_tensor(scenes.images[:500])
    again = _reconstructed(pipeline.vae, pixels)
    figures["PSNR of the autoencoder, dB"] = float(
        (10 * (4 / (again - pixels).square().mean((1, 2, 3))).log10()).mean()
    )
    for name, told in (("scenes", pixels), ("reconstructions", again)):
        answers, _ = judged(judges["garment"], told)
        figures[f"garment accuracy of {name}"] = float(np.mean(answers == scenes.garment[:500, 0]))
    return {name: round(figure, 4) for name, figure in figures.items()}


def _place(k: int, place: int) -> str:
    captions, _, _ = prompts("seen", "small")
    return f"{captions[7 * k % len(captions)]} {world._POSITION_WORDS[place][0]}"


@torch.no_grad()
def _reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean
    return vae.decode(latents).sample.float().cpu().clamp(-1, 1)


def sheet(load: Callable[..., Any]) -> Image.Image:
    """8 x 8 samples: large objects of seen pairs, withheld pairs (marked *), small ones in places, two objects."""
    captions = list(_sheet_captions())
    images = sample(load(), [caption.lstrip("*") for caption in captions], steps=25, seed=SEED)
    pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    width, height = 132, 134
    page = Image.new("RGB", (8 * width, 8 * height), "white")
    pen = ImageDraw.Draw(page)
    for k, (caption, picture) in enumerate(zip(captions, pixels, strict=True)):
        x, y = k % 8 * width, k // 8 * height
        page.paste(Image.fromarray(picture).resize((96, 96), Image.Resampling.NEAREST), (x + 18, y))
        pen.text((x + 2, y + 98), "\n".join(wrap(caption, 24)), fill="black", font_size=9)
    return page


def _sheet_captions() -> Iterator[str]:
    seen, withheld = prompts("seen", "large")[0], prompts("withheld")[0]
    yield from seen[::3][:16]
    yield from ("*" + caption for caption in withheld)
    yield from (_place(k, k % 5) for k in range(16))
    names = prompts("seen")[0]
    forms = ("{} on the left and {} on the right", "{} above {}")
    yield from (forms[k % 2].format(names[11 * k % 64], names[(17 * k + 5) % 64]) for k in range(16))
