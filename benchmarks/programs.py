"""The program search: what processes bring, what breeding costs, and a step of a program against torch's AdamW.

1. Evaluations per second of `ProgramSearch` in two processes against one process (time of starting them included), on
   the proxy of the claim. Limit: >= 1.5 of the 2 that two cores could give, as the parent breeds beside them.
2. Breeding a child (mutation, abstract execution, hash) against one evaluation: <= 10 %.
3. A step of `program_to_optimizer` of the AdamW program against `torch.optim.AdamW` as it comes, 10 M parameters:
   <= 3, as the program makes a new tensor for each of its 9 statements where AdamW goes about in place.

    python benchmarks/programs.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from _race import FAILED, RATIOS, clock, race, report
from _record import record

from shoestring.claims.search.programs import _digits, _loss_after
from shoestring.search.programs import ADAMW, Program, ProgramSearch, mutate, program_to_optimizer


def evaluate(program: Program) -> float:
    return -_loss_after(program, _digits(0)[:2], (64, 32, 10), 100, 0)


def processes(n_children: int, repeats: int) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(repeats):
        for n_jobs in (1, 2):
            search = ProgramSearch(evaluate, population_size=100, n_jobs=n_jobs, random_state=seed)
            seconds = clock(lambda search=search: search.fit(n_children))  # type: ignore[misc]
            rates[n_jobs].append(search.n_evaluations_ / seconds)
    for n_jobs, found in rates.items():
        print(f"{n_children} children, n_jobs={n_jobs}: {statistics.median(found):.0f} evaluations/s")
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    report("evaluations/s, n_jobs=2 / n_jobs=1", ratio, 1.5, at_least=True)


def breeding(n: int) -> None:
    rng = np.random.default_rng(0)
    programs = [Program.parse(ADAMW)]
    breed, train = [], []
    for _ in range(n):
        start = time.perf_counter()
        child = mutate(programs[rng.integers(len(programs))], rng)  # abstract execution included
        child.hash()
        breed.append(time.perf_counter() - start)
        train.append(clock(lambda: evaluate(programs[0])))
        programs.append(child)
    print(f"a child: {1e6 * np.mean(breed):.0f} us to breed, {1e3 * np.mean(train):.1f} ms to evaluate (100 steps)")
    report("breeding a child / evaluating AdamW", float(np.mean(breed) / np.mean(train)), 0.1)


def step(n: int, repeats: int) -> None:
    """One tensor, and the same number of parameters in 100."""
    for parts in (1, 100):
        parameters = [torch.nn.Parameter(torch.randn(n // parts)) for _ in range(parts)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        ours = program_to_optimizer(Program.parse(ADAMW))(parameters)
        theirs = torch.optim.AdamW(parameters)
        ours.step(), theirs.step()
        s = race(repeats, rest=0.1, ours=ours.step, theirs=theirs.step)
        print(f"{n} parameters in {parts}: {1e3 * s['ours']:.1f} ms, torch {1e3 * s['theirs']:.1f} ms")
        report(f"step of the AdamW program / torch.optim.AdamW, {n} parameters in {parts}", s["ours"] / s["theirs"], 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    if parser.parse_args().quick:
        step(1_000_000, 5)
        breeding(30)
        processes(100, 1)
    else:
        step(10_000_000, 15)
        breeding(300)
        processes(1000, 3)
        record("programs", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
