"""Wide-deep: a prediction against the pairwise kernel matrix it needs, its memory, and its peers' times.

1. `HilbertKernelClassifier` over 60,000 training rows against the same kernel matrix written plainly and in place:
   scikit-learn's squared distances, then exp(-alpha/2 log d^2). And, without a limit, against its `rbf_kernel`.
2. `InfinitelyDeepNTKClassifier` at infinite depth against `koenigs_kernel` of the products, and at depth 5 against
   `ntk_kernel`.
3. Working memory of a prediction at 60,000 rows against that at 15,000.
4. Fit and prediction beside 1-NN, RBF-SVM and MLP, in seconds.

    python benchmarks/wide_deep.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from functools import partial

import numpy as np
from _race import FAILED, RATIOS, clock, race, report
from _record import record
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from shoestring.classify.wide_deep import (
    HilbertKernelClassifier,
    InfinitelyDeepNTKClassifier,
    explicit_coefficients,
    koenigs_kernel,
    ntk_kernel,
)


def rows(n: int, width: int, seed: int) -> np.ndarray:
    X = np.random.default_rng(seed).random((n, width))
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def hilbert(n: int, queries: int, width: int, repeats: int) -> None:
    X, Q, y = rows(n, width, 0), rows(queries, width, 1), np.random.default_rng(2).integers(0, 10, n)
    model = HilbertKernelClassifier().fit(X, y)

    def matrix() -> np.ndarray:
        K = euclidean_distances(Q, X, squared=True)
        np.log(K, out=K)
        K *= -model.alpha_ / 2
        return np.exp(K, out=K)

    s = race(repeats, predict=lambda: model.predict(Q), matrix=matrix, rbf=lambda: rbf_kernel(Q, X))
    print(
        f"Hilbert, {n} rows of width {width}, {queries} queries: " + ", ".join(f"{k} {v:.2f} s" for k, v in s.items())
    )
    report(f"Hilbert, {n} x {width}: predict / its kernel matrix, plain", s["predict"] / s["matrix"], 1.5)
    what = f"Hilbert, {n} x {width}: predict / rbf_kernel, which takes no logarithm"
    print(f"  {what:<86} {s['predict'] / s['rbf']:6.2f}")


def deep(n: int, queries: int, width: int, few: int, repeats: int) -> None:
    X, Q, y = rows(n, width, 0), rows(queries, width, 1), np.random.default_rng(2).integers(0, 10, n)
    coefs = explicit_coefficients(width - 1)
    limit = InfinitelyDeepNTKClassifier().fit(X, y)
    finite = InfinitelyDeepNTKClassifier(depth=5).fit(X[:few], y[:few])
    s = race(
        repeats,
        limit=lambda: limit.predict(Q),
        koenigs=lambda: koenigs_kernel(np.clip(Q @ X.T, -1, 1), coefs),
        finite=lambda: finite.predict(Q),
        ntk=lambda: ntk_kernel(Q, X[:few], coefs, 5),
    )
    print(f"deep, width {width}, {queries} queries: " + ", ".join(f"{k} {v:.2f} s" for k, v in s.items()))
    report(f"infinite depth, {n} x {width}: predict / koenigs_kernel", s["limit"] / s["koenigs"], 1.5)
    report(f"depth 5, {few} x {width}: predict / ntk_kernel", s["finite"] / s["ntk"], 1.5)


def memory(few: int, many: int, queries: int) -> None:
    for name, model in {"Hilbert": HilbertKernelClassifier(), "infinite depth": InfinitelyDeepNTKClassifier()}.items():
        peaks = []
        for n in (few, many):
            model.fit(rows(n, 32, 0), np.random.default_rng(2).integers(0, 10, n))
            Q = rows(queries, 32, 1)
            tracemalloc.start()
            model.predict(Q)
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
        whole = queries * many / 2**17
        print(f"{name}: {peaks[0]:.1f} MB at {few} rows, {peaks[1]:.1f} MB at {many}; a matrix: {whole:.0f} MB")
        report(f"{name}: working memory of predict at {many} rows / at {few}", peaks[1] / peaks[0], 1.1)


def peers(n: int, queries: int) -> None:
    X, Q = rows(n, 64, 0), rows(queries, 64, 1)
    y = (X[:, :8].sum(1) > X[:, 8:16].sum(1)).astype(int)
    print(f"fit and predict, {n} rows of width 64, {queries} queries")
    for name, model in {
        "Hilbert": HilbertKernelClassifier(),
        "infinite depth": InfinitelyDeepNTKClassifier(),
        "1-NN": KNeighborsClassifier(1),
        "RBF-SVM": SVC(),
        "MLP": MLPClassifier(random_state=0, max_iter=50),
    }.items():
        fit = clock(partial(model.fit, X, y))
        print(f"    {name:<16} {fit:7.2f} s  {clock(partial(model.predict, Q)):7.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    quick = parser.parse_args().quick
    n, repeats = (6_000, 3) if quick else (60_000, 5)
    with threadpool_limits(1):  # the elementwise part of every arm has one thread
        for width in (16, 64, 784):
            hilbert(n, 1000, width, repeats)
        deep(n, 400, 64, 3000, repeats)
        memory(n // 4, n, 1000)
        peers(n // 10, 1000)
    if not quick:
        record("wide_deep", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
