"""The judges of scenes, tiny-t2i, and what all training scripts share. Of shipped weights only the judges' are used."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch import nn

from shoestring import loop, zoo
from shoestring.data import world
from shoestring.zoo.train import _common, _world_judges, tiny_t2i
from shoestring.zoo.train._common import EMA, index_batches, noise_loss, warmup_cosine


@pytest.fixture(scope="module")
def tower():
    """A text tower of its own: of tiny-clip's shape, untrained."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from shoestring.zoo.train import tiny_clip

    tokenizer = tiny_clip.make_tokenizer(world.draw(200).captions.tolist())
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIPTextModel(config).eval(), tokenizer


@pytest.fixture(scope="module")
def pipeline(tower):
    text, tokenizer = tower
    torch.manual_seed(1)
    unet = tiny_t2i.new_unet()
    nn.init.normal_(unet.conv_out.weight, std=0.02)  # at the start it predicts nothing
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):
            nn.init.normal_(module.weight, std=0.3)
    return StableDiffusionPipeline(
        vae=tiny_t2i.new_vae(), text_encoder=text, tokenizer=tokenizer, unet=unet.eval(),
        scheduler=tiny_t2i.new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_every_pair_is_asked_for_once():
    seen, withheld = tiny_t2i.prompts("seen"), tiny_t2i.prompts("withheld")
    assert (len(seen[0]), len(withheld[0])) == (64, 16)
    assert len({*seen[0], *withheld[0]}) == 80
    for captions, garment, colour in (seen, withheld):
        for text, g, c in zip(captions, garment, colour, strict=True):
            assert text.endswith(f"{world.COLOURS[c]} {world.GARMENTS[g]}")
    assert "an orange bag" in seen[0] + withheld[0]
    assert "red trousers" in seen[0] + withheld[0]
    assert all(text.startswith(("a large ", "large ")) for text in tiny_t2i.prompts("seen", "large")[0])


def test_training_conditions_as_the_pipeline_does(pipeline, tower):
    captions = ["a red bag", "", "a small blue coat on the left"]
    expected, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    assert torch.equal(tiny_t2i.states(*tower, captions), expected)


def test_latents_halve_the_side_and_unets_attend_to_the_text(pipeline):
    assert pipeline.vae_scale_factor == 2
    latents = tiny_t2i._encode(pipeline.vae, world.draw(3).images)
    assert latents.shape == (3, 4, 16, 16)
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    one, other = (pipeline.unet(x, t, encoder_hidden_states=torch.full((1, 32, 128), v)).sample for v in (0.0, 1.0))
    assert (one - other).abs().max() > 1e-6
    attends = {name.partition(".attentions")[0] for name, _ in pipeline.unet.named_modules() if "attn2" in name}
    assert attends == {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler], ids=["ddim", "euler"])
def test_samples_with_other_schedulers(pipeline, kind):
    old = pipeline.scheduler
    pipeline.scheduler = kind.from_config(old.config)
    images = tiny_t2i.sample(pipeline, ["a red bag", "a blue bag"], steps=3, seed=0)
    pipeline.scheduler = old
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()
    assert images.abs().max() <= 1


def test_samples_follow_their_seed(pipeline):
    one, same, other = (tiny_t2i.sample(pipeline, ["a red bag"], steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_an_interrupted_autoencoder_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    images = world.draw(64).images

    def trained(folder):
        vae = tiny_t2i.new_vae()
        tiny_t2i._fit_vae(vae, images, True, folder, False)
        return vae.state_dict()

    expected, step, calls = trained(None), tiny_t2i.to_tensor, []

    def dies(pixels):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return step(pixels)

    monkeypatch.setattr(tiny_t2i, "to_tensor", dies)
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path)
    found = trained(tmp_path)
    assert len(calls) == 4 + 2  # steps 3 and 4 anew
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_pixels_go_from_minus_one_to_one():
    images = np.stack([np.zeros((32, 32, 3)), np.full((32, 32, 3), 255)]).astype(np.uint8)
    images[0, 3, 7, 2] = 255
    tensor = _common.to_tensor(images)
    assert tensor.min() == -1
    assert (tensor[1] == 1).all()
    assert tensor[0, 2, 3, 7] == 1
    assert (tensor[0] == 1).sum() == 1


def test_augmentation_moves_by_no_more_than_told():
    images = torch.zeros(200, 3, 32, 32)
    images[:, :, 10, 20] = 100.0
    moved = _world_judges.augmented(images, 2, torch.Generator().manual_seed(0))
    where = moved[:, 0].flatten(1).argmax(1)
    rows, columns = where // 32 - 10, where % 32 - 20
    assert {*rows.tolist()} == {*columns.tolist()} == {-2, -1, 0, 1, 2}
    noise = moved[moved < 50].std()
    assert 0.05 < noise < 0.15


def test_batches_pass_over_all_rows_before_any_comes_again():
    batches = index_batches(10, 4, 5, seed=1)
    assert [len(batch) for batch in batches] == [4] * 5
    flat = torch.cat(batches)
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(10))
    assert flat[:10].tolist() != flat[10:].tolist()


def test_learning_rate_rises_and_falls():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = warmup_cosine(optimizer, 110, warmup=10), []
    for _ in range(110):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] < 1e-3


def test_averages_are_the_recursion():
    model, decay = nn.Linear(2, 1, bias=False), 0.5
    average, expected = EMA(model, decay), model.weight.detach().clone()
    state = loop.State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in (1, 2, 3):
        with torch.no_grad():
            model.weight += step
        state.step = step
        average(state)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
    restored = EMA(nn.Linear(2, 1, bias=False), decay)
    restored.load_state_dict(average.state_dict())
    restored.copy_to(model)
    assert torch.allclose(model.weight, expected, atol=1e-6)


class Zero(nn.Module):
    """Predicts no noise, so that the loss is the mean of w_t eps^2."""

    def forward(self, x, t):
        return type("Output", (), {"sample": torch.zeros_like(x)})


def test_noise_loss_is_weighted_by_the_signal():
    scheduler, images = DDIMScheduler(beta_end=0.012), torch.ones(4000, 1, 4, 4)
    plain = noise_loss(Zero(), scheduler, images, torch.Generator().manual_seed(0))
    assert plain == pytest.approx(1, abs=0.02)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weighted = noise_loss(Zero(), scheduler, images, torch.Generator().manual_seed(0), gamma=4.0)
    assert weighted == pytest.approx(float((4 / snr).clamp(max=1).mean()), abs=0.02)
    assert weighted < 0.95 * plain


def test_a_judge_is_read_as_it_answers():
    model, images = zoo.load("judge-colour"), _common.to_tensor(world.draw(300, split="test", two=0).images)
    answers, features = _common.judged(model, images)
    with torch.no_grad():
        assert (answers[:50] == model(images[:50]).logits.argmax(1).numpy()).all()
        pooled = model.resnet(images[:50]).pooler_output.flatten(1).numpy()
    assert np.allclose(features[:50], pooled, atol=1e-5)
