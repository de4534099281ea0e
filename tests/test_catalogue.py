"""The catalogue keeps its contract, and no row may claim what is not there."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shoestring
from shoestring import catalogue
from shoestring.catalogue import NEEDS, ROOMS, WITHOUT, Card, card, entry_doc, list_methods, module_doc

ROWS = catalogue.tomllib.loads((catalogue.PACKAGE / "catalogue.toml").read_text(encoding="utf-8"))
CARDS = [card(slug) for slug in ROWS]
READY = [c for c in CARDS if c.status == "ready"]
PLANNED = [c for c in CARDS if c.status == "planned"]


def by_slug(c: Card) -> str:
    return c.slug


def words(text: str) -> str:
    return " ".join(text.split())


# The contract -----------------------------------------------------------------------------------------------


def test_slugs_rooms_and_entries_are_the_contract():
    # Digest of the 74 agreed lines "slug room entry entry ...": import paths are promised, any edit breaks.
    lines = "\n".join(f"{c.slug} {c.room} {' '.join(c.entries)}" for c in CARDS)
    assert len(CARDS) == 74
    assert (
        hashlib.sha256(lines.encode()).hexdigest() == "bb333c8f4024a09987aa51001781150e2533125233253224b241bdd459c0fc74"
    )


def test_rows_have_the_same_keys_in_the_same_order():
    fields = list(Card.__dataclass_fields__)[1:-1]
    for slug, row in ROWS.items():
        assert [k for k in row if k != "published_title"] == fields, slug


def test_rooms():
    assert len(ROOMS) == 14
    assert list(dict.fromkeys(c.room for c in CARDS)) == list(ROOMS)


@pytest.mark.parametrize("field", ["title", "arxiv", "summary"])
def test_no_two_rows_share(field):
    values = [getattr(c, field) for c in CARDS if getattr(c, field)]
    assert len(values) == len(set(values))


@pytest.mark.parametrize("c", CARDS, ids=by_slug)
def test_row_is_well_formed(c):
    assert c.module == f"shoestring.{c.room}.{c.slug.replace('-', '_')}"
    assert c.claim_module == f"shoestring.claims.{c.room}.{c.slug.replace('-', '_')}"
    for entry in c.entries:
        module, name = entry.split(":")
        assert module == c.module
        assert name.isidentifier()
    assert c.status in ("planned", "ready")
    assert re.fullmatch(r"\d{4}\.\d{4,5}", c.arxiv)
    assert 2010 <= c.year <= 2026
    # A preprint id starts with its year and month: no venue printed a paper before that.
    assert c.year >= 2000 + int(c.arxiv[:2])
    assert not c.venue or str(c.year) in c.venue
    assert 0 < len(c.summary) <= 100
    assert not c.summary.endswith(".")
    for text in (c.title, c.authors, c.venue, c.summary, c.note, c.published_title):
        assert text == words(text)
    assert not re.search(r" and .* and |;|\d|\*", c.authors)


# The vocabulary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "column"), [(WITHOUT, "without"), (NEEDS, "needs")])
def test_every_term_is_known_and_used(vocabulary, column):
    assert len(vocabulary) <= 16
    rows = [getattr(c, column) for c in CARDS]
    assert {term for row in rows for term in row} == set(vocabulary)
    for row in rows:
        assert row
        assert list(row) == [term for term in vocabulary if term in row]  # no repeats, one order everywhere


@pytest.mark.parametrize("c", CARDS, ids=by_slug)
def test_without_and_needs_do_not_contradict(c):
    without, needs = set(c.without), set(c.needs)
    assert not without & needs
    # Exactly one of the two is said about these, so that a filter misses nobody.
    for term in ("gradients", "second-model"):
        assert (term in without) != (term in needs)
    if "labels" in without:
        assert not needs & {"labels", "few-labels"}
    if "data" in without:
        assert {"labels", "old-data"} <= without
        assert not needs & {"unlabelled-data", "forget-data", "retain-data", "references", "features"}
    if "old-data" in without:
        assert "retain-data" not in needs
    if "training" in without:
        assert "retraining" in without
    if "features" in needs:
        assert "weights" in without


# Status -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", READY, ids=by_slug)
def test_ready_row_is_importable_documented_and_claimed(c):
    for entry in c.entries:
        module, name = entry.split(":")
        assert inspect.getdoc(getattr(importlib.import_module(module), name))
    doc = module_doc(c)
    assert doc is not None
    assert words(c.title) in words(doc)
    assert c.arxiv in doc
    assert entry_doc(c)
    assert callable(importlib.import_module(c.claim_module).run)
    assert (catalogue.PACKAGE / "claims" / "results" / f"{c.slug}.json").is_file()


@pytest.mark.parametrize("c", PLANNED, ids=by_slug)
def test_planned_row_is_not_finished(c):
    """Its code may be there, with tests; what it lacks is the measured claim, without which it is not offered."""
    path = catalogue.PACKAGE / c.room / f"{c.module.rsplit('.', 1)[1]}.py"
    recorded = catalogue.PACKAGE / "claims" / "results" / f"{c.slug}.json"
    assert not (path.exists() and recorded.exists()), f"{c.slug} is finished: set its status to 'ready'"
    assert not recorded.exists()
    if path.exists():
        assert words(c.title) in words(module_doc(c))
    else:
        assert module_doc(c) is None
        assert entry_doc(c) is None


# Listing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "needs", "room"),
    [
        ((), (), None),
        (["labels", "gradients"], (), None),
        (["data"], ["diffusion-model", "second-model"], None),
        ((), ["forget-data"], "forget"),
        (["gradients"], ["features", "labels"], "learn"),
    ],
)
def test_filters_equal_brute_force(without, needs, room):
    expected = [
        slug
        for slug, row in ROWS.items()
        if all(t in row["without"] for t in without)
        and all(t in row["needs"] for t in needs)
        and (room is None or row["room"] == room)
    ]
    assert expected
    assert list_methods(without=without, needs=needs, room=room) == expected


def test_filters_literally():
    assert list_methods(room="learn") == ["g-acil", "fetril", "teen", "dkvb", "ovor"]
    assert list_methods(without=["labels", "gradients"], needs=["unlabelled-data", "features"]) == [
        "dataset-quantization"
    ]
    assert list_methods(without=["gradients"], needs=["labels"], room="learn") == ["g-acil", "fetril"]
    assert list_methods(without=["data"], room="forget") == ["all-but-one", "sfd"]
    assert list_methods(without=["data"], needs=["labels"]) == []


def test_a_string_is_one_term_and_any_iterable_serves():
    assert list_methods(without="labels") == list_methods(without=["labels"])
    assert list_methods(needs="labels", room="search") == list_methods(needs=("labels",), room="search")
    assert list_methods(without=(t for t in ["labels", "data"])) == list_methods(without={"data", "labels"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": ["label"]}, "without 'label' is unknown; did you mean 'labels'?"),
        ({"needs": "gradient"}, "needs 'gradient' is unknown; did you mean 'gradients'?"),
        ({"room": "forgot"}, "room 'forgot' is unknown; did you mean 'forget'?"),
        ({"without": "features"}, "without 'features' is unknown"),  # a term of the other vocabulary
        ({"without": [""]}, "without '' is unknown"),
    ],
)
def test_unknown_terms_name_the_nearest_and_the_known(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list_methods(**arguments)
    vocabulary = {"without": WITHOUT, "needs": NEEDS, "room": ROOMS}[next(iter(arguments))]
    assert all(term in str(caught.value) for term in vocabulary)


@pytest.mark.parametrize("arguments", [{"without": None}, {"needs": 3}, {"without": [1]}, {"room": ["learn"]}])
def test_wrong_types_are_named(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        list_methods(**arguments)


def test_card_is_the_row():
    c, row = card("loki"), ROWS["loki"]
    assert c.slug == "loki"
    for key, value in row.items():
        assert getattr(c, key) == (tuple(value) if isinstance(value, list) else value)
    assert c == card("loki")
    assert len({c, card("loki"), card("clip")}) == 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("gacil", "g-acil"), ("G_ACIL", "g-acil"), ("perp-negg", "perp-neg"), ("mealv2", "meal-v2")],
)
def test_unknown_slug_gets_did_you_mean(wrong, right):
    with pytest.raises(ValueError, match=f"slug '{wrong}' is unknown; did you mean '{right}'"):
        card(wrong)


def test_hopeless_slug_gets_no_guess():
    with pytest.raises(ValueError, match=r"^slug 'xxxxxxxx' is unknown$"):
        card("xxxxxxxx")
    with pytest.raises(TypeError, match="slug must be a str"):
        card(7)  # type: ignore[arg-type]


# BibTeX -----------------------------------------------------------------------------------------------------


def test_bibtex_of_a_conference_paper_with_family_names_accents_and_a_printed_title():
    assert card("dkvb").bibtex() == (
        "@inproceedings{dkvb,\n"
        "  title = {{Discrete Key-Value Bottleneck}},\n"
        '  author = {Tr{\\"{a}}uble and Goyal and Rahaman and Mozer and Kawaguchi and Bengio and '
        'Sch{\\"{o}}lkopf},\n'
        "  year = {2023},\n"
        "  booktitle = {ICML},\n"
        "  eprint = {2207.11240},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
    assert "title = {{GACL: Exemplar-Free Generalized Analytic Continual Learning}}" in card("g-acil").bibtex()


def test_bibtex_of_a_journal_paper_and_of_parted_family_names():
    assert card("gbnn").bibtex() == (
        "@article{gbnn,\n"
        "  title = {{Sequential Training of Neural Networks with Gradient Boosting}},\n"
        "  author = {Emami and Mart{\\'{i}}nez-Mu{\\~{n}}oz},\n"
        "  year = {2023},\n"
        "  journal = {IEEE Access},\n"
        "  eprint = {1909.12098},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
    assert "Granger and {Ben Ayed}}" in card("transductive-clustering").bibtex()
    assert "{{de Brebisson} and Vincent}" in card("z-loss").bibtex()


def test_bibtex_of_a_preprint_with_et_al():
    assert card("tfup").bibtex() == (
        "@misc{tfup,\n"
        "  title = {{Training-Free Unsupervised Prompt for Vision-Language Models}},\n"
        "  author = {Long and Wang and Zhao and Tan and others},\n"
        "  year = {2024},\n"
        "  eprint = {2404.16339},\n"
        "  archivePrefix = {arXiv},\n"
        "}"
    )
    assert "Samir Yitzhak Gadre and Rebecca Roelofs and others}" in card("model-soups").bibtex()
    assert r"ResNet-50 to 80\%+ Top-1" in card("meal-v2").bibtex()


@pytest.mark.parametrize("c", CARDS, ids=by_slug)
def test_bibtex_is_ascii_with_balanced_braces(c):
    entry = c.bibtex()
    assert entry.isascii()
    depth = 0
    for symbol in re.sub(r"\\[{}]", "", entry):
        depth += {"{": 1, "}": -1}.get(symbol, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"(?<!\\)[&%$#_^]", entry)


# Docstrings from source, and the package itself -------------------------------------------------------------


def test_docstrings_are_read_without_importing(tmp_path: Path, monkeypatch):
    (tmp_path / "learn").mkdir()
    source = '"""The paper.\n\n    Indented.\n"""\nraise SystemExit\nclass GACIL:\n    """The estimator."""\n'
    (tmp_path / "learn" / "g_acil.py").write_text(source)
    (tmp_path / "learn" / "teen.py").write_text("from x import TEEN\ndef calibrate_prototypes(): 'Pulls.'\n")
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    assert module_doc(card("g-acil")) == "The paper.\n\nIndented."
    assert entry_doc(card("g-acil")) == "The estimator."
    assert module_doc(card("teen")) is None
    assert entry_doc(card("teen")) is None  # not defined in its module
    assert module_doc(card("loki")) is None


def test_import_is_light():
    code = "import sys, shoestring; shoestring.list_methods(); print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert not loaded & {
        "torch",
        "numpy",
        "scipy",
        "sklearn",
        "datasets",
        "accelerate",
        "transformers",
        "typer",
    }


def test_rooms_load_lazily(monkeypatch):
    assert shoestring.__all__ == ["__version__", "card", "list_methods"]
    assert {*ROOMS, "data", "claims"} <= set(dir(shoestring))
    with pytest.raises(AttributeError, match="no attribute 'lern'"):
        shoestring.lern  # noqa: B018
    monkeypatch.delitem(vars(shoestring), "explain", raising=False)
    monkeypatch.setitem(sys.modules, "shoestring.explain", None)  # as if the room were not written
    with pytest.raises(AttributeError, match=r"shoestring\.explain is planned.*`shoestring list --room explain`"):
        shoestring.explain  # noqa: B018


def test_an_existing_room_is_its_module(tmp_path: Path, monkeypatch):
    (tmp_path / "metrics.py").write_text("FIGURE = 7\n")
    (tmp_path / "zoo.py").write_text("import no_such_module_at_all\n")
    monkeypatch.setattr(shoestring, "__path__", [str(tmp_path)])
    for name in ("metrics", "zoo"):
        monkeypatch.delitem(vars(shoestring), name, raising=False)
        monkeypatch.delitem(sys.modules, f"shoestring.{name}", raising=False)
    try:
        assert shoestring.metrics.FIGURE == 7
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            shoestring.zoo  # noqa: B018
    finally:
        vars(shoestring).pop("metrics", None)
        sys.modules.pop("shoestring.metrics", None)
