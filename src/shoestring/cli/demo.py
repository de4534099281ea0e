"""shoestring demo: the main job on real images, start to end, with a page that shows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console

if TYPE_CHECKING:
    import numpy as np

    from shoestring.claims.learn._streams import Walk

TASKS, BATCH = 5, 16
FORGET = "Sandal"


def run(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page and the plot go.")] = Path("demo"),
    rows: Annotated[int, typer.Option(min=500, max=20_000, help="Training images.")] = 8000,
    as_json: _console.Json = False,
) -> None:
    """Teach a classifier ten kinds of garments from a stream in which classes come, go and return; then forget one.

    Real images (the fashion bundle), a real frozen encoder, no image kept. Takes about two minutes on two cores and
    writes report.html and accuracy.png.

    \b
    Examples:
      shoestring demo
      shoestring demo --rows 2000 --out /tmp/demo
    """
    import numpy as np

    from shoestring import data
    from shoestring.claims import machine
    from shoestring.claims.learn._streams import frozen_features
    from shoestring.data.streams import SiBlurry
    from shoestring.learn import GACIL

    train, test = (data.load("fashion", split=split) for split in ("train", "test"))
    names = train.features["label"].names
    pick = np.random.default_rng(0).permutation
    train, test = train.select(pick(len(train))[:rows]), test.select(pick(len(test))[: max(rows // 4, 200)])
    y, y_test = np.array(train["label"]), np.array(test["label"])
    start = time.perf_counter()
    with _console.progress("demo") as report:
        total = len(train) + len(test)

        def extracted(done: int, total: int) -> None:
            report(0.8 * done / total, f"{done:,} of {total:,} images")

        X, X_test = frozen_features(train, test, extracted)
        images_per_second = total / (time.perf_counter() - start)
        report(0.8, "the stream")
        tasks = SiBlurry(y, n_tasks=TASKS, disjoint=0.5, blurry=0.1, random_state=0).tasks
        walks, seconds = _walk_all(tasks, X, y, X_test, y_test, report)
        joint, equal_to_joint = _joint(X, y, X_test, y_test, walks["G-ACIL"])
        report(0.98, f"forgetting {FORGET}")
        forgotten = _forget(GACIL(**OPTIONS).fit(X, y), X, y, X_test, names.index(FORGET))
    summary: dict[str, Any] = {
        "images": total,
        "images_per_second": round(images_per_second, 1),
        "methods": {
            name: {**{k: round(v, 4) for k, v in walk.scores().items()}, "seconds": round(seconds[name], 2)}
            for name, walk in walks.items()
        },
        "joint_ridge_A_Last": round(joint, 4),
        "same_answers_as_joint_ridge": equal_to_joint,
        "forgotten": forgotten,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(),
    }
    out.mkdir(parents=True, exist_ok=True)
    _write_page(out, summary, walks, tasks, y, names, joint)
    if as_json:
        _console.print_json(summary)
    else:
        _print(summary, out)


OPTIONS: dict[str, Any] = {"n_components": 2000}


def _walk_all(
    tasks: list[np.ndarray], X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, report: Any
) -> tuple[dict[str, Walk], dict[str, float]]:
    from sklearn.preprocessing import StandardScaler

    from shoestring.claims.learn._streams import Estimator, Learner, NearestMean, OnlineSGD, walk
    from shoestring.learn import GACIL

    scaler = StandardScaler().fit(X)
    learners: dict[str, Learner] = {
        "G-ACIL": Estimator(GACIL(**OPTIONS)),
        "nearest class mean": NearestMean(X.shape[1], 10),
        **{f"online SGD, rate {rate}": OnlineSGD(rate, scaler, 10) for rate in (0.001, 0.01, 0.1)},
    }
    walks, seconds = {}, {}
    for i, (name, learner) in enumerate(learners.items()):
        report(0.8 + 0.03 * i, name)
        start = time.perf_counter()
        walks[name] = walk(tasks, learner, X, y, X_test, y_test, batch=BATCH, every=500)
        seconds[name] = time.perf_counter() - start
    # of the three rates, the one that ends best: SGD is given what nobody knows beforehand
    best = max((name for name in walks if "SGD" in name), key=lambda name: walks[name].at_task_end[-1])
    kept = [name for name in walks if "SGD" not in name or name == best]
    return {name: walks[name] for name in kept}, {name: seconds[name] for name in kept}


def _joint(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, ours: Walk) -> tuple[float, bool]:
    """scikit-learn's Ridge on everything at once, on the same buffer: the upper bound."""
    import numpy as np
    from sklearn.linear_model import Ridge

    from shoestring.learn import GACIL
    from shoestring.learn.g_acil import random_projection

    W_B = random_projection(X.shape[1], OPTIONS["n_components"])
    ridge = Ridge(alpha=GACIL().gamma, fit_intercept=False).fit(np.maximum(X @ W_B, 0), np.eye(10)[y])
    accuracy = float((ridge.predict(np.maximum(X_test @ W_B, 0)).argmax(1) == y_test).mean())
    return accuracy, accuracy == ours.at_task_end[-1]


def _forget(model: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, gone: int) -> dict[str, Any]:
    """Forget a class's rows, and compare with a model that was never shown them."""
    import numpy as np

    from shoestring.learn import GACIL

    never = GACIL(**OPTIONS).fit(X[y != gone], y[y != gone])
    start = time.perf_counter()
    model.forget(X[y == gone], y[y == gone])
    seconds = time.perf_counter() - start
    difference = np.linalg.norm(model.coef_ - never.coef_) / np.linalg.norm(never.coef_)
    return {
        "class": FORGET,
        "rows": int((y == gone).sum()),
        "seconds": round(seconds, 3),
        "relative_difference_of_weights": float(difference),
        "equal_answers": float((model.predict(X_test) == never.predict(X_test)).mean()),
        "still_predicted": bool((model.predict(X_test) == gone).any()),
    }


def _table(summary: dict[str, Any]) -> list[list[str]]:
    rows = [
        [name, *(f"{100 * m[k]:.1f}" for k in ("A_AUC", "A_Avg", "A_Last")), f"{m['seconds']:.1f}"]
        for name, m in summary["methods"].items()
    ]
    return [*rows, ["scikit-learn Ridge, all data at once", "", "", f"{100 * summary['joint_ridge_A_Last']:.1f}", ""]]


HEADER = ["method", "A_AUC %", "A_Avg %", "A_Last %", "seconds"]


def _print(summary: dict[str, Any], out: Path) -> None:
    gone = summary["forgotten"]
    same = "the same answers as" if summary["same_answers_as_joint_ridge"] else "not the same answers as"
    _console.say(
        f"{summary['images']:,} real images through a frozen EfficientNet-Lite0, {summary['images_per_second']:.0f} "
        f"a second.\nA stream of {TASKS} tasks in batches of {BATCH}: classes appear, vanish and return; "
        "no image is kept.\n"
    )
    _console.print_table(HEADER, _table(summary), right=range(1, 5))
    _console.say(
        f"\nAt the end G-ACIL gives {same} one fit on everything seen.\n"
        f"Forgot the {gone['rows']:,} rows of {gone['class']!r} in {gone['seconds']:.2f} s. Against a model that\n"
        f"never saw them: weights differ by {gone['relative_difference_of_weights']:.0e} (relative), "
        f"{100 * gone['equal_answers']:.2f} % of the answers are equal;\n{gone['class']!r} is "
        f"{'still' if gone['still_predicted'] else 'never'} predicted.\n"
        f"\nThe page: {out / 'report.html'}   the plot: {out / 'accuracy.png'}"
    )


def _write_page(
    out: Path, summary: dict[str, Any], walks: dict[str, Walk], tasks: list[np.ndarray], y: np.ndarray,
    names: list[str], joint: float,
) -> None:  # fmt: skip
    from shoestring.claims import versions
    from shoestring.report import Section, curves, write_page

    svg = curves(
        {name: (walk.rows, [100 * a for a in walk.along]) for name, walk in walks.items()},
        x_label="images learnt",
        y_label="accuracy on the classes seen so far, %",
        steps=walks["G-ACIL"].task_ends[:-1],
        level=("Ridge on all data at once", 100 * joint),
        png=out / "accuracy.png",
    )
    counts = [[str((y[task] == k).sum()) for task in tasks] for k in range(len(names))]
    gone = summary["forgotten"]
    host = summary["machine"]
    write_page(
        out / "report.html",
        "A classifier that learns new classes and keeps no image",
        f"{summary['images']:,} garments, ten kinds, in a stream of {TASKS} tasks. G-ACIL (arXiv 2403.15706) behind a "
        "frozen EfficientNet-Lite0, against an online learner, the nearest class mean, and a fit on all data at once.",
        [
            Section("Accuracy along the stream", ["Vertical lines: a new task begins."], svg=svg),
            Section(
                "The figures",
                ["A_AUC: mean accuracy along the stream. A_Avg: mean at the ends of tasks. A_Last: at the end. Online "
                 "SGD knows all classes beforehand and has the best of three learning rates in hindsight."],
                HEADER, _table(summary), mark="G-ACIL",
            ),
            Section(
                "What came when",
                ["Images of each class in each task: half of the classes belong to one task each, a tenth of the "
                 "images of the others come in any task (Si-Blurry, n = 50, m = 10)."],
                ["class", *(f"task {i + 1}" for i in range(TASKS))],
                [[name, *row] for name, row in zip(names, counts, strict=True)],
            ),
            Section(
                f"Forgetting {gone['class']}",
                [
                    f"Taking out the {gone['rows']:,} rows of {gone['class']!r} took {gone['seconds']:.2f} s.",
                    "The weights then differ from those of a model that never saw them by "
                    f"{gone['relative_difference_of_weights']:.1e} (relative), and "
                    f"{100 * gone['equal_answers']:.2f} % of the answers on the test images are equal.",
                ],
            ),
        ],
        footer=f"Measured in {summary['seconds']:.0f} s on {host['cores']} cores ({host['processor']}), "
        f"torch {versions().get('torch')}, scikit-learn {versions().get('scikit-learn')}.",
    )  # fmt: skip
