"""What of each tensor a sub-network of `SortedModel` keeps, worked out once for a model.

Two ways: through ``torch.fx`` for networks that it can trace, following how many units of each tensor are kept; by
layout for transformers models, whose stream keeps its width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shoestring.compress._checks import check_whole

Subnet = dict[str, Any]
Cuts = tuple[tuple[int, int, int], ...]  # (dim, keep, parts) each, as `prefix` takes them


def unit_count(n: int, width: float) -> int:
    """Units that the share `width` of `n` keeps: ``width * n`` rounded to the nearest (halves up), at least 1.

    >>> [unit_count(10, w) for w in (0.01, 0.25, 0.5, 1.0)]
    [1, 3, 5, 10]
    """
    return max(1, math.floor(width * n + 0.5))


def prefix(tensor: Tensor, dim: int, keep: int, parts: int = 1) -> Tensor:
    """The first `keep` entries along `dim`, or of each of `parts` equal parts of it (fused query, key, value).

    A view if ``parts == 1``. The gradient is exactly zero outside.

    >>> import torch
    >>> prefix(torch.arange(6), 0, 2), prefix(torch.arange(6), 0, 1, parts=3)
    (tensor([0, 1]), tensor([0, 2, 4]))
    """
    if parts == 1:
        return tensor.narrow(dim, 0, keep)
    return tensor.unflatten(dim, (parts, -1)).narrow(dim + 1, 0, keep).flatten(dim, dim + 1)


def cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, keep, parts in cuts:
        tensor = prefix(tensor, dim, keep, parts)
    return tensor


@dataclass
class Patch:
    """Of one module: the tensors that are cut, and the sizes that it keeps beside them."""

    cuts: dict[str, Cuts] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """Of one sub-network: patches by module name, how many blocks run if not all, which do not, and its config."""

    patches: dict[str, Patch] = field(default_factory=dict)
    depth: int | None = None
    gone: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def keeps(self, name: str) -> bool:
        """Whether the module of this name runs."""
        return not f"{name}.".startswith(self.gone) if self.gone else True


def make_plans(model: nn.Module, blocks: str, subnets: Sequence[Subnet], transformer: bool) -> list[Plan]:
    """A plan for every sub-network; `blocks` is the name of the list that depth cuts, if any."""
    plans: list[Plan] = []
    graph: fx.Graph | None = None
    for subnet in subnets:
        plan = Plan()
        if "depth" in subnet:
            names = [f"{blocks}.{name}." for name, _ in model.get_submodule(blocks).named_children()]
            plan.gone = tuple(names[subnet["depth"] :])
            plan.depth = subnet["depth"] if plan.gone else None
        if transformer:
            _plan_transformer(plan, model, blocks, subnet)
        elif subnet.get("width", 1.0) < 1:
            graph = graph or _trace(model)
            plan.patches = _traced_patches(model, graph, subnet["width"])
        plan.patches = {name: patch for name, patch in plan.patches.items() if plan.keeps(name)}
        _check_plan(model, plan)
        plans.append(plan)
    return plans


def _layer_patch(layer: Any, keep_in: int | None, keep_out: int | None, parts: int = 1) -> Patch:
    """Of a linear layer, convolution or transformers' Conv1D; None keeps all."""
    swapped = hasattr(layer, "nf")  # Conv1D: weight (in, out)
    names = ("nf", "nx") if swapped else ("out_features", "in_features")
    names = ("out_channels", "in_channels") if isinstance(layer, nn.modules.conv._ConvNd) else names
    patch, cuts = Patch(), []
    if keep_out is not None:
        cuts.append((int(swapped), keep_out, parts))
        patch.sizes[names[0]] = keep_out * parts
        if layer.bias is not None:
            patch.cuts["bias"] = ((0, keep_out, parts),)
    if keep_in is not None:
        cuts.append((1 - int(swapped), keep_in, 1))
        patch.sizes[names[1]] = keep_in
    patch.cuts["weight"] = tuple(cuts)
    return patch


def _norm_patch(norm: nn.Module, size: str, value: Any) -> Patch:
    keep = value if isinstance(value, int) else value[0]
    tensors = [*norm._parameters.items(), *norm._buffers.items()]
    cuts: dict[str, Cuts] = {name: ((0, keep, 1),) for name, tensor in tensors if tensor is not None and tensor.ndim}
    return Patch(cuts, {size: value})


# ---- traced networks

ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.modules.dropout._DropoutNd),
)
POOLS = (
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
MIXING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ELEMENTWISE_NAMES = {  # of functions and methods
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid"),
    *("hardswish", "hardsigmoid", "hardtanh", "softplus", "dropout", "contiguous", "abs", "neg", "clamp"),
}
POOL_NAMES = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
JOIN_NAMES = {"add", "iadd", "add_", "sub", "isub", "mul", "imul", "mul_"}


@dataclass(frozen=True)
class Units:
    """The first `kept` of `full` units of a tensor: "features" of its last axis, "channels" of axis 1 before places,
    or "flat", channels and places in one axis.
    """

    kept: int
    full: int
    kind: str


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(model)
    except Exception as error:  # anything can go wrong in somebody's forward
        raise ValueError(f"width cannot be followed through {type(model).__name__}: {error}") from error


def _traced_patches(model: nn.Module, graph: fx.Graph, width: float) -> dict[str, Patch]:
    heads = _heads(graph, model)
    units: dict[fx.Node, Units | None] = {}
    patches: dict[str, Patch] = {}
    for node in graph.nodes:
        coming = [units[each] for each in node.all_input_nodes]
        units[node] = None
        if node.op == "call_module":
            name = str(node.target)
            patch, units[node] = _module_units(name, model.get_submodule(name), coming, width, name in heads)
            if patches.setdefault(name, patch) != patch:
                raise ValueError(f"{name} is used twice and would be cut in two ways")
        elif any(coming) and node.op != "output":  # what reaches the output comes from heads: whole
            units[node] = _operation_units(node, coming)
    patches = {name: patch for name, patch in patches.items() if patch != Patch()}
    if not patches:
        raise ValueError(f"width cuts nothing in {type(model).__name__}: it has no hidden layer")
    return patches


def _heads(graph: fx.Graph, model: nn.Module) -> set[str]:
    """Layers whose outputs reach the output of the network unmixed: what comes out of them is never cut."""
    heads: set[str] = set()
    seen: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, MIXING) and getattr(module, "groups", 1) == 1:
            heads.add(str(node.target))
        else:
            waiting.extend(node.all_input_nodes)
    return heads


def _module_units(
    name: str, module: Any, coming: list[Units | None], width: float, head: bool
) -> tuple[Patch, Units | None]:
    units = coming[0] if coming else None
    refused = ValueError(f"width cannot be cut through {name} ({type(module).__name__})")
    if len(coming) > 1 and any(coming):
        raise refused
    if isinstance(module, MIXING):
        return _mixing_units(module, units, width, head, refused)
    if units is None:
        return Patch(), None
    if isinstance(module, _BatchNorm):
        return _norm_patch(module, "num_features", _kept(units, module.num_features, refused)), units
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and units.kind != "channels" and len(module.normalized_shape) == 1:
        return _norm_patch(module, "normalized_shape", (_kept(units, module.normalized_shape[0], refused),)), units
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return Patch(), _flat(units)
    if isinstance(module, ELEMENTWISE) or (isinstance(module, POOLS) and units.kind == "channels"):
        return Patch(), units
    raise refused


def _mixing_units(
    module: Any, units: Units | None, width: float, head: bool, refused: ValueError
) -> tuple[Patch, Units | None]:
    linear = isinstance(module, nn.Linear)
    n_in, n_out = (getattr(module, f"{side}_{'features' if linear else 'channels'}") for side in ("in", "out"))
    if units and (units.kind == "channels") == linear:  # it mixes places, not the units that are cut
        raise refused
    keep_in = _kept(units, n_in, refused) if units else None
    if not linear and module.groups > 1:
        if keep_in is None:
            return Patch(), None
        if not module.groups == n_in == n_out:  # not depthwise
            raise refused
        patch = _layer_patch(module, None, keep_in)
        patch.sizes.update(in_channels=keep_in, groups=keep_in)
        return patch, units
    keep_out = None if head else unit_count(n_out, width)
    leaving = None if keep_out is None else Units(keep_out, n_out, "features" if linear else "channels")
    if keep_in is None and keep_out is None:
        return Patch(), None
    return _layer_patch(module, keep_in, keep_out), leaving


def _operation_units(node: fx.Node, coming: list[Units | None]) -> Units | None:
    units = coming[0]
    what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.target in (F.max_pool1d, F.max_pool2d, F.max_pool3d):  # torch names them all "fn"
        what = "max_pool2d"
    if what in JOIN_NAMES and all(each == units for each in coming):
        return units
    if units and len(coming) == 1:
        dims = node.args[1:] or (node.kwargs.get("start_dim", node.kwargs.get("dim")),)
        if what in ELEMENTWISE_NAMES or (what in POOL_NAMES and units.kind == "channels"):
            return units
        if what == "flatten" and dims == (1,):
            return _flat(units)
        spatial = dims[0] in ((2, 3), [2, 3], (-2, -1), [-2, -1], (-1, -2), [-1, -2])
        if (
            what == "mean"
            and units.kind == "channels"
            and spatial
            and len(dims) == 1
            and not node.kwargs.get("keepdim")
        ):
            return Units(units.kept, units.full, "features")
    shown = " and ".join(f"{u.kept} of {u.full} {u.kind}" if u else "something that is not cut" for u in coming)
    raise ValueError(f"width cannot be cut through {node.name} ({what}), which gets {shown}")


def _flat(units: Units) -> Units:
    return Units(units.kept, units.full, "flat") if units.kind == "channels" else units


def _kept(units: Units, n: int, refused: ValueError) -> int:
    """How many of a layer's n inputs belong to the units that are kept."""
    if n == units.full:
        return units.kept
    if units.kind == "flat" and n % units.full == 0:
        return n // units.full * units.kept
    raise refused


# ---- transformers models

Layout = tuple[str, tuple[str, ...], str, tuple[str, ...], str]
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("mlp.gate_proj", "mlp.up_proj")
# Inside a block: the attention, its query, key and value, its output, the first and the last feed-forward layers.
LAYOUTS: tuple[Layout, ...] = (
    ("self_attn", QKV, "self_attn.o_proj", GATED, "mlp.down_proj"),  # Llama and its likes
    ("attention", QKV, "attention.o_proj", ("mlp.fc1",), "mlp.fc2"),  # ViT
    ("attention.self", ("query", "key", "value"), "attention.output.dense", ("intermediate.dense",), "output.dense"),
    ("attn", ("c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),  # GPT-2
)


def _plan_transformer(plan: Plan, model: Any, blocks: str, subnet: Subnet) -> None:
    container = model.get_submodule(blocks)
    depth = subnet.get("depth", len(container))
    if plan.gone:
        plan.config["num_hidden_layers"] = depth
        if isinstance(getattr(model.config, "layer_types", None), list):
            plan.config["layer_types"] = model.config.layer_types[:depth]
    width: Any = subnet.get("width", 1.0)
    heads, ffn = (float(subnet.get(key, width)) for key in ("heads", "ffn"))
    for number in range(depth if (heads, ffn) != (1.0, 1.0) else 0):
        where, block = f"{blocks}.{number}.", container[number]
        attention, inputs, output, ups, down = _layout(where[:-1], block)
        if ffn < 1:
            neurons = unit_count(_n_in(block.get_submodule(down)), ffn)
            for name in ups:
                plan.patches[where + name] = _layer_patch(block.get_submodule(name), None, neurons)
            plan.patches[where + down] = _layer_patch(block.get_submodule(down), neurons, None)
            plan.config["n_inner" if attention == "attn" else "intermediate_size"] = neurons
        if heads == 1.0:
            continue
        module = block.get_submodule(attention)
        size = getattr(module, "head_dim", getattr(module, "attention_head_size", 0))
        for name, other in module.named_modules():  # a norm over all heads would have to be cut as well
            odd = name not in inputs and f"{attention}.{name}" != output
            if odd and any(p.numel() != size for p in other.parameters(recurse=False)):
                raise ValueError(f"width cannot be cut through {where}{attention}.{name} ({type(other).__name__})")
        parts = 3 if len(inputs) == 1 else 1  # fused
        n_heads = _n_in(block.get_submodule(output)) // size
        n_groups = n_heads if parts == 3 else module.get_submodule(inputs[1]).out_features // size
        groups = unit_count(n_groups, heads)
        kept = groups * (n_heads // n_groups)
        for place, name in enumerate(inputs):
            keep = (kept if place == 0 else groups) * size
            plan.patches[f"{where}{attention}.{name}"] = _layer_patch(module.get_submodule(name), None, keep, parts)
        plan.patches[where + output] = _layer_patch(block.get_submodule(output), kept * size, None)
        sizes = {"num_heads": kept, "num_attention_heads": kept}
        sizes.update(all_head_size=kept * size, split_size=kept * size)
        plan.patches[where + attention] = Patch(sizes={k: v for k, v in sizes.items() if k in vars(module)})
        if "q_proj" in inputs:  # these configs can say how wide a head is
            plan.config.update(num_attention_heads=kept, head_dim=size)
            if hasattr(model.config, "num_key_value_heads"):
                plan.config["num_key_value_heads"] = groups


def _layout(where: str, block: nn.Module) -> Layout:
    layers = {name for name, module in block.named_modules() if isinstance(module, nn.Linear) or hasattr(module, "nf")}
    differences = []
    for layout in LAYOUTS:
        attention, inputs, output, ups, down = layout
        odd = layers ^ {*(f"{attention}.{name}" for name in inputs), output, *ups, down}
        if not odd:
            return layout
        differences.append(sorted(odd))
    first = min(differences, key=len)[0]
    raise ValueError(f"width cannot be cut in {where} ({type(block).__name__}): no known layout, see {where}.{first}")


def _n_in(layer: Any) -> int:
    return layer.nx if hasattr(layer, "nx") else layer.in_features


# ---- checks


def checked_spec(spec: Any, transformer: bool) -> dict[str, list[Any]]:
    allowed = ("depth", "width", "heads", "ffn") if transformer else ("depth", "width")
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec must be a mapping such as {{'width': [0.5, 1.0]}}, got {spec!r}")
    odd = [key for key in spec if key not in allowed]
    if odd or not spec or ("width" in spec and len({"heads", "ffn"} & set(spec))):
        raise ValueError(f"spec must have keys of {allowed}, width or else heads and ffn; got {list(spec)}")
    checked = {}
    for key in [key for key in allowed if key in spec]:
        chain = list(spec[key]) if isinstance(spec[key], Sequence) and not isinstance(spec[key], str) else None
        if not chain:
            raise ValueError(f"spec[{key!r}] must be a list of sizes, got {spec[key]!r}")
        if key == "depth":
            chain = [check_whole("spec['depth']", d, 1) for d in chain]
        elif (
            any(isinstance(w, bool) or not isinstance(w, Real) or not 0 < float(w) <= 1 for w in chain)
            or chain[-1] != 1
        ):
            raise ValueError(f"spec[{key!r}] must be shares in (0, 1] that end with 1.0, got {chain}")
        if any(a >= b for a, b in pairwise(chain)):
            raise ValueError(f"spec[{key!r}] must grow, got {chain}")
        checked[key] = chain if key == "depth" else [float(w) for w in chain]
    return checked


def find_blocks(model: Any, blocks: str | None) -> str:
    modules = dict(model.named_modules())
    if blocks is not None:
        if not isinstance(modules.get(blocks), nn.ModuleList | nn.Sequential) or not blocks:
            raise ValueError(f"blocks must name a ModuleList or Sequential inside model, got {blocks!r}")
        return blocks
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not name or any(map(f"{name}.".startswith, found)):
            continue
        alike = len({type(block) for block in module}) == 1 and all(any(True for _ in b.parameters()) for b in module)
        if alike and (len(module) > 1 if layers is None else len(module) == layers):
            found.append(f"{name}.")
    if len(found) != 1:
        shown = ", ".join(name[:-1] for name in found) or "none"
        raise ValueError(f"blocks must name the list of alike blocks that depth cuts; in model there is: {shown}")
    return found[0][:-1]


def check_depth(model: nn.Module, blocks: str, depths: list[int]) -> None:
    container: Any = model.get_submodule(blocks)
    if depths[-1] != len(container):
        raise ValueError(f"spec['depth'] must end with all {len(container)} blocks of {blocks}, got {depths}")
    shapes = [{name: tuple(p.shape) for name, p in block.named_parameters()} for block in container]
    for number in range(depths[0], len(container)):
        if shapes[number] != shapes[depths[0] - 1]:
            raise ValueError(f"depth cannot be cut before {blocks}.{number}: its shapes differ from the block before")


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """That every tensor to be cut is a plain one, and a tied one is cut in one way."""
    ways: dict[int, Cuts] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not plan.keeps(name):
            continue
        cuts = plan.patches.get(name, Patch()).cuts
        for key in cuts:
            if key not in module._parameters and key not in module._buffers:
                raise ValueError(f"{name}.{key} is parametrized and cannot be cut: remove that first")
        for key, tensor in module._parameters.items():
            if tensor is not None and ways.setdefault(id(tensor), cuts.get(key, ())) != cuts.get(key, ()):
                raise ValueError(f"{name}.{key} is tied to a weight that is cut in another way")
