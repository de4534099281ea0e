"""How many of scikit-learn's own conformance checks our estimators pass.

python benchmarks/conformance.py
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import sklearn
from _record import record
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import check_estimator

from shoestring.classify import (
    ConstrainedPrototypeClustering,
    FrechetMeanClassifier,
    GBNNClassifier,
    GBNNRegressor,
    HilbertKernelClassifier,
    InfinitelyDeepNTKClassifier,
    LatentLabelShift,
)
from shoestring.learn import GACIL, TEEN, DKVBClassifier, FeTrIL

# Sizes are such that the checks take seconds; they change no check.
ESTIMATORS: list[BaseEstimator] = [
    GACIL(n_components=64),
    TEEN(),
    FeTrIL(),
    DKVBClassifier(num_codebooks=16, num_pairs=32, key_dim=8, key_epochs=3),
    FrechetMeanClassifier(),
    ConstrainedPrototypeClustering(),
    LatentLabelShift(2, random_state=0),
    HilbertKernelClassifier(),
    InfinitelyDeepNTKClassifier(),
    GBNNClassifier(30, learning_rate=0.5, max_iter=30, random_state=0),
    GBNNRegressor(30, learning_rate=0.5, max_iter=30, random_state=0),
]


def count(estimator: BaseEstimator) -> Counter[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(estimator, on_fail=None, on_skip=None)
    return Counter(result["status"] for result in results)


if __name__ == "__main__":
    found = {}
    for estimator in ESTIMATORS:
        counts = count(estimator)
        name = type(estimator).__name__
        found[name] = dict(counts)
        failed = counts["failed"] + counts["xfail"]
        print(f"{name}: {counts['passed']} passed, {failed} failed, {counts['skipped']} skipped")
    record("conformance", {"scikit-learn": sklearn.__version__, "estimators": found})
    sys.exit(any(counts.get("failed") or counts.get("xfail") for counts in found.values()))
