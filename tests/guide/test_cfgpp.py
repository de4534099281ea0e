"""CFG++: every property of its card, to its tolerance, in our sampler, in diffusers' modular loop and in a pipeline."""

import json
import math
import warnings
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.schedulers import scheduling_dpmsolver_multistep
from diffusers.utils.torch_utils import randn_tensor

from shoestring import guide, zoo
from shoestring.guide._cfgpp_solvers import split_noise
from shoestring.guide._levels import noise_levels
from shoestring.guide.cfgpp import (
    CFGPlusPlusGuidance,
    cfgpp_dpmpp_2m_step,
    cfgpp_dpmpp_2s_step,
    cfgpp_invert_step,
    cfgpp_sample,
    cfgpp_scales,
    cfgpp_step,
    invert,
)

from .conftest import random

SCALES = (0.0, 0.3, 0.6, 1.0)
NOISY, LESS = (0.3, math.sqrt(1 - 0.09)), (0.8, 0.6)  # alpha, sigma


def ddim(**config):
    """Without clipping, with its levels in float64."""
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, "beta_end": 0.012, **config})
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    if not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


class Affine:
    """A network that is affine in x: slope and offset are the condition's."""

    def __call__(self, x, t, slope, offset):
        return slope[:, None] * x + offset[:, None]


def affine_conditions(batch):
    cond = {
        "slope": torch.full((batch,), 0.7, dtype=torch.float64),
        "offset": torch.full((batch,), -0.2, dtype=torch.float64),
    }
    uncond = {
        "slope": torch.full((batch,), 0.4, dtype=torch.float64),
        "offset": torch.full((batch,), 0.1, dtype=torch.float64),
    }
    return cond, uncond


def ask(model, x, t, condition):
    if not isinstance(condition, dict):
        condition = {"encoder_hidden_states" if condition.is_floating_point() else "class_labels": condition}
    answer = model(x, t.expand(len(x)), **condition)
    return (answer if isinstance(answer, torch.Tensor) else answer.sample)[:, : x.shape[1]]


@torch.no_grad()
def written_out(model, noise, conditions, scale, steps, kind="epsilon", **config):
    """The paper's three lines with alphas_cumprod, nothing of ours."""
    scheduler = ddim(**config)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps.tolist():
        before = t - 1000 // steps
        a = scheduler.alphas_cumprod[t]
        a_next = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        e_c, e_u = (ask(model, x, torch.tensor(t), condition) for condition in conditions)
        if kind == "v_prediction":
            e_c, e_u = (a.sqrt() * v + (1 - a).sqrt() * x for v in (e_c, e_u))
        if kind == "sample":
            e_c, e_u = ((x - a.sqrt() * D) / (1 - a).sqrt() for D in (e_c, e_u))
        x0 = (x - (1 - a).sqrt() * (e_u + scale * (e_c - e_u))) / a.sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * e_u
    return x


@pytest.fixture(scope="module")
def garments():
    return zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")


@pytest.fixture(scope="module")
def t2i():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the step


def test_scale_zero_is_unconditional_ddim_bit_for_bit():
    scheduler = ddim()
    scheduler.set_timesteps(10)
    x, e_c, e_u = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    for i, t in enumerate(scheduler.timesteps):
        alphas, sigmas = (levels.tolist() for levels in noise_levels(scheduler))
        ours = cfgpp_step(x, e_c, e_u, (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]), 0.0)
        assert torch.equal(ours, scheduler.step(e_u, t, x).prev_sample)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_scale_zero_is_unconditional_sampling_bit_for_bit(name, tiny_sd):
    model, conditions = tiny_sd
    cond, uncond = conditions(2)
    scheduler = getattr(diffusers, name)(**({"clip_sample": False} if name == "DDIMScheduler" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = guide.sample(
            model, scheduler, CFGPlusPlusGuidance(0.0), random(2, 4, 8, 8), (cond, uncond), num_inference_steps=4
        )
    plain = guide.sample(model, scheduler, None, random(2, 4, 8, 8), (uncond,), num_inference_steps=4)
    assert torch.equal(ours.sample, plain.sample)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_predictions_give_plain_ddim(scale):
    scheduler = ddim()
    scheduler.set_timesteps(10)
    alphas, sigmas = (levels.tolist() for levels in noise_levels(scheduler))
    x, e = random(2, 3), random(2, 3, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        ours = cfgpp_step(x, e, e, (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]), scale)
        torch.testing.assert_close(ours, scheduler.step(e, t, x).prev_sample, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_predictions_give_plain_2m(scale):
    """DPM-Solver++ 2M of diffusers, whose samples of unit variance are ours times alpha."""
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(6)
    alphas, sigmas = noise_levels(scheduler)
    rhos = (sigmas / alphas).tolist()
    x, old, theirs = random(2, 3), None, None
    theirs = x * alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        D = torch.tanh(x + i)  # any clean estimate
        e = (theirs - alphas[i] * D) / sigmas[i]
        theirs = scheduler.step(e, t, theirs).prev_sample
        x = cfgpp_dpmpp_2m_step(x, D, D, rhos[i], rhos[i + 1], scale, D_u_old=old, sigma_old=rhos[i - 1] if i else None)
        old = D
        torch.testing.assert_close(x * alphas[i + 1], theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_equal_predictions_give_a_2s_of_second_order(scale):
    """For Gaussian data the flow is known: x is proportional to (c^2 + sigma^2)^1/2."""

    def error(ratio):
        def denoise(x, sigma):
            return x / (1 + sigma**2), x / (1 + sigma**2)

        x = cfgpp_dpmpp_2s_step(torch.tensor([1.0]).double(), denoise, 1.0, ratio, scale)
        return abs(float(x) - math.sqrt((1 + ratio**2) / 2))

    assert error(0.5) < 0.01
    # A step of second order errs by h^3: an eighth for half of h.
    assert 6 < error(math.exp(-0.2)) / error(math.exp(-0.1)) < 10


def test_2m_and_2s_are_unconditional_ones_and_a_shift():
    x, D_c, D_u, old = (random(2, 3, seed=i) for i in range(4))
    new, zero = (cfgpp_dpmpp_2m_step(x, D_c, D_u, 2.0, 1.2, scale, D_u_old=old, sigma_old=3.0) for scale in (0.6, 0.0))
    torch.testing.assert_close(new - zero, 0.6 * (D_c - D_u), rtol=1e-12, atol=1e-12)

    def denoise(x, sigma):
        return x / (1 + sigma) + 0.3 * sigma, x / (1 + sigma)

    new, zero = (cfgpp_dpmpp_2s_step(x, denoise, 2.0, 0.5, scale) for scale in (0.6, 0.0))
    # At the midpoint, 1.0, the two differ by 0.3.
    torch.testing.assert_close(new - zero, torch.full_like(x, 0.6 * 0.3), rtol=1e-12, atol=1e-12)


def test_2s_to_sigma_zero_is_the_guided_estimate():
    def denoise(x, sigma):
        return x + 1, x

    x = random(2, 3)
    torch.testing.assert_close(cfgpp_dpmpp_2s_step(x, denoise, 2.0, 0.0, 0.6), x + 0.6, rtol=1e-12, atol=1e-12)
    z = random(2, 3, seed=1)
    stirred = cfgpp_dpmpp_2s_step(x, lambda x, sigma: (0 * x, 0 * x), 2.0, 1.0, 0.6, eta=1.0, noise=z)
    torch.testing.assert_close(stirred, x / 4 + math.sqrt(0.75) * z)  # keeps 1 / 2 of 1, draws 3^1/2 / 2


def test_guidance_is_a_shift_of_the_clean_estimate_and_linear():
    x, e_c, e_u = (random(2, 3, seed=i) for i in range(3))
    zero = cfgpp_step(x, e_c, e_u, NOISY, LESS, 0.0)
    x0_c, x0_u = ((x - NOISY[1] * e) / NOISY[0] for e in (e_c, e_u))
    for scale in SCALES:
        shift = cfgpp_step(x, e_c, e_u, NOISY, LESS, scale) - zero
        torch.testing.assert_close(shift, scale * LESS[0] * (x0_c - x0_u), rtol=1e-12, atol=1e-12)


def test_scale_one_is_not_conditional_ddim():
    x, e_c, e_u = (random(2, 3, seed=i) for i in range(3))
    conditional = LESS[0] * (x - NOISY[1] * e_c) / NOISY[0] + LESS[1] * e_c
    difference = cfgpp_step(x, e_c, e_u, NOISY, LESS, 1.0) - conditional
    torch.testing.assert_close(difference, LESS[1] * (e_u - e_c), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [(NOISY, LESS), ((1.0, 3.0), (1.0, 1.5)), ((0.1, 0.9), (0.4, 0.6))],
                         ids=["unit variance", "unscaled", "line"])  # fmt: skip
@pytest.mark.parametrize("scale", SCALES)
def test_step_and_inversion_step_are_inverses(levels, scale):
    x, e_c, e_u = (random(2, 3, seed=i) for i in range(3))
    forth = cfgpp_step(x, e_c, e_u, *levels, scale)
    torch.testing.assert_close(cfgpp_invert_step(forth, e_c, e_u, *levels, scale), x, rtol=1e-10, atol=1e-10)
    back = cfgpp_invert_step(x, e_c, e_u, *levels, scale)
    torch.testing.assert_close(cfgpp_step(back, e_c, e_u, *levels, scale), x, rtol=1e-10, atol=1e-10)


def test_the_share_of_fresh_noise_is_ddims():
    scheduler = ddim()
    scheduler.set_timesteps(10)
    alphas, sigmas = (levels.tolist() for levels in noise_levels(scheduler))
    for i, t in enumerate(scheduler.timesteps.tolist()):
        s, down = split_noise((alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]), 0.4)
        assert s == pytest.approx(0.4 * math.sqrt(scheduler._get_variance(t, t - 100)), abs=1e-12)
        assert s**2 + down**2 == pytest.approx(sigmas[i + 1] ** 2, abs=1e-12)


def test_fresh_noise_is_added_where_the_old_is_taken():
    x, e_c, e_u, z = (random(2, 3, seed=i) for i in range(4))
    s, down = split_noise(NOISY, LESS, 0.7)
    x0 = (x - NOISY[1] * (0.4 * e_u + 0.6 * e_c)) / NOISY[0]
    stirred = cfgpp_step(x, e_c, e_u, NOISY, LESS, 0.6, eta=0.7, noise=z)
    torch.testing.assert_close(stirred, LESS[0] * x0 + down * e_u + s * z, rtol=1e-12, atol=1e-12)


# ---- the scales


def test_scales_are_those_of_the_ratio_and_end_at_lambda():
    scheduler = ddim()
    scheduler.set_timesteps(20)
    alphas, sigmas = noise_levels(scheduler)
    rho = sigmas / alphas
    omegas = cfgpp_scales(alphas, sigmas, 0.6)
    torch.testing.assert_close(omegas, 0.6 * rho[:-1] / (rho[:-1] - rho[1:]), rtol=1e-12, atol=0)
    assert omegas[-1] == pytest.approx(0.6, abs=1e-15)
    assert bool((omegas[:-1] > 0.6).all())


def test_scales_of_straight_lines_begin_in_pure_noise():
    sigmas = torch.linspace(1, 0, 6, dtype=torch.float64)
    omegas = cfgpp_scales(1 - sigmas, sigmas, 0.5)
    torch.testing.assert_close(omegas, 0.5 * (1 - sigmas[1:]) * sigmas[:-1] / (sigmas[:-1] - sigmas[1:]))


def test_a_step_between_equal_levels_has_no_scale():
    same = torch.tensor([0.5, 0.8, 0.8]), torch.tensor([0.75**0.5, 0.6, 0.6])
    assert cfgpp_scales(*same, 0.6).isinf().tolist() == [False, True]
    assert cfgpp_scales(*same, 0.0).tolist() == [0.0, 0.0]


# ---- the guider is the explicit step


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
def test_guider_takes_the_explicit_steps_over_a_whole_run(fixture, kind, request):
    model, conditions = request.getfixturevalue(fixture)
    noise, scheduler = random(2, 4, 8, 8), ddim(prediction_type=kind)
    explicit = written_out(model, noise, conditions(2), 0.6, 5, kind)
    out = guide.sample(model, scheduler, CFGPlusPlusGuidance(0.6), noise, conditions(2), num_inference_steps=5)
    torch.testing.assert_close(out.sample, explicit, rtol=1e-10, atol=1e-10)
    assert out.num_calls == 10
    torch.testing.assert_close(
        cfgpp_sample(model, scheduler, noise, conditions(2), 0.6, 5), explicit, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("scale", SCALES)
def test_affine_model_follows_the_closed_form(scale):
    scheduler, noise, (cond, uncond) = ddim(), random(3, 2), affine_conditions(3)
    scheduler.set_timesteps(20)
    a = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0]
    x = noise
    for here, after in pairwise(a):
        slope, offset = 0.4 + scale * (0.7 - 0.4), 0.1 + scale * (-0.2 - 0.1)
        ratio, s, s_next = math.sqrt(after / here), math.sqrt(1 - here), math.sqrt(1 - after)
        x = (ratio * (1 - s * slope) + s_next * 0.4) * x + s_next * 0.1 - ratio * s * offset
    out = guide.sample(Affine(), scheduler, CFGPlusPlusGuidance(scale), noise, (cond, uncond), num_inference_steps=20)
    torch.testing.assert_close(out.sample, x, rtol=1e-10, atol=1e-10)


def test_guider_is_exact_for_euler():
    """The scheduler computes in float32: the whole run in float64 is written out, and its scales are the guider's."""
    noise, conditions = random(3, 2), affine_conditions(3)
    scheduler = diffusers.EulerDiscreteScheduler()
    guider = CFGPlusPlusGuidance(0.6)
    out = guide.sample(Affine(), scheduler, guider, noise, conditions, num_inference_steps=20)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double().tolist()
    x = by_scale = noise * float(scheduler.init_noise_sigma)
    for i, omega in enumerate(guider.omegas):

        def euler(x, e_x0, e, sigma=sigmas[i], after=sigmas[i + 1]):
            return x - sigma * e_x0 + after * e

        def predicted(x, sigma=sigmas[i]):
            return [Affine()(x / math.sqrt(sigma**2 + 1), None, **condition) for condition in conditions]

        e_c, e_u = predicted(x)
        x = euler(x, e_u + 0.6 * (e_c - e_u), e_u)
        e_c, e_u = predicted(by_scale)
        e = e_u + omega * (e_c - e_u)
        by_scale = euler(by_scale, e, e)
    torch.testing.assert_close(by_scale, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.sample, x, rtol=1e-4, atol=1e-4)


FIRST_ORDER = {
    "ddim, eta 0.5": ("DDIMScheduler", {"clip_sample": False}, 0.5),
    "ddim, levels that end above one": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False,
                                                          "steps_offset": 1}, 0.0),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, 1.0),
    "euler": ("EulerDiscreteScheduler", {}, 0.0),
    "euler, karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0.0),
    "euler, velocity": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, 0.0),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 1.0),
    "dpm-solver of first order": ("DPMSolverMultistepScheduler", {"solver_order": 1}, 0.0),
    "dpm-solver of first order, stochastic": ("DPMSolverMultistepScheduler",
                                              {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, 1.0),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, 0.0),
    "flow matching, shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST_ORDER)
def test_every_scheduler_of_first_order_takes_the_explicit_steps(case, tiny_sd, monkeypatch):
    model, conditions = tiny_sd
    # DPM-Solver draws in float32, whatever the latents are: other numbers.
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor",
                        lambda *args, **kwargs: randn_tensor(*args, **kwargs | {"dtype": torch.float64}))  # fmt: skip
    name, config, eta = FIRST_ORDER[case]
    scheduler = getattr(diffusers, name)(**config)
    noise, passed = random(2, 4, 8, 8), eta if name == "DDIMScheduler" else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # all of these are exact: no warning
        out = guide.sample(
            model, scheduler, CFGPlusPlusGuidance(0.6, eta=passed), noise, conditions(2), num_inference_steps=5,
            generator=torch.Generator().manual_seed(3), step_kwargs={"eta": eta} if passed else None,
        )  # fmt: skip
    explicit = cfgpp_sample(
        model, scheduler, noise, conditions(2), 0.6, 5, eta=eta, generator=torch.Generator().manual_seed(3)
    )
    # Levels, and the sums of most schedulers, are float32; their size is that of x.
    torch.testing.assert_close(out.sample, explicit, rtol=1e-3, atol=1e-4 * float(explicit.abs().max()))


def test_one_step_is_cfg_at_the_same_scale(tiny_dit):
    model, conditions = tiny_dit
    noise, scheduler = random(2, 4, 8, 8), ddim(timestep_spacing="trailing")
    ours, cfg = (
        guide.sample(model, scheduler, guider, noise, conditions(2), num_inference_steps=1).sample
        for guider in (CFGPlusPlusGuidance(0.6), ClassifierFreeGuidance(0.6))
    )
    torch.testing.assert_close(ours, cfg, rtol=1e-10, atol=1e-10)


def test_a_step_that_ends_at_its_own_level_falls_back_to_the_explicit_step(tiny_dit):
    model, conditions = tiny_dit
    noise, guider = random(2, 4, 8, 8), CFGPlusPlusGuidance(0.6)
    scheduler = ddim(set_alpha_to_one=False, steps_offset=0)
    with pytest.warns(UserWarning, match=r"steps \[4\] of DDIMScheduler end at their own noise level"):
        out = guide.sample(model, scheduler, guider, noise, conditions(2), num_inference_steps=5)
    assert guider.omegas[-1] == 0.6
    explicit = cfgpp_sample(model, scheduler, noise, conditions(2), 0.6, 5)
    torch.testing.assert_close(
        explicit,
        written_out(model, noise, conditions(2), 0.6, 5, set_alpha_to_one=False),
        rtol=1e-10,
        atol=1e-10,
    )
    # What the scheduler's step cannot do is the shift of this last step alone.
    with torch.no_grad():
        e_c, e_u = (ask(model, out.sample, torch.tensor(0), condition) for condition in conditions(2))
    lost = 0.6 * (1 - scheduler.alphas_cumprod[0]).sqrt() * (e_u - e_c)
    torch.testing.assert_close(explicit - out.sample, lost, rtol=1e-9, atol=1e-9)


def test_outside_start_and_stop_and_disabled_it_is_conditional(tiny_dit):
    model, conditions = tiny_dit
    noise, scheduler = random(2, 4, 8, 8), ddim()
    plain = guide.sample(model, scheduler, None, noise, conditions(2, 1), num_inference_steps=4).sample
    off = guide.sample(
        model, scheduler, CFGPlusPlusGuidance(0.6, enabled=False), noise, conditions(2), num_inference_steps=4
    )
    assert torch.equal(off.sample, plain)
    assert off.num_calls == 4
    half = guide.sample(
        model, scheduler, CFGPlusPlusGuidance(0.6, start=0.5), noise, conditions(2), num_inference_steps=4
    )
    assert half.num_calls == 2 + 4
    ours = CFGPlusPlusGuidance(0.6, stop=0.5)
    assert guide.sample(model, scheduler, ours, noise, conditions(2), num_inference_steps=4).num_calls == 4 + 2


# ---- in diffusers


def modular(unet, scheduler, guider):
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    pipe.update_components(unet=unet, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)

    def run(noise, cond, uncond, steps, last=None):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[-(last or steps) :]
        if last and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(steps - last)
        return pipe(
            latents=noise,
            timesteps=timesteps,
            num_inference_steps=len(timesteps),
            denoiser_input_fields={
                "prompt_embeds": cond["encoder_hidden_states"],
                "negative_prompt_embeds": uncond["encoder_hidden_states"],
                "add_time_ids": cond["added_cond_kwargs"]["time_ids"],
                "negative_add_time_ids": uncond["added_cond_kwargs"]["time_ids"],
                "pooled_prompt_embeds": cond["added_cond_kwargs"]["text_embeds"],
                "negative_pooled_prompt_embeds": uncond["added_cond_kwargs"]["text_embeds"],
            },
            output="latents",
        )

    return run


@pytest.mark.filterwarnings("ignore:Unexpected input")
def test_modular_pipeline_takes_the_explicit_steps(tiny_sdxl_unet):
    model, conditions = tiny_sdxl_unet
    scheduler, guider, noise = ddim(), CFGPlusPlusGuidance(0.6), random(2, 4, 8, 8)
    run = modular(model, scheduler, guider)
    with pytest.raises(ValueError, match=r"guider\.set_scheduler"):
        run(noise, *conditions(2), 4)
    guider.set_scheduler(scheduler)
    for steps in (4, 5):  # a new run reads the new timesteps
        made = run(noise, *conditions(2), steps)
        explicit = written_out(model, noise, conditions(2), 0.6, steps)
        torch.testing.assert_close(made, explicit, rtol=1e-10, atol=1e-10)


def test_modular_pipeline_over_the_last_timesteps_uses_their_scales(tiny_sdxl_unet):
    """As image to image does."""
    model, conditions = tiny_sdxl_unet
    scheduler, guider, noise = ddim(), CFGPlusPlusGuidance(0.6), random(2, 4, 8, 8)
    guider.set_scheduler(scheduler)
    made = modular(model, scheduler, guider)(noise, *conditions(2), 5, last=2)
    alphas, sigmas = (levels.tolist() for levels in noise_levels(scheduler))
    x = noise
    for i in (3, 4):
        with torch.no_grad():
            e_c, e_u = (ask(model, x, scheduler.timesteps[i], condition) for condition in conditions(2))
        x = cfgpp_step(x, e_c, e_u, (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]), 0.6)
    torch.testing.assert_close(made, x, rtol=1e-10, atol=1e-10)
    scheduler.set_timesteps(50)  # behind the guider's back
    guider.set_state(step=1, num_inference_steps=3, timestep=torch.tensor(123))
    batches = _batches(guider, noise, noise)
    with pytest.raises(ValueError, match="not one of the scheduler given to set_scheduler"):
        guider(batches)


def _batches(guider, cond, uncond):
    batches = guider.prepare_inputs({"encoder_hidden_states": (cond, uncond)})
    for batch, prediction in zip(batches, (cond, uncond), strict=True):
        batch.noise_pred = prediction
    return batches


def test_conditions_from_a_block_state_are_the_same_batches():
    """As the modular pipelines of Wan and others hand them over."""
    from diffusers.modular_pipelines.modular_pipeline import BlockState

    guider, cond, uncond = CFGPlusPlusGuidance(), random(2, 3), random(2, 3, seed=1)
    guider.set_scheduler(ddim())
    fields = {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"), "guidance": "guidance"}
    state = BlockState(prompt_embeds=cond, negative_prompt_embeds=uncond, guidance=1)
    batches = guider.prepare_inputs_from_block_state(state, fields)
    assert len(batches) == 2
    assert batches[0].encoder_hidden_states is cond
    assert batches[1].encoder_hidden_states is uncond
    assert batches[1].guidance == 1
    with pytest.raises(ValueError, match="encoder_hidden_states, with which"):
        guider.prepare_inputs_from_block_state(BlockState(prompt_embeds=cond, guidance=1), fields)


def test_classic_pipeline_with_a_negative_prompt_takes_the_explicit_steps(t2i):
    noise = random(2, 4, 16, 16, dtype=torch.float32)
    prompts, negative = ["a large red bag", "a small blue shirt"], ["a shoe", ""]
    before = {name: tensor.clone() for name, tensor in t2i.unet.state_dict().items()}
    config = dict(t2i.scheduler.config)
    with guide.apply(t2i, CFGPlusPlusGuidance(0.6)) as calls:
        made = t2i(prompts, negative_prompt=negative, num_inference_steps=5, guidance_scale=9.0, latents=noise,
                   output_type="latent").images  # fmt: skip
    assert calls.rows == 2 * 2 * 5
    cond, uncond = t2i.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)
    explicit = cfgpp_sample(t2i.unet, t2i.scheduler, noise, (cond, uncond), 0.6, 5)
    torch.testing.assert_close(made, explicit, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in t2i.unet.state_dict().items())
    assert config == dict(t2i.scheduler.config)


def test_saved_loaded_and_renewed(tmp_path):
    guider = CFGPlusPlusGuidance(0.4, eta=0.2, start=0.1, stop=0.9)
    guider.set_scheduler(ddim())
    guider.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["guidance_scale"] == 0.4
    for other in (CFGPlusPlusGuidance.from_pretrained(tmp_path), guider.new()):
        assert {name: other.config[name] for name in ("guidance_scale", "eta", "start", "stop", "enabled")} == {
            "guidance_scale": 0.4, "eta": 0.2, "start": 0.1, "stop": 0.9, "enabled": True,
        }  # fmt: skip
        assert (other.guidance_scale, other.eta, other._start, other._stop) == (0.4, 0.2, 0.1, 0.9)
    assert guider.new(guidance_scale=0.8).guidance_scale == 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_and_device_are_kept(dtype, device):
    scheduler, guider = ddim(), CFGPlusPlusGuidance(0.6)
    scheduler.set_timesteps(4)
    guider.set_scheduler(scheduler)
    guider.set_state(step=1, num_inference_steps=4, timestep=scheduler.timesteps[1])
    cond, uncond = (random(2, 3, seed=seed).to(device, dtype) for seed in (0, 1))
    pred, pred_cond, pred_uncond = guider(_batches(guider, cond, uncond)).to_tuple()
    assert pred.dtype == dtype
    assert pred.device == cond.device
    assert pred_cond is cond
    assert pred_uncond is uncond
    if device == "cpu":
        full = uncond.double() + guider.omegas[1] * (cond.double() - uncond.double())
        torch.testing.assert_close(pred.double(), full, rtol=0, atol=20 * torch.finfo(dtype).eps)


# ---- inversion


def test_inversion_of_an_affine_model_is_the_closed_form():
    scheduler, (cond, uncond), x = ddim(), affine_conditions(3), random(3, 2)
    scheduler.set_timesteps(20)
    a = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0]
    expected = x
    for here, after in zip(a[-2::-1], a[:0:-1], strict=True):
        slope, offset = 0.4 + 0.6 * 0.3, 0.1 - 0.6 * 0.3
        ratio, s, s_next = math.sqrt(here / after), math.sqrt(1 - here), math.sqrt(1 - after)
        expected = (ratio * (1 - s_next * 0.4) + s * slope) * expected - ratio * s_next * 0.1 + s * offset
    found = invert(Affine(), scheduler, x, (cond, uncond), 0.6, 20)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_inversion_of_constant_predictions_is_exact():
    """Where the predictions do not depend on x, the approximation is none."""
    cond, uncond = affine_conditions(3)
    cond["slope"], uncond["slope"] = torch.zeros(3).double(), torch.zeros(3).double()
    x, scheduler = random(3, 2), ddim()
    noise = invert(Affine(), scheduler, x, (cond, uncond), 0.6, 10)
    out = guide.sample(Affine(), scheduler, CFGPlusPlusGuidance(0.6), noise, (cond, uncond), num_inference_steps=10)
    torch.testing.assert_close(out.sample, x, rtol=1e-10, atol=1e-10)


def test_inversion_is_the_same_in_samples_of_unit_variance_and_unscaled(tiny_dit):
    """DDIM and Euler over the same levels: scaling of inputs, of latents, and of the first sigma."""
    model, conditions = tiny_dit
    x = random(2, 4, 8, 8)
    euler = diffusers.EulerDiscreteScheduler(beta_end=0.012, timestep_spacing="leading")
    by_ddim, by_euler = (invert(model, scheduler, x, conditions(2), 0.6, 5) for scheduler in (ddim(), euler))
    torch.testing.assert_close(by_euler, by_ddim, rtol=1e-4, atol=1e-4)
    by_ddim, by_euler = (cfgpp_sample(model, scheduler, x, conditions(2), 0.6, 5) for scheduler in (ddim(), euler))
    torch.testing.assert_close(by_euler, by_ddim, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_inversion_reads_other_predictions_as_noise(kind):
    """An affine network of noise, said in another way, inverts to nearly the same."""
    scheduler, conditions, x = ddim(prediction_type=kind), affine_conditions(3), 0.5 * random(3, 2)
    scheduler.set_timesteps(200)

    def other(x, t, slope, offset):
        e = slope[:, None] * x + offset[:, None]
        a = scheduler.alphas_cumprod[t.long()][:, None]
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        return a.sqrt() * e - (1 - a).sqrt() * x0 if kind == "v_prediction" else x0

    plain = invert(Affine(), ddim(), x, conditions, 0.6, 200)
    torch.testing.assert_close(invert(other, scheduler, x, conditions, 0.6, 200), plain, rtol=1e-8, atol=1e-8)


def test_a_garment_comes_back_the_better_the_more_steps(garments):
    from shoestring.zoo.train._fashion import garments as rows

    model, scheduler = garments
    images, labels = rows("test[:4]")
    conditions = (labels, torch.full_like(labels, 10))
    wrong = []
    for steps in (5, 20):
        noise = invert(model, scheduler, images, conditions, 0.6, steps)
        assert noise.shape == images.shape
        back = guide.sample(model, scheduler, CFGPlusPlusGuidance(0.6), noise, conditions, num_inference_steps=steps)
        wrong.append(float((back.sample - images).square().mean()))
    assert wrong[1] < 0.6 * wrong[0]
    assert wrong[1] < 0.1 * float(images.var())


def test_the_same_noise_gives_the_same_garments(garments):
    model, scheduler = garments
    noise, conditions = random(2, 1, 28, 28, dtype=torch.float32), (torch.tensor([9, 1]), torch.full((2,), 10))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, rng = repr(vars(scheduler)), torch.get_rng_state()
    one, two = (cfgpp_sample(model, scheduler, noise, conditions, 0.6, 3) for _ in range(2))
    invert(model, scheduler, one, conditions, 0.6, 3)
    assert torch.equal(one, two)
    assert repr(vars(scheduler)) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    stirred = [
        cfgpp_sample(model, scheduler, noise, conditions, 0.6, 3, eta=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(stirred[0], stirred[1])
    assert not torch.equal(stirred[0], stirred[2])


# ---- what is refused, and what is warned of


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf"), "0.6", True])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale must be a number from 0 to 1"):
        CFGPlusPlusGuidance(scale)
    with pytest.raises(ValueError, match="guidance_scale must be a number from 0 to 1"):
        invert(Affine(), ddim(), random(3, 2), affine_conditions(3), scale, 2)


def test_cfgs_scales_are_warned_of():
    with pytest.warns(UserWarning, match="guidance_scale 7.5 is above 1"):
        CFGPlusPlusGuidance(7.5)
    with pytest.warns(UserWarning, match="guidance_scale 7.5 is above 1"):
        invert(Affine(), ddim(), random(3, 2), affine_conditions(3), 7.5, 2)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), "1"])
def test_an_eta_that_is_none_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1"):
        CFGPlusPlusGuidance(0.6, eta=eta)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_clipping_is_warned_of(option):
    with pytest.warns(UserWarning, match=f"{option} of DDIMScheduler changes the clean estimate"):
        CFGPlusPlusGuidance().set_scheduler(ddim(**{option: True}))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_higher_order_is_warned_of_and_runs(name, tiny_sd):
    model, conditions = tiny_sd
    scheduler = getattr(diffusers, name)()
    with pytest.warns(UserWarning, match=f"{name} is not of first order"):
        out = guide.sample(
            model, scheduler, CFGPlusPlusGuidance(), random(2, 4, 8, 8), conditions(2), num_inference_steps=4
        )
    assert bool(out.sample.isfinite().all())


@pytest.mark.parametrize("scheduler", [diffusers.LCMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(
    stochastic_sampling=True)], ids=["lcm", "stochastic flow"])  # fmt: skip
def test_a_scheduler_that_keeps_no_noise_is_refused(scheduler):
    with pytest.raises(ValueError, match="where CFG\\+\\+ is CFG at the same scale"):
        CFGPlusPlusGuidance().set_scheduler(scheduler)


def test_schedulers_it_cannot_read_are_refused():
    odd = ddim()
    odd.register_to_config(prediction_type="score")
    guider = CFGPlusPlusGuidance()
    with pytest.raises(ValueError, match="'score'"):
        guider.set_scheduler(odd)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no noise levels"):
        guide.sample(Affine(), diffusers.EDMEulerScheduler(), guider, random(3, 2), affine_conditions(3))
    with pytest.raises(ValueError, match="calls the network 7 times in 4 steps"):
        cfgpp_sample(Affine(), diffusers.HeunDiscreteScheduler(), random(3, 2), affine_conditions(3), 0.6, 4)


def test_conditions_that_do_not_fit_are_refused(tiny_sd):
    model, conditions = tiny_sd
    noise, scheduler, guider = random(2, 4, 8, 8), ddim(), CFGPlusPlusGuidance()
    with pytest.raises(ValueError, match=r"needs more than the 1 conditions|encoder_hidden_states.*is missing"):
        guide.sample(model, scheduler, guider, noise, conditions(2, 1), num_inference_steps=2)
    with pytest.raises(ValueError, match="takes a condition and its absence, got 3"):
        guide.sample(model, scheduler, guider, noise, conditions(2, 3), num_inference_steps=2)
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*is missing: give a negative_prompt"):
        guider.prepare_inputs({"encoder_hidden_states": (noise, None)})
    with pytest.raises(ValueError, match="row for each of the 2 latents"):
        guide.sample(model, scheduler, guider, noise, (conditions(2)[0], conditions(3)[1]), num_inference_steps=2)
    for loop in (cfgpp_sample, invert):
        with pytest.raises(ValueError, match="conditions must be two"):
            loop(model, scheduler, noise, conditions(2, 1), 0.6, 2)
        with pytest.raises(ValueError, match="width 8, got 6"):
            loop(model, scheduler, noise, (random(2, 5, 6), random(2, 5, 6)), 0.6, 2)
        with pytest.raises(ValueError, match="NaN"):
            loop(model, scheduler, noise * float("nan"), conditions(2), 0.6, 2)
        for steps in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="num_inference_steps must be a whole number >= 1"):
                loop(model, scheduler, noise, conditions(2), 0.6, steps)


def test_noise_that_is_missing_is_named():
    x = random(2, 3)
    with pytest.raises(ValueError, match="noise is needed where eta > 0"):
        cfgpp_step(x, x, x, NOISY, LESS, 0.6, eta=0.5)
    with pytest.raises(ValueError, match="noise is needed where eta > 0"):
        cfgpp_dpmpp_2s_step(x, lambda x, sigma: (x, x), 2.0, 1.0, 0.6, eta=0.5)


def test_inversion_without_guidance_is_that_of_diffusers(tiny_dit):
    model, (cond, uncond) = tiny_dit[0], tiny_dit[1](2)
    x = random(2, 4, 8, 8)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    backwards = diffusers.DDIMInverseScheduler.from_config(scheduler.config)
    theirs = guide.sample(model, backwards, None, x, (cond,), num_inference_steps=5).sample
    for scale in (0.0, 0.6):
        torch.testing.assert_close(invert(model, scheduler, x, (cond, cond), scale, 5), theirs, rtol=1e-6, atol=1e-6)
    theirs = guide.sample(model, backwards, None, x, (uncond,), num_inference_steps=5).sample
    torch.testing.assert_close(invert(model, scheduler, x, (cond, uncond), 0.0, 5), theirs, rtol=1e-6, atol=1e-6)
