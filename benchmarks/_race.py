"""What the benchmarks share: peers timed in turns in one run, and ratios held to limits set beforehand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

RATIOS: list[dict[str, object]] = []  # of this run, as `_record.record` keeps them
FAILED: list[str] = []


def clock(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def race(repeats: int, *, rest: float = 0.0, **work: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, interleaved so that they share the machine's moods.

    rest : seconds before each call, until the threads of the one before, which wait busily in their BLAS, are asleep
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            time.sleep(rest)
            seconds[name].append(clock(call))
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(what: str, ratio: float, limit: float, at_least: bool = False, width: int = 78) -> None:
    """Print a ratio beside its limit, and keep both."""
    good = ratio >= limit if at_least else ratio <= limit
    sign = ">=" if at_least else "<="
    RATIOS.append({"what": what, "ratio": round(ratio, 3), "limit": f"{sign} {limit:g}", "ok": good})
    print(f"  {what:<{width}} {ratio:7.2f}   (must be {sign} {limit:g})  {'ok' if good else 'FAILED'}")
    if not good:
        FAILED.append(what)
