"""Pack the bundles that ``shoestring.data.load`` reads: fashion, emoji, glosses, kjv.

    python scripts/pack_bundles.py                 # all four, into src/shoestring/data/bundles
    python scripts/pack_bundles.py glosses kjv     # some of them

Sources (Debian 12 and npm; nothing else is downloaded):

    apt-get install dataset-fashion-mnist wordnet-base bible-kjv
    npm install --ignore-scripts emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0

The npm packages are installed into a temporary folder by the script itself, or read from ``--node-modules DIR``.

The same sources and the same pyarrow and Pillow give the same bytes; other versions of the two may pack otherwise,
never hold other rows or other pixels: each file is read back and compared with its source before it is kept.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
BUNDLES = REPO / "src" / "shoestring" / "data" / "bundles"
FASHION = Path("/usr/share/datasets/fashion-mnist")
WORDNET = Path("/usr/share/wordnet")
EMOJI_VERSION = "16.0.0"

GARMENTS = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
# WordNet's lexicographer files in the order of their numbers, see lexnames(5WN).
LEXNAMES = [
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling"),
    *("noun.food", "noun.group", "noun.location", "noun.motive", "noun.object", "noun.person"),
    *("noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity", "noun.relation"),
    *("noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body", "verb.change"),
    *("verb.cognition", "verb.communication", "verb.competition", "verb.consumption", "verb.contact"),
    *("verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social"),
    *("verb.stative", "verb.weather", "adj.ppl"),
]
BOOKS = [
    *("Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth", "1 Samuel"),
    *("2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra", "Nehemiah", "Esther", "Job"),
    *("Psalms", "Proverbs", "Ecclesiastes", "Song of Solomon", "Isaiah", "Jeremiah", "Lamentations", "Ezekiel"),
    *("Daniel", "Hosea", "Joel", "Amos", "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah"),
    *("Haggai", "Zechariah", "Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians"),
    *("2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians", "1 Thessalonians"),
    *("2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James", "1 Peter"),
    *("2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation"),
]


def pack_fashion() -> None:
    """Keep the first 2,000 (train) and 500 (test) images of each class, in file order."""
    for split, prefix, per_class in (("train", "train", 2000), ("test", "t10k", 500)):
        images = read_idx(FASHION / f"{prefix}-images-idx3-ubyte.gz", offset=16).reshape(-1, 28, 28)
        labels = read_idx(FASHION / f"{prefix}-labels-idx1-ubyte.gz", offset=8)
        kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
        images, labels = images[kept], labels[kept]
        write(
            f"fashion-{split}.parquet",
            # Stored PNG, for the Parquet compresses across images: 391 bytes an image, against 413 of lossless
            # WebP and 451 of compressed PNG, and the fastest of the three to decode.
            {"image": [encode(x, format="PNG", compress_level=0) for x in images], "label": labels.tolist()},
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=GARMENTS)},
            pixels=images,
        )
        print(f"  sha256 of the pixels: first 100 {sha256(images[:100])}, all {sha256(images)}")
    write_licence(
        "fashion",
        f"""Fashion-MNIST, from the Debian package {debian("dataset-fashion-mnist")}.

        Changed: of the 60,000 training images the first 2,000 of each class are kept, of the 10,000 test images the
        first 500 of each class, in the order of the original files; pixels are the original ones, stored as PNG.""",
        debian_copyright("dataset-fashion-mnist"),
    )


def pack_emoji(node_modules: Path) -> None:
    """Keep every base emoji (no skin variants, no components), in Unicode's order, on white."""
    for style in ("google", "twitter"):
        package = node_modules / f"emoji-datasource-{style}"
        rows = json.loads(need(package / "emoji.json", EMOJI_HELP).read_text(encoding="utf-8"))
        rows = [r for r in rows if r["category"] != "Component" and r[f"has_img_{style}"]]
        rows.sort(key=lambda row: row["sort_order"])
        images = np.stack([on_white(package / "img" / style / "64" / row["image"]) for row in rows])
        write(
            f"emoji-{style}.parquet",
            {
                # Lossless WebP: 7.8 MB for both styles, against 8.8 MB of stored PNG packed by Parquet.
                "image": [encode(x, format="WEBP", lossless=True) for x in images],
                "name": [row["name"].lower() for row in rows],
                "category": [row["category"] for row in rows],
                "subcategory": [row["subcategory"] for row in rows],
                "style": [style] * len(rows),
                "unified": [row["unified"] for row in rows],
            },
            {
                "image": datasets.Image(),
                "name": datasets.Value("string"),
                "category": datasets.ClassLabel(names=sorted({row["category"] for row in rows})),
                "subcategory": datasets.ClassLabel(names=sorted({row["subcategory"] for row in rows})),
                "style": datasets.Value("string"),
                "unified": datasets.Value("string"),
            },
            pixels=images,
        )
        print(f"  sha256 of the pixels: {sha256(images)}")
    write_licence(
        "emoji",
        f"""Emoji of Unicode 16 in two styles, from the npm packages emoji-datasource-google {EMOJI_VERSION} and
        emoji-datasource-twitter {EMOJI_VERSION} by Cal Henderson (https://github.com/iamcal/emoji-data).

        Split "google": images of Noto Emoji v2.048, copyright Google Inc.
        (https://github.com/googlefonts/noto-emoji), under the Apache License 2.0, given in full below; flags are in
        the public domain or otherwise exempt from copyright.

        Split "twitter": images of Twemoji v16.0.1, copyright Twitter, Inc and other contributors
        (https://github.com/twitter/twemoji, continued at https://github.com/jdecked/twemoji), under the Creative
        Commons Attribution 4.0 International licence: https://creativecommons.org/licenses/by/4.0/legalcode

        Names, categories and code points: emoji-data, copyright Cal Henderson, under the MIT License, given below.

        Changed: base emoji only (no skin variants, no category "Component"); the 64 x 64 images are composited on
        white and stored as lossless WebP; names are in lower case.""",
        (package / "LICENSE").read_text(encoding="utf-8"),
        (REPO / "LICENSE").read_text(encoding="utf-8"),
    )


def pack_glosses() -> None:
    """Keep every synset; a tenth of the glosses, chosen by their hash, is the test split."""
    rows = list(read_synsets())
    features = {
        "id": datasets.Value("string"),
        "words": datasets.List(datasets.Value("string")),
        "pos": datasets.Value("string"),
        "lexname": datasets.ClassLabel(names=LEXNAMES),
        "gloss": datasets.Value("string"),
        "examples": datasets.Value("string"),
        "hypernyms": datasets.List(datasets.Value("string")),
    }
    for split in ("train", "test"):
        part = [row for row in rows if (int(sha256(row["gloss"].encode()), 16) % 10 == 0) == (split == "test")]
        write(f"glosses-{split}.parquet", {name: [row[name] for row in part] for name in features}, features)
    write_licence(
        "glosses",
        f"""Glosses of WordNet 3.0, from the Debian package {debian("wordnet-base")}.

        Changed: of each synset its words (underscores made spaces, syntactic markers dropped), part of speech,
        lexicographer file, gloss (parted into definition and examples) and hypernyms are kept; other relations,
        sense numbers and verb frames are left out.""",
        debian_copyright("wordnet-base"),
    )


def pack_kjv() -> None:
    """Keep every verse, in order."""
    try:
        command = ["bible", "-f", "gen1:1-rev22:21"]
        text = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    except FileNotFoundError:
        raise SystemExit("the program `bible` is missing: apt-get install bible-kjv") from None
    verses = [re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line).groups() for line in text.splitlines()]
    # The program abbreviates the books its own way, but prints them in the canonical order.
    abbreviations = list(dict.fromkeys(abbreviation for abbreviation, _, _, _ in verses))
    write(
        "kjv-train.parquet",
        {
            "book": [abbreviations.index(abbreviation) for abbreviation, _, _, _ in verses],
            "chapter": [int(chapter) for _, chapter, _, _ in verses],
            "verse": [int(verse) for _, _, verse, _ in verses],
            "text": [verse_text for _, _, _, verse_text in verses],
        },
        {
            "book": datasets.ClassLabel(names=BOOKS),
            "chapter": datasets.Value("int32"),
            "verse": datasets.Value("int32"),
            "text": datasets.Value("string"),
        },
    )
    write_licence(
        "kjv",
        f"""The Bible in the King James Version (1611), from the Debian package {debian("bible-kjv-text")}, as printed
        by its program `bible -f gen1:1-rev22:21`.

        The text is in the public domain (in the United Kingdom, printing it is a right of the Crown). The program is
        under the GPL, version 2 or later, and no part of this bundle; the notice of its package follows.

        Changed: the abbreviations of the books are replaced by their names; the text is as printed.""",
        debian_copyright("bible-kjv-text"),
    )


def read_idx(file: Path, offset: int) -> np.ndarray:
    need(file, "apt-get install dataset-fashion-mnist")
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=offset)


def on_white(file: Path) -> np.ndarray:
    with Image.open(need(file, EMOJI_HELP)) as image:
        image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))  # (64, 64, 3)


def read_synsets() -> Iterator[dict[str, Any]]:
    """Yield the synsets of WordNet's data files, whose lines are, see wndb(5WN)::

    offset lex_filenum ss_type w_cnt(hex) {word lex_id}... p_cnt {symbol offset pos src/tgt}... | gloss
    """
    for name in ("noun", "verb", "adj", "adv"):
        file = need(WORDNET / f"data.{name}", "apt-get install wordnet-base")
        for line in file.read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # the licence, at the top of each file
                continue
            data, _, gloss = line.partition(" | ")
            offset, lexname, pos, n_words, *rest = data.split()
            words, rest = rest[: 2 * int(n_words, 16) : 2], rest[2 * int(n_words, 16) :]
            pointers = rest[1 : 1 + 4 * int(rest[0])]
            hypernyms = [
                target_pos + target
                for symbol, target, target_pos in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=True)
                if symbol in ("@", "@i")
            ]
            definition, quote, examples = gloss.strip().partition('; "')
            yield {
                "id": pos + offset,
                "words": [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words],
                "pos": pos,
                "lexname": int(lexname),
                "gloss": definition,
                "examples": quote[2:] + examples,
                "hypernyms": hypernyms,
            }


EMOJI_HELP = (
    f"npm install --ignore-scripts emoji-datasource-google@{EMOJI_VERSION} emoji-datasource-twitter@{EMOJI_VERSION}"
)


def install_emoji(folder: str) -> Path:
    try:
        subprocess.run([*EMOJI_HELP.split(), "--no-audit", "--no-fund", "--prefix", folder], check=True)
    except FileNotFoundError:
        raise SystemExit("the program `npm` is missing: apt-get install npm") from None
    return Path(folder) / "node_modules"


def need(path: Path, command: str) -> Path:
    if not path.exists():
        raise SystemExit(f"{path} is missing: {command}")
    return path


def encode(pixels: np.ndarray, **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def sha256(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


def write(file: str, columns: dict[str, list], features: dict[str, Any], pixels: np.ndarray | None = None) -> None:
    """Write one split, read it back, compare, and put it in its place."""
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    temporary = BUNDLES / f".{file}.tmp"
    with open(temporary, "wb") as stream:
        # One row group and one page a column: small data, and the compressor sees all of it.
        pq.write_table(
            table,
            stream,
            compression="zstd",
            compression_level=22,
            use_dictionary=False,
            write_statistics=False,
            data_page_size=1 << 28,
            row_group_size=len(table),
        )
        stream.flush()
        os.fsync(stream.fileno())
    again = datasets.Dataset(pq.read_table(temporary))
    if again.features != datasets.Features(features) or again.data.table != table:
        raise SystemExit(f"{file}: read back, the rows differ from those written")
    if pixels is not None and not all(
        np.array_equal(row["image"], expected) for row, expected in zip(again, pixels, strict=True)
    ):
        raise SystemExit(f"{file}: read back, the pixels differ from the source's")
    os.replace(temporary, BUNDLES / file)
    print(f"{file}: {len(table):,} rows, {(BUNDLES / file).stat().st_size:,} bytes")


def write_licence(name: str, header: str, *texts: str) -> None:
    parts = [re.sub(r"\n +", "\n", header), *texts]
    file = BUNDLES / f"{name}.LICENSE.txt"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f"\n\n{'-' * 78}\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def debian(package: str) -> str:
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version}", package]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def debian_copyright(package: str) -> str:
    file = Path("/usr/share/doc") / package / "copyright"
    return need(file, f"apt-get install {package}").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["fashion", "emoji", "glosses", "kjv"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(everything)}; default: all")
    parser.add_argument("--node-modules", type=Path, help="where the npm packages are installed already")
    options = parser.parse_args()
    if unknown := set(options.names) - set(everything):
        parser.error(f"unknown bundle {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    names = options.names or everything
    BUNDLES.mkdir(exist_ok=True)
    if "fashion" in names:
        pack_fashion()
    if "emoji" in names:
        with tempfile.TemporaryDirectory() as folder:
            pack_emoji(options.node_modules or install_emoji(folder))
    if "glosses" in names:
        pack_glosses()
    if "kjv" in names:
        pack_kjv()
    print(f"together {sum(file.stat().st_size for file in BUNDLES.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
