"""tiny-var: writes grey garments of a class as 49 codes of a patch codebook, one after the other; a small GPT-2.

Architecture: `shoestring.zoo._codebook.PatchCodebook` (k-means of 4 x 4 patches, 256 codes, 7 x 7 codes an image) and
`transformers.GPT2LMHeadModel`, width 160, 4 layers, 5 heads, no dropout, embeddings tied. Its vocabulary is

    0 .. 255     codes            256 + k   class k of the ``fashion`` bundle            266   no class (null)

and its sequence the class token, then the codes in reading order; only codes are ever predicted. `log_prob_inputs`
makes that sequence of images, `sample` draws from the model, with or without classifier-free guidance.

Data: the ``fashion`` bundle's 20,000 training images, mirrored for half of the passes where that is no other picture: a
garment that is worn on the body looks alike from both sides, but all shoes and most bags here face left.

Recipe: cross-entropy of the 49 codes, the class replaced by null with probability 0.1 (so that guidance has its
unconditional half); AdamW (0.9, 0.95, decay 0.05), gradients clipped to 1, warm-up and half a cosine. Training stops
long before the model is as good as it could be: guidance and CCA (`shoestring.guide.cca`) are to improve on it, as they
do on the published models, which are far from perfect without guidance as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel

from shoestring import loop, zoo
from shoestring.metrics import frechet_distance
from shoestring.zoo._codebook import PatchCodebook
from shoestring.zoo.train._common import decay_groups, drop, index_batches, judged, seeded, warmup_cosine
from shoestring.zoo.train._fashion import class_names, garments

WHAT = "class-conditional GPT-2 over 49 patch codes of 28 x 28 grey garments, with its k-means codebook"
DATA = "fashion (the bundle): 20,000 training images, garments mirrored; measured on the 5,000 test images"
LICENCE = "MIT (Fashion-MNIST, Zalando SE)"
SEED = 0

CODES, CLASSES = 256, 10
NULL = CODES + CLASSES
STEPS, BATCH, RATE = 900, 64, 2e-3
SYMMETRIC = (0, 1, 2, 3, 4, 6)  # classes that may be mirrored


def make_codebook(images: Tensor, codes: int = CODES) -> PatchCodebook:
    """k-means of every ninth patch of `images`; as 9 and 49 have no common factor, they are from all places."""
    codebook = PatchCodebook(codes)
    patches = codebook.patches(images).flatten(0, 1)[::9].numpy()
    means = KMeans(codes, n_init=1, max_iter=30, random_state=SEED).fit(patches)
    codebook.vectors.copy_(torch.from_numpy(means.cluster_centers_).half())  # as they are saved
    return codebook


def log_prob_inputs(codes: Tensor, classes: Tensor) -> Tensor:
    """Input ids (n, 50) of codes (n, 49) and classes (n,); a class of `CLASSES` is the null class."""
    return torch.cat([CODES + classes[:, None], codes], 1)


def code_losses(model: Any, ids: Tensor) -> Tensor:
    """-log p(code | class, codes before it) in nats, (n, 49)."""
    logits = model(input_ids=ids[:, :-1]).logits[..., :CODES]  # class tokens are never written
    return nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def sample(
    model: Any, classes: Tensor, *, generator: torch.Generator, scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Codes (n, 49) of images of the given classes (n,), with the caches of keys and values.

    `scale` s is that of classifier-free guidance, l = l_null + s (l_class - l_null) on the logits; 1 is none, at half
    the cost.
    """
    n, device = len(classes), model.device
    ids = CODES + classes.to(device)
    if scale != 1:
        ids = torch.cat([ids, torch.full_like(ids, NULL)])
    ids, cache, codes = ids[:, None], DynamicCache(), []
    for _ in range(model.config.n_positions - 1):
        # By position, as the argument was called past_key_values until transformers 5.
        logits = model(ids, cache, use_cache=True).logits[:, -1, :CODES].float().cpu()
        if scale != 1:
            logits = logits[n:] + scale * (logits[:n] - logits[n:])
        code = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)  # (n, 1)
        codes.append(code)
        ids = code.to(device).repeat(1 if scale == 1 else 2, 1)
    return torch.cat(codes, 1)


def _model(*, width: int, layers: int, length: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=NULL + 1,
        n_positions=length + 1,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=NULL,
        eos_token_id=None,
    )
    with seeded(SEED):
        return GPT2LMHeadModel(config)


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, object]:
    """Find the codes, train the model, save both."""
    images, classes = garments("train[:512]" if smoke else "train")
    steps = 4 if smoke else STEPS
    codebook = make_codebook(images)
    symmetric = torch.isin(classes, torch.tensor(SYMMETRIC))
    mirrored = torch.where(symmetric[:, None, None, None], images.flip(3), images)
    codes = torch.cat([codebook.encode(part) for part in torch.cat([images, mirrored]).split(1000)])  # (2 n, 49)
    ids = log_prob_inputs(codes, classes.repeat(2))
    model = _model(width=64 if smoke else 160, layers=2 if smoke else 4, length=codebook.length).to(device)
    generator = torch.Generator().manual_seed(SEED)

    def step(model: nn.Module, rows: Tensor) -> Tensor:
        batch = ids[rows.cpu()]
        batch[:, 0] = drop(batch[:, 0], NULL, 0.1, generator)
        return code_losses(model, batch.to(device)).mean()

    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=RATE, betas=(0.9, 0.95))
    loop.fit(
        model,
        index_batches(len(ids), BATCH, steps, SEED),
        step,
        optimizer,
        scheduler=warmup_cosine(optimizer, steps, warmup=min(100, steps)),
        max_steps=steps,
        clip_grad_norm=1.0,
        generators=[generator],
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 200,
        progress=progress,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=NULL,
        do_sample=True,
        top_k=0,
        max_new_tokens=codebook.length,
        suppress_tokens=list(range(CODES, NULL + 1)),
    )
    model.half().save_pretrained(out)
    codebook.half().save_pretrained(out / "codebook")
    return {"steps": steps, "parameters": model.num_parameters()}


@torch.no_grad()
def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    """On the test images: nats per code; of samples what `judge-fashion` says of them; what the codes lose."""
    model, codebook, judge = load(), load("codebook"), zoo.load("judge-fashion")
    images, classes = garments("test")
    codes = codebook.encode(images)

    def nats(classes: Tensor) -> float:
        ids = log_prob_inputs(codes, classes)[:: 10 if fast else 1].to(model.device)
        return torch.cat([code_losses(model, part) for part in ids.split(250)]).mean().item()

    figures = {
        "held-out nats per code": nats(classes),
        "held-out nats per code, null class": nats(torch.full_like(classes, CLASSES)),
        "held-out nats per code, wrong class": nats((classes + 1) % CLASSES),
    }
    rows = slice(None, 1000 if fast else None)
    restored = codebook.decode(codes)
    error = (restored - images).square().mean((1, 2, 3))
    figures["decibels of reconstruction (PSNR)"] = (10 * (4 / error).log10()).mean().item()
    answers, _ = judged(judge, restored[rows].clamp(-1, 1))
    figures["judge's accuracy on reconstructions"] = float((answers == classes[rows].numpy()).mean())
    _, real = judged(judge, images[rows])
    wanted = torch.arange(CLASSES).repeat_interleave(50 if fast else 200)
    for scale, name in ((1.0, "samples"), (2.0, "samples guided by 2")):
        drawn = sample(model, wanted, scale=scale, generator=torch.Generator().manual_seed(SEED))
        answers, features = judged(judge, codebook.decode(drawn).clamp(-1, 1))
        figures[f"judge's accuracy on {name}"] = float((answers == wanted.numpy()).mean())
        figures[f"Frechet distance of {name}"] = frechet_distance(real, features)
    return figures


def sheet(load: Callable[..., Any]) -> Any:
    """Ten rows, a class each: four plain samples, then four guided by 2."""
    from PIL import Image, ImageDraw

    model, codebook = load(), load("codebook")
    names = class_names()
    wanted = torch.arange(CLASSES).repeat_interleave(4)
    pictures = [
        codebook.decode(sample(model, wanted, scale=scale, generator=torch.Generator().manual_seed(SEED)))
        for scale in (1.0, 2.0)
    ]
    cell, left, top = 60, 90, 20
    page = Image.new("L", (left + 8 * cell, top + CLASSES * cell), 255)
    draw = ImageDraw.Draw(page)
    draw.text((left, 4), "samples", fill=0)
    draw.text((left + 4 * cell, 4), "guided, scale 2", fill=0)
    for half, images in enumerate(pictures):
        grey = ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        for i, picture in enumerate(grey):
            k, column = divmod(i, 4)
            draw.text((4, top + k * cell + cell // 2 - 6), names[k], fill=0)
            page.paste(
                Image.fromarray(picture[0]).resize((56, 56), 0), (left + (4 * half + column) * cell, top + k * cell)
            )
    return page
