r"""The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family.

de Brébisson, Vincent. 2016, arXiv 1604.08859. With the algorithm of Vincent, de Brébisson, Bouthillier, NIPS 2015,
arXiv 1412.7091, and the family of de Brébisson, Vincent, ICLR 2016, arXiv 1511.05042.

Idea
----
A classification loss of the standardised score of the target, with two numbers that shift it from top-1 towards top-k.
It needs of all D scores only the target's, their sum and their sum of squares, and for such losses an exact SGD step
of the output layer exists whose cost does not depend on D: no softmax, no sampling, no hierarchy.

Not to be confused with the "z-loss" of ST-MoE, T5X and PaLM, a regulariser ``1e-4 log^2 Z`` added to softmax.

Equations
---------
Scores o = W h in R^D, target c::

    s = sum_k o_k,  q = sum_k o_k^2,  mu = s / D,  sigma^2 = q / D - mu^2,  z_c = (o_c - mu) / sigma
    Z-loss                 L = (1/a) softplus(a (b - z_c)),  a > 0          (hinge max(0, b - z_c) as a -> inf)
    squared error          L = q - 2 o_c + 1                                (to the one-hot target)
    log-Taylor softmax     L = -log((1 + o_c + o_c^2 / 2) / (D + s + q / 2))
    log-spherical softmax  L = -log((o_c^2 + eps) / (q + D eps))

Examples are rows here: H of shape (m, d), K targets each (the paper has columns, so every product is transposed).
W is never formed but kept as W = V U + 1 omega^T, with U^{-1}, Q = W^T W and w_bar = W^T 1. Forward::

    Hhat = H Q,  q = rowsum(H o Hhat),  s = H w_bar,  o_target = V[target] . (H U^T) + H omega

Backward, with g_A (m, K), g_s, g_q (m,) the gradients wrt o_target, s, q; Ydot (m, D) holding g_A at the targets;
ybar its row sums; T = 2 diag(g_q) H::

    1. Z = (Ydot V) U + ybar omega^T + g_s w_bar^T;  grad_H = 2 diag(g_q) Hhat + Z
    2. M = 4 diag(g_q) H Hhat^T diag(g_q) + D g_s g_s^T + Ydot Ydot^T + g_s ybar^T + ybar g_s^T + T Z^T + Z T^T
    3. U <- U - eta U H^T T;   U^{-1} <- U^{-1} + eta H^T (I - eta T H^T)^{-1} T U^{-1}
    4. omega <- omega - eta H^T (T omega + g_s)
    5. V[target] <- V[target] - eta Ydot^T H U^{-1}         (the new U^{-1})
    6. Q <- Q - eta (grad_H^T H + H^T grad_H) + eta^2 H^T M H
    7. w_bar <- w_bar - eta H^T (T w_bar + D g_s + ybar)

which is exactly W <- W - eta grad_O^T H, at O(m d^2 + m^2 d + K m d) (`_spherical.sgd_step`). Stabilisation
(`_spherical.stabilize`): singular values of U outside [0.5, 2] go back to 1 and V makes up for it, O(D d) each.

What to expect
--------------
* Scores, no probabilities. Rank by them; calibrate afterwards if probabilities are needed.
* z_c is at most sqrt(D - 1), so b should be well below. Larger b pushes the target further above the mean. a and b are
  to be tuned for the metric at hand.
* The Z-loss does not change if W is scaled, and its gradient is orthogonal to o: under SGD ||W|| only grows, so that
  the effective learning rate decays. Learning rates are other ones than for softmax: gradients go as 1 / sigma.
* Equal scores (sigma = 0) have no direction: the loss is that of z = 0, the gradient 0. Do not start from W = 0.
* D = 2 gives z_c = +-1 and no gradient ever: D < 3 is refused.

Code and paper
--------------
Read: pascal20100/factored_output_layer (C++ and a Theano op), summaries of the paper for a and b; no paper's text.
The gradient of the general (a, b) form was derived again, here autograd takes it from (o_c, s, q).

* The official code sums the loss over the batch; here ``reduction`` is "mean" by default: multiply lr by m to compare.
* The official op adds eps = 1e-12 to sigma and takes the square root of a difference as it is. Here sigma^2 below the
  rounding error of its terms is 0. `z_loss` on dense scores takes mean and variance in two passes, since in float32
  q / D - mu^2 is noise where abs(mu) >> sigma; in the layer both are float64.
* Official: everything in one dtype, U^{-1} by Woodbury "diverges" (their comment) and is recomputed at stabilisation;
  weight decay forgets Q and w_bar; a step that makes U singular is not caught. Here: d x d state is float64 also for a
  float32 V, so that no periodic O(D d^2) refresh is needed; weight decay scales all of W, Q, w_bar; a U whose norm says
  that it left the range is stabilised within the same step, before V is written, by an SVD that takes even a 0.
* The official singular-value update divides by the value. Here U is put together again from its SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoestring.train._checks import check_number
from shoestring.train._spherical import (
    Factors,
    factorize,
    gram,
    materialize,
    out_of_range,
    output_statistics,
    sgd_step,
    stabilize,
    unfactorize,
)

__all__ = [
    "SphericalLinear",
    "ZLoss",
    "log_spherical_softmax_from_stats",
    "log_taylor_softmax_from_stats",
    "squared_error_from_stats",
    "z_loss",
    "z_loss_from_stats",
]

TRAINABLE = (torch.float32, torch.float64)  # a step of SGD is often below the rounding of a 16-bit weight

StatsLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


# ---- the mathematics: losses of (o_c, s, q), unreduced; shapes broadcast


def z_loss_from_stats(
    o_target: Tensor, s: Tensor, q: Tensor, num_classes: int, a: float = 1.0, b: float = 0.0, eps: float = 1e-12
) -> Tensor:
    """``(1/a) softplus(a (b - (o_c - mu) / sigma))`` from the target's score, the sum and the sum of squares.

    Parameters
    ----------
    o_target, s, q : tensors whose shapes broadcast, float64 if abs(mu) >> sigma is possible
    num_classes : int, D
    a, b, eps : float; the official defaults. eps is added to sigma.

    Examples
    --------
    >>> o = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0])
    >>> z_loss_from_stats(o[0], o.sum(), o.square().sum(), 5)  # a one-hot score has z = sqrt(D - 1) = 2
    tensor(0.1269)
    """
    mu, square = s / num_classes, q / num_classes
    return _of_standardised(o_target - mu, square - mu**2, torch.finfo(q.dtype).eps * square, a, b, eps)


def squared_error_from_stats(o_target: Tensor, s: Tensor, q: Tensor, num_classes: int) -> Tensor:
    """``||o - e_c||^2 = q - 2 o_c + 1``.

    Examples
    --------
    >>> o = torch.tensor([0.5, 2.0])
    >>> squared_error_from_stats(o[0], o.sum(), o.square().sum(), 2)
    tensor(4.2500)
    """
    return q - 2 * o_target + 1


def log_taylor_softmax_from_stats(o_target: Tensor, s: Tensor, q: Tensor, num_classes: int) -> Tensor:
    """Minus the logarithm of softmax with ``1 + o + o^2 / 2`` in place of ``exp(o)``.

    Examples
    --------
    >>> o = torch.zeros(4)
    >>> log_taylor_softmax_from_stats(o[0], o.sum(), o.square().sum(), 4).exp()
    tensor(4.)
    """
    return torch.log(num_classes + s + q / 2) - torch.log(1 + o_target + o_target**2 / 2)


def log_spherical_softmax_from_stats(
    o_target: Tensor, s: Tensor, q: Tensor, num_classes: int, eps: float = 1e-3
) -> Tensor:
    """Minus the logarithm of ``(o_c^2 + eps) / (q + D eps)``; the sign of a score does not count. eps is our choice.

    Examples
    --------
    >>> o = torch.tensor([3.0, -1.0])
    >>> log_spherical_softmax_from_stats(o[0], o.sum(), o.square().sum(), 2, eps=0.0).exp()
    tensor(1.1111)
    """
    return torch.log(q + num_classes * eps) - torch.log(o_target**2 + eps)


def z_loss(
    logits: Tensor, target: Tensor, a: float = 1.0, b: float = 0.0, eps: float = 1e-12, reduction: str = "mean"
) -> Tensor:
    """The Z-loss of dense scores; for very many classes see `SphericalLinear`.

    Parameters
    ----------
    logits : tensor of shape (..., D), D >= 3
        float16 and bfloat16 are computed in float32.
    target : integer tensor of shape (...)
    a : float > 0, default 1.0
        Sharpness. The official default, as are b and eps.
    b : float, default 0.0
        How many standard deviations above the mean the target should be.
    eps : float >= 0
        Added to sigma.
    reduction : "mean", "sum" or "none"

    Returns
    -------
    tensor, 0-d or of shape (...), at least float32

    Raises
    ------
    ValueError, TypeError
        If a or eps is out of range, D < 3, shapes do not fit, or target holds a number outside 0 to D - 1 (it is named)
        or no integers. A GPU is waited for, to look at the labels.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0]])
    >>> z_loss(logits, torch.tensor([0]))
    tensor(0.1269)
    >>> z_loss(100 + 3 * logits, torch.tensor([0]))
    tensor(0.1269)
    """
    _check_z(a, b, eps)
    _check_reduction(reduction)
    if logits.ndim < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be a floating-point tensor (..., D), got {logits.dtype} {tuple(logits.shape)}")
    D = logits.shape[-1]
    _check_classes(D, "z")
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target must be of shape {tuple(logits.shape[:-1])}, got {tuple(target.shape)}")
    target = _check_target(target, D, logits.device)
    o = logits.to(torch.promote_types(logits.dtype, torch.float32))
    variance, mu = torch.var_mean(o, -1, correction=0)  # two passes: q / D - mu^2 would cancel
    o_target = o.gather(-1, target[..., None])[..., 0]
    noise = (torch.finfo(o.dtype).eps * mu) ** 2
    return _reduce(_of_standardised(o_target - mu, variance, noise, a, b, eps), reduction)


def _of_standardised(deviation: Tensor, variance: Tensor, noise: Tensor, a: float, b: float, eps: float) -> Tensor:
    spread = variance > noise  # else all scores are equal, as far as can be told
    sigma = torch.where(spread, variance, 1.0).sqrt() + eps
    z = torch.where(spread, deviation / sigma, 0.0)
    return F.softplus(b - z, beta=a, threshold=40.0)  # beyond a (b - z) = 40 the rest is below the rounding of float64


OTHER_LOSSES: dict[str, StatsLoss] = {
    "mse": squared_error_from_stats,
    "taylor": log_taylor_softmax_from_stats,
    "spherical": log_spherical_softmax_from_stats,
}


# ---- torch


class ZLoss(nn.Module):
    """The Z-loss as a module: ``ZLoss(a, b)(logits, target)``. See `z_loss`.

    Parameters
    ----------
    a : float > 0, default 1.0
    b : float, default 0.0
    eps : float >= 0, default 1e-12
    reduction : "mean", "sum" or "none"

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0]])
    >>> ZLoss(a=2.0, b=3.0)(logits, torch.tensor([0]))
    tensor(1.0635)
    """

    def __init__(self, a: float = 1.0, b: float = 0.0, eps: float = 1e-12, reduction: str = "mean") -> None:
        super().__init__()
        _check_z(a, b, eps)
        _check_reduction(reduction)
        self.a, self.b, self.eps, self.reduction = a, b, eps, reduction

    def extra_repr(self) -> str:
        return f"a={self.a}, b={self.b}, eps={self.eps}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return z_loss(logits, target, self.a, self.b, self.eps, self.reduction)


class SphericalLinear(nn.Module):
    """An output layer and its loss, trained by exact SGD at a cost that does not depend on the number of outputs.

    ``loss = layer(h, target)``, and ``loss.backward()`` gives the gradient wrt h *and takes the layer's SGD step*, as
    an optimizer fused into the layer would: weights are buffers, no Parameters, and no optimizer sees them.

    Parameters
    ----------
    in_features : int, d
    num_classes : int, D
        At least 3 for the Z-loss.
    loss : "z", "mse", "taylor", "spherical" or callable, default "z"
        A callable gets ``(o_target (m, K), s (m, 1), q (m, 1), D)``, float64, and returns (m, K).
    lr : float >= 0, default 0.01
        The official example's. Settable: ``layer.lr = scheduler.get_last_lr()[0]`` after ``scheduler.step()``.
    a, b, eps : float
        Of the Z-loss.
    weight_decay : float >= 0, default 0.0
        As in `torch.optim.SGD`. It shrinks U, so that now and then, every log 2 / (lr weight_decay) steps, W is
        multiplied out at O(D d^2).
    bias : bool, default True
        As in `torch.nn.Linear`: a column of W whose input is 1.
    reduction : "mean", "sum" or "none"
        Of the loss over examples and targets; it scales the step, as in SGD. The official example has "sum".
    stabilize_every : int >= 1, default 100
        Steps from one look at the singular values of U (an SVD of d x d) to the next. Official: 10 in the op, 100 in
        the timing example. A U that gets out of range earlier is brought back at once.
    generator : torch.Generator, optional
        For the initial weights, those of `torch.nn.Linear`: uniform in +-1 / sqrt(d).
    device, dtype : of V, float32 or float64; the d x d state is always float64 (which MPS does not have)

    Attributes
    ----------
    weight : tensor of shape (D, d)
        W, computed anew each time it is read, at O(D d^2).
    bias : tensor of shape (D,), or None

    Notes
    -----
    * One backward for each forward, in turn. A second backward through the same forward, or one whose weights changed
      in between, raises RuntimeError: the step would be another one than SGD's. To add up gradients, concatenate
      batches; micro-batches with backward in turn take a step each (`fit(accumulate=n)`: n steps of 1 / n of lr).
    * ``(k * loss).backward()`` takes a step of k lr, as in SGD: with a GradScaler set ``layer.lr = lr /
      scaler.get_scale()``. The gradient is clipped by nobody.
    * In evaluation mode the gradient wrt h still flows and nothing is updated; under ``torch.no_grad`` neither.
      ``torch.autograd.grad`` in training mode does update.
    * Plain SGD only. Momentum and Adam need all of the gradient of W, so there is no option for them.
    * If h or a gradient is not finite, or the step overflows, backward raises FloatingPointError and nothing has
      changed. For that a GPU is waited for once a step, and for the check of the labels once a forward.
    * State: V and 3 d^2 + 2 d numbers in float64. `state_dict` holds all of it (lr and options are the constructor's);
      training goes on from it bit for bit.
    * One process only: under DDP every process would train a layer of its own. No double backward.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> layer = SphericalLinear(4, 1000, loss="z", b=5.0, lr=1.0, generator=g)
    >>> h, target = torch.randn(8, 4, generator=g), torch.arange(8)
    >>> for _ in range(200):
    ...     layer(h, target).backward()
    >>> layer.topk(h, 1).indices[:, 0].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    V: Tensor
    U: Tensor
    U_inv: Tensor
    omega: Tensor
    Q: Tensor
    w_bar: Tensor
    updates: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | StatsLoss = "z",
        lr: float = 0.01,
        *,
        a: float = 1.0,
        b: float = 0.0,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        bias: bool = True,
        reduction: str = "mean",
        stabilize_every: int = 100,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("stabilize_every", stabilize_every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        _check_z(a, b, eps)
        _check_reduction(reduction)
        _check_classes(num_classes, loss)
        check_number("weight_decay", weight_decay, 0)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in TRAINABLE:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.in_features, self.num_classes, self.loss, self.has_bias = in_features, num_classes, loss, bias
        self.a, self.b, self.eps, self.reduction = a, b, eps, reduction
        self.weight_decay, self.stabilize_every = weight_decay, stabilize_every
        self.lr = lr
        W = torch.empty(num_classes, in_features + bias, device=device, dtype=dtype)
        bound = in_features**-0.5
        for name, tensor in factorize(W.uniform_(-bound, bound, generator=generator))._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, loss: str | StatsLoss = "z", lr: float = 0.01, **options: Any
    ) -> SphericalLinear:
        """A layer that begins with the weights of `linear` (copied), with its bias, device and dtype."""
        W, bias = linear.weight.detach(), linear.bias
        place: dict[str, Any] = {"bias": bias is not None, "device": W.device, "dtype": W.dtype}
        layer = cls(linear.in_features, linear.out_features, loss, lr, **place, **options)
        whole = W if bias is None else torch.cat([W, bias.detach()[:, None]], 1)
        for kept, tensor in zip(layer.factors, factorize(whole), strict=True):
            kept.copy_(tensor)
        return layer

    def to_linear(self) -> nn.Linear:
        """A `torch.nn.Linear` with the weights (and bias) as they are now."""
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.num_classes, self.has_bias, dtype=self.V.dtype)
        linear = linear.to_empty(device=self.V.device)
        W = materialize(self.factors)
        with torch.no_grad():
            linear.weight.copy_(W[:, : self.in_features])
            if self.has_bias:
                linear.bias.copy_(W[:, -1])
        return linear

    @property
    def factors(self) -> Factors:
        """The buffers themselves, as the functions of `_spherical` take them."""
        return Factors(self.V, self.U, self.U_inv, self.omega, self.Q, self.w_bar)

    @property
    def weight(self) -> Tensor:
        return materialize(self.factors)[:, : self.in_features]

    @property
    def bias(self) -> Tensor | None:
        return self.scores(self.V.new_zeros(self.in_features)) if self.has_bias else None

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        check_number("lr", value, 0)
        if value * self.weight_decay >= 1:
            raise ValueError(f"lr must be < 1 / weight_decay = {1 / self.weight_decay:g}, got {value}")
        self._lr = float(value)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, loss={self.loss!r}, lr={self.lr}, "
            f"bias={self.has_bias}, reduction={self.reduction!r}"
        )

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Parameters
        ----------
        h : tensor of shape (..., in_features)
        target : integer tensor of shape (...), or (..., K) for K targets each, whose losses are averaged (or summed)

        Returns
        -------
        tensor, 0-d; with ``reduction="none"`` of target's shape. Computed in float64, returned at least in float32.
        """
        H = self._rows(h)
        if target.shape != h.shape[:-1] and (target.ndim != h.ndim or target.shape[:-1] != h.shape[:-1]):
            wanted = tuple(h.shape[:-1])
            raise ValueError(f"target must be of shape {wanted} or {(*wanted, 'K')}, got {tuple(target.shape)}")
        labels = _check_target(target, self.num_classes, self.V.device).reshape(len(H), -1)
        learns = self.training and torch.is_grad_enabled()
        if learns and self.V.dtype not in TRAINABLE:
            raise TypeError(f"to train, the layer must be float32 or float64, got {self.V.dtype}: call layer.float()")
        anchor = torch.empty(0, requires_grad=learns)  # backward is to come here even if h needs no gradient
        o_target, s, q = _Statistics.apply(H, labels, anchor, self, learns)
        losses = self._losses(o_target, s[:, None], q[:, None])
        if losses.shape != labels.shape:
            raise ValueError(f"loss must return shape {tuple(labels.shape)}, got {tuple(losses.shape)}")
        return _reduce(losses.reshape(target.shape), self.reduction).to(torch.promote_types(h.dtype, torch.float32))

    def scores(self, h: Tensor) -> Tensor:
        """``W h (+ bias)``, all D of them: (..., D), in the dtype of V."""
        f = self.factors
        H = self._rows(h)
        scores = (H @ f.U.T).to(f.V.dtype) @ f.V.T + (H @ f.omega).to(f.V.dtype)[:, None]
        return scores.reshape(*h.shape[:-1], self.num_classes)

    @torch.no_grad()
    def topk(self, h: Tensor, k: int, *, rows: int = 2**16) -> Any:
        """The k best classes of each h, best first, `rows` classes at a time.

        Returns
        -------
        values, indices : named tuple of tensors (..., k), as of `torch.topk`
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be in [1, {self.num_classes}], got {k}")
        f = self.factors
        H = self._rows(h)
        Htil, shift = (H @ f.U.T).to(f.V.dtype), (H @ f.omega).to(f.V.dtype)[:, None]
        values, indices = Htil.new_empty(len(H), 0), torch.empty(len(H), 0, dtype=torch.int64, device=H.device)
        for start in range(0, self.num_classes, rows):
            block = Htil @ f.V[start : start + rows].T + shift
            best, place = block.topk(min(k, block.shape[1]))
            values, indices = torch.cat([values, best], 1), torch.cat([indices, start + place], 1)
            values, order = values.topk(min(k, values.shape[1]))
            indices = indices.gather(1, order)
        return torch.return_types.topk((values.reshape(*h.shape[:-1], k), indices.reshape(*h.shape[:-1], k)))

    @torch.no_grad()
    def unfactorize(self) -> None:
        """Multiply out, ``V = W, U = I, omega = 0``, and compute Q and w_bar anew: O(D d^2). Training does without."""
        unfactorize(self.factors)
        Q, w_bar = gram(self.V)
        self.Q.copy_(Q)
        self.w_bar.copy_(w_bar)

    def _rows(self, h: Tensor) -> Tensor:
        """h as (m, d) in float64, with the bias' 1."""
        if not isinstance(h, Tensor) or not h.is_floating_point():
            raise TypeError(f"h must be a floating-point tensor, got {getattr(h, 'dtype', type(h).__name__)}")
        if h.ndim < 1 or h.shape[-1] != self.in_features:
            raise ValueError(f"h must be of shape (..., {self.in_features}), got {tuple(h.shape)}")
        if h.device != self.V.device:
            raise ValueError(f"h must be on {self.V.device}, where the layer is, got {h.device}")
        H = h.reshape(-1, self.in_features).double()
        return F.pad(H, (0, 1), value=1.0) if self.has_bias else H

    def _losses(self, o_target: Tensor, s: Tensor, q: Tensor) -> Tensor:
        if self.loss == "z":
            return z_loss_from_stats(o_target, s, q, self.num_classes, self.a, self.b, self.eps)
        loss = OTHER_LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        return loss(o_target, s, q, self.num_classes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SphericalLinear:
        """`to`, `cuda`, `float`, ...: V takes device and dtype, the small state the device only."""
        before = {name: getattr(self, name) for name in ("U", "U_inv", "omega", "Q", "w_bar")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float64:
                setattr(self, name, tensor.to(moved.device))
        return self

    @torch.no_grad()
    def _step(self, H: Tensor, Hhat: Tensor, target: Tensor, g_A: Tensor, g_s: Tensor, g_q: Tensor) -> Tensor:
        """Update everything, or raise and update nothing; the gradient wrt H."""
        f = self.factors
        keep = 1 - self.lr * self.weight_decay  # W <- keep (W - (lr / keep) grad)
        grad_H, new, step = sgd_step(f, H, Hhat, target, g_A, g_s, g_q, self.lr / keep)
        new = new._replace(U=keep * new.U, U_inv=new.U_inv / keep, omega=keep * new.omega)
        new = new._replace(Q=keep**2 * new.Q, w_bar=keep * new.w_bar)
        changed = (grad_H, step, new.U, new.omega, new.Q, new.w_bar)
        finite = torch.stack([t.sum() for t in changed]).isfinite().all()
        finite, urgent = torch.stack([finite, out_of_range(new)]).tolist()
        if not finite:
            raise FloatingPointError(
                f"h, its gradient or the step of lr={self.lr} is not finite: the layer was left as it was"
            )
        for kept, tensor in zip(f[1:], new[1:], strict=True):
            kept.copy_(tensor)
        self.updates += 1
        if urgent or self.updates % self.stabilize_every == 0:
            stabilize(f)
        rows = step[:, :, None] * (H @ f.U_inv)[:, None] * keep  # (m, K, d)
        f.V.index_add_(0, target.flatten(), rows.flatten(0, 1).to(f.V.dtype))
        return grad_H


class _Statistics(torch.autograd.Function):
    """``(o_target, s, q)`` of H; its backward is the layer's step."""

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, target: Tensor, anchor: Tensor, layer: SphericalLinear, learns: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        o_target, s, q, Hhat = output_statistics(layer.factors, H, target)
        ctx.save_for_backward(H, target, Hhat)
        ctx.layer, ctx.learns, ctx.Q, ctx.version = layer, learns, layer.Q, layer.Q._version
        return o_target, s, q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_A: Tensor, g_s: Tensor, g_q: Tensor) -> tuple[Tensor | None, ...]:
        layer = ctx.layer
        if layer.Q is not ctx.Q or layer.Q._version != ctx.version:
            raise RuntimeError(
                "the weights of this SphericalLinear have changed since the forward: each backward is a step, so there "
                "can be one for each forward, before the next forward; concatenate batches to add their gradients"
            )
        H, target, Hhat = ctx.saved_tensors
        if ctx.learns:
            return layer._step(H, Hhat, target, g_A, g_s, g_q), None, None, None, None
        return sgd_step(layer.factors, H, Hhat, target, g_A, g_s, g_q, 0.0)[0], None, None, None, None


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _check_z(a: float, b: float, eps: float) -> None:
    check_number("a", a, 0)
    if not a > 0:
        raise ValueError(f"a must be > 0, got {a}")
    check_number("b", b, -float("inf"))
    check_number("eps", eps, 0)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_classes(num_classes: int, loss: str | StatsLoss) -> None:
    if not callable(loss) and loss not in ("z", *OTHER_LOSSES):
        raise ValueError(f"loss must be 'z', 'mse', 'taylor', 'spherical' or a callable, got {loss!r}")
    least, why = (3, ": of two scores the standardised ones are -1 and 1") if loss == "z" else (1, "")
    if not isinstance(num_classes, int) or num_classes < least:
        raise ValueError(f"num_classes must be an integer >= {least}{why}, got {num_classes!r}")


def _check_target(target: Tensor, num_classes: int, device: torch.device) -> Tensor:
    """target as int64, if its labels exist."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integers, got {target.dtype}")
    if target.device != device:
        raise ValueError(f"target must be on {device}, got {target.device}")
    wrong = target[(target < 0) | (target >= num_classes)]
    if len(wrong):
        raise ValueError(f"target must hold labels from 0 to {num_classes - 1}, got {int(wrong[0])}")
    return target.long()
