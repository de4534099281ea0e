"""What the verbs share: text and tables on stdout, progress, one-line errors, JSON.

rich is imported for a terminal only: a pipe gets plain lines, and gets them sooner.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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


def say(text: str = "", style: str | None = None) -> None:
    """A line, or lines, on stdout as they are; `style` (rich's words) only on a terminal."""
    if style and sys.stdout.isatty():
        console().print(text, style=style, soft_wrap=True)
    else:
        print(text)


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Container[int] = (),
    whole: Container[int] = (),
    dim: Container[int] = (),
) -> None:
    """Columns without lines; those in `right` are aligned there.

    A terminal breaks cells to fit, but not in the columns `whole`, and dims the rows `dim`. A pipe or a file gets one
    line a row, however long.
    """
    if not sys.stdout.isatty():
        print("\n".join(columns([headers, *rows], right)))
        return
    made = table(*headers)
    for number, column in enumerate(made.columns):
        column.no_wrap = number in whole
        column.justify = "right" if number in right else "left"
    for number, row in enumerate(rows):
        made.add_row(*row, style="dim" if number in dim else None)
    console().print(made)


def print_fields(fields: Mapping[str, str]) -> None:
    """A name and its value on each line; empty ones are left out."""
    rows = [(name, value) for name, value in fields.items() if value]
    if not sys.stdout.isatty():
        print("\n".join(columns(rows)))
        return
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    console().print(grid)


def console(*, stderr: bool = False) -> Console:
    """Prints text as it is, without markup or highlighting, and without colour where none is wanted.

    A pipe or a file gets lines of any length, since whoever reads them has no width.
    """
    from rich.console import Console

    return Console(
        stderr=stderr,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # rich alone would keep bold and dim
        width=None if (sys.stderr if stderr else sys.stdout).isatty() else 10_000,
        markup=False,
        highlight=False,
        emoji=False,
    )


def table(*headers: str) -> Table:
    """A table without lines, for `console`; its cells are str or rich.text.Text."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        made.add_column(header)
    return made


def columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Lines with the cells padded to columns.

    >>> columns([("name", "n"), ("a", "10")], right=[1])
    ['name   n', 'a     10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if number in right else str.ljust for number in range(len(widths))]
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def print_result(result: Result) -> None:
    """A claim's figures, rule and verdict."""
    headers = ("method", "setting", "metric", "value", "unit", "paper")
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
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    print_table([headers[i] for i in used], [[row[i] for i in used] for row in rows])
    about = {
        "claim": result.claim,
        "rule": result.rule,
        "data": result.data,
        "note": result.note,
        "verdict": result.verdict + " (fast form: it counts for nothing)" * result.fast,
        "run": f"{result.seconds:g} s, {result.machine.get('cores', '?')} cores, {result.date[:10]}",
    }
    print_fields(about)


def figure(value: float) -> str:
    """Four significant digits, whole numbers from 1,000 on.

    >>> figure(0.912345), figure(12345.6), figure(1.2e-12)
    ('0.9123', '12,346', '1.2e-12')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_json(value: Any) -> None:
    """Strict JSON in ASCII on stdout."""
    print(json.dumps(value, indent=1, allow_nan=False))


@contextmanager
def progress(title: str) -> Iterator[Callable[[float | None, str], None]]:
    """A bar on stderr, gone at the end, moved by calls ``report(done, text)``; nothing where no terminal is.

    `done` is the share done, 0 to 1, or None where the end is not known. Leave the block before printing.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda done, text: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    layout = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # rich would turn stdout into stderr here, and the result with it
    bar = Progress(*layout, console=console(stderr=True), transient=True, refresh_per_second=4, redirect_stdout=False)
    with bar:
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


class AsGiven:
    """Takes the place of typer's conversion for text and switches, where nothing is to be converted.

    typer 0.29 hands even these to pydantic, whose import alone takes half the time `shoestring list` may take.
    """

    @staticmethod
    def coerce(value: Any, param: Any, ctx: Any) -> Any:
        return [*value] if isinstance(value, tuple) else value


def keep_as_given(command: Any) -> None:
    """Let the parameters of type str, list[str] and bool through without pydantic; older typers need no help."""
    for param in command.get_params(typer.Context(command)):  # --help is among them
        kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        if kind in (str, list[str], bool) and getattr(param, "_runtime_param", ...) is None:
            param._runtime_param = AsGiven


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
