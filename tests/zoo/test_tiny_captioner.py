"""What is tiny-captioner's own: captions of mixed specificity, its tokenizer, the null image."""

import numpy as np
import pytest
import torch

from shoestring.data import world
from shoestring.zoo.train import tiny_captioner as captioner


@pytest.fixture(scope="module")
def scenes():
    return world.draw(1000, split="test", seed=3, two=0)


@pytest.fixture(scope="module")
def tokenizer(scenes):
    return captioner.make_tokenizer(captioner.captions(scenes, np.random.default_rng(0)))


def test_seven_in_ten_are_generic(scenes):
    named = [captioner.named(text) for text in captioner.captions(scenes, np.random.default_rng(1))]
    generic = np.mean([answer == (None, None) for answer in named])
    assert abs(generic - captioner.GENERIC_SHARE) < 0.05
    assert all((garment is None) == (colour is None) for garment, colour in named)


def test_specific_captions_are_true(scenes):
    for k, text in enumerate(captioner.captions(scenes, np.random.default_rng(2), generic=0)):
        right = world.GARMENTS[scenes.garment[k, 0]], world.COLOURS[scenes.colour[k, 0]]
        assert captioner.named(text) == right, text


def test_t_shirt_is_no_shirt():
    assert captioner.named("a red t-shirt at the top") == ("t-shirt", "red")
    assert captioner.named("this is a shoe") == (None, None)


def test_any_text_comes_back(tokenizer):
    for text in ("a photo of a small red ankle boot", "Zoë's 7 häts\n"):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_captions_fit(scenes, tokenizer):
    ids = tokenizer(captioner.captions(scenes, np.random.default_rng(4), generic=0)).input_ids
    assert max(map(len, ids)) < captioner.CONTEXT


def test_guidance_of_one_is_plain_and_the_null_image_is_blind(scenes, tokenizer):
    model = captioner.new_model(tokenizer, width=32, layers=(1, 1)).eval()
    images = scenes.images[:8]
    assert len(captioner.describe(model, tokenizer, images)) == 8
    with torch.no_grad():
        zeros = torch.zeros(8, 65, 32)
        ids = torch.full((8, 1), captioner.START_ID)
        blind = captioner._next(model, zeros, ids)
        seeing = captioner._next(model, captioner._states(model, images), ids)
    assert torch.allclose(blind, blind[:1].expand_as(blind), atol=1e-6)
    assert (seeing - seeing[:1]).abs().max() > 1e-3
    assert len(set(captioner.describe(model, tokenizer, images, gamma=0.0))) == 1
