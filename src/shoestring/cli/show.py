"""``shoestring show``: one method's card, with its equations, an example and the recorded result."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import Annotated

import typer

from shoestring.catalogue import ROOMS, Card, card, entry_doc, list_methods, module_doc
from shoestring.cli._console import Json, bad_usage, completer, print_fields, print_json, print_result, say


def run(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="A method.", autocompletion=completer(list_methods()))],
    as_json: Json = False,
) -> None:
    """Show a method: paper, what it does without, equations, example, recorded result.

    \b
    Examples:
      shoestring show g-acil
      shoestring show flap --json
    """
    with bad_usage():
        c = card(slug)
    result = None
    if c.status != "planned":
        from shoestring.claims import recorded

        result = recorded(slug)
    texts = {
        "idea": section(module_doc(c), "Idea"),
        "equations": section(module_doc(c), "Equations"),
        "import": import_lines(c) if module_doc(c) else "",
        "example": section(entry_doc(c), "Examples"),
    }
    if as_json:
        print_json({**asdict(c), **texts, "result": asdict(result) if result else None})
        return
    say(c.title, style="bold")
    published = f" Published as: {c.published_title}." if c.published_title else ""
    say(f"{c.authors.rstrip('.')}. {c.venue or c.year}.{f' arXiv {c.arxiv}.' if c.arxiv else ''}{published}\n")
    about = {
        "does": c.summary,
        "without": ", ".join(c.without),
        "needs": ", ".join(c.needs),
        "room": f"{c.room}: {ROOMS[c.room]}",
        "status": c.status + ": nothing to import yet" * (not texts["import"]),
        "note": c.note,
    }
    print_fields(about)
    for name, text in texts.items():
        if text:
            say(f"\n{name.capitalize()}", style="bold")
            say(text)  # as it stands in the source
    if result:
        say("\nRecorded result", style="bold")
        print_result(result)


def section(doc: str | None, title: str) -> str:
    """The text under a heading that is underlined by dashes, up to the next heading; "" if there is none.

    >>> section("Title.\\n\\nIdea\\n----\\nCount.\\n\\nMore\\n----\\n...", "Idea")
    'Count.'
    """
    lines = (doc or "").splitlines()
    heads = [i for i in range(len(lines) - 1) if lines[i] and lines[i + 1] == "-" * len(lines[i])]
    for head, end in pairwise([*heads, len(lines)]):
        if lines[head] == title:
            return "\n".join(lines[head + 2 : end]).strip("\n")
    return ""


def import_lines(c: Card) -> str:
    names: dict[str, list[str]] = {}
    for entry in c.entries:
        module, name = entry.split(":")
        names.setdefault(module, []).append(name)
    return "\n".join(f"from {module} import {', '.join(found)}" for module, found in names.items())
