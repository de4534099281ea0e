"""The one sampler: any diffusion network, any scheduler, any guider.

diffusers hands a guider the predictions and nothing else. Here a guider may also ask for the latents, the noise levels
and further network calls (`Step`), and every network call is counted. Guiders of diffusers run unchanged.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoestring.guide._levels import from_epsilon, noise_levels, prediction_kind, to_epsilon, to_x0

__all__ = ["SamplerOutput", "Step", "sample"]

Condition = dict[str, Tensor]


@dataclass
class Calls:
    """What a network was asked in a run: rows of a batch, and seconds."""

    rows: int = 0
    seconds: float = 0.0


@dataclass
class Step:
    r"""What a guider may know at a step, and the network to ask.

    Attributes
    ----------
    index, num_inference_steps : int
        This call of the network among those of the run; a solver of second order has two to a step.
    timestep : Tensor of shape ()
    sample : Tensor of shape (B, ...)
        :math:`x_t = \alpha x_0 + \sigma \epsilon`, as the scheduler has it.
    alpha, sigma, alpha_next, sigma_next : float
        Noise levels here, and where the scheduler's step ends.
    kind : {"epsilon", "v_prediction", "sample", "flow"}
        What the network predicts.
    scheduler
        Of diffusers; to be read, not to be stepped.
    conditions : tuple of dict of str to Tensor
        Network arguments over the batch: of the condition, of its absence, of further ones.
    """

    index: int
    num_inference_steps: int
    timestep: Tensor
    sample: Tensor
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    kind: str
    scheduler: Any
    conditions: tuple[Condition, ...]
    network: Callable[[Tensor, Tensor, Condition], Tensor] = field(repr=False)
    scaled: Tensor = field(repr=False)
    calls: Calls = field(default_factory=Calls, repr=False)

    def predict(self, condition: int | Mapping[str, Tensor] = 0, rows: Tensor | None = None) -> Tensor:
        """The network's prediction: one call.

        Parameters
        ----------
        condition : int or mapping
            Index into `conditions`, or network arguments over the rows asked for.
        rows : Tensor, optional
            Index of the batch: only these samples are asked for. Default: all.
        """
        if isinstance(condition, int):
            if condition >= len(self.conditions):
                raise ValueError(
                    f"conditions has {len(self.conditions)} entries, the guider needs one more: "
                    "(condition, its absence or a negative one, further ones)"
                )
            condition = self.conditions[condition]
            if rows is not None:
                condition = {name: value[rows] for name, value in condition.items()}
        began = time.perf_counter()
        scaled = self.scaled if rows is None else self.scaled[rows]
        prediction = self.network(scaled, self.timestep, dict(condition))
        self.calls.seconds += time.perf_counter() - began
        self.calls.rows += len(scaled)
        return prediction

    def to_x0(self, prediction: Tensor, rows: Tensor | None = None) -> Tensor:
        """The clean picture that a prediction stands for."""
        return to_x0(prediction, self._rows(rows), self.alpha, self.sigma, self.kind)

    def to_epsilon(self, prediction: Tensor, rows: Tensor | None = None) -> Tensor:
        """The noise that a prediction stands for."""
        return to_epsilon(prediction, self._rows(rows), self.alpha, self.sigma, self.kind)

    def from_epsilon(self, epsilon: Tensor, rows: Tensor | None = None) -> Tensor:
        """The prediction that stands for a noise."""
        return from_epsilon(epsilon, self._rows(rows), self.alpha, self.sigma, self.kind)

    def _rows(self, rows: Tensor | None) -> Tensor:
        return self.sample if rows is None else self.sample[rows]


@dataclass
class SamplerOutput:
    """What `sample` made, and what it cost.

    Attributes
    ----------
    sample : Tensor of shape (B, ...)
        Pictures, or latents of a latent model.
    num_calls : float
        Network evaluations per sample: CFG over 20 steps has 40, in whatever batches.
    num_steps : int
        Calls of the scheduler.
    seconds, seconds_network, seconds_guider : float
        Of the clock: whole, in the network, and in the guider outside the network. On a GPU the kernels that are still
        running count where they are waited for.
    """

    sample: Tensor
    num_calls: float
    num_steps: int
    seconds: float
    seconds_network: float
    seconds_guider: float


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    scheduler: Any,
    guider: Any,
    latents: Tensor,
    conditions: Sequence[Mapping[str, Any] | Tensor],
    *,
    num_inference_steps: int = 20,
    batch_branches: bool = False,
    generator: torch.Generator | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    callback: Callable[[Step, Tensor, Tensor], None] | None = None,
) -> SamplerOutput:
    """Denoise `latents` with a guider.

    Parameters
    ----------
    model : callable
        ``model(x, timestep, **condition)``, of diffusers (UNets, DiTs) or yours. It may answer with a tensor, a tuple
        or an output of diffusers. Channels beyond those of `latents` are a learnt variance and are left out.
    scheduler
        Of diffusers. It is copied: yours stays as it is.
    guider : diffusers.guiders.BaseGuidance or None
        Of this room or of diffusers. None: the first condition alone.
    latents : Tensor of shape (B, C, H, W)
        Standard normal noise, on the device and in the dtype of the model. The scheduler's first sigma is put on here,
        as the pipelines do.
    conditions : sequence of (mapping of str to Tensor, or Tensor)
        The condition, its absence (or a negative one), further ones: each the network's keyword arguments over the
        batch. An integer tensor is short for ``class_labels``, a floating one for ``encoder_hidden_states``.
    num_inference_steps : int, default 20
    batch_branches : bool, default False
        All conditions of a step in one call of the network: faster on small batches, with more memory.
    generator : torch.Generator, optional
        For schedulers that draw noise.
    step_kwargs : mapping, optional
        Further arguments of ``scheduler.step``, such as ``{"eta": 0.5}``.
    callback : callable, optional
        ``callback(step, prediction, latents_after)`` after every step.

    Raises
    ------
    ValueError
        Conditions of another batch than `latents` or of another width than the model; a guider that needs more
        conditions; no steps; NaN; a scheduler without noise levels; a prediction type that is not known.

    Examples
    --------
    >>> from diffusers.guiders import ClassifierFreeGuidance
    >>> from shoestring import zoo
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> boots, nothing = torch.full((2,), 9), torch.full((2,), 10)
    >>> out = sample(model, scheduler, ClassifierFreeGuidance(2.0), noise, (boots, nothing), num_inference_steps=5)
    >>> tuple(out.sample.shape), out.num_calls
    ((2, 1, 28, 28), 10.0)
    """
    check_run(num_inference_steps, latents)
    named = named_conditions(conditions, latents, model)
    kind = prediction_kind(scheduler)
    if "learned" in str(scheduler.config.get("variance_type", "")):
        raise ValueError(
            f"variance_type {scheduler.config.variance_type!r} of {type(scheduler).__name__} is not supported: "
            "a guided prediction has no variance; use fixed_small"
        )
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    alphas, sigmas = noise_levels(scheduler)
    if hasattr(guider, "set_scheduler"):
        guider.set_scheduler(scheduler)
    arguments = inspect.signature(scheduler.step).parameters
    extra = dict(step_kwargs or {}) | ({"generator": generator} if "generator" in arguments else {})

    began = time.perf_counter()
    calls, in_guider = Calls(), 0.0
    network = network_of(model, latents.shape[1])
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none, and scales no input
    scale_model_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    for index, timestep in enumerate(scheduler.timesteps):
        step = Step(
            index=index,
            num_inference_steps=len(scheduler.timesteps),
            timestep=timestep,
            sample=latents,
            alpha=float(alphas[index]),
            sigma=float(sigmas[index]),
            alpha_next=float(alphas[index + 1]),
            sigma_next=float(sigmas[index + 1]),
            kind=kind,
            scheduler=scheduler,
            conditions=named,
            network=network,
            scaled=scale_model_input(latents, timestep),
            calls=calls,
        )
        before, asked = time.perf_counter(), calls.seconds
        prediction = guided(step, guider, model, batch_branches)
        in_guider += time.perf_counter() - before - (calls.seconds - asked)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if callback is not None:
            callback(step, prediction, latents)
    return SamplerOutput(
        sample=latents,
        num_calls=calls.rows / len(latents),
        num_steps=len(scheduler.timesteps),
        seconds=time.perf_counter() - began,
        seconds_network=calls.seconds,
        seconds_guider=in_guider,
    )


def check_run(num_inference_steps: Any, latents: Tensor) -> None:
    """Raise unless these are a number of steps and finite noise."""
    if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number >= 1, got {num_inference_steps!r}")
    if not bool(latents.isfinite().all()):
        raise ValueError("latents hold NaN or infinity")


def is_between(guider: Any) -> bool:
    """Whether a guider of diffusers is between its `start` and `stop`; so it is before any run."""
    N = guider._num_inference_steps
    return N is None or int(guider._start * N) <= guider._step < int(guider._stop * N)


def guided(step: Step, guider: Any, model: Any, batch_branches: bool = False) -> Tensor:
    """The prediction of one step: the guider's own `predict`, or the way of diffusers."""
    if guider is None:
        return step.predict(0)
    guider.set_state(step=step.index, num_inference_steps=step.num_inference_steps, timestep=step.timestep)
    if hasattr(guider, "set_step"):
        guider.set_step(step)
    if hasattr(guider, "predict"):
        return guider.predict(step)
    try:
        batches = guider.prepare_inputs(
            {name: tuple(condition[name] for condition in step.conditions) for name in step.conditions[0]}
        )
    except IndexError:
        raise ValueError(
            f"{type(guider).__name__} needs more than the {len(step.conditions)} conditions given: "
            "(condition, its absence or a negative one, further ones)"
        ) from None
    asked = [{name: getattr(batch, name) for name in step.conditions[0]} for batch in batches]
    hooked = type(guider).prepare_models is not _plain_prepare()  # it changes the network for each of its calls
    if batch_branches and not hooked and len(asked) > 1:
        together = {name: torch.cat([condition[name] for condition in asked]) for name in asked[0]}
        everyone = torch.arange(len(step.sample), device=step.sample.device).repeat(len(asked))
        for batch, prediction in zip(batches, step.predict(together, everyone).chunk(len(asked)), strict=True):
            guider.prepare_models(model)
            batch.noise_pred = prediction
    else:
        for batch, condition in zip(batches, asked, strict=True):
            guider.prepare_models(model)
            batch.noise_pred = step.predict(condition)
            guider.cleanup_models(model)
    return guider(batches)[0]


def network_of(model: Callable[..., Any], channels: int) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """``network(x, timestep, condition)``: the prediction alone, whatever form the model answers in."""
    of_diffusers = hasattr(model, "config")

    def network(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        arguments: dict[str, Any] = {}
        for name, value in condition.items():  # "added_cond_kwargs.text_embeds" is an entry of a mapping
            outer, _, inner = name.partition(".")
            if inner:
                arguments.setdefault(outer, {})[inner] = value
            else:
                arguments[outer] = value
        if of_diffusers:
            arguments["return_dict"] = False
        answer = model(x, timestep.expand(len(x)), **arguments)
        prediction = answer if isinstance(answer, Tensor) else answer[0]
        return prediction if prediction.shape[1] == channels else prediction[:, :channels]

    return network


def named_conditions(
    conditions: Sequence[Mapping[str, Any] | Tensor], latents: Tensor, model: Any
) -> tuple[Condition, ...]:
    """Conditions as flat mappings, checked against the batch and the model."""
    if isinstance(conditions, Tensor | Mapping) or not conditions:
        raise ValueError("conditions must be a sequence of at least one condition: (condition, its absence, ...)")
    named: list[Condition] = []
    for place, condition in enumerate(conditions):
        if isinstance(condition, Tensor):
            condition = {"encoder_hidden_states" if condition.is_floating_point() else "class_labels": condition}
        flat = _flat(condition)
        for name, value in flat.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"conditions[{place}][{name!r}] must be a tensor, got {type(value).__name__}")
            if len(value) != len(latents):
                raise ValueError(
                    f"conditions[{place}][{name!r}] must have a row for each of the {len(latents)} latents, "
                    f"got {len(value)}"
                )
        if named and flat.keys() != named[0].keys():
            raise ValueError(
                f"conditions[{place}] must have the arguments of conditions[0], {sorted(named[0])}, got {sorted(flat)}"
            )
        named.append(flat)
        width = getattr(getattr(model, "config", None), "cross_attention_dim", None)
        states = flat.get("encoder_hidden_states")
        if states is not None and isinstance(width, int) and states.shape[-1] != width:
            raise ValueError(
                f"conditions[{place}] must have embeddings of the model's width {width}, got {states.shape[-1]}"
            )
        classes = getattr(getattr(model, "config", None), "num_class_embeds", None)
        labels = flat.get("class_labels")
        if labels is not None and classes and not labels.is_floating_point():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                raise ValueError(f"conditions[{place}] must have labels from 0 to {classes - 1}, got {low} to {high}")
    return tuple(named)


def _flat(condition: Mapping[str, Any]) -> Condition:
    flat: Condition = {}
    for name, value in condition.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": part for inner, part in value.items() if part is not None}
        elif value is not None:
            flat[name] = value
    return flat


def _plain_prepare() -> Any:
    from diffusers.guiders.guider_utils import BaseGuidance

    return BaseGuidance.prepare_models
