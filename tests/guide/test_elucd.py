"""Classifier guidance by EluCD: every property of its card, to its tolerance, and what must be refused."""

import copy
import math

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from shoestring import guide, zoo
from shoestring.guide._levels import KINDS, from_epsilon, noise_levels, to_epsilon, to_x0
from shoestring.guide.elucd import (
    ClassifierGuidance,
    ImageClassifier,
    classifier_log_prob,
    edm_input,
    edm_push,
    edm_weights,
    guidance_schedule,
    posterior_variance,
    preprocess_from,
    smooth_activations,
)

from .conftest import random, traced

K = 5
NO_SMOOTHING = {"softplus_beta": None}


class Small(nn.Module):
    """A random ReLU classifier of float64 pictures; its one ReLU is used, and registered, twice."""

    def __init__(self, channels=1, size=8, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, 6, 3, padding=1)
            self.act = nn.ReLU(inplace=True)
            self.again = self.act
            self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), self.act)
            self.last = nn.Linear(6 * size * size, K)
            self.last.weight.data *= 30  # sure enough of itself to have gradients
        self.double().eval()

    def forward(self, x):
        return self.last(self.body(self.again(self.first(x))).flatten(1))


def toy(x, t, **condition):
    """A denoiser that is affine in x."""
    return 0.4 * x + 0.1


def by_hand(network, x0, y, t1=1.0, t2=0.5, decode=None):
    """g as the card defines it, by one plain graph; exp, log and sum in place of logsumexp."""
    z = x0.clone().requires_grad_()
    picture = z if decode is None else decode(z)
    seen = picture + (picture.clamp(-1, 1) - picture).detach()  # clipped; the clip lets the gradient through
    f = network(seen)
    log_p = (t1 * f).exp().gather(1, y[:, None])[:, 0].div((t2 * f).exp().sum(1)).log()
    return torch.autograd.grad(log_p.sum(), z)[0]


def run(guider, scheduler=None, model=toy, noise=None, conditions=None, steps=6, **more):
    """The output, and every step with its prediction and what came after it."""
    noise = random(3, 1, 8, 8) if noise is None else noise
    conditions = [torch.zeros(len(noise), dtype=torch.long)] if conditions is None else conditions
    return traced(guider, scheduler, model, noise, conditions, steps, **more)


# ---- temperatures


def test_both_temperatures_one_is_the_log_softmax():
    f, y = (5 * random(4, K)).requires_grad_(), torch.tensor([0, 4, 2, 2])
    ours, plain = classifier_log_prob(f, y, 1.0, 1.0), f.log_softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    one, other = (torch.autograd.grad(log_p.sum(), f)[0] for log_p in (ours, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_marginal_temperature_zero_leaves_the_joint_gradient():
    network, x0, y = Small(), random(3, 1, 8, 8) / 3, torch.tensor([1, 0, 4])
    guider = ClassifierGuidance(network, joint_temperature=0.7, marginal_temperature=0.0, **NO_SMOOTHING)
    z = x0.clamp(-1, 1).requires_grad_()
    joint = torch.autograd.grad(network(z).gather(1, y[:, None]).sum(), z)[0]
    torch.testing.assert_close(guider.gradient(x0, y), 0.7 * joint, rtol=1e-14, atol=1e-14)


def test_linear_classifier_has_the_closed_form():
    W, bias, x0, y = random(K, 64), random(K, seed=1), random(3, 1, 8, 8, seed=2) / 9, torch.tensor([3, 0, 3])
    t1, t2 = 1.3, 0.4
    guider = ClassifierGuidance(
        lambda x: x.flatten(1) @ W.T + bias, joint_temperature=t1, marginal_temperature=t2, **NO_SMOOTHING
    )
    f = x0.flatten(1) @ W.T + bias
    expected = t1 * W[y] - t2 * (t2 * f).softmax(1) @ W
    torch.testing.assert_close(guider.gradient(x0, y).flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_a_constant_on_all_logits_changes_log_p_by_the_difference_of_temperatures():
    network, y = Small(), torch.tensor([1, 2, 0])
    f = network(random(3, 1, 8, 8))
    moved = classifier_log_prob(f + 7.0, y, 1.2, 0.5) - classifier_log_prob(f, y, 1.2, 0.5)
    torch.testing.assert_close(moved, torch.full((3,), 0.7 * 7.0, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    x0 = random(3, 1, 8, 8, seed=3)
    plain, shifted = (
        ClassifierGuidance(asked, **NO_SMOOTHING).gradient(x0, y) for asked in (network, lambda x: network(x) + 7.0)
    )
    torch.testing.assert_close(plain, shifted, rtol=1e-12, atol=1e-12)


def test_half_precision_does_not_overflow():
    f, y = torch.tensor([[300.0, -300.0]], dtype=torch.float16), torch.tensor([1])
    log_p = classifier_log_prob(f, y, 1.0, 1.0)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, torch.tensor([-600.0]))


# ---- the smooth classifier


@pytest.mark.parametrize("beta", [1.0, 3.0, 100.0])
def test_softplus_tends_to_relu(beta):
    z = torch.linspace(-3, 3, 601, dtype=torch.float64)
    far = (smooth_activations(nn.Sequential(nn.ReLU()), beta)(z) - z.relu()).abs().max()
    assert 0.5 * math.log(2) / beta < float(far) <= math.log(2) / beta + 1e-12


def test_smoothing_keeps_the_names_and_the_original():
    model = zoo.load("tiny-resnet")
    before, relus = copy.deepcopy(model.state_dict()), sum(isinstance(m, nn.ReLU) for m in model.modules())
    smooth = smooth_activations(model)
    assert relus > 10
    assert not any(isinstance(m, nn.ReLU) for m in smooth.modules())
    assert sum(isinstance(m, nn.Softplus) for m in smooth.modules()) == relus
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == relus
    assert list(smooth.state_dict()) == list(before)
    assert all(torch.equal(smooth.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in smooth.parameters())
    assert not any(m.training for m in smooth.modules())


def test_a_relu_that_is_there_twice_is_replaced_twice():
    smooth = smooth_activations(Small(), 3.0)
    assert [type(m) for m in (smooth.act, smooth.again, smooth.body[1])] == [nn.Softplus] * 3
    x, model = random(2, 1, 8, 8), Small()
    softplus = lambda z: torch.log1p((3.0 * z).exp()) / 3.0  # noqa: E731
    expected = model.last(softplus(model.body[0](softplus(model.first(x)))).flatten(1))
    torch.testing.assert_close(smooth(x), expected, rtol=1e-8, atol=1e-8)


def test_a_network_without_relu_warns():
    with pytest.warns(UserWarning, match="no ReLU module was found in Sequential"):
        smooth_activations(nn.Sequential(nn.GELU()))
    with pytest.warns(UserWarning, match="not smoothed"):
        ClassifierGuidance(lambda x: x.flatten(1))


# ---- the schedule and the step


def test_gamma_zero_is_the_posterior_variance():
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small")
    scheduler.set_timesteps(10)
    v = torch.stack([scheduler._get_variance(int(t)) for t in scheduler.timesteps]).double()
    torch.testing.assert_close(guidance_schedule(*noise_levels(scheduler), gamma=0.0), v, rtol=1e-4, atol=1e-7)


def test_sine_is_of_the_step_number_and_of_the_largest_variance():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(7)
    products = scheduler.alphas_cumprod.double()
    a = [float(products[t]) for t in scheduler.timesteps] + [float(scheduler.final_alpha_cumprod)]
    v = [(1 - a[i + 1]) / (1 - a[i]) * (1 - a[i] / a[i + 1]) for i in range(7)]
    expected = [v[i] + 0.3 * max(v) * math.sin(math.pi * (6 - i) / 7) for i in range(7)]
    assert guidance_schedule(*noise_levels(scheduler)).tolist() == pytest.approx(expected, rel=1e-9)


def test_posterior_variance_is_that_of_the_joint_gaussian():
    """Var(x_s | x_t, x_0) by conditioning the covariance of (x_s, x_t) that one more step of noise makes."""
    alpha, sigma, alpha_next, sigma_next = 0.5, 2.0, 0.9, 0.7
    covariance = alpha / alpha_next * sigma_next**2
    expected = sigma_next**2 - covariance**2 / sigma**2
    assert posterior_variance(alpha, sigma, alpha_next, sigma_next) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3], ids=["Dhariwal and Nichol", "with the sine"])
def test_the_mean_of_ancestral_ddpm_moves_by_gamma_g(gamma):
    network, y = Small(), torch.tensor([0, 3, 1])
    guider = ClassifierGuidance(network, labels=y, gamma=gamma, guidance_scale=0.8)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    _, seen = run(guider, scheduler, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(6)
    schedule = guidance_schedule(*noise_levels(scheduler), gamma)
    smooth = smooth_activations(network, 3.0)
    for step, prediction, _ in seen[:-1]:
        plain = toy(step.sample, None)
        ends = [
            scheduler.step(
                e, step.timestep, step.sample, generator=torch.Generator().manual_seed(1), return_dict=False
            )[0]
            for e in (prediction, plain)
        ]
        g = by_hand(smooth, to_x0(plain, step.sample, step.alpha, step.sigma, "epsilon"), y)
        expected = 0.8 * float(schedule[step.index]) * g
        assert float(expected.abs().max()) > 1e-5
        torch.testing.assert_close(ends[0] - ends[1], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deterministic_step_moves_by_gamma_g_whatever_the_network_predicts(kind):
    y = torch.tensor([0, 3, 1])
    guider = ClassifierGuidance(Small(), labels=y, guidance_scale=2.0)
    if kind == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    _, seen = run(guider, scheduler)
    scheduler.set_timesteps(6)
    schedule = guidance_schedule(*noise_levels(scheduler))
    smooth = smooth_activations(Small(), 3.0)
    for step, _, after in seen:
        plain = toy(step.sample, None)
        levels = step.alpha, step.sigma, kind
        x0, eps = to_x0(plain, step.sample, *levels), to_epsilon(plain, step.sample, *levels)
        unit = math.hypot(step.alpha_next, step.sigma_next)  # the paper's coordinates have alpha^2 + sigma^2 = 1
        expected = 2.0 * float(schedule[step.index]) * by_hand(smooth, x0, y) * unit
        moved = after - (step.alpha_next * x0 + step.sigma_next * eps)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=2e-6)
    assert float(schedule[-1]) == 0


def test_zero_terminal_signal_starts_finite():
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    out, seen = run(ClassifierGuidance(Small(), labels=1), scheduler)
    assert seen[0][0].alpha < 1e-6
    assert bool(out.sample.isfinite().all())


def test_ddim_and_euler_are_guided_alike():
    config = {"timestep_spacing": "trailing"}
    ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **config)
    euler = diffusers.EulerDiscreteScheduler(**config)

    def blind(x, t, **condition):  # its answer depends on the level alone: Euler shows the network x / r
        return torch.full_like(x, 0.001) * t.reshape(-1, 1, 1, 1)

    ddim.set_timesteps(5)  # divides 1000: both then end their steps where the next ones begin
    euler.set_timesteps(5)
    a = noise_levels(ddim)[0][0]
    noise = random(3, 1, 8, 8)
    guider = ClassifierGuidance(Small(), labels=2, guidance_scale=3.0)
    one, _ = run(guider, ddim, blind, noise, steps=5)
    other, _ = run(guider, euler, blind, noise / a / float(euler.init_noise_sigma), steps=5)
    plain, _ = run(None, ddim, blind, noise, steps=5)
    assert float((one.sample - plain.sample).abs().max()) > 0.01
    torch.testing.assert_close(one.sample, other.sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_scale_zero_is_the_unguided_sampler(name, tiny_sd):
    model, conditions = tiny_sd
    plain, zero, guided = (
        run(
            guider,
            getattr(diffusers, name)(),
            model,
            random(2, 4, 8, 8),
            conditions(2, 1),
            generator=torch.Generator().manual_seed(4),
        )[0].sample
        for guider in (
            None,
            ClassifierGuidance(Small(4), 1, guidance_scale=0.0),
            ClassifierGuidance(Small(4), 1, guidance_scale=5.0),
        )
    )
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
def test_equals_a_loop_written_out(fixture, request):
    """Latents, decoded by a convolution, classifier-free guidance besides; noise moved by gamma_t / k_t g."""
    model, conditions = request.getfixturevalue(fixture)
    noise, y = random(2, 4, 8, 8), torch.tensor([4, 2])
    filters = random(1, 4, 3, 3, seed=8) / 4
    decode = lambda z: F.conv2d(z, filters, padding=1)  # noqa: E731
    network = smooth_activations(Small(), 5.0)
    guider = ClassifierGuidance(Small(), y, guidance_scale=1.5, decode=decode, cfg_scale=2.5, softplus_beta=5.0)
    out, seen = run(guider, None, model, noise, conditions(2), steps=4)

    own = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    own.set_timesteps(4)
    products, x = own.alphas_cumprod.double(), noise
    a = [float(products[t]) for t in own.timesteps] + [1.0]
    v = [(1 - a[i + 1]) / (1 - a[i]) * (1 - a[i] / a[i + 1]) for i in range(4)]
    for i, t in enumerate(own.timesteps):
        step = seen[i][0]
        with torch.no_grad():
            e_c, e_u = (step.network(x, t, condition) for condition in step.conditions)
        e = e_u + 2.5 * (e_c - e_u)
        gamma_t = v[i] + 0.3 * max(v) * math.sin(math.pi * (3 - i) / 4)
        k = math.sqrt(a[i + 1] * (1 - a[i]) / a[i]) - math.sqrt(1 - a[i + 1])
        x0 = (x - math.sqrt(1 - a[i]) * e) / math.sqrt(a[i])
        e = e - 1.5 * gamma_t / k * by_hand(network, x0, y, decode=decode)
        x = own.step(e, t, x).prev_sample
    torch.testing.assert_close(out.sample, x, rtol=1e-6, atol=1e-6)
    assert out.num_calls == 8


def test_a_batch_is_its_samples_one_by_one():
    y, noise = torch.tensor([4, 0, 2]), random(3, 1, 8, 8)
    together, _ = run(ClassifierGuidance(Small(), y, guidance_scale=5.0), noise=noise)
    for i in range(3):
        alone, _ = run(ClassifierGuidance(Small(), int(y[i]), guidance_scale=5.0), noise=noise[i : i + 1])
        torch.testing.assert_close(together.sample[i : i + 1], alone.sample, rtol=1e-10, atol=1e-10)


def test_only_steps_between_start_and_stop_ask_the_classifier():
    asked = []

    class Counts(Small):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    guider = ClassifierGuidance(Counts(), 1, start=0.2, stop=0.6)
    _, seen = run(guider, steps=10)
    assert asked == [3] * 4
    moved = [not torch.equal(prediction, toy(step.sample, None)) for step, prediction, _ in seen]
    assert moved == [2 <= i < 6 for i in range(10)]
    guider.disable()
    run(guider, steps=10)
    assert len(asked) == 4


def test_no_gradient_reaches_the_diffusion_network(tiny_sd):
    model, conditions = tiny_sd
    graphs = []
    hook = model.register_forward_hook(lambda module, inputs, output: graphs.append(output[0].requires_grad))
    network = Small(4)
    try:
        with torch.enable_grad():
            out, _ = run(ClassifierGuidance(network, 1), None, model, random(2, 4, 8, 8), conditions(2, 1))
    finally:
        hook.remove()
    assert graphs == [False] * 6
    assert not out.sample.requires_grad
    assert all(p.grad is None for p in [*model.parameters(), *network.parameters()])


def test_works_in_inference_mode():
    guider, noise = ClassifierGuidance(Small(), 1), random(2, 1, 8, 8)
    plain, _ = run(guider, noise=noise)
    with torch.inference_mode():
        inside, _ = run(guider, noise=noise.clone(), conditions=[torch.zeros(2, dtype=torch.long)])
    assert torch.equal(inside.sample, plain.sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_latents_is_kept(dtype):
    x0, y = (random(2, 1, 8, 8) / 2).to(dtype), torch.tensor([1, 3])
    exact = ClassifierGuidance(Small(), y).gradient(x0.double(), y)
    for network in (Small(), Small().float()):
        g = ClassifierGuidance(network, y).gradient(x0, y)
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), exact, rtol=0.01, atol=0.01 * float(exact.abs().max()))
    noise = random(2, 1, 8, 8).to(dtype)
    out, _ = run(ClassifierGuidance(Small().float(), y), noise=noise)
    assert out.sample.dtype == dtype
    assert bool(out.sample.isfinite().all())


# ---- the EDM form


def test_edm_push_has_the_rms_it_says():
    x, g = 80 * random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1) * torch.tensor([1e-9, 1.0, 1e6]).reshape(3, 1, 1, 1)
    for i, w in enumerate(edm_weights(10, 0.004)):
        expected = (max(0.004 * (11 - i) / 11, 1e-5) + 0.3 * 0.004 * math.sin(math.pi * i / 10)) * x.square().mean(
            (1, 2, 3)
        ).sqrt()
        push = edm_push(g, x, float(w))
        torch.testing.assert_close(push.square().mean((1, 2, 3)).sqrt(), expected, rtol=1e-12, atol=0)
        along = g * (expected / g.square().mean((1, 2, 3)).sqrt()).reshape(3, 1, 1, 1)
        torch.testing.assert_close(push, along, rtol=1e-12, atol=0)


def test_edm_input_is_scaled_down_but_not_up():
    x = torch.stack([10 * torch.ones(1, 2, 2), 0.5 * torch.ones(1, 2, 2)])
    torch.testing.assert_close(edm_input(x), torch.stack([torch.ones(1, 2, 2), 0.5 * torch.ones(1, 2, 2)]))
    assert bool(edm_push(torch.zeros(1, 1, 2, 2), x[:1], 0.1).eq(0).all())


# ---- real models


def test_an_unconditional_network_draws_what_the_classifier_names():
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    judge, y = zoo.load("judge-fashion"), torch.arange(20) % 10
    noise = random(20, 1, 28, 28, dtype=torch.float32)
    right = {}
    for scale in (0.0, 3.0):
        out, _ = run(
            ClassifierGuidance(zoo.load("tiny-resnet"), y, guidance_scale=scale),
            scheduler,
            model,
            noise,
            [torch.full((20,), 10)],
            steps=10,
        )
        with torch.no_grad():
            right[scale] = int((judge(out.sample.clamp(-1, 1)).logits.argmax(1) == y).sum())
        assert out.num_calls == 10
    assert right[0.0] <= 7
    assert right[3.0] >= right[0.0] + 6


def test_guides_a_pipeline_through_its_decoder():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    network = ImageClassifier(zoo.load("judge-colour"), image_size=32)
    decode = lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample  # noqa: E731
    size = pipe.unet.config.sample_size
    noise = random(2, pipe.unet.config.in_channels, size, size, dtype=torch.float32)
    log_p, y = [], torch.tensor([3, 3])
    for scale in (0.0, 3.0):
        guider = ClassifierGuidance(network, y, guidance_scale=scale, decode=decode)
        with guide.apply(pipe, guider) as calls:
            z = pipe(
                ["a large bag"] * 2, num_inference_steps=5, guidance_scale=2.0, latents=noise, output_type="latent"
            ).images
        with torch.no_grad():
            log_p.append(float(classifier_log_prob(network(decode(z).clamp(-1, 1)), y, 1.0, 1.0).mean()))
        assert calls.rows == 10
    assert log_p[1] > log_p[0] + 0.5
    assert all(p.grad is None for part in (pipe.unet, pipe.vae, network) for p in part.parameters())


# ---- saving, and what is refused


def test_saved_and_loaded_it_guides_alike(tmp_path):
    given = {"guidance_scale": 4.0, "gamma": 0.1, "softplus_beta": 5.0, "marginal_temperature": 0.25, "start": 0.2}
    guider = ClassifierGuidance(Small(), torch.tensor([1, 2, 3]), clip=None, **given)
    guider.save_pretrained(tmp_path)
    loaded = ClassifierGuidance.from_pretrained(tmp_path, classifier=Small(), labels=torch.tensor([1, 2, 3]))
    assert {name: loaded.config[name] for name in given} == given
    assert (loaded.clip, loaded.gamma, loaded.guidance_scale) == (None, 0.1, 4.0)
    copied = guider.new(guidance_scale=0.0)
    assert torch.equal(run(loaded)[0].sample, run(guider)[0].sample)
    assert torch.equal(run(guider.new())[0].sample, run(guider)[0].sample)
    assert torch.equal(run(copied)[0].sample, run(None)[0].sample)
    bare = ClassifierGuidance.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier is missing"):
        run(bare)
    bare.classifier, bare.labels = Small(), [1, 2, 3]
    assert torch.equal(run(bare)[0].sample, run(guider)[0].sample)


def test_a_classifier_of_another_size_or_range_is_named():
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8, num_labels=K)
    ).eval()
    fitting = ImageClassifier(vit, value_range=(-2.0, 2.0))
    assert (fitting.image_size, fitting.channels) == (16, 3)
    noise = random(2, 3, 16, 16, dtype=torch.float32)
    with pytest.warns(UserWarning, match="no ReLU"):
        guider = ClassifierGuidance(fitting, 1)
    with pytest.raises(ValueError, match="expects values from -2 to 2, pictures are from -1 to 1"):
        run(guider, noise=noise)
    guider.preprocess = lambda x: 3 * x
    with pytest.raises(ValueError, match="expects values from -2 to 2, got -3"):
        run(guider, noise=noise)
    guider.preprocess = lambda x: 2 * x
    run(guider, noise=noise, steps=2)
    with pytest.raises(ValueError, match="expects images of 16 x 16, got 8 x 8"):
        run(guider, noise=random(2, 3, 8, 8, dtype=torch.float32))
    with pytest.raises(ValueError, match="expects 3 channels, got 1"):
        run(guider, noise=random(2, 1, 16, 16, dtype=torch.float32))
    nan = copy.deepcopy(vit)
    nan.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ImageClassifier(nan)


def test_preprocessing_of_a_processor_is_that_of_transformers():
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)
    pixels = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    images = (pixels.double() / 127.5 - 1).requires_grad_()
    ours = preprocess_from(processor)(images)
    theirs = processor(images=list(pixels.to(torch.uint8)), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours.detach(), theirs.double(), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(ours.sum(), images)[0].abs().min() > 0
    assert preprocess_from(processor)(torch.zeros(1, 3, 30, 20)).shape == (1, 3, 12, 12)


@pytest.mark.parametrize(
    ("classifier", "match"),
    [
        (lambda x: x, r"logits of shape \(B, K\), got \(3, 1, 8, 8\)"),
        (lambda x: x.flatten(1)[:1], r"answer 3 images .* got \(1, 64\)"),
        (lambda x: "cat", "got str"),
        (lambda x: x.flatten(1) / 0, "NaN or infinity"),
        (lambda x: x.detach().flatten(1), "must be differentiable"),
        (lambda x: torch.zeros(len(x), 4, requires_grad=True), "must be differentiable"),
        (lambda x: x.flatten(1)[:, :2], "labels must be from 0 to 1, .* got 2 to 2"),
    ],
    ids=["pictures", "one row", "a word", "infinite", "detached", "constant", "two classes"],
)
def test_bad_answers_of_a_classifier_are_named(classifier, match):
    with pytest.raises(ValueError, match=match):
        run(ClassifierGuidance(classifier, 2, **NO_SMOOTHING))


def test_bad_input_is_named(tiny_sd):
    network = Small()
    for name, values in {
        "guidance_scale": (-1.0, math.nan, "3"),
        "gamma": (-0.1, math.inf),
        "joint_temperature": (-1.0,),
        "marginal_temperature": (-1.0,),
        "softplus_beta": (0.0, -3.0),
        "clip": (0.0,),
        "cfg_scale": (math.nan,),
        "eta": (-1.0,),
        "start": (1.0,),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                ClassifierGuidance(network, 1, **{name: value})
    with pytest.raises(TypeError, match="classifier must be a callable"):
        ClassifierGuidance("resnet50")
    with pytest.raises(ValueError, match="eval mode"):
        ClassifierGuidance(Small().train())
    with pytest.raises(ValueError, match=r"labels must be one number or one for each of 3, got \(2,\)"):
        run(ClassifierGuidance(network, [1, 2]))
    with pytest.raises(TypeError, match="labels must be whole numbers"):
        run(ClassifierGuidance(network, 1.5))
    with pytest.raises(ValueError, match=r"from 0 to 4, .* got -1 to 3"):
        run(ClassifierGuidance(network, [-1, 2, 3]))
    with pytest.raises(ValueError, match=r"from 0 to 4, .* got 10 to 10"):  # the null class of the run
        run(ClassifierGuidance(network), conditions=[torch.full((3,), 10)])
    model, conditions = tiny_sd
    with pytest.raises(ValueError, match="no class_labels to take them from"):
        run(ClassifierGuidance(Small(4)), None, model, random(2, 4, 8, 8), conditions(2))
    with pytest.raises(ValueError, match="needs one more"):
        run(ClassifierGuidance(network, 1, cfg_scale=2.0))
    with pytest.raises(ValueError, match="EDMEulerScheduler has no noise levels"):
        run(ClassifierGuidance(network, 1), diffusers.EDMEulerScheduler())
    guider = ClassifierGuidance(network, 1)
    for ask in (guider.prepare_inputs, lambda data: guider.prepare_inputs_from_block_state(data, {})):
        with pytest.raises(ValueError, match=r"needs the latents: use shoestring\.guide\.sample"):
            ask({})


def test_an_error_leaves_everything_as_it_was():
    network, scheduler = Small(), diffusers.DDIMScheduler()
    before, held = copy.deepcopy(network.state_dict()), repr(vars(scheduler))
    guider = ClassifierGuidance(network, 7)
    with pytest.raises(ValueError, match="labels"):
        run(guider, scheduler)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert repr(vars(scheduler)) == held
    assert torch.is_grad_enabled()
    guider.labels = 2
    assert torch.equal(run(guider)[0].sample, run(ClassifierGuidance(Small(), 2))[0].sample)


def test_from_epsilon_agrees_with_the_shift_that_is_added():
    """The guided prediction is the prediction whose noise is eps - c_t g."""
    y = torch.tensor([0, 3, 1])
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True)
    _, seen = run(ClassifierGuidance(Small(), y), scheduler)
    step, prediction, _ = seen[2]
    levels = step.alpha, step.sigma, "v_prediction"
    plain = toy(step.sample, None)
    x0, eps = to_x0(plain, step.sample, *levels), to_epsilon(plain, step.sample, *levels)
    scheduler.set_timesteps(6)
    gamma_t = float(guidance_schedule(*noise_levels(scheduler))[2])
    k = step.alpha_next * step.sigma / step.alpha - step.sigma_next
    g = by_hand(smooth_activations(Small(), 3.0), x0, y)
    expected = from_epsilon(eps - gamma_t / k * g, step.sample, *levels)
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-9)
