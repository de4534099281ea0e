"""What pdp and nm-decay share: which weights they prune, how they step, and how the zeros become the weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from shoestring._models import check_model

Names = str | Sequence[str]


def prunable(model: nn.Module, target_modules: Names | None = None, exclude: Names = ()) -> dict[str, nn.Module]:
    """Layers by name whose ``weight`` can be pruned: linear layers, convolutions and transformers' Conv1D.

    Weights that need no gradient, and those that another module holds too (tied embeddings), are left alone.

    Parameters
    ----------
    model : nn.Module
    target_modules : str or sequence of str, optional
        As in peft: a string is a regular expression that names match in full; of a sequence, each is a whole name or
        its last parts. None: all.
    exclude : str or sequence of str
        The same, for what to leave out.

    Raises
    ------
    ValueError
        If nothing is left, a name of `target_modules` is no layer that can be pruned, or a weight is parametrized
        already; if the model holds NaN or is on the meta device.
    """
    check_model(model)
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        if not _is_layer(module):
            continue
        if is_parametrized(module, "weight"):
            if _matches(name, target_modules) and not (exclude and _matches(name, exclude)):
                raise ValueError(f"model must hold plain weights, got a parametrized one in {name}")
            continue
        weight = module.weight
        if isinstance(weight, nn.Parameter) and weight.requires_grad and holders[id(weight)] == 1 and weight.numel():
            found[name] = module
    if target_modules is not None and not isinstance(target_modules, str):
        unknown = [target for target in target_modules if not any(_matches(name, [target]) for name in found)]
        if unknown:
            raise ValueError(f"target_modules must name trainable linear layers or convolutions, got {unknown[0]!r}")
    chosen = {
        name: module
        for name, module in found.items()
        if _matches(name, target_modules) and not (exclude and _matches(name, exclude))
    }
    if not chosen:
        raise ValueError(
            "model must have a trainable linear layer or convolution to prune, got none "
            f"with target_modules={target_modules!r}, exclude={exclude!r}"
        )
    return chosen


def out_in(module: nn.Module) -> tuple[int, int]:
    """Dimensions of the outputs and of the inputs in a layer's weight."""
    return (1, 0) if hasattr(module, "nf") else (0, 1)


def keep_largest(a: Tensor, kept: int, dim: int | None = None) -> Tensor:
    """True at the `kept` largest entries of `a`, of all or along `dim`; exactly as many, whatever the ties.

    Examples
    --------
    >>> keep_largest(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2)
    tensor([False,  True,  True, False])
    >>> int(keep_largest(torch.zeros(4), 2).sum())
    2
    """
    if dim is None:
        return keep_largest(a.flatten(), kept, 0).view_as(a)
    if kept >= a.shape[dim]:
        return torch.ones_like(a, dtype=torch.bool)
    # argmax is three times as fast as topk of one
    index = a.argmax(dim, keepdim=True) if kept == 1 else a.topk(kept, dim).indices
    return torch.zeros_like(a, dtype=torch.bool).scatter_(dim, index, True)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Masks are computed in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Controller:
    """A parametrization on every chosen weight, stepped like a learning-rate scheduler.

    Attributes
    ----------
    model : nn.Module
    layers : dict of str to nn.Module
        The pruned layers by name; empty before they are parametrized.
    steps : int
        Optimizer steps done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, 0
        self.layers: dict[str, nn.Module] = {}
        self._orders: dict[str, list[str]] = {}
        self._finalized = False

    # What a method fills in: `_update` sets the buffers for `steps`, `_kept` is the hard mask of `finalize`.
    def _update(self) -> None:
        raise NotImplementedError

    def _kept(self, name: str) -> Tensor:
        raise NotImplementedError

    def step(self) -> None:
        """Go on by one optimizer step; call it after ``optimizer.step()``.

        Raises
        ------
        RuntimeError
            If there is nothing attached, or it is finalized.
        """
        self._check_attached("step")
        self.steps += 1
        with torch.no_grad():
            self._update()

    def __call__(self, state: Any = None) -> None:
        """`step`, as a callback of `shoestring.loop.fit`."""
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """What is not in the model's own state dict, which holds thresholds and masks: save and load both."""
        return {"steps": self.steps, "layers": list(self.layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises
        ------
        ValueError
            If it is of other layers; nothing is changed then.
        """
        self._check_attached("load_state_dict")
        if list(state["layers"]) != list(self.layers):
            raise ValueError(f"state must be of the layers {list(self.layers)}, got {list(state['layers'])}")
        self.steps = int(state["steps"])

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Make the zeros exact and take the parametrization off: what is left is the plain model, returned.

        The parameters are the same objects as ever, so that an optimizer may go on with them.
        """
        self._check_attached("finalize")
        for name, module in self.layers.items():
            kept = self._kept(name)
            original = self.original(name)
            original.copy_(torch.where(kept, original, 0))  # where, not *: no -0.0
            _take_off(module, self._orders[name])
        self._finalized = True
        return self.model

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that steps, saves and restores this controller, and finalizes at the end.

        Raises
        ------
        ImportError
            Without transformers.

        Examples
        --------
        >>> Trainer(model, arguments, train_dataset=rows, callbacks=[controller.callback()])  # doctest: +SKIP
        """
        return _trainer_callback(self)

    def original(self, name: str) -> Tensor:
        """The dense weight under the parametrization."""
        return self.layers[name].parametrizations["weight"].original  # type: ignore[union-attr, index]

    def parametrization(self, name: str) -> Any:
        """The module that is registered on the weight of layer `name`."""
        return self.layers[name].parametrizations["weight"][0]  # type: ignore[index]

    def _parametrize(self, layers: dict[str, nn.Module], parametrizations: Mapping[str, nn.Module]) -> None:
        for name, module in layers.items():
            self._orders[name] = list(module._parameters)
            # unsafe: a parametrization of ours keeps shape and dtype, and the check would run it thrice
            register_parametrization(module, "weight", parametrizations[name], unsafe=True)
        self.layers = layers

    def _check_attached(self, what: str) -> None:
        if self._finalized or not self.layers:
            raise RuntimeError(f"{what}() needs attached layers: " + ("finalized" if self._finalized else "attach()"))


def to_semi_structured(
    model: nn.Module, target_modules: Names | None = None, exclude: Names = (), *, inplace: bool = False
) -> nn.Module:
    """Replace the weights of linear layers, 2:4 sparse already, by torch's semi-structured sparse tensors.

    On the GPU they take little more than half of the memory and their products run on the sparse tensor cores. For
    inference: the new parameters need no gradient. This project had no GPU: what is checked here are the refusals.

    Parameters
    ----------
    model : nn.Module
        On a CUDA device, after ``finalize()``. Its dtype must be one that torch supports there (float16, bfloat16).
    target_modules, exclude : str or sequence of str
        As in peft: a regular expression, or names and last parts of names. Convolutions have no such format and have
        to be left out by name.
    inplace : bool, default False
        False: a deep copy is converted.

    Raises
    ------
    ValueError
        If a layer is not on a CUDA device, is no `torch.nn.Linear`, or has a group of four with three non-zeros; it is
        named and the model is as before.
    """
    layers = prunable(model, target_modules, exclude)
    for name, module in layers.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not isinstance(module, nn.Linear):
            raise ValueError(f"semi-structured tensors need torch.nn.Linear, got {type(module).__name__} in {name}")
        if weight.shape[1] % 4 or bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).any()):
            raise ValueError(f"semi-structured tensors need 2:4 sparse weights, got other ones in {name}")
        if weight.device.type != "cuda":
            raise ValueError(f"semi-structured tensors need a CUDA device, got {weight.device} in {name}")
    model = model if inplace else copy.deepcopy(model)
    for name in layers:
        module = model.get_submodule(name)
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())  # type: ignore[operator]
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)):
        return True
    weight = getattr(module, "weight", None)  # transformers' Conv1D, weight (in, out)
    return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def _matches(name: str, wanted: Names | None) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith("." + each) for each in wanted)


def _take_off(module: nn.Module, order: Sequence[str]) -> None:
    """Remove the parametrization; parameters come back in the order they had."""
    # A deep copy shares the class that torch has made, and torch takes the property `weight` off that class: without a
    # class of its own, the copy's weight would vanish with this one's.
    cls = type(module)
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, namespace)
    remove_parametrizations(module, "weight", leave_parametrized=False)
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({name: parameters.pop(name) for name in order if name in parameters} | parameters)


def _trainer_callback(controller: Controller) -> Any:
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState
    except ImportError as error:
        raise ImportError("callback() needs transformers: pip install 'shoestring[text]'") from error

    class PruningCallback(TrainerCallback, ExportableState):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # On resuming, the Trainer restores callbacks only if told so; their states are here in any case.
            saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
            if saved is not None:
                controller.load_state_dict(saved["attributes"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            controller.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            controller.finalize()

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": controller.state_dict()}

    return PruningCallback()
