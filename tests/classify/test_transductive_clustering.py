"""Transductive clustering: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import xlogy
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import kneighbors_graph
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler, normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.classify import transductive_clustering as tc
from shoestring.classify.transductive_clustering import (
    ConstrainedPrototypeClustering,
    cluster,
    energy,
    neighbour_graph,
    relax_labels,
    transduce,
    transduce_tasks,
)

DIGITS, DIGIT_LABELS = load_digits(return_X_y=True)
CONFIGURATIONS = [
    ConstrainedPrototypeClustering(),
    ConstrainedPrototypeClustering(prototype="mode", assignment="soft"),
    ConstrainedPrototypeClustering(prototype="mode", sigma=0.5, n_neighbors=3),
    ConstrainedPrototypeClustering(laplacian=0.0, align=False),
    ConstrainedPrototypeClustering(assignment="soft", laplacian=5.0, max_iter=20),
]
ALL_FORMS = [
    {"prototype": prototype, "assignment": assignment, "laplacian": laplacian}
    for prototype in ("mean", "mode")
    for assignment in ("hard", "soft")
    for laplacian in (0.0, 0.7, 6.0)
]


@parametrize_with_checks(CONFIGURATIONS)
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


def task(seed=0, shot=1, query=15, way=5, classes=range(5, 10)):
    """A real task: unit rows of digits, (support, labels, query, answers)."""
    rng = np.random.default_rng(seed)
    base = DIGITS[~np.isin(DIGIT_LABELS, list(classes))].mean(0)
    chosen = rng.permutation(list(classes))[:way]
    rows = [rng.permutation(np.flatnonzero(DIGIT_LABELS == k))[: shot + query] for k in chosen]
    X = normalize(DIGITS - base)
    support, queries = np.concatenate([r[:shot] for r in rows]), np.concatenate([r[shot:] for r in rows])
    return X[support], np.repeat(np.arange(way), shot), X[queries], np.repeat(np.arange(way), query)


def fit(support, labels, query, **options):
    X, y = np.concatenate([support, query]), np.concatenate([labels, np.full(len(query), -1)])
    return ConstrainedPrototypeClustering(**options).fit(X, y)


def few_labels(seed=0, shot=3, classes=10):
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(DIGIT_LABELS < classes))[:400]
    X, y = normalize(DIGITS[rows] - DIGITS.mean(0)), DIGIT_LABELS[rows]
    few = np.full(len(y), -1)
    for k in range(classes):
        few[np.flatnonzero(y == k)[:shot]] = k
    return X, few, y


def nearest_mean(support, labels, query):
    """SimpleShot."""
    means = np.stack([support[labels == k].mean(0) for k in np.unique(labels)])
    return np.unique(labels)[np.square(query[:, None] - means).sum(2).argmin(1)]


def softmax(Z):
    Z = np.exp(Z - Z.max(1, keepdims=True))
    return Z / Z.sum(1, keepdims=True)


def plain_graph(X, k=2):
    A = kneighbors_graph(X, k).toarray()
    return (A + A.T) / 2


# ---- what it is equal to


def test_no_iteration_is_the_nearest_prototype():
    for seed, shot in [(0, 1), (1, 5)]:
        support, labels, query, _ = task(seed, shot)
        expected = nearest_mean(support, labels, query)
        model = fit(support, labels, query, laplacian=0.0, max_iter=0, align=False)
        np.testing.assert_array_equal(model.transduction_[len(labels) :], expected)
        np.testing.assert_array_equal(model.predict(query), expected)


@pytest.mark.parametrize("shot", [1, 5])
def test_without_laplacian_it_is_semi_supervised_lloyd(shot):
    """Means of all members, support included; every query to the nearest; support never moves. In plain NumPy."""
    for seed in range(5):
        support, labels, query, _ = task(seed, shot)
        X = np.concatenate([support, query])
        M = np.stack([support[labels == k].mean(0) for k in range(5)])
        while True:
            l = np.concatenate([labels, np.square(query[:, None] - M).sum(2).argmin(1)])
            M_next = np.stack([X[l == k].mean(0) for k in range(5)])
            if np.allclose(M, M_next, atol=1e-14):
                break
            M = M_next
        model = fit(support, labels, query, laplacian=0.0, align=False, tol=0.0)
        np.testing.assert_array_equal(model.transduction_, l)
        np.testing.assert_allclose(model.prototypes_, M, atol=1e-12)
        assert model.energy_[-1] == pytest.approx(np.square(X - M[l]).sum(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_without_support_it_is_kmeans(seed):
    rng = np.random.default_rng(seed)
    X = DIGITS[rng.permutation(len(DIGITS))[:300]] + 1e-3 * rng.standard_normal((300, 64))  # integers tie
    init = X[:7].copy()
    peer = KMeans(7, init=init, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(X)
    found = cluster(
        torch.as_tensor(X)[None],
        torch.full((1, len(X)), -1),
        7,
        init=torch.as_tensor(init)[None],
        laplacian=0.0,
        tol=0.0,
        max_iter=300,
    )
    np.testing.assert_array_equal(found.labels[0].numpy(), peer.labels_)
    np.testing.assert_allclose(found.prototypes[0].numpy(), peer.cluster_centers_, atol=1e-9)
    assert found.energy[0, -1].item() == pytest.approx(peer.inertia_, rel=1e-10)


def test_fixed_prototypes_and_one_pass_are_laplacianshot():
    """LaplacianShot in plain NumPy: distances to the support means, sweeps over the queries alone."""
    support, labels, query, _ = task(3, shot=5)
    M = np.stack([support[labels == k].mean(0) for k in range(5)])
    a, W = np.square(query[:, None] - M).sum(2), plain_graph(query)
    S = softmax(-a)
    for _ in range(400):
        S = softmax(-a + 0.7 * W @ S)
    Q = torch.as_tensor(query)[None]
    found = relax_labels(torch.as_tensor(a)[None], torch.zeros(1, 75, 5), neighbour_graph(Q, 2), 0.7)
    np.testing.assert_array_equal(found.memberships[0].argmax(1).numpy(), S.argmax(1))
    np.testing.assert_allclose(found.memberships[0].numpy(), S, atol=1e-3)  # it stops by the official 1e-7 of E
    assert (found.eta == 1).all()


@pytest.mark.parametrize("prototype", ["mean", "mode"])
def test_one_iteration_written_out(prototype):
    """Labels by the nearest prototype, prototypes of those labels, relaxed labels: the whole first iteration."""
    support, labels, query, _ = task(4, shot=2)
    X = np.concatenate([support, query])
    M = np.stack([support[labels == k].mean(0) for k in range(5)])
    l = np.square(X[:, None] - M).sum(2).argmin(1)
    l[: len(labels)] = labels
    A = kneighbors_graph(X, 2).toarray()
    sigma2 = (A * np.square(X[:, None] - X).sum(2)).sum() / (5 * len(X))
    if prototype == "mean":
        M = np.stack([X[l == k].mean(0) for k in range(5)])
        a = np.square(X[:, None] - M).sum(2)
    else:
        for k in range(5):
            for _ in range(3000):
                g = np.exp(-np.square(X - M[k]).sum(1) / (2 * sigma2)) * (l == k)
                M[k] = g @ X / g.sum()
        a = -np.exp(-np.square(X[:, None] - M).sum(2) / (2 * sigma2))
    S = softmax(-a)
    S[: len(labels)] = np.eye(5)[labels]
    for _ in range(300):
        S = softmax(-a + 0.7 * (A + A.T) / 2 @ S)
        S[: len(labels)] = np.eye(5)[labels]
    with pytest.warns(ConvergenceWarning):
        model = fit(support, labels, query, prototype=prototype, align=False, max_iter=1)
    if prototype == "mode":
        assert model.sigma_**2 == pytest.approx(sigma2, rel=1e-12)
    np.testing.assert_allclose(model.prototypes_, M, atol=1e-3 if prototype == "mode" else 1e-12)
    np.testing.assert_allclose(model.label_distributions_, S, atol=1e-3)
    np.testing.assert_array_equal(model.transduction_, S.argmax(1))


# ---- the certificate


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_energy_never_rises(options):
    for seed, shot in [(0, 1), (1, 1), (2, 5)]:
        support, labels, query, _ = task(seed, shot)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = fit(support, labels, query, tol=0.0, **options)
        assert np.diff(model.energy_).max(initial=-1.0) <= 1e-11
        assert len(model.energy_) == model.n_iter_ + 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["mean", "mode"]),
    st.sampled_from(["hard", "soft"]),
    st.floats(0, 20),
    st.integers(1, 4),
    st.floats(0.05, 20),
)
def test_energy_never_rises_on_any_data(seed, prototype, assignment, laplacian, k, scale):
    rng = np.random.default_rng(seed)
    n, d, K = rng.integers(8, 40), rng.integers(1, 6), rng.integers(2, 5)
    X = scale * rng.standard_normal((1, n, d)).round(rng.integers(0, 4))  # ties too
    y = np.concatenate([np.arange(K), rng.integers(-1, K, n - K)])[None]
    found = cluster(
        torch.as_tensor(X),
        torch.as_tensor(y),
        int(K),
        prototype=prototype,
        assignment=assignment,
        laplacian=laplacian,
        n_neighbors=k,
        tol=0.0,
        max_iter=30,
    )
    E = found.energy[0].numpy()
    assert np.diff(E).max(initial=-1.0) <= 1e-12 * (n * K + np.abs(E).max())
    np.testing.assert_array_equal(found.labels[0].numpy()[y[0] >= 0], y[0][y[0] >= 0])


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_energy_is_that_of_the_outcome(options):
    """The last energy, from the definition, in NumPy."""
    support, labels, query, _ = task(5, shot=2)
    model = fit(support, labels, query, align=False, **options)
    X = np.concatenate([support, query])
    a = np.square(X[:, None] - model.prototypes_).sum(2)
    if options["prototype"] == "mode":
        a = -np.exp(-a / (2 * model.sigma_**2))
    S = model.label_distributions_
    if options["assignment"] == "hard":
        S = np.eye(5)[model.transduction_]
    E = (S * a).sum() + xlogy(S, S).sum() - options["laplacian"] / 2 * (S * (plain_graph(X) @ S)).sum()
    assert model.energy_[-1] == pytest.approx(E, rel=1e-10)


def test_label_sweeps_never_raise_their_energy():
    """With the symmetric graph. With the official, unsymmetric one the same sweeps do raise it."""
    worst_official = -np.inf
    for seed in range(20):
        support, labels, query, _ = task(seed)
        X = torch.as_tensor(np.concatenate([support, query]))[None]
        clamp = torch.zeros(1, 80, 5, dtype=torch.float64)
        clamp[0, torch.arange(5), torch.as_tensor(labels)] = 1
        a = tc.squared_distances(X, X[:, :5])
        found = relax_labels(a, clamp, neighbour_graph(X), 0.7)
        assert found.energy.diff().max() <= 1e-12
        assert (found.eta == 1).all()  # the paper's own sweep, never damped
        A, S, E = kneighbors_graph(X[0].numpy(), 2).toarray(), softmax(-a[0].numpy()), []
        for _ in range(60):
            S = softmax(-a[0].numpy() + 0.7 * A @ S)
            S[:5] = np.eye(5)
            E.append((xlogy(S, S) + S * a[0].numpy()).sum() - 0.35 * (S * (A @ S)).sum())
        worst_official = max(worst_official, np.diff(E).max())
    assert worst_official > 1e-4


def undamped(a, W, lam, Z, sweeps):
    E = []
    for _ in range(sweeps):
        S = softmax(Z)
        E.append((xlogy(S, S) + S * a).sum() - lam / 2 * (S * (W @ S)).sum())
        Z = -a + lam * W @ S
    return np.array(E)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0.1, 1.0))
def test_undamped_sweep_is_safe_up_to_two_over_the_lowest_eigenvalue(seed, k, share):
    """lambda <= 2 / -lambda_min(W): the bound of the module's docstring, from wild starts."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((24, 3))
    W = plain_graph(X, k)
    lam = share * 2 / -np.linalg.eigvalsh(W)[0]
    E = undamped(rng.standard_normal((24, 3)), W, lam, 5 * rng.standard_normal((24, 3)), 40)
    assert np.diff(E).max() <= 1e-11


def test_beyond_that_the_sweep_rises_and_the_damped_one_does_not():
    """Two rows that have only each other swap their labels for ever under the plain sweep."""
    X = torch.tensor([[[0.0], [1.0], [50.0], [51.0]]], dtype=torch.float64)
    graph, lam = neighbour_graph(X, 1), 8.0
    W = graph.dense(1)[0].numpy()
    start = np.array([[6.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 6.0]])
    a = np.zeros((4, 2))
    assert np.diff(undamped(a, W, lam, start, 60)).max() > 1e-3
    found = relax_labels(torch.as_tensor(a)[None], torch.zeros(1, 4, 2), graph, lam, start=torch.as_tensor(start)[None])
    assert found.energy.diff().max() <= 1e-12
    assert found.eta.item() < 1
    labels = found.memberships[0].argmax(1)
    assert labels[0] == labels[1]
    assert labels[2] == labels[3]


def test_official_prototypes_raise_the_energy_that_ours_do_not():
    """Hard prototypes with the relaxed energy, which the official code watches: it rises in most real tasks."""
    rises = 0
    for seed in range(10):
        support, labels, query, _ = task(seed)
        X = np.concatenate([support, query])
        W, M, E = plain_graph(X), support, []
        l = np.square(X[:, None] - M).sum(2).argmin(1)
        for _ in range(6):
            l[:5] = labels
            M = np.stack([X[l == k].mean(0) for k in range(5)])
            a = np.square(X[:, None] - M).sum(2)
            S = softmax(-a)
            for _ in range(60):
                S[:5] = np.eye(5)
                S = softmax(-a + 0.7 * W @ S)
            S[:5] = np.eye(5)
            E.append((xlogy(S, S) + S * a).sum() - 0.35 * (S * (W @ S)).sum())
            l = S.argmax(1)
        rises += np.diff(E).max() > 1e-6
    assert rises >= 5


def test_soft_form_ends_where_both_steps_stand():
    """A stationary point of the energy: prototypes are the soft means, memberships the softmax."""
    support, labels, query, _ = task(7, shot=5)
    model = fit(support, labels, query, align=False, assignment="soft", tol=0.0, max_iter=3000, laplacian=0.3)
    X, S, M = np.concatenate([support, query]), model.label_distributions_, model.prototypes_
    np.testing.assert_allclose(S.T @ X / S.sum(0)[:, None], M, atol=1e-3)
    expected = softmax(-np.square(X[:, None] - M).sum(2) + 0.3 * plain_graph(X) @ S)
    np.testing.assert_allclose(S[25:], expected[25:], atol=1e-3)


# ---- constraints


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_labelled_rows_keep_their_labels(options):
    """Even where they lie among another class."""
    support, labels, query, _ = task(0, shot=3)
    labels = labels[::-1].copy()  # all but the middle class are wrong
    labels[0] = 2
    model = fit(support, labels, query, **options)
    np.testing.assert_array_equal(model.transduction_[: len(labels)], labels)
    np.testing.assert_array_equal(model.label_distributions_[: len(labels)], np.eye(5)[labels])
    np.testing.assert_allclose(model.label_distributions_.sum(1), 1.0, atol=1e-12)
    assert (model.label_distributions_ >= 0).all()
    np.testing.assert_array_equal(model.label_distributions_.argmax(1), model.transduction_)


def two_chains():
    """Ten rows each, the first of each labelled: rows, graph, given labels, and costs that say the opposite."""
    chain = np.linspace(0, 9, 10)
    X = np.concatenate([np.c_[chain, np.zeros(10)], np.c_[chain, np.full(10, 30.0)]]) / 30
    clamp = torch.zeros(1, 20, 2, dtype=torch.float64)
    clamp[0, 0, 0] = clamp[0, 10, 1] = 1
    a = torch.tensor([[[0.3, 0.0]] * 10 + [[0.0, 0.3]] * 10], dtype=torch.float64)
    return X, neighbour_graph(torch.as_tensor(X)[None], 2), clamp, a


@pytest.mark.parametrize("laplacian", [20.0, 1e3])
def test_large_lambda_carries_a_label_along_its_component(laplacian):
    """From neutral costs. (Not against costs, as the card has it: see the next test.)"""
    X, graph, clamp, a = two_chains()
    found = relax_labels(torch.zeros_like(a), clamp, graph, laplacian)
    np.testing.assert_array_equal(found.memberships[0].argmax(1).numpy(), np.repeat([0, 1], 10))
    assert found.memberships[0].amax(1).min() > 0.99
    y = np.full(20, -1)
    y[0], y[10] = 4, 7
    model = ConstrainedPrototypeClustering(laplacian=laplacian, align=False).fit(X, y)
    np.testing.assert_array_equal(model.transduction_, np.repeat([4, 7], 10))


def test_large_lambda_makes_one_label_a_component_the_minimum_but_sweeps_are_local():
    """Against every cost, the label of the component's support is what E asks for; sweeps that start at costs which all
    agree on another label confirm each other there, and stay."""
    _, graph, clamp, a = two_chains()
    one_label = torch.eye(2, dtype=torch.float64)[torch.arange(20)[None] // 10]
    rng = np.random.default_rng(0)
    others = torch.eye(2, dtype=torch.float64)[torch.as_tensor(rng.integers(0, 2, (200, 1, 20)))]
    for other in [torch.softmax(-a, 2), one_label.flip(2), *others]:
        S = torch.where(clamp.sum(2, keepdim=True) > 0, clamp, other)
        if not torch.equal(S, one_label):
            assert energy(S, a, graph, 1e3) > energy(one_label, a, graph, 1e3)
    found = relax_labels(a, clamp, graph, 1e3)
    assert found.memberships[0, 4:10].argmax(1).tolist() == [1] * 6
    assert energy(found.memberships, a, graph, 1e3) > energy(one_label, a, graph, 1e3)


# ---- symmetries


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_order_of_rows_and_names_of_classes_do_not_matter(options):
    support, labels, query, _ = task(1, shot=3)
    plain = fit(support, labels, query, **options)
    rng = np.random.default_rng(0)
    X, y = np.concatenate([support, query]), np.concatenate([labels, np.full(len(query), -1)])
    order = rng.permutation(len(X))
    moved = ConstrainedPrototypeClustering(**options).fit(X[order], y[order])
    np.testing.assert_array_equal(moved.transduction_, plain.transduction_[order])
    np.testing.assert_allclose(moved.label_distributions_, plain.label_distributions_[order], atol=1e-9)
    names = np.array([30, 10, 50, 20, 40])
    renamed = ConstrainedPrototypeClustering(**options).fit(X, np.where(y < 0, -1, names[y]))
    np.testing.assert_array_equal(renamed.transduction_, names[plain.transduction_])
    np.testing.assert_allclose(renamed.prototypes_[np.argsort(np.argsort(names))], plain.prototypes_, atol=1e-9)


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_translation_and_rotation_do_not_matter(options):
    support, labels, query, _ = task(2, shot=2)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    plain = fit(support, labels, query, **options)
    moved = fit(support @ rotation + 100.0, labels, query @ rotation + 100.0, **options)
    np.testing.assert_array_equal(moved.transduction_, plain.transduction_)
    np.testing.assert_allclose(moved.label_distributions_, plain.label_distributions_, atol=1e-8)
    np.testing.assert_allclose(moved.prototypes_, plain.prototypes_ @ rotation + 100.0, atol=1e-8)
    np.testing.assert_allclose(moved.energy_, plain.energy_, rtol=1e-9)


def test_align_makes_a_shift_of_all_queries_harmless():
    support, labels, query, _ = task(3, shot=2)
    shift = np.random.default_rng(0).standard_normal(64)
    for options in ({}, {"prototype": "mode"}, {"assignment": "soft"}):
        plain, moved = fit(support, labels, query, **options), fit(support, labels, query + shift, **options)
        np.testing.assert_array_equal(moved.transduction_, plain.transduction_)
        np.testing.assert_allclose(moved.prototypes_, plain.prototypes_, atol=1e-9)
        np.testing.assert_array_equal(moved.predict(query + shift), plain.predict(query))
    free, moved = (fit(support, labels, q, align=False) for q in (query, query + shift))
    assert (moved.transduction_ != free.transduction_).any()
    assert (free.shift_ == 0).all()


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_equal_queries_get_equal_labels(options):
    support, labels, query, _ = task(6, shot=2, query=8)
    rows = np.concatenate([np.arange(40), [3, 3, 3, 17, 17, 30]])  # some three and four times
    order = np.random.default_rng(1).permutation(len(rows))
    model = fit(support, labels, query[rows[order]], **options)
    S = model.label_distributions_[len(labels) :]
    for row in (3, 17, 30):
        same = S[rows[order] == row]
        np.testing.assert_allclose(same, same[:1].repeat(len(same), 0), atol=1e-9)
        assert len(set(model.transduction_[len(labels) :][rows[order] == row])) == 1


# ---- the parts


def test_graph_is_that_of_scikit_learn_and_blocks_do_not_matter(monkeypatch):
    X = np.random.default_rng(0).standard_normal((3, 50, 4))
    expected = np.stack([plain_graph(x, 3) for x in X])
    np.testing.assert_array_equal(neighbour_graph(torch.as_tensor(X), 3).dense(3).numpy(), expected)
    monkeypatch.setattr("shoestring.classify._transductive_clustering_steps.BLOCK", 700)
    graph = neighbour_graph(torch.as_tensor(X), 3)
    np.testing.assert_array_equal(graph.dense(3).numpy(), expected)
    S = np.random.default_rng(1).random((3, 50, 2))
    np.testing.assert_allclose(graph.propagate(torch.as_tensor(S)).numpy(), expected @ S, atol=1e-12)
    sigma2 = [(w * np.square(x[:, None] - x).sum(2)).sum() / 250 for w, x in zip(expected, X, strict=True)]
    np.testing.assert_allclose(tc.bandwidth(torch.as_tensor(X), graph).square().numpy(), sigma2, rtol=1e-12)


def test_neighbours_that_tie_share_their_places():
    X = torch.tensor([[[0.0], [1.0], [-1.0], [1.0], [5.0]]], dtype=torch.float64)
    graph = neighbour_graph(X, 2)
    A = torch.zeros(5, 5, dtype=torch.float64)
    half = len(graph.rows) // 2
    A.index_put_((graph.rows[:half], graph.cols[:half]), 2 * graph.weights[:half])
    assert A[0].tolist() == pytest.approx([0, 2 / 3, 2 / 3, 2 / 3, 0])  # three at distance 1, two places
    assert A[4].tolist() == pytest.approx([0, 1, 0, 1, 0])
    np.testing.assert_allclose(A.sum(1).numpy(), 2.0)


def test_mean_shift_climbs_to_a_mode_and_survives_a_narrow_kernel():
    rng = np.random.default_rng(0)
    X = torch.as_tensor(np.concatenate([rng.normal(0, 0.1, (30, 2)), rng.normal(3, 0.1, (10, 2))]))[None]
    R, start = torch.ones(1, 40, 1, dtype=torch.float64), X.mean(1, keepdim=True)

    def density(M, sigma):
        return torch.exp(-tc.squared_distances(X, M) / (2 * sigma**2)).sum().item()

    sigma = torch.tensor([0.3], dtype=torch.float64)
    mode = tc.mode_prototypes(X, R, start, sigma)
    assert density(mode, 0.3) >= density(start, 0.3)
    grid = torch.as_tensor(np.stack(np.meshgrid(*[np.linspace(-1, 4, 201)] * 2), -1).reshape(1, -1, 2))
    values = torch.exp(-tc.squared_distances(grid, X) / (2 * 0.3**2)).sum(2)[0]
    np.testing.assert_allclose(mode[0, 0].numpy(), grid[0, values.argmax()].numpy(), atol=0.03)
    far = tc.mode_prototypes(X, R, start + 1e3, torch.tensor([1e-3], dtype=torch.float64))
    assert (far[0] == X[0]).all(1).any()  # all kernels underflow there; the nearest row is the limit
    empty = tc.mode_prototypes(X, torch.zeros_like(R), start, sigma)
    assert torch.equal(empty, start)


def test_cl2n():
    X = np.random.default_rng(0).standard_normal((6, 4))
    got = tc.centre_and_normalise(torch.as_tensor(X), torch.as_tensor(X.mean(0))).numpy()
    np.testing.assert_allclose(got, normalize(X - X.mean(0)), atol=1e-15)


def test_transduce_is_cl2n_shift_and_clustering():
    rng = np.random.default_rng(0)
    support, query, mean = rng.random((6, 9)), rng.random((20, 9)), rng.random(9)
    labels = np.array(list("abcabc"))
    model = fit(normalize(support - mean), [0, 1, 2, 0, 1, 2], normalize(query - mean), prototype="mode")
    np.testing.assert_array_equal(
        transduce(support, labels, query, mean, prototype="mode"), np.array(list("abc"))[model.transduction_[6:]]
    )
    model = fit(normalize(support), [0, 1, 2, 0, 1, 2], normalize(query), align=False, laplacian=0.2)
    np.testing.assert_array_equal(
        transduce(support, labels, query, align=False, laplacian=0.2), np.array(list("abc"))[model.transduction_[6:]]
    )


@pytest.mark.parametrize("options", ALL_FORMS, ids=str)
def test_tasks_in_a_batch_are_as_if_alone(options, monkeypatch):
    tasks = [task(seed, shot=2) for seed in range(7)]
    support, labels, query = (torch.as_tensor(np.stack(part)) for part in list(zip(*tasks, strict=True))[:3])
    mean = 0.3 * query.mean((0, 1))
    alone = [transduce(s, l, q, mean.numpy(), **options) for s, l, q, _ in tasks]
    together = transduce_tasks(support, labels, query, mean, **options)
    np.testing.assert_array_equal(together.numpy(), np.stack(alone))
    monkeypatch.setattr(tc, "TASKS", 3)
    assert torch.equal(transduce_tasks(support, labels, query, mean, **options), together)
    X, y = torch.cat([support, query], 1), torch.nn.functional.pad(labels, (0, 75), value=-1)
    batch = cluster(X, y, 5, **options)
    for t in range(7):
        one = cluster(X[t : t + 1], y[t : t + 1], 5, **options)
        assert one.n_iter == batch.n_iter[t]
        torch.testing.assert_close(one.memberships[0], batch.memberships[t], rtol=0, atol=1e-10)
        torch.testing.assert_close(one.energy[0, -1], batch.energy[t, -1], rtol=1e-12, atol=0)


def test_single_precision_tasks_agree_with_double():
    tasks = [task(seed, shot=1) for seed in range(30)]
    support, labels, query = (torch.as_tensor(np.stack(part)) for part in list(zip(*tasks, strict=True))[:3])
    single = transduce_tasks(support.float(), labels, query.float())
    assert (single == transduce_tasks(support, labels, query)).float().mean() > 0.99


# ---- a citizen of scikit-learn


def test_transduction_helps_on_digits():
    """Real data, three labels a class: above the nearest prototype by a margin, for every seed."""
    for seed in range(3):
        X, few, y = few_labels(seed)
        free = few == -1
        nearest = (nearest_mean(X[~free], y[~free], X[free]) == y[free]).mean()
        model = ConstrainedPrototypeClustering().fit(X, few)
        assert (model.transduction_[free] == y[free]).mean() > nearest + 0.02


def test_all_labelled_is_the_nearest_class_mean():
    X, y = load_iris(return_X_y=True)
    model = ConstrainedPrototypeClustering().fit(X, y)
    np.testing.assert_array_equal(model.predict(X), nearest_mean(X, y, X))
    np.testing.assert_array_equal(model.transduction_, y)


@pytest.mark.parametrize(
    "mark",
    [
        lambda names: names.tolist(),  # a list of strings and "-1"
        lambda names: np.where(names == "-1", -1, names.astype(object)),
        lambda names: np.where(names == "-1", None, names.astype(object)),
        lambda names: pd.Series(np.where(names == "-1", -1, names.astype(object))),
    ],
    ids=["list", "object", "None", "pandas"],
)
def test_string_labels(mark):
    X, few, _ = few_labels()
    plain = ConstrainedPrototypeClustering().fit(X, few)
    names = np.array([f"digit {k}" for k in range(10)])
    model = ConstrainedPrototypeClustering().fit(X, mark(np.where(few < 0, "-1", names[few])))
    np.testing.assert_array_equal(model.classes_, names)
    np.testing.assert_array_equal(model.transduction_, names[plain.transduction_])
    np.testing.assert_array_equal(model.predict(X), names[plain.predict(X)])


def test_minus_one_and_one_are_two_classes_and_a_warning_says_so():
    X = DIGITS[DIGIT_LABELS < 2]
    y = np.where(DIGIT_LABELS[DIGIT_LABELS < 2], 1, -1)
    with pytest.warns(UserWarning, match="taken as two classes"):
        model = ConstrainedPrototypeClustering().fit(X, y)
    assert model.classes_.tolist() == [-1, 1]
    assert model.score(X, y) > 0.98


def test_in_pipelines_searches_and_with_pandas():
    X, few, _ = few_labels()
    pipeline = make_pipeline(StandardScaler(with_std=False), Normalizer(), ConstrainedPrototypeClustering())
    assert cross_val_score(pipeline, DIGITS[:600], DIGIT_LABELS[:600], cv=3).mean() > 0.8
    grid = GridSearchCV(pipeline, {"constrainedprototypeclustering__prototype": ["mean", "mode"]}, cv=2)
    assert grid.fit(DIGITS[:400], DIGIT_LABELS[:400]).best_score_ > 0.8
    frame = pd.DataFrame(X, columns=[f"pixel {i}" for i in range(64)])
    model = clone(ConstrainedPrototypeClustering(prototype="mode")).fit(frame, pd.Series(few))
    assert list(model.feature_names_in_) == list(frame.columns)
    plain = ConstrainedPrototypeClustering(prototype="mode").fit(X.astype(np.float32), few)
    assert (plain.transduction_ == model.transduction_).mean() > 0.99
    again = clone(model).fit(frame, few)
    np.testing.assert_array_equal(again.label_distributions_, model.label_distributions_)


def test_no_global_state_is_touched():
    X, few, _ = few_labels()
    torch_state, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    ConstrainedPrototypeClustering(prototype="mode").fit(X, few)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.get_num_threads() == threads


def test_equal_rows_everywhere_are_no_accident():
    """Nothing to tell rows apart by: finite answers, no division by zero."""
    y = np.array([0, 1, -1, -1, -1, -1])
    for options in ALL_FORMS:
        model = ConstrainedPrototypeClustering(**options).fit(np.ones((6, 3)), y)
        assert np.isfinite(model.label_distributions_).all()
        assert np.isfinite(model.prototypes_).all()
        assert np.isfinite(model.energy_).all()


# ---- what must be refused, and leave the model as it was

GOOD_X = DIGITS[:30] / 16
GOOD_Y = np.where(np.arange(30) < 20, DIGIT_LABELS[:30], -1)


def spoilt(value):
    X = GOOD_X.copy()
    X[3, 2] = value
    return X


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        (spoilt(np.nan), GOOD_Y, ValueError, "X contains NaN"),
        (spoilt(np.inf), GOOD_Y, ValueError, "X contains infinity"),
        (GOOD_X[:0], GOOD_Y[:0], ValueError, "0 sample"),
        (GOOD_X[0], GOOD_Y[:1], ValueError, "Expected 2D array"),
        (GOOD_X, GOOD_Y[:29], ValueError, "y must hold a label for each row of X: X has 30 rows, y holds 29"),
        (GOOD_X, GOOD_Y[:0], ValueError, "y must hold a label for each row"),
        (GOOD_X, None, ValueError, "requires y"),
        (GOOD_X, np.full(30, -1), ValueError, "at least 2 classes, got 0"),
        (GOOD_X, np.where(np.arange(30) < 5, 3, -1), ValueError, "at least 2 classes, got 1"),
        (GOOD_X, np.full(30, 3), ValueError, "at least 2 classes, got 1"),
        (GOOD_X, ["a"] * 5 + ["-1"] * 25, ValueError, "at least 2 classes, got 1"),
        (GOOD_X, GOOD_Y + 0.5, ValueError, "Unknown label type"),
        (GOOD_X, np.where(GOOD_Y < 0, np.nan, GOOD_Y), ValueError, "y contains NaN"),
        (GOOD_X, np.array([1] * 15 + ["one"] * 15, dtype=object), TypeError, "y must hold labels of one kind"),
        (GOOD_X, np.array(["a", "b"] * 14 + [np.nan] * 2, dtype=object), TypeError, "y must hold labels of one kind"),
        (GOOD_X, np.zeros((30, 2), int), ValueError, "1d array"),
        (GOOD_X[:3], [0, 1, -1], ValueError, "n_neighbors must be < the number of rows, got 3"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(X, y, error, message):
    model = ConstrainedPrototypeClustering(n_neighbors=3).fit(GOOD_X[:, :50], GOOD_Y)
    before = {name: value for name, value in vars(model).items() if name.endswith("_")}
    with pytest.raises(error, match=message):
        model.fit(X, y)
    after = {name: value for name, value in vars(model).items() if name.endswith("_")}
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.n_features_in_ == 50


def test_predict_refuses_what_does_not_fit():
    model = ConstrainedPrototypeClustering().fit(GOOD_X, GOOD_Y)
    with pytest.raises(ValueError, match="63 features, but ConstrainedPrototypeClustering is expecting 64"):
        model.predict(GOOD_X[:, :63])
    with pytest.raises(ValueError, match="NaN"):
        model.predict(spoilt(np.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototype": "median"}, "prototype must be 'mean' or 'mode', got 'median'"),
        ({"assignment": None}, "assignment must be"),
        ({"laplacian": -0.1}, "laplacian must be a number >= 0, got -0.1"),
        ({"laplacian": np.nan}, "laplacian must be"),
        ({"laplacian": "auto"}, "laplacian must be"),
        ({"n_neighbors": 0}, "n_neighbors must be an integer >= 1, got 0"),
        ({"n_neighbors": 1.5}, "n_neighbors must be"),
        ({"n_neighbors": 30}, "n_neighbors must be < the number of rows"),
        ({"sigma": 0.0}, "sigma must be a number > 0 or 'auto', got 0.0"),
        ({"sigma": "best"}, "sigma must be"),
        ({"sigma": np.inf}, "sigma must be"),
        ({"max_iter": -1}, "max_iter must be an integer >= 0"),
        ({"max_iter": True}, "max_iter must be"),
        ({"tol": -1e-4}, "tol must be"),
        ({"align": "yes"}, "align must be True or False"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConstrainedPrototypeClustering(**options).fit(GOOD_X, GOOD_Y)


@pytest.mark.parametrize(
    ("support", "labels", "query", "mean", "error", "message"),
    [
        (GOOD_X[:4], [0, 1, 0], GOOD_X, None, ValueError, "labels must hold one label for each of the 4 rows"),
        (GOOD_X[:4], [0, 1, 2, -1], GOOD_X, None, ValueError, "unlabelled row"),
        (GOOD_X[:4], [7, 7, 7, 7], GOOD_X, None, ValueError, "labels must hold at least 2 classes"),
        (GOOD_X[:4], [0, 1, 0, 1], GOOD_X[:, :5], None, ValueError, "query must have the 64 features of support"),
        (GOOD_X[:4], [0, 1, 0, 1], GOOD_X[:0], None, ValueError, "0 sample"),
        (GOOD_X[:4], [0, 1, 0, 1], spoilt(np.nan), None, ValueError, "query contains NaN"),
        (GOOD_X[:4], [0, 1, 0, 1], GOOD_X, np.zeros(5), ValueError, r"base_mean must be of shape \(64,\)"),
        (GOOD_X[:4], [0, 1, 0, 1], GOOD_X, np.full(64, np.nan), ValueError, "base_mean contains NaN"),
    ],
)
def test_transduce_refuses(support, labels, query, mean, error, message):
    with pytest.raises(error, match=message):
        transduce(support, labels, query, mean)


def test_batched_form_refuses():
    X, y = torch.zeros(2, 4, 3), torch.tensor([[0, 1, 0, 1]] * 2)
    for support, labels, query, message in [
        (X[0], y, X, "must be of shape"),
        (X, y, X[:1], "must be of shape"),
        (X, y, X[:, :0], "not empty"),
        (X, y[:, :3], X, "labels must be int64"),
        (X, y.float(), X, "labels must be int64"),
        (X, y - 1, X, "labels must be classes 0"),
        (X, y * torch.tensor([[1], [0]]), X, "task 1 has none of class 1"),
        (X, y, torch.full_like(X, torch.nan), "finite"),
        (X.long(), y, X.long(), "float"),
    ]:
        with pytest.raises(ValueError, match=message):
            transduce_tasks(support, labels, query)
    with pytest.raises(ValueError, match="y must be -1 to 1, got"):
        cluster(X, y * 2, 2)
    with pytest.raises(ValueError, match="init must be finite of shape"):
        cluster(X, y, 2, init=torch.zeros(2, 3, 3))
    with pytest.raises(TypeError, match="unexpected keyword"):
        transduce_tasks(X, y, X, shots=5)


def test_energy_function_is_its_definition():
    rng = np.random.default_rng(0)
    X, S, a = rng.random((2, 9, 3)), rng.dirichlet(np.ones(4), (2, 9)), rng.random((2, 9, 4))
    graph = neighbour_graph(torch.as_tensor(X), 2)
    expected = [
        (s * np.log(s) + s * c).sum() - 0.6 * sum(w[p, q] * s[p] @ s[q] for p in range(9) for q in range(9))
        for s, c, w in zip(S, a, graph.dense(2).numpy(), strict=True)
    ]
    np.testing.assert_allclose(energy(torch.as_tensor(S), torch.as_tensor(a), graph, 1.2).numpy(), expected, rtol=1e-12)
