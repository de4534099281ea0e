"""What the benchmarks of pdp and nm-decay share: networks, their training steps, and what autograd keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

STEPS = 16  # timed together: one refresh of thresholds or masks falls into them


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    parts = [nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*parts), (256, 1, 28, 28)


def resnet_18(images: int) -> tuple[nn.Module, tuple[int, ...]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)), (images, 3, 96, 96)


def masked(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy with constant masks by torch.nn.utils.prune."""
    model = copy.deepcopy(model)
    for name in names:
        prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.9)
    return model


def layers(model: nn.Module) -> list[str]:
    """All convolutions and linear layers but the first and the last."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][1:-1]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, y)


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)


def stepper(
    model: nn.Module, shape: tuple[int, ...], steps: int, control: Callable[[], None] | None = None
) -> Callable[[], None]:
    """`steps` training steps with Adam, as one call, the first of them done."""
    x, y = batch(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def some(count: int = steps) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            if control is not None:
                control()

    some(1)
    return some


def kept_bytes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that autograd keeps for a backward pass, and buffers; without parameters and the batch."""
    x, y = batch(shape)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x, y)}
    kept = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in model.buffers()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, x, y)
    del loss
    return sum(kept.values())
