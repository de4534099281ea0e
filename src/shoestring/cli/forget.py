"""shoestring forget: take rows out of a learner kept in a folder, as if it had never seen them."""

from __future__ import annotations

from typing import Annotated

import typer

from shoestring.cli import _console, _rows


def run(
    state: _rows.State,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", show_default=False, help="The rows to forget, as they were learnt."),
    ] = None,
    split: _rows.Split = "train",
    label: _rows.Label = None,
    content: _rows.Content = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="LABEL", help="Drop a class without its rows, or only its rows in DATA."),
    ] = None,
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Take the rows of DATA out of the learner: afterwards it is the one that never saw them, to rounding.

    Either all rows go or none: rows that were never learnt are refused and the state stays as it was. With --class and
    no DATA the class can be predicted no more, but its rows still tell the other classes what they are not.

    \b
    Examples:
      shoestring forget customer-17/ --state pets
      shoestring forget photos/ --class cat --state pets
      shoestring forget --class cat --state pets
    """
    import numpy as np

    from shoestring._signals import uninterrupted
    from shoestring.learn._state import note, open_state, read_notes, write_state

    if data is None and class_ is None:
        raise _console.UsageError("give DATA, --class, or both")
    model, extra = open_state(state)
    before = model.n_samples_seen_
    if data is None:
        target = _as_known(class_, model.classes_)
        model.forget_class(target)
        note(extra, f"dropped the class {target}")
        gone, skipped = 0, []
    else:
        rows = _rows.Rows(
            data,
            split,
            content=content,
            label=label,
            backbone=extra.get("backbone") or None,
            strict=strict,
            device=device,
        )
        read_notes(state, backbone=rows.backbone_name or "")
        X, y = [], []
        with _console.progress(f"reading {data}") as report:
            for part in rows.chunks(256, report):
                assert part.y is not None
                kept = slice(None) if class_ is None else part.y == _as_known(class_, model.classes_)
                X.append(part.X[kept])
                y.append(part.y[kept])
        rows.print_skipped()
        if not sum(map(len, y)):
            raise ValueError(f"{data}: there is no row to forget")
        model.forget(np.concatenate(X), np.concatenate(y))
        gone, skipped = before - model.n_samples_seen_, [name for name, _ in rows.skipped]
        note(extra, f"forgot {data} ({split})" + (f", class {class_}" if class_ else ""), rows=gone)
    with uninterrupted():
        write_state(state, model, extra)
    summary = {
        "state": str(state),
        "rows_forgotten": gone,
        "rows_left": model.n_samples_seen_,
        "classes": model.classes_.tolist(),
        "skipped": skipped,
    }
    if as_json:
        _console.print_json(summary)
    else:
        what = f"{gone:,} rows forgotten" if data else f"class {class_} dropped"
        typer.echo(f"{what}; {model.n_samples_seen_:,} rows and {len(model.classes_)} classes left in {state}")


def _as_known(label: str | None, classes: object) -> object:
    """The label as the learner has it: a number where its classes are numbers."""
    import numpy as np

    kind = np.asarray(classes).dtype.kind
    if kind == "i":
        try:
            return int(str(label))
        except ValueError:
            raise ValueError(f"--class must be one of {np.asarray(classes).tolist()}, got {label!r}") from None
    return label
