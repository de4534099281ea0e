r"""Re-imagine the Negative Prompt Algorithm: Transform 2D Diffusion into 3D, alleviate Janus problem and Beyond.

Armandpour, Sadeghian, Zheng, Sadeghian, Zhou. 2023, arXiv 2304.04968 (Perp-Neg).

Idea
----
A negative prompt mostly says what the prompt says ("a red bag in the middle" against "a red bag"), so that to subtract
its direction takes away what was asked for. Perp-Neg subtracts only the part of it that is perpendicular to the
direction of the prompt: however large the weight, the prompt keeps its strength.

Equations
---------
For each sample, with the network's predictions e_u (no prompt), e_p (the main prompt), e_i (auxiliary prompt i, of
weight w_i: negative to remove it, positive to add it) and the guidance scale s::

    p = e_p - e_u,    n_i = e_i - e_u
    n_i^perp = n_i - <n_i, p> / max(||p||^2, 10^-6) p
    e = e_u + s (p + sum_i w_i n_i^perp)

The inner product runs over all axes but the batch. <e - e_u, p> = s ||p||^2 for all weights. With no auxiliary prompt
this is classifier-free guidance; with n_i in place of n_i^perp, plain composition, which at w = -1 and e_i near e_p has
nothing of the prompt left. Epsilon, v, flow and x_0 predictions of one step are affine in each other with the same
slope, and the coefficient of p has no unit: e is the same in each of them.

Text to 3D (`view_weights`): with the azimuth phi of the camera in degrees, z the text encoder's states of "..., front
view", side and back, and nw = -2, fd = 2, sd = 10::

    |phi| <= 90:  r = 1 - |phi| / 90        positive r z_front + (1 - r) z_side
                  w_front = 0 if r > 0.8 else nw exp(-fd r),    w_side = 0 if r < 0.2 else nw exp(-sd (1 - r))
    |phi| >  90:  r = 2 - |phi| / 90        positive r z_side + (1 - r) z_back
                  w_front = nw,                                 w_side = 0 if r > 0.8 else nw / 2 exp(-sd r)

Score distillation puts e in the place of the guided prediction: the gradient is (1 - alpha_bar_t) (e - epsilon).

What to expect
--------------
* One network call more for each auxiliary prompt; those of ``|w|`` < 10^-4 are left out, as in the official 3D code.
* e_u must be of the EMPTY prompt. A negative prompt in its place, as pipelines of diffusers take it, is another method;
  the same negative prompt in both places gives n = 0, and a warning here.
* Auxiliary prompts are projected on p, not on each other: two that say the same count twice.
* Nothing along p is removed: what the prompt itself implies ("a red bag" is mostly drawn in the middle) stays in part,
  at any weight.

Code and paper
--------------
Read: the official 2D pipeline, copies of the official 3D code in other repositories, ComfyUI's node, the abstract and
the card of this project. Not read: the paper's text; its success rates and its 3D results were not measured again.

* The official 2D pipeline makes one image, has no 10^-6 (NaN for p = 0), leaves the prediction undefined at s <= 1,
  and gives each complementary positive prompt the weight of the one before it (the first the main prompt's). The 3D
  code has the 10^-6, works per sample and wants weight 1 for the main prompt. Here: the 3D code's formula; the main
  prompt has no weight but s.
* ComfyUI sums over the whole batch, without the 10^-6: results depend on the other images. Its ``neg_scale`` 1 is
  our weight -1 and the default here; the paper's code has none.
* Half precision is computed in float32: the inner product of 65,536 numbers is not one of float16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from shoestring.guide._sampler import is_between

__all__ = ["PerpNegGuidance", "perp_neg", "perpendicular", "sds_gradient", "view_weights"]

EPS = 1e-6  # of the official 3D code
NEGLIGIBLE = 1e-4  # weights below are left out, as in the official 3D code
AUX = "pred_aux_"

Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]


# ---- the mathematics


def perpendicular(n: Tensor, p: Tensor, *, eps: float = EPS) -> Tensor:
    """``n - <n, p> / max(||p||^2, eps) p``: the part of n that is perpendicular to p, for each sample by itself.

    Parameters
    ----------
    n, p : Tensor of one shape (B, ...) and one floating dtype
        Directions; half precision comes back in half precision, but is summed in float32.
    eps : float, default=1e-6
        Of the official 3D code. Where ``||p||^2 < eps`` less than the whole projection is taken off.

    Returns
    -------
    Tensor of the shape and dtype of n

    Examples
    --------
    >>> perpendicular(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    if n.shape != p.shape or n.ndim < 2:
        raise ValueError(f"n and p must be of one shape (B, ...), got {tuple(n.shape)} and {tuple(p.shape)}")
    work = torch.promote_types(n.dtype, torch.float32)
    n_, p_ = n.to(work), p.to(work)
    axes = tuple(range(1, n.ndim))
    # Sums of products, not a matrix product: that may run in TF32, and rounds differently for other batches.
    onto = (n_ * p_).sum(axes, keepdim=True) / (p_ * p_).sum(axes, keepdim=True).clamp(min=eps)  # (B, 1, ...)
    return torch.addcmul(n_, onto, p_, value=-1).to(n.dtype)


def perp_neg(
    pred_uncond: Tensor,
    pred_cond: Tensor,
    preds_aux: Tensor | Sequence[Tensor],
    weights: Weights,
    guidance_scale: float,
    *,
    eps: float = EPS,
) -> Tensor:
    """The guided prediction ``e_u + s (p + sum_i w_i n_i^perp)``.

    ``9 K + 3`` flops a number of the prediction, and no network call: the K + 2 predictions are the cost.

    Parameters
    ----------
    pred_uncond, pred_cond : Tensor of shape (B, ...), floating
        Predictions without a prompt, and of the main prompt: epsilon, v, flow or x_0.
    preds_aux : K tensors of shape (B, ...), or one of shape (K, B, ...)
        Predictions of the auxiliary prompts.
    weights : (K,) or (K, B) numbers or Tensor
        Negative to remove, positive to add; for all samples, or for each.
    guidance_scale : float
        0: e_u. 1 with weights 0: e_p.
    eps : float, default=1e-6
        See `perpendicular`.

    Returns
    -------
    Tensor of the shape and dtype of pred_cond

    Raises
    ------
    ValueError
        If shapes do not fit.

    Examples
    --------
    The negative prompt is the prompt and something more; only that is subtracted:

    >>> e_u, e_p, e_n = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    >>> perp_neg(e_u, e_p, [e_n], [-1.0], 2.0)
    tensor([[ 2., -2.]])
    >>> e_u + 2.0 * ((e_p - e_u) - 1.0 * (e_n - e_u))  # plain composition has forgotten the prompt
    tensor([[ 0., -2.]])
    """
    if pred_uncond.shape != pred_cond.shape:
        raise ValueError(
            f"pred_uncond and pred_cond must be of one shape, got {tuple(pred_uncond.shape)} and "
            f"{tuple(pred_cond.shape)}"
        )
    w = _weights(weights, len(preds_aux), pred_cond)
    work = torch.promote_types(pred_cond.dtype, torch.float32)
    e_u = pred_uncond.to(work)
    p = pred_cond.to(work) - e_u
    d = p
    for w_i, e_i in zip(w, preds_aux, strict=True):
        d = d + w_i * perpendicular(e_i.to(work) - e_u, p, eps=eps)
    return torch.add(e_u, d, alpha=guidance_scale).to(pred_cond.dtype)


def view_weights(
    azimuth: Tensor | Sequence[float] | float,
    front: Tensor,
    side: Tensor,
    back: Tensor,
    *,
    negative_w: float = -2.0,
    front_decay_factor: float = 2.0,
    side_decay_factor: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Prompt and weights for a camera: what keeps a text-to-3D model from showing the front from every side.

    Parameters
    ----------
    azimuth : (B,) numbers, or one
        Degrees; 0 looks at the front, 180 at the back. Any turn: 270 is -90.
    front, side, back : Tensor of one shape (1, L, d), or (L, d)
        The text encoder's states of the prompt with "front view", "side view", "back view". Pooled states (1, d) too.
    negative_w, front_decay_factor, side_decay_factor : float, default -2, 2, 10
        Of the official 3D code.

    Returns
    -------
    embeds : Tensor of shape (B, L, d), dtype of `front`
        The positive prompt.
    weights : float64 Tensor of shape (2, B)
        Of the auxiliary prompts `front` and `side`, in this order (official: the other order beyond 90 degrees).

    Raises
    ------
    ValueError
        If shapes differ, or an angle is not finite.

    Examples
    --------
    >>> z = [torch.full((1, 1, 1), value) for value in (0.0, 1.0, 2.0)]
    >>> embeds, weights = view_weights([0, 90, 180], *z)
    >>> embeds.flatten().tolist(), weights.tolist()
    ([0.0, 1.0, 2.0], [[0.0, -2.0, -2.0], [-2.0, 0.0, -1.0]])
    """
    if not front.shape == side.shape == back.shape or front.ndim < 2:
        shapes = ", ".join(str(tuple(z.shape)) for z in (front, side, back))
        raise ValueError(f"front, side and back must be of one shape (1, L, d) or (L, d), got {shapes}")
    phi = torch.as_tensor(azimuth, dtype=torch.float64).to(front.device).reshape(-1)  # (B,)
    if not bool(phi.isfinite().all()):
        raise ValueError(f"azimuth must be finite, got {phi.tolist()}")
    turn = ((phi + 180) % 360 - 180).abs() / 90  # 0: front, 1: side, 2: back
    before = turn <= 1
    r = torch.where(before, 1 - turn, 2 - turn)
    w_front = torch.where(before, (negative_w * torch.exp(-front_decay_factor * r)).masked_fill(r > 0.8, 0), negative_w)
    w_side = torch.where(
        before,
        (negative_w * torch.exp(-side_decay_factor * (1 - r))).masked_fill(r < 0.2, 0),
        (negative_w / 2 * torch.exp(-side_decay_factor * r)).masked_fill(r > 0.8, 0),
    )
    shares = torch.stack([r * before, torch.where(before, 1 - r, r), (1 - r) * ~before])  # (3, B)
    z = torch.stack([front, side, back])
    z = z.reshape(3, *z.shape[2:]) if front.shape[0] == 1 else z  # (3, L, d)
    work = torch.promote_types(front.dtype, torch.float32)
    return torch.einsum("vb,v...->b...", shares.to(work), z.to(work)).to(front.dtype), torch.stack([w_front, w_side])


def sds_gradient(prediction: Tensor, noise: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """``(1 - alpha_bar_t) (e - epsilon)``: the gradient of score distillation with respect to the latents.

    Parameters
    ----------
    prediction : Tensor of shape (B, ...)
        `perp_neg` of epsilon predictions; the official 3D code has s = 100 and t from 2 to 98 % of the steps.
    noise : Tensor of the same shape
        What was added to the latents.
    alpha_bar : float or Tensor of shape (B,)
        ``scheduler.alphas_cumprod[t]``.

    Examples
    --------
    >>> sds_gradient(torch.full((1, 2), 3.0), torch.ones(1, 2), torch.tensor([0.75]))
    tensor([[0.5000, 0.5000]])
    """
    a = torch.as_tensor(alpha_bar, dtype=prediction.dtype, device=prediction.device)
    return (1 - a.reshape(-1, *[1] * (prediction.ndim - 1))) * (prediction - noise)


# ---- the guider


class PerpNegGuidance(BaseGuidance):
    """Negative and complementary prompts that cannot weaken the main prompt, for every pipeline that takes a guider.

    The auxiliary prompts come as further conditions: ``shoestring.guide.sample(..., conditions=(prompt, empty, hat))``,
    ``shoestring.guide.apply(pipe, guider, auxiliary=["a hat"])``; in a modular pipeline of diffusers, which knows but
    two, by `set_auxiliary`.

    Parameters
    ----------
    guidance_scale : float, default=7.5
        Of the official 2D pipeline.
    weights : float, or a list of K numbers or of K lists of B numbers; default=-1.0
        Of the K auxiliary prompts (a number: of the only one), negative to remove. Lists of B: one for each image. The
        default is ComfyUI's; the official demo has -1.5. Prompts of ``|weight| < 1e-4`` are not computed.
    eps : float, default=1e-6
        See `perpendicular`.
    start, stop : float, default 0.0, 1.0
        The share of steps that are guided; outside only the main prompt is computed (diffusers' convention).
    enabled : bool, default=True

    Notes
    -----
    Network calls a step: 2 + K. The configuration is saved and loaded by `save_pretrained` and `from_pretrained`; the
    prompts of `set_auxiliary` are data and are not in it.

    Examples
    --------
    >>> guider = PerpNegGuidance(guidance_scale=2.0, weights=[-1.0])
    >>> e_u, e_p, e_n = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    >>> guider.forward(e_p, e_u, pred_aux_0=e_n).pred
    tensor([[ 2., -2.]])
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        weights: float | list[float] | list[list[float]] = -1.0,
        eps: float = EPS,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.register_to_config(_use_default_values=[])  # diffusers forgets positional arguments in `new`
        for name, number in (
            ("guidance_scale", guidance_scale),
            ("eps", eps),
            *(("weights", w) for w in _flat(weights)),
        ):
            if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"{name} must be finite numbers (of a tensor: its tolist()), got {number!r}")
        if eps <= 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        self.guidance_scale = guidance_scale
        self.weights: list[Any] = [weights] if isinstance(weights, Real) else list(weights)  # type: ignore[arg-type]
        self.eps = eps
        self._auxiliary: tuple[dict[str, Any], ...] = ()
        self._checked = False

    def set_auxiliary(self, *conditions: Mapping[str, Any]) -> None:
        """Give the auxiliary prompts to a guider whose pipeline brings but (prompt, empty prompt). None: forget them.

        Parameters
        ----------
        *conditions : mapping of network arguments
            One for each auxiliary prompt, by the names that the pipeline uses: SDXL's modular pipeline
            ``prompt_embeds`` and ``text_embeds`` (pooled), most others ``encoder_hidden_states``. Of one row, or of one
            a sample. Arguments that do not depend on the prompt (``time_ids``) may be left out.
        """
        for number, condition in enumerate(conditions):
            if not isinstance(condition, Mapping) or not condition:
                raise TypeError(
                    f"auxiliary prompt {number} must be a mapping of network arguments, "
                    f"say {{'prompt_embeds': tensor}}, got {type(condition).__name__}"
                )
        self._auxiliary = tuple(dict(condition) for condition in conditions)
        self._checked = False

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        self._checked = self._checked and step > 0
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch a network call: main prompt, empty prompt, auxiliary prompts.

        Raises
        ------
        ValueError
            If there is no empty or no auxiliary prompt, there are more or fewer than weights, or one does not fit the
            main prompt in width or rows.
        """
        names = self._predictions()
        if len(names) > 1:
            data = self._completed(data)
        return [self._prepare_batch(data, _index(name), name) for name in names]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, for pipelines whose conditions are fields of a state."""
        conditions = {}
        for name, fields in input_fields.items():
            fields = (fields, fields) if isinstance(fields, str) else fields
            if hasattr(data, fields[0]):
                conditions[name] = tuple(getattr(data, field, None) for field in fields)
        return self.prepare_inputs(conditions)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **preds_aux: Tensor) -> GuiderOutput:
        """`perp_neg` of the predictions; auxiliary prompt i is called ``pred_aux_i``."""
        names = self._predictions()
        if pred_uncond is None or len(names) == 1:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=pred_uncond)
        if sorted(preds_aux) != sorted(names[2:]):
            raise ValueError(f"auxiliary predictions must be {names[2:]}, as weights are given, got {[*preds_aux]}")
        weights = [self.weights[_index(name) - 2] for name in preds_aux]
        pred = perp_neg(pred_uncond, pred_cond, [*preds_aux.values()], weights, self.guidance_scale, eps=self.eps)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared != 2  # all but the empty prompt

    @property
    def num_conditions(self) -> int:
        return len(self._predictions())

    def _predictions(self) -> list[str]:
        """What the network is asked at this step, in this order."""
        used = [f"{AUX}{i}" for i, w in enumerate(self.weights) if any(abs(x) >= NEGLIGIBLE for x in _flat(w))]
        guided = self._enabled and (bool(used) or not math.isclose(self.guidance_scale, 1.0))
        guided = guided and is_between(self)
        return ["pred_cond", "pred_uncond", *used] if guided else ["pred_cond"]

    def _completed(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """`data` with the auxiliary prompts behind (prompt, empty prompt), whoever brought them."""
        pairs = {name: value for name, value in data.items() if isinstance(value, tuple)}
        for name, value in pairs.items():
            if len(value) < 2 or (value[0] is not None and value[1] is None):
                raise ValueError(f"{name} must be (prompt, empty prompt, ...): Perp-Neg needs the empty prompt too")
        most = max((len(value) for value in pairs.values()), default=2)
        brought = [{name: value[i] for name, value in pairs.items() if i < len(value)} for i in range(2, most)]
        if brought and self._auxiliary:
            raise ValueError(
                f"auxiliary prompts come both with the conditions ({len(brought)}) and from set_auxiliary "
                f"({len(self._auxiliary)}): forget the latter by set_auxiliary()"
            )
        auxiliary = brought or self._auxiliary
        if not auxiliary and len(self._predictions()) > 2:
            raise ValueError(
                "Perp-Neg needs an auxiliary prompt beside the prompt and the empty prompt, got none: give it as a "
                "third condition (shoestring.guide.sample), as auxiliary=[...] (shoestring.guide.apply), or by "
                "set_auxiliary (modular pipelines). The negative prompt does not go in the place of the empty one."
            )
        if auxiliary and len(auxiliary) != len(self.weights):
            raise ValueError(f"weights must be one for each of {len(auxiliary)} auxiliary prompts, got {self.weights}")
        whole = {
            name: (*value[:2], *(_fitted(name, prompt.get(name, value[0]), value[0]) for prompt in auxiliary))
            for name, value in pairs.items()
        }
        if not self._checked:
            self._check(whole, auxiliary)
            self._checked = True
        return {**data, **whole}

    def _check(self, whole: Mapping[str, tuple[Any, ...]], auxiliary: Sequence[Mapping[str, Any]]) -> None:
        """Once a run, as it compares the prompts themselves."""
        depends = [name for name, value in whole.items() if not _same(value[0], value[1])]
        for number, prompt in enumerate(auxiliary):
            unknown = sorted(set(prompt) - set(whole))
            if unknown:
                raise ValueError(f"auxiliary prompt {number} has {unknown}, but the conditions here are {[*whole]}")
            lacking = [name for name in depends if name not in prompt]
            if lacking:
                raise ValueError(f"auxiliary prompt {number} lacks {lacking}, which depends on the prompt")
            if depends and all(_same(whole[name][2 + number], whole[name][1]) for name in depends):
                warnings.warn(
                    f"auxiliary prompt {number} is the same as the unconditional one and has no effect: Perp-Neg wants "
                    "the empty prompt there, not the negative prompt",
                    stacklevel=4,
                )


def _index(name: str) -> int:
    """Where the condition of a prediction is in (prompt, empty prompt, auxiliary 0, ...)."""
    if name.startswith(AUX):
        return 2 + int(name.removeprefix(AUX))
    return ["pred_cond", "pred_uncond"].index(name)


def _fitted(name: str, value: Any, prompt: Any) -> Any:
    """An auxiliary prompt as the main prompt is in device, dtype and rows."""
    if isinstance(value, list) and isinstance(prompt, list):  # states of one length a prompt (Z-Image)
        value = value * len(prompt) if len(value) == 1 else value
    if value is prompt or not (isinstance(value, Tensor) and isinstance(prompt, Tensor)):
        return value
    if value.ndim != prompt.ndim or (prompt.ndim > 1 and value.shape[-1] != prompt.shape[-1]):
        raise ValueError(
            f"{name} of an auxiliary prompt must be as wide as the main prompt's {tuple(prompt.shape)}, "
            f"got {tuple(value.shape)}"
        )
    if prompt.ndim and len(value) not in (1, len(prompt)):
        raise ValueError(f"{name} of an auxiliary prompt must have 1 or {len(prompt)} rows, got {len(value)}")
    return value.to(prompt.device, prompt.dtype).expand(*prompt.shape[:1], *value.shape[1:])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other


def _weights(weights: Any, number: int, like: Tensor) -> list[Any]:
    """Of each auxiliary prompt: a float, or a tensor that multiplies (B, ...)."""
    if len(weights) != number:
        raise ValueError(f"weights must be one for each of {number} auxiliary prompts, got {len(weights)}")
    if not isinstance(weights, Tensor) and all(isinstance(w, Real) for w in weights):
        return list(weights)
    rows = [torch.as_tensor(w, device=like.device).to(torch.promote_types(like.dtype, torch.float32)) for w in weights]
    for row in rows:
        if row.shape not in ((), like.shape[:1]):
            raise ValueError(f"weights of a prompt must be one number or {len(like)}, got shape {tuple(row.shape)}")
    return [row.reshape(-1, *[1] * (like.ndim - 1)) for row in rows]


def _flat(weights: Any) -> list[Any]:
    if isinstance(weights, list | tuple):
        return [number for row in weights for number in _flat(row)]
    return [weights]
