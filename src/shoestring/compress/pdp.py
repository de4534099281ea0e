r"""PDP: Parameter-free Differentiable Pruning is All You Need.

Minsik Cho, Saurabh Adya, Devang Naik. NeurIPS 2023, arXiv 2305.11203.

Idea
----
While a network trains, each weight is multiplied by a soft mask computed from the weight itself, so that pruned weights
still get a gradient and can come back. There are no mask parameters, no thresholds to learn and no fine-tuning stage.

Equations
---------
Of a tensor W of n weights a share r is to be pruned. W_l are the weights of least magnitude, W_h the
``round((1 - r) n)`` others. ::

    t = (max |W_l| + min |W_h|) / 2                                                                   (1)

    m(w) = e^{w^2/tau} / (e^{w^2/tau} + e^{t^2/tau}) = sigmoid((w^2 - t^2) / tau)                     (2)

    w_hat = m(w) w                                                                                    (3)

    d w_hat / dw = m + (2 w^2 / tau) m (1 - m)                                                        (4)

(4) holds t constant; its second term pushes weights near the boundary towards a decision. The
network is dense in epochs 0 to s - 1. At epoch s the layers' targets r_l are fixed: the share of a layer's weights
among the least ``round(r N)`` of all N weights of the network. From there on ::

    r_l(e) = min(1, epsilon (e - s + 1)) r_l                                                          (5)

In the end the mask is made hard, m(w) >= 1/2, that is, the ``round((1 - r_l) n)`` largest are kept.

* ``pattern="n:m"``: (1) in every group of M weights along a layer's inputs, with N kept; (5) rounds to whole weights.
* ``pattern="channel"``: ``||W_c||`` of every output channel c in place of ``|w|``, and m(c) multiplies the channel.
  Targets are those of the unstructured sort (how the paper sets them, we could not read). Biases of pruned channels
  stay.

What to expect
--------------
* tau is in units of squared weights. If t^2 is not well above tau (weights of std 0.02, as in BERT), m is near 1/2
  everywhere, the network trains with halved weights, and making the mask hard hurts: ``tau_relative=True`` takes tau
  times t^2. If tau is far below t^2, as for the norms of channels, pruned weights get no gradient and stay pruned.
* What trains is not sparse: look at the accuracy of ``copy.deepcopy((model, pruner))[1].finalize()``. Statistics of
  batch norm come from the soft mask. Weight decay keeps pulling at pruned weights.
* A layer keeps one weight (channel) at least. ``scope="global"`` can leave a layer little more.
* DDP: thresholds are the same on every process, as the weights are. Under FSDP a process sorts only its shard, which is
  wrong.

Code and paper
--------------
There is no official code, and the paper's text could not be read: this follows the card of this project, made from
re-implementations (PQuant and others) that agree on (1) to (3). epsilon = 0.015 and s = 16 are theirs; tau = 1e-4 is
that of one, PQuant has 1e-5. PQuant keeps int((1 - r) n) weights, one too few for r = 0.8, n = 80 (15.99... is cut to
15): here it is rounded to nearest. It also has uniform targets and prunes from the first epoch; others take the
targets from the initial weights, or a sigmoid of ``|w| - t``. A share of zero is the identity here (t = -inf, m = 1):
(2) with t = 0 would multiply small weights by 1/2.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoestring.compress._checks import check_ratio, check_whole
from shoestring.compress._prunable import Controller, Names, keep_largest, out_in, prunable, wide

__all__ = ["PDPPruner", "global_targets", "pdp_mask", "pdp_threshold", "pdp_weight"]


# ---- the mathematics


def pdp_mask(w: Tensor, t: Tensor | float, tau: Tensor | float = 1e-4) -> Tensor:
    """Soft mask of every weight against the threshold, equation (2), by a sigmoid that cannot overflow.

    Differentiable in w; give t detached. O(n).

    Parameters
    ----------
    w : tensor of any shape
    t : float or tensor that broadcasts against w, >= 0 or -inf
        -inf: nothing is to be pruned, m = 1.
    tau : float or tensor, > 0, default 1e-4
        Default of a re-implementation; the paper's values could not be read.

    Returns
    -------
    tensor of the shape of w, in its dtype but float32 at least

    Raises
    ------
    ValueError
        If `tau` is a number and not > 0.

    Examples
    --------
    >>> pdp_mask(torch.tensor([0.0, 0.1, -0.1, 0.2]), t=0.1, tau=0.01)
    tensor([0.2689, 0.5000, 0.5000, 0.9526])
    """
    if not isinstance(tau, Tensor) and not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    w = w.to(wide(w.dtype))
    t = torch.as_tensor(t, dtype=w.dtype, device=w.device)
    return torch.sigmoid((w * w - t * t.abs()) / tau)  # t |t| is t^2, and -inf for -inf


def pdp_weight(w: Tensor, t: Tensor | float, tau: Tensor | float = 1e-4) -> Tensor:
    """``pdp_mask(w, t, tau) * w``, equation (3), with (4) as its backward pass, in half as many passes over memory.

    Differentiable once. Parameters as in `pdp_mask`; autograd keeps w and m.

    Examples
    --------
    >>> w = torch.tensor([0.0, 0.1, 10.0], requires_grad=True)
    >>> pdp_weight(w, t=0.1, tau=0.01).sum().backward()
    >>> w.grad  # at the threshold: 1/2 + t^2 / (2 tau)
    tensor([0.2689, 1.0000, 1.0000])
    """
    w = w.to(wide(w.dtype))
    return _SoftWeight.apply(w, torch.as_tensor(t, dtype=w.dtype, device=w.device), tau)


class _SoftWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, t: Tensor, tau: Tensor | float) -> Tensor:
        m = (w * w).sub_(t * t.abs()).div_(tau).sigmoid_()  # (2)
        ctx.save_for_backward(w, m)
        ctx.tau = tau
        return m * w  # (3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, m = ctx.saved_tensors
        boost = torch.addcmul(m, m, m, value=-1).mul_(w).div_(0.5 * ctx.tau)  # 2 w / tau  m (1 - m)
        return torch.addcmul(m, boost, w).mul_(grad), None, None  # (4)


def pdp_threshold(w: Tensor, r: float, dim: int | None = None) -> Tensor:
    """The threshold that prunes a share r, equation (1), detached. Selection, not a sort: O(n) on average.

    Parameters
    ----------
    w : tensor of any shape
    r : float in [0, 1]
        ``round((1 - r) n)`` of n stay, but one at least: a layer's share may be 1.
    dim : int, optional
        The weights that compete are those along `dim` (groups); None: all.

    Returns
    -------
    tensor, float32 at least
        0-d, or of the shape of w with 1 at `dim`. -inf where all weights stay.

    Raises
    ------
    ValueError
        If `r` is out of range or `w` is empty.

    Examples
    --------
    >>> pdp_threshold(torch.tensor([1.0, -2.0, 3.0, 4.0]), r=0.5)
    tensor(2.5000)
    """
    if not 0 <= r <= 1:
        raise ValueError(f"r must be in [0, 1], got {r}")
    if not w.numel():
        raise ValueError("w must hold weights, got none")
    a = w.detach().to(wide(w.dtype)).abs()
    a, axis = (a.flatten(), 0) if dim is None else (a, dim)
    pruned = a.shape[axis] - _count_kept(r, a.shape[axis])
    if pruned == 0:
        t = torch.full_like(a.narrow(axis, 0, 1), -torch.inf)
    else:
        low = a.kthvalue(pruned, axis, keepdim=True).values  # max |W_l|
        tied = (a <= low).sum(axis, keepdim=True) > pruned
        high = torch.where(tied, low, torch.where(a > low, a, torch.inf).amin(axis, keepdim=True))  # min |W_h|
        t = (low + high) / 2
    return t.squeeze(0) if dim is None else t


def global_targets(weights: Sequence[Tensor], r: float) -> list[float]:
    """Share of each tensor among the least ``round(r N)`` of all N magnitudes.

    Shares times sizes add up to ``round(r N)`` exactly. Bisection over the bit patterns of float32, tensor by tensor:
    31 passes, and no copy of all the weights.

    Parameters
    ----------
    weights : sequence of tensors
    r : float in [0, 1)

    Returns
    -------
    list of float in [0, 1]

    Examples
    --------
    >>> global_targets([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0, 0.5, 5.0])], 0.5)
    [1.0, 0.25]
    """
    check_ratio("r", r)
    wanted = round(r * sum(w.numel() for w in weights))
    low, high = 0, int(torch.tensor(torch.inf).view(torch.int32))  # patterns of floats >= 0 are ordered as they are
    while low < high:  # the least pattern with as many magnitudes at or below it
        middle = (low + high) // 2
        if sum(int((_bits(w) <= middle).sum()) for w in weights) >= wanted:
            high = middle
        else:
            low = middle + 1
    below = [int((_bits(w) < low).sum()) for w in weights]
    left = wanted - sum(below)  # of those at the border, the first layers' go
    shares = []
    for w, count in zip(weights, below, strict=True):
        tied = min(left, int((_bits(w) == low).sum()))
        left -= tied
        shares.append((count + tied) / w.numel())
    return shares


def _bits(w: Tensor) -> Tensor:
    return w.detach().to(torch.float32).abs().view(torch.int32)


def _count_kept(r: float, n: int) -> int:
    return max(1, round((1 - r) * n))


# ---- the pruner


class PDPPruner(Controller):
    """Soft masks on the weights of a model while it trains, and hard ones at the end.

    A scheduler beside the training: ``step()`` after every ``optimizer.step()``, ``state_dict()``, and at the end
    ``finalize()``. Thresholds are buffers of the model, saved with it. Works with any optimizer, made before or after
    `attach`, under autocast (masks are float32), `torch.compile` (no recompilation), DDP and `copy.deepcopy` of
    ``(model, pruner)``. A step costs some ten passes over the weights, and every `refresh_every` steps a selection.

    Parameters
    ----------
    model : nn.Module
    sparsity : float in [0, 1), optional
        Share of the chosen weights to prune. Default 0.9; with ``pattern="n:m"`` it is 1 - n/m and not to be given.
    steps_per_epoch : int
        Optimizer steps of an epoch, the unit of the two next; ``len(loader)`` where nothing is accumulated.
    tau : float > 0, default 1e-4
        Temperature, in units of squared weights.
    tau_relative : bool, default False
        Ours: the temperature is tau times t^2.
    warmup_epochs : int, default 16
        s.
    ramp : float in (0, 1], default 0.015
        epsilon: 67 epochs of ramp. Shorter trainings need a larger one.
    scope : {"global", "local"}, default "global"
        Targets by one sort of all weights, or the same share for every layer.
    pattern : {"unstructured", "n:m", "channel"}, default "unstructured"
    n, m : int, optional
        Weights kept, and the size of a group, for "n:m". m divides the inputs (input channels) of every layer.
    target_modules, exclude : str or sequence of str
        Which layers, as in peft: a regular expression, or names and last parts of names. Default: all linear layers
        and convolutions. Whether the paper prunes the first and the last layer, we could not read.
    refresh_every : int, default 1
        Steps from one threshold to the next; they are always fresh where an epoch begins.

    Attributes
    ----------
    targets : dict of str to float, or None
        r_l by layer, from epoch s on.

    Raises
    ------
    TypeError, ValueError
        For bad options; and from `attach`, which then leaves the model as it was.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(20, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> pruner = PDPPruner(model, 0.75, steps_per_epoch=1, warmup_epochs=1, ramp=0.5).attach()
    >>> for x in torch.randn(5, 8, 20):
    ...     model(x).square().mean().backward()
    ...     optimizer.step()
    ...     pruner.step()
    >>> pruner.finalize()
    Linear(in_features=20, out_features=4, bias=True)
    >>> int(model.weight.count_nonzero())
    20
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        steps_per_epoch: int,
        tau: float = 1e-4,
        tau_relative: bool = False,
        warmup_epochs: int = 16,
        ramp: float = 0.015,
        scope: str = "global",
        pattern: str = "unstructured",
        n: int | None = None,
        m: int | None = None,
        target_modules: Names | None = None,
        exclude: Names = (),
        refresh_every: int = 1,
    ) -> None:
        super().__init__(model)
        for name, value, allowed in (
            ("scope", scope, ("global", "local")),
            ("pattern", pattern, ("unstructured", "n:m", "channel")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name, number in (("tau", tau), ("ramp", ramp)):
            if isinstance(number, bool) or not isinstance(number, Real):
                raise TypeError(f"{name} must be a number > 0, got {number!r}")
            if not 0 < number < float("inf"):
                raise ValueError(f"{name} must be > 0, got {number}")
        if pattern == "n:m":
            if sparsity is not None:
                raise ValueError(f"sparsity must be left out with pattern='n:m' (it is 1 - n/m), got {sparsity}")
            m = check_whole("m", m, 2)
            n = check_whole("n", n, 1, m)
            sparsity, scope = 1 - n / m, "local"
        elif n is not None or m is not None:
            raise ValueError(f"n and m need pattern='n:m', got pattern={pattern!r}")
        self.ratio = check_ratio("sparsity", 0.9 if sparsity is None else sparsity)
        self.steps_per_epoch = check_whole("steps_per_epoch", steps_per_epoch, 1)
        self.warmup_epochs = check_whole("warmup_epochs", warmup_epochs, 0)
        self.refresh_every = check_whole("refresh_every", refresh_every, 1)
        self.tau, self.tau_relative, self.ramp, self.scope, self.pattern = tau, tau_relative, ramp, scope, pattern
        self.n, self.m, self.target_modules, self.exclude = n, m, target_modules, exclude
        self.targets: dict[str, float] | None = None

    def attach(self) -> PDPPruner:
        """Parametrize the weights; returns the pruner itself."""
        if self.layers:
            raise RuntimeError("attach() was called before")
        layers = prunable(self.model, self.target_modules, self.exclude)
        masks = {}
        for name, module in layers.items():
            weight: Tensor = module.weight  # type: ignore[assignment]
            outputs, inputs = out_in(module)
            if self.pattern == "n:m" and weight.shape[inputs] % self.m:  # type: ignore[operator]
                raise ValueError(
                    f"m must divide the inputs of every layer, got m={self.m} and {weight.shape[inputs]} in {name}"
                )
            dim = outputs if self.pattern == "channel" else inputs
            masks[name] = _SoftMask(weight, self.pattern, dim, self.m, self.tau, self.tau_relative)
        self._parametrize(layers, masks)
        with torch.no_grad():
            self._update()
        return self

    def sparsity(self) -> float:
        """Share of zeros among the chosen weights if it were finalized now."""
        self._check_attached("sparsity")
        sizes = {name: self.original(name).numel() for name in self.layers}
        zeros = 0.0
        for name, size in sizes.items():
            competing = self.parametrization(name).competing
            zeros += size * (1 - _count_kept(self._share(name), competing) / competing)
        return zeros / sum(sizes.values())

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The soft masks of now by layer, in the shape of its weight."""
        self._check_attached("masks")
        return {
            name: self.parametrization(name).mask(self.original(name)).expand_as(self.original(name))
            for name in self.layers
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "targets": None if self.targets is None else dict(self.targets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        targets = state["targets"]
        super().load_state_dict(state)
        self.targets = None if targets is None else dict(targets)

    def finalize(self) -> nn.Module:
        if self.layers and not self._finalized and self._progress() < 1:
            warnings.warn(
                f"finalize() before the ramp has ended: {self.sparsity():.1%} of the weights are pruned", stacklevel=2
            )
        return super().finalize()

    def _progress(self) -> float:
        """The factor of equation (5)."""
        e, s = self.steps // self.steps_per_epoch, self.warmup_epochs
        return 0.0 if e < s else min(1.0, self.ramp * (e - s + 1))

    def _share(self, name: str) -> float:
        """r_l(e), equation (5)."""
        return 0.0 if self.targets is None else self._progress() * self.targets[name]

    def _update(self) -> None:
        since = self.steps - self.warmup_epochs * self.steps_per_epoch
        if since < 0:
            return
        if self.targets is None:  # the weights at epoch s, not the initial ones
            shares = [self.ratio] * len(self.layers)
            if self.scope == "global":
                shares = global_targets([self.original(name) for name in self.layers], self.ratio)
            self.targets = dict(zip(self.layers, shares, strict=True))
            bare = [name for name, share in self.targets.items() if (1 - share) * self.original(name).numel() < 1.5]
            if bare:
                warnings.warn(
                    f"one weight is to be left in {', '.join(bare)}: exclude it, or scope='local'", stacklevel=3
                )
        if since % self.steps_per_epoch % self.refresh_every == 0:
            for name in self.layers:
                self.parametrization(name).refresh(self.original(name), self._share(name))

    def _kept(self, name: str) -> Tensor:
        return self.parametrization(name).hard(self.original(name), self._share(name))


class _SoftMask(nn.Module):
    """w -> m(w) w, equation (3). `competing` weights, or channels, share a threshold."""

    t: Tensor

    def __init__(self, weight: Tensor, pattern: str, dim: int, m: int | None, tau: float, tau_relative: bool) -> None:
        super().__init__()
        self.pattern, self.dim, self.m, self.tau, self.tau_relative = pattern, dim, m, tau, tau_relative
        self.axis = dim + 1 if pattern == "n:m" else None
        self.competing = {"unstructured": weight.numel(), "channel": weight.shape[dim], "n:m": m or 0}[pattern]
        self.register_buffer("t", pdp_threshold(self.magnitudes(weight), 0.0, self.axis))  # -inf: dense

    def magnitudes(self, w: Tensor) -> Tensor:
        """What competes: weights, norms of channels, or weights in groups."""
        w = w.to(wide(w.dtype))
        if self.pattern == "channel":
            others = [d for d in range(w.ndim) if d != self.dim]
            return torch.linalg.vector_norm(w, dim=others, keepdim=True)
        return w.unflatten(self.dim, (-1, self.m)) if self.pattern == "n:m" else w

    def mask(self, w: Tensor) -> Tensor:
        """Soft mask that broadcasts against w."""
        return self.ungroup(pdp_mask(self.magnitudes(w), self.t, self.temperature()))

    def forward(self, w: Tensor) -> Tensor:
        if self.pattern == "channel":
            return (self.mask(w) * w).to(w.dtype)
        return self.ungroup(pdp_weight(self.magnitudes(w), self.t, self.temperature())).to(w.dtype)

    def temperature(self) -> Tensor | float:
        if not self.tau_relative:
            return self.tau
        square = self.t * self.t  # 0 and inf give no temperature
        return self.tau * torch.where((square > 0) & (square < torch.inf), square, 1.0)

    def ungroup(self, x: Tensor) -> Tensor:
        return x.flatten(self.dim, self.dim + 1) if self.pattern == "n:m" else x

    def refresh(self, w: Tensor, share: float) -> None:
        self.t.copy_(pdp_threshold(self.magnitudes(w), share, self.axis))

    def hard(self, w: Tensor, share: float) -> Tensor:
        """m >= 1/2, with ties broken so that the count is exact."""
        return self.ungroup(keep_largest(self.magnitudes(w).abs(), _count_kept(share, self.competing), self.axis))
