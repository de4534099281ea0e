r"""The mathematics of `wide_deep`: activations as Hermite series, the kernels of their networks, and the limits.

Everything below takes an activation as its normalised Hermite coefficients a_0, a_1, ... and works on inner products
xi of unit vectors. Equations, symbols and sources stand in the docstring of `shoestring.classify.wide_deep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

ZERO = 1e-12  # a coefficient from quadrature below this is 0: whether A and A' vanish decides the regime
NEAR = 1e-6  # pairs closer than this (relative, squared) are computed again from differences
PAIRS = 2**20  # numbers in the largest temporary of that
CACHED = 2**14  # numbers worked on at a time
SERIES = 16  # terms of the Koenigs function's power series at 0

Signed = tuple[np.ndarray, np.ndarray]  # log |value| and sign


# ---- activations


def hermite_coefficients(phi: Callable[[Any], Any], degree: int = 100) -> np.ndarray:
    """Coefficients a_i = E[phi(z) He_i(z)] / sqrt(i!) of phi / sqrt(E phi^2), by quadrature.

    Composite Gauss-Legendre on panels of width 1/2, so that the kinks of the usual activations (0, +-1, +-3, 6) lie on
    panel edges and cost no accuracy. Coefficients below 1e-12 are set to 0, and zeros at the end dropped.

    Parameters
    ----------
    phi : callable
        Elementwise activation of torch tensors or NumPy arrays, continuous.
    degree : int, default=100
        The last i (ours). What phi holds beyond it is added to the last coefficient's square, so that f(1) = 1: for
        smooth activations that is nothing, for ReLU it is 1e-4.

    Returns
    -------
    ndarray of shape (<= degree + 1,), float64, with squares that sum to 1

    Raises
    ------
    TypeError, ValueError
        If phi is no callable, changes the shape, is not finite, or is constant.

    Examples
    --------
    >>> hermite_coefficients(lambda z: z**3 - 3 * z).round(10).tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    if not isinstance(degree, int | np.integer) or isinstance(degree, bool) or degree < 1:
        raise ValueError(f"degree must be an integer >= 1, got {degree!r}")
    z, weight, values, _ = _quadrature(phi)
    coefs = np.empty(degree + 1)
    for i, h in enumerate(_normalised_hermite(z, degree)):
        coefs[i] = np.sum(weight * values * h)
    coefs[np.abs(coefs) < ZERO] = 0.0
    beyond = 1.0 - np.sum(coefs**2)
    if beyond > ZERO:
        coefs[-1] = math.copysign(math.sqrt(coefs[-1] ** 2 + beyond), coefs[-1])
    coefs = np.trim_zeros(coefs, "b")
    return coefs / np.sqrt(np.sum(coefs**2))


def explicit_coefficients(dimension: int) -> np.ndarray:
    """The paper's activation whose infinitely deep network is consistent on the sphere S^d: alpha = d.

    a_1^2 = a_3^2 = 2^(-d/2), a_2^2 = 1 - 2^(1-d/2) for d >= 2. For d = 1 that a_2^2 would be negative, and the
    official code has a_1^2 = a_7^2 = 1/2 instead.

    Parameters
    ----------
    dimension : int
        d, that of the sphere: one less than the length of the vectors. 1 <= d <= 2000 (beyond, 2^(-d/2) underflows).

    Examples
    --------
    >>> (explicit_coefficients(4) ** 2).round(10).tolist()
    [0.0, 0.25, 0.5, 0.25]
    >>> (explicit_coefficients(1) ** 2).round(10).tolist()
    [0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    """
    d = dimension
    if not isinstance(d, int | np.integer) or isinstance(d, bool) or not 1 <= d <= 2000:
        raise ValueError(f"dimension must be an integer from 1 to 2000 (that of the sphere), got {dimension!r}")
    if d == 1:
        return np.sqrt([0, 0.5, 0, 0, 0, 0, 0, 0.5])
    return np.sqrt([0, 2 ** (-d / 2), 1 - 2 ** (1 - d / 2), 2 ** (-d / 2)])


def check_coefficients(coefs: Any, name: str = "coefs") -> np.ndarray:
    """The squares a_i^2 (degree + 1,), summing to 1, without zeros at the end; or a ValueError that says what is wrong.

    Examples
    --------
    >>> check_coefficients([0.0, 0.6, 0.8, 0.0]).round(10).tolist()
    [0.0, 0.36, 0.64]
    """
    try:
        a = np.asarray(coefs, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of numbers a_0, a_1, ..., got {coefs!r}") from None
    if a.ndim != 1 or not a.size or not np.isfinite(a).all():
        raise ValueError(f"{name} must be finite numbers a_0, a_1, ... of shape (degree + 1,), got {coefs!r}")
    a2 = np.trim_zeros(a**2, "b")
    if abs(a2.sum() - 1.0) > 1e-6:
        raise ValueError(f"{name} must have squares that sum to 1 (E phi^2 = 1), got a sum of {a2.sum():g}")
    if len(a2) < 2:
        raise ValueError(f"{name} must have a term beyond a_0: a constant activation has no kernel, got {coefs!r}")
    return a2 / a2.sum()


def dual_activation(xi: ArrayLike, coefs: ArrayLike) -> np.ndarray:
    """f(xi) = E[phi(u) phi(v)] = sum_i a_i^2 xi^i for standard normals u, v of correlation xi, elementwise.

    Examples
    --------
    >>> dual_activation([0.0, 0.5, 1.0], explicit_coefficients(2)).tolist()
    [0.0, 0.3125, 1.0]
    """
    return _horner(check_coefficients(coefs), _products(xi))


def dual_derivative(xi: ArrayLike, coefs: ArrayLike) -> np.ndarray:
    """f'(xi) = E[phi'(u) phi'(v)] = sum_i i a_i^2 xi^(i-1), elementwise."""
    a2 = check_coefficients(coefs)
    return _horner(np.arange(1, len(a2)) * a2[1:], _products(xi))


@dataclass(frozen=True)
class Taxonomy:
    """To which classifier the infinitely deep network of an activation belongs.

    Attributes
    ----------
    A, A_prime, B_prime : E phi, E phi' and E phi'^2 under N(0, 1), of the activation scaled to E phi^2 = 1
    alpha : exponent of the kernel's singularity ||x - x'||^-alpha; inf for 1-NN, 0 for majority vote, nan if linear
    regime : "1-NN", "singular kernel", "majority vote", or "linear" (phi(x) = x, which is not deep at all)
    """

    A: float
    A_prime: float
    B_prime: float
    alpha: float
    regime: str


def taxonomy(activation: Callable[[Any], Any] | ArrayLike) -> Taxonomy:
    """A, A', B', alpha and the regime of an activation, given as a callable or by its Hermite coefficients.

    Parameters
    ----------
    activation : callable or array-like of shape (degree + 1,)
        As in `hermite_coefficients`, of any scale; or coefficients a_i with squares that sum to 1.

    Raises
    ------
    ValueError
        If a callable jumps (then E phi'^2 is infinite and the taxonomy does not apply).

    Examples
    --------
    >>> taxonomy(explicit_coefficients(4))
    Taxonomy(A=0.0, A_prime=0.5, B_prime=2.0, alpha=4.0, regime='singular kernel')
    >>> import torch
    >>> taxonomy(torch.relu).regime
    'majority vote'
    >>> round(taxonomy(torch.erf).alpha, 3)
    0.888
    """
    if callable(activation):
        coefs = hermite_coefficients(activation)
        a2 = check_coefficients(coefs)
        B = _mean_squared_slope(activation)
        if B < np.arange(len(a2) - 1) @ a2[:-1] - 1e-8:  # without the last one, which holds all beyond
            raise ValueError("activation jumps: E phi'^2 is infinite, and so are its kernels at depth infinity")
    else:
        coefs = np.asarray(activation, dtype=np.float64)
        a2 = check_coefficients(activation, "activation")
        B = float(np.arange(len(a2)) @ a2)
    A, A_prime = float(coefs[0]), float(coefs[1]) if len(coefs) > 1 else 0.0
    if a2[0] > 0:
        return Taxonomy(A, A_prime, B, 0.0, "majority vote")
    if a2[1] == 0:
        return Taxonomy(A, A_prime, B, math.inf, "1-NN")
    if len(a2) == 2 or 1.0 - a2[1] < ZERO:
        return Taxonomy(A, A_prime, B, math.nan, "linear")
    return Taxonomy(A, A_prime, B, float(-2 * np.log(a2[1]) / np.log(B)), "singular kernel")


def _quadrature(phi: Callable[[Any], Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, float]]:
    """Nodes z, weights times the normal density, phi(z) / sqrt(E phi^2); and (nodes a panel, the scale)."""
    if not callable(phi):
        raise TypeError(f"activation must be callable, got {type(phi).__name__}")
    nodes, half = 32, 0.25
    x, w = np.polynomial.legendre.leggauss(nodes)
    centres = np.arange(-14 + half, 14, 2 * half)
    z = (centres[:, None] + half * x).ravel()
    weight = np.tile(half * w, len(centres)) * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    try:
        values = phi(z)
    except (TypeError, AttributeError):  # one that knows tensors only
        values = phi(torch.as_tensor(z))
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    values = np.asarray(values, dtype=np.float64)
    if values.shape != z.shape or not np.isfinite(values).all():
        raise ValueError(
            f"activation must map {z.shape} finite numbers to as many finite numbers, got shape {values.shape}"
            + ("" if values.shape != z.shape else " with NaN or infinity")
        )
    square = float(np.sum(weight * values**2))
    if not square > 0:
        raise ValueError(f"activation must not be zero, got E phi^2 = {square:g}")
    return z, weight, values / math.sqrt(square), (nodes, half)


def _mean_squared_slope(phi: Callable[[Any], Any]) -> float:
    """E phi'^2 of the scaled activation, from the polynomial through the nodes of each panel."""
    _, weight, values, (nodes, half) = _quadrature(phi)
    x, w = np.polynomial.legendre.leggauss(nodes)
    V = np.polynomial.legendre.legvander(x, nodes - 1)  # values of P_j; its inverse is known by orthogonality
    to_coefs = (V * w[:, None]).T * (np.arange(nodes) + 0.5)[:, None]
    slopes = np.polynomial.legendre.legder(to_coefs @ values.reshape(-1, nodes).T)  # (nodes - 1, panels)
    slope = (V[:, :-1] @ slopes).T.ravel() / half
    return float(np.sum(weight * slope**2))


def _normalised_hermite(z: np.ndarray, degree: int) -> Any:
    """He_i(z) / sqrt(i!) for i = 0 .. degree, one after the other."""
    before, h = np.zeros_like(z), np.ones_like(z)
    yield h
    for i in range(degree):
        before, h = h, (z * h - math.sqrt(i) * before) / math.sqrt(i + 1)
        yield h


def _horner(coefs: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sum_i coefs_i x^i."""
    y = np.full_like(x, coefs[-1])
    for c in coefs[-2::-1]:
        y *= x
        if c:
            y += c
    return y


def _products(xi: ArrayLike) -> np.ndarray:
    xi = np.asarray(xi, dtype=np.float64)
    if not (np.abs(xi) <= 1).all():  # NaN too
        raise ValueError("xi must hold inner products of unit vectors, all in [-1, 1]")
    return xi


# ---- the limit of infinite depth


def log_koenigs_kernel(xi: ArrayLike, coefs: ArrayLike) -> Signed:
    """log |h(xi)| and the sign of h(xi), where h = lim_L f^L / A'^(2L); both of the shape of xi.

    Needs A = 0 and 0 < A' < 1. h is +inf at xi = 1 (and -inf at -1 if f is odd).
    """
    a2 = check_coefficients(coefs)
    if a2[0] > 0 or a2[1] == 0 or len(a2) == 2:
        raise ValueError(
            "coefs must have a_0 = 0 and 0 < |a_1| < 1, or there is no Koenigs function; "
            f"got a_0^2 = {a2[0]:g}, a_1^2 = {a2[1]:g}"
        )
    return log_koenigs(_products(xi), a2, koenigs_series(a2))


def koenigs_kernel(xi: ArrayLike, coefs: ArrayLike) -> np.ndarray:
    """h(xi), the kernel of the infinitely deep network up to scale: h(f(xi)) = A'^2 h(xi), h'(0) = 1, elementwise.

    Near xi = 1 it grows as (1 - xi)^(-alpha/2), so like ||x - x'||^-alpha. Where it exceeds 1e308 it is inf; see
    `log_koenigs_kernel`.

    Parameters
    ----------
    xi : array-like, in [-1, 1]
    coefs : array-like of shape (degree + 1,), with a_0 = 0 and 0 < |a_1| < 1

    Examples
    --------
    >>> a = explicit_coefficients(3)
    >>> h = koenigs_kernel([0.9, dual_activation(0.9, a)], a)
    >>> round(float(h[1] / h[0]), 12), round(float(a[1] ** 2), 12)
    (0.353553390593, 0.353553390593)
    """
    log, sign = log_koenigs_kernel(xi, coefs)
    with np.errstate(over="ignore"):
        return sign * np.exp(log)


def koenigs_series(a2: np.ndarray) -> tuple[np.ndarray, float]:
    """Power series of h at 0, as h(S) = S sum_j c_j (S / A'^2)^j, and the |S| below which it is exact to rounding.

    From Schroeder's equation, coefficient by coefficient; the scaled variable keeps all of them moderate.
    """
    lam = a2[1]
    f = np.zeros(SERIES + 1)  # f(lam y) / lam^2 = y + ...
    n = min(len(a2), SERIES + 1)
    f[1:n] = a2[1:n] * lam ** (np.arange(1, n) - 2.0)
    f[1] = 1.0
    power, powers = np.zeros(SERIES + 1), []
    power[0] = 1.0
    for _ in range(SERIES):
        power = np.convolve(power, f)[: SERIES + 1]
        powers.append(power)
    c = np.zeros(SERIES + 1)
    c[1] = 1.0
    for n in range(2, SERIES + 1):
        c[n] = sum(c[j] * lam ** (j - 1) * powers[j - 1][n] for j in range(1, n)) / (1 - lam ** (n - 1))
    radius = min(0.1, (1e-17 / max(abs(c[-1]), 1e-17)) ** (1 / (SERIES - 1)))
    return c[1:], radius * lam


def log_koenigs(xi: np.ndarray, a2: np.ndarray, series: tuple[np.ndarray, float]) -> Signed:
    """`log_koenigs_kernel` without the checks, in pieces that stay in the processor's cache."""
    flat, log, sign = xi.ravel(), np.empty(xi.size), np.empty(xi.size)
    for start in range(0, xi.size, CACHED):
        part = slice(start, start + CACHED)
        log[part], sign[part] = _log_koenigs(flat[part], a2, *series)
    return log.reshape(xi.shape), sign.reshape(xi.shape)


def _log_koenigs(xi: np.ndarray, a2: np.ndarray, c: np.ndarray, small: float) -> Signed:
    """Of xi (n,). h(xi) = xi prod_l (1 + sum_i (a_i^2 / a_1^2) S_l^(i-1)), with S_l = f^l(xi).

    Neither S_l nor A'^(2L) has to be resolved: where S_l underflows its factor is 1. The factors of all S_l below
    `small` come at once from the power series c.
    """
    lam = a2[1]
    odd = not a2[::2].any()
    S = np.abs(xi) if odd else xi.copy()
    # Away from 1 first, the repelling fixed point; 1 - f(x) = (1 - x) G(x) loses no digit there
    steps, coincide = np.zeros_like(S), np.flatnonzero(S == 1.0)
    close = np.flatnonzero((S > 0.95) & (S < 1.0))
    if len(close):
        G = a2[::-1].cumsum()[::-1][1:]  # sums of a_i^2 over i > j: all positive
        t = 1.0 - S[close]
        inside = np.arange(len(t))
        while len(inside):
            t[inside] *= _horner(G, 1.0 - t[inside])
            steps[close[inside]] += 1
            inside = inside[t[inside] < 0.05]
        S[close] = 1.0 - t
    S[coincide] = 0.5  # anything: replaced below
    g = a2[1:] / lam
    flush, layer = max(1, int(600 / np.log(g.sum()))), 0  # layers until the product could overflow
    largest = np.abs(S).max(initial=0.0)  # falls as f(largest) does, for |f(x)| <= f(|x|)
    with np.errstate(divide="ignore", under="ignore"):
        log, product = np.log(np.abs(S)) - steps * np.log(lam), np.sign(S)
        while largest > small:
            factor = _horner(g, S)
            product *= factor
            S *= factor
            S *= lam
            largest = float(_horner(a2, np.array(largest)))
            layer += 1
            if layer % flush == 0:
                log += np.log(np.abs(product))
                product = np.sign(product)
        S /= lam
        product *= _horner(c, S)
        log += np.log(np.abs(product))
    sign = np.sign(product)
    if odd:
        sign[xi < 0] *= -1.0
    log[coincide], sign[coincide] = np.inf, np.sign(xi[coincide])
    return log, sign


# ---- finite depth


def log_kernel(xi: np.ndarray, a2: np.ndarray, depth: int, ntk: bool) -> Signed:
    """log |K_L(xi)| and its sign (NTK), or those of S_L (NNGP), for xi in [-1, 1] of any shape, without checks."""
    flat, log, sign = xi.ravel(), np.empty(xi.size), np.empty(xi.size)
    for start in range(0, xi.size, CACHED):
        part = slice(start, start + CACHED)
        log[part], sign[part] = _log_kernel(flat[part], a2, depth, ntk)
    return log.reshape(xi.shape), sign.reshape(xi.shape)


def _log_kernel(xi: np.ndarray, a2: np.ndarray, depth: int, ntk: bool) -> Signed:
    """Of xi (n,). Values are kept as a number times exp(e), one e a value, rescaled before they over- or underflow."""
    k = int(np.flatnonzero(a2)[0])
    ones = np.flatnonzero(xi == 1.0)
    i = np.arange(len(a2))
    S = xi.copy()
    if k == 0:  # S tends to a fixed point > 0; nothing but xi = 1 grows without bound
        K = S.copy()
        with np.errstate(over="ignore"):
            for _ in range(depth):
                if ntk:
                    K *= _horner((i * a2)[1:], S)  # K_l = S_l + K_{l-1} f'(S_{l-1})
                S = _horner(a2, S)
                S[ones] = 1.0
                K += S
        value, exponent = (K if ntk else S), np.zeros_like(S)
    else:  # f(S) = S^k a_k^2 g(S), f'(S) = S^(k-1) a_k^2 m(S)
        g, m = a2[k:] / a2[k], (i * a2)[k:] / a2[k]
        s, K, exponent, common = S.copy(), S.copy(), np.zeros_like(S), 0.0
        growth = np.log(g.sum() + m.sum())
        every = 1 if k > 1 else max(1, int(600 / growth))
        with np.errstate(under="ignore"):
            for layer in range(1, depth + 1):
                gS = _horner(g, S)
                power = s ** (k - 1) if k > 1 else None
                s *= gS
                if ntk:
                    K *= _horner(m, S)
                    K += s  # K_l = S_l + K_{l-1} f'(S_{l-1}), both over S_{l-1}^(k-1) a_k^2
                if power is not None:
                    s *= power
                    K *= power
                    exponent *= k
                    gS *= S ** (k - 1)
                common = k * common + np.log(a2[k])
                S *= gS
                S *= a2[k]
                S[ones] = 1.0
                if layer % every == 0:
                    size = np.maximum(np.abs(s), np.abs(K)) if ntk else np.abs(s)
                    size[size == 0] = 1.0
                    s /= size
                    K /= size
                    exponent += np.log(size)
                s[ones] = K[ones] = 1.0
        value, exponent = (K if ntk else s), exponent + common
    with np.errstate(divide="ignore"):
        log = np.log(np.abs(value)) + exponent
    sign = np.sign(value)
    log[ones], sign[ones] = log_diagonal(a2, depth, ntk), 1.0
    return log, sign


def log_diagonal(a2: np.ndarray, depth: int, ntk: bool) -> float:
    """log K_L(1) = log sum_{l <= L} B'^l; for the NNGP, log S_L(1) = 0."""
    if not ntk:
        return 0.0
    terms = np.arange(depth + 1) * np.log(np.arange(len(a2)) @ a2)
    return float(terms.max() + np.log(np.exp(terms - terms.max()).sum()))


def check_depth(depth: Any, a2: np.ndarray) -> int:
    """A finite depth as int, or an error that says why not."""
    if not isinstance(depth, int | np.integer) or isinstance(depth, bool) or depth < 1:
        raise ValueError(f"depth must be an integer >= 1, got {depth!r}")
    k = int(np.flatnonzero(a2)[0])
    if k > 1 and depth * k * math.log(k) > 600:
        raise ValueError(
            f"depth must be at most {int(600 / (k * math.log(k)))} for an activation that starts at He_{k}, got {depth}"
            "; by then its classifier is 1-NN to rounding: use depth=inf"
        )
    return int(depth)


def ntk_kernel(
    X: ArrayLike, Y: ArrayLike | None = None, coefs: ArrayLike | str = "dim", depth: int = 3
) -> np.ndarray | float:
    """Neural tangent kernel K_L of the infinitely wide network with L = depth hidden layers.

    Usable wherever scikit-learn takes a callable: ``SVC(kernel=partial(ntk_kernel, depth=5))``. Two vectors give a
    number, because ``KernelRidge`` and ``pairwise_kernels`` call their kernel so (slowly: for many rows give them
    ``kernel="precomputed"``).

    Parameters
    ----------
    X : array-like of shape (n, p) or (p,)
        Rows are scaled to the unit sphere; one of zeros is orthogonal to all but other rows of zeros.
    Y : array-like of shape (m, p) or (p,), optional; by default X
    coefs : array-like of shape (degree + 1,) or "dim", default="dim"
        Hermite coefficients of the activation; ``"dim"``: `explicit_coefficients` of p - 1.
    depth : int, default=3
        L >= 1 (the default is ours).

    Returns
    -------
    ndarray of shape (n, m), float64; K_L(x, x) = 1 + B' + ... + B'^L

    Raises
    ------
    ValueError
        If a row is not finite or of another width, or if K_L overflows (B'^L > 1e308).

    Examples
    --------
    >>> x, y = [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]
    >>> round(float(ntk_kernel(x, x)), 10)  # 1 + 2 + 4 + 8
    15.0
    >>> ntk_kernel([x, y]).shape
    (2, 2)
    """
    return _kernel(X, Y, coefs, depth, ntk=True)


def nngp_kernel(
    X: ArrayLike, Y: ArrayLike | None = None, coefs: ArrayLike | str = "dim", depth: int = 3
) -> np.ndarray | float:
    """Kernel S_L = f(f(...f(<x, y>))) of the same network with only its last layer trained; S_L(x, x) = 1.

    Parameters, returned shape and errors are those of `ntk_kernel`.

    Examples
    --------
    >>> round(float(nngp_kernel([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], depth=1)), 6)  # (x + x^3) / 2 at 0.7071
    0.53033
    """
    return _kernel(X, Y, coefs, depth, ntk=False)


def _kernel(X: Any, Y: Any, coefs: Any, depth: int, ntk: bool) -> np.ndarray | float:
    X = np.asarray(X, dtype=np.float64)
    Y = X if Y is None else np.asarray(Y, dtype=np.float64)
    if not (1 <= X.ndim <= 2 and 1 <= Y.ndim <= 2 and X.shape[-1] == Y.shape[-1] and X.size and Y.size):
        raise ValueError(f"X and Y must be of shape (rows >= 1, p) and the same p, got {X.shape} and {Y.shape}")
    a2 = check_coefficients(
        explicit_coefficients(sphere_dimension(X.shape[-1])) if isinstance(coefs, str) and coefs == "dim" else coefs
    )
    depth = check_depth(depth, a2)
    xi = sphere_products(unit_rows(np.atleast_2d(X)), unit_rows(np.atleast_2d(Y), "Y"))
    log, sign = log_kernel(xi, a2, depth, ntk)
    if log.max() > 709:
        raise ValueError(
            f"depth {depth} makes K_L(x, x) = exp({log.max():.0f}) overflow; the classifier has no such limit"
        )
    K = sign * np.exp(log)
    return float(K[0, 0]) if X.ndim == Y.ndim == 1 else K


# ---- the sphere


def sphere_dimension(n_features: int) -> int:
    """d of the unit sphere in R^(d+1) that rows of n_features numbers are scaled to."""
    if n_features < 2:
        raise ValueError(f"n_features = {n_features}: rows on the unit sphere need at least 2 features (d = 1)")
    return n_features - 1


def unit_rows(X: np.ndarray, name: str = "X") -> np.ndarray:
    """Rows of X (n, p) divided by their lengths, (n, p + 1); a row of zeros becomes the unit vector of the last column.

    Examples
    --------
    >>> unit_rows(np.array([[3e200, 4e200], [0, 0]])).round(10).tolist()
    [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]
    """
    largest = np.abs(X).max(axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(largest))
    if len(bad):
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {bad[0]}")
    zero = largest == 0
    largest[zero] = 1.0
    Z = np.hstack([X / largest, zero])
    return Z / np.sqrt(np.einsum("ij,ij->i", Z, Z))[:, None]


def sphere_products(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Inner products (n, m) of unit rows, exactly 1 for equal rows: every layer amplifies rounding there by B'."""
    xi = X @ Y.T
    near = np.flatnonzero(xi.max(axis=1) > 1 - NEAR)
    if len(near):
        i, j = np.nonzero(xi[near] > 1 - NEAR)
        i = near[i]
        xi[i, j] = 1.0 - _pair_distances(X, Y, i, j) / 2
    return np.clip(xi, -1.0, 1.0, out=xi)


def squared_distances(X: np.ndarray, Y: np.ndarray, X2: np.ndarray, Y2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """||x - y||^2 (n, m) by a matrix product, near pairs from differences (0 for equal rows); and its row minima.

    X2, Y2 are the rows' own squared lengths.
    """
    D = (-2.0 * X) @ Y.T
    D += X2[:, None]
    D += Y2
    least = D.min(axis=1)
    near = np.flatnonzero(least <= NEAR * (X2 + Y2.max()))
    if len(near):
        i, j = np.nonzero(D[near] <= NEAR * (X2[near, None] + Y2))
        i = near[i]
        D[i, j] = _pair_distances(X, Y, i, j)
        least[near] = D[near].min(axis=1)
    return D, least


def _pair_distances(X: np.ndarray, Y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    D = np.empty(len(i))
    step = max(1, PAIRS // X.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = X[i[part]] - Y[j[part]]
        D[part] = np.einsum("ij,ij->i", difference, difference)
    return D
