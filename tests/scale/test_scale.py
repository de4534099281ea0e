"""Jobs on a real Ray: the result is that of one process, also if a worker is killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from shoestring.cli import app
from shoestring.learn import GACIL, TEEN, FeTrIL
from shoestring.scale import Source, _dump, learn, predict, tree_merge

ray = pytest.importorskip("ray")
DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = (DIGITS / 16.0).astype(np.float32)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / "digits.npz", X=DIGITS, y=LABELS)
    return Source(str(tmp_path / "digits.npz"))


@pytest.fixture(scope="module")
def alone():
    """The same in one process."""
    return GACIL(n_components=200).fit(DIGITS, LABELS)


def test_equals_one_process_and_scores_the_same(cluster, source, alone):
    seen = []
    model, skipped = learn(
        source, GACIL(n_components=200), rows_per_slice=100, progress=lambda done, text: seen.append(done)
    )  # 18 slices: two levels of merging
    np.testing.assert_allclose(model.coef_, alone.coef_, rtol=0, atol=1e-9)
    assert model.n_samples_seen_ == len(LABELS)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert skipped == []
    scored = predict(source, model, rows_per_slice=500)
    assert np.array_equal(scored.positions, np.arange(len(LABELS)))
    assert scored.row_names == [f"row {i}" for i in range(len(LABELS))]
    assert np.array_equal(scored.given, LABELS)
    proba = alone.predict_proba(DIGITS)
    assert np.array_equal(scored.labels, alone.classes_[proba.argmax(1)])
    np.testing.assert_allclose(scored.probabilities, proba.max(1), rtol=0, atol=1e-6)


def test_a_killed_worker_changes_nothing(cluster, source, alone):
    killed = []

    def kill_one_at_work():
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    title = (process / "cmdline").read_text()
                except OSError:
                    continue
                if "MapWorker" in title and "submit" in title:  # an actor with a slice in hand
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(title)
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    model, _ = learn(source, GACIL(n_components=200), rows_per_slice=60)
    killer.join()
    assert killed
    assert model.n_samples_seen_ == len(LABELS)  # no slice lost, none counted twice
    np.testing.assert_allclose(model.coef_, alone.coef_, rtol=0, atol=1e-9)


def test_on_top_of_what_is_known(cluster, source, tmp_path):
    np.savez(tmp_path / "more.npz", X=DIGITS[:300] + 1, y=LABELS[:300])
    before = TEEN(base_classes=range(6)).fit(DIGITS[:50], LABELS[:50])
    picked = np.arange(299, -1, -1)  # in any order
    model, _ = learn(Source(str(tmp_path / "more.npz")), before, positions=picked, rows_per_slice=100)
    together = TEEN(base_classes=range(6)).fit(
        np.concatenate([DIGITS[:50], DIGITS[:300] + 1]), np.concatenate([LABELS[:50], LABELS[:300]])
    )
    np.testing.assert_allclose(model.prototypes_, together.prototypes_, rtol=0, atol=1e-12)
    assert before.n_samples_seen_ == 50


def test_images_that_cannot_be_read_are_skipped_and_named(cluster, tmp_path):
    for i, k in enumerate(LABELS[:40]):
        folder = tmp_path / "images" / f"digit {k}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((255 * DIGITS[i].reshape(8, 8)).astype(np.uint8))
        picture.save(folder / f"{i}.png")
    broken = tmp_path / "images" / "digit 0" / "broken.png"
    broken.write_bytes(b"no picture")
    source = Source(str(tmp_path / "images"), backbone="efficientnet-lite0")
    model, skipped = learn(source, GACIL(n_components=20), rows_per_slice=25)
    assert [Path(name).name for name, _ in skipped] == ["broken.png"]
    assert model.n_samples_seen_ == 40
    scored = predict(source, model, rows_per_slice=25)
    assert len(scored.positions) == len(scored.labels) == 40
    assert all(name.endswith(".png") for name in scored.row_names)
    assert len(scored.skipped) == 1


def test_the_tree_adds_any_number():
    parts = [GACIL(n_components=20).fit(DIGITS[i::5], LABELS[i::5]) for i in range(5)]
    together = GACIL(n_components=20).fit(DIGITS, LABELS)
    for n in (1, 2, 3, 5):
        merged = tree_merge([_dump(part) for part in parts[:n]], GACIL)
        assert merged.n_samples_seen_ == sum(part.n_samples_seen_ for part in parts[:n])
    np.testing.assert_allclose(merged.coef_, together.coef_, rtol=0, atol=1e-9)
    assert tree_merge([], GACIL) is None


def test_bad_input(cluster, source, tmp_path):
    with pytest.raises(TypeError, match=r"learner must be one of GACIL, TEEN, .*got FeTrIL"):
        learn(source, FeTrIL())
    with pytest.raises(ValueError, match="learner must have base_classes"):
        learn(source, TEEN())
    with pytest.raises(ValueError, match="rows_per_slice must be >= 1, got -3"):
        learn(source, GACIL(n_components=20), rows_per_slice=-3)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="has no labels to learn"):
        learn(Source(str(tmp_path / "texts.jsonl"), content="text"), GACIL(n_components=20))


def test_from_the_shell_as_in_one_process(cluster, source, tmp_path):
    runner = CliRunner()

    def shoestring(*arguments):
        done = runner.invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done

    for name, more in (("ray", ["--on", "ray"]), ("alone", [])):
        shoestring("learn", source.data, "--state", tmp_path / name, "--n-components", 200, *more)
    kept, plain = (GACIL.load(max((tmp_path / name).glob("0*.safetensors"))) for name in ("ray", "alone"))
    np.testing.assert_allclose(kept.coef_, plain.coef_, rtol=0, atol=1e-9)
    again = runner.invoke(app, ["learn", source.data, "--state", str(tmp_path / "ray"), "--on", "ray"])
    assert again.exit_code == 1
    assert "were learnt on" in again.stderr  # the ledger has its chunks
    answers = [
        shoestring("predict", source.data, "--state", tmp_path / "ray", *more).stdout for more in (["--on", "ray"], [])
    ]
    assert answers[0] == answers[1]
    assert runner.invoke(app, ["learn", "x", "--state", "y", "--on", "spark"]).exit_code == 2
