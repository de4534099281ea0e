"""A step of FRUGAL against torch's AdamW and GaLore, and the bytes of their state, as ratios in one run.

`state_bytes()` is held to what the process really holds: the growth of its resident memory by the first steps, in a
process of its own (Linux with glibc).

python benchmarks/frugal.py [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from pytorch_optimizer import GaLore
from torch import Tensor, nn

from shoestring.train.frugal import FRUGAL

TIME, STATE = 1.5, 0.3  # of AdamW's default step, and of its state
HELD = 0.05  # largest difference between state_bytes() and the growth of the process, as a share
LIMITED = ("blockwise", "columns")


def matrices(width: int, depth: int) -> list[Tensor]:
    """Of `depth` transformer blocks, 12 width^2 each."""
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    ps: list[Tensor] = [nn.Parameter(torch.randn(shape) * 0.02) for _ in range(depth) for shape in shapes]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


def steps(width: int, depth: int, repeats: int) -> None:
    ps = matrices(width, depth)
    full = 2 * sum(p.nbytes for p in ps)
    peers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(ps),
        "foreach": torch.optim.AdamW(ps, foreach=True),
        "fused": torch.optim.AdamW(ps, fused=True),
        "galore": GaLore(
            [{"params": ps, "rank": width // 4, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}]
        ),
    }
    ours = ("blockwise", "columns", "rows", "randk", "svd", "random")
    for kind in ours:
        peers[kind] = FRUGAL([{"params": ps, "projected": True}], projection=kind)
    first = race(1, **{name: o.step for name, o in peers.items()})  # type: ignore[arg-type]
    s = race(repeats, rest=0.05, **{name: o.step for name, o in peers.items()})  # type: ignore[arg-type]
    where = f"{sum(p.numel() for p in ps) / 1e6:.0f} M"
    for name in ("foreach", "fused", "galore", *ours):
        seconds = s[name] + (max(0.0, first[name] - s[name]) / 200 if name in ours or name == "galore" else 0.0)
        ratio = seconds / s["adamw"]
        if name in LIMITED:
            report(f"{where}: step, {name} / AdamW", ratio, TIME)
        else:
            print(f"  {where}: step, {name} / AdamW, refresh shared by 200 steps: {ratio:.2f}   (no limit)")
    for kind in ours:
        ratio = peers[kind].state_bytes() / full  # type: ignore[attr-defined]
        if kind in LIMITED:
            report(f"{where}: state, {kind} / AdamW", ratio, STATE)
        else:
            print(f"  {where}: state, {kind} / AdamW: {ratio:.3f}   (no limit)")


def resident() -> int:
    """Bytes of this process in memory, after glibc has given back what is free."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hold(kind: str) -> None:
    """Print by how many bytes two steps on 49 M weights let the process grow, and `state_bytes()`."""
    small = FRUGAL([{"params": matrices(64, 1), "projected": True}], projection=kind)
    small.step()  # threads, buffers and code that the first step of any model brings
    optimizer = FRUGAL([{"params": matrices(640, 10), "projected": True}], projection=kind)
    before = resident()
    optimizer.step()
    optimizer.step()
    print(resident() - before, optimizer.state_bytes())


def memory() -> None:
    for kind in LIMITED:
        ran = subprocess.run([sys.executable, __file__, "--hold", kind], capture_output=True, text=True, check=True)
        grown, told = map(int, ran.stdout.split())
        report(f"49 M: growth of the process / state_bytes() - 1, {kind}", abs(grown / told - 1), HELD)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 M weights: a look, not a measurement")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        hold(options.hold)
        sys.exit()
    if options.quick:
        steps(128, 5, 3)
    else:
        steps(384, 6, 9)
        steps(640, 10, 7)
        memory()
        record("frugal", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
