"""A step of the spherical output layer against the dense ones, as ratios in one run, and its drift.

d = 128, batch 64, random input; each step is forward, backward and update of the output layer.

1. The step at 1,000,000 outputs against the step at 10,000: it must not depend on their number (limit 1.5).
2. ``nn.Linear`` + ``cross_entropy`` + SGD at 500,000 outputs against it (at least 5 times slower), and, without a
   limit, `torch.nn.AdaptiveLogSoftmaxWithLoss`, which is an approximation of another kind.
3. Drift: 10,000 float32 steps against the dense update in float64, relative to the norm of W (limit 1e-3).
4. Memory of the state at 1,000,000 outputs against V + 3 d^2 numbers of float64.

    python benchmarks/z_loss.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import nn

from shoestring.train.z_loss import SphericalLinear, z_loss

WIDTH, BATCH, STEPS = 128, 64, 10
FLAT, FASTER, DRIFT, STATE = 1.5, 5.0, 1e-3, 1.01


def spherical(D: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    layer = SphericalLinear(WIDTH, D, b=5.0, lr=0.1, bias=False, generator=generator)
    h = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()

    def steps() -> None:
        for _ in range(STEPS):
            layer(h, torch.randint(D, (BATCH,), generator=generator)).backward()

    return steps


def dense(D: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(WIDTH, D, bias=False)
    sgd = torch.optim.SGD(linear.parameters(), lr=0.1)
    h = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(linear(h), torch.randint(D, (BATCH,), generator=generator)).backward()
        sgd.step()

    return step


def adaptive(D: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, D, [D // 50, D // 10])
    sgd = torch.optim.SGD(softmax.parameters(), lr=0.1)
    h = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()

    def step() -> None:
        sgd.zero_grad()
        softmax(h, torch.randint(D, (BATCH,), generator=generator)).loss.backward()
        sgd.step()

    return step


def flat(few: int, many: int, repeats: int) -> None:
    small, large = spherical(few), spherical(many)
    small(), large()
    s = race(repeats, few=small, many=large)
    print(f"{STEPS} steps: {1000 * s['few']:.1f} ms at {few} outputs, {1000 * s['many']:.1f} ms at {many}")
    report(f"step at {many} outputs / at {few}", s["many"] / s["few"], FLAT)


def against_dense(D: int, repeats: int) -> None:
    work = {"spherical": spherical(D), "dense": dense(D), "adaptive": adaptive(D)}
    for call in work.values():
        call()
    s = race(repeats, **work)
    own = s["spherical"] / STEPS
    print(f"{D} outputs, a step: " + ", ".join(f"{n} {1000 * t:.1f} ms" for n, t in {**s, "spherical": own}.items()))
    report(f"{D} outputs: linear, cross-entropy and SGD / spherical", s["dense"] / own, FASTER, at_least=True)
    print(f"  {D} outputs: adaptive softmax and SGD / spherical: {s['adaptive'] / own:.2f}   (no limit)")


def drift(steps: int) -> None:
    D, d, m, lr = 500, 16, 16, 1.0
    generator = torch.Generator().manual_seed(0)
    layer = SphericalLinear(d, D, lr=lr, b=4.0, bias=False, generator=generator, dtype=torch.float32)
    W = layer.weight.double()
    teacher = torch.randn(D, d, generator=generator)
    for _ in range(steps):
        h = torch.randn(m, d, generator=generator)
        target = (h @ teacher.T).argmax(1)
        layer(h, target).backward()
        W.requires_grad_()
        (gradient,) = torch.autograd.grad(z_loss(h.double() @ W.T, target, 1.0, 4.0), W)
        W = (W - lr * gradient).detach()
    report(f"drift in {steps} float32 steps / norm of W", float((layer.weight.double() - W).norm() / W.norm()), DRIFT)


def memory(D: int) -> None:
    layer = SphericalLinear(WIDTH, D, bias=False)
    state = sum(tensor.nbytes for tensor in layer.state_dict().values())
    report(f"state at {D} outputs / V + 3 d^2 numbers", state / (layer.V.nbytes + 3 * 8 * WIDTH**2), STATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small: a look, not a measurement")
    if parser.parse_args().quick:
        flat(1000, 10_000, 5)
        against_dense(20_000, 3)
        drift(200)
        memory(10_000)
    else:
        flat(10_000, 1_000_000, 21)
        against_dense(500_000, 7)
        drift(10_000)
        memory(1_000_000)
        record("z_loss", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
