r"""TrAct: Making First-layer Pre-Activations Trainable.

Petersen, Borgelt, Ermon. NeurIPS 2024, arXiv 2410.23970.

Idea
----
The gradient of a first layer's weights is the gradient of its outputs times the inputs, so that bright, high-contrast
images move the weights more than dark ones. TrAct gives the optimizer the weight change that comes nearest to a
gradient step of the outputs (pre-activations) themselves; nothing else of model, data or optimizer changes.

Equations
---------
z = x W^T + bias, with x of shape (b, n), W (o, n), and G = dL/dz (b, o) of the mean loss, as autograd delivers it. The
outputs are to take the step z - eta b G (b undoes the mean); the weight change that does it best, ridge-regularised::

    D* = argmin_D  (1/b) ||x D^T - b G||_F^2 + lambda ||D||_F^2                                            (1)

    g_W = D* = G^T x (x^T x / b + lambda I_n)^{-1}        primal, b >= n      (backpropagation: g_W = G^T x)  (2)
             = G^T (x x^T / b + lambda I_b)^{-1} x        dual, b < n, the same number                        (3)

g_W is what the optimizer gets as the gradient of W. The gradients of bias and input stay sum_b G and G W. A convolution
is the same on its patches: x holds one row for each image and each place of the output, so b = batch x places, and
n = C kh kw. Of `groups` > 1 each is a layer of its own, with its own matrix. Leading dimensions of a linear layer's
input (the tokens of a ViT) all count into b. lambda = 0.1, for inputs standardised to unit variance, is the only
hyper-parameter (official default).

What to expect
--------------
* First layers on standardised, continuous input (pixels, patches). Inputs of 0 to 255 make lambda nothing beside x^T x;
  one-hot or sparse input makes x^T x / b so small that it is lambda that divides, up to 1 / lambda of the gradient.
* g_W is computed from the batch at hand: with gradient accumulation from every micro-batch, under DDP or FSDP on every
  process from its share, and then summed or averaged, which is not the g_W of the whole batch. It is linear in G:
  gradient scaling works, and a loss that is a sum counts b times as much as its mean, as it does without TrAct.
* ``lambda g_W`` tends to the plain gradient as lambda grows; the learning rate has to grow along.

Code and paper
--------------
Read: the official repository Felix-Petersen/tract (MIT), the abstract and the card of this project, not the paper's
text; (1) was derived from the code's (2).

* The official wrapper drops groups, dilation and padding_mode; here all are honoured, and string padding too.
* The official option ``cholesky_inverse`` inverts the wrong matrix (torch's function of that name takes the factor).
  Here: a Cholesky solve. For b < n the official code inverts by Woodbury, which subtracts nearly equal numbers; in
  float32 (3) is about 50 times nearer to the exact value (Fashion-MNIST pixels, b = 64, lambda = 0.1).
* lambda is raised to 4 eps tr(x^T x / b) where it is less, so that rounding of x^T x cannot make the matrix indefinite
  (ours; at unit variance and lambda = 0.1 in float32 that takes n > 200,000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, reduce
from numbers import Real
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

__all__ = [
    "TrActConv2d",
    "TrActLinear",
    "patch_moment",
    "ridge_solve",
    "tract_",
    "tract_conv2d",
    "tract_linear",
    "tract_weight_gradient",
    "untract",
]

BLOCK = 8 * 2**20  # bytes of patches held at a time
OTHER_FIRST_LAYERS = (_ConvNd, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.Bilinear, nn.MultiheadAttention)

Module = TypeVar("Module", bound=nn.Module)
Pair = int | tuple[int, int]


# ---- the mathematics


def tract_weight_gradient(x: Tensor, G: Tensor, lambda_: float = 0.1) -> Tensor:
    """The weight change that moves ``x W^T`` nearest to ``b G``: equation (2) if b >= n, else (3).

    O(b n min(b, n) + min(b, n)^3) flops, and a matrix of min(b, n)^2.

    Parameters
    ----------
    x : tensor of shape (..., b, n), real
        Inputs. Leading dimensions, if any, are independent layers (the groups of a convolution).
    G : tensor of shape (..., b, o)
        Gradient of the mean loss at the outputs.
    lambda_ : float > 0, default 0.1
        The official default.

    Returns
    -------
    tensor of shape (..., o, n), of the wider dtype of x and G, at least float32
        Descent is ``W - lr * g``. NaN or infinity in x makes all of it not finite, NaN in a column of G its row.

    Raises
    ------
    TypeError
        If x is complex, or ``lambda_`` is no number.
    ValueError
        If shapes do not fit, or ``lambda_`` is not > 0.

    Examples
    --------
    >>> x, G = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [1.0]])
    >>> G.T @ x  # backpropagation: the bright pixel gets more
    tensor([[1., 2.]])
    >>> tract_weight_gradient(x, G, lambda_=0.5)  # x^T x / b = diag(0.5, 2)
    tensor([[1.0000, 0.8000]])
    """
    _check_lambda(lambda_)
    _check_real(x, "x")
    if x.ndim < 2 or G.ndim != x.ndim or x.shape[:-1] != G.shape[:-1]:
        raise ValueError(f"x and G must be (..., b, n) and (..., b, o), got {tuple(x.shape)} and {tuple(G.shape)}")
    x, G = x.to(_working_dtype(x, G)), G.to(_working_dtype(x, G))
    with _autocast_off(x):
        b, n = x.shape[-2:]
        if b >= n:
            return ridge_solve(x.mT @ x / b, x.mT @ G, lambda_).mT  # (2)
        return ridge_solve(x @ x.mT / max(b, 1), G, lambda_).mT @ x  # (3); no rows: zeros


def ridge_solve(S: Tensor, B: Tensor, lambda_: float) -> Tensor:
    """``(S + lambda I)^{-1} B`` by Cholesky, without a look at the values (no wait for the GPU).

    Parameters
    ----------
    S : tensor of shape (..., n, n), symmetric, positive semi-definite
    B : tensor of shape (..., n, m)
    lambda_ : float > 0
        Raised to 4 eps tr(S) where less. NaN in S makes all of the answer NaN.

    Examples
    --------
    >>> ridge_solve(torch.tensor([[3.0]]), torch.tensor([[8.0]]), lambda_=1.0)
    tensor([[2.]])
    """
    _check_lambda(lambda_)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = (4 * torch.finfo(S.dtype).eps * trace).clamp(min=float(lambda_))  # NaN stays NaN
    L, _ = torch.linalg.cholesky_ex(S + ridge * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device))
    return torch.cholesky_solve(B, L)


def patch_moment(
    x: Tensor, kernel_size: Pair, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> Tensor:
    """Uncentred second moment ``a^T a / b`` of the patches `a` that a convolution sees, never holding all of them.

    Memory beside the result: 8 MB of patches at a time, or those of one row of places, if they are more.

    Parameters
    ----------
    x : tensor of shape (B, C, H, W), real
    kernel_size, stride, padding, dilation : int or pair of int
    groups : int, default 1
        Divides C.

    Returns
    -------
    tensor of shape (groups, n, n), n = C / groups * kh * kw in the order of ``weight.flatten(1)``
        At least float32. The mean is over all B x Ho x Wo patches, zeros of the padding included.

    Examples
    --------
    >>> patch_moment(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 2))  # patches (1, 2) and (2, 3)
    tensor([[[2.5000, 4.0000],
             [4.0000, 6.5000]]])
    """
    _check_real(x, "x")
    geometry = (_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), groups)
    _, G, C, Ho, Wo, kh, kw = _windows(x[:1], *geometry).shape
    n, b, dtype = C * kh * kw, len(x) * Ho * Wo, _working_dtype(x)
    rows = max(1, BLOCK // (dtype.itemsize * max(1, G * n * Wo)))  # of Wo places
    S = torch.zeros(G, n, n, dtype=dtype, device=x.device)
    with _autocast_off(x):
        for images in x.split(max(1, rows // max(1, Ho))):
            for part in _windows(images, *geometry).split(min(rows, max(1, Ho)), dim=3):
                a = _patches(part).to(dtype)  # (groups, n, patches)
                S = torch.baddbmm(S, a, a.mT)
                del a  # before the next
    return S / max(b, 1)


# ---- the layers as functions


def tract_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, lambda_: float = 0.1) -> Tensor:
    """`torch.nn.functional.linear` with TrAct's gradient for `weight`.

    Where no gradient of `weight` is wanted, it is torch's function itself. See `TrActLinear` for what is refused.

    Examples
    --------
    >>> W = torch.zeros(1, 2, requires_grad=True)
    >>> tract_linear(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), W, lambda_=0.5).sum().backward()
    >>> W.grad
    tensor([[1.0000, 0.8000]])
    """
    _check_lambda(lambda_)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(input, weight, bias)
    _check_real(weight, "weight")
    return _Linear.apply(input, weight, bias, lambda_)


def tract_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    lambda_: float = 0.1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with TrAct's gradient for `weight`; see `tract_linear`.

    Examples
    --------
    >>> W = torch.zeros(1, 1, 1, 1, requires_grad=True)
    >>> tract_conv2d(torch.tensor([[[[1.0, 3.0]]]]), W, lambda_=1.0).sum().backward()
    >>> W.grad  # 4 / (mean of 1 and 9, + 1)
    tensor([[[[0.6667]]]])
    """
    _check_lambda(lambda_)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    _check_real(weight, "weight")
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))  # an odd one goes right and below, as in torch
        padding = (total[0] // 2, total[1] // 2)
    elif padding == "valid":
        padding = 0
    elif isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
    images = input if input.ndim == 4 else input.unsqueeze(0)  # (C, H, W)
    z = _Conv2d.apply(images, weight, bias, lambda_, stride, _pair(padding), dilation, groups)
    return z if input.ndim == 4 else z.squeeze(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, lambda_: float) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.lambda_ = lambda_
        return F.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        grad_x = grad_W = grad_bias = None
        if ctx.needs_input_grad[0]:
            with _autocast_off(x):
                grad_x = (G @ W.to(G.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = tract_weight_gradient(_rows(x), _rows(G), ctx.lambda_).to(W.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _rows(G).sum(0)
        return grad_x, grad_W, grad_bias, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, lambda_: float, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.lambda_, ctx.geometry = lambda_, geometry
        return F.conv2d(x, W, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        need_x, need_W, need_bias = ctx.needs_input_grad[:3]
        b, n = len(G) * G.shape[2] * G.shape[3], W[0].numel()
        primal = b >= n
        mask = [need_x, need_W and primal, need_bias]
        operands = (G, x.to(G.dtype), W.to(G.dtype), [len(W)])  # under autocast, z and G are of its dtype
        grad_x, grad_W, grad_bias = torch.ops.aten.convolution_backward(
            *operands, stride, padding, dilation, False, [0, 0], groups, mask
        )
        if need_W and primal:
            S = patch_moment(x, W.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
            plain = grad_W.reshape(groups, -1, n).to(S.dtype)  # G^T x of each group: (groups, o / groups, n)
            grad_W = ridge_solve(S, plain.mT, ctx.lambda_).mT
        elif need_W:
            a = _patches(_windows(x, W.shape[2:], stride, padding, dilation, groups))  # (groups, n, b)
            rows = G.unflatten(1, (groups, len(W) // groups)).permute(1, 0, 3, 4, 2).flatten(1, 3)
            grad_W = tract_weight_gradient(a.mT, rows, ctx.lambda_)  # (groups, o / groups, n)
        grad_x = grad_x.to(x.dtype) if need_x else None
        grad_W = grad_W.reshape(W.shape).to(W.dtype) if need_W else None
        return grad_x, grad_W, grad_bias, None, None, None, None, None


# ---- the layers as modules


class _TrAct(nn.Module):
    """What the layers share: `lambda_`."""

    weight: Tensor
    lambda_: float

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        _check_lambda(lambda_)
        super().__init__(*args, **kwargs)
        _check_real(self.weight, "weight")
        self.lambda_ = lambda_

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


class TrActLinear(_TrAct, nn.Linear):
    """`torch.nn.Linear` whose weight gets TrAct's gradient.

    Same parameters, state_dict, initial weights and outputs as the plain layer, bit for bit. All leading dimensions of
    the input are rows. In half and bfloat16, and under autocast, equations (2) and (3) are computed in float32. Goes
    through `torch.compile` in one graph. Gradients cannot be differentiated again (``create_graph=True``, as gradient
    penalties and MAML do) and `torch.func` cannot transform it while its weight needs a gradient: RuntimeError.

    Parameters
    ----------
    *args, **kwargs
        As `torch.nn.Linear` takes them. Complex dtypes are refused (TypeError).
    lambda_ : float > 0, default 0.1
        The official default. May be set later.

    Examples
    --------
    >>> layer = TrActLinear(784, 100, lambda_=0.1)
    >>> layer
    TrActLinear(in_features=784, out_features=100, bias=True, lambda_=0.1)
    """

    def forward(self, input: Tensor) -> Tensor:
        return tract_linear(input, self.weight, self.bias, lambda_=self.lambda_)


class TrActConv2d(_TrAct, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight gets TrAct's gradient; see `TrActLinear`.

    Stride, string padding, dilation, groups and every padding_mode are honoured: the patches are those that the
    convolution sees. Of the patches at most 8 MB are held at a time (see `patch_moment`).

    Parameters
    ----------
    *args, **kwargs
        As `torch.nn.Conv2d` takes them. Complex dtypes are refused (TypeError).
    lambda_ : float > 0, default 0.1
        The official default. May be set later.

    Examples
    --------
    >>> TrActConv2d(3, 8, 3, stride=2)
    TrActConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), lambda_=0.1)
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = cast(Any, (self.stride, self.padding, self.dilation))
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return tract_conv2d(input, weight, bias, stride, padding, dilation, self.groups, lambda_=self.lambda_)


def tract_(module: Module, lambda_: float = 0.1, name: str | None = None) -> Module:
    """Let the first layer of a model, or one layer, train by TrAct; in place.

    The layer stays the object it is and only changes its class, to `TrActLinear` or `TrActConv2d`: its parameters, its
    hooks, the optimizers and wrappers built over it and all places where it is used stay as they are; no random number
    is drawn. A layer of a class derived from Linear or Conv2d (the padding convolution of EfficientNet) keeps its own
    `forward`, within which the call of `linear` or `conv2d` with its weight is replaced; `torch.compile` breaks its
    graph there, and such a model cannot be pickled whole (its state_dict can be saved as ever).

    Parameters
    ----------
    module : nn.Module
        A model, or the layer itself.
    lambda_ : float > 0, default 0.1
        The official default, for inputs of about unit variance.
    name : str, optional
        Of the layer, as in ``model.named_modules()``. By default the first Linear or Conv2d in the order of definition.
        If the model calls its layers in another order, give the name.

    Returns
    -------
    nn.Module
        The same object.

    Raises
    ------
    ValueError
        If ``lambda_`` is not a finite number > 0; there is no Linear or Conv2d; another kind of layer comes first
        (Conv1d, Embedding, ...) and no name is given; there is no layer `name`; or the layer trains by TrAct already,
        has a parametrization (register it afterwards), or is not initialised yet. The model is then as it was.
    TypeError
        If the layer is neither a Linear nor a Conv2d, is one that another module reads without calling it, or has
        complex weights.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> tract_(model)[0]
    TrActConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), lambda_=0.1)
    >>> untract(model)[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    _check_lambda(lambda_)
    name, layer = _find(module, name)
    what = f"layer {name!r}" if name else "the layer"
    kind = type(layer)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"{what} must be a Linear or Conv2d, got {kind.__name__}")
    if isinstance(layer, _TrAct):
        raise ValueError(f"{what} trains by TrAct already: set its lambda_, or untract() it first")
    if is_parametrized(layer):
        raise ValueError(f"{what} has a parametrization: call tract_ first and register it afterwards")
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(f"{what} is a {kind.__name__} without weights yet: give the model one batch first")
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise TypeError(f"{what} is read by MultiheadAttention and never called: name another layer")
    _check_real(layer.weight, f"the weight of {what}")
    known: dict[Any, Any] = {nn.Linear: TrActLinear, nn.Conv2d: TrActConv2d}
    layer.__class__ = known.get(kind) or _own_forward(cast(Any, kind))
    cast(_TrAct, layer).lambda_ = lambda_
    return module


def untract(module: Module) -> Module:
    """Undo `tract_` in place: every TrAct layer in a model, or the layer itself, is a plain one again.

    Raises
    ------
    ValueError
        If there is none, or one has a parametrization (remove that first).
    """
    found: list[Any] = [layer for layer in module.modules() if isinstance(layer, _TrAct)]
    if not found:
        raise ValueError(f"{type(module).__name__} has no layer that trains by TrAct")
    if any(is_parametrized(layer) for layer in found):
        raise ValueError("a layer that trains by TrAct has a parametrization: remove it before untract")
    for layer in found:
        layer.__class__ = next(kind for kind in type(layer).__mro__ if not issubclass(kind, _TrAct))
        del layer.lambda_
    return module


# ---- helpers


def _find(module: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    layers = dict(module.named_modules())
    if name is not None:
        if name not in layers:
            known = [key for key, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)]
            raise ValueError(f"name must be that of a layer, such as {known[:5]}, got {name!r}")
        return name, layers[name]
    for key, layer in layers.items():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            return key, layer
        if isinstance(layer, OTHER_FIRST_LAYERS):
            raise ValueError(
                f"the first layer {key!r} is a {type(layer).__name__}, not a Linear or Conv2d: give the name of a layer"
            )
    raise ValueError(f"module must hold a Linear or Conv2d, got {type(module).__name__} without one")


@cache
def _own_forward(kind: Any) -> Any:
    return type(f"TrAct{kind.__name__}", (_OwnForward, kind), {})


class _OwnForward(_TrAct):
    """Before a class derived from Linear or Conv2d, whatever its forward does besides."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Replaced(self) as call:
            output = super().forward(*args, **kwargs)
        if not call.met:
            raise RuntimeError(
                f"the forward of {type(self).__name__[5:]} called neither linear nor conv2d with the layer's own "
                "weight: TrAct cannot train it"
            )
        return output


class _Replaced(TorchFunctionMode):
    """While it is entered, linear and conv2d with the weight of `layer` are TrAct's."""

    FUNCTIONS: ClassVar[dict[Any, Callable[..., Tensor]]] = {F.linear: tract_linear, F.conv2d: tract_conv2d}

    def __init__(self, layer: _TrAct) -> None:
        super().__init__()
        self.layer, self.met = layer, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FUNCTIONS and (args[1] if len(args) > 1 else kwargs.get("weight")) is self.layer.weight:
            self.met = True
            return self.FUNCTIONS[func](*args, **kwargs, lambda_=self.layer.lambda_)
        return func(*args, **kwargs)


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """What a convolution sees, as a view: (B, groups, C / groups, Ho, Wo, kh, kw)."""
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    v = x.unflatten(1, (groups, x.shape[1] // groups))
    for side in (0, 1):
        v = v.unfold(3 + side, dilation[side] * (kernel[side] - 1) + 1, stride[side])[..., :: dilation[side]]
    return v


def _patches(windows: Tensor) -> Tensor:
    """The same as matrices, one a group: (groups, n, b), rows in the order of ``weight.flatten(1)``."""
    return windows.permute(1, 2, 5, 6, 0, 3, 4).flatten(1, 3).flatten(2)


def _rows(x: Tensor) -> Tensor:
    return torch.atleast_2d(x).flatten(0, -2)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _check_lambda(lambda_: Any) -> None:
    if isinstance(lambda_, bool) or not isinstance(lambda_, Real):
        raise TypeError(f"lambda_ must be a number, got {lambda_!r}")
    if not 0 < float(lambda_) < math.inf:
        raise ValueError(f"lambda_ must be finite and > 0, got {lambda_!r}")


def _check_real(x: Tensor, name: str) -> None:
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}: the closed form is that of real numbers")
