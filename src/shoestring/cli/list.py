"""``shoestring list``: the methods, filtered by what the user does not have."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from shutil import get_terminal_size
from typing import Annotated

import typer

from shoestring.catalogue import NEEDS, ROOMS, WITHOUT, card, list_methods
from shoestring.cli._console import Json, bad_usage, completer, print_json, print_table, say

NARROW = 100  # columns; a narrower terminal would break the cells into single words


def run(
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="X",
            help=f"What you do not have, repeatable: {', '.join(WITHOUT)}.",
            autocompletion=completer(WITHOUT),
        ),
    ] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option(
            "--needs",
            metavar="Y",
            help=f"What the method must make use of, repeatable: {', '.join(NEEDS)}.",
            autocompletion=completer(NEEDS),
        ),
    ] = None,
    room: Annotated[
        str | None,
        typer.Option("--room", metavar="ROOM", help=f"One room: {', '.join(ROOMS)}.", autocompletion=completer(ROOMS)),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods: all, or those that do without what you lack.

    \b
    Examples:
      shoestring list
      shoestring list --without labels --without gradients
      shoestring list --room compress --needs trained-model --json
    """
    with bad_usage():
        cards = [card(slug) for slug in list_methods(without or (), needs or (), room)]
    if as_json:
        print_json([asdict(c) for c in cards])
        return
    if cards:
        wide = not sys.stdout.isatty() or get_terminal_size().columns >= NARROW
        print_table(
            ["method", "room", "what it does", *["without"] * wide, "status"],
            [(c.slug, c.room, c.summary, *[", ".join(c.without)] * wide, c.status) for c in cards],
            dim=[i for i, c in enumerate(cards) if c.status == "planned"],
            whole=(0, 1, 3 + wide),
        )
        say()
    total = len(list_methods())
    counts = f"{len(cards)} methods" if len(cards) == total else f"{len(cards)} of {total} methods"
    by_status = ", ".join(f"{number} {status}" for status, number in Counter(c.status for c in cards).items())
    say(f"{counts}: {by_status}; more with `shoestring show METHOD`" if cards else counts)
