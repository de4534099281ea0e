"""SFD against a plain denoising fine-tuning step of the same batch, and one-step samples against fifty steps.

1. An iteration (a score and a generator step, each with retain and forget term) through `fit`: against the plain step
   (22 passes for 3), and against the same iteration written plainly with two optimizers and no loop.
2. Memory that an iteration adds at its peak, against the plain step.
3. Samples in one step, against 50 steps of DDIM.

    python benchmarks/sfd.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable

import torch
from _memory import added_mb, forget_peak, peak_mb
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import nn

from shoestring import zoo
from shoestring.forget.sfd import ScoreForgettingDistiller
from shoestring.zoo.train._common import noise_loss
from shoestring.zoo.train.tiny_class_ddpm import sample

ITERATION_LIMIT = 1.1 * 22 / 3  # of each term: 5 forward passes, 6 half backward passes; of a plain step 1 and 2
PLAINLY_LIMIT, MEMORY_LIMIT, SAMPLING_LIMIT = 1.1, 6.6, 0.03
PER_FIT = 3  # iterations of one call: what a call sets up once is small beside them


def distiller_of(unet: nn.Module, scheduler: object) -> ScoreForgettingDistiller:
    return ScoreForgettingDistiller(unet, scheduler, 0, 1, null=10, forget_weight=1.0, score_forget_weight=1.0)


def plain_step(unet: nn.Module, scheduler: object, batch: int) -> Callable[[], None]:
    unet, generator = copy.deepcopy(unet), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-5)
    images, labels = torch.randn(batch, 1, 28, 28, generator=generator), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        noise_loss(unet, scheduler, images, generator, class_labels=labels).backward()
        optimizer.step()

    return step


def plain_iteration(unet: nn.Module, scheduler: object, batch: int) -> Callable[[], None]:
    """The equations as they stand, for this network alone."""
    p, s, g = unet, copy.deepcopy(unet), copy.deepcopy(unet)
    p.requires_grad_(False)
    adams = [torch.optim.Adam(net.parameters(), 1e-5, betas=(0.0, 0.999)) for net in (s, g)]
    average = [parameter.detach().clone() for parameter in g.parameters()]
    abar = scheduler.alphas_cumprod
    tau = int(((1 - abar) / abar).sqrt().sub(2.5).abs().argmin())

    def made(labels: torch.Tensor) -> torch.Tensor:
        x = (1 - abar[tau]).sqrt() * torch.randn(batch, 1, 28, 28)
        eps = g(x, torch.full((batch,), tau), class_labels=labels).sample
        return (x - (1 - abar[tau]).sqrt() * eps) / abar[tau].sqrt()

    def noised(x_g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        t, eps = torch.randint(48, 919, (batch,)), torch.randn(batch, 1, 28, 28)
        a, b = (level.sqrt().view(-1, 1, 1, 1) for level in (abar[t], 1 - abar[t]))
        return t, eps, a, b, a * x_g + b * eps

    def iteration() -> None:
        c, forget, safe = torch.randint(1, 10, (batch,)), torch.zeros(batch, dtype=torch.long), torch.ones(batch).long()
        losses = []
        for labels in (c, forget):
            with torch.no_grad():
                x_g = made(labels)
            t, eps, _, _, x_t = noised(x_g)
            losses.append((eps - s(x_t, t, class_labels=labels).sample).square().sum((1, 2, 3)).mean())
        adams[0].zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_value_(s.parameters(), 1.0)
        adams[0].step()
        s.requires_grad_(False)
        losses = []
        for labels, asked in ((c, c), (forget, safe)):
            x_g = made(labels)
            t, _, a, b, x_t = noised(x_g)
            P = (x_t - b * p(x_t, t, class_labels=asked).sample) / a
            S = (x_t - b * s(x_t, t, class_labels=labels).sample) / a
            w = (P - x_g).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
            losses.append(((P - S) * ((P - x_g) - 1.2 * (P - S)) / w).sum((1, 2, 3)).mean())
        adams[1].zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_value_(g.parameters(), 1.0)
        adams[1].step()
        s.requires_grad_(True)
        torch._foreach_lerp_(average, [parameter.detach() for parameter in g.parameters()], 0.0001)

    return iteration


def times(batch: int, repeats: int) -> None:
    unet, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    distiller = distiller_of(unet, scheduler)
    plainly = plain_iteration(copy.deepcopy(unet), scheduler, batch)
    generator = torch.Generator().manual_seed(0)
    work = {
        "plain": plain_step(unet, scheduler, batch),
        "plainly": lambda: [plainly() for _ in range(PER_FIT)],
        "ours": lambda: distiller.fit(PER_FIT, batch, generator=generator, progress=False),
    }
    work["plain"]()
    s = race(repeats, **work)
    iteration, plainly_s = s["ours"] / PER_FIT, s["plainly"] / PER_FIT
    seconds = {"plain": s["plain"], "plainly": plainly_s, "ours": iteration}
    print(f"batch {batch}: {', '.join(f'{what} {1000 * each:.0f} ms' for what, each in seconds.items())}")
    report("iteration / plain fine-tuning step of the same batch", iteration / s["plain"], ITERATION_LIMIT)
    report("iteration / the same written plainly", iteration / plainly_s, PLAINLY_LIMIT)


def sampling(n: int, repeats: int) -> None:
    unet, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    distiller, labels = distiller_of(unet, scheduler), torch.arange(n) % 10
    generator = torch.Generator().manual_seed(0)
    work = {
        "one": lambda: distiller.sample(labels, generator),
        "fifty": lambda: sample(unet, scheduler, labels, scale=1.0, steps=50, generator=generator, batch=n),
    }
    work["one"]()
    s = race(repeats, **work)
    report(f"{n} samples: one step / 50 steps of DDIM", s["one"] / s["fifty"], SAMPLING_LIMIT)


def peak_memory(how: str, batch: int) -> None:
    """Run in a process of its own: print the MB that two steps or iterations add at their peak."""
    unet, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    plain_step(unet, scheduler, 1)()  # libraries have their buffers
    forget_peak()
    before = peak_mb()
    if how == "plain":
        step = plain_step(unet, scheduler, batch)
        step(), step()
    else:
        distiller_of(unet, scheduler).fit(2, batch, generator=torch.Generator().manual_seed(0), progress=False)
    print(json.dumps(peak_mb() - before))


def memory(batch: int) -> None:
    added = added_mb(__file__, ("plain", "ours"), batch)
    report("memory of an iteration / of a plain step", added["ours"] / added["plain"], MEMORY_LIMIT)


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
        times(4, 1)
        sampling(8, 1)
        memory(16)
    else:
        times(12, 5)
        sampling(16, 3)
        memory(48)
        record("sfd", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
