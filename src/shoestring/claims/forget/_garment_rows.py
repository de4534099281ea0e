"""Garments as tensors for short claims: without the import of transformers, and read once a process."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from shoestring import data


@cache
def garment_rows(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) float32 in [-1, 1] and labels (n,) int64 of a part of the ``fashion`` bundle."""
    rows = data.load("fashion", split=split)
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in rows["image"]]))
    return pixels[:, None].float() / 127.5 - 1, torch.tensor(rows["label"])
