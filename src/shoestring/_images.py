"""What a backbone does to an image before its network: decode, turn, put on white, cut the central square, resize.

An image is a uint8 array of shape (H, W, 3), or (H, W, 1) if it is grey, which stays so until its batch is resized.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from PIL import Image, ImageOps
except ImportError:  # arrays need no Pillow
    Image = None  # type: ignore[assignment]


class DecodeError(Exception):
    """This image cannot be read, others may: why."""


def undecoded(items: Any) -> Any:
    """A column of a `datasets.Dataset` with its images still encoded, so that a broken one can be named."""
    datasets = sys.modules.get("datasets")
    column = getattr(getattr(datasets, "arrow_dataset", None), "Column", None)  # since datasets 4
    if datasets is None or column is None or not isinstance(items, column):
        return items
    if not isinstance(items.source, datasets.Dataset) or not isinstance(items.features, datasets.Image):
        return items
    if items.source.format["type"] is not None:  # a transform of the user's
        return items
    name = items.column_name
    encoded = items.source.select_columns([name]).cast_column(name, datasets.Image(decode=False))
    return (item for part in encoded.iter(64) for item in part[name])


def pixels(item: Any, position: int) -> np.ndarray:
    """An image of any kind that `Backbone.extract` takes, as its viewer shows it: (H, W, 3) or (H, W, 1), uint8."""
    if isinstance(item, np.ndarray):
        return _of_array(item, position)
    if isinstance(item, Mapping) and ("bytes" in item or "path" in item):
        item = item["bytes"] if item.get("bytes") is not None else item["path"]
    if Image is None:
        raise ImportError("reading images needs Pillow: pip install 'shoestring[vision]'")
    try:
        if isinstance(item, bytes):
            return _of_pillow(Image.open(BytesIO(item)))
        if isinstance(item, Image.Image):
            return _of_pillow(item)
        if isinstance(item, str | os.PathLike):
            with open(item, "rb") as file:
                return _of_pillow(Image.open(file))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers let almost anything through: struct.error, SyntaxError, IndexError...
        raise DecodeError(_reason(error)) from error
    raise TypeError(
        f"item {position} must be an image: PIL, uint8 array, path, bytes, or a mapping with bytes or path, "
        f"got {type(item)}"
    )


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow can read"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _of_array(array: np.ndarray, position: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"item {position} must be uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if 0 in array.shape:
        raise DecodeError("no pixels")
    return _of_pillow(Image.fromarray(array)) if array.shape[2] == 4 else array


def _of_pillow(image: Any) -> np.ndarray:
    """Any PIL image, on white."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise DecodeError(f"{image.width} x {image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS")
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode}, not 8 or 16 bits")
    if image.getexif().get(0x112, 1) != 1:  # orientation; exif_transpose would copy the others
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)[:, :, None]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)  # np.asarray, faster


def three_channels(images: np.ndarray) -> np.ndarray:
    """Shape (..., 3) of (..., 3) or (..., 1)."""
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def resized(images: list[np.ndarray], size: int) -> Tensor:
    """Central squares of images, resized: (n, 3, size, size), uint8, in channels_last layout."""
    if len({image.shape for image in images}) > 1:
        return torch.cat([resized([image], size) for image in images])
    batch = torch.from_numpy(three_channels(np.stack(images))).permute(0, 3, 1, 2)  # (n, 3, H, W)
    height, width = batch.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    batch = batch[:, :, top : top + side, left : left + side]
    # On bytes torch resizes as Pillow does, to a level at most, and each image by itself.
    batch = F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
    return batch.contiguous(memory_format=torch.channels_last)
