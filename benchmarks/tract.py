"""TrAct against the plain layer and against a plain unfold-and-invert, as ratios in one run.

1. A training step (forward, backward, optimizer) of a small CNN, a ViT-tiny, a ResNet-18 and an MLP on images: TrAct
   against the plain layer (the limit), and against TrAct written plainly: all patches by `unfold`, one inverse.
2. Memory that the backward pass of one large convolution adds at its peak: in blocks against all patches.

    python benchmarks/tract.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _memory import forget_peak, in_a_process, peak_mb
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn

from shoestring.train.tract import patch_moment, tract_


class PlainFunction(torch.autograd.Function):
    """The equations as they stand: all patches at once, an explicit inverse of the n x n matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, W, bias, stride, padding) if W.ndim == 4 else F.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        a, g = x, G
        if W.ndim == 4:
            a = F.unfold(x, W.shape[2:], padding=ctx.padding, stride=ctx.stride).transpose(1, 2).flatten(0, 1)
            g = G.flatten(2).transpose(1, 2).flatten(0, 1)
        S = a.T @ a / len(a) + 0.1 * torch.eye(a.shape[1])
        return None, (g.T @ a @ torch.linalg.inv(S)).reshape(W.shape), g.sum(0) if ctx.has_bias else None, None, None


class PlainConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return PlainFunction.apply(x, self.weight, self.bias, self.stride[0], self.padding[0])


class PlainLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return PlainFunction.apply(x, self.weight, self.bias, 1, 0)


def plainly_(model: nn.Module) -> nn.Module:
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    layer.__class__ = PlainConv2d if isinstance(layer, nn.Conv2d) else PlainLinear
    return model


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def vit_tiny(image_size: int, patch_size: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=image_size, patch_size=patch_size, num_labels=10))


def resnet_18() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def stepper(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """One training step on one batch."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)
    if isinstance(model, nn.Sequential):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        F.cross_entropy(output if isinstance(output, Tensor) else output.logits, y).backward()
        optimizer.step()

    return step


def steps(what: str, model: nn.Module, shape: tuple[int, ...], repeats: int, limit: float = 1.10) -> None:
    copies = {"plain": model, "tract": tract_(copy.deepcopy(model)), "plainly": plainly_(copy.deepcopy(model))}
    work = {name: stepper(each, shape) for name, each in copies.items()}
    for step in work.values():
        step()
    s = race(repeats, **work)
    print(f"{what}: {', '.join(f'{name} {1000 * seconds:.1f} ms' for name, seconds in s.items())}")
    report(f"{what}: training step, TrAct / plain layer", s["tract"] / s["plain"], limit)
    report(f"{what}: training step, TrAct / unfold and invert", s["tract"] / s["plainly"], 1.05)


def peak_memory(how: str, images: int) -> None:
    """Run in a process of its own: print the MB that one moment of a 7x7 convolution adds at its peak."""
    x = torch.randn(images, 3, 224, 224)
    patch_moment(x[:1, :, :32, :32], 7, stride=2, padding=3)  # BLAS has its buffers
    forget_peak()
    before = peak_mb()
    if how == "blocks":
        patch_moment(x, 7, stride=2, padding=3)
    else:
        a = F.unfold(x, 7, padding=3, stride=2).transpose(1, 2).flatten(0, 1)
        torch.mm(a.T, a)
    print(json.dumps(peak_mb() - before))


def memory(images: int) -> None:
    added = {}
    for how in ("blocks", "unfold"):
        added[how] = in_a_process(__file__, how, images)
    inputs = images * 3 * 224 * 224 * 4 / 2**20
    print(
        f"7x7 convolution of {images} images ({inputs:.0f} MB): {added['blocks']:.0f} MB more, "
        f"by all patches {added['unfold']:.0f} MB"
    )
    report("memory of x^T x, blocks / the input itself", added["blocks"] / inputs, 2.0)
    report("memory of x^T x, blocks / all patches", added["blocks"] / added["unfold"], 0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak_memory(arguments.peak[0], int(arguments.peak[1]))
        sys.exit()
    torch.manual_seed(0)
    if arguments.quick:
        steps("small CNN, 32 x 3x32x32", small_cnn(), (32, 3, 32, 32), 5)
        memory(32)
    else:
        steps("small CNN, 128 x 3x32x32", small_cnn(), (128, 3, 32, 32), 31)
        steps("ViT-tiny/16, 16 x 3x224x224", vit_tiny(224, 16), (16, 3, 224, 224), 7)
        steps("ViT-tiny/4, 32 x 3x32x32", vit_tiny(32, 4), (32, 3, 32, 32), 9)
        steps("ResNet-18, 4 x 3x224x224", resnet_18(), (4, 3, 224, 224), 7)
        steps("MLP 3072-512-512-10, 128 x 3x32x32", mlp(), (128, 3, 32, 32), 31, 1.25)
        memory(32)
        record("tract", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
