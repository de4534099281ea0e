"""Gradient-free classifier guidance: every property of its card, to its tolerance, and what must be refused."""

import copy
import math

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoestring import guide, zoo
from shoestring.guide._levels import KINDS, to_epsilon, to_x0
from shoestring.guide.gfcg import (
    CONFUSIONS,
    GradientFreeClassifierGuidance,
    ImageClassifier,
    adaptive_scale,
    confusion,
    push,
    reference_labels,
)

from .conftest import random, traced

K = 5
ALWAYS = {"start": 0.0}


class Small(nn.Module):
    """A random classifier of float64 pictures that counts what it is asked."""

    def __init__(self, channels=1, size=8, classes=K, sharp=8.0):
        super().__init__()
        self.last = nn.Linear(channels * size * size, classes, bias=False).double()
        self.last.weight.data = sharp * random(classes, channels * size * size, seed=5) / size
        self.asked = 0
        self.eval()

    def forward(self, x):
        self.asked += len(x)
        return self.last(x.flatten(1))


def toy(x, t, class_labels):
    """A denoiser whose answer depends on the class."""
    where = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return 0.9 * x + 0.2 * torch.sin(where * (class_labels.to(x.dtype) + 1).reshape(-1, 1, 1, 1))


def run(guider, scheduler=None, model=toy, noise=None, conditions=None, steps=6, **more):
    """The output, and every step with its prediction."""
    noise = random(3, 1, 8, 8) if noise is None else noise
    conditions = [torch.arange(len(noise)) % K] if conditions is None else conditions
    return traced(guider, scheduler, model, noise, conditions, steps, **more)


# ---- the mathematics


def test_the_reference_is_never_the_class_asked_for():
    f = 10 * random(200, K)
    for y in range(K):
        reference = reference_labels(f, torch.full((200,), y))
        others = f.clone()
        others[:, y] = -torch.inf
        assert not bool((reference == y).any())
        assert torch.equal(f.gather(1, reference[:, None])[:, 0], others.max(1).values)
        for moved in (f + 100, f / 7):
            assert torch.equal(reference, reference_labels(moved, torch.full((200,), y)))


def test_confusion_depends_on_temperature_but_not_on_a_constant():
    f, y = 3 * random(6, K), torch.arange(6) % K
    reference = reference_labels(f, y)
    p = (f / 2).softmax(1)
    p_y, p_ref = (p.gather(1, k[:, None])[:, 0] for k in (y, reference))
    c = confusion(f, y, reference, "pairwise", 2.0)
    torch.testing.assert_close(c, p_ref / (p_y + p_ref), rtol=1e-12, atol=0)
    torch.testing.assert_close(c, confusion(f + 50, y, reference, "pairwise", 2.0), rtol=1e-10, atol=0)
    assert float((c - confusion(f, y, reference)).abs().min()) > 1e-3
    torch.testing.assert_close(confusion(f, y, reference, "miss", 2.0), 1 - p_y)
    assert torch.equal(confusion(f, y, reference, "argmax"), (f.argmax(1) != y).double())
    assert torch.equal(confusion(f, y, reference, "constant"), torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="confusion must be one of pairwise, miss, argmax, constant, got 'entropy'"):
        confusion(f, y, reference, "entropy")


def test_with_two_classes_the_scale_is_one_minus_the_probability():
    f, y = 2 * random(50, 2), torch.arange(50) % 2
    p_y = f.softmax(1).gather(1, y[:, None])[:, 0]
    for rule in ("pairwise", "miss"):
        w = adaptive_scale(confusion(f, y, reference_labels(f, y), rule), 4.0)
        torch.testing.assert_close(w, 1 + 3.0 * (1 - p_y), rtol=1e-12, atol=0)


def test_scales_stay_between_one_and_the_largest():
    f, y = 1e4 * random(100, K), torch.arange(100) % K
    for rule in CONFUSIONS:
        w = adaptive_scale(confusion(f, y, reference_labels(f, y), rule), 3.0)
        assert bool(((w >= 1) & (w <= 3)).all())


def test_the_push_is_the_gradient_of_the_pairwise_classifier():
    """Gaussian classes with exact scores: e_y - e_ref points along the exact gradient of log p(y | x; y or ref)."""
    alpha, sigma = 0.8, 0.6
    means, spreads = random(3, 12, seed=1), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x, y, reference = random(7, 12, seed=2), torch.arange(7) % 3, (torch.arange(7) + 1) % 3
    variance = alpha**2 * spreads**2 + sigma**2  # of x_t given the class

    def noise(k):
        return sigma * (x - alpha * means[k]) / variance[k, None]

    def log_density(z, k):
        return -0.5 * ((z - alpha * means[k]) ** 2).sum(1) / variance[k] - 6 * variance[k].log()

    z = x.clone().requires_grad_()
    log_p = torch.stack([log_density(z, y), log_density(z, reference)], 1).log_softmax(1)[:, 0]
    gradient = torch.autograd.grad(log_p.sum(), z)[0]
    moved = -(push(noise(y), noise(y), noise(reference), torch.full((7,), 2.5)) - noise(y)) / sigma
    cosine = F.cosine_similarity(moved, gradient, dim=1)
    torch.testing.assert_close(cosine, torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-10)


# ---- the guider


def test_scale_one_is_conditional():
    network = Small()
    out, _ = run(GradientFreeClassifierGuidance(network, guidance_scale=1.0, **ALWAYS))
    assert torch.equal(out.sample, run(None)[0].sample)
    assert (out.num_calls, network.asked) == (6, 0)


def test_a_sure_classifier_leaves_the_conditional_prediction():
    y = torch.arange(3) % K
    sure = lambda x: 1e4 * F.one_hot(y, K).to(x.dtype)  # noqa: E731
    out, _ = run(GradientFreeClassifierGuidance(sure, **ALWAYS))
    assert torch.equal(out.sample, run(None)[0].sample)
    assert out.num_calls == 6


def test_an_undecided_classifier_pushes_by_half_from_the_lowest_other_class():
    guider = GradientFreeClassifierGuidance(lambda x: x.new_full((len(x), K), 3.0), guidance_scale=4.0, **ALWAYS)
    labels = torch.tensor([0, 1, 4])
    _, seen = run(guider, conditions=[labels])
    for step, prediction, _ in seen:
        e, e_ref = toy(step.sample, None, labels), toy(step.sample, None, torch.tensor([1, 0, 0]))
        torch.testing.assert_close(prediction, e + 1.5 * (e - e_ref), rtol=1e-12, atol=1e-12)


def test_a_network_that_ignores_its_label_is_not_moved():
    deaf = lambda x, t, class_labels: 0.3 * x + 0.1  # noqa: E731
    out, _ = run(GradientFreeClassifierGuidance(Small(), guidance_scale=9.0, **ALWAYS), model=deaf)
    torch.testing.assert_close(out.sample, run(None, model=deaf)[0].sample, rtol=1e-12, atol=1e-12)


def written_out(network, labels, noise, scale, temperature=1.0, steps=6, decode=None, ask=None, alone=None):
    """The card's algorithm, sample by sample and with nothing shared."""
    ask = ask or (lambda x, t, k, i: toy(x, t, torch.tensor([k])))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    products, done = scheduler.alphas_cumprod.double(), []
    for i, y in enumerate(labels.tolist()):
        x = noise[i : i + 1]
        for t in scheduler.timesteps:
            a = float(products[t])
            e = (alone or ask)(x, t, y, i)
            x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
            p = (network((x0 if decode is None else decode(x0)).clamp(-1, 1)) / temperature).softmax(1)[0]
            ref = max((k for k in range(len(p)) if k != y), key=lambda k: float(p[k]))
            w = 1 + (scale - 1) * float(p[ref] / (p[y] + p[ref]))
            e = e + (w - 1) * (e - ask(x, t, ref, i))
            x = scheduler.step(e, t, x).prev_sample
        done.append(x)
    return torch.cat(done)


def test_equals_the_algorithm_written_out_sample_by_sample():
    noise, labels = random(7, 1, 8, 8, seed=3), torch.arange(7) % K
    guider = GradientFreeClassifierGuidance(Small(), guidance_scale=3.5, temperature=2.0, **ALWAYS)
    out, _ = run(guider, noise=noise, conditions=[labels])
    expected = written_out(Small(), labels, noise, 3.5, 2.0)
    torch.testing.assert_close(out.sample, expected, rtol=1e-5, atol=1e-5)
    assert float((out.sample - run(None, noise=noise, conditions=[labels])[0].sample).abs().max()) > 0.1


def test_a_batch_is_its_samples_one_by_one():
    """Some are pushed and some are not, in the same batch."""
    noise, labels = random(6, 1, 8, 8), torch.arange(6) % K
    options = {"confusion": "argmax", "guidance_scale": 2.5, **ALWAYS}
    together, _ = run(GradientFreeClassifierGuidance(Small(), **options), noise=noise, conditions=[labels])
    assert 6 < together.num_calls < 12
    calls = 0.0
    for i in range(6):
        one = slice(i, i + 1)
        alone, _ = run(GradientFreeClassifierGuidance(Small(), **options), noise=noise[one], conditions=[labels[one]])
        torch.testing.assert_close(together.sample[one], alone.sample, rtol=1e-10, atol=1e-10)
        calls += alone.num_calls
    assert together.num_calls == pytest.approx(calls / 6)


def test_confusion_under_the_threshold_saves_calls():
    labels, noise = torch.arange(8) % K, random(8, 1, 8, 8)
    always, saving = (GradientFreeClassifierGuidance(Small(), threshold=c, **ALWAYS) for c in (0.0, 0.4))
    assert run(always, noise=noise, conditions=[labels])[0].num_calls == 12
    out, seen = run(saving, noise=noise, conditions=[labels])
    assert 6 < out.num_calls < 12
    network, rows = Small(), 0
    for step, prediction, _ in seen:
        e = toy(step.sample, None, labels)
        f = network(to_x0(e, step.sample, step.alpha, step.sigma, "epsilon").clamp(-1, 1))
        left = confusion(f, labels, reference_labels(f, labels)) < 0.4
        assert torch.equal((prediction == e).flatten(1).all(1), left)
        rows += int((~left).sum())
    assert out.num_calls == pytest.approx(6 + rows / 8)


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
def test_layouts_of_real_networks(fixture, request):
    """Text networks have a further condition for each class; the class network has its label replaced."""
    model, conditions = request.getfixturevalue(fixture)
    noise, labels = random(3, 4, 8, 8), torch.tensor([0, 2, 1])
    text = fixture != "tiny_dit"
    given = conditions(3, 5) if text else conditions(3, 1)
    filters = random(1, 4, 3, 3, seed=8)
    decode = lambda z: F.conv2d(z, filters, padding=1)  # noqa: E731
    network = Small(classes=3)
    guider = GradientFreeClassifierGuidance(network, labels, decode=decode, guidance_scale=2.0, **ALWAYS)
    out, seen = run(guider, None, model, noise, given, steps=3)
    step = seen[0][0]

    @torch.no_grad()
    def ask(x, t, k, i):
        of = step.conditions[2 + k] if text else {"class_labels": torch.full((3,), k)}
        return step.network(x, t, {name: value[i : i + 1] for name, value in of.items()})

    @torch.no_grad()
    def alone(x, t, k, i):  # the user's own prompt
        return step.network(x, t, {name: value[i : i + 1] for name, value in step.conditions[0].items()})

    expected = written_out(network, labels, noise, 2.0, steps=3, decode=decode, ask=ask, alone=alone)
    torch.testing.assert_close(out.sample, expected, rtol=1e-5, atol=1e-5)
    assert out.num_calls == 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_for_noise_velocity_flow_and_clean_predictions(kind):
    if kind == "flow":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    else:
        scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    labels, network = torch.arange(3), Small()
    _, seen = run(GradientFreeClassifierGuidance(network, guidance_scale=4.0, **ALWAYS), scheduler)
    step, prediction, _ = seen[2]
    levels = step.alpha, step.sigma, kind
    own = toy(step.sample, None, labels)
    f = network(to_x0(own, step.sample, *levels).clamp(-1, 1))
    reference = reference_labels(f, labels)
    w = (1 + 3 * confusion(f, labels, reference)).reshape(3, 1, 1, 1)
    e, e_ref, guided = (
        to_epsilon(each, step.sample, *levels) for each in (own, toy(step.sample, None, reference), prediction)
    )
    torch.testing.assert_close(guided, e + (w - 1) * (e - e_ref), rtol=1e-8, atol=1e-8)


def test_with_classifier_free_guidance_the_two_pushes_add_up():
    labels, null = torch.arange(3), torch.full((3,), 9)
    network = Small()
    guider = GradientFreeClassifierGuidance(network, cfg_scale=2.5, guidance_scale=2.0, start=0.5)
    out, seen = run(guider, conditions=[labels, null])
    for step, prediction, _ in seen:
        e, e_u = (toy(step.sample, None, k) for k in (labels, null))
        if step.index < 3:  # before `start` neither
            assert torch.equal(prediction, e)
            continue
        f = network(to_x0(e, step.sample, step.alpha, step.sigma, "epsilon").clamp(-1, 1))
        reference = reference_labels(f, labels)
        c = confusion(f, labels, reference).reshape(3, 1, 1, 1)
        expected = e_u + 2.5 * (e - e_u) + c * (e - toy(step.sample, None, reference))
        torch.testing.assert_close(prediction, expected, rtol=1e-10, atol=1e-10)
    assert out.num_calls == 3 + 3 * 3


def test_a_weak_model_is_asked_for_the_reference():
    def weak(x, t, class_labels):
        return toy(x, t, class_labels) + 0.3

    labels, network = torch.arange(6) % K, Small(sharp=2.0)
    guider = GradientFreeClassifierGuidance(network, weak=weak, guidance_scale=2.0, **ALWAYS)
    out, seen = run(guider, noise=random(6, 1, 8, 8), conditions=[labels])
    kinds = set()
    for step, prediction, _ in seen:
        e = toy(step.sample, None, labels)
        f = network(to_x0(e, step.sample, step.alpha, step.sigma, "epsilon").clamp(-1, 1))
        asked = torch.where(f.argmax(1) == labels, labels, reference_labels(f, labels))
        kinds |= set((asked == labels).tolist())
        torch.testing.assert_close(prediction, 2 * e - weak(step.sample, None, asked), rtol=1e-10, atol=1e-10)
    assert kinds == {True, False}
    assert out.num_calls == 12


def test_only_steps_between_start_and_stop_ask_the_classifier():
    network = Small()
    guider = GradientFreeClassifierGuidance(network, start=0.2, stop=0.6)
    out, seen = run(guider, steps=10)
    moved = [not torch.equal(prediction, toy(step.sample, None, torch.arange(3))) for step, prediction, _ in seen]
    assert moved == [2 <= i < 6 for i in range(10)]
    assert (network.asked, out.num_calls) == (12, 14)
    guider.disable()
    assert torch.equal(run(guider)[0].sample, run(None)[0].sample)
    assert GradientFreeClassifierGuidance(network).config.start == 0.1


def test_no_graph_is_built():
    network, built = Small(), []
    network.register_forward_hook(lambda module, inputs, output: built.append(output.requires_grad))
    noise = random(3, 1, 8, 8)
    plain, _ = run(GradientFreeClassifierGuidance(network), noise=noise)
    with torch.inference_mode():
        inside, _ = run(GradientFreeClassifierGuidance(network), noise=noise.clone(), conditions=[torch.arange(3)])
    assert torch.equal(plain.sample, inside.sample)
    assert not plain.sample.requires_grad
    assert not any(built)
    assert all(p.grad is None for p in network.parameters())
    _, scale = GradientFreeClassifierGuidance(network).reference(noise, torch.arange(3))  # outside no_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_of_the_latents_is_kept(dtype):
    noise = random(3, 1, 8, 8)
    exact, _ = run(GradientFreeClassifierGuidance(Small(sharp=1.0)), noise=noise)
    for network in (Small(sharp=1.0), Small(sharp=1.0).float()):
        out, _ = run(GradientFreeClassifierGuidance(network), noise=noise.to(dtype))
        assert out.sample.dtype == dtype
        near = 0.1 if dtype == torch.bfloat16 else 0.02
        torch.testing.assert_close(out.sample.double(), exact.sample, rtol=near, atol=near)


def test_an_imperfect_network_is_put_right_more_often():
    model, scheduler = zoo.load("tiny-class-ddpm-weak"), zoo.load("tiny-class-ddpm-weak", "scheduler")
    judge, y = zoo.load("judge-fashion"), torch.arange(60) % 10
    noise, right = random(60, 1, 28, 28, dtype=torch.float32), []
    for scale in (1.0, 5.0):
        guider = GradientFreeClassifierGuidance(zoo.load("tiny-resnet"), guidance_scale=scale)
        out, _ = run(guider, scheduler, model, noise, [y], steps=10)
        with torch.no_grad():
            right.append(int((judge(out.sample.clamp(-1, 1)).logits.argmax(1) == y).sum()))
    assert right[1] >= right[0] + 5


def test_guides_a_pipeline_whose_prompts_are_classes():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    network = ImageClassifier(zoo.load("judge-colour"), image_size=32)
    names = [network.model.config.id2label[k] for k in range(network.model.config.num_labels)]
    decode = lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample  # noqa: E731
    size = pipe.unet.config.sample_size
    noise = random(2, pipe.unet.config.in_channels, size, size, dtype=torch.float32)
    wanted, pictures, calls = torch.tensor([0, 5]), {}, {}
    for scale in (1.0, 3.0):
        guider = GradientFreeClassifierGuidance(
            network, wanted, decode=decode, guidance_scale=scale, confusion="constant", start=0.25
        )
        with guide.apply(pipe, guider, auxiliary=[f"a {name} bag" for name in names]) as counted:
            pictures[scale] = pipe(
                [f"a {names[k]} bag" for k in wanted.tolist()],
                num_inference_steps=4,
                guidance_scale=2.0,
                latents=noise,
                output_type="latent",
            ).images
        calls[scale] = counted.rows
    assert calls == {1.0: 2 * 4, 3.0: 2 * (4 + 3)}
    with torch.no_grad():
        lead = [
            float(network(decode(z).clamp(-1, 1)).log_softmax(1).gather(1, wanted[:, None]).mean())
            for z in (pictures[1.0], pictures[3.0])
        ]
    assert lead[1] > lead[0]


# ---- saving, and what is refused


def test_saved_and_loaded_it_guides_alike(tmp_path):
    given = {"guidance_scale": 4.0, "confusion": "miss", "temperature": 2.0, "threshold": 0.05, "start": 0.2}
    guider = GradientFreeClassifierGuidance(Small(), **given)
    guider.save_pretrained(tmp_path)
    loaded = GradientFreeClassifierGuidance.from_pretrained(tmp_path, classifier=Small())
    assert {name: loaded.config[name] for name in given} == given
    assert torch.equal(run(loaded)[0].sample, run(guider)[0].sample)
    assert torch.equal(run(guider.new())[0].sample, run(guider)[0].sample)
    assert torch.equal(run(guider.new(guidance_scale=1.0))[0].sample, run(None)[0].sample)
    bare = GradientFreeClassifierGuidance.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier is missing"):
        run(bare)


def test_bad_input_is_named(tiny_sd):
    network = Small()
    for name, values in {
        "guidance_scale": (0.5, math.nan, "3"),
        "confusion": ("entropy",),
        "temperature": (0.0, -1.0),
        "threshold": (-0.1,),
        "clip": (0.0,),
        "cfg_scale": (math.inf,),
        "start": (1.0,),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                GradientFreeClassifierGuidance(network, **{name: value})
    with pytest.raises(TypeError, match="classifier must be a callable"):
        GradientFreeClassifierGuidance(3)
    with pytest.raises(ValueError, match="eval mode"):
        GradientFreeClassifierGuidance(Small().train())
    small = ImageClassifier(zoo.load("tiny-resnet"), image_size=28)
    with pytest.raises(ValueError, match="expects images of 28 x 28, got 8 x 8"):
        run(GradientFreeClassifierGuidance(small, **ALWAYS), noise=random(3, 1, 8, 8, dtype=torch.float32))
    unit = ImageClassifier(zoo.load("tiny-resnet"), value_range=(0.0, 1.0))
    with pytest.raises(ValueError, match="expects values from 0 to 1, pictures are from -1 to 1: rescale"):
        run(GradientFreeClassifierGuidance(unit))
    with pytest.raises(ValueError, match="at least two classes"):
        run(GradientFreeClassifierGuidance(Small(classes=1), 0))
    with pytest.raises(ValueError, match=r"shape \(B, K\), got \(3, 1, 8, 8\)"):
        run(GradientFreeClassifierGuidance(lambda x: x))
    with pytest.raises(ValueError, match=r"labels must be from 0 to 4, .* got 0 to 7"):
        run(GradientFreeClassifierGuidance(network), conditions=[torch.tensor([0, 7, 1])])
    with pytest.raises(ValueError, match=r"labels must be one number or one for each of 3, got \(2,\)"):
        run(GradientFreeClassifierGuidance(network, [1, 2]))
    with pytest.raises(ValueError, match="needs one more"):
        run(GradientFreeClassifierGuidance(network, cfg_scale=2.0))
    model, conditions = tiny_sd
    with pytest.raises(ValueError, match=r"one further condition for each class .* 1 were given"):
        run(GradientFreeClassifierGuidance(Small(4), 1), None, model, random(3, 4, 8, 8), conditions(3, 3))
    guider = GradientFreeClassifierGuidance(network)
    for ask in (guider.prepare_inputs, lambda data: guider.prepare_inputs_from_block_state(data, {})):
        with pytest.raises(ValueError, match=r"needs the latents: use shoestring\.guide\.sample"):
            ask({})


def test_an_error_leaves_everything_as_it_was():
    network, scheduler = Small(), diffusers.DDIMScheduler()
    before, held = copy.deepcopy(network.state_dict()), repr(vars(scheduler))
    guider = GradientFreeClassifierGuidance(network, 7)
    with pytest.raises(ValueError, match="labels"):
        run(guider, scheduler)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert repr(vars(scheduler)) == held
    guider.labels = 2
    fresh = GradientFreeClassifierGuidance(Small(), 2)
    assert torch.equal(run(guider)[0].sample, run(fresh)[0].sample)
