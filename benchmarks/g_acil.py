"""G-ACIL against its limits and its peers, as ratios in one run.

1. Absorbing 20,000 rows of width 4096, 100 classes, in chunks of 256, float64, against the bare BLAS rank-k update of
   the same rows (the limit), and against the published recursion, written plainly below.
2. The same rows from 384 features through the relu buffer, against the projection and the rank-k update alone.
3. 20,000 x 1,280 float32 features in batches of 1,000, against SGDClassifier.partial_fit and a bare X.T @ X.
4. Peak memory at 20,000 and at 80,000 rows.

    python benchmarks/g_acil.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import numpy as np
import torch
from _race import FAILED, RATIOS, clock, race, report
from _record import record
from scipy.linalg.blas import dsyrk
from sklearn.linear_model import SGDClassifier

from shoestring.learn import GACIL
from shoestring.learn.g_acil import random_projection


def published(X: np.ndarray, y: np.ndarray, classes: int, chunk: int, left_to_right: bool) -> None:
    """R -= R X' (I + X R X')^-1 X R;  W += R X' (Y - X W), as the paper and both official repositories have it.

    Python's @ works from the left, so the official line multiplies two (M, M) matrices; ``left_to_right=False``
    brackets it the cheapest way.
    """
    M = X.shape[1]
    R, W = torch.eye(M, dtype=torch.float64) / 100.0, torch.zeros(M, classes, dtype=torch.float64)
    for start in range(0, len(X), chunk):
        x = torch.from_numpy(X[start : start + chunk])
        Y = torch.nn.functional.one_hot(torch.from_numpy(y[start : start + chunk]), classes).double()
        K = torch.inverse(torch.eye(len(x), dtype=torch.float64) + x @ R @ x.T)
        R -= R @ x.T @ K @ x @ R if left_to_right else (R @ x.T @ K) @ (x @ R)
        W += R @ x.T @ (Y - x @ W) if left_to_right else R @ (x.T @ (Y - x @ W))


def absorb(X: np.ndarray, y: np.ndarray, chunk: int, **options: object) -> GACIL:
    model = GACIL(**options)
    for start in range(0, len(X), chunk):
        model.partial_fit(X[start : start + chunk], y[start : start + chunk])
    model.head_.ridge.flush()
    return model


def against_the_limit(rows: int, M: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    E, y = rng.standard_normal((rows, 384)), rng.integers(0, 100, rows)
    W_B = random_projection(384, M)
    X = np.maximum(E @ W_B, 0.0)

    def limit(chunk: int = 256) -> np.ndarray:
        G = np.zeros((M, M), order="F")
        for start in range(0, rows, chunk):
            dsyrk(1.0, X[start : start + chunk].T, beta=1.0, c=G, overwrite_c=1)
        return G

    def projected_limit() -> np.ndarray:
        G = np.zeros((M, M), order="F")
        for start in range(0, rows, 256):
            block = np.maximum(E[start : start + 256] @ W_B, 0.0)
            dsyrk(1.0, block.T, beta=1.0, c=G, overwrite_c=1)
        return G

    print(f"absorbing {rows} rows, M = {M}, 100 classes, float64")
    s = race(
        repeats,
        rest=0.1,
        dsyrk=limit,
        rows=lambda: absorb(X, y, 256, buffer=None),
        single=lambda: absorb(X[:2000], y[:2000], 8, buffer=None),
        projected_limit=projected_limit,
        features=lambda: absorb(E, y, 256, n_components=M),
    )
    for name, seconds in s.items():
        print(f"    {name:<18} {seconds:7.2f} s")
    report("rows as given, chunks of 256 / bare dsyrk", s["rows"] / s["dsyrk"], 1.3, False)
    gathered = s["single"] * rows / 2000 / s["dsyrk"]
    print(f"  {'rows as given, chunks of 8 (gathered) / bare dsyrk':<78} {gathered:7.2f}")
    whole = s["features"] / s["dsyrk"]
    print(f"  {'384 features through the buffer / bare dsyrk of the expanded rows':<78} {whole:7.2f}")
    report("384 features through the buffer / projection + dsyrk", s["features"] / s["projected_limit"], 1.3, False)
    model = absorb(X, y, 256, buffer=None)
    print(f"    the solve, apart   {clock(lambda: model.coef_):7.2f} s")
    best = clock(lambda: published(X, y, 100, 256, left_to_right=False))
    few = 256 * 8
    official = clock(lambda: published(X[:few], y[:few], 100, 256, left_to_right=True)) * rows / few
    print(f"    published recursion, as the official line is evaluated (8 chunks, scaled): {official:7.2f} s")
    print(f"    published recursion, bracketed the cheapest way (all rows):                {best:7.2f} s")
    report("published recursion / ours", official / s["rows"], 15, True)
    print(f"  {'published recursion, bracketed / ours':<78} {best / s['rows']:7.2f}")


def against_scikit_learn(rows: int, repeats: int) -> None:
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((rows, 1280)).astype(np.float32), rng.integers(0, 100, rows)

    def sgd() -> None:
        model = SGDClassifier(loss="log_loss")
        for start in range(0, rows, 1000):
            model.partial_fit(X[start : start + 1000], y[start : start + 1000], classes=np.arange(100))

    def floor(dtype: type) -> np.ndarray:
        G = np.zeros((1280, 1280), dtype)
        for start in range(0, rows, 1000):
            x = X[start : start + 1000].astype(dtype, copy=False)
            G += x.T @ x
        return G

    print(f"{rows} x 1280 float32 features in batches of 1000, 100 classes")
    s = race(
        repeats,
        rest=0.1,
        floor32=lambda: floor(np.float32),
        ours32=lambda: absorb(X, y, 1000, buffer=None, dtype="float32"),
        floor64=lambda: floor(np.float64),
        ours64=lambda: absorb(X, y, 1000, buffer=None),
    )
    s["sgd"] = clock(sgd)
    for name, seconds in s.items():
        print(f"    {name:<10} {seconds:7.2f} s  {rows / seconds:10.0f} rows/s")
    report("rows/s, dtype='float32' / bare float32 X.T @ X", s["floor32"] / s["ours32"], 0.85, True)
    report("rows/s, dtype='float64' / bare float64 X.T @ X", s["floor64"] / s["ours64"], 0.85, True)
    report("rows/s, dtype='float64' (the default) / SGDClassifier.partial_fit", s["sgd"] / s["ours64"], 2, True)
    report("rows/s, dtype='float32' / SGDClassifier.partial_fit", s["sgd"] / s["ours32"], 2, True)


def peak_memory(rows: int, M: int) -> None:
    """Run in a process of its own: learn rows made on the fly, print the peak resident size in MB."""
    rng = np.random.default_rng(2)
    model = GACIL(n_components=M)
    for _ in range(rows // 250):
        model.partial_fit(rng.standard_normal((250, 384)), rng.integers(0, 100, 250))
    model.predict(rng.standard_normal((250, 384)))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def memory(M: int, few: int, many: int) -> None:
    peaks = []
    for rows in (few, many):
        command = [sys.executable, __file__, "--peak", str(rows), str(M)]
        peaks.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"peak memory, M = {M}: {peaks[0]:.0f} MB at {few} rows, {peaks[1]:.0f} MB at {many} rows")
    report(f"peak memory at {many} rows / at {few} rows", peaks[1] / peaks[0], 1.05, False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(*arguments.peak)
        sys.exit()
    if arguments.quick:
        against_the_limit(4_000, 2048, 2)
        against_scikit_learn(4_000, 3)
        memory(1024, 2_000, 8_000)
    else:
        against_the_limit(20_000, 4096, 3)
        against_scikit_learn(20_000, 11)
        memory(4096, 20_000, 80_000)
        record("g_acil", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
