"""What the methods on diffusers UNets share: conditions as rows, the noise whatever the network predicts, DDIM."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoestring._models import check_model

Condition = int | Sequence[int] | Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_diffusion(unet: Any, scheduler: Any) -> None:
    """Raise unless these are a denoiser and a scheduler of the variance-preserving kind that belong together."""
    check_model(unet)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor) or alphas.ndim != 1:
        raise TypeError(f"scheduler must be a diffusers scheduler with alphas_cumprod, got {type(scheduler).__name__}")
    if prediction_type(scheduler) not in PREDICTIONS:
        raise ValueError(f"scheduler must predict one of {PREDICTIONS}, got {prediction_type(scheduler)!r}")
    channels = setting(unet, "in_channels"), setting(unet, "out_channels")
    if None not in channels and channels[0] != channels[1]:
        raise ValueError(f"unet must have as many output as input channels, got {channels[1]} and {channels[0]}")


def setting(module: Any, name: str) -> Any:
    """A value of a diffusers configuration, or None."""
    return getattr(getattr(module, "config", None), name, None)


def prediction_type(scheduler: Any) -> str:
    return setting(scheduler, "prediction_type") or "epsilon"


def condition_rows(name: str, condition: Condition, unet: nn.Module) -> Tensor:
    """K conditions: labels (K,) int64, or hidden states of a text encoder (K, L, D), on the device of `unet`."""
    try:
        rows = torch.as_tensor(condition, device=next(unet.parameters()).device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be class labels or encoder_hidden_states, got {condition!r}") from error
    if rows.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(rows.shape)}")
    if rows.is_floating_point():
        rows = rows[None] if rows.ndim == 2 else rows
        if rows.ndim != 3:
            raise ValueError(f"{name} must be of shape (L, D) or (K, L, D), got {tuple(rows.shape)}")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        width = setting(unet, "cross_attention_dim")
        if hasattr(unet, "config") and width is None:
            raise ValueError(f"{name} holds hidden states, but unet has no cross-attention: give class labels")
        if isinstance(width, int) and setting(unet, "encoder_hid_dim") is None and rows.shape[2] != width:
            raise ValueError(f"{name} must have width {width}, as the cross-attention of unet, got {rows.shape[2]}")
        return rows.detach()
    if rows.dtype == torch.bool or rows.is_complex() or rows.ndim > 1:
        raise TypeError(f"{name} must be class labels or encoder_hidden_states, got {condition!r}")
    rows = rows.reshape(-1).long()
    classes = setting(unet, "num_class_embeds")
    if hasattr(unet, "config") and classes is None:
        raise ValueError(f"{name} holds class labels, but unet knows no classes: give encoder_hidden_states")
    if int(rows.min()) < 0 or (classes is not None and int(rows.max()) >= classes):
        raise ValueError(
            f"{name} must hold labels from 0 to {'?' if classes is None else classes - 1}, got {condition!r}"
        )
    return rows


def check_alike(**conditions: Tensor | None) -> None:
    """Raise unless all are labels, or hidden states of one length and width."""
    given = {name: rows for name, rows in conditions.items() if rows is not None}
    (first, like), *rest = given.items()
    for name, rows in rest:
        if rows.is_floating_point() != like.is_floating_point() or rows.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"{name} must be a condition of the kind and size of {first}, got {rows.dtype} {tuple(rows.shape[1:])} "
                f"and {like.dtype} {tuple(like.shape[1:])}"
            )


def sample_shape(unet: nn.Module, shape: Sequence[int] | None) -> tuple[int, ...]:
    """(C, H, W) of what the network denoises: `shape`, or what its configuration says."""
    if shape is not None:
        return tuple(shape)
    channels, size = setting(unet, "in_channels"), setting(unet, "sample_size")
    if channels is None or size is None:
        raise ValueError("shape must be given as (C, H, W): the configuration of unet does not say it")
    return (channels, *((size, size) if isinstance(size, int) else size))


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over x are taken: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def signal_and_noise(scheduler: Any, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """a_t = sqrt(alphabar_t) and b_t = sqrt(1 - alphabar_t) of t (B,), in the shape (B, 1, 1, 1)."""
    alphabar = scheduler.alphas_cumprod.to(like.device)[t.to(like.device)]
    alphabar = alphabar.to(wide(like)).reshape(-1, *[1] * (like.ndim - 1))
    return alphabar.sqrt(), (1 - alphabar).sqrt()


def predict_noise(unet: nn.Module, scheduler: Any, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """eps(x_t, t, c) (B, C, H, W), at least float32, of a network that predicts eps, v or x_0.

    x_t : (B, C, H, W); t : (B,) int64; condition : (B,) labels or (B, L, D) hidden states.
    """
    dtype = next(unet.parameters()).dtype
    told = (
        {"encoder_hidden_states": condition.to(dtype)} if condition.is_floating_point() else {"class_labels": condition}
    )
    output = unet(x_t.to(dtype), t, **told).sample
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return output.to(wide(x_t))
    a, b = signal_and_noise(scheduler, t, x_t)
    return a * output + b * x_t if kind == "v_prediction" else (x_t - a * output) / b


def ddim_grid(scheduler: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps (n,) from noise to image, and alphabar (n + 1,) at each and behind the last, as DDIMScheduler's."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    alphabar = torch.cat([ddim.alphas_cumprod[ddim.timesteps], ddim.final_alpha_cumprod.reshape(1)])
    return ddim.timesteps, alphabar


@contextmanager
def held_still(*modules: nn.Module) -> Iterator[None]:
    """No parameter of these gets a gradient from what is computed inside; inputs still do."""
    free = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


def frozen_original(unet: nn.Module) -> nn.Module:
    """The network itself if it is in eval mode throughout, else a copy that is: dropout would blur what it says."""
    return copy.deepcopy(unet).eval() if any(module.training for module in unet.modules()) else unet


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The caller's, or one of seed 0: never the global one."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def positive(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def at_least_zero(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
