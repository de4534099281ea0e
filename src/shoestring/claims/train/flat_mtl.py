"""FlatMTL against the same rules without it: two overlaid digits, one of the two tasks with wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.metrics import expected_calibration_error
from shoestring.train.flat_mtl import FlatMTL, perturbation

CLAIM = (
    "Seeking flat regions for each task raises accuracy over the same multi-task rule (MGDA, PCGrad, CAGrad, IMTL, "
    "equal weights) on Multi-Fashion, MultiMNIST, CelebA, CityScapes, NYUv2 and Office-Home, with better calibration."
)
RULE = (
    "On test rows, in means over seeds, each rule (mean, PCGrad, CAGrad) with the flat term against the same rule "
    "without it at as many epochs, and at twice as many (as many backward passes); every arm at the point of its grid "
    "that is best on validation rows. partly: the mean accuracy of the two tasks is above both for at least two of the "
    "three rules. holds: it is above both for all three rules and every seed, and negative log-likelihood, calibration "
    "error and sharpness are lower than both for all three rules. Otherwise: not at this scale."
)
RULES = ("mean", "pcgrad", "cagrad")
BASE, LONGER, FLAT = "alone", "alone, twice the epochs", "flat"
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)  # of Adam, for every arm
RHO = 0.03  # the default
EPOCHS, BATCH, NOISE, RADIUS = 10, 100, 0.3, 0.01
METRICS = {
    "mean accuracy": "%",
    "accuracy, clean task": "%",
    "accuracy, noisy task": "%",
    "negative log-likelihood": "nats",
    "calibration error": "%",
    "sharpness": "nats",
}

Figures = dict[str, float]
Arm = tuple[str, str, float, float, int, int, int]  # rule, kind, lr, rho, epochs, seed, training rows
Split = tuple[Tensor, Tensor]  # images (N, 1, 12, 12), two labels each (2, N)


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    rows_, epochs = (300, 1) if fast else (1500, EPOCHS)
    processes = 1 if fast else None
    points = {
        FLAT: [(lr, RHO, epochs) for lr in RATES],
        LONGER: [(lr, 0.0, 2 * epochs) for lr in RATES],
        BASE: [(lr, 0.0, epochs) for lr in RATES],
    }
    cells = [(rule, kind) for kind in points for rule in RULES]
    grid: list[Arm] = [
        (rule, kind, lr, rho, e, 0, rows_) for rule, kind in cells for lr, rho, e in points[kind][: 1 if fast else None]
    ]
    first = run_all(_figures, grid, lambda share, text: progress(0.7 * share, text), "grid", processes=processes)
    chosen: dict[tuple[str, str], tuple[Arm, Figures]] = {}
    for arm, figures in zip(grid, first, strict=True):
        best = chosen.get(arm[:2])
        if best is None or figures["score"] > best[1]["score"]:
            chosen[arm[:2]] = arm, figures
    more: list[Arm] = [(*chosen[cell][0][:5], seed, rows_) for cell in cells for seed in range(1, seeds)]
    others = (
        run_all(_figures, more, lambda share, text: progress(0.7 + 0.3 * share, text), "seeds", processes=processes)
        if more
        else []
    )
    rows = []
    for rule in RULES:
        for kind in (BASE, LONGER, FLAT):
            arm, figures = chosen[rule, kind]
            found = [figures, *(o for run_, o in zip(more, others, strict=True) if run_[:2] == (rule, kind))]
            for metric, unit in METRICS.items():
                rows.append(Row.of(kind, metric, [f[metric] for f in found], unit=unit, setting=rule))
            rows.append(Row.of(kind, "learning rate", [arm[2]], setting=rule))
    progress(1.0, "done")
    return Result(
        slug="flat-mtl",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="digits of scikit-learn, two overlaid on a canvas of 12 x 12 pixels in opposite corners (1,500 pairs to "
        "train, 1,000 to choose, 2,000 to test, of different images); 30 % random labels in the second training task",
        note="Network: a convolution and a layer of 128 units, both with BatchNorm, two linear heads; Adam, batch "
        f"{BATCH}, {EPOCHS} epochs; the last epoch counts. The same grid of four learning rates for every arm, run "
        "with the first seed; the best mean accuracy on validation rows, whose labels are clean, is taken. rho is "
        "0.03, the default of FlatMTL (not adaptive, separate norms). Likelihood and calibration are means over the "
        "two tasks; "
        f"sharpness is the mean of L_i at the worst weights within {RADIUS:g} minus L_i, on the training rows with "
        "their labels, in eval mode. Before the rule was written the figures of our card were known: PCGrad at one "
        "seed with a larger network, noisy task 82.4 to 89.2, clean task 96.7 to 97.3; and that with clean labels in "
        "both tasks there was nothing to gain. This is the second run. The first had other grids of four points, rates "
        "0.0005 to 0.004 alone, and rates 0.001 and 0.002 with rho 0.01 and 0.03; nearly all chosen points lay on "
        "edges, so the grids were made equal and moved down. Its verdict was not at this scale: mean accuracy with "
        "PCGrad 92.9 alone, 91.5 with twice the epochs, 92.7 flat.",
    )


def verdict(rows: Sequence[Row]) -> str:
    def seeds(rule: str, kind: str, metric: str) -> np.ndarray:
        return np.array(find(rows, kind, metric, rule).seeds)

    def above(rule: str, every: bool) -> bool:
        flat = seeds(rule, FLAT, "mean accuracy")
        others = [seeds(rule, kind, "mean accuracy") for kind in (BASE, LONGER)]
        return all((flat > other).all() if every else flat.mean() > other.mean() for other in others)

    def lower(rule: str) -> bool:
        return all(
            seeds(rule, FLAT, metric).mean() < seeds(rule, kind, metric).mean()
            for metric in ("negative log-likelihood", "calibration error", "sharpness")
            for kind in (BASE, LONGER)
        )

    if sum(above(rule, every=False) for rule in RULES) < 2:
        return "not at this scale"
    return "holds" if all(above(rule, every=True) and lower(rule) for rule in RULES) else "partly"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 36, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList([nn.Linear(128, 10), nn.Linear(128, 10)])

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        return [nn.functional.cross_entropy(logits, labels) for logits, labels in zip(self(x), y, strict=True)]


def _figures(rule: str, kind: str, lr: float, rho: float, epochs: int, seed: int, n_train: int) -> Figures:
    (x, y), validation, test = _pairs(seed, n_train)
    torch.manual_seed(seed)  # of the weights
    net = _Net()
    heads = [list(head.parameters()) for head in net.heads]
    optimizer = FlatMTL(net.trunk.parameters(), heads, torch.optim.Adam, rule, rho=rho, lr=lr)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.step(partial(net.losses, x[batch], y[:, batch]))
    net.eval()
    chosen, figures = _measures(net, *validation), _measures(net, *test)
    return {**figures, "score": chosen["mean accuracy"], "sharpness": _sharpness(net, x, y)}


def _measures(net: _Net, x: Tensor, y: Tensor) -> Figures:
    with torch.no_grad():
        logits = net(x)
    right = [100 * float((p.argmax(1) == labels).double().mean()) for p, labels in zip(logits, y, strict=True)]
    loss = [float(nn.functional.cross_entropy(p, labels)) for p, labels in zip(logits, y, strict=True)]
    gaps = [
        100 * expected_calibration_error(labels.numpy(), p.double().softmax(1).numpy())
        for p, labels in zip(logits, y, strict=True)
    ]
    return {
        "mean accuracy": sum(right) / 2,
        "accuracy, clean task": right[0],
        "accuracy, noisy task": right[1],
        "negative log-likelihood": sum(loss) / 2,
        "calibration error": sum(gaps) / 2,
    }


def _sharpness(net: _Net, x: Tensor, y: Tensor) -> float:
    """Mean over tasks of the loss at the worst weights near by minus the loss."""
    rises = []
    for i, head in enumerate(net.heads):
        parts: list[list[Tensor]] = [list(net.trunk.parameters()), list(head.parameters())]
        loss = net.losses(x, y)[i]
        grads = torch.autograd.grad(loss, parts[0] + parts[1])
        n = len(parts[0])
        with torch.no_grad():
            pairs = zip(parts, (list(grads[:n]), list(grads[n:])), strict=True)
            eps = [e for part, part_grads in pairs for e in perturbation(part, part_grads, RADIUS)]
            kept = [p.clone() for p in parts[0] + parts[1]]
            torch._foreach_add_(parts[0] + parts[1], eps)
            rises.append(float(net.losses(x, y)[i] - loss))
            torch._foreach_copy_(parts[0] + parts[1], kept)
    return sum(rises) / 2


@cache
def _pairs(seed: int, n_train: int) -> tuple[Split, Split, Split]:
    """Training, validation and test pairs, of different images."""
    rng = np.random.default_rng(seed)
    images, digits = load_digits().images.astype(np.float32) / 16, load_digits().target
    parts = np.split(rng.permutation(len(images)), [900, 1200])
    splits = []
    for pool, n in zip(parts, (n_train, 1000, 2000), strict=True):
        first, second = pool[rng.integers(len(pool), size=(2, n))]
        canvas = np.zeros((n, 1, 12, 12), np.float32)
        canvas[:, 0, :8, :8] = images[first]
        canvas[:, 0, 4:, 4:] = np.maximum(canvas[:, 0, 4:, 4:], images[second])
        splits.append((torch.from_numpy(canvas), torch.from_numpy(np.stack([digits[first], digits[second]]))))
    wrong = rng.random(n_train) < NOISE
    splits[0][1][1, torch.from_numpy(wrong)] = torch.from_numpy(rng.integers(10, size=wrong.sum()))
    return splits[0], splits[1], splits[2]
