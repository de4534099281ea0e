"""GBNN's time to fit digits, as a ratio to scikit-learn's network of as many units trained by L-BFGS, in one run.

The same 1,257 standardised rows, 100 logistic units, one thread. The limit is on every arm: the published settings,
one unit a step with 200 iterations each, and those of the projected solver. Beside the time, accuracy on the other 540
rows.

    python benchmarks/gbnn.py
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from typing import Any

from _record import record
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from shoestring.classify.gbnn import GBNNClassifier

LIMIT, REPEATS = 2.0, 5
PEER = MLPClassifier((100,), activation="logistic", solver="lbfgs", random_state=0)
QUICK: dict[str, Any] = {"solver": "projected", "max_iter": 10, "learning_rate": 0.5, "random_state": 0}
ARMS = {
    "as published: 100 steps of 1 unit, 200 iterations": GBNNClassifier(100, random_state=0),
    "projected, 100 steps of 1 unit, 10 iterations": GBNNClassifier(100, **QUICK),
    "projected, 50 steps of 2 units, 10 iterations": GBNNClassifier(50, units_per_step=2, **QUICK),
    "projected, 20 steps of 5 units, 10 iterations": GBNNClassifier(20, units_per_step=5, **QUICK),
    "projected, 10 steps of 10 units, 10 iterations": GBNNClassifier(10, units_per_step=10, **QUICK),
}


def main() -> None:
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=540, random_state=0, stratify=y)
    scaler = StandardScaler().fit(X_train)
    X_train, X_test = scaler.transform(X_train), scaler.transform(X_test)
    seconds: dict[str, list[float]] = {name: [] for name in ("peer", *ARMS)}
    accuracy = {}
    warnings.simplefilter("ignore", ConvergenceWarning)
    with threadpool_limits(1):
        for _ in range(REPEATS):
            for name, model in {"peer": PEER, **ARMS}.items():
                fitted = clone(model)
                start = time.perf_counter()
                fitted.fit(X_train, y_train)
                seconds[name].append(time.perf_counter() - start)
                accuracy[name] = fitted.score(X_test, y_test)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"MLPClassifier(solver='lbfgs'): {median['peer']:.3f} s, accuracy {accuracy['peer']:.3f}")
    ratios, missed = [], []
    for name in ARMS:
        ratio = median[name] / median["peer"]
        what = f"fit digits, {name} / MLPClassifier(lbfgs)"
        ratios.append({"what": what, "ratio": round(ratio, 3), "limit": f"<= {LIMIT:g}", "ok": ratio <= LIMIT})
        print(f"  {name:<52} {ratio:7.2f}   (must be <= {LIMIT:g})  {'ok' if ratio <= LIMIT else 'FAILED'}"
              f"   accuracy {accuracy[name]:.3f}")  # fmt: skip
        missed += [name] if ratio > LIMIT else []
    record("gbnn", {"ratios": ratios, "accuracy": {name: round(value, 4) for name, value in accuracy.items()}})
    sys.exit(f"over the limit: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
