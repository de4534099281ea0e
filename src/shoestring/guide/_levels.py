r"""Noise levels of any scheduler, and one prediction turned into another.

Every sampler here moves :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`. Schedulers of diffusers keep the two numbers in
four ways: cumulative products (DDIM, DDPM, PNDM, LCM, TCD), a ratio :math:`\sigma/\alpha` for samples of unit variance
(DPM-Solver, UniPC, DEIS), the same ratio for samples that are not scaled, :math:`\alpha = 1` (Euler, Heun, LMS), and
straight lines, :math:`\alpha = 1 - \sigma` (flow matching).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["KINDS", "from_epsilon", "from_x0", "noise_levels", "prediction_kind", "to_epsilon", "to_x0"]

# Nothing in common tells these from schedulers that mean something else by their sigmas (EDM, consistency models).
_UNSCALED = ("EulerDiscrete", "EulerAncestralDiscrete", "Heun", "KDPM2", "LMS", "DPMSolverSDE")
KINDS = ("epsilon", "v_prediction", "sample", "flow")


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha` and :math:`\sigma` at the N timesteps of a scheduler, and where the last step ends.

    Parameters
    ----------
    scheduler
        Of diffusers, after ``set_timesteps``.

    Returns
    -------
    alphas, sigmas : float64 tensors of shape (N + 1,)
        Of the scheduler's own samples. Entry i + 1 is the level that step i ends at.

    Raises
    ------
    ValueError
        If the scheduler has no noise levels of these four kinds, or its timesteps are not set.

    Examples
    --------
    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler(set_alpha_to_one=True)
    >>> scheduler.set_timesteps(4)
    >>> alphas, sigmas = noise_levels(scheduler)
    >>> len(alphas), float(alphas[-1]), float(sigmas[-1])
    (5, 1.0, 0.0)
    """
    name = type(scheduler).__name__
    # hasattr asks a config for what is missing, and that warns.
    own = {*vars(scheduler), *dir(type(scheduler))}
    if getattr(scheduler, "timesteps", None) is None or (
        "num_inference_steps" in own and scheduler.num_inference_steps is None
    ):
        raise ValueError(f"scheduler {name} has no timesteps yet: call its set_timesteps first")
    n = len(scheduler.timesteps)
    if "sigmas" in own and "precondition_inputs" not in own:
        ratios = torch.as_tensor(scheduler.sigmas).double().cpu()
        if len(ratios) != n + 1:
            raise ValueError(f"scheduler {name} has {len(ratios)} sigmas for {n} timesteps, expected {n + 1}")
        if "_sigma_to_alpha_sigma_t" in own:
            alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(ratios)
            return alphas, sigmas
        if prediction_kind(scheduler) == "flow":
            return 1 - ratios, ratios
        if name.startswith(_UNSCALED):
            return torch.ones_like(ratios), ratios
    elif "alphas_cumprod" in own:
        return _from_products(scheduler, own)
    raise ValueError(
        f"scheduler {name} has no noise levels that are understood here (alphas_cumprod, or sigmas of Euler, "
        "DPM-Solver or flow matching); use, say, DDIMScheduler.from_config(pipe.scheduler.config)"
    )


def _from_products(scheduler: Any, own: set[str]) -> tuple[Tensor, Tensor]:
    """Of schedulers that keep the product of 1 - beta."""
    products = scheduler.alphas_cumprod.double().cpu()
    here = scheduler.timesteps.long().cpu()
    if "previous_timestep" in own or "_step_index" in own:  # DDPM, LCM, TCD: on to the next of the list
        after = torch.cat([here[1:], here.new_tensor([-1])])
    else:  # DDIM, PNDM: a fixed stride, whatever the list says
        after = here - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod if "final_alpha_cumprod" in own else 1.0
    end = products[after[-1]] if after[-1] >= 0 else torch.as_tensor(final).double().cpu()
    # With a stride that does not divide, a step ends a timestep or so off the next one, which the network is told.
    a = torch.cat([products[here], end.reshape(1)])
    return a.sqrt(), (1 - a).clamp(min=0).sqrt()


def prediction_kind(scheduler: Any) -> str:
    """What the network predicts: one of `KINDS`.

    Raises
    ------
    ValueError
        Another `prediction_type`, by name.
    """
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    kind = scheduler.config.get("prediction_type", "epsilon")
    kind = {"flow_prediction": "flow"}.get(kind, kind)
    if kind not in KINDS:
        raise ValueError(
            f"prediction_type {kind!r} of {type(scheduler).__name__} is not supported: one of {', '.join(KINDS)} is"
        )
    return str(kind)


def to_x0(prediction: Tensor, sample: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    r"""The clean picture behind a prediction: :math:`\hat x_0`.

    Parameters
    ----------
    prediction, sample : Tensor of equal shape
        The network's answer, and :math:`x_t`.
    alpha, sigma : float
        Of `sample`. With ``"v_prediction"`` the network saw :math:`x_t/r`, :math:`r^2 = \alpha^2 + \sigma^2`.
    kind : {"epsilon", "v_prediction", "sample", "flow"}
        ``"flow"`` is the velocity :math:`\epsilon - x_0` of straight lines.

    Examples
    --------
    >>> x = torch.full((1,), 0.6 * 2.0 + 0.8 * 3.0)  # x0 = 2, epsilon = 3
    >>> round(float(to_x0(torch.full((1,), 3.0), x, 0.6, 0.8, "epsilon")), 5)
    2.0
    >>> round(float(to_x0(torch.full((1,), 0.6 * 3 - 0.8 * 2), x, 0.6, 0.8, "v_prediction")), 5)
    2.0
    """
    if kind == "epsilon":
        return (sample - sigma * prediction) / alpha
    if kind == "v_prediction":
        r2 = alpha**2 + sigma**2
        return alpha / r2 * sample - sigma / r2**0.5 * prediction
    if kind == "sample":
        return prediction
    if kind == "flow":
        return sample - sigma * prediction
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def to_epsilon(prediction: Tensor, sample: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    r"""The noise behind a prediction, :math:`\hat\epsilon`. Arguments as of `to_x0`; `sigma` > 0."""
    if kind == "epsilon":
        return prediction
    if kind == "flow":
        return sample + alpha * prediction
    return (sample - alpha * to_x0(prediction, sample, alpha, sigma, kind)) / sigma


def from_epsilon(epsilon: Tensor, sample: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """What a network of this kind would have said, had it seen this noise. The inverse of `to_epsilon`; `alpha` > 0."""
    if kind == "epsilon":
        return epsilon
    return from_x0(to_x0(epsilon, sample, alpha, sigma, "epsilon"), sample, alpha, sigma, kind)


def from_x0(x0: Tensor, sample: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """What a network of this kind would have said, had it seen this picture. The inverse of `to_x0`; `sigma` > 0."""
    if kind == "sample":
        return x0
    epsilon = (sample - alpha * x0) / sigma
    if kind == "epsilon":
        return epsilon
    if kind == "v_prediction":
        return (alpha * epsilon - sigma * x0) / (alpha**2 + sigma**2) ** 0.5
    if kind == "flow":
        return epsilon - x0
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
