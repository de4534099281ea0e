r"""Symbolic Discovery of Optimization Algorithms (Lion).

Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le. NeurIPS 2023, arXiv 2302.06675.

Idea
----
An evolutionary search over programs, begun at AdamW, came to an optimizer with one buffer and a sign: every coordinate
moves by exactly lr. No second moment, epsilon, bias correction or step count is left, so that the state is half of
AdamW's. (The search itself is `shoestring.search.programs`.)

Equations
---------
For a tensor p with gradient g and momentum m, m = 0 at first; g is used twice, m changes last (`lion_update`)::

    c = beta1 m + (1 - beta1) g              beta1 = 0.9
    p <- (1 - lr wd) p - lr sign(c)          sign(0) = 0;  decoupled decay, multiplied by lr
    m <- beta2 m + (1 - beta2) g             beta2 = 0.99: a memory of 100 steps, though the step sees 10

As the search found it, with two slots m and v: ``m = interp(g, v, .9); v = interp(g, m, 1.1); p -= lr sign(m)`` where
interp(x, y, a) = (1 - a) x + a y; the two lines make v' = .99 v + .01 g, which is Lion. beta1 = beta2 = 0 is signSGD;
beta1 = beta2 = b is signSGD on the momentum after its update (the paper's Ablation_b).

How to set it
-------------
* lr 3 to 10 times lower than AdamW's and weight_decay as many times higher, lr wd kept; initial, peak and final lr
  alike. Batches of 256 or more, cosine rather than rsqrt. If it is not stable: betas (0.95, 0.98).
* Short runs and small models: a memory of 100 steps is long for a run of hundreds, and in ours, up to 2,000 steps of
  small models, AdamW was ahead (`shoestring claim lion`). Take beta2 = 0.9, which was not behind, or AdamW.
* Clipping gradients does not bound the step, it only weighs this gradient against others. Accumulated gradients have to
  be averaged before the step.
* Where g = 0 for ever (rows of an embedding no longer used) p goes on by lr as long as m is not 0: for thousands of
  steps. Where g was always 0, p rests.
* The state has the dtype of the parameter. In bfloat16 (8 bits) a hundredth of g is lost beside an m some times larger.

Code and paper
--------------
Read: google/automl `lion/` (torch, optax), lucidrains/lion-pytorch, timm and pytorch_optimizer. All decay first and
step then, the paper at once: the same, as c does not depend on p. `decoupled_weight_decay` of lion-pytorch (wd divided
by the initial lr) is another convention and not taken over. States are exchanged with those three: `exp_avg` alone.

* NaN: ``torch.sign(nan)`` is 0, so that the others leave such a coordinate still for ever and hide it. Here a c that
  is NaN or infinite makes this coordinate of p NaN, as torch.optim.AdamW does, and no other.
* `caution` (arXiv 2411.16085, not of the paper): coordinates where sign(c) g <= 0 rest, the others move by lr / share,
  share being the moving part of the tensor but not under 1e-3 (timm; lion-pytorch: 1e-5).
* Complex parameters: real and imaginary parts are coordinates of their own, as in timm.

Cost
----
Bytes moved a parameter in float32: at least 20 (read p, g, m; write p, m), where AdamW has 28. `fused` moves those 20,
on the CPU in one call for any number of tensors: a C++ loop (`KERNEL`), since Inductor makes a kernel and its checks of
every tensor, and with a thousand small ones those took longer than the arithmetic. By default, on the CPU, 5 or 6
operations run over blocks that stay in the cache, and for memory it is one pass too; on a GPU they run over all
parameters at once, as torch's foreach optimizers do, and c takes as much memory as they.
"""

from __future__ import annotations

import ctypes
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from shoestring.train._checks import check_betas, check_number, with_gradient

__all__ = ["Lion", "lion_step_", "lion_update"]

BLOCK = 2**17  # numbers a thread takes at a time: p, g, m and c in float32 are 2 MB
BUNDLE = 16  # tensors to a call of the compiled step; one more makes compiling a second longer
SMALL = 2**14  # tensors smaller than this are not worth their share of such a call
GRAIN = 2**15  # numbers that are worth another thread of the kernel

NATIVE = {torch.float32: "lion_float", torch.float64: "lion_double"}  # functions of the kernel

PLAIN = (Tensor, torch.nn.Parameter)  # and not, for instance, DTensor

Triples = tuple[list[Tensor], list[Tensor], list[Tensor]]


# ---- the mathematics


def lion_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
    weight_decay: float | Tensor = 0.0,
    caution: bool = False,
) -> tuple[Tensor, Tensor]:
    """The update rule: new parameter and new momentum of one tensor. Nothing is changed in place.

    Parameters
    ----------
    p, g, m : tensors of one shape and real floating dtype
        Parameter, gradient, momentum.
    lr : float or 0-d tensor
    betas : pair of float, default=(0.9, 0.99)
    weight_decay : float, default=0.0
    caution : bool, default=False

    Returns
    -------
    p, m : tensors, as those given

    Examples
    --------
    >>> p, m = lion_update(torch.tensor([1.0, 1.0]), torch.tensor([5.0, -0.001]), torch.zeros(2), lr=0.25)
    >>> p
    tensor([0.7500, 1.2500])
    >>> m
    tensor([ 5.0000e-02, -1.0000e-05])
    """
    beta1, beta2 = betas
    c = beta1 * m + (1 - beta1) * g
    update = torch.where(c.isfinite(), c.sign(), torch.nan)
    if caution:
        agrees = (update * g > 0).to(g.dtype)
        update = update * agrees / agrees.mean().clamp(min=1e-3)
    return (1 - lr * weight_decay) * p - lr * update, beta2 * m + (1 - beta2) * g


@torch.no_grad()
def lion_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool = False,
    caution: bool = False,
) -> None:
    """`lion_update` of many tensors in place, in blocks that stay in the cache.

    Parameters
    ----------
    params, grads, exp_avgs : sequences of real floating tensors, in the same order
        Parameters and momenta are changed, gradients are not. A triple shares shape, dtype and device.
    lr : float or 0-d tensor
    betas, weight_decay, maximize, caution : as in `Lion`

    Examples
    --------
    >>> p, m = torch.tensor([1.0, 1.0]), torch.zeros(2)
    >>> lion_step_([p], [torch.tensor([5.0, 0.0])], [m], lr=0.25, betas=(0.9, 0.99), weight_decay=0.0)
    >>> p
    tensor([0.7500, 1.0000])
    """
    if torch.compiler.is_compiling():  # Inductor makes its own pass of it, and would drop `alpha=0` below
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "caution": caution}
        return _plain_step_(params, grads, exp_avgs, maximize=maximize, **options)
    beta1, beta2 = betas
    for p, g, m in _blocks(params, grads, exp_avgs, split=not caution):
        if maximize:
            g = list(torch._foreach_neg(g))
        c = torch._foreach_lerp(m, g, 1 - beta1)
        if weight_decay:
            torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_add_(p, c, alpha=0)  # the sign of NaN would be 0
        torch._foreach_sign_(c)
        if caution:
            agrees = [(c_i * g_i > 0).to(g_i.dtype) for c_i, g_i in zip(c, g, strict=True)]
            torch._foreach_mul_(c, [a / a.mean().clamp_(min=1e-3) for a in agrees])
        if isinstance(lr, Tensor):
            torch._foreach_sub_(p, torch._foreach_mul(c, lr))
        else:
            torch._foreach_sub_(p, c, alpha=lr)
        torch._foreach_lerp_(m, g, 1 - beta2)


def _blocks(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], split: bool
) -> Iterator[Triples]:
    """Large tensors in pieces, small ones together; on a GPU all at once, for there it is launches that cost."""
    cpu = all(p.device.type == "cpu" for p in params)
    block = BLOCK * torch.get_num_threads() if cpu else 2**62
    gathered: Triples = ([], [], [])
    size = 0
    for triple in zip(params, grads, exp_avgs, strict=True):
        n = triple[0].numel()
        if split and n > block and all(t.is_contiguous() for t in triple):
            for p, g, m in zip(*(t.view(-1).split(block) for t in triple), strict=True):
                yield [p], [g], [m]
            continue
        for tensors, t in zip(gathered, triple, strict=True):
            tensors.append(t)
        size += n
        if size >= block:
            yield gathered
            gathered, size = ([], [], []), 0
    if gathered[0]:
        yield gathered


# ---- the optimizer


class Lion(Optimizer):
    """Lion: steps of lr along the sign of interpolated momentum, with one buffer a parameter.

    Parameters
    ----------
    params : iterable of parameters, of (name, parameter), or of dicts of groups
    lr : float or 0-d tensor, default=1e-4
        The official default. A third to a tenth of what AdamW would have.
    betas : pair of float in [0, 1), default=(0.9, 0.99)
        Weight of the momentum in the step, and decay of the momentum. The paper's.
    weight_decay : float, default=0.0
        Decoupled, multiplied by lr. 3 to 10 times what AdamW would have.
    maximize : bool, default=False
        Step along the gradient.
    foreach : bool, optional
        True, the default: `lion_step_`. False: one tensor after the other, `lion_update` written out; slower.
    fused : bool, optional
        `lion_update` compiled, in one pass over memory, for contiguous tensors; the others and `caution` go the way of
        `foreach`. On the CPU in float32 and float64 a C++ loop, built by the compiler that ``torch.compile`` found: 1 s
        at the first step, then kept on disk beside Inductor's. Elsewhere by ``torch.compile`` itself, for tensors of
        16,384 numbers or more: once for a dtype, whatever shapes and learning rates follow, in 15 to 25 s on 2 cores.
        Without a working compiler: a warning, and as `foreach`.
    caution : bool, default=False
        Coordinates whose step would go against the gradient rest; see the module.

    Raises
    ------
    TypeError, ValueError
        If a hyper-parameter, also one of a group, is no number or out of range.
    RuntimeError
        If `foreach` and `fused` are both True; at a step, if a gradient is sparse.

    Notes
    -----
    The only state is ``exp_avg``, with shape, dtype and device of the parameter; `load_state_dict` takes that of timm's
    and lion-pytorch's Lion, and theirs take this one. What a saved group does not know stays as constructed.

    ``torch.compile(optimizer.step)`` works; there a float lr that changes compiles again, a tensor does not. A change
    of lr in `lr_scheduler`, param groups and GradScaler are as with any optimizer of torch.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=1.0)  # for AdamW: lr=1e-3, weight_decay=0.1
    >>> model(torch.ones(3, 4)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        caution: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        defaults |= {"maximize": maximize, "foreach": foreach, "fused": fused, "caution": caution}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyper-parameters of their own; see ``torch.optim.Optimizer``."""
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("maximize", "foreach", "fused", "caution"):
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, called with gradients on, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [with_gradient(group["params"], "Lion") for group in self.param_groups]  # refuses before any change
        for group, params in zip(self.param_groups, ready, strict=True):
            exp_avgs = []
            for p in params:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                exp_avgs.append(state["exp_avg"])
            lr = group["lr"]
            options = {
                "lr": lr.reshape(()) if isinstance(lr, Tensor) else lr,
                "betas": group["betas"],
                "weight_decay": group["weight_decay"],
                "maximize": group["maximize"],
                "caution": group["caution"],
            }
            lists: list[Any] = [params, [p.grad for p in params], exp_avgs]
            step: Callable[..., None] = lion_step_
            if group["fused"] and not (group["caution"] or torch.compiler.is_compiling()):
                step = _fused_step_
            elif group["foreach"] is False and not group["fused"]:
                step = _plain_step_
            for (_, dtype), (bucket, _) in self._group_tensors_by_device_and_dtype(lists).items():
                if dtype is not None and dtype.is_complex:
                    bucket = [list(map(torch.view_as_real, tensors)) for tensors in cast(list[list[Tensor]], bucket)]
                step(*cast(list[list[Tensor]], bucket), **options)
        return loss


def _check_group(group: dict[str, Any]) -> None:
    check_number("lr", group["lr"], 0)
    check_betas(group["betas"])
    check_number("weight_decay", group["weight_decay"], 0)
    if group["foreach"] and group["fused"]:
        raise RuntimeError("`foreach` and `fused` cannot be `True` together.")


def _plain_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    maximize: bool = False,
    **options: Any,
) -> None:
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        p_new, m_new = lion_update(p, -g if maximize else g, m, **options)
        p.copy_(p_new)
        m.copy_(m_new)


def _fused_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
    caution: bool,
) -> None:
    """`lion_step_` of tensors of one device and dtype, those that are fit for it by what was compiled."""
    device, dtype = params[0].device, params[0].dtype
    native = device.type == "cpu" and dtype in NATIVE
    fit: list[tuple[Tensor, ...]] = []
    rest: list[tuple[Tensor, ...]] = []
    for triple in zip(params, grads, exp_avgs, strict=True):
        p, g, m = triple
        good = p.is_contiguous() and g.is_contiguous() and m.is_contiguous() and p.shape == m.shape
        good = good and type(p) in PLAIN and type(g) in PLAIN and (native or p.numel() >= SMALL)
        (fit if good else rest).append(triple)
    options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
    if fit:
        done = _native_step_(*zip(*fit, strict=True), **options) if native else _bundled_step_(fit, **options)
        if not done:
            rest = list(zip(params, grads, exp_avgs, strict=True))
    if rest:
        lion_step_(*zip(*rest, strict=True), **options, caution=caution)


# ---- compiled: on the CPU one loop over all tensors

KERNEL = """
#pragma GCC optimize("tree-loop-vectorize")  // Inductor turns it off
#include <algorithm>
#include <cstdint>

// tensors: count parameters, then as many gradients and momenta; every thread takes the same number of numbers
template <typename T>
void lion(T* const* tensors, const int64_t* sizes, int64_t count, int threads, T lr, T decay, T beta1, T rest1, T beta2,
          T rest2, T sign) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += sizes[i];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t first = total * thread / threads, end = total * (thread + 1) / threads;
    for (int64_t i = 0, start = 0; i < count && start < end; start += sizes[i++]) {
      T* p = tensors[i];
      const T* gradient = tensors[count + i];
      T* m = tensors[2 * count + i];
      const int64_t last = std::min(end - start, sizes[i]);
#pragma omp simd
      for (int64_t j = std::max<int64_t>(first - start, 0); j < last; ++j) {
        const T g = sign * gradient[j], c = beta1 * m[j] + rest1 * g;
        const T update = T(c > 0) - T(c < 0) + (c - c);  // NaN if c is not finite
        p[j] = decay * p[j] - lr * update;
        m[j] = beta2 * m[j] + rest2 * g;
      }
    }
  }
}
#define EXPORT(T)                                                                                                \
  extern "C" void lion_##T(T* const* tensors, const int64_t* sizes, int64_t count, int threads, double lr,       \
                           double decay, double beta1, double rest1, double beta2, double rest2, double sign) {  \
    lion<T>(tensors, sizes, count, threads, lr, decay, beta1, rest1, beta2, rest2, sign);                        \
  }
EXPORT(float)
EXPORT(double)
"""


def _native_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
) -> bool:
    """By the kernel, all tensors in one call; whether there is one."""
    kernel = _kernel()
    if kernel is None:
        return False
    lr, (beta1, beta2) = float(lr), betas
    numbers = (lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, -1.0 if maximize else 1.0)
    _call(kernel, params, grads, exp_avgs, numbers)
    return True


def _call(
    kernel: ctypes.CDLL,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    numbers: Sequence[float],
) -> None:
    tensors = array("Q", [t.data_ptr() for t in (*params, *grads, *exp_avgs)])
    sizes = array("q", [p.numel() for p in params])
    threads = max(1, min(torch.get_num_threads(), sum(sizes) // GRAIN))
    pointers = [ctypes.c_void_p(a.buffer_info()[0]) for a in (tensors, sizes)]
    call = getattr(kernel, NATIVE[params[0].dtype])
    call(*pointers, ctypes.c_int64(len(params)), ctypes.c_int(threads), *map(ctypes.c_double, numbers))
    torch.autograd.graph.increment_version(params)  # so that autograd knows, as of any operation in place


@cache
def _kernel() -> ctypes.CDLL | None:
    """`KERNEL`, by Inductor's compiler, lock and cache on disk, after a trial; None if something of it fails."""
    try:
        from torch._inductor.codecache import CppCodeCache

        kernel = cast(ctypes.CDLL, CppCodeCache.load(KERNEL))
        p, g, m = torch.ones(3), torch.tensor([-1.0, 0.0, torch.nan]), torch.zeros(3)
        _call(kernel, [p], [g], [m], (0.5, 0.75, 0.9, 0.1, 0.5, 0.5, 1.0))
        if p[:2].tolist() != [1.25, 0.75] or not p[2].isnan() or m[:2].tolist() != [-0.5, 0.0]:
            raise RuntimeError(f"wrong result {p.tolist()}, {m.tolist()}")
    except Exception as error:  # whatever a missing or broken compiler raises
        warnings.warn(f"Lion(fused=True) goes on unfused: its kernel failed ({error!r:.200})", stacklevel=2)
        return None
    return kernel


# ---- compiled: by torch.compile, in bundles


def _bundled_step_(
    flat: Sequence[tuple[Tensor, ...]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
) -> bool:
    """By the compiled step, `BUNDLE` tensors in a call; whether there is one."""
    compiled = _compiled_step(flat[0][0].device, flat[0][0].dtype, torch.get_num_threads())
    if compiled is None:
        return False
    step, spare = compiled
    # 0-d tensors, which unlike numbers may change without being compiled again
    rates = [torch.as_tensor(x, dtype=torch.float64) for x in (lr, weight_decay, *betas, -1 if maximize else 1)]
    for start in range(0, len(flat), BUNDLE):
        bundle = [tuple(t.detach().view(-1) for t in triple) for triple in flat[start : start + BUNDLE]]
        bundle += spare[len(bundle) :]
        step(*map(list, zip(*bundle, strict=True)), *rates)
    return True


@cache
def _compiled_step(
    device: torch.device, dtype: torch.dtype, threads: int
) -> tuple[Callable[..., None], list[tuple[Tensor, ...]]] | None:
    """The step of `BUNDLE` flat tensors of any lengths, and tensors to fill up a bundle; None if nothing compiles.

    Compiled here on lengths that are all different, or Inductor would take those that are equal for one length; and
    long, or it would take one thread.
    """
    step: Any = torch.compile(_bundle_step_, dynamic=True)
    try:
        examples = [
            tuple(torch.zeros(2**16 + 8 * i, device=device, dtype=dtype) for _ in range(3)) for i in range(BUNDLE)
        ]
        rates = [torch.tensor(x, dtype=torch.float64) for x in (0.0, 0.0, 0.9, 0.99, 1.0)]
        step(*map(list, zip(*examples, strict=True)), *rates)
    except Exception as error:  # whatever a missing or broken compiler raises
        warnings.warn(f"Lion(fused=True) goes on unfused: torch.compile failed ({error!r:.200})", stacklevel=2)
        return None
    return step, [tuple(t[: 2 + i].clone() for t in triple) for i, triple in enumerate(examples)]


def _bundle_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    sign: Tensor,
) -> None:
    for p, g, m in zip(params, grads, exp_avgs, strict=True):
        p_new, m_new = lion_update(p, sign * g, m, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        p.copy_(p_new)
        m.copy_(m_new)
