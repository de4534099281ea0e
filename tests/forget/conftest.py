import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel, UNet2DModel


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """A `transformers.Trainer` leaves its own for the rest of the process, where `loop.fit` would find it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def seeded():
    """One thread, and weights that do not depend on what ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_unet(classes: int = 4) -> UNet2DModel:
    sides = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return UNet2DModel(
        8, 1, 1, num_class_embeds=classes, attention_head_dim=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8,), **sides,
    ).eval()  # fmt: skip


def text_unet() -> UNet2DConditionModel:
    sides = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return UNet2DConditionModel(
        8, 2, 2, cross_attention_dim=6, attention_head_dim=2, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8,), mid_block_type=None, **sides,
    ).eval()  # fmt: skip
