"""shoestring compress: a trained model -> a smaller one in a folder, and a table of before and after."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console, _models, _rows

if TYPE_CHECKING:
    import torch

METHODS = ("udfc", "flap")
MEASURED = 2048  # images that an accuracy is measured on; a perplexity takes 1/16 of it, in blocks of 128 tokens


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="A folder, a hub id, or a name of the zoo.")
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="SLUG",
            show_default=False,
            help="udfc: filters of a convolutional network, no data. flap: heads and neurons of a transformer.",
            autocompletion=_console.completer(METHODS),
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", show_default=False, help="A new folder for the small model.")
    ],
    ratio: Annotated[float, typer.Option("--ratio", help="Share that goes: of the filters, or of the blocks.")] = 0.3,
    bits: Annotated[
        int | None, typer.Option("--bits", metavar="2..8", help="udfc: round the weights too.", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            show_default=False,
            help="flap: texts (JSON lines with a text, or any data set). Every tenth is kept for measuring.",
        ),
    ] = None,
    content: _rows.Content = None,
    structure: Annotated[
        str, typer.Option("--structure", metavar="AL-AM|UL-UM", help="flap: adaptive, or the same of every layer.")
    ] = "AL-AM",
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", show_default=False, help="udfc: labelled images to measure the accuracy on."
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "all",
    label: _rows.Label = None,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Compress a model of transformers and write it to a new folder; the one in place stays as it is.

    Ends in a table: accuracy or perplexity, parameters, bytes on disk, time of a pass. The small model is read back
    from its folder before it is measured.

    \b
    Examples:
      shoestring compress tiny-resnet --method udfc --ratio 0.3 --bits 6 --data fashion --split test --out small
      shoestring compress tiny-gpt --method flap --ratio 0.2 --calibration kjv --structure UL-UM --out small
      shoestring compress Qwen/Qwen2.5-0.5B --method flap --calibration text.jsonl --out small
    """
    if method not in METHODS:
        raise _console.UsageError(
            f"--method must be one of {', '.join(METHODS)}, got {method!r}{_console.did_you_mean(method, METHODS)}"
        )
    if method == "flap" and calibration is None:
        raise _console.UsageError("flap needs texts: --calibration text.jsonl, or a bundle such as kjv")
    if method == "flap" and bits is not None:
        raise _console.UsageError("--bits is for udfc: flap leaves the weights that stay as they are")
    _models.check_new(out)
    with _models.filled(out) as work:
        done = (
            _udfc(model, work, ratio, bits, data, split, content, label, device)
            if method == "udfc"
            else _flap(model, work, ratio, structure, str(calibration), split, content, device)
        )
    if as_json:
        _console.print_json({"model": model, "method": method, "out": str(out), **done})
        return
    before, after = done["before"], done["after"]
    _console.print_table(
        ["", "before", "after", "after / before"],
        [
            [name, _console.figure(before[name]), _console.figure(after[name]), f"{after[name] / before[name]:.2f}"]
            for name in before
        ],
        right=[1, 2, 3],
    )
    for line in (*done["notes"], f"written to {out}; {done['load']}"):
        _console.say(line)


def _udfc(
    name: str,
    work: Path,
    ratio: float,
    bits: int | None,
    data: str | None,
    split: str,
    content: str | None,
    label: str | None,
    device: str,
) -> dict[str, Any]:
    import torch

    from shoestring.compress import load_into, save
    from shoestring.compress.udfc import chains, udfc_compress

    folder, model, dtype = _model(name, device)
    images, labels = _images(folder, model, data, split, content, label) if data else (None, None)
    before = _measured(model, dtype, lambda m: _accuracy(m, images, labels, device), "accuracy %" if data else "")
    with _console.progress("udfc"):
        small = udfc_compress(model, pruning_ratio=ratio, weight_bits=bits, importance="group")
    left = [f"{layer}: {why}" for layer, why in chains(model)[1].items()]
    save(
        small.to(dtype),
        work,
        {"method": "udfc", "base": name, "pruning_ratio": ratio, "weight_bits": bits, "layers_left_alone": left},
    )
    model.config.save_pretrained(work)
    _copied(folder, work, ("preprocessor_config.json",))
    again = load_into(type(model)(model.config), work).to(device, torch.float32).eval()
    after = _measured(again, dtype, lambda m: _accuracy(m, images, labels, device), "accuracy %" if data else "")
    _card(work, name, "udfc", f"{ratio:.0%} of the filters, {bits or 'no'} bits", before, after)
    notes = [f"{len(left)} layers were left alone (compress.json says why)"] if left else []
    if bits:
        notes.append(
            f"weights take at most {2**bits - 1} values each, and are stored as floats: the file is not smaller"
        )
    if not data:
        notes.append("accuracy was not measured: give --data")
    how = f"load it with shoestring.compress.load_into({type(model).__name__}(config), folder)"
    return {"before": before, "after": after, "notes": notes, "load": how}


def _flap(
    name: str, work: Path, ratio: float, structure: str, calibration: str, split: str, content: str | None, device: str
) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from shoestring.compress._flap_layouts import PREFIX
    from shoestring.compress.flap import flap_load, flap_prune

    folder, model, dtype = _model(name, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its model knows "
            f"{model.get_input_embeddings().num_embeddings}"
        )
    texts = list(islice(_texts(calibration, split, content), 20_000))
    blocks = _blocks(tokenizer, texts[::10], model.config.max_position_embeddings)
    before = _measured(model, dtype, lambda m: _perplexity(m, blocks, device), "perplexity")
    rest = [text for place, text in enumerate(texts) if place % 10]
    with _console.progress("flap") as report:
        small = flap_prune(
            model,
            rest,
            ratio,
            structure=structure,
            tokenizer=tokenizer,
            sequence_length=blocks.shape[1],
            inplace=True,
            progress=report,
        )
    small.to(dtype).save_pretrained(work)
    tokenizer.save_pretrained(work)
    again: Any = flap_load(work, dtype=torch.float32).to(device).eval()
    after = _measured(again, dtype, lambda m: _perplexity(m, blocks, device), "perplexity")
    _card(work, name, "flap", f"{ratio:.0%} of the parameters of the blocks, {structure}", before, after)
    own = again.config.model_type.startswith(PREFIX)
    how = "load it with shoestring.compress.flap.flap_load(folder)" if own else "transformers alone loads it"
    return {"before": before, "after": after, "notes": [], "load": how}


def _model(name: str, device: str) -> tuple[str, Any, torch.dtype]:
    """Folder or hub id, the model in float32 for evaluation, and the dtype it is kept in."""
    import torch
    import transformers

    if not sys.stderr.isatty():  # a log file wants no bars
        transformers.utils.logging.disable_progress_bar()
    folder = _models.place(name)
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{name} is no folder of a transformers model: config.json is missing")
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        raise ValueError(f"{name} must name a model class of transformers, got architectures {config.architectures}")
    model = cls.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return folder, model, dtype


def _measured(model: Any, dtype: torch.dtype, figure: Callable[[Any], float], name: str) -> dict[str, float]:
    """The rows of the table. Bytes are those of the weights in `dtype`, tied ones once."""
    import statistics
    import time

    import torch

    state = {t.data_ptr(): t for t in model.state_dict().values()}.values()
    size = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in state)
    told = {name: figure(model)} if name else {}
    inputs = _dummy(model)
    seconds = []
    with torch.no_grad():
        for turn in range(13):
            began = time.perf_counter()
            model(**inputs)
            if turn >= 3:
                seconds.append(time.perf_counter() - began)
    return told | {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "bytes of weights": float(size),
        "milliseconds a pass": 1000 * statistics.median(seconds),
    }


def _dummy(model: Any) -> dict[str, Any]:
    """One row: a block of 128 tokens, or an image of the model's size."""
    import torch

    if model.main_input_name == "input_ids":
        length = min(128, getattr(model.config, "max_position_embeddings", 128))
        return {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
    size = getattr(model.config, "image_size", 64)
    return {"pixel_values": torch.zeros(1, model.config.num_channels, size, size, device=model.device)}


def _texts(name: str, split: str, content: str | None) -> Iterable[str]:
    from shoestring import data

    rows = data.load(name, split=split, streaming=False)
    column = content or next((c for c in ("text", "verse", "gloss", "content") if c in rows.column_names), None)
    if column is None or column not in rows.column_names:
        raise ValueError(f"{name} has no column of texts among {rows.column_names}: name it with --content")
    found = [text for text in rows[column] if isinstance(text, str) and text.strip()]
    if len(found) < 10:
        raise ValueError(f"{name} must hold at least 10 texts in {column!r}, got {len(found)}")
    return found


def _blocks(tokenizer: Any, texts: list[str], longest: int) -> torch.Tensor:
    """Texts, joined, as (n, length) blocks of tokens."""
    import torch

    length = min(128, longest)
    ids = [i for row in tokenizer(texts, add_special_tokens=False).input_ids for i in row][: length * MEASURED // 16]
    if len(ids) < length:
        raise ValueError(
            f"--calibration is too short to measure: a tenth of it has {len(ids)} tokens, a block {length}"
        )
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _perplexity(model: Any, blocks: torch.Tensor, device: str) -> float:
    import torch

    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss.double() * len(b) for b in blocks.to(device).split(16)]
    return float((torch.stack(losses).sum() / len(blocks)).exp())


def _images(
    folder: str, model: Any, data: str, split: str, content: str | None, label: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to MEASURED images as the model takes them, drawn evenly, and their labels."""
    import numpy as np
    import torch

    from shoestring import data as data_

    rows = data_.load(data, split=split)
    pictures, labels = content or "image", label or "label"
    if missing := [column for column in (pictures, labels) if column not in rows.column_names]:
        raise ValueError(f"{data} must have a column {missing[0]!r}, got {rows.column_names}")
    rows = rows.select(range(0, len(rows), max(1, len(rows) // MEASURED)))
    channels = model.config.num_channels
    processor = None
    if (Path(folder) / "preprocessor_config.json").is_file() or not Path(folder).is_dir():
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(folder)
    opened = [image.convert("L" if channels == 1 else "RGB") for image in rows[pictures]]
    if processor is not None:
        pixels = processor(opened, return_tensors="pt").pixel_values
    else:  # the zoo's: [-1, 1], as they are
        arrays = np.stack([np.asarray(image, dtype=np.float32) for image in opened]) / 127.5 - 1
        pixels = torch.from_numpy(arrays.reshape(len(arrays), *arrays.shape[1:3], channels)).permute(0, 3, 1, 2)
    truth = torch.tensor(rows[labels])
    if truth.is_floating_point() or int(truth.min()) < 0 or int(truth.max()) >= model.config.num_labels:
        raise ValueError(f"{labels!r} of {data} must be classes from 0 to {model.config.num_labels - 1} of the model")
    return pixels, truth


def _accuracy(model: Any, images: Any, labels: Any, device: str) -> float:
    import torch

    with torch.no_grad():
        answers = torch.cat([model(pixel_values=part.to(device)).logits.argmax(1).cpu() for part in images.split(128)])
    return 100 * float((answers == labels).double().mean())


def _copied(folder: str, work: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (Path(folder) / name).is_file():
            shutil.copyfile(Path(folder) / name, work / name)


def _card(work: Path, base: str, method: str, what: str, before: dict[str, float], after: dict[str, float]) -> None:
    """README.md beside the weights: what this is, of what, and how good."""
    lines = [f"| {name} | {_console.figure(before[name])} | {_console.figure(after[name])} |" for name in before]
    table = "\n".join(["| | before | after |", "| --- | --- | --- |", *lines])
    (work / "README.md").write_text(
        f"# {base}, compressed by {method}\n\nBase model: `{base}`. Removed: {what}. "
        f"Made by `shoestring compress`; measured on this machine.\n\n{table}\n",
        "utf-8",
    )
