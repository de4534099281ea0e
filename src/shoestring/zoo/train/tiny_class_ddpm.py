"""tiny-class-ddpm: noise predictor for 28 x 28 grey garments, told the class or nothing.

A `diffusers.UNet2DModel` with 16, 32 and 64 channels at 28 x 28, 14 x 14 and 7 x 7, one residual block down and two
up at each size, self-attention at 14 x 14 and 7 x 7 (heads of 32 channels). Classes 0-9 are garments, class 10
(`NULL`) is "no class": in training each label becomes it with probability `DROP`, so that classifier-free guidance
(Ho, Salimans 2022, arXiv 2207.12598) has its second prediction. The network is narrow where pixels are many and wide
where they are few, as training and every claim that samples from it must run on one core.

Data: the ``fashion`` bundle's 20,000 training images in [-1, 1], as they are. Loss: weighted squared error of the
noise (`noise_loss`, gamma 4), 1000 steps, linear betas from 1e-4 to 0.012. With the usual 0.02 the image behind the
predicted noise is a division by 0.006 at the last step, and nothing is clipped (``clip_sample`` is False: CFG++ and
inversion want it so): in a first weak twin, trained in this way, its errors grew into noise. 0.012 leaves a signal of
0.05. Small batches (many steps in little time), AdamW, half a cosine to 0; the averaged weights are kept. The last
layer of every residual branch starts at zero, as in Dhariwal, Nichol 2021 (arXiv 2105.05233).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image, ImageDraw
from torch import Tensor, nn

from shoestring import zoo
from shoestring.loop import fit
from shoestring.metrics import frechet_distance
from shoestring.zoo.train._common import (
    EMA,
    drop,
    index_batches,
    judged,
    noise_loss,
    seeded,
    warmup_cosine,
    zero_last_layers,
)
from shoestring.zoo.train._fashion import class_names, garments

WHAT = (
    "class-conditional UNet2DModel of 28 x 28 grey garments in [-1, 1], epsilon prediction; class 10 is the null class"
)
DATA = "fashion (the bundle): 20,000 training images; measured against the 5,000 test images"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"
SEED = 4

STEPS, BATCH, LR = 4000, 32, 2e-3
CHANNELS, HEAD = (16, 32, 64), 32
NULL, DROP, GAMMA = 10, 0.12, 4.0


def new_unet(channels: tuple[int, int, int], head: int, seed: int) -> Any:
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            attention_head_dim=head,
            norm_num_groups=8,
            num_class_embeds=NULL + 1,
        )
    zero_last_layers(unet, ("conv2", "to_out.0", "conv_out"))
    return unet


def new_scheduler() -> Any:
    return DDIMScheduler(beta_schedule="linear", beta_end=0.012, clip_sample=False, timestep_spacing="trailing")


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Train and save the network and its scheduler."""
    steps = 4 if smoke else STEPS
    unet = new_unet(CHANNELS, HEAD, SEED)
    return fit_unet(unet, out, steps, LR, SEED, smoke=smoke, device=device, checkpoint=checkpoint, progress=progress)


def fit_unet(
    unet: Any,
    out: Path,
    steps: int,
    lr: float,
    seed: int,
    *,
    smoke: bool,
    device: str,
    checkpoint: Path | None,
    progress: bool | None,
) -> dict[str, object]:
    """What this model and its weak twin share."""
    images, labels = (rows.to(device) for rows in garments("train[:256]" if smoke else "train"))
    unet, scheduler = unet.to(device, memory_format=torch.channels_last), new_scheduler()
    generator = torch.Generator().manual_seed(seed)

    def step(unet: nn.Module, rows: Tensor) -> Tensor:
        told = drop(labels[rows], NULL, DROP, generator)
        return noise_loss(unet, scheduler, images[rows], generator, gamma=GAMMA, class_labels=told)

    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=0.01)
    average = EMA(unet, 0.995)
    fit(
        unet,
        index_batches(len(images), BATCH, steps, seed),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(200, steps)),
        max_steps=steps,
        clip_grad_norm=1.0,
        callbacks=[average],
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 2 if smoke else 200,
        progress=progress,
    )
    average.copy_to(unet)
    unet.half().save_pretrained(out / "unet")
    scheduler.save_pretrained(out / "scheduler")
    return {"steps": steps, "parameters": sum(p.numel() for p in unet.parameters())}


@torch.no_grad()
def sample(
    unet: nn.Module,
    scheduler: Any,
    labels: Tensor,
    *,
    scale: float,
    steps: int = 20,
    generator: torch.Generator | None = None,
    batch: int = 64,
) -> Tensor:
    """Images (n, 1, 28, 28) in [-1, 1] on the CPU, by deterministic DDIM with classifier-free guidance.

    eps = eps(x, null) + scale (eps(x, label) - eps(x, null)): scale 1 is the conditional model, 0 the unconditional.
    The noise of all n is drawn at once, on the CPU: `batch` does not change which image comes out.
    """
    scheduler = DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    device = next(unet.parameters()).device
    noise = torch.randn((len(labels), 1, 28, 28), generator=generator)
    done = []
    for x, told in zip(noise.split(batch), labels.split(batch), strict=True):
        x, told = x.to(device), told.to(device)
        for t in scheduler.timesteps:
            eps = unet(x, t, class_labels=told if scale else torch.full_like(told, NULL)).sample
            if scale not in (0, 1):
                eps_null = unet(x, t, class_labels=torch.full_like(told, NULL)).sample
                eps = eps_null + scale * (eps - eps_null)
            x = scheduler.step(eps, t, x).prev_sample
        done.append(x.clamp(-1, 1).cpu())
    return torch.cat(done)


@torch.no_grad()
def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """What judge-fashion says of samples without guidance and with, and the loss on test images.

    The distances are between as many samples and the test images; that of as many training images is their floor.
    """
    unet, scheduler = load().to(memory_format=torch.channels_last), load("scheduler")
    device = next(unet.parameters()).device
    judge = zoo.load("judge-fashion", device=device)
    images, classes = garments("test")
    labels = torch.arange(80 if fast else 300) % 10
    _, real = judged(judge, images[:1000].to(device) if fast else images.to(device))
    figures = {}
    for name, scale in [("with guidance 2", 2.0)] + ([] if fast else [("without guidance", 1.0)]):
        generator = torch.Generator().manual_seed(0)
        samples = sample(unet, scheduler, labels, scale=scale, steps=10 if fast else 20, generator=generator)
        answers, features = judged(judge, samples.to(device))
        figures[f"judge accuracy {name}"] = float((answers == labels.numpy()).mean())
        if not fast:
            figures[f"frechet distance {name}"] = frechet_distance(features, real)
    if not fast:
        floor = judged(judge, garments("train[:300]")[0].to(device))[1]
        figures["frechet distance of training images"] = frechet_distance(floor, real)
    generator, n = torch.Generator().manual_seed(0), 160 if fast else 2000
    losses = [
        noise_loss(unet, scheduler, part.to(device), generator, class_labels=told.to(device)).item()
        for part, told in zip(images[:n].split(80), classes[:n].split(80), strict=True)
    ]
    return figures | {"noise loss": sum(losses) / len(losses)}


def sheet(load: Callable[..., Any]) -> Image.Image:
    """Each class: eight samples without guidance and the same noise with, then four training images."""
    unet, scheduler = load().to(memory_format=torch.channels_last), load("scheduler")
    labels = torch.arange(10).repeat_interleave(8)
    columns = [
        sample(unet, scheduler, labels, scale=scale, steps=25, generator=torch.Generator().manual_seed(1)).view(
            10, 8, 28, 28
        )
        for scale in (1.0, 2.0)
    ]
    images, classes = garments("train[:400]")
    real = torch.stack([images[classes == k][:4, 0] for k in range(10)])
    return contact_sheet([*columns, real], class_names(), ["without guidance", "guidance 2", "training images"])


def contact_sheet(blocks: Sequence[Tensor], rows: Sequence[str], titles: Sequence[str], size: int = 56) -> Image.Image:
    """Blocks (R, C, H, W) in [-1, 1] side by side, each under its title; row names at the left."""
    left, top, gap, between = 90, 18, 2, 14
    width = left + sum(block.shape[1] * (size + gap) + between for block in blocks)
    canvas = Image.new("L", (width, top + len(rows) * (size + gap)), 255)
    draw = ImageDraw.Draw(canvas)
    for r, name in enumerate(rows):
        draw.text((4, top + r * (size + gap) + size // 2 - 6), name, fill=0)
    for block, title in zip(blocks, titles, strict=True):
        draw.text((left, 3), title, fill=0)
        pixels = ((block + 1) * 127.5).round().to(torch.uint8).numpy()  # (R, C, H, W)
        for r, row in enumerate(pixels):
            for c, image in enumerate(row):
                tile = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + c * (size + gap), top + r * (size + gap)))
        left += block.shape[1] * (size + gap) + between
    return canvas
