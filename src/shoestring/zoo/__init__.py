"""zoo: small real models that this project trained, as transformers and diffusers objects. Offline, in the package.

They are what the methods of the other rooms are verified on, here and on any laptop; every method takes a large
public checkpoint in their place. ``docs/zoo.md`` has what each was trained on and how good it is.

>>> from shoestring import zoo
>>> zoo.names()  # doctest: +ELLIPSIS
['emoji-clip', 'judge-colour', ...]

A model is trained again by ``python -m shoestring.zoo.train NAME``; `shoestring.zoo.train` has the scripts.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["card", "load", "names", "parts", "path"]

_MODELS = Path(__file__).parent / "models"

# Every part of a model: the class whose from_pretrained reads it, and the folder it is in.
_PARTS: dict[str, dict[str, tuple[str, str]]] = {
    "tiny-clip": {
        "model": ("transformers:CLIPModel", ""),
        "tokenizer": ("transformers:CLIPTokenizer", ""),
        "processor": ("transformers:CLIPProcessor", ""),
    },
    "emoji-clip": {"model": ("shoestring.zoo._emoji_clip:EmojiCLIP", "")},
    "tiny-t2i": {"model": ("diffusers:StableDiffusionPipeline", "")},
    "tiny-class-ddpm": {
        "model": ("diffusers:UNet2DModel", "unet"),
        "scheduler": ("diffusers:DDIMScheduler", "scheduler"),
    },
    "tiny-class-ddpm-weak": {
        "model": ("diffusers:UNet2DModel", "unet"),
        "scheduler": ("diffusers:DDIMScheduler", "scheduler"),
    },
    "tiny-gpt": {
        "model": ("transformers:LlamaForCausalLM", ""),
        "tokenizer": ("transformers:AutoTokenizer", ""),
    },
    "tiny-captioner": {
        "model": ("transformers:VisionEncoderDecoderModel", ""),
        "tokenizer": ("transformers:AutoTokenizer", ""),
        "processor": ("transformers:AutoImageProcessor", ""),
    },
    "tiny-var": {
        "model": ("transformers:GPT2LMHeadModel", ""),
        "codebook": ("shoestring.zoo._codebook:PatchCodebook", "codebook"),
    },
    "tiny-resnet": {"model": ("transformers:ResNetForImageClassification", "")},
    "judge-fashion": {"model": ("transformers:ResNetForImageClassification", "")},
    "judge-garment": {"model": ("transformers:ResNetForImageClassification", "")},
    "judge-colour": {"model": ("transformers:ResNetForImageClassification", "")},
    "judge-position": {"model": ("transformers:ResNetForImageClassification", "")},
}


def names() -> list[str]:
    """The models that this installation carries, sorted.

    Examples
    --------
    >>> "tiny-gpt" in names()
    True
    """
    return sorted(name for name in _PARTS if (_MODELS / name / "card.json").is_file())


def parts(name: str) -> list[str]:
    """What `load` can give of a model: ``"model"`` and, say, its tokenizer.

    Examples
    --------
    >>> parts("tiny-gpt")
    ['model', 'tokenizer']
    """
    _check_name(name)
    return list(_PARTS[name])


def path(name: str) -> Path:
    """The folder of a model, for a ``from_pretrained`` of your own.

    Raises
    ------
    ValueError
        If there is no such model in the zoo.
    FileNotFoundError
        If this installation lacks it.
    """
    _check_name(name)
    if not (_MODELS / name / "card.json").is_file():
        raise FileNotFoundError(f"{_MODELS / name / 'card.json'} is missing: {_remedy(name)}")
    return _MODELS / name


def card(name: str) -> dict[str, Any]:
    """What a model is: data and their licence, seed, steps, time of training, and its measured quality.

    Returns
    -------
    dict
        ``what``, ``data``, ``licence``, ``seed``, ``steps``, ``seconds``, ``parameters``, ``bytes``, ``quality``
        (figures by name; accuracies and shares from 0 to 1), ``quality_fast`` (the same measured on less, which the
        tests repeat), ``machine`` and ``versions``.

    Examples
    --------
    >>> 0 < card("judge-fashion")["quality"]["accuracy"] < 1
    True
    """
    return _read_card(path(name), name)


def load(
    name: str, part: str = "model", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """A model of the zoo, or a part of it, as the object of its own library.

    Parameters
    ----------
    name : str
        One of `names`.
    part : str, default="model"
        One of `parts`: ``"model"``, in eval mode (a pipeline is one too), ``"tokenizer"``, ``"scheduler"``, ...
    device, dtype
        Of the model. The files hold float16.

    Raises
    ------
    ValueError
        If there is no such model or part, or a file is damaged: the message names it and the remedy.
    FileNotFoundError
        If a file is missing.

    Examples
    --------
    >>> model, tokenizer = load("tiny-gpt"), load("tiny-gpt", "tokenizer")
    >>> type(model).__name__
    'LlamaForCausalLM'
    """
    return load_from(path(name), name, part, device=device, dtype=dtype)


def load_from(
    folder: Path,
    name: str,
    part: str = "model",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """As `load`, of a model that was trained again into `folder`."""
    if part not in _PARTS[name]:
        raise ValueError(f"part of {name} must be one of {', '.join(_PARTS[name])}, got {part!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    _check_files(folder, name)
    where, subfolder = _PARTS[name][part]
    module, _, cls = where.partition(":")
    try:
        loader = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        extra = "diffusion" if module == "diffusers" else "text,vision"
        raise ImportError(f"{name} needs {module}: pip install 'shoestring[{extra}]'") from error
    options: dict[str, Any] = {"local_files_only": True}
    if part == "model":
        options["dtype"] = dtype
    with _no_bars():
        loaded = loader.from_pretrained(folder / subfolder, **options)
    if part == "model":
        loaded = loaded.to(device)
        if isinstance(loaded, torch.nn.Module):
            loaded.eval()
    return loaded


@contextmanager
def _no_bars() -> Iterator[None]:
    """For loads of a second: the two libraries draw bars even where nobody looks."""
    libraries = [sys.modules[m] for m in ("transformers.utils.logging", "diffusers.utils.logging") if m in sys.modules]
    drawn = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in drawn:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawn:
            library.enable_progress_bar()


def _check_name(name: str) -> None:
    if name not in _PARTS:
        raise ValueError(f"name must be one of {', '.join(sorted(_PARTS))}, got {name!r}")


def _read_card(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / "card.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'card.json'} is damaged ({error}): {_remedy(name)}") from error


def _check_files(folder: Path, name: str) -> None:
    """The card lists the files and their SHA-256: a damaged model must not answer."""
    for relative, expected in _read_card(folder, name)["files"].items():
        file = folder / relative
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {_remedy(name)}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{file} is damaged (its SHA-256 is not the card's): {_remedy(name)}")


def _remedy(name: str) -> str:
    return (
        f"reinstall shoestring, or train it again with `python -m shoestring.zoo.train {name} --out {_MODELS / name}`"
    )
