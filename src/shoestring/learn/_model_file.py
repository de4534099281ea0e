"""A learner as one safetensors file: its arrays, and what it is as JSON in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shoestring._files import atomic_path


def write(
    path: str | os.PathLike[str], model: Any, labels: np.ndarray, tensors: dict[str, torch.Tensor], *,
    format: str, version: int, params: dict[str, Any], extra: dict[str, Any] | None,
    solved: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Write a fitted learner, atomically.

    labels : its classes, in the order in which `tensors` count them; extra : plain data that `read` gives back;
    solved : what follows from the tensors but takes its time
    """
    meta = {
        "format": format,
        "version": version,
        "params": params,
        "classes": labels.tolist(),
        "kind": labels.dtype.kind,
        "n_features": model.n_features_in_,
        "feature_names": getattr(model, "feature_names_in_", np.empty(0)).tolist() or None,
        "extra": extra or {},
        "solved": solved or {},
    }
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        save_file(whole, temporary, metadata={"shoestring": json.dumps(meta, default=_plain)})


def read(path: str | os.PathLike[str], *, format: str, version: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write` wrote: the description, and the tensors.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file; if it is truncated, of another format, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no saved model at {path}")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("shoestring", "{}"))
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from None
    if meta.get("format") != format:
        raise ValueError(f"{path} is of the format {meta.get('format')!r}, expected {format!r}")
    if meta["version"] > version:
        raise ValueError(f"{path} has version {meta['version']}; this shoestring reads up to {version}: upgrade it")
    return meta, read


def restore(model: Any, meta: dict[str, Any]) -> np.ndarray:
    """Give a learner its feature names and width; returns its classes as `write` got them."""
    model.n_features_in_ = meta["n_features"]
    if meta["feature_names"]:
        model.feature_names_in_ = np.array(meta["feature_names"], dtype=object)
    return np.array(meta["classes"], dtype={"i": np.int64, "U": str, "b": bool}[meta["kind"]])


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, for json."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot save {value!r}: not a plain JSON value")
