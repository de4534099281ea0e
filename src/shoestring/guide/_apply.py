"""A guider inside a classic pipeline, for as long as a ``with`` lasts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shoestring.guide._levels import noise_levels, prediction_kind
from shoestring.guide._sampler import Calls, Condition, Step, _flat, guided, network_of

__all__ = ["apply"]


@contextmanager
def apply(pipe: Any, guider: Any, *, auxiliary: Sequence[str] = (), batch_branches: bool = False) -> Iterator[Calls]:
    """Let `guider` guide a classic pipeline in place of its own classifier-free guidance.

    The network's and the scheduler's methods are wrapped while the block runs, and are as before after it, errors
    included. The pipeline must guide (``guidance_scale`` above 1; its value does not matter), as it then brings the
    unconditional, or negative, embedding along. Guiders of diffusers work as well as those of this room.

    Parameters
    ----------
    pipe : diffusers pipeline
        With a `unet`, a `scheduler` and `encode_prompt`: StableDiffusionPipeline, StableDiffusionXLPipeline.
    guider : diffusers.guiders.BaseGuidance
    auxiliary : sequence of str, optional
        Further prompts, each for the whole batch, for guiders that take them (Perp-Neg).
    batch_branches : bool, default False
        As of `shoestring.guide.sample`; the pipeline by itself asks for both branches in one call.

    Yields
    ------
    Calls
        `rows` and `seconds` of the network in the last run.

    Raises
    ------
    TypeError
        If the pipeline has no unet.
    ValueError
        From the pipeline's call, if it does not guide; from the guider.

    Examples
    --------
    >>> from diffusers.guiders import ClassifierFreeGuidance
    >>> from shoestring import zoo
    >>> pipe = zoo.load("tiny-t2i")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> with apply(pipe, ClassifierFreeGuidance(3.0)) as calls:
    ...     picture = pipe("a large red bag", num_inference_steps=4).images[0]
    >>> picture.size, calls.rows
    ((32, 32), 8)
    """
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, torch.nn.Module):
        raise TypeError(f"pipe must have a unet, got {type(pipe).__name__}: use shoestring.guide.sample for it")
    if isinstance(auxiliary, str):
        raise TypeError(f"auxiliary must be a sequence of prompts, got the string {auxiliary!r}")
    run = _Run(pipe, guider, tuple(auxiliary), batch_branches)
    with (
        _replaced(unet, "forward", run.forward),
        _replaced(pipe.scheduler, "set_timesteps", run.set_timesteps),
        _replaced(pipe.scheduler, "scale_model_input", run.scale_model_input),
    ):
        yield run.calls


class _Run:
    """Stands between a pipeline, its network and its scheduler."""

    def __init__(self, pipe: Any, guider: Any, auxiliary: tuple[str, ...], batch_branches: bool):
        self.pipe, self.guider, self.auxiliary, self.batch_branches = pipe, guider, auxiliary, batch_branches
        self.calls = Calls()
        self.original_forward = pipe.unet.forward
        self.original_set_timesteps = pipe.scheduler.set_timesteps
        self.original_scale = pipe.scheduler.scale_model_input
        self.raw: Tensor | None = None
        self.index = 0
        self.levels: tuple[Tensor, Tensor] | None = None
        self.extra: tuple[Condition, ...] = ()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """A new run begins."""
        self.original_set_timesteps(*args, **kwargs)
        self.index, self.levels, self.extra = 0, None, ()
        self.calls.rows, self.calls.seconds = 0, 0.0

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keeps the sample as the scheduler has it."""
        self.raw = sample
        return self.original_scale(sample, *args, **kwargs)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        """The guided prediction, twice: the pipeline's own guidance then leaves it as it is."""
        if not self.pipe.do_classifier_free_guidance or self.raw is None or len(self.raw) != len(sample):
            raise ValueError(
                "the pipeline must guide for the guider to have the unconditional embedding: "
                "call it with guidance_scale above 1 (its value does not matter)"
            )
        scheduler = self.pipe.scheduler
        if self.levels is None:
            self.levels = noise_levels(scheduler)
            if hasattr(self.guider, "set_scheduler"):
                self.guider.set_scheduler(scheduler)
        scaled, raw = sample.chunk(2)[1], self.raw.chunk(2)[1]
        added = kwargs.pop("added_cond_kwargs", None)
        return_dict = kwargs.pop("return_dict", True)
        network_kwargs = {name: value for name, value in kwargs.items() if value is not None}
        both = _flat({"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added})
        halves = {name: value.chunk(2) for name, value in both.items()}
        condition: Condition = {name: half[1] for name, half in halves.items()}
        absent: Condition = {name: half[0] for name, half in halves.items()}
        if self.auxiliary and not self.extra:
            self.extra = tuple(self._encoded(prompt, condition) for prompt in self.auxiliary)

        def unet(x: Tensor, t: Tensor, **arguments: Any) -> Any:
            return self.original_forward(x, t, **network_kwargs, **arguments, return_dict=False)

        alphas, sigmas = self.levels
        step = Step(
            index=self.index,
            num_inference_steps=len(scheduler.timesteps),
            timestep=torch.as_tensor(timestep, device=sample.device),
            sample=raw,
            alpha=float(alphas[self.index]),
            sigma=float(sigmas[self.index]),
            alpha_next=float(alphas[self.index + 1]),
            sigma_next=float(sigmas[self.index + 1]),
            kind=prediction_kind(scheduler),
            scheduler=scheduler,
            conditions=(condition, absent, *self.extra),
            network=network_of(unet, raw.shape[1]),
            scaled=scaled,
            calls=self.calls,
        )
        self.index += 1
        prediction = torch.cat([guided(step, self.guider, self.pipe.unet, self.batch_branches)] * 2)
        if not return_dict:
            return (prediction,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=prediction)

    def _encoded(self, prompt: str, like: Condition) -> Condition:
        """A further prompt as network arguments over the batch."""
        rows = len(like["encoder_hidden_states"])
        answer = self.pipe.encode_prompt(
            prompt, device=self.pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        encoded = dict(like)  # time_ids of SDXL are those of the picture
        encoded["encoder_hidden_states"] = answer[0].expand(rows, -1, -1)
        if "added_cond_kwargs.text_embeds" in like:
            encoded["added_cond_kwargs.text_embeds"] = answer[2].expand(rows, -1)
        return encoded


@contextmanager
def _replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """A method of an object replaced for a while; what the instance itself held (hooks of accelerate) comes back."""
    held = vars(owner).get(name)

    @functools.wraps(getattr(owner, name))  # pipelines look at signatures
    def call(*args: Any, **kwargs: Any) -> Any:
        return new(*args, **kwargs)

    vars(owner)[name] = call
    try:
        yield
    finally:
        if held is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = held
