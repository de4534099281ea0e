"""The README shows only what works, and its figures are the recorded ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.cli import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_commands_exist():
    used = re.findall(r"^(?:\$ )?shoestring ([a-z]+)|`shoestring ([a-z]+)", README, re.MULTILINE)
    assert {a or b for a, b in used} <= set(VERBS)
    targets = set(re.findall(r"`make ([a-z]+)`", README))
    assert targets
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_figures_are_the_recorded_ones():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "figures.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
