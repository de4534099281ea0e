"""shoestring learn: teach a classifier rows as they come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console, _rows

if TYPE_CHECKING:
    from shoestring.learn import GACIL

METHODS = ("g-acil",)


def run(
    data: _rows.Data,
    state: _rows.State,
    split: _rows.Split = "train",
    label: _rows.Label = None,
    content: _rows.Content = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Frozen encoder; default efficientnet-lite0 for images, minilm for texts.", show_default=False
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Which learner: g-acil.")] = "g-acil",
    n_components: Annotated[
        int | None, typer.Option(min=1, help="Width of the random buffer, when the state is new.", show_default="2000")
    ] = None,
    gamma: Annotated[
        str | None, typer.Option(help='Ridge: a number, or "gcv" to choose it.', show_default="100")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Rows a chunk.")] = 256,
    shuffle: Annotated[
        bool, typer.Option(help="Shuffle the rows (changes only what is reported on the way, not what is learnt).")
    ] = True,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Measure accuracy on this data set at the end; or a split of DATA."),
    ] = None,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves on the way.")] = 60.0,
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Teach a classifier the rows of DATA, on top of what it knows. New classes may come at any time; no row is kept.

    Each chunk is first asked and then learnt: the accuracy reported on the way is on rows not yet learnt, of classes
    already known. The learner is saved every minute, at the end, and on Ctrl-C; running the same data again counts
    its rows again.

    \b
    Examples:
      shoestring learn photos/ --state pets
      shoestring learn more-photos/ --state pets --test held-out/
      shoestring learn features.npz --state s --gamma 10
      shoestring learn fashion --split "train[:2000]" --test test --state garments
    """
    import time

    from shoestring._signals import uninterrupted
    from shoestring.learn._state import MODEL, note, open_state, write_state

    with _console.bad_usage():
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        ridge = _gamma(gamma)
    rows = _rows.Rows(
        data, split, content=content, label=label, backbone=backbone, shuffle=0 if shuffle else None,
        strict=strict, device=device,
    )  # fmt: skip
    test_rows = _test_rows(test, data, rows, device) if test else None
    if (state / MODEL).exists():
        model, extra = open_state(state, backbone=rows.backbone_name or "", n_components=n_components, gamma=ridge)
    else:
        model, extra = _new(n_components or 2000, ridge or 100.0, device), {"backbone": rows.backbone_name or ""}
    asked: dict[Any, int] = {}
    right: dict[Any, int] = {}
    learnt, saved = 0, time.monotonic()

    def save() -> None:
        history = {"rows": learnt, "skipped": len(rows.skipped)}
        done = {**extra, "history": [*extra.get("history", [])]}
        note(done, f"learnt {data} ({split})", **history)
        with uninterrupted():
            write_state(state, model, done)

    try:
        with _console.progress(f"learning {data}") as report:
            for part in rows.chunks(chunk, report):
                assert part.y is not None
                if learnt or hasattr(model, "classes_"):
                    _ask(model, part.X, part.y, asked, right)
                model.partial_fit(part.X, part.y)
                learnt += len(part.y)
                if time.monotonic() - saved >= save_every:
                    save()
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if learnt:
            save()
            typer.echo(f"{learnt:,} rows were learnt and are saved in {state}", err=True)
        raise
    rows.print_skipped()
    if not learnt:
        raise ValueError(f"{data}: not one row could be read")
    save()
    tested: dict[Any, list[int]] = {}
    if test_rows is not None:
        tested = _accuracy(model, test_rows)
        test_rows.print_skipped()
    _tell(model, state, rows, learnt, asked, right, tested, as_json)


def _gamma(text: str | None) -> float | str | None:
    if text is None or text == "gcv":
        return text
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"gamma must be a number > 0 or 'gcv', got {text!r}") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"gamma must be a number > 0 or 'gcv', got {text!r}")
    return value


def _new(n_components: int, gamma: Any, device: str) -> GACIL:
    from shoestring.learn import GACIL

    return GACIL(n_components=n_components, gamma=gamma, device=device)


def _test_rows(test: str, data: str, rows: _rows.Rows, device: str) -> _rows.Rows:
    """--test names a data set, or a split of DATA."""
    from shoestring.data import load

    splits: Any = load(data, split=None)
    if test in splits and not Path(test).exists():
        content, label = rows.columns.content, rows.columns.label
        return _rows.Rows(data, test, content=content, label=label, backbone=rows.backbone_name, device=device)
    return _rows.Rows(test, "all", backbone=rows.backbone_name, device=device)


def _ask(model: GACIL, X: Any, y: Any, asked: dict[Any, int], right: dict[Any, int]) -> None:
    """Count answers on rows of known classes."""
    import numpy as np

    known = np.isin(y, model.classes_)
    if known.any():
        for label, answer in zip(y[known].tolist(), model.predict(X[known]).tolist(), strict=True):
            asked[label] = asked.get(label, 0) + 1
            right[label] = right.get(label, 0) + (label == answer)


def _accuracy(model: GACIL, rows: _rows.Rows) -> dict[Any, list[int]]:
    """Label -> [asked, right], every row of the test set counted."""
    found: dict[Any, list[int]] = {}
    with _console.progress(f"testing on {rows.title}") as report:
        for part in rows.chunks(256, report):
            assert part.y is not None
            for label, answer in zip(part.y.tolist(), model.predict(part.X).tolist(), strict=True):
                counts = found.setdefault(label, [0, 0])
                counts[0] += 1
                counts[1] += label == answer
    return found


def _tell(
    model: GACIL, state: Path, rows: _rows.Rows, learnt: int,
    asked: dict[Any, int], right: dict[Any, int], tested: dict[Any, list[int]], as_json: bool,
) -> None:  # fmt: skip
    counts = dict(zip(model.classes_.tolist(), model.class_count_.tolist(), strict=True))
    classes: dict[Any, dict[str, Any]] = {}
    for label in [*counts, *(label for label in tested if label not in counts)]:
        classes[label] = {
            "rows learnt": round(counts.get(label, 0)),
            "accuracy before learnt": right[label] / asked[label] if asked.get(label) else None,
        }
        if tested:
            n, good = tested.get(label, (0, 0))
            classes[label]["test accuracy"] = good / n if n else None
    total, tests = sum(asked.values()), sum(n for n, _ in tested.values())
    summary = {
        "state": str(state),
        "backbone": rows.backbone_name,
        "rows": learnt,
        "skipped": [{"name": name, "reason": reason} for name, reason in rows.skipped],
        "seconds": round(rows.seconds, 2),
        "rows_per_second": round(learnt / max(rows.seconds, 1e-9), 1),
        "gamma": model.gamma_,
        "accuracy_before_learnt": sum(right.values()) / total if total else None,
        "test_accuracy": sum(good for _, good in tested.values()) / tests if tested else None,
        "classes": classes,
    }
    if as_json:
        _console.print_json(summary)
        return
    _rows.print_classes(classes)
    _console.say(
        f"{learnt:,} rows learnt in {rows.seconds:.1f} s ({summary['rows_per_second']:,.0f} rows/s), "
        f"{len(rows.skipped)} skipped; {len(model.classes_)} classes"
    )
    if total:
        _console.say(f"{summary['accuracy_before_learnt']:.3f} right on {total:,} rows before they were learnt")
    if tested:
        _console.say(f"{summary['test_accuracy']:.3f} right on {tests:,} test rows")
    _console.say(f"saved in {state}")
