"""Seconds until `import shoestring` has ended and until `shoestring list` has answered, beside a bare Python.

Each is a process of its own, started in turns, its output thrown away. The limits hold for the fastest run: what the
machine does besides can only make a run slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from _record import record

PYTHON = sys.executable
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as users have it
COMMANDS = {
    "python -c pass": ([PYTHON, "-c", "pass"], None),
    "import shoestring": ([PYTHON, "-c", "import shoestring"], 0.2),
    "shoestring list": ([PYTHON, "-m", "shoestring", "list"], 0.3),
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    runs: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command, _ in COMMANDS.values():  # the first run writes the byte code
        seconds(command)
    for _ in range(repeats):
        for name, (command, _) in COMMANDS.items():
            runs[name].append(seconds(command))
    bare = min(runs["python -c pass"])
    print(f"{'':20} {'min ms':>8} {'median ms':>10} {'limit ms':>9} {'min / bare python':>18}")
    late = []
    for name, (_, limit) in COMMANDS.items():
        best = min(runs[name])
        allowed = f"{1000 * limit:.0f}" if limit else "-"
        middle = 1000 * statistics.median(runs[name])
        print(f"{name:20} {1000 * best:8.0f} {middle:10.0f} {allowed:>9} {best / bare:18.1f}")
        if limit and best > limit:
            late.append(name)
    record("startup", {name: round(min(times), 4) for name, times in runs.items()})
    if late:
        raise SystemExit(f"above the limit: {', '.join(late)}")


if __name__ == "__main__":
    main()
