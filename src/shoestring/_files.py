"""Files that are either the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace a file in one move: write to the path given, and it becomes `path` when the block ends well.

    Parameters
    ----------
    path : str or path-like
        The file to create or replace. Its folder must exist; a symbolic link is followed, not replaced.

    Yields
    ------
    pathlib.Path
        A name of its own in the same folder, with the same suffix (some writers append a missing one). The
        block creates this file. It is then flushed to the disk and renamed over `path`. If the block raises,
        it is removed and `path` stays as it was.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist, or if the block wrote nothing.
    IsADirectoryError
        If `path` is a folder.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder of {target} does not exist: create {target.parent} first")
    temporary = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(8)}{target.suffix}")
    # The user's umask decides a new file's mode; some writers (safetensors) would make it 0600.
    temporary.touch()
    mode = (target if target.exists() else temporary).stat().st_mode
    temporary.unlink()
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written to {temporary}, which was to become {target}")
        temporary.chmod(stat.S_IMODE(mode))
        _flush_to_disk(temporary)
        os.replace(temporary, target)
        _flush_to_disk(target.parent)  # without this a power cut can still undo the rename
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(work: Path, out: Path) -> None:
    """Move a finished folder to its place in one step: everything on the disk first, modes as the umask has them.

    Raises
    ------
    FileExistsError
        If `out` has come into being meanwhile: it is not touched, and `work` stays.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in [*work.rglob("*"), work]:
        if path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors makes them 0600
        _flush_to_disk(path)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} has come into being meanwhile")
    os.rename(work, out)
    _flush_to_disk(out.absolute().parent)


def _flush_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
