"""A training step with N:M mask decay against the plain step, constant masks, and SR-STE written plainly, in one run.

1. Time of 16 steps (Adam) of an MLP and a ResNet-18, all layers but the first and the last at 1:16 and 2:4, with masks
   refreshed every 16 steps; and of the MLP with masks at every step, against the plain step and against SR-STE as its
   public code has it (a sort of every group in every forward pass).
2. Bytes kept for the backward pass, and of masks, beyond the plain step's, over the bytes of the weights.

    python benchmarks/nm_decay.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from _sparse_steps import STEPS, kept_bytes, layers, masked, mlp, resnet_18, stepper
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from shoestring.compress.nm_decay import NMController, NMDecay, sparsify_nm

PLAIN, PRUNE, EVERY_STEP, SR_STE, MEMORY = 1.30, 1.30, 2.00, 1.05, 2.0  # limits, set before the first run


class PlainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, n: int, m: int) -> Tensor:
        groups = W.detach().abs().reshape(-1, m)
        index = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(1, index, 0).view_as(W)
        ctx.save_for_backward(W, mask)
        return W * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, mask = ctx.saved_tensors
        return grad + 2e-4 * (1 - mask) * W, None, None


class PlainSRSTE(nn.Module):
    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m

    def forward(self, W: Tensor) -> Tensor:
        return PlainFunction.apply(W, self.n, self.m)


def plain_sr_ste(model: nn.Module, names: list[str], n: int, m: int) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        register_parametrization(model.get_submodule(name), "weight", PlainSRSTE(n, m))
    return model


def decayed(model: nn.Module, names: list[str], n: int, m: int, refresh_every: int) -> tuple[nn.Module, NMController]:
    model = copy.deepcopy(model)
    recipe = NMDecay(n, m, total_steps=10**6, beta=1e-3, refresh_every=refresh_every)
    controller = sparsify_nm(model, recipe, names)
    return model, controller


def race_steps(
    what: str, model: nn.Module, shape: tuple[int, ...], n: int, m: int, repeats: int, steps: int, often: bool
) -> None:
    names = layers(model)
    seldom, controller = decayed(model, names, n, m, STEPS)
    constant = masked(model, names)
    weights = sum(model.get_submodule(name).weight.nbytes for name in names)
    memory = {k: kept_bytes(one, shape) for k, one in (("plain", model), ("nm", seldom), ("prune", constant))}
    work = {
        "plain": stepper(copy.deepcopy(model), shape, steps),
        "prune": stepper(constant, shape, steps),
        "nm-decay": stepper(seldom, shape, steps, controller.step),
    }
    if often:
        every, other = decayed(model, names, n, m, 1)
        work["every"] = stepper(every, shape, steps, other.step)
        work["sr-ste"] = stepper(plain_sr_ste(model, names, n, m), shape, steps)
    s = race(repeats, **work)
    what = f"{what}, {n}:{m}"
    print(f"{what}: {', '.join(f'{name} {1000 * seconds / steps:.1f} ms' for name, seconds in s.items())}")
    report(f"{what}: step, nm-decay / plain", s["nm-decay"] / s["plain"], PLAIN)
    report(f"{what}: step, nm-decay / torch.nn.utils.prune", s["nm-decay"] / s["prune"], PRUNE)
    if often:
        report(f"{what}: step, masks at every step / plain", s["every"] / s["plain"], EVERY_STEP)
        report(f"{what}: step, masks at every step / SR-STE plainly", s["every"] / s["sr-ste"], SR_STE)
    report(f"{what}: more bytes kept than plain / weights", (memory["nm"] - memory["plain"]) / weights, MEMORY)
    print(f"  (torch.nn.utils.prune: {(memory['prune'] - memory['plain']) / weights:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    network = "MLP 784-1024-1024-10, 256 images"
    if quick:
        race_steps(network, *mlp(), 1, 16, 1, STEPS, often=True)
    else:
        race_steps(network, *mlp(), 1, 16, 5, STEPS, often=True)
        race_steps(network, *mlp(), 2, 4, 5, STEPS, often=True)
        race_steps("ResNet-18, 8 x 3x96x96", *resnet_18(8), 1, 16, 3, STEPS, often=False)
        record("nm_decay", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
