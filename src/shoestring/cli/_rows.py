"""What learn, predict and forget share: a data set to chunks of features, with a bar, and what was skipped."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console

if TYPE_CHECKING:
    import numpy as np

    from shoestring.data.features import Chunk, Columns
    from shoestring.learn._state import State as Kept

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
On = Annotated[
    str | None, typer.Option("--on", metavar="ray", help="Work on all cores, or on all of a cluster, through Ray.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="Of a running Ray cluster; by default this machine."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that does not decode.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute, as torch names it: cpu, cuda, ...")]


class Rows:
    """A data set opened for a learner; counts what it gave and what it skipped.

    Parameters
    ----------
    data, split, content, label : as the options above
    backbone : name of the encoder, or None for the default where one is needed
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
        self.rows = rows
        self.backbone_name = (
            None if self.columns.kind == "features" else backbone or default_backbone(self.columns.kind)
        )
        self.device, self.strict, self.title = device, strict, data
        self.skipped: list[tuple[str, str]] = []
        self.seconds = 0.0

    def chunks(
        self,
        size: int,
        report: Any,
        *,
        first: int = 0,
        count: int | None = None,
        shuffle: int | None = None,
        known: Callable[[np.ndarray], bool] | None = None,
    ) -> Iterator[Chunk]:
        """Chunks that hold at least one row; ``report(done, text)`` moves the bar.

        Parameters
        ----------
        first, count : only so many rows from this one on; by default all
        shuffle : seed of the order, or None for the order of the data set
        known : as `shoestring.data.features.chunks`
        """
        from shoestring import backbones
        from shoestring.data.features import chunks

        report(None, "loading the backbone" if self.backbone_name else "")
        backbone = backbones.load(self.backbone_name, device=self.device) if self.backbone_name else None
        start, done, total = time.perf_counter(), 0, len(self.rows) - first if count is None else count
        rows = self.rows
        if shuffle is not None:
            from shoestring.learn._ledger import shuffled

            rows = rows.select(first + shuffled(total, shuffle))
        elif total < len(rows):
            rows = rows.select(range(first, first + total))

        def passed(hashes: np.ndarray) -> bool:
            nonlocal done
            left_out = known is not None and known(hashes)
            done += len(hashes) if left_out else 0
            return left_out

        asked = None if known is None else passed
        for chunk in chunks(rows, self.columns, backbone, size=size, strict=self.strict, known=asked):
            self.skipped += chunk.skipped
            if len(chunk.names):
                yield chunk
            done += len(chunk.names) + len(chunk.skipped)
            self.seconds = time.perf_counter() - start
            report(done / total, f"{done:,} of {total:,} rows, {done / self.seconds:,.0f} rows/s")

    def hashes(self, report: Any) -> np.ndarray:
        """What each row holds, in the order of the data set: (n, 16), without the backbone."""
        import numpy as np

        from shoestring.data.features import row_hashes

        parts, done = [np.empty((0, 16), np.uint8)], 0
        for part in row_hashes(self.rows, self.columns):
            parts.append(part)
            done += len(part)
            report(done / len(self.rows), f"looking for rows that are known: {done:,} of {len(self.rows):,}")
        return np.concatenate(parts)

    def print_skipped(self) -> None:
        """Name on stderr what could not be read."""
        for name, reason in self.skipped[:20]:
            typer.echo(f"skipped {name}: {reason}", err=True)
        if len(self.skipped) > 20:
            typer.echo(f"... and {len(self.skipped) - 20} more", err=True)


def open_state(folder: Path) -> Kept:
    """The learner of a folder; what is wrong with newer snapshots goes to stderr."""
    from shoestring.learn import _state

    state = _state.open_state(folder)
    for what in state.damaged:
        typer.echo(f"warning: {what}; the snapshot before it is used", err=True)
    return state


def check_on(on: str | None, address: str | None) -> None:
    if on not in (None, "ray"):
        raise _console.UsageError(f"--on must be ray, got {on!r}")
    if address is not None and on is None:
        raise _console.UsageError("--address needs --on ray")


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
