"""shoestring guide: pictures of a diffusion model, steered by a method of the room and by what it is compared with."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring.cli import _console, _models, _rows

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# Of each method: its default scale. Those of adaptive-guidance, perp-neg and cfg are of one kind.
METHODS = {"cfgpp": 0.6, "adaptive-guidance": 7.5, "perp-neg": 7.5, "elucd": 1.0, "gfcg": 3.0}
COMPARED = ("cfg", *METHODS)
NEED_CLASSIFIER = ("elucd", "gfcg")
CLASSES = ("num_class_embeds", "num_embeds_ada_norm")  # where a network's configuration counts its classes


def run(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            show_default=False,
            help="A diffusion model: a name of the zoo, a folder, or a hub id. Told texts (Stable Diffusion, SDXL) or "
            "classes (a folder with a UNet2DModel or DiT and its scheduler).",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="SLUG",
            show_default=False,
            help=", ".join(METHODS),
            autocompletion=_console.completer(METHODS),
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", show_default=False, help="A new folder for all of it.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Repeat it for several, in turn.")
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option("--negative", metavar="TEXT", help="What shall not be seen; perp-neg takes several."),
    ] = None,
    label: Annotated[
        list[int] | None,
        typer.Option(
            "--label", metavar="CLASS", help="A number; repeat it for several, in turn.", show_default="all in turn"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="Of the method.", show_default="the paper's")] = None,
    compare: Annotated[
        str,
        typer.Option("--compare", metavar="cfg|SLUG", help="What the second row is made with, from the same noise."),
    ] = "cfg",
    compare_scale: Annotated[
        float | None,
        typer.Option(
            "--compare-scale", help="Of that.", show_default="as --scale; for cfgpp the mean of its step scales"
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the scheduler.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of the first picture; the next has the next.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures of each.")] = 8,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures at once.")] = 8,
    classifier: Annotated[
        str | None,
        typer.Option("--classifier", metavar="MODEL", help="elucd, gfcg: an image classifier of transformers."),
    ] = None,
    class_prompt: Annotated[
        list[str] | None,
        typer.Option("--class-prompt", metavar="TEXT", help="gfcg of a text model: one for each class, in order."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="adaptive-guidance.", show_default="0.991")
    ] = None,
    negative_scale: Annotated[
        float | None, typer.Option("--negative-scale", help="perp-neg.", show_default="1")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="CLASS", help="Of diffusers, e.g. DDIMScheduler.", show_default="its own"),
    ] = None,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Make pictures with a method of guidance, and the same ones with another: images, a contact sheet, a JSON note.

    The table tells the network calls of a picture and the seconds of all. Weights and scheduler are only read.

    \b
    Examples:
      shoestring guide tiny-t2i --prompt "a large red bag" --method cfgpp --out sheet
      shoestring guide tiny-t2i --prompt "a red bag" --negative "on the left" --method perp-neg --scale 3 --out sheet
      shoestring guide tiny-class-ddpm --label 9 --label 1 --method adaptive-guidance --scale 2 --out sheet
      shoestring guide tiny-class-ddpm --method gfcg --classifier tiny-resnet --out sheet
    """
    _check_usage(method, compare, classifier, class_prompt, threshold, negative_scale, out)
    options = {"threshold": threshold, "negative_scale": negative_scale}
    with _quiet() as seen:
        source = _load(pipeline, scheduler, device, prompt, negative, label, class_prompt, n, (method, compare))
        asked = _classifier(classifier, source, device) if classifier else {}
        own = METHODS[method] if scale is None else scale
        other = compare_scale if compare_scale is not None else _default_compared(method, own, compare, source, steps)
        rows = [
            Row(name, value, _guider(name, value, options, asked, source))
            for name, value in ((method, own), (compare, other))
        ]
        with _console.progress("guide") as report:
            report(None, "one step, for the clock")
            source.make(rows[1], range(1), seed, 1)
            done = 0
            for row in rows:
                for first in range(0, n, batch):
                    part = range(first, min(first + batch, n))
                    began = time.perf_counter()
                    images, calls = source.make(row, part, seed, steps)
                    row.seconds += time.perf_counter() - began
                    row.images += images
                    row.calls += calls / n
                    done += len(part)
                    report(done / (2 * n), row.name)
    for warning in seen:
        typer.echo(f"warning: {warning}", err=True)
    note = {
        "pipeline": pipeline,
        "method": method,
        "compare": compare,
        "scheduler": type(source.scheduler).__name__,
        "steps": steps,
        "seeds": [seed + i for i in range(n)],
        **source.told(n),
        "rows": [
            {
                "method": row.name,
                "scale": row.scale,
                "network_calls": round(row.calls, 6),
                "seconds": round(row.seconds, 3),
                "files": [f"{row.name}/{i:03d}.png" for i in range(n)],
            }
            for row in rows
        ],
        "warnings": seen,
    }
    _write(out, rows, note, source)
    if as_json:
        _console.print_json({"out": str(out), **note})
        return
    _console.print_table(
        ["method", "scale", "network calls a picture", "seconds"],
        [[row.name, f"{row.scale:.3g}", f"{row.calls:.4g}", f"{row.seconds:.2f}"] for row in rows],
        right=[1, 2, 3],
    )
    _console.say(f"{2 * n} pictures, sheet.png and guide.json in {out}")


@dataclass
class Row:
    """One method: its guider, and what it made at what cost."""

    name: str
    scale: float
    guider: Any
    images: list[Image.Image] = field(default_factory=list)
    calls: float = 0.0  # of the network, a picture
    seconds: float = 0.0


@dataclass
class Texts:
    """A pipeline that is told texts."""

    pipe: Any
    prompts: list[str]  # one a picture
    negative: list[str]
    labels: list[int]  # of the classifier; none, or one a picture
    class_prompts: list[str]

    @property
    def scheduler(self) -> Any:
        return self.pipe.scheduler

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    def told(self, n: int) -> dict[str, Any]:
        return {"prompts": self.prompts, "negative": self.negative, **({"labels": self.labels} if self.labels else {})}

    def make(self, row: Row, part: range, seed: int, steps: int) -> tuple[list[Image.Image], float]:
        """Pictures of these numbers, and how many rows the network was asked."""
        import torch

        from shoestring.guide import apply

        auxiliary: tuple[str, ...] = ()
        negative = ", ".join(self.negative)
        if row.name == "perp-neg":  # its unconditional prompt is the empty one
            auxiliary, negative = tuple(self.negative), ""
        elif row.name == "gfcg":
            auxiliary = tuple(self.class_prompts)
        if self.labels and row.name in NEED_CLASSIFIER:
            row.guider.labels = torch.tensor([self.labels[i] for i in part])
        with apply(self.pipe, row.guider, auxiliary=auxiliary) as calls:
            images = self.pipe(
                [self.prompts[i] for i in part],
                negative_prompt=[negative] * len(part),
                num_inference_steps=steps,
                guidance_scale=7.5,  # any above 1: the guider has its own
                generator=[torch.Generator().manual_seed(seed + i) for i in part],
            ).images
        return images, calls.rows


@dataclass
class Classes:
    """A network that is told classes, and the decoder of its latents, if they are latents."""

    model: Any
    scheduler: Any
    vae: Any
    labels: list[int]  # one a picture
    null: int

    def told(self, n: int) -> dict[str, Any]:
        return {"labels": self.labels}

    def make(self, row: Row, part: range, seed: int, steps: int) -> tuple[list[Image.Image], float]:
        """Pictures of these numbers, and how many rows the network was asked."""
        import torch

        from shoestring.guide import sample

        size = self.model.config.sample_size
        shape = (self.model.config.in_channels, *((size, size) if isinstance(size, int) else size))
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in part])
        noise = noise.to(self.model.device, self.model.dtype)
        labels = torch.tensor([self.labels[i] for i in part], device=noise.device)
        conditions = (labels, torch.full_like(labels, self.null))
        made = sample(self.model, self.scheduler, row.guider, noise, conditions, num_inference_steps=steps)
        pixels = made.sample if self.vae is None else _decoder(self.vae)(made.sample)
        return _pictures(pixels), made.num_calls * len(part)


def _check_usage(
    method: str,
    compare: str,
    classifier: str | None,
    class_prompt: list[str] | None,
    threshold: float | None,
    negative_scale: float | None,
    out: Path,
) -> None:
    for option, name, known in (("--method", method, [*METHODS]), ("--compare", compare, COMPARED)):
        if name not in known:
            raise _console.UsageError(
                f"{option} must be one of {', '.join(known)}, got {name!r}{_console.did_you_mean(name, known)}"
            )
    both = (method, compare)
    if method == compare:
        raise _console.UsageError(f"--method and --compare are both {method}: compare it with another")
    if not classifier and (asking := [name for name in both if name in NEED_CLASSIFIER]):
        raise _console.UsageError(f"{asking[0]} needs --classifier: a name of the zoo, a folder, or a hub id")
    for option, value, methods in (
        ("--classifier", classifier, NEED_CLASSIFIER),
        ("--class-prompt", class_prompt, ("gfcg",)),
        ("--threshold", threshold, ("adaptive-guidance",)),
        ("--negative-scale", negative_scale, ("perp-neg",)),
    ):
        if value is not None and value != [] and not {*methods} & {*both}:
            raise _console.UsageError(f"{option} is for {' and '.join(methods)}")
    _models.check_new(out)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Without the libraries' bars and notices; yields what is to be said afterwards, each once."""
    import diffusers
    import transformers

    said: list[str] = []
    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said += dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


def _load(
    name: str,
    scheduler: str | None,
    device: str,
    prompt: list[str] | None,
    negative: list[str] | None,
    label: list[int] | None,
    class_prompt: list[str] | None,
    n: int,
    methods: Sequence[str],
) -> Texts | Classes:
    """The model, and what each of the n pictures is told."""
    import diffusers
    import torch

    if scheduler is not None and not hasattr(getattr(diffusers, scheduler, None), "set_timesteps"):
        raise ValueError(f"--scheduler must be a scheduler of diffusers, got {scheduler!r}")
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    folder = Path(_models.place(name))
    pipe: Any = None
    if (folder / "model_index.json").is_file() or not folder.is_dir():
        where = folder if folder.is_dir() else name
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, torch_dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        parts: dict[str, Any] = {
            part: getattr(pipe, part, None) for part in ("unet", "transformer", "scheduler", "vae")
        }
    else:
        parts = {part: _part(folder, part, dtype, device) for part in ("unet", "transformer", "scheduler", "vae")}
        if parts["scheduler"] is None or (parts["unet"] is None and parts["transformer"] is None):
            raise ValueError(
                f"{name} is no diffusion model: it has neither model_index.json nor the folders unet (or transformer) "
                "and scheduler"
            )
    if scheduler is not None:
        parts["scheduler"] = getattr(diffusers, scheduler).from_config(parts["scheduler"].config)
    if pipe is not None and parts["unet"] is not None and hasattr(pipe, "encode_prompt"):
        pipe.scheduler = parts["scheduler"]
        return _texts(name, pipe, prompt, negative, label, class_prompt, n, methods)
    model: Any = parts["unet"] if parts["unet"] is not None else parts["transformer"]
    counts = [getattr(model.config, key, None) for key in CLASSES] if model is not None else []
    known = next((count for count in counts if count), None)
    if known is None:
        raise ValueError(f"{name} is told neither texts (by a unet) nor classes, got {type(pipe or model).__name__}")
    if prompt or negative or class_prompt:
        raise ValueError(f"{name} is told a class: use --label, not --prompt, --negative or --class-prompt")
    if "perp-neg" in methods:
        raise ValueError(f"perp-neg needs a model that is told texts, {name} is told classes")
    # A UNet2DModel counts its null class, which is the last by custom; DiT does not.
    null = known - 1 if getattr(model.config, CLASSES[0], None) else known
    labels = label or [*range(null)]
    if min(labels) < 0 or max(labels) >= null:
        raise ValueError(f"--label must be from 0 to {null - 1} for {name}, got {labels}")
    return Classes(model, parts["scheduler"], parts["vae"], _in_turn(labels, n), null)


def _part(folder: Path, part: str, dtype: Any, device: str) -> Any:
    """A part of a folder without model_index.json, by the class its configuration names; None if it is not there."""
    import diffusers

    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not file.is_file():
        return None
    named = json.loads(file.read_text("utf-8")).get("_class_name")
    cls = getattr(diffusers, str(named), None)
    if cls is None:
        raise ValueError(f"{file} must name a class of diffusers in _class_name, got {named!r}")
    if part == "scheduler":
        return cls.from_pretrained(folder / part)
    return cls.from_pretrained(folder / part, torch_dtype=dtype).to(device).eval()


def _texts(
    name: str,
    pipe: Any,
    prompt: list[str] | None,
    negative: list[str] | None,
    label: list[int] | None,
    class_prompt: list[str] | None,
    n: int,
    methods: Sequence[str],
) -> Texts:
    if not prompt:
        raise ValueError(f"{name} is told texts: give --prompt")
    asking = [method for method in methods if method in NEED_CLASSIFIER]
    if asking and not label:
        raise ValueError(f"{asking[0]} of a text model needs --label, the classifier's number of what is asked for")
    if label and not asking:
        raise ValueError(f"{name} is told texts: --label is for a classifier's classes")
    if "gfcg" in methods and not class_prompt:
        raise ValueError("gfcg of a text model needs --class-prompt for each class of the classifier, in order")
    if "perp-neg" in methods and not negative:
        raise ValueError("perp-neg needs --negative: what shall not be seen")
    return Texts(pipe, _in_turn(prompt, n), negative or [], _in_turn(label, n) if label else [], class_prompt or [])


def _in_turn(items: Sequence[Any], n: int) -> list[Any]:
    return [items[i % len(items)] for i in range(n)]


def _classifier(name: str, source: Texts | Classes, device: str) -> dict[str, Any]:
    """The classifier, what it is shown of a picture, and how a picture is made of latents: arguments of its guiders."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from shoestring.guide._classifier import ImageClassifier, preprocess_from

    own, folder = _models.of_the_zoo(name), _models.place(name)
    model = AutoModelForImageClassification.from_pretrained(folder).to(device).eval()
    asked: dict[str, Any] = {"decode": None if source.vae is None else _decoder(source.vae)}
    if own or not _has_processor(folder):
        return asked | {"classifier": ImageClassifier(model)}
    processor = AutoImageProcessor.from_pretrained(folder)
    return asked | {"classifier": model, "preprocess": preprocess_from(processor)}


def _has_processor(folder: Any) -> bool:
    return not Path(folder).is_dir() or (Path(folder) / "preprocessor_config.json").is_file()


def _decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return lambda z: vae.decode(z / vae.config.scaling_factor + shift).sample


def _guider(
    name: str, scale: float, options: dict[str, float | None], asked: dict[str, Any], source: Texts | Classes
) -> Any:
    """The guider of a row."""
    if name == "cfg":
        from diffusers.guiders import ClassifierFreeGuidance

        return ClassifierFreeGuidance(guidance_scale=scale)
    if name == "cfgpp":
        from shoestring.guide.cfgpp import CFGPlusPlusGuidance

        return CFGPlusPlusGuidance(guidance_scale=scale)
    if name == "adaptive-guidance":
        from shoestring.guide.adaptive_guidance import AdaptiveGuidance

        threshold = options["threshold"]
        return AdaptiveGuidance(guidance_scale=scale, **({} if threshold is None else {"threshold": threshold}))
    if name == "perp-neg":
        from shoestring.guide.perp_neg import PerpNegGuidance

        weight = -1.0 if options["negative_scale"] is None else -options["negative_scale"]
        return PerpNegGuidance(guidance_scale=scale, weights=[weight] * len(getattr(source, "negative", ())))
    if name == "elucd":
        from shoestring.guide.elucd import ClassifierGuidance

        return ClassifierGuidance(**asked, guidance_scale=scale)
    from shoestring.guide.gfcg import GradientFreeClassifierGuidance

    return GradientFreeClassifierGuidance(**asked, guidance_scale=scale)


def _default_compared(method: str, scale: float, compare: str, source: Texts | Classes, steps: int) -> float:
    """Of methods of one kind the same; of CFG against CFG++ what CFG++ amounts to in these steps; else the paper's."""
    alike = ("cfg", "adaptive-guidance", "perp-neg")
    if method in alike and compare in alike:
        return scale
    if method == "cfgpp" and compare in alike:
        import copy
        import math

        from shoestring.guide._levels import noise_levels
        from shoestring.guide.cfgpp import cfgpp_scales

        scheduler = copy.deepcopy(source.scheduler)
        scheduler.set_timesteps(steps)
        omegas = [omega for omega in cfgpp_scales(*noise_levels(scheduler), scale).tolist() if math.isfinite(omega)]
        return sum(omegas) / max(len(omegas), 1)
    return METHODS.get(compare, 3.0)


def _pictures(pixels: Tensor) -> list[Image.Image]:
    """(n, 1 or 3, H, W) in [-1, 1] as images."""
    import torch
    from PIL import Image

    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"the model makes {pixels.shape[1]} channels, which are latents: its folder must have a vae")
    arrays = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def _write(out: Path, rows: list[Row], note: dict[str, Any], source: Texts | Classes) -> None:
    """Pictures, sheet and note."""
    with _models.filled(out) as work:
        for row in rows:
            (work / row.name).mkdir(parents=True)
            for i, image in enumerate(row.images):
                image.save(work / row.name / f"{i:03d}.png")
        told = source.prompts if isinstance(source, Texts) else [f"class {label}" for label in source.labels]
        _sheet(rows, told, note["seeds"]).save(work / "sheet.png")
        (work / "guide.json").write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _sheet(rows: list[Row], told: list[str], seeds: list[int]) -> Image.Image:
    """A row a method, a column a seed; what each was told above it, cost and scale at the left."""
    from textwrap import wrap

    from PIL import Image, ImageDraw

    side = max(*rows[0].images[0].size)
    times = max(1, -(-96 // side))  # small ones are enlarged, pixel by pixel
    width, height = (edge * times for edge in rows[0].images[0].size)
    lines = [wrap(text, max(8, width // 6))[:4] for text in told]
    left, top, gap = 150, 16 + 12 * max(map(len, lines)), 4
    page = Image.new(
        "RGB", (left + len(seeds) * (width + gap), top + len(rows) * (max(height, 60) + gap)), (255, 255, 255)
    )
    pen = ImageDraw.Draw(page)
    for column, seed in enumerate(seeds):
        x = left + column * (width + gap)
        pen.text((x, 2), "\n".join([f"seed {seed}", *lines[column]]), fill=(0, 0, 0), font_size=10)
    for place, row in enumerate(rows):
        y = top + place * (max(height, 60) + gap)
        words = [row.name, f"scale {row.scale:.3g}", f"{row.calls:.4g} calls a picture", f"{row.seconds:.2f} s"]
        pen.text((6, y + 4), "\n".join(words), fill=(0, 0, 0), font_size=11)
        for column, image in enumerate(row.images):
            page.paste(
                image.resize((width, height), Image.Resampling.NEAREST).convert("RGB"),
                (left + column * (width + gap), y),
            )
    return page
