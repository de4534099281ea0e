"""Lion's step against torch's AdamW and two other Lions, as ratios in one run, and its state in bytes.

1. By default against AdamW by default (0.8) and the Lions of pytorch_optimizer and lion-pytorch (0.9): 10 and 50
   million parameters, as ten large and as a thousand small matrices.
2. ``fused=True`` against torch's fused AdamW (1.0; the bytes moved would allow 20 / 28 = 0.71).
3. State: half the bytes of AdamW's.

    python benchmarks/lion.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

import lion_pytorch
import pytorch_optimizer
import torch
from _race import FAILED, RATIOS, race, report
from _record import record

from shoestring.train.lion import Lion

DEFAULT, PEERS, FUSED, STATE = 0.8, 0.9, 1.0, 0.5


def matrices(count: int, side: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(side, side, generator=generator)) for _ in range(count)]
    for p in found:
        p.grad = torch.randn(side, side, generator=generator)
    return found


def steps(count: int, side: int, repeats: int) -> None:
    params = matrices(count, side)
    decay = {"lr": 1e-5, "weight_decay": 0.1}
    s = race(
        repeats,
        rest=0.005,
        adamw=torch.optim.AdamW(params, **decay).step,
        adamw_fused=torch.optim.AdamW(params, **decay, fused=True).step,
        pytorch_optimizer=pytorch_optimizer.Lion(params, **decay).step,
        lion_pytorch=lion_pytorch.Lion(params, **decay).step,
        lion=Lion(params, **decay).step,
        lion_fused=Lion(params, **decay, fused=True).step,
    )
    where = f"{count} of {side} x {side}"
    print(where)
    for name, seconds in s.items():
        print(f"    {name:<18} {1000 * seconds:9.2f} ms")
    report(f"{where}: Lion / AdamW", s["lion"] / s["adamw"], DEFAULT)
    for peer in ("pytorch_optimizer", "lion_pytorch"):
        report(f"{where}: Lion / Lion of {peer}", s["lion"] / s[peer], PEERS)
    report(f"{where}: Lion, fused / AdamW, fused", s["lion_fused"] / s["adamw_fused"], FUSED)


def state() -> None:
    def size(optimizer: torch.optim.Optimizer) -> int:
        optimizer.step()
        held: Iterable[torch.Tensor] = (t for values in optimizer.state.values() for t in values.values())
        return sum(t.numel() * t.element_size() for t in held)

    params = matrices(10, 300)
    report("state: Lion / AdamW, bytes", size(Lion(params)) / size(torch.optim.AdamW(params)), STATE)


def compile_time() -> None:
    (p,) = matrices(1, 300)
    start = time.perf_counter()
    Lion([p], fused=True).step()
    print(
        f"first step of fused=True, compiling or from Inductor's cache: {time.perf_counter() - start:.1f} s (no limit)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tenth of the parameters: a look, not a measurement")
    quick = parser.parse_args().quick
    compile_time()
    state()
    if quick:
        steps(10, 316, 15)
        steps(100, 100, 15)
    else:
        for count, side, repeats in ((10, 1000, 31), (1000, 100, 31), (10, 2236, 9), (1000, 224, 9)):
            steps(count, side, repeats)
        record("lion", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
