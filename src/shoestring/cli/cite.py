"""``shoestring cite``: BibTeX entries."""

from __future__ import annotations

from typing import Annotated

import typer

from shoestring.catalogue import card, list_methods
from shoestring.cli._console import bad_usage, completer


def run(
    slugs: Annotated[
        list[str], typer.Argument(metavar="SLUG", help="Methods.", autocompletion=completer(list_methods()))
    ],
) -> None:
    """Print the BibTeX entries of methods' papers.

    \b
    Examples:
      shoestring cite g-acil
      shoestring cite lion flap >> references.bib
    """
    with bad_usage():
        entries = [card(slug).bibtex() for slug in slugs]
    typer.echo("\n\n".join(entries))
