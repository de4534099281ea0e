"""Data, learners that go along a stream of batches, and the walk that measures them: for the claims of this room."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from shoestring import backbones, data
from shoestring.claims import Progress
from shoestring.metrics import a_auc, a_avg, a_last, accuracy_on_seen


class Learner(Protocol):
    """Takes batches of features (N, e) with class ids (N,); predicts among the classes it has seen."""

    def learn(self, X: np.ndarray, y: np.ndarray, task: int) -> None: ...

    def predict(self, X: np.ndarray) -> np.ndarray: ...


class Estimator:
    """A scikit-learn classifier whose ``partial_fit`` takes new classes."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def learn(self, X: np.ndarray, y: np.ndarray, task: int) -> None:
        self.model.partial_fit(X, y)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.model.predict(X)


class NearestMean:
    """Nearest class mean, running."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        self.sums, self.counts = np.zeros((n_classes, n_features)), np.zeros(n_classes)

    def learn(self, X: np.ndarray, y: np.ndarray, task: int) -> None:
        np.add.at(self.sums, y, X)
        np.add.at(self.counts, y, 1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        seen = np.flatnonzero(self.counts)
        means = self.sums[seen] / self.counts[seen, None]
        return seen[(X @ means.T - 0.5 * np.square(means).sum(1)).argmax(1)]


class OnlineSGD:
    """Logistic regression, one gradient step a row, in the order in which they come.

    It is given what no stream gives: all classes, and the mean and spread of the whole stream to standardise with.
    Rows wait until somebody asks, and then go through one call: the same steps, without scikit-learn's cost a call.
    """

    def __init__(self, rate: float, scaler: StandardScaler, n_classes: int) -> None:
        self.model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=rate, shuffle=False)
        self.scaler, self.classes = scaler, np.arange(n_classes)
        self.seen: set[int] = set()
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def learn(self, X: np.ndarray, y: np.ndarray, task: int) -> None:
        self.seen |= set(y.tolist())
        self.waiting.append((X, y))

    def predict(self, X: np.ndarray) -> np.ndarray:
        if self.waiting:
            rows, labels = map(np.concatenate, zip(*self.waiting, strict=True))
            self.model.partial_fit(self.scaler.transform(rows), labels, classes=self.classes)
            self.waiting = []
        return argmax_seen(self.model.decision_function(self.scaler.transform(X)), self.seen)


@dataclass
class Walk:
    """What a learner did along a stream: accuracies, 0 to 1, on the test rows of the classes seen so far."""

    rows: list[int] = field(default_factory=list)  # learnt when `along` was measured
    along: list[float] = field(default_factory=list)
    task_ends: list[int] = field(default_factory=list)
    at_task_end: list[float] = field(default_factory=list)

    def scores(self) -> dict[str, float]:
        return {"A_AUC": a_auc(self.along), "A_Avg": a_avg(self.at_task_end), "A_Last": a_last(self.at_task_end)}


def walk(
    tasks: Sequence[np.ndarray], learner: Learner, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray,
    *, batch: int = 16, every: int = 1000,
) -> Walk:  # fmt: skip
    """One pass over the tasks (arrays of row numbers) in batches; accuracy every 1000 rows and at each task's end.

    Measured at the first batch end beyond each multiple of `every`, as the Si-Blurry code does.
    """
    done, learnt = Walk(), 0
    seen: set[int] = set()

    def accuracy() -> float:
        rows = np.isin(y_test, list(seen))
        return accuracy_on_seen(y_test[rows], learner.predict(X_test[rows]), list(seen))

    for number, task in enumerate(tasks):
        for start in range(0, len(task), batch):
            rows = task[start : start + batch]
            learner.learn(X[rows], y[rows], number)
            seen |= set(y[rows].tolist())
            learnt += len(rows)
            if learnt // every > (learnt - len(rows)) // every:
                done.rows.append(learnt)
                done.along.append(accuracy())
        if learnt:
            done.task_ends.append(learnt)
            done.at_task_end.append(accuracy())
    return done


def frozen_features(train: Any, test: Any, report: Callable[[int, int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, d), float64, of two data sets of images by the default backbone; ``report(done, total)`` images."""
    backbone = backbones.load(backbones.DEFAULT)
    total = len(train) + len(test)

    def extract(rows: Any, before: int) -> np.ndarray:
        features = backbone.extract(rows["image"], progress=lambda done: report(before + done, total))
        return features.astype(np.float64)

    return extract(train, 0), extract(test, len(train))


def argmax_seen(scores: np.ndarray, seen: set[int]) -> np.ndarray:
    """The best-scored (N,) of the classes seen; scores (N, c)."""
    ids = np.array(sorted(seen))
    return ids[scores[:, ids].argmax(1)]


class Pool(NamedTuple):
    """Rows to learn from and rows to be asked: features (n, d), float64, and class ids (n,)."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


def digits_behind_an_mlp(base: np.ndarray, seed: int) -> Pool:
    """Hidden layer of an MLP of 64 units trained on the `base` digits, as features of all ten; 40 % are asked."""
    X, y = load_digits(return_X_y=True)
    X = X / 16.0
    test = np.random.default_rng([seed, 1]).random(len(y)) < 0.4
    known = np.isin(y, base) & ~test
    mlp = MLPClassifier((64,), max_iter=60, random_state=seed, tol=0, n_iter_no_change=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 60 epochs are the budget
        mlp.fit(X[known], y[known])
    H = np.maximum(X @ mlp.coefs_[0] + mlp.intercepts_[0], 0)
    return Pool(H[~test], y[~test], H[test], y[test])


def garments(progress: Progress) -> Pool:
    """2,000 and 1,000 images of the fashion bundle behind the default backbone."""
    train, test = (data.load("fashion", split=split) for split in ("train[:2000]", "test[:1000]"))

    def report(done: int, total: int) -> None:
        progress(done / total, f"features of {total:,} garments")

    X, X_test = frozen_features(train, test, report)
    return Pool(X, np.array(train["label"][:]), X_test, np.array(test["label"][:]))


def emoji(progress: Progress) -> Pool:
    """The subcategories of at least 12 Google emoji behind the default backbone, half of each to learn from."""
    rows = data.load("emoji", split="google")
    y = np.array(rows["subcategory"][:])
    many = np.flatnonzero(np.bincount(y)[y] >= 12)
    rows, y = rows.select(many), np.unique(y[many], return_inverse=True)[1]
    rng = np.random.default_rng(0)
    rank = np.empty(len(y), dtype=np.int64)  # of a row within its class
    for k in np.unique(y):
        rows_of = np.flatnonzero(y == k)
        rank[rows_of] = rng.permutation(len(rows_of))
    learn, ask = np.flatnonzero(rank % 2 == 0), np.flatnonzero(rank % 2)

    def report(done: int, total: int) -> None:
        progress(done / total, f"features of {total:,} emoji")

    X, X_test = frozen_features(rows.select(learn), rows.select(ask), report)
    return Pool(X, y[learn], X_test, y[ask])
