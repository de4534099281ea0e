"""The paper's steps of higher order (`shoestring.guide.cfgpp`), and how noise is shared between old and new."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

Level = tuple[float, float]  # alpha, sigma


def split_noise(level: Level, next_level: Level, eta: float) -> tuple[float, float]:
    """Standard deviations of the noise at `next_level`: of what is drawn anew, and of what is kept of the old."""
    (alpha, sigma), (alpha_next, sigma_next) = level, next_level
    if not eta or not sigma_next:
        return 0.0, sigma_next
    s2 = (eta * sigma_next) ** 2 * (1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)
    return max(s2, 0.0) ** 0.5, max(sigma_next**2 - s2, 0.0) ** 0.5


def cfgpp_dpmpp_2m_step(
    x: Tensor,
    D_c: Tensor,
    D_u: Tensor,
    sigma: float,
    sigma_next: float,
    scale: float,
    *,
    D_u_old: Tensor | None = None,
    sigma_old: float | None = None,
) -> Tensor:
    r"""DPM-Solver++ 2M with CFG++, in Euler's form (:math:`\alpha = 1`): the unconditional 2M step plus guidance.

    With :math:`h = \ln(\sigma/\sigma')`, :math:`r = \ln(\sigma_{old}/\sigma)/h`:
    :math:`x' = D_\lambda - e^{-h} D_u + \frac{1 - e^{-h}}{2 r}(D_u - D_u^{old}) + e^{-h} x`.
    The first step, and the last one to :math:`\sigma' = 0`, are Euler's.

    Parameters
    ----------
    x : Tensor of shape (B, ...)
        Divide a sample of unit variance, and nothing else, by its :math:`\alpha` first.
    D_c, D_u, D_u_old : Tensor, as x
        Clean estimates :math:`\hat x_0`: with the condition, without it, and the latter of the step before.
    sigma, sigma_next, sigma_old : float
        Of x, of the answer, of the step before.
    scale : float
        :math:`\lambda`.

    Examples
    --------
    >>> import torch
    >>> x, D = torch.tensor([3.0]), torch.tensor([1.0])
    >>> cfgpp_dpmpp_2m_step(x, D, D, 2.0, 1.0, 0.6)  # no step before: Euler, 1 + (3 - 1) / 2
    tensor([2.])
    """
    D = D_u + scale * (D_c - D_u)
    fall = sigma_next / sigma  # e^-h
    step = D - fall * D_u + fall * x
    if D_u_old is None or sigma_old is None or sigma_next == 0:
        return step
    r = math.log(sigma_old / sigma) / math.log(sigma / sigma_next)
    return step + (1 - fall) / (2 * r) * (D_u - D_u_old)


def cfgpp_dpmpp_2s_step(
    x: Tensor,
    denoise: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    sigma: float,
    sigma_next: float,
    scale: float,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    r"""DPM-Solver++ 2S (ancestral where eta > 0) with CFG++, in Euler's form; two evaluations of `denoise`.

    The unconditional estimate leads to the midpoint :math:`x_2` at :math:`\sqrt{\sigma \sigma_d}`, then
    :math:`x' = D_\lambda(x_2) - e^{-h} D_u(x_2) + e^{-h} x + s z`, :math:`e^{-h} = \sigma_d/\sigma`.

    Parameters
    ----------
    denoise : callable
        ``denoise(x, sigma) -> (D_c, D_u)``, clean estimates.
    x, sigma, sigma_next, scale, eta, noise
        As of `cfgpp_dpmpp_2m_step` and `cfgpp_step`.

    Examples
    --------
    >>> import torch
    >>> x, one = torch.tensor([3.0]), torch.tensor([1.0])
    >>> cfgpp_dpmpp_2s_step(x, lambda x, sigma: (one, one), 2.0, 1.0, 0.6)
    tensor([2.])
    """
    s, down = split_noise((1.0, sigma), (1.0, sigma_next), eta)
    fall = down / sigma
    D_c, D_u = denoise(x, sigma)
    if down > 0:
        x_2 = math.sqrt(fall) * x + (1 - math.sqrt(fall)) * D_u
        D_c, D_u = denoise(x_2, math.sqrt(sigma * down))
    step = D_u + scale * (D_c - D_u) - fall * D_u + fall * x
    if s == 0:
        return step
    if noise is None:
        raise ValueError(f"noise is needed where eta > 0, got eta {eta} and None")
    return step + s * noise
