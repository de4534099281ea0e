"""Random expansions of frozen features, drawn once and never trained: the buffers of the analytic learners."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from sklearn.utils import check_random_state
from torch import Tensor


def random_projection(
    in_features: int, n_components: int, init: Literal["uniform", "normal"] = "uniform", random_state: Any = 0
) -> np.ndarray:
    """The buffer's W_B, float64 (in_features, n_components).

    ``"uniform"``: U(-1/sqrt(e), 1/sqrt(e)), as the official code; ``"normal"``: N(0, 1), as the text. Drawn with
    NumPy's legacy generator, whose stream is frozen: the same seed gives the same buffer on every machine, so that
    the sums of different sites can be merged.
    """
    draw = check_random_state(random_state)
    if init == "normal":
        return draw.standard_normal((in_features, n_components))
    if init == "uniform":
        bound = in_features**-0.5
        return draw.uniform(-bound, bound, (in_features, n_components))
    raise ValueError(f"init must be 'uniform' or 'normal', got {init!r}")


def relu_buffer(E: Tensor, W_B: Tensor) -> Tensor:
    """``relu(E W_B)``, eq. 3: features (N, e) and projection (e, M) to (N, M). 2 N e M flops."""
    return (E @ W_B).relu_()


def rbf_buffer(E: Tensor, centers: Tensor, kernel_width: float) -> Tensor:
    """``exp(-||e - m_j||^2 / (2 sigma^2))``, GKEAL eq. 4: features (N, e) and centres (M, e) to (N, M)."""
    squares = E.square().sum(1)[:, None] - 2 * (E @ centers.T) + centers.square().sum(1)  # (N, M)
    return squares.clamp_(min=0).mul_(-0.5 / kernel_width**2).exp_()
