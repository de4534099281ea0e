r"""Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models.

Chen, Zhang, Zhou. ICLR 2025, arXiv 2409.11219.

Idea
----
A conditional diffusion model is distilled into a generator of one step, by score distillation, from its own samples and
no data. For the condition to be forgotten the teacher is asked about another one: the generator learns to answer the
forgotten class with a safe class, while it is being distilled.

Equations
---------
Three networks eps(x, t, c) start from the pretrained weights: teacher p (frozen), fake score s, generator g. With
a_t = sqrt(alphabar_t), b_t = sqrt(1 - alphabar_t)::

    X_n(x_t, t, c) = (x_t - b_t eps_n(x_t, t, c)) / a_t                                         what n thinks x_0 is (1)
    g(z, c)        = X_g(b_tau z, tau, c),   z ~ N(0, I),   b_tau / a_tau = 2.5                   one-step generator (2)
    x_t            = a_t x_g + b_t eps,   eps ~ N(0, I),   t uniform from t_min to t_max - 1                        (3)

    L_s(c)      = E sum ||eps - eps_s(x_t, t, c)||^2,   x_g = sg[g(z, c)]                                           (4)
    L_g(c, c_p) = E sum (P - S) * [(P - x_g) - alpha (P - S)] / w,   w = sg[mean |P - x_g|] >= 1e-5                 (5)
                  P = X_p(x_t, t, c_p),   S = X_s(x_t, t, c);   gradients flow through x_g and x_t, p and s stay

    score step:      L_s(c) + 0.01 L_s(c_f),            c drawn from what is retained, without c_f                  (6)
    generator step:  L_g(c, c) + 0.01 L_g(c_f, c_s),    c_f forgotten, c_s the safe ("override") condition          (7)

The two steps alternate. Sums run over the entries of a sample, so the scale of losses and of a good rate depends on the
resolution. Adam with betas (0, 0.999), gradients clipped entry by entry to 1. The product is the moving average of g.

For classes N(mu_c, I) and the exact s of a generator with mean m the gradient of (5) at every x_g is
-b_t^4 (mu_cp - m) / w, whatever alpha is: m moves to mu_cp, and stays there.

What to expect
--------------
* Samples take one network call instead of 20 to 50. An iteration costs some seven plain training steps of the same
  batch, and the paper takes up to 50,000: a short run forgets (conditions are easily redirected) long before it is a
  good generator.
* For alpha > 1 long runs can diverge: look at samples, keep the average.
* The generator keeps no multi-step sampler; the teacher, which still knows the class, must be thrown away.

Code and paper
--------------
Read: the official repository tqch/score-forgetting-distillation (DDPM part: losses, training loop, configuration) and
the card of this project; not the paper's text, nor the SD training loop. Followed: the code.

* The official t_init, t_min and t_max are 440, 38 and 712 on the schedule of DDPM (1000 linear betas up to 0.02), and
  t_init is 625 for Stable Diffusion: 440 and 625 are where b / a = 2.5. Defaults here are the times nearest to b / a =
  2.5, 0.137 and 13.1: the same numbers there, and the same noise on any other schedule.
* "Data-free" official code opens the data set for the shape and the classes of the rest. Here conditions are drawn
  uniformly from `retain`, and there is no loader.
* The official code draws c once for both steps; here each draws its own. Without an override it replaces c_f by a class
  of ten, class 9 twice as often; here by one of `retain`, uniformly. Not taken over: a classifier that chooses c_s, the
  variant without gradients through p and s (with alpha = 1 that one also drops w), longer times at the start.
* With guidance the official code guides both networks of (5), and s in (4) as well. So here; how it counts the scale
  was not checked: 1 is no guidance here.
* The official average is constant at 0.9999 from the first iteration; here min(0.9999, (1 + n) / (10 + n)) at iteration
  n, as a short run would else return its start.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.forget._diffusion import (
    Condition,
    at_least_zero,
    check_alike,
    check_diffusion,
    condition_rows,
    frozen_original,
    held_still,
    own_generator,
    positive,
    predict_noise,
    sample_shape,
    setting,
    signal_and_noise,
    wide,
)
from shoestring.loop import Record, State, fit

__all__ = [
    "ScoreForgettingDistiller",
    "denoised",
    "one_step_generate",
    "score_matching_loss",
    "sid_generator_loss",
    "time_of_noise",
]

NOISE_OF_GENERATOR, NOISE_LEAST, NOISE_MOST = 2.5, 0.137264, 13.10728  # b / a at 440, 38 and 712 of DDPM's schedule


# ---- the mathematics


def denoised(x_t: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(x_t - b eps) / a``: equation (1).

    Parameters
    ----------
    x_t, eps : tensor of shape (B, ...)
    a, b : tensor that broadcasts with them, a > 0

    Examples
    --------
    >>> denoised(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor(0.6), torch.tensor(0.8))
    tensor([1.])
    """
    return (x_t - b * eps) / a


def score_matching_loss(eps: Tensor, eps_s: Tensor) -> Tensor:
    """Equation (4): squared error of the noise, summed over a sample, averaged over samples.

    Parameters
    ----------
    eps, eps_s : tensor of one shape (B, ...)

    Examples
    --------
    >>> score_matching_loss(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(3.)
    """
    return (eps - eps_s).flatten(1).square().sum(1).mean()


def sid_generator_loss(x_g: Tensor, p_x0: Tensor, s_x0: Tensor, alpha: float = 1.2) -> Tensor:
    """Equation (5), the loss of the generator.

    Parameters
    ----------
    x_g : tensor of shape (B, ...)
        What the generator made.
    p_x0, s_x0 : tensor of shape (B, ...)
        P and S, of x_g with noise, with the graph that leads back to it.
    alpha : float, default 1.2
        The official value for DDPM; 1.0, for which the bracket is S - x_g, for Stable Diffusion.

    Returns
    -------
    0-d tensor, at least float32
        0, as its gradient is, where P = S as functions.

    Examples
    --------
    >>> x_g, P, S = torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> sid_generator_loss(x_g, P, S, alpha=1.0)  # (2 - 1) (1 - 0) / 2
    tensor(0.5000)
    """
    if not x_g.shape == p_x0.shape == s_x0.shape:
        shapes = [tuple(x.shape) for x in (x_g, p_x0, s_x0)]
        raise ValueError(f"x_g, p_x0 and s_x0 must have one shape, got {shapes}")
    x_g, P, S = (x.to(wide(x)).flatten(1) for x in (x_g, p_x0, s_x0))
    w = (P - x_g).detach().abs().mean(1, keepdim=True).clamp(min=1e-5)
    return ((P - S) * ((P - x_g) - alpha * (P - S)) / w).sum(1).mean()


def time_of_noise(scheduler: Any, ratio: float) -> int:
    """The timestep whose b_t / a_t is nearest to `ratio`.

    Examples
    --------
    >>> from diffusers import DDPMScheduler
    >>> [time_of_noise(DDPMScheduler(), ratio) for ratio in (2.5, 0.137264, 13.10728)]
    [440, 38, 712]
    >>> time_of_noise(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), 2.5)
    625
    """
    alphabar = scheduler.alphas_cumprod.double()
    return int((((1 - alphabar) / alphabar).sqrt() - ratio).abs().argmin())


def one_step_generate(
    unet: nn.Module, scheduler: Any, z: Tensor, condition: Condition, t_init: int | None = None
) -> Tensor:
    """Equation (2): one network call from noise to samples.

    The same with a scheduler alone: ``DDIMScheduler.step(unet(b * z, t_init, ...).sample, t_init, b * z)`` and its
    ``pred_original_sample``.

    Parameters
    ----------
    unet : UNet2DModel, UNet2DConditionModel, or nn.Module of the same call
    scheduler : diffusers scheduler with ``alphas_cumprod``
    z : tensor of shape (B, C, H, W)
        Standard normal noise.
    condition : int, sequence of int, or tensor
        Labels, or hidden states (L, D) or (K, L, D): one, or B.
    t_init : int, optional
        tau; by default where b / a is nearest to 2.5.

    Returns
    -------
    tensor of shape (B, C, H, W), at least float32
    """
    rows = condition_rows("condition", condition, unet)
    if len(rows) not in (1, len(z)):
        raise ValueError(f"condition must be one or {len(z)}, one for each z, got {len(rows)}")
    tau = time_of_noise(scheduler, NOISE_OF_GENERATOR) if t_init is None else t_init
    return _one_step(unet, scheduler, z, rows.expand(len(z), *rows.shape[1:]), tau)


def _one_step(unet: nn.Module, scheduler: Any, z: Tensor, rows: Tensor, tau: int) -> Tensor:
    t = torch.full((len(z),), tau, device=z.device)
    a, b = signal_and_noise(scheduler, t, z)
    x = b * z
    return denoised(x, predict_noise(unet, scheduler, x, t, rows), a, b)


class ScoreForgettingDistiller:
    """Distils a diffusion UNet into a one-step generator that answers a forgotten condition with another.

    In memory: teacher, fake score, generator and its average (four networks), and Adam's state of two.

    Parameters
    ----------
    unet : UNet2DModel with classes, UNet2DConditionModel, or nn.Module of the same call
        The teacher, on the device of the training. Not changed.
    scheduler : diffusers scheduler with ``alphas_cumprod``
        Says the noise levels and whether eps, v or x_0 is predicted.
    forget : int, sequence of int, or tensor
        c_f: class labels; or hidden states (L, D), or (K, L, D) for K prompts. Drawn uniformly.
    override : as `forget`, optional
        c_s: one for all, or K, one for each of `forget`. By default one of `retain`, drawn anew every time.
    retain : as `forget`, optional
        What is to stay as it is. By default all classes of `unet` but those of `forget` and `null`; needed for prompts.
    null : as `forget`, one row, optional
        The null condition. Needed for guidance.
    guidance_scale : float, default 1.0
        Of teacher and fake score; 1.0 is none (official DDPM), with others every call of the two counts twice.
    alpha : float, default 1.2
        Of (5); official for DDPM, 1.0 for Stable Diffusion.
    t_init, t_min, t_max : int, optional
        By default by noise level: 440, 38, 712 on the schedule of DDPM.
    forget_weight, score_forget_weight : float >= 0, default 0.01
        Of the second terms of (7) and of (6); official for DDPM, 1.0 for Stable Diffusion. 0: plain distillation.
    lr_score, lr_generator : float, default 1e-5
    betas : pair of float, default (0.0, 0.999)
    ema_decay : float in [0, 1), default 0.9999
    grad_clip_value : float > 0 or None, default 1.0
        Largest entry of a gradient.
    start : (score, generator), pair of nn.Module, optional
        Networks to start from, copied: of a first stage of plain distillation. By default `unet` for both.
    shape : (C, H, W), optional
        Of a sample; by default from the configuration of `unet`.

    Attributes
    ----------
    generator_ : nn.Module
        The average: the product, for ``save_pretrained`` and `one_step_generate`.
    generator, score : nn.Module
        The networks in training.
    teacher : nn.Module
        `unet` itself, or a copy if it was in train mode.
    history_ : list of dict
        Records of `shoestring.loop.fit`, whose steps are score and generator steps in turn: ``score_retain``,
        ``score_forget``, ``generator_retain``, ``generator_forget``; ``loss`` is a mean over both kinds.

    Raises
    ------
    TypeError, ValueError
        Conditions that `unet` cannot be told, an empty one, times out of order.

    Warns
    -----
    UserWarning
        If something of `forget` is in `retain`, with the count: the two terms then fight.

    Examples
    --------
    >>> from diffusers import DDPMScheduler, UNet2DModel
    >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    >>> unet = UNet2DModel(8, 1, 1, num_class_embeds=3, norm_num_groups=4, layers_per_block=1, **blocks)
    >>> distiller = ScoreForgettingDistiller(unet, DDPMScheduler(), forget=0, override=1)
    >>> generator = distiller.fit(n_iters=1, batch_size=2)
    >>> type(generator).__name__, distiller.sample([0, 2]).shape
    ('UNet2DModel', torch.Size([2, 1, 8, 8]))
    """

    history_: list[Record]

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        forget: Condition,
        override: Condition | None = None,
        *,
        retain: Condition | None = None,
        null: Condition | None = None,
        guidance_scale: float = 1.0,
        alpha: float = 1.2,
        t_init: int | None = None,
        t_min: int | None = None,
        t_max: int | None = None,
        forget_weight: float = 0.01,
        score_forget_weight: float = 0.01,
        lr_score: float = 1e-5,
        lr_generator: float = 1e-5,
        betas: tuple[float, float] = (0.0, 0.999),
        ema_decay: float = 0.9999,
        grad_clip_value: float | None = 1.0,
        start: tuple[nn.Module, nn.Module] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        check_diffusion(unet, scheduler)
        at_least_zero(forget_weight=forget_weight, score_forget_weight=score_forget_weight)
        at_least_zero(lr_score=lr_score, lr_generator=lr_generator, ema_decay=ema_decay, guidance_scale=guidance_scale)
        if ema_decay >= 1:
            raise ValueError(f"ema_decay must be < 1, got {ema_decay}")
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        if grad_clip_value is not None and not grad_clip_value > 0:
            raise ValueError(f"grad_clip_value must be > 0 or None, got {grad_clip_value}")
        self.null = None if null is None else condition_rows("null", null, unet)
        if self.null is not None and len(self.null) != 1:
            raise ValueError(f"null must be one condition, got {len(self.null)}")
        if guidance_scale != 1 and self.null is None:
            raise ValueError(f"null must be given for guidance_scale {guidance_scale}")
        self.forget = condition_rows("forget", forget, unet)  # (K,) or (K, L, D)
        self.retain = _retained(unet, retain, self.forget, self.null, forget_weight + score_forget_weight > 0)
        self.override = None if override is None else condition_rows("override", override, unet)
        check_alike(forget=self.forget, retain=self.retain, override=self.override, null=self.null)
        if self.override is not None:
            if len(self.override) not in (1, len(self.forget)):
                raise ValueError(
                    f"override must be one condition or {len(self.forget)}, one for each, got {len(self.override)}"
                )
            self.override = self.override.expand_as(self.forget)

        self.scheduler, self.shape = scheduler, sample_shape(unet, shape)
        self.t_init = time_of_noise(scheduler, NOISE_OF_GENERATOR) if t_init is None else t_init
        self.t_min = time_of_noise(scheduler, NOISE_LEAST) if t_min is None else t_min
        self.t_max = time_of_noise(scheduler, NOISE_MOST) if t_max is None else t_max
        last = len(scheduler.alphas_cumprod)
        if not (0 <= self.t_min < self.t_max <= last and 0 <= self.t_init < last):
            raise ValueError(
                f"t_min, t_max and t_init must be in order and below {last}, got {self.t_min}, {self.t_max} and "
                f"{self.t_init}"
            )
        self.guidance_scale, self.alpha = guidance_scale, alpha
        self.forget_weight, self.score_forget_weight = forget_weight, score_forget_weight
        self.lr_score, self.lr_generator, self.betas = lr_score, lr_generator, betas
        self.ema_decay, self.grad_clip_value = ema_decay, grad_clip_value
        self.teacher = frozen_original(unet)
        score, generator = (unet, unet) if start is None else start
        self.score, self.generator = copy.deepcopy(score), copy.deepcopy(generator)
        self.generator_ = copy.deepcopy(generator).eval()
        self.history_ = []

    def score_loss(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Equation (6) on new samples of the generator.

        Parameters
        ----------
        batch_size : int
            Samples of each of the two terms.
        generator : torch.Generator

        Returns
        -------
        dict of 0-d tensors
            ``loss``, with a gradient for `score` alone, and its terms before weights, without.
        """
        retain = self._score_term(self._draw(self.retain, batch_size, generator)[1], generator)
        terms = {"loss": retain, "score_retain": retain.detach()}
        if self.score_forget_weight:
            forget = self._score_term(self._draw(self.forget, batch_size, generator)[1], generator)
            terms |= {"loss": retain + self.score_forget_weight * forget, "score_forget": forget.detach()}
        return terms

    def generator_loss(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Equation (7).

        Parameters
        ----------
        batch_size : int
            Samples of each of the two terms.
        generator : torch.Generator

        Returns
        -------
        dict of 0-d tensors
            ``loss``, with a gradient for `generator` alone, and its terms before weights, without.
        """
        told = self._draw(self.retain, batch_size, generator)[1]
        retain = self._generator_term(told, told, generator)
        terms = {"loss": retain, "generator_retain": retain.detach()}
        if self.forget_weight:
            row, told = self._draw(self.forget, batch_size, generator)
            safe = self._draw(self.retain, batch_size, generator)[1] if self.override is None else self.override[row]
            forget = self._generator_term(told, safe, generator)
            terms |= {"loss": retain + self.forget_weight * forget, "generator_forget": forget.detach()}
        return terms

    def fit(
        self, n_iters: int = 50_000, batch_size: int = 128, *, generator: torch.Generator | None = None, **options: Any
    ) -> nn.Module:
        """Alternate score and generator steps.

        An iteration with both terms of (6) and (7): 10 forward passes of `batch_size` samples, and 12 half backward
        ones (to the weights, or to the inputs) of about the same cost.

        Parameters
        ----------
        n_iters : int, default 50_000
            Pairs of steps. Official for CIFAR-10; two-stage runs take far fewer.
        batch_size : int, default 128
            Samples of each term.
        generator : torch.Generator, optional
            Of noise, times and conditions. By default one of seed 0.
        **options
            Of `shoestring.loop.fit`: ``progress``, ``checkpoint``, ``resume``, ``mixed_precision``, ... Its steps are
            half iterations. One process only.

        Returns
        -------
        nn.Module
            `generator_`, in eval mode.

        Raises
        ------
        FloatingPointError
            If a loss is NaN or infinite; the weights are those of the last good step.
        """
        positive(n_iters=n_iters, batch_size=batch_size)
        generator = own_generator(generator)

        def step(both: nn.Module, number: int) -> tuple[Tensor, dict[str, Tensor]]:
            score_turn = number % 2 == 0
            self.score.train(score_turn)
            self.generator.train(not score_turn)
            terms = (self.score_loss if score_turn else self.generator_loss)(batch_size, generator)
            return terms.pop("loss"), terms

        rates = [(self.score, self.lr_score), (self.generator, self.lr_generator)]
        # One Adam is two: a network that got no gradient in this step is left out, with its state.
        optimizer = torch.optim.Adam([{"params": net.parameters(), "lr": lr} for net, lr in rates], betas=self.betas)
        clip = self.grad_clip_value
        if clip is not None:
            everything = [*self.score.parameters(), *self.generator.parameters()]
            optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(everything, clip))
        both = nn.ModuleDict({"score": self.score, "generator": self.generator})
        self.history_ = fit(
            both,
            range(2 * n_iters),
            step,
            optimizer,
            callbacks=[_Average(self.generator_, self.generator, self.ema_decay), *options.pop("callbacks", ())],
            generators=[generator],
            **options,
        )
        return self.generator_

    @torch.no_grad()
    def sample(self, condition: Condition, generator: torch.Generator | None = None, n: int | None = None) -> Tensor:
        """Samples (n, C, H, W) of `generator_` in one network call.

        Parameters
        ----------
        condition : int, sequence of int, or tensor
            One, or n.
        generator : torch.Generator, optional
            By default one of seed 0.
        n : int, optional
            By default as many as there are conditions.
        """
        rows = condition_rows("condition", condition, self.generator_)
        z = self._noise(len(rows) if n is None else n, own_generator(generator))
        return one_step_generate(self.generator_, self.scheduler, z, rows, self.t_init)

    def _score_term(self, told: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            x_g = _one_step(self.generator, self.scheduler, self._noise(len(told), generator), told, self.t_init)
        x_t, t, eps = self._noised(x_g, generator)
        return score_matching_loss(eps, self._predict(self.score, x_t, t, told))  # (4)

    def _generator_term(self, told: Tensor, teacher_told: Tensor, generator: torch.Generator) -> Tensor:
        x_g = _one_step(self.generator, self.scheduler, self._noise(len(told), generator), told, self.t_init)
        x_t, t, _ = self._noised(x_g, generator)
        a, b = signal_and_noise(self.scheduler, t, x_t)
        with held_still(self.teacher, self.score):
            P = denoised(x_t, self._predict(self.teacher, x_t, t, teacher_told), a, b)
            S = denoised(x_t, self._predict(self.score, x_t, t, told), a, b)
        return sid_generator_loss(x_g, P, S, self.alpha)  # (5)

    def _noised(self, x_g: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Equation (3): x_t, t, eps."""
        t = torch.randint(self.t_min, self.t_max, (len(x_g),), generator=generator, device=generator.device)
        t, eps = t.to(x_g.device), self._noise(len(x_g), generator)
        a, b = signal_and_noise(self.scheduler, t, x_g)
        return a * x_g + b * eps, t, eps

    def _predict(self, net: nn.Module, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        eps = predict_noise(net, self.scheduler, x_t, t, told)
        if self.null is None or self.guidance_scale == 1:
            return eps
        u = predict_noise(net, self.scheduler, x_t, t, self.null.expand_as(told))
        return u + self.guidance_scale * (eps - u)

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        parameter = next(self.generator.parameters())
        return randn_tensor((n, *self.shape), generator=generator, device=parameter.device, dtype=wide(parameter))

    def _draw(self, rows: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Row numbers (n,), uniform, and these rows."""
        number = torch.randint(len(rows), (n,), generator=generator, device=generator.device).to(rows.device)
        return number, rows[number]


def _retained(
    unet: nn.Module, retain: Condition | None, forget: Tensor, null: Tensor | None, forgetting: bool
) -> Tensor:
    if retain is None:
        classes = setting(unet, "num_class_embeds")
        if forget.is_floating_point() or classes is None:
            raise ValueError("retain must be given: the conditions that are to stay as they are")
        left_out = set(forget.tolist()) | set([] if null is None else null.tolist())
        return condition_rows("retain", [c for c in range(classes) if c not in left_out], unet)
    rows = condition_rows("retain", retain, unet)
    check_alike(forget=forget, retain=rows)
    same = (rows[:, None] == forget[None]).reshape(len(rows), len(forget), -1).all(2).any(1)  # (K,)
    if forgetting and (both := int(same.sum())):
        warnings.warn(f"{both} of {len(rows)} conditions of retain are in forget as well", stacklevel=3)
    return rows


class _Average:
    """Callback: average <- d average + (1 - d) network after iteration n, d = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, average: nn.Module, network: nn.Module, decay: float) -> None:
        self.average, self.network, self.decay = average, network, decay

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        n, left = divmod(state.step, 2)
        if left:
            return
        decay = min(self.decay, (1 + n) / (10 + n))
        for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for kept, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)
