"""Random networks in the layouts of Stable Diffusion, SDXL and DiT, small and in float64, and texts for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from shoestring import guide

WIDTH = 8


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unet(**more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            **more,
        )
    return model.double().eval()


def traced(guider: Any, scheduler: Any, model: Any, noise: Tensor, conditions: Any, steps: int, **more: Any) -> Any:
    """The output of a run, and every step with its prediction and what came after it."""
    seen: list[Any] = []
    scheduler = scheduler or DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    out = guide.sample(
        model,
        scheduler,
        guider,
        noise,
        conditions,
        num_inference_steps=steps,
        callback=lambda *a: seen.append(a),
        **more,
    )
    return out, seen


@pytest.fixture(scope="session")
def tiny_sd() -> tuple[Any, Callable[..., Any]]:
    """Network of Stable Diffusion, and ``conditions(batch, kinds)``: `kinds` different texts over the batch."""

    def conditions(batch: int, kinds: int = 2) -> tuple[Tensor, ...]:
        return tuple(random(batch, 5, WIDTH, seed=10 + kind) for kind in range(kinds))

    return unet(), conditions


@pytest.fixture(scope="session")
def tiny_sdxl_unet() -> tuple[Any, Callable[..., Any]]:
    """Network of SDXL, which is also told a pooled text and sizes."""
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 6,
    )

    def conditions(batch: int, kinds: int = 2) -> tuple[dict[str, Any], ...]:
        sizes = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]], dtype=torch.float64).repeat(batch, 1)
        return tuple(
            {
                "encoder_hidden_states": random(batch, 5, WIDTH, seed=10 + kind),
                "added_cond_kwargs": {"text_embeds": random(batch, 6, seed=20 + kind), "time_ids": sizes},
            }
            for kind in range(kinds)
        )

    return model, conditions


@pytest.fixture(scope="session")
def tiny_dit() -> tuple[Any, Callable[..., Any]]:
    """Diffusion transformer over classes, with a learnt variance beside its noise; class 7 is "no class"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=8,
        )
        for parameter in model.parameters():  # DiT starts at zero, and then says the same of every class
            torch.nn.init.normal_(parameter, std=0.2)

    def conditions(batch: int, kinds: int = 2) -> tuple[Tensor, ...]:
        labels = [torch.arange(batch) % 7, torch.full((batch,), 7), *((torch.arange(batch) + k) % 7 for k in (2, 3))]
        return tuple(labels[:kinds])

    return model.double().eval(), conditions
