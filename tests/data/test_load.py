from __future__ import annotations

import doctest
import hashlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from shoestring import data

REPO = Path(__file__).resolve().parents[2]
BUNDLES = REPO / "src" / "shoestring" / "data" / "bundles"
ROWS = {
    ("fashion", "train"): 20_000,
    ("fashion", "test"): 5_000,
    ("emoji", "google"): 1_906,
    ("emoji", "twitter"): 1_906,
    ("glosses", "train"): 105_946,
    ("glosses", "test"): 11_713,
    ("kjv", "train"): 31_102,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches of the tests' files out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def sha256_of_pixels(rows: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(row["image"]).tobytes())
    return digest.hexdigest()


# The bundles


@pytest.mark.parametrize(("name", "split"), ROWS)
def test_every_split_has_all_its_rows(name, split):
    assert len(data.load(name, split=split)) == ROWS[name, split]


def test_no_other_bundle_and_no_other_split():
    assert data.bundles() == ["emoji", "fashion", "glosses", "kjv"]
    assert {(name, split) for name in data.bundles() for split in data.load(name, split=None)} == set(ROWS)


def test_bundles_are_under_25_megabytes():
    assert sum(file.stat().st_size for file in BUNDLES.iterdir()) < 25_000_000


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        (
            "fashion",
            ["Zalando SE", "Permission is hereby granted", "dataset-fashion-mnist 0.0~git2020"],
        ),
        (
            "emoji",
            ["Apache License", "creativecommons.org/licenses/by/4.0", "Cal Henderson", "Twitter, Inc", "google 16.0.0"],
        ),
        ("glosses", ["Princeton University", "without fee or", "wordnet-base 1:3.0"]),
        ("kjv", ["public domain", "Chip Chapin", "bible-kjv-text 4."]),
    ],
)
def test_licence_names_source_terms_and_changes(name, phrases):
    text = data.license(name)
    for phrase in [*phrases, "Changed:"]:
        assert phrase in text


def test_licence_of_no_bundle_is_refused():
    with pytest.raises(ValueError, match="emoji, fashion, glosses, kjv, got 'mnist'"):
        data.license("mnist")


@pytest.mark.parametrize(("name", "split"), ROWS)
def test_datasets_reads_the_files_natively(name, split):
    theirs = datasets.load_dataset("parquet", data_files=str(BUNDLES / f"{name}-{split}.parquet"), split="train")
    ours = data.load(name, split=split)
    assert theirs.features == ours.features
    assert theirs.data.table.equals(ours.data.table)


# Computed from the idx files of the Debian package by a program of four lines, apart from the packing script.
@pytest.mark.parametrize(
    ("split", "first_100", "everything", "labels"),
    [
        (
            "train",
            "9fd5e05238929f78618002dd971c29d7154e418c5e6c5159dcbc48bead93a90f",
            "25f2e16a84fc059e5d830e2843f2902952e8893c75dfbbd96b3ee1042842ec9e",
            "a300155992331d9b103227d1800093271ce6f0e10a1bf12dc9a46c6a627d6363",
        ),
        (
            "test",
            "d8c9b85550f6c8fa33478e27cb3fe70fd34b4cc96e6ab91b911853b51fb3d527",
            "bf02d0b4c8d6c9b121d524bffcdacfc2779b482a78d008386eee33780ec62ad3",
            "7d1b4398f5702435e60327cc42350d43d4d0287df47e32f7ba489339c1338a8f",
        ),
    ],
)
def test_fashion_is_the_source_pixel_for_pixel(split, first_100, everything, labels):
    rows = data.load("fashion", split=split)
    assert sha256_of_pixels(rows.select(range(100))) == first_100
    assert sha256_of_pixels(rows) == everything
    assert hashlib.sha256(bytes(list(rows["label"]))).hexdigest() == labels


@pytest.mark.parametrize(("split", "per_class"), [("train", 2000), ("test", 500)])
def test_fashion_is_balanced(split, per_class):
    assert Counter(data.load("fashion", split=split)["label"]) == dict.fromkeys(range(10), per_class)


def test_fashion_classes_are_named():
    rows = data.load("fashion")
    assert rows.features["label"].int2str([9, 0, 3]) == ["Ankle boot", "T-shirt/top", "Dress"]
    assert rows[0]["label"] == 9
    assert rows[0]["image"].mode == "L"


@pytest.mark.parametrize(
    ("style", "digest"),
    [
        ("google", "6cef32ce667b509c928ee3a75723e07de593c2f123f129b745466e28d18d8aa1"),
        ("twitter", "ac84c4eb0f205c8aedac6d11509a5055279284de4fab66259e9412c1ffe4b11f"),
    ],
)
def test_every_emoji_decodes_to_the_source_on_white(style, digest):
    rows = data.load("emoji", split=style)
    assert {(row["image"].size, row["image"].mode) for row in rows} == {((64, 64), "RGB")}
    assert sha256_of_pixels(rows) == digest
    assert set(rows["style"]) == {style}


def test_emoji_of_both_styles_are_in_the_same_rows():
    google, twitter = (data.load("emoji", split=style) for style in ("google", "twitter"))
    for column in ("name", "category", "subcategory", "unified"):
        assert google[column][:] == twitter[column][:]
    assert google.features == twitter.features
    assert len(set(google["unified"])) == 1906
    assert google[0]["name"] == "grinning face"
    assert google[0]["unified"] == "1F600"


def test_emoji_categories_are_a_hierarchy_without_components():
    rows = data.load("emoji", split="google").remove_columns("image")
    categories, subcategories = rows.features["category"], rows.features["subcategory"]
    assert categories.num_classes == 9
    assert subcategories.num_classes == 98
    assert "Component" not in categories.names
    assert Counter(categories.int2str(list(rows["category"])))["People & Body"] == 386
    assert len({(row["category"], row["subcategory"]) for row in rows}) == 98  # each below one category only
    assert all(name == name.lower() for name in rows["name"])


@pytest.fixture(scope="module")
def synsets():
    return {row["id"]: row for row in data.load("glosses", split="all").to_list()}


def test_hypernyms_resolve(synsets):
    assert len(synsets) == 117_659
    assert sum(len(row["hypernyms"]) for row in synsets.values()) == 97_666  # 89,089 "@" and 8,577 "@i"
    assert all(above in synsets for row in synsets.values() for above in row["hypernyms"])


def test_every_noun_is_an_entity(synsets):
    below: dict[str, list[str]] = {}
    for row in synsets.values():
        for above in row["hypernyms"]:
            below.setdefault(above, []).append(row["id"])
    reached, frontier = set(), ["n00001740"]
    while frontier:
        synset = frontier.pop()
        if synset not in reached:
            reached.add(synset)
            frontier += below.get(synset, [])
    assert synsets["n00001740"]["words"] == ["entity"]
    assert reached == {name for name in synsets if name.startswith("n")}


def test_a_synset_in_full(synsets):
    lexnames = data.load("glosses").features["lexname"]
    assert synsets["n02084071"] == {
        "id": "n02084071",
        "words": ["dog", "domestic dog", "Canis familiaris"],
        "pos": "n",
        "lexname": lexnames.str2int("noun.animal"),
        "gloss": "a member of the genus Canis (probably descended from the common wolf) that has been domesticated "
        "by man since prehistoric times; occurs in many breeds",
        "examples": '"the dog barked all night"',
        "hypernyms": ["n02083346", "n01317541"],  # canine, domestic animal
    }


def test_lexnames_agree_with_the_part_of_speech(synsets):
    names = data.load("glosses").features["lexname"].names
    assert len(names) == 45
    assert {row["lexname"] for row in synsets.values()} == set(range(45))
    prefixes = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
    assert all(names[row["lexname"]].split(".")[0] == prefixes[row["pos"]] for row in synsets.values())


@pytest.mark.parametrize(
    ("word", "lexname"),
    [
        *(("volleyball", "noun.act"), ("swordfish", "noun.animal"), ("crowbar", "noun.artifact")),
        *(("neuroglia", "noun.body"), ("milk chocolate", "noun.food"), ("Beaufort Sea", "noun.object")),
        *(("harmattan", "noun.phenomenon"), ("strap fern", "noun.plant"), ("childbirth", "noun.process")),
        *(("tesseract", "noun.shape"), ("bulimia", "noun.state"), ("carbon monoxide", "noun.substance")),
        *(("smirk", "verb.body"), ("drool over", "verb.emotion"), ("overstay", "verb.stative"), ("mown", "adj.all")),
        *(("acidimetric", "adj.pert"), ("unsaponified", "adj.ppl"), ("soon", "adv.all"), ("biont", "noun.Tops")),
    ],
)
def test_lexnames_are_those_of_well_known_words(synsets, word, lexname):
    names = data.load("glosses").features["lexname"].names
    assert lexname in {names[row["lexname"]] for row in synsets.values() if word in row["words"]}


def test_no_gloss_is_in_both_splits_and_the_split_is_by_its_hash():
    train, test = (set(data.load("glosses", split=split)["gloss"]) for split in ("train", "test"))
    assert not train & test
    assert all(int(hashlib.sha256(gloss.encode()).hexdigest(), 16) % 10 == 0 for gloss in test)
    assert not any(int(hashlib.sha256(gloss.encode()).hexdigest(), 16) % 10 == 0 for gloss in train)


def test_kjv_begins_and_ends_as_it_should():
    rows = data.load("kjv")
    books = rows.features["book"]
    assert rows[0] == {
        "book": books.str2int("Genesis"),
        "chapter": 1,
        "verse": 1,
        "text": "In the beginning God created the heaven and the earth.",
    }
    assert rows[-1] == {
        "book": books.str2int("Revelation"),
        "chapter": 22,
        "verse": 21,
        "text": "The grace of our Lord Jesus Christ be with you all. Amen.",
    }
    assert [row for row in rows if row["text"] == "Jesus wept."] == [
        {"book": books.str2int("John"), "chapter": 11, "verse": 35, "text": "Jesus wept."}
    ]


def test_kjv_verses_are_in_order_without_gaps():
    places = [(row["book"], row["chapter"], row["verse"]) for row in data.load("kjv").to_list()]
    for (book, chapter, verse), following in itertools.pairwise(places):
        assert following in [(book, chapter, verse + 1), (book, chapter + 1, 1), (book + 1, 1, 1)]
    assert len({place[:2] for place in places}) == 1189
    assert len({place[0] for place in places}) == 66


def test_kjv_books_have_their_chapters():
    rows = data.load("kjv")
    chapters = {rows.features["book"].int2str(row["book"]): row["chapter"] for row in rows.to_list()}
    known = {"Genesis": 50, "Psalms": 150, "Isaiah": 66, "Obadiah": 1, "Matthew": 28, "Acts": 28, "Philemon": 1}
    assert {book: chapters[book] for book in known} == known
    assert list(chapters)[8:10] == ["1 Samuel", "2 Samuel"]


def test_the_script_packs_what_is_shipped(tmp_path, monkeypatch):
    if shutil.which("bible") is None:
        pytest.skip("needs: apt-get install bible-kjv")
    spec = importlib.util.spec_from_file_location("pack_bundles", REPO / "scripts" / "pack_bundles.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "BUNDLES", tmp_path)
    script.pack_kjv()
    assert pq.read_table(tmp_path / "kjv-train.parquet").equals(pq.read_table(BUNDLES / "kjv-train.parquet"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kjv-train.parquet", "kjv.LICENSE.txt"]


# Splits and streams


def test_all_styles_can_be_joined_and_cut():
    both = data.load("emoji", split="all")
    assert both["style"][:] == ["google"] * 1906 + ["twitter"] * 1906
    cut = data.load("emoji", split="google[:2]+twitter[-1:]")
    assert [(row["style"], row["name"]) for row in cut] == [
        (both[i]["style"], both[i]["name"]) for i in (0, 1, len(both) - 1)
    ]


@pytest.mark.parametrize("split", ["train", "google[", "", "google+train"])
def test_unknown_split_names_those_there_are(split):
    with pytest.raises(ValueError, match=re.escape(f"google, twitter or all, for emoji, got {split!r}")):
        data.load("emoji", split=split)


def test_streaming_a_bundle_gives_the_same_rows():
    rows = data.load("kjv", split="train[:500]")
    stream = data.load("kjv", split="train[:500]", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.features == rows.features
    assert list(stream) == list(rows)
    splits = data.load("fashion", split=None, streaming=True)
    assert isinstance(splits, datasets.IterableDatasetDict)
    assert sha256_of_pixels(splits["test"].take(100)).startswith("d8c9b855")


# Folders of images


def save_image(file: Path, colour: tuple[int, int, int], **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), colour).save(file, **options)


@pytest.fixture
def zoo(tmp_path):
    folder = tmp_path / "zoo [1]"
    save_image(folder / "dog" / "b.PNG", (255, 0, 0))
    save_image(folder / "dog" / "a.png", (0, 255, 0))
    save_image(folder / "dog" / "puppies" / "c.bmp", (0, 0, 255))
    save_image(folder / "cat" / "1.JPeG", (9, 9, 9), format="JPEG")
    save_image(folder / "cat" / ".hidden.png", (0, 0, 0))
    save_image(folder / ".thumbnails" / "x.png", (0, 0, 0))
    (folder / "cat" / "broken.jpg").write_bytes(b"no image at all")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "labels.csv").write_text("a,b\n1,2\n")
    (folder / "empty").mkdir()
    return folder


def test_image_folder_is_sorted_and_labelled_by_folder(zoo):
    rows = data.load(zoo)
    assert rows.features["label"].names == ["cat", "dog"]  # no class for the empty and the hidden folder
    raw = rows.cast_column("image", datasets.Image(decode=False))
    assert [Path(row["image"]["path"]).relative_to(zoo).as_posix() for row in raw] == [
        *("cat/1.JPeG", "cat/broken.jpg", "dog/a.png", "dog/b.PNG", "dog/puppies/c.bmp")
    ]
    assert rows["label"][:] == [0, 0, 1, 1, 1]
    assert [rows[i]["image"].getpixel((0, 0)) for i in (2, 3, 4)] == [(0, 255, 0), (255, 0, 0), (0, 0, 255)]


def test_a_broken_image_is_met_only_when_its_row_is_read(zoo):
    rows = data.load(str(zoo))
    assert len(rows) == 5
    with pytest.raises(UnidentifiedImageError):
        rows[1]
    assert rows[0]["image"].size == (5, 4)
    raw = rows.cast_column("image", datasets.Image(decode=False))
    assert Path(raw[1]["image"]["path"]).read_bytes() == b"no image at all"


def test_streaming_an_image_folder_gives_the_same_rows(zoo):
    (zoo / "cat" / "broken.jpg").unlink()
    rows, stream = data.load(zoo), data.load(zoo, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [(np.asarray(row["image"]).tolist(), row["label"]) for row in stream] == [
        (np.asarray(row["image"]).tolist(), row["label"]) for row in rows
    ]


def test_folders_named_as_splits_are_splits_with_one_set_of_labels(tmp_path):
    save_image(tmp_path / "train" / "cat" / "1.png", (1, 1, 1))
    save_image(tmp_path / "train" / "dog" / "1.png", (2, 2, 2))
    save_image(tmp_path / "test" / "dog" / "2.png", (3, 3, 3))
    splits = data.load(tmp_path, split=None)
    assert list(splits) == ["train", "test"]
    test = data.load(tmp_path, split="test")
    assert [(row["image"].getpixel((0, 0)), row["label"]) for row in test] == [((3, 3, 3), 1)]
    assert test.features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"train, test or all, .* got 'val'"):
        data.load(tmp_path, split="val")


def test_a_class_may_be_called_train(tmp_path):
    save_image(tmp_path / "train" / "1.png", (1, 1, 1))
    save_image(tmp_path / "bus" / "1.png", (2, 2, 2))
    assert data.load(tmp_path).features["label"].names == ["bus", "train"]


def test_a_single_split_folder_keeps_its_classes(tmp_path):
    save_image(tmp_path / "train" / "cat" / "1.png", (1, 2, 3))
    rows = data.load(tmp_path)
    assert rows.features["label"].names == ["cat"]
    assert rows[0]["image"].getpixel((0, 0)) == (1, 2, 3)


def test_images_without_class_folders_have_no_label(tmp_path):
    save_image(tmp_path / "b.png", (1, 1, 1))
    save_image(tmp_path / "a.png", (2, 2, 2))
    rows = data.load(tmp_path)
    assert rows.column_names == ["image"]
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == [2, 1]
    save_image(tmp_path / "cat" / "1.png", (1, 1, 1))
    with pytest.raises(ValueError, match=r"both in class folders and beside them, such as a\.png"):
        data.load(tmp_path)


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"{tmp_path}: no images found; expected one folder a class"):
        data.load(tmp_path)


# Tables

TABLE = {"id": [1, 2, 3], "text": ["a, b", 'say "c"', "d\ne"], "weight": [0.5, -1.0, 2.25]}


def write_table(file: Path, rows: dict[str, list] = TABLE) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    frame = datasets.Dataset.from_dict(rows)
    if file.suffix == ".csv":
        frame.to_csv(file)
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, lines=file.suffix == ".jsonl")
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet", "odd [1]*.csv", "test.csv"])
def test_files_of_tables(tmp_path, name, streaming):
    rows = data.load(write_table(tmp_path / name), streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(rows) == [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]


def test_a_suffix_may_be_in_capitals(tmp_path):
    file = write_table(tmp_path / "t.csv").rename(tmp_path / "T.CSV")
    assert data.load(file)["id"][:] == [1, 2, 3]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_is_split_by_file_name(tmp_path, streaming):
    folder = tmp_path / "my [set]"
    write_table(folder / "data" / "train-00001-of-00002.parquet", {"id": [3, 4]})
    write_table(folder / "data" / "train-00000-of-00002.parquet", {"id": [1, 2]})
    write_table(folder / "data" / "test-00000-of-00001.parquet", {"id": [9]})
    write_table(folder / "notes.csv")
    save_image(folder / "assets" / "logo.png", (0, 0, 0))  # Parquet wins over a stray picture
    (folder / "README.md").write_text("# about")
    assert {k: [row["id"] for row in v] for k, v in data.load(folder, split=None, streaming=streaming).items()} == {
        "train": [1, 2, 3, 4],
        "test": [9],
    }
    assert [row["id"] for row in data.load(folder, split="all", streaming=streaming)] == [1, 2, 3, 4, 9]
    with pytest.raises(ValueError, match=r"train, test or all, .* got 'validation'"):
        data.load(folder, split="validation", streaming=streaming)


def test_a_folder_of_csv_and_a_folder_saved_to_disk(tmp_path):
    write_table(tmp_path / "csv" / "trained.csv", {"id": [1]})  # begins with train, is not the word train
    write_table(tmp_path / "csv" / "val.csv", {"id": [2]})
    assert {k: v["id"][:] for k, v in data.load(tmp_path / "csv", split=None).items()} == {"train": [1], "val": [2]}
    datasets.Dataset.from_dict(TABLE).save_to_disk(tmp_path / "saved")
    assert data.load(tmp_path / "saved")["text"][:] == TABLE["text"]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "t.npz"])
def test_a_truncated_file_is_named(tmp_path, name):
    file = tmp_path / name
    if name == "t.npz":
        np.savez(file, X=np.ones((4, 3)), y=np.arange(4))
    else:
        write_table(file, {"id": [1, 2], "word": ["one", "two"], "n": [10, 20]})
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rfind(b",") if name == "t.csv" else -3])
    with pytest.raises(ValueError, match=f"{file}: "):
        data.load(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{file}: "):
        data.load(file)


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    file = write_table(tmp_path / "t.parquet", {"n": list(range(5000))})
    whole = file.read_bytes()
    file.write_bytes(whole[:500] + bytes(2000) + whole[2500:])
    with pytest.raises(ValueError, match=f"{file}: cannot be read as parquet"):
        data.load(file)


def test_csv_with_an_open_quote_or_a_long_row_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    for text in ('a,b\n1,"open\n2,3\n', "a,b\n1,2\n1,2,3\n", "a,b\n1,2\n3\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file}: "):
            data.load(file)


@pytest.mark.parametrize("text", ['a,b\n1,"x\ny"\n', "a,b\n1,2", "a\n1\n2\n", "a,b\r\n1,2\r\n", "a,b\n1,\n"])
def test_whole_csv_files_are_not_taken_for_truncated_ones(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert len(data.load(tmp_path / "t.csv")) == text.replace('"x\ny"', "x").strip().count("\n")


def test_a_last_line_longer_than_what_is_looked_at_is_left_to_the_parser(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\nx,y\n1," + "z" * 100_000 + "\n")
    assert len(data.load(tmp_path / "t.csv")[1]["b"]) == 100_000


# Arrays


@pytest.mark.parametrize("labels", [[3, 1, 1, 2], ["b", "a", "a", "c"]])
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f8", "uint8"])
def test_npz_gives_rows_of_numpy_arrays(tmp_path, dtype, labels):
    X, y = np.arange(12).reshape(4, 3).astype(dtype, order="F"), np.array(labels)
    np.savez_compressed(tmp_path / "f.npz", X=X, y=y, other=np.zeros(2))
    rows = data.load(tmp_path / "f.npz")
    assert rows.features["X"] == datasets.List(datasets.Value("float32"), length=3)
    batch = rows[:]
    assert isinstance(batch["X"], np.ndarray)
    assert batch["X"].dtype == np.float32
    np.testing.assert_array_equal(batch["X"], X)
    np.testing.assert_array_equal(batch["y"], y)
    for got, want in zip(data.load(tmp_path / "f.npz", streaming=True), rows, strict=True):
        np.testing.assert_array_equal(got["X"], want["X"])
        assert got["y"] == want["y"]


def test_npz_leaves_nan_to_the_learner(tmp_path):
    np.savez(tmp_path / "f.npz", X=np.array([[np.nan, np.inf]]), y=[0])
    np.testing.assert_array_equal(data.load(tmp_path / "f.npz")[:]["X"], [[np.nan, np.inf]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.ones((2, 3))}, "expected the arrays X and y, got X"),
        ({"a": np.ones(2), "b": np.ones(2)}, "expected the arrays X and y, got a, b"),
        ({"X": np.ones((2, 3)), "y": np.arange(3)}, r"shape \(2,\) as X has 2 rows, got int64 of shape \(3,\)"),
        ({"X": np.ones((2, 3)), "y": np.ones((2, 1))}, r"y must be .* got float64 of shape \(2, 1\)"),
        ({"X": np.ones(3), "y": np.arange(3)}, r"X must be numbers of shape \(n, d\), got float64 of shape \(3,\)"),
        ({"X": np.ones((2, 0)), "y": np.arange(2)}, r"X must be .* got float64 of shape \(2, 0\)"),
        ({"X": np.array([["a"], ["b"]]), "y": np.arange(2)}, "X must be numbers"),
        ({"X": np.ones((1, 1), complex), "y": np.arange(1)}, "X must be numbers"),
        ({"X": np.array([[object()]]), "y": np.arange(1)}, "Object arrays cannot be loaded"),
        ({"X": np.ones((1, 1)), "y": np.array([None])}, "Object arrays cannot be loaded"),
    ],
)
def test_npz_with_unfit_arrays_is_refused(tmp_path, arrays, message):
    file = tmp_path / "f.npz"
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        data.load(file)


def test_npy_under_the_name_of_npz_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 2)))
    (tmp_path / "f.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"f\.npz: truncated, or no npz file"):
        data.load(tmp_path / "f.npz")


# Names


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/folder", "~/no-such", "nothing.csv", "a/b/c", "x/photo.jpg", "a b"]
)
def test_a_path_that_is_not_there_lists_the_bundles(name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder, .*emoji, fashion, glosses, kjv"):
        data.load(name)


def test_a_path_object_is_never_a_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "fashion" / "cat" / "1.png", (1, 1, 1))
    assert len(data.load(Path("fashion"))) == len(data.load("./fashion")) == 1
    assert len(data.load("fashion")) == 20_000


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_table(tmp_path / "t.jsonl")
    assert len(data.load("~/t.jsonl")) == 3


@pytest.mark.parametrize("wrong", [3, None, "", b"kjv"])
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(TypeError, match="name_or_path must be a non-empty str or path"):
        data.load(wrong)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.npz, \.csv, \.json, \.jsonl, \.parquet, got '\.bin'"):
        data.load(tmp_path / "model.bin")


def run_python(code: str, home: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_DATASETS_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_is_light_and_bundles_leave_the_cache_alone(tmp_path):
    code = """
import sys
import shoestring.data
assert not {"torch", "datasets", "numpy", "pyarrow"} & set(sys.modules)
assert len(shoestring.data.load("fashion", split="test")) == 5000
assert "torch" not in sys.modules
assert shoestring.data.streams is sys.modules["shoestring.data.streams"]
"""
    run_python(code, tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_hub_name_without_the_network_tells_what_was_tried(tmp_path):
    code = """
import shoestring.data
for name in ("mnsit", "some-user/some.data"):
    try:
        shoestring.data.load(name)
    except FileNotFoundError as error:
        for part in (name + ": no bundle", "emoji, fashion", "no file or folder /", "the hub: ", "offline"):
            assert part.lower() in str(error).lower(), (part, str(error))
    else:
        raise AssertionError(name)
"""
    run_python(code, tmp_path)


def test_absent_pillow_is_named_with_the_line_that_installs_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "PIL" else find_spec(name))
    with pytest.raises(ImportError, match=r"pip install 'shoestring\[vision\]'"):
        data.load("fashion")
    assert len(data.load("kjv")) == 31_102  # no images, no need


def test_a_parquet_file_without_the_metadata_of_datasets(tmp_path):
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "t.parquet")
    assert data.load(tmp_path / "t.parquet")["n"][:] == [1, 2]


def test_the_page_in_docs_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = REPO / "docs" / "data.md"
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testfile(str(page), module_relative=False, optionflags=options)
    assert result.attempted > 10
    assert result.failed == 0
    for file in BUNDLES.iterdir():
        if file.suffix == ".parquet":
            assert f"| `{file.name}` | {ROWS[tuple(file.stem.split('-'))]:,} |" in page.read_text(encoding="utf-8")
