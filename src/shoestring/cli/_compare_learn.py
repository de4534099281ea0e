"""shoestring compare learn: every learner along the same stream of classes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.cli import _console, _rows

KEEPS = {
    "g-acil": "sums of the features and of their products",
    "teen": "a sum and a count for each class",
    "fetril": "a mean for each class, and the classifier",
    "dkvb": "keys made of features, and values for each class",
    "nearest class mean": "a sum and a count for each class",
    "SGD, as it comes": "the classifier",
    "all rows, refitted": "every row",
}
REFERENCES = ("nearest class mean", "SGD, as it comes", "all rows, refitted")


def learners() -> dict[str, Callable[[], Any]]:
    """Name -> what makes an untaught learner; settings are defaults, nothing is tuned for anyone."""
    from sklearn.linear_model import LogisticRegression, SGDClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from shoestring.learn import GACIL, TEEN, DKVBClassifier, FeTrIL

    return {
        "g-acil": lambda: GACIL(n_components=2000),
        "teen": TEEN,
        "fetril": FeTrIL,
        "dkvb": lambda: DKVBClassifier(num_codebooks=64, num_pairs=256),
        "nearest class mean": lambda: TEEN(shift=0.0),
        "SGD, as it comes": lambda: _Sgd(SGDClassifier(loss="log_loss", random_state=0)),
        "all rows, refitted": lambda: _AllRows(make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))),
    }


class _Sgd:
    """Logistic regression by SGD on the rows of each task; it is told all classes beforehand."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.classes: Any = None

    def partial_fit(self, X: Any, y: Any) -> None:
        self.model.partial_fit(X, y, classes=self.classes)

    def predict(self, X: Any) -> Any:
        return self.model.predict(X)


class _AllRows:
    """Keeps every row and fits anew: what one has who may keep the data."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[tuple[Any, Any]] = []

    def partial_fit(self, X: Any, y: Any) -> None:
        import numpy as np

        self.rows.append((X, y))
        self.model.fit(*map(np.concatenate, zip(*self.rows, strict=True)))

    def predict(self, X: Any) -> Any:
        return self.model.predict(X)


def compare(
    data: str, split: str, *, label: str | None, content: str | None, backbone: str | None, tasks: int,
    held_out: float, seeds: int, plot: Path, strict: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Class-incremental streams of DATA, one for each seed: another order of classes."""
    import numpy as np

    from shoestring.data.streams import class_incremental
    from shoestring.metrics import forgetting
    from shoestring.report import curves

    if not 0 < held_out < 1:
        raise _console.UsageError(f"--held-out must be between 0 and 1, got {held_out}")
    X, y = _features(data, split, label, content, backbone, strict, device)
    n_classes = len(np.unique(y))
    if n_classes < tasks:
        raise ValueError(f"{data} has {n_classes} classes, too few for {tasks} tasks: give --tasks")
    made = learners()
    along: dict[str, list[list[float]]] = {name: [] for name in made}
    forgot: dict[str, list[float]] = {name: [] for name in made}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    kept: dict[str, int] = {}
    with _console.progress("comparing") as report:
        for seed in range(seeds):
            test = _held_out(y, held_out, seed)
            train = np.flatnonzero(~test)
            stream = [train[task] for task in class_incremental(y[train], n_tasks=tasks, random_state=seed)]
            for i, (name, make) in enumerate(made.items()):
                report((seed * len(made) + i) / (seeds * len(made)), f"{name}, order {seed + 1} of {seeds}")
                learner = make()
                if isinstance(learner, _Sgd):
                    learner.classes = np.unique(y)
                accuracies, by_class, spent = _walk(learner, stream, X, y, np.flatnonzero(test))
                along[name].append(accuracies)
                seconds[name].append(spent)
                if tasks > 1:
                    forgot[name].append(forgetting(by_class))
                kept[name] = _bytes_kept(learner)
    figures: dict[str, dict[str, Any]] = {
        name: {
            "accuracy over time": float(np.mean(along[name])),
            "accuracy at the end": float(np.mean([a[-1] for a in along[name]])),
            "spread": float(np.std([a[-1] for a in along[name]])),
            "forgetting": float(np.mean(forgot[name])) if forgot[name] else None,
            "seconds": float(np.median(seconds[name])),
            "bytes kept per class": round(kept[name] / n_classes),
            "keeps": KEEPS[name],
            "along": np.mean(along[name], axis=0).tolist(),
        }
        for name in made
    }
    figures = dict(sorted(figures.items(), key=lambda item: -item[1]["accuracy at the end"]))
    steps = list(range(1, tasks + 1))
    curves(
        {name: (steps, [100 * a for a in f["along"]]) for name, f in figures.items()},
        x_label="tasks learnt",
        y_label="accuracy on the classes so far, %",
        png=plot,
    )
    if as_json:
        _console.print_json(
            {"rows": len(y), "classes": n_classes, "tasks": tasks, "learners": figures, "plot": str(plot)}
        )
        return
    _console.say(f"{len(y):,} rows, {n_classes} classes in {tasks} tasks, {seeds} orders of classes.\n")
    _console.print_table(
        ["learner", "over time %", "at the end %", "± s.d.", "forgetting %", "seconds", "kept a class", "what is kept"],
        [
            [
                name,
                f"{100 * f['accuracy over time']:.1f}",
                f"{100 * f['accuracy at the end']:.1f}",
                f"{100 * f['spread']:.1f}",
                "-" if f["forgetting"] is None else f"{100 * f['forgetting']:.1f}",
                f"{f['seconds']:.2f}",
                f"{f['bytes kept per class'] / 1024:,.1f} kB",
                f["keeps"],
            ]
            for name, f in figures.items()
        ],
        right=range(1, 7),
    )
    _console.say("\novor is no learner of features: it tunes prompts in a vision transformer.")
    _console.say(f"The plot: {plot}")


def _features(
    data: str, split: str, label: str | None, content: str | None, backbone: str | None, strict: bool, device: str
) -> tuple[Any, Any]:
    import numpy as np

    rows = _rows.Rows(data, split, content=content, label=label, backbone=backbone, strict=strict, device=device)
    with _console.progress(f"reading {data}") as report:
        parts = [(part.X, part.y) for part in rows.chunks(256, report)]
    rows.print_skipped()
    if not parts:
        raise ValueError(f"{data}: not one row could be read")
    X, y = map(np.concatenate, zip(*parts, strict=True))
    if not np.isfinite(X).all():
        raise ValueError(f"{data}: features hold NaN or infinite values")
    return X.astype(np.float64), y


def _held_out(y: Any, share: float, seed: int) -> Any:
    """The rows that are asked: of every class its share, at least one and not all; bool (n,)."""
    import numpy as np

    test = np.zeros(len(y), dtype=bool)
    rng = np.random.default_rng(seed)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        if len(rows) < 2:
            raise ValueError(f"class {label!s} has one row: two are needed, to learn one and to ask the other")
        test[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return test


def _walk(learner: Any, stream: Any, X: Any, y: Any, test: Any) -> tuple[list[float], Any, float]:
    """Accuracy over the classes so far after every task; of each class, NaN before it came; seconds of learning."""
    import numpy as np

    classes = np.unique(y)
    by_class = np.full((len(stream), len(classes)), np.nan)
    accuracies, spent = [], 0.0
    seen = np.empty(0, dtype=y.dtype)
    for t, rows in enumerate(stream):
        start = time.perf_counter()
        learner.partial_fit(X[rows], y[rows])
        spent += time.perf_counter() - start
        seen = np.union1d(seen, y[rows])
        asked = test[np.isin(y[test], seen)]
        right = learner.predict(X[asked]) == y[asked]
        accuracies.append(float(right.mean()))
        for c in np.flatnonzero(np.isin(classes, seen)):
            by_class[t, c] = right[y[asked] == classes[c]].mean()
    return accuracies, by_class, spent


def _bytes_kept(learner: Any) -> int:
    """What must be kept to go on: the learner's file; of the references their arrays."""
    if isinstance(learner, _AllRows):
        return sum(rows.nbytes for rows, _ in learner.rows)
    if isinstance(learner, _Sgd):
        return learner.model.coef_.nbytes + learner.model.intercept_.nbytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learner.safetensors"
        learner.save(path)
        return path.stat().st_size
