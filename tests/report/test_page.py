"""Pages hold what they were given, escaped, and need nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from shoestring.report import Section, bars, curves, write_page


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tag, self.cells = "", []

    def handle_starttag(self, tag, attrs):
        self.tag = tag

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.cells.append(data)

    def handle_endtag(self, tag):
        self.tag = ""


def test_page_is_self_contained_and_escapes(tmp_path):
    svg = curves({"ours <1>": ([1, 2], [0.5, 0.75])}, x_label="rows", y_label="accuracy", level=("bound", 0.8))
    section = Section("<b>", ["a & b"], ["method", "value"], [["<script>alert(1)</script>", "1"]], svg=svg)
    write_page(tmp_path / "r.html", "Title", "lead", [section], footer="made here")
    page = (tmp_path / "r.html").read_text()
    parser = Cells()
    parser.feed(page)
    assert parser.cells == ["method", "value", "<script>alert(1)</script>", "1"]
    assert "<script" not in page
    assert "a &amp; b" in page
    assert not re.search(r'(?:src|href)="(?!#)', page.replace('xlink:href="#', ""))
    assert page.count("<svg") == 1


def test_curves_are_drawn_to_scale_and_repeatable(tmp_path):
    lines = {"a": ([0, 10], [0.0, 1.0]), "b": ([0, 10], [1.0, 0.0])}
    first = curves(lines, x_label="x", y_label="y", png=tmp_path / "p.png")
    assert first == curves(lines, x_label="x", y_label="y")
    paths = re.findall(r'<path d="M ([\d. LM\n-]+)" clip-path', first)
    (ax, ay), (bx, by) = (tuple(map(float, p.split("L")[0].split())) for p in paths[:2])
    assert ax == pytest.approx(bx)
    assert ay > by  # SVG counts downwards: 0.0 is below 1.0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_bars_are_as_long_as_their_values(tmp_path):
    from PIL import Image

    values = {"ours": (80.0, 2.0), "theirs": (40.0, 0.0)}
    bars(values, x_label="accuracy, %", title="t", stressed=["ours"], png=tmp_path / "b.png")
    pixels = Image.open(tmp_path / "b.png").convert("RGB")
    wide = {}
    for name, colour in (("ours", (0x0B, 0x6E, 0x4F)), ("theirs", (0x9A, 0xA3, 0xAD))):
        found = [x for y in range(pixels.height) for x in range(pixels.width) if pixels.getpixel((x, y)) == colour]
        wide[name] = max(found) - min(found)
    assert wide["ours"] / wide["theirs"] == pytest.approx(2, abs=0.05)
