"""A codebook of image patches, with which a language model can write grey images as sequences of whole numbers.

An image (1, 28, 28) is cut into 7 x 7 patches of 4 x 4 pixels; the code of a patch is the number of the nearest of K
vectors, the means that k-means found on training images. Codes are in reading order. `decode` puts the vectors back.

    |p - c_k|^2 = |p|^2 - 2 (p . c_k - |c_k|^2 / 2):   code(p) = argmax_k  p . c_k - |c_k|^2 / 2
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["PatchCodebook"]


class PatchCodebook(nn.Module):
    """Images to codes and back.

    Parameters
    ----------
    codes : int, default=256
        K, the number of vectors.
    patch : int, default=4
        Pixels of a patch's side.
    side : int, default=28
        Pixels of an image's side, a multiple of `patch`.

    Attributes
    ----------
    vectors : (K, patch^2) parameter without gradient

    Examples
    --------
    >>> codebook = PatchCodebook(codes=2)
    >>> codebook.vectors[1] = 1.0
    >>> codebook.encode(torch.ones(3, 1, 28, 28)).unique(), codebook.length
    (tensor([1]), 49)
    """

    def __init__(self, codes: int = 256, patch: int = 4, side: int = 28) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"side must be a multiple of patch, got {side} and {patch}")
        self.codes, self.patch, self.side = codes, patch, side
        self.vectors = nn.Parameter(torch.zeros(codes, patch * patch), requires_grad=False)

    @property
    def length(self) -> int:
        """Codes of an image."""
        return (self.side // self.patch) ** 2

    def patches(self, images: Tensor) -> Tensor:
        """(n, 1, side, side) -> (n, length, patch^2)."""
        if images.ndim != 4 or images.shape[1:] != (1, self.side, self.side):
            raise ValueError(f"images must have shape (n, 1, {self.side}, {self.side}), got {tuple(images.shape)}")
        return nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, 1, side, side) in [-1, 1] -> codes (n, length) int64."""
        c = self.vectors
        scores = self.patches(images.to(c.dtype)) @ c.T - c.square().sum(1) / 2  # (n, length, K)
        return scores.argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (n, length) -> images (n, 1, side, side)."""
        if codes.ndim != 2 or codes.shape[1] != self.length:
            raise ValueError(f"codes must have shape (n, {self.length}), got {tuple(codes.shape)}")
        columns = self.vectors[codes].transpose(1, 2)  # (n, patch^2, length)
        return nn.functional.fold(columns, (self.side, self.side), self.patch, stride=self.patch)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"codes": self.codes, "patch": self.patch, "side": self.side}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        save_file({"vectors": self.vectors.detach().cpu().contiguous()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **_: Any) -> PatchCodebook:
        """Read what `save_pretrained` wrote; computes in float32, whatever the file holds."""
        folder = Path(folder)
        codebook = cls(**json.loads((folder / "config.json").read_text("utf-8")))
        codebook.load_state_dict(load_file(folder / "model.safetensors"))
        return codebook.eval()
