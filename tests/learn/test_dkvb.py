"""Discrete key-value bottleneck: what it looks up, what it moves, what it leaves alone to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from shoestring.learn import dkvb
from shoestring.learn.dkvb import (
    DiscreteKeyValueBottleneck,
    DKVBClassifier,
    nearest_keys,
    smoothed_gradient,
    update_keys,
)

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS / 16.0
SMALL = {"num_codebooks": 16, "num_pairs": 32, "key_dim": 6}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(**options):
    made = DiscreteKeyValueBottleneck(20, 4, **{**SMALL, "dtype": torch.float64, **options})
    return made.init_keys(draw(300, 20), 3)


@parametrize_with_checks([DKVBClassifier(num_codebooks=16, num_pairs=32, key_dim=8, key_epochs=3)])
def test_scikit_learn_conformance(estimator, check):
    check(estimator)


# ---- lookup


@pytest.mark.parametrize("block", [1, 1000, 1 << 24])
@pytest.mark.parametrize("top_k", [1, 3])
def test_blocks_find_what_brute_force_finds(block, top_k, monkeypatch):
    monkeypatch.setattr(dkvb, "BLOCK", block)
    h, keys = draw(50, 5, 3), draw(5, 40, 3, seed=1)
    distance = torch.cdist(h.transpose(0, 1), keys)  # (C, B, J)
    assert torch.equal(nearest_keys(h, keys, top_k=top_k), distance.argsort(2)[:, :, :top_k].transpose(0, 1))
    usable = draw(5, 40, seed=2) > 0
    distance[~usable[:, None].expand_as(distance)] = torch.inf
    assert torch.equal(nearest_keys(h, keys, usable, top_k), distance.argsort(2)[:, :, :top_k].transpose(0, 1))


def test_one_codebook_with_the_training_rows_for_keys_is_the_nearest_neighbour():
    half = len(LABELS) // 2
    model = DiscreteKeyValueBottleneck(64, 10, num_codebooks=1, num_pairs=half, projection="chunk", dtype=torch.float64)
    model.keys.copy_(torch.from_numpy(DIGITS[:half])[None])
    model.values.data.copy_(nn.functional.one_hot(torch.from_numpy(LABELS[:half]), 10)[None])
    model.usage.fill_(1)
    answers = model.eval()(torch.from_numpy(DIGITS[half:])).argmax(1)
    nearest = KNeighborsClassifier(1).fit(DIGITS[:half], LABELS[:half])
    assert np.array_equal(answers.numpy(), nearest.predict(DIGITS[half:]))


def test_logits_are_the_mean_of_the_values_found():
    model = layer(top_k=2)
    model.values.data.copy_(draw(*model.values.shape, seed=3))
    z = draw(9, 20, seed=4)
    h = torch.einsum("bd,cdk->bck", z, model.projections)
    near = torch.cdist(h.transpose(0, 1), model.keys).argsort(2)[:, :, :2]  # (C, B, 2)
    expected = torch.stack(
        [torch.stack([model.values[c, near[c, b]] for c in range(16)]).mean((0, 1)) for b in range(9)]
    )
    torch.testing.assert_close(model(z), expected, rtol=0, atol=1e-14)


def test_projections_have_columns_of_length_one():
    torch.testing.assert_close(layer().projections.norm(dim=1), torch.ones(16, 6, dtype=torch.float64))


def test_zero_values_know_nothing():
    model = layer()
    logits = model(draw(7, 20))
    assert (logits == 0).all()
    loss = nn.functional.cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(4))


def test_answers_are_constant_within_a_cell_and_pass_no_gradient_back():
    model = layer().train()
    model.values.data.copy_(draw(*model.values.shape, seed=3))
    z = draw(30, 20, seed=4).requires_grad_()
    logits = model(z)
    assert torch.equal(model(z + 1e-9 * draw(30, 20, seed=5)), logits)
    logits.sum().backward()
    assert z.grad is None


def test_order_of_pairs_and_codebooks_and_common_scale_do_not_matter():
    model = layer()
    model.values.data.copy_(draw(*model.values.shape, seed=3))
    model.usage.copy_(draw(16, 32, seed=6) > 0)
    z = draw(30, 20, seed=4)
    expected = model.eval()(z)
    pairs, books = torch.randperm(32), torch.randperm(16)
    for name in ("keys", "usage"):
        getattr(model, name).copy_(getattr(model, name)[:, pairs][books])
    model.values.data.copy_(model.values[:, pairs][books])
    model.projections.copy_(model.projections[books])
    torch.testing.assert_close(model(z), expected, rtol=0, atol=1e-14)
    model.keys.mul_(8)
    torch.testing.assert_close(model(8 * z), expected, rtol=0, atol=1e-14)


# ---- keys


def test_without_memory_a_batch_is_one_step_of_k_means():
    h, keys = draw(200, 3, 2), draw(3, 8, 2, seed=1)
    expected = keys.clone()
    for c in range(3):
        start = keys[c].numpy()
        one = KMeans(8, init=start, n_init=1, max_iter=1, algorithm="lloyd").fit(h[:, c].numpy())
        labels = torch.from_numpy(np.argmin(((h[:, c, None].numpy() - start) ** 2).sum(2), 1))
        for j in labels.unique():
            expected[c, j] = h[labels == j, c].mean(0)
        assert one.n_iter_ == 1
    n, s = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8, 2, dtype=torch.float64)
    update_keys(h, keys, n, s, decay=0.0, threshold=0.0)
    hit = n > 0
    assert hit.sum() > 18
    torch.testing.assert_close(keys[hit], expected[hit], rtol=1e-5, atol=1e-6)  # but for the eps of ntilde
    assert n.sum(1).tolist() == [200, 200, 200]


def test_running_means_are_the_equations():
    """Two batches, written out for one codebook."""
    a, b, keys = draw(30, 1, 2), draw(30, 1, 2, seed=1), draw(1, 4, 2, seed=2)
    n, s, k = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64), keys[0].clone()
    for h in (a[:, 0], b[:, 0]):
        i = torch.cdist(h, k).argmin(1)
        for j in range(4):
            n[j] = 0.95 * n[j] + 0.05 * (i == j).double().sum()
            s[j] = 0.95 * s[j] + 0.05 * h[i == j].sum(0)
        smooth = (n + 1e-5) / (n.sum() + 4e-5) * n.sum()
        k = s / smooth[:, None]
    counts, sums = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, 2, dtype=torch.float64)
    for h in (a, b):
        update_keys(h, keys, counts, sums, 0.95, 0.0)
    torch.testing.assert_close(keys[0], k, rtol=0, atol=1e-13)
    torch.testing.assert_close(counts[0], n, rtol=0, atol=1e-13)


def test_dead_keys_become_rows_of_the_batch_and_stay():
    h, keys = draw(64, 2, 3), draw(2, 16, 3, seed=1)
    keys[:, 5:] += 100.0  # far from everything
    n, s = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    update_keys(h, keys, n, s, 0.95, 0.4, generator)
    for c in range(2):
        rows = {tuple(row) for row in h[:, c].tolist()}
        assert all(tuple(key) in rows for key in keys[c, 5:].tolist())
    torch.testing.assert_close(n[:, 5:], torch.full((2, 11), 0.4, dtype=torch.float64))
    torch.testing.assert_close(s[:, 5:], 0.4 * keys[:, 5:])
    placed = keys[:, 5:].clone()
    update_keys(keys[None, :, 0], keys, n, s, 0.95, 0.0)  # a batch elsewhere: the next running mean does not undo it
    moved = (keys[:, 5:] - placed).norm(dim=2)
    assert (moved < 1e-3).all()


def test_keys_cover_the_data_and_follow_the_generator():
    z = draw(500, 20)
    one, two = (DiscreteKeyValueBottleneck(20, 4, **SMALL, dtype=torch.float64).init_keys(z) for _ in range(2))
    assert torch.equal(one.keys, two.keys)
    other = DiscreteKeyValueBottleneck(20, 4, **SMALL, dtype=torch.float64)
    other.init_keys(z, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(one.keys, other.keys)
    used = [one.lookup(z)[:, c].unique().numel() for c in range(16)]
    assert min(used) >= 28  # of 32
    batches = DiscreteKeyValueBottleneck(20, 4, **SMALL, dtype=torch.float64).init_keys(list(z.split(100)), 2)
    assert torch.isfinite(batches.keys).all()


# ---- learning


def test_a_step_moves_hit_values_only_and_leaves_other_answers_bit_for_bit():
    model = layer(num_pairs=256).train()
    model.values.data.copy_(draw(*model.values.shape, seed=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    here, there = draw(4, 20, seed=4), draw(200, 20, seed=5)
    before, answers = model.values.detach().clone(), model(there).detach()
    found = model.lookup(here)[:, :, 0]
    nn.functional.cross_entropy(model(here), torch.tensor([0, 1, 2, 3]), label_smoothing=0.1).backward()
    optimizer.step()
    hit = torch.zeros(16, 256, dtype=torch.bool)
    hit[torch.arange(16), found] = True
    assert torch.equal(model.values[~hit], before[~hit])
    assert (model.values[hit] != before[hit]).any(1).all()
    untouched = ~hit[torch.arange(16), model.lookup(there)[:, :, 0]].any(1)
    assert untouched.any()
    assert torch.equal(model(there)[untouched], answers[untouched])
    model(here).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):  # Adam would move what was not hit
        torch.optim.Adam(model.parameters()).step()


def test_the_classifier_takes_the_steps_of_torch():
    """Autograd's gradient times C, clipped, by SGD: the same values."""
    options = {"epochs": 3, "batch_size": 100, "key_epochs": 2, "clip": 0.5, **SMALL}
    model = DKVBClassifier(**options).fit_keys(DIGITS)
    generator = torch.Generator()
    generator.set_state(model._generator.get_state())
    model.partial_fit(DIGITS[:250], LABELS[:250])
    net = DiscreteKeyValueBottleneck(64, 10, **SMALL).train()
    net.load_state_dict({**model.bottleneck_.state_dict(), "values": torch.zeros(16, 32, 10)})
    X, y = torch.tensor(DIGITS[:250], dtype=torch.float32), torch.from_numpy(LABELS[:250])
    for _ in range(3):
        for rows in torch.randperm(250, generator=generator).split(100):
            net.zero_grad()
            nn.functional.cross_entropy(net(X[rows]), y[rows], label_smoothing=0.1).backward()
            gradient = net.values.grad.to_dense() * 16
            net.values.data -= 0.3 * gradient * min(1.0, 0.5 / float(gradient.norm()))
    torch.testing.assert_close(model.bottleneck_.values.data, net.values.data, rtol=1e-4, atol=1e-6)


def test_smoothed_gradient_is_that_of_autograd():
    logits = draw(8, 5).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    nn.functional.cross_entropy(logits, y, label_smoothing=0.1).backward()
    torch.testing.assert_close(smoothed_gradient(logits.detach(), y, 0.1), logits.grad, rtol=0, atol=1e-15)


def test_a_first_small_step_counts_labels():
    """At zero, V_{c,j} becomes proportional to count_{j,y} - n_j / K."""
    model = DKVBClassifier(**SMALL, epochs=1, batch_size=10_000, lr=1e-3, label_smoothing=0.0, clip=1e9)
    model.fit_keys(DIGITS).partial_fit(DIGITS, LABELS)
    found = model.bottleneck_.train().lookup(torch.tensor(DIGITS, dtype=torch.float32))[:, :, 0].numpy()
    counts = np.zeros((16, 32, 10))
    for c in range(16):
        np.add.at(counts[c], (found[:, c], LABELS), 1)
    expected = 1e-3 / len(LABELS) * (counts - counts.sum(2, keepdims=True) / 10)
    np.testing.assert_allclose(model.bottleneck_.values.numpy(), expected, rtol=1e-4, atol=1e-9)


def test_tasks_that_share_no_key_commute():
    far = DIGITS + 10.0
    both = np.concatenate([DIGITS[:300], far[:300]])
    options = {**SMALL, "num_pairs": 64, "batch_size": 300, "epochs": 5}
    ends = []
    for order in ((0, 1), (1, 0)):
        model = DKVBClassifier(**options).fit_keys(both)
        tasks = ((DIGITS[:300], LABELS[:300]), (far[:300], LABELS[:300]))
        hits = [set(zip(*np.nonzero(_hit(model, X)), strict=True)) for X, _ in tasks]
        assert not hits[0] & hits[1]
        for i in order:
            model.partial_fit(*tasks[i])
        ends.append(model.bottleneck_.values)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)  # batches are whole tasks: only their rows' order differs


def _hit(model, X):
    layer = model.bottleneck_
    found = nearest_keys(layer.heads(torch.tensor(X, dtype=torch.float32)), layer.keys)[:, :, 0].numpy()
    hit = np.zeros((found.shape[1], layer.keys.shape[1]), dtype=bool)
    hit[np.arange(found.shape[1]), found] = True
    return hit


def test_classes_in_sequence_are_kept():
    """The point of it: five tasks of two digits; a linear probe ends at the last two."""
    half = np.arange(len(LABELS)) % 2 == 0
    model = DKVBClassifier(num_codebooks=32, num_pairs=128, key_dim=8).fit_keys(DIGITS[half])
    for task in range(5):
        rows = half & (LABELS // 2 == task)
        model.partial_fit(DIGITS[rows], LABELS[rows])
    assert model.score(DIGITS[~half], LABELS[~half]) > 0.9


def test_labels_may_be_strings_in_any_order_of_arrival():
    names = np.array(list("jihgfedcba"))[LABELS]
    model = DKVBClassifier(**SMALL).fit_keys(DIGITS)
    for task in range(5):
        rows = LABELS // 2 == task
        model.partial_fit(DIGITS[rows], names[rows])
    assert model.classes_.tolist() == list("abcdefghij")
    numbers = DKVBClassifier(**SMALL).fit_keys(DIGITS)
    for task in range(5):
        rows = LABELS // 2 == task
        numbers.partial_fit(DIGITS[rows], 9 - LABELS[rows])
    assert np.array_equal(model.predict(DIGITS), np.array(list("abcdefghij"))[numbers.predict(DIGITS)])


def test_state_dict_round_trip_and_dtype():
    model = layer().train()
    model.values.data.copy_(draw(*model.values.shape, seed=3))
    z = draw(10, 20, seed=4)
    model(z)
    twin = DiscreteKeyValueBottleneck(20, 4, **SMALL, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(z), model.eval()(z))
    assert layer(dtype=torch.float32).float()(z.float()).dtype == torch.float32


def test_unused_pairs_are_not_found_when_predicting():
    model = layer()
    model.train()(draw(3, 20, seed=4))
    assert int(model.usage.sum()) == 3 * 16
    model.eval()
    found = model.lookup(draw(50, 20, seed=5))[:, :, 0]
    assert (model.usage[torch.arange(16), found] > 0).all()
    assert int(model.usage.sum()) == 3 * 16  # predicting is not counted


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks must be an int >= 1, got 0"),
        ({"num_pairs": 2.5}, "num_pairs must be an int >= 1, got 2.5"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"top_k": 33}, "top_k must be <= num_pairs = 32, got 33"),
        ({"projection": "learnt"}, "projection must be 'random' or 'chunk'"),
        ({"projection": "chunk"}, "in_features must be a multiple"),
        ({"threshold_factor": -1.0}, "threshold_factor must be >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiscreteKeyValueBottleneck(20, 4, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"lr": 0}, "lr must be > 0"),
        ({"clip": float("nan")}, "clip must be > 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ],
)
def test_bad_options_of_the_classifier(options, message):
    with pytest.raises(ValueError, match=message):
        DKVBClassifier(**SMALL, **options).fit(DIGITS[:50], LABELS[:50])


def test_bad_features():
    model = layer()
    with pytest.raises(ValueError, match=r"features must be \(B, 20\), got \(3, 5\)"):
        model(draw(3, 5))
    keys = model.keys.clone()
    with pytest.raises(ValueError, match="NaN"):
        model.init_keys(torch.full((9, 20), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="no rows"):
        model.init_keys([])
    assert torch.equal(model.keys, keys)


def test_bad_rows_leave_the_classifier_as_it_was():
    model = DKVBClassifier(**SMALL).fit(DIGITS, LABELS)
    before = model.decision_function(DIGITS)
    bad = DIGITS[:3].copy()
    bad[1, 1] = np.nan
    for X, y, error in (
        (bad, [0, 1, 2], ValueError),
        (DIGITS[:3, :5], [0, 1, 2], ValueError),
        (DIGITS[:0], [], ValueError),
        (DIGITS[:3], [0, 1], ValueError),
        (DIGITS[:3], ["a", "b", "c"], TypeError),
        (DIGITS[:3], [0.5, 1, 2], ValueError),
    ):
        with pytest.raises(error):
            model.partial_fit(X, y)
    assert np.array_equal(model.decision_function(DIGITS), before)
    with pytest.raises(ValueError, match="nothing is learnt yet"):
        DKVBClassifier(**SMALL).fit_keys(DIGITS).predict(DIGITS)
