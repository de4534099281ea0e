"""A training run on the disk: one safetensors file holds tensors and, as JSON in its header, everything else.

No pickle: `write` takes dicts, lists, tuples, numbers, strings and tensors, nested at will, and `read` gives the same
back, bit for bit. `random_state` and `set_random_state` do the same for the random number generators.
"""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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


class Keeper:
    """The checkpoints of one run in one folder: ``step-<number>.safetensors``, the last two of them.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist.
    model : nn.Module
    parts : mapping of str to object
        Optimizer, scheduler and whatever else has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, folder: Path, model: nn.Module, parts: Mapping[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"checkpoint must be a folder, got the file {folder}")
        self.folder, self.model, self.parts = folder, model, parts
        self._kept: list[Path] = []

    def save(self, step: int, run: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, with `run` beside the states of model and parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:010d}.safetensors"
        states = {name: part.state_dict() for name, part in self.parts.items()}
        write(path, {"run": dict(run), "model": self.model.state_dict(), "parts": states})
        self._kept = [*(kept for kept in self._kept if kept != path), path][-2:]
        for old in set(self._found()) - set(self._kept):
            old.unlink(missing_ok=True)

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and what is in it; None if there is none."""
        broken = None
        for path in self._found():
            try:
                return path, read(path)
            except ValueError as error:
                broken = broken or error
                warnings.warn(f"{error}. Trying the one before.", stacklevel=2)
        if broken:
            raise broken
        return None

    def load(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Put model and parts into the state of the checkpoint, or raise ValueError before anything has changed."""
        if set(saved["parts"]) != set(self.parts):
            raise ValueError(
                f"checkpoint {path} is of another run: it has the states of {sorted(saved['parts'])}, "
                f"this run needs {sorted(self.parts)}"
            )
        _check_model(self.model, saved["model"], path)
        for name, part in self.parts.items():
            try:
                part.load_state_dict(saved["parts"][name])
            except (ValueError, KeyError) as error:
                raise ValueError(f"the {name} in checkpoint {path} does not fit: {error}") from error
            if isinstance(part, torch.optim.Optimizer):
                _keep_dtypes(part, saved["parts"][name])
        self.model.load_state_dict(saved["model"])
        self._kept = [path]

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), key=lambda path: path.name, reverse=True)


def _check_model(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Names, shapes and dtypes, all before anything is loaded: `load_state_dict` would load what fits, then raise."""
    own = model.state_dict()
    if names := sorted(set(own) ^ set(state)):
        raise ValueError(f"checkpoint {path} is of another model: only one of the two has {', '.join(names[:3])}")
    for name, value in own.items():
        if isinstance(value, Tensor) and (value.shape, value.dtype) != (state[name].shape, state[name].dtype):
            raise ValueError(
                f"checkpoint {path} is of another model: {name} is {tuple(state[name].shape)} {state[name].dtype} "
                f"there, {tuple(value.shape)} {value.dtype} here"
            )


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back the saved state's dtypes: torch casts it to that of the parameters (float32 moments to bfloat16)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        if not (isinstance(index, int) and index < len(parameters) and isinstance(saved, Mapping)):
            continue  # an optimizer with a layout and a load_state_dict of its own
        loaded = optimizer.state[parameters[index]]
        for name, value in saved.items():
            now = loaded.get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                loaded[name] = value.to(now.device)
