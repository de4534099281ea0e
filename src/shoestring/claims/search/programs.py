"""The program search against random programs, constants alone and a grid of AdamW, at as many proxy trainings each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from shoestring import data
from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.search.programs import ADAMW, Program, ProgramSearch, random_program

CLAIM = (
    "Ageing evolution of programs that starts from AdamW finds optimizers that train better than tuned AdamW (the one "
    "it found is Lion), while of 2 million random programs none beats AdamW; 89.1 % of the children need no training, "
    "since their functional hash is in the cache, and 69.8 % of the statements are redundant."
)
RULE = (
    "Proxy: validation loss of a small net on digits after 100 steps, the same number of trainings for every arm. "
    "partly: in the mean over seeds the evolved program is better on the proxy than the best of the random programs, "
    "of constants-only mutation of AdamW and of the grid of AdamW, and the best random program is worse than the best "
    "AdamW (of the grid). holds: besides, the evolved program is better than all three on the proxy for every seed; "
    "in the mean on the test rows of digits from initialisations that the search never saw; and in the mean than "
    "constants-only mutation and the grid on the test rows of garments, with a larger net and five times the steps. "
    "Otherwise: not at this scale."
)
EVOLVED, CONSTANTS, RANDOM, GRID, INITIAL = "evolved", "constants only", "random programs", "AdamW grid", "AdamW 1e-3"
PROXY, TEST, GARMENTS = "proxy validation loss", "digits test loss", "garments test loss"
TRAININGS, POPULATION = 240, 100
LEARNING_RATES, DECAYS = np.geomspace(1e-3, 0.1, 8), (0.0, 0.01)
BETAS = (0.0, 0.5, 0.9), (0.8, 0.9, 0.97, 0.99, 0.999)  # 8 x 2 x 3 x 5 = TRAININGS points
MULTIPLIERS = (0.03, 0.1, 0.3, 1.0)  # of the learning rate on garments, chosen on validation rows there
DIVERGED = 10.0  # the loss of what is worse, or not finite; guessing has log(10)
Split = tuple[np.ndarray, np.ndarray]


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    trainings, processes = (15, 1) if fast else (TRAININGS, None)
    runs = [(arm, seed, trainings) for arm in (EVOLVED, CONSTANTS, GRID, RANDOM) for seed in range(seeds)]
    found = run_all(_search, runs, lambda done, text: progress(0.8 * done, text), "searches", processes=processes)
    runs += [(INITIAL, seed, trainings) for seed in range(seeds)]
    winners = [(figures.pop("program"), seed) for figures, (_, seed, _) in zip(found, runs, strict=False)]
    winners += [(ADAMW, seed) for seed in range(seeds)]
    judged = run_all(
        _judge,
        [(program, seed, fast) for program, seed in winners],
        lambda done, text: progress(0.8 + 0.2 * done, text),
        "winners on garments",
        processes=processes,
    )
    rows = []
    for arm in (EVOLVED, CONSTANTS, GRID, RANDOM, INITIAL):
        mine = [i for i, (other, _, _) in enumerate(runs) if other == arm]
        for metric in judged[0]:
            rows.append(
                Row.of(arm, metric, [judged[i][metric] for i in mine], unit="%" if "accuracy" in metric else "")
            )
        if arm != INITIAL:
            for metric in found[mine[0]]:
                paper = {"cache hit rate": 89.1, "redundant statements": 69.8}.get(metric) if arm == EVOLVED else None
                unit = "" if metric in ("children", "trainings") else "%"
                rows.append(Row.of(arm, metric, [found[i][metric] for i in mine], unit=unit, paper=paper))
    best = winners[min(range(seeds), key=lambda i: judged[i][PROXY])][0]
    program = "; ".join(str(s) for s in Program.parse(best).simplify().statements)
    progress(1.0, "done")
    return Result(
        slug="program-search",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="digits of scikit-learn (1000 rows to train, 397 to validate, 400 to test, drawn anew for every seed); "
        "fashion bundle at 14 x 14 pixels, 1000 of its training rows to validate, its test rows to test",
        note=f"Every arm spends {trainings} trainings of a 64-32-10 tanh net on digits (100 steps of batch 64, cosine "
        f"schedule); evolution and constants-only mutation from AdamW with lr 1e-3 and weight decay 0.01, population "
        f"{POPULATION}, tournament of 2. The grid is 8 learning rates from 1e-3 to 0.1, 2 decays, 3 and 5 betas; the "
        "constants and the grid are of AdamW without bias correction, as in the paper's programs. Random programs have "
        "9 statements, drawn as mutation draws them. Winners are judged from five initialisations and orders of the "
        "batches that no search saw, and then on garments with a 196-128-64-10 net, 500 steps, the learning rate "
        f"multiplied by the best of {MULTIPLIERS} there (validation rows; two initialisations). A program sees all "
        "weights as one vector. A loss above 10, or none, counts as 10. The rule was written before the "
        "first run, which had 600 trainings an arm and a grid of 600 points, took too long (141 s), and gave "
        "proxy losses of 0.126 evolved, 0.137 constants only, 0.177 random, 0.110 grid; not at this scale. Nothing "
        "but the sizes, and the points of the grid, was changed after it. The best of the evolved programs "
        "by the proxy, live "
        f"statements: {program}; returns {', '.join(Program.parse(best).outputs)}.",
    )


def verdict(rows: Sequence[Row]) -> str:
    def seeds(method: str, metric: str) -> np.ndarray:
        return np.array(find(rows, method, metric).seeds)

    others = (CONSTANTS, GRID, RANDOM)
    proxy = {arm: seeds(arm, PROXY) for arm in (EVOLVED, *others)}
    better = all(proxy[EVOLVED].mean() < proxy[arm].mean() for arm in others)
    if not (better and proxy[GRID].mean() < proxy[RANDOM].mean()):
        return "not at this scale"
    every = all((proxy[EVOLVED] < proxy[arm]).all() for arm in others)
    test = all(seeds(EVOLVED, TEST).mean() < seeds(arm, TEST).mean() for arm in others)
    garments = all(seeds(EVOLVED, GARMENTS).mean() < seeds(arm, GARMENTS).mean() for arm in (CONSTANTS, GRID))
    return "holds" if every and test and garments else "partly"


# ---- the arms


def _search(arm: str, seed: int, trainings: int) -> dict[str, Any]:
    """The best program of `trainings` trainings, and figures of how it was found."""

    def evaluate(program: Program) -> float:
        return -_loss_after(program, _digits(seed)[:2], (64, 32, 10), 100, seed)

    if arm in (EVOLVED, CONSTANTS):
        weights = (1, 1, 1) if arm == EVOLVED else (0, 0, 0, 1)
        search = ProgramSearch(evaluate, population_size=POPULATION, mutation_weights=weights, random_state=seed)
        while getattr(search, "n_evaluations_", 0) < trainings:  # no child needs more than one
            search.fit(max(1, trainings - getattr(search, "n_evaluations_", 1)))
        statements = [(len(p.live()), len(p.statements)) for p, _ in search.population_]
        live, total = np.sum(statements, 0)
        figures: dict[str, Any] = {"program": str(search.best_program_), "children": search.n_children_}
        if arm == EVOLVED:
            figures |= {
                "cache hit rate": 100 * search.cache_hit_rate_,
                "redundant statements": 100 * (1 - live / total),
            }
        return figures
    rng = np.random.default_rng(seed)
    if arm == GRID:
        points = itertools.product(LEARNING_RATES, DECAYS, *BETAS)
        programs = [_adamw(*point) for point in points]
        programs = [programs[i] for i in rng.permutation(len(programs))[:trainings]]
    else:
        programs = [random_program(rng) for _ in range(trainings)]
    with threadpool_limits(1):
        fitness = [evaluate(program) for program in programs]
    figures = {"program": str(programs[int(np.argmax(fitness))])}
    if arm == RANDOM:
        initial = evaluate(Program.parse(ADAMW))
        figures["better than AdamW 1e-3"] = 100 * float(np.mean(np.array(fitness) > initial))
    return figures


def _adamw(lr: float, decay: float, beta1: float, beta2: float) -> Program:
    text = ADAMW
    for old, new in (("0.9)", f"{beta1})"), ("0.999)", f"{beta2})"), ("0.01", f"{decay}"), ("0.001", f"{lr}")):
        text = text.replace(f" {old}", f" {new}")
    return Program.parse(text)


def _judge(program: str, seed: int, fast: bool) -> dict[str, float]:
    optimizer = Program.parse(program)
    with threadpool_limits(1):
        train, validation, test = _digits(seed)
        digits = {PROXY: _loss_after(optimizer, (train, validation), (64, 32, 10), 100, seed)}
        fresh = [_scores(optimizer, (train, test), (64, 32, 10), 100, 1000 + 10 * seed + i) for i in range(5)]
        steps, sizes, repeats = (30, (196, 16, 10), 1) if fast else (500, (196, 128, 64, 10), 2)
        train, validation, test = _garments(2000 if fast else None)
        chosen = min(
            MULTIPLIERS, key=lambda x: _loss_after(optimizer, (train, validation), sizes, steps, 5000 + seed, x)
        )
        garments = [
            _scores(optimizer, (train, test), sizes, steps, 6000 + 10 * seed + i, chosen) for i in range(repeats)
        ]
    (loss, accuracy), (their_loss, their_accuracy) = np.mean(fresh, 0), np.mean(garments, 0)
    return digits | {
        TEST: float(loss),
        "digits test accuracy": 100 * float(accuracy),
        GARMENTS: float(their_loss),
        "garments test accuracy": 100 * float(their_accuracy),
    }


# ---- the nets


def _loss_after(*what: Any) -> float:
    return _scores(*what)[0]


def _scores(
    program: Program, rows: tuple[Split, Split], sizes: tuple[int, ...], steps: int, seed: int, multiplier: float = 1.0
) -> tuple[float, float]:
    """Loss (at most DIVERGED) and accuracy on the second split of a tanh net trained on the first."""
    (X, y), (X_test, y_test) = rows
    rng = np.random.default_rng(seed)
    shapes = [(i, o) for i, o in itertools.pairwise(sizes)]
    w = np.concatenate([p for i, o in shapes for p in (rng.standard_normal(i * o) / math.sqrt(i), np.zeros(o))])
    w = w.astype(np.float32)
    m, v, train = np.zeros_like(w), np.zeros_like(w), program.compile()
    orders = [rng.permutation(len(X)) for _ in range(1 + steps * 64 // len(X))]
    order = np.concatenate(orders)
    with np.errstate(all="ignore"):
        for t in range(steps):
            batch = order[64 * t : 64 * (t + 1)]
            g = _gradient(w, shapes, X[batch], y[batch])
            update, m, v = train(w, g, m, v, multiplier * 0.5 * (1 + math.cos(math.pi * t / steps)))
            w = w - update
            if t % 10 == 9 and not math.isfinite(w.sum()):
                return DIVERGED, 0.0
        logits = _activations(w, shapes, X_test)[0][-1]
        logits -= logits.max(1, keepdims=True)
        loss = float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y_test)), y_test]).mean())
        return (loss if loss < DIVERGED else DIVERGED), float((logits.argmax(1) == y_test).mean())


def _activations(w: np.ndarray, shapes: list[tuple[int, int]], X: np.ndarray) -> tuple[list[np.ndarray], list[Any]]:
    layers, weights, at = [X], [], 0
    for i, o in shapes:
        W, b = w[at : at + i * o].reshape(i, o), w[at + i * o : at + i * o + o]
        at += i * o + o
        z = layers[-1] @ W + b
        layers.append(z if len(layers) == len(shapes) else np.tanh(z))
        weights.append(W)
    return layers, weights


def _gradient(w: np.ndarray, shapes: list[tuple[int, int]], X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the mean cross-entropy, as one vector."""
    layers, weights = _activations(w, shapes, X)
    delta = np.exp(layers[-1] - layers[-1].max(1, keepdims=True))
    delta /= delta.sum(1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    parts: list[np.ndarray] = []
    for h, W in zip(reversed(layers[:-1]), reversed(weights), strict=True):
        parts = [(h.T @ delta).ravel(), delta.sum(0), *parts]
        delta = (delta @ W.T) * (1 - h * h)  # (of the first layer: not used)
    return np.concatenate(parts)


@cache
def _digits(seed: int) -> tuple[Split, Split, Split]:
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(X))
    train, validation, test = order[:1000], order[1000:1397], order[1397:]
    return (X[train], y[train]), (X[validation], y[validation]), (X[test], y[test])


@cache
def _garments(rows_of_each: int | None) -> tuple[Split, Split, Split]:
    def small(split: str) -> Split:
        rows = data.load("fashion", split=split if rows_of_each is None else f"{split}[:{rows_of_each}]")
        images = np.stack([np.asarray(image.convert("L").resize((14, 14))) for image in rows["image"]])
        return images.reshape(len(images), -1).astype(np.float32) / 255, np.array(rows["label"][:])

    (X, y), test = small("train"), small("test")
    return (X[1000:], y[1000:]), (X[:1000], y[:1000]), test
