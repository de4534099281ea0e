r"""All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models.

Hong, Lee, Woo. AAAI 2024, arXiv 2312.12807.

Idea
----
Classifier-free guidance adds a multiple of a guidance term to an unconditional prediction. To erase a concept, only its
guidance term is trained, towards that of an alternative which the user chooses (pig -> cow) or towards nothing, while
the unconditional prediction is held where it was: layout and other content hang on it.

**This is guidance-term erasure after Hong et al.** The method section could not be read and no code was found. The
loss below is RECONSTRUCTED from the abstract and the first page: see "Code and paper".

Equations
---------
eps(x, c) is the noise that the network predicts for x = x_t told c, and eps(x, 0) that for the null condition (the
empty prompt, the null class). theta_0 is the model as it was, frozen; theta is trained::

    eps~(x, c) = u(x) + s g(x, c)      u(x) = eps(x, 0)      g(x, c) = eps(x, c) - eps(x, 0)                (1)

    g*(x)  = g_0(x, c_a) - eta [g_0(x, c_e) - g_0(x, c_a)]                                                  (2)
    L_guid = mean || eps_theta(x, c_e) - sg[u_theta(x)] - g*(x) ||^2                                        (3)
    L_unc  = mean || u_theta(x) - u_0(x) ||^2                                                               (4)
    L      = L_guid + lambda L_unc                                                                          (5)

c_e is erased, c_a the alternative; without one c_a is the null condition and g_0(x, c_a) = 0. sg stops the gradient:
the guidance term is not to be made small by moving u. eta >= 0 pushes away from the concept as well; 0 replaces it. At
L = 0 the model asked for c_e equals the old one asked for c_a, at *every* s. ESD (arXiv 2303.07345) fits
eps_theta(x, c_e) to u_0 - eta g_0(x, c_e), which is (2) with the null condition and u_0 in the place of u_theta, and
leaves u_theta free: its guided prediction is right at s = 1 only.

x_t come from the model itself, no data: DDIM from noise under guidance told c_e, by theta_0. As theta_0 does not
change, the states are drawn once, with what (2) and (4) need of them, and every step takes some (`States`).

What to expect
--------------
* The prompts given in `erase` are erased, and what is near to them in the text encoder. Give one row a phrasing.
* lambda matters most if all weights are trained: conditional and null path share them. With cross-attention only, u
  moves as well, as the null prompt passes through it.
* What is erased by prompt comes back by other inputs (inverted prompts, adversarial embeddings) and by little training.
  It is no safety measure.

Code and paper
--------------
Read: the abstract, the caption of figure 1 (replacement pairs, purification) and the card of this project. Not read:
the method section, any experiment. No official code was found.

* From the abstract: that the guidance term is updated and the drift of the unconditional score constrained, and that
  the user may name an alternative. Reconstructed: the squared errors, sg, lambda = 1, eta, which weights are trained.
* Rate, steps, batch 1 and cross-attention are those of ESD; the paper's are not known. ESD's official code draws x_t
  anew at every step. A pool of states is ours, as is its size.
* `purify` is named in the caption; with the null condition both ways it would return the image, by (4): it inverts
  under the concept's condition.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoestring.forget._diffusion import (
    Condition,
    at_least_zero,
    check_alike,
    check_diffusion,
    condition_rows,
    ddim_grid,
    frozen_original,
    own_generator,
    positive,
    predict_noise,
    sample_shape,
    wide,
)
from shoestring.loop import Record, fit

__all__ = ["GuidanceTermEraser", "States", "ddim_step", "guidance_target", "guidance_term_loss", "purify"]


# ---- the mathematics


def guidance_target(eps_alternative: Tensor, eps_erase: Tensor, eps_null: Tensor, eta: float = 0.0) -> Tensor:
    """The guidance term that the erased concept is to have: equation (2), from predictions of the frozen model.

    Parameters
    ----------
    eps_alternative, eps_erase, eps_null : tensor of shape (B, ...), one shape
        Noise predicted at the same x_t for alternative, concept and null condition.
    eta : float >= 0, default 0.0
        0: the alternative's term. With the null condition as the alternative, -eta times the concept's.

    Returns
    -------
    tensor of shape (B, ...)

    Examples
    --------
    >>> cow, pig, null = torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([1.0])
    >>> guidance_target(cow, pig, null), guidance_target(cow, pig, null, eta=0.5)
    (tensor([2.]), tensor([1.]))
    """
    return (eps_alternative - eps_null) - eta * (eps_erase - eps_alternative)


def guidance_term_loss(
    eps_erase: Tensor,
    eps_null: Tensor,
    target: Tensor,
    frozen_null: Tensor,
    *,
    preserve_weight: float = 1.0,
    detach_uncond: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (3) to (5), means over all entries, at least in float32.

    Parameters
    ----------
    eps_erase, eps_null : tensor of shape (B, ...)
        The trained model's predictions for the concept and for the null condition.
    target, frozen_null : tensor of shape (B, ...)
        `guidance_target`, and the frozen model's prediction for the null condition.
    preserve_weight : float >= 0, default 1.0
        lambda (reconstructed).
    detach_uncond : bool, default True
        False: without sg, so that (3) pulls at the unconditional prediction as well.

    Returns
    -------
    (L, L_guid, L_unc) : 0-d tensors

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> guidance_term_loss(5 * one, one, 2 * one, 0 * one)  # (5 - 1 - 2)^2 and (1 - 0)^2
    (tensor(5.), tensor(4.), tensor(1.))
    """
    shapes = {tuple(x.shape) for x in (eps_erase, eps_null, target, frozen_null)}
    if len(shapes) > 1:
        raise ValueError(f"all four predictions must have one shape, got {sorted(shapes)}")
    eps_erase, eps_null = eps_erase.to(wide(eps_erase)), eps_null.to(wide(eps_null))
    u = eps_null.detach() if detach_uncond else eps_null
    guidance = (eps_erase - u - target).square().mean()  # (3)
    unconditional = (eps_null - frozen_null).square().mean()  # (4)
    return guidance + preserve_weight * unconditional, guidance, unconditional  # (5)


def ddim_step(x: Tensor, eps: Tensor, alphabar_from: Tensor, alphabar_to: Tensor) -> Tensor:
    """One step of DDIM with its eta = 0, to less noise or to more: with one eps each undoes the other.

    Parameters
    ----------
    x, eps : tensor of one shape
    alphabar_from, alphabar_to : tensor that broadcasts with x, in (0, 1]

    Examples
    --------
    >>> low, high = torch.tensor(0.25), torch.tensor(1.0)
    >>> ddim_step(torch.tensor([1.0]), torch.tensor([0.0]), low, high)
    tensor([2.])
    """
    x_0 = (x - (1 - alphabar_from).sqrt() * eps) / alphabar_from.sqrt()
    return alphabar_to.sqrt() * x_0 + (1 - alphabar_to).sqrt() * eps


class States(NamedTuple):
    """States x_t on the way from noise to the concept, and what the frozen model says there; all on the CPU.

    Attributes
    ----------
    x_t : (N, C, H, W), in the dtype of the network
    t : (N,) int64
    row : (N,) int64
        Which of the rows of `erase` the state was drawn for.
    target, frozen_null : (N, C, H, W)
        g* of equation (2) and u_0.
    """

    x_t: Tensor
    t: Tensor
    row: Tensor
    target: Tensor
    frozen_null: Tensor

    def __repr__(self) -> str:
        return f"States of shape {tuple(self.x_t.shape)}"


class GuidanceTermEraser:
    """Trains a copy of a diffusion UNet in which a concept has the guidance term of its alternative.

    Memory: two networks, Adam's state of what is trained, and 3 numbers for each number of the pool's states.

    Parameters
    ----------
    unet : UNet2DConditionModel, UNet2DModel with classes, or nn.Module of the same call
        On the device where it is to be trained; not changed, unless `inplace`. Weights are trained in the dtype they
        have: float32, or bfloat16.
    scheduler : diffusers scheduler with ``alphas_cumprod``
        Says the noise levels and whether eps, v or x_0 is predicted. Only DDIM is run, whichever it is.
    erase : int, sequence of int, or tensor
        c_e: class labels; or hidden states of the text encoder, (L, D), or (K, L, D) for K prompts that are to be
        erased. A state is drawn for one of them.
    alternative : as `erase`, optional
        c_a: one for all, or K, one for each of `erase`. By default the null condition.
    null : as `erase`, one row
        The null condition as it is used in sampling: hidden states of the empty prompt (not zeros), the null class.
    preserve_weight : float >= 0, default 1.0
        lambda of (5); reconstructed.
    eta : float >= 0, default 0.0
        Of (2); reconstructed.
    detach_uncond : bool, default True
        Whether (3) has its sg; reconstructed.
    guidance_scale : float >= 0, default 3.0
        s of (1) with which the states are drawn (ESD's).
    trainable : str or sequence of str, default "attn2"
        Parameters whose names contain one of these. "attn2" is cross-attention; a class-conditional UNet has none:
        "all".
    lr, steps, batch_size : default 1e-5, 500, 1
        Of Adam without weight decay (ESD's ranges).
    timestep_sampling : {"random", "sequential"}
        "random": states in random order, each once before any comes again. "sequential": `batch_size` trajectories at
        a time, each from noise to image.
    sampling_steps : int, default 50
        DDIM steps of a trajectory.
    trajectories : int, default 20
        The pool has ``trajectories * sampling_steps`` states (ours).
    shape : (C, H, W), optional
        Of a state; by default from the configuration of `unet`.
    inplace : bool, default False
        Train `unet` itself and freeze a copy.

    Attributes
    ----------
    unet_ : nn.Module
        The erased network: ``pipeline.unet = eraser.unet_``, or ``eraser.unet_.save_pretrained(folder)``.
    frozen : nn.Module
        theta_0: `unet` itself, or a copy if it was in train mode.
    history_ : list of dict
        Records of `shoestring.loop.fit`, with ``guidance`` and ``unconditional`` beside ``loss``.

    Raises
    ------
    TypeError, ValueError
        Conditions that `unet` cannot be told, an empty one, numbers of rows that do not fit, no parameter of that name.

    Warns
    -----
    UserWarning
        If concepts are their own alternative, with their count.

    Examples
    --------
    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    >>> unet = UNet2DModel(8, 1, 1, num_class_embeds=4, norm_num_groups=4, layers_per_block=1, **blocks)
    >>> eraser = GuidanceTermEraser(
    ...     unet,
    ...     DDIMScheduler(),
    ...     erase=0,
    ...     alternative=1,
    ...     null=3,
    ...     trainable="all",
    ...     steps=2,
    ...     sampling_steps=4,
    ...     trajectories=1,
    ... )
    >>> erased = eraser.fit(torch.Generator().manual_seed(0))
    >>> type(erased).__name__, eraser.history_[-1]["step"]
    ('UNet2DModel', 2)
    """

    history_: list[Record]

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        *,
        erase: Condition,
        null: Condition,
        alternative: Condition | None = None,
        preserve_weight: float = 1.0,
        eta: float = 0.0,
        detach_uncond: bool = True,
        guidance_scale: float = 3.0,
        trainable: str | Sequence[str] = "attn2",
        lr: float = 1e-5,
        steps: int = 500,
        batch_size: int = 1,
        timestep_sampling: str = "random",
        sampling_steps: int = 50,
        trajectories: int = 20,
        shape: Sequence[int] | None = None,
        inplace: bool = False,
    ) -> None:
        check_diffusion(unet, scheduler)
        at_least_zero(preserve_weight=preserve_weight, eta=eta, guidance_scale=guidance_scale, lr=lr)
        positive(steps=steps, batch_size=batch_size, sampling_steps=sampling_steps, trajectories=trajectories)
        if timestep_sampling not in ("random", "sequential"):
            raise ValueError(f"timestep_sampling must be 'random' or 'sequential', got {timestep_sampling!r}")
        self.erase = condition_rows("erase", erase, unet)  # (K,) or (K, L, D)
        self.null = condition_rows("null", null, unet)  # (1,) or (1, L, D)
        if len(self.null) != 1:
            raise ValueError(f"null must be one condition, got {len(self.null)}")
        self.has_alternative = alternative is not None
        told = self.null if alternative is None else condition_rows("alternative", alternative, unet)
        check_alike(erase=self.erase, alternative=told, null=self.null)
        if len(told) not in (1, len(self.erase)):
            raise ValueError(f"alternative must be one condition or {len(self.erase)}, one for each, got {len(told)}")
        self.alternative = told.expand_as(self.erase)
        same = int((self.alternative == self.erase).reshape(len(self.erase), -1).all(1).sum())
        if same:
            warnings.warn(f"{same} of {len(self.erase)} concepts are their own alternative", stacklevel=2)

        self.scheduler, self.shape = scheduler, sample_shape(unet, shape)
        self.preserve_weight, self.eta, self.detach_uncond = preserve_weight, eta, detach_uncond
        self.guidance_scale, self.lr, self.steps, self.batch_size = guidance_scale, lr, steps, batch_size
        self.timestep_sampling, self.sampling_steps = timestep_sampling, sampling_steps
        self.trajectories = trajectories
        self.names = _chosen(unet, trainable)
        self.frozen = copy.deepcopy(unet).eval() if inplace else frozen_original(unet)
        self.unet_ = unet if inplace else copy.deepcopy(unet)
        self.history_ = []

    def loss(self, x_t: Tensor, t: Tensor, row: Tensor | None = None) -> dict[str, Tensor]:
        """Equations (2) to (5) at any states, with the frozen model asked anew.

        Parameters
        ----------
        x_t : tensor of shape (B, C, H, W)
        t : tensor of shape (B,), int64
        row : tensor of shape (B,), int64, optional
            Which of the rows of `erase`; by default the first.

        Returns
        -------
        dict of 0-d tensors
            ``loss``, and ``guidance`` and ``unconditional``, without a gradient.
        """
        row = torch.zeros_like(t) if row is None else row
        target, frozen_null = self._frozen_terms(x_t, t, row)
        return self._loss(self.unet_, States(x_t, t, row, target, frozen_null))

    @torch.no_grad()
    def draw_states(self, generator: torch.Generator | None = None) -> States:
        """The pool: every state of `trajectories` runs of DDIM by the frozen model, told the concept, guided by s.

        Three network calls a state, two without an alternative; `batch_size` (but at least 4) trajectories at a time.

        Parameters
        ----------
        generator : torch.Generator, optional
            On the CPU or on the network's device. By default one of seed 0.

        Returns
        -------
        States
            ``trajectories * sampling_steps`` of them, those of a trajectory one after the other.
        """
        from diffusers.utils.torch_utils import randn_tensor

        generator = own_generator(generator)
        device, dtype = self.null.device, next(self.frozen.parameters()).dtype
        rows = torch.randint(len(self.erase), (self.trajectories,), generator=generator, device=generator.device)
        precise = torch.promote_types(dtype, torch.float32)
        noise = randn_tensor((self.trajectories, *self.shape), generator=generator, device=device, dtype=precise)
        timesteps, alphabar = ddim_grid(self.scheduler, self.sampling_steps)
        alphabar = alphabar.to(device, noise.dtype)
        chunks, size = [], max(4, self.batch_size)
        for x, row in zip(noise.split(size), rows.to(device).split(size), strict=True):
            states = []
            for k, timestep in enumerate(timesteps.tolist()):
                t = torch.full_like(row, timestep)
                target, u, erase = self._frozen_predictions(x, t, row)
                parts = (x.to(dtype), t, row, target.to(dtype), u.to(dtype))
                states.append(States(*(part.cpu() for part in parts)))
                x = ddim_step(x, u + self.guidance_scale * (erase - u), alphabar[k], alphabar[k + 1])
            chunks.append(States(*(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*states, strict=True))))
        return States(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def fit(
        self, generator: torch.Generator | None = None, *, states: States | None = None, **options: Any
    ) -> nn.Module:
        """Train `unet_` for `steps` steps. Called again, it goes on from there.

        A step is one forward and one backward pass over ``2 * batch_size`` rows.

        Parameters
        ----------
        generator : torch.Generator, optional
            Draws states and their order. By default one of seed 0.
        states : States, optional
            A pool drawn before, by an eraser of the same model, conditions and eta.
        **options
            Of `shoestring.loop.fit`: ``progress``, ``checkpoint``, ``resume``, ``mixed_precision``, ...

        Returns
        -------
        nn.Module
            `unet_`, in the mode it was in.

        Raises
        ------
        FloatingPointError
            If the loss is NaN or infinite; the weights are those of the last good step.
        """
        generator = own_generator(generator)
        pool = self.draw_states(generator) if states is None else states
        if not len(pool.t):
            raise ValueError("states must not be empty")
        parameters = dict(self.unet_.named_parameters())
        flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.names)
        device = self.null.device

        def step(unet: nn.Module, picked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            some = States(*(part[picked.cpu()].to(device) for part in pool))
            terms = self._loss(unet, some)
            return terms.pop("loss"), terms

        try:
            optimizer = torch.optim.Adam([parameters[name] for name in self.names], lr=self.lr)
            batches = self._order(len(pool.t), generator)
            options = {"max_steps": self.steps, **options}
            self.history_ = fit(self.unet_, batches, step, optimizer, **options)
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(flags[name])
        return self.unet_

    def _loss(self, unet: nn.Module, states: States) -> dict[str, Tensor]:
        x_t, t, row, target, frozen_null = states
        told = torch.cat([self.erase[row], self.null.expand_as(self.erase[row])])
        eps = predict_noise(unet, self.scheduler, torch.cat([x_t, x_t]), torch.cat([t, t]), told)  # (2B, C, H, W)
        eps_erase, eps_null = eps.chunk(2)
        loss, guidance, unconditional = guidance_term_loss(
            eps_erase,
            eps_null,
            target,
            frozen_null,
            preserve_weight=self.preserve_weight,
            detach_uncond=self.detach_uncond,
        )
        return {"loss": loss, "guidance": guidance.detach(), "unconditional": unconditional.detach()}

    @torch.no_grad()
    def _frozen_terms(self, x_t: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        target, frozen_null, _ = self._frozen_predictions(x_t, t, row)
        return target, frozen_null

    def _frozen_predictions(self, x_t: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g*, u_0 and eps_0(x_t, c_e)."""
        conditions = [self.null.expand_as(self.erase[row]), self.erase[row]]
        conditions += [self.alternative[row]] if self.has_alternative else []
        n = len(conditions)
        eps = predict_noise(
            self.frozen, self.scheduler, torch.cat([x_t] * n), torch.cat([t] * n), torch.cat(conditions)
        ).chunk(n)
        u, erase = eps[:2]
        return guidance_target(eps[2] if self.has_alternative else u, erase, u, self.eta), u, erase

    def _order(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Which states a step takes: `steps` tensors (batch_size,) int64."""
        needed = self.steps * self.batch_size
        if self.timestep_sampling == "random":
            passes = -(-needed // n)
            order = torch.cat([torch.randperm(n, generator=generator, device=generator.device) for _ in range(passes)])
            return list(order.cpu()[:needed].split(self.batch_size))
        runs = torch.arange(n).reshape(-1, self.sampling_steps).split(self.batch_size)  # trajectories that go together
        once = [column for group in runs for column in group.T]
        return [once[k % len(once)] for k in range(self.steps)]


def _chosen(unet: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    """Names of the parameters that are trained."""
    names = [name for name, _ in unet.named_parameters()]
    parts = [trainable] if isinstance(trainable, str) else list(trainable)
    chosen = names if "all" in parts else [name for name in names if any(part in name for part in parts)]
    if not chosen:
        raise ValueError(
            f"trainable must name parameters of unet, got {trainable!r}, which is in no name (a class-conditional UNet "
            "has no cross-attention: 'all')"
        )
    return chosen


@torch.no_grad()
def purify(
    original: nn.Module,
    erased: nn.Module,
    scheduler: Any,
    x_0: Tensor,
    condition: Condition,
    *,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
) -> Tensor:
    """Take a concept out of existing images: DDIM inversion by the original, sampling by the erased model.

    2 ``num_inference_steps`` network calls, half as many more with guidance.

    Parameters
    ----------
    original, erased : as `unet` of `GuidanceTermEraser`
    scheduler : diffusers scheduler
    x_0 : tensor of shape (B, C, H, W)
        Images of a pixel model, or scaled latents: ``vae.encode(image).latent_dist.mean * vae.config.scaling_factor``.
    condition : int, sequence of int, or tensor
        The concept's, as `erase`; one row, or B. Inversion and sampling are told it.
    null : as `condition`, optional
        Needed for guidance.
    guidance_scale : float, default 1.0
        Of the sampling by the erased model. Inversion is not guided.
    num_inference_steps : int, default 50

    Returns
    -------
    tensor of shape (B, C, H, W), dtype of x_0
        With ``erased`` the original itself, x_0 up to the error of DDIM inversion, which falls with the steps.
    """
    check_diffusion(original, scheduler)
    positive(num_inference_steps=num_inference_steps)
    at_least_zero(guidance_scale=guidance_scale)
    told = condition_rows("condition", condition, original)
    if len(told) not in (1, len(x_0)):
        raise ValueError(f"condition must be one or {len(x_0)}, one for each image, got {len(told)}")
    told = told.expand(len(x_0), *told.shape[1:])
    if guidance_scale != 1 and null is None:
        raise ValueError(f"null must be given for guidance_scale {guidance_scale}")
    nothing = None if null is None else condition_rows("null", null, original).expand_as(told)

    timesteps, alphabar = ddim_grid(scheduler, num_inference_steps)
    alphabar = alphabar.to(x_0.device, wide(x_0))
    levels = list(enumerate(timesteps.tolist()))
    x = x_0.to(wide(x_0))
    for k, timestep in reversed(levels):
        t = torch.full((len(x),), timestep, device=x.device)
        eps = predict_noise(original, scheduler, x, t, told)
        x = ddim_step(x, eps, alphabar[k + 1], alphabar[k])
    for k, timestep in levels:
        t = torch.full((len(x),), timestep, device=x.device)
        eps = predict_noise(erased, scheduler, x, t, told)
        if nothing is not None and guidance_scale != 1:
            u = predict_noise(erased, scheduler, x, t, nothing)
            eps = u + guidance_scale * (eps - u)
        x = ddim_step(x, eps, alphabar[k], alphabar[k + 1])
    return x.to(x_0.dtype)
