"""shoestring learn, predict and forget, on real rows and real images, as a user types them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from shoestring.learn import GACIL

DIGITS, LABELS = load_digits(return_X_y=True)
NAMES = np.array([f"digit {k}" for k in range(10)])[LABELS]


@pytest.fixture
def digits(tmp_path):
    """digits.npz, and the two halves a.npz and b.npz."""
    for name, rows in (("digits", slice(None)), ("a", slice(0, 900)), ("b", slice(900, None))):
        np.savez(tmp_path / f"{name}.npz", X=DIGITS[rows], y=NAMES[rows])
    return tmp_path


def garments(folder: Path, n: int = 4) -> Path:
    """A folder of real pictures, one folder a class."""
    from shoestring.data import load

    rows = load("fashion", split="test")
    for label in (0, 1, 8):
        name = rows.features["label"].int2str(label).replace("/", "-")
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(np.array(rows["label"]) == label)[:n]:
            rows[int(i)]["image"].save(folder / name / f"{i}.png")
    return folder


def test_learning_in_two_calls_is_learning_at_once(shoestring, digits):
    shoestring("learn", digits / "a.npz", "--state", digits / "s", "--n-components", 300)
    out = shoestring("learn", digits / "b.npz", "--state", digits / "s", "--chunk", 50, "--json")
    told = json.loads(out.stdout)
    joint = GACIL(n_components=300).fit(DIGITS.astype(np.float32), NAMES)
    kept = GACIL.load(digits / "s" / "model.safetensors")
    np.testing.assert_allclose(kept.coef_, joint.coef_, atol=1e-9)
    assert told["rows"] == len(LABELS) - 900
    assert told["skipped"] == []
    assert {name: c["rows learnt"] for name, c in told["classes"].items()} == {
        f"digit {k}": int((LABELS == k).sum()) for k in range(10)
    }
    assert 0.85 < told["accuracy_before_learnt"] < 1
    card = (digits / "s" / "README.md").read_text()
    assert "1,797" in card
    assert card.count("learnt ") >= 2


def test_accuracy_before_learnt_is_that_of_the_model_before(shoestring, digits):
    told = json.loads(
        shoestring("learn", digits / "digits.npz", "--state", digits / "s", "--chunk", 900, "--no-shuffle",
                   "--n-components", 200, "--json").stdout
    )  # fmt: skip
    model = GACIL(n_components=200).fit(DIGITS[:900].astype(np.float32), NAMES[:900])
    expected = model.score(DIGITS[900:].astype(np.float32), NAMES[900:])
    assert told["accuracy_before_learnt"] == pytest.approx(expected)


def test_test_set_accuracy(shoestring, digits):
    told = json.loads(
        shoestring("learn", digits / "a.npz", "--state", digits / "s", "--test", digits / "b.npz",
                   "--n-components", 300, "--gamma", 1, "--json").stdout
    )  # fmt: skip
    model = GACIL(n_components=300, gamma=1.0).fit(DIGITS[:900].astype(np.float32), NAMES[:900])
    assert told["test_accuracy"] == pytest.approx(model.score(DIGITS[900:].astype(np.float32), NAMES[900:]))
    assert told["gamma"] == 1.0


def test_forget_is_never_having_learnt(shoestring, digits):
    shoestring("learn", digits / "digits.npz", "--state", digits / "s", "--n-components", 300)
    out = shoestring("forget", digits / "b.npz", "--state", digits / "s")
    assert "897 rows forgotten; 900 rows and 10 classes left" in out.stdout
    model = GACIL.load(digits / "s" / "model.safetensors")
    never = GACIL(n_components=300).fit(DIGITS[:900].astype(np.float32), NAMES[:900])
    np.testing.assert_allclose(model.coef_, never.coef_, atol=1e-9)
    told = json.loads(
        shoestring("forget", digits / "a.npz", "--class", "digit 3", "--state", digits / "s", "--json").stdout
    )
    assert told["rows_forgotten"] == (LABELS[:900] == 3).sum()
    assert "digit 3" not in told["classes"]
    assert "forgot" in (digits / "s" / "README.md").read_text()


def test_forget_refuses_what_was_never_learnt_and_changes_nothing(shoestring, digits):
    shoestring("learn", digits / "a.npz", "--state", digits / "s", "--n-components", 100)
    before = {path.name: path.read_bytes() for path in (digits / "s").iterdir()}
    result = shoestring("forget", digits / "digits.npz", "--state", digits / "s", code=1)
    assert "only" in result.stderr
    assert "cannot forget" in result.stderr
    assert shoestring("forget", "--class", "digit 77", "--state", digits / "s", code=1).stderr.startswith(
        "error: label"
    )
    shoestring("forget", "--state", digits / "s", code=2)
    assert {path.name: path.read_bytes() for path in (digits / "s").iterdir()} == before


def test_dropping_a_class_without_its_rows(shoestring, digits):
    shoestring("learn", digits / "a.npz", "--state", digits / "s", "--n-components", 100)
    shoestring("forget", "--class", "digit 5", "--state", digits / "s")
    told = json.loads(shoestring("predict", digits / "b.npz", "--state", digits / "s", "--json").stdout)
    assert "digit 5" not in {row["label"] for row in told["rows"]}


def test_predict_writes_csv(shoestring, digits):
    shoestring("learn", digits / "a.npz", "--state", digits / "s", "--n-components", 300)
    result = shoestring("predict", digits / "b.npz", "--state", digits / "s", "--out", digits / "labels.csv")
    rows = list(csv.DictReader((digits / "labels.csv").open()))
    model = GACIL.load(digits / "s" / "model.safetensors")
    assert [row["label"] for row in rows] == model.predict(DIGITS[900:].astype(np.float32)).tolist()
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    assert "accuracy 0." in result.stderr
    assert (
        shoestring("predict", digits / "b.npz", "--state", digits / "s").stdout == (digits / "labels.csv").read_text()
    )


def test_a_folder_of_ones_own_images(shoestring, tmp_path):
    photos = garments(tmp_path / "photos")
    (photos / "Bag" / "broken.png").write_bytes(b"\x89PNG but no more")
    told = json.loads(shoestring("learn", photos, "--state", tmp_path / "s", "--n-components", 200, "--json").stdout)
    assert told["rows"] == 12
    assert told["backbone"] == "efficientnet-lite0"
    assert [Path(s["name"]).name for s in told["skipped"]] == ["broken.png"]
    loose = tmp_path / "new"
    loose.mkdir()
    for file in (photos / "Bag").glob("[0-9]*.png"):
        Image.open(file).save(loose / file.name)
    told = json.loads(shoestring("predict", loose, "--state", tmp_path / "s", "--json").stdout)
    assert [row["label"] for row in told["rows"]] == ["Bag"] * 4
    assert told["accuracy"] is None
    result = shoestring("learn", photos, "--state", tmp_path / "t", "--strict", code=1)
    assert "broken.png" in result.stderr
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["learn", "{d}/none.npz", "--state", "{d}/s"], 1, "no such file"),
        (["learn", "{d}/empty", "--state", "{d}/s"], 1, "no images found"),
        (["learn", "{d}/a.npz", "--state", "{d}/s", "--gamma", "-1"], 2, "gamma"),
        (["learn", "{d}/a.npz", "--state", "{d}/s", "--gamma", "much"], 2, "gamma"),
        (["learn", "{d}/a.npz", "--state", "{d}/s", "--chunk", "0"], 2, "--chunk"),
        (["learn", "{d}/a.npz", "--state", "{d}/s", "--method", "magic"], 2, "method"),
        (["learn", "{d}/a.npz", "--state", "{d}/s", "--label", "colour"], 1, "colour"),
        (["learn", "{d}/a.npz"], 2, "--state"),
        (["predict", "{d}/a.npz", "--state", "{d}/s"], 1, "no learner in"),
        (["forget", "{d}/a.npz", "--state", "{d}/s"], 1, "no learner in"),
        (["learn", "{d}/nan.npz", "--state", "{d}/s"], 1, "NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(shoestring, digits, arguments, code, message):
    (digits / "empty").mkdir()
    np.savez(digits / "nan.npz", X=np.full((3, 4), np.nan), y=[0, 1, 2])
    result = shoestring(*(a.format(d=digits) for a in arguments), code=code)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (digits / "s").exists()


def test_a_state_of_another_kind_is_refused(shoestring, digits, tmp_path):
    shoestring("learn", digits / "a.npz", "--state", digits / "s", "--n-components", 100)
    before = (digits / "s" / "model.safetensors").read_bytes()
    np.savez(digits / "wide.npz", X=np.zeros((3, 7)), y=["digit 1"] * 3)
    np.savez(digits / "ints.npz", X=DIGITS[:3], y=LABELS[:3])
    for data, options, message in [
        (garments(tmp_path / "photos", 1), [], "backbone"),
        (digits / "a.npz", ["--n-components", 200], "n_components"),
        (digits / "a.npz", ["--gamma", 5], "gamma"),
        (digits / "wide.npz", [], "7 features"),
        (digits / "ints.npz", [], "integers"),
    ]:
        assert message in shoestring("learn", data, "--state", digits / "s", *options, code=1).stderr
    assert (digits / "s" / "model.safetensors").read_bytes() == before
    (digits / "s" / "model.safetensors").write_bytes(before[:1000])
    assert "truncated or damaged" in shoestring("learn", digits / "a.npz", "--state", digits / "s", code=1).stderr


def test_ctrl_c_saves_what_was_learnt(digits):
    np.savez(digits / "many.npz", X=np.tile(DIGITS, (60, 1)), y=np.tile(NAMES, 60))
    command = [sys.executable, "-m", "shoestring", "learn", str(digits / "many.npz"), "--state", str(digits / "s"),
               "--chunk", "20", "--n-components", "900", "--save-every", "0.2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (digits / "s" / "model.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    model = GACIL.load(digits / "s" / "model.safetensors")
    assert f"{model.n_samples_seen_:,} rows were learnt and are saved" in told
    assert 0 < model.n_samples_seen_ < 60 * len(LABELS)
    assert model.n_samples_seen_ % 20 == 0
