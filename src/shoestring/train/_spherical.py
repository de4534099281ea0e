"""A linear layer W of D outputs kept as ``V U + 1 omega^T``: one exact SGD step without touching all of W.

The factored algorithm of `shoestring.train.z_loss`, whose docstring has the equations. Everything but V is d x d or
smaller and float64, whatever V is: Q, U and U^{-1} are carried along for thousands of steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Factors", "factorize", "gram", "materialize", "output_statistics", "sgd_step", "stabilize", "unfactorize"]

ROWS = 2**14  # rows of V worked on at a time
LOW, HIGH = 0.5, 2.0  # where stabilisation keeps the singular values of U


class Factors(NamedTuple):
    """``W = V U + 1 omega^T`` and what follows from it.

    Attributes
    ----------
    V : tensor of shape (D, d), float32 or float64
    U, U_inv : tensor of shape (d, d), float64
    omega : tensor of shape (d,), float64
    Q : tensor of shape (d, d), float64, ``W^T W``
    w_bar : tensor of shape (d,), float64, ``W^T 1``
    """

    V: Tensor
    U: Tensor
    U_inv: Tensor
    omega: Tensor
    Q: Tensor
    w_bar: Tensor


def gram(W: Tensor) -> tuple[Tensor, Tensor]:
    """``(W^T W, W^T 1)`` in float64, at O(D d^2), a block of rows at a time."""
    Q, w_bar = W.new_zeros(W.shape[1], W.shape[1], dtype=torch.float64), W.new_zeros(W.shape[1], dtype=torch.float64)
    for block in W.split(ROWS):
        rows = block.double()
        Q.addmm_(rows.T, rows)
        w_bar.add_(rows.sum(0))
    return Q, w_bar


def factorize(W: Tensor) -> Factors:
    """``V = W, U = I, omega = 0``; V is W itself, not a copy."""
    eye = torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
    return Factors(W, eye, eye.clone(), W.new_zeros(W.shape[1], dtype=torch.float64), *gram(W))


def materialize(f: Factors) -> Tensor:
    """W itself, of shape (D, d) and the dtype of V."""
    W = torch.empty_like(f.V)
    for block, rows in zip(f.V.split(ROWS), W.split(ROWS), strict=True):
        rows.copy_(block.double() @ f.U + f.omega)
    return W


def output_statistics(f: Factors, H: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the scores ``o = W h`` that are never computed: those of the targets, their sum, their sum of squares.

    Parameters
    ----------
    H : tensor of shape (m, d), float64
    target : tensor of shape (m, K), int64

    Returns
    -------
    o_target (m, K), s (m,), q (m,), and Hhat = H Q (m, d), all float64
    """
    Hhat = H @ f.Q
    o_target = (f.V[target].double() @ (H @ f.U.T)[:, :, None]).squeeze(2) + (H @ f.omega)[:, None]
    return o_target, H @ f.w_bar, (H * Hhat).sum(1), Hhat


def sgd_step(
    f: Factors, H: Tensor, Hhat: Tensor, target: Tensor, g_A: Tensor, g_s: Tensor, g_q: Tensor, eta: float
) -> tuple[Tensor, Factors, Tensor]:
    """Steps 1 to 7: the gradient wrt H, the factors after the step but for V, and what V's target rows get.

    Nothing is changed in place, and nothing here has D rows.

    Parameters
    ----------
    H, Hhat : tensor of shape (m, d), float64, one example a row
    target, g_A : tensor of shape (m, K)
        The targets, and the gradient of the loss wrt their scores.
    g_s, g_q : tensor of shape (m,)
        Gradient wrt sum and sum of squares of the scores.
    eta : float

    Returns
    -------
    grad_H : tensor of shape (m, d)
    new : Factors, in which V is still the old one
    step : tensor of shape (m, K), ``-eta g_A``
        ``V[target] += step[:, :, None] * (H U_inv)[:, None]`` with the U_inv that belongs to U then.
    """
    V, U, U_inv, omega, Q, w_bar = f
    (m, d), D = H.shape, len(V)
    T = 2 * g_q[:, None] * H  # (m, d)
    Htil, ybar = H @ U.T, g_A.sum(1)
    Z = (g_A[:, None] @ V[target].double()).squeeze(1) @ U + torch.outer(ybar, omega) + torch.outer(g_s, w_bar)
    grad_H = 2 * g_q[:, None] * Hhat + Z  # 1
    cross = torch.outer(g_s, ybar) + T @ Z.T
    M = T @ (Hhat * (2 * g_q)[:, None]).T + D * torch.outer(g_s, g_s) + _repeats(target, g_A) + cross + cross.T  # 2
    U_new = U - eta * Htil.T @ T  # 3
    if m < d:  # Woodbury
        inner = torch.eye(m, dtype=H.dtype, device=H.device) - eta * T @ H.T
        U_inv_new = U_inv + eta * H.T @ torch.linalg.solve_ex(inner, T @ U_inv)[0]
    else:
        U_inv_new = torch.linalg.solve_ex(torch.eye(d, dtype=H.dtype, device=H.device) - eta * H.T @ T, U_inv)[0]
    omega_new = omega - eta * H.T @ (T @ omega + g_s)  # 4
    HG = H.T @ grad_H
    Q_new = Q - eta * (HG + HG.T - eta * H.T @ M @ H)  # 6
    w_bar_new = w_bar - eta * H.T @ (T @ w_bar + D * g_s + ybar)  # 7
    return grad_H, Factors(V, U_new, U_inv_new, omega_new, Q_new, w_bar_new), -eta * g_A  # 5


def _repeats(target: Tensor, g_A: Tensor) -> Tensor:
    """``Ydot Ydot^T`` (m, m): diagonal unless examples share a target."""
    distinct, place = target.unique(return_inverse=True)
    Y = g_A.new_zeros(len(target), len(distinct)).scatter_add_(1, place, g_A)
    return Y @ Y.T


def out_of_range(f: Factors) -> Tensor:
    """Whether U has a singular value that has certainly left [0.5, 2]: by Frobenius norms, at O(d^2).

    While it is False, all of them are within 1 / (2 sqrt(d)) and 2 sqrt(d).
    """
    most = len(f.U) / LOW**2
    return ~((f.U.square().sum() <= most) & (f.U_inv.square().sum() <= most))  # also if the inverse is not finite


def stabilize(f: Factors) -> int:
    """Bring the singular values of U back to 1 where they are outside [0.5, 2], in place; W stays what it is.

    ``U = P S R^T``. For a value s with left and right vectors u, r: ``U += (1 - s) u r^T``, ``V += (s - 1) (V u) u^T``;
    it works for s = 0 too. U^{-1} is computed afresh, from the same decomposition. O(d^3), and O(D d) for every value
    that was outside; if that is over a third of them, `unfactorize`.

    Returns
    -------
    int : how many were outside
    """
    P, S, Rh = torch.linalg.svd(f.U)
    out = (S < LOW) | (S > HIGH)
    count = int(out.sum())
    if 3 * count > len(S):
        unfactorize(f)
        return count
    kept = torch.where(out, 1.0, S)
    if count:
        vectors = P[:, out]
        back, forth = vectors.to(f.V.dtype), ((S[out] - 1) * vectors).T.to(f.V.dtype)
        for rows in f.V.split(ROWS):
            rows.addmm_(rows @ back, forth)
        f.U.copy_(P * kept @ Rh)
    f.U_inv.copy_(Rh.T / kept @ P.T)
    return count


def unfactorize(f: Factors) -> None:
    """``V = W, U = I, omega = 0`` in place: O(D d^2), without a second W. Q and w_bar are left alone."""
    for rows in f.V.split(ROWS):
        rows.copy_(rows.double() @ f.U + f.omega)
    eye = torch.eye(len(f.U), dtype=f.U.dtype, device=f.U.device)
    f.U.copy_(eye)
    f.U_inv.copy_(eye)
    f.omega.zero_()
