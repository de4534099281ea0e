"""Distances between labels, and what they let a Fréchet mean reach (see `shoestring.classify.loki`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from scipy.optimize import linprog
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial.distance import cdist

__all__ = [
    "bundle_taxonomy",
    "check_distances",
    "check_power",
    "is_structure",
    "label_distances",
    "locus",
    "next_class",
    "observed_rows",
    "tree_labels",
    "tree_locus",
]

REACHED = 1e-7  # share of the largest coefficient that a linear programme's optimum may be off: HiGHS's own tolerance


# ---- distances


def label_distances(
    structure: Any,
    labels: Sequence[Hashable] | None = None,
    observed: Sequence[Hashable] | None = None,
    *,
    weight: str | None = None,
    dtype: DTypeLike = np.float64,
) -> np.ndarray:
    """Distances d between labels, from a tree, a graph or embeddings. Plain distances: they are squared later, once.

    Parameters
    ----------
    structure : tree, graph or embeddings
        - a tree as nested mappings, leaves in a list or as empty mappings: ``{"animal": ["cat", "dog"], "food": {}}``;
        - a tree as parent links, ``{child: parent}``, parent None at the top, or a flat list of integers, the parent
          of node i at place i, -1 at the top. What occurs as a parent only is a top. Several tops, in either form,
          hang from one unnamed root, which is no label;
        - a networkx graph: shortest paths; the directions of edges are ignored, since a distance is symmetric;
        - an array or tensor of shape (N, e): Euclidean distances between its rows.
    labels : sequence of N labels, optional
        Columns of the result. By default all nodes in the order of `tree_labels`; of embeddings, the row numbers (if
        given: the names of the rows).
    observed : sequence of K labels, optional
        Rows of the result; by default `labels`. No more than (K, nodes) is ever held.
    weight : str, optional
        Edge attribute of a networkx graph that holds the length, > 0; by default every edge has length 1.
    dtype : default=float64
        Type of the result. float32 halves the memory; a narrow integer type would overflow when squared.

    Returns
    -------
    ndarray of shape (K, N)

    Raises
    ------
    TypeError
        If the structure is none of these.
    ValueError
        If a label is not in it or occurs twice, the tree has a cycle, the graph does not connect the labels (their
        distance would be infinite), a length is not > 0, or embeddings are not finite.

    Examples
    --------
    >>> taxonomy = {"animal": ["cat", "dog"], "food": ["tea"]}
    >>> label_distances(taxonomy, labels=["cat", "dog", "tea", "food"], observed=["cat"])
    array([[0., 2., 4., 3.]])
    >>> label_distances([-1, 0, 1])  # a path of three nodes
    array([[0., 1., 2.],
           [1., 0., 1.],
           [2., 1., 0.]])
    """
    if _is_graph(structure):
        nodes = list(structure.nodes)
        columns, rows = _columns_and_rows(nodes, labels, observed)
        d = _graph_distances(structure, nodes, rows, weight)
        apart = ~np.isfinite(d[:, columns])
        if apart.any():
            k, n = np.argwhere(apart)[0]
            raise ValueError(
                f"structure must connect all labels: there is no path from {nodes[rows[k]]!r} to {nodes[columns[n]]!r}"
            )
        return d[:, columns].astype(dtype)
    embeddings = _embeddings(structure)
    if embeddings is not None:
        names = list(range(len(embeddings))) if labels is None else list(labels)
        if len(names) != len(embeddings):
            raise ValueError(f"labels must name the {len(embeddings)} rows of the embeddings, got {len(names)}")
        _, rows = _columns_and_rows(names, None, observed)
        return cdist(embeddings[rows], embeddings).astype(dtype)
    tree = _read_tree(structure)
    columns, rows = _columns_and_rows(tree.labels, labels, observed)
    d = _tree_distances(tree, rows, dtype)  # (nodes, K)
    return d[: len(columns)].T if labels is None else d[columns].T


def tree_labels(tree: Any, *, leaves_only: bool = False) -> list[Any]:
    """The labels of a tree, in the order in which `label_distances` numbers them.

    Parameters
    ----------
    tree : as in `label_distances`
    leaves_only : leave inner nodes out, where they are no labels ("phylogenetic tree")

    Examples
    --------
    >>> tree_labels({"animal": ["cat", "dog"], "food": ["tea"]})
    ['animal', 'cat', 'dog', 'food', 'tea']
    >>> tree_labels({"animal": ["cat", "dog"], "food": ["tea"]}, leaves_only=True)
    ['cat', 'dog', 'tea']
    """
    read = _read_tree(tree)
    inner = set(read.parent[read.parent >= 0].tolist())
    return [label for node, label in enumerate(read.labels) if not (leaves_only and node in inner)]


def bundle_taxonomy(name: Literal["emoji", "glosses"]) -> dict[str, Any]:
    """The hierarchy of a bundled data set, from nothing but its own columns.

    Parameters
    ----------
    name : {"emoji", "glosses"}
        ``"emoji"``: nested, 9 categories over 98 subcategories (columns ``category`` and ``subcategory``).
        ``"glosses"``: parent links {synset id: first hypernym's id} of the 82,115 nouns of WordNet 3.0 (both splits;
        column ``hypernyms``), a tree with the root entity, ``n00001740``. The further hypernyms of 2,213 nouns are left
        out; verbs (559 tops), adjectives and adverbs (no hypernyms in WordNet) too.

    Raises
    ------
    ValueError
        If the name is another one.

    Examples
    --------
    >>> bundle_taxonomy("emoji")["Flags"]
    ['country-flag', 'flag', 'subdivision-flag']
    """
    from shoestring import data  # imports datasets, a second

    if name == "emoji":
        rows = data.load("emoji", split="google")
        names, below = rows.features["category"].int2str, rows.features["subcategory"].int2str
        pairs = sorted(set(zip(names(rows["category"][:]), below(rows["subcategory"][:]), strict=True)))
        return {top: [low for above, low in pairs if above == top] for top in dict(pairs)}
    if name == "glosses":
        rows = data.load("glosses", split="all")
        columns = zip(rows["pos"][:], rows["id"][:], rows["hypernyms"][:], strict=True)
        return {synset: next(iter(hypernyms), None) for pos, synset, hypernyms in columns if pos == "n"}
    raise ValueError(f"name must be 'emoji' or 'glosses', got {name!r}")


def is_structure(distances: Any) -> bool:
    """Whether it is a tree with named nodes (nested mappings or parent links) or a networkx graph."""
    return isinstance(distances, Mapping) or _is_graph(distances)


def check_distances(distances: Any) -> None:
    """Raise ValueError unless the array or tensor is (K, N), finite and >= 0; if square, symmetric with zero diagonal.

    The triangle inequality is not asked for: a Fréchet mean needs none.
    """
    if distances.ndim != 2 or not all(distances.shape):
        raise ValueError(f"distances must be of shape (N, N) or (K, N), got {tuple(distances.shape)}")
    low, high = float(distances.min()), float(distances.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"distances must be finite, got {low if not np.isfinite(low) else high}; of a graph whose "
                         "parts do not connect, put a large number")  # fmt: skip
    if low < 0:
        raise ValueError(f"distances must be >= 0, got {low:g}")
    if distances.shape[0] == distances.shape[1]:
        _check_square(distances, high)


def observed_rows(distances: Any, observed: ArrayLike | None, n_columns: int | None = None) -> Any:
    """The (K, N) rows of the observed labels.

    Parameters
    ----------
    distances : array or tensor of shape (N, N), or (K, N), then these rows already
    observed : array-like of K column numbers, or None for all N (or, with (K, N), for unknown)
    n_columns : K, if the width of the probabilities is known

    Raises
    ------
    ValueError
        If shapes do not fit, or `check_distances` would raise on the rows.
    """
    if distances.ndim != 2:
        raise ValueError(f"distances must be of shape (N, N) or (K, N), got {tuple(distances.shape)}")
    K, N = distances.shape
    if observed is not None:
        observed = np.asarray(observed)
        if observed.ndim != 1 or observed.dtype.kind not in "iu" or not len(observed):
            raise ValueError(f"observed must be a flat list of label numbers, got {observed!r}")
        if len(np.unique(observed)) < len(observed) or observed.min() < 0 or observed.max() >= N:
            raise ValueError(f"observed must hold different label numbers from 0 to {N - 1}, got {observed.tolist()}")
        if K not in (N, len(observed)):
            raise ValueError(f"distances of shape {(K, N)} do not fit {len(observed)} observed labels")
        rows = distances[observed] if K == N else distances
    else:
        rows = distances
    if n_columns is not None and len(rows) != n_columns:
        raise ValueError(
            f"probs has {n_columns} columns, but distances gives {len(rows)} rows: give one row for each column, or "
            "say in observed which labels the columns are"
        )
    if observed is None or len(rows) == N:
        check_distances(rows if observed is None else rows[:, observed])
    else:
        check_distances(rows)
        _check_square(rows[:, observed], float(rows.max()))
    return rows


def _check_square(d: Any, high: float) -> None:
    slack = 1e-5 * high  # float32 embeddings
    if float(abs(d.diagonal()).max()) > slack:
        raise ValueError("distances must be 0 from a label to itself; are its rows and columns in different order?")
    for start in range(0, len(d), 1024):  # no second matrix of this size
        gap = float(abs(d[start : start + 1024] - d[:, start : start + 1024].T).max())
        if gap > slack:
            raise ValueError(f"distances must be symmetric, got two that differ by {gap:g}")


def _columns_and_rows(
    nodes: Sequence[Hashable], labels: Sequence[Hashable] | None, observed: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Places of labels and of observed labels among the nodes."""
    place = {node: i for i, node in enumerate(nodes)}

    def places(what: str, names: Sequence[Hashable]) -> np.ndarray:
        names = [name.item() if isinstance(name, np.generic) else name for name in names]
        unknown = [name for name in names if name not in place]
        if unknown:
            raise ValueError(f"{what} must be nodes of the structure; {unknown[0]!r} is not")
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"{what} must be different labels, at least one, got {len(names)} with repetitions")
        return np.array([place[name] for name in names])

    columns = np.arange(len(nodes)) if labels is None else places("labels", labels)
    return columns, columns if observed is None else places("observed", observed)


def _embeddings(structure: Any) -> np.ndarray | None:
    if isinstance(structure, torch.Tensor):
        structure = structure.detach().cpu().numpy()
    if isinstance(structure, Mapping | str | bytes) or not isinstance(structure, Iterable):
        return None
    array = np.asarray(structure)
    if array.ndim != 2:
        return None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"structure, if embeddings, must hold numbers, got dtype {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError("structure, if embeddings, must be finite, got NaN or infinity")
    return array.astype(np.float64)


def _is_graph(structure: Any) -> bool:
    return hasattr(structure, "nodes") and hasattr(structure, "edges") and hasattr(structure, "adj")


def _graph_distances(graph: Any, nodes: list[Any], rows: np.ndarray, weight: str | None) -> np.ndarray:
    """Shortest paths (K, nodes) from some nodes, infinite where there is none."""
    place = {node: i for i, node in enumerate(nodes)}
    length: dict[tuple[int, int], float] = {}
    for u, v, value in graph.edges(data=weight or "", default=None if weight else 1.0):
        if value is None or not 0 < value < np.inf:
            raise ValueError(f"the {weight!r} of edge {u!r}-{v!r} must be a finite number > 0, got {value}")
        ends = min(place[u], place[v]), max(place[u], place[v])
        length[ends] = min(length.get(ends, np.inf), float(value))  # of parallel edges the shortest
    u, v = np.array(list(length), dtype=np.int64).reshape(-1, 2).T
    sparse = coo_array((np.array(list(length.values())), (u, v)), shape=(len(nodes),) * 2).tocsr()
    return np.asarray(dijkstra(sparse, directed=False, indices=rows)).reshape(len(rows), len(nodes))


# ---- trees


class _Tree(NamedTuple):
    """Labels, and after them perhaps an unnamed root; nodes in preorder are ``order``."""

    labels: list[Any]
    parent: np.ndarray  # (nodes,), -1 at the root
    order: np.ndarray  # (nodes,), every subtree is a slice of it
    size: np.ndarray  # (nodes,), nodes in the subtree


def _read_tree(structure: Any) -> _Tree:
    if _is_graph(structure):
        labels, parent = _parents_of_graph(structure)
    elif isinstance(structure, Mapping):
        nested = any(not isinstance(below, Hashable) or isinstance(below, tuple) for below in structure.values())
        labels, parent = _parents_of_nested(structure) if nested else _parents_of_links(structure)
    else:
        labels, parent = _parents_of_numbers(structure)
    if not labels:
        raise ValueError("structure must hold at least one label, got an empty tree")
    tops = [node for node, above in enumerate(parent) if above == -1]
    if len(tops) != 1:  # none: all nodes are on cycles, and the walk below finds nothing
        for node in tops:
            parent[node] = len(parent)
        parent.append(-1)
    children: list[list[int]] = [[] for _ in parent]
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    order: list[int] = []
    stack = [len(parent) - 1 if len(tops) != 1 else tops[0]]
    while stack:
        order.append(stack.pop())
        stack.extend(reversed(children[order[-1]]))
    if len(order) < len(parent):
        stuck = next(iter(set(range(len(parent))) - set(order)))
        raise ValueError(f"structure must be a tree: the parents of {labels[stuck]!r} go round in a cycle")
    size = [1] * len(parent)
    for node in reversed(order[1:]):
        size[parent[node]] += size[node]
    return _Tree(labels, np.array(parent), np.array(order), np.array(size))


def _parents_of_links(links: Mapping[Any, Any]) -> tuple[list[Any], list[int]]:
    labels = list(dict.fromkeys([*links, *(above for above in links.values() if above is not None)]))
    place = {label: i for i, label in enumerate(labels)}
    above = [links.get(label) for label in labels]
    return labels, [-1 if label is None else place[label] for label in above]


def _parents_of_nested(nested: Mapping[Any, Any]) -> tuple[list[Any], list[int]]:
    labels: list[Any] = []
    parent: list[int] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, Any, int]] = [(label, below, -1) for label, below in reversed(list(nested.items()))]
    while stack:
        label, below, above = stack.pop()
        if label in seen:
            raise ValueError(f"structure must be a tree: label {label!r} occurs twice")
        seen.add(label)
        labels.append(label)
        parent.append(above)
        if below is None:
            continue
        if not isinstance(below, Mapping):
            if isinstance(below, str | bytes) or not isinstance(below, Iterable):
                raise TypeError(
                    f"what hangs below {label!r} must be a mapping, a list of leaves or None, got {below!r}"
                )
            below = dict.fromkeys(_unrepeated(below))
        node = len(labels) - 1
        stack.extend((name, deeper, node) for name, deeper in reversed(list(below.items())))
    return labels, parent


def _unrepeated(leaves: Iterable[Any]) -> list[Any]:
    leaves = list(leaves)
    if len(set(leaves)) < len(leaves):
        raise ValueError(f"structure must be a tree: a label occurs twice in {leaves!r}")
    return leaves


def _parents_of_numbers(numbers: Any) -> tuple[list[Any], list[int]]:
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(
            "structure must be nested mappings, parent links {child: parent}, a flat list of parent numbers, a "
            f"networkx graph or embeddings (N, e), got {type(numbers).__name__}"
        )
    if array.size and not (array.min() >= -1 and array.max() < len(array)):
        raise ValueError(f"parent numbers must be from -1 (top) to {len(array) - 1}, got {array.tolist()}")
    return list(range(len(array))), array.tolist()


def _parents_of_graph(graph: Any) -> tuple[list[Any], list[int]]:
    labels = list(graph.nodes)
    place = {label: i for i, label in enumerate(labels)}
    neighbours: list[list[int]] = [[] for _ in labels]
    n_edges = 0
    for u, v in graph.edges():
        neighbours[place[u]].append(place[v])
        neighbours[place[v]].append(place[u])
        n_edges += 1
    parent, stack = [-1] * len(labels), [0] if labels else []
    reached = set(stack)
    while stack:
        node = stack.pop()
        for other in neighbours[node]:
            if other not in reached:
                reached.add(other)
                parent[other] = node
                stack.append(other)
    if len(reached) < len(labels) or n_edges != len(labels) - 1:
        raise ValueError(
            f"structure must be a tree here, got a graph of {len(labels)} nodes and {n_edges} edges"
            + ("" if len(reached) == len(labels) else " that does not connect")
        )
    return labels, parent


def _tree_distances(tree: _Tree, rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Distances (nodes, K) from every node to the nodes `rows`.

    Down an edge, what hangs below gets nearer by one and everything else farther by one. Of the K nodes in preorder,
    those below are a slice.
    """
    place, depth = np.empty((2, len(tree.order)), dtype=np.int64)
    place[tree.order] = np.arange(len(tree.order))
    depth[tree.order[0]] = 0
    for node in tree.order[1:]:
        depth[node] = depth[tree.parent[node]] + 1
    by_place = np.argsort(place[rows])
    first = np.searchsorted(place[rows][by_place], place)
    last = np.searchsorted(place[rows][by_place], place + tree.size)
    d = np.empty((len(tree.order), len(rows)), dtype=dtype)
    d[tree.order[0]] = depth[rows]
    for node in tree.order[1:]:
        np.add(d[tree.parent[node]], 1, out=d[node])
        d[node, by_place[first[node] : last[node]]] -= 2
    return d


# ---- what can be reached


def locus(
    distances: ArrayLike, observed: ArrayLike | None = None, *, power: float = 2.0, ties: bool = True
) -> np.ndarray:
    """Which labels can be predicted at all from the observed ones: the locus Pi(Lambda) of the paper.

    y is reachable if some weights w on the simplex over Lambda make it a Fréchet mean: one linear programme each,
    ``min_w max_z sum_k w_k (d(k, y)^2 - d(k, z)^2)``, whose optimum is 0 for a mean. N programmes with K unknowns and N
    constraints: for hundreds of labels. On a tree use `tree_locus`, which is linear.

    Parameters
    ----------
    distances : array-like of shape (N, N), or (K, N), the rows of the observed labels
    observed : array-like of K label numbers, by default all (or as the rows of (K, N) say)
    power : exponent of the distance, > 0
    ties : default=True
        True: the paper's set, y may share the minimum with others. False: what `frechet_mean_predict` can answer,
        the lowest number among tied labels (so y must beat all lower ones strictly).

    Returns
    -------
    ndarray of shape (N,), bool

    Examples
    --------
    >>> path = abs(np.subtract.outer(np.arange(5), np.arange(5)))
    >>> locus(path, [1, 3])
    array([False,  True,  True,  True, False])
    """
    check_power(power)
    D = np.asarray(distances, dtype=np.float64)
    if D.ndim == 2 and D.shape[0] == D.shape[1]:
        check_distances(D)
    D2 = observed_rows(D, observed) ** power  # (K, N)
    D2 = D2 / max(D2.max(), np.finfo(float).tiny)
    K, N = D2.shape
    reached = np.zeros(N, dtype=bool)
    for y in range(N):
        worse = np.delete(D2[:, y, None] - D2, y, axis=1).T  # (N - 1, K): w'worse <= 0 says that y is as good
        strict = np.delete(np.arange(N) < y, y) & (not ties)
        # Unknowns w and t. ties: min t, worse w <= t. Else: max t, worse w <= -t against lower labels, <= 0 the others.
        t_column = np.where(strict, 1.0, 0.0) if not ties else -np.ones(N - 1)
        answer = linprog(
            [0.0] * K + [1.0 if ties else -1.0],
            A_ub=np.column_stack([worse, t_column]) if N > 1 else None,
            b_ub=np.zeros(N - 1) if N > 1 else None,
            A_eq=[[1.0] * K + [0.0]],
            b_eq=[1.0],
            bounds=[(0, None)] * K + [(0, None) if ties else (0, 1)],
        )
        if answer.status != 0:  # infeasible, which the form with ties never is
            continue
        optimum = float(answer.fun or 0.0)
        reached[y] = optimum <= REACHED if ties else -optimum > REACHED or not strict.any()
    return reached


def tree_locus(tree: Any, observed: Sequence[Hashable]) -> list[Any]:
    """The locus in a tree whose nodes are all labels, power 2: all nodes on paths between observed labels.

    Parameters
    ----------
    tree : as in `label_distances`, or a networkx graph that is a tree
    observed : sequence of labels, at least one

    Returns
    -------
    list of labels, in the order of `tree_labels`

    Examples
    --------
    >>> tree_locus({"thing": {"animal": ["cat", "dog"], "food": ["tea"]}}, ["cat", "tea"])
    ['thing', 'animal', 'cat', 'food', 'tea']
    """
    read = _read_tree(tree)
    _, rows = _columns_and_rows(read.labels, None, observed)
    inside = _on_paths(read, rows)
    return [label for label, reached in zip(read.labels, inside, strict=False) if reached]


def next_class(tree: Any, observed: Sequence[Hashable]) -> Any:
    """The class to label next: the node farthest from the locus, which adds most to it (its whole path there).

    Parameters
    ----------
    tree : as in `label_distances`, or a networkx graph that is a tree
    observed : sequence of labels, at least one

    Returns
    -------
    label, or None if every label can be predicted already
        Of several at the same distance the first in the order of `tree_labels`.

    Examples
    --------
    >>> taxonomy = {"thing": {"animal": {"cat": {}, "dog": ["poodle"]}, "food": ["tea"]}}
    >>> next_class(taxonomy, ["cat", "tea"])
    'poodle'
    """
    read = _read_tree(tree)
    _, rows = _columns_and_rows(read.labels, None, observed)
    distance = np.where(_on_paths(read, rows), 0, len(read.order))
    for node in read.order[:0:-1]:  # up: the locus below
        above = read.parent[node]
        distance[above] = min(distance[above], distance[node] + 1)
    for node in read.order[1:]:  # down: the locus above or aside
        distance[node] = min(distance[node], distance[read.parent[node]] + 1)
    distance = distance[: len(read.labels)]
    return read.labels[int(distance.argmax())] if distance.max() > 0 else None


def _on_paths(tree: _Tree, rows: np.ndarray) -> np.ndarray:
    """Nodes (nodes,) on paths between the nodes `rows`: ends of the edges that have some of them on both sides."""
    below = np.zeros(len(tree.order), dtype=np.int64)
    below[rows] = 1
    for node in tree.order[:0:-1]:
        below[tree.parent[node]] += below[node]
    crossed = (below > 0) & (below < len(rows))
    crossed[tree.order[0]] = False
    inside = crossed.copy()
    inside[tree.parent[crossed]] = True
    inside[rows] = True
    return inside


def check_power(power: float) -> None:
    """Raise ValueError unless the exponent is a finite number > 0."""
    if not (np.isreal(power) and np.isfinite(power) and power > 0):
        raise ValueError(f"power must be a finite number > 0, got {power!r}")
