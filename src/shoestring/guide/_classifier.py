"""What the two methods that ask a classifier share: the classifier, whose labels, and how it sees a clean estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring._models import check_model
from shoestring.guide._sampler import Step, is_between

__all__ = ["ClassifierGuider", "ImageClassifier", "check_number", "preprocess_from"]

LATENTS = "needs the latents: use shoestring.guide.sample or shoestring.guide.apply"


class ImageClassifier(nn.Module):
    """An image classifier of transformers as a function, images to logits, that says when images are not what it needs.

    Parameters
    ----------
    model : torch.nn.Module
        Of transformers, say ``AutoModelForImageClassification.from_pretrained(...)``; in eval mode.
    image_size : int, optional
        Height and width that it was trained on. Default: ``model.config.image_size``; without one (ResNets) any size.
    value_range : (float, float), default (-1.0, 1.0)
        Of the pixels it was trained on. Guided pictures are in [-1, 1].

    Shapes
    ------
    (B, C, H, W) -> (B, K)

    Raises
    ------
    ValueError
        On images of another size, number of channels or range. On construction: weights that are NaN or absent.

    Examples
    --------
    >>> from shoestring import zoo
    >>> classifier = ImageClassifier(zoo.load("tiny-resnet"), image_size=28)
    >>> classifier(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> classifier(torch.zeros(2, 1, 32, 32))
    Traceback (most recent call last):
    ...
    ValueError: the classifier expects images of 28 x 28, got 32 x 32: resize them in preprocess
    """

    def __init__(
        self, model: nn.Module, *, image_size: int | None = None, value_range: tuple[float, float] = (-1.0, 1.0)
    ) -> None:
        super().__init__()
        check_model(model)
        config = getattr(model, "config", None)
        self.model, self.value_range = model, (float(value_range[0]), float(value_range[1]))
        own = getattr(config, "image_size", None)
        self.image_size = image_size or (own if isinstance(own, int) else None)
        self.channels = getattr(config, "num_channels", None)
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"the classifier expects images of {self.image_size} x {self.image_size}, got {height} x {width}: "
                "resize them in preprocess"
            )
        if self.channels is not None and images.shape[1] != self.channels:
            raise ValueError(f"the classifier expects {self.channels} channels, got {images.shape[1]}")
        (low, high), (least, most) = self.value_range, torch.aminmax(images.detach())
        slack = 1e-3 * (high - low)
        if not (low - slack <= float(least) and float(most) <= high + slack):  # NaN is outside as well
            raise ValueError(
                f"the classifier expects values from {low:g} to {high:g}, got {float(least):g} to {float(most):g}: "
                "rescale them in preprocess"
            )
        answer = self.model(images)
        return answer if isinstance(answer, Tensor) else answer.logits


def preprocess_from(processor: Any) -> Callable[[Tensor], Tensor]:
    """What an image processor of transformers does, differentiable, and for pictures in [-1, 1].

    Pictures are resized to what the network sees, without a crop, and normalised by mean and standard deviation.

    Parameters
    ----------
    processor : transformers image processor

    Returns
    -------
    callable, (B, C, H, W) -> (B, C, h, w)

    Examples
    --------
    >>> from types import SimpleNamespace  # or AutoImageProcessor.from_pretrained(...)
    >>> processor = SimpleNamespace(
    ...     size={"height": 4, "width": 4}, do_normalize=True, image_mean=[0.5], image_std=[0.25]
    ... )
    >>> preprocess_from(processor)(torch.ones(1, 1, 8, 8))[0, 0, 0]  # 1 is white: (1 - 0.5) / 0.25
    tensor([2., 2., 2., 2.])
    """
    size: dict[str, int] = dict(processor.size)
    if getattr(processor, "do_center_crop", False):
        size = dict(processor.crop_size)
    shape = (
        int(size.get("height", size.get("shortest_edge", 0))),
        int(size.get("width", size.get("shortest_edge", 0))),
    )
    if min(shape) < 1:
        raise ValueError(f"processor must have a size of height and width or shortest_edge, got {size}")
    normal = getattr(processor, "do_normalize", True)
    mean, std = (processor.image_mean, processor.image_std) if normal else ([0.0], [1.0])

    def preprocess(images: Tensor) -> Tensor:
        if images.shape[-2:] != shape:
            images = F.interpolate(images, size=shape, mode="bilinear", antialias=True)
        m, s = (torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (mean, std))
        return ((images + 1) / 2 - m) / s

    return preprocess


class ClassifierGuider(BaseGuidance):
    """Base of `ClassifierGuidance` and `GradientFreeClassifierGuidance`: all but the guidance.

    The classifier and the callables are no numbers, so a saved configuration leaves them out: give them again, as
    ``from_pretrained(folder, classifier=...)`` or as attributes.
    """

    _input_predictions: ClassVar = ["pred_cond"]
    ignore_for_config: ClassVar = ["classifier", "decode", "labels", "preprocess"]

    labels: Tensor | Sequence[int] | int | None
    preprocess: Callable[[Tensor], Tensor] | None
    decode: Callable[[Tensor], Tensor] | None
    cfg_scale: float
    clip: float | None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, which drops arguments that are not of the configuration; here they are set."""
        objects = {name: kwargs.pop(name) for name in cls.ignore_for_config if name in kwargs}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        for name, value in objects.items():
            setattr(made[0] if return_unused_kwargs else made, name, value)
        return made

    def new(self, **kwargs: Any) -> Any:
        """A copy with the same classifier and callables, and with what `kwargs` change."""
        own = {name: getattr(self, name) for name in self.ignore_for_config if hasattr(self, name)}
        return type(self).from_config(self.config, **{**own, **kwargs})

    @property
    def classifier(self) -> Callable[[Tensor], Any] | None:
        """As it was given."""
        return self._given

    @classifier.setter
    def classifier(self, classifier: Callable[[Tensor], Any] | None) -> None:
        check_classifier(classifier)
        self._given, self._asked = classifier, self.prepared(classifier)

    def prepared(self, classifier: Any) -> Any:
        """What is asked in its place."""
        return classifier

    def set_scheduler(self, scheduler: Any) -> None:
        """Called before a run: the classifier must be there, and expect values as pictures have them."""
        if self.classifier is None:
            raise ValueError("classifier is missing: set guider.classifier, or give it to from_pretrained")
        check_classifier(self.classifier)
        expected = getattr(self.classifier, "value_range", None)
        if expected is None or self.preprocess is not None or self.clip is None:
            return
        low, high = expected
        if (low, high) != (-self.clip, self.clip):
            raise ValueError(
                f"the classifier expects values from {low:g} to {high:g}, pictures are from {-self.clip:g} to "
                f"{self.clip:g}: rescale them in preprocess"
            )

    @property
    def active(self) -> bool:
        """Whether this step is guided: enabled, and between `start` and `stop`."""
        return bool(self._enabled) and is_between(self)

    @property
    def num_conditions(self) -> int:
        return 1

    @property
    def is_conditional(self) -> bool:
        return True

    def prepare_inputs(self, data: Any) -> Any:
        raise ValueError(f"{type(self).__name__} {LATENTS}")

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        raise ValueError(f"{type(self).__name__} {LATENTS}")

    def by_condition(self, step: Step, pred_cond: Tensor) -> Tensor:
        """``e_u + s (e_c - e_u)`` with s = `cfg_scale`, a second network call; `pred_cond` itself if s is 1."""
        if self.cfg_scale == 1 or not self.active:
            return pred_cond
        pred_uncond = step.predict(1)
        return pred_uncond + self.cfg_scale * (pred_cond - pred_uncond)

    def targets(self, step: Step) -> Tensor:
        """Classes (B,) int64 that are asked for: `labels`, or else the run's own ``class_labels``."""
        given = step.conditions[0].get("class_labels") if self.labels is None else self.labels
        if given is None:
            raise ValueError("labels must be given: the condition has no class_labels to take them from")
        y = torch.as_tensor(given, device=step.sample.device)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"labels must be whole numbers, got {y.dtype}")
        if y.ndim == 0:
            y = y.expand(len(step.sample))
        if y.shape != step.sample.shape[:1]:
            raise ValueError(f"labels must be one number or one for each of {len(step.sample)}, got {tuple(y.shape)}")
        return y.long()

    def clipped(self, images: Tensor) -> Tensor:
        """Pictures as the classifier is shown them: in [-clip, clip], and in its dtype."""
        dtype = next((p.dtype for p in _parameters(self._asked) if p.is_floating_point()), None)
        if dtype is None and images.dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        images = images if dtype is None else images.to(dtype)
        return images if self.clip is None else images.clamp(-self.clip, self.clip)

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Answers (B, K) of the classifier, float32 at least, checked; `labels` only for their range."""
        said: Any = self._asked(images if self.preprocess is None else self.preprocess(images))
        f = said if isinstance(said, Tensor) else getattr(said, "logits", None)
        if not isinstance(f, Tensor) or f.ndim != 2 or len(f) != len(images):
            got = tuple(f.shape) if isinstance(f, Tensor) else type(said).__name__
            raise ValueError(f"classifier must answer {len(images)} images with logits of shape (B, K), got {got}")
        f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
        if not bool(f.isfinite().all()):
            raise ValueError("classifier must answer with finite logits, got NaN or infinity")
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= f.shape[1]:
            raise ValueError(
                f"labels must be from 0 to {f.shape[1] - 1}, the classes of the classifier, got {low} to {high}"
            )
        return f


def check_classifier(classifier: Any) -> None:
    """Raise unless it is None, or can be called and is in eval mode."""
    if classifier is not None and not callable(classifier):
        raise TypeError(f"classifier must be a callable, images to logits, got {type(classifier).__name__}")
    if isinstance(classifier, nn.Module) and any(module.training for module in classifier.modules()):
        raise ValueError("classifier must be in eval mode: call its eval() first")


def check_number(name: str, value: Any, low: float = -math.inf, *, above: bool = False) -> float:
    """A finite number >= low, or > low."""
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or (above and value == low):
        bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def _parameters(classifier: Any) -> Iterator[nn.Parameter]:
    return classifier.parameters() if isinstance(classifier, nn.Module) else iter(())
