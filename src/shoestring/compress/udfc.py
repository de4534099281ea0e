r"""Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning.

Shipeng Bai, Jun Chen, Xintian Shen, Yixuan Qian, Yong Liu. ICCV 2023, arXiv 2308.07209.

Idea
----
A damaged channel, pruned or quantised, looks much like a mixture of the channels that are left. The mixture is found
from the weights alone, by one ridge regression a layer, and folded into the next layer: no data, no training.

Equations
---------
Layer l: Z = W * X_prev with W (N, C, K, K), then batch norm (gamma, beta, mu, sigma = sqrt(var + eps)), then relu; the
next layer has weights V (O, N, K', K'), or (O, N) after pooling. P are the pruned channels, R the kept ones. ::

    G_j = gamma_j / sigma_j vec(W_j),    b_j = beta_j + gamma_j (bias_j - mu_j) / sigma_j                      (1)
    t_j = [G_j ; sqrt(alpha2) b_j]                                                                             (2)

    l_re(s) = ||G_j - sum_k s_k G_k||^2 + alpha2 (b_j - sum_k s_k b_k)^2 + alpha1 ||s||^2,       k in R        (3)
    s_j = (A A^T + alpha1 I)^{-1} A t_j,    rows of A: t_k, k in R                                             (4)

    V_hat[:, k] = sum_j S_jk V[:, j]                                                                           (5)

For j in R, S_j is e_j as long as nothing is quantised. With quantised weights Q(W) the rows of A come from Q(W), the
target t_j from W, and the ridge of a kept channel pulls towards e_j instead of 0 (ours): with p_j = e_j, else 0, ::

    s_j = p_j + (A A^T + alpha1 I)^{-1} A (t_j - A^T p_j)                                                      (6)

which is (4) for j in P and gives S = I where nothing was damaged. One Cholesky factor serves all channels of a layer;
layers go in forward order. ``nonnegative=True`` (ours) keeps s_j >= 0: relu(sum_k s_k a_k) is not sum_k s_k relu(a_k),
and signs that mix make it worse. Without batch norm gamma = sigma = 1 and b_j = bias_j.

A depthwise convolution behind the layer (MobileNet's expand, depthwise, project) belongs to the same channels: a pruned
channel takes its depthwise filter along, and the project convolution is what is rewritten. The t_j is ours: depthwise
filters alone are nine numbers each, which a few others span exactly, although they look at different maps. We take the
filter of both layers together and both offsets, ::

    t_j = [G'_j (x) t_j of the first layer ; sqrt(alpha2) b'_j],        G', b': (1) of the depthwise layer     (7)

so that t_j = c t_k still means that the maps are multiples of one another, exactly.

What is rewritten
-----------------
Convolutions whose channels reach only convolutions and linear layers, through activations that keep positive multiples
(relu, leaky relu, none), pooling, padding, dropout and flattening: all of a plain CNN, the inside of residual blocks.
Channels that go into a sum or a concatenation (the residual stream) are left alone, and `chains` says so by name. relu6
is not homogeneous above 6: it is let through, and exactness ends where a map exceeds it.

Code and paper
--------------
The paper's text could not be read and its repository is gone: (1) to (5) are derived, from the abstract, a summary that
has the defaults, and the code of the older LBYL (bigdata-inha/LBYL), which solves the pruning half. Which default
belongs to the ridge and which to the offset is a guess. LBYL's released solver is not followed where it departs from
its own formula: the running variance for its root, the offset as a scalar on the diagonal, a_k folded in place of s_k.
Its loss is (3) divided by (gamma_j / sigma_j)^2 in the first term; it measured the same. As in its code, ranking and
coefficients use the weights a layer had at first, before the layer in front was folded into it. With `weight_bits` they
cannot: what is rounded are the folded weights, so then t_j and A are those of the folded layer.

References: arXiv 2308.07209; LBYL (Leave Before You Leave), 2022; Kim et al., Neuron Merging, NeurIPS 2020.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from shoestring._models import check_model
from shoestring.compress._checks import check_ratio, check_whole
from shoestring.compress._saved import resize_
from shoestring.compress._udfc_chains import Chain, analyse, chains

__all__ = [
    "Chain",
    "chains",
    "channel_rows",
    "compress_by",
    "nonnegative_coefficients",
    "quantize",
    "reconstruction_coefficients",
    "udfc_compress",
]

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


def udfc_compress(
    model: nn.Module,
    example_inputs: Any = None,
    pruning_ratio: float = 0.3,
    weight_bits: int | None = None,
    importance: str = "l2",
    alpha1: float = 0.01,
    alpha2: float = 0.008,
    nonnegative: bool = False,
    inplace: bool = False,
    remove: bool = True,
) -> nn.Module:
    """Prune filters and quantise weights of a trained convolutional network, and repair it without data.

    Of every layer that can be repaired (see `chains`) floor(pruning_ratio N) of the N filters go, the smallest first.
    The result is of the model's own class, with fewer channels in ordinary layers and the same names in its state dict:
    `shoestring.compress.save` and `load_into` keep it. A ResNet-18 takes seconds.

    Parameters
    ----------
    model : nn.Module
        In training or evaluation mode; batch norms are read as they are in evaluation. Any floating dtype and device:
        the linear algebra is float64 (float32 on mps) on the layer's device, the result has the model's dtype.
    example_inputs : tensor or tuple of tensors, optional
        What the forward takes. Only read where the forward branches on shapes or values, and then by default zeros,
        (1, C, 64, 64) for the C channels of the first convolution.
    pruning_ratio : float in [0, 1), default 0.3
        The paper's setting on ImageNet.
    weight_bits : int from 2 to 8, optional
        Round the weights of every Conv2d and Linear (`quantize`), those that cannot be repaired as well.
        They stay floating-point tensors, of at most 2^bits - 1 values each: nothing is packed, and the file is not
        smaller. Biases and batch norms are left in full.
    importance : {"l2", "l1", "group"}, default "l2"
        "l2", the paper's, and "l1": the norm of a filter; of a filter and its depthwise filter, the product. "group",
        torch-pruning's: the l2 norm of the filter, of its depthwise filter and of the weights that read it, together.
        A small filter that is read by large weights then stays: far better on the ResNet of `benchmarks/udfc.py`.
    alpha1 : float >= 0, default 0.01
        Ridge of (3), the paper's default. It has the scale of squared weights. 0 takes the least-norm solution.
    alpha2 : float >= 0, default 0.008
        Weight of the offsets in (3), the paper's default.
    nonnegative : bool, default False
        Coefficients >= 0 (ours). It wants a larger alpha1, such as 1.
    inplace : bool, default False
        Change `model` itself. False works on a copy.
    remove : bool, default True
        False leaves the shapes and sets the pruned channels to zero. Both answer the same.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If an argument is out of its range; weights are NaN, infinite or on the meta device; the model has layer norms
        or cannot be traced; or no layer of it can be repaired: the message names the first and says why. The model is
        then as it was.
    TypeError
        If model is no module, or a number is none.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> small = udfc_compress(net, pruning_ratio=0.25)
    >>> small[0]
    Conv2d(1, 6, kernel_size=(3, 3), stride=(1, 1))
    >>> small[4]
    Linear(in_features=216, out_features=10, bias=True)
    """
    _check_weight("alpha1", alpha1)
    coefficients = nonnegative_coefficients if nonnegative else reconstruction_coefficients
    return compress_by(
        model,
        lambda t, basis, prior: coefficients(t, basis, alpha1, prior),
        example_inputs,
        pruning_ratio=pruning_ratio,
        weight_bits=weight_bits,
        importance=importance,
        alpha2=alpha2,
        inplace=inplace,
        remove=remove,
    )


# ---- the mathematics


def channel_rows(layers: Sequence[tuple[Tensor, Tensor, Tensor]], alpha2: float = 0.008) -> Tensor:
    """The t_j of all channels: (2), and (7) for each depthwise layer that follows.

    Parameters
    ----------
    layers : sequence of (W, scale, b)
        W (N, C, K, K), and (N, 1, K, K) from the second on; scale = gamma / sigma and b as in (1), both (N,).
    alpha2 : float >= 0, default 0.008

    Returns
    -------
    tensor of shape (N, d)
        d = C K^2 + 1 for one layer; each depthwise layer makes it K^2 d + 1.

    Examples
    --------
    >>> W, scale, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0]), torch.tensor([5.0, 6.0])
    >>> channel_rows([(W, scale, b)], alpha2=1.0)
    tensor([[ 1.,  2.,  5.],
            [30., 40.,  6.]])
    """
    t = layers[0][0].new_ones(len(layers[0][0]), 1)
    for W, scale, b in layers:
        G = scale[:, None] * W.flatten(1)  # (N, C K^2)
        t = torch.cat([(G[:, :, None] * t[:, None]).flatten(1), math.sqrt(alpha2) * b[:, None]], 1)
    return t


def reconstruction_coefficients(
    t_damaged: Tensor, t_basis: Tensor, alpha1: float, prior: Tensor | None = None
) -> Tensor:
    """S of (4), or with a prior of (6): each damaged row as a mixture of the basis rows. R^2 (d + M) + R^3 / 3 flops.

    Parameters
    ----------
    t_damaged : tensor of shape (M, d), float
    t_basis : tensor of shape (R, d)
        The rows of A.
    alpha1 : float >= 0
        0: the least-norm solution of least squares.
    prior : tensor of shape (M, R), optional
        p_j, towards which the ridge pulls; zero by default.

    Returns
    -------
    tensor of shape (M, R)

    Raises
    ------
    ValueError
        If shapes do not fit, or alpha1 is not a finite number >= 0.

    Examples
    --------
    >>> A = torch.eye(2)
    >>> reconstruction_coefficients(torch.tensor([[4.0, 8.0]]), A, alpha1=3.0)
    tensor([[1., 2.]])
    """
    _check_rows(t_damaged, t_basis, alpha1)
    A, t = t_basis, t_damaged
    p = t.new_zeros(len(t), len(A)) if prior is None else prior
    if alpha1 == 0:
        return p + (t - p @ A) @ torch.linalg.pinv(A)
    H = A @ A.mT
    L = torch.linalg.cholesky(H + alpha1 * torch.eye(len(A), dtype=A.dtype, device=A.device))
    return p + torch.cholesky_solve(A @ t.mT - H @ p.mT, L).mT  # (6), and (4) for p = 0


def nonnegative_coefficients(
    t_damaged: Tensor, t_basis: Tensor, alpha1: float, prior: Tensor | None = None, *, steps: int = 5000
) -> Tensor:
    """S >= 0 that minimises ||t_j - A^T s_j||^2 + alpha1 ||s_j - p_j||^2, all rows at once. Ours.

    Accelerated projected gradient with restarts, in variables scaled so that the Hessian has a diagonal of ones, until
    the optimality conditions hold to 1e-9 of the largest right-hand side. M R^2 flops a step.

    Parameters
    ----------
    t_damaged, t_basis, alpha1
        As in `reconstruction_coefficients`.
    prior : tensor of shape (M, R), optional
        p_j, zero by default.
    steps : int, default 5000
        At most.

    Examples
    --------
    >>> nonnegative_coefficients(torch.tensor([[3.0, -6.0]]), torch.eye(2), alpha1=0.5)
    tensor([[2., 0.]])
    """
    _check_rows(t_damaged, t_basis, alpha1)
    A = t_basis
    H = A @ A.mT + alpha1 * torch.eye(len(A), dtype=A.dtype, device=A.device)
    B = t_damaged @ A.mT + (0 if prior is None else alpha1 * prior)  # (M, R)
    d = H.diagonal().clamp(min=torch.finfo(H.dtype).tiny).rsqrt()
    H, B = d[:, None] * H * d, B * d
    step = 1 / torch.linalg.matrix_norm(H, 2)
    tolerance = max(1e-9, 10 * torch.finfo(H.dtype).eps) * B.abs().max()
    s = u = torch.zeros_like(B)
    momentum = 1.0
    for number in range(steps):
        new = (u - step * (u @ H - B)).clamp(min=0)
        if ((new - u) * (new - s)).sum() < 0:  # the step turned back: forget the momentum
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        s, u, momentum = new, new + (momentum - 1) / following * (new - s), following
        if number % 20 == 0:
            gradient = s @ H - B
            if torch.where(s > 0, gradient.abs(), -gradient).max() <= tolerance:
                break
    return s * d


def quantize(W: Tensor, bits: int) -> Tensor:
    """Uniform symmetric rounding of a whole tensor: integers from -q to q, q = 2^(bits-1) - 1, times ``max |W|`` / q.

    Parameters
    ----------
    W : tensor, float
    bits : int from 2 to 8

    Returns
    -------
    tensor like W, not of integers

    Examples
    --------
    >>> quantize(torch.tensor([-3.0, 0.4, 0.6, 1.4]), bits=3)
    tensor([-3.,  0.,  1.,  1.])
    """
    check_whole("bits", bits, 2, 8)
    q = 2 ** (bits - 1) - 1
    scale = W.abs().max() / q
    return torch.where(scale > 0, (W / scale).round().clamp(-q, q) * scale, W)


# ---- the surgery


def compress_by(
    model: nn.Module,
    solve: Solve,
    example_inputs: Any = None,
    *,
    pruning_ratio: float = 0.3,
    weight_bits: int | None = None,
    importance: str = "l2",
    alpha2: float = 0.008,
    inplace: bool = False,
    remove: bool = True,
) -> nn.Module:
    """`udfc_compress` with coefficients of your own: other repairs of the same damage, such as none.

    Parameters
    ----------
    solve : callable
        ``solve(t, basis, prior) -> S`` of one layer: t (M, d) of the damaged channels (the pruned ones, or with
        `weight_bits` all), basis (R, d) of the kept, rounded ones, prior (M, R) with a one where a channel is its own
        basis row. S (M, R) is what (5) folds; to return ``prior`` is plain pruning and rounding.
    model, example_inputs, pruning_ratio, weight_bits, importance, alpha2, inplace, remove
        As in `udfc_compress`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> pruned = compress_by(net, lambda t, basis, prior: prior, pruning_ratio=0.5)
    >>> pruned[0].out_channels, pruned[2].in_channels
    (2, 2)
    """
    ratio = check_ratio("pruning_ratio", pruning_ratio)
    if weight_bits is not None:
        check_whole("weight_bits", weight_bits, 2, 8)
    if importance not in ("l2", "l1", "group"):
        raise ValueError(f'importance must be "l2", "l1" or "group", got {importance!r}')
    _check_weight("alpha2", alpha2)
    check_model(model)
    found, refused, order = analyse(model, example_inputs)
    if not found:
        name, reason = next(iter(refused.items()), ("", "there is no convolution"))
        raise ValueError(f"model has no layer that udfc can prune and repair{': ' if name else ''}{name}: {reason}")
    with torch.no_grad():
        new, cuts = _compressed(model, found, order, solve, ratio, weight_bits, importance, alpha2)
        model = model if inplace else copy.deepcopy(model)
        _put(model, new, cuts if remove else {})
    return model


def _compressed(
    model: nn.Module,
    found: Sequence[Chain],
    order: Sequence[str],
    solve: Solve,
    ratio: float,
    bits: int | None,
    importance: str,
    alpha2: float,
) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, Tensor]]]]:
    """New tensors by name, full in shape with zeros for what is pruned, and which (dimension, indices) of them stay."""
    modules = dict(model.named_modules())
    heads = {chain.layers[0][0]: chain for chain in found}
    followers = {name for chain in found for name, _ in chain.layers[1:]}
    new: dict[str, Tensor] = {}
    cuts: dict[str, list[tuple[int, Tensor]]] = {}

    def original(name: str) -> Tensor:
        return _wide(modules[name].weight)

    def current(name: str) -> Tensor:
        return new.get(f"{name}.weight", original(name))

    for name in order:
        if name in followers:
            continue
        if name not in heads:
            if bits is not None:
                new[f"{name}.weight"] = quantize(current(name), bits)
            continue
        chain = heads[name]
        names = [layer for layer, _ in chain.layers]
        affine = [_scale_and_offset(modules[layer], modules[norm] if norm else None) for layer, norm in chain.layers]
        N = len(affine[0][0])

        if importance == "group":
            parts = [original(layer).flatten(1) for layer in names]
            parts += [original(layer).unflatten(1, (N, -1)).transpose(0, 1).flatten(1) for layer in chain.consumers]
            size = torch.cat(parts, 1).norm(2, 1)  # (N,)
        else:
            size = torch.stack([original(layer).flatten(1).norm(int(importance[1]), 1) for layer in names]).prod(0)
        pruned = size.argsort(stable=True)[: min(N - 1, math.floor(ratio * N + 1e-9))]
        if bits is None and not len(pruned):
            continue
        keep = torch.ones(N, dtype=torch.bool, device=size.device).index_fill_(0, pruned, False)
        kept = keep.nonzero()[:, 0]

        whole = [original(layer) if bits is None else current(layer) for layer in names]
        damaged = [current(layer) * keep[:, None, None, None] for layer in names]
        if bits is not None:
            damaged = [quantize(W, bits) for W in damaged]
        hurt = pruned if bits is None else torch.arange(N, device=size.device)
        t = channel_rows([(W, *ab) for W, ab in zip(whole, affine, strict=True)], alpha2)[hurt]  # (M, d)
        basis = whole if bits is None else damaged
        A = channel_rows([(W, *ab) for W, ab in zip(basis, affine, strict=True)], alpha2)[kept]  # (R, d)
        S = torch.diag(keep.to(t.dtype))  # (N, N), e_j for what was kept and not rounded
        S[hurt[:, None], kept] = solve(t, A, S[hurt[:, None], kept])

        for (layer, norm), W in zip(chain.layers, damaged, strict=True):
            new[f"{layer}.weight"] = W
            tensors = [f"{layer}.bias", *(f"{norm}.{part}" for part in _PER_CHANNEL if norm)]
            for tensor in tensors:
                old = getattr(modules[tensor.rpartition(".")[0]], tensor.rpartition(".")[2])
                if old is not None:
                    new[tensor] = torch.where(keep, _wide(old), float(tensor.endswith("running_var")))
                    cuts[tensor] = [(0, kept)]
            cuts.setdefault(f"{layer}.weight", []).append((0, kept))
        for consumer in chain.consumers:
            V = current(consumer)
            V_hat = torch.einsum("on...,nk->ok...", V.unflatten(1, (N, -1)), S)  # (5), for each place in a flat map
            new[f"{consumer}.weight"] = V_hat.flatten(1, 2)
            places = V.shape[1] // N
            columns = (kept[:, None] * places + torch.arange(places, device=kept.device)).flatten()
            cuts.setdefault(f"{consumer}.weight", []).append((1, columns))
    return new, cuts


_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def _scale_and_offset(conv: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """gamma / sigma and b of (1), (N,) each."""
    W: Any = conv.weight
    bias: Any = W.new_zeros(len(W)) if conv.bias is None else conv.bias
    if norm is None:
        return _wide(torch.ones_like(bias)), _wide(bias)
    var, mu, eps = _wide(norm.running_var), _wide(norm.running_mean), norm.eps  # type: ignore[arg-type]
    gamma = torch.ones_like(var) if norm.weight is None else _wide(norm.weight)  # type: ignore[arg-type]
    beta = torch.zeros_like(var) if norm.bias is None else _wide(norm.bias)  # type: ignore[arg-type]
    scale = gamma / torch.sqrt(var + eps)  # type: ignore[operator]
    return scale, beta + scale * (_wide(bias) - mu)


def _put(model: nn.Module, new: dict[str, Tensor], cuts: dict[str, list[tuple[int, Tensor]]]) -> None:
    for name, tensor in new.items():
        for dimension, indices in cuts.get(name, ()):
            tensor = tensor.index_select(dimension, indices)
        new[name] = tensor
    resize_(model, {name: tuple(tensor.shape) for name, tensor in new.items()})
    own = model.state_dict(keep_vars=True)
    for name, tensor in new.items():
        own[name].copy_(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


# ---- checks


def _check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0, got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def _check_rows(t_damaged: Tensor, t_basis: Tensor, alpha1: float) -> None:
    _check_weight("alpha1", alpha1)
    if t_damaged.ndim != 2 or t_basis.ndim != 2 or t_damaged.shape[1] != t_basis.shape[1]:
        shapes = f"{tuple(t_damaged.shape)} and {tuple(t_basis.shape)}"
        raise ValueError(f"t_damaged and t_basis must be (M, d) and (R, d), got {shapes}")
