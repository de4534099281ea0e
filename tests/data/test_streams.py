"""Si-Blurry and class-incremental streams: exact counts, conservation of samples, determinism, bad input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.data.streams import SiBlurry, class_incremental


def balanced(n_classes: int, per_class: int) -> np.ndarray:
    return np.random.RandomState(7).permutation(np.repeat(np.arange(n_classes), per_class))


def home_task(stream: SiBlurry) -> dict:
    """Task that each kept class belongs to."""
    return {
        c: i
        for groups in (stream.disjoint_classes, stream.blurry_classes)
        for i, group in enumerate(groups)
        for c in group.tolist()
    }


def samples_away_from_home(stream: SiBlurry, labels: np.ndarray) -> list[int]:
    home = home_task(stream)
    return [i for t, task in enumerate(stream.tasks) for i in task.tolist() if home[labels[i]] != t]


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 12), min_size=1, max_size=80),
    n_tasks=st.integers(1, 7),
    disjoint=st.floats(0, 1),
    blurry=st.floats(0, 1),
    batch_size=st.none() | st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_sample_exactly_once(labels, n_tasks, disjoint, blurry, batch_size, seed):
    stream = SiBlurry(
        labels,
        n_tasks=n_tasks,
        disjoint=disjoint,
        blurry=blurry,
        batch_size=batch_size,
        random_state=seed,
    )
    assert sorted(np.concatenate(stream.tasks).tolist()) == list(range(len(labels)))
    assert len(stream.tasks) == len(stream.disjoint_classes) == len(stream.blurry_classes) == n_tasks
    classes = np.concatenate(stream.disjoint_classes + stream.blurry_classes)
    assert sorted(classes.tolist()) == sorted(set(labels))
    assert stream.dropped_classes.size == 0
    # batches are the tasks cut up in order, never across two tasks, never empty
    expected = [
        task[s : s + (batch_size or len(labels))].tolist()
        for task in stream.tasks
        for s in range(0, len(task), batch_size or len(labels))
    ]
    assert list(stream) == expected
    assert len(stream) == len(expected)


@settings(max_examples=200, deadline=None)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=80),
    n_tasks=st.integers(1, 7),
    disjoint=st.floats(0, 1),
    blurry=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_only_pooled_samples_of_blurry_classes_leave_their_task(labels, n_tasks, disjoint, blurry, seed):
    labels = np.array(labels)
    stream = SiBlurry(labels, n_tasks=n_tasks, disjoint=disjoint, blurry=blurry, random_state=seed)
    moved = set(samples_away_from_home(stream, labels))
    assert moved <= set(stream.blurred.tolist())
    blurry_classes = np.concatenate(stream.blurry_classes)
    assert np.isin(labels[stream.blurred], blurry_classes).all()
    assert len(stream.blurred) <= int(round(blurry * np.isin(labels, blurry_classes).sum(), 6))
    for i, classes in enumerate(stream.disjoint_classes):
        for c in classes:
            assert np.isin(np.flatnonzero(labels == c), stream.tasks[i]).all()


def test_sizes_follow_the_formula():
    labels = balanced(100, 20)
    stream = SiBlurry(labels, n_tasks=7, disjoint=0.5, blurry=0.1, random_state=3)
    assert len(np.concatenate(stream.disjoint_classes)) == 49  # floor(50 / 7) * 7
    assert len(np.concatenate(stream.blurry_classes)) == 51
    assert len(stream.blurred) <= 102  # nb = floor(0.1 * 51 * 20), less where a task runs short


def test_pool_is_exactly_floor_m_of_the_blurry_samples():
    """Where every task has nb blurry samples none can run short, so the count is exact."""
    labels = balanced(60, 50)
    full = 0
    for seed in range(30):
        stream = SiBlurry(labels, n_tasks=3, disjoint=0.5, blurry=0.013, random_state=seed)
        smallest = min(len(c) for c in stream.blurry_classes) * 50
        nb = 19  # floor(0.013 * 1500) = floor(19.5)
        if smallest >= nb:
            full += 1
            assert len(stream.blurred) == len(set(stream.blurred.tolist())) == nb
        assert 0 < len(samples_away_from_home(stream, labels)) <= nb
    assert full >= 20


def test_dealing_keeps_the_size_of_every_task():
    """Each task gets back as many samples as it gave, so only the mix changes."""
    labels = balanced(40, 50)
    for seed in range(10):
        calm, blurred = (SiBlurry(labels, n_tasks=4, disjoint=0.5, blurry=m, random_state=seed) for m in (0, 0.02))
        assert home_task(calm) == home_task(blurred)  # class cuts do not depend on m
        if min(len(c) for c in blurred.blurry_classes) * 50 >= 20:
            assert [len(t) for t in calm.tasks] == [len(t) for t in blurred.tasks]


def test_blurry_zero_never_splits_a_class():
    labels = balanced(17, 9)
    for seed in range(20):
        stream = SiBlurry(labels, n_tasks=5, disjoint=0.5, blurry=0, random_state=seed)
        assert stream.blurred.size == 0
        assert samples_away_from_home(stream, labels) == []


def test_disjoint_one_never_splits_a_class_whatever_the_blur():
    labels = balanced(20, 9)
    stream = SiBlurry(labels, n_tasks=5, disjoint=1.0, blurry=1.0, random_state=0)
    assert len(np.concatenate(stream.disjoint_classes)) == 20
    assert sum(map(len, stream.blurry_classes)) == 0
    assert samples_away_from_home(stream, labels) == []


def test_disjoint_zero_makes_all_classes_blurry():
    labels = balanced(20, 50)
    stream = SiBlurry(labels, n_tasks=5, disjoint=0, blurry=1.0, random_state=0)
    assert sum(map(len, stream.disjoint_classes)) == 0
    assert len(np.concatenate(stream.blurry_classes)) == 20
    n_tasks_of_class = sum(np.isin(np.arange(20), labels[task]).astype(int) for task in stream.tasks)
    assert np.mean(n_tasks_of_class > 1) > 0.5


@pytest.mark.parametrize(
    ("n_classes", "n_tasks", "disjoint", "D", "B"),
    [(23, 5, 0.5, 10, 10), (10, 3, 1.0, 9, 0), (10, 5, 0.4, 0, 10), (11, 4, 0.0, 0, 8), (100, 5, 0.29, 25, 75)],
)
def test_dropped_classes_as_the_official_code(n_classes, n_tasks, disjoint, D, B):
    labels = balanced(n_classes, 6)
    common = {"n_tasks": n_tasks, "disjoint": disjoint, "blurry": 0.3, "random_state": 1}
    official = SiBlurry(labels, keep_all_classes=False, **common)
    assert len(np.concatenate(official.disjoint_classes)) == D
    assert len(np.concatenate(official.blurry_classes)) == B
    assert len(official.dropped_classes) == n_classes - D - B
    streamed = np.concatenate(official.tasks)
    assert len(streamed) == (D + B) * 6
    assert not np.isin(labels[streamed], official.dropped_classes).any()

    whole = SiBlurry(labels, **common)
    assert len(np.concatenate(whole.disjoint_classes)) == D
    assert len(np.concatenate(whole.blurry_classes)) == n_classes - D
    assert len(np.concatenate(whole.tasks)) == n_classes * 6


def test_share_is_decimal_not_binary():
    """0.29 * 100 is 28.999999999999996; the official integer percentages give 29."""
    stream = SiBlurry(balanced(100, 1), n_tasks=1, disjoint=0.29, blurry=0)
    assert len(np.concatenate(stream.disjoint_classes)) == 29


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("keep_all_classes", [True, False])
def test_same_as_step_by_step_loops(seed, keep_all_classes):
    """The card's four steps by plain loops over samples with sets, on the same draws."""
    labels = balanced(13, 8).tolist()
    T, n, m = 4, 0.5, 0.4
    stream = SiBlurry(labels, n_tasks=T, disjoint=n, blurry=m, keep_all_classes=keep_all_classes, random_state=seed)

    rng = np.random.RandomState(seed)
    C, D = 13, 4
    B = 9 if keep_all_classes else 8
    order = rng.permutation(C).tolist()
    owner = {}  # class -> (task, is blurry)
    for first, count, is_blurry in ((0, D, False), (D, B, True)):
        edges = sorted(rng.randint(count, size=T - 1, dtype=np.int64).tolist())
        for place in range(count):
            owner[order[first + place]] = (sum(edge <= place for edge in edges), is_blurry)
    samples = rng.permutation(len(labels)).tolist()
    fixed = [[] for _ in range(T)]
    free = [[] for _ in range(T)]
    for i in samples:
        if labels[i] in owner:
            task, is_blurry = owner[labels[i]]
            (free if is_blurry else fixed)[task].append(i)
    nb = 28 if keep_all_classes else 25  # floor(0.4 * 72), floor(0.4 * 64)
    edges = [0, *sorted(rng.randint(nb, size=T - 1, dtype=np.int64).tolist()), nb]
    given = []
    for t in range(T):
        for _ in range(edges[t + 1] - edges[t]):
            if free[t]:
                given.append(free[t].pop(0))
    given = [given[i] for i in rng.permutation(len(given))]
    expected = []
    for t in range(T):
        mine = fixed[t] + free[t]
        for _ in range(edges[t + 1] - edges[t]):
            if given:
                mine.append(given.pop(0))
        expected.append([mine[i] for i in rng.permutation(len(mine))])

    assert [task.tolist() for task in stream.tasks] == expected


def test_pool_is_random_even_if_the_data_set_is_sorted_by_class():
    labels = np.repeat(np.arange(10), 100)
    stream = SiBlurry(labels, n_tasks=1, disjoint=0, blurry=0.1, random_state=0)
    assert len(stream.blurred) == 100
    assert len(np.unique(labels[stream.blurred])) == 10  # the official code would take class 0 only


def test_class_cuts_are_stochastic_and_may_leave_a_task_without_classes():
    sizes = [
        tuple(map(len, SiBlurry(balanced(10, 2), n_tasks=5, disjoint=1, random_state=s).disjoint_classes))
        for s in range(60)
    ]
    assert len(set(sizes)) > 20
    assert any(0 in size for size in sizes)
    assert all(size[-1] >= 1 for size in sizes)  # cuts lie in [0, D): never behind the last class


def test_same_seed_same_stream_and_other_seed_other_stream():
    labels = balanced(20, 10)
    make = lambda seed: np.concatenate(SiBlurry(labels, random_state=seed).tasks).tolist()  # noqa: E731
    assert make(5) == make(5) == make(np.int64(5)) == make(np.random.RandomState(5))
    assert make(np.random.default_rng(5)) == make(np.random.default_rng(5))
    assert len({tuple(make(seed)) for seed in range(20)}) == 20
    assert make(None) != make(None)
    stream = SiBlurry(labels, batch_size=7)
    assert list(stream) == list(stream)  # a second epoch is the same stream


def test_stream_is_pinned():
    """RandomState's streams are promised for ever: if this changes, recorded results lose their seed."""
    stream = SiBlurry(np.arange(24) % 6, n_tasks=3, disjoint=0.5, blurry=0.5, random_state=0)
    assert [task.tolist() for task in stream.tasks] == [
        [17, 23, 11, 5],
        [21, 12, 2, 3, 9, 0, 18, 20, 16, 6, 8, 14],
        [15, 10, 19, 1, 22, 7, 13, 4],
    ]


def test_shared_generator_moves_on():
    rng = np.random.RandomState(0)
    labels = balanced(10, 10)
    assert not np.array_equal(
        np.concatenate(SiBlurry(labels, random_state=rng).tasks),
        np.concatenate(SiBlurry(labels, random_state=rng).tasks),
    )


def test_string_labels_give_the_stream_of_their_ranks():
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
    y = balanced(6, 5)
    by_rank = SiBlurry(y, n_tasks=2)
    for labels in (names[y], names[y].tolist(), names[y].astype(object)):
        by_name = SiBlurry(labels, n_tasks=2)
        assert all(map(np.array_equal, by_name.tasks, by_rank.tasks))
        assert all(map(np.array_equal, by_name.blurry_classes, [names[c] for c in by_rank.blurry_classes]))
    assert by_name.classes.tolist() == names.tolist()


def test_torch_dataloader_takes_it_as_batch_sampler():
    torch = pytest.importorskip("torch")
    labels = balanced(10, 13)
    X = torch.arange(130)
    stream = SiBlurry(labels, n_tasks=4, batch_size=8, random_state=2)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, torch.as_tensor(labels)), batch_sampler=stream
    )
    batches = list(loader)
    assert len(loader) == len(batches) == len(stream)
    assert torch.cat([x for x, _ in batches]).tolist() == np.concatenate(stream.tasks).tolist()
    assert all((labels[x.numpy()] == y.numpy()).all() for x, y in batches)
    task_of = np.empty(130, dtype=int)
    for t, task in enumerate(stream.tasks):
        task_of[task] = t
    assert all(len(set(task_of[x.numpy()])) == 1 for x, _ in batches)
    # labels given as a tensor make the same stream
    same = SiBlurry(torch.as_tensor(labels), n_tasks=4, batch_size=8, random_state=2)
    assert list(same) == list(stream)


def test_import_needs_no_torch():
    code = "import sys, shoestring.data.streams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_class_incremental_partitions_classes_and_samples(labels, shuffle, seed, data):
    C = len(set(labels))
    n_tasks = data.draw(st.integers(1, C))
    first = data.draw(st.none() | st.integers(1, C - n_tasks + 1)) if n_tasks > 1 else None
    tasks = class_incremental(labels, n_tasks=n_tasks, first=first, shuffle_classes=shuffle, random_state=seed)
    assert sorted(np.concatenate(tasks).tolist()) == list(range(len(labels)))
    classes = [set(np.array(labels)[task].tolist()) for task in tasks]
    assert sum(map(len, classes)) == C == len(set.union(*classes))  # no class in two tasks
    sizes = [len(c) for c in classes]
    if first is not None:
        assert sizes.pop(0) == first
    assert max(sizes) - min(sizes) <= 1
    if not shuffle:
        assert [c for task in classes for c in sorted(task)] == sorted(set(labels))


def test_class_incremental_b50():
    labels = balanced(100, 3)
    tasks = class_incremental(labels, n_tasks=26, first=50)
    assert [len(np.unique(labels[task])) for task in tasks] == [50] + [2] * 25


def test_class_incremental_seeds():
    labels = balanced(10, 10)
    make = lambda seed: [t.tolist() for t in class_incremental(labels, n_tasks=5, random_state=seed)]  # noqa: E731
    assert make(1) == make(1)
    first_classes = {tuple(np.unique(labels[make(seed)[0]])) for seed in range(10)}
    assert len(first_classes) > 5  # the order of classes is random
    fixed = [class_incremental(labels, n_tasks=5, shuffle_classes=False, random_state=seed)[0] for seed in range(10)]
    assert len({tuple(task.tolist()) for task in fixed}) == 10  # and that of the samples inside a task
    assert len({tuple(sorted(task.tolist())) for task in fixed}) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": []}, ValueError, "labels must not be empty"),
        ({"labels": [[0, 1], [1, 0]]}, ValueError, r"labels must have one dimension, got shape \(2, 2\)"),
        ({"labels": [0.5, 1.0]}, TypeError, "all int or all str, got float"),
        ({"labels": np.array([0.0, np.nan])}, TypeError, "all int or all str, got float"),
        ({"labels": [0, "a"]}, TypeError, "all int or all str, got int, str"),
        ({"labels": ["a", None]}, TypeError, "all int or all str, got NoneType, str"),
        ({"n_tasks": 0}, ValueError, "n_tasks must be >= 1, got 0"),
        ({"n_tasks": 2.0}, TypeError, "n_tasks must be an int, got 2.0"),
        ({"disjoint": 50}, ValueError, "disjoint must be a fraction .* got 50; for 50 % write 0.5"),
        ({"blurry": 10}, ValueError, "blurry must be a fraction .* got 10; for 10 % write 0.1"),
        ({"blurry": -0.1}, ValueError, "blurry must be a fraction .* got -0.1$"),
        ({"disjoint": float("nan")}, ValueError, "disjoint must be a fraction .* got nan$"),
        ({"disjoint": "half"}, TypeError, "disjoint must be a number .* got 'half'"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"batch_size": "8"}, TypeError, "batch_size must be an int, got '8'"),
        ({"random_state": -1}, ValueError, "random_state must be in .* got -1"),
        ({"random_state": "0"}, TypeError, "random_state must be an int, .* got '0'"),
        ({"keep_all_classes": False, "n_tasks": 5}, ValueError, "at least n_tasks=5 classes in labels, got 4"),
    ],
)
def test_si_blurry_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        SiBlurry(**{"labels": [0, 1, 2, 3] * 3, "n_tasks": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": []}, ValueError, "labels must not be empty"),
        ({"labels": [1.5]}, TypeError, "got float"),
        ({"n_tasks": 5}, ValueError, r"n_tasks must be at most the number of classes in labels \(4\), got 5"),
        ({"n_tasks": 0}, ValueError, "n_tasks must be >= 1, got 0"),
        ({"first": 0}, ValueError, "first must be >= 1, got 0"),
        ({"first": 4}, ValueError, "first must be <= 3 with 4 classes and n_tasks=2, got 4"),
        ({"first": 3, "n_tasks": 1}, ValueError, "first must be = 4 with 4 classes and n_tasks=1, got 3"),
        ({"random_state": 1.5}, TypeError, "random_state must be an int"),
    ],
)
def test_class_incremental_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        class_incremental(**{"labels": [0, 1, 2, 3] * 3, "n_tasks": 2, **arguments})
