"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004), to say how near two samples of one noise are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ssim"]

WIDTH, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03  # the authors' window and constants


def ssim(images: Tensor, references: Tensor, *, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Structural similarity of every image to its reference, 1 for equal ones.

    With means, variances and covariance in a Gaussian window of 11 x 11 (spread 1.5), C1 = (K1 L)^2, C2 = (K2 L)^2,
    of values above `low`, as the luminance term wants means >= 0::

        SSIM = mean over windows of (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2))

    Windows lie wholly inside the image, as in the authors' code; channels are averaged.

    Parameters
    ----------
    images, references : tensors of shape (B, C, H, W), any floating dtype, H and W >= 11
        Computed in float32, or in float64 if both are.
    low, high : float, default=-1.0, 1.0
        The smallest and largest possible value; L is their difference.

    Returns
    -------
    tensor of shape (B,)

    Raises
    ------
    ValueError
        If shapes differ, are not (B, C, H, W), or are smaller than the window; or low is not below high.

    Examples
    --------
    >>> picture = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
    >>> ssim(picture, picture)
    tensor([1.])
    """
    if images.shape != references.shape or images.ndim != 4 or min(images.shape[2:]) < WIDTH:
        raise ValueError(
            f"images and references must be of one shape (B, C, H, W), H and W >= {WIDTH}, "
            f"got {tuple(images.shape)} and {tuple(references.shape)}"
        )
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    dtype = torch.promote_types(torch.promote_types(images.dtype, references.dtype), torch.float32)
    x, y = (z.to(dtype).flatten(0, 1)[:, None] - low for z in (images, references))  # (BC, 1, H, W)
    places = torch.arange(WIDTH, dtype=dtype, device=x.device) - WIDTH // 2
    window = torch.exp(-(places**2) / (2 * SPREAD**2))
    window = window / window.sum()

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window[None, None, :, None]), window[None, None, None, :])

    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (K1 * (high - low)) ** 2, (K2 * (high - low)) ** 2
    share = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx * mx + my * my + c1) * (sx + sy + c2))
    return share.flatten(1).mean(1).unflatten(0, images.shape[:2]).mean(1)
