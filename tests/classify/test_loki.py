"""Loki: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import tracemalloc

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from shoestring.classify import loki
from shoestring.classify.loki import (
    FrechetMeanClassifier,
    LokiHead,
    bundle_taxonomy,
    euclidean_frechet_variances,
    frechet_mean_predict,
    frechet_mean_set,
    frechet_variances,
    label_distances,
    locus,
    mean_power_distance,
    next_class,
    temper,
    tree_labels,
    tree_locus,
)

DIGITS, LABELS = load_digits(return_X_y=True)
TAXONOMY = {"animal": {"cat": {}, "dog": ["poodle", "spaniel"]}, "food": ["tea", "bread"], "stone": {}}


class PathDistances:
    """A function whose name, unlike a plain one's, holds no address: test names must be the same in every worker."""

    def __call__(self, classes) -> np.ndarray:
        places = np.arange(len(classes))
        return abs(np.subtract.outer(places, places))

    def __repr__(self) -> str:
        return "path_distances"


path_distances = PathDistances()


def simplex(rng, rows, width) -> np.ndarray:
    return rng.dirichlet(np.full(width, 0.5), rows)


def random_tree(n: int, seed: int) -> nx.Graph:
    rng = np.random.default_rng(seed)
    return nx.Graph([(int(rng.integers(i)), i) for i in range(1, n)])


def all_pairs(graph: nx.Graph) -> np.ndarray:
    """By networkx, in the order of the nodes: what label_distances is compared with."""
    lengths = dict(nx.all_pairs_shortest_path_length(graph))
    return np.array([[lengths[u][v] for v in graph.nodes] for u in graph.nodes], dtype=float)


def variance_by_definition(P, d, observed) -> np.ndarray:
    return np.array([[sum(p[k] * d[i, y] ** 2 for k, i in enumerate(observed)) for y in range(len(d))] for p in P])


CONFIGURATIONS = [
    FrechetMeanClassifier(),
    FrechetMeanClassifier(distances=path_distances),
    FrechetMeanClassifier(GaussianNB(), distances=path_distances, power=1.0, temperature=2.0),
    FrechetMeanClassifier(make_pipeline(StandardScaler(), KNeighborsClassifier()), distances=path_distances),
]


@parametrize_with_checks(CONFIGURATIONS)
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


# ---- the Fréchet mean


@pytest.mark.parametrize("torched", [False, True])
def test_variance_is_its_definition(torched):
    rng = np.random.default_rng(0)
    d, observed = all_pairs(random_tree(30, 0)), [4, 20, 1, 11]
    P = simplex(rng, 25, 4)
    kind = torch.as_tensor if torched else np.asarray
    S = frechet_variances(kind(P), kind(d), observed)
    np.testing.assert_allclose(S, variance_by_definition(P, d, observed), rtol=1e-12)
    np.testing.assert_allclose(frechet_variances(kind(P), kind(d[observed])), S, rtol=1e-12)
    answers = frechet_mean_predict(kind(P), kind(d), observed)
    assert isinstance(answers, torch.Tensor if torched else np.ndarray)
    np.testing.assert_array_equal(answers, variance_by_definition(P, d, observed).argmin(1))


def test_one_hot_answers_the_observed_class():
    d, observed = all_pairs(random_tree(40, 1)), [30, 2, 17, 39, 8]
    np.testing.assert_array_equal(frechet_mean_predict(np.eye(5), d, observed), observed)
    np.testing.assert_array_equal(frechet_mean_predict(torch.eye(5), torch.as_tensor(d), observed), observed)


def test_complete_graph_is_argmax():
    P = simplex(np.random.default_rng(0), 2000, 12)
    np.testing.assert_array_equal(frechet_mean_predict(P, 1.0 - np.eye(12)), P.argmax(1))
    model = FrechetMeanClassifier(GaussianNB(), distances=lambda classes: 1.0 - np.eye(len(classes)))
    plain = GaussianNB().fit(DIGITS, LABELS)
    np.testing.assert_array_equal(model.fit(DIGITS, LABELS).predict(DIGITS), plain.predict(DIGITS))
    np.testing.assert_array_equal(
        FrechetMeanClassifier(GaussianNB()).fit(DIGITS, LABELS).predict(DIGITS), plain.predict(DIGITS)
    )


def test_complete_graph_without_a_matrix_equals_the_matrix():
    P = simplex(np.random.default_rng(1), 50, 3)

    class Fixed(GaussianNB):
        def predict_proba(self, X):
            return P

    options = {"classes": [7, 0, 1, 2, 9]}
    fitted = FrozenEstimator(Fixed().fit(np.arange(6)[:, None], [0, 1, 2] * 2))
    bare = FrechetMeanClassifier(fitted, **options).fit()
    full = FrechetMeanClassifier(fitted, distances=1 - np.eye(5), **options).fit()
    np.testing.assert_allclose(bare.decision_function([[0]]), full.decision_function([[0]]), atol=1e-14)
    np.testing.assert_array_equal(bare.predict([[0]]), full.predict([[0]]))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.floats(0, 1))
def test_path_with_two_ends_is_the_rounded_mean(n, p):
    d = path_distances(range(n))
    position = p * (n - 1)
    answer = int(frechet_mean_predict(np.array([[1 - p, p]]), d, [0, n - 1])[0])
    if abs(position % 1 - 0.5) > 1e-9:
        assert answer == round(position)
    else:
        assert abs(answer - position) < 0.5 + 1e-9


def test_real_line_is_the_nearest_grid_point_to_the_mean():
    rng = np.random.default_rng(2)
    points = np.sort(rng.uniform(-5, 5, 30))
    observed = [0, 9, 14, 29]
    P = simplex(rng, 500, 4)
    nearest = abs((P @ points[observed])[:, None] - points).argmin(1)
    d = abs(np.subtract.outer(points, points))
    np.testing.assert_array_equal(frechet_mean_predict(P, d, observed), nearest)


@pytest.mark.parametrize("torched", [False, True])
def test_euclidean_means_need_no_distances(torched):
    """sum_k p_k ||e_k - e_y||^2 by the bias-variance identity, to 1e-10, far from the origin as well."""
    rng = np.random.default_rng(3)
    E, observed = rng.standard_normal((200, 16)) + 30.0, rng.choice(200, 40, replace=False)
    P = simplex(rng, 300, 40)
    d = label_distances(E)
    kind = torch.as_tensor if torched else np.asarray
    S = euclidean_frechet_variances(kind(P), kind(E), observed)
    np.testing.assert_allclose(S, frechet_variances(P, d, observed), rtol=0, atol=1e-10)
    mean = P @ E[observed]
    nearest = np.linalg.norm(mean[:, None] - E, axis=2).argmin(1)
    np.testing.assert_array_equal(np.asarray(S).argmin(1), nearest)
    np.testing.assert_array_equal(frechet_mean_predict(P, d, observed), nearest)


def test_scaling_changes_nothing():
    rng = np.random.default_rng(4)
    d, observed = all_pairs(random_tree(50, 4)), rng.choice(50, 9, replace=False)
    P = simplex(rng, 400, 9)
    answers = frechet_mean_predict(P, d, observed)
    for factor in (1e-8, 0.3, 1e8):
        np.testing.assert_array_equal(frechet_mean_predict(P, factor * d, observed), answers)
    rows = rng.uniform(1e-6, 1e6, (400, 1))
    np.testing.assert_array_equal(frechet_mean_predict(P * rows, d, observed), answers)
    shifted = frechet_variances(P, d, observed) + rows  # a constant to each row of S
    np.testing.assert_array_equal(frechet_variances(P, d, observed).argmin(1), shifted.argmin(1))


def test_integer_and_single_precision_distances_give_the_same():
    rng = np.random.default_rng(5)
    d, observed = (
        40 * all_pairs(random_tree(60, 5)),
        rng.choice(60, 7, replace=False),
    )  # up to 700: squares overflow int16
    P = simplex(rng, 300, 7)
    answers = frechet_mean_predict(P, d, observed)
    for dtype in (np.int16, np.uint16, np.float32):
        np.testing.assert_array_equal(frechet_mean_predict(P, d.astype(dtype), observed), answers)
    complete = ~np.eye(7, dtype=bool)
    for kind in (np.asarray, torch.as_tensor):
        np.testing.assert_array_equal(frechet_mean_predict(kind(P), kind(complete)), P.argmax(1))
    single = frechet_variances(P.astype(np.float32), d, observed)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, frechet_variances(P, d, observed), rtol=1e-5)


def test_expected_squared_distance_is_at_most_that_of_argmax():
    """If P is the true posterior: drawn truths agree with it, and no candidate at all does better."""
    rng = np.random.default_rng(6)
    d = all_pairs(random_tree(25, 6))
    P = simplex(rng, 500, 25)
    mean, top = frechet_mean_predict(P, d), P.argmax(1)
    expected = variance_by_definition(P, d, range(25))
    rows = np.arange(500)
    assert (expected[rows, mean] <= expected.min(1) * (1 + 1e-12)).all()
    assert expected[rows, mean].mean() < expected[rows, top].mean()
    truth = np.array([rng.choice(25, p=p) for p in P for _ in range(20)])
    drawn = mean_power_distance(truth, np.repeat(mean, 20), d)
    assert drawn == pytest.approx(expected[rows, mean].mean(), rel=0.05)
    assert drawn < mean_power_distance(truth, np.repeat(top, 20), d)


def test_ties_are_named_and_the_lowest_wins_whatever_the_rounding():
    d = path_distances(range(4))
    np.testing.assert_array_equal(frechet_mean_set(np.array([[0.5, 0.5]]), d, [0, 3]), [[False, True, True, False]])
    rng = np.random.default_rng(7)
    ring = all_pairs(nx.cycle_graph(30))
    for _ in range(50):  # opposite points of a ring, weights 1/n that are no binary fractions
        P = np.full((1, 30), rng.uniform(0.01, 1) / 30)
        assert frechet_mean_set(P, ring).all()
        assert frechet_mean_predict(P, ring) == [0]
        assert frechet_mean_predict(torch.as_tensor(P).float(), ring) == 0


def test_power_one_is_the_median():
    d = path_distances(range(9))
    P = np.array([[0.6, 0.1, 0.3], [0.2, 0.2, 0.6]])
    np.testing.assert_array_equal(frechet_mean_predict(P, d, [0, 4, 8], power=1.0), [0, 8])
    np.testing.assert_array_equal(frechet_mean_predict(P, d, [0, 4, 8]), [3, 6])  # means 2.8 and 5.6


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(8)
    d, observed = all_pairs(random_tree(300, 8)), rng.choice(300, 40, replace=False)
    P = simplex(rng, 77, 40)
    model = LokiHead(d, observed, from_logits=False)
    whole = frechet_variances(P, d, observed), frechet_mean_predict(P, d, observed), model.predict(torch.as_tensor(P))
    np.testing.assert_allclose(frechet_variances(P[:5], d, observed), whole[0][:5], rtol=1e-13)  # few rows
    monkeypatch.setattr(loki, "CACHE", 900)  # 3 of 40
    np.testing.assert_allclose(frechet_variances(P[:5], d, observed), whole[0][:5], rtol=1e-13)
    np.testing.assert_array_equal(frechet_mean_predict(torch.as_tensor(P[:5]), d, observed), whole[1][:5])
    monkeypatch.setattr(loki, "FEW_ROWS", 2)
    monkeypatch.setattr(loki, "BLOCK", 1000)  # 25 columns, 3 rows
    np.testing.assert_allclose(frechet_variances(P, d, observed), whole[0], rtol=1e-13)
    np.testing.assert_allclose(frechet_variances(torch.as_tensor(P), d, observed), whole[0], rtol=1e-13)
    np.testing.assert_array_equal(frechet_mean_predict(P, d, observed), whole[1])
    np.testing.assert_array_equal(frechet_mean_predict(torch.as_tensor(P), d, observed), whole[1])
    np.testing.assert_array_equal(model.predict(torch.as_tensor(P)), whole[2])


def test_a_hundred_thousand_labels_in_bounded_memory(monkeypatch):
    """Peak of the prediction alone, counted by Python: a few blocks, whatever B N and K N are."""
    monkeypatch.setattr(loki, "BLOCK", 2**20)  # 8 MB
    parents = np.maximum((np.arange(100_000) - 1) // 10, -1)
    parents[0] = -1
    observed = np.arange(0, 100_000, 2500)
    d = label_distances(parents, observed=observed.tolist(), dtype=np.float32)  # (40, 100000), 16 MB
    P = simplex(np.random.default_rng(9), 300, 40)  # S alone would take 240 MB, D2 in float64 32 MB
    tracemalloc.start()
    answers = frechet_mean_predict(P, d)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8 * 2**20 + d.size  # and one byte a distance for checks
    few = np.random.default_rng(0).choice(100_000, 500, replace=False)
    S = P @ d[:, few].astype(float) ** 2
    assert (np.take_along_axis(P @ d[:, answers].astype(float) ** 2, np.arange(300)[:, None], 1) <= S + 1e-9).all()


def test_temper_is_a_softmax_with_temperature():
    logits = np.random.default_rng(10).normal(0, 5, (40, 6))
    P = torch.as_tensor(logits).softmax(1)
    for T in (0.01, 0.5, 1.0, 7.0):
        expected = (torch.as_tensor(logits) / T).softmax(1)
        torch.testing.assert_close(temper(P, T), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(temper(P.numpy(), T), expected.numpy(), rtol=1e-9, atol=1e-12)


# ---- distances


def test_tree_distances_are_shortest_paths():
    for seed in range(5):
        graph = random_tree(120, seed)
        expected = all_pairs(graph)
        nodes = list(graph.nodes)
        np.testing.assert_array_equal(label_distances(graph), expected)
        parents = [-1] * 120
        for parent, child in nx.bfs_edges(graph, 0):
            parents[child] = parent
        observed = np.random.default_rng(seed).permutation(120)[:13].tolist()
        numbered = label_distances(parents, labels=nodes, observed=observed)
        np.testing.assert_array_equal(numbered, expected[[nodes.index(node) for node in observed]])
        links = {f"n{child}": None if parent < 0 else f"n{parent}" for child, parent in enumerate(parents)}
        named = label_distances(links, labels=[f"n{node}" for node in nodes], observed=[f"n{i}" for i in observed])
        np.testing.assert_array_equal(named, numbered)


def test_nested_mapping_and_its_unnamed_root():
    d = label_distances(TAXONOMY)
    names = tree_labels(TAXONOMY)
    assert names == ["animal", "cat", "dog", "poodle", "spaniel", "food", "tea", "bread", "stone"]
    graph = nx.Graph([("", "animal"), ("", "food"), ("", "stone"), ("animal", "cat"), ("animal", "dog")])
    graph.add_edges_from([("dog", "poodle"), ("dog", "spaniel"), ("food", "tea"), ("food", "bread")])
    expected = label_distances(graph, labels=names)
    np.testing.assert_array_equal(d, expected)
    assert tree_labels(TAXONOMY, leaves_only=True) == ["cat", "poodle", "spaniel", "tea", "bread", "stone"]
    links = {"cat": "animal", "dog": "animal", "poodle": "dog", "spaniel": "dog", "tea": "food", "bread": "food"}
    np.testing.assert_array_equal(label_distances(links | {"stone": None}, labels=names), expected)


def test_a_deep_tree_is_no_recursion():
    d = label_distances([-1, *range(4999)], observed=[0, 4999])
    np.testing.assert_array_equal(d, [np.arange(5000), np.arange(5000)[::-1]])


def test_graph_distances_take_weights_and_ignore_direction():
    graph = nx.MultiDiGraph()
    graph.add_edge("a", "b", km=5.0)
    graph.add_edge("b", "a", km=2.0)
    graph.add_edge("c", "b", km=1.5)
    np.testing.assert_array_equal(label_distances(graph), [[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_array_equal(label_distances(graph, ["c", "a"], ["a"], weight="km"), [[3.5, 0]])


def test_embedding_distances_are_norms_not_squares():
    E = np.random.default_rng(0).standard_normal((20, 5))
    expected = np.linalg.norm(E[:, None] - E, axis=2)
    np.testing.assert_allclose(label_distances(E), expected, atol=1e-12)
    np.testing.assert_allclose(label_distances(torch.as_tensor(E), observed=[3, 1]), expected[[3, 1]], atol=1e-12)
    names = [f"n{i}" for i in range(20)]
    np.testing.assert_allclose(label_distances(E, names, ["n7"], dtype=np.float32), expected[[7]], rtol=1e-6)


# ---- what can be reached


@pytest.mark.parametrize("seed", range(4))
def test_tree_locus_is_the_union_of_paths_by_three_ways(seed):
    """Paths by networkx, the linear programmes, and answers at random weights that are found nowhere else."""
    rng = np.random.default_rng(seed)
    graph = random_tree(24, seed)
    nodes = list(graph.nodes)
    observed = rng.choice(24, 4, replace=False)
    paths = {node for u in observed for v in observed for node in nx.shortest_path(graph, nodes[u], nodes[v])}
    assert set(tree_locus(graph, [nodes[i] for i in observed])) == paths
    d = label_distances(graph)
    for ties in (True, False):  # on a tree every node of a path is the only mean for some weights
        assert {nodes[i] for i in np.flatnonzero(locus(d, observed, ties=ties))} == paths
    weights = np.concatenate([simplex(rng, 3000, 4), _edges_of_the_simplex(4)])
    assert {nodes[i] for i in frechet_mean_predict(weights, d, observed)} == paths


def _edges_of_the_simplex(k: int) -> np.ndarray:
    steps = np.linspace(0, 1, 101)
    return np.array([(1 - t) * np.eye(k)[i] + t * np.eye(k)[j] for i in range(k) for j in range(k) for t in steps])


def test_leaves_cover_a_tree_and_no_fewer_do():
    graph = random_tree(40, 3)
    leaves = [node for node in graph if graph.degree(node) == 1]
    assert tree_locus(graph, leaves) == list(graph.nodes)
    for leaf in leaves:
        assert leaf not in tree_locus(graph, [other for other in leaves if other != leaf])
    d = label_distances(graph)
    numbers = [list(graph.nodes).index(leaf) for leaf in leaves]
    assert locus(d, numbers).all()


def test_grid_locus_with_ties_and_what_can_be_output():
    d = label_distances(nx.grid_2d_graph(4, 4))
    assert locus(d, [0, 15]).all()
    can = locus(d, [0, 15], ties=False)
    assert can.sum() == 7
    steps = np.linspace(0, 1, 1001)
    answered = np.unique(frechet_mean_predict(np.column_stack([1 - steps, steps]), d, [0, 15]))
    np.testing.assert_array_equal(np.flatnonzero(can), answered)


def test_complete_graph_reaches_nothing_but_ties():
    d = 1.0 - np.eye(6)
    np.testing.assert_array_equal(locus(d, [1, 4], ties=False), np.isin(np.arange(6), [1, 4]))
    np.testing.assert_array_equal(locus(d, [1, 4]), np.isin(np.arange(6), [1, 4]))  # S = 1 against at most 1/2
    assert locus(d).all()


def test_answers_are_always_in_the_locus():
    rng = np.random.default_rng(12)
    for _ in range(5):
        E = rng.standard_normal((15, 2))
        d, observed = label_distances(E), rng.choice(15, 4, replace=False)
        answers = np.unique(frechet_mean_predict(simplex(rng, 2000, 4), d, observed))
        assert set(answers) <= set(np.flatnonzero(locus(d, observed, ties=False)))
        assert locus(d, observed)[observed].all()


def test_an_unobserved_leaf_of_equal_depth_never_beats_the_observed():
    """On the emoji hierarchy with subcategories as the only labels; with the categories as labels too, these win."""
    tree = bundle_taxonomy("emoji")
    leaves = tree_labels(tree, leaves_only=True)
    assert (len(tree), len(leaves)) == (9, 98)
    rng = np.random.default_rng(13)
    observed = rng.choice(98, 30, replace=False)
    P = simplex(rng, 2000, 30)
    assert set(frechet_mean_predict(P, label_distances(tree, labels=leaves), observed)) <= set(observed)
    everything = tree_labels(tree)
    assert len(everything) == 107
    rows = label_distances(tree, observed=[leaves[i] for i in observed])
    answered = {everything[i] for i in frechet_mean_predict(P, rows)}
    assert answered & set(tree)
    assert answered <= set(tree_locus(tree, [leaves[i] for i in observed]))


def test_wordnet_nouns_are_one_tree():
    links = bundle_taxonomy("glosses")
    assert len(links) == 82_115
    assert [synset for synset, above in links.items() if above is None] == ["n00001740"]  # entity
    dog, cat = "n02084071", "n02121620"
    d = label_distances(links, observed=[dog, cat], dtype=np.float32)
    names = tree_labels(links)
    assert d[0, names.index(cat)] == 4  # dog, canine, carnivore, feline, cat
    between = tree_locus(links, [dog, cat])
    assert len(between) == 5
    np.testing.assert_array_equal(sorted(between), sorted(np.array(names)[d.sum(0) == 4]))
    steps = np.linspace(0, 1, 41)
    answered = {names[i] for i in frechet_mean_predict(np.column_stack([1 - steps, steps]), d)}
    assert answered == set(between)
    far = next_class(links, [dog, cat])
    height = label_distances(links, labels=names, observed=between).min(0)
    assert height[names.index(far)] == height.max()


def test_next_class_adds_most_to_the_locus():
    for seed in range(6):
        graph = random_tree(35, 20 + seed)
        observed = [5, 6]
        while (chosen := next_class(graph, observed)) is not None:
            gains = [len(tree_locus(graph, [*observed, node])) for node in graph if node not in observed]
            assert len(tree_locus(graph, [*observed, chosen])) == max(gains)
            observed.append(chosen)
        assert len(tree_locus(graph, observed)) == 35


# ---- the classifier


def test_ordered_classes_never_seen_are_answered():
    known = np.isin(LABELS, [0, 3, 9])
    model = FrechetMeanClassifier(LogisticRegression(max_iter=50, C=1e-5), distances=path_distances, classes=range(10))
    model.fit(DIGITS[known], LABELS[known])
    P = model.estimator_.predict_proba(DIGITS)
    mean = P @ [0, 3, 9]
    answers = model.predict(DIGITS)
    clear = abs(mean % 1 - 0.5) > 1e-9
    np.testing.assert_array_equal(answers[clear], np.round(mean[clear]))
    np.testing.assert_array_equal(model.classes_, np.arange(10))
    np.testing.assert_array_equal(model.observed_, [0, 3, 9])
    np.testing.assert_array_equal(model.decision_function(DIGITS)[clear].argmax(1), answers[clear])


def test_columns_go_through_the_classes_of_the_estimator():
    """Candidates in any order, distances in theirs: the same answers; taking columns for candidates would not be."""
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    y = names[LABELS]
    d = path_distances(names)
    expected = FrechetMeanClassifier(GaussianNB(), distances=d, classes=names).fit(DIGITS, y).predict(DIGITS)
    shuffle = np.random.default_rng(0).permutation(10)
    model = FrechetMeanClassifier(GaussianNB(), distances=d[np.ix_(shuffle, shuffle)], classes=names[shuffle])
    assert (model.fit(DIGITS, y).predict(DIGITS) == expected).mean() > 0.999  # but for ties
    np.testing.assert_array_equal(model.classes_[model.observed_], model.estimator_.classes_)
    by_number = FrechetMeanClassifier(
        FrozenEstimator(GaussianNB().fit(DIGITS, LABELS)), distances=d, classes=names, observed=names
    ).fit()
    assert (by_number.predict(DIGITS) == expected).mean() > 0.999
    rows = d[[list(names).index(name) for name in model.estimator_.classes_]][:, :9]  # nine is no candidate
    few = FrechetMeanClassifier(GaussianNB(), distances=rows, classes=names[:9]).fit(DIGITS, y)
    assert few.observed_.tolist().count(-1) == 1
    assert "nine" not in few.predict(DIGITS)


def test_frozen_estimator_is_used_as_it_is_without_data():
    known = np.isin(LABELS, [1, 4, 8])
    fitted = GaussianNB().fit(DIGITS[known], LABELS[known])
    theta = fitted.theta_.copy()
    model = FrechetMeanClassifier(FrozenEstimator(fitted), distances=path_distances, classes=range(10)).fit()
    again = clone(model).fit(DIGITS[:10], LABELS[:10])  # data are not read
    np.testing.assert_array_equal(model.predict(DIGITS), again.predict(DIGITS))
    np.testing.assert_array_equal(fitted.theta_, theta)
    refitted = FrechetMeanClassifier(GaussianNB(), distances=path_distances, classes=range(10))
    np.testing.assert_array_equal(refitted.fit(DIGITS[known], LABELS[known]).predict(DIGITS), model.predict(DIGITS))
    assert model.n_features_in_ == 64
    with pytest.raises(sklearn.exceptions.NotFittedError):
        FrechetMeanClassifier(FrozenEstimator(GaussianNB())).fit()
    with pytest.raises(ValueError, match="FrozenEstimator"):
        FrechetMeanClassifier(fitted).fit()


def test_tree_and_graph_give_candidates_by_name():
    y = np.array(["cat", "poodle", "spaniel", "tea"])[np.arange(len(LABELS)) % 4]
    X = np.eye(4)[np.arange(len(LABELS)) % 4] + np.random.default_rng(0).normal(0, 0.8, (len(LABELS), 4))
    model = FrechetMeanClassifier(distances=TAXONOMY).fit(X, y)
    assert model.classes_.tolist() == tree_labels(TAXONOMY)
    assert set(model.predict(X)) == set(tree_locus(TAXONOMY, ["cat", "poodle", "spaniel", "tea"]))
    d = label_distances(TAXONOMY)
    full = FrechetMeanClassifier(distances=d, classes=tree_labels(TAXONOMY)).fit(X, y)
    np.testing.assert_array_equal(model.predict(X), full.predict(X))
    leaves = FrechetMeanClassifier(distances=TAXONOMY, classes=tree_labels(TAXONOMY, leaves_only=True)).fit(X, y)
    assert set(leaves.predict(X)) == {"cat", "poodle", "spaniel", "tea"}
    graph = nx.relabel_nodes(nx.path_graph(4), dict(enumerate(["tea", "cat", "poodle", "spaniel"])))
    assert set(FrechetMeanClassifier(distances=graph).fit(X, y).classes_) == set(y)


def test_embeddings_equal_their_distances():
    E = np.random.default_rng(0).standard_normal((10, 3))
    known = LABELS < 6
    soft = {"classes": range(10), "temperature": 50.0}
    near = FrechetMeanClassifier(GaussianNB(), embeddings=E, **soft).fit(DIGITS[known], LABELS[known])
    far = FrechetMeanClassifier(GaussianNB(), distances=label_distances(E), **soft).fit(DIGITS[known], LABELS[known])
    np.testing.assert_array_equal(near.predict(DIGITS), far.predict(DIGITS))
    np.testing.assert_allclose(near.decision_function(DIGITS), far.decision_function(DIGITS), atol=1e-10)
    assert near.distances_ is None


def test_temperature_softens_the_overconfident():
    def agreement(temperature):
        model = FrechetMeanClassifier(GaussianNB(), distances=path_distances, temperature=temperature)
        return (model.fit(DIGITS, LABELS).predict(DIGITS) == model.estimator_.predict(DIGITS)).mean()

    assert agreement(1e-4) > 0.998  # argmax, but for ties
    assert agreement(1e-4) > agreement(1.0) > agreement(30.0)
    broad = GaussianNB(var_smoothing=0.1)  # no probability underflows to 0, which no temperature lifts
    soft = FrechetMeanClassifier(broad, distances=path_distances, temperature=1e4).fit(DIGITS, LABELS)
    assert np.isin(soft.predict(DIGITS), [4, 5]).all()  # the middle


def test_pipelines_search_pandas_strings_and_single_precision():
    X, y = load_iris(return_X_y=True, as_frame=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = make_pipeline(StandardScaler(), FrechetMeanClassifier(distances=path_distances))
    assert cross_val_score(model, X, names).mean() > 0.9
    search = GridSearchCV(
        FrechetMeanClassifier(LogisticRegression(max_iter=500), distances=path_distances),
        {"estimator__C": [0.01, 1.0], "temperature": [0.5, 1.0]},
    ).fit(X, names)
    assert search.best_score_ > 0.9
    fitted = search.best_estimator_
    assert fitted.feature_names_in_.tolist() == list(X.columns)
    assert fitted.n_features_in_ == 4
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(X[X.columns[::-1]])
    single = clone(fitted).fit(X.to_numpy(np.float32), names)
    assert (single.predict(X.to_numpy(np.float32)) == fitted.predict(X)).mean() > 0.98
    assert isinstance(pd.Series(fitted.predict(X)).iloc[0], str)


def test_fit_parameters_reach_the_estimator():
    weight = np.where(LABELS < 5, 1.0, 1e-3)
    expected = LogisticRegression(max_iter=200).fit(DIGITS, LABELS, sample_weight=weight).predict(DIGITS)
    model = FrechetMeanClassifier(LogisticRegression(max_iter=200))
    np.testing.assert_array_equal(model.fit(DIGITS, LABELS, sample_weight=weight).predict(DIGITS), expected)
    with sklearn.config_context(enable_metadata_routing=True):
        routed = FrechetMeanClassifier(LogisticRegression(max_iter=200).set_fit_request(sample_weight=True))
        np.testing.assert_array_equal(routed.fit(DIGITS, LABELS, sample_weight=weight).predict(DIGITS), expected)
        with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError):
            model.fit(DIGITS, LABELS, sample_weight=weight)


# ---- the torch layer


def test_head_equals_the_functions_and_is_differentiable():
    rng = np.random.default_rng(0)
    d, observed = all_pairs(random_tree(30, 0)), [4, 20, 1, 11]
    logits = torch.as_tensor(rng.standard_normal((50, 4)))
    head = LokiHead(d, observed, temperature=2.0)
    P = (logits / 2.0).softmax(1)
    torch.testing.assert_close(head(logits), -frechet_variances(P, d, observed))
    torch.testing.assert_close(head.predict(logits), frechet_mean_predict(P, d, observed))
    torch.testing.assert_close(head(logits.reshape(5, 10, 4)), head(logits).reshape(5, 10, 30))
    torch.testing.assert_close(LokiHead(d[observed], from_logits=False)(P), head(logits))
    assert torch.autograd.gradcheck(head, (logits[:3].clone().requires_grad_(),))
    assert not list(head.parameters())


def test_head_keeps_its_precision_and_its_state():
    d = 300.0 * path_distances(range(8))  # squares up to 4.4e6: no half
    model = nn.Sequential(nn.Linear(3, 2), LokiHead(d.astype(np.float32), [0, 7])).half()
    assert model[0].weight.dtype == torch.float16
    assert model[1].powers.dtype == torch.float32
    assert model[1].powers.max() == 2100.0**2
    scores = model(torch.randn(5, 3).half())
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    other = LokiHead(torch.zeros(2, 8) + torch.arange(8.0), power=1.0)
    other.load_state_dict(model[1].state_dict())
    assert torch.equal(other.powers, model[1].powers)
    assert model.double()[1].powers.dtype == torch.float64


# ---- what must be refused

P2, PATH = np.array([[0.5, 0.5]]), path_distances(range(3))


@pytest.mark.parametrize(
    ("probs", "distances", "observed", "message"),
    [
        (np.array([[0.5, np.nan]]), PATH, [0, 2], "probs must be finite"),
        (np.array([[0.5, np.inf]]), PATH, [0, 2], "probs must be finite"),
        (np.array([[2.5, -0.5]]), PATH, [0, 2], "probs must be >= 0, got -0.5"),
        (np.array([[0.0, 0.0]]), PATH, [0, 2], "row of zeros"),
        (np.empty((0, 2)), PATH, [0, 2], "at least one row"),
        (np.array([0.5, 0.5]), PATH, [0, 2], r"shape \(B, K\), got \(2,\)"),
        (P2, PATH, None, "probs has 2 columns, but distances gives 3 rows"),
        (P2, PATH, [0, 1, 2], "probs has 2 columns, but distances gives 3 rows"),
        (P2, PATH, [0, 3], "label numbers from 0 to 2"),
        (P2, PATH, [0, -1], "label numbers from 0 to 2"),
        (P2, PATH, [1, 1], "different label numbers"),
        (P2, PATH, [0.0, 2.0], "flat list of label numbers"),
        (P2, -PATH, [0, 2], "distances must be >= 0, got -2"),
        (P2, np.where(PATH == 2, np.inf, PATH), [0, 2], "distances must be finite, got inf"),
        (P2, np.where(PATH == 2, np.nan, PATH), [0, 2], "distances must be finite, got nan"),
        (P2, np.triu(PATH), [0, 2], "symmetric"),
        (P2, PATH + 1, [0, 2], "0 from a label to itself"),
        (P2, PATH[0], [0, 2], r"shape \(N, N\) or \(K, N\), got \(3,\)"),
    ],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_bad_numbers_are_refused(probs, distances, observed, message, kind):
    with pytest.raises(ValueError, match=message):
        frechet_mean_predict(kind(probs), kind(distances), observed)


def test_bad_options_are_refused():
    for power in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="power must be a finite number > 0"):
            frechet_variances(P2, PATH, [0, 2], power=power)
    for temperature in (0, -1.0, np.inf, "warm"):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            temper(P2, temperature)
        with pytest.raises(ValueError, match="temperature must be"):
            FrechetMeanClassifier(temperature=temperature).fit(DIGITS, LABELS)
    with pytest.raises(TypeError, match="distances must hold real numbers"):
        frechet_variances(P2, [["a", "b"]])
    with pytest.raises(ValueError, match="distances must be a rectangular"):
        frechet_variances(P2, [[0, 1], [1]])
    with pytest.raises(ValueError, match="embeddings must be finite"):
        euclidean_frechet_variances(P2, np.array([[np.nan], [1.0]]))
    with pytest.raises(ValueError, match="each of 2 columns"):
        euclidean_frechet_variances(P2, np.ones((3, 1)))
    with pytest.raises(ValueError, match="one shape"):
        mean_power_distance([0, 1], [0], PATH)
    with pytest.raises(ValueError, match="predicted must hold label numbers from 0 to 2"):
        mean_power_distance([0, 1], [0, 3], PATH)


@pytest.mark.parametrize(
    ("structure", "options", "error", "message"),
    [
        ({"a": "b", "b": "a"}, {}, ValueError, "cycle"),
        ([-1, 2, 1], {}, ValueError, "cycle"),
        ([-1, 0, 3], {}, ValueError, "parent numbers must be from -1"),
        ({"a": ["b", "b"]}, {}, ValueError, "occurs twice"),
        ({"a": {"b": {}}, "c": ["b"]}, {}, ValueError, "'b' occurs twice"),
        ({"a": {"b": 3}}, {}, TypeError, "below 'b'"),
        ({}, {}, ValueError, "empty tree"),
        (TAXONOMY, {"labels": ["cat", "wolf"]}, ValueError, "'wolf' is not"),
        (TAXONOMY, {"observed": ["wolf"]}, ValueError, "observed must be nodes of the structure; 'wolf' is not"),
        (TAXONOMY, {"labels": ["cat", "cat"]}, ValueError, "different labels"),
        (TAXONOMY, {"observed": []}, ValueError, "at least one"),
        (np.array([[0.0], [np.nan]]), {}, ValueError, "finite"),
        (np.eye(3), {"labels": ["a", "b"]}, ValueError, "labels must name the 3 rows"),
        ("tree", {}, TypeError, "structure must be nested mappings"),
        (nx.Graph([(0, 1), (2, 3)]), {}, ValueError, "no path from 0 to 2"),
        (nx.path_graph(3), {"weight": "km"}, ValueError, "'km' of edge 0-1 must be a finite number > 0, got None"),
    ],
)
def test_bad_structures_are_refused(structure, options, error, message):
    with pytest.raises(error, match=message):
        label_distances(structure, **options)


def test_next_class_and_tree_locus_want_a_tree():
    for function in (next_class, tree_locus):
        with pytest.raises(ValueError, match="must be a tree here, got a graph of 4 nodes and 4 edges"):
            function(nx.cycle_graph(4), [0, 1])
        with pytest.raises(ValueError, match="does not connect"):
            function(nx.Graph([(0, 1), (2, 3)]), [0])
        with pytest.raises(ValueError, match="observed must be nodes"):
            function(TAXONOMY, ["wolf"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distances": PATH}, ValueError, "one column for each of 10 classes"),
        (
            {"distances": PATH, "classes": [0, 1, 2]},
            ValueError,
            "classes must hold all classes of the estimator, but 3",
        ),
        ({"distances": np.triu(path_distances(range(10)))}, ValueError, "symmetric"),
        ({"distances": -path_distances(range(10))}, ValueError, "distances must be >= 0"),
        ({"distances": {"a": ["b"]}}, TypeError, "classes hold strings, but the classes of the estimator are integers"),
        ({"distances": nx.path_graph(9)}, ValueError, "observed must be nodes of the structure; 9 is not"),
        ({"classes": [0, "b", 2]}, TypeError, "classes must be integers or strings, of one kind; got int, str"),
        ({"classes": [*range(10), 0]}, ValueError, "classes must be different labels, got 0 twice"),
        ({"classes": []}, ValueError, "classes must hold at least one label"),
        ({"observed": ["a", "b"]}, ValueError, "observed must name the 10 classes"),
        ({"embeddings": np.eye(10), "distances": path_distances}, ValueError, "instead of distances"),
        ({"embeddings": np.eye(10), "power": 1.0}, ValueError, "power 2.0, got power 1.0"),
        ({"embeddings": np.eye(9)}, ValueError, "one row for each of 10 classes, got 9"),
        ({"estimator": LinearSVC()}, TypeError, "must have predict_proba"),
        ({"estimator": SVC()}, TypeError, "must have predict_proba"),
    ],
)
def test_a_bad_fit_is_refused_and_leaves_the_model_as_it_was(options, error, message):
    model = FrechetMeanClassifier(GaussianNB()).fit(DIGITS[:, :5], LABELS)
    before, estimator = model.predict(DIGITS[:, :5]), model.estimator_
    model.set_params(**options)
    with pytest.raises(error, match=message):
        model.fit(DIGITS, LABELS)
    model.set_params(**clone(FrechetMeanClassifier(GaussianNB())).get_params(deep=False))
    np.testing.assert_array_equal(model.predict(DIGITS[:, :5]), before)
    assert model.estimator_ is estimator


def test_bad_rows_are_refused_and_leave_the_model_as_it_was():
    model = FrechetMeanClassifier(distances=path_distances).fit(DIGITS[:300], LABELS[:300])
    before = model.decision_function(DIGITS)
    bad = DIGITS[:300].copy()
    bad[5, 5] = np.nan
    for X, y, message in (
        (bad, LABELS[:300], "NaN"),
        (DIGITS[:0], LABELS[:0], "0 sample"),
        (DIGITS[:300], np.zeros(300, int), "class"),
        (DIGITS[:300], LABELS[:299], "inconsistent numbers of samples"),
        (DIGITS[:300], np.linspace(0, 1, 300), "Unknown label type"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(X, y)
    for y in ([1, "a", 2], np.array([1, "a", 2], dtype=object)):
        with pytest.raises(TypeError, match="y must hold labels of one kind"):
            model.fit(DIGITS[:3], y)
    for X, message in ((bad, "NaN"), (DIGITS[:, :9], "9 features"), (DIGITS[:0], "0 sample")):
        with pytest.raises(ValueError, match=message):
            model.predict(X)
    np.testing.assert_array_equal(model.decision_function(DIGITS), before)


def test_an_estimator_whose_probabilities_are_none_is_refused():
    class Cosines(GaussianNB):
        def predict_proba(self, X):
            return super().predict_proba(X) - 0.5

    with pytest.raises(ValueError, match="probs must be >= 0"):
        FrechetMeanClassifier(Cosines()).fit(DIGITS, LABELS).predict(DIGITS)


def test_the_head_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"outputs must be of shape \(..., 2\), got \(4, 3\)"):
        LokiHead(PATH, [0, 2])(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="probs must be >= 0"):
        LokiHead(PATH, [0, 2], from_logits=False)(torch.tensor([[1.5, -0.5]]))
    with pytest.raises(ValueError, match="probs must be finite"):
        LokiHead(PATH, [0, 2]).predict(torch.tensor([[np.nan, 0.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        LokiHead(np.triu(PATH))
    with pytest.raises(ValueError, match="power"):
        LokiHead(PATH, power=0)


@pytest.mark.parametrize("name", ["kjv", "wordnet", None])
def test_unknown_taxonomies_are_refused(name):
    with pytest.raises(ValueError, match="name must be 'emoji' or 'glosses'"):
        bundle_taxonomy(name)
