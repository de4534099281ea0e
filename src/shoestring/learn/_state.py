"""A learner kept in a folder, so that it can be neither lost nor half written.

``DIR/00000012.safetensors`` is the twelfth snapshot: one file that holds the learner as its ``save`` writes it and, in
the metadata, what was noted beside it and the ledger of what it was taught. So one step commits both:

1. a file in a hidden folder of the writer's own is written, sealed with a checksum, and flushed to the disk;
2. ``link`` gives it the next number. That fails if the number is taken: of two writers who began from the same
   snapshot, one is told `Conflict` and begins again from the other's. No lock is needed for that, and on network file
   systems a lock may do nothing; `locked` is there so that it rarely happens;
3. the folder is flushed. Now the commit is acknowledged, and whatever is killed, a reader finds this snapshot whole.

The newest `KEPT` snapshots stay. One that was damaged since is found by its checksum, and the one before is used.

Where a file system has no hard links, step 2 is a rename after a look that the number is free: there, two writers are
kept apart by the lock alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shoestring import __version__
from shoestring._files import _flush_to_disk
from shoestring.learn._ledger import Ledger, now

# method -> (module, class). A learner has ``save(path, extra)``, ``load(path)``, ``classes_``, ``class_count_`` and
# ``n_samples_seen_``. Its file is a safetensors file with JSON under "shoestring" in the metadata; "extra" is in that.
LEARNERS = {
    "g-acil": ("shoestring.learn.g_acil", "GACIL"),
    "fetril": ("shoestring.learn.fetril", "FeTrIL"),
    "teen": ("shoestring.learn.teen", "TEEN"),
    "dkvb": ("shoestring.learn.dkvb", "DKVBClassifier"),
}

OLD = "model.safetensors"  # the one file of a folder before there were numbers and checksums: number 0
KEPT = 3
_SNAPSHOT = re.compile(r"(\d{8,})\.safetensors")
_TEMPORARY = re.compile(r"\.\d{8,}\.(.*)-(\d+)\.[0-9a-f]{16}")  # as `commit` names them
_DAY = 86_400


class Conflict(Exception):
    """Somebody else has committed since this state was opened: nothing of it was saved."""


@dataclass
class State:
    """A learner and what is known of it.

    Attributes
    ----------
    folder : where it is kept
    method : which learner, a key of `LEARNERS`
    model : the learner
    notes : plain data, ``backbone`` and ``history`` among it
    ledger : what it was taught
    number : of the newest file in the folder; the next commit is the next number
    damaged : of newer snapshots that could not be used, what is wrong with them
    params : parameters of the learner, as its file tells them
    """

    folder: Path
    method: str
    model: Any
    notes: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    number: int = 0
    damaged: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)

    def check(self, **same: Any) -> None:
        """Raise ValueError unless these agree with the notes or the learner's parameters; None agrees with all."""
        known = {**self.params, **self.notes, "method": self.method}
        for name, wanted in same.items():
            if wanted is not None and wanted != known.get(name):
                raise ValueError(
                    f"{self.folder} was learnt with {name} = {known.get(name)!r}, not {wanted!r}; give another --state"
                )

    def note(self, what: str, **more: Any) -> None:
        """Add an entry to the history that the card shows."""
        self.notes.setdefault("history", []).append({"date": now(), "what": what, **more})


def exists(folder: Path) -> bool:
    """Whether a learner is kept there.

    Raises
    ------
    ValueError
        If the folder, or file, is there and is something else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; --state takes a folder")
    if _numbers(folder):
        return True
    visible = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if visible:
        shown = ", ".join(visible[:3]) + (", ..." if len(visible) > 3 else "")
        raise ValueError(f"no learner in {folder}, but other files ({shown}); give another --state, or an empty folder")
    return False


def open_state(folder: Path) -> State:
    """The learner of a folder, from the newest snapshot that is whole.

    Raises
    ------
    FileNotFoundError
        If there is no state in the folder.
    ValueError
        If no snapshot is whole, or the newest whole one is of a newer version or an unknown method.
    """
    for _ in range(10):
        if not exists(folder):
            raise FileNotFoundError(f"no learner in {folder}: `shoestring learn DATA --state {folder}` makes one")
        with suppress(FileNotFoundError):  # by then a writer had newer ones, and removed it
            return _open_newest(folder)
    raise ValueError(f"{folder}: its snapshots vanish faster than they can be read")


def commit(state: State) -> Path:
    """Save a state as the next snapshot of its folder. When this returns, it is on the disk.

    Raises
    ------
    Conflict
        If another writer was first.
    OSError
        If it could not be written (disk full, read-only, ...): the snapshots in the folder are as they were.
    """
    folder, number = state.folder, state.number + 1
    target = folder / _name(number)
    # A folder, because writers put temporary files of their own beside what they write, safetensors among them.
    room = folder / f".{number:08d}.{_here()}-{os.getpid()}.{secrets.token_hex(8)}"
    temporary, blank = room / target.name, secrets.token_hex(8)
    extra = {**state.notes, "method": state.method, "ledger": state.ledger.to_json(), "checksum": blank}
    try:
        try:
            room.mkdir(parents=True)
            state.model.save(temporary, extra=extra)
            _seal(temporary, blank)
            _flush_to_disk(temporary)
            _publish(temporary, target)
            _flush_to_disk(folder)
        except (OSError, SafetensorError) as error:
            why = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise OSError(f"{folder}: cannot save, {why}; what was saved before is whole") from error
        if max(_numbers(folder)) > number:  # others have committed so often that this number was free again
            raise Conflict(f"another process has taught {folder} in between")
        state.number = number
        with suppress(OSError):  # the commit has been made, whatever becomes of the card and of older snapshots
            card = room / "README.md"
            card.write_text(_card(state), encoding="utf-8")
            os.replace(card, folder / card.name)
            _remove_old(folder)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return target


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One writer at a time; the next waits for its turn, and `waiting` is called once if it has to.

    Where files cannot be locked it lets everybody in: see `commit`. What writers left that were killed is removed; and
    a folder made for the lock, if nothing was saved in it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's file, in a folder that we share
            descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written, {error.strerror}") from error
    try:
        told = False
        while not _try_to_lock(descriptor):
            if not told:
                waiting()
                told = True
            time.sleep(0.1)
        _remove_left_over(folder)
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            if made and not _numbers(folder):
                (folder / ".lock").unlink()
                folder.rmdir()


def _numbers(folder: Path) -> list[int]:
    """Numbers of the snapshots, unsorted."""
    names = os.listdir(folder)
    found = [int(match[1]) for name in names if (match := _SNAPSHOT.fullmatch(name))]
    return found + [0] * (OLD in names)


def _name(number: int) -> str:
    return f"{number:08d}.safetensors" if number else OLD


def _open_newest(folder: Path) -> State:
    numbers = sorted(_numbers(folder), reverse=True)
    damaged: list[str] = []
    for number in numbers:
        path = folder / _name(number)
        try:
            told = _read_checked(path) if number else _read_header(path)
        except _Damaged as error:
            damaged.append(f"{path} {error}")
            continue
        notes = told["extra"]
        method = notes.pop("method", "g-acil")
        ledger = Ledger.from_json(notes.pop("ledger", {}))
        notes.pop("checksum", None)
        if method not in LEARNERS:
            raise ValueError(f"{path} is of the method {method!r}; this shoestring knows {', '.join(LEARNERS)}")
        model = learner(method).load(path)
        return State(folder, method, model, notes, ledger, numbers[0], damaged, told.get("params") or {})
    raise ValueError(f"no snapshot in {folder} can be used: {'; '.join(damaged)}")


def learner(method: str) -> Any:
    """The class of a method."""
    module, name = LEARNERS[method]
    return getattr(import_module(module), name)


class _Damaged(Exception):
    """What is wrong with a file."""


def _header(file: Any) -> bytes:
    """The length and the JSON at the beginning of a safetensors file."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > 100_000_000:
        raise _Damaged("is truncated or damaged: it has no header")
    header = length + file.read(size)
    if len(header) < 8 + size:
        raise _Damaged("is truncated or damaged: it ends within its header")
    return header


def _told(header: bytes) -> dict[str, Any]:
    """What a learner's ``save`` says in the header."""
    with suppress(ValueError, KeyError, TypeError):
        told = json.loads(json.loads(header[8:])["__metadata__"]["shoestring"])
        if isinstance(told, dict) and isinstance(told["extra"], dict):
            return told
    raise _Damaged("is damaged, or not a learner of shoestring's: its header cannot be read")


def _read_header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return _told(_header(file))


def _read_checked(path: Path) -> dict[str, Any]:
    """The same, after a look at every byte."""
    with open(path, "rb") as file:
        header = _header(file)
        told = _told(header)
        checksum = str(told["extra"].get("checksum"))
        if len(checksum) != 16 or _checksum(header, checksum, file) != checksum:
            raise _Damaged("is damaged: its checksum does not match")
        return told


def _seal(path: Path, blank: str) -> None:
    """Put the checksum of everything else where `blank` is, in place."""
    with open(path, "r+b") as file:
        header = _header(file)
        sealed = header.replace(blank.encode(), _checksum(header, blank, file).encode())
        file.seek(0)
        file.write(sealed)


def _checksum(header: bytes, blank: str, file: Any) -> str:
    """CRC-32 of the header, `blank` aside, and of the rest of the file: 16 hexadecimal digits."""
    rest = 0
    while block := file.read(1 << 20):
        rest = zlib.crc32(block, rest)
    return f"{zlib.crc32(header.replace(blank.encode(), b'')):08x}{rest:08x}"


def _publish(temporary: Path, target: Path) -> None:
    """Give a file its number, unless that is taken."""
    taken = Conflict(f"another process has taught {target.parent} in between")
    try:
        os.link(temporary, target)
    except FileExistsError:
        if not os.path.samefile(temporary, target):  # over a network, a link can be made and the answer lost
            raise taken from None
    except OSError:
        if target.exists():
            raise taken from None
        os.rename(temporary, target)  # no hard links here (FAT, some network file systems)


def _try_to_lock(descriptor: int) -> bool:
    """True if the lock is ours, or if there are none here."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows says the second
        return False
    except OSError:
        return True
    return True


def _here() -> str:
    return re.sub(r"\W", "", socket.gethostname())[:20]


def _remove_old(folder: Path) -> None:
    for number in sorted(_numbers(folder))[:-KEPT]:
        (folder / _name(number)).unlink(missing_ok=True)


def _remove_left_over(folder: Path) -> None:
    """Remove what writers left that were killed: on this machine, or more than a day ago."""
    with suppress(OSError):
        _remove_old(folder)
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        with suppress(OSError):
            if match and (
                (match[1] == _here() and not _alive(int(match[2]))) or time.time() - path.stat().st_mtime > _DAY
            ):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there, os.kill kills whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _card(state: State) -> str:
    model, name = state.model, type(state.model).__name__
    counts = dict(zip(model.classes_.tolist(), model.class_count_.tolist(), strict=True))
    shown = [f"{label} ({count:g})" for label, count in list(counts.items())[:100]]
    shown += [f"and {len(counts) - 100:,} more"] if len(counts) > 100 else []
    history = "\n".join(
        f"- {entry['date']}: {entry['what']}"
        + "".join(f", {k} {v}" for k, v in entry.items() if k not in ("date", "what"))
        for entry in state.notes.get("history", [])
    )
    snapshot = _name(state.number)
    return f"""# A classifier taught with shoestring {__version__}

- Method: {state.method}, snapshot `{snapshot}`; of the older ones the last {KEPT - 1} are kept
- Backbone: {state.notes.get("backbone") or "none, features were given"}
- Rows learnt and not forgotten: {model.n_samples_seen_:,}; no row is kept
- Classes ({len(counts):,}): {", ".join(shown) or "none"}

What happened to it:

{history}

```python
from shoestring.learn import {name}

model = {name}.load("{snapshot}")
```
"""
