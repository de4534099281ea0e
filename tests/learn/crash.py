"""`shoestring learn`, killed while it writes; after SQLite's writecrash. A program: it forks warm children of its own.

    crash.py every [--chunks N] [--power-cut 1 or 2]    kill at the 1st, 2nd, 3rd ... write until one run ends
    crash.py random [--chunks N] [--kills N]            kill at random moments until the last chunk is learnt
    crash.py writers [--chunks N] [--writers N]         several writers at once, without any lock

It prints JSON: ``wrong``, what was found wrong after which kill, and counts. tests/learn/test_state.py runs short
forms, benchmarks/learn_state.py long ones.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a fork has none of its parent's other threads, and would wait for them for ever
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

CHUNK, M = 20, 24
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Lab:
    """A data set, what learning it undisturbed gives after every chunk, and ways to disturb."""

    def __init__(self, folder: Path, n_chunks: int) -> None:
        from shoestring.learn import GACIL
        from shoestring.learn._ledger import shuffled
        from shoestring.learn._state import open_state

        self.folder, self.state = folder, folder / "state"
        X, y = load_digits(return_X_y=True)
        pick = np.random.default_rng(0).integers(0, len(X), n_chunks * CHUNK)
        X = X[pick].astype(np.float32) + np.random.default_rng(1).random((len(pick), 1), np.float32)
        y = y[pick]
        np.savez(folder / "rows.npz", X=X, y=y)
        code, told = self.run(self.learn("rows.npz"))
        assert code == 0, told
        (job,) = open_state(self.state).ledger.jobs
        self.sequence = job.chunks
        assert len(self.sequence) == n_chunks
        self.told = told
        shutil.rmtree(self.state)
        order, model, self.coefs = shuffled(len(X), 0), GACIL(n_components=M), [np.zeros(0)]
        for start in range(0, len(X), CHUNK):
            rows = order[start : start + CHUNK]
            self.coefs.append(model.partial_fit(X[rows], y[rows]).coef_.copy())
        self.X, self.y = X, y

    def learn(self, data: str, save_every: float = 0) -> list[str]:
        return ["learn", str(self.folder / data), "--state", str(self.state), "--chunk", str(CHUNK),
                "--n-components", str(M), "--save-every", str(save_every)]  # fmt: skip

    def start(self, command: list[str], before: Callable[[], None] = lambda: None, name: str = "told") -> int:
        """The command in a child of ours; its process id. What it says goes to a file `name`."""
        sys.stdout.flush()
        (self.folder / name).write_text("")  # a child may be killed before it opens it
        pid = os.fork()
        if pid:
            return pid
        try:
            out = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            from shoestring.cli import app

            before()
            app(command)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(99)

    def wait(self, pid: int, name: str = "told") -> tuple[int, str]:
        """Exit code, minus the signal that killed it, and what it said."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, (self.folder / name).read_text()

    def run(self, command: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
        return self.wait(self.start(command, before))

    def look(self, acknowledged: int, at_most: int | None = None) -> tuple[int, str]:
        """Chunks in the state, and what is wrong with it ("" if nothing).

        acknowledged : chunks that were said to be saved
        at_most : more than these cannot be there
        """
        from shoestring.learn._state import open_state

        try:
            kept = open_state(self.state)
        except FileNotFoundError:
            return 0, f"no state, but {acknowledged} chunks were acknowledged" if acknowledged else ""
        except ValueError as error:
            return 0, f"does not open: {error}"
        if kept.damaged:
            return 0, f"damaged: {kept.damaged}"
        chunks = [chunk for job in kept.ledger.jobs for chunk in job.chunks]
        n = len(chunks)
        if chunks != self.sequence[:n]:
            return n, "the ledger's chunks are not those of the undisturbed run"
        if kept.model.n_samples_seen_ != n * CHUNK:
            return n, f"{kept.model.n_samples_seen_} rows in the model, {n * CHUNK} in the ledger"
        if n < acknowledged:
            return n, f"{acknowledged} chunks were acknowledged, {n} are there"
        if at_most is not None and n > at_most:
            return n, f"neither the old state nor the new one: {n} chunks, {acknowledged} acknowledged"
        difference = np.abs(kept.model.coef_ - self.coefs[n]).max() / np.abs(self.coefs[n]).max()
        return n, "" if difference < 1e-9 else f"weights differ by {difference:.1e} after {n} chunks"

    def look_at_end(self) -> str:
        """What is wrong once the job has ended."""
        wrong = self.look(len(self.sequence))[1]
        files = sorted(path.name for path in self.state.iterdir())
        snapshots = [name for name in files if re.fullmatch(r"\d{8}\.safetensors", name)]
        if files != [".lock", *snapshots, "README.md"] or len(snapshots) > 3:
            wrong = wrong or f"left over: {files}"
        return wrong


def acknowledged(told: str) -> int:
    """Chunks that a run said to have learnt and saved."""
    rows = re.findall(r"^saved ([\d,]+) rows", told, re.MULTILINE)
    return int(rows[-1].replace(",", "")) // CHUNK if rows else 0


def kill_at(folder: Path, k: int, power_cut: int) -> Callable[[], None]:
    """Hooks for a child: it kills itself before its k-th call that writes into `folder`.

    power_cut : if not 0, half of every file is lost that was not flushed after it was written; and, where k + power_cut
        is even, links are that were made after their folder was flushed
    """

    def install() -> None:
        import shoestring.learn._model_file as module

        count = 0
        dirty: set[int] = set()  # inodes
        links: dict[int, list[Any]] = {}  # inode of a folder -> new names in it
        truncate, unlink, stat = os.truncate, os.unlink, os.stat

        def step() -> bool:
            nonlocal count
            count += 1
            return count == k

        def die() -> None:
            if power_cut:
                for path in [path for path in folder.rglob("*") if path.is_file() and stat(path).st_ino in dirty]:
                    truncate(path, stat(path).st_size // 2)
                for made in links.values():
                    for path in made if (k + power_cut) % 2 == 0 else []:
                        unlink(path)
            os.kill(os.getpid(), signal.SIGKILL)

        def inside(path: Any) -> bool:
            return isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))

        def before(call: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
            def hooked(*args: Any, **kwargs: Any) -> Any:
                counted = counts(*args, **kwargs)
                if counted and step():
                    die()
                given = call(*args, **kwargs)
                if counted and call is os_link:
                    links.setdefault(stat(Path(args[1]).parent).st_ino, []).append(args[1])
                elif counted and call in (python_open, os_open):
                    dirty.add(stat(args[0]).st_ino)
                elif counted and call is os_fsync:
                    dirty.discard(os.fstat(args[0]).st_ino)
                    links.pop(os.fstat(args[0]).st_ino, None)
                return given

            return hooked

        def opens(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
            return inside(path) and bool(set(mode) & set("wax+"))

        python_open, os_open, os_fsync, os_link = builtins.open, os.open, os.fsync, os.link
        builtins.open = io.open = before(python_open, opens)  # type: ignore[assignment]
        os.open = before(os_open, lambda path, flags, *_, **__: inside(path) and bool(flags & WRITING))
        os.fsync = before(os_fsync, lambda _: True)
        for name in ("link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "chmod"):
            setattr(os, name, before(getattr(os, name), lambda path, *_, **__: inside(path)))
        write = module.save_file

        def save_file(tensors: Any, path: Any, metadata: Any) -> None:
            if step():
                die()
            half = step()
            write(tensors, path, metadata)
            dirty.add(stat(path).st_ino)
            if half:
                truncate(path, stat(path).st_size // 2)
                die()

        module.save_file = save_file  # type: ignore[assignment]

    return install


def every(lab: Lab, power_cut: int) -> dict[str, Any]:
    """Kill at the k-th write for every k, look, and go on to the end."""
    wrong: list[str] = []
    left = Counter[int]()
    k = 0
    while True:
        k += 1
        shutil.rmtree(lab.state, ignore_errors=True)
        code, told = lab.run(lab.learn("rows.npz"), kill_at(lab.state, k, power_cut))
        n, found = lab.look(acknowledged(told), acknowledged(told) + 1)
        if code == 0:
            break
        left[n] += 1
        if code != -signal.SIGKILL:
            wrong.append(f"write {k}: exit code {code}: {told[-300:]}")
            break
        if not found:
            code, told = lab.run(lab.learn("rows.npz"))
            found = lab.look_at_end()
            if code and not (n == len(lab.sequence) and "were learnt" in told):  # all was learnt: that is refused
                found = f"going on: exit code {code}: {told[-300:]}"
        if found:
            wrong.append(f"kill at write {k}: {found}")
    return {"kills": k - 1, "chunks_left": {str(n): left[n] for n in sorted(left)}, "wrong": wrong}


def random(lab: Lab, kills: int) -> dict[str, Any]:
    """Kill at random moments; more of them if the job ends before `kills`."""
    rng, wrong, done, seen, rounds = np.random.default_rng(0), [], 0, [0], 1
    span = 0.1
    while done < kills:
        pid = lab.start(lab.learn("rows.npz"))
        time.sleep(rng.uniform(0, span))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code, told = lab.wait(pid)
        if code not in (0, -signal.SIGKILL):
            wrong.append(f"kill {done}: exit code {code}: {told[-300:]}")
            break
        n, found = lab.look(seen[-1] + acknowledged(told))
        if code == 0 or n == len(lab.sequence):  # it was too quick: once more, from the beginning
            if code == 0 and not found:
                found = lab.look_at_end()
            shutil.rmtree(lab.state)
            rounds, n = rounds + 1, 0
        done += code != 0
        if found:
            wrong.append(f"kill {done}: {found}")
        # so that the job lasts for all kills, and goes on
        span = max(span * (1.1 if n - seen[-1] < len(lab.sequence) / kills else 0.9), 0.02)
        seen.append(n)
    code, told = lab.run(lab.learn("rows.npz"))
    wrong += [f"the end: exit code {code}: {told[-300:]}"] if code else [w for w in [lab.look_at_end()] if w]
    return {"kills": done, "jobs": rounds, "stands": len(set(seen)), "wrong": wrong}


def writers(lab: Lab, n: int) -> dict[str, Any]:
    """Several at once, without the lock, each with rows of its own; and two with the same rows."""
    from shoestring.learn import GACIL
    from shoestring.learn._state import open_state

    def without_lock() -> None:
        from shoestring.learn import _state

        _state.locked = lambda folder, waiting: contextlib.nullcontext()  # type: ignore[assignment, return-value]

    wrong, conflicts = [], 0
    parts = np.array_split(np.arange(len(lab.X)), n)
    for i, part in enumerate(parts):
        np.savez(lab.folder / f"part{i}.npz", X=lab.X[part], y=lab.y[part])
    for names in ([f"part{i}.npz" for i in range(n)], ["rows.npz", "rows.npz"]):
        shutil.rmtree(lab.state, ignore_errors=True)
        pids = [lab.start(lab.learn(name), without_lock, f"told{i}") for i, name in enumerate(names)]
        ends = [lab.wait(pid, f"told{i}") for i, pid in enumerate(pids)]
        conflicts += sum(told.count("in between") for _, told in ends)
        # Of two with the same rows the later may find that all have been learnt; that is said, and right.
        bad = [(code, told) for code, told in ends if code and "were learnt" not in told]
        wrong += [f"{names}: exit code {code}: {told[-300:]}" for code, told in bad]
        kept = open_state(lab.state)
        chunks = [chunk for job in kept.ledger.jobs for chunk in job.chunks]
        if names[0] == "rows.npz" and sorted(chunks) != sorted(lab.sequence):
            wrong.append(f"{names}: {len(chunks)} chunks, {len(set(chunks))} different, for {len(lab.sequence)}")
        if kept.model.n_samples_seen_ != len(lab.X):
            wrong.append(f"{names}: {kept.model.n_samples_seen_} rows, expected {len(lab.X)}")
        joint = GACIL(n_components=M).fit(lab.X, lab.y).coef_
        if not np.allclose(kept.model.coef_, joint, rtol=0, atol=1e-9 * np.abs(joint).max()):
            wrong.append(f"{names}: the weights are not those of one fit on all rows")
        if not all(job.ended for job in kept.ledger.jobs):
            wrong.append(f"{names}: a job has not ended")
    return {"conflicts": conflicts, "wrong": wrong}


def warm() -> None:
    """Import what the command imports, so that no child has to."""
    for name in ("datasets", "shoestring.backbones", "shoestring.data.features", "shoestring.learn.g_acil"):
        importlib.import_module(name)
    from shoestring.cli import app

    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):  # typer imports at the first call
        app(["learn", "no.npz", "--state", "no", "--chunk", "1", "--n-components", "1", "--save-every", "0"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["every", "random", "writers"])
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("--power-cut", type=int, default=0, help="1 or 2: and what was not flushed is lost")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--writers", type=int, default=2)
    given = parser.parse_args()
    warm()
    folder = Path(tempfile.mkdtemp(prefix="shoestring-crash-"))
    start = time.perf_counter()
    try:
        lab = Lab(folder, given.chunks)
        told = (
            every(lab, given.power_cut) if given.what == "every"
            else random(lab, given.kills) if given.what == "random"
            else writers(lab, given.writers)
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**told, "seconds": round(time.perf_counter() - start, 1)}))
