"""What classify and compare share: rows of which some have a label, and what each method makes of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console, _rows

if TYPE_CHECKING:
    import numpy as np

SLUGS = ("gbnn", "wide-deep", "transductive-clustering", "loki", "latent-label-shift")
REFERENCES = ("logistic regression", "nearest neighbour")

Domains = Annotated[
    str | None,
    typer.Option("--domains", metavar="COLUMN", help="Column that says from which domain (source, site) a row comes."),
]
Classes = Annotated[
    int | None,
    typer.Option("--classes", min=2, metavar="K", help="How many classes there are, if no label says it."),
]
Distances = Annotated[
    Path | None,
    typer.Option(
        "--distances",
        metavar="FILE",
        help="Distances between labels: a .json tree ({name: {name: {}}}), or a .csv square with the labels as header.",
    ),
]
Ordered = Annotated[
    bool, typer.Option("--ordered", help="Labels are numbers, and the distance of two is their difference.")
]
Shots = Annotated[
    int | None,
    typer.Option("--shots", min=1, metavar="N", help="Show N labels a class, drawn at random; hide the others."),
]
HeldOut = Annotated[
    float, typer.Option("--held-out", metavar="SHARE", help="Share of labels to hide if every row has one.")
]
Unlabelled = Annotated[
    str | None,
    typer.Option("--unlabelled", metavar="VALUE", help='What stands for "no label" beside an empty cell: -1, say.'),
]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="COLUMN", help="A column to leave out (an identifier); repeat.")
]
Backbone = Annotated[str | None, typer.Option("--backbone", metavar="NAME", help="Frozen encoder of images or texts.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn at random.")]


@dataclass(frozen=True)
class Problem:
    """Rows to classify.

    Attributes
    ----------
    X : (n, d), float64
    y : (n,) of str or int, or of anything where `given` is False
    given : (n,) bool, rows whose label is known to us
    shown : (n,) bool, rows whose label the methods may see; the others are to be classified
    names : (n,) str
    domains : (n,) or None
    labels : all labels there are, also those no row has; with `distances` (N, N) between them, or None
    n_classes : how many classes, or None if nobody said
    """

    X: np.ndarray
    y: np.ndarray
    given: np.ndarray
    shown: np.ndarray
    names: list[str]
    domains: np.ndarray | None
    labels: np.ndarray
    distances: np.ndarray | None
    n_classes: int | None


def read(
    data: str,
    split: str,
    *,
    label: str | None,
    content: str | None,
    drop: list[str] | None,
    domains: str | None,
    unlabelled: str | None,
    distances: Path | None,
    ordered: bool,
    classes: int | None,
    backbone: str | None,
    strict: bool,
    device: str,
) -> Problem:
    """A table, features, or images or texts through a backbone, with labels where there are any."""
    import numpy as np

    from shoestring import data as rooms
    from shoestring.data.features import label_column
    from shoestring.data.tables import is_table, matrix

    if ordered and distances is not None:
        raise _console.UsageError("give --ordered or --distances, not both")
    rows: Any = rooms.load(data, split=split)
    named: dict[str, list[Any]] = {
        "--label": [label],
        "--domains": [domains],
        "--column": [content],
        "--drop": drop or [],
    }
    for option, name in ((option, name) for option, columns in named.items() for name in columns):
        if name is not None and name not in rows.features:
            raise ValueError(f"{option}: {data} has no column {name!r}; columns are {', '.join(rows.features)}")
    label = label or label_column(rows.features, content)
    left_out = {name for name in (label, domains, *(drop or ())) if name is not None}
    if content is None and is_table(rows, left_out):
        X, _ = matrix(rows, left_out)
        names, kept = [f"row {i}" for i in range(len(X))], np.arange(len(X))
    else:
        found = _rows.Rows(
            data, split, content=content, label=label, need_label=False, backbone=backbone, strict=strict,
            device=device, loaded=rows,
        )  # fmt: skip
        with _console.progress(f"reading {data}") as report:
            parts = list(found.chunks(256, report))
        found.print_skipped()
        if not parts:
            raise ValueError(f"{data}: not one row could be read")
        X = np.concatenate([part.X for part in parts]).astype(np.float64)
        names = [name for part in parts for name in part.names]
        kept = np.concatenate([part.positions for part in parts])
    if not np.isfinite(X).all():
        first = names[int(np.argmin(np.isfinite(X).all(axis=1)))]
        raise ValueError(f"{data}: features must be finite, got NaN or infinity in {first}")
    y, given = _labels(rows, label, unlabelled)
    y, given = y[kept], given[kept]
    seen = np.unique(y[given])
    labels, D = _distances(seen, distances, ordered)
    where = None if domains is None else _domains(rows, domains)[kept]
    return Problem(X, y, given, given, names, where, labels, D, classes or (len(labels) or None))


def _labels(rows: Any, label: str | None, unlabelled: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and where there is one: not empty, not missing, not the word for it."""
    import numpy as np

    if label is None:
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=bool)
    values = rows.with_format(None)[label][:]
    int2str = getattr(rows.features[label], "int2str", None)

    def missing(value: Any) -> bool:
        return value is None or value in ("", -1 if int2str else "") or value != value or str(value) == unlabelled

    given = np.array([not missing(value) for value in values])
    known = [value for value, g in zip(values, given, strict=True) if g]
    if int2str:
        known = [int2str(value) for value in known]
    if any(isinstance(value, float) and not value.is_integer() for value in known):
        raise ValueError(f"column {label!r} must hold classes, whole numbers or text, got numbers with a fraction")
    known = [int(value) if isinstance(value, float) else value for value in known]
    if len({isinstance(value, str) for value in known}) > 1:
        raise ValueError(f"column {label!r} must hold either text or numbers, got both")
    y_known = np.array(known) if known else np.empty(0, dtype=np.int64)
    y = np.zeros(len(values), dtype=y_known.dtype)
    y[given] = y_known
    return y, given


def _domains(rows: Any, column: str) -> np.ndarray:
    import numpy as np

    values = rows.with_format(None)[column][:]
    if any(value is None or value != value for value in values):
        raise ValueError(f"column {column!r} must name a domain in every row, got empty cells")
    return np.array([str(value) for value in values])


def _distances(seen: np.ndarray, file: Path | None, ordered: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """All labels, those of the file beside those seen, and their distances."""
    import numpy as np

    if ordered:
        if seen.dtype.kind not in "iu":
            raise ValueError("--ordered: labels must be whole numbers")
        line = np.arange(seen.min(), seen.max() + 1) if len(seen) and np.ptp(seen) < 10_000 else seen
        return line, np.abs(line[:, None] - line).astype(np.float64)
    if file is None:
        return seen, None
    from shoestring.classify.loki import label_distances, tree_labels

    if file.suffix == ".json":
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"{file} must hold one tree, {{name: {{name: {{}}}}}}, got {type(tree).__name__}")
        leaves, nodes = set(tree_labels(tree, leaves_only=True)), tree_labels(tree)
        names = [name for name in nodes if name in leaves or name in seen]  # an inner node only if it is a label
        D = label_distances(tree, names)
    else:
        with open(file, newline="", encoding="utf-8") as lines:
            header, *body = list(csv.reader(lines))
        names = header
        try:
            D = np.array(body, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"{file} must hold a header of labels and a square of numbers: {error}") from None
        if D.shape != (len(names), len(names)):
            raise ValueError(f"{file} must hold a square of {len(names)} x {len(names)} numbers, got {D.shape}")
    labels = np.array(names).astype(seen.dtype) if len(seen) else np.array(names)
    outside = np.setdiff1d(seen, labels)
    if len(outside):
        raise ValueError(f"{file} has no label {outside[0].item()!r}, which the data have")
    return labels, D


def hide(problem: Problem, shots: int | None, held_out: float, seed: int) -> Problem:
    """Hide labels, to be classified and scored: all but `shots` a class, or a share of each class."""
    import numpy as np

    if not 0 < held_out < 1:
        raise _console.UsageError(f"--held-out must be between 0 and 1, got {held_out}")
    rng = np.random.default_rng(seed)
    shown = np.zeros_like(problem.given)
    for c in np.unique(problem.y[problem.given]):
        rows = rng.permutation(np.flatnonzero(problem.given & (problem.y == c)))
        n = min(shots, len(rows) - 1) if shots else len(rows) - max(1, round(held_out * len(rows)))
        shown[rows[: max(n, 1)]] = True
    return replace(problem, shown=shown)


def unfit(slug: str, problem: Problem) -> str:
    """Why a method cannot be used on these rows; "" if it can."""
    import numpy as np

    shown = np.unique(problem.y[problem.shown])
    if slug == "latent-label-shift":
        if problem.domains is None:
            return "needs --domains, a column that says where a row comes from"
        if problem.n_classes is None:
            return "needs --classes, as no row has a label"
        r = len(np.unique(problem.domains))
        return f"needs as many domains as classes, got {r} for {problem.n_classes}" if r < problem.n_classes else ""
    if len(shown) < 2:
        return f"needs labels of two classes at least, got {len(shown)}"
    if slug == "loki" and problem.distances is None:
        return "needs distances between labels: --distances or --ordered"
    return ""


def answers(slug: str, problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels of the rows that are not shown, and the probability of each or None where a method gives none."""
    return _ANSWERS[slug](problem, seed)


def _by(make: Callable[[int], Any]) -> Callable[[Problem, int], tuple[np.ndarray, np.ndarray | None]]:
    """A classifier that is fitted to the rows shown and asked about the others, on standardised columns."""

    def answer(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), make(seed))
        model.fit(problem.X[problem.shown], problem.y[problem.shown])
        proba = model.predict_proba(problem.X[~problem.shown])
        return model.classes_[proba.argmax(1)], proba.max(1)

    return answer


def _gbnn(seed: int) -> Any:
    from shoestring.classify.gbnn import GBNNClassifier

    # 100 units. The published settings, which are the defaults of the class, take ten times as long on a table.
    return GBNNClassifier(20, units_per_step=5, learning_rate=0.5, solver="projected", max_iter=10, random_state=seed)


def _wide_deep(seed: int) -> Any:
    from shoestring.classify.wide_deep import HilbertKernelClassifier

    return HilbertKernelClassifier()


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)


def _neighbour(seed: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(1)


def _transductive(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    import numpy as np
    from sklearn.preprocessing import Normalizer, StandardScaler

    from shoestring.classify.transductive_clustering import ConstrainedPrototypeClustering

    X = Normalizer().fit_transform(StandardScaler().fit_transform(problem.X))  # "CL2N" of the paper
    classes, codes = np.unique(problem.y[problem.shown], return_inverse=True)
    y = np.full(len(X), -1)
    y[problem.shown] = codes
    model = ConstrainedPrototypeClustering().fit(X, y)
    hidden = ~problem.shown
    return classes[model.transduction_[hidden]], model.label_distributions_[hidden].max(1)


def _loki(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    import numpy as np
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from shoestring.classify.loki import FrechetMeanClassifier

    base = make_pipeline(StandardScaler(), _logistic(seed))
    model = FrechetMeanClassifier(base, distances=problem.distances, classes=problem.labels)
    model.fit(problem.X[problem.shown], problem.y[problem.shown])
    return np.asarray(model.predict(problem.X[~problem.shown])), None


def _latent_label_shift(problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Classes found without labels; where some labels are shown, each class found gets the name that fits best."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment
    from sklearn.preprocessing import StandardScaler

    from shoestring.classify.latent_label_shift import LatentLabelShift

    assert problem.n_classes is not None  # `unfit` says so
    X = StandardScaler().fit_transform(problem.X)
    model = LatentLabelShift(problem.n_classes, random_state=seed).fit(X, domains=problem.domains)
    proba = model.predict_proba(X, domains=problem.domains)
    found, hidden = proba.argmax(1), ~problem.shown
    if not problem.shown.any():
        return np.array([f"class {k + 1}" for k in found[hidden]]), proba[hidden].max(1)
    names, codes = np.unique(problem.y[problem.shown], return_inverse=True)
    table = np.zeros((proba.shape[1], len(names)))
    np.add.at(table, (found[problem.shown], codes), 1)
    rows, columns = linear_sum_assignment(-table)
    name_of = names[table.argmax(1)]
    name_of[rows] = names[columns]
    return name_of[found[hidden]], proba[hidden].max(1)


_ANSWERS: dict[str, Callable[[Problem, int], tuple[Any, Any]]] = {
    "gbnn": _by(_gbnn),
    "wide-deep": _by(_wide_deep),
    "transductive-clustering": _transductive,
    "loki": _loki,
    "latent-label-shift": _latent_label_shift,
    "logistic regression": _by(_logistic),
    "nearest neighbour": _by(_neighbour),
}
