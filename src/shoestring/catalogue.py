"""The table of all methods, without importing any of them.

``catalogue.toml`` beside this file holds one row a method; this module lists, filters and looks rows up,
writes their BibTeX entries and reads their docstrings from source. It imports the standard library only.

>>> from shoestring.catalogue import card, list_methods
>>> list_methods(without=["labels", "gradients"], room="compress")
['udfc', 'flap']
>>> card("lion").title
'Symbolic Discovery of Optimization Algorithms'
"""

from __future__ import annotations

import ast
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["NEEDS", "PIECES", "ROOMS", "WITHOUT", "Card", "card", "entry_doc", "list_methods", "module_doc"]

PACKAGE = Path(__file__).parent

# What a user may lack. Both vocabularies describe the first entry of a method, applied to a model that is
# already trained where there is one.
WITHOUT = {
    "labels": "no labelled examples (class names, prompts and captions may still be given)",
    "gradients": "nothing is back-propagated, not even through a small head",
    "training": "nothing is trained step by step: at most counted, averaged, clustered, searched or solved",
    "retraining": "no training from scratch once more: the model stays, is cut, or gets one short update",
    "old-data": "the old training data (beyond what is to be forgotten) is neither kept nor read again",
    "data": "no real examples at all",
    "second-model": "no other trained model: teacher, scorer, generator, frozen copy",
    "weights": "black box: only the model's outputs or embeddings are read",
    "tuning": "no search over the hyper-parameters that the usual way needs",
    "memory": "clearly less memory than the usual way",
    "compute": "clearly less computing, or fewer model calls, than the usual way",
    "parameters": "few or no extra trainable parameters",
    "redesign": "the architecture, and how the model is used, stay as they are",
    "task-ids": "no task boundaries or task ids in a stream",
}

# What a method takes.
NEEDS = {
    "labels": "labelled examples",
    "few-labels": "a few labelled examples: shots per class, a held-out set, a batch",
    "unlabelled-data": "examples without labels: images, texts or rows",
    "features": "features from a frozen encoder",
    "forget-data": "the examples that are to be forgotten",
    "retain-data": "examples whose treatment must stay as it is",
    "references": "one or a few example images of what is wanted",
    "side-info": "something known beforehand: class names, label distances, domains, captions, frames",
    "gradients": "back-propagation through the model, a part of it or a head",
    "trained-model": "a model already trained on the task",
    "second-model": "another model: teacher, scorer, classifier, generator, frozen copy",
    "image-model": "a trained image encoder",
    "text-model": "a trained text encoder",
    "image-text-model": "a model that ties images to text: paired encoders, or a captioner",
    "language-model": "a generative language model",
    "diffusion-model": "a trained diffusion model",
}

# Room -> what goes in and what comes out.
ROOMS = {
    "learn": "a stream of labelled features or images, new classes at any time -> a classifier",
    "classify": "few labels, no labels or no gradients -> class scores",
    "retrieve": "queries and a gallery -> a ranking",
    "detect": "text or image -> generated or not",
    "tune": "a model -> the model with few trainable weights; several models -> one",
    "train": "a model and batches -> a trained model, cheaper or better",
    "distill": "teachers -> a student",
    "search": "a space of architectures -> ranked architectures",
    "condense": "a large data set -> a small one",
    "forget": "a model and what to forget -> a model",
    "compress": "a model -> a smaller model",
    "guide": "a sampler -> a steered sampler",
    "generate": "data or references -> a generator, images",
    "explain": "a model or data -> what it provably does",
}

# Parts of the library that are no row of the table and have a claim of their own: name -> what it is, claim module.
PIECES = {
    "program-search": (
        "The evolutionary search over programs that found Lion (arXiv 2302.06675)",
        "shoestring.claims.search.programs",
    ),
}

# Journals among the venues; every other venue is a conference or workshop.
_JOURNALS = {
    "IEEE Access": "IEEE Access",
    "IEEE TIP": "IEEE Transactions on Image Processing",
    "PNAS": "Proceedings of the National Academy of Sciences",
}
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {c: "\\" + c for c in "&%$#_{}"}
_TEX_ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030c": "v"}


@dataclass(frozen=True)
class Card:
    """One row of the catalogue: a published method, where it lives, and what it does with and without.

    Attributes
    ----------
    slug : str
        Name of the method in the command line and in file names.
    title, authors, venue, arxiv : str
        The paper. `authors` says no more than our sources do (often family names only); `venue` and `arxiv`
        are "" where there is none.
    year : int
        Year of the venue, or of the preprint.
    room : str
        One of `ROOMS`.
    entries : tuple of str
        Import paths ``"shoestring.<room>.<module>:<name>"``, the main one first.
    without, needs : tuple of str
        Terms of `WITHOUT` and `NEEDS`, for the first entry.
    summary : str
        What it does for a user, in one line.
    status : {"planned", "ready"}
    note : str
        What is reconstructed, or what another entry adds; "" if there is nothing to say.
    published_title : str, default ""
        The title printed by the venue, where it is another one.
    """

    slug: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    room: str
    entries: tuple[str, ...]
    without: tuple[str, ...]
    needs: tuple[str, ...]
    summary: str
    status: str
    note: str
    published_title: str = ""

    @property
    def module(self) -> str:
        """Dotted path of the method's module, e.g. ``"shoestring.learn.g_acil"``."""
        return self.entries[0].split(":")[0]

    @property
    def claim_module(self) -> str:
        """Dotted path of the module that re-measures the paper's claim."""
        return f"shoestring.claims.{self.room}.{self.module.rsplit('.', 1)[1]}"

    def bibtex(self) -> str:
        """Return the BibTeX entry of the paper, in plain ASCII; the slug is its key.

        Examples
        --------
        >>> print(card("perp-neg").bibtex())
        @misc{perp-neg,
          title = {{Re-imagine the Negative Prompt Algorithm: Transform 2D Diffusion into 3D, alleviate Janus
            problem and Beyond}},
          author = {Armandpour and Sadeghian and Zheng and Sadeghian and Zhou},
          year = {2023},
          eprint = {2304.04968},
          archivePrefix = {arXiv},
        }
        """
        fields = {
            "title": "{" + _tex(self.published_title or self.title) + "}",  # the braces keep the capitals
            "author": _tex_authors(self.authors),
            "year": str(self.year),
        }
        kind = "misc"
        if self.venue:
            venue = " ".join(self.venue.replace(str(self.year), "").split())
            kind, field = ("article", "journal") if venue in _JOURNALS else ("inproceedings", "booktitle")
            fields[field] = _tex(_JOURNALS.get(venue, venue))
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
        return f"@{kind}{{{self.slug},\n{body}}}"


def list_methods(
    without: Iterable[str] | str = (), needs: Iterable[str] | str = (), room: str | None = None
) -> list[str]:
    """Slugs of the methods that do without all of `without` and take all of `needs`.

    Parameters
    ----------
    without : iterable of str or str, default ()
        Terms of `WITHOUT`: what you do not have. A single string is one term.
    needs : iterable of str or str, default ()
        Terms of `NEEDS`: what the method must make use of.
    room : str, optional
        One of `ROOMS`.

    Returns
    -------
    list of str
        In the order of the catalogue; planned methods are listed too (see `Card.status`).

    Raises
    ------
    ValueError
        For a term or room that does not exist.

    Examples
    --------
    >>> list_methods(without=["labels", "gradients"], needs="features")
    ['dataset-quantization']
    """
    without, needs = _terms(without, WITHOUT, "without"), _terms(needs, NEEDS, "needs")
    if room is not None:
        _check(room, ROOMS, "room")
    return [
        c.slug
        for c in _cards().values()
        if without.issubset(c.without) and needs.issubset(c.needs) and room in (None, c.room)
    ]


def card(slug: str) -> Card:
    """Look one method up.

    Parameters
    ----------
    slug : str
        A name that `list_methods` returns.

    Returns
    -------
    Card

    Raises
    ------
    ValueError
        For an unknown slug; the message names the nearest one.

    Examples
    --------
    >>> card("g-acil").entries
    ('shoestring.learn.g_acil:GACIL',)
    >>> card("flapp")
    Traceback (most recent call last):
    ValueError: slug 'flapp' is unknown; did you mean 'flap'?
    """
    _check(slug, _cards(), "slug")
    return _cards()[slug]


def module_doc(card: Card) -> str | None:
    """Docstring of the method's module, read from its source; None if file or docstring is missing."""
    tree = _tree(card)
    return ast.get_docstring(tree) if tree else None


def entry_doc(card: Card) -> str | None:
    """Docstring of the first entry, read from the source; None if it is not defined there or has none."""
    tree, name = _tree(card), card.entries[0].split(":")[1]
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node)
    return None


@cache
def _cards() -> dict[str, Card]:
    rows = tomllib.loads((PACKAGE / "catalogue.toml").read_text(encoding="utf-8"))
    return {slug: Card(slug, **{k: _frozen(v) for k, v in row.items()}) for slug, row in rows.items()}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _terms(terms: Iterable[str] | str, known: Iterable[str], argument: str) -> set[str]:
    if not isinstance(terms, Iterable):
        raise TypeError(f"{argument} must be a term or an iterable of terms, got {terms!r}")
    terms = [terms] if isinstance(terms, str) else list(terms)
    for term in terms:
        _check(term, known, argument)
    return set(terms)


def _check(name: str, known: Iterable[str], argument: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, got {name!r}")
    if name in known:
        return
    from difflib import get_close_matches  # only a wrong name pays for it

    near = get_close_matches(name.lower().replace("_", "-"), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if argument != "slug":  # 74 slugs would bury the message
        hint += f" Known: {', '.join(known)}"
    raise ValueError(f"{argument} {name!r} is unknown{hint}")


def _tree(card: Card) -> ast.Module | None:
    path = PACKAGE.joinpath(*card.module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.exists() else None


def _tex(text: str) -> str:
    """Plain ASCII for LaTeX: special characters escaped, accents as commands."""
    out: list[str] = []
    for c in unicodedata.normalize("NFD", text):
        if c in _TEX_ACCENTS:
            out[-1] = f"{{\\{_TEX_ACCENTS[c]}{{{out[-1]}}}}}"
        else:
            out.append(_TEX.get(c, c))
    return "".join(out)


def _tex_authors(authors: str) -> str:
    names = authors.removesuffix(" et al.").replace(" and ", ", ").split(", ")
    # A one-word name says that the list holds family names only, so "Ben Ayed" must not be parted.
    family_only = any(" " not in name for name in names)
    names = ["{" + _tex(n) + "}" if family_only and " " in n else _tex(n) for n in names]
    return " and ".join(names + ["others"] * authors.endswith(" et al."))
