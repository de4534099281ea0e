"""Label-agnostic forgetting against gradient ascent and fine-tuning, which have labels, and against retraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.claims.forget._garment_rows import garment_rows
from shoestring.forget.laf import LabelAgnosticForgetting, repair
from shoestring.loop import fit

CLAIM = (
    "A classifier forgets a class, or rows at random, without any label, about as well as methods that have labels: it "
    "comes near a retrained model on what is to be forgotten, for a few points on the rest. CIFAR-10, class 0, "
    "accuracy in % on test rows that stay / of the forgotten class: original 83.0 / 83.4, retrained 85.1 / 0.0, "
    "LAF 80.5 / 2.0 (official notebook)."
)
RULE = (
    "Gap: mean distance to the retrained model, in points, over the accuracies on training rows that stay, on the "
    "rows to forget, and on the test rows of each. holds: in both settings LAF's gap is below the original's and "
    "below gradient ascent's, in the mean over seeds; and with a class to forget, for every seed, its accuracy on test "
    "rows of that class is at most 20 % and on test rows of the others at most 6 points below the retrained model's. "
    "partly: with a class to forget the mean gap is below the original's and below gradient ascent's. Otherwise: not "
    "at this scale."
)
CLASS, ROWS = "a class", "random rows"
ORIGINAL, RETRAINED, ASCENT, TUNED = "original", "retrained", "gradient ascent", "fine-tuning on the rest"
LAF, REPAIRED = "LAF", "LAF+R"
GAP, ATTACK = "gap to retrained", "balanced accuracy of a loss threshold"
METRICS = ("training rows that stay", "rows to forget", "test rows that stay", "test rows to forget")
Choice = tuple[float, float]
GRID: dict[str, tuple[Choice, ...]] = {  # rates of Adam (LAF: factor of the official 5e-5 and 1e-4) and temperature
    ASCENT: tuple((rate, 0.0) for rate in (3e-6, 1e-5, 2e-5, 5e-5)),
    TUNED: tuple((rate, 0.0) for rate in (1e-4, 3e-4, 1e-3, 3e-3)),
    LAF: ((10.0, 20.0), (30.0, 20.0), (100.0, 20.0), (30.0, 5.0)),
    ORIGINAL: ((0.0, 0.0),),
}
FULL = {"rows": 1500, "test": 2500, "epochs": 8, "passes": 6}
FAST = {"rows": 400, "test": 400, "epochs": 2, "passes": 2}
PAPER = {
    (ORIGINAL, METRICS[2]): 83.0,
    (ORIGINAL, METRICS[3]): 83.4,
    (RETRAINED, METRICS[2]): 85.1,
    (RETRAINED, METRICS[3]): 0.0,
    (LAF, METRICS[1]): 7.2,
    (LAF, METRICS[2]): 80.5,
    (LAF, METRICS[3]): 2.0,
}

Weights = dict[str, np.ndarray]
Figures = dict[str, float]


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    size, processes = (FAST, 1) if fast else (FULL, None)
    chosen_on = () if fast else (0,)
    every = (*chosen_on, *range(1, seeds + 1))
    trainings = [(which, seed, size) for seed in every for which in (ORIGINAL, CLASS, ROWS)]
    found = run_all(train, trainings, lambda d, t: progress(0.4 * d, t), "trainings", processes=processes)
    models = {(which, seed): weights for (which, seed, _), weights in zip(trainings, found, strict=True)}

    def forgotten(asked: list[tuple[str, str, Choice, int]], share: float, text: str) -> list[list[Figures]]:
        runs = [
            (arm, setting, choice, seed, size, models[ORIGINAL, seed], models[setting, seed])
            for arm, setting, choice, seed in asked
        ]
        start = 1.0 - share if text == "seeds" else 0.4
        found = run_all(unlearn, runs, lambda d, t: progress(start + share * d, t), text, processes=processes)
        gold = {(s, seed): answer[1] for (arm, s, _, seed), answer in zip(asked, found, strict=True) if arm == ORIGINAL}
        for (_, setting, _, seed), answer in zip(asked, found, strict=True):
            for figures in answer:
                figures[GAP] = float(np.mean([abs(figures[m] - gold[setting, seed][m]) for m in METRICS]))
        return found

    grid = [(arm, s, choice, 0) for arm in GRID for s in (CLASS, ROWS) for choice in GRID[arm]]
    best = {(arm, setting): GRID[arm][-1] for arm in GRID for setting in (CLASS, ROWS)}
    if not fast:
        gaps = [answer[0][GAP] for answer in forgotten(grid, 0.3, "rates")]
        for key in {key for key in best if key[0] != ORIGINAL}:
            ranked = [(gap, choice) for gap, (a, s, choice, _) in zip(gaps, grid, strict=True) if (a, s) == key]
            best[key] = min(ranked)[1]
    final = [(a, s, best[a, s], seed) for a in GRID for s in (CLASS, ROWS) for seed in every[-seeds:]]
    answers = forgotten(final, 0.6 if fast else 0.3, "seeds")
    rows = []
    for setting in (CLASS, ROWS):
        for method in (ORIGINAL, RETRAINED, ASCENT, TUNED, LAF, REPAIRED):
            arm, index = {RETRAINED: (ORIGINAL, 1), REPAIRED: (LAF, 1)}.get(method, (method, 0))
            of = [found[index] for found, (a, s, _, _) in zip(answers, final, strict=True) if (a, s) == (arm, setting)]
            for metric in (*METRICS, GAP, ATTACK):
                unit = "points" if metric == GAP else "%"
                paper = PAPER.get((method, metric)) if setting == CLASS else None
                rows.append(Row.of(method, metric, [f[metric] for f in of], unit=unit, setting=setting, paper=paper))
    progress(1.0, "done")
    return Result(
        slug="laf",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data=f"fashion bundle: {size['rows']:,} training images, {size['test']:,} test images; to forget: the "
        "whole class seed + 4, or from every class k of 0 to 4 a share of 8 (k + 1) %, 8 to 40 %",
        note="The paper's network at half its channels, trained for "
        f"{size['epochs']} epochs; every arm forgets in {size['passes']} passes over the rows to forget, in batches of "
        "32 beside as many that stay (fine-tuning sees only these, ascent only those). Rates: for every arm the best "
        "of four by the gap, on another seed and the other half of the test images; three of LAF's have the official "
        "temperature for classes, 20, one that for rows, 5; all are far above the official rates, which are for "
        "thousands of steps: these are some fifty. Ascent and fine-tuning read labels; LAF+R reads those of one pass "
        "over as many batches that stay. "
        "For random rows 'test rows to forget' are all test rows of classes 0 to 4. Seen before the rule was written: "
        "the card's expectation of 10 to 20 % left and 2 to 6 points lost, no run. The grids were narrowed to these "
        "after a look at the seed that chooses, and at digits. A first full run with 1,800 rows took 95 s: partly "
        "as well; rows were cut for time. Chosen: "
        + ", ".join(
            f"{arm}, {setting} {rate:g}" + (f" at tau {tau:g}" if tau else "")
            for (arm, setting), (rate, tau) in best.items()
            if rate
        )
        + ".",
    )


def verdict(rows: Sequence[Row]) -> str:
    def gap(method: str, setting: str) -> float:
        return find(rows, method, GAP, setting).value

    better = {s: gap(LAF, s) < min(gap(ORIGINAL, s), gap(ASCENT, s)) for s in (CLASS, ROWS)}
    left = np.array(find(rows, LAF, METRICS[3], CLASS).seeds)
    rest = np.array(find(rows, RETRAINED, METRICS[2], CLASS).seeds) - find(rows, LAF, METRICS[2], CLASS).seeds
    if all(better.values()) and (left <= 20).all() and (rest <= 6).all():
        return "holds"
    return "partly" if better[CLASS] else "not at this scale"


# ---- one run


class Network(nn.Module):
    """The paper's network for 28 x 28 images, at half its channels: two linear layers after the feature, as theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.fc1 = nn.Linear(16 * 7 * 7, 256)
        self.fc2 = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.conv(x).flatten(1)))


def network(seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def split(
    setting: str, seed: int, size: dict[str, int]
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor], Tensor]:
    """Training rows, which of them to forget, test rows (those to choose rates on for seed 0), and their kind."""
    rows, half = size["rows"], 0 if seed == 0 else 2500
    x, y = garment_rows(f"train[{seed * rows}:{(seed + 1) * rows}]")
    x_test, y_test = garment_rows(f"test[{half}:{half + size['test']}]")
    if setting == CLASS:
        gone = (seed + 4) % 10
        return (x, y), y == gone, (x_test, y_test), y_test == gone
    chance = torch.rand(len(y), generator=torch.Generator().manual_seed(100 + seed))
    return (x, y), (y < 5) & (chance < 0.08 * (y + 1)), (x_test, y_test), y_test < 5


def train(which: str, seed: int, size: dict[str, int]) -> Weights:
    """The original, or one that was trained without what a setting forgets."""
    (x, y), gone, _, _ = split(ROWS if which == ORIGINAL else which, seed, size)
    if which != ORIGINAL:
        x, y = x[~gone], y[~gone]
    model = network(seed)
    batches = Shuffled(len(x), 32, seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    fit(model, batches, lambda m, i: F.cross_entropy(m(x[i]), y[i]), optimizer, epochs=size["epochs"], progress=False)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def unlearn(
    arm: str, setting: str, choice: Choice, seed: int, size: dict[str, int], original: Weights, retrained: Weights
) -> list[Figures]:
    """Figures of the arm; of LAF also after repair (LAF+R), of the original also of the retrained model."""
    rows, gone, test, test_gone = split(setting, seed, size)
    models = [network(seed), network(seed)]
    for model, weights in zip(models, (original, retrained), strict=True):
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    (x, y), passes, (rate, tau) = rows, size["passes"], choice
    forget, retain = (Batches(x[part], y[part], seed) for part in (gone, ~gone))
    answers: list[nn.Module] = [*models] if arm == ORIGINAL else [models[0]]
    if arm == LAF:
        laf = LabelAgnosticForgetting(
            "fc1",
            epochs=passes,
            lr_extractor=5e-5 * rate,
            lr_align=1e-4 * rate,
            temperature=tau,
            generator=torch.Generator().manual_seed(seed),
        ).fit(models[0], forget, retain)
        answers = [laf.model_, repair(laf.model_, retain, head="fc2", max_steps=len(forget), lr=1e-3)]
    elif arm != ORIGINAL:
        batches: Any = forget if arm == ASCENT else First(retain, len(forget))
        sign = -1.0 if arm == ASCENT else 1.0

        def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return sign * F.cross_entropy(model(batch[0]), batch[1])

        fit(models[0], batches, step, torch.optim.Adam(models[0].parameters(), rate), epochs=passes, progress=False)
    return [figures_of(model, rows, gone, test, test_gone) for model in answers]


@torch.no_grad()
def figures_of(
    model: nn.Module, rows: tuple[Tensor, Tensor], gone: Tensor, test: tuple[Tensor, Tensor], test_gone: Tensor
) -> Figures:
    """Accuracies in %, and how well the best loss threshold tells rows to forget from test rows of their kind."""
    scores = [torch.cat([model(part) for part in x.split(500)]) for x, _ in (rows, test)]
    right = [(s.argmax(1) == y).float() for s, (_, y) in zip(scores, (rows, test), strict=True)]
    parts = (right[0][~gone], right[0][gone], right[1][~test_gone], right[1][test_gone])
    losses = [F.cross_entropy(s, y, reduction="none") for s, (_, y) in zip(scores, (rows, test), strict=True)]
    inside, outside = losses[0][gone].sort().values, losses[1][test_gone].sort().values
    cuts = torch.cat([inside, outside])
    below = [torch.searchsorted(part, cuts, right=True) / len(part) for part in (inside, outside)]
    attack = 50 + 50 * float((below[0] - below[1]).max())
    return {m: 100 * float(part.mean()) for m, part in zip(METRICS, parts, strict=True)} | {ATTACK: attack}


class Shuffled:
    """Row numbers, in a new order every epoch."""

    def __init__(self, length: int, batch: int, seed: int) -> None:
        self.length, self.batch, self.generator = length, batch, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.length, generator=self.generator).split(self.batch))

    def __len__(self) -> int:
        return -(-self.length // self.batch)


class Batches(Shuffled):
    """Rows and labels, 32 at a time."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        super().__init__(len(x), 32, seed)
        self.x, self.y = x, y

    def __iter__(self) -> Any:
        return ((self.x[i], self.y[i]) for i in super().__iter__())


class First:
    """As many batches of every epoch as there are of the other kind."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Any:
        return (batch for batch, _ in zip(self.batches, range(self.count), strict=False))

    def __len__(self) -> int:
        return min(self.count, len(self.batches))
