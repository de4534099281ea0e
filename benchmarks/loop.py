"""Time per step in `shoestring.loop.fit` against the same step written by hand, in one run.

The hand-written loop is the shortest correct one: zero_grad, loss, backward, step, and the loss as a float. The two
train twins of one model, one step each in turn: `fit` reads its batches from an iterator that does the step of the
twin before it hands out the next batch. So what else the machine does falls on both, and the median of the ratios is
steady. The cost of a call of `fit`, before its first step, is measured apart.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from _record import record
from torch import Tensor, nn

from shoestring.loop import fit

Batch = tuple[Tensor, Tensor]
LIMIT = 1.05  # of a step of about 2 ms or more


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def measure(model: nn.Module, shape: tuple[int, ...], steps: int, progress: bool) -> tuple[float, float]:
    """Milliseconds of a step by hand, and the median of the ratios."""
    data = [(torch.randn(shape), torch.randint(10, (shape[0],))) for _ in range(20)]
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, twin))
    by_hand: list[float] = []
    by_fit: list[float] = []
    losses: list[float] = []

    def batches() -> Iterator[Batch]:
        for i in range(steps):
            batch = data[i % len(data)]
            start = time.perf_counter()
            twin_optimizer.zero_grad()
            loss = loss_of(twin, batch)
            loss.backward()
            twin_optimizer.step()
            losses.append(loss.item())
            middle = time.perf_counter()
            yield batch
            by_hand.append(middle - start)
            by_fit.append(time.perf_counter() - middle)

    fit(model, batches(), loss_of, optimizer, progress=progress)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), "the two loops trained differently"
    ratios = [f / h for f, h in zip(by_fit[20:], by_hand[20:], strict=True)]
    return 1000 * statistics.median(by_hand[20:]), statistics.median(ratios)


def milliseconds_per_call() -> float:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(max_steps: int) -> float:
        start = time.perf_counter()
        fit(model, [torch.ones(1, 1)] * 2, lambda m, x: m(x).sum(), optimizer, max_steps=max_steps, progress=False)
        return time.perf_counter() - start

    run(1)
    return 1000 * statistics.median(2 * run(1) - run(2) for _ in range(100))  # without the step itself


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    os.environ["FORCE_COLOR"] = "1"  # rich draws the bar as on a terminal
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], bool]] = [
        ("MLP, 4,000 parameters (the loop itself)", lambda: mlp(32), (32, 64), False),
        ("MLP, 0.2 M parameters", lambda: mlp(400), (64, 64), True),
        ("conv net, 28 x 28", conv_net, (32, 1, 28, 28), True),
    ]
    print(f"{'model':40} {'ms/step by hand':>16} {'fit/hand':>9} {'with a bar':>11}")
    late, ratios = [], []
    for name, make, shape, limited in cases:
        milliseconds, ratio = measure(make(), shape, steps, progress=False)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            _, with_bar = measure(make(), shape, steps, progress=True)
        print(f"{name:40} {milliseconds:16.3f} {ratio:9.3f} {with_bar:11.3f}", flush=True)
        ratios.append(
            {
                "model": name,
                "ms a step by hand": round(milliseconds, 3),
                "fit": round(ratio, 3),
                "with a bar": round(with_bar, 3),
                "limited": limited,
            }
        )
        if limited and ratio > LIMIT:
            late.append(name)
    call = milliseconds_per_call()
    print(f"a call of fit, before its first step: {call:.1f} ms")
    record("loop", {"limit": LIMIT, "ratios": ratios, "ms a call": round(call, 2)})
    if late:
        raise SystemExit(f"more than {LIMIT} times the hand-written loop: {', '.join(late)}")


if __name__ == "__main__":
    main()
