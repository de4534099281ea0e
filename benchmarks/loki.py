"""Loki against the matrix product it contains, as ratios in one run, and its peak memory.

1. Prediction over 10,000 labels, from probabilities to labels, checks of its input and squaring included, against the
   bare product ``P @ D2`` of the same arrays (the limit): NumPy and torch, float64 and float32, many and few observed
   classes, one row and many.
2. The same answers by label embeddings against the product with the distances.
3. 100,000 labels of a tree: peak memory at 100 and at 2,000 rows, beside the (K, N) distances themselves.

    python benchmarks/loki.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch
from _memory import forget_peak, in_a_process, peak_mb
from _race import FAILED, RATIOS, race, report
from _record import record
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.frozen import FrozenEstimator

from shoestring.classify.loki import (
    FrechetMeanClassifier,
    LokiHead,
    euclidean_frechet_variances,
    frechet_mean_predict,
    label_distances,
)


class Given(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose probabilities are given: rows of X."""

    def __init__(self, n_classes: int = 1) -> None:
        self.n_classes = n_classes
        self.classes_ = np.arange(n_classes)

    def fit(self, X: object, y: object) -> Given:
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return X


def against_the_product(N: int, K: int, B: int, repeats: int) -> None:
    rng = np.random.default_rng(0)
    E, P = rng.standard_normal((N, 64)), rng.dirichlet(np.ones(K), B)
    D = label_distances(E, observed=list(range(K)))  # (K, N)
    D2 = D**2
    P32, D32 = P.astype(np.float32), D.astype(np.float32)
    D2_32 = D32**2
    given = FrechetMeanClassifier(FrozenEstimator(Given(K)), distances=D, classes=range(N), observed=range(K)).fit()
    head = LokiHead(torch.as_tensor(D), from_logits=False)
    tP, tD2 = torch.as_tensor(P), torch.as_tensor(D2)
    print(f"{B} rows, {K} observed of {N} labels")
    s = race(
        repeats,
        rest=0.1,
        product=lambda: P @ D2,
        predict=lambda: frechet_mean_predict(P, D),
        classifier=lambda: given.predict(P),
        product32=lambda: P32 @ D2_32,
        predict32=lambda: frechet_mean_predict(P32, D32),
        torch_product=lambda: tP @ tD2,
        head=lambda: head.predict(tP),
    )
    for name, seconds in s.items():
        print(f"    {name:<14} {1000 * seconds:9.2f} ms")
    where = f"{B} rows, {K} of {N} labels"
    if B > 1:  # else every call would check all distances for one row: for that there are the two below
        report(f"{where}: frechet_mean_predict / NumPy product", s["predict"] / s["product"], 3)
        report(f"{where}: frechet_mean_predict, float32 / NumPy product", s["predict32"] / s["product32"], 3)
    else:
        print(
            f"  {f'{where}: frechet_mean_predict / NumPy product':<84} {s['predict'] / s['product']:7.2f}   (no limit)"
        )
    report(f"{where}: FrechetMeanClassifier.predict / NumPy product", s["classifier"] / s["product"], 3)
    report(f"{where}: LokiHead.predict / torch product", s["head"] / s["torch_product"], 3)


def embeddings(N: int, B: int, repeats: int) -> None:
    """All labels observed: without the distances (no limit set)."""
    rng = np.random.default_rng(1)
    E, P = rng.standard_normal((N, 64)), rng.dirichlet(np.ones(N), B)
    D2 = label_distances(E) ** 2
    s = race(repeats, rest=0.1, product=lambda: P @ D2, embeddings=lambda: euclidean_frechet_variances(P, E).argmin(1))
    print(f"  {f'{B} rows, {N} labels, all observed, 64-d embeddings / NumPy product':<84}", end="")
    print(f" {s['embeddings'] / s['product']:7.2f}   (no limit)")


def peak_memory(N: int, K: int, B: int) -> None:
    """Run in a process of its own: print the MB at the peak of prediction, before it, and of the distances."""
    parents = np.maximum((np.arange(N) - 1) // 10, 0)
    parents[0] = -1
    before = peak_mb()
    D = label_distances(parents, observed=list(range(N - K, N)), dtype=np.float32)
    P = np.random.default_rng(2).dirichlet(np.ones(K), B)
    making = peak_mb() - before
    forget_peak()
    before = peak_mb()
    frechet_mean_predict(P, D)
    print(json.dumps([peak_mb(), peak_mb() - before, making, D.nbytes / 2**20]))


def memory(N: int, K: int, few: int, many: int) -> None:
    peaks = []
    for B in (few, many):
        peaks.append(in_a_process(__file__, N, K, B))
    (peak_few, _, _, _), (peak_many, added, making, distances) = peaks
    print(f"{N} labels of a tree, {K} observed: the distances take {distances:.0f} MB, and making them {making:.0f} MB")
    print(f"    predicting adds {added:.0f} MB for {many} rows (their variances: {8 * N * many / 2**20:.0f} MB)")
    report(f"{N} labels, {K} observed: peak memory at {many} rows / at {few} rows", peak_many / peak_few, 1.05)
    report(f"{N} labels, {K} observed: memory of making the distances / their size", making / distances, 1.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    parser.add_argument("--peak", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(*arguments.peak)
        sys.exit()
    if arguments.quick:
        against_the_product(10_000, 100, 200, 5)
        memory(20_000, 400, 200, 500)
    else:
        for K, B in ((1000, 1000), (100, 1000), (1000, 1)):
            against_the_product(10_000, K, B, 7)
        embeddings(10_000, 200, 5)
        memory(100_000, 500, 200, 2000)
        record("loki", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
