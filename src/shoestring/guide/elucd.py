r"""Elucidating The Design Space of Classifier-Guided Diffusion Generation (ICLR 2024).

Ma, Hu, Wang, Sun. arXiv 2310.11311.

Idea
----
Any classifier of clean pictures steers a diffusion model that knows nothing of classes: it is shown the denoised
estimate, its ReLUs are smoothed, joint and marginal probability get temperatures of their own, and the push grows in
the middle of the run. The gradient is the classifier's alone; nothing is propagated back through the diffusion network.

Equations
---------
a is ``alphas_cumprod`` at step t, a' where the step ends, f(x) the K logits, t = N - 1, ..., 0 the respaced step::

    x0hat   = clip((x_t - sqrt(1 - a) eps) / sqrt(a), -1, 1)                        detached
    g       = d/dx0hat [ t1 f_y(x0hat) - logsumexp_k t2 f_k(x0hat) ]                t1 = 1, t2 = 0.5
    ReLU(z) becomes  log(1 + exp(b z)) / b                                          b = 3
    v_t     = (1 - a') / (1 - a) (1 - a / a')                                       posterior variance
    gamma_t = v_t + gamma max(v) sin(pi t / N)                                      gamma = 0.3
    mu     <- mu + s gamma_t g                                                      s = 1

As a noise prediction, which is all that a scheduler of diffusers takes (our derivation)::

    eps <- eps - c_t g,   c_t = s gamma_t / k_t,   k_t = sqrt(a' (1 - a) / a) - sqrt(1 - a' - eta^2 v_t)

k_t is minus the derivative of the step's mean by eps. The step is linear in eps, so the mean moves by s gamma_t g
exactly: with DDPMScheduler and the ancestral Euler (eta = 1), with DDIM and Euler (eta = 0), to first order with
multistep solvers. The paper only has ancestral DDPM with 250 steps; the rest is our extension. Levels of other
schedulers are first scaled to alpha^2 + sigma^2 = 1, so that DDIM and Euler are guided alike.

What to expect
--------------
* g is not the gradient of log p(y | x_t): the Jacobian of x0hat is left out on purpose. This is no Bayes' rule.
* Everything hangs on `guidance_scale`. On the zoo's model, over 20 steps, a judge names half of the garments at 1 and
  nine in ten at 3, where they get holes and patterns that no garment has. Look at them. v_t falls with the number of
  steps, so over few steps one s pushes harder.
* The classifier is asked in all steps; in the first ones x0hat is a blur. `start` leaves them out.

Code and paper
--------------
Read: AlexMaOLS/EluCD (MIT; its EDM part CC-BY-NC-SA) and a summary of the paper; not the paper's own text.

* The official classifier sees raw pictures in [-1, 1], neither resized nor normalised by mean and standard deviation.
  So it is here by default; `preprocess` is for classifiers that were trained otherwise (`preprocess_from`).
* Official: log(exp(t1 f_y) / sum exp(t2 f)), which overflows in half precision. Here logsumexp.
* "sigma_t" of the paper's update is a variance; so is the code's. Official max(v) is the running maximum of one pixel
  of the learnt variance; here the scheduler's largest step variance.
* Official ReLUs are replaced at the top level and in Bottleneck blocks only; here everywhere. Functional relu and GELU
  cannot be: you are warned if nothing was replaced. The official parameters are not frozen (a typing error).
* The EDM code does something else: it classifies the noisy x and adds the push to x before the network. Its pieces are
  here as `edm_input`, `edm_weights`, `edm_push`; the guider does not use them.
* With classifier-free guidance (`cfg_scale`; DiT in the paper, code never released) the term is added to its eps.
* For latent models (ours) `decode` is differentiated too, the diffusion network still is not.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.guide._classifier import ClassifierGuider, ImageClassifier, check_number, preprocess_from
from shoestring.guide._levels import from_x0, noise_levels
from shoestring.guide._sampler import Step

__all__ = [
    "ClassifierGuidance",
    "ImageClassifier",
    "classifier_log_prob",
    "edm_input",
    "edm_push",
    "edm_weights",
    "guidance_schedule",
    "posterior_variance",
    "preprocess_from",
    "smooth_activations",
    "x0_shift",
]


# ---- the mathematics


def classifier_log_prob(
    logits: Tensor, y: Tensor, joint_temperature: float = 1.0, marginal_temperature: float = 0.5
) -> Tensor:
    """``t1 f_y - logsumexp_k t2 f_k``: log p(x, y) - log p(x), each tempered. t1 = t2 = 1 is the log softmax.

    Parameters
    ----------
    logits : Tensor of shape (B, K)
    y : int64 Tensor of shape (B,)
    joint_temperature, marginal_temperature : float, default 1.0 and 0.5
        t1 and t2: the official script for ImageNet at 128 pixels. t2 = 0 leaves the joint term.

    Returns
    -------
    Tensor of shape (B,), float32 for half precision

    Examples
    --------
    >>> f, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> bool(torch.isclose(classifier_log_prob(f, y, 1.0, 1.0), f.log_softmax(1)[:, 0]))
    True
    """
    f = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    joint = joint_temperature * f.gather(1, y[:, None])[:, 0]
    return joint - (marginal_temperature * f).logsumexp(1)


def smooth_activations(model: nn.Module, beta: float = 3.0) -> nn.Module:
    """A deep copy in which every ReLU module is ``Softplus_beta``, frozen; weights and names of the state dict stay.

    Parameters
    ----------
    model : torch.nn.Module
        Is left as it is.
    beta : float, default 3.0
        The paper's for DDPM; 5.0 for EDM. The two functions differ by at most ln 2 / beta.

    Warns
    -----
    UserWarning
        If there was no ReLU module: functional relu cannot be replaced, and GELU or SiLU are smooth.

    Examples
    --------
    >>> smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))[1]
    Softplus(beta=3.0, threshold=20.0)
    """
    beta = check_number("beta", beta, 0.0, above=True)
    smooth = copy.deepcopy(model).requires_grad_(False)
    replaced = 0
    for parent in smooth.modules():
        for name, child in parent._modules.items():  # named_children leaves out a module that is there twice
            if isinstance(child, nn.ReLU):
                parent._modules[name] = nn.Softplus(beta).train(child.training)
                replaced += 1
    if isinstance(smooth, nn.ReLU):
        return nn.Softplus(beta).train(smooth.training)
    if not replaced:
        warnings.warn(f"no ReLU module was found in {type(model).__name__}: nothing was smoothed", stacklevel=2)
    return smooth


def posterior_variance(alpha: Any, sigma: Any, alpha_next: Any, sigma_next: Any) -> Any:
    """``v = (sigma^2 - (alpha / alpha')^2 sigma'^2) sigma'^2 / sigma^2``, of q(x_t' | x_t, x_0). Floats or tensors.

    Examples
    --------
    >>> posterior_variance(0.6, 0.8, 1.0, 0.0)  # the last step draws no noise
    0.0
    """
    return (sigma**2 - (alpha / alpha_next * sigma_next) ** 2) * (sigma_next / sigma) ** 2


def guidance_schedule(alphas: Tensor, sigmas: Tensor, gamma: float = 0.3) -> Tensor:
    """``gamma_t = v_t + gamma max(v) sin(pi t / N)`` of all N steps, the noisiest (t = N - 1) first.

    Parameters
    ----------
    alphas, sigmas : Tensor of shape (N + 1,)
        Noise levels of the steps and of the end, of any scheduler; scaled to ``alpha^2 + sigma^2 = 1`` here.
    gamma : float, default 0.3
        The official code's. 0 is Dhariwal and Nichol's mean shift.

    Returns
    -------
    float64 Tensor of shape (N,)

    Examples
    --------
    >>> a = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    >>> guidance_schedule(a.sqrt(), (1 - a).sqrt(), gamma=0.0)
    tensor([0.4444, 0.0000], dtype=torch.float64)
    """
    alphas, sigmas = _unit(alphas.double(), sigmas.double())
    v = posterior_variance(alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])
    t = torch.arange(len(v) - 1, -1, -1, dtype=v.dtype, device=v.device)
    return v + gamma * v.max() * torch.sin(math.pi * t / len(v)).clamp(min=0)


def x0_shift(
    gamma_t: float, alpha: float, sigma: float, alpha_next: float, sigma_next: float, eta: float = 0.0
) -> float:
    """How far x0hat must move along g for the step's mean to move by ``gamma_t g``: ``gamma_t / (d mean / d x0hat)``.

    ``c_t = alpha / sigma`` times this; other than c_t it is finite at alpha = 0, where zero terminal SNR begins.

    Examples
    --------
    >>> x0_shift(0.1, 0.6, 0.8, 1.0, 0.0)  # the last step ends at x0hat itself
    0.1
    """
    alpha, sigma = _unit(alpha, sigma)
    alpha_next, sigma_next = _unit(alpha_next, sigma_next)
    v = posterior_variance(alpha, sigma, alpha_next, sigma_next)
    direction = math.sqrt(max(0.0, sigma_next**2 - eta**2 * v))
    return gamma_t / (alpha_next - direction * alpha / sigma)


def edm_input(sample: Tensor) -> Tensor:
    """The noisy sample as the official EDM code shows it to the classifier: scaled down to unit RMS if above."""
    return sample / _rms(sample).clamp(min=1)


def edm_weights(num_inference_steps: int, max_guidance: float = 0.001, sine: float = 0.3) -> Tensor:
    """``w_i = max(G (M - i) / M, 1e-5) + sine G sin(pi i / (M - 1))``, M = N + 1, of the official EDM code.

    Parameters
    ----------
    num_inference_steps : int
        N.
    max_guidance : float, default 0.001
        G: the official command's default; its script for 10 steps says 0.004.
    sine : float, default 0.3

    Returns
    -------
    float64 Tensor of shape (N,)

    Examples
    --------
    >>> edm_weights(2, max_guidance=0.3, sine=0.0)
    tensor([0.3000, 0.2000], dtype=torch.float64)
    """
    i, M = torch.arange(num_inference_steps, dtype=torch.float64), num_inference_steps + 1
    return (max_guidance * (M - i) / M).clamp(min=1e-5) + sine * max_guidance * torch.sin(math.pi * i / (M - 1))


def edm_push(gradient: Tensor, sample: Tensor, weight: float) -> Tensor:
    """What the official EDM code adds to the sample before the network: RMS ``weight * rms(sample)``, per sample.

    Examples
    --------
    >>> edm_push(torch.tensor([[3.0, 3.0]]), torch.tensor([[2.0, 2.0]]), 0.5)
    tensor([[1., 1.]])
    """
    return gradient / _rms(gradient).clamp(min=torch.finfo(gradient.dtype).tiny) * _rms(sample) * weight


# ---- diffusers


class ClassifierGuidance(ClassifierGuider):
    """Guide towards classes by the gradient of a classifier of clean pictures.

    Runs in `shoestring.guide.sample` and `shoestring.guide.apply`; diffusers' modular pipelines withhold the latents,
    and it says so there.

    Parameters
    ----------
    classifier : callable, (B, C, H, W) -> logits (B, K)
        A module in eval mode, or any differentiable function; an output with `logits` will do. `ImageClassifier` makes
        one of transformers tell when pictures are not as it expects.
    labels : int, sequence or Tensor of shape (B,), optional
        What to guide towards. Default: the ``class_labels`` of the run's condition.
    guidance_scale : float, default 1.0
        s, the paper's. 0: not guided, and the classifier is not asked.
    preprocess : callable, optional
        Differentiable, pictures in [-1, 1] to what the classifier takes. Default: as they are, as in the paper.
    decode : callable, optional
        Latents to pictures, differentiable:
        ``lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample``.
    joint_temperature, marginal_temperature : float, default 1.0 and 0.5
        t1 and t2, see `classifier_log_prob`; the paper's for DDPM. EDM: 1.0 and 0.0.
    gamma : float, default 0.3
        Weight of the sine in `guidance_schedule`; the paper's.
    softplus_beta : float or None, default 3.0
        See `smooth_activations`; the paper's for DDPM, 5.0 for EDM. None keeps the classifier as it is.
    clip : float or None, default 1.0
        Pictures are clipped to [-clip, clip] before the classifier; the paper's.
    cfg_scale : float, default 1.0
        Other than 1: classifier-free guidance of this scale besides, which costs a second network call.
    eta : float, optional
        How much noise the scheduler's step adds, 1 for ancestral. Default: 1 for DDPMScheduler and
        EulerAncestralDiscreteScheduler, else 0; give it if you give DDIM one.
    start, stop : float, default 0.0 and 1.0
        Share of the run that is guided, as in diffusers.
    enabled : bool, default True

    Raises
    ------
    ValueError
        A classifier in training mode, or that expects another range, size or number of channels; logits that are not
        (B, K) or not finite; labels outside 0 to K - 1 (the null class of a model is one); numbers out of range; a
        `preprocess` or `decode` that is not differentiable.
    TypeError
        A classifier that cannot be called; labels that are not whole numbers.

    Notes
    -----
    A step costs one network call, one pass of the classifier and one back through it (and through `decode`): no graph
    of the diffusion network is kept. Smoothing copies the classifier. A saved configuration holds the numbers; give
    classifier, labels, preprocess and decode to ``from_pretrained``.

    Examples
    --------
    A model that is told nothing (class 10 of it is "no class") draws boots:

    >>> from shoestring import guide, zoo
    >>> model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    >>> boots = ClassifierGuidance(zoo.load("tiny-resnet"), labels=9, guidance_scale=3.0)
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> out = guide.sample(model, scheduler, boots, noise, [torch.full((2,), 10)], num_inference_steps=5)
    >>> tuple(out.sample.shape), out.num_calls
    ((2, 1, 28, 28), 5.0)
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Any] | None = None,
        labels: Tensor | Sequence[int] | int | None = None,
        *,
        guidance_scale: float = 1.0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 0.5,
        gamma: float = 0.3,
        softplus_beta: float | None = 3.0,
        clip: float | None = 1.0,
        cfg_scale: float = 1.0,
        eta: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = check_number("guidance_scale", guidance_scale, 0.0)
        self.joint_temperature = check_number("joint_temperature", joint_temperature, 0.0)
        self.marginal_temperature = check_number("marginal_temperature", marginal_temperature, 0.0)
        self.gamma = check_number("gamma", gamma, 0.0)
        self.softplus_beta = (
            None if softplus_beta is None else check_number("softplus_beta", softplus_beta, 0.0, above=True)
        )
        self.clip = None if clip is None else check_number("clip", clip, 0.0, above=True)
        self.cfg_scale = check_number("cfg_scale", cfg_scale)
        self.eta = None if eta is None else check_number("eta", eta, 0.0)
        self.labels, self.preprocess, self.decode = labels, preprocess, decode
        self.classifier = classifier
        self._gammas: Tensor | None = None
        # Not by diffusers' decorator: it takes a positional argument that is left out of the configuration for another.
        self.register_to_config(
            guidance_scale=guidance_scale,
            joint_temperature=joint_temperature,
            marginal_temperature=marginal_temperature,
            gamma=gamma,
            softplus_beta=softplus_beta,
            clip=clip,
            cfg_scale=cfg_scale,
            eta=eta,
            start=start,
            stop=stop,
            enabled=enabled,
        )

    def prepared(self, classifier: Any) -> Any:
        """The classifier with smoothed activations."""
        if classifier is None or self.softplus_beta is None:
            return classifier
        if not isinstance(classifier, nn.Module):
            warnings.warn("classifier is no torch.nn.Module: its activations are not smoothed", stacklevel=4)
            return classifier
        return smooth_activations(classifier, self.softplus_beta)

    def set_scheduler(self, scheduler: Any) -> None:
        """The schedule gamma_t of all steps."""
        super().set_scheduler(scheduler)
        self._gammas = guidance_schedule(*noise_levels(scheduler), self.gamma)

    def predict(self, step: Step) -> Tensor:
        """The guided prediction of a step, of the kind that the network makes."""
        pred_cond = step.predict(0)
        prediction = self.by_condition(step, pred_cond)
        if not self.active or self.guidance_scale == 0:
            return prediction
        if self._gammas is None or len(self._gammas) != step.num_inference_steps:
            self.set_scheduler(step.scheduler)
        assert self._gammas is not None
        shift = x0_shift(
            self.guidance_scale * float(self._gammas[step.index]),
            step.alpha,
            step.sigma,
            step.alpha_next,
            step.sigma_next,
            _eta(step.scheduler) if self.eta is None else self.eta,
        )
        if shift == 0:  # the last step: the classifier would be asked for nothing
            return prediction
        g = self.gradient(self.estimate(step, prediction), self.targets(step))
        # A prediction is linear in (x0, x_t): without x_t, what a change of x0 changes.
        return prediction + from_x0(shift * g, torch.zeros_like(g), step.alpha, step.sigma, step.kind)

    def estimate(self, step: Step, prediction: Tensor) -> Tensor:
        """What the classifier is shown, before decoding and clipping: x0hat."""
        return step.to_x0(prediction)

    def gradient(self, x0: Tensor, labels: Tensor) -> Tensor:
        """``g``, of the shape and dtype of `x0`: the gradient at the clipped picture, carried back through `decode`.

        Parameters
        ----------
        x0 : Tensor of shape (B, C, H, W)
            Clean estimates, latents if there is `decode`.
        labels : int64 Tensor of shape (B,)
        """
        with torch.inference_mode(False), torch.enable_grad():
            z, y = x0.detach().clone().requires_grad_(), labels.clone()
            picture = z if self.decode is None else self.decode(z)
            seen = self.clipped(picture.detach()).requires_grad_()
            log_p = classifier_log_prob(
                self.logits(seen, y), y, self.joint_temperature, self.marginal_temperature
            )  # (B,)
            g = _grad(log_p.sum(), seen, "preprocess and classifier")
            if self.decode is not None:
                g = _grad((picture * g.to(picture.dtype)).sum(), z, "decode")
        return g.to(x0.dtype)


def _grad(of: Tensor, by: Tensor, name: str) -> Tensor:
    g = torch.autograd.grad(of, by, allow_unused=True)[0] if of.requires_grad else None
    if g is None:
        raise ValueError(f"{name} must be differentiable, but no gradient comes back")
    return g


def _unit(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Levels of the sample scaled to alpha^2 + sigma^2 = 1, which a noise prediction does not see."""
    r = (alpha**2 + sigma**2) ** 0.5
    return alpha / r, sigma / r


def _eta(scheduler: Any) -> float:
    return float(type(scheduler).__name__ in ("DDPMScheduler", "EulerAncestralDiscreteScheduler"))


def _rms(x: Tensor) -> Tensor:
    """(B, 1, ...), in float32 at least."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return wide.square().flatten(1).mean(1).sqrt().to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
