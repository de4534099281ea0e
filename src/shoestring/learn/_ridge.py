"""Ridge regression from sums over rows: what the analytic learners of this room share.

With rows X (N, M) and targets Y (N, c), everything a ridge fit needs is in the sums

    G = X'X  (M, M),    Q = Y'X  (c, M),    yy = ||Y||_F^2,    n = N,

which can be added to, subtracted from and merged. Of ``G`` only the lower triangle is kept up to date: half the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import blas
from scipy.optimize import brentq
from scipy.sparse import csr_array
from torch import Tensor, nn

GATHER = 256  # rows; smaller rank-k updates are bound by reading G, not by arithmetic (measured at M = 4096)
SPILL = 16_384  # rows summed in single precision before they join the double-precision total


# On a CPU, NumPy converts and adds large arrays here: torch's threads would go on waiting beside BLAS's, on its cores.
# Measured on 2 cores, 1,000 rows of width 1,280 to float64 and their rank-k update: 1.25 times as long with torch.


def in_dtype(X: Tensor, dtype: torch.dtype) -> Tensor:
    """``X.to(dtype)``."""
    if X.dtype == dtype or X.device.type != "cpu" or X.dtype not in (torch.float32, torch.float64):
        return X.to(dtype)
    return torch.from_numpy(X.detach().numpy().astype(np.float64 if dtype == torch.float64 else np.float32))


def _add(total: Tensor, part: Tensor) -> None:
    """``total += part``."""
    if total.device.type == "cpu":
        total.numpy()[...] += part.numpy()
    else:
        total += part


def rank_k_update(G: Tensor, X: Tensor, sign: float = 1.0) -> None:
    """In place, ``G += sign * X'X`` on the lower triangle of G.

    N M^2 flops on a CPU (BLAS ``syrk``); twice that on a GPU, where torch reaches only the general product.

    Parameters
    ----------
    G : Tensor of shape (M, M), float32 or float64, contiguous
    X : Tensor of shape (N, M), same dtype and device
    sign : +1 to add the rows, -1 to take them out
    """
    if G.device.type != "cpu":
        G.addmm_(X.T, X, alpha=sign)
        return
    syrk = blas.dsyrk if G.dtype == torch.float64 else blas.ssyrk
    # BLAS counts by columns: our contiguous G is its own transpose there, and our lower triangle the upper one.
    syrk(sign, X.contiguous().numpy().T, beta=1.0, c=G.numpy().T, lower=0, overwrite_c=1)


def add_targets(Q: Tensor, X: Tensor, Y: Tensor, sign: float = 1.0) -> None:
    """In place, ``Q += sign * Y'X``.

    Parameters
    ----------
    Q : Tensor of shape (c, M), float64
    X : Tensor of shape (N, M), float32 or float64
    Y : Tensor
        Targets (N, c), or the int64 column numbers (N,) of one-hot targets: then 2 N M flops, no (N, c) array.
    """
    if Y.ndim == 2:
        Q.add_((Y.T.to(X.dtype) @ X).to(Q.dtype), alpha=sign)
    elif X.device.type != "cpu":
        Q.index_add_(0, Y, X.to(Q.dtype), alpha=sign)
    else:
        # Sums of the rows of each class, in their own precision, as a sparse product: one thread. torch's index_add_
        # wakes a second pool of threads, which then fights BLAS's for the cores (measured: 10 times slower in here).
        present, column = np.unique(Y.numpy(), return_inverse=True)
        onehot = csr_array((np.ones(len(Y), X.numpy().dtype), column, np.arange(len(Y) + 1)), (len(Y), len(present)))
        Q.numpy()[present] += sign * (onehot.T @ X.numpy())


def solve_ridge(G: Tensor, Q: Tensor, gamma: float) -> Tensor:
    """``W = argmin ||Y - X W'||_F^2 + gamma ||W||_F^2 = Q (G + gamma I)^-1`` from the sums.

    One Cholesky factorisation, M^3/3 + 2 c M^2 flops, one copy of G.

    Parameters
    ----------
    G : Tensor of shape (M, M), float64; only the lower triangle is read
    Q : Tensor of shape (c, M), float64
    gamma : ridge, > 0

    Returns
    -------
    Tensor of shape (c, M), float64

    Raises
    ------
    ValueError
        If G + gamma I is not positive definite.

    Examples
    --------
    >>> X, Y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0], [6.0]]).double()
    >>> solve_ridge(X.T @ X, Y.T @ X, gamma=1e-9)
    tensor([[3.0000]], dtype=torch.float64)
    """
    return torch.cholesky_solve(Q.T, cholesky(G, gamma)).T.contiguous()


def residuals(G: Tensor, Q: Tensor, yy: float, gamma: float, W: Tensor | None = None) -> tuple[float, float]:
    """How well the ridge fit does on its own rows, from the sums: residual sum of squares, degrees of freedom.

    With B = (G + gamma I)^-1 and W = Q B::

        ||Y - X W'||_F^2  = yy - <W, Q> - gamma ||W||_F^2  = yy - <B, Q'Q> - gamma <B B, Q'Q>
        tr X B X'         = M - gamma tr B

    About M^3 flops with W, and c M^2 + 2 M^3 more without, where W would cost 2 c M^2.

    Parameters
    ----------
    G : Tensor of shape (M, M), float64; only the lower triangle is read
    Q : Tensor of shape (c, M), float64
    yy : ||Y||_F^2
    gamma : ridge, > 0
    W : Tensor of shape (c, M), float64, where it is known
    """
    B = torch.cholesky_inverse(cholesky(G, gamma))
    if W is not None:
        rss = yy - (W * Q).sum().item() - gamma * W.square().sum().item()
    else:
        S = torch.zeros(B.shape, dtype=B.dtype, device=B.device)  # row by row in memory, as B is not
        rank_k_update(S, Q)  # Q'Q
        S.tril_()

        def inner(A: Tensor) -> float:
            return (2 * (A * S).sum() - A.diagonal() @ S.diagonal()).item()

        rss = yy - inner(B) - gamma * inner(B @ B)
    return max(rss, 0.0), len(B) - gamma * B.diagonal().sum().item()


def gcv_score(s: np.ndarray, q: np.ndarray, rss_0: float, free_0: float, n: float, gamma: float) -> tuple[float, float]:
    """Generalised cross-validation of a ridge fit (Golub, Heath & Wahba 1979) without the data, and its slope.

    With G = V diag(s) V', s_i > 0, q_i = ||(Q V)_i||^2, and the values rss_0, free_0 of the unregularised fit::

        RSS(gamma)      = rss_0 + sum_i (q_i / s_i) (gamma / (s_i + gamma))^2      rss_0  = yy - sum_i q_i / s_i
        n - tr H(gamma) = free_0 + sum_i gamma / (s_i + gamma)                     free_0 = n - rank
        GCV(gamma)      = n RSS / (n - tr H)^2

    Written as sums of positive terms, which lose no digits where gamma is small.

    Returns
    -------
    score, slope : GCV, and a positive multiple of d GCV / d gamma
    """
    r = s + gamma
    rss = rss_0 + np.sum(q / s * (gamma / r) ** 2)
    free = free_0 + np.sum(gamma / r)
    d_rss, d_free = np.sum(2 * gamma * q / r**3), np.sum(s / r**2)
    return float(n * rss / free**2), float(d_rss * free - 2 * rss * d_free)


def choose_gamma(G: Tensor, Q: Tensor, yy: float, n: float) -> float:
    """The gamma with the least `gcv_score`, from the sums alone: one eigendecomposition of G, about 9 M^3 flops.

    Searched between 1e-8 (below, a solve loses half its digits) and 10 times the largest eigenvalue: a grid of ten
    points a decade, then the root of the slope beside the best of them (a root, because a minimum is found to half
    the digits only).

    Parameters
    ----------
    G : Tensor of shape (M, M), float64; only the lower triangle is read
    Q : Tensor of shape (c, M), float64
    yy : ||Y||_F^2
    n : number of rows (sum of weights)
    """
    s, V = torch.linalg.eigh(G)
    q = (Q @ V).square().sum(0).cpu().numpy()
    s = s.cpu().numpy()
    if not s[-1] > 0:
        return 1.0  # nothing but zeros seen: every gamma gives W = 0
    span = s > 1e-14 * len(s) * s[-1]
    s, q = s[span], q[span]
    rss_0 = yy - float(np.sum(q / s))
    rss_0 = rss_0 if rss_0 > 1e-10 * yy else 0.0
    free_0 = max(n - len(s), 0.0)

    def score(gamma: float) -> tuple[float, float]:
        return gcv_score(s, q, rss_0, free_0, n, gamma)

    grid = s[-1] * np.logspace(-8, 1, 91)
    best = int(np.argmin([score(gamma)[0] for gamma in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    if score(low)[1] < 0 < score(high)[1]:
        return float(brentq(lambda gamma: score(gamma)[1], low, high, rtol=1e-12))
    return float(grid[best])


def cholesky(G: Tensor, gamma: float) -> Tensor:
    """L (M, M) with ``L L' = G + gamma I``; of G only the lower triangle is read."""
    A = G.clone()
    A.diagonal().add_(gamma)
    L, info = torch.linalg.cholesky_ex(A)  # reads the lower triangle
    if info.item():
        raise ValueError(
            f"G + gamma I is not positive definite at gamma = {gamma:g}: either rows were taken out that had never "
            "been put in, or gamma is below the rounding error of G; give a larger gamma"
        )
    return L


class RidgeSums(nn.Module):
    """The running sums G and Q, exact to rounding however the rows are cut into chunks.

    Chunks of fewer than 256 rows are gathered first (8 kB a unit of width). In float32 the rows are multiplied in
    single precision and summed so for 16,384 rows at most, then added to a float64 total: the error of G stays near
    1e-6 for any number of rows. Moving or casting the module that holds this one moves the sums, and never casts them.

    Parameters
    ----------
    width : M
    dtype : precision in which rows come, torch.float64 or torch.float32
    device : where the sums are kept
    """

    G: Tensor
    Q: Tensor

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("G", torch.zeros(width, width, dtype=torch.float64, device=device))
        self.register_buffer("Q", torch.zeros(0, width, dtype=torch.float64, device=device))
        self._partial: Tensor | None = None  # float32 only: the sum since the last spill
        self._partial_rows = 0
        self._gathered: Tensor | None = None
        self._n_gathered = 0

    def resize(self, n_targets: int) -> None:
        """Give Q room for n_targets rows, new ones zero. Grows by half, so that one class at a time stays cheap."""
        if n_targets > len(self.Q):
            more = max(n_targets, len(self.Q) * 3 // 2) - len(self.Q)
            self.Q = torch.cat([self.Q, self.Q.new_zeros(more, self.Q.shape[1])])

    def add(self, X: Tensor, Y: Tensor, weight: Tensor | None = None, sign: float = 1.0) -> None:
        """Add (``sign=1``) or take out (``-1``) rows X (N, M) with targets (N, c) or column numbers (N,)."""
        n = len(X)
        Q = self.Q[: Y.shape[1]] if Y.ndim == 2 else self.Q
        add_targets(Q, X if weight is None else X * weight[:, None], Y, sign)
        if weight is not None:
            X = X * weight.sqrt()[:, None]
        if sign < 0 or n >= GATHER:
            self._rank_k(X, sign)
            return
        if self._gathered is None:
            self._gathered = torch.empty(GATHER, X.shape[1], dtype=self.dtype, device=X.device)
        if self._n_gathered + n > GATHER:
            self._add_gathered()
        self._gathered[self._n_gathered : self._n_gathered + n] = X
        self._n_gathered += n

    def flush(self) -> Tensor:
        """Bring G up to date, keep no row, and return G (lower triangle)."""
        self._add_gathered()
        self._gathered = None
        if self._partial is not None:
            _add(self.G, self._partial)
            self._partial, self._partial_rows = None, 0
        return self.G

    def _add_gathered(self) -> None:
        if self._gathered is not None and self._n_gathered:
            n, self._n_gathered = self._n_gathered, 0
            self._rank_k(self._gathered[:n], 1.0)

    def _rank_k(self, X: Tensor, sign: float) -> None:
        if self.dtype == torch.float64:
            rank_k_update(self.G, X, sign)
            return
        if self._partial is None:
            self._partial = torch.zeros_like(self.G, dtype=self.dtype)
        rank_k_update(self._partial, X, sign)
        self._partial_rows += len(X)
        if self._partial_rows >= SPILL:
            self.flush()

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # gathered rows are data: only their sums leave this object
        return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RidgeSums:
        self.flush()
        return super()._apply(moving(fn), recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.flush()
        fit_buffers(self, ("Q",), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def recursive_update(R: Tensor, W: Tensor, X: Tensor, Y: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """One step of the paper's recursion (Theorem 1); with ``sign=-1`` its inverse, which takes rows out.

    2 N M^2 + N^2 M + N^3/3 flops; new tensors are returned.

    Parameters
    ----------
    R : Tensor of shape (M, M), the inverse of X'X + gamma I over the rows so far; I / gamma at first
    W : Tensor of shape (M, c), padded with zero columns for the classes that are new in this chunk
    X : Tensor of shape (N, M)
    Y : Tensor of shape (N, c), one-hot
    sign : +1 to learn the rows, -1 to forget them

    Raises
    ------
    ValueError
        If I - X R X' is not positive definite: rows to forget that were never learnt.
    """
    XR = X @ R  # (N, M)
    K = sign * (XR @ X.T)  # (N, N)
    K.diagonal().add_(1.0)
    L, info = torch.linalg.cholesky_ex(K)
    if info.item():
        raise ValueError("X holds rows that were never learnt: they cannot be forgotten")
    V = torch.linalg.solve_triangular(L, XR, upper=False)  # V'V = R X' (I + X R X')^-1 X R
    R = R - sign * (V.T @ V)
    R = (R + R.T) / 2  # the official code lets R lose its symmetry
    W = W + sign * (R @ (X.T @ (Y - X @ W)))
    return R, W


class RecursiveRidge(nn.Module):
    """R and W of the paper's recursion, with the interface of `RidgeSums`."""

    R: Tensor
    W: Tensor

    def __init__(self, width: int, gamma: float, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("R", torch.eye(width, dtype=dtype, device=device) / gamma)
        self.register_buffer("W", torch.zeros(width, 0, dtype=dtype, device=device))

    def resize(self, n_targets: int) -> None:
        if n_targets > self.W.shape[1]:
            self.W = torch.cat([self.W, self.W.new_zeros(len(self.W), n_targets - self.W.shape[1])], 1)

    def add(self, X: Tensor, Y: Tensor, weight: Tensor | None = None, sign: float = 1.0) -> None:
        onehot = X.new_zeros(len(X), self.W.shape[1])
        onehot[torch.arange(len(Y), device=Y.device), Y] = 1.0
        if weight is not None:  # weighted least squares: rows and targets times sqrt(w)
            X, onehot = X * weight.sqrt()[:, None], onehot * weight.sqrt()[:, None]
        self.R, self.W = recursive_update(self.R, self.W, X, onehot, sign)

    def sums(self, gamma: float) -> tuple[Tensor, Tensor]:
        """G = R^-1 - gamma I and Q = W' R^-1, float64. About M^3 flops."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.R.double()))
        return inverse - gamma * torch.eye(len(inverse), dtype=inverse.dtype, device=inverse.device), (
            self.W.T.double() @ inverse
        )

    def _apply(self, fn: Any, recurse: bool = True) -> RecursiveRidge:
        return super()._apply(moving(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        fit_buffers(self, ("W",), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def moving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``Module._apply`` does to a sum: ``.to(device)`` moves it, ``.half()`` must not round it."""
    return lambda t: t.to(fn(t.new_empty(0)).device)


def fit_buffers(module: nn.Module, names: tuple[str, ...], state_dict: dict[str, Any], prefix: str) -> None:
    """Give the named buffers, whose length is the number of classes, the shapes that a state dict brings."""
    for name in names:
        if prefix + name in state_dict:
            old = getattr(module, name)
            setattr(module, name, old.new_zeros(state_dict[prefix + name].shape))
