from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from shoestring.data import world
from shoestring.zoo._emoji_clip import EmojiCLIP
from shoestring.zoo.train import emoji_clip, tiny_clip
from shoestring.zoo.train._common import to_tensor


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    scenes = world.draw(300, two=0.3)
    rng = np.random.default_rng(0)
    return tiny_clip.make_tokenizer([tiny_clip.caption(scenes, row % 300, rng) for row in range(3000)])


def test_every_word_of_the_world_is_one_token(tokenizer: CLIPTokenizer) -> None:
    text = "this shows a little emerald sneaker above an azure gown"
    assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_any_text_tokenises_without_an_unknown(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("Zebra ☃ naïve 漢字").input_ids
    assert ids.count(tokenizer.unk_token_id) == 1  # the end, which is "unknown" too
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "zebra ☃ naïve 漢字"


def test_padding_does_not_change_the_text_feature(tokenizer: CLIPTokenizer) -> None:
    model = tiny_clip._model(tokenizer, smoke=True).eval()
    short = tokenizer("a red bag", return_tensors="pt").input_ids
    padded = tokenizer("a red bag", padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert padded.shape == (1, tiny_clip.TOKENS)
    with torch.no_grad():
        one, two = (model.get_text_features(input_ids=ids).pooler_output for ids in (short, padded))
    assert torch.allclose(one, two, atol=1e-5)


def test_processor_gives_the_pixels_of_training(tokenizer: CLIPTokenizer) -> None:
    images = world.draw(4).images
    processed = tiny_clip.make_processor(tokenizer)(images=list(images), return_tensors="pt").pixel_values
    assert torch.allclose(processed, to_tensor(images), atol=1e-6)


def test_loss_is_zero_of_matched_and_log_n_of_equal_features() -> None:
    class Fake:
        logit_scale = torch.tensor(4.6)

        def get_image_features(self, pixel_values):  # type: ignore[no-untyped-def]
            return type("Output", (), {"pooler_output": pixel_values})

        def get_text_features(self, input_ids):  # type: ignore[no-untyped-def]
            return type("Output", (), {"pooler_output": input_ids})

    eye, ones = torch.eye(5), torch.ones(5, 5)
    assert tiny_clip.contrastive_loss(Fake(), eye, eye) < 1e-6  # type: ignore[arg-type]
    assert abs(tiny_clip.contrastive_loss(Fake(), ones, ones) - np.log(5)) < 1e-5  # type: ignore[arg-type]


def test_emoji_clip_saves_weights_and_config_only_and_loads_them_in_the_dtype(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    model = EmojiCLIP(dim=8, hidden=16).half()
    model.save_pretrained(tmp_path)
    torch.set_rng_state(before)
    loaded = EmojiCLIP.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())


def test_a_fifth_of_the_emoji_is_held_out_by_name() -> None:
    names = np.array([f"emoji {i}" for i in range(2000)])
    unseen = emoji_clip.held_out(names)
    assert 0.17 < unseen.mean() < 0.23
    assert (emoji_clip.held_out(names[::-1]) == unseen[::-1]).all()
