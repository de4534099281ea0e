"""G-ACIL: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from shoestring.data.streams import SiBlurry
from shoestring.learn import GACIL, AnalyticHead
from shoestring.learn.g_acil import choose_gamma, random_projection, rbf_buffer, recursive_update, relu_buffer

FIXTURES = Path(__file__).parent.parent / "fixtures"
DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS / 16.0
M = 600


def model(**options) -> GACIL:
    return GACIL(**{"n_components": M, "gamma": 1.0, **options})


def buffered(X, n_components=M, seed=0):
    return np.maximum(X @ random_projection(X.shape[1], n_components, random_state=seed), 0.0)


def joint_weights(X, y, gamma=1.0, **options):
    """(classes, M), by NumPy's solver on the buffered rows: what everything here is compared with."""
    B = buffered(X, **options)
    classes = np.unique(y)
    Y = (y[:, None] == classes).astype(float)
    return np.linalg.solve(B.T @ B + gamma * np.eye(B.shape[1]), B.T @ Y).T


def gap(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


CONFIGURATIONS = [
    GACIL(n_components=64),
    GACIL(buffer=None, gamma="gcv"),
    GACIL(n_components=32, buffer="rbf", kernel_width=3.0, gamma="gcv"),
    GACIL(n_components=32, solver="recursive"),
    GACIL(n_components=32, compensation=0.6, gamma=1.0),
]


@parametrize_with_checks(CONFIGURATIONS)
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


# ---- exactness


@pytest.mark.parametrize("solver", ["gram", "recursive"])
@pytest.mark.parametrize("chunk", [1, 7, 256, 1797])
def test_chunked_equals_joint(solver, chunk):
    rows = len(LABELS) if chunk > 1 else 200
    order = np.random.default_rng(chunk).permutation(rows)
    learner = model(solver=solver)
    for part in np.split(order, range(chunk, rows, chunk)):
        learner.partial_fit(DIGITS[part], LABELS[part])
    assert gap(learner.coef_, joint_weights(DIGITS[order], LABELS[order])) < 1e-9
    assert learner.n_samples_seen_ == rows


def test_order_does_not_matter():
    by_class, shuffled = np.argsort(LABELS, kind="stable"), np.random.default_rng(0).permutation(len(LABELS))
    coef = []
    for order in (by_class, by_class[::-1], shuffled):
        learner = model()
        for part in np.array_split(order, 9):
            learner.partial_fit(DIGITS[part], LABELS[part])
        coef.append(learner.coef_)
    assert gap(coef[0], coef[2]) < 1e-9
    assert gap(coef[1], coef[2]) < 1e-9


def test_equals_ridge_on_buffered_features():
    Y = (LABELS[:, None] == np.arange(10)).astype(float)
    ridge = Ridge(alpha=3.0, fit_intercept=False).fit(buffered(DIGITS), Y)
    learner = model(gamma=3.0).fit(DIGITS, LABELS)
    assert gap(learner.coef_, ridge.coef_) < 1e-9
    np.testing.assert_allclose(learner.decision_function(DIGITS), ridge.predict(buffered(DIGITS)), atol=1e-9)


def test_no_buffer_equals_ridge_on_the_features():
    Y = (LABELS[:, None] == np.arange(10)).astype(float)
    ridge = Ridge(alpha=0.5, fit_intercept=False).fit(DIGITS, Y)
    assert gap(model(buffer=None, gamma=0.5).fit(DIGITS, LABELS).coef_, ridge.coef_) < 1e-9


def test_recursion_keeps_the_inverse():
    gamma, R, W = 1.0, torch.eye(M, dtype=torch.float64), torch.zeros(M, 10, dtype=torch.float64)
    B, Y = torch.as_tensor(buffered(DIGITS)), torch.eye(10, dtype=torch.float64)[LABELS]
    for part in torch.arange(len(B)).split(100):
        R, W = recursive_update(R, W, B[part], Y[part])
    G = B.T @ B
    assert (R @ (G + gamma * torch.eye(M)) - torch.eye(M)).abs().max() < 1e-10
    assert torch.equal(R, R.T)


def test_recursion_is_the_papers_two_brackets():
    """W = [W - R X'X W | R X' Ytilde] + [R X' Ybar | 0], Theorem 1, with the inverse written out."""
    rng = np.random.default_rng(0)
    X1, X2 = (torch.as_tensor(rng.standard_normal((30, 12))) for _ in range(2))
    y1, y2 = torch.as_tensor(rng.integers(0, 3, 30)), torch.as_tensor(rng.integers(0, 5, 30))
    I = torch.eye(12, dtype=torch.float64)
    R = torch.linalg.inv(X1.T @ X1 + 2.0 * I)
    W = R @ X1.T @ torch.eye(3, dtype=torch.float64)[y1]
    Y = torch.eye(5, dtype=torch.float64)[y2]
    R_k = R - R @ X2.T @ torch.linalg.inv(torch.eye(30) + X2 @ R @ X2.T) @ X2 @ R
    unexposed = torch.cat([W - R_k @ X2.T @ X2 @ W, R_k @ X2.T @ Y[:, 3:]], 1)
    gain = torch.cat([R_k @ X2.T @ Y[:, :3], torch.zeros(12, 2)], 1)
    got_R, got_W = recursive_update(R, torch.cat([W, torch.zeros(12, 2)], 1), X2, Y)
    torch.testing.assert_close(got_R, R_k, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_W, unexposed + gain, rtol=0, atol=1e-12)


def test_acil_is_the_case_where_no_class_returns():
    """On disjoint chunks Ybar = 0, so the exposed-class gain is zero and dropping it changes nothing."""
    R, W = torch.eye(M, dtype=torch.float64), torch.zeros(M, 0, dtype=torch.float64)
    for digits in ((0, 1, 2), (3, 4), (5, 6, 7, 8, 9)):
        rows = np.isin(LABELS, digits)
        X = torch.as_tensor(buffered(DIGITS[rows]))
        Ytilde = torch.as_tensor((LABELS[rows][:, None] == digits).astype(float))
        Ybar = torch.zeros(len(X), W.shape[1])
        padded = torch.cat([W, torch.zeros(M, len(digits))], 1)
        R, W = recursive_update(R, padded, X, torch.cat([Ybar, Ytilde], 1))
    assert gap(W.T.numpy(), model().fit(DIGITS, LABELS).coef_) < 1e-9


def test_presenting_rows_r_times_divides_gamma():
    thrice = model(gamma=3.0)
    for _ in range(3):
        thrice.partial_fit(DIGITS, LABELS)
    assert gap(thrice.coef_, model(gamma=1.0).fit(DIGITS, LABELS).coef_) < 1e-9


def test_scaling_the_projection_divides_gamma():
    """Scaling W_B by s is dividing gamma by s^2: scores are equal."""
    a = model(gamma=1.0).fit(DIGITS, LABELS)
    b = model(gamma=9.0).fit(3 * DIGITS, LABELS)
    np.testing.assert_allclose(a.decision_function(DIGITS), b.decision_function(3 * DIGITS), atol=1e-10)


def test_classes_are_interchangeable():
    swap = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    plain, swapped = model().fit(DIGITS, LABELS), model().fit(DIGITS, swap[LABELS])
    assert gap(swapped.coef_[swap], plain.coef_) < 1e-12


def test_large_gamma_is_the_class_sum():
    B = buffered(DIGITS)
    Q = np.stack([B[LABELS == k].sum(0) for k in range(10)])
    assert gap(model(gamma=1e12).fit(DIGITS, LABELS).coef_ * 1e12, Q) < 1e-6


def test_last_accuracy_does_not_depend_on_the_stream():
    train, test = np.arange(0, 1300), np.arange(1300, 1797)
    answers = []
    for seed, (n, m, tasks) in enumerate([(0.5, 0.1, 5), (0.0, 0.3, 3), (1.0, 0.1, 2), (0.5, 0.5, 10)]):
        learner = model(gamma=1.0)
        stream = SiBlurry(LABELS[train], n_tasks=tasks, disjoint=n, blurry=m, random_state=seed)
        for task in stream.tasks:
            for part in np.split(task, range(64, len(task), 64)):
                if len(part):
                    learner.partial_fit(DIGITS[train][part], LABELS[train][part])
        answers.append(learner.predict(DIGITS[test]))
    assert all((answer == answers[0]).all() for answer in answers)
    assert (answers[0] == LABELS[test]).mean() > 0.93


def test_sample_weight_is_repetition():
    times = np.random.default_rng(1).integers(0, 4, len(LABELS))
    repeated = np.repeat(np.arange(len(LABELS)), times)
    for solver in ("gram", "recursive"):
        weighted = model(solver=solver).fit(DIGITS, LABELS, sample_weight=times)
        assert gap(weighted.coef_, joint_weights(DIGITS[repeated], LABELS[repeated])) < 1e-9
    np.testing.assert_allclose(weighted.class_count_, np.bincount(LABELS[repeated]))


def test_single_precision_is_near_and_does_not_drift():
    exact = model().fit(DIGITS, LABELS)
    single = model(dtype="float32")
    for part in np.array_split(np.arange(len(LABELS)), 40):
        single.partial_fit(DIGITS[part].astype(np.float32), LABELS[part])
    assert gap(single.coef_, exact.coef_) < 2e-4
    assert (single.predict(DIGITS) == exact.predict(DIGITS)).mean() > 0.999


# ---- forgetting and merging


@pytest.mark.parametrize("solver", ["gram", "recursive"])
@pytest.mark.parametrize("what", ["random half", "a class and more"])
def test_forget_equals_never_seen(solver, what):
    gone = np.random.default_rng(0).random(len(LABELS)) < 0.5
    if what == "a class and more":
        gone = (LABELS == 3) | (np.arange(len(LABELS)) % 10 == 0)
    learner = model(solver=solver).fit(DIGITS, LABELS)
    learner.forget(DIGITS[gone], LABELS[gone])
    assert gap(learner.coef_, joint_weights(DIGITS[~gone], LABELS[~gone])) < 1e-9
    np.testing.assert_array_equal(learner.classes_, np.unique(LABELS[~gone]))
    np.testing.assert_array_equal(learner.class_count_, np.unique(LABELS[~gone], return_counts=True)[1])
    assert learner.n_samples_seen_ == (~gone).sum()


def test_forgetting_everything_is_an_empty_model():
    learner = model().fit(DIGITS, LABELS).forget(DIGITS, LABELS)
    assert len(learner.classes_) == 0
    with pytest.raises(ValueError, match="every class has been forgotten"):
        learner.predict(DIGITS)
    learner.partial_fit(DIGITS[:500], LABELS[:500])
    assert gap(learner.coef_, joint_weights(DIGITS[:500], LABELS[:500])) < 1e-12


def test_forget_class_leaves_rows_with_zero_targets():
    learner = model().fit(DIGITS, LABELS).forget_class(4)
    B = buffered(DIGITS)
    Y = (LABELS[:, None] == np.delete(np.arange(10), 4)).astype(float)
    assert gap(learner.coef_, np.linalg.solve(B.T @ B + np.eye(M), B.T @ Y).T) < 1e-9
    assert 4 not in learner.predict(DIGITS)
    with pytest.raises(ValueError, match="label 4 is unknown"):
        learner.forget_class(4)


@pytest.mark.parametrize("solver", ["gram", "recursive"])
def test_merge_of_seven_equals_joint(solver):
    names = np.array(list("zyxwvutsrq"))[LABELS]  # first seen in another order at every site
    sites = [
        model(solver=solver).fit(DIGITS[part], names[part])
        for part in np.array_split(np.argsort(LABELS * 7919 % 101, kind="stable"), 7)
    ]
    total = sites[0]
    for site in sites[1:]:
        total += site
    joint = joint_weights(DIGITS, names)
    assert gap(total.coef_, joint) < 1e-9
    np.testing.assert_array_equal(total.classes_, np.unique(names))


def test_merge_across_solvers_and_gammas():
    a = model(gamma=2.0).fit(DIGITS[:900], LABELS[:900])
    b = model(gamma=0.5, solver="recursive").fit(DIGITS[900:], LABELS[900:])
    assert gap(a.merge(b).coef_, joint_weights(DIGITS, LABELS, gamma=2.0)) < 1e-9


def test_merge_refuses_another_buffer():
    a = model().fit(DIGITS, LABELS)
    before = a.coef_.copy()
    for other in (model(random_state=1), model(n_components=M + 1), model(buffer=None), model(init="normal")):
        with pytest.raises(ValueError, match="same buffer"):
            a.merge(other.fit(DIGITS, LABELS))
    with pytest.raises(TypeError, match="must be a GACIL"):
        a.merge("model")
    with pytest.raises(TypeError, match="integers"):
        a.merge(model().fit(DIGITS, LABELS.astype(str)))
    np.testing.assert_array_equal(a.coef_, before)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_interleaving_ends_at_the_joint_fit(data):
    """Learn, forget, merge, save and load in any order: the weights are those of one fit on the rows that remain."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    X, y = rng.standard_normal((60, 4)), rng.integers(0, 5, 60)
    options = {"n_components": 15, "gamma": 0.5, "solver": data.draw(st.sampled_from(["gram", "recursive"]))}
    present: list[int] = []
    fresh = list(rng.permutation(60))
    learner = GACIL(**options)
    for step in data.draw(st.lists(st.sampled_from(["learn", "forget", "merge", "save"]), min_size=1, max_size=12)):
        size = int(rng.integers(1, 12))
        if step in ("learn", "merge") and fresh:
            part, fresh = fresh[:size], fresh[size:]
            present += part
            if step == "learn" or len(present) == len(part):
                learner.partial_fit(X[part], y[part])
            else:
                learner.merge(GACIL(**options).partial_fit(X[part], y[part]))
        elif step == "forget" and len(present) > size:
            rng.shuffle(present)
            part, present = present[:size], present[size:]
            learner.forget(X[part], y[part])
        elif step == "save" and present:
            path = SCRATCH / f"{os.getpid()}.safetensors"
            learner.save(path)
            learner = GACIL.load(path)
    if present:
        np.testing.assert_array_equal(learner.classes_, np.unique(y[present]))
        joint = joint_weights(X[present], y[present], gamma=0.5, n_components=15)
        assert np.abs(learner.coef_ - joint).max() < 1e-9 * max(1.0, np.abs(joint).max())


@pytest.fixture(autouse=True)
def _scratch(tmp_path):
    global SCRATCH
    SCRATCH = tmp_path


# ---- the family and the options


def test_gcv_score_is_that_of_the_hat_matrix():
    X, y = DIGITS[:300], LABELS[:300]
    B, Y = buffered(X, 80), np.eye(10)[y]
    learner = GACIL(n_components=80, gamma="gcv").fit(X, y)

    def direct(gamma):
        H = B @ np.linalg.solve(B.T @ B + gamma * np.eye(80), B.T)
        return 300 * np.sum((Y - H @ Y) ** 2) / (300 - np.trace(H)) ** 2

    grid = np.logspace(-8, 4, 400)
    best = min(direct(gamma) for gamma in grid)
    assert direct(learner.gamma_) <= best * (1 + 1e-12)
    assert grid[0] < learner.gamma_ < grid[-1]
    G, Q = torch.as_tensor(B.T @ B), torch.as_tensor(Y.T @ B)
    assert choose_gamma(G, Q, 300.0, 300.0) == pytest.approx(learner.gamma_, rel=1e-6)
    assert gap(learner.coef_, joint_weights(X, y, gamma=learner.gamma_, n_components=80)) < 1e-9


def test_gcv_needs_no_rows_and_follows_the_sums():
    chunked = GACIL(n_components=80, gamma="gcv")
    for part in np.array_split(np.arange(900), 9):
        chunked.partial_fit(DIGITS[part], LABELS[part])
        chunked.predict(DIGITS[:1])
    assert chunked.gamma_ == pytest.approx(GACIL(n_components=80, gamma="gcv").fit(DIGITS[:900], LABELS[:900]).gamma_)


def test_rbf_buffer_is_the_gaussian_kernel():
    E, centers = torch.as_tensor(DIGITS[:50]), torch.as_tensor(DIGITS[100:120])
    expected = rbf_kernel(DIGITS[:50], DIGITS[100:120], gamma=1 / (2 * 1.7**2))
    np.testing.assert_allclose(rbf_buffer(E, centers, 1.7).numpy(), expected, atol=1e-12)


def test_gkeal_chunked_equals_joint_with_given_centers():
    centers = DIGITS[::9]
    options = {"buffer": "rbf", "centers": centers, "kernel_width": 2.0, "gamma": 0.1}
    chunked = GACIL(**options)
    for part in np.array_split(np.random.default_rng(0).permutation(len(LABELS)), 11):
        chunked.partial_fit(DIGITS[part], LABELS[part])
    K = rbf_kernel(DIGITS, centers, gamma=1 / 8)
    Y = np.eye(10)[LABELS]
    expected = K @ np.linalg.solve(K.T @ K + 0.1 * np.eye(len(centers)), K.T @ Y)
    np.testing.assert_allclose(chunked.decision_function(DIGITS), expected, atol=1e-8)


def test_dsal_second_stream_written_out():
    """DS-AL in plain NumPy: residual of the first stream, columns of classes not in the chunk zeroed, tanh buffer."""
    W_B = random_projection(64, 50)
    learner = GACIL(n_components=50, gamma=1.0, compensation=0.6)
    first, second = (lambda E: np.maximum(E @ W_B, 0)), (lambda E: np.tanh(E @ W_B))
    G, Q, G2, Q2 = np.zeros((50, 50)), np.zeros((50, 10)), np.zeros((50, 50)), np.zeros((50, 10))
    for digits in ((0, 1, 2), (3, 4, 5), (2, 6, 7), (8, 9)):
        rows = np.isin(LABELS, digits)
        E, Y = DIGITS[rows], np.eye(10)[LABELS[rows]]
        G, Q = G + first(E).T @ first(E), Q + first(E).T @ Y
        W = np.linalg.solve(G + np.eye(50), Q)
        residual = (Y - first(E) @ W) * np.isin(np.arange(10), digits)
        G2, Q2 = G2 + second(E).T @ second(E), Q2 + second(E).T @ residual
        learner.partial_fit(E, LABELS[rows])
    expected = first(DIGITS) @ W + 0.6 * second(DIGITS) @ np.linalg.solve(G2 + np.eye(50), Q2)
    np.testing.assert_allclose(learner.decision_function(DIGITS), expected, atol=1e-9)
    for refused in (lambda: learner.forget(DIGITS[:1], LABELS[:1]), lambda: learner.merge(learner)):
        with pytest.raises(ValueError, match="depends on the order of chunks"):
            refused()


def test_projection_laws():
    uniform, normal = random_projection(400, 300), random_projection(400, 300, "normal")
    assert np.abs(uniform).max() <= 1 / 20
    assert uniform.std() == pytest.approx(1 / 20 / np.sqrt(3), rel=0.01)
    assert normal.std() == pytest.approx(1.0, rel=0.01)
    # the legacy generator is frozen: these digits are the same on every machine and NumPy
    assert random_projection(4, 2)[0].tolist() == [0.04881350392732475, 0.21518936637241948]
    E, W_B = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    assert relu_buffer(E, W_B).tolist() == [[0.0, 1.0]]


def test_probabilities_are_the_gaussian_posterior():
    learner = model(n_components=100).fit(DIGITS, LABELS)
    B, Y, scores = buffered(DIGITS, 100), np.eye(10)[LABELS], learner.decision_function(DIGITS)
    H = B @ np.linalg.solve(B.T @ B + np.eye(100), B.T)
    variance = np.sum((Y - scores) ** 2) / (10 * (len(Y) - np.trace(H)))
    assert learner.head_.noise_variance == pytest.approx(variance, rel=1e-9)
    distance = ((np.eye(10)[None] - scores[:, None]) ** 2).sum(2)  # (N, 10)
    posterior = np.exp(-distance / (2 * variance))
    posterior /= posterior.sum(1, keepdims=True)
    np.testing.assert_allclose(learner.predict_proba(DIGITS), posterior, atol=1e-12)
    assert (learner.predict_proba(DIGITS).argmax(1) == scores.argmax(1)).all()


def test_one_class_so_far_and_two():
    zeros, pair = LABELS == 0, np.isin(LABELS, (0, 1))
    learner = model().partial_fit(DIGITS[zeros], LABELS[zeros])
    assert (learner.predict(DIGITS) == 0).all()
    assert (learner.predict_proba(DIGITS) == 1).all()
    learner.partial_fit(DIGITS[LABELS == 1], LABELS[LABELS == 1])
    difference = learner.decision_function(DIGITS[pair])
    assert difference.shape == (pair.sum(),)
    assert ((difference > 0) == LABELS[pair]).mean() > 0.99


@pytest.mark.parametrize("names", [np.array(["ten"] * 5 + ["a much longer name"] * 5), np.arange(10) * 10**17 - 5])
def test_labels_of_any_kind_grow_over_time(names):
    learner = model(n_components=50)
    half = LABELS < 5
    for rows in (half, ~half):
        learner.partial_fit(DIGITS[rows], names[LABELS[rows]])
    np.testing.assert_array_equal(learner.classes_, np.unique(names))
    by_number = model(n_components=50).fit(DIGITS, np.unique(names, return_inverse=True)[1][LABELS])
    np.testing.assert_array_equal(learner.predict(DIGITS), learner.classes_[by_number.predict(DIGITS)])


def test_in_a_pipeline_with_pandas_and_cross_validation():
    frame = pd.DataFrame(DIGITS, columns=[f"pixel {i}" for i in range(64)])
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), model(n_components=200))
    assert cross_val_score(pipeline, frame, LABELS, cv=3).mean() > 0.9
    learner = clone(model()).fit(frame, pd.Series(LABELS).map(str))
    assert list(learner.feature_names_in_) == list(frame.columns)
    assert learner.classes_.tolist() == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="feature names"):
        learner.partial_fit(frame[frame.columns[::-1]], LABELS.astype(str))


# ---- as a torch layer


def test_head_equals_estimator_and_lets_gradients_through():
    head = AnalyticHead(64, M, gamma=1.0)
    for part in torch.arange(len(LABELS)).split(200):
        head.update(torch.as_tensor(DIGITS[part]), torch.as_tensor(LABELS[part]))
    learner = model().fit(DIGITS, LABELS)
    assert gap(head.weight.numpy(), learner.coef_) < 1e-12
    x = torch.tensor(DIGITS[:5], requires_grad=True)
    torch.autograd.gradcheck(lambda x: head(x), (x,), atol=1e-4)
    assert not any(p.requires_grad for p in head.parameters())
    network = torch.nn.Sequential(torch.nn.Flatten(), head)
    assert (network(torch.as_tensor(DIGITS).reshape(-1, 8, 8)).argmax(1).numpy() == learner.predict(DIGITS)).all()


def test_head_ids_never_seen_score_minus_infinity():
    head = AnalyticHead(64, 50).update(torch.as_tensor(DIGITS[:50]), torch.as_tensor(LABELS[:50]) * 2 + 1)
    scores = head(torch.as_tensor(DIGITS[:5], dtype=torch.float32))
    assert scores.dtype == torch.float32
    assert scores.shape == (5, 20)
    assert torch.isinf(scores[:, ::2]).all()
    assert torch.isfinite(scores[:, 1::2]).all()


def test_head_state_dict_round_trip_and_casts():
    head = AnalyticHead(64, 80, gamma="gcv").update(torch.as_tensor(DIGITS[:700]), torch.as_tensor(LABELS[:700]))
    other = AnalyticHead(64, 80, gamma="gcv", random_state=5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), head).half()
    assert network[0].weight.dtype == torch.float16
    assert head.ridge.G.dtype == head.basis.dtype == torch.float64
    assert torch.equal(other.weight, head.weight)
    for h in (head, other):
        h.update(torch.as_tensor(DIGITS[700:]), torch.as_tensor(LABELS[700:]))
    assert torch.equal(other.weight, head.weight)


@pytest.mark.parametrize(
    ("features", "ids", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), r"shape \(N >= 1, 64\)"),
        (torch.zeros(0, 64), torch.zeros(0, dtype=torch.long), "N >= 1"),
        (torch.zeros(2, 64), torch.zeros(2), "integers of shape"),
        (torch.zeros(2, 64), torch.zeros(3, dtype=torch.long), "integers of shape"),
        (torch.zeros(2, 64), torch.tensor([0, -1]), "not be negative"),
        (torch.full((2, 64), torch.nan), torch.tensor([0, 1]), "NaN or infinity"),
    ],
)
def test_head_refuses(features, ids, message):
    head = AnalyticHead(64, 20)
    with pytest.raises(ValueError, match=message):
        head.update(features, ids)
    assert head.n_classes == 0
    assert head.total.sum() == 0


# ---- saving


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"solver": "recursive"}, {"buffer": None}, {"gamma": "gcv"}, {"compensation": 1.5},
     {"buffer": "rbf"}, {"random_state": None}],
    ids=str,
)  # fmt: skip
def test_save_and_load_go_on_bit_for_bit(options, tmp_path):
    learner = model(n_components=70, **options).fit(DIGITS[:800], np.array(list("abcdefghij"))[LABELS[:800]])
    learner.save(tmp_path / "m.safetensors", extra={"backbone": "none"})
    loaded = GACIL.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(loaded.decision_function(DIGITS), learner.decision_function(DIGITS))
    for m in (loaded, learner):
        m.partial_fit(DIGITS[800:], np.array(list("abcdefghij"))[LABELS[800:]])
    np.testing.assert_array_equal(loaded.coef_, learner.coef_)
    assert loaded.classes_.tolist() == list("abcdefghij")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_more_classes_than_width_are_scored_without_their_weights():
    """Rows are solved for until as many were asked as there are classes; then W is, and nothing changes."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((300, 20)), np.arange(300) % 60
    learner = GACIL(n_components=30, gamma=0.5).fit(X, y)
    B, Y = buffered(X, 30), np.eye(60)[y]
    W = joint_weights(X, y, gamma=0.5, n_components=30)
    for first, last, solved in ((0, 30, False), (30, 59, False), (59, 300, True), (0, 300, True)):
        scores = learner.decision_function(X[first:last])
        assert ("weight" in learner.head_._solved) is solved
        assert gap(scores, B[first:last] @ W.T) < 1e-9
    hat = B @ np.linalg.solve(B.T @ B + 0.5 * np.eye(30), B.T)
    variance = np.sum((Y - hat @ Y) ** 2) / (60 * (300 - np.trace(hat)))
    assert learner.head_.noise_variance == pytest.approx(variance, rel=1e-9)
    fresh = GACIL(n_components=30, gamma=0.5).fit(X, y)
    assert fresh.head_.noise_variance == pytest.approx(variance, rel=1e-9)  # without W
    assert "weight" not in fresh.head_._solved
    fresh.partial_fit(X[:5], y[:5] + 1)
    again = GACIL(n_components=30, gamma=0.5).fit(np.r_[X, X[:5]], np.r_[y, y[:5] + 1])
    assert gap(fresh.decision_function(X), again.decision_function(X)) < 1e-9


@pytest.mark.parametrize("gamma", [1.0, "gcv"])
def test_what_was_settled_is_saved_until_a_row_is_added(gamma, tmp_path, monkeypatch):
    learner = model(n_components=70, gamma=gamma).fit(DIGITS[:800], LABELS[:800]).settle()
    learner.save(tmp_path / "m.safetensors")
    loaded = GACIL.load(tmp_path / "m.safetensors")
    with monkeypatch.context() as without:
        without.setattr("shoestring.learn._analytic_head.residuals", None)
        without.setattr("shoestring.learn._analytic_head.choose_gamma", None)
        np.testing.assert_array_equal(loaded.predict_proba(DIGITS), learner.predict_proba(DIGITS))
    for m in (loaded, learner):
        m.partial_fit(DIGITS[800:], LABELS[800:])
    joint = model(n_components=70, gamma=gamma).fit(DIGITS, LABELS)
    np.testing.assert_allclose(loaded.predict_proba(DIGITS), joint.predict_proba(DIGITS), rtol=0, atol=1e-9)


def test_gathered_rows_never_leave_in_a_pickle_or_copy():
    import copy
    import pickle

    learner = model().partial_fit(DIGITS[:100], LABELS[:100])
    assert learner.head_.ridge._n_gathered == 100
    blob = pickle.dumps(learner)
    assert learner.head_.ridge._gathered is None
    np.testing.assert_array_equal(pickle.loads(blob).coef_, learner.coef_)  # noqa: S301 (our own bytes)
    np.testing.assert_array_equal(copy.deepcopy(learner).coef_, learner.coef_)


def test_file_of_version_1_still_loads():
    """Written once by the version that introduced the format; kept for ever."""
    learner = GACIL.load(FIXTURES / "g_acil_v1.safetensors")
    np.testing.assert_array_equal(learner.classes_, ["cat", "dog"])
    assert learner.n_samples_seen_ == 6
    X = np.array([[1.0, 0, 0], [0, 1, 0]])
    expected = np.load(FIXTURES / "g_acil_v1_scores.npy")
    np.testing.assert_allclose(learner.decision_function(X), expected, atol=1e-12)
    learner.partial_fit(X, ["cow", "cat"])
    assert learner.classes_.tolist() == ["cat", "cow", "dog"]


def test_truncated_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    model(n_components=20).fit(DIGITS, LABELS).save(path)
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            GACIL.load(path)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="is of the format"):
        GACIL.load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(ValueError, match="version 9"):
        GACIL.load(path)
    with pytest.raises(FileNotFoundError, match="no saved model"):
        GACIL.load(tmp_path / "absent")


# ---- what must be refused, and leave the model as it was

GOOD_X, GOOD_Y = DIGITS[:20], LABELS[:20]


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        (np.where(GOOD_X == GOOD_X[0, 2], np.nan, GOOD_X), GOOD_Y, ValueError, "NaN"),
        (np.where(GOOD_X == GOOD_X[0, 2], np.inf, GOOD_X), GOOD_Y, ValueError, "infinity"),
        (GOOD_X[:, :63], GOOD_Y, ValueError, "63 features, but GACIL is expecting 64"),
        (GOOD_X[:0], GOOD_Y[:0], ValueError, "0 sample"),
        (GOOD_X, GOOD_Y[:19], ValueError, "inconsistent numbers of samples"),
        (GOOD_X, GOOD_Y + 0.5, ValueError, "Unknown label type"),
        (GOOD_X, [1] * 19 + [np.nan], ValueError, "Unknown label type"),
        (GOOD_X, [1] * 19 + ["one"], TypeError, "strings, but the classes known so far are integers"),
        (GOOD_X, np.array([1] * 19 + ["one"], dtype=object), TypeError, "labels of one kind"),
        (GOOD_X, np.array([1] * 19 + [None], dtype=object), TypeError, "NoneType"),
        (GOOD_X, np.array(["a"] * 20), TypeError, "strings, but the classes known so far are integers"),
        (GOOD_X, np.array([2**63] * 20, dtype=np.uint64), ValueError, "beyond int64"),
        (GOOD_X, np.array([2**70] * 20, dtype=object), ValueError, "beyond int64"),
        (GOOD_X, np.array([1 + 2j] * 20), ValueError, "Complex data"),
        (GOOD_X, np.zeros((20, 2), int), ValueError, "1d array"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["partial_fit", "forget"])
def test_bad_rows_are_refused_and_change_nothing(call, X, y, error, message):
    learner = model(n_components=50).fit(DIGITS[:500], LABELS[:500])
    before = learner.coef_.copy()
    with pytest.raises(error, match=message):
        getattr(learner, call)(X, y)
    np.testing.assert_array_equal(learner.coef_, before)
    assert learner.n_samples_seen_ == 500
    assert learner.classes_.tolist() == list(range(10))


@pytest.mark.parametrize("solver", ["gram", "recursive"])
def test_rows_never_seen_cannot_be_forgotten(solver):
    learner = model(n_components=50, solver=solver).fit(DIGITS[:100], LABELS[:100])
    before = learner.coef_.copy()
    threes = DIGITS[LABELS == 3]
    for X, y, message in [
        (threes, np.full(len(threes), 3), "cannot forget 183 rows"),
        (DIGITS[:1], [77], "cannot forget rows of 77"),
        (1e3 * DIGITS[:1], LABELS[:1], "never"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.forget(X, y)
    np.testing.assert_array_equal(learner.coef_, before)
    np.testing.assert_array_equal(learner.class_count_, np.bincount(LABELS[:100]))


@pytest.mark.parametrize("solver", ["gram", "recursive"])
def test_more_weight_than_came_cannot_be_forgotten(solver):
    learner = model(n_components=50, solver=solver).fit(DIGITS[:100], LABELS[:100])
    with pytest.raises(ValueError, match="weight"):
        learner.forget(DIGITS[:1], LABELS[:1], sample_weight=[1000.0])
    learner.forget(DIGITS[:1], LABELS[:1])
    assert learner.n_samples_seen_ == 99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma"), ({"gamma": -1.0}, "gamma"), ({"gamma": np.nan}, "gamma"), ({"gamma": "best"}, "gamma"),
        ({"n_components": 0}, "n_components"), ({"n_components": 1.5}, "n_components"), ({"buffer": "tanh"}, "buffer"),
        ({"solver": "qr"}, "solver"), ({"dtype": "float16"}, "dtype"), ({"init": "zeros"}, "init"),
        ({"buffer": "rbf", "kernel_width": 0}, "kernel_width"), ({"buffer": "rbf", "centers": [[1.0]]}, "centers"),
        ({"solver": "recursive", "gamma": "gcv"}, "needs solver='gram'"), ({"compensation": -1}, "compensation"),
        ({"compensation": 1.0, "buffer": None}, "compensation needs"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options).fit(DIGITS, LABELS)


def test_bad_weights_are_refused():
    for weight, message in [
        ([-1.0] * 20, "[Nn]egative"),
        ([0.0] * 20, "zero"),
        ([np.nan] * 20, "NaN"),
        ([1.0], "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(n_components=20).fit(GOOD_X, GOOD_Y, sample_weight=weight)


def test_classes_if_announced_are_kept_to():
    with pytest.raises(ValueError, match="9, which is not in classes"):
        model().partial_fit(DIGITS, LABELS, classes=np.arange(9))


def test_a_failed_first_chunk_leaves_an_unfitted_model():
    learner = model()
    with pytest.raises(ValueError, match="inconsistent"):
        learner.partial_fit(GOOD_X, GOOD_Y[:3])
    learner.partial_fit(GOOD_X[:, :7], GOOD_Y)
    assert learner.n_features_in_ == 7


def test_ctrl_c_waits_for_the_end_of_the_chunk():
    learner = model(n_components=1500).fit(DIGITS[:10], LABELS[:10])
    many = np.tile(DIGITS, (4, 1))
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    learnt = []

    def teach_until_stopped():
        while True:
            learner.partial_fit(many, np.tile(LABELS, 4))
            learnt.append(1)

    with pytest.raises(KeyboardInterrupt):
        teach_until_stopped()
    times, rest = divmod(learner.n_samples_seen_ - 10, len(many))
    assert rest == 0
    assert times in (len(learnt), len(learnt) + 1)
    assert learner.class_count_.sum() == learner.n_samples_seen_
    every = np.tile(np.arange(len(LABELS)), 4 * times)
    seen = np.concatenate([np.arange(10), every])
    assert gap(learner.coef_, joint_weights(DIGITS[seen], LABELS[seen], n_components=1500)) < 1e-9
