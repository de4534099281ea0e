"""``python -m shoestring.zoo.train NAME``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoestring import zoo
from shoestring.zoo.train import train_model


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(sorted(zoo._PARTS))}.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps only, in seconds.")] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the model; by default zoo-models/NAME.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Folder to save to and to go on from; by default OUT.checkpoint."),
    ] = None,
) -> None:
    """Train a model of the zoo again and measure it. Interrupted, the same command goes on."""
    out = out or Path("zoo-models") / name
    checkpoint = checkpoint or (None if smoke else out.with_name(out.name + ".checkpoint"))
    card = train_model(name, out, smoke=smoke, device=device, checkpoint=checkpoint)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    typer.run(main)
