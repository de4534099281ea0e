"""Chunks hold every readable row once, in order, whatever their size."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from shoestring import backbones, data
from shoestring.data.features import Columns, chunks, find_columns, row_hashes


@pytest.fixture(scope="module")
def pixels():
    """A real frozen function of images that costs nothing: 8 x 8 gray means."""
    return backbones.load(lambda images: images.float().mean(1).flatten(1), image_size=8)


def test_columns_of_the_bundles():
    assert find_columns(data.load("fashion", split="test")) == Columns("image", "image", "label")
    assert find_columns(data.load("emoji", split="google"), label="category").label == "category"
    assert find_columns(data.load("kjv"), content="text") == Columns("text", "text", "book")


def test_columns_of_tables():
    rows = datasets.Dataset.from_dict({"f": [[1.0, 2.0]], "label": ["a"], "note": ["x"]})
    assert find_columns(rows) == Columns("features", "f", "label")
    assert find_columns(rows, content="note") == Columns("text", "note", "label")
    for options, message in [({"label": "no"}, "no column 'no'"), ({"content": "label", "label": "note"}, None)]:
        if message:
            with pytest.raises(ValueError, match=message):
                find_columns(rows, **options)
        else:
            assert find_columns(rows, **options) == Columns("text", "label", "note")
    with pytest.raises(ValueError, match="several columns hold text: a, b"):
        find_columns(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}))
    with pytest.raises(ValueError, match="no column holds"):
        find_columns(datasets.Dataset.from_dict({"a": [1], "b": [2.0]}))
    with pytest.raises(ValueError, match="neither features nor images nor text"):
        find_columns(datasets.Dataset.from_dict({"a": [1], "b": ["x"]}), content="a")


@pytest.mark.parametrize("size", [1, 7, 60])
def test_feature_rows_come_as_given(size, tmp_path):
    X, y = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32), np.arange(50) % 4
    np.savez(tmp_path / "f.npz", X=X, y=y)
    rows = data.load(tmp_path / "f.npz")
    parts = list(chunks(rows, find_columns(rows), size=size))
    np.testing.assert_array_equal(np.concatenate([part.X for part in parts]), X)
    np.testing.assert_array_equal(np.concatenate([part.y for part in parts]), y)
    assert [len(part.names) for part in parts] == [len(c) for c in np.split(y, range(size, 50, size))]
    assert parts[-1].names[-1] == "row 49"


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_chunks_are_images_at_once(pixels, streaming):
    rows = data.load("fashion", split="test").select(range(40))
    whole = pixels.extract(rows["image"])
    names = rows.features["label"].int2str(rows["label"])
    given = rows.to_iterable_dataset() if streaming else rows
    parts = list(chunks(given, find_columns(given), pixels, size=13))
    np.testing.assert_allclose(np.concatenate([part.X for part in parts]), whole, atol=1e-5)
    assert [str(label) for part in parts for label in part.y] == names


def test_broken_images_are_named_and_the_others_kept(pixels, tmp_path):
    rows = data.load("fashion", split="test")
    for i, folder in enumerate(("a", "a", "b", "b")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows[i]["image"].save(tmp_path / folder / f"{i}.png")
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "3.png").write_bytes(b"")
    folder = data.load(tmp_path)
    for size in (1, 4):
        parts = list(chunks(folder, find_columns(folder), pixels, size=size))
        assert [label for part in parts for label in part.y] == ["a", "b"]
        assert [name[-7:] for part in parts for name in part.names] == ["a/0.png", "b/2.png"]
        skipped = [skip for part in parts for skip in part.skipped]
        assert [name[-7:] for name, _ in skipped] == ["a/1.png", "b/3.png"]
        assert all(reason for _, reason in skipped)
        kept = np.concatenate([part.X for part in parts])
        np.testing.assert_allclose(kept, pixels.extract([rows[0]["image"], rows[2]["image"]]), atol=1e-5)
    with pytest.raises(ValueError, match=r"1\.png"):
        list(chunks(folder, find_columns(folder), pixels, strict=True))


def test_wrong_backbone_and_size(pixels):
    rows = data.load("fashion", split="test").select(range(3))
    texts = data.load("kjv").select(range(3))
    with pytest.raises(ValueError, match="a backbone is needed"):
        next(chunks(rows, find_columns(rows)))
    with pytest.raises(ValueError, match="takes image"):
        next(chunks(texts, Columns("text", "text", None), pixels))
    with pytest.raises(ValueError, match="size must be >= 1"):
        next(chunks(rows, find_columns(rows), pixels, size=0))


def hashes(rows, size=1000, **columns):
    return np.concatenate(list(row_hashes(rows, find_columns(rows, **columns), size)))


def test_a_row_is_told_by_its_content_and_label_alone():
    def table(X, y):
        return hashes(datasets.Dataset.from_dict({"X": X, "y": y}).with_format("numpy"))

    X = [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]
    first = table(X, ["a", "b", "a"])
    assert (first.shape, first.dtype) == ((3, 16), np.uint8)
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first, table(X[::-1], ["a", "b", "a"])[::-1])
    others = [table(X, ["a", "a", "b"])[2], table([[1.0, 2.5]], ["a"])[0], table([[2.0, 1.0]], ["a"])[0], first[1]]
    others += [table(X, ["1", "b", "a"])[0], table(X, [1, 2, 3])[0]]  # a number is not its name
    assert not any(np.array_equal(first[0], other) for other in others)
    texts = datasets.Dataset.from_dict({"text": ["ab", "a"], "y": ["c", "bc"]})
    assert not np.array_equal(*hashes(texts))


@pytest.mark.parametrize("size", [1, 7, 40])
def test_images_are_told_by_their_files_wherever_they_are(tmp_path, size):
    rows = data.load("fashion", split="test").select(range(40))
    for folder in ("here", "there"):
        for i, row in enumerate(rows):
            (tmp_path / folder / str(row["label"])).mkdir(parents=True, exist_ok=True)
            row["image"].save(tmp_path / folder / str(row["label"]) / f"{i}.png")
    here, there = data.load(tmp_path / "here"), data.load(tmp_path / "there")
    np.testing.assert_array_equal(hashes(here, size), hashes(there))
    broken = next((tmp_path / "there").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:-1])
    assert (hashes(here) != hashes(data.load(tmp_path / "there"))).any(1).sum() == 1
    for file in (tmp_path / "there").rglob("*.png"):
        file.unlink()
    assert len(np.unique(hashes(there), axis=0)) == 40  # the backbone will say that they are gone


def test_known_chunks_are_left_out_before_the_backbone(tmp_path):
    seen, asked = [], []
    backbone = backbones.load(lambda images: seen.append(len(images)) or images.float().mean((2, 3)), image_size=8)
    rows = data.load("fashion", split="test").select(range(10))
    told = hashes(rows)

    def known(part):
        asked.append(part)
        return len(asked) == 2

    seen.clear()
    parts = list(chunks(rows, find_columns(rows), backbone, size=4, known=known))
    np.testing.assert_array_equal(np.concatenate(asked), told)
    assert seen == [4, 2]
    assert [part.positions.tolist() for part in parts] == [[0, 1, 2, 3], [8, 9]]
    np.testing.assert_array_equal(np.concatenate([part.hashes for part in parts]), told[[0, 1, 2, 3, 8, 9]])
    assert parts[1].names == ["row 8", "row 9"]
    assert next(chunks(rows, find_columns(rows), backbone)).hashes is None
