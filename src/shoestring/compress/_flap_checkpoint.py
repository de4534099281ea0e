"""What config.json says of a model that FLAP pruned, and the classes that read it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers

from shoestring.compress._flap_layouts import (
    HEADS,
    LAYOUTS,
    NEURONS,
    PREFIX,
    Branch,
    add_to_bias,
    branches_of,
    count,
    shrink,
)


def describe(model: Any) -> None:
    """Make the config describe the model: by the fields of its own type if these can, else as `_Pruned`."""
    branches = branches_of(model)
    heads, neurons = ([branch.units for branch in branches if branch.kind == kind] for kind in (HEADS, NEURONS))
    if not isinstance(model, _Pruned):
        if len({*heads}) == len({*neurons}) == 1 and _plain(model, branches[0], neurons[0]):
            return
        cls = pruned_class(type(model))
        model.config.__class__ = cls.config_class
        model.__class__ = cls
    model.config.flap_heads, model.config.flap_neurons = heads, neurons
    model.config.flap_bias = all(branch.consumer.bias is not None for branch in branches)


def _plain(model: Any, attention: Branch, neurons: int) -> bool:
    """Try the fields of the model's own config; biases it must have beside ours become zeros."""
    config, dim = copy.deepcopy(model.config), attention.head_dim
    fields = {
        "num_attention_heads": attention.columns.numel() // dim,
        "num_key_value_heads": attention.units,
        "head_dim": dim,
        "intermediate_size": neurons,
        "n_inner": neurons,
    }
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if attention.consumer.bias is not None:
        fields |= {"attention_bias": True, "mlp_bias": True}
    fields = {name: value for name, value in fields.items() if hasattr(config, name) or name == "head_dim"}
    try:
        config = type(config).from_dict({**config.to_dict(), **fields})
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = type(model)(config)
        size = branches_of(twin)[0].head_dim
    except Exception:  # transformers' own refusal, of whatever type: say, heads that do not divide the width
        return False
    wanted = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    extra = [name for name in wanted if name not in own]
    if size != dim or any(wanted.get(name) != shape for name, shape in own.items()):
        return False
    if not all(name.endswith(".bias") for name in extra):
        return False
    for name in extra:
        add_to_bias(model.get_submodule(name.removesuffix(".bias")))
    for name, value in fields.items():
        setattr(model.config, name, value)
    return True


_SUBCLASSES: dict[Any, Any] = {}


class _Pruned:
    """What the subclasses add: layers of the sizes that the config lists."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        counts = (getattr(config, "flap_heads", None), getattr(config, "flap_neurons", None))
        for i, branch in enumerate(branches_of(self)):
            listed = counts[branch.kind]
            if listed is not None:
                shrink(branch, count(branch.units) < listed[i // 2])
            if getattr(config, "flap_bias", False):
                add_to_bias(branch.consumer)


def pruned_class(cls: Any) -> Any:
    """The subclass of a model class that reads per-layer counts from its config."""
    return _subclass(cls, (_Pruned, cls), lambda: {"config_class": pruned_config(cls.config_class)})


def pruned_config(cls: Any) -> Any:
    return _subclass(cls, (cls,), lambda: {"model_type": PREFIX + cls.model_type})


def _subclass(cls: Any, bases: tuple[Any, ...], members: Callable[[], dict[str, Any]]) -> Any:
    if cls not in _SUBCLASSES:
        name = f"Flap{cls.__name__}"
        _SUBCLASSES[cls] = globals()[name] = type(name, bases, {**members(), "__module__": __name__})  # pickle looks
    return _SUBCLASSES[cls]


def register() -> None:
    """Let the Auto classes of transformers read folders of pruned models."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    autos = ("", "ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
    for kind in LAYOUTS:
        if kind not in CONFIG_MAPPING:
            continue
        config = CONFIG_MAPPING[kind]
        pruned = pruned_config(config)
        transformers.AutoConfig.register(pruned.model_type, pruned, exist_ok=True)
        for task in (*autos, "ForQuestionAnswering", "ForImageClassification"):
            auto = getattr(transformers, f"AutoModel{task}")
            if config in auto._model_mapping:
                model = auto._model_mapping[config]
                if not isinstance(model, tuple | list):
                    auto.register(pruned, pruned_class(model), exist_ok=True)
