"""What an evaluation of unlearning gives back: a table, and a plot of forget against retain."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoestring._files import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "model": "model",
    "forget_loss": "forget loss",
    "forget_accuracy": "forget accuracy",
    "retain_loss": "retain loss",
    "retain_change": "retain change",
    "retain_accuracy": "retain accuracy",
    "forget_quality": "forget quality",
    "membership_auc": "membership AUC",
    "lira_auc": "LiRA-lite AUC",
    "lira_tpr": "TPR at 1 % FPR",
    "verbatim": "verbatim",
    "relearn_steps": "relearnt in",
    "finding": "finding",
}


@dataclass(frozen=True)
class Evaluation:
    """A row a model, and what they were measured with. Prints itself as a table.

    Attributes
    ----------
    rows : list of dict
        Keys of ``COLUMNS``; what could not be measured is not there. ``relearn_steps`` is None where the loss did not
        come back within ``settings["relearn_steps"]``.
    settings : dict
        Numbers of samples, the options, and ``first_time``: name -> (steps, what they are of).
    losses : dict
        model -> "forget", "retain", "holdout" -> ndarray (n,): for measures of your own; not in the JSON.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    losses: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict, repr=False)

    def row(self, model: str) -> dict[str, Any]:
        """The row of a model by name."""
        found = [row for row in self.rows if row["model"] == model]
        if not found:
            raise ValueError(f"model must be one of {[row['model'] for row in self.rows]}, got {model!r}")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Rows and settings as plain data."""
        return {"rows": self.rows, "settings": self.settings}

    def to_json(self) -> str:
        """Strict JSON of `to_dict`."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as they shall read; columns without a figure are left out."""
        used = [key for key in COLUMNS if any(key in row for row in self.rows)]
        return [COLUMNS[key] for key in used], [[self._cell(row, key) for key in used] for row in self.rows]

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        header, rows = self.cells()
        lines = [header, ["---"] * len(header), *rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def to_rich(self) -> Table:
        """A `rich.table.Table`."""
        from rich.table import Table
        from rich.text import Text

        header, rows = self.cells()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in (0, len(header) - 1) else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    def __str__(self) -> str:
        header, rows = self.cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [header, *rows])

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Forget against retain loss, a point a model, as SVG text; also written to `path` if it is given.

        Needs a retain set. Up and to the left is what one wants, no further up than the retrained model.
        """
        points = {r["model"]: (r["retain_loss"], r["forget_loss"]) for r in self.rows if "retain_loss" in r}
        if not points:
            raise ValueError("plot needs retain losses: give evaluate a retain set")
        svg = _scatter(points, "loss on what is kept", "loss on what is forgotten")
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(svg, encoding="utf-8")
        return svg

    def _cell(self, row: dict[str, Any], key: str) -> str:
        if key not in row:
            return ""
        value = row[key]
        if key == "relearn_steps":
            return f"> {self.settings['relearn_steps']}" if value is None else str(value)
        if not isinstance(value, float):
            return str(value)
        sign = "+" if key == "retain_change" else ""
        return f"{value:{sign}.2g}" if 0 < abs(value) < 0.01 else f"{value:{sign}.3f}"


def _scatter(points: Mapping[str, tuple[float, float]], x_label: str, y_label: str) -> str:
    """Named points as SVG, without a plotting library; the same points give the same text."""
    width, height, left, top, right, bottom = 640, 400, 70, 20, 170, 50
    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = (_axis([p[i] for p in points.values()]) for i in (0, 1))

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom)

    colours = {"original": "#667", "retrained": "#b5542a"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13" fill="#1b1f24">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for tick in x_ticks:
        parts.append(f'<path d="M{x(tick):.1f} {top}V{height - bottom}" stroke="#d8dce2"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        parts.append(f'<path d="M{left} {y(tick):.1f}H{width - right}" stroke="#d8dce2"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for name, (at_x, at_y) in points.items():
        colour = colours.get(name, "#0b6e4f")
        parts.append(f'<circle cx="{x(at_x):.1f}" cy="{y(at_y):.1f}" r="5" fill="{colour}"/>')
        place = f'x="{x(at_x) + 9:.1f}" y="{y(at_y) + 4:.1f}" fill="{colour}"'
        parts.append(f"<text {place}>{html.escape(name)}</text>")
    middle = (top + height - bottom) / 2
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">{x_label}</text>')
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends of an axis and its ticks: whole multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= spread / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    first, last = (first - 1, last + 1) if first == last else (first, last)
    return first * step, last * step, [float(f"{k * step:.12g}") for k in range(first, last + 1)]
