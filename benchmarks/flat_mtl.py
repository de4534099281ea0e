"""FlatMTL's step against the passes it is made of, done by hand, as ratios in one run.

1. What the algorithm needs for m tasks: one forward pass and m backward passes at the weights, m times both elsewhere,
   and one update. The reference does just that with bare ``loss.backward()``, nothing perturbed, kept or combined. A
   step may cost 10 % more. A small CNN with two tasks at a batch of 128, and a ResNet-18 of half its width with three
   at 64 (the paper's: 256). What a step does beside its passes does not depend on the batch: at small ones it weighs
   more, with the full ResNet-18 and a batch of 8 a fifth.
2. Beside it, without limit: the base optimizer on the mean of the losses, SAM of that mean by hand, and a step that is
   given closures of single tasks, so that it computes fewer heads than the reference.

    python benchmarks/flat_mtl.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn

from shoestring.train.flat_mtl import AGGREGATORS, FlatMTL

LIMIT = 1.10


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short = nn.Sequential()
        if stride > 1 or before != width:
            self.short = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.short(x)).relu()


def resnet18(width: int) -> nn.Module:
    """For 32 x 32 pixels; `width` channels at first, 64 in the original, and 8 times as many at the end."""
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for before, after, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)):
        blocks += [Block(before * width, after * width, stride), Block(after * width, after * width, 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def small_cnn() -> nn.Module:
    """For 28 x 28 pixels: 69,000 parameters."""
    layers: list[nn.Module] = []
    for before, width in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 80), nn.ReLU())


class Problem:
    """A network with m heads and one batch."""

    def __init__(self, trunk: nn.Module, width: int, m: int, x: Tensor) -> None:
        self.trunk, self.heads, self.x = trunk, nn.ModuleList(nn.Linear(width, 10) for _ in range(m)), x
        self.y = torch.randint(10, (m, len(x)))
        self.parameters = [*trunk.parameters(), *self.heads.parameters()]

    def loss(self, i: int, features: Tensor | None = None) -> Tensor:
        features = self.trunk(self.x) if features is None else features
        return nn.functional.cross_entropy(self.heads[i](features), self.y[i])

    def losses(self) -> list[Tensor]:
        features = self.trunk(self.x)
        return [self.loss(i, features) for i in range(len(self.heads))]

    def optimizer(self, aggregator: str) -> FlatMTL:
        heads = [head.parameters() for head in self.heads]
        return FlatMTL(self.trunk.parameters(), heads, torch.optim.Adam, aggregator, rho=1e-3, lr=1e-5)


def bare_passes(problem: Problem, base: torch.optim.Optimizer) -> None:
    """1 forward and m backward passes, m times both, an update."""
    base.zero_grad()
    losses = problem.losses()
    for loss in losses:
        loss.backward(retain_graph=loss is not losses[-1])
    for i in range(len(losses)):
        problem.losses()[i].backward()
    base.step()


def base_step(problem: Problem, base: torch.optim.Optimizer) -> None:
    base.zero_grad()
    torch.stack(problem.losses()).mean().backward()
    base.step()


def sam_step(problem: Problem, base: torch.optim.Optimizer, rho: float = 1e-3) -> None:
    """SAM of the mean loss, as it is usually written."""
    base.zero_grad()
    torch.stack(problem.losses()).mean().backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in problem.parameters]).norm()
        kept = [p.clone() for p in problem.parameters]
        for p in problem.parameters:
            p.add_(p.grad * (rho / (norm + 1e-12)))
    base.zero_grad()
    torch.stack(problem.losses()).mean().backward()
    with torch.no_grad():
        for p, old in zip(problem.parameters, kept, strict=True):
            p.copy_(old)
    base.step()


def against_bare_passes(name: str, problem: Problem, rules: Sequence[str], repeats: int) -> None:
    m = len(problem.heads)
    base = torch.optim.Adam(problem.parameters, lr=1e-5)
    print(f"{name}, {m} tasks, batch {len(problem.x)}, {sum(p.numel() for p in problem.parameters):,} parameters")

    def in_turns(**work: Callable[[], object]) -> dict[str, float]:
        work = {"bare": lambda: bare_passes(problem, base), **work}
        for call in work.values():
            call()
        s = race(repeats, **work)
        for label, seconds in s.items():
            print(f"    {label:<32} {1000 * seconds:9.2f} ms  {seconds / s['bare']:6.3f} of the bare passes")
        return s

    # Each against the bare passes by itself: with several in one process, which of them finds its memory still mapped
    # is chance (glibc gives large blocks back), and decides 10 % of a pass.
    for rule in rules:
        flat = problem.optimizer(rule)
        s = in_turns(**{rule: lambda flat=flat: flat.step(problem.losses)})
        report(f"{name}, {m} tasks: step with {rule} / its passes, bare", s[rule] / s["bare"], LIMIT)
        del flat
    alone = [lambda i=i: problem.loss(i) for i in range(m)]
    flat = problem.optimizer("mean")
    s = in_turns(
        mean=lambda: flat.step(problem.losses),
        closures_of_single_tasks=lambda: flat.step(problem.losses, alone),
        base_step=lambda: base_step(problem, base),
        SAM=lambda: sam_step(problem, base),
    )
    for label in ("base_step", "SAM"):
        what = f"{name}, {m} tasks: step with mean / {label.replace('_', ' ')}"
        RATIOS.append({"what": what, "ratio": round(s["mean"] / s[label], 3)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats: a look, not a measurement")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    small = Problem(small_cnn(), 80, 2, torch.randn(128, 1, 28, 28))
    against_bare_passes("small CNN", small, tuple(AGGREGATORS), 3 if quick else 40)
    large = Problem(resnet18(32), 256, 3, torch.randn(8 if quick else 64, 3, 32, 32))
    against_bare_passes("ResNet-18", large, ("mean", "pcgrad", "cagrad"), 1 if quick else 5)
    if not quick:
        record("flat_mtl", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
