"""Latent label shift on digits where looks mislead, and where they do not, against k-means on pixels and on p(d|x)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier

from shoestring.claims import Progress, Result, Row, find
from shoestring.classify.latent_label_shift import IdentifiabilityWarning, LatentLabelShift, to_uniform_domains

CLAIM = (
    "Where class proportions differ strongly between domains (Dirichlet alpha .5 or 3), factorising the outputs of a "
    "domain classifier finds the classes better than clustering by looks does (SCAN), most of all where looks mislead "
    "(FieldGuide); at alpha 10 the gain vanishes or turns."
)
RULE = (
    "Read from the paper's factoriser (NMF) where looks mislead (digits glued into arbitrary pairs), means over the "
    "seeds. partly: at alpha .5 its accuracy is above, and its L1 error of p(y|d) below, those of k-means on pixels. "
    "holds: besides, both are so at alpha 3 too, and at alpha .5 and 3 also against k-means on the domain "
    "probabilities. Otherwise: not at this scale. Plain digits, where looks do not mislead, alpha 10 and successive "
    "projection are reported and do not count."
)
CLASSES, DOMAINS, TEST_SHARE = 5, 10, 0.4
ALPHAS = (0.5, 3.0, 10.0)
MAX_CONDITION = 20.0  # of the priors drawn; official: 4 to 8 on CIFAR-10, up to 210 elsewhere
REGIMES = ("looks mislead", "looks do not")
FIRST_SEED = 1000  # smaller ones were used while the method was written
METRICS = ("accuracy", "L1 error of p(y|d)")
ARMS = ("DDFA, NMF", "DDFA, successive projection", "k-means on pixels", "k-means on p(d|x)")


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 5)
    settings = [(regime, alpha) for regime in REGIMES for alpha in ALPHAS]
    if fast:
        settings = settings[:2]
    rows = []
    for i, (regime, alpha) in enumerate(settings):
        setting = f"{regime}, alpha {alpha:g}"
        figures: dict[tuple[str, str], list[float]] = {}
        for seed in range(seeds):
            progress((i * seeds + seed) / (len(settings) * seeds), f"{setting}, draw {seed + 1} of {seeds}")
            for key, figure in _figures(regime, alpha, FIRST_SEED + seed).items():
                figures.setdefault(key, []).append(figure)
        for (method, metric), values in figures.items():
            unit = "%" if metric == "accuracy" else ""
            rows.append(Row.of(method, metric, values, unit=unit, setting=setting))
    progress(1.0, "done")
    return Result(
        slug="latent-label-shift",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data="scikit-learn's digits, 8 x 8 pixels: all ten glued at random into 5 pairs, or digits 0 to 4 alone",
        note=f"{DOMAINS} domains, p(y|d) ~ Dirichlet(alpha / {CLASSES}) redrawn to a condition number below "
        f"{MAX_CONDITION:g}, rows dealt accordingly, {TEST_SHARE:.0%} for the test. One discriminator for all: an MLP "
        "of 64 with early stopping, cross-fitted in five; m = 30. Accuracy in % on test rows; DDFA knows their domain, "
        "k-means has no use for it. L1 error summed over the classes, averaged over the domains. Every arm gets the "
        "permutation of labels that is best on the test rows, as in the paper. k-means has 10 starts; its p(y|d) is "
        "the share of its clusters among a domain's training rows. The looks of the paper's baseline are SCAN's, ours "
        "are pixels. Rule and arms were fixed before this run, but after runs on other draws, on which NMF was behind "
        "k-means on p(d|x) at alpha 3. 'Warned' is the share of draws in which the estimator says that its classes may "
        f"be arbitrary. {_draws_ahead(rows)}",
    )


def verdict(rows: Sequence[Row]) -> str:
    def better(baseline: str, alpha: float) -> bool:
        setting = f"{REGIMES[0]}, alpha {alpha:g}"
        accuracy, error = (
            [find(rows, method, metric, setting).value for method in (ARMS[0], baseline)] for metric in METRICS
        )
        return accuracy[0] > accuracy[1] and error[0] < error[1]

    if not better(ARMS[2], 0.5):
        return "not at this scale"
    return "holds" if better(ARMS[2], 3) and better(ARMS[3], 0.5) and better(ARMS[3], 3) else "partly"


def _draws_ahead(rows: Sequence[Row]) -> str:
    """How often, not only on average: written after the first full run had shown how wide the draws spread."""
    setting = f"{REGIMES[0]}, alpha 3"
    ours, pixels, q = (find(rows, arm, METRICS[0], setting).seeds for arm in (ARMS[0], ARMS[2], ARMS[3]))
    ahead = [sum(a > b for a, b in zip(ours, theirs, strict=True)) for theirs in (pixels, q)]
    return (
        f"At alpha 3, where looks mislead, NMF is more accurate than k-means on pixels in {ahead[0]} of {len(ours)} "
        f"draws, than k-means on p(d|x) in {ahead[1]}."
    )


# ---- one draw


def _figures(regime: str, alpha: float, seed: int) -> dict[tuple[str, str], float]:
    rng = np.random.default_rng(seed)
    X, y, d = _domains(regime, alpha, rng)
    test = rng.random(len(y)) < TEST_SHARE
    X_train, y_train, d_train = X[~test], y[~test], d[~test]
    X_test, y_test, d_test = X[test], y[test], d[test]
    truth = _shares(y_train, d_train)

    discriminator = MLPClassifier((64,), early_stopping=True, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    figures: dict[tuple[str, str], float] = {}

    def score(arm: str, labels: np.ndarray, priors: np.ndarray) -> None:
        hits = np.zeros((CLASSES, CLASSES))
        np.add.at(hits, (y_test, labels), 1)
        truly, called = linear_sum_assignment(-hits)
        figures[arm, METRICS[0]] = 100 * float(hits[truly, called].sum()) / len(labels)
        figures[arm, METRICS[1]] = float(np.abs(priors[:, called] - truth).sum(1).mean())

    options: dict[str, Any] = {"discriminator": discriminator, "cv": folds, "random_state": seed}
    for arm, factorizer in zip(ARMS[:2], ("nmf", "spa"), strict=True):
        model = LatentLabelShift(CLASSES, factorizer=factorizer, **options)  # type: ignore[arg-type]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(X_train, domains=d_train)
        score(arm, model.predict(X_test, domains=d_test), model.class_priors_)
        warned = any(issubclass(warning.category, IdentifiabilityWarning) for warning in caught)
        figures[arm, "warned"] = float(warned)

    q = cross_val_predict(discriminator, X_train, d_train, cv=folds, method="predict_proba")  # as inside the model
    q = to_uniform_domains(q, model.domain_prior_)
    q_test = to_uniform_domains(model.discriminator_.predict_proba(X_test), model.domain_prior_)
    for arm, seen, unseen in ((ARMS[2], X_train, X_test), (ARMS[3], q, q_test)):
        kmeans = KMeans(CLASSES, n_init=10, random_state=seed).fit(seen)
        score(arm, kmeans.predict(unseen), _shares(kmeans.labels_, d_train))
    return figures


def _domains(regime: str, alpha: float, rng: np.random.Generator) -> tuple[np.ndarray, Any, np.ndarray]:
    """X, classes and domains: rows of each class dealt without replacement in proportion to p(y|d)."""
    X, digit = load_digits(return_X_y=True)
    if regime == REGIMES[0]:
        y = (rng.permutation(10) // 2)[digit]
    else:
        X, y = X[digit < CLASSES], digit[digit < CLASSES]
    while True:
        priors = rng.dirichlet(np.full(CLASSES, alpha / CLASSES), DOMAINS)  # (r, k)
        priors[priors < 1e-7] = 0
        if np.linalg.cond(priors) <= MAX_CONDITION:
            break
    d = np.full(len(y), -1)
    for label in range(CLASSES):
        rows = rng.permutation(np.flatnonzero(y == label))
        wanted = priors[:, label] * len(y) / DOMAINS
        dealt = np.floor(wanted * min(1.0, len(rows) / wanted.sum())).astype(int)
        d[rows[: dealt.sum()]] = np.repeat(np.arange(DOMAINS), dealt)
    used = d >= 0
    return X[used] / 16, y[used], d[used]


def _shares(labels: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """(r, k): share of each label in each domain."""
    counts = np.zeros((DOMAINS, CLASSES))
    np.add.at(counts, (domains, labels), 1)
    return counts / counts.sum(1, keepdims=True)
