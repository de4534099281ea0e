r"""SortedNet, a Place for Every Network and Every Network in its Place.

Valipour, Rezagholizadeh, Rajabzadeh, Kavehzadeh, Tahaei, Chen, Ghodsi. 2023, arXiv 2309.00255 (from version 2 on: "A
Scalable and Generalized Framework for Training Modular Deep Neural Networks").

Idea
----
One network is trained so that each of its prefixes, the first d blocks with the first share w of their units, is a good
network itself: a step trains one or a few prefixes drawn at random. Afterwards any size is cut out of the one
checkpoint, without search, training or data.

Equations
---------
B are the sub-networks of the spec, the product of its chains b_1 < ... < b_n; theta_b the prefix of every weight::

    W_b = W[:o_b, :i_b],    bias_b = bias[:o_b],    norms act on the first o_b units                           (1)
    f(x; theta_b) = head(norm(block_d(... block_1(x))))     d = d_b; one norm and one head for every depth     (2)

    min_theta  E_{b ~ P} E_{(x, y)} L(f(x; theta_b), y)                                                        (3)

    b_1 ... b_g ~ P,    theta <- step(theta, (1/g) sum_j grad L(f(x; theta_{b_j}), y))       g: `n_accumulate`  (4)

Input features and classes are never cut, and nothing is rescaled. P is uniform unless told otherwise. A prefix unit
then gets n times the updates of the last one, and the whole network suffers first: `full_prob` gives it more (ours).

What is cut
-----------
* Networks that ``torch.fx`` can trace (MLPs, CNNs, residual nets): of all n units of a hidden layer, the first
  ``unit_count(n, w)``. What is added to one another is cut alike, so a residual stream is narrowed as a whole. A module
  through which the cut cannot be followed is refused by its name.
* transformers models, encoders and decoders (BERT, ViT, GPT-2, Llama and their likes): the first heads of the attention
  (with grouped queries: the first groups) and the first neurons of the feed-forward layers. The stream keeps its width,
  so this is nested as MatFormer is, not as (1) applied to every matrix.
* Depth: the first d of `blocks`, by default the only list of alike blocks. Blocks that are cut must have the shapes of
  the last one kept.

What to expect
--------------
* Batch norm: statistics differ between sub-networks. Each keeps its own (of every batch norm, in ``state_dict``) and
  updates them when it is trained; `recalibrate_norms` estimates them anew after training, without labels.
* Adam and weight decay act on what got a zero gradient: a weight of which a prefix was used moves by stale momentum
  outside that prefix. A weight that was not used at all has ``grad = None`` and rests.
* DistributedDataParallel: draw with `step_generator`, which is the same on all ranks, and set
  ``find_unused_parameters=True`` for depth. FSDP, which flattens weights, and ``torch.compile`` around the wrapper: no;
  compile what `extract` returns. One thread at a time: weights are exchanged while a sub-network runs.
* Only a network trained this way has good prefixes. Of one trained plainly, small prefixes answer near chance.

Code and paper
--------------
Read: the abstracts of both versions and, for nesting, the shared head and accumulation, the text of its sibling Sorted
LLaMA (2309.08968), which averages the loss over all of B at every step: `sorted_loss` over ``range(len(model))``. There
is no official code. The accumulation default of 2 and the rounding of `unit_count` are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shoestring._models import check_model
from shoestring.compress._checks import check_whole
from shoestring.compress._sortednet_plans import (
    check_depth,
    checked_spec,
    cut,
    find_blocks,
    make_plans,
    prefix,
    unit_count,
)

__all__ = [
    "SortedModel",
    "SortedTrainerMixin",
    "draw_subnets",
    "prefix",
    "recalibrate_norms",
    "sorted_loss",
    "sorted_step",
    "step_generator",
    "subnet_probs",
    "unit_count",
]

LossFunction = Callable[[Any, Any], Tensor]


# ---- the mathematics


def subnet_probs(
    n: int, distribution: str | Sequence[float] | Tensor = "uniform", full_prob: float | None = None
) -> Tensor:
    """Probabilities P of `n` sub-networks.

    Parameters
    ----------
    n : int
    distribution : "uniform" or n numbers >= 0, default "uniform"
        Numbers are divided by their sum.
    full_prob : float in [0, 1], default None
        Probability of the last, the whole network; the others share the rest in the proportions of `distribution`.

    Returns
    -------
    tensor (n,), float64

    Raises
    ------
    ValueError
        If `distribution` or `full_prob` is none.

    Examples
    --------
    >>> subnet_probs(4).tolist(), subnet_probs(3, [1, 3, 7], full_prob=0.5).tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.125, 0.375, 0.5])
    """
    if isinstance(distribution, str):
        if distribution != "uniform":
            raise ValueError(f"distribution must be 'uniform' or {n} numbers, got {distribution!r}")
        P = torch.ones(n, dtype=torch.float64)
    else:
        P = torch.as_tensor(distribution, dtype=torch.float64).detach().cpu().clone()
    if P.shape != (n,) or not bool(torch.isfinite(P).all()) or bool((P < 0).any()) or not float(P.sum()) > 0:
        raise ValueError(f"distribution must be {n} numbers >= 0 with a sum > 0, got {P.tolist()}")
    P = P / P.sum()
    if full_prob is not None:
        if isinstance(full_prob, bool) or not isinstance(full_prob, Real) or not 0 <= float(full_prob) <= 1:
            raise ValueError(f"full_prob must be in [0, 1], got {full_prob!r}")
        rest = float(P[:-1].sum())
        if full_prob < 1 and not rest > 0:
            raise ValueError(f"distribution leaves nothing for the other sub-networks, got full_prob={full_prob}")
        P[:-1] *= (1 - float(full_prob)) / (rest or 1.0)
        P[-1] = float(full_prob)
    return P


def draw_subnets(probs: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """`n` independent draws from `probs` (with replacement) by a CPU generator.

    >>> draw_subnets(subnet_probs(3, [0, 1, 0]), 4, step_generator(0))
    [1, 1, 1, 1]
    """
    return torch.multinomial(probs, n, replacement=True, generator=generator).tolist()


def step_generator(step: int, seed: int = 0) -> torch.Generator:
    """A fresh CPU generator for this step: the same on every rank, and again after an interruption."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# ---- the network


class SortedModel(nn.Module):
    """A network and the sub-networks that are its prefixes.

    Without a chosen sub-network it is `model`, bit for bit. It holds `model` itself, not a copy, and no weight of its
    own: optimizers, hooks and ``state_dict`` see the whole weights (of batch norms it keeps statistics for each
    sub-network). Choosing costs one view a tensor.

    Parameters
    ----------
    model : nn.Module
    spec : mapping
        ``"depth"``: numbers of blocks, the last all of them. ``"width"``: shares of the units, the last 1.0. For
        transformers models ``"heads"`` and ``"ffn"`` may stand instead of ``"width"``, each a chain of its own. Sub-
        networks are the product, in the order of `subnets`; the last is the whole.
    blocks : str, default None
        Name of the ``ModuleList`` or ``Sequential`` that depth cuts. None: the only one of at least two alike blocks.

    Attributes
    ----------
    subnets : list of dict
        ``[{"depth": 2, "width": 0.5}, ...]``
    active : int
        The one that runs.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If the spec is none of this model, `model` holds NaN or has no values, or it cannot be cut; then with the name
        of the module at fault. `model` is as before.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> net = SortedModel(model, {"width": [0.25, 0.5, 1.0]})
    >>> [net.parameter_count(i) for i in range(len(net))]
    [19, 35, 67]
    >>> with net.subnet(0):
    ...     y = net(torch.zeros(1, 4))
    >>> small = net.extract({"width": 0.25})
    >>> small[0], torch.equal(small(torch.zeros(1, 4)), y)
    (Linear(in_features=4, out_features=2, bias=True), True)
    """

    def __init__(self, model: nn.Module, spec: Mapping[str, Sequence[Any]], *, blocks: str | None = None) -> None:
        check_model(model)
        super().__init__()
        transformer = hasattr(model, "config") and hasattr(model.config, "num_hidden_layers")
        self.spec = checked_spec(spec, transformer)
        choices = product(*self.spec.values())
        self.subnets: list[dict[str, Any]] = [dict(zip(self.spec, choice, strict=True)) for choice in choices]
        self.blocks = find_blocks(model, blocks) if transformer or "depth" in self.spec else ""
        if "depth" in self.spec:
            check_depth(model, self.blocks, self.spec["depth"])
        self._plans = make_plans(model, self.blocks, self.subnets, transformer)
        self.model = model
        self.active = len(self) - 1
        self._undo: list[tuple[dict[str, Any], str, Any]] = []  # what is exchanged just now
        self._running: int | None = None  # for which sub-network
        self._own: list[list[tuple[str, str, str]]] = []  # statistics of batch norms: of which module, which, where
        for i, plan in enumerate(self._plans):
            self._own.append([])
            for name, key, buffer in _statistics(model) if i < len(self) - 1 else ():  # the whole has those of `model`
                if plan.keeps(name):
                    own = f"subnet {i}: {name.replace('.', '/')} {key}"
                    cuts = plan.patches[name].cuts.get(key, ()) if name in plan.patches else ()
                    self.register_buffer(own, cut(buffer, cuts).clone())
                    self._own[i].append((name, key, own))

    def __len__(self) -> int:
        return len(self.subnets)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._running is not None or self.active == len(self) - 1:
            return self.model(*args, **kwargs)
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise RuntimeError(
                "gradient checkpointing runs the model once more in the backward pass: have both inside "
                "`with model.subnet(i):`, or use sorted_step"
            )
        with self.subnet(self.active):
            return self.model(*args, **kwargs)

    def index(self, subnet: int | Mapping[str, Any]) -> int:
        """Number of a sub-network, given as a number (negative from the end) or as what `subnets` holds.

        Raises
        ------
        ValueError
            If it is not in the spec.
        """
        if isinstance(subnet, Mapping):
            if dict(subnet) not in self.subnets:
                raise ValueError(f"subnet must be one of the spec {self.spec}, got {dict(subnet)}")
            return self.subnets.index(dict(subnet))
        if isinstance(subnet, bool) or not isinstance(subnet, int):
            raise TypeError(f"subnet must be a number or a dict such as {self.subnets[0]}, got {subnet!r}")
        if not -len(self) <= subnet < len(self):
            raise ValueError(f"subnet must be in [0, {len(self) - 1}], got {subnet}")
        return subnet % len(self)

    def set_subnet(self, subnet: int | Mapping[str, Any]) -> None:
        """Run this sub-network from now on; -1 is the whole."""
        self.active = self.index(subnet)

    @contextmanager
    def subnet(self, subnet: int | Mapping[str, Any]) -> Iterator[SortedModel]:
        """Run this sub-network inside, whether by ``model(...)``, ``model.model(...)`` or its ``generate``.

        Inside, run forward and backward passes only: modules hold views of their weights (1). Move, save, set modes and
        make optimizers outside.
        """
        i, before = self.index(subnet), (self.active, self._running)
        self._restore()
        try:
            self._install(i)
            yield self
        finally:
            self._restore()
            self.active = before[0]
            if before[1] is not None:
                self._install(before[1])

    def extract(self, subnet: int | Mapping[str, Any]) -> Any:
        """A sub-network as a module of its own, of the class of `model` and really smaller.

        Nothing is shared with `model`. It is saved by ``shoestring.compress.save``; to load, make one from an untrained
        original: ``load_into(SortedModel(fresh, spec).extract(i), folder)``. A transformers model has its config
        adjusted and goes through ``save_pretrained`` and ``from_pretrained``, unless heads were cut and its config
        cannot say how wide a head is (BERT, GPT-2): then ``from_pretrained`` refuses the sizes.
        """
        i = self.index(subnet)
        with self.subnet(i):
            memo: dict[int, Any] = {}
            for table, key, original in self._undo:
                if isinstance(original, Tensor):
                    own = table[key].detach().clone(memory_format=torch.contiguous_format)
                    if isinstance(original, nn.Parameter):
                        own = nn.Parameter(own, requires_grad=original.requires_grad)
                    memo[id(table[key])] = own  # not the view, its own storage
            small = copy.deepcopy(self.model, memo)
        for key, value in self._plans[i].config.items():
            setattr(small.config, key, value)
        return small

    def parameter_count(self, subnet: int | Mapping[str, Any]) -> int:
        """Parameters of a sub-network, shared ones counted once."""
        with self.subnet(subnet):
            return sum(p.numel() for p in {id(p): p for p in self.model.parameters()}.values())

    def extra_repr(self) -> str:
        return f"spec={self.spec}"

    def _install(self, i: int) -> None:
        """Put the views, sizes and statistics of sub-network i in place, remembering what was there."""
        self.active = self._running = i
        if i == len(self) - 1:
            return
        plan = self._plans[i]
        views: dict[int, Tensor] = {}
        with torch.enable_grad():
            for name, patch in plan.patches.items():
                module = self.model.get_submodule(name)
                for key in patch.cuts.keys() & module._parameters.keys():
                    whole: Any = module._parameters[key]
                    if id(whole) not in views:  # tied weights stay tied
                        views[id(whole)] = cut(whole, patch.cuts[key])
                    self._exchange(module._parameters, key, views[id(whole)])
                for key, size in patch.sizes.items():
                    self._exchange(vars(module), key, size)
        for name, key, own in self._own[i]:
            self._exchange(self.model.get_submodule(name)._buffers, key, self._buffers[own])
        if plan.depth is not None:
            owner, _, last = self.blocks.rpartition(".")
            whole_list = self.model.get_submodule(self.blocks)
            first = copy.copy(whole_list)
            first._modules = dict(list(whole_list._modules.items())[: plan.depth])
            self._exchange(self.model.get_submodule(owner)._modules, last, first)

    def _exchange(self, table: Any, key: str, value: Any) -> None:
        self._undo.append((table, key, table[key]))
        table[key] = value

    def _restore(self) -> None:
        while self._undo:
            table, key, value = self._undo.pop()
            table[key] = value
        self._running = None


def _statistics(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Module name, key and buffer of all batch-norm statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield from ((name, key, buffer) for key, buffer in module._buffers.items() if buffer is not None)


# ---- training


def sorted_loss(
    model: nn.Module, loss_fn: LossFunction, batch: Any, subnets: Sequence[int | Mapping[str, Any]]
) -> Tensor:
    """Mean loss of several sub-networks on one batch: (3) for all of them, or for those drawn.

    All graphs are held until the backward pass; `sorted_step` holds one. What ``shoestring.loop.fit`` wants::

        fit(model, batches, lambda m, b: sorted_loss(m, loss_fn, b, draw_subnets(P, 1, g)), optimizer, accumulate=2)

    Parameters
    ----------
    model : SortedModel, or one in DistributedDataParallel
    loss_fn : callable
        ``loss_fn(model, batch)`` gives a 0-d tensor.
    batch : object
    subnets : sequence of int or dict
        At least one.
    """
    net = _sorted_model(model)
    if not len(subnets):
        raise ValueError("subnets must hold at least one, got none")
    losses = []
    for i in subnets:
        with net.subnet(i):
            losses.append(loss_fn(model, batch))
    return torch.stack(losses).mean()


def sorted_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    *,
    generator: torch.Generator,
    n_accumulate: int = 2,
    distribution: str | Sequence[float] | Tensor = "uniform",
    full_prob: float | None = None,
) -> Tensor:
    """One optimizer step (4): `n_accumulate` sub-networks are drawn, each runs forward and backward in turn.

    Costs up to `n_accumulate` plain steps; the memory is that of one sub-network at a time.

    Parameters
    ----------
    model : SortedModel, or one in DistributedDataParallel
    loss_fn : callable
        ``loss_fn(model, batch)`` gives a 0-d tensor.
    batch : object
        All draws see it.
    optimizer : torch.optim.Optimizer
        Its gradients are set to None first.
    generator : torch.Generator
        On the CPU. ``step_generator(step)`` draws alike on all ranks.
    n_accumulate : int >= 1, default 2 (ours; the paper compares several)
    distribution, full_prob
        As in `subnet_probs`.

    Returns
    -------
    0-d tensor
        The mean loss, detached.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> net = SortedModel(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), {"width": [0.25, 1.0]})
    >>> x, optimizer = torch.randn(64, 2), torch.optim.Adam(net.parameters(), 0.02)
    >>> loss_fn = lambda model, x: ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
    >>> for step in range(200):
    ...     loss = sorted_step(net, loss_fn, x, optimizer, generator=step_generator(step))
    >>> bool(loss_fn(net.extract(0), x) < 0.1)
    True
    """
    net = _sorted_model(model)
    check_whole("n_accumulate", n_accumulate, 1)
    drawn = draw_subnets(subnet_probs(len(net), distribution, full_prob), n_accumulate, generator)
    optimizer.zero_grad()
    losses = []
    for j, i in enumerate(drawn, 1):
        last = j == n_accumulate or not hasattr(model, "no_sync")
        quiet: AbstractContextManager[Any] = nullcontext() if last else model.no_sync()  # type: ignore[operator]
        with quiet, net.subnet(i):
            loss = loss_fn(model, batch) / n_accumulate
            loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).sum()


def recalibrate_norms(
    model: SortedModel, loader: Iterable[Any], subnets: Sequence[int | Mapping[str, Any]] | None = None
) -> None:
    """Estimate the batch-norm statistics of sub-networks anew, as the mean over batches; nothing else changes.

    One forward pass over `loader` a sub-network, without gradients and dropout. Without batch norm nothing is done. The
    statistics of the whole network are those of ``model.model``.

    Parameters
    ----------
    model : SortedModel
    loader : iterable of batches
        Tensors, tuples whose first entry is the input, or dicts of keyword arguments; labels are not used. Read once
        for every sub-network.
    subnets : sequence of int or dict, default None
        None: all.

    Raises
    ------
    ValueError
        If there is no batch, or an iterator cannot be read again. Statistics are as before.
    """
    if not isinstance(model, SortedModel):
        raise TypeError(f"model must be a SortedModel, got {type(model).__name__}")
    chosen = [model.index(i) for i in (range(len(model)) if subnets is None else subnets)]
    if isinstance(loader, Iterator) and len(chosen) > 1:
        raise ValueError(f"loader is an iterator, which {len(chosen)} sub-networks cannot all read: pass a list")
    if not any(isinstance(module, _BatchNorm) for module in model.model.modules()):
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for i in chosen:
            with model.subnet(i), torch.no_grad():
                _estimate(model.model, loader)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _estimate(model: nn.Module, loader: Iterable[Any]) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over batches
        for batch in loader:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
        if not count:
            raise ValueError("loader must give at least one batch, got none")
    except BaseException:
        for buffer, old in before:
            buffer.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


class SortedTrainerMixin:
    """For a ``transformers.Trainer``: every micro-batch trains a sub-network drawn anew.

    ``gradient_accumulation_steps`` is g of (4). Draws depend on ``args.seed`` and the step alone: equal on all ranks,
    and kept when training is resumed. With depth in the spec, several ranks need ``ddp_find_unused_parameters=True``.
    The sub-networks are those of ``trainer.sorted_model``; evaluation runs the whole network.

    Parameters
    ----------
    spec : mapping
        As of `SortedModel`.
    distribution, full_prob
        As in `subnet_probs`.

    Examples
    --------
    >>> class SortedTrainer(SortedTrainerMixin, Trainer):  # doctest: +SKIP
    ...     pass
    >>> trainer = SortedTrainer(model, arguments, train_dataset=rows, spec={"depth": [3, 6]})  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        spec: Mapping[str, Sequence[Any]],
        distribution: str | Sequence[float] | Tensor = "uniform",
        full_prob: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sorted_model = SortedModel(self.model, spec)  # type: ignore[attr-defined]
        self.subnet_probs = subnet_probs(len(self.sorted_model), distribution, full_prob)
        self._last_step, self._micro = -1, 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step, total = self.state.global_step, self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        self._micro = self._micro + 1 if step == self._last_step else 0
        self._last_step = step
        generator = step_generator(step, self.args.seed)  # type: ignore[attr-defined]
        drawn = draw_subnets(self.subnet_probs, total, generator)[self._micro % total]
        with self.sorted_model.subnet(drawn):  # forward and backward
            return super().training_step(*args, **kwargs)  # type: ignore[misc]


def _sorted_model(model: nn.Module) -> SortedModel:
    net = model
    while not isinstance(net, SortedModel) and isinstance(getattr(net, "module", None), nn.Module):
        net = net.module  # type: ignore[assignment]
    if not isinstance(net, SortedModel):
        raise TypeError(f"model must be a SortedModel, got {type(model).__name__}")
    return net
