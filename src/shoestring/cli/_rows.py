"""What learn, predict and forget share: a data set to chunks of features, with a bar, and what was skipped."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console

if TYPE_CHECKING:
    from shoestring.data.features import Chunk, Columns

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help="A folder of images (one folder a class), an .npz file with arrays X and y, a .parquet, .csv or .jsonl "
        "file, a bundle (fashion, emoji, ...), or a data set on the Hugging Face hub.",
    ),
]
State = Annotated[
    Path, typer.Option("--state", metavar="DIR", show_default=False, help="Folder in which the learner is kept.")
]
Split = Annotated[str, typer.Option("--split", help='Which split, or a slice: "train[:1000]".')]
Label = Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="Label column, if it cannot be guessed.")]
Content = Annotated[
    str | None, typer.Option("--column", metavar="COLUMN", help="Column of images, features or texts, likewise.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the CSV here.", show_default="standard output")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that does not decode.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute, as torch names it: cpu, cuda, ...")]


class Rows:
    """A data set opened for a learner; counts what it gave and what it skipped.

    Parameters
    ----------
    data, split, content, label : as the options above
    backbone : name of the encoder, or None for the default where one is needed
    shuffle : seed of the order, or None for the order of the data set
    loaded : the data set itself, if it has been loaded already
    """

    def __init__(
        self,
        data: str,
        split: str,
        *,
        content: str | None = None,
        label: str | None = None,
        need_label: bool = True,
        backbone: str | None = None,
        shuffle: int | None = None,
        strict: bool = False,
        device: str = "cpu",
        loaded: Any = None,
    ) -> None:
        from shoestring.data import load
        from shoestring.data.features import find_columns

        rows: Any = load(data, split=split) if loaded is None else loaded
        self.columns: Columns = find_columns(rows, content, label)
        if need_label and self.columns.label is None:
            raise ValueError(
                f"{data} has no label column: columns are {', '.join(rows.features)}; name it with --label, or give "
                "images in one folder a class"
            )
        self.rows = rows if shuffle is None else rows.shuffle(seed=shuffle)
        self.backbone_name = (
            None if self.columns.kind == "features" else backbone or default_backbone(self.columns.kind)
        )
        self.device, self.strict, self.title = device, strict, data
        self.skipped: list[tuple[str, str]] = []
        self.seconds = 0.0

    def chunks(self, size: int, report: Any) -> Iterator[Chunk]:
        """Chunks that hold at least one row; ``report(done, text)`` moves the bar."""
        from shoestring import backbones
        from shoestring.data.features import chunks

        report(None, "loading the backbone" if self.backbone_name else "")
        backbone = backbones.load(self.backbone_name, device=self.device) if self.backbone_name else None
        start, done = time.perf_counter(), 0
        for chunk in chunks(self.rows, self.columns, backbone, size=size, strict=self.strict):
            self.skipped += chunk.skipped
            if len(chunk.names):
                yield chunk
            done += len(chunk.names) + len(chunk.skipped)
            self.seconds = time.perf_counter() - start
            report(done / len(self.rows), f"{done:,} of {len(self.rows):,} rows, {done / self.seconds:,.0f} rows/s")

    def print_skipped(self) -> None:
        """Name on stderr what could not be read."""
        for name, reason in self.skipped[:20]:
            typer.echo(f"skipped {name}: {reason}", err=True)
        if len(self.skipped) > 20:
            typer.echo(f"... and {len(self.skipped) - 20} more", err=True)


def default_backbone(kind: str) -> str:
    from shoestring import backbones

    return backbones.DEFAULT if kind == "image" else "minilm"


def write_labels(found: list[dict[str, Any]], out: Path | None) -> None:
    """CSV of name, label and probability: to the file, whole or not at all, or to stdout."""
    from shoestring._files import atomic_path

    def write(file: Any) -> None:
        writer = csv.DictWriter(file, ["name", "label", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)

    if out is None:
        write(sys.stdout)
        return
    with atomic_path(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        write(file)


def print_classes(classes: dict[Any, dict[str, Any]]) -> None:
    """One line a class: label -> column -> figure."""
    headers = ["class", *next(iter(classes.values()))]

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    rows = [[str(name), *map(cell, figures.values())] for name, figures in classes.items()]
    _console.print_table(headers, rows, right=range(1, len(headers)))
