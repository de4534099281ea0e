"""shoestring classify and compare, on real tables and images, as a user types them."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

WINE = load_wine(as_frame=True).frame.rename(columns={"target": "label"})
NAMED = WINE.assign(label=np.array(["barolo", "grignolino", "barbera"])[WINE["label"]])
DIGITS, LABELS = load_digits(return_X_y=True)


@pytest.fixture
def half(tmp_path):
    """The wines, named, with the label of every other one blank; and those labels."""
    frame = NAMED.copy()
    frame.loc[frame.index % 2 == 1, "label"] = ""
    frame.to_csv(tmp_path / "half.csv", index=False)
    return tmp_path / "half.csv", NAMED["label"].to_numpy()[1::2]


@pytest.mark.parametrize("method", ["gbnn", "wide-deep", "transductive-clustering"])
def test_rows_without_a_label_are_labelled(shoestring, half, method):
    file, truth = half
    out = shoestring("classify", file, "--method", method)
    rows = list(csv.DictReader(io.StringIO(out.stdout)))
    assert [row["name"] for row in rows] == [f"row {i}" for i in range(1, len(NAMED), 2)]
    assert np.mean([row["label"] for row in rows] == truth) > 0.9
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    assert "accuracy" not in out.stderr  # nobody knows the labels asked for


def test_hidden_labels_are_not_seen(shoestring, tmp_path):
    # With labels drawn at random nothing can be learnt; seeing the hidden ones would give more than a third.
    frame = WINE.assign(label=np.random.default_rng(0).integers(0, 3, len(WINE)))
    frame.to_csv(tmp_path / "noise.csv", index=False)
    told = json.loads(shoestring("classify", tmp_path / "noise.csv", "--method", "wide-deep", "--held-out", 0.5,
                                 "--json").stdout)  # fmt: skip
    assert told["labels_shown"] == pytest.approx(len(WINE) / 2, abs=2)
    assert told["accuracy"] < 0.5


def test_shots_are_labels_a_class(shoestring, tmp_path):
    NAMED.to_csv(tmp_path / "wine.csv", index=False)
    told = json.loads(shoestring("classify", tmp_path / "wine.csv", "--method", "transductive-clustering", "--shots", 3,
                                 "--json").stdout)  # fmt: skip
    assert told["labels_shown"] == 9
    assert len(told["rows"]) == len(WINE) - 9
    assert told["accuracy"] > 0.85


def test_a_word_for_no_label(shoestring, tmp_path):
    frame = WINE.copy()
    frame.loc[::2, "label"] = -1
    frame.to_csv(tmp_path / "w.csv", index=False)
    told = json.loads(
        shoestring("classify", tmp_path / "w.csv", "--method", "gbnn", "--unlabelled=-1", "--json").stdout
    )
    assert len(told["rows"]) == 89
    assert {row["label"] for row in told["rows"]} == {0, 1, 2}


def test_out_writes_the_file_whole(shoestring, half, tmp_path):
    file, truth = half
    shoestring("classify", file, "--method", "wide-deep", "--out", tmp_path / "labels.csv")
    assert len(pd.read_csv(tmp_path / "labels.csv")) == len(truth)


def test_loki_answers_with_a_label_nobody_gave(shoestring, tmp_path):
    # Three points on a line; 1 is never labelled, and lies between 0 and 2.
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 60)
    frame = pd.DataFrame({"a": y + 0.1 * rng.standard_normal(180), "label": y.astype(object)})
    frame.loc[frame["label"] == 1, "label"] = ""
    frame.to_csv(tmp_path / "line.csv", index=False)
    told = json.loads(shoestring("classify", tmp_path / "line.csv", "--ordered", "--method", "loki", "--json").stdout)
    assert {row["label"] for row in told["rows"]} == {1}


def test_loki_takes_a_tree_or_a_square(shoestring, tmp_path):
    NAMED.to_csv(tmp_path / "wine.csv", index=False)
    (tmp_path / "tree.json").write_text(
        json.dumps({"wine": {"Piedmont": {"barolo": {}, "barbera": {}, "grignolino": {}}, "Tuscany": {"chianti": {}}}})
    )
    (tmp_path / "square.csv").write_text("barolo,barbera,grignolino\n0,1,1\n1,0,1\n1,1,0\n")
    accuracy = {}
    for name in ("tree.json", "square.csv"):
        told = shoestring(
            "classify", tmp_path / "wine.csv", "--method", "loki", "--distances", tmp_path / name, "--json"
        )
        accuracy[name] = json.loads(told.stdout)["accuracy"]
    assert accuracy["square.csv"] > 0.9  # all distances equal: the most probable class
    assert accuracy["tree.json"] > 0.5  # hedges to Piedmont where it is unsure


def test_domains_instead_of_labels(shoestring, tmp_path):
    rng = np.random.default_rng(1)
    shares = np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    domain = np.repeat(np.arange(3), 300)
    kind = (rng.random(900) < shares[domain, 1]).astype(int)
    X = DIGITS[np.array([rng.choice(np.flatnonzero(k == LABELS)) for k in kind])]
    frame = pd.DataFrame(X).add_prefix("pixel").assign(site=[f"s{d}" for d in domain], kind=kind)
    frame.to_csv(tmp_path / "sites.csv", index=False)
    told = json.loads(
        shoestring("classify", tmp_path / "sites.csv", "--method", "latent-label-shift", "--domains", "site",
                   "--drop", "kind", "--classes", 2, "--json").stdout
    )  # fmt: skip
    found = np.array([row["label"] for row in told["rows"]])
    assert set(found) == {"class 1", "class 2"}
    same = np.mean((found == "class 2") == kind)
    assert max(same, 1 - same) > 0.85
    assert told["accuracy"] is None


def test_images_go_through_a_backbone(shoestring, tmp_path):
    from shoestring.data import load

    rows = load("fashion", split="test")
    labels = np.array(rows["label"])
    for k in (1, 8):
        folder = tmp_path / "photos" / rows.features["label"].int2str(k)
        folder.mkdir(parents=True)
        for i in np.flatnonzero(labels == k)[:8]:
            rows[int(i)]["image"].save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    out = shoestring("classify", tmp_path / "photos", "--method", "transductive-clustering", "--shots", 2, "--json")
    told = json.loads(out.stdout)
    assert len(told["rows"]) == 12
    assert told["accuracy"] == 1
    assert "broken.png" in out.stderr


def test_compare_scores_everyone_on_the_same_hidden_rows(shoestring, tmp_path):
    NAMED.to_csv(tmp_path / "wine.csv", index=False)
    out = shoestring("compare", "classify", tmp_path / "wine.csv", "--shots", 5, "--seeds", 2, "--plot",
                     tmp_path / "c.png", "--json")  # fmt: skip
    told = json.loads(out.stdout)
    assert set(told["methods"]) == {
        "gbnn", "wide-deep", "transductive-clustering", "logistic regression", "nearest neighbour",
    }  # fmt: skip
    assert set(told["do_not_fit"]) == {"loki", "latent-label-shift"}
    assert "--domains" in told["do_not_fit"]["latent-label-shift"]
    assert told["labels_shown"] == 15
    assert told["rows_scored"] == len(WINE) - 15
    means = [m["accuracy"] for m in told["methods"].values()]
    assert means == sorted(means, reverse=True)
    assert Image.open(tmp_path / "c.png").size[0] > 500
    # The references are scikit-learn's own, on the rows the draw shows.
    from shoestring.cli import _classify

    problem = _classify.read(
        str(tmp_path / "wine.csv"), "all", label=None, content=None, drop=None, domains=None, unlabelled=None,
        distances=None, ordered=False, classes=None, backbone=None, strict=False, device="cpu",
    )  # fmt: skip
    for seed in range(2):
        draw = _classify.hide(problem, 5, 0.25, seed)
        X = (
            StandardScaler()
            .fit(WINE.drop(columns="label").to_numpy()[draw.shown])
            .transform(WINE.drop(columns="label").to_numpy())
        )
        for name, model in (
            ("nearest neighbour", KNeighborsClassifier(1)),
            ("logistic regression", LogisticRegression(max_iter=1000)),
        ):
            model.fit(X[draw.shown], NAMED["label"][draw.shown])
            expected = model.score(X[~draw.shown], NAMED["label"][~draw.shown])
            assert told["methods"][name]["draws"][seed] == pytest.approx(expected)


def test_compare_prints_one_table_and_what_does_not_fit(shoestring, tmp_path):
    WINE.to_csv(tmp_path / "wine.csv", index=False)
    plot = tmp_path / "c.png"
    out = shoestring("compare", "classify", tmp_path / "wine.csv", "--ordered", "--seeds", 1, "--plot", plot)
    assert "loki" in out.stdout
    assert "latent-label-shift needs --domains" in out.stdout
    assert str(plot) in out.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "gbn"], 2, "did you mean 'gbnn'?"),
        (["--method", "loki"], 1, "loki needs distances between labels"),
        (["--method", "latent-label-shift"], 1, "needs --domains"),
        (["--method", "latent-label-shift", "--domains", "half"], 1, "as many domains as classes, got 2 for 3"),
        (["--method", "gbnn", "--label", "nothing"], 1, "--label"),
        (["--method", "gbnn", "--drop", "nothing"], 1, "--drop"),
        (["--method", "gbnn", "--held-out", "1.5"], 2, "--held-out must be between 0 and 1"),
        (["--method", "loki", "--ordered"], 1, "--ordered: labels must be whole numbers"),
        (["--method", "gbnn", "--label", "alcohol"], 1, "whole numbers or text"),
    ],
)
def test_bad_input_is_one_line(shoestring, tmp_path, arguments, code, message):
    NAMED.assign(half=np.arange(len(NAMED)) % 2).to_csv(tmp_path / "wine.csv", index=False)
    out = shoestring("classify", tmp_path / "wine.csv", *arguments, code=code)
    line = out.stderr.rstrip("\n").rsplit("\n")[-1]  # before it, `datasets` may draw its bar in this process
    assert line.startswith("error: ")
    assert message in line
    assert out.stdout == ""


def test_bad_tables_and_files_are_one_line(shoestring, tmp_path):
    NAMED.assign(alcohol=np.nan).to_csv(tmp_path / "nan.csv", index=False)
    assert "alcohol" in shoestring("classify", tmp_path / "nan.csv", "--method", "gbnn", code=1).stderr
    NAMED.to_csv(tmp_path / "wine.csv", index=False)
    (tmp_path / "d.csv").write_text("barolo,barbera\n0,1\n1,0\n")
    out = shoestring("classify", tmp_path / "wine.csv", "--method", "loki", "--distances", tmp_path / "d.csv", code=1)
    assert "has no label 'grignolino'" in out.stderr
    WINE.assign(label="").to_csv(tmp_path / "none.csv", index=False)
    assert "two classes" in shoestring("compare", "classify", tmp_path / "none.csv", code=1).stderr
    assert "room must be classify" in shoestring("compare", "detect", tmp_path / "wine.csv", code=2).stderr
