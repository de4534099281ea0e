"""What the verbs share: consoles, tables, progress, one-line errors, JSON. rich is imported where it is used."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shoestring.claims import Result

# The bases of typer.BadParameter: click's own, or those of the copy that newer typers carry and do not export.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

# What a user can put right. Any other exception is a mistake of ours and keeps its traceback.
EXPECTED = (ClickException, ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

debug = False  # of this run; set by `Verbs.main`


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no highlighting, no colour where none is wanted.

    A pipe or a file gets lines of any length, since whoever reads them has no width.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # rich alone would keep bold and dim
        width=None if stream.isatty() else 10_000,
        markup=False,
        highlight=False,
        emoji=False,
    )


def table(*headers: str) -> Table:
    """A table without lines; cells are str or rich.text.Text."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        made.add_column(header)
    return made


def print_fields(out: Console, fields: Mapping[str, str]) -> None:
    """One line a field, the names in a column; empty fields are left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in fields.items():
        if value:
            grid.add_row(name, value)
    out.print(grid)


def print_result(out: Console, result: Result) -> None:
    """A claim's figures, rule and verdict."""
    rows = [
        (
            row.method,
            row.setting,
            row.metric,
            f"{figure(row.value)} ± {figure(row.spread)}" if len(row.seeds) > 1 else figure(row.value),
            row.unit,
            "" if row.paper is None else figure(row.paper),
        )
        for row in result.rows
    ]
    headers = ("method", "setting", "metric", "value", "unit", "paper")
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    figures = table(*(headers[i] for i in used))
    for row in rows:
        figures.add_row(*(row[i] for i in used))
    out.print(figures)
    about = {
        "claim": result.claim,
        "rule": result.rule,
        "data": result.data,
        "note": result.note,
        "verdict": result.verdict + " (fast form: it counts for nothing)" * result.fast,
        "run": f"{result.seconds:g} s, {result.machine.get('cores', '?')} cores, {result.date[:10]}",
    }
    print_fields(out, about)


def figure(value: float) -> str:
    """Four significant digits, whole numbers from 1,000 on.

    >>> figure(0.912345), figure(12345.6), figure(1.2e-12)
    ('0.9123', '12,346', '1.2e-12')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_json(value: Any) -> None:
    """Strict JSON in ASCII on stdout."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


@contextmanager
def progress(title: str) -> Iterator[Callable[[float | None, str], None]]:
    """A bar on stderr, gone at the end, moved by calls ``report(done, text)``; nothing where no terminal is.

    `done` is the share done, 0 to 1, or None where the end is not known. Leave the block before printing.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda done, text: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", title=title, total=None)

        def report(done: float | None, text: str) -> None:
            bar.update(task, total=None if done is None else 1.0, completed=done, description=text)

        yield report


@contextmanager
def bad_usage() -> Iterator[None]:
    """What the library says of an argument (ValueError) becomes an error of usage, exit code 2."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest name as the end of a message, "" if none is near.

    >>> did_you_mean("lst", ["list", "show"])
    "; did you mean 'list'?"
    """
    from difflib import get_close_matches

    near = get_close_matches(name.lower().replace("_", "-"), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def completer(names: Iterable[str]) -> Callable[[str], list[str]]:
    """For ``autocompletion=``: the names that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def print_error(error: BaseException, *, about: str = "", hint: str = "") -> None:
    """One line on stderr, after the traceback if that is asked for."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {f'{about}: ' if about else ''}{one_line(error)}{hint}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line, control characters shown instead of sent to the terminal.

    >>> one_line(ValueError("no\\nsuch \\x1b[31m row"))
    'no such \\\\x1b[31m row'
    """
    if isinstance(error, ClickException):
        text = error.format_message()  # type: ignore[attr-defined]
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
