"""Where FLAP's units are in each architecture of transformers, and how they are cut out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring.compress._saved import resize_


@dataclass(frozen=True)
class Layout:
    """Names in an architecture: the list of blocks in the base model, and what is in a block."""

    blocks: str
    attention: str  # the module that knows the size of a head
    qkv: tuple[str, ...]  # one name: fused
    out: str
    up: tuple[str, ...]
    down: str
    by_head: bool = False  # fused as q, k, v of the first head, of the second, ... and not as all q, all k, all v


_LLAMA = Layout(
    "layers",
    "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
_BERT = Layout(
    "encoder.layer",
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Layout("h", "attn", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "gpt_neox": Layout(
        "layers",
        "attention",
        ("attention.query_key_value",),
        "attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
        by_head=True,
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "vit": Layout(
        "layers",
        "attention",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        ("mlp.fc1",),
        "mlp.fc2",
    ),
}
PREFIX = "shoestring.compress.flap:"
HEADS, NEURONS = 0, 1


@dataclass
class Branch:
    """Heads or neurons of one block: the rows that make each and the columns that read it."""

    name: str
    kind: int  # HEADS or NEURONS
    producers: list[tuple[Any, Tensor]]  # linear layers, with rows (units, rows of a unit)
    consumer: Any
    columns: Tensor  # (units, columns of a unit)
    attention: nn.Module | None = None
    head_dim: int = 0

    @property
    def units(self) -> int:
        return len(self.columns)

    @property
    def cost(self) -> int:
        """Parameters that go with a unit."""
        made = sum(rows.shape[1] * (matrix(m).shape[1] + (m.bias is not None)) for m, rows in self.producers)
        return made + self.columns.shape[1] * len(matrix(self.consumer))


def branches_of(model: Any) -> list[Branch]:
    """Attention and MLP of every block, in turn."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    kind = str(model.config.model_type).removeprefix(PREFIX)
    if kind not in LAYOUTS:
        raise ValueError(f"model must be of type {', '.join(LAYOUTS)}, got {kind or type(model).__name__!r}")
    layout, base = LAYOUTS[kind], model.base_model
    try:
        blocks: Any = base.get_submodule(layout.blocks)
        return [branch for i, block in enumerate(blocks) for branch in _of_block(f"{layout.blocks}.{i}", block, layout)]
    except AttributeError as error:
        version = transformers.__version__
        raise ValueError(f"{kind} is laid out otherwise in transformers {version} than in 5.24: {error}") from error


def _of_block(name: str, block: nn.Module, layout: Layout) -> Iterator[Branch]:
    attention, out, down = (block.get_submodule(path) for path in (layout.attention, layout.out, layout.down))
    sizes = (getattr(attention, size, None) for size in ("head_dim", "head_size", "attention_head_size"))
    head_dim = next(size for size in sizes if size)
    qkv = [block.get_submodule(path) for path in layout.qkv]
    if len(qkv) == 1:
        rows = count(len(matrix(qkv[0])))
        if layout.by_head:
            parts = [rows.view(-1, 3 * head_dim)]
        else:
            parts = [rows.view(3, -1, head_dim).transpose(0, 1).flatten(1)]
    else:
        groups = len(matrix(qkv[1])) // head_dim
        parts = [count(len(matrix(part))).view(groups, -1) for part in qkv]
    columns = count(matrix(out).shape[1]).view(len(parts[0]), -1)
    yield Branch(f"{name}.{layout.out}", HEADS, list(zip(qkv, parts, strict=True)), out, columns, attention, head_dim)
    neurons = count(matrix(down).shape[1])[:, None]
    up = [(block.get_submodule(path), neurons) for path in layout.up]
    yield Branch(f"{name}.{layout.down}", NEURONS, up, down, neurons)


def count(n: int) -> Tensor:
    """0 to n - 1, also while transformers builds models on the meta device."""
    return torch.arange(n, device="cpu")


def matrix(module: Any) -> Tensor:
    """The weights of a layer as (out, in)."""
    if isinstance(module, Conv1D):  # GPT-2's, (in, out)
        return module.weight.T
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if (
        not isinstance(module, nn.Linear)
        or tuple(module.weight.shape) != shape
        or not module.weight.is_floating_point()
    ):
        raise ValueError(f"layers must be plain linear ones, got {module}: prune before quantising or adding adapters")
    return module.weight


# ---- surgery


def shrink(branch: Branch, keep: Tensor) -> None:
    """Rows and columns of the units that stay; keep is (units,), bool."""
    for module, rows in branch.producers:
        _select_(module, 0, rows[keep].flatten().sort().values)
    _select_(branch.consumer, 1, branch.columns[keep].flatten())
    attention, dim = branch.attention, branch.head_dim
    if attention is not None:
        groups, heads = int(keep.sum()), branch.columns[keep].numel() // dim
        sizes = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": groups}
        for name, size in (sizes | {"all_head_size": heads * dim, "split_size": heads * dim}).items():
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, size)


def _select_(module: Any, dim: int, index: Tensor) -> None:
    """Keep these rows (dim 0) or columns (dim 1) of a layer, and of its bias those of its rows."""
    index = index.to(module.weight.device)
    kept = {"weight": module.weight.detach().index_select(1 - dim if isinstance(module, Conv1D) else dim, index)}
    if dim == 0 and module.bias is not None:
        kept["bias"] = module.bias.detach().index_select(0, index)
    resize_(module, {name: tuple(tensor.shape) for name, tensor in kept.items()})
    for name, tensor in kept.items():
        getattr(module, name).data.copy_(tensor)


def mask_(branch: Branch, keep: Tensor) -> None:
    """Zeros in place of what `shrink` removes. The columns alone would do."""
    for module, rows in branch.producers:
        gone = rows[~keep].flatten().to(module.weight.device)
        matrix(module).data[gone] = 0
        if module.bias is not None:
            module.bias.data[gone] = 0
    matrix(branch.consumer).data[:, branch.columns[~keep].flatten().to(branch.consumer.weight.device)] = 0


def add_to_bias(module: Any, extra: Tensor | None = None) -> None:
    """Add `extra` (out,) to the bias, which is made of zeros where there is none."""
    if getattr(module, "bias", None) is None:
        resize_(module, {"bias": (len(matrix(module)),)})
        module.bias.data.zero_()
    if extra is not None:
        module.bias.data.copy_(module.bias.data.to(extra) + extra)
