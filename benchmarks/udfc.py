"""UDFC: what 30 % of the filters of a ResNet-18 are worth in images/s, and what it takes to remove them.

1. Images/s of a ResNet-18 (112 px) with 30 % of the filters inside its blocks gone, against the dense one.
2. Seconds to compress it (11 M parameters, random weights, statistics as of training), in every form.
3. Against torch-pruning's magnitude pruner at the same ratio on the same layers: seconds, and the accuracy that is left
   of tiny-resnet on the test garments, without any training. Of torch-pruning's own choice of layers, the residual
   stream included, only the figures are printed: it removes more.

    python benchmarks/udfc.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
import torch_pruning as tp
from _race import FAILED, RATIOS, clock, race, report
from _record import record
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from shoestring import zoo
from shoestring.compress.udfc import chains, compress_by, udfc_compress
from shoestring.zoo.train._fashion import garments

RATIO = 0.3
FASTER, SECONDS = 1.2, 10.0  # the limits
FORMS: dict[str, dict[str, Any]] = {
    "prune 30 %": {},
    "prune 30 %, 6 bits": {"weight_bits": 6},
    "prune 30 %, non-negative": {"nonnegative": True, "alpha1": 1.0},
}


def resnet_18() -> ResNetForImageClassification:
    """Random weights, and running statistics of two batches of noise."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=1000)).train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def by_torch_pruning(model: nn.Module, shape: tuple[int, ...], everywhere: bool = False) -> nn.Module:
    """Magnitude pruning at the same ratio: of the layers that UDFC prunes, or of all but the classifier."""
    model = copy.deepcopy(model)
    layers = dict(model.named_modules())
    mine = {layers[chain.layers[0][0]] for chain in chains(model)[0]}
    others = [m for m in layers.values() if isinstance(m, nn.Conv2d | nn.Linear) and m not in mine]
    classifier = [m for m in others if isinstance(m, nn.Linear)]
    tp.pruner.MagnitudePruner(
        model,
        torch.zeros(shape),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=classifier if everywhere else others,
        output_transform=lambda out: out.logits.sum(),
    ).step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = torch.cat([model(part).logits.argmax(1) for part in images.split(500)]) == labels
    return 100 * right.float().mean().item()


@torch.no_grad()
def speed(model: nn.Module, small: nn.Module, batch: int, side: int, repeats: int) -> None:
    images = torch.randn(batch, 3, side, side)
    work = {"dense": lambda: model(images), "small": lambda: small(images)}
    for call in work.values():
        call()
    s = race(repeats, **work)
    print(f"ResNet-18, {batch} x 3x{side}x{side}: {', '.join(f'{k} {batch / t:.0f} images/s' for k, t in s.items())}")
    what = f"ResNet-18, {batch} x 3x{side}x{side}, 30 %: images/s, UDFC / dense"
    report(what, s["dense"] / s["small"], FASTER, at_least=True)


def compression(model: nn.Module) -> nn.Module:
    """Seconds of every form, and of torch-pruning; the pruned model."""
    kept: dict[str, nn.Module] = {}

    def work(form: str) -> None:
        kept[form] = udfc_compress(model, pruning_ratio=RATIO, **FORMS[form])

    for form in FORMS:
        seconds = clock(lambda form=form: work(form))  # type: ignore[misc]
        report(f"ResNet-18, {form}: seconds to compress", seconds, SECONDS)
    seconds = clock(lambda: by_torch_pruning(model, (1, 3, 64, 64)))
    small = kept["prune 30 %"]
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, small)]
    print(f"torch-pruning, the same layers: {seconds:.2f} s; parameters {count[0]:.2f} M -> {count[1]:.2f} M")
    return small


def peers(name: str, split: str) -> None:
    """Accuracy of tiny-resnet without any training after it."""
    model = zoo.load(name)
    images, labels = garments(split)
    shape = (1, *images.shape[1:])
    udfc = {
        "UDFC": udfc_compress(model, pruning_ratio=RATIO),
        "UDFC, non-negative": udfc_compress(model, pruning_ratio=RATIO, nonnegative=True, alpha1=1.0),
        "UDFC, 6 bits": udfc_compress(model, pruning_ratio=RATIO, weight_bits=6),
        "UDFC, importance of the group": udfc_compress(model, pruning_ratio=RATIO, importance="group"),
        "no repair": compress_by(model, lambda t, basis, prior: prior, pruning_ratio=RATIO),
    }
    peer = {
        "torch-pruning, the same layers": by_torch_pruning(model, shape),
        "torch-pruning, all layers": by_torch_pruning(model, shape, everywhere=True),
    }
    left = {what: accuracy(m, images, labels) for what, m in {"dense": model, **udfc, **peer}.items()}
    for what, m in {"dense": model, **udfc, **peer}.items():
        print(f"  {name}, {what:<32} {left[what]:5.1f} %  {sum(p.numel() for p in m.parameters()):>9,} parameters")
    theirs = left["torch-pruning, the same layers"]
    by_l2 = {
        "what": f"{name}, 30 %: accuracy left, UDFC with the paper's importance / torch-pruning, same layers",
        "ratio": round(left["UDFC"] / theirs, 3),
    }
    print(f"  {by_l2['what']} {by_l2['ratio']:.2f} (no limit)")
    RATIOS.append(by_l2)
    # torch-pruning looks at the group of a filter: the repair is compared with it on the same choice of filters
    like = left["UDFC, importance of the group"] / theirs
    what = f"{name}, 30 %: accuracy left, UDFC with torch-pruning's importance / torch-pruning, same layers"
    report(what, like, 1.0, at_least=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--model", default="tiny-resnet", help="of the zoo, for the accuracy")
    arguments = parser.parse_args()
    quick = arguments.quick
    dense = resnet_18()
    small = compression(dense)
    speed(dense, small, *((4, 64, 5) if quick else (16, 112, 21)))
    if not quick:
        speed(dense, small, 32, 64, 21)
    peers(arguments.model, "test[:500]" if quick else "test")
    if not quick:
        record("udfc", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
