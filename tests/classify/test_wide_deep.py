"""Wide and deep networks: every property of the card, to its tolerance, and what must be refused."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.classify.wide_deep import (
    HermiteActivation,
    HilbertKernelClassifier,
    InfinitelyDeepNTKClassifier,
    dual_activation,
    dual_derivative,
    explicit_coefficients,
    hermite_coefficients,
    hilbert_kernel,
    koenigs_kernel,
    log_koenigs_kernel,
    nngp_kernel,
    ntk_kernel,
    taxonomy,
)

DIGITS, LABELS = load_digits(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(LABELS))
TRAIN, TEST = ORDER[:898], ORDER[898:]
NO_A = np.sqrt([0, 0, 0.5, 0.5])  # A = A' = 0
WITH_A = np.sqrt([0.3, 0.2, 0.3, 0.2])  # A != 0, B' = 1.4, stable fixed point c* = 0.5
POINTS = np.linspace(-0.999, 0.9999, 61)


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def expect(function, n=100):
    """E function(z), z ~ N(0, 1), by Gauss-Hermite quadrature."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return w @ function(z) / math.sqrt(2 * math.pi)


CONFIGURATIONS = [
    HilbertKernelClassifier(),
    HilbertKernelClassifier(alpha=3.0, normalize=False),
    HilbertKernelClassifier(eps=0.01),
    InfinitelyDeepNTKClassifier(),
    InfinitelyDeepNTKClassifier(hermite=(0.0, 0.0, 0.6, 0.8)),
    InfinitelyDeepNTKClassifier(hermite=(0.6, 0.48, 0.64)),  # majority vote
    InfinitelyDeepNTKClassifier(depth=4, ridge=1e-6),
    InfinitelyDeepNTKClassifier(activation=np.tanh, depth=2, kernel="nngp"),
]


@parametrize_with_checks(CONFIGURATIONS)
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


# ---- activations


@pytest.mark.parametrize(
    ("phi", "derivative"),
    [
        (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
        (lambda z: np.sin(1.5 * z) + 0.3 * z**2, lambda z: 1.5 * np.cos(1.5 * z) + 0.6 * z),
        (scipy.special.erf, lambda z: 2 / np.sqrt(np.pi) * np.exp(-(z**2))),
        (lambda z: 2 * z**3 - z + 1, lambda z: 6 * z**2 - 1),
    ],
    ids=["tanh", "sine and square", "erf", "cubic"],
)
def test_dual_and_taxonomy_are_expectations_of_the_activation(phi, derivative):
    """f(1) = 1, f(0) = A^2, f'(0) = A'^2, f'(1) = B', with A, A', B' from an independent quadrature of phi."""
    n = 180 if phi is np.tanh else 100  # the poles of tanh at +-i pi / 2 make Gauss-Hermite slow
    scale = math.sqrt(expect(lambda z: phi(z) ** 2, n))
    A, A_prime = expect(phi, n) / scale, expect(derivative, n) / scale
    B_prime = expect(lambda z: derivative(z) ** 2, n) / scale**2
    a = hermite_coefficients(phi)
    assert dual_activation(1.0, a) == pytest.approx(1.0, abs=1e-10)
    assert dual_activation(0.0, a) == pytest.approx(A**2, abs=1e-10)
    assert dual_derivative(0.0, a) == pytest.approx(A_prime**2, abs=1e-10)
    assert dual_derivative(1.0, a) == pytest.approx(B_prime, abs=1e-10)
    kind = taxonomy(phi)
    assert (kind.A, kind.A_prime, kind.B_prime) == pytest.approx((A, A_prime, B_prime), abs=1e-10)


def test_dual_activation_is_the_covariance_of_activations():
    """f(xi) = E[phi(u) phi(v)] by quadrature over the plane, u and v of correlation xi."""
    z, w = np.polynomial.hermite_e.hermegauss(120)
    w = w / w.sum()
    phi = partial(np.sin)
    scale = expect(lambda z: phi(z) ** 2)
    for xi in (-0.8, 0.0, 0.3, 0.95):
        u, v = z[:, None], xi * z[:, None] + math.sqrt(1 - xi**2) * z
        assert dual_activation(xi, hermite_coefficients(phi)) == pytest.approx(
            w @ (phi(u) * phi(v)) @ w / scale, abs=1e-10
        )


def test_relu_is_the_arc_cosine_kernel():
    """One layer, closed form; the power series ends at its last coefficient, so near 1 to what lies beyond."""
    xi = np.linspace(-1, 1, 201)
    exact = (np.sqrt(1 - xi**2) + (np.pi - np.arccos(xi)) * xi) / np.pi
    a = hermite_coefficients(torch.relu)
    inner = np.abs(xi) <= 0.85
    np.testing.assert_allclose(dual_activation(xi, a)[inner], exact[inner], atol=1e-10)
    np.testing.assert_allclose(dual_activation(xi, a), exact, atol=2e-5)
    np.testing.assert_allclose(dual_activation(xi, hermite_coefficients(torch.relu, 1000)), exact, atol=1e-9)
    angles = np.linspace(0.6, 2.5, 20)
    X, Y = np.array([[1.0, 0.0]]), np.stack([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(
        nngp_kernel(X, Y, a, depth=1)[0], (np.sin(angles) + (np.pi - angles) * np.cos(angles)) / np.pi, atol=1e-10
    )


def test_duals_of_the_official_code():
    """sin(sqrt(a) x): sinh(a xi) / sinh(a), alpha = d at the published a; erf: arcsin; the explicit activations."""
    for a, d in ((2.676, 2), (6.13539, 4), (13.8258, 8)):
        phi = partial(lambda a, z: np.sin(math.sqrt(a) * z), a)
        np.testing.assert_allclose(
            dual_activation(POINTS, hermite_coefficients(phi)), np.sinh(a * POINTS) / np.sinh(a), atol=1e-12
        )
        kind = taxonomy(phi)
        assert kind.alpha == pytest.approx(d, abs=1e-4)
        assert kind.A_prime**2 == pytest.approx(a / math.sinh(a))
        assert kind.B_prime == pytest.approx(a / math.tanh(a))
    erf = dual_activation(POINTS, hermite_coefficients(torch.erf))
    np.testing.assert_allclose(erf, np.arcsin(2 * POINTS / 3) / np.arcsin(2 / 3), atol=1e-12)
    assert taxonomy(torch.erf).alpha == pytest.approx(0.888, abs=5e-4)
    x = POINTS
    for d, f in {
        1: (x + x**7) / 2,
        2: (x + x**3) / 2,
        4: x**3 / 4 + x**2 / 2 + x / 4,
        8: (x**3 + 14 * x**2 + x) / 16,
    }.items():
        np.testing.assert_allclose(dual_activation(x, explicit_coefficients(d)), f, atol=1e-14)


def test_explicit_activation_is_the_papers_polynomial():
    d, x = 5, torch.linspace(-3, 3, 50, dtype=torch.float64)
    phi = (
        2 ** (-d / 4) * (x**3 - 3 * x) / math.sqrt(6)
        + math.sqrt(1 - 2 ** (1 - d / 2)) * (x**2 - 1) / math.sqrt(2)
        + 2 ** (-d / 4) * x
    )
    torch.testing.assert_close(HermiteActivation(explicit_coefficients(d))(x), phi)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 63, 784])
def test_explicit_activation_has_alpha_d(d):
    kind = taxonomy(explicit_coefficients(d))
    assert kind.regime == "singular kernel"
    assert kind.alpha == pytest.approx(d, rel=1e-12)
    if d > 1:
        assert kind.B_prime == pytest.approx(2)
        assert kind.A_prime**2 == pytest.approx(2 ** (-d / 2))
    back = hermite_coefficients(HermiteActivation(explicit_coefficients(d)).double())
    if 2 ** (-d / 4) > 1e-6:  # and not 0 for a quadrature
        np.testing.assert_allclose(back, explicit_coefficients(d), atol=1e-12)


def test_taxonomy_of_the_usual_activations():
    F = torch.nn.functional
    for phi in (torch.relu, F.gelu, F.silu, F.softplus, torch.sigmoid, torch.nn.ELU(), torch.exp, lambda z: abs(z)):
        assert taxonomy(phi).regime == "majority vote"
        assert taxonomy(phi).alpha == 0
    for phi in (torch.tanh, torch.nn.Hardtanh(), torch.sin, lambda z: z**3, lambda z: z.clamp(-1, 1)):
        assert taxonomy(phi).regime == "singular kernel"
    assert taxonomy(torch.relu).B_prime == pytest.approx(1, abs=1e-10)
    # the kinks of hard tanh: E phi'^2 / E phi^2 in closed form
    inside = math.erf(1 / math.sqrt(2))
    second_moment = inside - math.sqrt(2 / math.pi) * math.exp(-0.5) + (1 - inside)
    assert taxonomy(torch.nn.Hardtanh()).B_prime == pytest.approx(inside / second_moment, abs=1e-10)
    assert taxonomy(NO_A).regime == taxonomy(lambda z: z**4 - 6 * z**2 + 3).regime == "1-NN"
    assert taxonomy(NO_A).alpha == math.inf
    assert taxonomy([0.0, 1.0]).regime == taxonomy(lambda z: 3 * z).regime == "linear"
    assert taxonomy(WITH_A).B_prime == pytest.approx(1.4)


# ---- kernels


def plain(xi, a, depth, ntk=True):
    """The recursion as it stands in the paper."""
    a2 = np.asarray(a) ** 2
    f, df = np.polynomial.Polynomial(a2), np.polynomial.Polynomial(a2).deriv()
    S = K = np.asarray(xi, dtype=float)
    for _ in range(depth):
        S, K = f(S), f(S) + K * df(S)
    return K if ntk else S


@pytest.mark.parametrize(
    "a", [explicit_coefficients(3), NO_A, WITH_A, explicit_coefficients(1), np.sqrt([0, 0, 0, 1.0])]
)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_kernels_are_the_papers_recursion(a, depth):
    X, Y = np.random.default_rng(0).standard_normal((2, 20, 3))
    xi = unit(X) @ unit(Y).T
    np.testing.assert_allclose(ntk_kernel(X, Y, a, depth), plain(xi, a, depth), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(nngp_kernel(X, Y, a, depth), plain(xi, a, depth, ntk=False), rtol=1e-9, atol=1e-300)


def test_diagonal_is_exact_where_rounding_would_grow():
    """B'^L = 2^500 times a rounding error of 1e-16 is no small error: the diagonal is set, off it nothing overflows."""
    X = np.random.default_rng(1).random((30, 7))
    K, S = ntk_kernel(X, X * 3, explicit_coefficients(4), 500), nngp_kernel(X, None, explicit_coefficients(4), 500)
    np.testing.assert_allclose(np.diag(K), 2.0**501 - 1)
    np.testing.assert_array_equal(np.diag(S), 1.0)
    assert S[~np.eye(30, dtype=bool)].max() < 1e-100


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 63, 500, 2000])
def test_koenigs_solves_schroeder(d):
    """h(f(xi)) = A'^2 h(xi), signs included, h'(0) = 1."""
    a = explicit_coefficients(d)
    xi = POINTS[np.abs(POINTS) > 1e-9]
    log, sign = log_koenigs_kernel(xi, a)
    log_after, sign_after = log_koenigs_kernel(dual_activation(xi, a), a)
    # log h is as sharp as xi: f(xi) is rounded to 1e-16, and d log h = alpha / 2 d xi / (1 - xi), times 1 / xi near 0
    np.testing.assert_allclose(log_after - log, 2 * np.log(a[1]), atol=1e-10 if d < 100 else 1e-8)
    np.testing.assert_array_equal(sign_after, sign)
    np.testing.assert_allclose(koenigs_kernel(1e-12 * a[1] ** 2, a) / (1e-12 * a[1] ** 2), 1, rtol=1e-10)
    assert koenigs_kernel(1.0, a) == np.inf
    assert koenigs_kernel(0.0, a) == 0


@pytest.mark.parametrize("a", [explicit_coefficients(2), hermite_coefficients(torch.erf), np.sqrt([0, 0.9, 0.1])])
def test_koenigs_is_the_limit_of_the_nngp(a):
    xi = POINTS[np.abs(POINTS) > 1e-9]
    h, lam = koenigs_kernel(xi, a), a[1] ** 2
    depth = int(40 / -np.log(lam))
    S = plain(xi, a, depth, ntk=False) / lam**depth
    np.testing.assert_allclose(S, h, rtol=1e-10)


def test_ntk_converges_to_koenigs_as_one_over_depth():
    from shoestring.classify._wide_deep_kernels import log_kernel

    a, xi = explicit_coefficients(4), np.array([-0.7, 0.1, 0.6, 0.9])
    log_h, sign_h = log_koenigs_kernel(xi, a)
    gaps = []
    for L in (1000, 4000, 16000):
        log, sign = log_kernel(xi, a**2, L, ntk=True)  # lam^L is far below 1e-308
        np.testing.assert_array_equal(sign, sign_h)
        gaps.append(np.abs(log - L * np.log(a[1] ** 2) - np.log(L) - log_h).max())
    assert gaps[0] < 0.04
    assert gaps[1] / gaps[0] == pytest.approx(1 / 4, rel=0.1)
    assert gaps[2] / gaps[1] == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize(("d", "measured"), [(2, -1.00003), (3, -1.50004), (4, -2.00005)])
def test_slope_of_the_singularity_is_half_alpha(d, measured):
    a, t = explicit_coefficients(d), 1e-5 * np.array([1, 1.001])
    log, _ = log_koenigs_kernel(1 - t, a)
    assert np.diff(log)[0] / np.diff(np.log(t))[0] == pytest.approx(measured, abs=5e-5)


@pytest.mark.parametrize("d", [1, 8, 63])
def test_slope_over_a_period_is_half_alpha(d):
    """Locally log h ripples with period log B'; over one period it falls by alpha / 2 log B' whatever d."""
    a = explicit_coefficients(d)
    B = taxonomy(a).B_prime
    log, _ = log_koenigs_kernel(1 - 1e-7 * np.array([1, B]), a)
    assert (log[0] - log[1]) / np.log(B) == pytest.approx(d / 2, rel=1e-5)


def test_kernel_away_from_zero_is_constant():
    """A != 0: off the diagonal K_60 = c* / (1 - f'(c*)) = 0.5 / 0.35, for every xi."""
    xi = np.append(np.linspace(-1, 0.99, 50), 0.999)
    Y = np.stack([xi, np.sqrt(1 - xi**2)], 1)
    K = ntk_kernel([[1.0, 0.0]], Y, WITH_A, 60)[0]
    np.testing.assert_allclose(K[:-1], 0.5 / 0.35, atol=3e-7)
    assert K[-1] == pytest.approx(0.5 / 0.35, abs=4.2e-5)
    assert ntk_kernel([1.0, 0.0], [1.0, 0.0], WITH_A, 60) == pytest.approx((1.4**61 - 1) / 0.4)


def test_kernel_at_the_edge_of_chaos_is_a_third():
    """A != 0, B' = 1: 1 - S_L ~ 2 / (f''(1) L), K_L / K_L(1) -> 1/3 off the diagonal, for smooth f."""
    K = [ntk_kernel([1.0, 0.0], [0.6, 0.8], np.sqrt([0.25, 0.5, 0.25]), L) / (L + 1) for L in (300, 30000)]
    assert abs(K[1] - 1 / 3) < 1e-3 < abs(K[0] - 1 / 3)


@pytest.mark.parametrize(
    ("phi", "depth", "draws"),
    [(HermiteActivation(explicit_coefficients(2)), 1, 16), (torch.tanh, 1, 4), (torch.tanh, 2, 2), (torch.sin, 2, 2)],
    ids=["explicit", "tanh", "tanh two layers", "sine two layers"],
)
def test_finite_networks_have_these_kernels(phi, depth, draws):
    """NTK and NNGP of MLPs of width 4096 in the NTK parametrisation, every weight trained, to a few per cent.

    One draw is enough for bounded activations. The explicit one is cubic: its kernel is a mean of heavy-tailed terms,
    off by 5 to 10 % at one layer of this width, and by half and more at two.
    """
    width, generator = 4096, torch.Generator().manual_seed(0)
    scale = 1 / math.sqrt(expect(lambda z: phi(torch.as_tensor(z)).numpy() ** 2))
    X = torch.as_tensor(unit(np.random.default_rng(3).random((3, 5))), dtype=torch.float32)
    ntk, nngp = np.zeros((3, 3)), np.zeros((3, 3))
    for _ in range(draws):
        sizes = itertools.pairwise([5] + [width] * depth + [1])
        W = [torch.randn(m, n, generator=generator).requires_grad_() for n, m in sizes]
        gradients, features = [], []
        for x in X:
            h = W[0] @ x
            for w in W[1:]:
                last = scale * phi(h)
                h = w @ last / math.sqrt(width)
            features.append(last.detach())
            gradients.append(torch.cat([g.ravel() for g in torch.autograd.grad(h.sum(), W)]))
        G, F = torch.stack(gradients), torch.stack(features)
        ntk += (G @ G.T).numpy() / draws
        nngp += (F @ F.T).numpy() / width / draws
    a = hermite_coefficients(phi)
    np.testing.assert_allclose(ntk, ntk_kernel(X, None, a, depth), rtol=0.05)
    np.testing.assert_allclose(nngp, nngp_kernel(X, None, a, depth), rtol=0.05)


def test_in_scikit_learns_kernel_machines():
    X, y, X_test = DIGITS[TRAIN[:300]], LABELS[TRAIN[:300]], DIGITS[TEST[:100]]
    kernel = partial(ntk_kernel, depth=3)
    by_callable = SVC(kernel=kernel).fit(X, y)
    precomputed = SVC(kernel="precomputed").fit(kernel(X), y)
    np.testing.assert_array_equal(by_callable.predict(X_test), precomputed.predict(kernel(X_test, X)))
    assert by_callable.score(X, y) > 0.95
    a = explicit_coefficients(2)
    few = X[:12, 20:23] + 1
    np.testing.assert_allclose(
        pairwise_kernels(few, metric=nngp_kernel, coefs=a, depth=2), nngp_kernel(few, None, a, 2)
    )
    ridge = KernelRidge(kernel=ntk_kernel, kernel_params={"coefs": a, "depth": 2}).fit(few, y[:12])
    K = ntk_kernel(few, None, a, 2)
    np.testing.assert_allclose(ridge.predict(few), K @ np.linalg.solve(K + np.eye(12), y[:12]))


# ---- the Hilbert estimate


def test_hilbert_equals_neighbors_with_power_weights():
    for normalize, rows in ((True, unit(DIGITS)), (False, DIGITS)):
        model = HilbertKernelClassifier(alpha=5.0, normalize=normalize).fit(DIGITS[TRAIN], LABELS[TRAIN])
        peer = KNeighborsClassifier(len(TRAIN), weights=lambda d: d**-5.0, algorithm="brute").fit(
            rows[TRAIN], LABELS[TRAIN]
        )
        np.testing.assert_allclose(
            model.predict_proba(DIGITS[TEST]), peer.predict_proba(rows[TEST]), rtol=1e-7, atol=1e-12
        )


def test_hilbert_interpolates():
    for options in ({}, {"alpha": 0.01}, {"normalize": False}, {"alpha": 1e5}):
        model = HilbertKernelClassifier(**options).fit(DIGITS[TRAIN], LABELS[TRAIN])
        np.testing.assert_array_equal(model.predict_proba(DIGITS[TRAIN]), np.eye(10)[LABELS[TRAIN]])
    assert (
        HilbertKernelClassifier(eps=0.5, alpha=2.0).fit(DIGITS[TRAIN], LABELS[TRAIN]).predict_proba(DIGITS[TRAIN]).max()
        < 1
    )


def test_hilbert_at_a_repeated_row_is_the_mean_of_its_labels():
    X = np.array([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0], [3.0, 1.0], [3.0, 2.0]])
    model = HilbertKernelClassifier().fit(X, ["a", "a", "b", "b", "c"])
    np.testing.assert_allclose(model.predict_proba([[4.0, 8.0]]), [[2 / 3, 1 / 3, 0]])
    np.testing.assert_allclose(
        HilbertKernelClassifier(normalize=False).fit(X, list("aabbc")).predict_proba(X), np.eye(3)[[0, 0, 1, 1, 2]]
    )


def test_hilbert_large_alpha_is_nearest_neighbour():
    nearest = KNeighborsClassifier(1).fit(unit(DIGITS)[TRAIN], LABELS[TRAIN]).predict(unit(DIGITS)[TEST])
    by_dimension = HilbertKernelClassifier().fit(DIGITS[TRAIN], LABELS[TRAIN])
    assert by_dimension.alpha_ == 63
    assert (by_dimension.predict(DIGITS[TEST]) == nearest).mean() > 0.998
    np.testing.assert_array_equal(
        HilbertKernelClassifier(alpha=1e6).fit(DIGITS[TRAIN], LABELS[TRAIN]).predict(DIGITS[TEST]), nearest
    )


def test_hilbert_small_alpha_is_majority_vote():
    model = HilbertKernelClassifier(alpha=1e-9).fit(DIGITS[TRAIN], LABELS[TRAIN])
    counts = np.bincount(LABELS[TRAIN])
    assert (model.predict(DIGITS[TEST]) == counts.argmax()).all()
    np.testing.assert_allclose(
        model.predict_proba(DIGITS[TEST]), np.tile(counts / len(TRAIN), (len(TEST), 1)), atol=1e-9
    )


@pytest.mark.parametrize("factor", [1e-100, 1e-3, 7.0, 1e100])
@pytest.mark.parametrize("normalize", [True, False])
def test_hilbert_does_not_see_scale(factor, normalize):
    plain = HilbertKernelClassifier(normalize=normalize).fit(DIGITS[TRAIN], LABELS[TRAIN])
    scaled = HilbertKernelClassifier(normalize=normalize).fit(DIGITS[TRAIN] * factor, LABELS[TRAIN])
    np.testing.assert_allclose(
        scaled.predict_proba(DIGITS[TEST] * factor), plain.predict_proba(DIGITS[TEST]), rtol=1e-8
    )


def test_hilbert_sees_no_shift_and_small_distances_far_from_the_origin():
    X = np.random.default_rng(0).integers(0, 1000, (200, 3)) / 1024
    y = (X[:, 0] > 0.5).astype(int)
    Q = np.random.default_rng(1).integers(0, 1000, (50, 3)) / 1024 + 1 / 4096
    plain, shifted = (HilbertKernelClassifier(normalize=False).fit(X + s, y).predict_proba(Q + s) for s in (0, 2.0**20))
    np.testing.assert_allclose(shifted, plain, rtol=1e-9)
    # two rows 1e-9 apart, and a query a third of the way between: weights (2 : 1)^3
    X = np.vstack([X, [[0.5, 0.5, 0.5], [0.5 + 3e-9, 0.5, 0.5]]])
    model = HilbertKernelClassifier(normalize=False).fit(X, np.append(y, [0, 1]))
    np.testing.assert_allclose(model.predict_proba([[0.5 + 1e-9, 0.5, 0.5]]), [[8 / 9, 1 / 9]], rtol=1e-6)


def test_hilbert_kernel_and_dim_in_the_plain_space():
    X, Y = np.random.default_rng(0).random((2, 30, 4))
    D = np.linalg.norm(X[:, None] - Y[None], axis=2)
    np.testing.assert_allclose(hilbert_kernel(X, Y), D**-4, rtol=1e-10)
    np.testing.assert_allclose(hilbert_kernel(X, Y, alpha=2.5, eps=0.1), (D**2 + 0.01) ** -1.25, rtol=1e-10)
    y = np.arange(30) % 3
    model = HilbertKernelClassifier(normalize=False).fit(X, y)
    votes = hilbert_kernel(Y, X, alpha=model.alpha_) @ np.eye(3)[y]
    np.testing.assert_allclose(model.predict_proba(Y), votes / votes.sum(1, keepdims=True), rtol=1e-9)
    with_eps = HilbertKernelClassifier(normalize=False, alpha=2.0, eps=0.3).fit(X, y)
    votes = hilbert_kernel(Y, X, alpha=2.0, eps=0.3) @ np.eye(3)[y]
    np.testing.assert_allclose(with_eps.predict_proba(Y), votes / votes.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:The number of unique classes")
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.1, 400), st.booleans())
def test_hilbert_is_the_formula_for_any_rows_and_classes(seed, classes, alpha, repeat):
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((60, 3)), np.append(rng.integers(0, classes, 58), [0, classes])
    if repeat:
        X[40:] = X[:20]
    Q = np.vstack([rng.standard_normal((20, 3)), X[:10] * 2])
    model = HilbertKernelClassifier(alpha=alpha).fit(X, y)
    distance = np.linalg.norm(unit(Q)[:, None] - unit(X)[None], axis=2)
    distance[distance < 1e-14] = 0
    for row, got in zip(distance, model.predict_proba(Q), strict=True):
        weight = (row == 0).astype(float) if (row == 0).any() else (row.min() / row) ** alpha
        expected = np.array([weight[y == c].sum() for c in model.classes_]) / weight.sum()
        np.testing.assert_allclose(got, expected, atol=1e-8)


# ---- networks of finite and infinite depth


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("a", [explicit_coefficients(4), WITH_A, NO_A])
def test_finite_depth_is_kernel_regression(a, kernel):
    X, y, X_test = DIGITS[TRAIN[:200]], LABELS[TRAIN[:200]], DIGITS[TEST]
    function = ntk_kernel if kernel == "ntk" else nngp_kernel
    for ridge in (0.0, 0.3):
        model = InfinitelyDeepNTKClassifier(hermite=a, depth=2, ridge=ridge, kernel=kernel).fit(X, y)
        K = function(X, None, a, 2) + ridge * np.eye(200)
        expected = function(X_test, X, a, 2) @ np.linalg.solve(K, np.eye(10)[y])
        np.testing.assert_allclose(model.decision_function(X_test), expected, atol=1e-8)


def test_rows_that_coincide_are_one_row_with_the_mean_label():
    """To that tends the solution with any ridge -> 0; at a given ridge it is the same solution."""
    rng = np.random.default_rng(0)
    X = rng.random((40, 4))
    X = np.vstack([X, X[:15], X[:5]])
    y = rng.integers(0, 3, 60)
    Q = rng.random((20, 4))
    a = explicit_coefficients(3)
    model = InfinitelyDeepNTKClassifier(depth=3, ridge=0.1).fit(X, y)
    K = ntk_kernel(X, None, a, 3) + 0.1 * np.eye(60)
    expected = ntk_kernel(Q, X, a, 3) @ np.linalg.solve(K, np.eye(3)[y])
    np.testing.assert_allclose(model.decision_function(Q), expected, atol=1e-9)
    interpolant = InfinitelyDeepNTKClassifier(depth=3).fit(X, y)
    nearly = InfinitelyDeepNTKClassifier(depth=3, ridge=1e-9).fit(X, y)
    np.testing.assert_allclose(interpolant.decision_function(Q), nearly.decision_function(Q), atol=1e-5)
    means = np.array([np.eye(3)[y[(x == X).all(1)]].mean(0) for x in X])
    np.testing.assert_allclose(interpolant.decision_function(X), means, atol=1e-7)
    np.testing.assert_allclose(InfinitelyDeepNTKClassifier().fit(X, y).decision_function(X), means, atol=1e-12)


def test_a_kernel_of_low_rank_gives_the_solution_of_least_norm():
    X, y = np.random.default_rng(0).random((80, 2)), np.arange(80) % 2
    model = InfinitelyDeepNTKClassifier(hermite=explicit_coefficients(2), depth=1, kernel="nngp").fit(X, y)
    K = nngp_kernel(X, None, explicit_coefficients(2), 1)  # rank 4 of 80
    expected = K @ np.linalg.pinv(K, rcond=1e-12, hermitian=True) @ np.eye(2)[y]
    np.testing.assert_allclose(model.decision_function(X), expected[:, 1] - expected[:, 0], atol=1e-6)


def test_infinite_depth_is_the_singular_smoother():
    X, y, X_test = DIGITS[TRAIN][:, 20:25] + 1, LABELS[TRAIN] % 3, DIGITS[TEST][:, 20:25] + 1
    X, index = np.unique(X, axis=0, return_index=True)
    y = y[index]
    X_test = X_test[(np.abs(unit(X_test) @ unit(X).T - 1) > 1e-9).all(1)]
    model = InfinitelyDeepNTKClassifier().fit(X, y)
    _, same, times = np.unique(unit(X).round(12), axis=0, return_inverse=True, return_counts=True)
    h = koenigs_kernel(np.clip(unit(X_test) @ unit(X).T, -1, 1), explicit_coefficients(4)) / times[same.ravel()]
    votes = h @ np.eye(3)[y]
    np.testing.assert_allclose(model.decision_function(X_test), votes / votes.sum(1, keepdims=True), rtol=1e-6)


def test_negative_products_follow_the_signed_limit():
    X = np.random.default_rng(0).standard_normal((50, 4))
    y, Q, a = np.arange(50) % 3, np.random.default_rng(1).standard_normal((30, 4)), explicit_coefficients(3)
    model = InfinitelyDeepNTKClassifier().fit(X, y)
    assert not model.nonnegative_
    votes = koenigs_kernel(unit(Q) @ unit(X).T, a) @ np.eye(3)[y]
    np.testing.assert_allclose(model.decision_function(Q), votes / np.abs(votes).sum(1, keepdims=True), rtol=1e-8)
    odd = InfinitelyDeepNTKClassifier(hermite=explicit_coefficients(2)).fit(X, y)  # h(-1) = -inf: any label but its own
    np.testing.assert_allclose(odd.decision_function(-X[:3]), -odd.decision_function(X[:3]))
    assert (odd.predict(-X) != y).all()


@pytest.mark.parametrize(("kernel", "depth", "agreement"), [("nngp", 60, 1.0), ("ntk", 20000, 0.97)])
def test_deep_networks_become_the_infinitely_deep_one(kernel, depth, agreement):
    """Values of 2^-20000 and 2^20000 among them. The NNGP's rate is geometric, the NTK's 1 / (L (1 - xi))."""
    rng = np.random.default_rng(0)
    X, Q = rng.dirichlet([1, 1, 1], 150), rng.dirichlet([1, 1, 1], 200)
    y = (X[:, 0] + 0.3 * rng.standard_normal(150) > X[:, 1]).astype(int)
    limit = InfinitelyDeepNTKClassifier().fit(X, y)
    deep = InfinitelyDeepNTKClassifier(depth=depth, kernel=kernel).fit(X, y)
    assert limit.taxonomy_.alpha == pytest.approx(2)
    assert (deep.predict(Q) == limit.predict(Q)).mean() >= agreement
    hilbert = HilbertKernelClassifier().fit(X, y)
    assert (hilbert.predict(Q) == limit.predict(Q)).mean() > 0.97  # the same singularity, another kernel away from it


def test_without_hermite_0_and_1_it_is_nearest_neighbour():
    """Agreement on digits at L = 1, 3, 8, as measured before; from L = 8 on all of it."""
    nearest = KNeighborsClassifier(1).fit(unit(DIGITS)[TRAIN], LABELS[TRAIN]).predict(unit(DIGITS)[TEST])
    agreement = []
    for depth in (1, 3, 8, 15, 100, math.inf):
        model = InfinitelyDeepNTKClassifier(hermite=NO_A, depth=depth).fit(DIGITS[TRAIN], LABELS[TRAIN])
        agreement.append((model.predict(DIGITS[TEST]) == nearest).mean())
    assert agreement[0] > 0.975
    assert agreement[1] > 0.98
    assert agreement[2:] == [1.0] * 4


def test_with_hermite_0_it_is_the_majority_vote():
    y = LABELS[TRAIN]
    majority = np.bincount(y).argmax()
    assert np.sort(np.bincount(y))[-1] > np.sort(np.bincount(y))[-2]
    models = [
        InfinitelyDeepNTKClassifier(hermite=WITH_A, depth=60),
        InfinitelyDeepNTKClassifier(hermite=WITH_A, depth=400),
        InfinitelyDeepNTKClassifier(hermite=WITH_A),
        InfinitelyDeepNTKClassifier(activation=torch.relu),
        InfinitelyDeepNTKClassifier(hermite=WITH_A, kernel="nngp"),
        # B' < 1: with any ridge
        InfinitelyDeepNTKClassifier(hermite=np.sqrt([0.5, 0.3, 0.2]), ridge=1e-3),
        InfinitelyDeepNTKClassifier(hermite=np.sqrt([0.5, 0.3, 0.2]), ridge=1e-3, depth=200),
    ]
    for model in models:
        assert (model.fit(DIGITS[TRAIN], y).predict(DIGITS[TEST]) == majority).all()


def test_small_slope_without_ridge_is_an_interpolant():
    """B' < 1, no ridge: the limit of the solutions is not the majority vote, so depth=inf refuses to say so."""
    model = InfinitelyDeepNTKClassifier(hermite=np.sqrt([0.5, 0.3, 0.2]), depth=6)
    X, y = DIGITS[TRAIN[:60]], LABELS[TRAIN[:60]]
    assert model.fit(X, y).score(X, y) == 1
    with pytest.raises(ValueError, match="ridge must be > 0 at depth=inf"):
        clone(model).set_params(depth=math.inf).fit(X, y)


# ---- as an estimator


@pytest.mark.parametrize(
    "model",
    [
        HilbertKernelClassifier(),
        InfinitelyDeepNTKClassifier(),
        InfinitelyDeepNTKClassifier(hermite=NO_A),
        InfinitelyDeepNTKClassifier(depth=2),
    ],
    ids=["hilbert", "limit", "nearest", "finite"],
)
def test_memory_is_bounded(model):
    """60,000 training rows (2,000 where they are solved for), 400 queries: a whole kernel would be 192 (6.4) MB."""
    n = 2000 if model.get_params().get("depth") == 2 else 60_000
    rng = np.random.default_rng(0)
    X, Q = rng.random((n, 16)), rng.random((400, 16))
    model = clone(model).fit(X, rng.integers(0, 50, n))
    model.predict(Q[:2])
    tracemalloc.start()
    try:
        model.predict(Q if n > 2000 else np.repeat(Q, 20, axis=0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6


def test_blocks_do_not_change_the_answer(monkeypatch):
    from shoestring.classify import wide_deep

    models = [
        HilbertKernelClassifier(alpha=500.0),
        HilbertKernelClassifier(alpha=0.5, normalize=False),
        InfinitelyDeepNTKClassifier(),
        InfinitelyDeepNTKClassifier(hermite=explicit_coefficients(4), depth=3),
    ]
    rows = np.vstack([DIGITS[TEST[:50]], DIGITS[TRAIN[:5]]])
    for model in models:
        model.fit(DIGITS[TRAIN], LABELS[TRAIN])
        answer = "predict_proba" if hasattr(model, "predict_proba") else "decision_function"
        whole = getattr(model, answer)(rows)
        with monkeypatch.context() as m:
            m.setattr(wide_deep, "QUERIES", 7)
            m.setattr(wide_deep, "ROWS", 13)
            np.testing.assert_allclose(getattr(model, answer)(rows), whole, rtol=1e-6, atol=1e-9)


def test_pipelines_pandas_strings_and_search():
    frame = pd.DataFrame(DIGITS, columns=[f"pixel {i}" for i in range(64)])
    names = np.array(list("abcdefghij"))[LABELS]
    for model in (HilbertKernelClassifier(), InfinitelyDeepNTKClassifier(depth=2)):
        pipeline = make_pipeline(MinMaxScaler().set_output(transform="pandas"), model)
        assert cross_val_score(pipeline, frame[:600], names[:600], cv=3).mean() > 0.9
        fitted = clone(model).fit(frame[:300], pd.Series(names[:300]))
        assert list(fitted.feature_names_in_) == list(frame.columns)
        assert fitted.predict(frame[:2]).dtype.kind in "UO"
        np.testing.assert_array_equal(
            fitted.predict(frame[300:400]),
            clone(model).fit(DIGITS[:300].astype(np.float32), names[:300]).predict(DIGITS[300:400]),
        )
    search = GridSearchCV(HilbertKernelClassifier(), {"alpha": ["dim", 8.0], "normalize": [True, False]}, cv=2)
    assert search.fit(DIGITS[:300], LABELS[:300]).best_score_ > 0.85


def test_a_row_of_zeros_is_orthogonal_to_all_others():
    X = np.array([[0.0, 0, 0], [1, 2, 0], [0, 1, 3], [2, 0, 1]])
    for model in (HilbertKernelClassifier(), InfinitelyDeepNTKClassifier(), InfinitelyDeepNTKClassifier(depth=3)):
        model.fit(X, [0, 1, 2, 3])
        np.testing.assert_array_equal(model.predict(X), [0, 1, 2, 3])
    without = HilbertKernelClassifier().fit(X[1:], [1, 1, 3])
    np.testing.assert_allclose(without.predict_proba(X[:1]), [[2 / 3, 1 / 3]])
    orthogonal = InfinitelyDeepNTKClassifier().fit(X[1:], [1, 1, 3])  # no vote at all: the shares of the classes
    np.testing.assert_allclose(orthogonal.decision_function(X[:1]), 1 / 3 - 2 / 3)


def test_hermite_activation_as_a_module():
    phi = HermiteActivation(explicit_coefficients(6))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(phi, (x,))
    assert phi(x.half()).dtype == torch.float16
    assert not list(phi.parameters())
    other = HermiteActivation([0.0, 1.0, 0.0, 0.0])
    other.load_state_dict(phi.state_dict())
    torch.testing.assert_close(other(x), phi(x))
    assert repr(phi) == "HermiteActivation(degree=3)"
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), phi, torch.nn.Linear(8, 2))
    network(torch.ones(4, 3)).sum().backward()
    assert network[0].weight.grad.abs().sum() > 0


# ---- bad input


X4 = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 0.5], [0.1, 1.0, 2.0], [1.0, 1.0, 1.0]])
Y4 = [0, 0, 1, 1]


@pytest.mark.parametrize(
    "model", [HilbertKernelClassifier(), InfinitelyDeepNTKClassifier(), InfinitelyDeepNTKClassifier(depth=2)]
)
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.where(X4 == 3, np.nan, X4), Y4, "NaN"),
        (np.where(X4 == 3, np.inf, X4), Y4, "infinity"),
        (X4[:0], [], "0 sample"),
        (X4, [1, 1, 1, 1], "two classes, got one class"),
        (X4, [0, 0, 1], "inconsistent"),
        (X4, [0, 0, np.nan, 1], "NaN"),
        (X4, [0.1, 0.2, 0.7, 0.9], "[Uu]nknown label type"),
        (X4, np.array([0, "a", 1, "b"], dtype=object), "labels of one kind|[Uu]nknown label type"),
        (X4[:, :0], Y4, "0 feature"),
        ([["a", "b"]] * 4, Y4, "convert"),
    ],
    ids=str,
)
def test_refuses_rows_and_leaves_the_model(model, X, y, message):
    model = clone(model).fit(X4, Y4)
    before, answer = dict(model.__dict__), model.predict(X4)
    with pytest.raises((ValueError, TypeError), match=message):
        model.fit(X, y)
    assert model.__dict__ == before
    np.testing.assert_array_equal(model.predict(X4), answer)


@pytest.mark.parametrize("model", [HilbertKernelClassifier(), InfinitelyDeepNTKClassifier()])
def test_refuses_queries(model):
    model = clone(model).fit(X4, Y4)
    for X, message in (
        (X4[:, :2], "2 features"),
        (X4 * np.nan, "NaN"),
        (X4[0], "1D array"),
        (X4[:0], "0 sample"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(X)


def test_refuses_one_feature_on_the_sphere():
    for model in (HilbertKernelClassifier(), InfinitelyDeepNTKClassifier(), InfinitelyDeepNTKClassifier(NO_A)):
        with pytest.raises(ValueError, match="n_features = 1"):
            model.fit(X4[:, :1], Y4)
    assert HilbertKernelClassifier(normalize=False).fit(X4[:, :1], Y4).alpha_ == 1  # on the line it is defined
    circle = InfinitelyDeepNTKClassifier().fit(X4[:, :2], Y4)  # d = 1 has its own activation
    assert circle.taxonomy_.alpha == pytest.approx(1)
    assert len(circle.coefs_) == 8


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (HilbertKernelClassifier(alpha=0.0), ValueError, "alpha must be a finite number > 0, got 0.0"),
        (HilbertKernelClassifier(alpha=-1), ValueError, "alpha must be .* got -1"),
        (HilbertKernelClassifier(alpha=np.inf), ValueError, "alpha must be .* got inf"),
        (HilbertKernelClassifier(alpha="d"), ValueError, "alpha must be 'dim' or"),
        (HilbertKernelClassifier(alpha=True), TypeError, "alpha"),
        (HilbertKernelClassifier(eps=-1e-3), ValueError, "eps must be a finite number >= 0"),
        (HilbertKernelClassifier(normalize="yes"), TypeError, "normalize must be True or False"),
        (InfinitelyDeepNTKClassifier(depth=0), ValueError, "depth must be an integer >= 1, got 0"),
        (InfinitelyDeepNTKClassifier(depth=2.5), ValueError, "depth must be an integer"),
        (InfinitelyDeepNTKClassifier(depth=-np.inf), ValueError, "depth"),
        (InfinitelyDeepNTKClassifier(depth="deep"), ValueError, "depth"),
        (InfinitelyDeepNTKClassifier(hermite=NO_A, depth=1000), ValueError, "use depth=inf"),
        (InfinitelyDeepNTKClassifier(ridge=-1.0), ValueError, "ridge must be a finite number >= 0"),
        (InfinitelyDeepNTKClassifier(ridge=None), TypeError, "ridge"),
        (InfinitelyDeepNTKClassifier(kernel="rbf"), ValueError, "kernel must be 'ntk' or 'nngp'"),
        (InfinitelyDeepNTKClassifier(hermite=[1.0, 1.0]), ValueError, "squares that sum to 1"),
        (InfinitelyDeepNTKClassifier(hermite=[1.0, 0.0]), ValueError, "beyond a_0"),
        (InfinitelyDeepNTKClassifier(hermite=[]), ValueError, "hermite"),
        (InfinitelyDeepNTKClassifier(hermite=[np.nan, 1.0]), ValueError, "finite"),
        (InfinitelyDeepNTKClassifier(hermite="relu"), ValueError, "hermite must be 'dim' or"),
        (InfinitelyDeepNTKClassifier(hermite=[0.0, 1.0]), ValueError, "linear"),
        (InfinitelyDeepNTKClassifier(hermite=NO_A, activation=np.tanh), ValueError, "exclude each other"),
        (InfinitelyDeepNTKClassifier(activation="relu"), TypeError, "activation must be callable"),
        (InfinitelyDeepNTKClassifier(activation=np.sign), ValueError, "jumps"),
        (InfinitelyDeepNTKClassifier(activation=np.log), ValueError, "NaN or infinity"),
        (InfinitelyDeepNTKClassifier(activation=np.sum), ValueError, "got shape"),
        (InfinitelyDeepNTKClassifier(activation=np.zeros_like), ValueError, "must not be zero"),
        (InfinitelyDeepNTKClassifier(activation=np.ones_like), ValueError, "beyond a_0|constant"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v).split(" at 0x")[0],  # the same in every worker
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_refuses_parameters(model, error, message):
    with pytest.raises(error, match=message):
        model.fit(X4, Y4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ntk_kernel(X4, X4[:, :2]), "same p"),
        (lambda: ntk_kernel(X4 * np.nan), "X must be finite"),
        (lambda: ntk_kernel(X4, X4 * np.inf), "Y must be finite"),
        (lambda: ntk_kernel(X4, depth=2000), "overflow"),
        (lambda: ntk_kernel(X4, coefs=[1.0, 2.0]), "sum to 1"),
        (lambda: ntk_kernel(X4[:, :1]), "n_features = 1"),
        (lambda: nngp_kernel(X4, depth=0), "depth"),
        (lambda: hilbert_kernel(X4, X4[:, :2]), "same p"),
        (lambda: hilbert_kernel(X4 * np.nan), "finite"),
        (lambda: hilbert_kernel(X4, alpha=-1), "alpha"),
        (lambda: koenigs_kernel(1.5, explicit_coefficients(2)), r"\[-1, 1\]"),
        (lambda: koenigs_kernel(np.nan, explicit_coefficients(2)), r"\[-1, 1\]"),
        (lambda: koenigs_kernel(0.5, WITH_A), "a_0 = 0"),
        (lambda: koenigs_kernel(0.5, NO_A), "a_1"),
        (lambda: koenigs_kernel(0.5, [0.0, 1.0]), "a_1"),
        (lambda: explicit_coefficients(0), "dimension"),
        (lambda: explicit_coefficients(2.5), "dimension"),
        (lambda: explicit_coefficients(5000), "dimension"),
        (lambda: hermite_coefficients(np.tanh, 0), "degree"),
        (lambda: HermiteActivation([0.5]), "sum to 1"),
        (lambda: taxonomy([[1.0]]), "shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_functions_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_far_queries_are_refused_and_not_nan():
    model = HilbertKernelClassifier(normalize=False).fit(X4, Y4)
    with pytest.raises(ValueError, match="1e150 times"):
        model.predict(X4 * 1e200)
    with pytest.raises(ValueError, match="spread less"):
        HilbertKernelClassifier(normalize=False).fit(X4 / 3 * 1.7e308, Y4)
