r"""CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models.

Chung, Kim, Park, Nam, Ye. ICLR 2025, arXiv 2406.08070.

Idea
----
Classifier-free guidance extrapolates (scales of 2 to 12) and renoises with the extrapolated noise, which leaves the
data manifold. CFG++ interpolates (scales of 0 to 1) and renoises with the *unconditional* noise: fewer artefacts, and a
step that can be inverted. The same two network calls a step; nothing is trained.

Equations
---------
:math:`x = \alpha x_0 + \sigma \epsilon`; primes: where the step ends; :math:`\lambda \in [0, 1]` the scale;
:math:`\epsilon_c, \epsilon_u` the noise predicted with the condition and without it, or with a negative one::

    e   = eps_u + lambda (eps_c - eps_u)
    x0  = (x - sigma e) / alpha                        guided
    x'  = alpha' x0 + sigma' eps_u                     CFG has e here             `cfgpp_step`

    x0  = (x' - sigma' eps_u) / alpha'                 the step backwards; predictions are asked
    x   = alpha x0 + sigma e                           at (x', t)                 `cfgpp_invert_step`, `invert`

As a guider
-----------
Our derivation. A deterministic first-order step is affine in the prediction, hence CFG++ is CFG with the scale ::

    omega = lambda alpha' sigma / (alpha' sigma - alpha sigma')                   `cfgpp_scales`

at each step, and needs no scheduler of its own: `CFGPlusPlusGuidance` knows the noise levels and gives the scheduler
the prediction whose step is the step above. In :math:`\rho = \sigma/\alpha`,
:math:`\omega = \lambda \rho/(\rho - \rho')`; at the last step (:math:`\rho' = 0`) just :math:`\lambda`. It holds for
every prediction type, as they are affine in each other, and for straight lines (:math:`\alpha = 1 - \sigma`). A step
that renoises with the share :math:`\eta` of fresh noise (DDIM's eta; Euler ancestral and DDPM are :math:`\eta = 1`)
draws :math:`s = \eta \sigma' (1 - (\alpha \sigma' / \alpha' \sigma)^2)^{1/2}` and keeps
:math:`\sigma_d^2 = \sigma'^2 - s^2` of the old: :math:`\sigma_d` takes the place of :math:`\sigma'`.

What to expect
--------------
* :math:`\lambda = 1` is not conditional sampling: x' differs from it by :math:`\sigma' (\epsilon_u - \epsilon_c)`.
* The scale depends on the number of steps: each adds its own shift, :math:`\rho/(\rho - \rho')` grows about as their
  number. The same scale guides more in more steps. Compare at an equal number.
* A step that ends at its own noise level (DDIM with ``set_alpha_to_one=False`` and ``steps_offset=0``: the last) leaves
  x as it is whatever was predicted; omega is infinite. The guider answers with :math:`\omega = \lambda` and warns. The
  explicit step has no such limit: `cfgpp_sample` takes it at every step.
* DDIM, ``timestep_spacing="trailing"``, in a number of steps that does not divide its training steps: a step ends up
  to one training step beside the next timestep, and omega is off by as little.
* Clipping or thresholding of x0 by the scheduler breaks the identity: the guider warns. `cfgpp_sample` never clips.
* Solvers of higher order (DPM-Solver 2M, UniPC, PNDM) mix predictions of several steps, whose omegas differ: there the
  guider is CFG with the first-order omegas, near CFG++ but not equal to it, and warns. The paper's own 2M and 2S steps
  are `cfgpp_dpmpp_2m_step` and `cfgpp_dpmpp_2s_step`.
* Where the scheduler keeps no noise of x at all (LCM, stochastic flow matching) CFG++ *is* CFG at lambda: refused.

Code and paper
--------------
Read, in the card of this project: the official repository CFGpp-diffusion/CFGpp (no licence: nothing is copied). Not
read: the paper's text, so none of its tables were checked.

* Official code for SD 1.5 puts a 1 in front of the alphas, which shifts all levels by one training step and makes its
  last DDIM step one between equal levels. Here the levels are the scheduler's.
* Official 2M for SD 1.5 has the guided estimate in the finite difference, that for SDXL the unconditional one. Here the
  latter: it is a difference of one function, and equals unconditional 2M plus a shift by guidance.
* The official examples pass a long negative prompt: then "unconditional" means with respect to that prompt.
* Their inversion defaults to a scale of 7.5, which is CFG's: scales above 1 warn here.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from shoestring.guide._cfgpp_solvers import Level, cfgpp_dpmpp_2m_step, cfgpp_dpmpp_2s_step, split_noise
from shoestring.guide._levels import noise_levels, prediction_kind, to_epsilon, to_x0
from shoestring.guide._sampler import check_run, is_between, named_conditions, network_of

__all__ = [
    "CFGPlusPlusGuidance",
    "cfgpp_dpmpp_2m_step",
    "cfgpp_dpmpp_2s_step",
    "cfgpp_invert_step",
    "cfgpp_sample",
    "cfgpp_scales",
    "cfgpp_step",
    "invert",
]

SAME_LEVEL = 1e-6  # levels whose ratios differ by less, relatively, are one: the scheduler's step does nothing
ANCESTRAL = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")  # eta = 1, without being asked
FIRST_ORDER = (*ANCESTRAL, "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")


# ---- the mathematics


def cfgpp_step(
    x: Tensor,
    e_c: Tensor,
    e_u: Tensor,
    level: Level,
    next_level: Level,
    scale: float,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    r"""One explicit step: the guided :math:`\hat x_0`, renoised with the unconditional noise.

    Parameters
    ----------
    x : Tensor of shape (B, ...)
    e_c, e_u : Tensor, as x
        Noise predicted with the condition, and without it.
    level, next_level : (float, float)
        :math:`(\alpha, \sigma)` of x and of the answer: :math:`(\sqrt a, \sqrt{1 - a})` of DDIM, :math:`(1, \sigma)` of
        Euler, :math:`(1 - \sigma, \sigma)` of flow matching. :math:`\alpha > 0`.
    scale : float
        :math:`\lambda`, 0 (unconditional DDIM) to 1.
    eta : float, default 0.0
        Share of fresh noise, as DDIM's; 1 is the ancestral step.
    noise : Tensor, as x
        Standard normal; needed where eta > 0.

    Returns
    -------
    Tensor, as x

    Examples
    --------
    >>> x, e_c, e_u = torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.5])
    >>> cfgpp_step(x, e_c, e_u, (0.6, 0.8), (1.0, 0.0), 0.5)  # (1 - 0.8 x 0.75) / 0.6
    tensor([0.6667])
    """
    alpha, sigma = level
    e = e_u + scale * (e_c - e_u)
    x0 = (x - sigma * e) / alpha
    return _renoise(x0, e_u, level, next_level, eta, noise)


def _renoise(x0: Tensor, e: Tensor, level: Level, next_level: Level, eta: float, noise: Tensor | None) -> Tensor:
    alpha_next, sigma_next = next_level
    if not eta:
        return alpha_next * x0 + sigma_next * e
    if noise is None:
        raise ValueError(f"noise is needed where eta > 0, got eta {eta} and None")
    s, sigma_down = split_noise(level, next_level, eta)
    return alpha_next * x0 + sigma_down * e + s * noise


def cfgpp_invert_step(x: Tensor, e_c: Tensor, e_u: Tensor, level: Level, next_level: Level, scale: float) -> Tensor:
    r"""The step backwards: from x at `next_level` (less noise) to `level`; its inverse, given the same predictions.

    Arguments are those of `cfgpp_step`, by the same names; :math:`\alpha' > 0`.

    Examples
    --------
    >>> x, e_c, e_u = torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.5])
    >>> forth = cfgpp_step(x, e_c, e_u, (0.6, 0.8), (0.8, 0.6), 0.5)
    >>> cfgpp_invert_step(forth, e_c, e_u, (0.6, 0.8), (0.8, 0.6), 0.5)
    tensor([1.])
    """
    (alpha, sigma), (alpha_next, sigma_next) = level, next_level
    e = e_u + scale * (e_c - e_u)
    x0 = (x - sigma_next * e_u) / alpha_next
    return alpha * x0 + sigma * e


def cfgpp_scales(alphas: Tensor, sigmas: Tensor, scale: float, eta: float = 0.0) -> Tensor:
    r"""CFG's scale at each step, with which a first-order sampler takes the steps of CFG++ (our derivation).

    Parameters
    ----------
    alphas, sigmas : Tensor of shape (N + 1,)
        Noise levels, as of `shoestring.guide._levels.noise_levels`.
    scale : float
        :math:`\lambda`.
    eta : float, default 0.0
        Share of fresh noise of the sampler's steps.

    Returns
    -------
    Tensor of shape (N,), float64
        :math:`\omega_i`; infinite where a step ends at its own noise level (0 if the scale is).

    Examples
    --------
    >>> alphas, sigmas = torch.tensor([1.0, 1, 1]), torch.tensor([4.0, 1, 0])  # Euler: 4 / (4 - 1), 1 / (1 - 0)
    >>> cfgpp_scales(alphas, sigmas, 0.6)
    tensor([0.8000, 0.6000], dtype=torch.float64)
    """
    levels = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
    down = [split_noise(level, next_level, eta)[1] for level, next_level in pairwise(levels)]
    alphas, sigmas, sigma_down = alphas.double(), sigmas.double(), torch.tensor(down, dtype=torch.float64)
    alpha, sigma, alpha_next = alphas[:-1], sigmas[:-1], alphas[1:]
    fall = alpha_next * sigma - alpha * sigma_down
    same = fall.abs() <= SAME_LEVEL * alpha_next * sigma
    return torch.where(same, math.inf if scale else 0.0, scale * alpha_next * sigma / fall)


# ---- the guider


class CFGPlusPlusGuidance(BaseGuidance):
    r"""CFG++ as a guider: CFG with the scale :math:`\lambda \rho / (\rho - \rho')` at each step. No scheduler changes.

    It must know the noise levels. `shoestring.guide.sample` and `apply` tell it; for a modular pipeline of diffusers
    call ``guider.set_scheduler(pipe.scheduler)`` once (again, if the pipeline gets another scheduler); the timesteps
    are read at the first step of each run. Two network calls a step, as CFG; one where it is disabled, or outside start
    and stop, where the conditional prediction is answered (diffusers' rule).

    Parameters
    ----------
    guidance_scale : float, default 0.6
        :math:`\lambda`, 0 to 1; the default is that of the official examples, and about CFG's 7.5 there.
    eta : float, default 0.0
        What the pipeline is given as `eta` (DDIM). Schedulers that are ancestral by themselves need none.
    start, stop : float, default 0.0, 1.0
        Share of the steps between which it guides.
    enabled : bool, default True

    Raises
    ------
    ValueError
        A scale or eta that is negative or not finite; no scheduler, or one without noise levels, with an unknown
        prediction type, or that keeps no noise; no unconditional embedding; more conditions than two.

    Warns
    -----
    UserWarning
        A scale above 1; a scheduler that clips, is not of first order, or whose steps end at their own noise level.

    Examples
    --------
    >>> from shoestring import zoo
    >>> from shoestring.guide import sample
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> boots, nothing = torch.full((2,), 9), torch.full((2,), 10)
    >>> guider = CFGPlusPlusGuidance(0.4)
    >>> out = sample(model, scheduler, guider, noise, (boots, nothing), num_inference_steps=5)
    >>> out.num_calls, [round(omega, 2) for omega in guider.omegas]  # CFG's scale, step by step
    (10.0, [0.6, 0.68, 0.74, 0.68, 0.4])
    """

    guidance_scale: float
    eta: float

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 0.6,
        eta: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.register_to_config(_use_default_values=[])  # diffusers forgets positional arguments in `new`
        _check_scale(guidance_scale)
        if not (isinstance(eta, Real) and 0 <= float(eta) <= 1):
            raise ValueError(f"eta must be a number from 0 to 1, got {eta!r}")
        self.guidance_scale = float(guidance_scale)
        self.eta = float(eta)
        self.omegas: list[float] = []  # of this run
        self._scheduler: Any = None
        self._timesteps: list[float] = []

    def set_scheduler(self, scheduler: Any) -> None:
        """The scheduler that will step: read at the first step of each run, never changed."""
        prediction_kind(scheduler)
        _check_scheduler(scheduler)
        self._scheduler, self.omegas = scheduler, []

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if self._scheduler is not None and (step == 0 or not self.omegas):
            self._read_levels()

    def _read_levels(self) -> None:
        alphas, sigmas = noise_levels(self._scheduler)
        eta = 1.0 if _is_ancestral(self._scheduler) else self.eta
        omegas = cfgpp_scales(alphas, sigmas, self.guidance_scale, eta).tolist()
        still = [i for i, omega in enumerate(omegas) if math.isinf(omega)]
        if still and _is_first_order(self._scheduler):
            warnings.warn(
                f"steps {still} of {type(self._scheduler).__name__} end at their own noise level and change nothing, "
                "whatever is predicted: the guidance of CFG++ there is lost; "
                "shoestring.guide.cfgpp.cfgpp_sample takes the explicit step (DDIM: or set_alpha_to_one=True)",
                stacklevel=3,
            )
        self.omegas = [self.guidance_scale if math.isinf(omega) else omega for omega in omegas]
        self._timesteps = self._scheduler.timesteps.tolist()

    def _omega(self) -> float:
        """CFG's scale at this step."""
        if self._num_inference_steps == len(self.omegas):
            return self.omegas[self._step]
        try:  # image to image: a run over the last of the timesteps
            return self.omegas[self._timesteps.index(float(self._timestep))]
        except ValueError:
            raise ValueError(
                f"timestep {float(self._timestep):g} is not one of the scheduler given to set_scheduler: "
                "give it the scheduler that steps, after any change of it"
            ) from None

    def _inputs(self, data: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Which conditions are asked for, checked before the network is."""
        if not self._is_active():
            return [(0, "pred_cond")]
        if self._scheduler is None:
            raise ValueError(
                "CFGPlusPlusGuidance needs the noise levels: call guider.set_scheduler(pipe.scheduler) before the run"
            )
        for name, value in data.items():
            if isinstance(value, tuple) and len(value) > 2:
                raise ValueError(
                    f"CFGPlusPlusGuidance takes a condition and its absence, got {len(value)} of {name}: "
                    "further prompts are PerpNegGuidance's"
                )
            if isinstance(value, tuple) and value[0] is not None and (len(value) < 2 or value[1] is None):
                raise ValueError(
                    f"the unconditional {name}, with which CFG++ renoises, is missing: give a negative_prompt, '' for "
                    "none"
                )
        return list(enumerate(self._input_predictions))

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, place, name) for place, name in self._inputs(data)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        fields = {
            key: tuple(getattr(data, name, None) if name else None for name in names)
            for key, names in input_fields.items()
            if isinstance(names, tuple)
        }
        return [
            self._prepare_batch_from_block_state(input_fields, data, place, name)
            for place, name in self._inputs(fields)
        ]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None or not self._is_active():
            pred = pred_cond
        else:
            pred = torch.add(pred_uncond, pred_cond - pred_uncond, alpha=self._omega())
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._is_active() else 1

    def _is_active(self) -> bool:
        return self._enabled and is_between(self)


# ---- the explicit loops


@torch.no_grad()
def cfgpp_sample(
    model: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    conditions: Sequence[Mapping[str, Any] | Tensor],
    guidance_scale: float = 0.6,
    num_inference_steps: int = 20,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sample by the explicit step: of the scheduler only timesteps and noise levels are used.

    What `CFGPlusPlusGuidance` does in `shoestring.guide.sample` with a first-order scheduler, and also what it cannot:
    steps between equal noise levels, schedulers that clip, or are of higher order. 2 N network calls a sample.

    Parameters
    ----------
    model, scheduler, latents
        As of `shoestring.guide.sample`: latents (B, ...) of unit variance. The scheduler is left as it is.
    conditions : (condition, its absence)
        As of `shoestring.guide.sample`.
    guidance_scale : float, default 0.6
        :math:`\lambda`, 0 to 1.
    num_inference_steps : int, default 20
    eta : float, default 0.0
        Share of fresh noise.
    generator : torch.Generator, optional
        Of that noise.

    Returns
    -------
    Tensor, as latents

    Raises
    ------
    ValueError
        As `shoestring.guide.sample`; a scheduler that calls the network more than once a step.

    Examples
    --------
    >>> from shoestring import zoo
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> boots, nothing = torch.full((2,), 9), torch.full((2,), 10)
    >>> tuple(cfgpp_sample(model, scheduler, noise, (boots, nothing), 0.4, 5).shape)
    (2, 1, 28, 28)
    """
    run = _Run(model, scheduler, latents, conditions, guidance_scale, num_inference_steps)
    x = latents * run.first_sigma
    for i in range(num_inference_steps):
        p_c, p_u = run.predictions(x / run.norms[i], i)
        e_u, D_c, D_u = run.epsilon(p_u, x, i), run.x0(p_c, x, i), run.x0(p_u, x, i)
        noise = None
        if eta:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        # The step of `cfgpp_step`, which divides by alpha: pure noise of flow matching has alpha = 0.
        x = _renoise(D_u + guidance_scale * (D_c - D_u), e_u, run.levels[i], run.levels[i + 1], eta, noise)
    return x


@torch.no_grad()
def invert(
    model: Callable[..., Any],
    scheduler: Any,
    latents: Tensor,
    conditions: Sequence[Mapping[str, Any] | Tensor],
    guidance_scale: float = 0.6,
    num_inference_steps: int = 20,
) -> Tensor:
    r"""From pictures back to the noise that `CFGPlusPlusGuidance` makes them of (DDIM inversion). 2 N calls a sample.

    Each step asks for the predictions at the less noisy end, an approximation that more steps make better. To edit:
    invert with the prompt that describes the picture, sample with another, at the same scale and number of steps.

    Parameters
    ----------
    model, scheduler, conditions, guidance_scale, num_inference_steps
        As of `cfgpp_sample`.
    latents : Tensor of shape (B, ...)
        Pictures in the model's range, or latents of them (times the autoencoder's ``scaling_factor``).

    Returns
    -------
    Tensor, as latents
        Noise, of unit variance: what `shoestring.guide.sample` and `cfgpp_sample` start from.

    Raises
    ------
    ValueError
        As `cfgpp_sample`.

    Examples
    --------
    >>> import numpy as np
    >>> from shoestring import zoo
    >>> from shoestring.data import load
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> row = load("fashion", split="test[:1]")
    >>> x = torch.tensor(np.array(row["image"])).reshape(1, 1, 28, 28) / 127.5 - 1
    >>> conditions = torch.tensor(row["label"]), torch.tensor([10])
    >>> noise = invert(model, scheduler, x, conditions, 0.6, 20)
    >>> back = cfgpp_sample(model, scheduler, noise, conditions, 0.6, 20)
    >>> float((back - x).square().mean()) < 0.1
    True
    """
    run = _Run(model, scheduler, latents, conditions, guidance_scale, num_inference_steps)
    x = latents
    for i in reversed(range(num_inference_steps)):
        seen = x / run.norms[i + 1]
        e_c, e_u = (run.epsilon(p, seen * run.norms[i], i) for p in run.predictions(seen, i))
        x = cfgpp_invert_step(x, e_c, e_u, run.levels[i], run.levels[i + 1], guidance_scale)
    return x / run.first_sigma


class _Run:
    """A network and the noise levels of N steps, checked; what the two loops share."""

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,
        latents: Tensor,
        conditions: Sequence[Mapping[str, Any] | Tensor],
        guidance_scale: float,
        num_inference_steps: int,
    ) -> None:
        N = num_inference_steps
        check_run(N, latents)
        _check_scale(guidance_scale)
        self.conditions = named_conditions(conditions, latents, model)
        if len(self.conditions) != 2:
            raise ValueError(f"conditions must be two, (condition, its absence), got {len(self.conditions)}")
        self.network = network_of(model, latents.shape[1])
        self.kind = prediction_kind(scheduler)
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(N, device=latents.device)
        alphas, sigmas = noise_levels(scheduler)
        self.timesteps = scheduler.timesteps
        if len(self.timesteps) != N:
            raise ValueError(
                f"scheduler {type(scheduler).__name__} calls the network {len(self.timesteps)} times in {N} steps, "
                "expected once a step: use DDIMScheduler or EulerDiscreteScheduler"
            )
        self.levels: list[Level] = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
        self.first_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))  # flow matching has none
        unscaled = bool((alphas == 1).all())  # Euler's samples: the network wants them at unit variance
        self.norms = [math.hypot(*level) if unscaled else 1.0 for level in self.levels]

    def predictions(self, scaled: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """With the condition and without it."""
        condition, absence = self.conditions
        t = self.timesteps[i]
        return self.network(scaled, t, dict(condition)), self.network(scaled, t, dict(absence))

    def epsilon(self, prediction: Tensor, x: Tensor, i: int) -> Tensor:
        return to_epsilon(prediction, x, *self.levels[i], self.kind)

    def x0(self, prediction: Tensor, x: Tensor, i: int) -> Tensor:
        return to_x0(prediction, x, *self.levels[i], self.kind)


# ---- checks


def _check_scale(scale: Any) -> None:
    if isinstance(scale, bool) or not (isinstance(scale, Real) and math.isfinite(scale) and float(scale) >= 0):
        raise ValueError(f"guidance_scale must be a number from 0 to 1, got {scale!r}")
    if float(scale) > 1:
        warnings.warn(
            f"guidance_scale {scale:g} is above 1: CFG++ interpolates between 0 and 1; 0.6 is about CFG's 7.5",
            stacklevel=3,
        )


def _check_scheduler(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if name == "LCMScheduler" or config.get("stochastic_sampling"):
        raise ValueError(
            f"scheduler {name} renoises with fresh noise alone, where CFG++ is CFG at the same scale: "
            "use ClassifierFreeGuidance"
        )
    clips = [option for option in ("clip_sample", "thresholding") if config.get(option)]
    if clips:
        warnings.warn(
            f"{clips[0]} of {name} changes the clean estimate, and CFG++ is then not exact: "
            f"{name}.from_config(scheduler.config, {clips[0]}=False)",
            stacklevel=3,
        )
    if not _is_first_order(scheduler):
        warnings.warn(
            f"{name} is not of first order: guidance is CFG with CFG++'s scales, near CFG++ but not equal to it; "
            "DDIMScheduler and EulerDiscreteScheduler are exact",
            stacklevel=3,
        )


def _is_first_order(scheduler: Any) -> bool:
    return type(scheduler).__name__ in FIRST_ORDER or scheduler.config.get("solver_order") == 1


def _is_ancestral(scheduler: Any) -> bool:
    sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    return sde or type(scheduler).__name__ in ANCESTRAL
