r"""Discrete Key-Value Bottleneck.

Träuble, Goyal, Rahaman, Mozer, Kawaguchi, Bengio, Schölkopf. ICML 2023. arXiv 2207.11240.

Idea
----
Behind a frozen encoder stand C codebooks of J frozen keys, each with a value that can be learnt. A row looks up its
nearest key in every codebook, and its scores are the mean of the values found there. So learning touches only the
values that the rows of today hit, and what other rows will be told stays as it is, to the bit. Keys need no labels.

Equations
---------
z = f(x) (D,), random projections P_c (D, dk) with columns of length 1, keys k_{c,j} (dk,), values V_{c,j} (classes,)::

    h_c = z P_c,     j_c = argmin_j ||h_c - k_{c,j}||^2,     logits = (1/C) sum_c V_{c,j_c}

Keys, from rows without labels, by vector quantisation with running means, decay g = 0.95, a batch after the other::

    n_j <- g n_j + (1 - g) #hits,   s_j <- g s_j + (1 - g) sum of hits,   k_j = s_j / ntilde_j
    ntilde_j = (n_j + eps) / (sum n + J eps) * sum n                       (eps = 1e-5)
    n_j < 0.1 batch / J:  k_j <- a random h of the batch, n_j <- that threshold, s_j <- k_j n_j

Values start at zero (a pair nobody has touched votes for nothing) and follow the gradient of the cross-entropy with
label smoothing 0.1 by plain SGD: momentum, weight decay or Adam would move values that were not hit.

Code and paper
--------------
* The official replacement of dead keys writes the keys only, so that the next running mean undoes it; here n and s
  follow.
* When predicting, the nearest key is sought among those hit in training. The official code puts the others at the
  batch's greatest distance, so that for top_k > 1 an answer depends on the batch; here they are infinitely far.
* The mean over C divides the gradient of a value by C; with lr 0.3 and C = 256 the official runs take 2,000 epochs a
  task. `DiscreteKeyValueBottleneck` is that, under your own ``torch.optim.SGD``. `DKVBClassifier` does not divide, so
  that a few epochs are enough (ours).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from shoestring._signals import uninterrupted
from shoestring.learn._labels import check_announced, check_labels, ids_of, union
from shoestring.learn._model_file import read, restore, write

__all__ = ["DKVBClassifier", "DiscreteKeyValueBottleneck", "nearest_keys", "smoothed_gradient", "update_keys"]

FORMAT, VERSION = "shoestring.dkvb", 1
EPS = 1e-5
BLOCK = 1 << 24  # distances held at a time


def nearest_keys(h: Tensor, keys: Tensor, usable: Tensor | None = None, top_k: int = 1) -> Tensor:
    """Numbers of the nearest keys, in every codebook.

    Parameters
    ----------
    h : (B, C, dk)
    keys : (C, J, dk)
    usable : (C, J) bool, optional
        Keys that may be found. Default: all.
    top_k : int, default=1

    Returns
    -------
    (B, C, top_k) int64, nearest first. Costs 2 B C J dk flops; 64 MB (float32) of distances are held at a time.
    """
    B, C, _ = h.shape
    J = keys.shape[1]
    squares = keys.square().sum(2)  # (C, J)
    if usable is not None:
        squares = squares.masked_fill(~usable, torch.inf)
    found = torch.empty(B, C, top_k, dtype=torch.int64, device=h.device)
    step = max(1, BLOCK // max(1, C * J))
    for start in range(0, B, step):
        rows = h[start : start + step].transpose(0, 1)  # (C, b, dk)
        distance = torch.baddbmm(squares[:, None], rows, keys.transpose(1, 2), alpha=-2)  # (C, b, J), less ||h||^2
        if top_k == 1:  # of keys equally near to rounding (two may be one row of the data) the first, in any batch
            least = distance.amin(2, keepdim=True)
            tie = 8 * torch.finfo(h.dtype).eps * (least.abs() + rows.square().sum(2, keepdim=True))
            near = (distance <= least + tie).byte().argmax(2, keepdim=True)
        else:
            near = distance.topk(top_k, 2, largest=False).indices
        found[start : start + step] = near.transpose(0, 1)
    return found


def update_keys(
    h: Tensor,
    keys: Tensor,
    n: Tensor,
    s: Tensor,
    decay: float,
    threshold: float,
    generator: torch.Generator | None = None,
) -> None:
    """One batch of the vector quantisation, in place: keys (C, J, dk), running counts n (C, J) and sums s (C, J, dk).

    A key whose count is below `threshold` becomes a row of the batch, drawn by `generator`; 0 replaces none.
    """
    B, C, dk = h.shape
    J = keys.shape[1]
    place = (nearest_keys(h, keys)[:, :, 0] + J * torch.arange(C, device=h.device)).flatten()  # (B C,)
    hits = torch.zeros(C * J, dtype=h.dtype, device=h.device).index_add_(
        0, place, torch.ones_like(place, dtype=h.dtype)
    )
    sums = torch.zeros(C * J, dk, dtype=h.dtype, device=h.device).index_add_(0, place, h.reshape(B * C, dk))
    n.mul_(decay).add_(hits.view(C, J), alpha=1 - decay)
    s.mul_(decay).add_(sums.view(C, J, dk), alpha=1 - decay)
    total = n.sum(1, keepdim=True)
    smooth = (n + EPS) / (total + J * EPS) * total  # ntilde
    keys.copy_(s / smooth[:, :, None])
    dead = n < threshold
    if dead.any():
        c, j = dead.nonzero(as_tuple=True)
        row = torch.randint(B, c.shape, generator=generator).to(h.device)
        keys[c, j] = h[row, c]
        n[c, j] = threshold
        s[c, j] = keys[c, j] * threshold


class DiscreteKeyValueBottleneck(nn.Module):
    """Features to logits through C codebooks of J frozen keys with learnable values.

    Parameters
    ----------
    in_features : int
        D, the width of the encoder's features.
    out_features : int
        Number of classes.
    num_codebooks, num_pairs, key_dim : int, default=256, 4096, 14
        C, J and dk (the paper's).
    decay : float in [0, 1), default=0.95
        g of the running means (the paper's).
    threshold_factor : float >= 0, default=0.1
        A key hit less often than this share of the mean is replaced (the paper's).
    top_k : int, default=1
        Keys per codebook whose values are averaged.
    projection : {"random", "chunk"}, default="random"
        Random projections, or features cut into C parts of width D / C (then `key_dim` is ignored).
    generator : torch.Generator, optional
        For projections and keys; default: one with seed 0.
    dtype, device : as in torch

    Attributes
    ----------
    values : Parameter (C, J, out_features), zeros at first; its gradient is sparse
    projections : buffer (C, D, dk), absent with ``projection="chunk"``
    keys : buffer (C, J, dk)
    usage : buffer (C, J) int64, how often a pair was hit in training

    Notes
    -----
    The gradient of `values` is sparse, of the pairs hit: use ``torch.optim.SGD(bottleneck.parameters(), lr=0.3)``. SGD
    without momentum and weight decay leaves all other values as they are, bit for bit; Adam refuses sparse gradients.
    Nothing flows back into the encoder. Memory: 4 C J (dk + classes) bytes and twice 4 C J dk while keys are made.

    Shapes: (B, D) -> (B, out_features).

    Examples
    --------
    >>> z = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    >>> layer = DiscreteKeyValueBottleneck(20, 3, num_codebooks=8, num_pairs=16, key_dim=4).init_keys(z)
    >>> nn.functional.cross_entropy(layer(z), torch.zeros(64, dtype=torch.long)).item()  # log(3): nothing is learnt
    1.098...
    """

    keys: Tensor
    usage: Tensor
    projections: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_codebooks: int = 256,
        num_pairs: int = 4096,
        key_dim: int = 14,
        decay: float = 0.95,
        threshold_factor: float = 0.1,
        top_k: int = 1,
        projection: Literal["random", "chunk"] = "random",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(locals())
        generator = generator or torch.Generator().manual_seed(0)
        dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features, self.top_k = in_features, out_features, top_k
        self.decay, self.threshold_factor, self.projection = decay, threshold_factor, projection
        if projection == "chunk":
            key_dim = in_features // num_codebooks
        else:
            P = torch.randn(num_codebooks, in_features, key_dim, generator=generator, dtype=dtype)
            self.register_buffer("projections", (P / P.norm(dim=1, keepdim=True)).to(device))
        keys = torch.randn(num_codebooks, num_pairs, key_dim, generator=generator, dtype=dtype)
        self.register_buffer("keys", keys.to(device))
        self.register_buffer("usage", torch.zeros(num_codebooks, num_pairs, dtype=torch.int64, device=device))
        self.values = nn.Parameter(torch.zeros(num_codebooks, num_pairs, out_features, dtype=dtype, device=device))

    @torch.no_grad()
    def init_keys(
        self,
        data: Tensor | Iterable[Tensor],
        epochs: int = 10,
        *,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> DiscreteKeyValueBottleneck:
        """Make the keys from features without labels, then never touch them again.

        Parameters
        ----------
        data : tensor (N, D), or an iterable of batches (B, D) that can be walked through once an epoch
        epochs : int, default=10
            The paper's.
        batch_size : int, default=256
            For a tensor; it is shuffled anew every epoch.
        generator : torch.Generator, optional
            For the order of rows and the replacement of dead keys; default: one with seed 0.
        """
        generator = generator or torch.Generator().manual_seed(0)
        n, s = torch.zeros_like(self.keys[:, :, 0]), torch.zeros_like(self.keys)
        keys = self.keys.clone()
        seen = 0
        for _ in range(epochs):
            batches: Iterable[Tensor] = data
            if isinstance(data, Tensor):
                batches = (data[rows] for rows in torch.randperm(len(data), generator=generator).split(batch_size))
            for batch in batches:
                h = self.heads(batch)
                seen += len(h)
                threshold = self.threshold_factor * len(h) / keys.shape[1]
                update_keys(h, keys, n, s, self.decay, threshold, generator)
        if not seen:
            raise ValueError("data holds no rows to make keys from")
        if not torch.isfinite(keys).all():
            raise ValueError("data holds NaN or infinite features")
        self.keys.copy_(keys)
        return self

    def heads(self, z: Tensor) -> Tensor:
        """h (B, C, dk) of features (B, D)."""
        if z.ndim != 2 or z.shape[1] != self.in_features:
            raise ValueError(f"features must be (B, {self.in_features}), got {tuple(z.shape)}")
        if self.projection == "chunk":
            return z.reshape(len(z), len(self.keys), -1)
        C, D, dk = self.projections.shape
        flat = self.projections.transpose(0, 1).reshape(D, C * dk)
        return (z.to(flat.dtype) @ flat).view(len(z), C, dk)

    @torch.no_grad()
    def lookup(self, z: Tensor) -> Tensor:
        """Numbers (B, C, top_k) of the keys found; outside training only of those that training has hit."""
        usable = None if self.training else self.usage > 0
        return nearest_keys(self.heads(z), self.keys, usable, self.top_k)

    def forward(self, z: Tensor) -> Tensor:
        return self.read(self.lookup(z))

    def read(self, found: Tensor) -> Tensor:
        """Logits (B, out_features) of the pairs found (B, C, top_k): a lookup can be kept for a data set.

        In training mode the pairs are counted as used.
        """
        if self.training:
            J = self.values.shape[1]
            hits = (found + J * torch.arange(len(self.values), device=found.device)[:, None]).flatten()
            self.usage.view(-1).index_add_(0, hits, torch.ones_like(hits))
        return _Read.apply(found, self.values)


class _Read(torch.autograd.Function):
    """Mean of the values found; the gradient is sparse, of the pairs found."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, values: Tensor) -> Tensor:
        C, J, classes = values.shape
        place = (found + J * torch.arange(C, device=found.device)[:, None]).flatten(1)  # (B, C top_k)
        ctx.save_for_backward(found)
        ctx.shape = values.shape
        return nn.functional.embedding_bag(place, values.view(C * J, classes), mode="mean")

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor]:
        (found,) = ctx.saved_tensors
        B, C, k = found.shape
        codebook = torch.arange(C, device=found.device)[None, :, None].expand(B, C, k)
        where = torch.stack([codebook.flatten(), found.flatten()])  # (2, B C k)
        each = (G / (C * k)).repeat_interleave(C * k, 0)  # (B C k, classes)
        return None, torch.sparse_coo_tensor(where, each, ctx.shape, check_invariants=False).coalesce()


def smoothed_gradient(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Gradient (B, K) of the mean cross-entropy with label smoothing, with respect to the logits."""
    B, K = logits.shape
    wanted = torch.full_like(logits, label_smoothing / K)
    wanted[torch.arange(B, device=logits.device), target] += 1 - label_smoothing
    return (logits.softmax(1) - wanted) / B


class DKVBClassifier(ClassifierMixin, BaseEstimator):
    """Classifier on features that learns new classes at any time and edits only the values its rows hit.

    Parameters
    ----------
    num_codebooks, num_pairs, key_dim : int, default=256, 4096, 14
        C, J and dk (the paper's).
    epochs : int, default=20
        Passes over the rows of a call (ours; the paper has 2,000 a task and divides the gradient by C).
    lr : float, default=0.3
        Step of the values (the paper's; here the gradient of a value is not divided by C).
    label_smoothing : float in [0, 1), default=0.1
    clip : float, default=1.0
        Largest norm of a step's gradient (the paper's).
    batch_size : int, default=256
    key_epochs : int, default=10
        Passes of the vector quantisation that makes the keys.
    random_state : int, RandomState instance or None, default=0
    device : str, default="cpu"

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,), sorted labels
    bottleneck_ : DiscreteKeyValueBottleneck
        Its columns number the classes in order of appearance.
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Notes
    -----
    Keys are made by `fit_keys` from any rows without labels (the stream's own, or of a related data set); without it,
    of the rows of `fit` or of the first `partial_fit`. Keys that do not cover the stream bring forgetting back. A call
    looks its keys up once, 2 N C J dk flops, and then costs N C K an epoch.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = DKVBClassifier(num_codebooks=32, num_pairs=128, key_dim=8).fit_keys(X)  # no labels
    >>> for task in ([0, 1], [2, 3], [4, 5], [6, 7], [8, 9]):
    ...     rows = np.isin(y, task)
    ...     model = model.partial_fit(X[rows], y[rows])
    >>> bool(model.score(X, y) > 0.9)
    True
    """

    classes_: np.ndarray
    bottleneck_: DiscreteKeyValueBottleneck

    def __init__(
        self,
        *,
        num_codebooks: int = 256,
        num_pairs: int = 4096,
        key_dim: int = 14,
        epochs: int = 20,
        lr: float = 0.3,
        label_smoothing: float = 0.1,
        clip: float = 1.0,
        batch_size: int = 256,
        key_epochs: int = 10,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "cpu",
    ) -> None:
        self.num_codebooks = num_codebooks
        self.num_pairs = num_pairs
        self.key_dim = key_dim
        self.epochs = epochs
        self.lr = lr
        self.label_smoothing = label_smoothing
        self.clip = clip
        self.batch_size = batch_size
        self.key_epochs = key_epochs
        self.random_state = random_state
        self.device = device

    def fit_keys(self, X: ArrayLike) -> DKVBClassifier:
        """Make the keys from rows (n, d) without labels, and forget everything learnt."""
        rows = validate_data(self, X, reset=True, dtype=[np.float64, np.float32])
        self.bottleneck_ = self._with_keys(rows)
        self._set(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        return self

    def fit(self, X: ArrayLike, y: ArrayLike) -> DKVBClassifier:
        """Forget everything, make keys of these rows, learn them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,), integers or strings
        """
        return self._learn(X, y, first=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, *, classes: ArrayLike | None = None) -> DKVBClassifier:
        """Learn rows, of known or new classes. A call that raises leaves the model as it was.

        `classes`, which scikit-learn's own learners need, is not needed; if given, y must keep to it.
        """
        check_announced(y, classes)
        return self._learn(X, y, first=not hasattr(self, "bottleneck_"))

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Logits (n_samples, n_classes); for two classes, as in scikit-learn, their difference (n_samples,)."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Labels (n_samples,) of the highest logit."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Softmax of the logits, (n_samples, n_classes)."""
        return softmax(self._scores(X), axis=1)

    @property
    def n_samples_seen_(self) -> int:
        """Rows learnt."""
        check_is_fitted(self)
        return int(self._counts.sum())

    @property
    def class_count_(self) -> np.ndarray:
        check_is_fitted(self)
        return self._counts[self._order]

    def save(self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Write one safetensors file, atomically; its metadata hold the parameters, the classes and `extra` as JSON."""
        check_is_fitted(self)
        params = self.get_params()
        if not isinstance(self.random_state, int | np.integer):
            params["random_state"] = None  # the keys themselves are in the file
        tensors = {f"bottleneck.{name}": t for name, t in self.bottleneck_.state_dict().items()}
        tensors |= {"class_count": torch.from_numpy(self._counts), "generator": self._generator.get_state()}
        write(path, self, self._labels, tensors, format=FORMAT, version=VERSION, params=params, extra=extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> DKVBClassifier:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file; if it is truncated, not a model of this class, or of a newer version.
        """
        meta, tensors = read(path, format=FORMAT, version=VERSION)
        model = cls(**{**meta["params"], "device": device})
        labels = restore(model, meta)
        layer = model._empty(meta["n_features"], len(labels), torch.Generator())
        layer.load_state_dict({name[11:]: t for name, t in tensors.items() if name.startswith("bottleneck.")})
        model.bottleneck_ = layer.eval()
        model._generator = torch.Generator()
        model._generator.set_state(tensors["generator"])
        model._set(labels, tensors["class_count"].numpy())
        return model

    # ---- inside

    def _set(self, labels: np.ndarray, counts: np.ndarray) -> None:
        """Labels in order of appearance, and how many rows of each."""
        self._labels, self._counts, self._order = labels, counts, np.argsort(labels)
        self.classes_ = labels[self._order]

    def _empty(self, width: int, classes: int, generator: torch.Generator) -> DiscreteKeyValueBottleneck:
        layer = DiscreteKeyValueBottleneck(
            width, classes, num_codebooks=self.num_codebooks, num_pairs=self.num_pairs, key_dim=self.key_dim,
            generator=generator, dtype=torch.float32, device=self.device,
        )  # fmt: skip
        layer.values.requires_grad_(False)  # the gradient is written out below
        return layer

    def _with_keys(self, X: np.ndarray) -> DiscreteKeyValueBottleneck:
        _check({**self.get_params(), "in_features": X.shape[1], "out_features": 1})
        for name in ("epochs", "batch_size", "key_epochs"):
            if not (isinstance(getattr(self, name), int | np.integer) and getattr(self, name) >= 1):
                raise ValueError(f"{name} must be an int >= 1, got {getattr(self, name)!r}")
        for name in ("lr", "clip"):
            if not (getattr(self, name) > 0 and np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        seed = check_random_state(self.random_state).randint(2**31)
        generator = torch.Generator().manual_seed(int(seed))
        layer = self._empty(X.shape[1], 0, generator)
        rows = torch.tensor(X, dtype=torch.float32, device=self.device)
        self._generator = generator
        return layer.init_keys(rows, self.key_epochs, batch_size=self.batch_size, generator=generator).eval()

    def _learn(self, X: Any, y: Any, first: bool) -> DKVBClassifier:
        X = validate_data(self, X, reset=first, dtype=[np.float64, np.float32])
        y = check_labels(y, None if first else self._labels)
        check_consistent_length(X, y)
        layer = self._with_keys(X) if first else self.bottleneck_
        known = np.empty(0, dtype=y.dtype) if first or not len(self._labels) else self._labels
        labels = union(known, y)
        ids = ids_of(labels, y)
        counts = np.bincount(ids, minlength=len(labels))
        if not first:
            counts[: len(known)] += self._counts
        rows = torch.tensor(X, dtype=torch.float32, device=self.device)
        with uninterrupted():  # half-learnt rows could neither be undone nor learnt again
            self.bottleneck_ = self._train(layer, rows, torch.as_tensor(ids, device=self.device), len(labels))
            self._set(labels, counts)
        return self

    def _train(
        self, layer: DiscreteKeyValueBottleneck, X: Tensor, target: Tensor, classes: int
    ) -> DiscreteKeyValueBottleneck:
        C, J, before = layer.values.shape
        if classes > before:  # new classes: nothing votes for them yet
            layer.values = nn.Parameter(nn.functional.pad(layer.values, (0, classes - before)), requires_grad=False)
            layer.out_features = classes
        layer.train()
        found = layer.lookup(X)[:, :, 0]  # (N, C): keys do not move, so once is enough
        place = found + J * torch.arange(C, device=found.device)
        values = layer.values.view(C * J, classes)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(X), generator=self._generator).split(self.batch_size):
                hit = place[rows.to(place.device)]  # (B, C)
                logits = values[hit].mean(1)  # (B, K)
                G = smoothed_gradient(logits, target[rows.to(target.device)], self.label_smoothing)
                pairs, inverse = hit.flatten().unique(return_inverse=True)
                gradient = torch.zeros(len(pairs), classes, device=values.device)
                gradient.index_add_(0, inverse, G.repeat_interleave(C, 0))  # not divided by C: see the module
                scale = (self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
                values.index_add_(0, pairs, gradient * (-self.lr * scale))
        layer.usage.view(-1).index_add_(0, place.flatten(), torch.ones_like(place.flatten()))
        return layer.eval()

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        if not len(self.classes_):
            raise ValueError("nothing is learnt yet, there are only keys: call partial_fit first")
        with torch.no_grad():
            logits = self.bottleneck_(torch.tensor(X, dtype=torch.float32, device=self.device))
        return logits.cpu().numpy()[:, self._order]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "bottleneck_")


def _check(given: dict[str, Any]) -> None:
    low = {"in_features": 1, "out_features": 0, "num_codebooks": 1, "num_pairs": 1, "key_dim": 1, "top_k": 1}
    for name, least in low.items():
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if given.get("top_k", 1) > given["num_pairs"]:
        raise ValueError(f"top_k must be <= num_pairs = {given['num_pairs']}, got {given['top_k']}")
    if not 0 <= given.get("decay", 0) < 1:
        raise ValueError(f"decay must be in [0, 1), got {given['decay']}")
    if not given.get("threshold_factor", 0) >= 0:
        raise ValueError(f"threshold_factor must be >= 0, got {given['threshold_factor']}")
    projection = given.get("projection", "random")
    if projection not in ("random", "chunk"):
        raise ValueError(f"projection must be 'random' or 'chunk', got {projection!r}")
    if projection == "chunk" and given["in_features"] % given["num_codebooks"]:
        raise ValueError(
            f"in_features must be a multiple of num_codebooks to be cut into chunks, got {given['in_features']} and "
            f"{given['num_codebooks']}"
        )
