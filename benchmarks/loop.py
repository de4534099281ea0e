"""Steps per second of `shoestring.loop.fit` against the same training written by hand, in one run.

The hand-written loop is the shortest correct one: zero_grad, loss, backward, step, and the loss as a float. Both
train the same model on the same batches, in alternating repeats. One thread, and seconds of this process; the ratio
is that of the fastest repeats, which other work on the machine disturbs least (the median of the ratios beside it).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoestring.loop import fit

Batch = tuple[Tensor, Tensor]
LIMIT = 1.05  # of a step of about 2 ms or more


def step(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def by_hand(model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer) -> list[float]:
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = step(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_fit(model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    fit(model, batches, step, optimizer, progress=False)


def with_bar(model: nn.Module, batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        fit(model, batches, step, optimizer, progress=True)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], steps: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randint(10, (shape[0],))) for _ in range(steps)]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    by_hand(model, batches, optimizer)
    with_fit(model, batches[:5], optimizer)
    arms = {"hand": by_hand, "fit": with_fit, "bar": with_bar}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms)[:: 1 if repeat % 2 else -1]:
            start = time.process_time()
            arms[name](model, batches, optimizer)
            seconds[name].append(time.process_time() - start)
    fastest = {name: min(times) for name, times in seconds.items()}
    pairs = zip(seconds["fit"], seconds["hand"], strict=True)
    return {
        "ms": 1000 * fastest["hand"] / steps,
        "fit": fastest["fit"] / fastest["hand"],
        "bar": fastest["bar"] / fastest["hand"],
        "median": statistics.median(fit_time / hand_time for fit_time, hand_time in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    os.environ["FORCE_COLOR"] = "1"  # rich draws the bar as on a terminal
    cases = {
        "MLP, 4,000 parameters (the loop itself)": (lambda: mlp(32), (32, 64), 300, False),
        "MLP, 0.2 M parameters": (lambda: mlp(400), (64, 64), 200, True),
        "conv net, 28 x 28": (conv_net, (32, 1, 28, 28), 100, True),
    }
    print(f"{'model':40} {'ms/step by hand':>16} {'fit/hand':>9} {'with a bar':>11} {'median of fit/hand':>19}")
    late = []
    for name, (make, shape, steps, limited) in cases.items():
        got = measure(make, shape, steps, repeats)
        print(f"{name:40} {got['ms']:16.3f} {got['fit']:9.3f} {got['bar']:11.3f} {got['median']:19.3f}")
        if limited and got["fit"] > LIMIT:
            late.append(name)
    if late:
        raise SystemExit(f"more than {LIMIT} times the hand-written loop: {', '.join(late)}")


if __name__ == "__main__":
    main()
