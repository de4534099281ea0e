"""The sampler: levels of every scheduler, equality with diffusers' own loops, counting, and what it refuses."""

import copy

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from shoestring import guide, zoo
from shoestring.guide._levels import KINDS, from_epsilon, from_x0, noise_levels, prediction_kind, to_epsilon, to_x0

from .conftest import random

VARIANCE_PRESERVING = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
VARIANCE_PRESERVING += ["DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
UNSCALED = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
]


def new(name, **config):
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(8)
    return scheduler


@pytest.mark.parametrize("name", VARIANCE_PRESERVING + UNSCALED)
def test_levels_are_those_at_which_the_scheduler_adds_noise(name):
    scheduler = new(name)
    alphas, sigmas = noise_levels(scheduler)
    assert len(alphas) == len(sigmas) == len(scheduler.timesteps) + 1
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    for i in (0, 3, len(scheduler.timesteps) - 1):
        t = scheduler.timesteps[i : i + 1].repeat(2)
        noisy = scheduler.add_noise(x0, noise, t)
        torch.testing.assert_close(alphas[i] * x0 + sigmas[i] * noise, noisy, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_step_ends_at_the_next_level(name):
    """With the true noise and first order, a step leads from one level to the next."""
    config = (
        {"solver_order": 1} if name.startswith("DPM") else {"clip_sample": False} if name.startswith("DDIM") else {}
    )
    scheduler = new(name, **config)
    alphas, sigmas = noise_levels(scheduler)
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x0, t)
        after = scheduler.step(noise, t, alphas[i] * x0 + sigmas[i] * noise, return_dict=False)[0]
        torch.testing.assert_close(after, alphas[i + 1] * x0 + sigmas[i + 1] * noise, rtol=1e-5, atol=1e-5)


def test_levels_of_flow_matching_lie_on_a_straight_line():
    scheduler = new("FlowMatchEulerDiscreteScheduler")
    alphas, sigmas = noise_levels(scheduler)
    assert prediction_kind(scheduler) == "flow"
    torch.testing.assert_close(alphas + sigmas, torch.ones(9, dtype=torch.float64))
    assert float(sigmas[0]) == 1
    assert float(sigmas[-1]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [(0.6, 0.8), (1.0, 3.0), (0.3, 0.7)], ids=["unit variance", "unscaled", "line"])
def test_conversions_give_back_picture_and_noise(kind, levels):
    alpha, sigma = levels
    x0, noise = random(3, 2, 4), random(3, 2, 4, seed=1)
    x = alpha * x0 + sigma * noise
    if kind == "flow" and alpha + sigma != 1:
        alpha, sigma = 0.25, 0.75
        x = alpha * x0 + sigma * noise
    r = (alpha**2 + sigma**2) ** 0.5
    said = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": (alpha * noise - sigma * x0) / r,
        "flow": noise - x0,
    }[kind]
    torch.testing.assert_close(to_x0(said, x, alpha, sigma, kind), x0)
    torch.testing.assert_close(to_epsilon(said, x, alpha, sigma, kind), noise)
    torch.testing.assert_close(from_epsilon(noise, x, alpha, sigma, kind), said)
    torch.testing.assert_close(from_x0(x0, x, alpha, sigma, kind), said)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_velocity_is_read_as_the_scheduler_reads_it(name):
    """The last step of a deterministic scheduler to sigma 0 is its own estimate of the clean picture."""
    config = {"clip_sample": False, "set_alpha_to_one": True} if name == "DDIMScheduler" else {}
    scheduler = new(name, prediction_type="v_prediction", **config)
    alphas, sigmas = noise_levels(scheduler)
    x, v, t = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1), scheduler.timesteps[-1]
    scheduler.scale_model_input(x, t)
    after = scheduler.step(v, t, x, return_dict=False)[0]
    torch.testing.assert_close(
        to_x0(v, x, float(alphas[-2]), float(sigmas[-2]), "v_prediction"), after, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one batch"])
def test_equals_a_loop_written_out(fixture, together, request):
    model, conditions = request.getfixturevalue(fixture)
    cond, uncond = conditions(3)
    noise = random(3, 4, 8, 8)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    out = guide.sample(
        model,
        scheduler,
        ClassifierFreeGuidance(3.0),
        noise,
        (cond, uncond),
        num_inference_steps=4,
        batch_branches=together,
    )

    def ask(x, t, condition):
        kwargs = condition if isinstance(condition, dict) else None
        if kwargs is None:
            kwargs = {"encoder_hidden_states" if condition.is_floating_point() else "class_labels": condition}
        return model(x, t.expand(3), **kwargs).sample[:, :4]

    own = diffusers.DDIMScheduler(clip_sample=False)
    own.set_timesteps(4)
    x = noise
    with torch.no_grad():
        for t in own.timesteps:
            e_c, e_u = ask(x, t, cond), ask(x, t, uncond)
            x = own.step(e_u + 3.0 * (e_c - e_u), t, x).prev_sample
    torch.testing.assert_close(out.sample, x, rtol=1e-10, atol=1e-10)
    assert out.num_calls == 8
    assert out.num_steps == 4


def test_a_flow_along_true_velocities_ends_at_the_picture():
    x0, noise = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    out = guide.sample(
        lambda x, t, class_labels: noise - x0,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        None,
        noise,
        (torch.tensor([0, 1]),),
        num_inference_steps=3,
    )
    torch.testing.assert_close(out.sample.double(), x0, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def t2i():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, steps=4, scale=3.0, **kwargs):
    noise = random(2, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2, dtype=torch.float32)
    prompts = ["a large red bag", "a small blue shirt"]
    return pipe(
        prompts, num_inference_steps=steps, guidance_scale=scale, latents=noise, output_type="latent", **kwargs
    ).images


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_pipeline_guided_by_cfg_is_the_pipeline(t2i, name):
    before = t2i.scheduler
    t2i.scheduler = getattr(diffusers, name).from_config(before.config)
    try:
        plain = picture(t2i, negative_prompt=["a shoe", ""])
        with guide.apply(t2i, ClassifierFreeGuidance(3.0)) as calls:
            guided = picture(t2i, scale=9.0, negative_prompt=["a shoe", ""])
        with guide.apply(t2i, ClassifierFreeGuidance(3.0), batch_branches=True) as together:
            at_once = picture(t2i, scale=9.0, negative_prompt=["a shoe", ""])
    finally:
        t2i.scheduler = before
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at_once, plain, rtol=1e-4, atol=1e-4)
    assert calls.rows == together.rows == 2 * 2 * 4


def test_the_pipeline_is_left_as_it_was(t2i):
    def of(pipe):
        return (
            {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()},
            dict(pipe.scheduler.config),
            {name: type(one) for name, one in pipe.unet.attn_processors.items()},
            {*vars(pipe.unet)},
            {*vars(pipe.scheduler)},
        )

    picture(t2i)
    before = of(t2i)
    with pytest.raises(ValueError, match="guidance_scale above 1"), guide.apply(t2i, ClassifierFreeGuidance(3.0)):
        picture(t2i, scale=1.0)
    with guide.apply(t2i, ClassifierFreeGuidance(3.0)):
        picture(t2i)
    after = of(t2i)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())
    assert before[1:] == after[1:]


def test_the_schedulers_state_is_not_touched(tiny_sd):
    model, conditions = tiny_sd
    scheduler = diffusers.EulerDiscreteScheduler()
    before = copy.deepcopy(vars(scheduler))
    guide.sample(model, scheduler, None, random(1, 4, 8, 8), conditions(1, 1), num_inference_steps=2)
    assert repr(before) == repr(vars(scheduler))


class Asks(ClassifierFreeGuidance):
    """Asks for its first sample twice and for the others once."""

    def predict(self, step):
        first = torch.tensor([0])
        everyone = step.predict(0)
        everyone[first] = step.predict(0, first)
        return everyone


def test_calls_are_counted_by_rows(tiny_sd):
    model, conditions = tiny_sd
    noise = random(4, 4, 8, 8)
    plain = guide.sample(model, diffusers.DDIMScheduler(), None, noise, conditions(4, 1), num_inference_steps=2)
    out = guide.sample(model, diffusers.DDIMScheduler(), Asks(), noise, conditions(4, 1), num_inference_steps=2)
    assert plain.num_calls == 2
    assert out.num_calls == 2 * 5 / 4
    torch.testing.assert_close(out.sample, plain.sample)


def test_the_same_generator_gives_the_same_picture(tiny_sd):
    model, conditions = tiny_sd
    one, two, other = (
        guide.sample(
            model,
            diffusers.DDPMScheduler(),
            None,
            random(2, 4, 8, 8),
            conditions(2, 1),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(seed),
        ).sample
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_bad_input_is_named(tiny_sd, tiny_dit):
    model, conditions = tiny_sd
    noise, cfg, ddim = random(2, 4, 8, 8), ClassifierFreeGuidance(3.0), diffusers.DDIMScheduler()
    for steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps"):
            guide.sample(model, ddim, cfg, noise, conditions(2), num_inference_steps=steps)
    with pytest.raises(ValueError, match=r"conditions\[1\].*row for each of the 2 latents"):
        guide.sample(model, ddim, cfg, noise, (conditions(2)[0], conditions(3)[1]))
    with pytest.raises(ValueError, match="width 8, got 6"):
        guide.sample(model, ddim, cfg, noise, (random(2, 5, 6), random(2, 5, 6)))
    with pytest.raises(ValueError, match="needs more than the 1 conditions"):
        guide.sample(model, ddim, cfg, noise, conditions(2, 1))
    with pytest.raises(ValueError, match="needs one more"):
        guide.sample(model, ddim, Twice(), noise, conditions(2, 1))
    with pytest.raises(ValueError, match="NaN"):
        guide.sample(model, ddim, cfg, noise * float("nan"), conditions(2))
    with pytest.raises(ValueError, match="EDMEulerScheduler has no noise levels"):
        guide.sample(model, diffusers.EDMEulerScheduler(), cfg, noise, conditions(2))
    with pytest.raises(ValueError, match="learned"):
        guide.sample(model, diffusers.DDPMScheduler(variance_type="learned_range"), cfg, noise, conditions(2))
    odd = diffusers.DDIMScheduler()
    odd.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="'score'"):
        guide.sample(model, odd, cfg, noise, conditions(2))
    with pytest.raises(ValueError, match="set_timesteps first"):
        noise_levels(diffusers.DDIMScheduler())
    unet = zoo.load("tiny-class-ddpm")
    with pytest.raises(ValueError, match="labels from 0 to 10, got 11"):
        guide.sample(unet, ddim, None, torch.zeros(1, 1, 28, 28), (torch.tensor([11]),))
    with pytest.raises(TypeError, match="unet"), guide.apply(unet, cfg):
        pass


class Twice(ClassifierFreeGuidance):
    def predict(self, step):
        return step.predict(1)
