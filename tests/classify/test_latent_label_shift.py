"""Latent label shift: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.classify.latent_label_shift import (
    IdentifiabilityWarning,
    LatentLabelShift,
    PrefitDiscriminator,
    cluster_given_domain,
    domain_given_class,
    factorize_nmf,
    factorize_spa,
    p_y_given_x,
    p_y_given_x_and_d,
    successive_projection,
    to_simplex,
    to_uniform_domains,
    visible_classes,
)

CONFIGURATIONS = [
    LatentLabelShift(2),
    LatentLabelShift(2, factorizer="nmf", n_init=2, cv=2),
    LatentLabelShift(2, discriminator=GaussianNB(), discriminator_prior="uniform", n_clusters=3),
    LatentLabelShift(2, clusterer=AgglomerativeClustering(4), cv=KFold(3, shuffle=True, random_state=0)),
]


@parametrize_with_checks(CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore")  # the checks' data are not of this model, and we say so
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


# ---- exact tables: a finite X, every probability known


def tables(seed, k, r, inputs=40, anchors=1):
    """p(x|y) (X, k) with anchor inputs for every class, and A = p(y|d) (k, r) of condition < 50, all domains mixed."""
    rng = np.random.default_rng(seed)
    x_given_y = rng.dirichlet(np.ones(inputs), k).T
    x_given_y[: anchors * k] *= np.tile(np.eye(k), (anchors, 1)) > 0
    x_given_y /= x_given_y.sum(0)
    while True:
        A = rng.dirichlet(np.full(k, 0.5), r).T
        if np.linalg.cond(A) < 50:
            return x_given_y, A


def bayes(x_given_y, A, d=None):
    """p(y|x) under equally likely domains, or p(y|x, d), straight from the definition."""
    joint = x_given_y * (A.mean(1) if d is None else A[:, d])
    return joint / joint.sum(1, keepdims=True)


def oracle(x_given_y, A):
    """q(x) = p(d|x) under equally likely domains, from p(x|d) alone."""
    x_given_d = x_given_y @ A
    return x_given_d / x_given_d.sum(1, keepdims=True)


def matched(estimate, truth):
    """Columns of `estimate` in the order of those of `truth`."""
    distance = np.abs(truth[:, :, None] - estimate[:, None, :]).sum(0)
    return estimate[:, linear_sum_assignment(distance)[1]]


sizes = st.tuples(st.integers(0, 10**6), st.integers(2, 5), st.integers(0, 4)).map(lambda t: (t[0], t[1], t[1] + t[2]))


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_oracle_q_returns_the_true_posterior(size):
    x_given_y, A = tables(*size)
    D = domain_given_class(A)
    p = p_y_given_x(oracle(x_given_y, A), D)
    np.testing.assert_allclose(p, bayes(x_given_y, A), atol=1e-12)
    np.testing.assert_allclose(to_simplex(p), bayes(x_given_y, A), atol=1e-12)
    for d in range(A.shape[1]):
        known = p_y_given_x_and_d(bayes(x_given_y, A), np.tile(D[d], (len(p), 1)))
        np.testing.assert_allclose(known, bayes(x_given_y, A, d), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_spa_recovers_exact_tables_with_anchors(size):
    """Inputs are the clusters: zero residual, A up to a permutation. The card asks for L1 < .01."""
    x_given_y, A = tables(*size)
    B = x_given_y @ A
    C, A_hat = factorize_spa(B, len(A))
    np.testing.assert_allclose(C @ A_hat, B, atol=1e-10)
    np.testing.assert_allclose(matched(A_hat.T, A.T), A.T, atol=1e-8)
    np.testing.assert_allclose(matched(C, x_given_y), x_given_y, atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_successive_projection_finds_the_vertices(size):
    """Every oracle q(x) lies in the convex hull of D's columns, and its anchors are those columns."""
    x_given_y, A = tables(*size)
    q, D = oracle(x_given_y, A), domain_given_class(A)
    weights = p_y_given_x(q, D)
    assert weights.min() > -1e-12
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(weights @ D.T, q, atol=1e-12)
    found = successive_projection(q, len(A))
    assert sorted(found) == list(range(len(A)))  # the anchors come first in these tables
    order = np.random.default_rng(0).permutation(len(q))
    assert set(order[successive_projection(q[order], len(A))]) == set(found)


def test_nmf_without_pure_domains_fits_exactly_and_is_wrong():
    """Why "spa" is the default: residual 0, and p(y|d) far off, on tables that SPA solves to rounding."""
    errors = []
    for seed in range(5):
        x_given_y, A = tables(seed, 3, 6)
        A = 0.6 * A + 0.4 / 3  # every class in every domain
        B = x_given_y @ A
        C, A_hat = factorize_nmf(B, 3, n_init=3, random_state=seed)
        assert np.linalg.norm(B - C @ A_hat) < 1e-3 * np.linalg.norm(B)
        errors.append(np.abs(matched(A_hat.T, A.T) - A.T).sum(1).mean())
        np.testing.assert_allclose(matched(factorize_spa(B, 3)[1].T, A.T), A.T, atol=1e-9)
    assert min(errors) > 0.1


def test_nmf_with_anchors_and_pure_domains_is_right():
    """In the limit: it converges slowly, see factorize_nmf."""
    x_given_y, A = tables(5, 3, 4)
    A = np.hstack([np.eye(3), A])
    C, A_hat = factorize_nmf(x_given_y @ A, 3, n_init=1, max_iter=20_000, tol=1e-10, random_state=0)
    np.testing.assert_allclose(matched(A_hat.T, A.T), A.T, atol=1e-6)
    np.testing.assert_allclose(matched(C, x_given_y), x_given_y, atol=1e-6)
    default = factorize_nmf(x_given_y @ A, 3, random_state=0)[1]
    assert np.abs(matched(default.T, A.T) - A.T).sum(1).mean() < 1e-2


@settings(max_examples=20, deadline=None)
@given(sizes)
def test_columns_and_rows_sum_to_one(size):
    x_given_y, A = tables(*size)
    noisy = (
        np.random.default_rng(size[0]).multinomial(300, x_given_y @ A @ np.ones(A.shape[1]) / A.shape[1], A.shape[1]).T
    )
    B = (noisy + 1e-3) / (noisy + 1e-3).sum(0)
    for C, A_hat in (factorize_spa(B, len(A)), factorize_nmf(B, len(A), n_init=1, max_iter=50, random_state=0)):
        for M in (C, A_hat, domain_given_class(A_hat)):
            assert M.min() >= 0
            np.testing.assert_allclose(M.sum(0), 1, atol=1e-12)
        D = domain_given_class(A_hat)
        q = np.random.default_rng(0).dirichlet(np.ones(A.shape[1]), 30)
        p = to_simplex(p_y_given_x(q, D))
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(p_y_given_x_and_d(p, D[np.arange(30) % len(D)]).sum(1), 1, atol=1e-12)


def test_one_domain_a_class_is_the_domain_id():
    """r = k and A a permutation: whatever q says, the class is the domain."""
    A = np.eye(4)[[2, 0, 3, 1]]
    D = domain_given_class(A)
    q, d = np.random.default_rng(0).dirichlet(np.ones(4), 50), np.arange(50) % 4
    q[:25] = np.eye(4)[(d[:25] + 1) % 4]  # even where q excludes the domain
    classes = p_y_given_x_and_d(to_simplex(p_y_given_x(q, D)), D[d]).argmax(1)
    np.testing.assert_array_equal(A[classes, d], 1)


def test_permuted_domains_permute_rows_only():
    x_given_y, A = tables(7, 3, 5)
    B, order = x_given_y @ A, np.array([3, 1, 4, 0, 2])
    C, A_hat = factorize_spa(B, 3)
    C_2, A_2 = factorize_spa(B[:, order], 3)
    np.testing.assert_allclose(A_2, A_hat[:, order], atol=1e-10)
    np.testing.assert_allclose(C_2, C, atol=1e-10)
    D, q = domain_given_class(A), oracle(x_given_y, A)
    np.testing.assert_allclose(p_y_given_x(q[:, order], D[order]), p_y_given_x(q, D), atol=1e-12)


def test_permuted_components_permute_labels_only():
    x_given_y, A = tables(8, 4, 6)
    q, order = oracle(x_given_y, A), np.array([2, 0, 3, 1])
    D, D_2 = domain_given_class(A), domain_given_class(A[order])
    np.testing.assert_array_equal(D_2, D[:, order])
    p, p_2 = to_simplex(p_y_given_x(q, D)), to_simplex(p_y_given_x(q, D_2))
    np.testing.assert_allclose(p_2, p[:, order], atol=1e-12)
    d = np.arange(len(q)) % 6
    np.testing.assert_allclose(p_y_given_x_and_d(p_2, D_2[d]), p_y_given_x_and_d(p, D[d])[:, order], atol=1e-12)


def test_equal_priors_carry_no_information():
    x_given_y, A = tables(9, 3, 5)
    A = np.tile(A[:, :1], 5)
    D = domain_given_class(A)
    np.testing.assert_allclose(D, 0.2, atol=1e-12)
    assert np.linalg.matrix_rank(D) == 1
    np.testing.assert_allclose(oracle(x_given_y, A), 0.2, atol=1e-12)
    np.testing.assert_allclose(to_simplex(p_y_given_x(oracle(x_given_y, A), D)), 1 / 3, atol=1e-12)
    C, A_hat = factorize_spa(x_given_y @ A, 3)  # no anchors to be seen, but no nonsense either
    np.testing.assert_allclose(C @ A_hat, x_given_y @ A, atol=1e-12)


def test_unequal_domains_are_divided_out():
    x_given_y, A = tables(10, 3, 4)
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    q = x_given_y @ A * prior
    q /= q.sum(1, keepdims=True)  # what a classifier trained on domains of these shares outputs
    np.testing.assert_allclose(to_uniform_domains(q, prior), oracle(x_given_y, A), atol=1e-12)


def test_negative_and_empty_posteriors():
    p = to_simplex(np.array([[-0.2, 0.7, 0.7], [-1, -2, -3], [0.0, 0.0, 0.0], [-3.0, 1.0, 0.0]]))
    np.testing.assert_allclose(p, [[0, 0.5, 0.5], [1 / 3] * 3, [1 / 3] * 3, [0, 1, 0]])
    contradiction = p_y_given_x_and_d(np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 0.3, 0.1]]))
    np.testing.assert_allclose(contradiction, [[0, 0.75, 0.25]])
    nowhere = domain_given_class(np.array([[1.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(nowhere, [[0.5, 0], [0.5, 0]])
    np.testing.assert_allclose(to_simplex(p_y_given_x(np.array([[0.5, 0.5]]), nowhere)), [[1, 0]])


def test_counts_by_hand_and_their_errors():
    clusters, domains = np.array([0, 2, 2, 0, 1]), np.array([0, 0, 1, 1, 1])
    np.testing.assert_allclose(cluster_given_domain(clusters, domains), [[1 / 2, 1 / 3], [0, 1 / 3], [1 / 2, 1 / 3]])
    assert cluster_given_domain(clusters, domains, n_clusters=5).shape == (5, 2)
    with pytest.raises(ValueError, match="got domain 2 empty"):
        cluster_given_domain(clusters, domains, n_domains=3)
    with pytest.raises(ValueError, match="row 3 of B all zero"):
        factorize_spa(cluster_given_domain(clusters, domains, n_clusters=5), 2)
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"n_vertices must be from 1 to .* got {n}"):
            successive_projection(np.ones((5, 2)), n)


def test_visible_classes_count_the_rank_beyond_noise():
    x_given_y, A = tables(11, 3, 6)
    rng = np.random.default_rng(0)

    def drawn(A, n):
        return np.concatenate([rng.choice(len(x_given_y), n, p=p / p.sum()) for p in (x_given_y @ A).T])

    d = np.repeat(np.arange(6), 2000)
    assert visible_classes(drawn(A, 2000), d) == 3
    assert visible_classes(drawn(np.tile(A[:, :1], 6), 2000), d) == 1
    assert visible_classes(drawn(A[:, [0, 0, 0, 1, 1, 1]], 2000), d) == 2
    assert visible_classes(drawn(A, 4), np.repeat(np.arange(6), 4)) < 3  # too few rows to see them
    null = [visible_classes(rng.integers(0, 12, 600), np.arange(600) % 6) for _ in range(200)]
    assert np.mean(np.array(null) > 1) < 0.02


# ---- the estimator

PRIORS = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9], [0.5, 0.5, 0.0]])  # (r, k)
CLINICS = np.array(["north", "east", "south", "west"])


def sample(seed=0, sizes=(300, 300, 300, 300), priors=PRIORS, mislead=True):
    """Rows of 3 classes in 4 clinics; each class is two distant blobs, as near to another's as to its own."""
    rng = np.random.default_rng(seed)
    d = np.repeat(np.arange(4), sizes)
    y = np.array([rng.choice(3, p=priors[i]) for i in d])
    angle = 2 * np.pi / 6 * (y + 3 * rng.integers(0, 2, len(y)) if mislead else 2 * y)
    X = 4 * np.c_[np.cos(angle), np.sin(angle)] + 0.5 * rng.standard_normal((len(y), 2))
    return np.c_[X, X**2, X[:, 0] * X[:, 1]], y, CLINICS[d]  # squares, so that a linear model can tell


X, Y, D_IDS = sample()


def accuracy(y, labels):
    table = np.zeros((3, 3))
    np.add.at(table, (y, labels), 1)
    rows, columns = linear_sum_assignment(-table)
    return table[rows, columns].sum() / len(y)


def model(**options):
    return LatentLabelShift(
        3, **{"random_state": 0, "discriminator": make_pipeline(StandardScaler(), LogisticRegression())} | options
    )


@pytest.mark.parametrize("factorizer", ["spa", "nmf"])
def test_finds_classes_that_clustering_cannot(factorizer, recwarn):
    X_new, Y_new, D_new = sample(seed=1)
    learner = model(factorizer=factorizer).fit(X, domains=D_IDS)
    assert not [w for w in recwarn if issubclass(w.category, IdentifiabilityWarning)]
    assert accuracy(Y, KMeans(3, n_init=10, random_state=0).fit_predict(X[:, :2])) < 0.75
    assert accuracy(Y, learner.labels_) > 0.93
    assert accuracy(Y_new, learner.predict(X_new, domains=D_new)) > 0.93
    assert accuracy(Y_new, learner.predict(X_new)) > 0.9  # from nowhere in particular
    truth = PRIORS[np.argsort(CLINICS)]
    assert learner.domains_.tolist() == sorted(CLINICS)
    assert np.abs(matched(learner.class_priors_, truth) - truth).sum(1).mean() < 0.15
    assert learner.n_visible_classes_ == 3
    assert learner.condition_number_ == pytest.approx(np.linalg.cond(learner.domain_given_class_))


def test_with_an_oracle_it_ends_at_bayes_rule():
    """A finite X and the true q: all that is left is counting noise."""
    x_given_y, A = tables(15, 3, 5, inputs=12, anchors=2)
    rng = np.random.default_rng(0)
    d = np.repeat(np.arange(5), 20000)
    x = np.concatenate([rng.choice(12, 20000, p=p / p.sum()) for p in (x_given_y @ A).T])
    q = PrefitDiscriminator(lambda X: oracle(x_given_y, A)[X[:, 0].astype(int)], np.arange(5))
    learner = LatentLabelShift(3, discriminator=q, n_clusters=12, random_state=0).fit(x[:, None], domains=d)
    assert np.abs(matched(learner.class_priors_, A.T) - A.T).sum(1).mean() < 0.03
    every = np.arange(12.0)[:, None]
    np.testing.assert_allclose(
        matched(learner.predict_proba(every), bayes(x_given_y, A)), bayes(x_given_y, A), atol=0.05
    )
    for i in range(5):
        known = learner.predict_proba(every, domains=np.full(12, i))
        gap = np.abs(matched(known, bayes(x_given_y, A, i)) - bayes(x_given_y, A, i)).sum(1) / 2
        assert (x_given_y @ A[:, i]) @ gap < 0.02  # total variation, on average over p(x|d)
    assert learner.residual_ < 0.01


def test_attributes_are_the_equations():
    learner = model().fit(X, domains=D_IDS)
    d = np.searchsorted(learner.domains_, D_IDS)
    B = cluster_given_domain(learner.cluster_labels_, d)
    assert B.shape == (18, 4)  # 6 n_classes
    C, A = factorize_spa(B, 3)
    np.testing.assert_allclose(learner.cluster_given_class_, C)
    np.testing.assert_allclose(learner.class_priors_, A.T)
    np.testing.assert_allclose(learner.domain_given_class_, (A / A.sum(1, keepdims=True)).T)
    q = to_uniform_domains(learner.discriminator_.predict_proba(X), learner.domain_prior_)
    p = to_simplex(p_y_given_x(q, learner.domain_given_class_))
    np.testing.assert_allclose(learner.predict_proba(X), p)
    known = p * learner.domain_given_class_[d]
    np.testing.assert_allclose(learner.predict_proba(X, D_IDS), known / known.sum(1, keepdims=True))
    assert learner.labels_.dtype == learner.predict(X).dtype == np.int64


def test_q_of_fit_is_cross_fitted():
    """A discriminator that knows its training rows by heart must not be asked about them."""

    class Parrot(GaussianNB):
        def fit(self, X, y):
            self.seen_ = {row.tobytes() for row in X}
            return super().fit(X, y)

        def predict_proba(self, X):
            if asked is not None:
                asked.append(any(row.tobytes() in self.seen_ for row in X))
            return super().predict_proba(X)

    asked = []
    model(discriminator=Parrot(), cv=4).fit(X, domains=D_IDS)
    assert asked == [False] * 4 + [True]  # the last only looks whether it returns probabilities


def test_renamed_domains_change_nothing_else():
    rename = dict(zip(CLINICS, ["c", "a", "d", "b"], strict=True))
    a = model(discriminator=GaussianNB()).fit(X, domains=D_IDS)
    b = model(discriminator=GaussianNB()).fit(X, domains=[rename[name] for name in D_IDS])
    rows = np.searchsorted(b.domains_, [rename[name] for name in a.domains_])
    np.testing.assert_allclose(b.class_priors_[rows], a.class_priors_, atol=1e-9)
    np.testing.assert_array_equal(b.labels_, a.labels_)


def test_domains_of_any_size():
    """Domains of 20 : 1, and a q that has learnt so: divided out, p(y|x) is that of equally likely domains."""
    x_given_y, A = tables(12, 3, 4, inputs=12, anchors=2)
    rows = np.array([40000, 20000, 4000, 2000])
    rng = np.random.default_rng(0)
    d = np.repeat(np.arange(4), rows)
    x = np.concatenate([rng.choice(12, n, p=p / p.sum()) for n, p in zip(rows, (x_given_y @ A).T, strict=True)])
    every = np.arange(12.0)[:, None]

    def trained(X):
        q = (x_given_y @ A * rows)[X[:, 0].astype(int)]
        return q / q.sum(1, keepdims=True)

    def error(prior):
        q = PrefitDiscriminator(trained, np.arange(4))
        learner = LatentLabelShift(3, discriminator=q, n_clusters=12, discriminator_prior=prior, random_state=0)
        p = learner.fit(x[:, None], domains=d).predict_proba(every)
        return np.abs(matched(p, bayes(x_given_y, A)) - bayes(x_given_y, A)).max()

    assert error("empirical") < 0.05
    assert error(rows / rows.sum()) == error("empirical")
    assert error("uniform") > 0.2


def test_a_balanced_discriminator_needs_the_uniform_prior():
    X, Y, ids = sample(2, (1200, 1200, 300, 300))
    balanced = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    learner = model(discriminator=balanced, discriminator_prior="uniform").fit(X, domains=ids)
    np.testing.assert_allclose(learner.domain_prior_, 0.25)
    assert accuracy(Y, learner.labels_) > 0.9


# ---- what is said when the assumptions look violated


def test_equal_priors_are_reported():
    X, _, ids = sample(priors=np.tile([0.5, 0.3, 0.2], (4, 1)))
    for factorizer in ("spa", "nmf"):
        with pytest.warns(IdentifiabilityWarning, match="only 1 of n_classes = 3"):
            learner = model(factorizer=factorizer).fit(X, domains=ids)
        assert learner.n_visible_classes_ == 1


def test_exactly_equal_domains_have_an_infinite_condition():
    x = np.tile(np.arange(6.0), 30)[:, None]
    q = PrefitDiscriminator(lambda X: np.full((len(X), 3), 1 / 3), ["a", "b", "c"])
    ids = np.repeat(["a", "b", "c"], 60)
    learner = LatentLabelShift(3, discriminator=q, clusterer=_Given(np.tile(np.arange(6), 30)))
    with pytest.warns(IdentifiabilityWarning, match="condition number"):
        learner.fit(x, domains=ids)
    assert learner.condition_number_ > 1e10
    np.testing.assert_allclose(learner.predict_proba(x), 1 / 3)
    np.testing.assert_allclose(learner.predict_proba(x, domains=ids), 1 / 3)


def test_domains_that_differ_in_looks_are_reported():
    rng = np.random.default_rng(0)
    shift = dict(zip(CLINICS, rng.standard_normal((4, 5)) * 3, strict=True))
    with pytest.warns(
        IdentifiabilityWarning, match=r"at least 4 classes, not n_classes = 3.* leaves 0\.\d\d of p\(c\|d\)"
    ):
        learner = model().fit(X + np.stack([shift[name] for name in D_IDS]), domains=D_IDS)
    assert learner.residual_ > 0.1


def test_more_classes_than_asked_for_are_reported():
    with pytest.warns(IdentifiabilityWarning, match="at least 3 classes, not n_classes = 2"):
        LatentLabelShift(2, discriminator=model().discriminator, random_state=0).fit(X, domains=D_IDS)


# ---- a citizen of scikit-learn


def test_y_stands_in_for_domains_and_is_ignored_beside_them():
    learner = model().fit(X, domains=D_IDS)
    np.testing.assert_array_equal(model().fit(X, D_IDS).labels_, learner.labels_)
    np.testing.assert_array_equal(model().fit(X, Y, domains=D_IDS).labels_, learner.labels_)
    pipeline = make_pipeline(StandardScaler(), model()).fit(X, D_IDS)
    assert accuracy(Y, pipeline.predict(X, domains=D_IDS)) > 0.9


def test_domains_are_routed_as_metadata():
    with config_context(enable_metadata_routing=True):
        learner = model().set_fit_request(domains=True).set_predict_request(domains=True)
        learner.set_predict_proba_request(domains=True)
        pipeline = make_pipeline(StandardScaler(), learner).fit(X, domains=D_IDS)
        expected = model().fit(StandardScaler().fit_transform(X), domains=D_IDS)
        np.testing.assert_array_equal(pipeline[-1].labels_, expected.labels_)
        np.testing.assert_array_equal(
            pipeline.predict(X, domains=D_IDS), expected.predict(pipeline[0].transform(X), D_IDS)
        )
        np.testing.assert_allclose(pipeline.predict_proba(X, domains=D_IDS).sum(1), 1)
        assert clone(pipeline)[-1].get_metadata_routing().fit.requests == {"domains": True}
        # y, the true classes, is for the scorer alone
        only_fit = make_pipeline(StandardScaler(), model().set_fit_request(domains=True))
        shuffled = ShuffleSplit(3, random_state=0)
        scores = cross_val_score(only_fit, X, Y, scoring="adjusted_rand_score", cv=shuffled, params={"domains": D_IDS})
        assert scores.min() > 0.7
        grid = {"latentlabelshift__factorizer": ["spa", "nmf"], "latentlabelshift__n_clusters": ["auto", 9]}
        search = GridSearchCV(only_fit, grid, scoring="adjusted_rand_score", cv=shuffled).fit(X, Y, domains=D_IDS)
        assert search.best_score_ > 0.7
        with pytest.raises(Exception, match="domains"):
            make_pipeline(StandardScaler(), model()).fit(X, domains=D_IDS)  # not requested


def test_pandas_single_precision_and_reproducibility():
    frame = pd.DataFrame(X, columns=list("abcde"))
    ids = pd.Series(D_IDS, index=np.arange(len(D_IDS))[::-1]).astype("category")
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    learner = model(random_state=5).fit(frame, domains=ids)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert learner.feature_names_in_.tolist() == list("abcde")
    again = model(random_state=np.random.RandomState(5)).fit(X, domains=list(D_IDS))
    np.testing.assert_array_equal(again.class_priors_, learner.class_priors_)
    np.testing.assert_array_equal(again.predict_proba(X), learner.predict_proba(frame))
    single = model(random_state=5).fit(X.astype(np.float32), domains=D_IDS)
    assert (single.labels_ == learner.labels_).mean() > 0.98
    with pytest.raises(ValueError, match="feature names"):
        learner.predict(frame[list("edcba")])
    np.testing.assert_array_equal(learner.fit(X, domains=D_IDS).labels_, again.labels_)
    assert not hasattr(learner, "feature_names_in_")


NUMBERS = np.searchsorted(sorted(CLINICS), D_IDS)


@pytest.mark.parametrize(
    "ids", [NUMBERS * 10**12 - 5, NUMBERS.astype(float), D_IDS.astype(object)], ids=lambda a: a.dtype
)
def test_domain_ids_of_any_kind(ids):
    by_name, learner = model().fit(X, domains=D_IDS), model().fit(X, domains=ids)
    np.testing.assert_array_equal(learner.labels_, by_name.labels_)
    np.testing.assert_array_equal(learner.predict(X, domains=ids), by_name.predict(X, domains=D_IDS))


class _Given(KMeans):
    """A clusterer that returns what it was given."""

    def __init__(self, labels):
        self.labels = labels

    def fit_predict(self, X, y=None, sample_weight=None):
        return self.labels


def test_a_clusterer_of_ones_own():
    X_new, Y_new, ids = sample(seed=4)
    agglomerative = model(clusterer=AgglomerativeClustering(15)).fit(X_new, domains=ids)
    assert agglomerative.cluster_given_class_.shape == (15, 3)
    assert accuracy(Y_new, agglomerative.labels_) > 0.9
    noisy = np.where(np.arange(len(Y)) % 10 == 0, -1, 7 * Y)  # noise and gaps in the numbers
    learner = model(clusterer=_Given(noisy)).fit(X, domains=D_IDS)
    assert learner.cluster_given_class_.shape == (4, 3)
    assert set(learner.cluster_labels_) == set(range(4))
    with pytest.raises(ValueError, match="at least n_classes = 3 clusters, got 2"):
        model(clusterer=AgglomerativeClustering(2)).fit(X, domains=D_IDS)
    with pytest.raises(ValueError, match=r"clusterer must return one label a row, \(1200,\), got shape \(3,\)"):
        model(clusterer=_Given(np.arange(3))).fit(X, domains=D_IDS)


def test_prefit_discriminators_are_used_as_they_are():
    X_old, _, ids_old = sample(seed=9)
    fitted = make_pipeline(StandardScaler(), LogisticRegression()).fit(X_old, ids_old)
    frozen = model(discriminator=FrozenEstimator(fitted)).fit(X, domains=D_IDS)
    assert frozen.discriminator_.estimator is fitted
    assert accuracy(Y, frozen.labels_) > 0.9
    np.testing.assert_array_equal(frozen.predict(X, D_IDS), frozen.labels_)  # nothing to cross-fit

    scaler, linear = fitted[0], fitted[1]
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Softmax(1)).double().requires_grad_(False)
    net[0].weight[:] = torch.as_tensor(linear.coef_)
    net[0].bias[:] = torch.as_tensor(linear.intercept_)
    backwards = lambda X: net(torch.as_tensor(scaler.transform(X))).flip(1)  # noqa: E731
    adapter = PrefitDiscriminator(backwards, linear.classes_[::-1])
    assert clone(adapter) is adapter
    assert (adapter.predict(X) == fitted.predict(X)).all()
    by_torch = model(discriminator=adapter).fit(X, domains=D_IDS)
    np.testing.assert_allclose(by_torch.predict_proba(X), frozen.predict_proba(X), atol=1e-9)


# ---- what must be refused, and leave the estimator as it was


def changed(array, value):
    array = np.array(array)
    array.flat[3] = value
    return array


BAD_FITS = [
    ({"X": changed(X, np.nan)}, ValueError, "NaN"),
    ({"X": changed(X, np.inf)}, ValueError, "infinity"),
    ({"X": X[:0], "domains": D_IDS[:0]}, ValueError, "0 sample"),
    ({"X": X[0]}, ValueError, "2D array"),
    ({"domains": D_IDS[:-1]}, ValueError, "domains must have one domain a row of X, 1200, got 1199"),
    ({"domains": None, "y": D_IDS[:-1]}, ValueError, "y must have one domain a row of X, 1200, got 1199"),
    ({"domains": None}, ValueError, "domains=.* y to be passed, but the target y is None"),
    ({"domains": np.tile(["a", "b"], 600)}, ValueError, "at least n_classes = 3 different domains, got 2"),
    ({"domains": np.full(1200, "a")}, ValueError, "at least n_classes = 3 different domains, got 1"),
    ({"domains": np.where(np.arange(1200) == 7, "zoo", D_IDS)}, ValueError, "got domain 'zoo' once"),
    ({"domains": pd.Categorical(D_IDS, [*CLINICS, "empty"])}, ValueError, "empty category"),
    ({"domains": pd.Series(D_IDS).mask(np.arange(1200) == 5).to_numpy(object)}, TypeError, "got float, str"),
    ({"domains": changed(np.arange(1200.0) % 4, np.nan)}, ValueError, "domains must not hold NaN or infinity, got nan"),
    ({"domains": np.array([1, "a", None, 2.5] * 300, object)}, TypeError, "got NoneType, float, integers, str"),
    ({"domains": D_IDS.reshape(-1, 1)}, ValueError, r"domains must have shape \(n_samples,\).* \(1200, 1\)"),
    ({"domains": np.arange(1200) % 4 * 1j}, TypeError, "got dtype complex128"),
]
BAD_OPTIONS = [
    ({"n_classes": 1}, ValueError, "n_classes must be an integer >= 2, got 1"),
    ({"n_classes": 5}, ValueError, "at least n_classes = 5 different domains, got 4"),
    ({"n_classes": 3.0}, ValueError, r"n_classes must be an integer >= 2, got 3\.0"),
    ({"n_classes": True}, ValueError, "n_classes must be an integer >= 2, got True"),
    ({"n_clusters": 0}, ValueError, "n_clusters must be 'auto' or an integer .* got 0"),
    ({"n_clusters": "many"}, ValueError, "n_clusters must be .* got 'many'"),
    ({"n_clusters": 1201}, ValueError, "at most the number of rows, 1200, got 1201"),
    ({"factorizer": "svd"}, ValueError, "factorizer must be 'spa' or 'nmf', got 'svd'"),
    ({"n_init": 0}, ValueError, "n_init must be an integer >= 1, got 0"),
    ({"cv": 1}, ValueError, "cv must be at least 2 folds, got 1"),
    ({"cv": ShuffleSplit(1, random_state=0)}, ValueError, "cv must hold out every row"),
    ({"discriminator": LinearSVC()}, TypeError, "discriminator must have predict_proba, got LinearSVC"),
    ({"discriminator": Ridge()}, TypeError, "discriminator must have predict_proba"),
    ({"clusterer": StandardScaler()}, TypeError, "clusterer must have fit_predict, got StandardScaler"),
    ({"discriminator_prior": "flat"}, ValueError, "discriminator_prior must be 'empirical', .* got 'flat'"),
    ({"discriminator_prior": [0.5, 0.5]}, ValueError, "discriminator_prior must be 4 shares > 0 of sum 1"),
    ({"discriminator_prior": [0.5, 0.5, 0.5, 0.5]}, ValueError, "discriminator_prior must be 4 shares > 0 of sum 1"),
    ({"discriminator_prior": [0.5, 0.5, 0.0, 0.0]}, ValueError, "discriminator_prior must be 4 shares > 0 of sum 1"),
    ({"discriminator": PrefitDiscriminator(lambda X: np.full((len(X), 3), 1 / 3), list("abc"))}, ValueError,
     r"must know exactly the domains .* got \['a', 'b', 'c'\]"),
    ({"discriminator": PrefitDiscriminator(lambda X: np.full((len(X), 3), 1 / 3), CLINICS)}, ValueError,
     r"discriminator must return probabilities of shape \(\d+, 4\).* got shape \(\d+, 3\)"),
    ({"discriminator": PrefitDiscriminator(lambda X: np.eye(4)[[0] * len(X)] * 3 - 0.5, CLINICS)}, ValueError,
     r"sum 1; got shape .* values -0\.5 to 2\.5"),
    ({"discriminator": PrefitDiscriminator(lambda X: np.full((len(X), 4), np.nan), CLINICS)}, ValueError,
     "must return probabilities"),
]  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    return model().fit(X, domains=D_IDS)


def unchanged(learner, before):
    assert set(vars(learner)) == set(before)
    assert all(vars(learner)[name] is before[name] for name in before if name.endswith("_"))


@pytest.mark.parametrize(("changes", "error", "message"), BAD_FITS)
def test_bad_rows_are_refused_and_change_nothing(fitted, changes, error, message):
    before = dict(vars(fitted))
    with pytest.raises(error, match=message):
        fitted.fit(**{"X": X, "domains": D_IDS, **changes})
    unchanged(fitted, before)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_and_change_nothing(options, error, message):
    learner = model().fit(X, domains=D_IDS).set_params(**options)
    before = dict(vars(learner))
    with pytest.raises(error, match=message):
        learner.fit(X, domains=D_IDS)
    unchanged(learner, before)


@pytest.mark.parametrize(
    ("X_new", "domains", "error", "message"),
    [
        (X[:, :4], None, ValueError, "4 features, but LatentLabelShift is expecting 5"),
        (changed(X, np.nan), None, ValueError, "NaN"),
        (X[:0], None, ValueError, "0 sample"),
        (X[:2], ["north", "nowhere"], ValueError, "must be among those of fit, .* got 'nowhere'"),
        (X[:2], ["north"], ValueError, "one domain a row of X, 2, got 1"),
        (X[:2], [1, 2], TypeError, "of the kind given to fit"),
        (X[:2], "north", ValueError, r"shape \(n_samples,\)"),
    ],
)
def test_bad_new_rows_are_refused(fitted, X_new, domains, error, message):
    for call in (fitted.predict, fitted.predict_proba):
        with pytest.raises(error, match=message):
            call(X_new, domains=domains)


def test_few_clusters_are_raised_with_a_warning():
    with pytest.warns(UserWarning, match="n_clusters = 2 is raised to n_classes = 3"):
        learner = model(n_clusters=2).fit(X, domains=D_IDS)
    assert len(learner.cluster_given_class_) == 3
    assert learner.n_clusters == 2


def test_tiny_domains_lower_the_number_of_folds():
    rows = np.concatenate([np.flatnonzero(D_IDS == name)[:n] for name, n in zip(CLINICS, (2, 3, 50, 50), strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        learner = model().fit(X[rows], domains=D_IDS[rows])
    assert len(learner.labels_) == 105


def test_verdict_follows_its_rule():
    from shoestring.claims import Row
    from shoestring.claims.classify.latent_label_shift import ALPHAS, ARMS, METRICS, REGIMES, verdict

    def rows(**worse):
        """DDFA by NMF ahead everywhere, but for the arms given: name -> (alpha, accuracy, error)."""
        made = []
        for alpha in ALPHAS:
            setting = f"{REGIMES[0]}, alpha {alpha:g}"
            for arm, name in zip(ARMS, ("nmf", "spa", "pixels", "q"), strict=True):
                accuracy, error = (80.0, 0.2) if name == "nmf" else (60.0, 0.5)
                if name in worse and worse[name][0] == alpha:
                    accuracy, error = worse[name][1:]
                made += [Row.of(arm, m, [v], setting=setting) for m, v in zip(METRICS, (accuracy, error), strict=True)]
        return made

    assert verdict(rows()) == "holds"
    assert verdict(rows(spa=(0.5, 99, 0.0))) == verdict(rows(pixels=(10, 99, 0.0))) == "holds"  # do not count
    assert verdict(rows(q=(3, 81, 0.5))) == verdict(rows(q=(0.5, 60, 0.1))) == "partly"
    assert verdict(rows(pixels=(3, 80.0, 0.5))) == "partly"
    assert verdict(rows(pixels=(0.5, 81, 0.5))) == verdict(rows(pixels=(0.5, 60, 0.2))) == "not at this scale"
