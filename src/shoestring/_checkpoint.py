"""State on the disk: one safetensors file holds tensors and, as JSON in its header, everything else.

No pickle: `write` takes dicts, lists, tuples, numbers, strings and tensors, nested at will, and `read` gives the same
back, bit for bit. `random_state` and `set_random_state` do the same for the random number generators.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoestring._files import atomic_path

FORMAT = "shoestring training checkpoint 1"


def write(path: Path, tree: Any) -> None:
    """Write `tree` to `path`, whole or not at all.

    Raises
    ------
    TypeError
        If `tree` holds something that is neither a tensor nor plain data; it is named by its place in the tree.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write(path, {"betas": (0.9, 0.999), 3: [torch.ones(2), None]})
    >>> read(path)
    {'betas': (0.9, 0.999), 3: [tensor([1., 1.]), None]}
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(tree, "", tensors))
    storages: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses two tensors in one storage, as tied weights are
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        storages.add(storage.data_ptr())
    metadata = {"format": FORMAT, "tree": text, "crc32": str(_checksum(text, tensors))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def read(path: Path) -> Any:
    """Read what `write` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, corrupt, or no checkpoint of this library; it is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clone: the tensors of safe_open live in the file, which may be removed while they are in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is truncated or corrupt ({error}): remove it") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a '{FORMAT}' file, its format is {metadata.get('format')!r}")
    if metadata["crc32"] != str(_checksum(metadata["tree"], tensors)):
        raise ValueError(f"checkpoint {path} is corrupt (its checksum does not match): remove it")
    return _unpack(json.loads(metadata["tree"]), tensors)


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`; tensors go to `tensors` under their place. Every JSON object is a tag for one type."""
    if isinstance(value, Tensor):
        value, tag = value.detach(), "tensor"
        if value.is_complex():  # safetensors has no complex128
            value, tag = torch.view_as_real(value.resolve_conj()), "complex"
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"a checkpoint holds dense tensors only, got {value.layout} at {place}")
        while place in tensors:  # keys 1 and "1" in one dict
            place += "+"
        tensors[place] = value.cpu().contiguous()
        return {tag: place}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_pack(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):  # a list of pairs, because JSON's keys are strings only
        pairs = [[_pack(k, f"{place}/key", {}), _pack(v, f"{place}/{k}", tensors)] for k, v in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise TypeError(f"a checkpoint holds tensors and plain data only, got {type(value).__name__} at {place}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "complex":
        return torch.view_as_complex(tensors[content])
    if tag == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    pairs = {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    return Counter(pairs) if tag == "counter" else pairs


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def random_state(device: torch.device, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """State of Python's, numpy's and torch's global generators, of the device's, and of the given ones."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the state, nothing is drawn
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": _device_random(device, "get")() if device.type != "cpu" else None,
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: Mapping[str, Any], device: torch.device, generators: Sequence[torch.Generator]) -> None:
    """Put every generator back to where `random_state` found it."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and state["device"] is not None:
        _device_random(device, "set")(state["device"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


def _device_random(device: torch.device, verb: str) -> Any:
    function = getattr(getattr(torch, device.type), f"{verb}_rng_state")
    if device.type == "mps":  # one device, no argument
        return function
    return (lambda: function(device)) if verb == "get" else (lambda state: function(state, device))
