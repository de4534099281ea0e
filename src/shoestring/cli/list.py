"""``shoestring list``: the methods, filtered by what the user does not have."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from shoestring.catalogue import NEEDS, ROOMS, WITHOUT, card, list_methods
from shoestring.cli._console import Json, bad_usage, completer, console, print_json, table

NARROW = 100  # columns; a narrower terminal would break the cells into single words


def run(
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X",
            help=f"What you do not have, repeatable: {', '.join(WITHOUT)}.",
            autocompletion=completer(WITHOUT),
        ),
    ] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Y",
            help=f"What the method must make use of, repeatable: {', '.join(NEEDS)}.",
            autocompletion=completer(NEEDS),
        ),
    ] = None,
    room: Annotated[
        str | None,
        typer.Option(metavar="ROOM", help=f"One room: {', '.join(ROOMS)}.", autocompletion=completer(ROOMS)),
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
    out = console()
    if cards:
        wide = out.width >= NARROW
        rows = table("method", "room", "what it does", *["without"] * wide, "status")
        rows.columns[0].no_wrap = rows.columns[1].no_wrap = rows.columns[-1].no_wrap = True
        for c in cards:
            style = "dim" if c.status == "planned" else None
            rows.add_row(c.slug, c.room, c.summary, *[", ".join(c.without)] * wide, c.status, style=style)
        out.print(rows)
        out.print()
    total = len(list_methods())
    counts = f"{len(cards)} methods" if len(cards) == total else f"{len(cards)} of {total} methods"
    by_status = ", ".join(f"{number} {status}" for status, number in Counter(c.status for c in cards).items())
    out.print(f"{counts}: {by_status}; more with `shoestring show METHOD`" if cards else counts)
