r"""Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers.

Abhimanyu Bambhaniya, Amir Yazdanbakhsh, Suvinay Subramanian, Sheng-Chun Kao, Shivani Agrawal, Utku Evci, Tushar
Krishna. CPAL 2025, arXiv 2402.04744.

Idea
----
A network is trained to N:M sparsity (N of every M consecutive weights stay) by fading the pruned weights out, or by
tightening the pattern frame by frame, instead of cutting them at once. It needs nothing beside the training itself and
is made for high sparsity, 1:8 and beyond.

Equations
---------
W are the dense weights, grouped by M along the inputs; m(W) is 1 for the N largest magnitudes of every group and 0
elsewhere, computed again from W at every step, without a gradient. t counts steps since the dense phase ended. ::

    W_eff = W * (m + (1 - m) D_t)                                                                     (1)

    MdGf, linear:       D_t = max(1 - beta t, 0)                                                      (2)
    MdGf, exponential:  D_t = e^{-beta t}                                                             (3)
    SdGf:               D_t = 0, and the pattern changes over equal frames of the sparse phase:
      stepwise            (M-1):M, M/2:M, M/4:M, ..., N:M                                             (4)
      geometric           8N:8M, 4N:4M, 2N:2M, N:M                                                    (5)
      densify             N:8M, N:4M, N:2M, N:M                                                       (6)

    (A) "decayed":   dL/dW = dL/dW_eff * (m + (1 - m) D_t)      autograd of (1)                       (7)
    (B) "ste":       dL/dW = dL/dW_eff                          straight through                      (8)

Training is dense for the first part (D = 1), sparse, and at the end fine-tuning with the hard mask (D = 0).

The baseline SR-STE (Zhou et al. 2021, arXiv 2102.04010) is ``mode="hard", lambda_=2e-4``: D = 0 all along, and ::

    dL/dW = dL/dW_eff + lambda (1 - m) W                                                              (9)

Code and paper
--------------
The paper says that it restricts the flow of gradients towards pruned weights, which is (7); the released code
(abhibambhaniya/progressive_gradient_flow_nm_sparsity) lets them through whole in every recipe, which is (8). On
Fashion-MNIST (8) is at or above SR-STE and (7) below it (see the claim), so (8) is the default. The paper's tables
could not be read.

* The released file does not import as it is (indentation), its layer drops the bias, and it runs layers whose step is
  unknown as step 0. Its beta = 2e-4 (default) and 1e-4 (ViT recipe) are per step: 1e-4 leaves D = 0.9 after 1,000,
  and the final cut destroys the network. ``beta=None`` reaches D = 0.01 where fine-tuning begins, at any length.
* It fine-tunes from the epoch after the one it means; here from the step that the fraction says.
* Its (4) misses N:M where M/N is no power of two (7:8, 4:8 for 3:8); here N:M is added as the last frame.
* Groups run along the input channels of a convolution, as in its code. A width that M does not divide is refused.

Under (7), once D = 0, pruned weights get no gradient and the mask freezes (Adam's moments move them on for a while);
under (8) it goes on changing to the last step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.compress._checks import check_ratio, check_whole
from shoestring.compress._prunable import Controller, Names, keep_largest, out_in, prunable, to_semi_structured, wide

__all__ = [
    "NMController",
    "NMDecay",
    "decay",
    "decayed_weight",
    "frames",
    "nm_mask",
    "sparsify_nm",
    "to_semi_structured",
]

SCHEDULES: dict[str, tuple[str | None, ...]] = {
    "mask": ("exp", "linear"),
    "structure": ("stepwise", "geometric", "densify"),
    "hard": (None,),
}
LEFT = 1e-2  # D where fine-tuning begins, if beta is None


# ---- the mathematics


def nm_mask(w: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """True at the n largest magnitudes of every m consecutive entries along `dim`; exactly n, whatever the ties.

    O(numel log m) and a copy of the magnitudes.

    Parameters
    ----------
    w : tensor of any shape
        Its size along `dim` is a multiple of m.
    n, m : int, 1 <= n <= m
    dim : int, default -1

    Returns
    -------
    bool tensor of the shape of w

    Raises
    ------
    ValueError
        If m does not divide the size, or n and m are out of range.

    Examples
    --------
    >>> nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), 2, 4)
    tensor([[False,  True,  True, False]])
    """
    check_whole("m", m, 1)
    check_whole("n", n, 1, m)
    dim = dim % w.ndim
    if w.shape[dim] % m:
        raise ValueError(f"m must divide the size of w along dim, got m={m} and {w.shape[dim]}")
    groups = w.detach().abs().unflatten(dim, (-1, m))  # (..., groups, m, ...)
    return keep_largest(groups, n, dim + 1).flatten(dim, dim + 1)


def decay(t: float, schedule: str, beta: float) -> float:
    """D_t: what is left of pruned weights t steps after the dense phase, equations (2) and (3).

    Examples
    --------
    >>> decay(5, "linear", 0.1), round(decay(5, "exp", 0.1), 4)
    (0.5, 0.6065)
    """
    if schedule == "linear":
        return max(1.0 - beta * t, 0.0)
    if schedule == "exp":
        return math.exp(-beta * t)
    raise ValueError(f"schedule must be 'linear' or 'exp', got {schedule!r}")


def frames(n: int, m: int, schedule: str) -> list[tuple[int, int]]:
    """The patterns of the frames of SdGf, equations (4) to (6).

    Examples
    --------
    >>> frames(1, 16, "stepwise")
    [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    >>> frames(1, 8, "geometric")
    [(8, 64), (4, 32), (2, 16), (1, 8)]
    """
    if schedule == "stepwise":
        found = [(m - 1 if i == 0 else m // 2**i, m) for i in range(int(math.log2(m / n)) + 1)]
        return found if found[-1][0] == n else [*(f for f in found if f[0] > n and f[0] < m), (n, m)]
    if schedule == "geometric":
        return [(n * 2**i, m * 2**i) for i in (3, 2, 1, 0)]
    if schedule == "densify":
        return [(n, m * 2**i) for i in (3, 2, 1, 0)]
    raise ValueError(f"schedule must be 'stepwise', 'geometric' or 'densify', got {schedule!r}")


def decayed_weight(W: Tensor, m: Tensor, D: Tensor | float, *, grad_mode: str = "ste", lambda_: float = 0.0) -> Tensor:
    """W_eff, equation (1), with the backward pass (7), (8) or (9). Computed in float32 at least; O(numel).

    Parameters
    ----------
    W : tensor
    m : bool tensor of the shape of W
    D : float or 0-d tensor in [0, 1]
    grad_mode : {"ste", "decayed"}, default "ste"
        (B), of the released code, or (A), of the paper's words.
    lambda_ : float, default 0
        Of equation (9), for "ste".

    Returns
    -------
    tensor of the shape and dtype of W

    Examples
    --------
    >>> W = torch.tensor([1.0, 4.0], requires_grad=True)
    >>> decayed_weight(W, torch.tensor([False, True]), 0.5, grad_mode="decayed").sum().backward()
    >>> W.grad
    tensor([0.5000, 1.0000])
    """
    D = torch.as_tensor(D, dtype=wide(W.dtype), device=W.device)
    if grad_mode == "decayed":
        return (W * torch.where(m, 1.0, D)).to(W.dtype)
    if grad_mode == "ste":
        return _StraightThrough.apply(W, m, D, lambda_)
    raise ValueError(f"grad_mode must be 'ste' or 'decayed', got {grad_mode!r}")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, m: Tensor, D: Tensor, lambda_: float) -> Tensor:
        ctx.lambda_ = lambda_
        if lambda_:
            ctx.save_for_backward(W, m)
        return (W * torch.where(m, 1.0, D)).to(W.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lambda_:
            W, m = ctx.saved_tensors
            grad = grad + ctx.lambda_ * torch.where(m, 0.0, W)
        return grad, None, None, None


# ---- the recipe


@dataclass(frozen=True)
class NMDecay:
    """A recipe: the pattern, and how the network gets there. `sparsify_nm` puts it on a model.

    Parameters
    ----------
    n, m : int, default 1 and 16
        n of every m weights stay.
    mode : {"mask", "structure", "hard"}, default "mask"
        MdGf, SdGf, or the hard mask all along (the baselines STE and SR-STE).
    schedule : str, optional
        "exp" (default) or "linear" for "mask"; "stepwise" (default), "geometric" or "densify" for "structure".
    beta : float > 0, optional
        Per optimizer step. None (ours): D is 0.01 where fine-tuning begins. The released code has 1e-4, for its 100,000
        steps and more.
    dense_frac, finetune_frac : float in [0, 1), default 0 and 0.1
        Parts of the training with D = 1 at the beginning and with D = 0 at the end. Released recipe: 0 and 0.
    total_steps : int
        Optimizer steps of the training.
    dim : {-1, 0}, default -1
        Groups along a layer's inputs (of a convolution: its input channels), which hardware wants, or its outputs.
    grad_mode : {"ste", "decayed"}, default "ste"
        (B) or (A).
    lambda_ : float >= 0, default 0
        SR-STE's pull on pruned weights (2e-4 there), with "ste".
    refresh_every : int, default 1
        Steps from one mask to the next.

    Examples
    --------
    >>> recipe = NMDecay(1, 16, total_steps=100, dense_frac=0.2, finetune_frac=0.3)
    >>> [round(recipe.at(step)[2], 3) for step in (0, 20, 45, 69, 70)]
    [1.0, 1.0, 0.1, 0.011, 0.0]
    """

    n: int = 1
    m: int = 16
    mode: str = "mask"
    schedule: str | None = None
    beta: float | None = None
    dense_frac: float = 0.0
    finetune_frac: float = 0.1
    total_steps: int = field(kw_only=True)
    dim: int = -1
    grad_mode: str = "ste"
    lambda_: float = 0.0
    refresh_every: int = 1

    def __post_init__(self) -> None:
        check_whole("m", self.m, 2)
        check_whole("n", self.n, 1, self.m)
        check_whole("total_steps", self.total_steps, 1)
        check_whole("refresh_every", self.refresh_every, 1)
        for name, value, allowed in (
            ("mode", self.mode, tuple(SCHEDULES)),
            ("grad_mode", self.grad_mode, ("ste", "decayed")),
            ("dim", self.dim, (-1, 0)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if self.schedule is None:
            object.__setattr__(self, "schedule", SCHEDULES[self.mode][0])
        if self.schedule not in SCHEDULES[self.mode]:
            raise ValueError(
                f"schedule must be one of {SCHEDULES[self.mode]} with mode={self.mode!r}, got {self.schedule!r}"
            )
        if check_ratio("dense_frac", self.dense_frac) + check_ratio("finetune_frac", self.finetune_frac) >= 1:
            raise ValueError(f"finetune_frac must be < 1 - dense_frac, got {self.finetune_frac} + {self.dense_frac}")
        if isinstance(self.lambda_, bool) or not isinstance(self.lambda_, Real) or not 0 <= self.lambda_ < math.inf:
            raise ValueError(f"lambda_ must be a number >= 0, got {self.lambda_!r}")
        if self.lambda_ and self.grad_mode != "ste":
            raise ValueError(f"lambda_ needs grad_mode='ste', got {self.grad_mode!r}")
        if self.beta is not None:
            if self.mode != "mask":
                raise ValueError(f"beta needs mode='mask', got {self.mode!r}")
            if isinstance(self.beta, bool) or not isinstance(self.beta, Real) or not 0 < self.beta < math.inf:
                raise ValueError(f"beta must be a number > 0, got {self.beta!r}")
        if self.n == self.m and self.mode == "structure":
            raise ValueError(f"n must be < m with mode='structure', got {self.n}:{self.m}")

    def patterns(self) -> list[tuple[int, int]]:
        """All that come up, the last one n:m."""
        return frames(self.n, self.m, str(self.schedule)) if self.mode == "structure" else [(self.n, self.m)]

    def at(self, step: int) -> tuple[int, int, float]:
        """N, M and D after `step` optimizer steps."""
        dense, end = round(self.dense_frac * self.total_steps), self._end()
        if step < dense:
            return self.n, self.m, 1.0
        if step >= end or self.mode == "hard":
            return self.n, self.m, 0.0
        t, length = step - dense, end - dense
        if self.mode == "structure":
            patterns = self.patterns()
            return *patterns[t * len(patterns) // length], 0.0
        beta = self.beta
        if beta is None:
            beta = (-math.log(LEFT) if self.schedule == "exp" else 1 - LEFT) / length
        return self.n, self.m, decay(t, str(self.schedule), beta)

    def _end(self) -> int:
        return self.total_steps - round(self.finetune_frac * self.total_steps)


def sparsify_nm(
    model: nn.Module, cfg: NMDecay, target_modules: Names | None = None, exclude: Names = ()
) -> NMController:
    """Parametrize weights of `model` by a recipe, in place.

    Masks and D are buffers of the model, saved with it: a byte a weight. Works with any optimizer, made before or
    after, under autocast, `torch.compile` (no recompilation), DDP (``broadcast_buffers=False`` saves sending the masks,
    which are equal anyway) and `copy.deepcopy` of ``(model, controller)``. Under FSDP groups may be torn apart.

    Parameters
    ----------
    model : nn.Module
    cfg : NMDecay
    target_modules, exclude : str or sequence of str
        As in peft: a regular expression, or names and last parts of names. The paper sparsifies the two matrices of
        the feed-forward layers, and Q, K, V at most milder (call it again with another recipe and other layers).
        Default: all linear layers and convolutions, the head too.

    Returns
    -------
    NMController

    Raises
    ------
    ValueError
        If M (of any frame) does not divide the width of a layer, which is named, or nothing can be pruned. The model
        is as it was.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> controller = sparsify_nm(model, NMDecay(2, 4, total_steps=1), ["0"])
    >>> controller.step()  # after optimizer.step()
    >>> int(controller.finalize()[0].weight.count_nonzero())
    512
    """
    if not isinstance(cfg, NMDecay):
        raise TypeError(f"cfg must be an NMDecay, got {type(cfg).__name__}")
    controller = NMController(model, cfg)
    layers = prunable(model, target_modules, exclude)
    for name, module in layers.items():
        width = module.weight.shape[controller.dim(module)]  # type: ignore[index]
        for _, m in cfg.patterns():
            if width % m:
                raise ValueError(f"m must divide the width of every layer, got m={m} and {width} in {name}")
    controller._parametrize(layers, {name: _Decayed(module.weight, cfg) for name, module in layers.items()})
    with torch.no_grad():
        controller._update()
    return controller


class NMController(Controller):
    """What `sparsify_nm` returns: ``step()`` after every ``optimizer.step()``, ``finalize()`` at the end.

    Attributes
    ----------
    cfg : NMDecay
    steps : int
        Optimizer steps done.
    """

    def __init__(self, model: nn.Module, cfg: NMDecay) -> None:
        super().__init__(model)
        self.cfg = cfg
        self._masked: tuple[int, int] | None = None  # the pattern of the masks; None: they are not used yet

    def dim(self, module: nn.Module) -> int:
        """The dimension of a layer's weight along which groups run."""
        outputs, inputs = out_in(module)
        return inputs if self.cfg.dim == -1 else outputs

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        n, m, D = self.cfg.at(self.steps)
        self._masked = (n, m) if D < 1 else None

    def finalize(self) -> nn.Module:
        if self.layers and not self._finalized:
            n, m, D = self.cfg.at(self.steps)
            if D > 0.05 or (n, m) != (self.cfg.n, self.cfg.m):
                warnings.warn(
                    f"finalize() after {self.steps} of {self.cfg.total_steps} steps: a hard cut", stacklevel=2
                )
        return super().finalize()

    def _update(self) -> None:
        n, m, D = self.cfg.at(self.steps)
        new = D < 1 and self._masked != (n, m)
        for name, module in self.layers.items():
            decayed = self.parametrization(name)
            decayed.D.fill_(D)
            if new or (D < 1 and self.steps % self.cfg.refresh_every == 0):
                decayed.mask.copy_(nm_mask(self.original(name), n, m, self.dim(module)))
        self._masked = (n, m) if D < 1 else None

    def _kept(self, name: str) -> Tensor:
        n, m, D = self.cfg.at(self.steps)
        if D == 0 and (n, m) == (self.cfg.n, self.cfg.m):
            return self.parametrization(name).mask  # the one the outputs are made with
        return nm_mask(self.original(name), self.cfg.n, self.cfg.m, self.dim(self.layers[name]))


class _Decayed(nn.Module):
    mask: Tensor
    D: Tensor

    def __init__(self, weight: Any, cfg: NMDecay) -> None:
        super().__init__()
        self.grad_mode, self.lambda_ = cfg.grad_mode, float(cfg.lambda_)
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("D", torch.ones((), dtype=wide(weight.dtype), device=weight.device))

    def forward(self, W: Tensor) -> Tensor:
        return decayed_weight(W, self.mask, self.D, grad_mode=self.grad_mode, lambda_=self.lambda_)
