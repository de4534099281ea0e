"""Shrunk modules on disk: safetensors and a JSON note, read back into the model they came from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring._files import atomic_path

__all__ = ["load_into", "resize_", "save"]

_WEIGHTS, _NOTE = "model.safetensors", "compress.json"


def save(model: nn.Module, folder: str | os.PathLike[str], note: Mapping[str, Any]) -> None:
    """Write the weights of a module and what was done to it.

    Parameters
    ----------
    model : nn.Module
    folder : path
        Created if need be. Each file is replaced in one move; the weights come last.
    note : mapping
        Method, ratio, figures: anything JSON holds.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save(nn.Linear(3, 2), folder, {"method": "none"})
    >>> model = load_into(nn.Linear(5, 2), folder)
    >>> model.in_features
    3
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, names = {}, {}
    for name, tensor in model.state_dict().items():  # tied weights are kept once
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in names:
            continue
        names[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    with atomic_path(folder / _NOTE) as file:
        file.write_text(json.dumps(dict(note), indent=1) + "\n", "utf-8")
    with atomic_path(folder / _WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})


def load_into(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Shrink `model`, built as the original was, to the shapes in `folder`, and load the weights bit for bit.

    Parameters
    ----------
    model : nn.Module
        Of the original's architecture; its weights do not matter. Changed in place, unless something is wrong.
    folder : path
        Written by `save`, or by ``save_pretrained`` of a shrunk transformers model.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    FileNotFoundError
        If there are no weights in `folder`.
    ValueError
        If they are damaged, or belong to another architecture.
    """
    file = Path(folder) / _WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    own = model.state_dict()
    unknown = [name for name in tensors if name not in own and not name.endswith(".bias")]
    tied = {tensor.data_ptr() for name, tensor in own.items() if name in tensors}
    missing = [name for name in own if name not in tensors and own[name].data_ptr() not in tied]
    odd = [name for name, tensor in tensors.items() if name in own and tensor.ndim != own[name].ndim]
    if unknown or missing or odd:
        first = (unknown or missing or odd)[0]
        raise ValueError(f"{file} is of another architecture than model ({type(model).__name__}): see {first}")
    resize_(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model.load_state_dict(tensors, strict=False)
    return model


def resize_(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters and buffers new shapes, in place, with values undefined, and tell their layers.

    ``shapes["block.conv.weight"] = (12, 3, 3, 3)`` makes a convolution of 12 filters; a bias that is not there is made.
    What has its shape already keeps its tensor.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        owner, _, last = name.rpartition(".")
        module = modules[owner]
        old = getattr(module, last)
        if old is not None and tuple(old.shape) == shape:
            continue
        like = next(module.parameters()) if old is None else old
        fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
        if old is None or isinstance(old, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=like.requires_grad)
        setattr(module, last, fresh)
        _tell(module, last, fresh)


def _tell(module: nn.Module, last: str, tensor: Tensor) -> None:
    """The sizes that a layer keeps beside its weight."""
    if last != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels = len(tensor)
        if module.groups == module.in_channels and module.groups > 1:  # depthwise
            module.in_channels, module.groups = len(tensor), len(tensor)
        else:
            module.in_channels = tensor.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(tensor)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(tensor.shape)
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D, weight (in, out)
        vars(module).update(nx=tensor.shape[0], nf=tensor.shape[1])
