"""The functions a program may call, as released with the paper (google/automl, ``hero``; not its code).

A value is a number, one number per leaf, or tensors: a list with a leaf for every parameter, or one bare leaf. Leaves
are numpy arrays or torch tensors, and each function goes by what it is given. Numbers known before a step (constants,
`lr`, and what is computed from them) are Python floats, so that 0.999 is not rounded to a parameter's bfloat16.

Of the released table

* ``a / b`` is ``a / (b + 1e-8)``: AdamW's program needs no eps, and 0 / 0 is 0; ``reciprocal`` is plain;
* ``sqrt``, ``log``, ``log2``, ``log10`` take ``|x|``, and ``log1p`` is ``log|1 + x|``;
* ``dot``, ``cosine_sim``, ``global_norm`` and ``clip_by_global_norm`` act on all leaves at once, ``norm`` on each;
* ``cbrt`` is mended (the released entry returns the function, not the root), ``invert`` is left out (undefined for
  floats: 44 of the 45 remain), ``interpolate`` is `interp`, with tensors as x and y and a number as weight (the
  released check asks that of x instead), and ``power``, ``max``, ``min`` broadcast like ``+``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBER, PER_LEAF, TENSOR = range(3)  # the abstract values: each broadcasts to the ones after it
EPS = 1e-8


@dataclass(frozen=True)
class Function:
    """What a program can call.

    Attributes
    ----------
    arity : int
    run : callable
        On numbers, arrays, tensors and lists of leaves.
    result : callable
        Abstract execution: the kind of the result for the kinds of the arguments, None if it is not defined for them.
    elementwise : bool
        Whether every element of the result needs only the elements at its own place.
    """

    arity: int
    run: Callable[..., Any]
    result: Callable[..., int | None]
    elementwise: bool = True


def _number(x: Any) -> Any:
    return float(x) if isinstance(x, float) else x  # np.float64 times a tensor would be an array


def _unary(f: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda x: f(torch, x) if isinstance(x, Tensor) else _number(f(np, x))


def _binary(on_tensors: Callable[[Any, Any], Any], on_arrays: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def run(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return on_tensors(a, b)
        return _number(on_arrays(a, b))

    return run


def _of_tensors(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """For functions of torch that take no floats."""

    def run(a: Any, b: Any) -> Tensor:
        like = a if isinstance(a, Tensor) else b
        return f(*(x if isinstance(x, Tensor) else like.new_full((), x) for x in (a, b)))

    return run


_add, _sub, _mul = (
    _binary(getattr(operator, f), getattr(np, n)) for f, n in (("add", "add"), ("sub", "subtract"), ("mul", "multiply"))
)
_divide = _binary(operator.truediv, np.true_divide)
_min = _binary(_of_tensors(torch.minimum), np.minimum)
_sqrt = _unary(lambda xp, x: xp.sqrt(abs(x)))


def _interp(x: Any, y: Any, a: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and isinstance(a, float):
        return torch.lerp(x, y, a)
    return _add(_mul(_sub(1.0, a), x), _mul(a, y))


def _sign(xp: Any, x: Any) -> Any:
    return xp.sign(x) if xp is np else torch.where(x.isnan(), x, x.sign())  # torch's own hides NaN


# ---- over leaves


def _leaves(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _per_leaf(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        sizes = [len(a) for a in args if isinstance(a, list)]
        if not sizes:
            return f(*args)
        return [f(*(a[i] if isinstance(a, list) else a for a in args)) for i in range(sizes[0])]

    return run


def _leaf_dot(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return _mul(a, b) if isinstance(a, float) else np.vdot(a, b)


def _dot(a: Any, b: Any) -> Any:
    total, *more = [_leaf_dot(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True)]
    for x in more:
        total = _add(total, x)
    return total


def _global_norm(x: Any) -> Any:
    return _sqrt(_dot(x, x))


def _cosine_sim(a: Any, b: Any) -> Any:
    return _divide(_dot(a, b), _mul(_global_norm(a), _global_norm(b)))


def _clip_by_global_norm(x: Any, c: Any) -> Any:
    return _per_leaf(_mul)(_min(1.0, _divide(c, _global_norm(x))), x)


# ---- the table

_SAME_NAME = (
    *("abs", "cos", "sin", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arcsinh", "arccosh"),
    *("arctanh", "exp", "exp2", "expm1", "square", "reciprocal", "negative"),
)
_UNARY: dict[str, Callable[[Any, Any], Any]] = {
    name: lambda xp, x, name=name: getattr(xp, name)(x) for name in _SAME_NAME
} | {
    "exp10": lambda xp, x: xp.exp2(math.log2(10) * x),
    "log": lambda xp, x: xp.log(abs(x)),
    "log10": lambda xp, x: xp.log10(abs(x)),
    "log2": lambda xp, x: xp.log2(abs(x)),
    "log1p": lambda xp, x: xp.log(abs(1 + x)),
    "cube": lambda xp, x: xp.square(x) * x,
    "sqrt": lambda xp, x: xp.sqrt(abs(x)),
    "cbrt": lambda xp, x: xp.sign(x) * abs(x) ** (1 / 3),
    "sign": _sign,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": _add,
    "-": _sub,
    "*": _mul,
    "/": lambda a, b: _divide(a, _add(b, EPS)),
    "max": _binary(_of_tensors(torch.maximum), np.maximum),
    "min": _min,
    "power": _binary(operator.pow, np.power),
}
_CONSTANTS = {"get_pi": math.pi, "get_e": math.e, "get_eps": EPS}


def _same(a: int, b: int) -> int | None:
    return NUMBER if a == b else None


FUNCTIONS: dict[str, Function] = {
    **{name: Function(2, _per_leaf(f), max) for name, f in _BINARY.items()},
    **{name: Function(1, _per_leaf(_unary(f)), lambda a: a) for name, f in _UNARY.items()},
    **{name: Function(0, lambda value=value: value, lambda: NUMBER) for name, value in _CONSTANTS.items()},
    "interp": Function(3, _per_leaf(_interp), lambda x, y, a: max(x, y) if a == NUMBER else None),
    "norm": Function(1, _per_leaf(_global_norm), lambda a: min(a, PER_LEAF), elementwise=False),
    "global_norm": Function(1, _global_norm, lambda a: NUMBER, elementwise=False),
    "dot": Function(2, _dot, _same, elementwise=False),
    "cosine_sim": Function(2, _cosine_sim, _same, elementwise=False),
    "clip_by_global_norm": Function(
        2, _clip_by_global_norm, lambda x, c: x if c == NUMBER else None, elementwise=False
    ),
}
