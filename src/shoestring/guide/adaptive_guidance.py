r"""Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models.

Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet. AAAI 2025, arXiv 2312.12487.

Idea
----
Classifier-free guidance asks the network twice a step, with the condition and without it. In later steps the answers
point the same way: AG watches their cosine and asks once a step as soon as it has passed a threshold. LinearAG also
replaces earlier unconditional answers, by a linear combination of past answers that was fitted by least squares.

Equations
---------
e_c,t = eps(x_t, c), e_u,t = eps(x_t, empty or negative prompt), s the guidance scale, gbar the threshold::

    CFG:       e_t = e_u,t + s (e_c,t - e_u,t)                                         2 calls
    AG:        gamma_t = <e_c,t, e_u,t> / (||e_c,t|| ||e_u,t||)      for each sample, over all its numbers
               e_t = CFG until gamma_t >= gbar for the first time, at that step too;  e_c,t in all later steps: 1 call
    LinearAG:  ehat_u,i = sum_{j<=i} b^c_ij e_c,j + sum_{j<i} b^u_ij e_u,j             i = 0, 1, ... in sampling order
               e_i = ehat_u,i + s (e_c,i - ehat_u,i)                                   1 call

With k the number of CFG steps, T steps take 2 k + (T - k) calls. b are scalars, shared by pixels, channels and samples,
fitted on CFG trajectories without an intercept; when sampling, ehat_u stands where e_u was not computed. Let v be the
vectors (e_c,0, e_u,0, e_c,1, e_u,1, ...) of a trajectory and G = sum v v^T over all pixels and samples, 2T x 2T. The
normal equations of every step i are a corner of this one matrix (our observation), so that trajectories are added up
one after the other, in float64, and are not kept::

    (G[:2i+1, :2i+1] + ridge mean(diag) I) b_i = G[:2i+1, 2i+1]

What to expect
--------------
* A threshold belongs to a model, a space and a solver. 0.991 is the paper's, for latent text-to-image models and 20
  steps (about 30 calls for 40). Choose your own on a few seeds, by `choose_threshold`.
* gamma need not rise: near pure noise both answers are that noise, and gamma is near 1 at the first step as well. Where
  cos(x0) is 0.9 at all noise levels, it falls from 1 to 0.6 at a signal three times the noise. `min_guided_steps`
  keeps the first steps guided; or measure in another `space`, with its own threshold. In this project's pixel-space
  model of garments gamma of the noise is above 0.998 at nearly all steps, and 0.991 crosses at the first; that of x0
  and of x_t - e rises from 0.85 to 0.999.
* A fixed cut after the same number of steps (`ClassifierFreeGuidance(stop=...)`; "Step AG", arXiv 2506.08351) does
  almost as well where all samples cross at about one step. The claim of this project has it as a baseline.
* Where fewer steps already give CFG's image (smooth models with second-order solvers), fewer steps are the cheaper cut.
* With `per_sample` the unconditional batch shrinks; calls of one or two rows cost more a row. Saved are calls of the
  sampler here, which asks for one condition after the other; pipelines that ask for both in one call gain less.
* LinearAG's coefficients belong to one model, scheduler, number of steps, scale and to the EMPTY negative prompt.

Code and paper
--------------
Not read: the paper's text; there is no official repository. Read: asagi4/ComfyUI-Adaptive-Guidance and the card of this
project, whose author read the abstract and a co-author's course repository (jpperezu/AML_Project, without LinearAG).

* The paper's formula has e_c where gamma_t >= gbar already, its algorithm from the next step on. Here: the next step,
  as the two calls of this one are paid for (so does the ComfyUI node). The switch is for good.
* The co-author's code measures x_t - e (`space="x_minus_eps"`: 0.9990 gives 30 calls with Stable Diffusion 1.4), the
  ComfyUI node the denoised images (`space="x0"`: default 0.990). The values are not comparable.
* Batches: that node flattens the whole batch into one cosine, so that images depend on each other. Here every sample
  has its own: a batch goes on until all have crossed, or with `per_sample` each sample stops by itself.
* Perp-Neg and others as `inner`: that node compares e_c with the negative prompt's answer alone. Here gamma is the
  smallest of all the cosines between e_c and the others, as all the others are to be dropped. Ours.
* LinearAG: that the current e_c enters, no intercept, and the later half (`second_half`) are our reading. Known are the
  form, 200 images, and 25 calls at T = 20 with every second step estimated; ridge 1e-6 is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from shoestring.guide._linear_adaptive import (
    LinearAdaptiveGuidance,
    TrajectoryRecorder,
    check_finite,
    estimate_unconditional,
    fit_linear,
    gram_matrix,
    guided_prediction,
    linear_schedule,
    relative_residual,
)

__all__ = [
    "AdaptiveGuidance",
    "LinearAdaptiveGuidance",
    "TrajectoryRecorder",
    "calls_at",
    "choose_threshold",
    "cosine_similarity",
    "estimate_unconditional",
    "fit_linear",
    "gram_matrix",
    "guided_prediction",
    "in_space",
    "linear_schedule",
    "relative_residual",
]

SPACES = ("eps", "x_minus_eps", "x0")


# ---- the mathematics


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b> / (||a|| ||b||)`` of every sample, over all axes but the first. gamma_t of the paper.

    Exactly 1 for equal samples, NaN if one of two is zero. Sums are in float32, or float64 for float64.

    Parameters
    ----------
    a, b : tensors of one shape (B, ...), floating

    Returns
    -------
    tensor of shape (B,), float32 or float64

    Examples
    --------
    >>> cosine_similarity(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]]))
    tensor([1., 0.])
    """
    if a.shape != b.shape or a.ndim < 2 or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            f"a and b must be floating tensors of one shape (B, ...), got {a.dtype} {tuple(a.shape)} and "
            f"{b.dtype} {tuple(b.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.flatten(1).to(dtype), b.flatten(1).to(dtype)
    ab, aa, bb = (torch.linalg.vecdot(x, y) for x, y in ((a, b), (a, a), (b, b)))
    return (ab / (aa * bb).sqrt()).clamp(-1, 1)  # the root of a square is exact, so that equal ones have exactly 1


def in_space(epsilon: Tensor, sample: Tensor, alpha: float, sigma: float, space: str) -> Tensor:
    """What of a noise prediction is compared, at ``x_t = alpha x_0 + sigma eps``.

    Parameters
    ----------
    epsilon, sample : tensors of one shape
        The predicted noise, and x_t.
    alpha, sigma : float
    space : {"eps", "x_minus_eps", "x0"}
        "eps": the noise. "x_minus_eps": ``x_t - eps``, with x_t scaled to ``alpha^2 + sigma^2 = 1``, as the network
        of Stable Diffusion sees it whatever the scheduler (ours). "x0": ``(x_t - sigma eps) / alpha``.

    Examples
    --------
    >>> in_space(torch.tensor([1.0]), torch.tensor([2.0]), 0.6, 0.8, "x0")
    tensor([2.])
    """
    if space == "eps":
        return epsilon
    if space == "x_minus_eps":
        return sample / math.hypot(alpha, sigma) - epsilon
    if space == "x0":
        return torch.sub(sample, epsilon, alpha=sigma) / alpha
    raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")


def calls_at(
    similarities: Tensor | Sequence[Tensor], threshold: float, *, per_sample: bool = True, min_guided_steps: int = 1
) -> Tensor:
    """Network calls that AG takes at a threshold, from the gamma_t of full CFG: ``2 k + (T - k)``.

    Until it crosses, AG is CFG: one CFG run tells of all thresholds.

    Parameters
    ----------
    similarities : tensor of shape (T, B), or T tensors of shape (B,)
        ``AdaptiveGuidance(threshold=2, ...).similarities`` after a run.
    threshold : float
    per_sample : bool, default=True
        False: all samples go on until the last of them has crossed.
    min_guided_steps : int, default=1

    Returns
    -------
    tensor of shape (B,), int64

    Examples
    --------
    >>> gammas = torch.tensor([[0.5, 0.95], [0.8, 0.8], [0.95, 0.99], [0.99, 0.99]])
    >>> calls_at(gammas, 0.9), calls_at(gammas, 0.9, per_sample=False), calls_at(gammas, 2.0)
    (tensor([7, 5]), tensor([7, 7]), tensor([8, 8]))
    """
    gammas = _stacked(similarities)
    crossed = gammas >= threshold
    crossed[: min_guided_steps - 1] = False
    k = ((crossed.cumsum(0) == 0).sum(0) + 1).clamp(max=len(gammas))  # (B,) the crossing step is guided
    return len(gammas) + (k if per_sample else k.amax().expand_as(k))


def choose_threshold(
    similarities: Tensor | Sequence[Tensor],
    saving: float = 0.25,
    *,
    per_sample: bool = True,
    min_guided_steps: int = 1,
) -> float:
    """The highest threshold at which AG saves at least this share of CFG's calls, in the mean over samples. Ours.

    Parameters
    ----------
    similarities : tensor of shape (T, B), or T tensors of shape (B,)
        Of full CFG, as of `calls_at`, on seeds and prompts that are for choosing.
    saving : float, default=0.25
        The paper's 30 calls for 40.
    per_sample, min_guided_steps : as of the guider

    Raises
    ------
    ValueError
        If no threshold saves as much.

    Examples
    --------
    >>> gammas = torch.tensor([[0.5, 0.6], [0.8, 0.8], [0.95, 0.9], [0.99, 0.99]])
    >>> round(choose_threshold(gammas, 0.25), 3)
    0.8
    """
    gammas = _stacked(similarities)
    if not 0 <= saving < 0.5:
        raise ValueError(f"saving must be >= 0 and < 0.5, as one of two calls remains, got {saving}")
    most = 2 * len(gammas) * (1 - saving) + 1e-9

    def fits(threshold: float) -> bool:
        calls = calls_at(gammas, threshold, per_sample=per_sample, min_guided_steps=min_guided_steps)
        return float(calls.double().mean()) <= most

    # Calls grow with the threshold, and only just above a value that was measured: bisect among these.
    candidates = gammas[gammas.isfinite()].double().unique().tolist()
    low, high = -1, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(candidates[middle]) else (low, middle - 1)
    if low < 0:
        raise ValueError(f"no threshold saves {saving:.0%} of the calls (min_guided_steps={min_guided_steps})")
    return float(candidates[low])


def _stacked(similarities: Tensor | Sequence[Tensor]) -> Tensor:
    gammas = similarities if isinstance(similarities, Tensor) else torch.stack(list(similarities))
    if gammas.ndim != 2 or not gammas.numel():
        raise ValueError(f"similarities must be of shape (T, B), got {tuple(gammas.shape)}")
    return gammas


# ---- the guider


class AdaptiveGuidance(BaseGuidance):
    """Classifier-free guidance that stops asking for the unconditional prediction once it has become redundant.

    Parameters
    ----------
    guidance_scale : float, default=7.5
        The paper's, as that of `diffusers.guiders.ClassifierFreeGuidance`. At 1 nothing is guided.
    threshold : float, default=0.991
        gbar; the paper's, for noise predictions of latent text-to-image models. Above 1: never, which is CFG.
    guidance_rescale : float, default=0.0
    space : {"eps", "x_minus_eps", "x0"}, default="eps"
        What is compared, see `in_space`. Predictions of v, flow or x0 are turned into it. In diffusers' modular
        pipelines, which withhold the latents, only "eps", and predictions are compared as they come.
    per_sample : bool, default=False
        False: the batch goes on until all its samples have crossed (each for good). True: each sample stops by itself,
        and the unconditional batch shrinks. This needs `shoestring.guide.sample` or `apply`.
    min_guided_steps : int, default=1
        So many steps are guided at least. Ours.
    inner : BaseGuidance, optional
        What guides until then, in place of CFG: `PerpNegGuidance`, or a guider of diffusers that works on predictions.
        Scale, rescale, start and stop are then its own.
    start, stop : float, default=0.0, 1.0
        Share of the steps between which there is guidance at all, as in diffusers.
    enabled : bool, default=True

    Attributes
    ----------
    inner : BaseGuidance
    similarities : list of tensors of shape (B,)
        gamma of the guided steps of the last run; NaN where it was not measured.
    converged : bool tensor of shape (B,), or None
        Which samples have crossed.
    crossing_steps : int64 tensor of shape (B,), or None
        Index of the step at which each crossed first; -1: not.
    num_function_evaluations : float
        Network evaluations a sample in the last run.

    Raises
    ------
    ValueError
        For an option out of range, or an `inner` that cannot be switched off (see Notes).

    Notes
    -----
    Cost beside the network: three sums over the prediction a guided step, and one number that the host waits for.
    A new run begins with ``set_state(step=0, ...)``. With solvers of second order (Heun) the switch waits for the end
    of the solver's step; multistep solvers mix both kinds in one step.

    Refused as `inner`: CFG++ (its step puts the noise of the unconditional prediction back, at every step: without it
    there is no CFG++ step), guiders that ask the network themselves, guiders that change the network between calls,
    and adaptive ones. With `per_sample`: those that remember the batch (momentum), or have a weight for each image.

    Examples
    --------
    >>> from shoestring import zoo
    >>> from shoestring.guide import sample
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> boots, nothing = torch.full((2,), 9), torch.full((2,), 10)
    >>> guider = AdaptiveGuidance(2.0, threshold=-1)
    >>> sample(model, scheduler, guider, noise, (boots, nothing), num_inference_steps=4).num_calls
    5.0
    >>> guider.crossing_steps
    tensor([0, 0])

    A threshold for this model, that saves a quarter of the calls of other seeds:

    >>> cfg = AdaptiveGuidance(2.0, threshold=2)
    >>> _ = sample(model, scheduler, cfg, noise, (boots, nothing), num_inference_steps=4)
    >>> guider = AdaptiveGuidance(2.0, threshold=choose_threshold(cfg.similarities, 0.25))
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]
    inner: Any
    similarities: list[Tensor]
    converged: Tensor | None
    num_function_evaluations: float
    _measured: list[int]  # the step of each of the similarities
    _off: Tensor | None  # samples that are not guided any more
    _done: bool  # none is
    _step: int | None

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        threshold: float = 0.991,
        guidance_rescale: float = 0.0,
        space: str = "eps",
        per_sample: bool = False,
        min_guided_steps: int = 1,
        inner: Any = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.register_to_config(_use_default_values=[])  # diffusers forgets positional arguments in `new`
        check_finite("guidance_scale", guidance_scale)
        check_finite("threshold", threshold)
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        if isinstance(min_guided_steps, bool) or not isinstance(min_guided_steps, int) or min_guided_steps < 1:
            raise ValueError(f"min_guided_steps must be a whole number >= 1, got {min_guided_steps!r}")
        if inner is None:
            self.inner = ClassifierFreeGuidance(guidance_scale, guidance_rescale, start=start, stop=stop)
        else:
            if (guidance_scale, guidance_rescale, start, stop) != (7.5, 0.0, 0.0, 1.0):
                raise ValueError("guidance_scale, guidance_rescale, start and stop are those of inner: set them there")
            self.inner = _built(inner) if isinstance(inner, dict) else inner
            _check_inner(self.inner, per_sample)
            self.register_to_config(inner=_described(self.inner))
        self.threshold = threshold
        self.space = space
        self.per_sample = per_sample
        self.min_guided_steps = min_guided_steps
        self._order = 1
        self._current: Any = None
        self._reset()

    def set_scheduler(self, scheduler: Any) -> None:
        """Before a run: how many calls of the network a step of the solver has."""
        self._order = int(getattr(scheduler, "order", 1))
        if hasattr(self.inner, "set_scheduler"):
            self.inner.set_scheduler(scheduler)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Before every step; step 0 begins a new run."""
        super().set_state(step, num_inference_steps, timestep)
        self.inner.set_state(step, num_inference_steps, timestep)
        self._current = None
        if step == 0:
            self._reset()
        if step % self._order == 0 and self.converged is not None and not self._done:
            self._off = self.converged
            self._done = bool(self.converged.all())

    def set_step(self, step: Any) -> None:
        """What `shoestring.guide.sample` and `apply` tell of a step."""
        self._current = step
        if hasattr(self.inner, "set_step"):
            self.inner.set_step(step)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Of a guided step what `inner` asks for, afterwards the condition alone."""
        self._check_way()
        return self.inner.prepare_inputs(data) if self._is_guiding() else [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, for pipelines whose conditions are fields of a state."""
        self._check_way()
        if self._is_guiding():
            return self.inner.prepare_inputs_from_block_state(data, input_fields)
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **more: Tensor) -> GuiderOutput:
        """The guided prediction, or `pred_cond` once all samples have crossed."""
        if not self._is_guiding():
            output = GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
            self._count(1)
        else:
            others = {name: p for name, p in {"pred_uncond": pred_uncond, **more}.items() if p is not None}
            if not others:
                raise ValueError("pred_uncond is missing in a guided step")
            output = self.inner.forward(pred_cond, **others)
            self._count(1 + len(others))
            self._observe(self._similarity(pred_cond, others.values()))
        self._end_step()
        return output

    @property
    def predict(self) -> Any:
        """``predict(step)``, with `per_sample` only: by its presence the sampler knows who asks the network itself."""
        if not self.per_sample:
            raise AttributeError("predict is there with per_sample=True only")
        return self._predict

    def _predict(self, step: Any) -> Tensor:
        """The prediction of one step, each sample guided or not."""
        pred_cond = step.predict(0)
        self._count(1)
        if self._is_guiding():
            rows = None if self._off is None else (~self._off).nonzero().squeeze(1)
            if rows is not None and len(rows) == len(pred_cond):
                rows = None
            own = pred_cond if rows is None else pred_cond[rows]
            data = {
                name: tuple(c[name] if rows is None else c[name][rows] for c in step.conditions)
                for name in step.conditions[0]
            }
            try:
                batches = self.inner.prepare_inputs(data)
            except IndexError:
                raise ValueError(
                    f"{type(self.inner).__name__} needs more than the {len(step.conditions)} conditions given: "
                    "(condition, its absence or a negative one, further ones)"
                ) from None
            # One call for each condition: in one call with the whole batch the few rows were no cheaper on a CPU.
            others = {}
            for batch in batches:
                identifier = getattr(batch, self._identifier_key)
                if identifier != "pred_cond":
                    others[identifier] = step.predict({name: getattr(batch, name) for name in data}, rows)
            guided = self.inner.forward(own, **others)[0]
            self._count(len(others) * len(own) / len(pred_cond))
            gamma = self._similarity(own, others.values(), rows)
            if rows is None:
                pred_cond = guided
            else:
                pred_cond = pred_cond.index_copy(0, rows, guided)
                gamma = gamma.new_full((len(pred_cond),), math.nan).index_copy(0, rows, gamma)
            self._observe(gamma)
        self._end_step()
        return pred_cond

    @property
    def is_conditional(self) -> bool:
        self.inner._count_prepared = self._count_prepared  # what pipelines tell this guider alone
        return bool(self.inner.is_conditional) if self._is_guiding() else True

    @property
    def num_conditions(self) -> int:
        return self.inner.num_conditions if self._is_guiding() else 1

    def _is_guiding(self) -> bool:
        return self._enabled and not self._done and self.inner.num_conditions > 1

    def _similarity(self, pred_cond: Tensor, others: Iterable[Tensor], rows: Tensor | None = None) -> Tensor:
        own = self._compared(pred_cond, rows)
        gammas = [cosine_similarity(own, self._compared(other, rows)) for other in others]
        return gammas[0] if len(gammas) == 1 else torch.stack(gammas).amin(0)  # (B,)

    def _compared(self, prediction: Tensor, rows: Tensor | None) -> Tensor:
        step = self._current
        if step is None:  # a modular pipeline
            return prediction
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if self.space == "x0" and step.kind != "epsilon":
            return step.to_x0(prediction, rows)
        sample = step.sample if rows is None else step.sample[rows]
        return in_space(step.to_epsilon(prediction, rows), sample, step.alpha, step.sigma, self.space)

    def _observe(self, gamma: Tensor) -> None:
        """Who has crossed at this step. gamma: (B,), NaN for samples that had crossed before."""
        self.similarities.append(gamma)
        self._measured.append(self._step or 0)
        if len(self.similarities) >= self._least():
            crossed = gamma >= self.threshold
            self.converged = crossed if self.converged is None else self.converged | crossed

    def _least(self) -> int:
        """So many network calls are guided at least."""
        return self.min_guided_steps * self._order

    @property
    def crossing_steps(self) -> Tensor | None:
        if not self.similarities:
            return None
        crossed = torch.stack(self.similarities) >= self.threshold  # (guided calls, B)
        crossed[: self._least() - 1] = False
        steps = torch.tensor(self._measured, device=crossed.device)[crossed.int().argmax(0)]
        return torch.where(crossed.any(0), steps, -1)

    def _count(self, evaluations: float) -> None:
        self.num_function_evaluations += evaluations

    def _check_way(self) -> None:
        if self.per_sample or (self.space != "eps" and self._current is None):
            what = "per_sample=True" if self.per_sample else f"space={self.space!r}"
            raise ValueError(f"{what} needs the latents: use shoestring.guide.sample or shoestring.guide.apply")

    def _end_step(self) -> None:
        """After the last one, pipelines ask `num_conditions` whether to encode the next run's negative prompt."""
        if self._step is not None and self._step + 1 == self._num_inference_steps:
            self._done, self._off = False, None

    def _reset(self) -> None:
        self.similarities, self._measured = [], []
        self.converged = self._off = None
        self._done = False
        self.num_function_evaluations = 0.0


# ---- helpers


def _check_inner(inner: Any, per_sample: bool) -> None:
    """Raise if it makes no sense to switch this guider off half-way."""
    if not isinstance(inner, BaseGuidance):
        raise TypeError(f"inner must be a guider (BaseGuidance), got {type(inner).__name__}")
    from shoestring.guide.cfgpp import CFGPlusPlusGuidance

    weights = getattr(inner, "weights", None)
    reason = None
    if isinstance(inner, CFGPlusPlusGuidance):
        reason = "CFG++ renoises with the unconditional prediction at every step, so that it never becomes redundant"
    elif isinstance(inner, AdaptiveGuidance | LinearAdaptiveGuidance):
        reason = "it is adaptive already"
    elif hasattr(inner, "predict"):
        reason = "it asks the network itself and has no prediction that could be left out"
    elif type(inner).prepare_models is not BaseGuidance.prepare_models:
        reason = "its second prediction is of a changed network, not of another condition"
    elif per_sample and getattr(inner, "adaptive_projected_guidance_momentum", None) is not None:
        reason = "with per_sample=True the batch shrinks, and its momentum is of the whole batch"
    elif per_sample and isinstance(weights, list | tuple) and any(isinstance(w, list | tuple) for w in weights):
        reason = "with per_sample=True the batch shrinks, and its weights are one for each image"
    if reason:
        raise ValueError(f"inner must be a guider that may stop, got {type(inner).__name__}: {reason}")


def _described(inner: Any) -> dict[str, Any]:
    """A guider as JSON can hold it."""
    options = {name: value for name, value in inner.config.items() if not name.startswith("_")}
    return {"_module": type(inner).__module__, "_class_name": type(inner).__name__, **options}


def _built(description: dict[str, Any]) -> Any:
    """The guider of `_described`. A file may name only diffusers' and this package's: it is not code to be run."""
    options = dict(description)
    module, name = str(options.pop("_module", "")), str(options.pop("_class_name", ""))
    if module.split(".")[0] not in ("diffusers", "shoestring"):
        raise ValueError(f"inner must be of diffusers or shoestring to be loaded, got {module}.{name}: pass inner=...")
    guider: Any = getattr(import_module(module), name, None)
    is_guider = isinstance(guider, type) and issubclass(guider, BaseGuidance)
    if not is_guider:
        raise ValueError(f"inner must be a guider, got {module}.{name}")
    return guider.from_config(options)
