"""shoestring forget: rows out of a learner kept in a folder, exactly; texts out of a language model, approximately."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoestring.cli import _console, _forget_models, _rows

if TYPE_CHECKING:
    import numpy as np


def run(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA|MODEL",
            show_default=False,
            help="The rows to forget, as they were learnt; or a language model: a folder, hub id, or name of the zoo.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", show_default=False, help="Folder in which the learner is kept."),
    ] = None,
    split: _rows.Split = "train",
    label: _rows.Label = None,
    content: _rows.Content = None,
    class_: Annotated[
        str | None,
        typer.Option("--class", metavar="LABEL", help="Drop a class without its rows, or only its rows in DATA."),
    ] = None,
    strict: _rows.Strict = False,
    method: _forget_models.Method = None,
    forget: _forget_models.Forget = None,
    retain: _forget_models.Retain = None,
    held_out: _forget_models.HeldOut = None,
    retrained: _forget_models.Retrained = None,
    out: _forget_models.Out = None,
    epochs: _forget_models.Epochs = None,
    lr: _forget_models.Rate = None,
    batch: _forget_models.Batch = 4,
    length: _forget_models.Length = None,
    beta: _forget_models.Beta = None,
    retain_loss: _forget_models.RetainLoss = "nll",
    alpha: _forget_models.Alpha = 5.0,
    dictionary: _forget_models.Dictionary = None,
    relearn_steps: _forget_models.RelearnSteps = 50,
    save_every: _forget_models.SaveEvery = 50,
    seed: _forget_models.Seed = 0,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Take rows out of a learner, exactly, or texts out of a language model, approximately.

    A learner (--state): afterwards it is the one that never saw the rows of DATA, to rounding. Either all rows go or
    none: rows that were never learnt are refused and the state stays as it was. With --class and no DATA the class can
    be predicted no more, but its rows still tell the other classes what they are not.

    A language model of transformers (--method): it is fine-tuned until the texts of --forget cost it more, and written
    with its figures to --out. MODEL itself is never changed. The figures say whether the texts are gone or only hidden,
    as far as that can be measured: it is no proof. The same command goes on after a crash.

    \b
    Examples:
      shoestring forget customer-17/ --state pets
      shoestring forget photos/ --class cat --state pets
      shoestring forget --class cat --state pets
      shoestring forget my-model/ --method npo --forget gone.jsonl --retain kept.jsonl --out my-model-without
    """
    if method is not None or forget is not None or out is not None:
        given = {"--state": state, "--class": class_, "--label": label, "--column": content, "--strict": strict}
        if wrong := [option for option, value in given.items() if value]:
            raise _console.UsageError(f"{wrong[0]} is for a learner, --method, --forget and --out for a language model")
        if data is None or method is None or forget is None or out is None:
            raise _console.UsageError("a language model needs MODEL, --method, --forget and --out")
        terms = _forget_models.dictionary(dictionary)
        options = _forget_models.Options(
            method, epochs, lr, batch, length, beta, retain_loss, alpha, terms, save_every, seed
        )
        _forget_models.forget(
            data, options, forget=forget, retain=retain, held_out=held_out, retrained=retrained, out=out,
            relearn_steps=relearn_steps, device=device, as_json=as_json,
        )  # fmt: skip
        return
    if state is None:
        raise _console.UsageError("give --state (a learner), or --method, --forget and --out (a language model)")
    from shoestring._signals import uninterrupted
    from shoestring.learn import _state

    if data is None and class_ is None:
        raise _console.UsageError("give DATA, --class, or both")
    if not _state.exists(state):
        _state.open_state(state)  # says so; and no lock is put there
    with _state.locked(state, lambda: typer.echo(f"{state} is in use; waiting for its turn", err=True)):
        kept = _rows.open_state(state)
        if not hasattr(kept.model, "forget" if data is not None else "forget_class"):
            raise ValueError(
                f"a learner of the method {kept.method} cannot forget: see docs/learn.md for those that can"
            )
        gone = None
        if data is not None:
            rows = _rows.Rows(
                data,
                split,
                content=content,
                label=label,
                backbone=kept.notes.get("backbone") or None,
                strict=strict,
                device=device,
            )
            kept.check(backbone=rows.backbone_name or "")
            gone = _read(rows, None if class_ is None else _as_known(class_, kept.model.classes_))
        while True:
            before = kept.model.n_samples_seen_
            if gone is None:
                target = _as_known(class_, kept.model.classes_)
                kept.model.forget_class(target)
                kept.note(f"dropped the class {target}")
            else:
                X, y, hashes = gone
                kept.model.forget(X, y)
                kept.ledger.forget(hashes)
                more = f", class {class_}" if class_ else ""
                kept.note(f"forgot {data} ({split}){more}", rows=before - kept.model.n_samples_seen_)
            if not kept.model.n_samples_seen_:
                kept.ledger.clear()
            try:
                with uninterrupted():
                    _state.commit(kept)
                break
            except _state.Conflict as conflict:
                typer.echo(f"{conflict}: going on from there", err=True)
                kept = _rows.open_state(state)
    model = kept.model
    summary = {
        "state": str(state),
        "rows_forgotten": before - model.n_samples_seen_,
        "rows_left": model.n_samples_seen_,
        "classes": model.classes_.tolist(),
        "skipped": [] if data is None else [name for name, _ in rows.skipped],
    }
    if as_json:
        _console.print_json(summary)
    else:
        what = f"{summary['rows_forgotten']:,} rows forgotten" if data else f"class {class_} dropped"
        typer.echo(f"{what}; {model.n_samples_seen_:,} rows and {len(model.classes_)} classes left in {state}")


def _read(rows: _rows.Rows, label: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and hashes of the rows, or of those of one label."""
    import numpy as np

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    raw: list[np.ndarray] = []

    def keep_hashes(hashes: np.ndarray) -> bool:
        raw.append(hashes)  # those of rows that cannot be read, too: the ledger has them as well
        return False

    with _console.progress(f"reading {rows.title}") as report:
        for part in rows.chunks(256, report, known=keep_hashes):
            assert part.y is not None
            assert part.hashes is not None
            kept = slice(None) if label is None else part.y == label
            parts.append((part.X[kept], part.y[kept], part.hashes[kept]))
    rows.print_skipped()
    if not sum(len(y) for _, y, _ in parts):
        raise ValueError(f"{rows.title}: there is no row to forget")
    X, y, hashes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return X, y, np.concatenate(raw) if label is None else hashes


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
