"""shoestring compare learn, on real digits, as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shoestring.cli._compare_learn import _held_out
from shoestring.learn import GACIL, TEEN

DIGITS, LABELS = load_digits(return_X_y=True)
NAMES = np.array([f"digit {k}" for k in range(10)])[LABELS]


@pytest.fixture
def digits(tmp_path):
    np.savez(tmp_path / "digits.npz", X=DIGITS.astype(np.float32) / 16, y=NAMES)
    return tmp_path / "digits.npz"


def test_every_learner_on_the_same_stream(shoestring, digits, tmp_path):
    plot = tmp_path / "plot.png"
    told = json.loads(
        shoestring("compare", "learn", digits, "--seeds", 1, "--tasks", 4, "--plot", plot, "--json").stdout
    )
    assert (told["rows"], told["classes"], told["tasks"]) == (1797, 10, 4)
    learners = told["learners"]
    assert {"g-acil", "teen", "fetril", "dkvb", "nearest class mean", "SGD, as it comes"} < set(learners)
    # What does not depend on the order can be had without a stream.
    X, test = DIGITS.astype(np.float32).astype(float) / 16, _held_out(NAMES, 0.25, 0)
    assert 0.2 < test.mean() < 0.3
    for name, joint in {
        "g-acil": GACIL(n_components=2000),
        "nearest class mean": TEEN(shift=0.0),
        "all rows, refitted": make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
    }.items():
        score = joint.fit(X[~test], NAMES[~test]).score(X[test], NAMES[test])
        assert learners[name]["accuracy at the end"] == pytest.approx(score, abs=0.003), name
        assert learners[name]["accuracy at the end"] == learners[name]["along"][-1]
    order = [figures["accuracy at the end"] for figures in learners.values()]
    assert order == sorted(order, reverse=True)
    assert learners["SGD, as it comes"]["forgetting"] > 0.5 > learners["g-acil"]["forgetting"]
    assert learners["all rows, refitted"]["bytes kept per class"] == round((~test).sum() * 64 * 8 / 10)
    with Image.open(plot) as picture:
        assert picture.size[0] > 500


def test_one_table_and_bad_usage(shoestring, digits, tmp_path):
    plot = tmp_path / "plot.png"
    out = shoestring("compare", "learn", digits, "--seeds", 1, "--tasks", 1, "--plot", plot).stdout
    assert "10 classes in 1 tasks" in out
    assert "every row" in out
    assert "too few for 11 tasks" in shoestring("compare", "learn", digits, "--tasks", 11, code=1).stderr
    assert "--shots is for classify" in shoestring("compare", "learn", digits, "--shots", 5, code=2).stderr
    assert "--tasks is for learn" in shoestring("compare", "classify", digits, "--tasks", 5, code=2).stderr
    assert "--held-out must be" in shoestring("compare", "learn", digits, "--held-out", 1.5, code=2).stderr
    np.savez(tmp_path / "one.npz", X=DIGITS[:3], y=["a", "a", "b"])
    alone = shoestring("compare", "learn", tmp_path / "one.npz", "--tasks", 2, code=1).stderr
    assert "class b has one row" in alone
