"""Rules that combine gradients: what their papers define, exactly, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize, nnls
from torch import Tensor

from shoestring.train import aggregators
from shoestring.train.aggregators import (
    aggregate_cagrad,
    aggregate_imtl,
    aggregate_mean,
    aggregate_mgda,
    aggregate_pcgrad,
)

RULES = {
    "mean": aggregate_mean,
    "pcgrad": aggregate_pcgrad,
    "cagrad": aggregate_cagrad,
    "mgda": aggregate_mgda,
    "imtl": aggregate_imtl,
}
by_rule = pytest.mark.parametrize("rule", RULES)


def gradients(seed: int, m: int | None = None, n: int | None = None, decades: float = 4.0) -> Tensor:
    """Rows whose norms differ by up to so many powers of ten; every third time two of them all but opposite."""
    rng = np.random.default_rng(seed)
    m, n = m or int(rng.integers(2, 7)), n or int(rng.integers(1, 9))
    G = rng.standard_normal((m, n)) * 10 ** rng.uniform(-decades / 2, decades / 2, (m, 1))
    if seed % 3 == 0:
        G[1] = -0.5 * G[0] + 1e-3 * G[1]
    return torch.from_numpy(G)


# ---- every rule


@by_rule
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_gives_exactly_zero(rule: str, m: int, dtype: torch.dtype) -> None:
    d = RULES[rule](torch.zeros(m, 5, dtype=dtype))
    assert d.dtype == dtype
    assert torch.equal(d, torch.zeros(5, dtype=dtype))


@by_rule
def test_one_task_keeps_its_gradient(rule: str) -> None:
    """CAGrad up to its factor (1 + c) / (1 + c^2)."""
    G = gradients(1, m=1, n=7)
    factor = 1.4 / 1.16 if rule == "cagrad" else 1.0
    torch.testing.assert_close(RULES[rule](G), factor * G[0], rtol=1e-12, atol=0)


@by_rule
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e9])
def test_all_gradients_scaled_scale_the_direction(rule: str, scale: float) -> None:
    for seed in range(20):
        G = gradients(seed)
        d = RULES[rule](G)
        torch.testing.assert_close(RULES[rule](scale * G), scale * d, rtol=1e-6, atol=1e-9 * scale * float(G.norm()))


@by_rule
def test_order_of_the_tasks_does_not_matter(rule: str) -> None:
    """Of two tasks for PCGrad, whose order of projections matters for more."""
    for seed in range(20):
        G = gradients(seed, m=2 if rule == "pcgrad" else 5, n=8)
        torch.testing.assert_close(RULES[rule](G.flip(0)), RULES[rule](G), rtol=1e-6, atol=1e-8 * float(G.norm()))


@by_rule
def test_a_dead_task_gives_no_nan(rule: str) -> None:
    G = gradients(2, m=3, n=6)
    G[1] = 0
    d = RULES[rule](G)
    assert torch.isfinite(d).all()
    if rule == "mgda":  # by definition: zero is in the hull
        assert torch.equal(d, torch.zeros(6, dtype=torch.float64))
    if rule == "imtl":
        torch.testing.assert_close(d, aggregate_imtl(G[[0, 2]]))
    if rule == "pcgrad":
        torch.testing.assert_close(d, aggregate_pcgrad(G[[0, 2]]))


@by_rule
def test_blocks_of_columns_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = gradients(4, m=3, n=50)
    whole = RULES[rule](G)
    monkeypatch.setattr(aggregators, "BLOCK", 7)
    torch.testing.assert_close(RULES[rule](G), whole, rtol=1e-9, atol=1e-12)


@by_rule
def test_rows_may_be_strided_and_single_precision(rule: str) -> None:
    wide = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    expected = RULES[rule](wide[:, :30].double().contiguous())
    torch.testing.assert_close(RULES[rule](wide[:, :30]).double(), expected, rtol=1e-4, atol=1e-5)
    assert RULES[rule](wide[:, :0]).shape == (0,)


@by_rule
def test_half_precision_takes_inner_products_in_single(rule: str) -> None:
    """In bfloat16 the inner products of 3,000 numbers would lose the small angle between these rows."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3000, generator=generator)
    G = torch.stack([base + 0.1 * torch.randn(3000, generator=generator) for _ in range(3)]).bfloat16()
    expected = RULES[rule](G.double())
    assert float((RULES[rule](G).double() - expected).norm() / expected.norm()) < 0.01


# ---- PCGrad


def test_pcgrad_of_opposite_gradients_is_zero() -> None:
    for seed in range(10):
        g = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(aggregate_pcgrad(torch.stack([g, -g])), torch.zeros(1000))


@pytest.mark.parametrize("seed", range(6))
def test_pcgrad_is_its_algorithm(seed: int) -> None:
    """Written out on vectors, with the same draws."""
    G = gradients(seed, m=5, n=6)
    draws = torch.Generator().manual_seed(seed)
    total = torch.zeros(6, dtype=torch.float64)
    for i in range(5):
        g = G[i].clone()
        for j in torch.randperm(5, generator=draws).tolist():
            if j != i and g @ G[j] < 0:
                g -= (g @ G[j]) / (G[j] @ G[j]) * G[j]
        total += g
    d = aggregate_pcgrad(G, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(d, total, rtol=1e-8, atol=1e-9 * float(G.norm()))


def test_pcgrad_leaves_the_gradients_and_the_global_generator_alone() -> None:
    G = gradients(3, m=4, n=6)
    before, state = G.clone(), torch.get_rng_state()
    aggregate_pcgrad(G, torch.Generator().manual_seed(0))
    assert torch.equal(G, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_pcgrad_without_conflict_is_the_sum() -> None:
    G = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aggregate_pcgrad(G), G.sum(0))


# ---- MGDA


@pytest.mark.parametrize("seed", range(60))
def test_mgda_helps_every_task_and_is_the_shortest_mixture(seed: int) -> None:
    """``<d, g_i> >= ||d||^2`` for every i is both, for a d in the hull: checked to 1e-9 of the longest row."""
    G = gradients(seed)
    d, scale = aggregate_mgda(G), float(G.norm(dim=1).max())
    assert float((G @ d).min()) >= float(d @ d) - 1e-9 * scale**2
    w = linprog(np.zeros(len(G)), A_eq=np.vstack([G.T.numpy() / scale, np.ones(len(G))]), b_eq=[*(d / scale), 1.0])
    assert w.status == 0  # d is a mixture of the rows


@pytest.mark.parametrize("m", [2, 3, 6])
def test_mgda_is_scipys_quadratic_programme(m: int) -> None:
    for seed in range(8):
        G = gradients(seed, m=m, n=10, decades=1)
        K = (G @ G.T).numpy()
        qp = minimize(
            lambda w, K=K: w @ K @ w,
            np.full(m, 1 / m),
            jac=lambda w, K=K: 2 * K @ w,
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        d = aggregate_mgda(G)
        assert float(d @ d) <= qp.fun * (1 + 1e-9) + 1e-12
        assert float(d @ d) == pytest.approx(qp.fun, rel=1e-4, abs=1e-9)


def test_mgda_of_two_tasks_reaches_the_corners() -> None:
    """Official code stops at weights .999 and .001."""
    G = torch.tensor([[1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(aggregate_mgda(G), G[0], rtol=0, atol=1e-15)


# ---- CAGrad


@pytest.mark.parametrize("c", [0.2, 0.4, 0.9])
def test_cagrad_is_the_best_worst_case_in_the_ball(c: float) -> None:
    """Its conditions of optimality, rows differing in size by up to four powers of ten.

    d - g_0 is on the sphere, and a non-negative mixture of the rows with the least inner product; or within it, and
    these rows have a mixture of 0.
    """
    inside = 0
    for seed in range(120):
        G = gradients(seed)
        scale, g0 = float(G.norm(dim=1).max()), G.mean(0)
        d = aggregate_cagrad(G, c) * (1 + c**2)
        u = ((d - g0) / (c * g0.norm())).numpy()
        inner = (G @ d).numpy() / scale**2
        assert np.linalg.norm(u) <= 1 + 1e-5
        worst = (G.numpy()[inner <= inner.min() + 2e-6] / scale).T
        if np.linalg.norm(u) > 1 - 1e-5:
            assert nnls(worst, u)[1] < 2e-5
        else:
            inside += 1
            assert nnls(np.vstack([worst, np.ones(worst.shape[1])]), np.append(np.zeros(len(worst)), 1.0))[1] < 1e-5
    assert inside < 60


def test_cagrad_with_c_zero_is_the_mean() -> None:
    G = gradients(5)
    torch.testing.assert_close(aggregate_cagrad(G, c=0.0), aggregate_mean(G))


def test_cagrad_does_not_depend_on_the_scale_of_h() -> None:
    """h is about 100 times smaller than g: SLSQP on its inner products as they are stops at the start."""
    G = gradients(7, m=3, n=20, decades=1).float()
    torch.testing.assert_close(aggregate_cagrad(1e-6 * G) * 1e6, aggregate_cagrad(G), rtol=1e-4, atol=1e-5)


# ---- IMTL-G


@pytest.mark.parametrize("m", [2, 3, 5])
def test_imtl_projects_equally_on_all_tasks(m: int) -> None:
    for seed in range(10):
        G = gradients(3 * seed + 1, m=m, n=12, decades=2)
        d = aggregate_imtl(G)
        projections = (G @ d) / G.norm(dim=1)
        torch.testing.assert_close(projections, projections[:1].expand(m), rtol=1e-6, atol=0)
        weights = torch.linalg.lstsq(G.T, d[:, None]).solution
        assert float(weights.sum()) == pytest.approx(1, rel=1e-7)


def test_imtl_of_opposite_gradients_is_zero() -> None:
    g = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aggregate_imtl(torch.stack([g, -g])), torch.zeros(50), rtol=0, atol=1e-6)


# ---- bad input


@by_rule
@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 3, 4)])
def test_what_is_no_matrix_of_gradients_is_refused(rule: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"G must be of shape \(m, n\) with m >= 1, got"):
        RULES[rule](torch.zeros(shape))
    for wrong in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.complex64), [[1.0]]):
        with pytest.raises(TypeError, match="G must be a tensor of real floating-point numbers"):
            RULES[rule](wrong)


@pytest.mark.parametrize("rule", ["pcgrad", "cagrad", "mgda", "imtl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(rule: str, value: float) -> None:
    G = torch.ones(2, 3)
    G[1, 1] = value
    with pytest.raises(ValueError, match="G must be finite"):
        RULES[rule](G)


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(ValueError, match=r"c must be >= 0, got -0\.1"):
        aggregate_cagrad(torch.ones(2, 3), c=-0.1)
