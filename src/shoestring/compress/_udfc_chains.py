"""Which channels of a traced network can be pruned: where they go between their convolution and what reads them."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized


class Chain(NamedTuple):
    """A convolution whose channels can be pruned, what belongs to the same channels, and what reads them.

    Attributes
    ----------
    layers : list of (name of a convolution, name of its batch norm or None)
        The convolution, then any depthwise ones behind it.
    consumers : list of str
        Convolutions and linear layers that are rewritten.
    """

    layers: list[tuple[str, str | None]]
    consumers: list[str]


def chains(model: nn.Module, example_inputs: Any = None) -> tuple[list[Chain], dict[str, str]]:
    """What `udfc_compress` rewrites in a model, and which convolutions it leaves alone, with the reason.

    Parameters
    ----------
    model, example_inputs
        As in `udfc_compress`. The model is not changed.

    Returns
    -------
    found : list of Chain
        In forward order.
    refused : dict of str to str
        Reason by name of the convolution.

    Raises
    ------
    ValueError
        If the model has layer norms, or `torch.fx` cannot trace it.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> chains(net)
    ([Chain(layers=[('0', None)], consumers=['2'])], {'2': 'its channels are an output of the model'})
    """
    found, refused, _ = analyse(model, example_inputs)
    return found, refused


def analyse(model: nn.Module, example_inputs: Any) -> tuple[list[Chain], dict[str, str], list[str]]:
    """`chains`, and all Conv2d and Linear in forward order."""
    graph = _graph(model, example_inputs)
    modules = dict(model.named_modules())
    uses = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    uses.update(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    tied = {
        name for name, module in modules.items() if any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
    }
    alone = {name for name in modules if uses[name] == 1} - tied
    found: list[Chain] = []
    refused: dict[str, str] = {}
    order: list[str] = []
    for node in graph.nodes:
        name = str(node.target)
        module = modules[name] if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d | nn.Linear) or name in order:
            continue
        order.append(name)
        if is_parametrized(module) or module._parameters.get("weight") is None:
            raise ValueError(f"layer {name} has a parametrization: make it a plain weight first")
        if isinstance(module, nn.Conv2d) and not _is_depthwise(module, module.in_channels):
            answer = _follow(node, modules, alone)
            if isinstance(answer, Chain):
                found.append(answer)
            else:
                refused[name] = answer
    return found, refused, order


def _follow(head: fx.Node, modules: dict[str, nn.Module], alone: set[str]) -> Chain | str:
    """The chain of a convolution, or why there is none."""
    conv: Any = modules[str(head.target)]
    N = conv.out_channels
    layers: list[tuple[str, str | None]] = [(str(head.target), None)]
    consumers: list[str] = []
    if head.target not in alone:
        return "it is used in more than one place"
    if conv.groups > 1:
        return f"its {conv.groups} groups of filters see different inputs"
    last = head  # the last convolution of the chain
    todo = [(head, False)]  # what carries its channels, and whether they are blocks of a flat vector there
    while todo:
        node, flat = todo.pop()
        for user in node.users:
            name = str(user.target)
            module = modules[name] if user.op == "call_module" else None
            if user.op == "output":
                return "its channels are an output of the model"
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if node is not last or len(node.users) > 1 or name not in alone:
                    return f"its channels go into {name}, a batch norm that does not directly follow one convolution"
                if module.running_mean is None:
                    return f"its batch norm {name} has no running statistics"
                layers[-1] = (layers[-1][0], name)
                todo.append((user, flat))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                if name not in alone:
                    return f"its channels go into {name}, which is used in more than one place"
                if _is_depthwise(module, N):
                    if todo or consumers or len(node.users) > 1:
                        return f"its channels branch before the depthwise {name}"
                    layers.append((name, None))
                    last = user
                    todo.append((user, flat))
                elif isinstance(module, nn.Conv2d) and module.groups > 1:
                    return f"its channels go into {name}, a convolution of {module.groups} groups"
                elif isinstance(module, nn.Linear) and (not flat or module.in_features % N):
                    return f"its channels go into {name}, a linear layer over other dimensions"
                else:
                    consumers.append(name)
            elif _asks_batch_size(user):
                continue
            elif (passes := _passes(user, module)) is not None:
                todo.append((user, flat or passes == "flattens"))
            else:
                called = getattr(user.target, "__name__", name)
                what = called if module is None else f"{name} ({type(module).__name__})"
                if user.target in _SUMS:
                    what += ", a residual stream"
                return f"its channels go into {what}"
    return Chain(layers, consumers) if consumers else "nothing reads its channels"


_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PASSING = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_PASSING_FUNCTIONS = {
    *(torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.leaky_relu, "relu", "relu_", "contiguous"),
    *(F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(torch.max_pool2d, torch.dropout),
}


def _passes(node: fx.Node, module: nn.Module | None) -> str | None:
    """Whether channels stay what they are, "passes", or become blocks of a flat vector, "flattens"."""
    if module is not None:
        if isinstance(module, nn.Flatten):
            return "flattens" if (module.start_dim, module.end_dim) == (1, -1) else None
        return "passes" if isinstance(module, _PASSING) else None
    if node.target in _PASSING_FUNCTIONS:
        return "passes"
    rest = (*node.args[1:], *node.kwargs.values())
    if node.target in (torch.flatten, "flatten"):
        return "flattens" if rest in ((1,), (1, -1)) else None
    if node.target in ("view", "reshape", torch.reshape):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return "flattens" if len(shape) == 2 and shape[1] == -1 else None
    if node.target in (torch.mean, "mean"):
        over = rest[0] if rest and isinstance(rest[0], tuple | list) else ()
        if sorted(axis % 4 for axis in over) == [2, 3]:
            return "passes" if True in rest[1:] else "flattens"
    return None


def _asks_batch_size(node: fx.Node) -> bool:
    if node.target == "size":
        return node.args[1:] == (0,)
    shape = node.target is getattr and node.args[1:] == ("shape",)
    return shape and all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _is_depthwise(module: nn.Module, N: int) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels == N > 1


class _Tracer(fx.Tracer):
    """Layers stay whole, those derived from torch's as well; a branch is decided by the values of an example."""

    def __init__(self, example: Sequence[Any]) -> None:
        super().__init__()
        self.example = example
        self.values: dict[fx.Node, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.value(obj.node))

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
            self.values[node] = self._compute(node, args, kwargs)
        return self.values[node]

    def _compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            place = [other for other in node.graph.nodes if other.op == "placeholder"].index(node)
            return self.example[place]
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        raise fx.proxy.TraceError(f"a branch depends on what comes out of {node.target}")


def _graph(model: nn.Module, example_inputs: Any) -> fx.Graph:
    for name, module in model.named_modules():
        if isinstance(module, _OTHER_NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
            raise ValueError(
                f"layer {name} is a {type(module).__name__}: it has no running statistics that could be folded into "
                "the weights, as udfc needs (batch norm, or none)"
            )

    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if example_inputs is None and first is not None:
        example_inputs = first.weight.new_zeros(1, first.in_channels, 64, 64)
    example = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    concrete = {p.name: p.default for p in parameters if p.default is not p.empty}
    if "return_dict" in concrete:  # transformers: a tuple, not an object that looks into what it is given
        concrete["return_dict"] = False
    with _evaluating(model):
        try:
            return _Tracer(example).trace(model, concrete or None)
        except Exception as error:
            raise ValueError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error


_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
