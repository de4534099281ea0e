"""shoestring learn: teach a classifier rows as they come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console, _rows

if TYPE_CHECKING:
    import numpy as np

    from shoestring.learn import GACIL
    from shoestring.learn._ledger import Job
    from shoestring.learn._state import State
    from shoestring.scale import Source

METHODS = ("g-acil", "fetril", "teen", "dkvb")
WHOLE = ("fetril", "dkvb")  # they want to see all rows of their classes at once: DATA is one chunk


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
    method: Annotated[
        str | None,
        typer.Option(help=f"Which learner, when the state is new: {', '.join(METHODS)}.", show_default="g-acil"),
    ] = None,
    n_components: Annotated[
        int | None,
        typer.Option(min=1, help="g-acil: width of the random buffer, when the state is new.", show_default="2000"),
    ] = None,
    gamma: Annotated[
        str | None, typer.Option(help='g-acil: ridge, a number, or "gcv" to choose it.', show_default="100")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Rows a chunk.", show_default="256; fetril and dkvb: all of DATA")
    ] = None,
    shuffle: Annotated[
        bool | None,
        typer.Option(
            "--shuffle/--no-shuffle",
            help="Shuffle the rows (with g-acil it changes what is reported on the way, not what is learnt).",
            show_default="shuffle",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Teach rows that were learnt before once more.")] = False,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Measure accuracy on this data set at the end; or a split of DATA."),
    ] = None,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves on the way.")] = 60.0,
    on: _rows.On = None,
    address: _rows.Address = None,
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Teach a classifier the rows of DATA, on top of what it knows. New classes may come at any time; no row is kept.

    Each chunk is first asked and then learnt: the accuracy reported on the way is on rows not yet learnt, of classes
    already known (of more classes than a chunk has rows, not every chunk is asked). The learner is saved every minute,
    at the end, and on Ctrl-C. Whenever it was cut off, by a crash too, the same command goes on behind what was saved.
    Rows that were learnt before are told by what they hold, and refused.

    --method is chosen when the state is new: g-acil (exact, forgets), fetril (a mean a class), teen (few shots beside
    large classes; the classes of the first DATA are its base), dkvb (edits only what is hit).

    \b
    Examples:
      shoestring learn photos/ --state pets
      shoestring learn photos/ --state small --method fetril
      shoestring learn more-photos/ --state pets --test held-out/
      shoestring learn features.npz --state s --gamma 10
      shoestring learn photos/ --state pets --on ray
      shoestring learn fashion --split "train[:2000]" --test test --state garments
    """
    from shoestring.learn import _state
    from shoestring.scale import Source

    _rows.check_on(on, address)
    with _console.bad_usage():
        if method not in (None, *METHODS):
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        ridge = _gamma(gamma)
        if method not in (None, "g-acil") and not (n_components is None and gamma is None):
            raise ValueError(f"--n-components and --gamma are for g-acil, not for {method}")
    rows = _rows.Rows(data, split, content=content, label=label, backbone=backbone, strict=strict, device=device)
    test_rows = _test_rows(test, data, rows, device) if test else None
    same = {"method": method, "backbone": rows.backbone_name or "", "n_components": n_components, "gamma": ridge}
    tally = Tally()

    def taught(report: Any) -> State:
        """The state after all rows were learnt; anew if another process has taught it on the way."""
        while True:
            if _state.exists(state):
                opened = _rows.open_state(state)
                opened.check(**same)
            else:
                model = _new(method or METHODS[0], n_components or 2000, ridge or 100.0, device, rows)
                opened = _state.State(state, method or METHODS[0], model, {"backbone": rows.backbone_name or ""})
            job = opened.ledger.plan(
                os.path.abspath(data) if os.path.exists(data) else data,
                split,
                len(rows.rows),
                lambda: rows.hashes(report),
                chunk=chunk or (len(rows.rows) if opened.method in WHOLE else None),
                shuffle=None if shuffle is False else 0,
                same_order=shuffle is None,
                again=again,
            )
            try:
                if on == "ray":
                    source = Source(data, split, content, label, rows.backbone_name, device)
                    _teach_on_ray(opened, job, rows, tally, source, address, report)
                else:
                    _teach(opened, job, rows, tally, save_every, report)
            except _state.Conflict as conflict:
                typer.echo(f"{conflict}: going on from there", err=True)
                tally.back_to_saved()
                continue
            if job.first + job.rows == len(rows.rows):
                return opened

    _state.exists(state)  # so that no lock is put into a folder of something else
    with (
        _state.locked(state, lambda: typer.echo(f"{state} is in use; waiting for its turn", err=True)),
        _console.progress(f"learning {data}") as report,
    ):
        kept = taught(report)
    rows.print_skipped()
    tested: dict[Any, list[int]] = {}
    if test_rows is not None:
        tested = _accuracy(kept.model, test_rows)
        test_rows.print_skipped()
    _tell(kept, rows, tally, tested, as_json)


class Tally:
    """What became of the rows of one command, and how far that is saved."""

    def __init__(self) -> None:
        self.learnt, self.before = 0, 0  # rows learnt now, and by the same command before it was cut off
        self.retrying = False  # what is known now was learnt now, or has been counted as learnt before
        self.asked: dict[Any, int] = {}
        self.right: dict[Any, int] = {}
        self.saved()

    def saved(self) -> None:
        self._saved = self.learnt, dict(self.asked), dict(self.right)

    def back_to_saved(self) -> None:
        self.learnt, self.asked, self.right = self._saved
        self.saved()
        self.retrying = True


def _teach(state: State, job: Job, rows: _rows.Rows, tally: Tally, save_every: float, report: Any) -> None:
    """Learn the chunks of a job that are not in the ledger, and save on the way and at the end."""
    import time
    from collections import Counter

    from shoestring._signals import uninterrupted
    from shoestring.learn._ledger import add_totals, chunk_hash, total_of
    from shoestring.learn._state import Conflict, commit

    model, history = state.model, [*state.notes.get("history", [])]
    done, met = Counter(job.chunks), Counter[bytes]()
    this, total, learnt, skipped = b"", "0", 0, len(rows.skipped)
    unsaved, unasked, saved = 0, float("inf"), time.monotonic()
    if job.first:
        typer.echo(f"the first {job.first:,} rows were learnt before; going on behind them", err=True)

    def known(hashes: np.ndarray) -> bool:
        nonlocal this, total
        this, total = chunk_hash(hashes), add_totals(total, total_of(hashes))
        if met[this] >= done[this]:  # equal chunks count as often as they come
            return False
        met[this] += 1
        tally.before += 0 if tally.retrying else len(hashes)
        return True

    def save() -> None:
        nonlocal unsaved, saved
        state.notes["history"] = [*history]
        state.note(f"learnt {job.data} ({job.split})", rows=learnt, skipped=len(rows.skipped) - skipped)
        with uninterrupted():
            path = commit(state)
            tally.saved()
            unsaved = 0
        saved = time.monotonic()
        typer.echo(f"saved {learnt:,} rows: {path}", err=True)

    try:
        for part in rows.chunks(job.chunk, report, first=job.first, count=job.rows, shuffle=job.shuffle, known=known):
            assert part.y is not None
            if hasattr(model, "classes_") and unasked >= len(model.classes_):
                _ask(model, part.X, part.y, tally.asked, tally.right)
                unasked = 0
            with uninterrupted():
                model.partial_fit(part.X, part.y)
                state.ledger.add(job, this)
                met[this] += 1
                learnt, unsaved, unasked = learnt + len(part.y), unsaved + len(part.y), unasked + len(part.y)
                tally.learnt += len(part.y)
            if time.monotonic() - saved >= save_every:
                save()
    except KeyboardInterrupt:
        try:
            if unsaved:
                save()
            if tally.learnt:
                typer.echo(f"{tally.learnt:,} rows were learnt and are saved in {state.folder}", err=True)
        except Conflict as conflict:
            typer.echo(f"{conflict}: {unsaved:,} rows of this one are not saved", err=True)
        raise
    if not learnt and not met:
        raise ValueError(f"{job.data}: not one row could be read")
    changed = state.ledger.end(job, met, total)
    if changed:
        typer.echo(
            f"warning: {changed:,} chunks learnt before are not in {job.data} any more: its rows have changed",
            err=True,
        )
    with uninterrupted():
        _settle(model)
        save()
    tally.retrying = False


def _teach_on_ray(
    state: State, job: Job, rows: _rows.Rows, tally: Tally, source: Source, address: str | None, report: Any
) -> None:
    """Learn the chunks of a job that are not in the ledger on all workers, and save once, at the end."""
    import time
    from collections import Counter

    import numpy as np

    from shoestring import scale
    from shoestring._signals import uninterrupted
    from shoestring.learn._ledger import add_totals, chunk_hash, shuffled, total_of
    from shoestring.learn._state import commit

    start = time.perf_counter()
    hashes = rows.hashes(report)
    order = np.arange(job.rows) if job.shuffle is None else shuffled(job.rows, job.shuffle)
    done, met, new = Counter(job.chunks), Counter[bytes](), []
    positions, total = [np.empty(0, np.int64)], "0"
    for i in range(0, job.rows, job.chunk):
        part = job.first + order[i : i + job.chunk]
        this, total = chunk_hash(hashes[part]), add_totals(total, total_of(hashes[part]))
        if met[this] < done[this]:
            tally.before += 0 if tally.retrying else len(part)
        else:
            new.append(this)
            positions.append(part)
        met[this] += 1
    wanted = np.concatenate(positions)
    if len(wanted):
        state.model, skipped = scale.learn(source, state.model, positions=wanted, address=address, progress=report)
        rows.skipped += skipped
        tally.learnt += len(wanted) - len(skipped)
        for this in new:
            state.ledger.add(job, this)
    rows.seconds = time.perf_counter() - start
    state.ledger.end(job, met, total)
    state.note(f"learnt {job.data} ({job.split}) on Ray", rows=len(wanted), skipped=len(rows.skipped))
    with uninterrupted():
        _settle(state.model)
        path = commit(state)
        tally.saved()
    tally.retrying = False
    typer.echo(f"saved {len(wanted):,} rows: {path}", err=True)


def _settle(model: Any) -> None:
    """What every prediction would have to compute first, computed once."""
    if hasattr(model, "settle"):
        model.settle()


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


def _new(method: str, n_components: int, gamma: Any, device: str, rows: _rows.Rows) -> Any:
    """A learner that was taught nothing, with default settings."""
    from shoestring.learn import GACIL, TEEN, DKVBClassifier, FeTrIL

    if method == "g-acil":
        return GACIL(n_components=n_components, gamma=gamma, device=device)
    if method == "dkvb":
        return DKVBClassifier(num_codebooks=64, num_pairs=256, device=device)  # a hundredth of the paper's table
    if method == "fetril":
        return FeTrIL()
    feature = rows.rows.features[rows.columns.label]
    labels = sorted(set(rows.rows[rows.columns.label][:]))
    return TEEN(base_classes=feature.int2str(labels) if hasattr(feature, "int2str") else labels)


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


def _tell(state: State, rows: _rows.Rows, tally: Tally, tested: dict[Any, list[int]], as_json: bool) -> None:
    model, asked, right = state.model, tally.asked, tally.right
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
        "state": str(state.folder),
        "backbone": rows.backbone_name,
        "rows": tally.learnt,
        "learnt_before": tally.before,
        "skipped": [{"name": name, "reason": reason} for name, reason in rows.skipped],
        "seconds": round(rows.seconds, 2),
        "rows_per_second": round(tally.learnt / max(rows.seconds, 1e-9), 1),
        "gamma": getattr(model, "gamma_", None),
        "accuracy_before_learnt": sum(right.values()) / total if total else None,
        "test_accuracy": sum(good for _, good in tested.values()) / tests if tested else None,
        "classes": classes,
    }
    if as_json:
        _console.print_json(summary)
        return
    _rows.print_classes(classes)
    _console.say(
        f"{tally.learnt:,} rows learnt in {rows.seconds:.1f} s ({summary['rows_per_second']:,.0f} rows/s), "
        f"{len(rows.skipped)} skipped; {len(model.classes_)} classes"
    )
    if tally.before:
        _console.say(f"{tally.before:,} rows had been learnt by this command before it was cut off")
    if total:
        _console.say(f"{summary['accuracy_before_learnt']:.3f} right on {total:,} rows before they were learnt")
    if tested:
        _console.say(f"{summary['test_accuracy']:.3f} right on {tests:,} test rows")
    _console.say(f"saved in {state.folder}")
