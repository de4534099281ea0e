"""Constrained prototype clustering on few-shot tasks of garments and emoji, against SimpleShot and two peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.semi_supervised import LabelSpreading
from torch import Tensor

from shoestring import backbones, data
from shoestring.claims import Progress, Result, Row, find
from shoestring.classify.transductive_clustering import (
    centre_and_normalise,
    cluster,
    neighbour_graph,
    query_shift,
    relax_labels,
    unaries,
)

CLAIM = (
    "Labelling all queries of a few-shot task together, by clustering with the support as constraints, beats "
    "labelling each by its nearest prototype; plain K-means already does. mini-ImageNet, WRN, 5-way, 15 queries a "
    "class, accuracy in % at 1 / 5 shots: SimpleShot 65.87 / 82.09, LaplacianShot 73.44 / 83.93, K-means "
    "73.80 / 84.62, K-modes 74.78 / 84.45, SLK-Means 74.75 / 84.61, SLK-MS 75.17 / 84.28."
)
RULE = (
    "Over the settings with balanced queries. holds: K-means, K-modes, SLK-Means and SLK-MS are all above SimpleShot "
    "in every one, by at least 3 points at 1 shot, and SLK-Means is at most 0.5 points below the better of the two "
    "LabelSpreadings in every one. partly: SLK-Means is above SimpleShot in every one, on every seed. Otherwise: not "
    "at this scale. Imbalanced queries are reported and do not count: the paper claims nothing about them."
)
WAY, QUERIES, TASKS = 5, 15, 60  # tasks a seed and setting
DIRICHLET = 2.0  # of the imbalanced queries, as in Veilleux et al. (2021)
LAPLACIAN = 0.7  # the official script's; tuned nowhere here
FORMS: dict[str, dict[str, Any]] = {
    "K-means": {"prototype": "mean", "laplacian": 0.0},
    "K-modes": {"prototype": "mode", "laplacian": 0.0},
    "SLK-Means": {"prototype": "mean", "laplacian": LAPLACIAN},
    "SLK-MS": {"prototype": "mode", "laplacian": LAPLACIAN},
}
PAPER = {
    "SimpleShot": (65.87, 82.09), "LaplacianShot": (73.44, 83.93), "K-means": (73.80, 84.62),
    "K-modes": (74.78, 84.45), "SLK-Means": (74.75, 84.61), "SLK-MS": (75.17, 84.28),
}  # fmt: skip


class Pool(NamedTuple):
    """Features with classes from which tasks are drawn; `base_mean` gives the mean of what a task's classes are not."""

    name: str
    X: np.ndarray
    y: np.ndarray
    classes: np.ndarray
    base_mean: Callable[[np.ndarray], np.ndarray]


class Tasks(NamedTuple):
    """T tasks: rows (T, n, .), support first; y with -1 for queries; the queries' true classes."""

    rows: Tensor
    y: Tensor
    answers: Tensor


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    pools = [_garments_in_pixels()] if fast else [_garments(progress), _emoji(progress)]
    settings = [(pool, shot, balanced) for pool in pools for shot in (1, 5) for balanced in (True, False)]
    settings = [s for s in settings if s[2] or s[0].name == "fashion"]  # emoji classes are too small for imbalance
    rows = []
    for i, (pool, shot, balanced) in enumerate(settings):
        setting = f"{pool.name}, {shot}-shot, {'balanced' if balanced else 'Dirichlet'} queries"
        figures: dict[str, list[float]] = {}
        for seed in range(seeds):
            done = (i * seeds + seed) / (len(settings) * seeds)
            progress(done if fast else 0.4 + 0.6 * done, f"{setting}, seed {seed + 1} of {seeds}")
            tasks = _draw(pool, shot, balanced, 15 if fast else TASKS, np.random.default_rng([seed, shot, balanced]))
            for method, labels in _answers(tasks, WAY * shot).items():
                share = (labels[:, WAY * shot :] == tasks.answers).double().mean()
                figures.setdefault(method, []).append(100 * float(share))
        for method, values in figures.items():
            paper = PAPER[method][shot == 5] if balanced and method in PAPER else None
            rows.append(Row.of(method, "accuracy", values, unit="%", setting=setting, paper=paper))
    progress(1.0, "done")
    return Result(
        slug="transductive-clustering",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="fashion bundle, test split, 200 images of each of 10 classes"
        + (
            ", pixels (fast form)"
            if fast
            else ", and emoji bundle, google, the 31 subcategories of at least 20 images; frozen EfficientNet-Lite0 "
            "features of width 1280"
        ),
        note=f"{WAY}-way, {TASKS} tasks a seed. Base mean (CL2N): of the garments of the five classes not in the task; "
        "of the emoji of all smaller subcategories. Balanced: 15 queries a class; Dirichlet: 75 queries, class shares "
        f"drawn from Dirichlet({DIRICHLET:g}). Lambda {LAPLACIAN:g} and all else by default, nothing tuned. 'Shift "
        "alone' is SimpleShot with the queries' mean moved to the support's, a control; all others but SimpleShot have "
        "that shift too. scikit-learn's KMeans starts at the support means, support among the rows; LabelSpreading has "
        "its defaults. The paper's figures are on mini-ImageNet with an encoder trained on its base classes. Before "
        "the rule was written, a few hundred tasks of the same garments had been looked at, for hard against soft "
        "prototypes: K-means was 5 to 8 points above SimpleShot at 1 shot there. The default (hard) is the official "
        "code's. Nothing of emoji had been seen. A first full run had 100 tasks a seed and the same verdict, but took "
        "100 s of the 90 s a claim may take; the rule was not touched.",
    )


def verdict(rows: Sequence[Row]) -> str:
    balanced = sorted({row.setting for row in rows if "balanced" in row.setting})

    def value(method: str, setting: str) -> float:
        return find(rows, method, "accuracy", setting).value

    def gains(method: str, setting: str) -> np.ndarray:
        return np.subtract(
            find(rows, method, "accuracy", setting).seeds, find(rows, "SimpleShot", "accuracy", setting).seeds
        )

    ahead = all(
        value(method, s) - value("SimpleShot", s) > 0
        and ("1-shot" not in s or value(method, s) - value("SimpleShot", s) >= 3)
        for s in balanced
        for method in FORMS
    )
    level = all(
        value("SLK-Means", s) >= max(value(f"LabelSpreading, {kernel}", s) for kernel in ("rbf", "knn")) - 0.5
        for s in balanced
    )
    if ahead and level:
        return "holds"
    return "partly" if all((gains("SLK-Means", s) > 0).all() for s in balanced) else "not at this scale"


def _answers(tasks: Tasks, n_support: int) -> dict[str, Tensor]:
    """Labels (T, n) of every method."""
    X, y = tasks.rows, tasks.y
    shifted = torch.where(y[..., None] < 0, X + query_shift(X, y), X)
    graph = neighbour_graph(shifted)
    given = torch.nn.functional.one_hot(y.clamp(min=0), WAY) * (y >= 0)[..., None]
    nearest = cluster(shifted, y, WAY, laplacian=0.0, max_iter=0)
    a = unaries(shifted, nearest.prototypes)
    answers = {
        "SimpleShot": cluster(X, y, WAY, laplacian=0.0, max_iter=0).labels,
        "Shift alone": nearest.labels,
        "LaplacianShot": relax_labels(a, given.to(a.dtype), graph, LAPLACIAN).memberships.argmax(2),
        **{name: cluster(shifted, y, WAY, **options).labels for name, options in FORMS.items()},
    }
    peers: dict[str, list[np.ndarray]] = {}
    for rows, labels, means in zip(shifted.numpy(), y.numpy(), nearest.prototypes.numpy(), strict=True):
        peers.setdefault("KMeans", []).append(KMeans(WAY, init=means, n_init=1).fit(rows).labels_)
        for kernel in ("rbf", "knn"):
            spread = LabelSpreading(kernel=kernel, max_iter=200).fit(rows, labels)
            peers.setdefault(f"LabelSpreading, {kernel}", []).append(spread.transduction_)
    return answers | {name: torch.as_tensor(np.stack(labels)) for name, labels in peers.items()}


def _draw(pool: Pool, shot: int, balanced: bool, n_tasks: int, rng: np.random.Generator) -> Tasks:
    """Tasks after CL2N, in coordinates of their own: n instead of 1280, all distances kept."""
    rows, answers = [], []
    for _ in range(n_tasks):
        chosen = rng.choice(pool.classes, WAY, replace=False)
        shares = np.full(WAY, 1 / WAY) if balanced else rng.dirichlet(np.full(WAY, DIRICHLET))
        counts = np.full(WAY, QUERIES) if balanced else rng.multinomial(WAY * QUERIES, shares)
        drawn = [rng.permutation(np.flatnonzero(pool.y == label)) for label in chosen]
        support = np.concatenate([d[:shot] for d in drawn])
        query = np.concatenate([d[shot : shot + count] for d, count in zip(drawn, counts, strict=True)])
        mean = torch.as_tensor(pool.base_mean(chosen))
        rows.append(centre_and_normalise(torch.as_tensor(pool.X[np.concatenate([support, query])]), mean))
        answers.append(np.repeat(np.arange(WAY), counts))
    X = torch.stack(rows).double()
    values, vectors = torch.linalg.eigh(X @ X.transpose(1, 2))  # X X' = (U s)(U s)'
    y = torch.full(X.shape[:2], -1)
    y[:, : WAY * shot] = torch.arange(WAY).repeat_interleave(shot)
    return Tasks(vectors * values.clamp(min=0).sqrt()[:, None], y, torch.as_tensor(np.stack(answers)))


# ---- data


def _garments(progress: Progress) -> Pool:
    rows, y = _garment_rows()

    def report(done: int) -> None:
        progress(0.2 * done / len(y), f"features of {len(y)} garments")

    return _fashion(backbones.load().extract(rows["image"], progress=report), y)


def _garments_in_pixels() -> Pool:
    rows, y = _garment_rows()
    return _fashion(np.stack([np.asarray(image, np.float32).ravel() / 255 for image in rows["image"]]), y)


def _garment_rows() -> tuple[Any, np.ndarray]:
    rows = data.load("fashion", split="test")
    y = np.array(rows["label"])
    chosen = np.sort(np.concatenate([np.flatnonzero(y == k)[:200] for k in range(10)]))
    return rows.select(chosen), y[chosen]


def _fashion(X: np.ndarray, y: np.ndarray) -> Pool:
    means = np.stack([X[y == k].mean(0) for k in range(10)])  # all classes are of one size
    return Pool("fashion", X, y, np.arange(10), lambda chosen: np.delete(means, chosen, axis=0).mean(0))


def _emoji(progress: Progress) -> Pool:
    rows = data.load("emoji", split="google")
    y = np.array(rows["subcategory"])

    def report(done: int) -> None:
        progress(0.2 + 0.2 * done / len(y), f"features of {len(y)} emoji")

    X = backbones.load().extract(rows["image"], progress=report)
    classes = np.flatnonzero(np.bincount(y) >= 20)
    base = X[~np.isin(y, classes)].mean(0)
    return Pool("emoji", X, y, classes, lambda chosen: base)
