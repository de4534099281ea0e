"""The command line's frame, and the verbs list, show, cite, info and claim."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import shoestring
from shoestring import catalogue, claims
from shoestring.catalogue import Card, card, list_methods
from shoestring.claims import Result, Row, load_result, save_result
from shoestring.cli import VERBS, app
from shoestring.cli.show import section

COMMAND = [sys.executable, "-m", "shoestring"]
HARMLESS = {"list", "show", "cite", "info"}  # verbs that write nothing and take no time


def run(*args, **env):
    """In this process: exit code, stdout, stderr. What is no SystemExit is raised."""
    result = CliRunner().invoke(app, [str(a) for a in args], env={"SHOESTRING_DEBUG": None, **env})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def environment(**more):
    names = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "SHOESTRING_DEBUG", "TTY_COMPATIBLE", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if k not in names} | more


def on_terminal(*args, command=COMMAND, **env):
    """Exit code and all that a terminal of 120 columns is sent."""
    master, slave = pty.openpty()
    env = environment(**{"COLUMNS": "120", "TERM": "xterm"} | env)
    process = subprocess.Popen([*command, *args], stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    sent = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux's way to say that the other end is closed
                raise
            part = b""
        if not part:
            break
        sent += part
    os.close(master)
    return process.wait(), sent.decode()


def rows_of(text):
    """Cells of a table that went into a pipe, without its header."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.split("\n\n")[0].splitlines()][
        1:
    ]


# list -------------------------------------------------------------------------------------------------------

FILTERS = [
    ({}, []),
    ({"without": ["labels", "gradients"]}, ["--without", "labels", "--without", "gradients"]),
    ({"needs": ["features", "labels"]}, ["--needs", "features", "--needs", "labels"]),
    ({"room": "guide"}, ["--room", "guide"]),
    (
        {"without": ["training"], "needs": ["trained-model"], "room": "compress"},
        ["--without", "training", "--needs", "trained-model", "--room", "compress"],
    ),
]


@pytest.mark.parametrize(("wanted", "args"), FILTERS)
def test_list_is_list_methods(wanted, args):
    cards = [card(slug) for slug in list_methods(**wanted)]
    answer = run("list", *args, "--json")
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out) == json.loads(json.dumps([asdict(c) for c in cards]))

    table = run("list", *args).out
    shown = [[c.slug, c.room, c.summary, *([", ".join(c.without)] if c.without else []), c.status] for c in cards]
    assert rows_of(table) == shown
    assert table.splitlines()[-1].startswith("74 methods: " if len(cards) == 74 else f"{len(cards)} of 74 methods: ")


def test_list_counts_and_marks_what_is_planned(monkeypatch):
    first, second = (card(slug) for slug in ("lion", "flap"))
    two = {
        "lion": replace(first, status="ready"),
        "flap": replace(second, status="planned"),
    }
    monkeypatch.setattr(catalogue, "_cards", lambda: two)
    out = run("list").out
    assert [row[-1] for row in rows_of(out)] == ["ready", "planned"]
    assert out.splitlines()[-1].startswith("2 methods: 1 ready, 1 planned;")


def test_list_without_a_match_says_so():
    assert not list_methods(without=["labels", "data"], room="learn")
    answer = run("list", "--without", "labels", "--without", "data", "--room", "learn")
    assert (answer.code, answer.out) == (0, "0 of 74 methods\n")
    assert run("list", "--without", "labels", "--without", "data", "--room", "learn", "--json").out == "[]\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--without", "lables"], "without 'lables' is unknown; did you mean 'labels'?"),
        (["--needs", "feature"], "needs 'feature' is unknown; did you mean 'features'?"),
        (["--room", "compres"], "room 'compres' is unknown; did you mean 'compress'?"),
    ],
)
def test_list_refuses_unknown_terms(args, message):
    answer = run("list", *args)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error: {message}")
    assert answer.err.count("\n") == 1


# show -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", list_methods())
def test_show_says_what_the_catalogue_says(slug):
    c = card(slug)
    answer = run("show", slug)
    assert answer.code == 0
    for part in (
        c.title,
        c.authors,
        c.venue or str(c.year),
        c.arxiv,
        c.summary,
        ", ".join(c.without),
        ", ".join(c.needs),
    ):
        assert part in answer.out
    assert re.search(rf"^status +{c.status}", answer.out, re.MULTILINE)
    as_json = json.loads(run("show", slug, "--json").out)
    assert {k: as_json[k] for k in asdict(c)} == json.loads(json.dumps(asdict(c)))


def test_show_prints_equations_and_example_as_they_stand():
    """With brackets, backslashes and indentation that markup or wrapping would eat."""
    source = Path(shoestring.__file__).with_name("learn") / "g_acil.py"
    text = source.read_text()
    equations = text.split("Equations\n---------\n")[1].split("\n\nCode and paper\n")[0]
    example = text.split("    Examples\n    --------\n")[1].split('\n    """')[0].rstrip()
    example = "\n".join(line[4:] for line in example.splitlines())
    assert "[Ybar exposed | Ytilde new]" in equations
    on_screen = on_terminal("show", "g-acil", NO_COLOR="1")[1].replace("\r\n", "\n")
    for out in (run("show", "g-acil").out, on_screen):
        assert equations in out
        assert example in out
        assert "\nfrom shoestring.learn.g_acil import GACIL\n" in out
    as_json = json.loads(run("show", "g-acil", "--json").out)
    assert as_json["equations"] == equations
    assert as_json["example"] == example


def test_sections_end_at_the_next_heading():
    doc = "Title.\n\nIdea\n----\na, b\n---\nc\n\nIdea too\n--------\nd\n"
    assert section(doc, "Idea") == "a, b\n---\nc"
    assert section(doc, "Idea too") == "d"
    assert section(doc, "Equations") == section(None, "Idea") == ""


def test_show_a_planned_method(monkeypatch):
    planned = replace(card("flap"), status="planned", entries=("shoestring.compress.not_there:Name",))
    monkeypatch.setattr(catalogue, "_cards", lambda: {"flap": planned})
    answer = run("show", planned.slug)
    assert "planned: nothing to import yet" in answer.out
    assert "import " not in answer.out.replace("nothing to import yet", "").replace(planned.summary, "")
    as_json = json.loads(run("show", planned.slug, "--json").out)
    assert (as_json["import"], as_json["equations"], as_json["result"]) == ("", "", None)


def test_show_the_recorded_result(monkeypatch, tmp_path, toy):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert "Recorded result" not in run("show", "toy").out
    measured = claims.measure("toy")
    save_result(measured, tmp_path)
    out = run("show", "toy").out.split("Recorded result\n")[1]
    assert "toy     quiet    accuracy  0.75 ± 0.25  0.8\n" in out
    assert "ridge   quiet    seconds   12,346\n" in out
    assert "rule     holds if toy is above 0.5" in out
    assert "verdict  holds\n" in out
    assert json.loads(run("show", "toy", "--json").out)["result"] == json.loads(json.dumps(asdict(measured)))


@pytest.mark.parametrize("verb", ["show", "cite", "claim"])
def test_unknown_slug(verb):
    answer = run(verb, "flapp")
    assert (answer.code, answer.out) == (2, "")
    assert "'flapp' is unknown; did you mean 'flap'?" in answer.err
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1


# cite, info -------------------------------------------------------------------------------------------------


def test_cite_prints_the_entries_and_nothing_else():
    assert run("cite", "lion").out == card("lion").bibtex() + "\n"
    assert run("cite", "lion", "flap").out == f"{card('lion').bibtex()}\n\n{card('flap').bibtex()}\n"
    answer = run("cite", "lion", "flapp")
    assert (answer.code, answer.out) == (2, "")


def test_info_as_json():
    import torch

    found = json.loads(run("info", "--json").out)
    assert found["shoestring"] == shoestring.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0] == {"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    assert {"text", "diffusion", "ray", "app", "dev", "all"} <= set(found["extras"])
    # What is installed is what can be imported.
    missing = [name for name in ("diffusers", "peft") if not find_spec(name)]
    diffusion = found["extras"]["diffusion"]
    assert [name for name in diffusion["missing"] if name != "transformers"] == missing
    assert diffusion["install"] == "pip install 'shoestring[diffusion]'"


def test_info_tells_absent_and_old_packages_from_installed_ones():
    from packaging.requirements import Requirement

    from shoestring.cli import info

    here = Requirement("rich>=1")
    absent = Requirement("shoestring-no-such-package>=1")
    old = Requirement("rich>=9999")
    assert info.extra("x", [here])["installed"] is True
    state = info.extra("x", [here, absent, old])
    assert state["installed"] is False
    assert state["missing"][0] == "shoestring-no-such-package"
    assert state["missing"][1].startswith("rich >=9999 (found ")
    assert state["install"] == "pip install 'shoestring[x]'"


def test_info_lines_of_missing_extras(monkeypatch):
    from shoestring.cli import info

    monkeypatch.setattr(info, "version", lambda name: None)
    out = run("info").out
    assert "pip install 'shoestring[text]'" in out
    assert "pip install 'shoestring[app]'" in out
    assert "\ntorch         missing\n" in out
    # The core's own packages are not counted among an extra's.
    assert json.loads(run("info", "--json").out)["extras"]["app"]["missing"] == ["jinja2", "matplotlib"]


def test_info_from_a_folder():
    """Not installed: no metadata, so no extras, but still an answer; and without torch."""
    code = """
import sys
from importlib import metadata
real = metadata.distribution
def distribution(name):
    if name == "shoestring":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
sys.modules["torch"] = None
from shoestring.cli import app
app(["info"])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"shoestring    {shoestring.__version__}\n" in out
    assert "extras: unknown, since shoestring is not installed as a package" in out
    assert "torch does not load" in out


# claim ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """A catalogue of three methods: toy, whose claim runs; broken, whose claim fails; one that is planned."""

    def method(slug, status="ready", room="learn"):
        text = dict.fromkeys(("venue", "arxiv", "note"), "")
        return Card(
            slug, slug.title(), "Nobody", 2020, text["venue"], text["arxiv"], room,
            (f"shoestring.{room}.{slug}:Name",), (), (), "does nothing", status, text["note"],
        )  # fmt: skip

    cards = {c.slug: c for c in (method("toy"), method("broken"), method("later", "planned", "guide"))}
    monkeypatch.setattr(catalogue, "_cards", lambda: cards)
    monkeypatch.setattr(claims, "PIECES", {})

    def measure(fast, progress, seeds=None):
        print("a library that prints")
        progress(0.5, "half")
        figures = [0.5, 1.0] if seeds is None else [0.75] * seeds
        rows = [
            Row.of("toy", "accuracy", figures, setting="quiet", paper=0.8),
            Row.of("ridge", "seconds", [12345.6], setting="quiet"),
        ]
        return Result("toy", "toy is good", "holds if toy is above 0.5", rows, "none")

    def verdict(rows):
        return "holds" if claims.find(rows, "toy", "accuracy", "quiet").value > 0.5 else "partly"

    def fail(fast, progress, seeds=None):
        raise RuntimeError("two\nlines")

    for name, run_claim in (("toy", measure), ("broken", fail)):
        module = ModuleType(f"shoestring.claims.learn.{name}")
        module.run, module.verdict = run_claim, verdict
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return cards


def test_claim_prints_and_writes_the_result(toy, tmp_path):
    answer = run("claim", "toy", "--out", tmp_path / "new" / "folder")
    assert answer.code == 0
    written = load_result(tmp_path / "new" / "folder" / "toy.json")
    assert written.verdict == "holds"
    assert written.value("toy", "accuracy", "quiet") == 0.75
    lines = answer.out.splitlines()
    assert lines[0] == "toy: Toy"
    assert lines[1].split() == ["method", "setting", "metric", "value", "paper"]  # no unit anywhere
    assert lines[2].split("  ")[0] == "toy"
    assert "0.75 ± 0.25" in lines[2]
    assert lines[3].split() == ["ridge", "quiet", "seconds", "12,346"]
    assert "verdict  holds" in lines
    assert "rule     holds if toy is above 0.5" in lines
    assert f"written to {tmp_path / 'new' / 'folder' / 'toy.json'}" in lines
    assert "a library that prints" not in answer.out


def test_claim_writes_into_claims_results_by_default(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("claim", "toy").code == 0
    assert [str(p) for p in Path().rglob("*.json")] == ["claims-results/toy.json"]


def test_claim_options_reach_the_claim(toy, tmp_path):
    answer = run("claim", "toy", "--fast", "--seeds", 3, "--out", tmp_path, "--json")
    (result,) = json.loads(answer.out)
    assert result == json.loads((tmp_path / "toy.json").read_text())
    assert result["fast"] is True
    assert result["rows"][0]["seeds"] == [0.75] * 3
    assert "fast form: it counts for nothing" in run("claim", "toy", "--fast", "--out", tmp_path).out


@pytest.mark.parametrize("name", ["all", "learn"])
def test_a_failing_claim_does_not_stop_the_others(toy, tmp_path, name):
    # broken comes first
    order = {"broken": toy["broken"], "toy": toy["toy"], "later": toy["later"]}
    toy.clear()
    toy.update(order)
    answer = run("claim", name, "toy", "--out", tmp_path, "--json")
    assert answer.code == 1
    assert [result["slug"] for result in json.loads(answer.out)] == ["toy"]
    assert "error: broken: two lines\n" in answer.err
    assert "Traceback" not in answer.err
    assert "later" not in answer.err
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]
    assert "Traceback" in run("claim", name, "--out", tmp_path, "--debug").err


def test_claim_of_planned_methods(toy, tmp_path):
    answer = run("claim", "later", "--out", tmp_path)
    assert (answer.code, answer.out) == (1, "")
    assert "later is planned" in answer.err
    answer = run("claim", "guide", "--out", tmp_path)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == "error: nothing to measure: all methods of guide are planned\n"


def test_claim_refuses_before_it_runs(toy, tmp_path):
    (tmp_path / "file").touch()
    answer = run("claim", "toy", "--out", tmp_path / "file")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == f"error: {tmp_path / 'file'}: File exists\n"
    assert run("claim", "toy", "--seeds", 0).code == 2
    assert run("claim", "toy", "--seeds", "two").code == 2
    assert run("claim", "toy", "lern").err.startswith(
        "error: slug, room or all: 'lern' is unknown; did you mean 'learn'?"
    )


# The frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_examples_that_work(verb):
    answer = run(verb, "--help")
    assert (answer.code, answer.err) == (0, "")
    examples = [line.strip() for line in answer.out.splitlines() if line.startswith(f"    shoestring {verb}")]
    assert "  Examples:\n" in answer.out
    assert examples
    if verb in HARMLESS:
        for example in examples:
            assert run(*example.split(" >> ")[0].split()[1:]).code == 0


def test_help_lists_every_verb():
    answer = run("--help")
    assert (answer.code, answer.err) == (0, "")
    listed = answer.out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in listed if line[2:3] != " "] == [*VERBS]
    assert run().out == answer.out


def test_version():
    assert run("--version").out == f"shoestring {shoestring.__version__}\n"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["lst"], "did you mean 'list'? (try 'shoestring --help')"),
        (["list", "--rom", "learn"], "(try 'shoestring list --help')"),
        (["--nothing"], "(try 'shoestring --help')"),
        (["show"], "(try 'shoestring show --help')"),
        (["show", "lion", "flap"], "(try 'shoestring show --help')"),
        (["list", "--room"], "(try 'shoestring list --help')"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(args, hint):
    answer = run(*args)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.endswith(f"{hint}\n")
    assert answer.err.count("\n") == 1


BAD_INPUT = [
    (ValueError("gamma must be > 0,\n got -1"), "gamma must be > 0, got -1"),
    (TypeError("X must be an array"), "X must be an array"),
    (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
    (FileNotFoundError("no folder 'a'"), "no folder 'a'"),
    (ImportError("pip install 'shoestring[text]'"), "pip install 'shoestring[text]'"),
    (FloatingPointError("the loss is nan"), "the loss is nan"),
    (MemoryError(), "MemoryError"),
    (ValueError("file \x1b[31mred\x07"), "file \\x1b[31mred\\x07"),
]


@pytest.mark.parametrize(("error", "line"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_1(monkeypatch, error, line):
    from shoestring.cli import cite

    def fail(slug):
        raise error

    monkeypatch.setattr(cite, "card", fail)
    monkeypatch.setattr(cite, "bad_usage", nullcontext)  # which makes an error of usage of every ValueError
    answer = run("cite", "lion")
    assert (answer.code, answer.out, answer.err) == (1, "", f"error: {line}\n")
    for shown in (
        run("cite", "lion", "--debug"),
        run("--debug", "cite", "lion"),
        run("cite", "lion", SHOESTRING_DEBUG="1"),
    ):
        assert shown.code == 1
        assert shown.err.startswith("Traceback (most recent call last):\n")
        assert shown.err.endswith(f"error: {line}\n")
    assert "Traceback" not in run("cite", "lion", SHOESTRING_DEBUG="0").err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    from shoestring.cli import cite

    def fail(slug):
        raise AssertionError("ours")

    monkeypatch.setattr(cite, "card", fail)
    with pytest.raises(AssertionError, match="ours"):
        run("cite", "lion")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()])
def test_interrupted(monkeypatch, error):
    from shoestring.cli import cite

    def fail(slug):
        raise error

    monkeypatch.setattr(cite, "card", fail)
    answer = run("cite", "lion")
    assert (answer.code, answer.out, answer.err) == (130, "", "interrupted\n")


def test_ctrl_c(tmp_path):
    """A real signal, in the middle of a claim; what was written before stays."""
    code = f"""
import sys, time
from types import ModuleType
from shoestring import catalogue
from shoestring.claims import Result, Row
cards = {{
    slug: catalogue.Card(
        slug, "T", "N", 2020, "", "", "learn", (f"shoestring.learn.{{slug}}:N",), (), (), "s", "ready", ""
    )
    for slug in ("quick", "slow")
}}
catalogue._cards = lambda: cards
def run(slug):
    def measure(fast, progress, seeds=None):
        if slug == "slow":
            print("sleeping", file=sys.stderr, flush=True)
            time.sleep(60)
        return Result(slug, "c", "r", [Row("m", "a", 1.0)], "d")
    return measure
for slug in cards:
    module = ModuleType(f"shoestring.claims.learn.{{slug}}")
    module.run, module.verdict = run(slug), lambda rows: "holds"
    sys.modules[module.__name__] = module
from shoestring.cli import app
app(["claim", "all", "--out", {str(tmp_path)!r}, "--json"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr.readline() == "sleeping\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["quick.json"]


@pytest.mark.parametrize("args", [["list"], ["list", "--json"], ["show", "lion"]])  # more and less than the buffer
def test_broken_pipe_is_silent(args):
    process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_colour_only_where_it_is_wanted():
    code, coloured = on_terminal("list", "--room", "learn")
    assert code == 0
    assert "\x1b[1mmethod" in coloured
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        for args in (["list"], ["show", "g-acil"], ["--help"], ["show", "flapp"]):
            assert "\x1b" not in on_terminal(*args, **env)[1]
    for env in ({}, {"FORCE_COLOR": "1"}):
        out = subprocess.run([*COMMAND, "list"], capture_output=True, text=True, env=environment(**env)).stdout
        assert "\x1b" not in out
        assert rows_of(out) == rows_of(run("list").out)


def test_a_terminal_dims_what_is_planned():
    code = """
from dataclasses import replace
from shoestring import catalogue
two = {
    slug: replace(catalogue.card(slug), status=status) for slug, status in (("lion", "ready"), ("flap", "planned"))
}
catalogue._cards = lambda: two
from shoestring.cli import app
app(["list"])
"""
    _, sent = on_terminal(command=[sys.executable, "-c", code])
    lines = sent.splitlines()
    assert "\x1b[1mmethod" in lines[0]
    assert next(line for line in lines if "lion" in line).startswith("lion ")
    assert next(line for line in lines if "flap" in line).startswith("\x1b[2mflap")


def test_a_terminal_gets_the_text_as_it_is():
    text = "[bold]x[/bold] :smile: 'a' 12 [/] \\[y]"
    code = f"""
from shoestring.cli._console import print_fields, print_table, say
print_table(["name"], [[{text!r}]])
print_fields({{"name": {text!r}}})
say({text!r}, style="italic")
"""
    _, sent = on_terminal(command=[sys.executable, "-c", code])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", sent).splitlines()
    assert [line.strip() for line in plain] == ["name", text, f"name  {text}", text]


def test_a_terminal_breaks_cells_but_no_slug():
    for width in ("60", "80", "120"):
        out = on_terminal("list", NO_COLOR="1", COLUMNS=width)[1].replace("\r\n", "\n")
        table = out.split("\n\n")[0].splitlines()
        assert max(map(len, table)) <= int(width)
        first = [line.split(" ")[0] for line in table[1:]]
        assert [slug for slug in first if slug] == list_methods()
        assert (" without " in table[0]) == (int(width) >= 100)


def test_ascii_terminals_get_an_answer():
    authors = next(c for c in map(card, list_methods()) if not c.authors.isascii())
    answer = subprocess.run(
        [*COMMAND, "show", authors.slug], capture_output=True, env=environment(PYTHONIOENCODING="ascii")
    )
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert b"?" in answer.stdout


def test_progress_is_shown_on_a_terminal_and_goes_away():
    code = """
import time
from shoestring.cli._console import progress
with progress("toy [1/2]") as report:
    report(None, "reading")
    report(0.5, "half [of] it")
    time.sleep(0.6)
    print("result")
"""
    env = environment(TERM="xterm", COLUMNS="120")
    script = [sys.executable, "-c", code]
    silent = subprocess.run(script, capture_output=True, text=True, env=env)
    assert (silent.stdout, silent.stderr) == ("result\n", "")
    master, slave = pty.openpty()
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=slave, env=env)
    os.close(slave)
    assert process.stdout.read() == b"result\n"  # never on stderr
    process.wait()
    sent = os.read(master, 65536).decode()
    os.close(master)
    assert "toy [1/2]" in sent
    assert "50%" in sent
    assert "half [of] it" in sent
    assert sent.rstrip().endswith("\x1b[2K")  # the last act: the line is wiped


def test_what_the_verbs_import():
    """`list` must answer in 0.3 s (benchmarks/startup.py): nothing heavy, and nothing that it does not need."""
    code = """
import sys
from shoestring.cli import app
try:
    app(sys.argv[1:])
except SystemExit:
    heavy = {"torch", "numpy", "scipy", "sklearn", "datasets", "rich", "pydantic", "shoestring.claims"}
    print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    for args in (
        ["list"],
        ["list", "--room", "learn", "--json"],
        ["cite", "lion"],
        *(["show", c.slug] for c in map(card, list_methods()[-1:]) if c.status == "planned"),
        ["--version"],
        ["--help"],
        ["list", "--rom"],
    ):
        answer = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert answer.stderr.splitlines()[-1] == "[]", args


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("shoestring sh", ["show"]),
        ("shoestring show fla", ["flap", "flat-mtl"]),
        ("shoestring list --without lab", ["labels"]),
        ("shoestring list --room comp", ["compress"]),
        ("shoestring claim al", ["all", "all-but-one", "allora"]),
    ],
)
def test_the_shell_completes(line, completed):
    env = environment(_SHOESTRING_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    out = subprocess.run(COMMAND, capture_output=True, text=True, env=env).stdout
    assert sorted(out.split()) == completed
