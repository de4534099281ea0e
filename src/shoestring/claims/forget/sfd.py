"""SFD against gradient ascent, a fine-tune on the rest and the same distillation without forgetting: a garment leaves
tiny-class-ddpm, which becomes a generator of one step."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all

CLAIM = (
    "One distillation makes a diffusion model a generator of one step that no longer makes a chosen class (0.36 % of "
    "CIFAR-10 class 0 recognised) and makes the others about as well as before (FID 5.32 on the nine others), without "
    "data."
)
RULE = (
    "judge-fashion on samples. partly: in the mean over seeds, of samples asked for the forgotten class at most 5 % "
    "are recognised as it, and the accuracy on the nine others is at most 10 points below that of the same "
    "distillation without the forget terms. holds: besides, for every seed at most 5 %, and accuracy on the others at "
    "most 10 points below, and Frechet distance at most twice, that of the unchanged model with eight steps. "
    "Otherwise: not at this scale."
)
OURS, PLAIN, ASCENT, REST = "SFD", "distillation without forgetting", "gradient ascent", "fine-tune on the rest"
BEFORE, ONE, NULL = "unchanged model", "unchanged model, one step", "unchanged model, null class for the forgotten"
TUNED = (OURS, ASCENT, REST)
RATES = (3e-4, 1e-3)
FORGET, SAFE, NULL_CLASS = 0, 1, 10  # t-shirt, trouser
FOUND, INSTEAD = "asked for the forgotten class, recognised as it", "asked for the forgotten class, recognised as safe"
OTHERS, DISTANCE, SECONDS = "accuracy on the nine others", "Frechet distance of the nine others", "time of 100 samples"
SIZE = {"iterations": 14, "batch": 6, "forgotten": 20, "each": 6, "sampling_steps": 8}
FAST = {"iterations": 1, "batch": 2, "forgotten": 4, "each": 1, "sampling_steps": 2}


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    size, rates = (FAST, RATES[1:]) if fast else (SIZE, RATES)
    processes = 1 if fast else None
    grid = [(arm, rate, 0, size) for arm in TUNED for rate in rates] if len(rates) > 1 else []
    found = run_all(forget, grid, lambda d, t: progress(0.35 * d, t), "rates", processes=processes) if grid else []
    best = {
        arm: _chosen([(f, rate) for (a, rate, _, _), f in zip(grid, found, strict=True) if a == arm])
        if grid
        else rates[0]
        for arm in TUNED
    }
    best |= {PLAIN: best[OURS], BEFORE: 0.0, ONE: 0.0, NULL: 0.0}
    runs = [(arm, rate, seed, size) for arm, rate in best.items() for seed in range(1, seeds + 1)]
    found = run_all(forget, runs, lambda d, t: progress(0.35 + 0.65 * d, t), "seeds", processes=processes)
    rows = []
    for arm in best:
        figures = [f for (a, *_), f in zip(runs, found, strict=True) if a == arm]
        rows += [Row.of(arm, metric, [f[metric] for f in figures], unit=UNITS.get(metric, "")) for metric in figures[0]]
    progress(1.0, "done")
    return Result(
        slug="sfd",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="tiny-class-ddpm and judge-fashion; SFD and gradient ascent read no images, the fine-tune 3,600 training "
        "images of fashion without the forgotten class; distances are to as many test images",
        note=f"t-shirt forgotten, trouser its override. {size['iterations']} iterations of batch {size['batch']} (the "
        "paper takes up to 50,000 of 128), and as many pairs of plain steps for the others. Forget weights 1 (official "
        "for Stable Diffusion; 0.01 for CIFAR-10 is for long runs), no guidance, average 0.9, else the paper's. "
        f"Rate of SFD (both networks), gradient ascent and fine-tune from {', '.join(f'{r:g}' for r in RATES)} on seed "
        "0: of those that leave at most 10 % of the forgotten class the best on the others, else the least of it. SFD "
        f"and its twin make samples in one step, the others in {size['sampling_steps']}. Gradient ascent: on the "
        "model's own samples of the class. Retraining takes 50 minutes and is impossible within a claim: in its place "
        "the fine-tune and the null class (what the model makes when it is told nothing). Seen before: the card, which "
        "expected below 10 % of the class within 30 s, and no quality at the paper's level; and, after the rule was "
        "written, seed 0 with 20 iterations of 8, in which SFD at 1e-3 forgot and kept the others, and 3e-3 ruined the "
        "network (so that 3e-3 is not in the grid). Chosen: "
        + ", ".join(f"{arm} {best[arm]:g}" for arm in TUNED)
        + ".",
    )


UNITS = {FOUND: "%", INSTEAD: "%", OTHERS: "%", SECONDS: "s"}


def verdict(rows: Sequence[Row]) -> str:
    if find(rows, OURS, FOUND).value > 5 or find(rows, OURS, OTHERS).value < find(rows, PLAIN, OTHERS).value - 10:
        return "not at this scale"
    before = zip(find(rows, BEFORE, OTHERS).seeds, find(rows, BEFORE, DISTANCE).seeds, strict=True)
    ours = zip(*(find(rows, OURS, metric).seeds for metric in (FOUND, OTHERS, DISTANCE)), strict=True)
    every = all(
        found <= 5 and others >= was - 10 and distance <= 2 * distance_was
        for (found, others, distance), (was, distance_was) in zip(ours, before, strict=True)
    )
    return "holds" if every else "partly"


def _chosen(found: list[tuple[dict[str, float], float]]) -> float:
    """The rate that forgets and keeps the others best; if none forgets, the one that comes nearest to it."""
    forgot = [(-figures[OTHERS], rate) for figures, rate in found if figures[FOUND] <= 10]
    return min(forgot or [(figures[FOUND], rate) for figures, rate in found])[1]


def forget(arm: str, rate: float, seed: int, size: dict[str, int]) -> dict[str, float]:
    """Train one arm and judge its samples; seed 0 is for the choice of the rate."""
    import torch

    from shoestring.forget.sfd import ScoreForgettingDistiller

    unet, scheduler, _ = _models()
    generator = torch.Generator().manual_seed(seed)
    if arm in (OURS, PLAIN, ONE):
        weight = 0.0 if arm == PLAIN else 1.0
        distiller = ScoreForgettingDistiller(
            unet,
            scheduler,
            FORGET,
            SAFE,
            retain=[c for c in range(10) if c != FORGET or arm == PLAIN],
            forget_weight=weight,
            score_forget_weight=weight,
            lr_score=rate,
            lr_generator=rate,
            ema_decay=0.9,
        )
        if arm != ONE:
            distiller.fit(size["iterations"], size["batch"], generator=generator, progress=False)
        return _figures(lambda labels, rng: distiller.sample(labels, rng).clamp(-1, 1), seed, size)

    from shoestring.zoo.train.tiny_class_ddpm import sample

    if arm in (ASCENT, REST):
        unet = _tuned(arm, rate, size, unet, scheduler, generator)

    def samples(labels: Any, rng: Any) -> Any:
        told = labels.masked_fill(labels == FORGET, NULL_CLASS) if arm == NULL else labels
        return sample(unet, scheduler, told, scale=1.0, steps=size["sampling_steps"], generator=rng)

    return _figures(samples, seed, size)


def _tuned(arm: str, rate: float, size: dict[str, int], unet: Any, scheduler: Any, generator: Any) -> Any:
    import torch

    from shoestring.loop import fit
    from shoestring.zoo.train._common import noise_loss
    from shoestring.zoo.train._fashion import garments
    from shoestring.zoo.train.tiny_class_ddpm import sample

    if arm == ASCENT:
        labels = torch.full((3 * size["batch"],), FORGET)
        images = sample(unet, scheduler, labels, scale=1.0, steps=size["sampling_steps"], generator=generator)
    else:
        images, labels = garments("train[:4000]")
        images, labels = images[labels != FORGET], labels[labels != FORGET]
    unet, sign = copy.deepcopy(unet), -1.0 if arm == ASCENT else 1.0

    def step(unet: Any, rows: torch.Tensor) -> torch.Tensor:
        return sign * noise_loss(unet, scheduler, images[rows], generator, class_labels=labels[rows])

    order = torch.randint(len(images), (2 * size["iterations"], size["batch"]), generator=generator)
    fit(unet, list(order), step, torch.optim.Adam(unet.parameters(), rate), progress=False)
    return unet


@cache
def _models() -> tuple[Any, Any, Any]:
    """Network, scheduler and judge, which no arm changes."""
    from shoestring import zoo

    return zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler"), zoo.load("judge-fashion")


@cache
def _real(each: int) -> Any:
    """The judge's features of as many test images of the nine others."""
    import torch

    from shoestring.zoo.train._common import judged
    from shoestring.zoo.train._fashion import garments

    images, classes = garments("test[:500]")
    chosen = torch.cat([(classes == c).nonzero()[:each, 0] for c in range(10) if c != FORGET])
    return judged(_models()[2], images[chosen])[1]


def _figures(samples: Any, seed: int, size: dict[str, int]) -> dict[str, float]:
    import torch

    from shoestring.metrics import frechet_distance
    from shoestring.zoo.train._common import judged

    others = torch.tensor([c for c in range(10) if c != FORGET] * size["each"])
    labels = torch.cat([torch.full((size["forgotten"],), FORGET), others])
    start = time.perf_counter()
    images = samples(labels, torch.Generator().manual_seed(1000 + seed)).nan_to_num()
    seconds = 100 * (time.perf_counter() - start) / len(labels)
    answers, features = judged(_models()[2], images)
    told, rest = answers[: size["forgotten"]], answers[size["forgotten"] :]
    return {
        FOUND: 100 * float((told == FORGET).mean()),
        INSTEAD: 100 * float((told == SAFE).mean()),
        OTHERS: 100 * float((rest == others.numpy()).mean()),
        DISTANCE: frechet_distance(features[size["forgotten"] :], _real(size["each"])),
        SECONDS: seconds,
    }
