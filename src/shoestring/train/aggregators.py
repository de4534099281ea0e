r"""Rules that make one descent direction of the gradients of m tasks: mean, PCGrad, CAGrad, MGDA, IMTL-G.

A rule is a function of the matrix G (m, n), row i being the gradient g_i of task i, and returns a vector (n,). So is
an aggregator of torchjd, and either can be given to `shoestring.train.flat_mtl.FlatMTL`. All of them here are
``w^T G`` with m weights that depend on the inner products of the rows alone: those, an m x m matrix, go to the CPU, the
gradients stay on their device. A matrix of zeros gives exactly zero, a task without gradient divides nothing by zero.

====== ======================================== ==========================================================
rule   paper                                    direction, g_0 the mean
====== ======================================== ==========================================================
mean   equal weights                            ``g_0``
pcgrad Yu et al., NeurIPS 2020, 2001.06782      ``sum_i (g_i, projected off every g_j it conflicts with)``
cagrad Liu et al., NeurIPS 2021, 2110.14048     ``(g_0 + c ||g_0|| g_w / ||g_w||) / (1 + c^2)``, below
mgda   Desideri 2012; Sener and Koltun, 2018    ``argmin ||d||`` over the convex hull of the rows
imtl   Liu et al., ICLR 2021, IMTL-G            ``<d, g_i> / ||g_i||`` equal for all i, weights sum to 1
====== ======================================== ==========================================================

CAGrad's ``g_w = G^T w`` minimises ``<g_w, g_0> + c ||g_0|| ||g_w||`` over the simplex. Official codes solve that by
SLSQP, which may stop early where rows differ much in size, and MGDA by 20 or 250 approximate iterations. Here both are
solved exactly. MGDA is non-negative least squares: for ``x = t w, sum_i w_i = 1``

    ``min_t ||t G^T w||^2 + (t - 1)^2 = ||G^T w||^2 / (1 + ||G^T w||^2)``, so ``min_{x >= 0}`` finds MGDA's w,

and CAGrad is MGDA of shifted rows: ``s ||v|| = min_tau (s / 2) (||v||^2 / tau + tau)``, and for a given tau the rest is
``(s / 2 tau) ||sum_i w_i (g_i + tau / s g_0)||^2`` up to constants, which leaves one equation, ``||g_w(tau)|| = tau``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import brentq, nnls
from torch import Tensor

from shoestring.train._checks import check_number

__all__ = ["aggregate_cagrad", "aggregate_imtl", "aggregate_mean", "aggregate_mgda", "aggregate_pcgrad"]

BLOCK = 2**22  # columns whose inner products are taken at a time: what half precision takes in single, 16 MB a task


def aggregate_mean(G: Tensor) -> Tensor:
    """Mean of the rows.

    Parameters
    ----------
    G : tensor of shape (m, n), floating point

    Returns
    -------
    tensor of shape (n,), dtype and device of G

    Examples
    --------
    >>> aggregate_mean(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.5000, 1.5000])
    """
    _check(G)
    return G.mean(0)


def aggregate_pcgrad(G: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad: every row, projected off each other row it has a negative inner product with; then the sum.

    A sum, as in the paper and in the code of FS-MTL: without conflict m times the mean.

    Parameters
    ----------
    G : tensor of shape (m, n), floating point
    generator : torch.Generator on the CPU, optional
        Draws the order of the projections, anew for every row. Default: in the order of the rows. For two tasks there
        is one order only.

    Returns
    -------
    tensor of shape (n,), dtype and device of G

    Examples
    --------
    >>> aggregate_pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    tensor([0.5000, 1.5000])
    """

    def weights(K: np.ndarray) -> np.ndarray:
        m = len(K)
        W = np.eye(m)  # row i: task i's projected gradient, as a mixture of the rows of G
        for i in range(m):
            order = range(m) if generator is None else torch.randperm(m, generator=generator).tolist()
            for j in order:
                inner = W[i] @ K[j]
                if j != i and inner < 0:
                    W[i, j] -= inner / K[j, j]
        return np.asarray(W.sum(0))

    return _mixture(G, weights)


def aggregate_cagrad(G: Tensor, c: float = 0.4) -> Tensor:
    """CAGrad: the direction within ``c ||g_0||`` of the mean g_0 whose worst inner product with a row is the largest.

    Divided by ``1 + c^2`` as in the official code, which changes the step of SGD and not that of Adam. Where some
    mixture of the tasks is stationary the best g_w may be 0, without direction; then the limit of tau to 0 is taken,
    which is as good for every task and still within the ball.

    Parameters
    ----------
    G : tensor of shape (m, n), floating point
    c : float, default=0.4
        >= 0; 0.4 in the paper and in the code of FS-MTL. 0 is the mean.

    Returns
    -------
    tensor of shape (n,), dtype and device of G

    Raises
    ------
    ValueError
        If c < 0 or G is no matrix.

    Examples
    --------
    >>> aggregate_cagrad(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), c=0.5) * (1 + 0.5**2)
    tensor([0.1835, 1.2041, 1.2041])
    """
    check_number("c", c, 0)

    def weights(K: np.ndarray) -> np.ndarray:
        R = _rows(K)  # (m, m), the largest row of length 1
        b = np.full(len(K), 1 / len(K))
        g0 = b @ R
        s = c * math.sqrt(g0 @ g0)

        def mixture(tau: float) -> np.ndarray:
            return _nearest_to_zero(R + tau / s * g0)

        def excess(tau: float) -> float:
            g_w = mixture(tau) @ R
            return math.sqrt(g_w @ g_w) - tau

        if s > 0:
            tau = brentq(excess, TINY, 2.0, xtol=1e-15, rtol=1e-12) if excess(TINY) > 0 else TINY
            b = b + s / tau * mixture(tau)
        return b / (1 + c**2)

    return _mixture(G, weights)


def aggregate_mgda(G: Tensor) -> Tensor:
    """MGDA: the shortest vector in the convex hull of the rows, ``<d, g_i> >= ||d||^2`` for every i.

    So a task without gradient stops all others. (For CityScapes FS-MTL multiplies d by the number of tasks.)

    Parameters
    ----------
    G : tensor of shape (m, n), floating point

    Returns
    -------
    tensor of shape (n,), dtype and device of G

    Examples
    --------
    >>> aggregate_mgda(torch.tensor([[2.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
    tensor([1., 1.])
    """
    return _mixture(G, lambda K: _nearest_to_zero(_rows(K)))


def aggregate_imtl(G: Tensor) -> Tensor:
    """IMTL-G: the mixture with weights of sum 1 that has the same projection on every row.

    Weights may be negative, and grow without bound as rows become opposite. For opposite rows, where no such mixture
    exists, 0; a row of zeros is left out.

    Parameters
    ----------
    G : tensor of shape (m, n), floating point

    Returns
    -------
    tensor of shape (n,), dtype and device of G

    Examples
    --------
    >>> aggregate_imtl(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([0.7500, 0.7500])
    """

    def weights(K: np.ndarray) -> np.ndarray:
        norms = np.sqrt(K.diagonal())
        alive = norms > 0
        v = np.zeros(len(K))
        cosines = K[np.ix_(alive, alive)] / np.outer(norms[alive], norms[alive])
        v[alive] = np.linalg.pinv(cosines, rcond=1e-10, hermitian=True).sum(1) / norms[alive]  # C (v norms) = 1
        total = v.sum()
        return v / total if abs(total) > 1e-9 * np.abs(v).sum() else np.zeros(len(K))

    return _mixture(G, weights)


# ---- weights from inner products

TINY = 1e-6  # of the longest row


def _mixture(G: Tensor, weights: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """``w^T G``, w of the inner products of the rows, (m, m) in float64."""
    _check(G)
    if not G.numel():
        return G.new_zeros(G.shape[1])
    wide = [block.to(torch.promote_types(G.dtype, torch.float32)) for block in G.split(BLOCK, dim=1)]
    K = torch.stack([block @ block.T for block in wide]).cpu().double().sum(0).numpy()
    if not np.isfinite(K).all():
        raise ValueError("G must be finite, and so must the squares of its rows' norms")
    if not K.any():
        return torch.zeros_like(G[0])
    return torch.from_numpy(weights(K)).to(G) @ G


def _rows(K: np.ndarray) -> np.ndarray:
    """m rows of m coordinates with the inner products K, up to a factor: the longest has length 1."""
    norms = np.sqrt(K.diagonal())
    safe = np.where(norms > 0, norms, 1.0)
    values, vectors = np.linalg.eigh(K / np.outer(safe, safe))
    values[values < 1e-13 * len(K)] = 0  # rounding, whose root would be 1e-7
    return np.asarray(vectors * np.sqrt(values) * (norms / norms.max())[:, None])


def _nearest_to_zero(R: np.ndarray) -> np.ndarray:
    """Weights (m,) >= 0 of sum 1 of the shortest mixture of the rows of R."""
    if len(R) == 2:
        apart = R[0] - R[1]
        length = apart @ apart
        first = min(max(-(R[1] @ apart) / length, 0.0), 1.0) if length > 0 else 0.5
        return np.array([first, 1 - first])
    x, _ = nnls(np.vstack([R.T, np.ones(len(R))]), np.append(np.zeros(R.shape[1]), 1.0))
    return np.asarray(x / x.sum())


def _check(G: Tensor) -> None:
    if not isinstance(G, Tensor) or not G.is_floating_point():
        raise TypeError(f"G must be a tensor of real floating-point numbers, got {getattr(G, 'dtype', type(G))}")
    if G.ndim != 2 or not len(G):
        raise ValueError(f"G must be of shape (m, n) with m >= 1, got {tuple(G.shape)}")
