"""Streams of tasks for continual learning: which samples arrive when, as arrays of indices.

``class_incremental`` is the classic split: every class belongs to exactly one task.
``SiBlurry`` is the Stochastic incremental Blurry scenario: classes appear, vanish and come back.

    Jun-Yeong Moon, Keon-Hee Park, Jung Uk Kim, Gyeong-Moon Park. "Online Class Incremental Learning on
    Stochastic Blurry Task Boundary via Mask and Visual Prompt Tuning". ICCV 2023, arXiv 2308.09303.

Si-Blurry in the paper's letters: T tasks, n the share of disjoint classes, m the share of blurry samples;
C is the number of classes.

1. Sizes. D = floor(floor(C n) / T) T classes are disjoint; the other B = C - D are blurry.
2. Class cuts. In a random order of the classes, the first D are disjoint and the next B blurry. Each of the
   two lists is cut at T - 1 sorted uniform integers from [0, D), or [0, B), into T parts, one a task; a part
   may be empty. A sample belongs to the task of its class.
3. Blurring. nb = floor(m x samples of blurry classes). T - 1 sorted uniform integers from [0, nb) cut nb into
   k_1 .. k_T. Task i gives k_i of its blurry samples (all, if it has fewer) to a pool; the pool is shuffled
   and dealt out again, k_i samples to task i (the last tasks get less if the pool came out short).
4. Order. The samples of each task are shuffled; one pass.

The official code (github.com/moonjunyyy/Si-Blurry, the branch with random cuts) differs in two ways:

- It rounds B down to a multiple of T as well and silently drops the C - D - B classes left over, samples and
  all. ``keep_all_classes=False`` does the same and names them in ``dropped_classes``; the default keeps them
  as blurry classes.
- It gives to the pool the k_i samples that stand first in the data set, which in a folder of images sorted by
  class are all of one class. Here they are drawn at random: no difference for a data set in random order.

D is rounded down as published: 10 classes and T = 5 allow n = 0, 0.5 and 1, and n = 0.4 gives D = 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SiBlurry", "class_incremental"]

RandomStateLike = int | np.random.Generator | np.random.RandomState | None


class SiBlurry:
    """Si-Blurry stream: some classes live in one task only, the others' samples are blurred over all tasks.

    The four steps stand in the module's docstring. Iterating yields batches of indices in stream order, none
    of which mixes two tasks, so that an instance is a ``batch_sampler`` for ``torch.utils.data.DataLoader``.
    Every pass gives the same stream.

    Parameters
    ----------
    labels : array-like of int or str, shape (N,)
        The label of every sample; only their equality matters.
    n_tasks : int, default 5
        T, the number of tasks.
    disjoint : float in [0, 1], default 0.5
        n, the share of classes that appear in one task only.
    blurry : float in [0, 1], default 0.1
        m, the share of the other classes' samples that are dealt out over all tasks.
    batch_size : int or None, default None
        Samples per batch; the last batch of a task may be smaller. None: one batch a task.
    keep_all_classes : bool, default True
        False drops the classes that the official code drops.
    random_state : int, numpy Generator, RandomState or None, default 0
        An int gives the same stream on every platform and with every version of NumPy.

    Attributes
    ----------
    tasks : list of T int arrays
        Indices of each task's samples, in stream order; together each kept sample exactly once.
    classes : array, shape (C,)
        The distinct labels, sorted.
    disjoint_classes, blurry_classes : list of T arrays
        Labels that belong to each task; a blurry class may have samples in other tasks too.
    dropped_classes : array
        Labels that do not appear in the stream; empty when ``keep_all_classes``.
    blurred : int array
        Indices of the samples that went through the pool.

    Raises
    ------
    ValueError
        ``labels`` empty or not one-dimensional, a share outside [0, 1], ``n_tasks`` or ``batch_size`` < 1, or
        fewer classes than tasks with ``keep_all_classes=False`` (all would be dropped).
    TypeError
        ``labels`` neither all int nor all str, or another argument of the wrong type.

    Examples
    --------
    >>> labels = ["ant", "bee", "cat", "dog"] * 5
    >>> stream = SiBlurry(labels, n_tasks=2, disjoint=0.5, blurry=0.2, batch_size=4, random_state=0)
    >>> [c.tolist() for c in stream.disjoint_classes], [c.tolist() for c in stream.blurry_classes]
    ([['cat'], ['dog']], [['bee'], ['ant']])
    >>> [len(task) for task in stream.tasks], len(stream)
    ([10, 10], 6)
    >>> list(stream)[:3]
    [[17, 14, 9, 10], [1, 5, 13, 2], [6, 18]]
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        n_tasks: int = 5,
        disjoint: float = 0.5,
        blurry: float = 0.1,
        batch_size: int | None = None,
        keep_all_classes: bool = True,
        random_state: RandomStateLike = 0,
    ) -> None:
        classes, y = _encode(labels)
        T = _count("n_tasks", n_tasks)
        n, m = _share("disjoint", disjoint), _share("blurry", blurry)
        self.batch_size = None if batch_size is None else _count("batch_size", batch_size)
        self.n_tasks = T
        self.classes = classes
        rng = _random_state(random_state)

        C = len(classes)
        D = _floor(C * n) // T * T
        B = C - D if keep_all_classes else (C - D) // T * T
        if D + B == 0:
            raise ValueError(f"keep_all_classes=False needs at least n_tasks={T} classes in labels, got {C}")

        order = rng.permutation(C)
        disjoint_classes = np.split(order[:D], _cuts(D, T, rng))
        blurry_classes = np.split(order[D : D + B], _cuts(B, T, rng))

        samples = rng.permutation(len(y))
        disjoint_samples = [samples[np.isin(y[samples], c)] for c in disjoint_classes]
        blurry_samples = [samples[np.isin(y[samples], c)] for c in blurry_classes]

        nb = _floor(m * sum(map(len, blurry_samples)))
        cuts = _cuts(nb, T, rng)
        k = np.diff(cuts, prepend=0, append=nb)
        pool = rng.permutation(np.concatenate([s[:k_i] for s, k_i in zip(blurry_samples, k, strict=True)]))
        dealt = np.split(pool, cuts)  # a short pool leaves less for the last tasks
        parts = zip(disjoint_samples, blurry_samples, k, dealt, strict=True)
        self.tasks: list[NDArray[np.intp]] = [
            rng.permutation(np.concatenate([d, b[k_i:], p])).astype(np.intp) for d, b, k_i, p in parts
        ]

        self.blurred: NDArray[np.intp] = pool.astype(np.intp)
        self.disjoint_classes = [classes[c] for c in disjoint_classes]
        self.blurry_classes = [classes[c] for c in blurry_classes]
        self.dropped_classes = classes[np.sort(order[D + B :])]

    def __iter__(self) -> Iterator[list[int]]:
        for task in self.tasks:
            size = self.batch_size or max(len(task), 1)
            for start in range(0, len(task), size):  # a task without samples has no batch
                yield task[start : start + size].tolist()

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(-(-len(task) // (self.batch_size or max(len(task), 1))) for task in self.tasks)


def class_incremental(
    labels: ArrayLike,
    *,
    n_tasks: int,
    first: int | None = None,
    shuffle_classes: bool = True,
    random_state: RandomStateLike = 0,
) -> list[NDArray[np.intp]]:
    """Classic class-incremental split: each task brings new classes, no class comes back.

    Parameters
    ----------
    labels : array-like of int or str, shape (N,)
        The label of every sample.
    n_tasks : int
        Number of tasks, the first one included: "B50, 25 phases" of CIFAR-100 is ``n_tasks=26, first=50``.
    first : int or None, default None
        Number of classes in the first task; the others share the rest. None: all tasks share alike. Where
        classes do not divide evenly, the earlier tasks get one more.
    shuffle_classes : bool, default True
        Random order of classes; False takes them in sorted order.
    random_state : int, numpy Generator, RandomState or None, default 0
        Decides the order of the classes and of the samples inside each task.

    Returns
    -------
    list of ``n_tasks`` int arrays
        Indices of each task's samples in random order; together each sample exactly once.

    Raises
    ------
    ValueError
        ``labels`` empty or not one-dimensional, or a task would be left without a class.
    TypeError
        ``labels`` neither all int nor all str, or another argument of the wrong type.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    >>> tasks = class_incremental(labels, n_tasks=3, first=2, shuffle_classes=False)
    >>> [np.unique(labels[task]).tolist() for task in tasks]
    [[0, 1], [2], [3]]
    """
    classes, y = _encode(labels)
    C, T = len(classes), _count("n_tasks", n_tasks)
    if T > C:
        raise ValueError(f"n_tasks must be at most the number of classes in labels ({C}), got {T}")
    if first is not None:
        first = _count("first", first)
        if first > C - (T - 1) or (T == 1 and first != C):
            expected = f"= {C}" if T == 1 else f"<= {C - (T - 1)}"
            raise ValueError(f"first must be {expected} with {C} classes and n_tasks={T}, got {first}")
    rng = _random_state(random_state)

    order = rng.permutation(C) if shuffle_classes else np.arange(C)
    if first is None or T == 1:
        groups = np.array_split(order, T)
    else:
        groups = [order[:first], *np.array_split(order[first:], T - 1)]
    samples = rng.permutation(len(y))
    return [samples[np.isin(y[samples], group)].astype(np.intp) for group in groups]


def _cuts(size: int, n_parts: int, rng: np.random.RandomState) -> NDArray[np.int64]:
    """Sorted places to cut ``size`` things into ``n_parts``; never at the end, so the last part gets one."""
    if size == 0:
        return np.zeros(n_parts - 1, dtype=np.int64)
    return np.sort(rng.randint(size, size=n_parts - 1, dtype=np.int64))  # default dtype differs by platform


def _floor(x: float) -> int:
    """Floor of a product with a decimal share: 0.29 x 100 is 29 although it is 28.999... in binary."""
    return int(round(x, 6))


def _encode(labels: Any) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Sorted distinct labels, (C,), and the place of each sample's label among them, (N,)."""
    array = np.asarray(labels, dtype=None if hasattr(labels, "dtype") else object)
    if array.ndim != 1:
        raise ValueError(f"labels must have one dimension, got shape {array.shape}")
    if len(array) == 0:
        raise ValueError("labels must not be empty")
    if array.dtype.kind == "O":  # NumPy would turn a list of ints and strings into strings without a word
        for kind in (Integral, str):
            if all(isinstance(label, kind) for label in array):
                array = np.array(array.tolist())
                break
    if array.dtype.kind not in "biuUST":
        found = sorted({type(label).__name__ for label in array.tolist()})
        raise TypeError(f"labels must be all int or all str, got {', '.join(found)}")
    classes, y = np.unique(array, return_inverse=True)
    return classes, y


def _count(name: str, value: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def _share(name: str, value: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        hint = f"; for {value} % write {value / 100}" if 1 < value <= 100 else ""
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value}{hint}")
    return float(value)


def _random_state(random_state: RandomStateLike) -> np.random.RandomState:
    """Legacy generator on purpose: NumPy promises that its streams never change; ``default_rng``'s may."""
    if isinstance(random_state, np.random.RandomState):
        return random_state
    if isinstance(random_state, np.random.Generator):
        return np.random.RandomState(random_state.integers(2**32, dtype=np.uint64))
    if random_state is None:
        return np.random.RandomState()
    if not isinstance(random_state, Integral) or isinstance(random_state, bool):
        raise TypeError(f"random_state must be an int, Generator, RandomState or None, got {random_state!r}")
    if not 0 <= random_state < 2**32:
        raise ValueError(f"random_state must be in [0, 2**32), got {random_state}")
    return np.random.RandomState(int(random_state))
