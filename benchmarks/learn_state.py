"""What a state that cannot be lost costs, as ratios in one run, and the long crash tests.

1. `shoestring learn` killed at every single write (as by SIGKILL, and as by two kinds of power cut), killed 200 times
   at random moments over 500 chunks, and three writers at once without a lock: no state may be wrong.
2. 200,000 rows of features through `shoestring learn --save-every 0.2`, on one thread: rows a second and memory, the
   last tenth against the first.
3. 10,000 classes of 5 rows against 100 classes of 500: seconds a row of `learn`, and of `predict` on images.
4. A commit against the learner's own `save`.

    python benchmarks/learn_state.py [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _race import FAILED, RATIOS, clock, race, report
from _record import record

CRASH = Path(__file__).parent.parent / "tests" / "learn" / "crash.py"
TOLD: dict[str, object] = {}  # without a limit


def crashes(quick: bool) -> None:
    chunks, kills, n = ("1", "20", "50") if quick else ("4", "200", "500")
    for what, arguments in {
        "killed at every write": ["every", "--chunks", chunks],
        "power cut at every write": ["every", "--chunks", chunks, "--power-cut", "1"],
        "power cut at every write, the other way": ["every", "--chunks", chunks, "--power-cut", "2"],
        f"killed {kills} times at random over {n} chunks": ["random", "--chunks", n, "--kills", kills],
        "three writers without a lock": ["writers", "--chunks", "15" if quick else "60", "--writers", "3"],
    }.items():
        done = subprocess.run([sys.executable, str(CRASH), *arguments], check=True, capture_output=True, text=True)
        told = json.loads(done.stdout)
        print(f"    {told}")
        TOLD[what] = {name: value for name, value in told.items() if name != "wrong"}
        report(f"{what}: wrong states", len(told["wrong"]), 0)


def shoestring(*arguments: object) -> str:
    """The command, in this process; what it prints."""
    from shoestring.cli import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([str(a) for a in arguments])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(err.getvalue()) from None
    return out.getvalue()


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def stream(folder: Path, n: int) -> None:
    """In a process of its own: learn n rows, and print the moments and the memory after every chunk."""
    from shoestring.learn import GACIL

    moments, memory, learn = [], [], GACIL.partial_fit

    def partial_fit(self: Any, X: Any, y: Any) -> Any:
        learn(self, X, y)
        moments.append(time.perf_counter())
        memory.append(resident_mb())
        return self

    GACIL.partial_fit = partial_fit  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    y = rng.integers(0, 20, n)
    X = rng.standard_normal((20, 64), np.float32)[y] + rng.standard_normal((n, 64), np.float32)
    np.savez(folder / "rows.npz", X=X, y=y)
    del X, y
    shoestring("learn", folder / "rows.npz", "--state", folder / "s", "--n-components", 500, "--save-every", 0.2)
    snapshots = max(int(path.stem) for path in (folder / "s").glob("0*"))
    print(json.dumps([moments, memory, snapshots]))


def throughput(n: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--stream", folder, str(n)]
        # One thread: at this width, torch's and BLAS's threads would wait for each other, now longer and now shorter.
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    moments, memory, snapshots = json.loads(done.stdout)
    tenth = len(moments) // 10
    first, last = moments[tenth] - moments[0], moments[-2] - moments[-2 - tenth]
    tenths = [moments[i + tenth - 1] - moments[i] for i in range(0, len(moments) - tenth + 1, tenth)]
    print(f"    seconds of each tenth: {', '.join(f'{seconds:.2f}' for seconds in tenths)}")
    speed = 256 * len(moments) / (moments[-1] - moments[0])
    print(f"{n:,} rows of 64 features: {speed:,.0f} rows/s, {snapshots} commits, {memory[-1]:.0f} MB")
    TOLD["rows a second"] = round(speed)
    report(f"{n:,} rows: rows/s of the last tenth / of the first", first / last, 0.95, at_least=True)
    report(f"{n:,} rows: memory in the last tenth / in the first", max(memory[-tenth:]) / max(memory[:tenth]), 1.05)


def classes(many: int, few: int, each: int, images: int) -> None:
    """The same number of rows in many and in few classes, of width 1,280 as efficientnet-lite0 gives them."""
    from shoestring.learn import GACIL
    from shoestring.learn._state import State, commit

    n, rng = many * each, np.random.default_rng(0)
    learn, bare = {}, {}
    X = np.abs(rng.standard_normal((n, 1280), np.float32))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shoestring("predict", "fashion", "--split", "test[:20]", "--state", _taught(folder / "warm", X[:300], 3))
        for c in (few, many):
            np.savez(folder / "rows.npz", X=X, y=rng.permutation(np.arange(n) % c))
            told = shoestring("learn", folder / "rows.npz", "--state", folder / f"learn{c}", "--json")
            learn[c] = 1 / json.loads(told)["rows_per_second"]
            newest = max((folder / f"learn{c}").glob("0*"))
            model = GACIL.load(newest)
            commit(State(folder / f"predict{c}", "g-acil", model, {"backbone": "efficientnet-lite0"}))
            model.coef_  # noqa: B018 (as after as many rows as classes; until then a row costs 2 M^2 more)
            bare[c] = min(clock(lambda model=model: model.predict(X[:256])) for _ in range(3)) / 256
        seconds = race(5, **{str(c): _predicting(folder / f"predict{c}", images) for c in (few, many)})
        predict = {c: seconds[str(c)] / images for c in (few, many)}
        for c in (few, many):
            for what, times in ("learn", learn), ("predict, images", predict), ("predict, features", bare):
                print(f"    {c:6,} classes: {what:<18} {1e6 * times[c]:9.0f} us a row")
    where = f"{many:,} classes of {each} rows / {few:,} of {n // few}"
    report(f"{where}: seconds a row of learn, from features", learn[many] / learn[few], 2)
    report(f"{where}: seconds a row of predict, from images", predict[many] / predict[few], 2)
    ratio = bare[many] / bare[few]
    TOLD[f"{where}: seconds a row of predict, from features"] = round(ratio, 2)
    print(f"  {where + ': seconds a row of predict, from features':<78} {ratio:7.2f}   (no limit: the scores alone)")


def _predicting(folder: Path, images: int) -> Callable[[], object]:
    return lambda: shoestring("predict", "fashion", "--split", f"test[:{images}]", "--state", folder)


def _taught(folder: Path, X: np.ndarray, c: int) -> Path:
    from shoestring.learn import GACIL
    from shoestring.learn._state import State, commit

    model = GACIL(n_components=200).fit(X, np.arange(len(X)) % c)
    commit(State(folder, "g-acil", model, {"backbone": "efficientnet-lite0"}))
    return folder


def commits(M: int, repeats: int) -> None:
    """A commit, checksum and all, against ``save``; with a ledger of nothing and one of 100,000 chunks."""
    from shoestring.learn import GACIL
    from shoestring.learn._ledger import Job
    from shoestring.learn._state import State, commit, open_state

    rng = np.random.default_rng(0)
    model = GACIL(n_components=M).fit(rng.standard_normal((500, 256)), np.arange(500) % 10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = State(folder / "small", "g-acil", model), State(folder / "large", "g-acil", model)
        chunks = [rng.bytes(16) for _ in range(100_000)]
        large.ledger.jobs.append(Job("rows", "train", 0, 25_600_000, 256, 0, "2026-01-01", chunks=chunks))
        s = race(
            repeats,
            save=lambda: model.save(folder / "model.safetensors"),
            commit=lambda: commit(small),
            commit_large=lambda: commit(large),
            load=lambda: GACIL.load(folder / "model.safetensors"),
            open=lambda: open_state(folder / "small"),
        )
        size = (folder / "model.safetensors").stat().st_size / 2**20
    print(f"M = {M}, a file of {size:.0f} MB: " + ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in s.items()))
    TOLD[f"M = {M}: milliseconds"] = {name: round(1000 * seconds, 1) for name, seconds in s.items()}
    report(f"M = {M}: commit / the learner's own save", s["commit"] / s["save"], 2)
    report(f"M = {M}: commit with 100,000 chunks in the ledger / with none", s["commit_large"] / s["commit"], 2)
    report(f"M = {M}: opening, every byte checked / the learner's own load", s["open"] / s["load"], 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size: a look, not a measurement")
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        stream(Path(arguments.stream[0]), int(arguments.stream[1]))
        sys.exit()
    if arguments.quick:
        crashes(True)
        throughput(20_000)
        classes(1_000, 100, 5, 50)
        commits(500, 3)
    else:
        throughput(200_000)
        classes(10_000, 100, 5, 600)
        commits(2000, 7)
        crashes(False)
        record("learn_state", {"ratios": RATIOS, "told": TOLD})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
