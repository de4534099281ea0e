"""The patch codebook, and what is tiny-var's own: where class tokens are, the null class, guidance, seeds."""

import pytest
import torch

from shoestring.zoo._codebook import PatchCodebook
from shoestring.zoo.train import tiny_var


@pytest.fixture(scope="module")
def codebook() -> PatchCodebook:
    made = PatchCodebook(codes=32)
    made.vectors.copy_(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_var._model(width=32, layers=1, length=49).eval()


def test_codes_come_back(codebook):
    codes = torch.randint(32, (5, 49), generator=torch.Generator().manual_seed(1))
    assert torch.equal(codebook.encode(codebook.decode(codes)), codes)


def test_code_is_the_nearest_vector(codebook):
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    distances = (codebook.patches(images)[:, :, None] - codebook.vectors).square().sum(-1)
    assert torch.equal(codebook.encode(images), distances.argmin(-1))


def test_codes_are_in_reading_order(codebook):
    codes = torch.zeros(1, 49, dtype=torch.int64)
    codes[0, 8] = 5  # second row, second column
    assert torch.equal(codebook.decode(codes)[0, 0, 4:8, 4:8].flatten(), codebook.vectors[5])


def test_save_and_load(codebook, tmp_path):
    codebook.save_pretrained(tmp_path / "codebook")
    assert torch.equal(PatchCodebook.from_pretrained(tmp_path / "codebook").vectors, codebook.vectors)


def test_wrong_shapes_are_refused(codebook):
    with pytest.raises(ValueError, match=r"images must have shape"):
        codebook.encode(torch.zeros(28, 28))
    with pytest.raises(ValueError, match=r"codes must have shape"):
        codebook.decode(torch.zeros(1, 48, dtype=torch.int64))


def test_null_class_is_the_last_token():
    ids = tiny_var.log_prob_inputs(torch.zeros(2, 49, dtype=torch.int64), torch.tensor([3, tiny_var.CLASSES]))
    assert ids.shape == (2, 50)
    assert ids[:, 0].tolist() == [tiny_var.CODES + 3, tiny_var.NULL]


def test_samples_are_codes_and_follow_the_seed(model):
    classes = torch.arange(4)
    drawn = [tiny_var.sample(model, classes, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert drawn[0].shape == (4, 49)
    assert drawn[0].max() < tiny_var.CODES
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_cache_gives_the_model_s_own_choice(model):
    classes = torch.arange(3)
    codes = tiny_var.sample(model, classes, generator=torch.Generator().manual_seed(0), temperature=1e-6)
    with torch.no_grad():
        logits = model(input_ids=tiny_var.log_prob_inputs(codes, classes)[:, :-1]).logits[..., : tiny_var.CODES]
    assert (logits.argmax(-1) == codes).float().mean() > 0.97


def test_guidance_of_the_null_class_changes_nothing(model):
    null = torch.full((3,), tiny_var.CLASSES)
    drawn = [
        tiny_var.sample(model, null, scale=s, generator=torch.Generator().manual_seed(0), temperature=1e-6)
        for s in (1.0, 3.0)
    ]
    assert (drawn[0] == drawn[1]).float().mean() > 0.97
