from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shoestring._files import atomic_path


def test_new_and_replaced_file_hold_what_was_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
            assert not target.exists() or target.read_text() != text
        assert target.read_text() == text
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_block_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_data_reach_the_disk_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert calls == ["file", "rename", "folder"]


def test_kill_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import sys, time\nfrom shoestring._files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t, open(t, 'w') as f:\n"
        "    f.write('half'); f.flush(); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert target.read_text() == "old"


def test_two_writers_at_once_do_not_share_a_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_path(target) as one, atomic_path(target) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert target.read_text() == "one"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [target]


def test_suffix_is_kept_for_writers_that_append_a_missing_one(tmp_path: Path) -> None:
    target = tmp_path / "x.npz"
    with atomic_path(target) as temporary:
        np.savez(temporary, a=np.arange(3))
    assert np.load(target)["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
def test_umask_decides_a_new_files_mode_and_the_old_file_a_replaced_ones(tmp_path: Path) -> None:
    target = tmp_path / "a"
    old_mask = os.umask(0o022)
    try:
        with atomic_path(target) as temporary:
            temporary.write_text("1")
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        with atomic_path(tmp_path / "b") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644
        target.chmod(0o640)
        with atomic_path(target) as temporary:
            temporary.write_text("2")
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
    finally:
        os.umask(old_mask)


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_path(tmp_path / "absent" / "a"):
        pass
    with pytest.raises(IsADirectoryError, match=tmp_path.name), atomic_path(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_module_loads_fast_without_torch() -> None:
    start = time.perf_counter()
    code = "import shoestring._files, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 5
