"""SortedNet: what a smaller size gains, and what the wrapper costs, as ratios in one run.

1. Images/s of the half-width extract over the whole network (the limit of the issue), and over a network of that size
   built by itself, which it must equal.
2. Forward pass of the wrapper at full width over the plain model, and at half width over the extract.
3. A training step: `sorted_step` on the whole network over the plain step, and over uniformly drawn widths.

    python benchmarks/sortednet.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn

from shoestring.compress.sortednet import SortedModel, sorted_step, step_generator

WIDTHS = {"width": [0.25, 0.5, 0.75, 1.0]}
HALF = {"width": 0.5}
EXTRACT_AT_LEAST = 1.5  # issue 7
OWN_SIZE = 1.05  # an extract is an ordinary network of its size
OVERHEAD = 1.10
HALF_OVERHEAD = 1.25  # a view a tensor, at every pass
MIXED = 1.0  # drawn widths are narrower: a step must not cost more than a plain one


def cnn(share: float = 1.0) -> nn.Module:
    a, b, c = (int(share * n) for n in (64, 128, 256))
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(c, 10)),
    )


def mlp(share: float = 1.0) -> nn.Module:
    n = int(1024 * share)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(3072, n), nn.LayerNorm(n), nn.ReLU(), nn.Linear(n, n), nn.LayerNorm(n), nn.ReLU()),
        *(nn.Linear(n, n), nn.LayerNorm(n), nn.ReLU(), nn.Linear(n, 10)),
    )


def vit(share: float = 1.0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8, "num_labels": 10}
    cut = {"num_attention_heads": int(6 * share), "intermediate_size": int(1536 * share), "head_dim": 64}
    return ViTForImageClassification(ViTConfig(**sizes, **cut))


def output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output(model, batch[0]), batch[1])


def passes(what: str, make: Callable[..., nn.Module], shape: tuple[int, ...], repeats: int) -> None:
    """Forward passes: plain model, wrapper, half extract, half wrapper, half network built by itself."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    net = SortedModel(copy.deepcopy(model), WIDTHS).eval()
    half = SortedModel(net.model, WIDTHS).eval()
    half.set_subnet(HALF)
    models = {
        "plain": model,
        "wrapper": net,
        "extract": net.extract(HALF),
        "half wrapper": half,
        "own": make(0.5).eval(),
    }
    assert sum(p.numel() for p in models["extract"].parameters()) == sum(p.numel() for p in models["own"].parameters())

    def forward(each: nn.Module) -> Callable[[], Tensor]:
        return lambda: output(each, x)

    with torch.no_grad():
        work = {name: forward(each) for name, each in models.items()}
        for call in work.values():
            call()
        s = race(repeats, **work)
    print(f"{what}: {', '.join(f'{name} {len(x) / seconds:,.0f} images/s' for name, seconds in s.items())}")
    report(f"{what}: images/s, half-width extract / whole", s["plain"] / s["extract"], EXTRACT_AT_LEAST, True)
    report(f"{what}: forward, half-width extract / network of that size", s["extract"] / s["own"], OWN_SIZE)
    report(f"{what}: forward, wrapper at full width / plain", s["wrapper"] / s["plain"], OVERHEAD)
    report(f"{what}: forward, wrapper at half width / extract", s["half wrapper"] / s["extract"], HALF_OVERHEAD)


def steps(what: str, make: Callable[..., nn.Module], shape: tuple[int, ...], repeats: int) -> None:
    """Training steps; of drawn widths, four of each are in every call, as uniform sampling has them in the mean."""
    torch.manual_seed(0)
    model = make().train()
    batch = torch.randn(shape), torch.randint(10, shape[:1])
    nets = {name: SortedModel(copy.deepcopy(model), WIDTHS).train() for name in ("whole", "drawn")}
    optimizers = {name: torch.optim.SGD(m.parameters(), 1e-3, 0.9) for name, m in {"plain": model, **nets}.items()}

    def plain() -> None:
        for _ in range(4):
            optimizers["plain"].zero_grad()
            loss_fn(model, batch).backward()
            optimizers["plain"].step()

    def step(name: str, distributions: list[list[float]]) -> None:
        for P in distributions:
            options = {"generator": step_generator(0), "n_accumulate": 1, "distribution": P}
            sorted_step(nets[name], loss_fn, batch, optimizers[name], **options)

    one_hot = torch.eye(4).tolist()
    work = {"plain": plain, "whole": lambda: step("whole", one_hot[3:] * 4), "drawn": lambda: step("drawn", one_hot)}
    for call in work.values():
        call()
    s = race(repeats, **work)
    print(f"{what}: {', '.join(f'{name} {250 * seconds:.1f} ms a step' for name, seconds in s.items())}")
    report(f"{what}: training step, sorted_step on the whole / plain", s["whole"] / s["plain"], OVERHEAD)
    report(f"{what}: training step, sorted_step over four widths / plain", s["drawn"] / s["plain"], MIXED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else 31
    for what, make, size, rows in (("CNN", cnn, 32, 64), ("MLP", mlp, 32, 64), ("ViT", vit, 64, 16)):
        rows = 4 if arguments.quick else rows
        passes(f"{what}, {rows} images", make, (rows, 3, size, size), repeats)
    for what, make, size, rows in (("CNN", cnn, 32, 32), ("ViT", vit, 64, 4)):
        rows = 2 if arguments.quick else rows
        steps(f"{what}, {rows} images", make, (rows, 3, size, size), max(3, repeats // 4))
    if not arguments.quick:
        record("sortednet", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
