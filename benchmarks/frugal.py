"""A step of FRUGAL against torch's AdamW and GaLore, and the bytes of their state, as ratios in one run.

python benchmarks/frugal.py [--quick]
"""

from __future__ import annotations

import argparse
import sys

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from pytorch_optimizer import GaLore
from torch import Tensor, nn

from shoestring.train.frugal import FRUGAL

TIME, STATE = 1.5, 0.3  # of AdamW's default step, and of its state
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 M weights: a look, not a measurement")
    if parser.parse_args().quick:
        steps(128, 5, 3)
    else:
        steps(384, 6, 9)
        steps(640, 10, 7)
        record("frugal", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
