"""The steps of transductive clustering, over T tasks of n rows at once. The paper is in `transductive_clustering`.

Shapes: rows X (T, n, d), memberships S and costs a (T, n, K), prototypes M (T, K, d).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SWEEPS, SWEEP_TOL = 600, 1e-7  # of the labels, in one outer iteration (official)
SHIFTS, SHIFT_TOL = 1000, 1e-5  # of the modes, likewise
BLOCK = 1 << 22  # distances held at a time


def centre_and_normalise(X: Tensor, mean: Tensor | None = None) -> Tensor:
    """Rows minus `mean`, divided by their length: "CL2N", or "L2N" without a mean. A row of length 0 stays 0.

    >>> centre_and_normalise(torch.tensor([[4.0, 5.0], [1.0, 1.0]]), torch.tensor([1.0, 1.0]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return torch.nn.functional.normalize(X if mean is None else X - mean, dim=-1, eps=1e-14)


def query_shift(X: Tensor, y: Tensor) -> Tensor:
    """mean(labelled rows) - mean(unlabelled rows), (T, 1, d); 0 where a task lacks either.

    >>> query_shift(torch.tensor([[[1.0], [3.0], [10.0]]]), torch.tensor([[0, 1, -1]]))
    tensor([[[-8.]]])
    """
    labelled = (y >= 0)[..., None].to(X.dtype)  # (T, n, 1)
    n_labelled, n_free = labelled.sum(1, keepdim=True), (1 - labelled).sum(1, keepdim=True)
    shift = (X * labelled).sum(1, keepdim=True) / n_labelled - (X * (1 - labelled)).sum(1, keepdim=True) / n_free
    return torch.where((n_labelled > 0) & (n_free > 0), shift, 0)


def squared_distances(X: Tensor, M: Tensor) -> Tensor:
    """||x_p - m_k||^2, (T, n, K).

    >>> squared_distances(torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
    tensor([[[25.,  1.]]])
    """
    norms = torch.linalg.vector_norm(X, dim=2).square()[:, :, None] + M.square().sum(2)[:, None]
    return torch.baddbmm(norms, X, M.transpose(1, 2), alpha=-2).clamp_(min=0)


def unaries(X: Tensor, M: Tensor, sigma: Tensor | None = None) -> Tensor:
    """a (T, n, K): squared distances (means), or with sigma (T,) the negative kernel (modes).

    >>> unaries(torch.zeros(1, 1, 1), torch.tensor([[[1.0]]]), torch.tensor([2.0]))  # -exp(-1/8)
    tensor([[[-0.8825]]])
    """
    distances = squared_distances(X, M)
    return distances if sigma is None else -torch.exp(distances / (-2 * sigma.square())[:, None, None])


def mean_prototypes(X: Tensor, R: Tensor, old: Tensor | None = None) -> Tensor:
    """m_k = sum_p r_pk x_p / sum_p r_pk, (T, K, d): the minimiser of E over M. `old` where a class has no member.

    >>> mean_prototypes(torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0]]]))
    tensor([[[0.5000],
             [5.0000]]])
    """
    total = R.sum(1)[:, :, None]  # (T, K, 1)
    M = R.transpose(1, 2) @ X / total
    return M if old is None else torch.where(total > 0, M, old)


def mode_prototypes(X: Tensor, R: Tensor, start: Tensor, sigma: Tensor) -> Tensor:
    """Mean shift from `start` (T, K, d) among the members, to its fixed point: never raises E.

    At most 1000 steps (official), until a mode moves by no more than 1e-5 sigma. The official 1e-5 of its largest
    coordinate is the same order on unit rows, but depends on how the axes lie.

    >>> X, R = torch.tensor([[[0.0], [0.1], [9.0]]]), torch.ones(1, 3, 1)
    >>> mode_prototypes(X, R, torch.tensor([[[1.0]]]), torch.tensor([1.0]))
    tensor([[[0.0500]]])
    """
    M, precision = start, sigma.square().reciprocal()[:, None, None]
    own = R.log() - precision / 2 * torch.linalg.vector_norm(X, dim=2).square()[:, :, None]
    moving = R.sum(1) > 0  # (T, K): a mode without members stays where it is
    for _ in range(SHIFTS):
        weights = torch.softmax(own + precision * (X @ M.transpose(1, 2)), 1)  # (T, n, K) r g / sum r g
        M_next = torch.where(moving[..., None], weights.transpose(1, 2) @ X, M)
        moving = moving & (torch.linalg.vector_norm(M_next - M, dim=2) > SHIFT_TOL * sigma[:, None])
        M = M_next
        if not moving.any():
            break
    return M


class NeighbourGraph(NamedTuple):
    """Symmetric W of T tasks of n rows as edges (E,): W[rows, cols] = weights, rows and columns numbered task * n + p.

    Edges that are listed twice add up.
    """

    rows: Tensor
    cols: Tensor
    weights: Tensor

    def propagate(self, S: Tensor) -> Tensor:
        """W S, (T, n, K)."""
        flat = S.reshape(-1, S.shape[2])
        return torch.zeros_like(flat).index_add_(0, self.rows, self.weights[:, None] * flat[self.cols]).view_as(S)

    def dense(self, n_tasks: int) -> Tensor:
        """W as (T, n, n), to look at; every row must have a neighbour."""
        n = (int(self.rows.max()) + 1) // n_tasks
        W = self.weights.new_zeros(n_tasks * n, n)
        return W.index_put_((self.rows, self.cols % n), self.weights, accumulate=True).view(n_tasks, n, n)


def neighbour_graph(X: Tensor, n_neighbors: int = 2) -> NeighbourGraph:
    """(A + A') / 2, where A_pq = 1 if q is one of the n_neighbors nearest other rows of p.

    Rows that tie for the last places share them, so that A has row sums n_neighbors, whatever the order of rows.

    >>> neighbour_graph(torch.tensor([[[0.0], [1.0], [3.0]]]), 1).dense(1)
    tensor([[[0.0000, 1.0000, 0.0000],
             [1.0000, 0.0000, 0.5000],
             [0.0000, 0.5000, 0.0000]]])
    """
    T, n, _ = X.shape
    rows, cols, weights = [], [], []
    rounding = 16 * torch.finfo(X.dtype).eps * torch.linalg.vector_norm(X, dim=2).amax(1).square()[:, None, None]
    step = max(1, BLOCK // (T * n))
    for start in range(0, n, step):
        block = torch.arange(start, min(start + step, n))
        D = squared_distances(X[:, block], X)  # (T, block, n)
        D[:, torch.arange(len(block)), block] = math.inf  # not its own neighbour
        last = D.topk(n_neighbors, largest=False).values[..., -1:]
        near = D < last - rounding
        tied = (D <= last + rounding) & ~near
        share = (n_neighbors - near.sum(2, keepdim=True)) / tied.sum(2, keepdim=True)
        task, row, col = torch.nonzero(near | tied, as_tuple=True)
        rows.append(task * n + block[row])
        cols.append(task * n + col)
        weights.append(torch.where(near, 1.0, share.to(X.dtype))[task, row, col].to(X.dtype))
    p, q, w = torch.cat(rows), torch.cat(cols), torch.cat(weights) / 2
    return NeighbourGraph(torch.cat([p, q]), torch.cat([q, p]), torch.cat([w, w]))


def bandwidth(X: Tensor, graph: NeighbourGraph) -> Tensor:
    """sigma (T,): sigma^2 = sum_pq w_pq ||x_p - x_q||^2 / (5 n), the official constant.

    >>> X = torch.tensor([[[0.0], [1.0], [3.0]]])
    >>> bandwidth(X, neighbour_graph(X, 1)).square() * 15  # 1 + 1 + 4
    tensor([6.])
    """
    T, n, d = X.shape
    flat = X.reshape(T * n, d)
    total = X.new_zeros(T)
    for p, q, w in zip(*(part.split(max(1, BLOCK // d)) for part in graph), strict=True):
        total.index_add_(0, p // n, w * (flat[p] - flat[q]).square().sum(1))
    return (total / (5 * n)).sqrt().clamp(min=torch.finfo(X.dtype).tiny ** 0.25)  # all rows equal: any width will do


def energy(S: Tensor, a: Tensor, graph: NeighbourGraph | None, laplacian: float) -> Tensor:
    """E (T,) = sum s . a + s . log s - (lambda / 2) s . W s; the barrier is 0 where S is one-hot.

    >>> energy(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[3.0, 9.0], [1.0, 1.0]]]), None, 0.0)
    tensor([3.3069])
    """
    E = torch.special.xlogy(S, S) + S * a
    if graph is not None:
        E = E - laplacian / 2 * S * graph.propagate(S)
    return E.sum((1, 2))


class Relaxation(NamedTuple):
    """What `relax_labels` finds: memberships and logits (T, n, K), energy (T, 1 + sweeps), eta (T,)."""

    memberships: Tensor
    logits: Tensor
    energy: Tensor
    eta: Tensor


def relax_labels(
    a: Tensor,
    clamp: Tensor,
    graph: NeighbourGraph | None,
    laplacian: float,
    *,
    start: Tensor | None = None,
    active: Tensor | None = None,
) -> Relaxation:
    """Memberships while prototypes stand still: sweeps of s_p <- softmax(-a_p + lambda sum_q w_pq s_q).

    At most 600 sweeps, until the energy falls by no more than 1e-7 of itself (both official). With the support means as
    prototypes this is LaplacianShot.

    Parameters
    ----------
    a : Tensor of shape (T, n, K)
    clamp : Tensor of shape (T, n, K)
        One-hot rows where the label is given, rows of 0 elsewhere.
    graph : NeighbourGraph or None
    laplacian : float
    start : Tensor of shape (T, n, K), optional
        First logits; -a by default.
    active : Tensor of shape (T,), bool, optional
        Tasks to work at; the others keep their start.

    Examples
    --------
    >>> X = torch.tensor([[[0.0], [2.0], [0.9], [1.2]]])  # the last two have each other
    >>> clamp = torch.tensor([[[1.0, 0], [0, 1.0], [0, 0], [0, 0]]])
    >>> a = unaries(X, X[:, :2])
    >>> relax_labels(a, clamp, neighbour_graph(X, 1), 5.0).memberships.argmax(2)
    tensor([[0, 1, 1, 1]])
    >>> relax_labels(a, clamp, None, 0.0).memberships.argmax(2)
    tensor([[0, 1, 0, 1]])
    """
    Z = -a if start is None else start
    S = clamped(Z, clamp)
    E = energy(S, a, graph, laplacian)
    eta, energies = a.new_ones(len(a)), [E]
    active = torch.ones(len(a), dtype=torch.bool) if active is None else active
    eps = torch.finfo(a.dtype).eps
    for i in range(SWEEPS):
        target = -a if graph is None else -a + laplacian * graph.propagate(S)
        Z_next = torch.lerp(Z, target, eta[:, None, None])
        S_next = clamped(Z_next, clamp)
        E_next = energy(S_next, a, graph, laplacian)
        rises = E_next > E + 8 * eps * (E.abs() + a.shape[1])  # beyond rounding
        settled = ~rises & (E - E_next <= max(SWEEP_TOL, 8 * eps) * E.abs()) if i > 1 else torch.zeros_like(rises)
        step = (active & ~rises)[:, None, None]
        Z, S, E = torch.where(step, Z_next, Z), torch.where(step, S_next, S), torch.where(step[:, 0, 0], E_next, E)
        eta = torch.where(active & rises, eta / 2, eta)
        active = active & ~settled
        energies.append(E)
        if not active.any():
            break
    return Relaxation(S, Z, torch.stack(energies, 1), eta)


def clamped(Z: Tensor, clamp: Tensor) -> Tensor:
    """softmax of the logits Z, with given rows put back to their one-hot.

    >>> clamped(torch.zeros(1, 2, 2), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    tensor([[[0.0000, 1.0000],
             [0.5000, 0.5000]]])
    """
    return torch.where(clamp.sum(2, keepdim=True) > 0, clamp, torch.softmax(Z, 2))


def one_hot(S: Tensor) -> Tensor:
    """argmax S as one-hot rows.

    >>> one_hot(torch.tensor([[[0.3, 0.7]]]))
    tensor([[[0., 1.]]])
    """
    return torch.zeros_like(S).scatter_(2, S.argmax(2, keepdim=True), 1.0)
