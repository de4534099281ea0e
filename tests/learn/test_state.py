"""A state folder that can be neither lost nor half written, and the ledger of what was taught."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.datasets import load_digits

from shoestring.learn import GACIL, _state
from shoestring.learn._ledger import Ledger, add_totals, chunk_hash, shuffled, total_of
from shoestring.learn._state import Conflict, State, commit, exists, locked, open_state

FIXTURES = Path(__file__).parent.parent / "fixtures"
X, Y = load_digits(return_X_y=True)
CRASH = [sys.executable, str(Path(__file__).parent / "crash.py")]


def fresh(folder: Path, n: int = 100) -> State:
    """A state not yet saved, that was taught n rows."""
    model = GACIL(n_components=20).partial_fit(X[:n], Y[:n])
    state = State(folder, "g-acil", model, {"backbone": ""})
    job = state.ledger.plan("digits", "train", n, lambda: np.empty((0, 16), np.uint8), chunk=n)
    state.ledger.add(job, b"%016d" % n)
    return state


def saved(folder: Path, times: int = 1) -> State:
    """A state saved several times, with 100 rows more each time."""
    state = fresh(folder)
    for i in range(times):
        if i:
            state.model.partial_fit(X[100 * i : 100 * (i + 1)], Y[100 * i : 100 * (i + 1)])
            state.ledger.add(state.ledger.jobs[0], b"%016d" % i)
        commit(state)
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- crashes, in processes of their own


@pytest.mark.parametrize(
    "arguments",
    [
        ["every", "--chunks", "2", "--power-cut", "1"],
        ["random", "--chunks", "30", "--kills", "8"],
        ["writers", "--chunks", "12"],
    ],
    ids=["killed at every write", "killed at random", "two writers without a lock"],
)
def test_no_chunk_is_lost_or_counted_twice(arguments):
    """crash.py compares ledger, rows and weights (to 1e-9) with those of a run that nobody disturbs."""
    done = subprocess.run([*CRASH, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    if arguments[0] == "every":
        assert told["kills"] > 40
        assert set(told["chunks_left"]) == {"0", "1", "2"}
    elif arguments[0] == "random":
        assert told["kills"] == 8
        assert told["stands"] > 2
    else:
        assert told["conflicts"] > 0


# ---- the snapshots


def test_what_is_saved_is_what_is_opened(tmp_path):
    state = saved(tmp_path / "s", 2)
    state.note("something else")
    assert commit(state) == tmp_path / "s" / "00000003.safetensors"
    opened = open_state(tmp_path / "s")
    assert (opened.number, opened.method, opened.damaged) == (3, "g-acil", [])
    assert opened.notes == state.notes
    assert opened.ledger.to_json() == state.ledger.to_json()
    np.testing.assert_array_equal(opened.model.coef_, state.model.coef_)
    opened.check(backbone="", n_components=20, gamma=100.0, method="g-acil", random_state=None)
    with pytest.raises(ValueError, match="n_components = 20, not 30"):
        opened.check(n_components=30)
    # and without shoestring's state: the learner alone, and any reader of safetensors
    np.testing.assert_array_equal(GACIL.load(tmp_path / "s" / "00000003.safetensors").coef_, state.model.coef_)
    with safe_open(tmp_path / "s" / "00000003.safetensors", "np") as file:
        assert "rows" in set(file.keys())
    assert "00000003.safetensors" in (tmp_path / "s" / "README.md").read_text()


SMALL = {"g-acil": {"n_components": 50}, "dkvb": {"num_codebooks": 8, "num_pairs": 32, "epochs": 2, "key_epochs": 2}}


@pytest.mark.parametrize("method", _state.LEARNERS)
def test_every_learner_can_be_kept_and_goes_on_as_if_it_had_not_been(tmp_path, method):
    there, here = (_state.learner(method)(**SMALL.get(method, {})).partial_fit(X[:200], Y[:200]) for _ in range(2))
    commit(State(tmp_path, method, there, {"backbone": "minilm"}))
    opened = open_state(tmp_path)
    assert (opened.method, opened.notes, type(opened.model)) == (method, {"backbone": "minilm"}, type(there))
    for model in (opened.model, here):
        model.partial_fit(X[200:400], Y[200:400])
    np.testing.assert_array_equal(opened.model.predict(X[400:500]), here.predict(X[400:500]))
    assert f"Method: {method}" in (tmp_path / "README.md").read_text()


def test_the_last_three_snapshots_stay(tmp_path):
    saved(tmp_path / "s", 5)
    assert sorted(contents(tmp_path / "s")) == [*(f"{i:08d}.safetensors" for i in (3, 4, 5)), "README.md"]


def test_a_flipped_bit_anywhere_is_found_and_the_snapshot_before_used(tmp_path):
    saved(tmp_path / "s", 3)
    newest = tmp_path / "s" / "00000003.safetensors"
    whole = newest.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    places = {0, 7, 8, *range(9, size, 17), *range(size, len(whole), 211), whole.index(b"checksum"), len(whole) - 1}
    assert len(places) > 80
    for place in places:
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        opened = open_state(tmp_path / "s")
        assert opened.model.n_samples_seen_ == 200, place
        (told,) = opened.damaged
        assert str(newest) in told
    newest.write_bytes(whole)
    assert open_state(tmp_path / "s").model.n_samples_seen_ == 300


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_snapshot_is_found(tmp_path, kept):
    saved(tmp_path / "s", 2)
    newest = tmp_path / "s" / "00000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:kept])
    opened = open_state(tmp_path / "s")
    assert opened.model.n_samples_seen_ == 100
    assert "00000002.safetensors" in opened.damaged[0]
    commit(opened)  # with a number of its own
    assert (open_state(tmp_path / "s").number, open_state(tmp_path / "s").damaged) == (3, [])


def test_no_whole_snapshot_is_an_error_that_names_all(tmp_path):
    saved(tmp_path / "s", 2)
    for path in (tmp_path / "s").glob("0*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no snapshot in .*00000002.*checksum.*00000001.*checksum"):
        open_state(tmp_path / "s")


def test_a_snapshot_of_a_newer_version_is_not_passed_over(tmp_path, monkeypatch):
    state = saved(tmp_path / "s", 1)
    monkeypatch.setattr("shoestring.learn.g_acil.VERSION", 99)
    commit(state)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"version 99.*upgrade"):
        open_state(tmp_path / "s")
    state.method = "magic"
    commit(state)
    with pytest.raises(ValueError, match="'magic'"):
        open_state(tmp_path / "s")


def test_a_folder_of_version_1_opens_and_is_upgraded_by_the_first_commit(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    shutil.copy(FIXTURES / "g_acil_v1.safetensors", folder / "model.safetensors")
    before = contents(folder)
    state = open_state(folder)
    assert (state.number, state.ledger.jobs, contents(folder)) == (0, [], before)
    rows = np.random.default_rng(0).random((5, 3))
    expected = state.model.decision_function(rows)
    for number in range(1, 4):
        commit(state)
        upgraded = open_state(folder)
        assert upgraded.number == number
        np.testing.assert_array_equal(upgraded.model.decision_function(rows), expected)
    assert not (folder / "model.safetensors").exists()  # it was the fourth
    (folder / "model.safetensors").write_bytes(before["model.safetensors"][:500])
    for path in folder.glob("0*"):
        path.unlink()
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_state(folder)


def test_the_state_of_the_first_release_with_a_ledger_opens_and_goes_on(tmp_path):
    shutil.copytree(FIXTURES / "state_1", tmp_path / "s")
    state = open_state(tmp_path / "s")
    (job,) = state.ledger.jobs
    assert (job.data, job.ended, job.chunk, job.rows, len(job.chunks)) == ("rows.npz", False, 20, 60, 2)
    assert state.model.n_samples_seen_ == 40
    assert state.notes["history"][0]["rows"] == 40
    np.testing.assert_allclose(state.model.coef_, np.load(FIXTURES / "state_1_coef.npy"), rtol=0, atol=1e-12)
    assert commit(state).name == "00000003.safetensors"


# ---- writers


def test_of_two_writers_one_is_told_and_nothing_changes(tmp_path):
    folder = tmp_path / "s"
    saved(folder)
    ours, theirs = open_state(folder), open_state(folder)
    theirs.model.partial_fit(X[500:600], Y[500:600])
    commit(theirs)
    before = contents(folder)
    ours.model.partial_fit(X[600:700], Y[600:700])
    with pytest.raises(Conflict, match="another process"):
        commit(ours)
    assert contents(folder) == before
    assert len(list(folder.iterdir())) == len(before)


def test_a_writer_that_slept_while_its_number_came_free_again_is_told(tmp_path):
    folder = tmp_path / "s"
    saved(folder)
    ours, theirs = open_state(folder), open_state(folder)
    for _ in range(4):
        commit(theirs)
    assert not (folder / "00000002.safetensors").exists()
    with pytest.raises(Conflict):
        commit(ours)
    assert open_state(folder).number == 5


def test_without_hard_links_a_rename_commits(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder = tmp_path / "s"
    saved(folder, 2)
    ours, theirs = open_state(folder), open_state(folder)
    commit(theirs)
    with pytest.raises(Conflict):
        commit(ours)
    assert open_state(folder).number == 3


def test_a_link_whose_answer_was_lost_is_a_commit(tmp_path, monkeypatch):
    link = os.link

    def answer_lost(source, target):
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answer_lost)
    saved(tmp_path / "s", 2)
    assert open_state(tmp_path / "s").model.n_samples_seen_ == 200


def test_a_reader_whose_snapshot_was_removed_takes_a_newer_one(tmp_path, monkeypatch):
    state, read, calls = saved(tmp_path / "s"), _state._read_checked, []

    def slow(path):
        told = read(path)
        if not calls:
            for _ in range(4):
                commit(state)
        calls.append(path.name)
        return told

    monkeypatch.setattr(_state, "_read_checked", slow)
    assert open_state(tmp_path / "s").number == 5
    assert calls == ["00000001.safetensors", "00000005.safetensors"]


def test_the_second_writer_waits_for_its_turn(tmp_path):
    folder, order = tmp_path / "s", []

    def second():
        with locked(folder, lambda: order.append("waits")):
            order.append("second")

    with locked(folder, lambda: order.append("no")):
        commit(fresh(folder))
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 20
        while not order and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    assert order == ["waits", "first", "second"]


def test_where_files_cannot_be_locked_writers_go_in(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "s", lambda: pytest.fail("waited")):
        commit(fresh(tmp_path / "s"))


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    folder = tmp_path / "s"
    saved(folder)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = _state._here()
    stays = [
        f".00000002.{here}-{os.getpid()}.{'a' * 16}",
        f".00000002.elsewhere-{dead.pid}.{'b' * 16}",
        "photos",
        ".git",
    ]
    goes = [f".00000002.{here}-{dead.pid}.{'c' * 16}", f".00000002.elsewhere-1.{'d' * 16}"]
    for name in stays + goes:
        (folder / name).mkdir()
        (folder / name / "half").write_bytes(b"half")
    os.utime(folder / goes[1], (time.time() - 2 * 86_400,) * 2)
    for number in range(2, 6):  # killed before the oldest were removed
        shutil.copy(folder / "00000001.safetensors", folder / f"{number:08d}.safetensors")
    with locked(folder, lambda: None):
        pass
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(stays)
    assert sorted(path.name for path in folder.glob("0*")) == [f"{number:08d}.safetensors" for number in (3, 4, 5)]


# ---- folders and disks


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(ValueError, match=r"no learner in .*notes\.txt"):
        exists(tmp_path)
    with pytest.raises(ValueError, match=r"is a file; --state takes a folder"):
        exists(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    assert not exists(tmp_path)  # hidden files do no harm
    assert not exists(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no learner in"):
        open_state(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a": {}}       ' + bytes(100))
    with pytest.raises(ValueError, match="not a learner"):
        open_state(tmp_path)


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with contextlib.suppress(ZeroDivisionError), locked(tmp_path / "s", lambda: None):
        raise ZeroDivisionError
    assert not (tmp_path / "s").exists()
    (tmp_path / "mine").mkdir()
    with contextlib.suppress(ZeroDivisionError), locked(tmp_path / "mine", lambda: None):
        raise ZeroDivisionError
    assert (tmp_path / "mine").is_dir()


@contextlib.contextmanager
def small_files(folder):
    """No file may become larger than 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_disk(folder):
    """Fill the small disk that is mounted at the folder."""
    filler = folder / ".filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder):
    """Nobody may write there, not even root: so root becomes nobody for a while."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def small_disk():
    """A folder on a disk of 256 kB, or, where nothing can be mounted, a skipped test."""
    folder = Path(tempfile.mkdtemp(prefix="shoestring-disk-"))
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        folder.rmdir()
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture
def public():
    """A folder that any user can reach; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="shoestring-public-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("place", "trouble", "message"),
    [
        ("tmp_path", small_files, "File too large"),
        ("small_disk", full_disk, "No space left"),
        ("public", read_only, "Permission denied"),
    ],
    ids=["file size limit", "disk full", "read-only"],
)
def test_a_save_that_fails_says_so_and_leaves_the_snapshots_whole(request, place, trouble, message):
    folder = request.getfixturevalue(place) / "s"
    folder.mkdir()
    state = saved(folder)
    before = contents(folder)
    state.model.partial_fit(X[100:200], Y[100:200])
    with trouble(folder), pytest.raises(OSError, match=f"cannot save, .*{message}.*what was saved before is whole"):
        commit(state)
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert open_state(folder).model.n_samples_seen_ == 100
    commit(state)  # once there is room again
    assert open_state(folder).model.n_samples_seen_ == 200


def test_a_card_that_cannot_be_written_does_not_undo_the_commit(tmp_path):
    folder = tmp_path / "s"
    saved(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    state = open_state(folder)
    commit(state)
    assert open_state(folder).number == 2


def test_the_card_of_10_000_classes_is_short(tmp_path):
    model = GACIL(n_components=4).fit(np.random.default_rng(0).random((10_000, 3)), np.arange(10_000))
    commit(State(tmp_path, "g-acil", model))
    card = (tmp_path / "README.md").read_text()
    assert "Classes (10,000): 0 (1), 1 (1)" in card
    assert "and 9,900 more" in card
    assert len(card) < 3000


# ---- the ledger


def hashes(*rows: int) -> np.ndarray:
    """Row hashes that are told by a number."""
    return np.stack([np.frombuffer(chunk_hash(np.full((1, 16), row, np.int64)), np.uint8) for row in rows])


ROWS = hashes(*range(100))


def teach(ledger: Ledger, rows: np.ndarray, data: str = "a.csv", *, stop_after: int | None = None, **options) -> int:
    """What `shoestring learn` does with a ledger: how many rows it would have learnt."""
    options.setdefault("chunk", 10)
    job = ledger.plan(data, "train", len(rows), lambda: rows, **options)
    rest = rows[job.first : job.first + job.rows]
    order = np.arange(len(rest)) if job.shuffle is None else shuffled(len(rest), job.shuffle)
    done, met, learnt = Counter(job.chunks), Counter(), 0
    for i, start in enumerate(range(0, len(rest), job.chunk)):
        if stop_after is not None and i == stop_after:
            return learnt
        part = rest[order[start : start + job.chunk]]
        this = chunk_hash(part)
        if met[this] >= done[this]:
            ledger.add(job, this)
            learnt += len(part)
        met[this] += 1
    ledger.end(job, met, total_of(rest))
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert json.dumps(again.to_json()) == json.dumps(ledger.to_json())
    return learnt


def test_the_total_does_not_depend_on_order_or_parts():
    order = np.random.default_rng(0).permutation(100)
    assert total_of(ROWS) == total_of(ROWS[order]) == add_totals(total_of(ROWS[:37]), total_of(ROWS[37:]))
    assert total_of(ROWS) != total_of(ROWS[:99])
    assert total_of(np.full((3, 16), 255, np.uint8)) == f"{3 * (2**128 - 1) % 2**128:032x}"
    assert add_totals("f" * 32, "0" * 31 + "2") == "0" * 31 + "1"


def test_a_job_that_was_cut_off_goes_on_behind_its_chunks():
    ledger = Ledger()
    assert teach(ledger, ROWS, stop_after=4, shuffle=0) == 40
    assert teach(ledger, ROWS, stop_after=7, shuffle=0) == 30
    assert teach(ledger, ROWS, shuffle=0) == 30
    assert [len(job.chunks) for job in ledger.jobs] == [10]


def test_equal_chunks_of_one_data_set_are_counted_as_often_as_they_come():
    rows, ledger = np.concatenate([ROWS[:20], ROWS[:20], ROWS[:20]]), Ledger()
    assert teach(ledger, rows, stop_after=3) == 30
    assert teach(ledger, rows) == 30
    assert len(ledger.jobs[0].chunks) == 6


@pytest.mark.parametrize("options", [{}, {"chunk": 7}, {"shuffle": 3}], ids=["same", "other chunks", "shuffled"])
def test_rows_that_were_learnt_are_known_by_any_name_in_any_order_and_chunks(options):
    ledger = Ledger()
    teach(ledger, ROWS)
    for rows in (ROWS, ROWS[::-1], ROWS[np.random.default_rng(1).permutation(100)]):
        with pytest.raises(ValueError, match=r"the 100 rows of b.csv were learnt on .* from a.csv \(train\): --again"):
            teach(ledger, rows, "b.csv", **options)
    assert teach(ledger, ROWS, again=True, **options) == 100
    assert len(ledger.jobs) == 2


def test_only_the_new_rows_of_a_file_that_has_grown_are_learnt():
    ledger = Ledger()
    assert teach(ledger, ROWS[:43], shuffle=0) == 43
    assert teach(ledger, ROWS[:65], shuffle=0) == 22
    assert teach(ledger, ROWS[:65], "copy.csv", again=True) == 65
    assert teach(ledger, ROWS, shuffle=0) == 35
    with pytest.raises(ValueError, match=r"the 100 rows"):
        teach(ledger, ROWS, chunk=1)


def test_a_file_that_grew_after_its_job_was_cut_off_ends_the_job_first():
    ledger = Ledger()
    teach(ledger, ROWS[:50], stop_after=2, shuffle=0)
    job = ledger.plan("a.csv", "train", 100, lambda: ROWS, shuffle=0)
    assert (job.first, job.rows, len(job.chunks)) == (0, 50, 2)
    assert teach(ledger, ROWS, shuffle=0) == 30
    assert teach(ledger, ROWS, shuffle=0) == 50
    with pytest.raises(ValueError, match="the 100 rows"):
        teach(ledger, ROWS)


def test_known_chunks_among_other_rows_are_refused_before_anything_is_learnt():
    ledger = Ledger()
    teach(ledger, ROWS[:50], shuffle=0)
    edited = ROWS[:50].copy()
    edited[17] = 0
    before = ledger.to_json()
    with pytest.raises(ValueError, match=r"4 of 5 chunks of 10 rows were learnt .*--again"):
        teach(ledger, edited, shuffle=0)
    teach(ledger, ROWS[50:70], "c.csv", stop_after=1)
    with pytest.raises(ValueError, match=r"1 of 3 chunks .* from c.csv \(train\), in a job that was cut off"):
        teach(ledger, np.concatenate([ROWS[90:], ROWS[50:70]]), "d.csv")
    assert ledger.to_json()["jobs"][0] == before["jobs"][0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (100, {"chunk": 20, "shuffle": 0}, "--chunk 10 only, got 20"),
        (100, {"shuffle": None}, "goes on with --shuffle only"),
        (90, {"shuffle": 0}, "there were 100 rows, now there are 90"),
    ],
    ids=["chunk", "shuffle", "rows"],
)
def test_a_job_that_was_cut_off_keeps_its_chunks_and_order(rows, options, message):
    ledger = Ledger()
    teach(ledger, ROWS, stop_after=3, shuffle=0)
    with pytest.raises(ValueError, match=message):
        teach(ledger, ROWS[:rows], **options)
    assert teach(ledger, ROWS[:rows], again=True, **options) == rows
    ledger = Ledger()
    teach(ledger, ROWS, stop_after=3, shuffle=0)
    assert teach(ledger, ROWS, chunk=None, same_order=True) == 70


def test_rows_that_changed_under_a_job_that_was_cut_off_are_told():
    ledger = Ledger()
    teach(ledger, ROWS, stop_after=5)
    changed = ROWS.copy()
    changed[3] = 0
    job = ledger.plan("a.csv", "train", 100, lambda: changed)
    met = Counter(chunk_hash(changed[i : i + 10]) for i in range(0, 100, 10))
    for chunk in met - Counter(job.chunks):
        ledger.add(job, chunk)
    assert ledger.end(job, met, total_of(changed)) == 1
    assert sorted(len(job.chunks) for job in ledger.jobs) == [1, 10]


def test_what_was_forgotten_may_come_again():
    ledger = Ledger()
    teach(ledger, ROWS[:60])
    teach(ledger, ROWS[60:], "b.csv")
    ledger.forget(ROWS[:60][::-1])
    assert [job.data for job in ledger.jobs] == ["b.csv"]
    assert teach(ledger, ROWS[:60]) == 60
    ledger.forget(ROWS[60:75])  # in parts
    with pytest.raises(ValueError, match=r"15 rows were forgotten since"):
        teach(ledger, ROWS[60:], "b.csv")
    assert teach(ledger, ROWS[60:75], "part.csv") == 15
    ledger.forget(ROWS[60:75])
    ledger.forget(ROWS[75:])
    assert teach(ledger, ROWS[60:], "b.csv") == 40
    ledger.clear()
    assert teach(ledger, ROWS) == 100


def test_a_ledger_that_would_outgrow_the_header_says_so(monkeypatch):
    monkeypatch.setattr("shoestring.learn._ledger.MOST", 15)
    ledger = Ledger()
    teach(ledger, ROWS)
    with pytest.raises(ValueError, match="give a --chunk above 10"):
        teach(ledger, hashes(*range(200, 260)), "b.csv")
    assert teach(ledger, hashes(*range(200, 260)), "b.csv", chunk=20) == 60
