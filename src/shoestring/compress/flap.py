r"""Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP).

Yongqi An, Xu Zhao, Tao Yu, Ming Tang and Jinqiao Wang. AAAI 2024, arXiv 2312.11983.

Idea
----
An input that hardly fluctuates around its mean is as good as a constant, and a constant can move into a bias. Heads and
neurons whose outputs fluctuate least, weighted by what reads them, are removed, and their mean is put into the bias of
the layer that read them: forward passes on unlabelled text, no gradients, no retraining.

Equations
---------
Scored are the two layers of a block that write to the residual stream, attention output and MLP down, each with weights
W (d_out, d_in) and inputs X (tokens, d_in). A unit is a set of columns of W: of a neuron one, of a head its head_dim,
of a key-value group (grouped-query attention) those of all its query heads::

    xbar_j = mean_t X_tj,      F_j = sum_t (X_tj - xbar_j)^2 / (T - 1)                                     (1)
    S_j = F_j ||W_:j||^2                          WIFV;     IFV: F_j;     WIFN: mean_i |W_ij| rms_t X_tj    (2)
    Z_j = (S_j - mean_j S) / std_j S              over the d_in columns of one layer (attention: of S_j^2)  (3)
    score(unit) = mean of Z_j over its columns                                                              (4)
    keep the k units of highest score, over all layers and kinds, with
        k = argmin_k |cost of the first k - (1 - p) cost of all|,   cost: parameters that a unit takes along (5)
    bias <- bias + W[:, R] xbar[R]                for the removed columns R, which then go                  (6)

The error of the layer is W[:, R] (x_R - xbar_R): mean zero, and expected square sum_{j in R} S_j for uncorrelated
columns. That is "AL-AM", adaptive over layers and modules. "UL-UM" takes as much of every layer and module: heads by
the sum of S_j, p of them to the nearest whole number, and neurons until the block has lost p (ours; the official code
rounds down both).

What comes back
---------------
An ordinary transformers model with smaller layers. Per-layer counts fit no config of transformers 5.24 (its
``per_layer_config`` is read by few architectures, none of these), so the model gets a subclass of its class and a
``model_type`` of its own, ``shoestring.compress.flap:llama``: ``save_pretrained`` writes the counts into config.json,
and `flap_load`, or ``AutoModel*.from_pretrained`` after ``import shoestring.compress.flap``, reads it. Transformers
alone refuses that folder with a message that holds this name. Where one config can say it, class and type stay as they
are and transformers alone loads the folder: "UL-UM" of Llama and ViT, and with ``bias=False`` of Qwen and Mistral, if
the number of heads divides the width (transformers' own condition). Llama's config has one switch for all biases of
attention, and one for those of the MLP: query, key, value, gate and up then get biases of zeros, a few parameters.

What to expect
--------------
* Means matter where activations have one (GELU, ReLU). Inputs of a SiLU-gated down projection have means near 0: there
  (6) repairs little, and most of the gain is (2) and (5).
* Decisions about heads are as coarse as heads are few: with 4 key-value groups a quarter of the attention at a time.
* Calibrate on text like the target's; a few hundred sequences do.

Code and paper
--------------
The paper's text was not read; equations are of the official code (CASIA-IVA-Lab/FLAP, Apache-2.0, LLaMA-1 only).

* That code squares S_j of attention before (3), which the formula of its README has not: ``attn_power=2`` follows the
  code and the published figures, 1 the formula.
* Its running variance is not one (aliased mean, first sequence lost, divided by sequences): proportional to F_j, about.
  Here Welford and Chan: exact, mergeable, in float64.
* It keeps scores > threshold, so that the unit at the threshold goes even at p = 0, and takes 512/3 for every head.
  Here (5) as it stands: p = 0 removes nothing, ties go by order, costs are counted.
* It overwrites biases. Here (6) adds.
* It carries hidden states of all sequences from block to block. Since pruning only begins after the last block, plain
  forward passes that collect both layers of all blocks give the same numbers from the activations of one batch.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoestring._models import check_model
from shoestring.compress._checks import check_ratio, check_whole

try:
    import transformers
except ImportError as error:
    raise ImportError("flap needs transformers: pip install 'shoestring[text]'") from error

from shoestring.compress._flap_calibration import batches_of
from shoestring.compress._flap_checkpoint import describe, pruned_class, register
from shoestring.compress._flap_layouts import PREFIX, Branch, add_to_bias, branches_of, mask_, matrix, shrink

__all__ = [
    "ColumnStats",
    "allocate",
    "column_scores",
    "column_statistics",
    "compensation",
    "flap_load",
    "flap_prune",
    "standardize",
    "wifv",
]

Metric = Callable[[Tensor, "ColumnStats"], Tensor]
Progress = Callable[[float, str], None]

register()  # with the Auto classes of transformers


@torch.no_grad()
def flap_prune(
    model: Any,
    calibration: Any,
    pruning_ratio: float = 0.2,
    *,
    metric: str | Metric = "WIFV",
    structure: str = "AL-AM",
    bias: bool = True,
    remove: bool = True,
    attn_power: int = 2,
    min_heads: int = 1,
    min_neurons: int = 1,
    tokenizer: Any = None,
    sequence_length: int = 128,
    max_sequences: int = 1024,
    inplace: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Remove attention heads and MLP neurons of a transformers model, by forward passes on unlabelled data.

    Cost: the forward passes without the output layer; beside the model, two float64 numbers for every scored column.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of type llama, mistral, qwen2, qwen3, gpt2, gpt_neox, bert, roberta or vit, with any head; in any floating dtype
        and on any device. Statistics and compensation are float64 (float32 on mps), the result has the model's dtype.
    calibration : tensor, or iterable of tensors, of dicts or of str, or list of ColumnStats
        - ``input_ids`` of shape (sequences, length), or (tokens,), cut into `sequence_length`; for ViT
          ``pixel_values`` (images, channels, height, width). Taken 8 rows at a time;
        - batches: such tensors, or the model's keyword arguments (``labels`` are left out, padding by a 2-d
          ``attention_mask`` does not count);
        - texts, with `tokenizer`: joined, cut into `sequence_length`, read up to `max_sequences`, so that a stream will
          do;
        - what `column_statistics` returned.
    pruning_ratio : float in [0, 1), default 0.2
        p: the share of the parameters of heads and neurons that goes. Embeddings, norms and heads do not count. At 0
        nothing is touched.
    metric : {"WIFV", "IFV", "WIFN"} or callable, default "WIFV"
        (2). "WIFN" is Wanda's. A callable takes W (d_out, d_in) and `ColumnStats`, and returns (d_in,).
    structure : {"AL-AM", "UL-UM"}, default "AL-AM"
        Adaptive, or uniform over layers and modules.
    bias : bool, default True
        Compensate by (6). Every attention output and down projection then has a bias.
    remove : bool, default True
        False leaves the shapes and sets what would go to zero. Both answer the same.
    attn_power : {1, 2}, default 2
        Power of S_j of attention: the official code's 2, or the formula's 1.
    min_heads, min_neurons : int >= 1, default 1
        What every layer keeps, of heads (of key-value groups, where they are shared) and neurons: ours, since an empty
        layer breaks generation. At very high p more is kept than asked for.
    tokenizer : callable, optional
        ``tokenizer(text)["input_ids"]``, for texts.
    sequence_length, max_sequences : int, default 128 and 1024
        Those of the official scripts.
    inplace : bool, default False
        Change `model` itself. False works on a copy.
    progress : callable, optional
        Called with the share done (0 until the end where the number of batches is not known) and a word.

    Returns
    -------
    model
        With fewer parameters; see the module's "What comes back" on saving and loading.

    Raises
    ------
    ValueError
        If an argument is out of its range; the architecture is not in the table (the message has the list); there is
        nothing to prune; weights are NaN, infinite or on the meta device; calibration is empty, shorter than
        `sequence_length` or gives NaN. The model is then as it was.
    TypeError
        If model is no transformers model, or calibration nothing of the above.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    >>> ids = torch.arange(100).view(4, 25)
    >>> small = flap_prune(model, ids, 0.5, structure="UL-UM")
    >>> type(small).__name__, small.config.num_attention_heads, small.config.intermediate_size
    ('LlamaForCausalLM', 2, 32)
    >>> type(flap_prune(model, ids, 0.5)).__name__  # sizes differ from layer to layer
    'FlapLlamaForCausalLM'
    """
    ratio = check_ratio("pruning_ratio", pruning_ratio)
    score = _metric(metric)
    if structure not in ("AL-AM", "UL-UM"):
        raise ValueError(f"structure must be 'AL-AM' or 'UL-UM', got {structure!r}")
    check_whole("attn_power", attn_power, 1, 2)
    minimum = (check_whole("min_heads", min_heads, 1), check_whole("min_neurons", min_neurons, 1))
    check_model(model)
    branches = branches_of(model)
    if all(branch.units <= minimum[branch.kind] for branch in branches):
        raise ValueError("nothing prunable: no layer has more than min_heads heads or min_neurons neurons")

    reading = {"sequence_length": sequence_length, "max_sequences": max_sequences, "progress": progress}
    stats = _statistics(model, branches, calibration, {"tokenizer": tokenizer, **reading})
    power = (attn_power, 1)
    S = [score(matrix(b.consumer), s).cpu().double() ** power[b.kind] for b, s in zip(branches, stats, strict=True)]
    for branch, values in zip(branches, S, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"calibration gives NaN or infinity at the input of {branch.name}")
    kept = (_adaptive if structure == "AL-AM" else _uniform)(branches, S, ratio, minimum)

    if not inplace:
        model = copy.deepcopy(model)
        branches = branches_of(model)
    if not all(bool(keep.all()) for keep in kept):
        for branch, keep, s in zip(branches, kept, stats, strict=True):
            if bias:
                R = branch.columns[~keep].flatten().to(s.mean.device)
                add_to_bias(branch.consumer, compensation(matrix(branch.consumer), s.mean, R))  # (6)
            (shrink if remove else mask_)(branch, keep)
        describe(model)
    if progress is not None:
        progress(1.0, "pruned")
    return model


def flap_load(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load what ``flap_prune(...).save_pretrained(folder)`` wrote, as the class it was.

    Parameters
    ----------
    folder : path
    **options
        Of ``from_pretrained``: dtype, device_map, ...

    Raises
    ------
    ValueError
        If config.json does not name a model class of transformers.
    FileNotFoundError
        If it is missing.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_head=4, n_layer=2))
    >>> small, folder = flap_prune(model, torch.arange(48).view(4, 12), 0.3), tempfile.mkdtemp()
    >>> small.save_pretrained(folder)
    >>> torch.equal(flap_load(folder).lm_head.weight, small.lm_head.weight)
    True
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{Path(folder) / 'config.json'} is missing")
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    pruned = config.model_type.startswith(PREFIX)
    cls = getattr(transformers, name.removeprefix("Flap") if pruned else name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{folder} must name a model class of transformers, got architectures {config.architectures}")
    found: Any = pruned_class(cls) if pruned else cls
    return found.from_pretrained(folder, **options)


# ---- the mathematics


class ColumnStats:
    """Mean and variance of the columns of a matrix that comes in pieces: (1) by Welford and Chan.

    The order and the size of the pieces do not matter, up to rounding. float64; float32 on mps.

    Attributes
    ----------
    n : int
        Rows so far.
    mean : tensor of shape (d,)
    M2 : tensor of shape (d,)
        Sum of squared deviations from the mean.

    Examples
    --------
    >>> stats = ColumnStats().update(torch.tensor([[1.0], [2.0]])).merge(ColumnStats().update(torch.tensor([[6.0]])))
    >>> stats.n, stats.mean.item(), stats.variance.item(), round(stats.mean_square.item(), 3)
    (3, 3.0, 7.0, 13.667)
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.M2 = torch.zeros(0, dtype=torch.float64)

    def update(self, x: Tensor) -> ColumnStats:
        """Take in rows x (..., d), of any floating dtype."""
        if x.ndim < 1 or not x.is_floating_point():
            raise ValueError(f"x must be floating, of shape (..., d), got {x.dtype} of shape {tuple(x.shape)}")
        x = x.detach().reshape(-1, x.shape[-1]).to(_wide(x))
        if len(x):
            variance, mean = torch.var_mean(x, 0, correction=0)
            self._add(len(x), mean, variance * len(x))
        return self

    def merge(self, other: ColumnStats) -> ColumnStats:
        """Take in the rows that `other` saw, which stays as it is."""
        if other.n:
            self._add(other.n, other.mean, other.M2)
        return self

    def _add(self, n: int, mean: Tensor, M2: Tensor) -> None:
        if not self.n:
            self.n, self.mean, self.M2 = n, mean.clone(), M2.clone()
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"rows must have the {len(self.mean)} columns of those before, got {len(mean)}")
        delta, total = mean.to(self.mean.device) - self.mean, self.n + n
        self.mean = self.mean + delta * (n / total)
        self.M2 = self.M2 + M2.to(self.M2.device) + delta**2 * (self.n * n / total)
        self.n = total

    @property
    def variance(self) -> Tensor:
        """F (d,), unbiased. ValueError with fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a variance needs at least 2 rows, got {self.n}")
        return self.M2 / (self.n - 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x_j^2 (d,)."""
        return self.M2 / max(self.n, 1) + self.mean**2


def wifv(W: Tensor, F: Tensor) -> Tensor:
    """``S_j = F_j ||W_:j||^2`` of (2).

    Parameters
    ----------
    W : tensor of shape (d_out, d_in)
    F : tensor of shape (d_in,)

    Examples
    --------
    >>> wifv(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([1.0, 2.0]))
    tensor([25.,  2.])
    """
    return F * torch.linalg.vector_norm(W, dim=0, dtype=torch.promote_types(W.dtype, torch.float32)) ** 2


def column_scores(W: Tensor, stats: ColumnStats, metric: str = "WIFV") -> Tensor:
    """(2): the score of every input column of a linear layer.

    Parameters
    ----------
    W : tensor of shape (d_out, d_in)
    stats : ColumnStats of its inputs
    metric : {"WIFV", "IFV", "WIFN"}

    Returns
    -------
    tensor of shape (d_in,), float64

    Examples
    --------
    >>> W, stats = torch.tensor([[3.0, 1.0], [4.0, 0.0]]), ColumnStats().update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> for metric in ("WIFV", "IFV", "WIFN"):
    ...     print(metric, column_scores(W, stats, metric).numpy().round(3))
    WIFV [50.  0.]
    IFV [2. 0.]
    WIFN [4.95 0.5 ]
    """
    if metric == "WIFV":
        return wifv(W, stats.variance)
    if metric == "IFV":
        return stats.variance
    if metric == "WIFN":
        return W.abs().mean(0, dtype=torch.promote_types(W.dtype, torch.float32)) * stats.mean_square.sqrt()
    raise ValueError(f"metric must be 'WIFV', 'IFV' or 'WIFN', or a function of W and its statistics, got {metric!r}")


def standardize(S: Tensor) -> Tensor:
    """(3): ``(S - mean) / std``, with the unbiased std; zeros where all are equal.

    Examples
    --------
    >>> standardize(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    std = S.std() if len(S) > 1 else S.new_zeros(())
    return (S - S.mean()) / torch.where(std > 0, std, 1.0)


def allocate(scores: Tensor, costs: Tensor, ratio: float) -> Tensor:
    """(5): which units stay. The kept cost is the nearest to (1 - ratio) of all that a prefix by score can have.

    What is kept at a higher ratio is part of what is kept at a lower one. O(n log n).

    Parameters
    ----------
    scores : tensor of shape (n,)
        Higher stays; of equal ones the first. Infinity is allowed, NaN not.
    costs : tensor of shape (n,), > 0
    ratio : float in [0, 1)

    Returns
    -------
    tensor of shape (n,), bool

    Examples
    --------
    >>> allocate(torch.tensor([0.5, 2.0, 1.0, 0.1]), torch.tensor([1, 4, 1, 2]), 0.4).tolist()
    [False, True, True, False]
    """
    check_ratio("ratio", ratio)
    if scores.ndim != 1 or scores.shape != costs.shape:
        raise ValueError(f"scores and costs must be of one shape (n,), got {tuple(scores.shape)}, {tuple(costs.shape)}")
    if bool(scores.isnan().any()) or not bool((costs > 0).all()):
        raise ValueError("scores must not be NaN, and costs must be > 0")
    order = scores.argsort(descending=True, stable=True)
    cost = torch.cat([costs.new_zeros(1), costs[order].cumsum(0)]).to(_wide(costs))  # of the first k = 0 ... n
    k = int((cost - (1 - ratio) * cost[-1]).abs().argmin())
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[order[:k]] = True
    return keep


def compensation(W: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """(6): ``W[:, R] xbar[R]``, what the bias of a layer takes over from the removed columns.

    Parameters
    ----------
    W : tensor of shape (d_out, d_in)
    mean : tensor of shape (d_in,)
    removed : tensor of column numbers, int64, or a mask (d_in,), bool

    Returns
    -------
    tensor of shape (d_out,), of the dtype of mean

    Examples
    --------
    >>> compensation(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0]), torch.tensor([1]))
    tensor([40., 80.])
    """
    return W[:, removed].to(mean.dtype) @ mean[removed]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _metric(metric: str | Metric) -> Metric:
    if callable(metric):
        return metric
    column_scores(torch.ones(1, 1), ColumnStats().update(torch.ones(2, 1)), metric)  # refuses an unknown name
    return lambda W, stats: column_scores(W, stats, metric)


# ---- calibration


@torch.no_grad()
def column_statistics(
    model: Any,
    calibration: Any,
    *,
    tokenizer: Any = None,
    sequence_length: int = 128,
    max_sequences: int = 1024,
    progress: Progress | None = None,
) -> list[ColumnStats]:
    """(1) for all scored layers, by forward passes of the base model in eval mode.

    What `flap_prune` does first. Several machines take their share of the calibration, `ColumnStats.merge` theirs into
    one, and `flap_prune` takes the list for its calibration; one list serves any number of ratios.

    Parameters
    ----------
    model, calibration, tokenizer, sequence_length, max_sequences, progress
        As in `flap_prune`.

    Returns
    -------
    list of ColumnStats
        Of the inputs of attention output and MLP down of the first block, of the second, ...
    """
    check_whole("sequence_length", sequence_length, 2)
    check_whole("max_sequences", max_sequences, 1)
    check_model(model)
    branches = branches_of(model)
    stats = [ColumnStats() for _ in branches]
    mask: Tensor | None = None

    def watch(own: ColumnStats) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            own.update(x if mask is None else x[mask.to(x.device)])

        return hook

    batches, total = batches_of(calibration, model.main_input_name, tokenizer, sequence_length, max_sequences)
    modes = [(module, module.training) for module in model.modules()]
    hooks = [b.consumer.register_forward_pre_hook(watch(s)) for b, s in zip(branches, stats, strict=True)]
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    device = next(model.parameters()).device
    try:
        model.eval()
        for number, batch in enumerate(batches, 1):
            mask = batch.get("attention_mask")
            mask = mask.bool() if mask is not None and mask.ndim == 2 else None
            model.base_model(**{name: tensor.to(device) for name, tensor in batch.items()}, **options)
            if progress is not None:
                progress(min(0.95, 0.95 * number / total) if total else 0.0, f"batch {number}")
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes:
            module.training = training
    if stats[0].n < 2:
        raise ValueError(f"calibration must hold at least 2 tokens, got {stats[0].n}")
    return stats


def _statistics(model: Any, branches: list[Branch], calibration: Any, options: dict[str, Any]) -> list[ColumnStats]:
    """Those given, or collected."""
    if not isinstance(calibration, list) or not calibration or not isinstance(calibration[0], ColumnStats):
        return column_statistics(model, calibration, **options)
    found = [len(stats.mean) for stats in calibration]
    if found != [branch.columns.numel() for branch in branches]:
        raise ValueError(f"calibration must be column_statistics of this model, got some of {found} columns")
    return calibration


# ---- which units stay


def _adaptive(branches: list[Branch], S: list[Tensor], ratio: float, minimum: tuple[int, int]) -> list[Tensor]:
    """AL-AM: (3), (4) and (5), with the best of every layer set apart."""
    scores, protected = [], []
    for branch, values in zip(branches, S, strict=True):
        unit = standardize(values)[branch.columns].mean(1)  # (4)
        best = torch.zeros_like(unit, dtype=torch.bool)
        best[unit.argsort(descending=True, stable=True)[: minimum[branch.kind]]] = True
        scores.append(unit.masked_fill(best, math.inf))
        protected.append(best)
    costs = torch.cat([torch.full((branch.units,), branch.cost) for branch in branches])
    keep = allocate(torch.cat(scores), costs, ratio) | torch.cat(protected)
    return list(keep.split([branch.units for branch in branches]))


def _uniform(branches: list[Branch], S: list[Tensor], ratio: float, minimum: tuple[int, int]) -> list[Tensor]:
    """UL-UM: as many of every layer."""
    attention, mlp = branches[:2]
    if any(
        (branch.units, branch.cost) != (branches[branch.kind].units, branches[branch.kind].cost) for branch in branches
    ):
        raise ValueError(
            "structure 'UL-UM' needs layers of equal sizes, got some that were pruned by layer: use 'AL-AM'"
        )
    heads = min(math.floor(ratio * attention.units + 0.5), max(0, attention.units - minimum[0]))
    cost = ratio * (attention.units * attention.cost + mlp.units * mlp.cost) - heads * attention.cost
    neurons = min(max(0, math.floor(cost / mlp.cost + 0.5)), max(0, mlp.units - minimum[1]))
    kept = []
    for branch, values in zip(branches, S, strict=True):
        order = values[branch.columns].sum(1).argsort(descending=True, stable=True)
        keep = torch.zeros(branch.units, dtype=torch.bool)
        keep[order[: branch.units - (heads, neurons)[branch.kind]]] = True
        kept.append(keep)
    return kept
