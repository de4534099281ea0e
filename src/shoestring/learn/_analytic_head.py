"""The analytic classifier as a layer: buffer, sums and solve behind one ``nn.Module``."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shoestring._signals import uninterrupted
from shoestring.learn._buffers import random_projection, rbf_buffer, relu_buffer
from shoestring.learn._ridge import (
    RecursiveRidge,
    RidgeSums,
    cholesky,
    choose_gamma,
    fit_buffers,
    in_dtype,
    moving,
    residuals,
    solve_ridge,
)

BLOCK = 1024  # rows expanded at a time: bounds memory at BLOCK x M whatever the chunk


class AnalyticHead(nn.Module):
    r"""The last layer of a network, learnt in closed form from any stream of (features, class ids).

    Put it where the classifier's ``nn.Linear`` was: ``forward`` gives logits, `update` learns, `downdate` forgets.
    No gradient is ever needed; gradients do flow through ``forward`` to its input.

    Parameters
    ----------
    in_features : e, the width of the features
    n_components : M, the width of the buffer; ignored without a buffer and with given centers (paper: 5000)
    gamma : ridge, > 0, or ``"gcv"``: chosen by generalised cross-validation from the sums, anew whenever they changed
    buffer : ``"relu"`` (the paper's), ``"rbf"`` (GKEAL's) or None (the features themselves, M = e)
    init : law of the relu buffer, ``"uniform"`` (official code) or ``"normal"`` (text)
    kernel_width : sigma of the rbf buffer (GKEAL: 10)
    centers : Tensor (M, e), the rbf buffer's centres
    compensation : None, or DS-AL's C (0.6 on CIFAR-100, 1.5 on ImageNet-1k): a second stream on tanh(e W_B) is fitted
        to what the first leaves over, and C times its score is added. Not the joint fit any more: it depends on the
        order of chunks, so nothing can be forgotten or merged
    solver : ``"gram"``, or ``"recursive"``, the paper's (the same weights, slower)
    dtype : torch.float64, or torch.float32 to multiply in single precision (the sums stay double)
    device : where the buffer and the sums are kept
    random_state : seed of the relu buffer

    Notes
    -----
    Memory 8 (M^2 + e M + c M) bytes. ``.to(device)`` moves the head; ``.half()`` and the like leave its sums alone.
    The score of an id that was never seen is -inf.

    Examples
    --------
    >>> features, ids = torch.eye(3), torch.tensor([0, 1, 1])
    >>> head = AnalyticHead(3, buffer=None, gamma=0.5).update(features, ids)
    >>> head(features).argmax(1)
    tensor([0, 1, 1])
    """

    basis: Tensor
    rows: Tensor
    weights: Tensor
    total: Tensor

    def __init__(
        self,
        in_features: int,
        n_components: int = 5000,
        *,
        gamma: float | Literal["gcv"] = 100.0,
        buffer: Literal["relu", "rbf"] | None = "relu",
        init: Literal["uniform", "normal"] = "uniform",
        kernel_width: float = 10.0,
        centers: Tensor | None = None,
        compensation: float | None = None,
        solver: Literal["gram", "recursive"] = "gram",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        random_state: Any = 0,
    ) -> None:
        super().__init__()
        _check_options(n_components, gamma, buffer, kernel_width, compensation, solver, dtype)
        self.in_features, self.gamma, self.buffer, self.dtype = in_features, gamma, buffer, dtype
        self.kernel_width, self.compensation, self.solver = kernel_width, compensation, solver
        basis = torch.empty(0)  # W_B (e, M), the centres (M, e), or nothing
        width = in_features
        if buffer == "relu":
            basis = torch.as_tensor(random_projection(in_features, n_components, init, random_state))
            width = n_components
        elif buffer == "rbf":
            if centers is None or centers.ndim != 2 or centers.shape[1] != in_features or not len(centers):
                got = "none" if centers is None else tuple(centers.shape)
                raise ValueError(f"centers must have shape (M, {in_features}) for buffer='rbf', got {got}")
            basis, width = centers, len(centers)
        self.register_buffer("basis", basis.to(device=device, dtype=dtype))
        self.ridge: RidgeSums | RecursiveRidge
        if solver == "gram":
            self.ridge = RidgeSums(width, dtype, device)
        else:
            self.ridge = RecursiveRidge(width, float(gamma), dtype, device)
        self.second = None if compensation is None else RidgeSums(width, dtype, device)
        self.register_buffer("rows", torch.zeros(0, dtype=torch.int64, device=device))  # of each class
        self.register_buffer("weights", torch.zeros(0, dtype=torch.float64, device=device))
        self.register_buffer("total", torch.zeros(2, dtype=torch.float64, device=device))  # rows, weight
        self._solved: dict[str, Any] = {}  # what follows from the sums, until they change

    # ---- use

    def forward(self, features: Tensor) -> Tensor:
        """Scores (N, c) of features (N, e), in their dtype; solves first if rows have come since the last solve."""
        E = features.to(self.dtype)
        scores = self._first_stream(self.expand(E))
        if self.second is not None:
            assert self.compensation is not None
            scores = scores + self.compensation * (self._tanh(E) @ self._second_weight().T.to(self.dtype))
        unseen = self.rows == 0
        if unseen.any():
            scores = scores.masked_fill(unseen, -torch.inf)
        return scores.to(features.dtype) if features.is_floating_point() else scores

    def expand(self, E: Tensor) -> Tensor:
        """The buffer: features (N, e) to X (N, M)."""
        if self.buffer == "relu":
            return relu_buffer(E, self.basis)
        if self.buffer == "rbf":
            return rbf_buffer(E, self.basis, self.kernel_width)
        return E

    @property
    def n_classes(self) -> int:
        """Highest id seen, plus one."""
        return len(self.rows)

    @property
    def weight(self) -> Tensor:
        """W' (c, M), as ``nn.Linear`` has it: of one joint ridge fit on all rows seen. Float64 with solver="gram"."""
        if "weight" not in self._solved:
            if isinstance(self.ridge, RecursiveRidge):
                self._solved["weight"] = self.ridge.W.T
            else:
                self._solved["weight"] = solve_ridge(*self._sums(self.gamma), self.gamma_)
                self._solved.pop("factor", None)
        return self._solved["weight"]

    @property
    def gamma_(self) -> float:
        """The ridge in use: gamma, or what generalised cross-validation chose."""
        if self.gamma != "gcv":
            return self.gamma
        if "gamma" not in self._solved:
            G, Q = self._sums(self.gamma)
            self._solved["gamma"] = choose_gamma(G, Q, self.weights.sum().item(), self.total[1].item())
        return self._solved["gamma"]

    @property
    def noise_variance(self) -> float:
        """Residual variance of a one-hot target, ``RSS / (c (n - tr H))``, from the sums.

        The ridge fit is the mean of a Gaussian model with this variance, under which
        ``p(k | x) is proportional to exp(-||onehot_k - f(x)||^2 / 2 sigma^2)``, that is softmax(f(x) / sigma^2).
        """
        if "variance" not in self._solved:
            gamma, n = self.gamma_, self.total[1].item()
            G, Q = self._sums(gamma)
            W = None if self._rows_are_cheaper() else self.weight.double()
            rss, used = residuals(G, Q, self.weights.sum().item(), gamma, W)
            classes = int((self.rows > 0).sum())
            free = max(n - used, 1e-6 * n)
            self._solved["variance"] = max(rss / (classes * free), 1e-6)
        return self._solved["variance"]

    # ---- learn and forget

    @torch.no_grad()
    def update(self, features: Tensor, ids: Tensor, weight: Tensor | None = None) -> AnalyticHead:
        """Learn rows: features (N, e), class ids (N,) of any integer dtype, optional weights (N,) > 0."""
        self._check_rows(features, ids, weight)
        return self.learn_checked(features, ids, weight)

    @torch.no_grad()
    def learn_checked(self, features: Tensor, ids: Tensor, weight: Tensor | None = None) -> AnalyticHead:
        """`update` for rows that a caller has already checked to be finite and of fitting shape."""
        E, ids, weight = self._here(features, ids, weight)
        with uninterrupted():
            self._grow(int(ids.max()) + 1)
            self._add(E, ids, weight, 1.0)
            if self.second is not None:
                self._add_second(E, ids, weight)
        return self

    @torch.no_grad()
    def downdate(self, features: Tensor, ids: Tensor, weight: Tensor | None = None) -> AnalyticHead:
        """Forget rows that were learnt: afterwards the head is what it would be had it never seen them.

        Raises
        ------
        ValueError
            If more rows of a class, or more weight, would go than came, or if the rows cannot have been among those
            seen because a sum of squares would fall below zero; the head is then unchanged.
        """
        self._refuse_compensation("forget")
        self._check_rows(features, ids, weight)
        E, ids, weight = self._here(features, ids, weight)
        if int(ids.max()) >= self.n_classes:
            raise ValueError(f"cannot forget class id {int(ids.max())}: ids seen are 0 to {self.n_classes - 1}")
        self._check_seen(E, ids, weight)
        before = dict(self.ridge.named_buffers()) if self.solver == "recursive" else {}
        try:
            with uninterrupted():
                self._add(E, ids, weight, -1.0)
        except ValueError:  # the recursion's own refusal, perhaps after some blocks
            for name, tensor in before.items():
                setattr(self.ridge, name, tensor)
            raise
        self._clear_emptied()
        return self

    @torch.no_grad()
    def merge(self, other: AnalyticHead, columns: Tensor | None = None) -> AnalyticHead:
        """Add what another head with the same buffer has learnt; ``columns[j]`` is our id of its class j."""
        self._refuse_compensation("merge")
        other._refuse_compensation("merge")
        same = (
            (self.buffer, self.in_features, self.kernel_width) == (other.buffer, other.in_features, other.kernel_width)
            and self.basis.shape == other.basis.shape
            and torch.equal(self.basis, other.basis.to(self.basis))
        )
        if not same:
            raise ValueError(
                "other must have the same buffer (kind, width, random_state or centers): "
                "sums over different buffers cannot be added"
            )
        columns = (torch.arange(other.n_classes) if columns is None else columns).to(self.rows.device)
        with uninterrupted():
            self._merge(other, columns)
        return self

    @torch.no_grad()
    def keep(self, ids: Tensor) -> AnalyticHead:
        """Keep only the classes `ids`, renumbered 0, 1, ...; rows of the others stay in G, with all-zero targets."""
        if isinstance(self.ridge, RidgeSums):
            self.ridge.Q = self.ridge.Q[ids].clone()
        else:
            self.ridge.W = self.ridge.W[:, ids].clone()
        if self.second is not None:
            self.second.Q = self.second.Q[ids].clone()
        self.rows, self.weights = self.rows[ids].clone(), self.weights[ids].clone()
        self._solved = {}
        return self

    # ---- inside

    def _merge(self, other: AnalyticHead, columns: Tensor) -> None:
        if len(columns):
            self._grow(int(columns.max()) + 1)
        if isinstance(self.ridge, RidgeSums):
            G, Q = other._sums(other.gamma)
            self.ridge.flush().add_(G.to(self.total.device))
            self.ridge.Q.index_add_(0, columns, Q.to(self.total.device))
        else:  # R = (R_a^-1 + R_b^-1 - gamma_b I)^-1
            G, Q = self._sums(self.gamma)
            G_b, Q_b = other._sums(other.gamma)
            G = G + G_b.to(G)
            Q = Q.index_add(0, columns, Q_b.to(Q))
            G.diagonal().add_(float(self.gamma))
            R = torch.cholesky_inverse(torch.linalg.cholesky(G))
            self.ridge.R, self.ridge.W = R.to(self.dtype), (R @ Q.T).to(self.dtype)
        self.rows.index_add_(0, columns, other.rows.to(self.rows))
        self.weights.index_add_(0, columns, other.weights.to(self.weights))
        self.total += other.total.to(self.total)
        self._solved = {}

    def _add(self, E: Tensor, ids: Tensor, weight: Tensor | None, sign: float) -> None:
        w = torch.ones_like(ids, dtype=torch.float64) if weight is None else weight.double()
        for start in range(0, len(E), BLOCK):
            block = slice(start, start + BLOCK)
            X = self.expand(in_dtype(E[block], self.dtype))  # (<= BLOCK, M)
            self.ridge.add(X, ids[block], None if weight is None else weight[block].to(self.dtype), sign)
        self.rows.index_add_(0, ids, torch.ones_like(ids), alpha=int(sign))
        self.weights.index_add_(0, ids, w, alpha=sign)
        self.total[0] += sign * len(E)
        self.total[1] += sign * w.sum()
        self._solved = {}

    def _add_second(self, E: Tensor, ids: Tensor, weight: Tensor | None) -> None:
        """DS-AL: fit tanh(e W_B) to the residual of the first stream, its columns of classes not in this chunk zeroed.

        The official code zeroes all columns but the last ones, which is wrong where a chunk brings back old classes.
        """
        assert self.second is not None
        present = torch.zeros(self.n_classes, dtype=self.dtype, device=E.device)
        present[ids] = 1.0
        W = self.weight.to(self.dtype)
        for start in range(0, len(E), BLOCK):
            block = slice(start, start + BLOCK)
            rows = E[block].to(self.dtype)
            residual = -(self.expand(rows) @ W.T)  # (N, c)
            residual[torch.arange(len(rows), device=E.device), ids[block]] += 1.0
            w = None if weight is None else weight[block].to(self.dtype)
            self.second.add(self._tanh(rows), residual * present, w)

    def _tanh(self, E: Tensor) -> Tensor:
        return (E @ self.basis).tanh_()

    def _grow(self, n_classes: int) -> None:
        more = n_classes - self.n_classes
        if more > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(more)])
            self.weights = torch.cat([self.weights, self.weights.new_zeros(more)])
        self.ridge.resize(self.n_classes)
        if self.second is not None:
            self.second.resize(self.n_classes)

    def _sums(self, gamma: Any) -> tuple[Tensor, Tensor]:
        """G (M, M) and Q (c, M) over all rows seen."""
        if isinstance(self.ridge, RidgeSums):
            return self.ridge.flush(), self.ridge.Q[: self.n_classes]
        return self.ridge.sums(float(gamma))

    def _first_stream(self, X: Tensor) -> Tensor:
        """X W' (N, c) of buffered rows X (N, M)."""
        if not self._rows_are_cheaper(len(X)):
            return X @ self.weight.T.to(self.dtype)
        G, Q = self._sums(self.gamma)
        if "factor" not in self._solved:
            self._solved["factor"] = cholesky(G, self.gamma_)
        return torch.cholesky_solve(X.T, self._solved["factor"]).T @ Q.T  # X (G + gamma I)^-1 Q'

    def _rows_are_cheaper(self, n: int = 0) -> bool:
        """Whether to leave W unsolved: 2 M^2 flops a row asked instead of 2 M^2 a class, until rows outnumber classes.

        With no more classes than M, W costs no more than other things that are done once. In float32, X G^-1 and Q are
        larger than X and W, and their product would lose more digits.
        """
        if not isinstance(self.ridge, RidgeSums) or self.dtype != torch.float64 or "weight" in self._solved:
            return False
        if self.n_classes <= self.ridge.Q.shape[1]:
            return False
        self._solved["asked"] = self._solved.get("asked", 0) + n
        return self._solved["asked"] < self.n_classes

    @torch.no_grad()
    def _second_weight(self) -> Tensor:
        if "second" not in self._solved:
            assert self.second is not None
            self._solved["second"] = solve_ridge(self.second.flush(), self.second.Q[: self.n_classes], self.gamma_)
        return self._solved["second"]

    def _here(self, E: Tensor, ids: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.total.device
        return E.to(device), ids.to(device, torch.int64), None if weight is None else weight.to(device)

    def _check_rows(self, E: Tensor, ids: Tensor, weight: Tensor | None) -> None:
        if E.ndim != 2 or E.shape[1] != self.in_features or not len(E):
            raise ValueError(f"features must have shape (N >= 1, {self.in_features}), got {tuple(E.shape)}")
        if ids.shape != E.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers of shape ({len(E)},), got {ids.dtype} {tuple(ids.shape)}")
        if int(ids.min()) < 0:
            raise ValueError(f"ids must not be negative, got {int(ids.min())}")
        if not torch.isfinite(E).all():
            raise ValueError("features hold NaN or infinity")
        if weight is not None and (weight.shape != ids.shape or not bool((weight > 0).all() & weight.isfinite().all())):
            raise ValueError(f"weight must hold {len(E)} finite numbers > 0")

    def _check_seen(self, E: Tensor, ids: Tensor, weight: Tensor | None) -> None:
        """Refuse to take out what cannot have been put in: necessary conditions, O(N M)."""
        gone = torch.bincount(ids, minlength=self.n_classes)
        w = torch.ones_like(ids, dtype=torch.float64) if weight is None else weight.double()
        lost = torch.zeros_like(self.weights).index_add_(0, ids, w)
        bad = (gone > self.rows) | (lost > self.weights * (1 + 1e-9))
        if bad.any():
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"cannot forget {int(gone[k])} rows (weight {lost[k]:g}) of class id {k}: "
                f"only {int(self.rows[k])} (weight {self.weights[k]:g}) were seen"
            )
        if not isinstance(self.ridge, RidgeSums):
            return  # recursive_update itself refuses, before anything changes, when rows fit in one block
        have = self.ridge.flush().diagonal()
        take = torch.zeros_like(have)
        for start in range(0, len(E), BLOCK):
            X = self.expand(E[start : start + BLOCK].to(self.dtype)).double()
            take += (X.square() * w[start : start + BLOCK, None]).sum(0)
        slack = 1e-9 if self.dtype == torch.float64 else 1e-4
        if bool((take > have * (1 + slack) + 1e-12).any()):
            raise ValueError("cannot forget these rows: they were never seen (a sum of squares would fall below zero)")

    def _clear_emptied(self) -> None:
        """Where no row is left, what remains of the sums is rounding: make it the exact zero of never having seen."""
        empty = self.rows == 0
        self.weights[empty] = 0.0
        if isinstance(self.ridge, RidgeSums):
            self.ridge.Q[: self.n_classes][empty] = 0.0
            if self.total[0] == 0:
                self.ridge.flush().zero_()
        if self.total[0] == 0:
            self.total.zero_()

    def _refuse_compensation(self, what: str) -> None:
        if self.second is not None:
            raise ValueError(
                f"cannot {what} with compensation: the second stream depends on the order of chunks; "
                "use compensation=None where rows may have to be forgotten or merged"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> AnalyticHead:
        self._solved = {}
        return super()._apply(moving(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._solved = {}
        fit_buffers(self, ("rows", "weights"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_options(
    n_components: Any, gamma: Any, buffer: Any, kernel_width: Any, compensation: Any, solver: Any, dtype: Any
) -> None:
    number = (int, float, np.number)
    if not isinstance(n_components, int | np.integer) or n_components < 1:
        raise ValueError(f"n_components must be an integer >= 1, got {n_components!r}")
    if gamma != "gcv" and not (isinstance(gamma, number) and 0 < gamma < np.inf):
        raise ValueError(f"gamma must be a number > 0 or 'gcv', got {gamma!r}")
    if buffer not in ("relu", "rbf", None):
        raise ValueError(f"buffer must be 'relu', 'rbf' or None, got {buffer!r}")
    if not (isinstance(kernel_width, number) and 0 < kernel_width < np.inf):
        raise ValueError(f"kernel_width must be a number > 0, got {kernel_width!r}")
    if solver not in ("gram", "recursive"):
        raise ValueError(f"solver must be 'gram' or 'recursive', got {solver!r}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be float64 or float32, got {dtype!r}")
    if solver == "recursive" and gamma == "gcv":
        raise ValueError("gamma='gcv' needs solver='gram': the recursion fixes gamma before the first row")
    if compensation is not None:
        if not (isinstance(compensation, number) and 0 < compensation < np.inf):
            raise ValueError(f"compensation must be None or a number > 0, got {compensation!r}")
        if buffer != "relu" or solver != "gram":
            raise ValueError("compensation needs buffer='relu' and solver='gram'")
