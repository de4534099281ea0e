"""How the models of the zoo were trained: ``python -m shoestring.zoo.train NAME [--smoke]``.

A script is a module of its own, ``shoestring/zoo/train/tiny_gpt.py`` for ``tiny-gpt``, with

- ``WHAT``, ``DATA``, ``LICENCE`` (texts of the card) and ``SEED``;
- ``train(out, *, smoke, device, checkpoint, progress) -> dict``: trains, writes the parts under `out` in half
  precision by ``save_pretrained``, returns what the card says of it (``steps`` at least);
- ``quality(load, *, fast, progress) -> dict[str, float]``: measures what ``load(part)`` gives, on data that were not
  trained on; `fast` on less of them, in seconds;
- ``sheet(load) -> PIL.Image``, for models that make images or captions: samples to look at.

Seeds are fixed, checkpoints resume, and the same script runs on a GPU with ``--device cuda``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from shoestring import zoo

__all__ = ["script", "train_model"]


def script(name: str) -> ModuleType:
    """The training script of a model."""
    zoo._check_name(name)
    return importlib.import_module(f"shoestring.zoo.train.{name.replace('-', '_')}")


def train_model(
    name: str,
    out: str | os.PathLike[str],
    *,
    smoke: bool = False,
    device: str = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, object]:
    """Train a model of the zoo, measure it, and put it with its card into the folder `out`.

    Parameters
    ----------
    name : str
    out : path
        Replaced as a whole at the end; if anything fails before, it is as it was.
    smoke : bool, default=False
        A few steps, in seconds: shows that the script runs. The figures count for nothing.
    device : str, default="cpu"
    checkpoint : path, default=None
        Folder from which an interrupted training goes on.
    progress : bool, default=None
        Bars on stderr. None: on a terminal.

    Returns
    -------
    dict
        The card.
    """
    module, out = script(name), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        start = time.perf_counter()
        told = module.train(
            fresh,
            smoke=smoke,
            device=device,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )
        seconds = time.perf_counter() - start
        files = sorted(file for file in fresh.rglob("*") if file.is_file())
        card: dict[str, object] = {"name": name, "what": module.WHAT, "data": module.DATA, "licence": module.LICENCE}
        card |= {"seed": module.SEED, "smoke": smoke, "seconds": round(seconds), **told}
        card["bytes"] = sum(file.stat().st_size for file in files)
        card["files"] = {file.relative_to(fresh).as_posix(): _sha256(file) for file in files}
        card["machine"] = f"{platform.machine()}, {device}, {torch.get_num_threads()} threads"
        card["versions"] = {package: version(package) for package in ("torch", "transformers", "diffusers")}
        _write_card(fresh, card)

        def load(part: str = "model"):  # type: ignore[no-untyped-def]
            return zoo.load_from(fresh, name, part, device=device)

        card["quality_fast"] = module.quality(load, fast=True, progress=progress)
        card["quality"] = card["quality_fast"] if smoke else module.quality(load, fast=False, progress=progress)
        _write_card(fresh, card)
        _replace(fresh, out)
        return card
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_card(folder: Path, card: dict[str, object]) -> None:
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _replace(fresh: Path, out: Path) -> None:
    """Two renames, as no system replaces a full folder in one: in between there is none, never a half."""
    for file in (fresh, *fresh.rglob("*")):  # mkdtemp and safetensors let only the owner read
        file.chmod(0o755 if file.is_dir() else 0o644)
    old = fresh.with_name(fresh.name + ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)
