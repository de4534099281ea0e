"""Guidance-term erasure against a plain denoising fine-tuning step of the same batch, as ratios in one run.

1. A training step with its states drawn beforehand, against the plain step: two rows of the network for one, so 2, and
   against the plain step of twice the batch, which is the same work.
2. A state of the pool, against three forward passes of the network; and what a step would cost that draws its own
   state by half a trajectory, as ESD's code does, against a step with a pool of 20 x 50 states spread over 500 steps.
3. Memory that a step adds at its peak, against the plain step.

    python benchmarks/all_but_one.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from _memory import added_mb, forget_peak, peak_mb
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import nn

from shoestring import zoo
from shoestring.forget.all_but_one import GuidanceTermEraser
from shoestring.zoo.train._common import noise_loss

STEP_LIMIT, SAME_WORK_LIMIT, STATE_LIMIT = 2.2, 1.1, 1.15  # 1.1 x (2 rows for one); 1.1 x; the DDIM step on top
POOL_LIMIT, MEMORY_LIMIT = 0.25, 2.3
PER_FIT = 5  # steps of one call: what a call sets up once is small beside them


def conditions(name: str, unet: nn.Module, rows: int, seed: int) -> Any:
    """Labels, or hidden states as a text encoder would give: what they say does not matter for time."""
    generator = torch.Generator().manual_seed(seed)
    return seed if name == "tiny-class-ddpm" else torch.randn(rows, 32, 128, generator=generator)


def stepper(unet: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def plain(name: str, unet: nn.Module, scheduler: Any, batch: int) -> Callable[[], None]:
    unet, generator = copy.deepcopy(unet), torch.Generator().manual_seed(0)
    shape = (batch, unet.config.in_channels, *[unet.config.sample_size] * 2)
    images = torch.randn(shape, generator=generator)
    told: dict[str, torch.Tensor] = {"class_labels": torch.zeros(batch, dtype=torch.long)}
    if name != "tiny-class-ddpm":
        told = {"encoder_hidden_states": conditions(name, unet, batch, 0)}
        unet.requires_grad_(False)
        for parameter_name, parameter in unet.named_parameters():
            parameter.requires_grad_("attn2" in parameter_name)
    return stepper(unet, lambda: noise_loss(unet, scheduler, images, generator, **told))


def ours(name: str, unet: nn.Module, scheduler: Any, batch: int) -> tuple[GuidanceTermEraser, Callable[[], object]]:
    eraser = GuidanceTermEraser(
        unet,
        scheduler,
        erase=conditions(name, unet, 1, 0),
        alternative=conditions(name, unet, 1, 1),
        null=conditions(name, unet, 1, 2),
        trainable="all" if name == "tiny-class-ddpm" else "attn2",
        batch_size=batch,
        sampling_steps=4,
        trajectories=batch,
        steps=PER_FIT,
    )
    generator = torch.Generator().manual_seed(0)
    pool = eraser.draw_states(generator)
    return eraser, lambda: eraser.fit(generator, states=pool, progress=False)


def model(name: str) -> tuple[Any, Any]:
    if name == "tiny-class-ddpm":
        return zoo.load(name), zoo.load(name, "scheduler")
    pipeline = zoo.load(name)
    return pipeline.unet, pipeline.scheduler


def times(name: str, batch: int, repeats: int) -> None:
    unet, scheduler = model(name)
    eraser, step = ours(name, unet, scheduler, batch)
    shape = (batch, unet.config.in_channels, *[unet.config.sample_size] * 2)
    x, t = torch.randn(shape), torch.full((batch,), 500)
    row = torch.zeros(batch, dtype=torch.long)
    key = "class_labels" if name == "tiny-class-ddpm" else "encoder_hidden_states"

    @torch.no_grad()
    def forward() -> None:
        eraser.frozen(torch.cat([x] * 3), torch.cat([t] * 3), **{key: torch.cat([eraser.erase[row]] * 3)})

    work = {
        "plain": plain(name, unet, scheduler, batch),
        "twice": plain(name, unet, scheduler, 2 * batch),
        "ours": step,
        "forward": forward,
        "pool": lambda: eraser.draw_states(torch.Generator().manual_seed(0)),  # 4 states for each of the batch
    }
    for call in work.values():
        call()
    s = race(repeats, **work)
    s["ours"] /= PER_FIT
    print(f"{name}, batch {batch}: {', '.join(f'{what} {1000 * seconds:.1f} ms' for what, seconds in s.items())}")
    report(f"{name}: erasing step / plain step", s["ours"] / s["plain"], STEP_LIMIT)
    report(f"{name}: erasing step / plain step of twice the batch", s["ours"] / s["twice"], SAME_WORK_LIMIT)
    state = s["pool"] / 4  # of a whole batch
    report(f"{name}: a state of the pool / three forward passes", state / s["forward"], STATE_LIMIT)
    anew = s["ours"] + 25 * state * 2 / 3 + state  # half of 50 steps with two calls each, and the targets
    report(f"{name}: step with a pool of 1000 for 500 steps / states anew", (s["ours"] + 2 * state) / anew, POOL_LIMIT)


def peak_memory(how: str, batch: int) -> None:
    """Run in a process of its own: print the MB that three steps add at their peak."""
    name = "tiny-class-ddpm"
    unet, scheduler = model(name)
    plain(name, unet, scheduler, 1)()  # libraries have their buffers
    forget_peak()
    before = peak_mb()
    step = plain(name, unet, scheduler, batch) if how == "plain" else ours(name, unet, scheduler, batch)[1]
    for _ in range(3):
        step()
    print(json.dumps(peak_mb() - before))


def memory(batch: int) -> None:
    added = added_mb(__file__, ("plain", "ours"), batch)
    report("tiny-class-ddpm: memory of erasing / plain fine-tuning", added["ours"] / added["plain"], MEMORY_LIMIT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(arguments.peak[0], int(arguments.peak[1]))
        sys.exit()
    torch.manual_seed(0)
    if arguments.quick:
        times("tiny-class-ddpm", 8, 3)
        memory(32)
    else:
        times("tiny-class-ddpm", 16, 7)
        times("tiny-t2i", 8, 7)
        memory(64)
        record("all_but_one", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
