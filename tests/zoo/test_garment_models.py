"""judge-fashion, tiny-class-ddpm and its weak twin: what is theirs beyond the tests of all training scripts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shoestring.zoo.train import _fashion, judge_fashion, tiny_class_ddpm, tiny_class_ddpm_weak
from shoestring.zoo.train._common import drop
from shoestring.zoo.train.tiny_class_ddpm import NULL, fit_unet, new_scheduler, new_unet, sample

TINY = {"channels": (8, 8, 8), "head": 8, "seed": 0}


class Shifts(nn.Module):
    """A noise predictor that says (label + 1) / 20 everywhere, and counts its calls per label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.labels: list[int] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor):
        self.labels += class_labels.tolist()
        eps = ((class_labels + 1) / 20).view(-1, 1, 1, 1).expand_as(x)
        return type("Output", (), {"sample": eps})


def test_shifted_moves_by_at_most_a_pixel_and_mirrors_half():
    image = torch.full((1, 1, 28, 28), -1.0)
    image[0, 0, 10, 5] = 1.0
    moved = _fashion.shifted(image.expand(400, 1, 28, 28), torch.Generator().manual_seed(0))
    assert moved.shape == (400, 1, 28, 28)
    assert (moved.flatten(1).sum(1) == image.sum()).all()  # one white pixel each, black filled in
    where = (moved[:, 0] == 1).nonzero()
    assert set(where[:, 1].tolist()) == set(range(9, 12))
    assert set(where[:, 2].tolist()) == {4, 5, 6, 21, 22, 23}  # 5 +- 1 and its mirror image 22 +- 1
    assert 150 < (where[:, 2] > 14).sum() < 250


def test_judge_is_named_as_the_bundle_and_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    config = judge_fashion.new_model().config
    new_unet(**TINY)
    assert torch.equal(before, torch.get_rng_state())
    assert config.id2label == dict(enumerate(_fashion.class_names()))
    assert config.id2label[9] == "Ankle boot"


def test_garments_keep_the_whole_range_and_their_labels():
    images, labels = _fashion.garments("test[:200]")
    assert images.shape == (200, 1, 28, 28)
    assert (images.min(), images.max()) == (-1, 1)
    assert set(labels.tolist()) == set(range(10))


def test_no_seed_is_used_twice():
    seeds = [judge_fashion.SEED, tiny_class_ddpm.SEED, tiny_class_ddpm_weak.SEED]
    assert len(set(seeds)) == 3


def test_both_unets_attend_at_14_and_7_and_the_twin_is_half_as_wide():
    full = new_unet(tiny_class_ddpm.CHANNELS, tiny_class_ddpm.HEAD, 0)
    weak = new_unet(tiny_class_ddpm_weak.CHANNELS, tiny_class_ddpm_weak.HEAD, 0)
    assert [2 * width for width in weak.config.block_out_channels] == list(full.config.block_out_channels)
    seen: list[tuple[int, int]] = []
    for unet in (full, weak):
        for module in unet.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
        seen.clear()
        assert unet(torch.zeros(1, 1, 28, 28), 5, class_labels=torch.tensor([NULL])).sample.shape == (1, 1, 28, 28)
        assert set(seen) == {(14, 14), (7, 7)}


def test_unet_starts_by_predicting_nothing():
    assert not new_unet(**TINY)(torch.randn(2, 1, 28, 28), 5, class_labels=torch.tensor([1, 2])).sample.any()


def test_scheduler_never_clips_and_can_divide_by_its_last_signal():
    scheduler = new_scheduler()
    scheduler.set_timesteps(20)
    assert not scheduler.config.clip_sample
    assert not scheduler.config.thresholding
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1].sqrt() > 0.04  # the errors of a prediction are divided by it


@pytest.mark.parametrize(("scale", "asked"), [(0.0, {NULL}), (1.0, {3}), (2.0, {3, NULL})])
def test_scale_zero_is_unconditional_and_one_conditional(scale: float, asked: set[int]):
    model = Shifts()
    sample(model, new_scheduler(), torch.tensor([3, 3]), scale=scale, steps=3)
    assert set(model.labels) == asked
    assert len(model.labels) == 2 * 3 * len(asked)


def test_guidance_extrapolates_from_null_to_label():
    """Label 3 says 4/20, null 11/20: scale 2 says -3/20, and so does a model without guidance that is told -4."""

    def images(label: int, scale: float) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return sample(Shifts(), new_scheduler(), torch.tensor([label]), scale=scale, steps=5, generator=g)

    assert torch.allclose(images(3, 2.0), images(-4, 1.0), atol=1e-4)
    assert not torch.allclose(images(3, 2.0), images(3, 1.0), atol=1e-2)


def test_sample_does_not_depend_on_the_batch_size_or_change_the_scheduler():
    unet, scheduler, labels = new_unet(**TINY).eval(), new_scheduler(), torch.arange(5)
    nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    one, five = (
        sample(unet, scheduler, labels, scale=2.0, steps=2, generator=torch.Generator().manual_seed(3), batch=batch)
        for batch in (1, 5)
    )
    assert torch.allclose(one, five, atol=1e-4)
    assert scheduler.num_inference_steps is None


def test_drop_gives_the_null_class_its_share_and_leaves_the_others():
    labels = torch.arange(10).repeat(1000)
    told = drop(labels, NULL, tiny_class_ddpm.DROP, torch.Generator().manual_seed(0))
    assert abs((told == NULL).float().mean() - tiny_class_ddpm.DROP) < 0.01
    assert torch.equal(told[told != NULL], labels[told != NULL])


def test_training_tells_the_null_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told: list[int] = []

    def noted(unet, scheduler, images, generator, *, gamma, class_labels):
        told.extend(class_labels.tolist())
        return next(unet.parameters()).sum()

    monkeypatch.setattr(tiny_class_ddpm, "noise_loss", noted)
    run_tiny(tmp_path, steps=20)
    assert 0.05 < told.count(NULL) / len(told) < 0.2
    assert set(told) == set(range(11))


def run_tiny(out: Path, *, steps: int = 5, checkpoint: Path | None = None) -> dict[str, object]:
    return fit_unet(
        new_unet(**TINY), out, steps, 1e-3, 7, smoke=True, device="cpu", checkpoint=checkpoint, progress=False
    )


def test_killed_and_started_again_ends_at_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    told = run_tiny(tmp_path / "undisturbed")
    assert told["steps"] == 5
    real, calls = tiny_class_ddpm.noise_loss, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("power cut")
        return real(*args, **kwargs)

    monkeypatch.setattr(tiny_class_ddpm, "noise_loss", dies)
    with pytest.raises(OSError, match="power cut"):
        run_tiny(tmp_path / "resumed", checkpoint=tmp_path / "checkpoint")
    run_tiny(tmp_path / "resumed", checkpoint=tmp_path / "checkpoint")
    assert len(calls) == 4 + 3  # died in step 4, went on from the checkpoint of step 2
    file = "unet/diffusion_pytorch_model.safetensors"
    undisturbed, resumed = load_file(tmp_path / "undisturbed" / file), load_file(tmp_path / "resumed" / file)
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
