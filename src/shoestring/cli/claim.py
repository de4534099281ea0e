"""``shoestring claim``: measure the papers' own claims again."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoestring.catalogue import PIECES, ROOMS, list_methods
from shoestring.cli._console import (
    Json,
    UsageError,
    completer,
    did_you_mean,
    print_error,
    print_json,
    print_result,
    progress,
    say,
)

NAMES = ("all", *ROOMS, *list_methods(), *PIECES)


def run(
    names: Annotated[
        list[str],
        typer.Argument(metavar="SLUG", help="Methods, rooms, or all.", autocompletion=completer(NAMES)),
    ],
    fast: Annotated[
        bool, typer.Option("--fast", help="The short form, seconds each; its verdict counts for nothing.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, metavar="N", help="How many seeds; by default the claim's own.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where <slug>.json is written.")] = Path(
        "claims-results"
    ),
    as_json: Json = False,
) -> None:
    """Measure papers' claims again, on real data, on this machine.

    A claim that fails does not stop the others; the exit code is 1 then.

    \b
    Examples:
      shoestring claim g-acil
      shoestring claim learn --fast
      shoestring claim all --seeds 3 --out my-results
    """
    slugs = chosen(names)
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):  # better now than after an hour
        raise PermissionError(f"--out {out} cannot be written to")
    from shoestring.claims import measure, save_result, title

    results = []
    for number, slug in enumerate(slugs, 1):
        try:
            with progress(f"{slug} ({number}/{len(slugs)})") as report, redirect_stdout(sys.stderr):
                result = measure(slug, fast=fast, progress=report, seeds=seeds)
            path = save_result(result, out)
        except Exception as error:  # whatever goes wrong in one claim, the others are run
            print_error(error, about=slug)
            continue
        results.append(result)
        if not as_json:
            say(f"{slug}: {title(slug)}", style="bold")
            print_result(result)
            say(f"written to {path}\n")
    if as_json:
        print_json([asdict(result) for result in results])
    if len(results) < len(slugs):
        raise typer.Exit(1)


def chosen(names: list[str]) -> list[str]:
    """Slugs, each once; of rooms and of all only what is not planned."""
    from shoestring.claims import measurable

    slugs: dict[str, None] = {}
    for name in names:
        if name in (*ROOMS, "all"):
            slugs |= dict.fromkeys(measurable(None if name == "all" else name))
        elif name in (*list_methods(), *PIECES):
            slugs[name] = None
        else:
            raise UsageError(f"slug, room or all: {name!r} is unknown{did_you_mean(name, NAMES)}")
    if not slugs:
        raise ValueError(f"nothing to measure: all methods of {', '.join(names)} are planned")
    return [*slugs]
