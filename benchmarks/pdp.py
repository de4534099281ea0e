"""A training step with PDP's soft masks against the plain step and torch.nn.utils.prune's constant masks, in one run.

1. Time of 16 steps (Adam) of an MLP and a ResNet-18, all layers but the first and the last masked, with thresholds
   refreshed every 16 steps; and of the MLP with a refresh at every step.
2. Bytes kept for the backward pass beyond the plain step's, over the bytes of the masked weights.
3. Time of a threshold against a full sort.

    python benchmarks/pdp.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from _sparse_steps import STEPS, kept_bytes, layers, masked, mlp, resnet_18, stepper
from torch import nn

from shoestring.compress.pdp import PDPPruner, pdp_threshold

PLAIN, PRUNE, EVERY_STEP, MEMORY, SORT = 1.30, 1.30, 2.50, 3.0, 0.5  # limits, set before the first run


def soft(model: nn.Module, names: list[str], refresh_every: int) -> tuple[nn.Module, PDPPruner]:
    model = copy.deepcopy(model)
    pruner = PDPPruner(
        model, 0.9, steps_per_epoch=10**6, warmup_epochs=0, ramp=1.0, refresh_every=refresh_every, target_modules=names,
        scope="local",
    )  # fmt: skip
    return model, pruner.attach()


def race_steps(what: str, model: nn.Module, shape: tuple[int, ...], repeats: int, steps: int, often: bool) -> None:
    names = layers(model)
    seldom, pruner = soft(model, names, STEPS)
    constant = masked(model, names)
    weights = sum(model.get_submodule(name).weight.nbytes for name in names)
    memory = {k: kept_bytes(m, shape) for k, m in (("plain", model), ("pdp", seldom), ("prune", constant))}
    work = {
        "plain": stepper(copy.deepcopy(model), shape, steps),
        "prune": stepper(constant, shape, steps),
        "pdp": stepper(seldom, shape, steps, pruner.step),
    }
    if often:
        every, other = soft(model, names, 1)
        work["every"] = stepper(every, shape, steps, other.step)
    s = race(repeats, **work)
    print(f"{what}: {', '.join(f'{name} {1000 * seconds / steps:.1f} ms' for name, seconds in s.items())}")
    report(f"{what}: step, PDP / plain", s["pdp"] / s["plain"], PLAIN)
    report(f"{what}: step, PDP / torch.nn.utils.prune", s["pdp"] / s["prune"], PRUNE)
    if often:
        report(f"{what}: step, PDP with a threshold at every step / plain", s["every"] / s["plain"], EVERY_STEP)
    report(f"{what}: more bytes kept than plain / weights", (memory["pdp"] - memory["plain"]) / weights, MEMORY)
    print(f"  (torch.nn.utils.prune: {(memory['prune'] - memory['plain']) / weights:.2f})")


def threshold(size: int, repeats: int) -> None:
    w = torch.randn(size)
    s = race(repeats, threshold=lambda: pdp_threshold(w, 0.9), sort=lambda: w.abs().sort())
    report(f"threshold of {size:,} weights / a sort", s["threshold"] / s["sort"], SORT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    threshold(10**6, 3 if quick else 9)
    race_steps("MLP 784-1024-1024-10, 256 images", *mlp(), *((1, STEPS) if quick else (7, STEPS)), often=True)
    if not quick:
        race_steps("ResNet-18, 8 x 3x96x96", *resnet_18(8), 3, STEPS, often=False)
        record("pdp", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
