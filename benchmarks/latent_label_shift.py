"""Latent label shift against the parts it cannot do without, as ratios in one run.

`fit` has to cross-fit the domain classifier, fit it once more on all rows, and cluster its outputs; everything else
(counts, factorisation, diagnostics) should cost little beside that. `predict_proba` has to ask the classifier.

1. 20,000 rows of width 64, 10 domains, 5 classes, logistic regression, both factorisers.
2. The digits, an MLP, as in the claim.

    python benchmarks/latent_label_shift.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
import warnings

import numpy as np
from _race import FAILED, RATIOS, race, report
from _record import record
from sklearn.base import ClassifierMixin, clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier

from shoestring.classify.latent_label_shift import LatentLabelShift

# Set before the first run; the issue sets none for this method.
FIT_SPA, FIT_NMF, PREDICT = 1.25, 2.0, 2.0


def measure(name: str, X: np.ndarray, d: np.ndarray, classes: int, q: ClassifierMixin, repeats: int) -> None:
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    options = {"discriminator": q, "cv": folds, "random_state": 0}
    model = LatentLabelShift(classes, **options).fit(X, domains=d)

    def parts() -> None:
        proba = cross_val_predict(q, X, d, cv=folds, method="predict_proba")
        clone(q).fit(X, d)
        KMeans(6 * classes, n_init=5, max_iter=100, random_state=0).fit_predict(proba)

    print(f"{name}: {len(X)} rows x {X.shape[1]}, {len(np.unique(d))} domains, {classes} classes")
    s = race(
        repeats,
        parts=parts,
        spa=lambda: LatentLabelShift(classes, **options).fit(X, domains=d),
        nmf=lambda: LatentLabelShift(classes, factorizer="nmf", **options).fit(X, domains=d),
    )
    s |= race(
        5 * repeats,
        ask=lambda: model.discriminator_.predict_proba(X),
        predict=lambda: model.predict_proba(X, domains=d),
    )
    for what, seconds in s.items():
        print(f"    {what:<8} {1000 * seconds:9.1f} ms")
    peers = "cross_val_predict + fit + KMeans alone"
    report(f"{name}: fit, successive projection / {peers}", s["spa"] / s["parts"], FIT_SPA)
    report(f"{name}: fit, NMF from 10 starts / {peers}", s["nmf"] / s["parts"], FIT_NMF)
    report(f"{name}: predict_proba / the discriminator's predict_proba", s["predict"] / s["ask"], PREDICT)


def blobs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    d = np.arange(rows) % 10
    priors = rng.dirichlet(np.full(5, 0.2), 10)
    y = (rng.random(rows)[:, None] > priors.cumsum(1)[d]).sum(1).clip(max=4)
    return rng.standard_normal((5, 64))[y] + rng.standard_normal((rows, 64)), d


def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    domains = rng.dirichlet(np.full(10, 0.1), 5)  # p(d|y), for each pair of digits
    return X / 16, (rng.random(len(X))[:, None] > domains.cumsum(1)[y // 2]).sum(1).clip(max=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # about speed alone
    X, d = blobs(2_000 if arguments.quick else 20_000)
    measure("blobs, LogisticRegression", X, d, 5, LogisticRegression(max_iter=1000), 2 if arguments.quick else 7)
    X, d = digits()
    keep = np.bincount(d, minlength=10)[d] >= 10
    mlp = MLPClassifier((64,), early_stopping=True, random_state=0)
    measure("digits, MLP", X[keep], d[keep], 5, mlp, 2 if arguments.quick else 7)
    if not arguments.quick:
        record("latent_label_shift", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
