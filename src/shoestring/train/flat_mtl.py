r"""Improving Multi-task Learning via Seeking Task-based Flat Regions.

Hoang Phan, Lam Tran, Quyen Tran, Ngoc N. Tran, Tuan Truong, Qi Lei, Nhat Ho, Dinh Phung, Trung Le. arXiv 2211.13723
(2022); ICCV 2025 as "Beyond Losses Reweighting: Empowering Multi-Task Learning via the Generalization Perspective".

Idea
----
Sharpness-aware minimisation for several tasks at once: each task finds its own worst weights near the current ones,
and any rule that makes one direction of several gradients is applied twice, to the gradients that lower the losses and
to those that flatten them, so that neither conflicts with the other. Heads take the plain sharpness-aware gradient.

Equations
---------
theta are the shared parameters, phi_i the head of task i, L_i its loss, all on one batch::

    g_i = grad_theta L_i(theta, phi_i),        q_i = grad_phi_i L_i(theta, phi_i)                            (stage 1)
    eps_i = rho g_i / ||g_i||,                 eps_phi_i = rho q_i / ||q_i||                                 (stage 2)
    s_i = grad_theta L_i(theta + eps_i, phi_i + eps_phi_i),   t_i = grad_phi_i L_i(the same)                 (stage 3)
    h_i = s_i - g_i = rho grad_theta ||g_i|| + O(rho^2)
    d = Agg(g_1, ..., g_m) + Agg(h_1, ..., h_m),    (theta, phi_i) <- base optimizer given (d, t_i)

``adaptive=True`` (ASAM; in most runs of the official code): ``eps = rho w^2 g / || |w| g ||``, elementwise in w.
``decompose=False`` (the paper's ablation): ``d = Agg(s_1, ..., s_m)``; the same for a linear Agg. One task is SAM.

Code and paper
--------------
Read: official repository VietHoang1512/FS-MTL (scripts) and the card of this project; not the paper's text.

* Norms: one for theta and one for the head in the paper and in the scripts for CelebA and CityScapes, the default here;
  one for both together in the script for Multi-MNIST, ``separate_norms=False``.
* rho: 2 with the adaptive form in the scripts. The two scales have nothing to do with each other, so rho has a default
  for each: 2.0 with ``adaptive``, else 0.03, chosen by us on small networks. A rho too large silently collapses a
  network to constant outputs (losses of log(classes)): watch `FlatMTL.sharpness`.
* Cost: m backward passes from one forward pass, then m times both, perturbed. The code computes all heads in each of
  the latter, as ``step(closure)`` does; ``step(closure, task_closures)`` does not.
* The scripts set the momentum of BatchNorm to 0 while weights are perturbed, which fails for momentum None and counts
  its batches on. Here all buffers of the modules that a closure calls are put back, so whatever a forward pass leaves
  in buffers is that of the one pass with unperturbed weights.
* MGDA and CAGrad are solved exactly, see `shoestring.train.aggregators`.

Where it runs
-------------
* LR schedulers, param groups, ``loop.fit``: as any optimizer. In ``loop.fit`` the step function updates by itself::

      def step(model, batch):
          losses = optimizer.step(lambda: task_losses(model, batch))
          return None, {"loss": losses.mean()}

* ``transformers.Trainer`` calls ``optimizer.step()`` with no closure: give it the base optimizer and let a training
  step fill in the gradients. Clipping and schedulers then work; gradient accumulation does not (below)::

      class FlatTrainer(Trainer):
          def training_step(self, model, inputs, num_items_in_batch=None):
              model.train()
              inputs = self._prepare_inputs(inputs)
              return flat.set_gradients(lambda: task_losses(model, inputs)).mean()


      FlatTrainer(model, args, train_dataset=rows, optimizers=(flat.base, None)).train()

* Autocast, around closures or around the whole step: yes. ``GradScaler``: no, gradients would have to be unscaled in
  the middle of a step; use bfloat16, which needs none.
* Accumulation over micro-batches: no, eps_i must be that of the whole batch. A closure may sum losses over them.
* DistributedDataParallel: no. Gradients are taken by ``torch.autograd.grad``, which its hooks do not see: replicas
  would drift apart. FSDP and DeepSpeed, which split parameters: no. Written for GPUs, measured on a CPU.
* ``torch.compile(optimizer.step)``: no, closures and the rules' solvers are Python. Compile the model.
* Complex parameters and sparse gradients are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from shoestring.train._checks import check_number
from shoestring.train._forward_trace import ForwardTrace
from shoestring.train.aggregators import (
    aggregate_cagrad,
    aggregate_imtl,
    aggregate_mean,
    aggregate_mgda,
    aggregate_pcgrad,
)

__all__ = ["FlatMTL", "flat_direction", "perturbation"]

Aggregator = Callable[[Tensor], Tensor]
AGGREGATORS: dict[str, Aggregator] = {
    "mean": aggregate_mean,
    "pcgrad": aggregate_pcgrad,
    "cagrad": aggregate_cagrad,
    "mgda": aggregate_mgda,
    "imtl": aggregate_imtl,
}
RHO, ADAPTIVE_RHO = 0.03, 2.0


# ---- the mathematics


def perturbation(
    weights: list[Tensor], grads: list[Tensor], rho: float | list[float], adaptive: bool = False
) -> list[Tensor]:
    """Worst perturbation of the weights within a ball, to first order: stage 2.

    Parameters
    ----------
    weights, grads : lists of tensors of the same shapes
        Together one vector w, and the gradient g of one task's loss there.
    rho : float, or a float for each tensor, >= 0
        Radius, ``||eps||``, or with `adaptive` ``||eps / |w| ||`` over the weights that are not 0.
    adaptive : bool, default=False
        ASAM's ball, in which rescaling of layers that leaves a network's function alone changes nothing.

    Returns
    -------
    list of tensors, as grads; 0 where the gradient is

    Examples
    --------
    >>> perturbation([torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([3.0]), torch.tensor([4.0])], rho=0.5)
    [tensor([0.3000]), tensor([0.4000])]
    """
    if not grads:
        return []
    sizes = list(torch._foreach_abs(weights)) if adaptive else []  # |w|
    scaled = list(torch._foreach_mul(sizes, grads)) if adaptive else grads  # |w| g, or g
    norm = get_total_norm(scaled) + 1e-12
    eps = list(torch._foreach_mul(scaled, 1 / norm if isinstance(rho, list) else rho / norm))
    if isinstance(rho, list):
        torch._foreach_mul_(eps, rho)
    if adaptive:
        torch._foreach_mul_(eps, sizes)  # rho w^2 g / || |w| g ||
    return eps


def flat_direction(
    G: Tensor,
    S: Tensor,
    aggregator: Aggregator = aggregate_mean,
    decompose: bool = True,
    *,
    overwrite_s: bool = False,
) -> Tensor:
    """Direction for the shared parameters: ``Agg(G) + Agg(S - G)``, or ``Agg(S)``.

    Parameters
    ----------
    G, S : tensors of shape (m, n)
        Gradients of m losses at the weights, and each at its own perturbed weights.
    aggregator : callable (m, n) -> (n,), default=aggregate_mean
    decompose : bool, default=True
    overwrite_s : bool, default=False
        Whether S may become h, which saves memory.

    Returns
    -------
    tensor of shape (n,)

    Examples
    --------
    >>> flat_direction(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.5, 0.0], [0.0, 2.0]]))
    tensor([0.7500, 1.0000])
    """
    if not decompose:
        return aggregator(S)
    h = S.sub_(G) if overwrite_s else S - G
    return aggregator(G) + aggregator(h)


# ---- the optimizer


class FlatMTL(torch.optim.Optimizer):
    """Any optimizer and any multi-task gradient rule, looking for weights that are flat for every task.

    It shares its param groups and its state with the base optimizer, ``optimizer.base``. A step costs m backward passes
    at the weights, and a forward and a backward pass for each of the m tasks at its perturbed weights. Beside the base
    optimizer's state it holds 2 m gradients, and during a step a copy of the weights.

    Parameters
    ----------
    shared_params : iterable of Parameter or of dict
        theta: parameters that several tasks use, or param groups of them. A group may have its own ``rho`` and whatever
        the base optimizer takes.
    task_params : sequence of m iterables, as shared_params
        phi_i: the parameters of task i alone. May be empty.
    base_optimizer : class or callable
        ``base_optimizer(groups, **base_kwargs)`` returns the optimizer that makes the update.
    aggregator : {"mean", "pcgrad", "cagrad", "mgda", "imtl"} or callable, default="mean"
        Agg: a rule of `shoestring.train.aggregators` with its defaults, or any function of the gradients (m, n) to a
        direction (n,), such as an aggregator of torchjd. The next step overwrites the matrix it is given.
    rho : float, optional
        Radius, >= 0. Default 0.03 (ours), with `adaptive` 2.0 (official scripts). 0 is the base rule alone, at its
        cost. A schedule may change ``param_groups[i]["rho"]``.
    adaptive : bool, default=False
    decompose : bool, default=True
        False: the paper's ablation, ``Agg(s)``.
    separate_norms : bool, default=True
        False: one norm over the shared parameters and the task's head.
    restore_rng : bool, default=False
        Whether perturbed passes see the random numbers of the first, such as dropout masks. Torch's global generators
        of the CPU and the parameters' GPUs only. Default as in the official code.
    generator : torch.Generator on the CPU, optional
        Draws the order of PCGrad's projections. Default: one with seed 0. Part of the state dict.
    **base_kwargs
        For `base_optimizer`: lr, betas, weight_decay, ...

    Attributes
    ----------
    base : torch.optim.Optimizer
    sharpness : tensor of shape (m,), or None
        ``L_i(theta + eps_i, phi_i + eps_phi_i) - L_i(theta, phi_i)`` of the last step; None where rho was 0.

    Raises
    ------
    TypeError
        Of `step` without closure. A base_optimizer that makes no optimizer; a complex parameter.
    ValueError
        A parameter that is shared and in a head, or in two heads; an unknown aggregator; rho < 0; a closure that does
        not return m scalar losses with gradients; an aggregator's answer that is no (n,).
    FloatingPointError
        A loss or gradient that is NaN or infinite (on a GPU, looking is waiting, once a step). As after any error in a
        closure, weights, buffers, ``.grad`` and optimizer state are as before the step.
    RuntimeError
        A sparse gradient.

    Examples
    --------
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> trunk, heads = nn.Linear(4, 8), [nn.Linear(8, 1), nn.Linear(8, 1)]
    >>> optimizer = FlatMTL(
    ...     trunk.parameters(), [h.parameters() for h in heads], torch.optim.Adam, "pcgrad", rho=0.01, lr=0.01
    ... )
    >>> x = torch.randn(64, 4)
    >>> def closure():
    ...     z = trunk(x).relu()
    ...     return [nn.functional.mse_loss(head(z), x[:, i : i + 1]) for i, head in enumerate(heads)]
    >>> before = sum(closure()).item()
    >>> for _ in range(100):
    ...     losses = optimizer.step(closure)
    >>> bool(losses.sum() < 0.1 * before), bool((optimizer.sharpness > 0).all())
    (True, True)
    """

    def __init__(
        self,
        shared_params: Iterable[Any],
        task_params: Sequence[Iterable[Any]],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        aggregator: str | Aggregator = "mean",
        rho: float | None = None,
        adaptive: bool = False,
        decompose: bool = True,
        *,
        separate_norms: bool = True,
        restore_rng: bool = False,
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        rho = (ADAPTIVE_RHO if adaptive else RHO) if rho is None else rho
        check_number("rho", rho, 0)
        if isinstance(base_optimizer, torch.optim.Optimizer) or not callable(base_optimizer):
            raise TypeError(
                "base_optimizer must be a class such as torch.optim.Adam, or a function of param groups, got "
                f"{base_optimizer!r}"
            )
        if not callable(aggregator) and aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator must be one of {', '.join(AGGREGATORS)}, or callable, got {aggregator!r}")
        groups = _groups(shared_params, None)
        self.n_tasks = 0
        for self.n_tasks, params in enumerate(task_params, 1):
            groups += _groups(params, self.n_tasks - 1)
        if not self.n_tasks:
            raise ValueError("task_params must hold the parameters of at least one task, got none")
        self.aggregator, self.adaptive, self.decompose = aggregator, adaptive, decompose
        self.separate_norms, self.restore_rng = separate_norms, restore_rng
        self.generator = generator
        if generator is None and aggregator == "pcgrad":
            self.generator = torch.Generator().manual_seed(0)
        self.sharpness: Tensor | None = None
        self._held: Tensor | None = None
        super().__init__(groups, {"task": None, "rho": rho})
        self.base = base_optimizer(self.param_groups, **base_kwargs)
        if not isinstance(self.base, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must return a torch.optim.Optimizer, got {self.base!r}")
        self.defaults = {**self.base.defaults, **self.defaults}
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        task_closures: Sequence[Callable[[], Tensor]] | None = None,
    ) -> Tensor:
        """One update.

        Parameters
        ----------
        closure : callable
            Does a forward pass and returns the m losses, a sequence of scalars or a tensor (m,); no backward. Called
            1 + m times a step, and should see one batch in all.
        task_closures : sequence of m callables, optional
            ``task_closures[i]()`` returns the loss of task i alone. Called for the perturbed weights instead of
            `closure`, they save the forward passes of the other heads.

        Returns
        -------
        tensor of shape (m,)
            The losses before the update.
        """
        losses = self.set_gradients(closure, task_closures)
        with torch.autocast(losses.device.type, enabled=False):
            self.base.step()
        torch.clear_autocast_cache()
        return losses

    @torch.no_grad()
    def set_gradients(
        self, closure: Callable[[], Any] | None, task_closures: Sequence[Callable[[], Tensor]] | None = None
    ) -> Tensor:
        """All of `step` but the update: d and t_i go into ``.grad``, in place of what was there.

        ``optimizer.base.step()`` then makes the update, perhaps after clipping: for hosts that call ``step()``
        themselves. Takes and returns what `step` does.
        """
        if closure is None:
            raise TypeError(
                "FlatMTL.step needs a closure that returns the losses of all tasks, for it evaluates them at several "
                "weights: optimizer.step(lambda: task_losses(model, batch)), with no backward before. A host that "
                "calls step() itself is given optimizer.base, and optimizer.set_gradients(closure) is called before"
            )
        m = self.n_tasks
        if task_closures is not None and len(task_closures) != m:
            raise ValueError(f"task_closures must hold {m} closures, one a task, got {len(task_closures)}")
        radius = {p: float(g["rho"]) for g in self.param_groups for p in g["params"] if p.requires_grad}
        shared, *heads = [
            [p for g in self.param_groups if g["task"] == task for p in g["params"] if p in radius]
            for task in (None, *range(m))
        ]
        n = sum(p.numel() for p in shared)
        reached: set[Tensor] = set()
        trace = ForwardTrace(radius, self.restore_rng)
        try:
            with trace.first_pass():
                losses = _losses(closure, m)
            G, S = self._rows(shared, heads)  # row i: g_i and q_i, s_i and t_i
            for i, head in enumerate(heads):  # stage 1
                reached.update(_write_gradient(G[i], losses[i], shared + head, i, retain_graph=i < m - 1))
            values = torch.stack([loss.detach().reshape(()).to(G) for loss in losses])  # (m,)
            del losses  # and their graph
            perturbed = values.clone()
            if any(rho > 0 for rho in radius.values()):
                kept = {p: p.clone() for p in radius}
                for i, head in enumerate(heads):
                    eps = self._eps(shared, head, G[i], radius)  # stage 2
                    with trace.another_pass(), _perturbed(shared + head, eps, kept):  # stage 3
                        del eps
                        loss = _losses(closure, m)[i] if task_closures is None else _losses(task_closures[i], 1)[0]
                        reached.update(_write_gradient(S[i], loss, shared + head, i))
                        perturbed[i] = loss.detach().reshape(())
                        del loss
                del kept
            else:
                S = G
            _check_finite(values, perturbed, G, S)
            d = self._direction(G[:, :n], None if S is G else S[:, :n])
        except BaseException:
            trace.undo()
            self._held = None  # it may hold NaN
            raise
        self.sharpness = None if S is G else perturbed - values
        _set_grad(shared, d, reached)
        for i, head in enumerate(heads):
            _set_grad(head, S[i, n:], reached)
        return values

    def _rows(self, shared: list[Tensor], heads: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Two tensors (m, n + the largest head), in the widest type of the parameters, at least single precision.

        Kept from step to step: fresh memory of this size costs more than what is done with it.
        """
        dtype, parameters = torch.float32, shared + [p for head in heads for p in head]
        for p in parameters:
            dtype = torch.promote_types(dtype, p.dtype)
        width = sum(p.numel() for p in shared) + max(sum(p.numel() for p in head) for head in heads)
        device = parameters[0].device if parameters else torch.device("cpu")
        held = self._held
        if held is None or (held.shape, held.dtype, held.device) != ((2, self.n_tasks, width), dtype, device):
            held = self._held = torch.zeros(2, self.n_tasks, width, dtype=dtype, device=device)
        return held[0], held[1]

    def _eps(self, shared: list[Tensor], head: list[Tensor], g: Tensor, radius: dict[Tensor, float]) -> list[Tensor]:
        eps, views = [], _views(g, shared + head)
        for part in (shared, head) if self.separate_norms else (shared + head,):
            rhos = [radius[p] for p in part]
            grads, weights = [views.pop(0) for _ in part], [p.to(g.device) for p in part]
            eps += perturbation(weights, grads, rhos if len(set(rhos)) > 1 else max(rhos, default=0.0), self.adaptive)
        return eps

    def _direction(self, G: Tensor, S: Tensor | None) -> Tensor:
        agg = AGGREGATORS[self.aggregator] if isinstance(self.aggregator, str) else self.aggregator
        if agg is aggregate_pcgrad:
            agg = partial(aggregate_pcgrad, generator=self.generator)
        with torch.autocast(G.device.type, enabled=False):  # which would take inner products in half precision
            # S None: rho and h are 0, for which a rule of someone else's might not give 0
            d = agg(G) if S is None else flat_direction(G, S, agg, self.decompose, overwrite_s=True)
        if not isinstance(d, Tensor) or d.shape != G.shape[1:]:
            got = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"aggregator must return a tensor of shape ({G.shape[1]},), got {got}")
        if not isinstance(self.aggregator, str) and not torch.isfinite(d).all():
            raise FloatingPointError("aggregator returned NaN or infinity for finite gradients")
        return d

    # ---- what an optimizer is

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to those that are shared, or with ``"task": i`` to the head of task i.

        The number of tasks stays. The group may have its own ``rho`` and whatever the base optimizer takes.
        """
        group = {"task": None, "rho": self.defaults["rho"], **param_group}
        task = group["task"]
        if task is not None and task not in range(self.n_tasks):
            raise ValueError(f"task of a param group must be None or a number below {self.n_tasks}, got {task!r}")
        check_number("rho", group["rho"], 0)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        places = {id(p): _place(g["task"]) for g in self.param_groups for p in g["params"]}
        for i, item in enumerate(group["params"]):
            name, p = item if isinstance(item, tuple) else (f"number {i}", item)
            if id(p) in places:
                raise ValueError(
                    f"parameter {name} of {_place(task)}, of shape {tuple(p.shape)}, is in {places[id(p)]} already: a "
                    "parameter belongs to one task, or to those that are shared"
                )
            places[id(p)] = _place(task)
            if isinstance(p, Tensor) and p.is_complex():
                raise TypeError(f"parameter {name} of {_place(task)} is complex, which FlatMTL does not support")
        if "base" in self.__dict__:
            self.base.add_param_group(group)
        else:
            super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer, with ``"generator"`` if there is one."""
        state = self.base.state_dict()
        return state if self.generator is None else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken, also that of a plain base optimizer over the same param groups."""
        state = dict(state_dict)
        drawn = state.pop("generator", None)
        mine = [(group["task"], group["rho"]) for group in self.param_groups]
        self.base.load_state_dict(state)
        self.param_groups, self.state = self.base.param_groups, self.base.state
        for group, (task, rho) in zip(self.param_groups, mine, strict=True):
            group["task"] = task
            group.setdefault("rho", rho)
        if drawn is not None and self.generator is not None:
            self.generator.set_state(drawn.cpu())

    def __getstate__(self) -> dict[str, Any]:
        kept = ("n_tasks", "aggregator", "adaptive", "decompose", "separate_norms", "restore_rng", "generator", "base")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "sharpness": None, "_held": None})
        self.param_groups, self.state = self.base.param_groups, self.base.state


# ---- parameters and vectors


def _groups(params: Iterable[Any], task: int | None) -> list[dict[str, Any]]:
    if isinstance(params, Tensor | dict):
        raise TypeError(f"{_place(task)} must be an iterable of parameters or of param groups, got {type(params)}")
    items = list(params)
    groups = items if items and isinstance(items[0], dict) else [{"params": items}] if items else []
    return [{**group, "task": task} for group in groups]


def _place(task: int | None) -> str:
    return "shared_params" if task is None else f"task_params[{task}]"


def _views(vector: Tensor, params: list[Tensor]) -> list[Tensor]:
    sizes = [p.numel() for p in params]
    return [v.view(p.shape) for v, p in zip(vector[: sum(sizes)].split(sizes), params, strict=True)] if params else []


def _write_gradient(
    row: Tensor, loss: Tensor, params: list[Tensor], task: int, retain_graph: bool = False
) -> list[Tensor]:
    """Write the gradient to the row, 0 where there is none; return the parameters that have one."""
    grads = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True) if params else ()
    views = _views(row, params)
    found = [(p, view, g) for p, view, g in zip(params, views, grads, strict=True) if g is not None]
    if not found:
        raise ValueError(f"the loss of task {task} depends on no parameter of shared_params and task_params[{task}]")
    for p, _, g in found:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"FlatMTL does not support sparse gradients, got layout {g.layout} for a parameter of shape "
                f"{tuple(p.shape)}: build its layer with sparse=False"
            )
    if len(found) < len(params):
        row.zero_()
    torch._foreach_copy_([view for _, view, _ in found], [g for _, _, g in found])
    return [p for p, _, _ in found]


@contextmanager
def _perturbed(params: list[Tensor], eps: list[Tensor], kept: dict[Tensor, Tensor]) -> Iterator[None]:
    """In place, and back to the very bits. Autocast keeps copies in half precision: none must survive."""
    try:
        torch._foreach_add_(params, [e.to(p) for e, p in zip(eps, params, strict=True)])
        torch.clear_autocast_cache()
        yield
    finally:
        torch._foreach_copy_(params, [kept[p] for p in params])
        torch.clear_autocast_cache()


def _set_grad(params: list[Tensor], vector: Tensor, reached: set[Tensor]) -> None:
    """None for what no loss reaches, so that the base optimizer passes it by."""
    for p, view in zip(params, _views(vector, params), strict=True):
        p.grad = torch.empty_like(p).copy_(view) if p in reached else None


def _losses(closure: Callable[[], Any], m: int) -> list[Tensor]:
    with torch.enable_grad():
        found = closure()
        losses = list(found) if isinstance(found, list | tuple) or getattr(found, "ndim", 0) == 1 else [found]
    if len(losses) != m:
        raise ValueError(f"closure must return {m} losses, one a task, got {len(losses)}")
    for i, loss in enumerate(losses):
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"losses of closure must be scalar tensors, got {got} for number {i}")
        if not loss.requires_grad:
            raise ValueError(f"losses of closure must have a gradient, number {i} has none")
    return losses


def _check_finite(values: Tensor, perturbed: Tensor, G: Tensor, S: Tensor) -> None:
    norm = partial(torch.linalg.vector_norm, dim=1)
    numbers = torch.stack([values, norm(G), perturbed, norm(S)]).tolist()  # waits for a GPU, once
    what = ("loss", "gradient norm", "loss at perturbed weights", "gradient norm at perturbed weights")
    for name, row in zip(what, numbers, strict=True):
        for i, number in enumerate(row):
            if not math.isfinite(number):
                raise FloatingPointError(f"the {name} of task {i} is {number}; nothing was changed")
