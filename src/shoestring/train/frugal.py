r"""FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training.

Zmushko, Beznosikov, Takáč and Horváth. ICML 2025, arXiv 2411.07837.

Idea
----
Adam keeps two numbers for every weight. FRUGAL keeps them for a fraction rho of every model's matrices only, chosen
anew every T steps, and moves all the other weights in the same step by the sign of their gradient, which needs no
state. GaLore and BAdam save the same memory by not moving the others at all.

Equations
---------
For a matrix p with gradient g, at steps t = 0, 1, 2, ...; P maps onto the subspace, P^T back::

    if t mod T = 0: choose a new P; its state starts from 0                                             (1)
    p      <- p (1 - lr wd)                                                  decay of the whole matrix  (2)
    g_full  = P(g),   g_free = g - P^T P(g)                                                             (3)
    u_full  = -lr c Adam(g_full), bias-corrected with the age of the state                              (4)
    u_free  = -lr c alpha sign(g_free)     or  -lr c alpha g_free  ("sgd")  or  0  ("none")             (5)
    p      <- p + P^T u_full + u_free                                                                   (6)

c is `proj_lr_scale`, alpha `state_free_lr_scale`, rho `density`, T `update_gap`. Subspaces, for p of (out, in)::

    blockwise           whole matrices: of all projected ones as many as hold about rho of their entries
    columns, rows       max(1, int(rho in)) input features, max(1, int(rho out)) output features
    randk               max(1, int(rho out in)) entries
    svd                 the r = max(1, round(rho min(out, in))) leading singular vectors of g on the shorter side
    random              r random orthonormal vectors on the shorter side

Everything that is in no projected group (embeddings, norms, biases, the head) is left to the base optimizer alone.
rho = 1 is AdamW, rho = 0 is signSGD. ``svd`` with "none" is GaLore (whose own settings are `reset_state=False`,
`proj_lr_scale=0.25`), ``blockwise`` with "none" is BAdam.

What to expect
--------------
* At a first step Adam's update is g / (abs(g) + eps), a sign: both parts of (6) start with steps of one size, and one
  learning rate, Adam's, serves both. With "sgd" it does not.
* `state_free_lr_scale` 1 for training from scratch, 0.1 for fine-tuning (the authors' scripts).
* Clipping the norm of the gradient does not make the sign steps smaller.
* NaN and infinity: as in torch's optimizers they are not hidden. With ``blockwise``, ``columns``, ``rows`` and
  ``randk`` they stay in their coordinate (torch.sign alone would hide a NaN); ``svd`` and ``random`` spread them along
  the shorter side, and ``svd`` refuses to take a basis from them.
* Choices are a function of a seed, the number of the refresh and the number of the parameter, and of nothing else: not
  of the device, nor of which parameters had a gradient. So all processes of a data-parallel run choose alike, given
  the same seed (with ``svd`` because the gradients they see are the same), and a resumed run goes on as it would have.
  Sharded parameters (FSDP) are no matrices, and only fit a regular group.

Code and paper
--------------
Read: the official repository fzmushko/FRUGAL (optimizer templates, in a stored copy), its README and the card of this
project; not the paper's text. Facts are from there, code is not. Where we differ:

* Official: round(rho n) of n blocks. Matrices differ in size, so random blocks would hold up to twice the memory asked
  for. Here blocks are taken in turn until the *entries* held are nearest to rho of all: the same for equal blocks.
* Official: of a tiny layer int(rho n) = 0 columns. Here at least one (one block, one direction), unless rho = 0.
* Official: whether to refresh is read off the first parameter. Here each one is refreshed when due, at its first
  gradient in the period, so frozen and unused parameters do no harm.
* Official: momentum of SGD begins with a copy of the *parameter*. Here, as in torch, of the gradient.
* Official: ``svd`` takes the sign of g_free as it comes, round-off included; if r is all there is, or g has rank r or
  less, that is noise that moves every weight by lr. Here entries of g_free within round-off of 0 are 0.
* Official default of coordinates: columns in the code, randk in the README. Both are here; the default is blockwise.
* "mirror" (first, last, second, last but one, ...) needs no even number of blocks here.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from shoestring.train._checks import check_betas, check_number, with_gradient
from shoestring.train.lion import lion_step_

__all__ = [
    "FRUGAL",
    "block_sequence",
    "choose_blocks",
    "draw_subspace",
    "frugal_param_groups",
    "project",
    "project_back",
    "split_gradient",
    "state_free_update",
]

COORDINATES = ("columns", "rows", "randk")
BASES = ("svd", "random")
CHOICES = {
    "projection": ("blockwise", *COORDINATES, *BASES),
    "block_order": ("random", "ascending", "descending", "mirror"),
    "state_free": ("sign_sgd", "sgd", "none"),
    "base": ("adamw", "lion", "sgdm"),
}
ROUND_OFF = 8  # entries of g - P^T P g below so many rounding errors of their row are 0


# ---- the mathematics


def block_sequence(n: int, order: str, *, start: int = 0, generator: torch.Generator | None = None) -> list[int]:
    """In which order n blocks take their turn.

    Parameters
    ----------
    n : int
    order : {"random", "ascending", "descending", "mirror"}
        "mirror": first, last, second, last but one, ...
    start : int, default=0
        Place in the order to begin at; from its end it goes on at its beginning. Not for "random".
    generator : torch.Generator on the CPU
        For "random".

    Examples
    --------
    >>> block_sequence(5, "mirror")
    [0, 4, 1, 3, 2]
    >>> block_sequence(5, "descending", start=3)
    [1, 0, 4, 3, 2]
    """
    if order == "random":
        return torch.randperm(n, generator=generator).tolist()
    places = [(start + i) % n for i in range(n)]
    if order == "ascending":
        return places
    if order == "descending":
        return [n - 1 - i for i in places]
    return [n - 1 - i // 2 if i % 2 else i // 2 for i in places]


def choose_blocks(sizes: Sequence[int], density: float, sequence: Iterable[int]) -> list[int]:
    """The first blocks of `sequence` that together hold nearest to `density` of all entries; at least one, unless 0.

    Parameters
    ----------
    sizes : sequence of n int
        Entries of every block.
    density : float in [0, 1]
    sequence : n block numbers

    Examples
    --------
    >>> choose_blocks([4, 4, 4, 4], 0.5, [2, 0, 1, 3])
    [2, 0]
    >>> choose_blocks([16, 4, 4, 4], 0.25, [1, 0, 3, 2])  # 4 of 28, not 20
    [1]
    """
    wanted, held = density * sum(sizes), 0
    active: list[int] = []
    for block in sequence:
        if density == 0 or (active and held + sizes[block] / 2 >= wanted):
            break
        active.append(block)
        held += sizes[block]
    return active


def draw_subspace(g: Tensor, density: float, projection: str, generator: torch.Generator | None) -> Tensor | None:
    """Choose P of equation (1) for one matrix.

    Parameters
    ----------
    g : Tensor of shape (out, in), real, not empty
        Its gradient. All but "svd" look at its shape, dtype and device only.
    density : rho in (0, 1]
    projection : {"columns", "rows", "randk", "svd", "random"}
    generator : torch.Generator on the CPU
        Not for "svd".

    Returns
    -------
    Tensor or None
        Coordinates: sorted int64 of shape (k,); of single entries int32 if there are fewer than 2^31, to save memory.
        Else the basis P of shape (r, min(out, in)), P P^T = I, in the dtype of g. None for all coordinates.

    Examples
    --------
    >>> draw_subspace(torch.ones(3, 8), 0.25, "columns", torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    out, in_ = g.shape
    if projection in COORDINATES:
        n = {"columns": in_, "rows": out, "randk": out * in_}[projection]
        k = max(1, int(density * n))
        if k == n:
            return None
        index = torch.randperm(n, generator=generator)[:k].sort().values
        return index.to(g.device, torch.int32 if projection == "randk" and n < 2**31 else torch.int64)
    shorter = min(out, in_)
    r = max(1, round(density * shorter))
    dtype = torch.promote_types(g.dtype, torch.float32)  # no decompositions in half precision
    if projection == "svd":
        U, _, Vh = torch.linalg.svd(g.to(dtype), full_matrices=False)
        P = Vh[:r] if out >= in_ else U[:, :r].T
    else:
        P = torch.linalg.qr(torch.randn(shorter, r, generator=generator, dtype=dtype))[0].T.to(g.device)
    return P.to(g.dtype).clone(memory_format=torch.contiguous_format)  # of its own: not a view of all vectors


def project(g: Tensor, S: Tensor, projection: str) -> Tensor:
    """``P(g)``: the part of a matrix in the subspace S.

    Parameters
    ----------
    g : Tensor of shape (out, in)
    S : Tensor
        As `draw_subspace` returns it.
    projection : {"columns", "rows", "randk", "svd", "random"}

    Returns
    -------
    Tensor
        (out, k) for columns, (k, in) for rows, (k,) for randk; else (out, r) if out >= in, (r, in) if not.

    Examples
    --------
    >>> project(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]), "columns")
    tensor([[2.],
            [4.]])
    """
    if projection in BASES:
        return g @ S.T if g.shape[0] >= g.shape[1] else S @ g
    if projection == "randk":
        return g.reshape(-1).index_select(0, S)
    return g.index_select(1 if projection == "columns" else 0, S)


@overload
def project_back(u: Tensor, S: Tensor, projection: str, shape: Sequence[int]) -> Tensor: ...
@overload
def project_back(u: Tensor, S: Tensor, projection: str, *, into: Tensor) -> Tensor: ...
def project_back(
    u: Tensor, S: Tensor, projection: str, shape: Sequence[int] = (), *, into: Tensor | None = None
) -> Tensor:
    """``P^T u``: from the subspace to a matrix of `shape` (out, in).

    Parameters
    ----------
    u : Tensor
        As `project` returns it.
    S, projection
        As there.
    shape : (out, in)
    into : Tensor of shape (out, in), contiguous, optional
        Instead of `shape`: the result is added to it in place, or, for coordinates, takes their place in it.

    Examples
    --------
    >>> project_back(torch.tensor([[2.0], [4.0]]), torch.tensor([1]), "columns", (2, 2))
    tensor([[0., 2.],
            [0., 4.]])
    """
    whole = u.new_zeros(tuple(shape)) if into is None else into
    if projection in BASES:
        return whole.addmm_(u, S) if whole.shape[0] >= whole.shape[1] else whole.addmm_(S.T, u)
    if projection == "randk":
        whole.view(-1).scatter_(0, S.long(), u)
        return whole
    dim = 1 if projection == "columns" else 0
    return whole.scatter_(dim, (S if dim else S[:, None]).expand_as(u), u)


def split_gradient(g: Tensor, S: Tensor, projection: str) -> tuple[Tensor, Tensor]:
    """Equation (3): ``g_full = P(g)`` and ``g_free = g - P^T P(g)``.

    Parameters are those of `project`. With a basis, entries of g_free that are within round-off of 0 are 0.

    Returns
    -------
    (g_full, g_free)
        Of g_full the shape is that of `project`; g_free is (out, in).

    Examples
    --------
    >>> split_gradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]), "columns")[1]
    tensor([[1., 0.],
            [3., 0.]])
    """
    g_full = project(g, S, projection)
    if projection in COORDINATES:
        return g_full, project_back(torch.zeros_like(g_full), S, projection, into=_copy(g))
    right = g.shape[0] >= g.shape[1]
    g_free = torch.addmm(g, g_full, S, alpha=-1) if right else torch.addmm(g, S.T, g_full, alpha=-1)
    error = ROUND_OFF * torch.finfo(g.dtype).eps * len(S) ** 0.5
    rms = torch.linalg.vector_norm(g, dim=int(right), keepdim=True) / g.shape[int(right)] ** 0.5
    return g_full, g_free.mul_(g_free.abs() > error * rms)  # a product, since it keeps NaN


def state_free_update(g_free: Tensor, rule: str, scale: float | Tensor) -> Tensor:
    """Equation (5): ``scale sign(g)``, ``scale g`` or 0, with ``scale = -lr c alpha``; a new contiguous tensor.

    The sign of NaN is NaN here, and of an infinity (as in Adam, where it is inf / inf): torch.sign would make it 0.

    Examples
    --------
    >>> state_free_update(torch.tensor([3.0, -2.0, torch.nan]), "sign_sgd", -0.5)
    tensor([-0.5000,  0.5000,     nan])
    """
    if rule == "none":
        return torch.zeros_like(g_free, memory_format=torch.contiguous_format)
    if rule == "sgd":
        return _copy(g_free).mul_(scale)
    return g_free.sign().add_(g_free, alpha=0).mul_(scale).contiguous()


def _copy(g: Tensor) -> Tensor:
    return g.clone(memory_format=torch.contiguous_format)


# ---- the optimizer


class FRUGAL(torch.optim.Optimizer):
    """AdamW (or Lion, or SGD with momentum) on a changing part of every projected matrix, sign steps on the rest.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor), or of dicts
        A dict is a parameter group. ``projected=True`` in it says that its matrices are split; without it, and for
        plain tensors, they are left to the base optimizer. `frugal_param_groups` builds the groups of a model. A group
        may set any of the arguments below for itself. ``transposed=True``: its matrices are (in, out), as those of
        GPT-2's Conv1D are, which matters to "columns" and "rows".
    lr : float or 0-d tensor, default=1e-3
        The paper's for training from scratch.
    betas : pair of float, default=(0.9, 0.999)
        Of AdamW. For ``base="lion"`` give Lion's own, (0.9, 0.99): the default does not change with the base.
    eps, weight_decay : float, default=1e-8 and 0.0
        Decay is decoupled, for every base.
    density : float in [0, 1], default=0.25
        rho, the share of the projected entries that have state.
    update_gap : int >= 1, default=200
        T, steps between two choices of the subspace. Choose it so that a run sees many.
    projection : {"blockwise", "columns", "rows", "randk", "svd", "random"}, default="blockwise"
        "randk", "svd" and "random" hold more than rho of the memory: an index of 4 bytes an entry, or the basis.
    block_order : {"random", "ascending", "descending", "mirror"}, default="random"
        For "blockwise". Blocks are chosen among those of all groups which share `density`, `update_gap`, `block_order`.
    state_free : {"sign_sgd", "sgd", "none"}, default="sign_sgd"
    state_free_lr_scale : float >= 0, default=1.0
        alpha. 0 is the same as "none".
    proj_lr_scale : float >= 0, default=1.0
        c, on both parts of projected matrices; not on their weight decay.
    reset_state : bool, default=True
        Start from zero state in every new subspace. A block that is not chosen again loses its state in any case.
    base : {"adamw", "lion", "sgdm"}, default="adamw"
    momentum : float in [0, 1), default=0.9
        Of "sgdm".
    maximize : bool, default=False
    generator : torch.Generator, optional
        One number, the seed, is read from it now; it is held in the groups, so that `state_dict` has it. By default the
        seed is 0. All processes of a run must have the same.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, a parameter is complex, or one that is projected is not 2-D.

    Warns
    -----
    UserWarning
        If no group says whether it is projected: then this is nothing but the base optimizer.

    Notes
    -----
    ``step`` raises RuntimeError for sparse gradients and, naming the parameter, FloatingPointError for a gradient from
    which "svd" cannot take a basis; nothing was changed then. On the CPU torch's fused AdamW is used where layouts
    allow it. Nothing is kept but `state`; while it works, a step holds one matrix of the largest size more.

    Examples
    --------
    >>> model = nn.TransformerEncoder(
    ...     nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0), 4, enable_nested_tensor=False
    ... )
    >>> optimizer = FRUGAL(frugal_param_groups(model), lr=1e-3, density=0.25, update_gap=50)
    >>> model(torch.ones(3, 2, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> round(
    ...     optimizer.state_bytes(projected=True) / sum(8 * p.numel() for p in optimizer.param_groups[0]["params"]), 2
    ... )
    0.27
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        update_gap: int = 200,
        projection: str = "blockwise",
        block_order: str = "random",
        state_free: str = "sign_sgd",
        state_free_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        reset_state: bool = True,
        base: str = "adamw",
        momentum: float = 0.9,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "update_gap": update_gap,
            "projection": projection,
            "block_order": block_order,
            "state_free": state_free,
            "state_free_lr_scale": state_free_lr_scale,
            "proj_lr_scale": proj_lr_scale,
            "reset_state": reset_state,
            "base": base,
            "momentum": momentum,
            "maximize": maximize,
            "seed": seed,
            **LATER,
        }
        _check(defaults)
        params = list(params)
        if not any(isinstance(group, dict) and "projected" in group for group in params):
            warnings.warn(
                f"no parameter group says projected=True: FRUGAL is plain {base}; see frugal_param_groups", stacklevel=2
            )
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in LATER.items():
                group.setdefault(name, list(value) if isinstance(value, list) else value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Its matrices are split from the next step on; blocks among them wait for the next refresh."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                if p.is_complex():
                    raise ValueError(f"FRUGAL does not support complex parameters, got {p.dtype} for {_name(group, i)}")
                if group["projected"] and p.ndim != 2:
                    raise ValueError(
                        f"a projected parameter must have 2 dimensions, got shape {tuple(p.shape)} for "
                        f"{_name(group, i)}: put it into a group without projected=True"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        group["active"], group["step"] = [], self.param_groups[0]["step"]
        if isinstance(group["lr"], Tensor) and any(other["lr"] is group["lr"] for other in self.param_groups[:-1]):
            group["lr"] = group["lr"].clone()  # schedulers write into it, and safetensors wants every tensor once

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(numbers, params, strict=True):  # torch has made all tensors of the dtype of p
            saved = state_dict["state"].get(number, {})
            if "index" in saved:
                self.state[p]["index"] = saved["index"].to(p.device)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    @torch.compiler.disable  # it branches on its state, and torch's AdamW is wrong for 0-d parameters once compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [with_gradient(group["params"], "FRUGAL") for group in self.param_groups]
        self._refresh()
        for group, params in zip(self.param_groups, ready, strict=True):
            if group["weight_decay"]:
                for p in params:
                    p.mul_(1 - group["lr"] * group["weight_decay"])  # (2)
            if group["projected"]:
                self._step_projected(group, [p for p in params if p.numel()])
            else:
                self._step_base(group, params, params, [_grad(p) for p in params], group["lr"])
            group["step"] += 1
        return loss

    def state_bytes(self, projected: bool | None = None) -> int:
        """Bytes of all tensors in `state`: all that is held between two steps.

        Parameters
        ----------
        projected : bool, optional
            Only those of projected groups (True) or of the others (False).
        """
        groups = [g for g in self.param_groups if projected is None or g["projected"] == projected]
        states = [self.state.get(p, {}) for group in groups for p in group["params"]]
        storages = [v.untyped_storage() for state in states for v in state.values() if isinstance(v, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    # ---- the update

    def _step_projected(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr = group["lr"] * group["proj_lr_scale"]
        scale = (lr if group["maximize"] else -lr) * group["state_free_lr_scale"]
        rule = group["state_free"] if group["state_free_lr_scale"] else "none"
        projection = group["projection"]
        places = {p: i for i, p in enumerate(group["params"])}
        whole = []
        for p in params:
            state = self.state.get(p, {})
            S = state.get("index", state.get("basis"))
            if places[p] in group["active"] or (S is None and "refresh" in state):
                whole.append(p)
            elif S is None:
                if rule != "none":
                    p.add_(state_free_update(_grad(p), rule, scale))
            else:
                w, g = (p.T, _grad(p).T) if group["transposed"] else (p, _grad(p))  # (out, in)
                coordinates = projection in COORDINATES
                full_rank = not coordinates and len(S) == min(g.shape)
                if coordinates or full_rank or rule == "none":
                    g_full, g_free = project(g, S, projection), g
                else:
                    g_full, g_free = split_gradient(g, S, projection)  # (3)
                u_full = torch.zeros_like(g_full)
                self._step_base(group, [p], [u_full], [g_full], lr)  # (4)
                u = state_free_update(g_free, "none" if full_rank else rule, scale)  # (5)
                w.add_(project_back(u_full, S, projection, into=u))  # (6)
        self._step_base(group, whole, whole, [_grad(p) for p in whole], lr)

    def _step_base(
        self, group: dict[str, Any], owners: list[Tensor], params: list[Tensor], grads: list[Tensor], lr: Any
    ) -> None:
        """A step of the base optimizer on `params`, in place; their states are those of `owners`."""
        states = [self.state[p] for p in owners]
        more = {"lr": lr, "maximize": group["maximize"], "weight_decay": 0.0}
        if group["base"] == "sgdm":
            buffers = [state.get("momentum_buffer") for state in states]
            sgd(params, grads, buffers, momentum=group["momentum"], dampening=0.0, nesterov=False, **more)
            for state, buffer in zip(states, buffers, strict=True):
                if buffer is not None:
                    state["momentum_buffer"] = buffer
            return
        for state, p in zip(states, params, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                if group["base"] == "adamw":
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["step"] = torch.zeros((), dtype=torch.float32)
        averages = [state["exp_avg"] for state in states]
        if group["base"] == "lion":
            lion_step_(params, grads, averages, betas=group["betas"], **more)
            return
        squares, steps = [state["exp_avg_sq"] for state in states], [state["step"] for state in states]
        beta1, beta2 = group["betas"]
        more |= {"amsgrad": False, "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        more["fused"] = _fusable(params, grads, averages) or None
        adamw(params, grads, averages, squares, [], steps, **more)

    # ---- the subspaces

    def _refresh(self) -> None:
        """Equation (1), wherever it is due. Raises before anything is changed."""
        found = []
        number = 0
        for group in self.param_groups:
            refresh = group["step"] // group["update_gap"]
            for i, p in enumerate(group["params"]):
                number += 1
                if not group["projected"] or group["projection"] == "blockwise" or not group["density"]:
                    continue
                if p.grad is None or not p.numel() or self.state.get(p, {}).get("refresh") == refresh:
                    continue
                g = p.grad.T if group["transposed"] else p.grad
                if group["projection"] == "svd" and not torch.isfinite(g).all():
                    raise FloatingPointError(f"the gradient of {_name(group, i)} is not finite: it has no basis")
                generator = _generator(group["seed"], refresh, number)
                S = draw_subspace(g, group["density"], group["projection"], generator)
                found.append((group, p, refresh, S))
        for group, p, refresh, S in found:
            state = self.state[p]
            old = state.pop("index", state.pop("basis", None))
            if group["reset_state"] or getattr(old, "shape", None) != getattr(S, "shape", None):
                state.clear()
            state["refresh"] = refresh
            if S is not None:
                state["basis" if group["projection"] in BASES else "index"] = S
        self._refresh_blocks()

    def _refresh_blocks(self) -> None:
        pools: dict[Any, list[dict[str, Any]]] = {}
        for group in self.param_groups:
            if group["projected"] and group["projection"] == "blockwise" and group["step"] % group["update_gap"] == 0:
                pool = tuple(group[key] for key in ("density", "block_order", "seed", "update_gap"))
                pools.setdefault(pool, []).append(group)
        for (density, order, seed, gap), groups in pools.items():
            members = [(group, i, p) for group in groups for i, p in enumerate(group["params"])]
            start, generator = groups[0]["next_block"], _generator(seed, groups[0]["step"] // gap, 0)
            sequence = block_sequence(len(members), order, start=start, generator=generator)
            chosen = set(choose_blocks([p.numel() for _, _, p in members], density, sequence))
            for group in groups:
                group["active"], group["next_block"] = [], (start + len(chosen)) % max(1, len(members))
            for place, (group, i, p) in enumerate(members):
                if place in chosen:
                    group["active"].append(i)
                if p in self.state and (place not in chosen or group["reset_state"]):
                    del self.state[p]


LATER: dict[str, Any] = {"projected": False, "transposed": False, "step": 0, "active": [], "next_block": 0}


def _check(group: dict[str, Any]) -> None:
    check_number("lr", group["lr"], 0)
    check_betas(group["betas"])
    for name in ("eps", "weight_decay", "state_free_lr_scale", "proj_lr_scale"):
        check_number(name, group[name], 0)
    check_number("density", group["density"], 0, 1)
    check_number("momentum", group["momentum"], 0, 1, open_high=True)
    if not isinstance(group["update_gap"], int) or group["update_gap"] < 1:
        raise ValueError(f"update_gap must be >= 1, got {group['update_gap']!r}, and a whole number")
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {group[name]!r}")


def _name(group: dict[str, Any], i: int) -> str:
    names = group.get("param_names")
    return names[i] if names else f"parameter {i} of its group, of shape {tuple(group['params'][i].shape)}"


def _grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None
    return grad


def _generator(seed: int, refresh: int, number: int) -> torch.Generator:
    """Of the subspace of one parameter (0: of the blocks) in one period; torch reads 32 bits of a seed."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {refresh} {number}".encode()))


def _fusable(*tensors: Sequence[Tensor]) -> bool:
    """Whether torch's fused CPU kernel is right: it walks through memory, whatever the strides say."""
    tuples = zip(*tensors, strict=True)
    return all(a.device.type == "cpu" and a.stride() == b.stride() == c.stride() for a, b, c in tuples)


# ---- the groups of a model


def frugal_param_groups(model: nn.Module, target_modules: Sequence[str] | str | None = None) -> list[dict[str, Any]]:
    """Parameter groups for `FRUGAL`: the matrices of linear layers inside attention and MLP, and everything else.

    Linear layers are `torch.nn.Linear`, the Conv1D of transformers' GPT-2, and the input projections of
    `torch.nn.MultiheadAttention`. A matrix that is an embedding too (a tied head) is never projected, and what needs no
    gradient is left out.

    Parameters
    ----------
    model : nn.Module
    target_modules : sequence of str, or str, optional
        Parts of the names of the layers to project, e.g. ``["attn", "mlp"]``. By default every linear layer inside a
        numbered module, as "model.layers.3.mlp.up_proj" is: inside the stack of blocks, where the attention and MLP
        layers of every transformer are, while heads, poolers and embeddings are not. (A bare ``nn.Sequential`` has no
        layer *inside* a numbered module: name its layers.)

    Returns
    -------
    list of dict
        The projected matrices, those of Conv1D apart since they are (in, out), then the regular group.

    Raises
    ------
    ValueError
        If there is no such layer, or a target is in the name of none.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
    >>> model = nn.ModuleDict({"layers": nn.ModuleList([layer]), "head": nn.Linear(8, 5)})
    >>> proj, regular = frugal_param_groups(model)
    >>> proj["param_names"]
    ['layers.0.self_attn.in_proj_weight', 'layers.0.self_attn.out_proj.weight', 'layers.0.linear1.weight', ...]
    """
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    found = list(_linear_weights(model))
    for target in targets or ():
        if not any(target in layer for layer, _, _, _ in found):
            raise ValueError(f"target_modules: no linear layer has {target!r} in its name")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    flat: dict[int, bool] = {}  # of projected matrices: whether they are (in, out)
    for layer, _, p, transposed in found:
        inside = any(part.isdigit() for part in layer.split(".")[:-1])
        if id(p) not in embeddings and (inside if targets is None else any(target in layer for target in targets)):
            flat[id(p)] = transposed
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for kind in ({"projected": True}, {"projected": True, "transposed": True}, {"projected": False}):
        wanted = kind.get("transposed", False) if kind["projected"] else None
        members = [(name, p) for name, p in named if flat.get(id(p)) is wanted]
        names, params = [name for name, _ in members], [p for _, p in members]
        if members:
            groups.append({"params": params, "param_names": names, **kind})
    if not groups or not groups[0]["projected"]:
        raise ValueError("the model has no linear layer inside a numbered module: name its layers by target_modules")
    return groups


def _linear_weights(model: nn.Module) -> Iterator[tuple[str, str, Tensor, bool]]:
    """Name of the layer, of the weight, the weight, and whether it is (in, out)."""
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield layer, "weight", module.weight, False
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers.pytorch_utils
            yield layer, "weight", module.weight, True
        elif isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (p := getattr(module, name)) is not None:
                    yield layer, name, p, False
