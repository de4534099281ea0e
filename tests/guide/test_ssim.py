"""Structural similarity against its definition, window by window."""

import numpy as np
import pytest
import torch

from shoestring.guide._ssim import ssim

from .conftest import random


def by_definition(x, y, data_range):
    """One channel; Wang et al. 2004 as it is written."""
    places = np.arange(11) - 5
    w = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            sa, sb, sab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * sab + c2) / ((ma**2 + mb**2 + c1) * (sa + sb + c2)))
    return np.mean(values)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0)])
def test_equals_its_definition(low, high):
    x, y = random(2, 3, 14, 13), random(2, 3, 14, 13, seed=1)
    y = x + 0.5 * y
    expected = [
        np.mean([by_definition(x[b, c].numpy() - low, y[b, c].numpy() - low, high - low) for c in range(3)])
        for b in (0, 1)
    ]
    np.testing.assert_allclose(ssim(x, y, low=low, high=high), expected, rtol=1e-10)


def test_equal_images_have_one_and_noise_less():
    x = random(2, 1, 28, 28, dtype=torch.float32).clamp(-1, 1)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert bool((ssim(x, -x) < 0).all())
    near, far = (ssim(x, x + s * random(2, 1, 28, 28, seed=2, dtype=torch.float32)) for s in (0.01, 0.5))
    assert bool((near > far).all())


def test_bad_input_is_named():
    x = random(1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"one shape.*\(1, 1, 12, 12\) and \(1, 1, 12, 11\)"):
        ssim(x, x[..., :11])
    with pytest.raises(ValueError, match="H and W >= 11"):
        ssim(x[..., :10, :], x[..., :10, :])
    with pytest.raises(ValueError, match="low must be below high, got 1 and 1"):
        ssim(x, x, low=1, high=1)
