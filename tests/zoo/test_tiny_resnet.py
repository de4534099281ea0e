"""tiny-resnet: what is its own beyond the tests of all training scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shoestring.zoo.train import _fashion, judge_fashion, tiny_resnet


def test_layout_is_that_of_resnet_18():
    model = tiny_resnet.new_model()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17 + 3  # and a projection at each of three changes of width
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 20
    sizes: list[int] = []
    for stage in model.resnet.encoder.stages:
        stage.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[-1]))
    assert model(torch.zeros(2, 1, 28, 28)).logits.shape == (2, 10)
    assert sizes == [7, 4, 2, 1]
    assert model.config.id2label == dict(enumerate(_fashion.class_names()))


def test_initial_weights_are_its_own_and_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    one, two = tiny_resnet.new_model(), tiny_resnet.new_model()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert tiny_resnet.SEED != judge_fashion.SEED


def run(out: Path, checkpoint: Path | None = None) -> None:
    tiny_resnet.train(out, smoke=True, device="cpu", checkpoint=checkpoint, progress=False, steps=5)


def test_killed_and_started_again_ends_at_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tiny_resnet, "SAVE_EVERY", 2)
    run(tmp_path / "undisturbed")
    real, calls = _fashion.shifted, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("power cut")
        return real(*args, **kwargs)

    monkeypatch.setattr(_fashion, "shifted", dies)
    with pytest.raises(OSError, match="power cut"):
        run(tmp_path / "resumed", tmp_path / "checkpoint")
    run(tmp_path / "resumed", tmp_path / "checkpoint")
    assert len(calls) == 4 + 3  # died in step 4, went on from the checkpoint of step 2
    undisturbed, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("undisturbed", "resumed"))
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
