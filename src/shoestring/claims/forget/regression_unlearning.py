"""Blindspot and Gaussian-amnesiac unlearning of a range of targets against fine-tuning and retraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.claims.forget._garment_rows import garment_rows
from shoestring.forget.regression_unlearning import (
    blindspot_unlearn,
    gaussian_amnesiac_unlearn,
    loss_membership_attack,
    prediction_wasserstein,
    relearning_steps,
)
from shoestring.loop import fit

CLAIM = (
    "A regressor forgets a range of targets in one epoch, by the answers of a briefly trained second network "
    "(Blindspot) or by random targets (Gaussian): its answers come nearer to a retrained model's than after "
    "fine-tuning, at almost the same error on what stays. AgeDB, ages up to 30 forgotten, error in years on test rows "
    "that stay / to forget and Wasserstein distance to the retrained model: original 9.33 / 12.77, 2.99; retrained "
    "11.38 / 24.31; fine-tuned 9.79 / 14.83, 1.62; Gaussian 9.81 / 17.07, 2.33; Blindspot 9.98 / 21.63, 1.15 (official "
    "notebook)."
)
RULE = (
    "Turned garments only; the Wasserstein distance is that of the predictions for the rows to forget to the retrained "
    "model's. holds: for every seed Blindspot's distance is the smallest of original, fine-tuning, Gaussian and "
    "Blindspot, its error on test rows to forget is the largest of the four, and its error on test rows that stay is "
    "at most 10 % above the original's. partly: in the mean over seeds its distance is below the original's and "
    "fine-tuning's. Otherwise: not at this scale."
)
GARMENTS, DIABETES = "angle of turned garments", "diabetes"
OFFICIAL = GARMENTS + ", official rate"
ORIGINAL, RETRAINED, TUNED, GAUSSIAN, BLINDSPOT = "original", "retrained", "fine-tuning", "Gaussian", "Blindspot"
ARMS = (TUNED, GAUSSIAN, BLINDSPOT)
STAYS, GOES = "error on test rows that stay", "error on test rows to forget"
DISTANCE, ATTACK, ANAMNESIS = "Wasserstein distance to retrained", "rows to forget called members", "anamnesis index"
STEPS = "steps to relearn"
OFFICIAL_RATE = 1e-3
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FULL = {"rows": 1800, "test": 2500, "epochs": 15, "relearn": 10}
FAST = {"rows": 400, "test": 400, "epochs": 4, "relearn": 1}
SCALE = {GARMENTS: (90.0, "degrees"), OFFICIAL: (90.0, "degrees"), DIABETES: (1.0, "standard deviations")}
PAPER = {
    (ORIGINAL, DISTANCE): 2.99,
    (TUNED, DISTANCE): 1.62,
    (GAUSSIAN, DISTANCE): 2.33,
    (BLINDSPOT, DISTANCE): 1.15,
    (RETRAINED, ATTACK): 30.0,
    (ORIGINAL, ATTACK): 59.0,
    (TUNED, ATTACK): 43.0,
    (GAUSSIAN, ATTACK): 50.0,
    (BLINDSPOT, ATTACK): 40.0,
    (TUNED, ANAMNESIS): 0.007,
    (GAUSSIAN, ANAMNESIS): 0.010,
    (BLINDSPOT, ANAMNESIS): 0.333,
}

Weights = dict[str, np.ndarray]
Figures = dict[str, float]


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    size, processes = (FAST, 1) if fast else (FULL, None)
    settings = (GARMENTS, DIABETES)
    every = (*(() if fast else (0,)), *range(1, seeds + 1))
    trainings = [(s, which, seed, size) for s in settings for seed in every for which in (ORIGINAL, RETRAINED)]
    found = run_all(train, trainings, lambda d, t: progress(0.45 * d, t), "trainings", processes=processes)
    models = {(s, which, seed): w for (s, which, seed, _), w in zip(trainings, found, strict=True)}

    def answers_of(
        asked: list[tuple[str, str, float, int]], brief: bool, start: float, end: float, text: str
    ) -> list[list[Figures]]:
        runs = []
        for s, arm, rate, seed in asked:
            kind = GARMENTS if s == OFFICIAL else s
            both = models[kind, ORIGINAL, seed], models[kind, RETRAINED, seed]
            runs.append((kind, arm, rate, seed, size, *both, brief or s == OFFICIAL))
        report: Progress = lambda d, t: progress(start + (end - start) * d, t)  # noqa: E731
        return run_all(unlearn, runs, report, text, processes=processes)

    best = {(s, arm): OFFICIAL_RATE for s in settings for arm in ARMS}
    start = 0.45
    if not fast:
        grid = [(s, arm, rate, 0) for s in settings for arm in ARMS for rate in RATES]
        grid += [(s, ORIGINAL, 0.0, 0) for s in settings]
        tried, start = answers_of(grid, True, 0.45, 0.65, "rates"), 0.65
        gold = {s: answer[1] for (s, arm, _, _), answer in zip(grid, tried, strict=True) if arm == ORIGINAL}
        for s, arm in best:
            gaps = [
                (sum(abs(answer[0][m] - gold[s][m]) for m in (STAYS, GOES)), rate)
                for (at, by, rate, _), answer in zip(grid, tried, strict=True)
                if (at, by) == (s, arm)
            ]
            best[s, arm] = min(gaps)[1]
    seeded = every[-seeds:]
    final = [(s, a, best.get((s, a), 0.0), seed) for s in settings for a in (ORIGINAL, *ARMS) for seed in seeded]
    final += [(OFFICIAL, arm, OFFICIAL_RATE, seed) for arm in ARMS for seed in seeded]
    answers = answers_of(final, False, start, 1.0, "seeds")
    figures: dict[tuple[str, str], list[Figures]] = {}
    for (s, arm, _, _), answer in zip(final, answers, strict=True):
        for method, one in zip((arm, RETRAINED), answer, strict=False):
            figures.setdefault((s, method), []).append(one)
    rows = []
    for (setting, method), of in figures.items():
        scale, unit = SCALE[setting]
        for metric in (STAYS, GOES, DISTANCE, ATTACK):
            by, kind = (100.0, "%") if metric == ATTACK else (scale, unit)
            paper = PAPER.get((method, metric)) if setting == GARMENTS else None
            rows.append(Row.of(method, metric, [by * f[metric] for f in of], unit=kind, setting=setting, paper=paper))
        if setting != OFFICIAL:
            taken = zip(of, figures[setting, RETRAINED], strict=True)
            index = [f[STEPS] / max(g[STEPS], 1.0) for f, g in taken]
            paper = PAPER.get((method, ANAMNESIS)) if setting == GARMENTS else None
            rows.append(Row.of(method, ANAMNESIS, index, setting=setting, paper=paper))
    progress(1.0, "done")
    return Result(
        slug="regression-unlearning",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data=f"fashion bundle: {size['rows']:,} training and {size['test']:,} test images, each turned by an angle "
        "from 0 to 90 degrees, below 30 to forget; diabetes of scikit-learn (442 patients, a third of them to test), "
        "the third of least progression to forget",
        note="Small networks, Adam, L1 loss. Epochs as in the paper: fine-tuning 5, Gaussian 1, Blindspot 1 after 2 of "
        "the second network. Rate of every arm: the best of four by the distance of its errors on what stays and what "
        "goes to the retrained model's, on another seed and other test rows. Distances in the paper are in years. "
        f"Relearning: at most {size['relearn']} epochs, held-out rows; of what needs no step 0. The diabetes network "
        "has no positions, so no attention term; its 442 rows are too few for a verdict. Seen before the rule was "
        "written: the paper's order of the methods, which the card expects here too, no run; the rows at the official "
        "rate were added after a look at the seed that chooses; epochs and rows were cut for time after it. Chosen: "
        + ", ".join(f"{arm}, {setting} {rate:g}" for (setting, arm), rate in best.items())
        + ".",
    )


def verdict(rows: Sequence[Row]) -> str:
    def of(method: str, metric: str) -> np.ndarray:
        return np.array(find(rows, method, metric, GARMENTS).seeds)

    others = (ORIGINAL, TUNED, GAUSSIAN)
    nearest = all((of(BLINDSPOT, DISTANCE) < of(other, DISTANCE)).all() for other in others)
    furthest = all((of(BLINDSPOT, GOES) > of(other, GOES)).all() for other in others)
    if nearest and furthest and (of(BLINDSPOT, STAYS) <= 1.1 * of(ORIGINAL, STAYS)).all():
        return "holds"
    nearer = [of(BLINDSPOT, DISTANCE).mean() < of(other, DISTANCE).mean() for other in (ORIGINAL, TUNED)]
    return "partly" if all(nearer) else "not at this scale"


# ---- one run


def network(setting: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setting == DIABETES:
            return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 2), (16, 32, 2), (32, 32, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 1))


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) in [-1, 1], each turned about its middle; what comes in from outside is black."""
    angle = degrees * (math.pi / 180)
    zero = torch.zeros_like(angle)
    theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def rows_of(setting: str, seed: int, size: dict[str, int]) -> tuple[TensorDataset, Tensor, TensorDataset, Tensor]:
    """Training rows and which to forget, test rows (for seed 0 others, to choose rates on) and which are like them."""
    generator = torch.Generator().manual_seed(seed)
    if setting == DIABETES:
        from sklearn.datasets import load_diabetes

        data = load_diabetes()
        x = torch.as_tensor(data.data, dtype=torch.float32) * 21  # columns of unit length to unit deviation
        y = torch.as_tensor(data.target, dtype=torch.float32)[:, None]
        low = y[:, 0] < torch.quantile(y, 1 / 3)
        y = (y - y.mean()) / y.std()
        order = torch.randperm(len(x), generator=generator)
        train, test = order[147:], order[:147]
        return TensorDataset(x[train], y[train]), low[train], TensorDataset(x[test], y[test]), low[test]
    parts: list[Any] = []
    rows, half = size["rows"], 0 if seed == 0 else 2500
    for split in (f"train[{seed * rows}:{(seed + 1) * rows}]", f"test[{half}:{half + size['test']}]"):
        images = garment_rows(split)[0]
        angle = 90 * torch.rand(len(images), generator=generator)
        parts += [TensorDataset(turned(images, angle), angle[:, None] / 90), angle < 30]
    return parts[0], parts[1], parts[2], parts[3]


def train(setting: str, which: str, seed: int, size: dict[str, int]) -> Weights:
    """The original, or one trained without the rows to forget."""
    data, gone, _, _ = rows_of(setting, seed, size)
    x, y = (t if which == ORIGINAL else t[~gone] for t in data.tensors)
    model = network(setting, seed)
    epochs = size["epochs"]
    descend(model, x, y, 1e-3, epochs, seed)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def descend(model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int, seed: int) -> None:
    """Plain training: Adam, L1, batches of 64 in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    batches = [i for _ in range(epochs) for i in torch.randperm(len(x), generator=generator).split(64)]
    fit(model, batches, lambda m, i: F.l1_loss(m(x[i]), y[i]), torch.optim.Adam(model.parameters(), lr), progress=False)


def unlearn(
    setting: str, arm: str, lr: float, seed: int, size: dict[str, int], original: Weights, gold: Weights, brief: bool
) -> list[Figures]:
    """Figures of the arm, and beside those of the original also of the retrained model; no relearning if `brief`."""
    data, gone, test, test_gone = rows_of(setting, seed, size)
    models = [network(setting, seed), network(setting, seed)]
    for model, weights in zip(models, (original, gold), strict=True):
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    x, y = data.tensors
    retain, forget = (DataLoader(Subset(data, torch.nonzero(u)[:, 0].tolist()), 64) for u in (~gone, gone))
    options: dict[str, Any] = {"lr": lr, "generator": torch.Generator().manual_seed(seed)}
    changed = models[0]
    if arm == TUNED:
        changed = network(setting, seed)
        changed.load_state_dict(models[0].state_dict())
        descend(changed, x[~gone], y[~gone], lr, 5, seed)
    elif arm == GAUSSIAN:
        changed = gaussian_amnesiac_unlearn(models[0], retain, forget, **options)
    elif arm == BLINDSPOT:
        changed = blindspot_unlearn(models[0], retain, forget, **options)
    answers = []
    held_out = DataLoader(Subset(test, torch.nonzero(test_gone)[:250, 0].tolist()), 250)
    goal = 1.05 * error(models[0], *held_out.dataset[:])
    for model in (changed, models[1]) if arm == ORIGINAL else (changed,):
        found = figures_of(model, models[1], data, gone, test, test_gone, seed)
        if not brief:
            relearn: dict[str, Any] = {"batch_size": 128, "max_epochs": size["relearn"], "seed": seed}
            found[STEPS] = float(relearning_steps(model, DataLoader(data, 128), held_out, goal, **relearn))
        answers.append(found)
    return answers


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(F.l1_loss(model.eval()(x), y))


@torch.no_grad()
def figures_of(
    model: nn.Module,
    gold: nn.Module,
    data: TensorDataset,
    gone: Tensor,
    test: TensorDataset,
    test_gone: Tensor,
    seed: int,
) -> Figures:
    model.eval(), gold.eval()
    (x, y), (x_test, y_test) = data.tensors, test.tensors
    errors, errors_test = ((model(a) - b).abs()[:, 0] for a, b in ((x, y), (x_test, y_test)))
    members, others = errors[~gone], errors_test[~test_gone]
    count = min(len(members), len(others), 500)  # equally many of both, at random
    generator = torch.Generator().manual_seed(seed)
    members, others = (e[torch.randperm(len(e), generator=generator)[:count]] for e in (members, others))
    return {
        STAYS: float(errors_test[~test_gone].mean()),
        GOES: float(errors_test[test_gone].mean()),
        DISTANCE: prediction_wasserstein(model(x[gone]).numpy(), gold(x[gone]).numpy()),
        ATTACK: loss_membership_attack(members.numpy(), others.numpy(), errors[gone].numpy()),
    }
