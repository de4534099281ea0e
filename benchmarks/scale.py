"""A job on Ray against the same job in one process, on this machine; and what a cluster would take.

1. Learning real garments through the frozen encoder: rows/s of Ray, two workers of one thread, against one process
   with all of torch's threads. Ray is started, and its workers have imported and opened everything, before the clock.
2. The costs a cluster adds: starting, and a merge of two learners of width M; from them the time for 10^9 rows on 100
   workers, which is a calculation and no measurement.

    python benchmarks/scale.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import ray
from _race import FAILED, RATIOS, clock, report
from _record import record

from shoestring import scale
from shoestring.learn import GACIL

M = 2000
WORKERS, ROWS = 100, 10**9


def main(quick: bool) -> None:
    rows = 400 if quick else 3000
    source = scale.Source("fashion", f"train[:{rows}]", backbone="efficientnet-lite0")
    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    scale.learn(scale.Source("fashion", "train[:64]", backbone="efficientnet-lite0"), GACIL(n_components=M))
    begun = time.perf_counter() - start

    def alone() -> None:
        model = GACIL(n_components=M)
        for chunk in source.chunks(range(rows)):
            model.partial_fit(chunk.X, chunk.y)

    alone_s, ray_s = [], []
    few = scale.Source("fashion", "train[:64]", backbone="efficientnet-lite0")
    for _ in range(1 if quick else 3):
        alone_s.append(clock(alone))
        whole = clock(lambda: scale.learn(source, GACIL(n_components=M)))
        start_up = clock(lambda: scale.learn(few, GACIL(n_components=M)))  # actors, imports, the encoder
        ray_s.append((whole, start_up))
    whole, start_up = map(float, np.median(ray_s, axis=0))
    one = float(np.median(alone_s))
    print(f"{rows} garments: one process {one:.1f} s, Ray {whole:.1f} s of which actors start {start_up:.1f} s")
    report("rows/s of one process / of Ray, start of the actors aside", (whole - start_up) / one, 1 / 0.85)
    part = scale._dump(GACIL(n_components=M).fit(np.random.default_rng(0).normal(size=(100, 64)), np.arange(100) % 10))
    merge = min(clock(lambda: scale.tree_merge([part, part], GACIL)) for _ in range(3)) + min(
        clock(lambda: scale._dump(GACIL(n_components=M).fit(np.eye(10), np.arange(10)))) for _ in range(3)
    )
    row = (whole - start_up) * 2 / rows  # seconds of one worker
    slices = ROWS / 8192
    seconds = ROWS * row / WORKERS + slices * merge / WORKERS + np.log(slices) / np.log(scale.FAN_IN) * merge
    print(f"a row {1000 * row:.2f} ms of one worker; a merge {merge:.3f} s, {len(part) / 2**20:.0f} MB")
    if not quick:
        record(
            "scale",
            {
                "ratios": RATIOS,
                "rows": rows,
                "one process s": round(one, 2),
                "ray s": round(float(whole), 2),
                "actors start s": round(float(start_up), 2),
                "ray and its first actors start s": round(begun, 1),
                "ms a row of one worker": round(1000 * row, 3),
                "s a merge": round(merge, 3),
                "MB a learner": round(len(part) / 2**20, 1),
                "model": {"workers": WORKERS, "rows": ROWS, "hours": round(float(seconds) / 3600, 2)},
            },
        )
    ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    main(parser.parse_args().quick)
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
