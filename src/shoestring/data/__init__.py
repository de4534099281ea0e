"""The data room: a name or a path in, rows out. One way to read data for every other room.

>>> from shoestring import data
>>> data.bundles()
['emoji', 'fashion', 'glosses', 'kjv']
>>> data.load("kjv")[0]["text"]
'In the beginning God created the heaven and the earth.'

`load` returns a `datasets.Dataset`, or a `datasets.IterableDataset` that is never held in memory as a whole.
Streams of tasks for continual learning are in `shoestring.data.streams`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib
import importlib.util
import io
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets  # at run time inside the functions: importing it takes a second

__all__ = ["bundles", "license", "load"]

_BUNDLES = Path(__file__).parent / "bundles"
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TABLES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_SPLITS = {"train", "val", "valid", "validation", "test"}


def load(
    name_or_path: str | os.PathLike[str], *, split: str | None = "train", streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    """Read a data set: a bundle, a file, a folder, or a name on the Hugging Face hub.

    Parameters
    ----------
    name_or_path : str or path-like
        In the order in which it is looked up:

        - a bundle: ``"fashion"``, ``"emoji"``, ``"glosses"``, ``"kjv"`` (write ``"./fashion"`` for a folder of
          that name);
        - a ``.parquet``, ``.csv`` (with a header line), ``.json`` or ``.jsonl`` file, or a folder of them. In a
          folder, a file or subfolder whose name begins with the word train, val, valid, validation or test belongs
          to that split, every other to train; of several kinds of file Parquet is read, else CSV, else JSON;
        - an ``.npz`` file with arrays ``X`` of shape (n, d) and ``y`` of shape (n,), numbers or strings. Columns
          ``"X"`` (float32) and ``"y"``; rows come out as NumPy arrays;
        - a folder of images, one folder a class: ``DATA/cat/1.jpg``. Columns ``"image"``, decoded when a row is
          read and not before, and ``"label"``, a `datasets.ClassLabel` of the sorted folder names. Deeper folders
          belong to their class, hidden files and empty folders are passed over, rows are sorted by path. Where every
          path begins with a split (``DATA/train/cat/1.jpg``), these are the splits. Images without class folders
          give the column ``"image"`` alone;
        - a folder written by `datasets.Dataset.save_to_disk`;
        - a data set on the Hugging Face hub, ``"name"`` or ``"user/name"``, with `datasets.load_dataset`.
          No code of the data set's is ever run.
    split : str or None, default="train"
        Name of a split, or ``"all"``, or, unless a file or hub data set is streamed, a slice or sum of splits as
        `datasets` writes them: ``"train[:100]"``, ``"google+twitter"``. None: all splits, in a dictionary. What
        has no splits is one split, ``"train"``.
    streaming : bool, default=False
        Give an iterable data set. Files and hub data sets are then read while iterating, and errors in them met
        only then.

    Returns
    -------
    datasets.Dataset
        Or `datasets.IterableDataset` if `streaming`; or, if `split` is None, a `datasets.DatasetDict` or
        `datasets.IterableDatasetDict` of them.

    Raises
    ------
    FileNotFoundError
        If nothing of this name is found; the message says where it was looked for.
    ValueError
        If there is no such split (the message names those there are), a file is empty, truncated or otherwise
        unreadable, arrays are missing or do not fit, or a folder holds no data.
    ImportError
        If rows hold images and Pillow is not installed.

    Examples
    --------
    >>> from shoestring.data import load
    >>> fashion = load("fashion", split="test")
    >>> len(fashion), fashion[0]["image"].size
    (5000, (28, 28))
    >>> fashion.features["label"].int2str(fashion[0]["label"])
    'Ankle boot'
    >>> sorted((name, len(rows)) for name, rows in load("emoji", split=None).items())
    [('google', 1906), ('twitter', 1906)]
    """
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise TypeError(f"name_or_path must be a non-empty str or path, got {name_or_path!r}")
    source = os.fspath(name_or_path)
    path = Path(source).expanduser().absolute()
    if isinstance(name_or_path, str) and source in bundles():
        splits = _read_bundle(source)
    elif path.is_dir():
        splits = _read_folder(path, streaming)
    elif path.exists():
        splits = _read_file(path, streaming)
    else:
        splits = _read_hub(source, streaming)
    chosen = _choose(splits, split, source)
    _check_pillow(chosen)
    return _streamed(chosen) if streaming else chosen


def bundles() -> list[str]:
    """Return the names of the data sets that are shipped with shoestring.

    Examples
    --------
    >>> from shoestring.data import bundles
    >>> bundles()
    ['emoji', 'fashion', 'glosses', 'kjv']
    """
    return sorted(file.name.removesuffix(".LICENSE.txt") for file in _BUNDLES.glob("*.LICENSE.txt"))


def license(name: str) -> str:
    """Return the licence of a bundle: source, authors, terms, and what was changed.

    Parameters
    ----------
    name : str
        One of `bundles`.

    Raises
    ------
    ValueError
        If there is no bundle of this name.

    Examples
    --------
    >>> from shoestring.data import license
    >>> print(license("fashion").splitlines()[0])
    Fashion-MNIST, from the Debian package dataset-fashion-mnist 0.0~git20200523.55506a9-1.
    """
    if name not in bundles():
        raise ValueError(f"name must be one of {', '.join(bundles())}, got {name!r}")
    return (_BUNDLES / f"{name}.LICENSE.txt").read_text(encoding="utf-8")


def __getattr__(name: str) -> Any:
    if name == "streams":
        return importlib.import_module(".streams", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _read_bundle(name: str) -> datasets.DatasetDict:
    import datasets
    import pyarrow.parquet as pq

    # Straight from the package's files: load_dataset would first write a copy into the user's cache.
    read = {}
    for file in sorted(_BUNDLES.glob(f"{name}-*.parquet")):
        rows = datasets.Dataset(pq.read_table(file), fingerprint=_fingerprint(file))
        read[file.stem.removeprefix(f"{name}-")] = rows
    return datasets.DatasetDict(read)


def _fingerprint(file: Path) -> str:
    """Name the contents of `file` for `datasets`, which would otherwise hash every row."""
    stat = file.stat()
    return hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]


def _read_folder(folder: Path, streaming: bool) -> Any:
    import datasets

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # of Dataset.save_to_disk
        saved = datasets.load_from_disk(str(folder))
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict({"train": saved})
    files = _visible_files(folder)
    images = [file for file in files if file.suffix.lower() in _IMAGES]
    kinds = {_TABLES.get(file.suffix.lower()) for file in files}
    # Parquet files are a data set whatever lies beside them; a CSV file beside images is a note on them.
    for kind in ["parquet"] if images else ["parquet", "csv", "json"]:
        if kind in kinds:
            splits: dict[str, list[Path]] = {}
            for file in files:
                if _TABLES.get(file.suffix.lower()) == kind:
                    splits.setdefault(_split_of(file), []).append(folder / file)
            return _read_tables(folder, splits, kind, streaming)
    if not images:
        raise ValueError(
            f"{folder}: no images found; expected one folder a class, such as {folder}/cat/1.jpg "
            f"(or Parquet, CSV or JSON lines files)"
        )
    return _image_folder(folder, images)


def _visible_files(folder: Path) -> list[Path]:
    """List the files under `folder`, relative to it, sorted, without what begins with a dot."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name).relative_to(folder) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.parts)


def _split_of(file: Path) -> str:
    """Read the split off a relative path: test.csv, test-00000-of-00002.parquet, test/a.csv; else train."""
    words = [re.split(r"[\W_]", part.lower())[0] for part in file.parts]
    return next((word for word in words if word in _SPLITS), "train")


def _image_folder(folder: Path, images: list[Path]) -> datasets.DatasetDict:
    import datasets

    loose = [file for file in images if len(file.parts) == 1]
    if loose and len(loose) < len(images):
        raise ValueError(f"{folder}: images both in class folders and beside them, such as {loose[0]}")
    in_splits = all(len(file.parts) > 2 and file.parts[0] in _SPLITS for file in images)
    splits: dict[str, list[Path]] = {}
    for file in images:
        splits.setdefault(file.parts[0] if in_splits else "train", []).append(file)

    rows = {name: {"image": [str(folder / file) for file in files]} for name, files in splits.items()}
    features = datasets.Features({"image": datasets.Image()})
    if not loose:
        level = 1 if in_splits else 0
        features["label"] = datasets.ClassLabel(names=sorted({file.parts[level] for file in images}))
        for name, files in splits.items():
            rows[name]["label"] = [file.parts[level] for file in files]
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(rows[name], features=features) for name in splits})


def _read_file(file: Path, streaming: bool) -> Any:
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _read_npz(file)
    if suffix in _TABLES:
        return _read_tables(file, {"train": [file]}, _TABLES[suffix], streaming)
    raise ValueError(f"{file}: expected a folder or a file of type .npz, {', '.join(_TABLES)}, got {suffix!r}")


def _read_npz(file: Path) -> datasets.DatasetDict:
    import datasets
    import numpy as np
    import pyarrow as pa

    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: truncated, or no npz file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            X, y = (arrays.get(name) for name in ("X", "y"))
            names = sorted(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if X is None or y is None:
        raise ValueError(f"{file}: expected the arrays X and y, got {', '.join(names) or 'none'}")
    if X.ndim != 2 or X.shape[1] == 0 or X.dtype.kind not in "biuf":
        raise ValueError(f"{file}: X must be numbers of shape (n, d), got {X.dtype} of shape {X.shape}")
    if y.shape != X.shape[:1] or y.dtype.kind not in "biufU":
        raise ValueError(
            f"{file}: y must be numbers or strings of shape ({len(X)},) as X has {len(X)} rows, "
            f"got {y.dtype} of shape {y.shape}"
        )
    # float32 is also what the NumPy and torch formats of `datasets` make of every float.
    X = X.astype(np.float32, copy=False)
    y = y.tolist() if y.dtype.kind == "U" else y.astype(y.dtype.newbyteorder("="), copy=False)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), X.shape[1])  # (n,) lists of d, no copy
    read = datasets.Dataset(pa.table({"X": rows, "y": pa.array(y)}), fingerprint=_fingerprint(file))
    return datasets.DatasetDict({"train": read.with_format("numpy")})


def _read_tables(source: Path, splits: dict[str, list[Path]], kind: str, streaming: bool) -> Any:
    import datasets

    for file in (file for files in splits.values() for file in files):
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
        if kind == "csv":
            _check_last_line(file)
    # load_dataset takes names for patterns, so [ and * in them are escaped.
    data_files = {name: [glob.escape(str(file)) for file in files] for name, files in splits.items()}
    try:
        return datasets.load_dataset(kind, data_files=data_files, streaming=streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as error:
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise ValueError(f"{source}: cannot be read as {kind}: {first_line}") from error


def _check_last_line(file: Path) -> None:
    """Refuse a CSV file that ends within a row: the parser would take what is missing for empty values."""
    with open(file, encoding="utf-8", errors="replace", newline="") as text:
        header = next(csv.reader(text), [])
    with open(file, "rb") as binary:
        binary.seek(-min(1 << 16, file.stat().st_size), io.SEEK_END)
        _, newline, line = binary.read().rstrip(b"\r\n").rpartition(b"\n")
    # A quoted field may hold newlines, so only a line without quotes is surely a row.
    if newline and b'"' not in line:
        fields = next(csv.reader([line.decode("utf-8", "replace")]), [])
        if len(fields) < len(header):
            raise ValueError(f"{file}: truncated: the last line has {len(fields)} of {len(header)} fields")


def _read_hub(name: str, streaming: bool) -> Any:
    import datasets

    known = f"no bundle of this name (there are {', '.join(bundles())})"
    suffix = Path(name).suffix.lower()
    hub_name = re.fullmatch(r"\w[\w-]*|\w[\w-]*/\w[\w.-]*", name)
    if not hub_name or suffix in _TABLES or suffix in _IMAGES or suffix == ".npz":
        raise FileNotFoundError(f"{name}: no such file or folder, and {known}")
    try:
        return datasets.load_dataset(name, streaming=streaming)
    except OSError as error:  # not found, not allowed, or no network
        raise FileNotFoundError(
            f"{name}: {known}, no file or folder {Path(name).absolute()}, and not to be had from the hub: {error}"
        ) from error


def _choose(splits: Any, split: str | None, source: str) -> Any:
    """Pick a split by name, or cut and join splits as `datasets` would."""
    import datasets

    splits = type(splits)({name: splits[name] for name in sorted(splits, key=lambda name: name != "train")})
    if split is None:
        return splits
    if split in splits:
        return splits[split]
    unknown = ValueError(f"split must be one of {', '.join(splits)} or all, for {source}, got {split!r}")
    if isinstance(splits, datasets.IterableDatasetDict):
        if split == "all":
            return datasets.concatenate_datasets(list(splits.values()))
        raise unknown
    spec = "+".join(splits) if split == "all" else split
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute({k: len(rows) for k, rows in splits.items()})
    except (ValueError, AssertionError, TypeError) as error:
        raise unknown from error
    parts = [splits[piece.splitname].select(range(piece.from_, piece.to)) for piece in pieces]
    return datasets.concatenate_datasets(parts)


def _check_pillow(chosen: Any) -> None:
    import datasets

    for rows in chosen.values() if isinstance(chosen, dict) else [chosen]:
        images = any(isinstance(feature, datasets.Image) for feature in (rows.features or {}).values())
        if images and importlib.util.find_spec("PIL") is None:
            raise ImportError("reading images needs Pillow: pip install 'shoestring[vision]'")


def _streamed(chosen: Any) -> Any:
    import datasets

    if isinstance(chosen, dict):
        return datasets.IterableDatasetDict({name: _streamed(rows) for name, rows in chosen.items()})
    return chosen.to_iterable_dataset() if isinstance(chosen, datasets.Dataset) else chosen
