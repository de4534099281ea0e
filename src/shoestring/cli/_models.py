"""What compress, guide and forget share: where a model is, and the new folder that takes the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoestring._files import publish_folder


def of_the_zoo(name: str) -> bool:
    """Whether a model's name means one of the zoo; a folder of that name comes first."""
    from shoestring import zoo

    return name in zoo.names() and not Path(name).exists()


def place(name: str) -> str:
    """The folder of a model of the zoo; any other name, a folder or a hub id, as it is."""
    from shoestring import zoo

    return str(zoo.path(name)) if of_the_zoo(name) else name


def check_new(out: Path) -> None:
    """Raise unless `out` can become a new folder: not there yet or empty, in a folder that is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists already: nothing is overwritten, give a new folder")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"the folder of --out {out} does not exist: create {out.absolute().parent} first")


@contextmanager
def filled(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which is `out` once the block has ended well, and else is removed."""
    work = out.absolute().with_name(f".{out.name}.{os.getpid()}")
    try:
        yield work
        if out.exists():
            out.rmdir()
        publish_folder(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
