"""Gradient noise against the training step it is added to, and against a plain loop, as ratios in one run.

Whole steps (zero_grad, forward, backward, optimizer), with two threads and with one, bare and with the noise; and the
noise alone against the loop that everyone writes, ``p.grad += torch.randn_like(p) * std``:

1. a small conv net, a small vision transformer (batches of 28 x 28 images) and the paper's 20-layer perceptron of 50
   units on 784 pixels, batch 128;
2. where a step has few operations a weight, without a limit: the same perceptron at batch 64, a wide one.

Also: the bare optimizer step beside the one with noise, and the memory that is kept.

    python benchmarks/gradient_noise.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn

from shoestring.train.gradient_noise import GradientNoise, noise_std

STEP_LIMIT = 1.15  # of a training step: the issue's
LOOP_LIMIT = 1.0  # of the plain loop


def perceptron(width: int, layers: int) -> nn.Module:
    widths = [784, *(layers - 1) * (width,)]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patches, self.position = nn.Conv2d(1, width, 4, 4), nn.Parameter(torch.zeros(49, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT + self.position).mean(1))


def against(name: str, make: Callable[[], nn.Module], batch: int, repeats: int, limit: float | None) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    models = [make() for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]
    GradientNoise(optimizers[1], eta=0.01)

    def step(which: int) -> None:
        optimizers[which].zero_grad()
        nn.functional.cross_entropy(models[which](x), y).backward()
        optimizers[which].step()

    step(0), step(1)  # the first makes gradients and momentum
    parameters = list(models[0].parameters())
    noise = GradientNoise(torch.optim.SGD(parameters, lr=0.01), eta=0.01)

    def plain_loop() -> None:
        std = noise_std(1)
        for p in parameters:
            p.grad += torch.randn_like(p) * std

    def bursts(**work: Callable[[], object]) -> dict[str, float]:
        return race(repeats, **{key: (lambda call=call: [call() for _ in range(burst)]) for key, call in work.items()})

    start = time.perf_counter()
    step(0)
    burst = max(1, round(0.02 / (time.perf_counter() - start)))  # short steps: several to a measurement
    # Twins step in turn and the median of the ratios of neighbours is taken: the machine's mood is then in both.
    bare, noisy = [], []
    for _ in range(repeats):
        for which, seconds in ((0, bare), (1, noisy)):
            start = time.perf_counter()
            for _ in range(burst):
                step(which)
            seconds.append((time.perf_counter() - start) / burst)
    ratio = statistics.median(b / a for a, b in zip(bare, noisy, strict=True))
    step(0)  # gradients again
    s = bursts(noise=lambda: noise._update(1), loop=plain_loop, bare=optimizers[0].step, noisy=optimizers[1].step)
    numbers = sum(p.numel() for p in parameters)
    threads = torch.get_num_threads()
    where = f"{name}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    print(f"{where}: {numbers:,} weights, a step {1000 * statistics.median(bare):.2f} ms, the noise alone", end=" ")
    print(f"{1000 * s['noise'] / burst:.2f} ms ({1e9 * s['noise'] / burst / numbers:.1f} ns a weight)")
    if limit is None:
        print(f"  {f'{where}: step with noise / bare step':<84} {ratio:7.2f}   (no limit)")
        RATIOS.append({"what": f"{where}: step with noise / bare step", "ratio": round(ratio, 3)})
    else:
        report(f"{where}: step with noise / bare step", ratio, limit, width=84)
    report(f"{where}: noise / loop of randn_like", s["noise"] / s["loop"], LOOP_LIMIT, width=84)
    print(f"  {f'{where}: optimizer step (SGD) with noise / without':<84} {s['noisy'] / s['bare']:7.2f}   (no limit)")
    kept = sum(slabs[0][1].untyped_storage().nbytes() for _, slabs in noise._kept.values() if slabs)
    report(f"{where}: memory kept / that of the slab, 4 MB", kept / 2**22, 1.0, width=84)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: a look, not a measurement")
    repeats = 5 if (arguments := parser.parse_args()).quick else 31
    for threads in (2, 1):
        torch.set_num_threads(threads)
        against("conv net", conv_net, 64, repeats, STEP_LIMIT)
        against("vision transformer", VisionTransformer, 32, repeats, STEP_LIMIT)
        against("20 layers of 50", lambda: perceptron(50, 20), 128, repeats, STEP_LIMIT)
        against("20 layers of 50", lambda: perceptron(50, 20), 64, repeats, None)
        against("3 layers of 512", lambda: perceptron(512, 3), 128, repeats, None)
    if not arguments.quick:
        record("gradient_noise", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
