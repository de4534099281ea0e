r"""Gradient-Free Classifier Guidance for Diffusion Model Sampling (WACV 2026).

Shenoy, Pan, Balakrishnan, Cheng, Jeon, Yang, Kim. arXiv 2411.15393.

Idea
----
At every step a classifier of clean pictures looks at the denoised estimate and names the wrong class that the sample is
drifting to. The sample is pushed away from that class, by the conditional model itself, the harder the more the
classifier confuses the two. No gradient, no unconditional model, no training.

Equations
---------
y is the class asked for, f(x) the K logits of the classifier, T its temperature, e the network's prediction::

    x0hat = the clean estimate of e(x_t, y), clipped to [-1, 1];   p = softmax(f(x0hat) / T)
    y_ref = argmax_{k != y} p_k                                                       per sample
    c     = p_{y_ref} / (p_y + p_{y_ref})                                             "pairwise"
    w     = 1 + (w_max - 1) c                                                         w_max = 3
    e    <- e(x_t, y) + (w - 1) (e(x_t, y) - e(x_t, y_ref))

The coefficients of the last line add up to 1, so it is the same for noise, velocity, flow and clean predictions.

What is the paper's, and what is ours
-------------------------------------
Read: the abstract, a short description by others, and notes on the WACV text. The method section could not be read, and
there is no official code. Call what this does "GFCG-style".

* The paper's: a classifier in inference mode gives a reference class and a scale anew at each step; it sees the clean
  estimate; the scale grows with the model's confusion; combination with CFG and with Autoguidance.
* Ours: y_ref is the most probable other class; the function c and its alternatives ("miss": 1 - p_y, "argmax":
  1[p_{y_ref} > p_y], "constant": 1); w_max; that the estimate is the conditional one, before any guidance; `start` 0.1;
  the threshold; the temperature; and how `weak` is used.
* With `cfg_scale` s (3 calls): e <- e_u + s (e_y - e_u) + (w - 1) (e_y - e_ref).
* With `weak`, Autoguidance (ours, inferred from "without additional computational overhead"): the reference prediction
  is the weak model's, of y_ref where the classifier is confused (p_{y_ref} > p_y), else of y; w is w_max throughout.

What to expect
--------------
* In the first steps x0hat is a blur that the classifier takes for one and the same class. Hence `start`.
* y_ref may change from step to step: solvers of first order (DDIM, Euler) take that better than multistep ones.
* A judge of the result must be another classifier than the guide: accuracy by the guide says nothing.
* Confidence in a clean estimate is no posterior of the noisy sample. With a perfect model there is nothing to gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoestring.guide._classifier import ClassifierGuider, ImageClassifier, check_number, preprocess_from
from shoestring.guide._sampler import Condition, Step, network_of

__all__ = [
    "CONFUSIONS",
    "GradientFreeClassifierGuidance",
    "ImageClassifier",
    "adaptive_scale",
    "confusion",
    "preprocess_from",
    "push",
    "reference_labels",
]

CONFUSIONS = ("pairwise", "miss", "argmax", "constant")


# ---- the mathematics


def reference_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """``y_ref = argmax_{k != y} f_k``: the most probable class that is not asked for; of tied ones the lowest.

    Parameters
    ----------
    logits : Tensor of shape (B, K), K >= 2
    labels : int64 Tensor of shape (B,)

    Returns
    -------
    int64 Tensor of shape (B,)

    Examples
    --------
    >>> reference_labels(torch.tensor([[0.1, 3.0, 2.0], [0.1, 3.0, 2.0]]), torch.tensor([1, 0]))
    tensor([2, 1])
    """
    if logits.shape[1] < 2:
        raise ValueError("the classifier must know at least two classes, for one to be the reference, got 1")
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def confusion(
    logits: Tensor, labels: Tensor, reference: Tensor, rule: str = "pairwise", temperature: float = 1.0
) -> Tensor:
    """``c`` in [0, 1]: how far the classifier takes a sample of class y for y_ref. Ours, not the paper's.

    Parameters
    ----------
    logits : Tensor of shape (B, K)
    labels, reference : int64 Tensor of shape (B,)
    rule : {"pairwise", "miss", "argmax", "constant"}
        p_ref / (p_y + p_ref); 1 - p_y; 1 if p_ref > p_y, else 0; 1.
    temperature : float, default 1.0
        T of p = softmax(f / T); above 1 for an over-confident classifier.

    Returns
    -------
    Tensor of shape (B,), float32 for half precision

    Examples
    --------
    >>> confusion(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))
    tensor([0.5000])
    """
    f = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    f = f / temperature
    lead = (f.gather(1, reference[:, None]) - f.gather(1, labels[:, None]))[:, 0]  # log p_ref - log p_y
    if rule == "pairwise":
        return lead.sigmoid()
    if rule == "miss":
        return 1 - f.softmax(1).gather(1, labels[:, None])[:, 0]
    if rule == "argmax":
        return (lead > 0).to(f.dtype)
    if rule == "constant":
        return torch.ones_like(lead)
    raise ValueError(f"confusion must be one of {', '.join(CONFUSIONS)}, got {rule!r}")


def adaptive_scale(c: Tensor, guidance_scale: float = 3.0) -> Tensor:
    """``w = 1 + (w_max - 1) c``.

    Examples
    --------
    >>> adaptive_scale(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    tensor([1., 2., 3.])
    """
    return 1 + (guidance_scale - 1) * c


def push(prediction: Tensor, pred_cond: Tensor, pred_ref: Tensor, scale: Tensor) -> Tensor:
    """``e + (w - 1) (e_y - e_ref)``; e is e_y, or what another guidance made of it.

    Parameters
    ----------
    prediction, pred_cond, pred_ref : Tensor of shape (B, ...)
    scale : Tensor of shape (B,)
        w, one a sample, never a mean of the batch.

    Examples
    --------
    >>> e, e_ref = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0]])
    >>> push(e, e, e_ref, torch.tensor([1.0, 3.0]))
    tensor([[1.],
            [3.]])
    """
    w = scale.to(prediction.dtype).reshape(-1, *[1] * (prediction.ndim - 1))
    return prediction + (w - 1) * (pred_cond - pred_ref)


# ---- diffusers


class GradientFreeClassifierGuidance(ClassifierGuider):
    """Push samples off the wrong class that a classifier sees in them, without a gradient.

    Runs in `shoestring.guide.sample` and `shoestring.guide.apply`; diffusers' modular pipelines withhold the latents,
    and it says so there.

    Parameters
    ----------
    classifier : callable, (B, C, H, W) -> logits (B, K)
        In eval mode. Its classes are those of the model: class k of one is class k of the other.
    labels : int, sequence or Tensor of shape (B,), optional
        What is asked for. Default: the ``class_labels`` of the run's condition. Text models need it.
    guidance_scale : float, default 3.0
        w_max, ours. 1: the conditional prediction, and the classifier is not asked.
    confusion : {"pairwise", "miss", "argmax", "constant"}, default "pairwise"
        See the function of this name; ours.
    temperature : float, default 1.0
        Of the classifier's probabilities.
    threshold : float, default 0.0
        Confusion below it counts as none, and saves the second network call for that sample; ours.
    preprocess : callable, optional
        Pictures in [-1, 1] to what the classifier takes. Default: as they are.
    decode : callable, optional
        Latents to pictures: ``lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample``.
    weak : callable, optional
        A worse model of the same kind, for Autoguidance: the reference prediction is its.
    clip : float or None, default 1.0
        Pictures are clipped to [-clip, clip] before the classifier.
    cfg_scale : float, default 1.0
        Other than 1: classifier-free guidance of this scale besides, which costs a further network call.
    start, stop : float, default 0.1 and 1.0
        Share of the run that is guided, as in diffusers.
    enabled : bool, default True

    Raises
    ------
    ValueError
        A classifier in training mode, with one class, or that expects another range, size or number of channels; logits
        that are not (B, K) or not finite; labels outside 0 to K - 1; numbers out of range; a run with neither
        ``class_labels`` nor one further condition a class.
    TypeError
        A classifier that cannot be called; labels that are not whole numbers.

    Notes
    -----
    Reference conditions: with ``class_labels`` the label is replaced. Text models need one further condition for each
    of the K classes, in their order (``conditions=(prompt, negative, class 0, ..., class K - 1)``, or
    ``apply(pipe, guider, auxiliary=["a photo of a bag", ...])``).

    A step costs one network call for the batch, one pass of the classifier, and one more network call for the samples
    that are pushed, one after the other. Works in inference mode. A saved configuration holds the numbers; give
    classifier, labels, preprocess, decode and weak to ``from_pretrained``.

    Examples
    --------
    >>> from shoestring import guide, zoo
    >>> model, scheduler = zoo.load("tiny-class-ddpm-weak"), zoo.load("tiny-class-ddpm-weak", "scheduler")
    >>> guider = GradientFreeClassifierGuidance(zoo.load("tiny-resnet"))
    >>> noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> out = guide.sample(model, scheduler, guider, noise, [torch.tensor([6, 9])], num_inference_steps=10)
    >>> tuple(out.sample.shape), out.num_calls  # one call in the first step, two in the nine others
    ((2, 1, 28, 28), 19.0)
    """

    ignore_for_config: ClassVar = ["classifier", "decode", "labels", "preprocess", "weak"]

    def __init__(
        self,
        classifier: Callable[[Tensor], Any] | None = None,
        labels: Tensor | Sequence[int] | int | None = None,
        *,
        guidance_scale: float = 3.0,
        confusion: str = "pairwise",
        temperature: float = 1.0,
        threshold: float = 0.0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        weak: Callable[..., Any] | None = None,
        clip: float | None = 1.0,
        cfg_scale: float = 1.0,
        start: float = 0.1,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if confusion not in CONFUSIONS:
            raise ValueError(f"confusion must be one of {', '.join(CONFUSIONS)}, got {confusion!r}")
        self.guidance_scale = check_number("guidance_scale", guidance_scale, 1.0)
        self.confusion = confusion
        self.temperature = check_number("temperature", temperature, 0.0, above=True)
        self.threshold = check_number("threshold", threshold, 0.0)
        self.clip = None if clip is None else check_number("clip", clip, 0.0, above=True)
        self.cfg_scale = check_number("cfg_scale", cfg_scale)
        self.labels, self.preprocess, self.decode, self.weak = labels, preprocess, decode, weak
        self.classifier = classifier
        # Not by diffusers' decorator: it takes a positional argument that is left out of the configuration for another.
        self.register_to_config(
            guidance_scale=guidance_scale,
            confusion=confusion,
            temperature=temperature,
            threshold=threshold,
            clip=clip,
            cfg_scale=cfg_scale,
            start=start,
            stop=stop,
            enabled=enabled,
        )

    def predict(self, step: Step) -> Tensor:
        """The guided prediction of a step, of the kind that the network makes."""
        pred_cond = step.predict(0)
        prediction = self.by_condition(step, pred_cond)
        if not self.active or self.guidance_scale == 1:
            return prediction
        reference, scale = self.reference(step.to_x0(pred_cond), self.targets(step))
        rows = (scale > 1).nonzero()[:, 0]  # the others stay as they are
        if not len(rows):
            return prediction
        every = len(rows) == len(scale)
        condition = _reference_condition(step, reference)
        if not every:
            condition = {name: value[rows] for name, value in condition.items()}
        asked = step if self.weak is None else _with_network(step, self.weak)
        pred_ref = asked.predict(condition, None if every else rows)
        if every:
            return push(prediction, pred_cond, pred_ref, scale)
        return prediction.index_copy(0, rows, push(prediction[rows], pred_cond[rows], pred_ref, scale[rows]))

    @torch.no_grad()
    def reference(self, x0: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The class to push each sample away from, and how hard.

        Parameters
        ----------
        x0 : Tensor of shape (B, C, H, W)
            Clean estimates, latents if there is `decode`.
        labels : int64 Tensor of shape (B,)

        Returns
        -------
        reference : int64 Tensor of shape (B,)
        scale : Tensor of shape (B,)
            w >= 1.
        """
        f = self.logits(self.clipped(x0 if self.decode is None else self.decode(x0)), labels)
        reference = reference_labels(f, labels)
        if self.weak is not None:
            mistaken = confusion(f, labels, reference, "argmax") > 0
            return torch.where(mistaken, reference, labels), torch.full_like(f[:, 0], self.guidance_scale)
        c = confusion(f, labels, reference, self.confusion, self.temperature)
        return reference, adaptive_scale(c.masked_fill(c < self.threshold, 0), self.guidance_scale)


def _reference_condition(step: Step, reference: Tensor) -> Condition:
    """The network arguments of each sample's reference class, over the batch."""
    condition = step.conditions[0]
    if "class_labels" in condition:
        return {**condition, "class_labels": reference.to(condition["class_labels"].dtype)}
    classes = step.conditions[2:]
    if int(reference.max()) >= len(classes):
        raise ValueError(
            "the run needs class_labels, or after (condition, its absence) one further condition for each class of "
            f"the classifier: class {int(reference.max())} is asked for, {len(classes)} were given"
        )
    present, place = reference.unique(return_inverse=True)  # at most B of the K classes are put side by side
    chosen = [classes[k] for k in present.tolist()]
    everyone = torch.arange(len(reference), device=reference.device)
    return {name: torch.stack([c[name] for c in chosen])[place, everyone] for name in condition}


def _with_network(step: Step, model: Any) -> Step:
    return dataclasses.replace(step, network=network_of(model, step.sample.shape[1]))
