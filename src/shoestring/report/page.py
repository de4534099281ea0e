"""One HTML file out of sections of text, tables and SVG pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoestring import __version__
from shoestring._files import atomic_path

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667; --line: #d8dce2; --page: #fff; --mark: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #3a4048; --page: #15181c; --mark: #5cc9a0; }
  svg { background: #fff; border-radius: 6px; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 52rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; }
.lead { color: var(--soft); font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { text-align: right; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); }
tr.mark td { font-weight: 600; color: var(--mark); }
svg { max-width: 100%; height: auto; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); }
footer { color: var(--soft); font-size: .85rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for paragraph in section.text %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.header %}<div class="scroll"><table>
<thead><tr>{% for cell in section.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}<tr{% if row[0] == section.mark %} class="mark"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if section.svg %}<figure role="img" aria-label="{{ section.title }}">{{ section.svg | safe }}</figure>
{% endif %}
{% endfor %}
<footer>shoestring {{ version }}. {{ footer }}</footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, and perhaps a table and a picture.

    Attributes
    ----------
    title : heading
    text : paragraphs
    header, rows : the table's cells, as they shall read
    mark : first cell of the row to stress
    svg : a picture, as `curves` makes one
    """

    title: str
    text: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    mark: str = ""
    svg: str = ""


def write_page(
    path: str | os.PathLike[str], title: str, lead: str, sections: Sequence[Section], footer: str = ""
) -> None:
    """Write the page, atomically. It needs nothing beside it: no file, no network.

    Raises
    ------
    ImportError
        If Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ModuleNotFoundError:
        raise ImportError("pages need Jinja2: pip install 'shoestring[app]'") from None
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE)
    page = template.render(title=title, lead=lead, sections=sections, footer=footer, version=__version__)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    steps: Sequence[float] = (),
    level: tuple[str, float] | None = None,
    png: str | os.PathLike[str] | None = None,
) -> str:
    """Draw lines (name -> xs, ys), the first one stressed, and return the picture as SVG.

    Parameters
    ----------
    lines : name -> (xs, ys)
    x_label, y_label : of the axes
    steps : xs of vertical marks, such as ends of tasks
    level : name and y of a horizontal mark, such as an upper bound
    png : also write the picture here

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    figure = _figure(8, 4.2)
    import matplotlib

    colours = ("#0b6e4f", "#b5542a", "#4c5faf", "#8a6d1a", "#7a3b73", "#2b8aa3", "#c23b5a", "#667")
    axes = figure.subplots()
    for x in steps:
        axes.axvline(x, color="#d8dce2", linewidth=1, zorder=0)
    if level is not None:
        axes.axhline(level[1], color="#667", linewidth=1, linestyle="--", zorder=1, label=level[0])
    for (name, (xs, ys)), colour in zip(lines.items(), colours * len(lines), strict=False):
        first = name == next(iter(lines))
        axes.plot(xs, ys, color=colour, linewidth=2.4 if first else 1.5, marker="o", markersize=3, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)  # rows, tasks, steps
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    if png is not None:
        with atomic_path(Path(png)) as temporary:
            figure.savefig(temporary, dpi=144)
    text = io.StringIO()
    # a fixed salt and no date: the same figures give the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "shoestring", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1].strip()  # without the XML declaration and doctype


def bars(
    values: Mapping[str, tuple[float, float]],
    *,
    x_label: str,
    title: str,
    stressed: Collection[str],
    png: str | os.PathLike[str],
) -> None:
    """Draw shares (name -> per cent, spread) as bars, the first on top, and write the picture.

    Parameters
    ----------
    values : name -> (value, spread), 0 to 100
    x_label, title : of the picture
    stressed : names whose bars are coloured; the others are grey
    png : file to write

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    figure = _figure(7, 0.9 + 0.45 * len(values))
    axes = figure.subplots()
    names = [*values][::-1]
    heights, spreads = zip(*(values[name] for name in names), strict=True)
    colours = ["#0b6e4f" if name in stressed else "#9aa3ad" for name in names]
    axes.barh(names, heights, xerr=spreads, color=colours, ecolor="#1b1f24", capsize=3)
    for row, value in enumerate(heights):
        axes.text(1, row, f"{value:.1f}", va="center", color="white")
    axes.set_xlim(0, 100)
    axes.set_xlabel(x_label)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(Path(png)) as temporary:
        figure.savefig(temporary, dpi=144, format="png")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("plots need matplotlib: pip install 'shoestring[app]'") from None
    return Figure(figsize=(width, height), layout="constrained")
