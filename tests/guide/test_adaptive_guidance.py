"""Adaptive guidance: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser

from shoestring import guide, zoo
from shoestring.guide import adaptive_guidance as ag
from shoestring.guide._levels import noise_levels
from shoestring.guide.adaptive_guidance import AdaptiveGuidance, LinearAdaptiveGuidance, TrajectoryRecorder
from shoestring.guide.cfgpp import CFGPlusPlusGuidance
from shoestring.guide.perp_neg import PerpNegGuidance

from .conftest import random

T = 8
NULL = 7
SHAPE = (2, 4, 4)


def ddim(**config):
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **config)


class Toy:
    """Knows the noise of pictures: one for each label, that come together as the noise falls (merge), or stay apart."""

    def __init__(self, scheduler, *, merge=True, kind="epsilon", pictures=None):
        self.products, self.merge, self.kind = scheduler.alphas_cumprod.double(), merge, kind
        own = random(NULL + 1, *SHAPE, seed=5) * torch.arange(1, NULL + 2, dtype=torch.float64).reshape(-1, 1, 1, 1) / 4
        self.pictures = own if pictures is None else pictures
        self.common = random(*SHAPE, seed=6)

    def target(self, labels, sigma):
        return self.common + sigma**2 * self.pictures[labels] if self.merge else self.pictures[labels]

    def __call__(self, x, t, class_labels):
        a, s = (p.sqrt().reshape(-1, 1, 1, 1) for p in (self.products[t], 1 - self.products[t]))
        epsilon = (x - a * self.target(class_labels, s)) / s
        if self.kind == "epsilon":
            return epsilon
        x0 = self.target(class_labels, s)
        return x0 if self.kind == "sample" else a * epsilon - s * x0


LABELS = torch.tensor([0, 1, 2, 3, 4])
CONDITIONS = (LABELS, torch.full((5,), NULL))
NOISE = random(5, *SHAPE, seed=3)


def run(guider, *, model=None, scheduler=None, noise=NOISE, conditions=CONDITIONS, steps=T, **kwargs):
    scheduler = scheduler or ddim()
    return guide.sample(
        model or Toy(scheduler), scheduler, guider, noise, conditions, num_inference_steps=steps, **kwargs
    )


def traced(guider, **kwargs):
    """Also the latents before every step and after the last, and the predictions."""
    latents, predictions = [], []

    def keep(step, prediction, after):
        latents.append(step.sample)
        predictions.append(prediction)
        if step.index + 1 == step.num_inference_steps:
            latents.append(after)

    return run(guider, callback=keep, **kwargs), latents, predictions


def adaptive(threshold=0.9, space="x0", **kwargs):
    return AdaptiveGuidance(3.0, threshold, space=space, **kwargs)


def cfg_gammas(space="x0", **kwargs):
    guider = adaptive(2.0, space)
    run(guider, **kwargs)
    return torch.stack(guider.similarities)


def thresholds():
    """Between the values that are measured, so that every pattern of crossings occurs."""
    gammas = cfg_gammas().unique()
    return [-1.0, *((gammas[1:] + gammas[:-1]) / 2).tolist(), 2.0]


# ---- the mathematics


def test_cosine_is_that_of_each_sample():
    a, b = random(3, 2, 5), random(3, 2, 5, seed=1)
    rows = zip(a.reshape(3, -1).numpy(), b.reshape(3, -1).numpy(), strict=True)
    expected = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in rows]
    np.testing.assert_allclose(ag.cosine_similarity(a, b), expected, rtol=1e-12)
    assert torch.equal(ag.cosine_similarity(a, a), torch.ones(3, dtype=torch.float64))
    assert torch.equal(ag.cosine_similarity(a.float(), a.float()), torch.ones(3))
    torch.testing.assert_close(ag.cosine_similarity(a, -a), -torch.ones(3, dtype=torch.float64))
    assert bool(ag.cosine_similarity(torch.zeros(3, 2, 5), a.float()).isnan().all())


def test_cosine_is_invariant_to_a_common_positive_scale():
    a, b = random(3, 40), random(3, 40, seed=1)
    for scale in (1e-6, 0.3, 1e6):
        torch.testing.assert_close(ag.cosine_similarity(scale * a, scale * b), ag.cosine_similarity(a, b))


def test_cosine_of_half_precision_is_summed_in_float32():
    a, b = (1 + 0.1 * random(2, 70000, seed=s) for s in (0, 1))
    for dtype in (torch.float16, torch.bfloat16):
        found = ag.cosine_similarity(a.to(dtype), b.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), ag.cosine_similarity(a.to(dtype).double(), b.to(dtype).double()))


def in_three_spaces(r):
    """gamma at a signal r times the noise, where x0 are unit vectors of cosine 0.9 and x is of the first of them."""
    x0_c = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    x0_u = torch.tensor([[0.9, (1 - 0.81) ** 0.5, 0.0]], dtype=torch.float64)
    noise = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    b = 1 / (1 + r * r) ** 0.5
    a = r * b
    x = a * x0_c + b * noise
    e = [(x - a * x0) / b for x0 in (x0_c, x0_u)]
    return {s: float(ag.cosine_similarity(*(ag.in_space(p, x, a, b, s) for p in e))) for s in ag.SPACES}


@pytest.mark.parametrize(("r", "eps", "x_minus_eps"), [(0.02, 1.0, 0.9), (0.2, 0.996, 0.899), (1, 0.917, 0.846)])
def test_the_three_spaces_are_those_of_the_cards_toy(r, eps, x_minus_eps):
    """The card's figures are of random vectors; at r = 3 they differ from these orthogonal ones in the second digit."""
    found = in_three_spaces(r)
    assert found["x0"] == pytest.approx(0.9, abs=1e-12)
    assert found["eps"] == pytest.approx(1 / (1 + 0.2 * r * r) ** 0.5, abs=1e-12)
    assert found["eps"] == pytest.approx(eps, abs=0.01)
    assert found["x_minus_eps"] == pytest.approx(x_minus_eps, abs=0.01)


def test_x_minus_eps_does_not_depend_on_how_a_scheduler_scales():
    e, x, a, s = random(2, 6), random(2, 6, seed=1), 0.6, 0.8
    torch.testing.assert_close(ag.in_space(e, x, a, s, "x_minus_eps"), x - e)
    torch.testing.assert_close(ag.in_space(e, x / a, 1.0, s / a, "x_minus_eps"), x - e)
    with pytest.raises(ValueError, match="space must be one of eps, x_minus_eps, x0, got 'v'"):
        ag.in_space(e, x, a, s, "v")


@pytest.mark.parametrize("per_sample", [True, False], ids=["per sample", "whole batch"])
def test_chosen_threshold_is_the_highest_that_saves_enough(per_sample):
    gammas = torch.rand(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for saving in (0.1, 0.25, 0.4):
        chosen = ag.choose_threshold(gammas, saving, per_sample=per_sample)
        calls = {
            x: float(ag.calls_at(gammas, x, per_sample=per_sample).double().mean()) for x in gammas.flatten().tolist()
        }
        assert chosen == max(x for x, mean in calls.items() if mean <= 20 * (1 - saving))
    with pytest.raises(ValueError, match="no threshold saves 40%"):
        ag.choose_threshold(gammas, 0.4, min_guided_steps=9)
    with pytest.raises(ValueError, match=r"saving must be >= 0 and < 0\.5"):
        ag.choose_threshold(gammas, 0.5)
    with pytest.raises(ValueError, match=r"shape \(T, B\)"):
        ag.calls_at(gammas[0], 0.5)


# ---- AdaptiveGuidance


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_threshold_above_one_is_cfg_to_the_bit(fixture, scheduler, request):
    model, conditions = request.getfixturevalue(fixture)
    scheduler = getattr(diffusers, scheduler)()
    noise = random(2, 4, 8, 8)

    def images(guider):
        return guide.sample(model, scheduler, guider, noise, conditions(2), num_inference_steps=3)

    cfg = images(ClassifierFreeGuidance(3.0))
    for more in ({}, {"per_sample": True}, {"space": "x0"}, {"space": "x_minus_eps", "per_sample": True}):
        found = images(AdaptiveGuidance(3.0, threshold=1.01, **more))
        assert torch.equal(found.sample, cfg.sample)
        assert found.num_calls == 6


@pytest.mark.parametrize("fixture", ["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
def test_half_the_steps_are_saved_on_the_layouts_of_large_models(fixture, request):
    """Threshold -1 on random networks: the first step is CFG's, the others are the condition's."""
    model, conditions = request.getfixturevalue(fixture)
    noise = random(2, 4, 8, 8)
    scheduler = ddim()
    asked = []
    out = guide.sample(
        model,
        scheduler,
        AdaptiveGuidance(3.0, threshold=-1, per_sample=True),
        noise,
        conditions(2),
        num_inference_steps=3,
        callback=lambda step, prediction, after: asked.append((prediction, step.predict(0), step.predict(1))),
    )
    for i, (prediction, e_c, e_u) in enumerate(asked):
        torch.testing.assert_close(prediction, e_u + 3 * (e_c - e_u) if i == 0 else e_c, rtol=1e-10, atol=1e-10)
    assert out.num_calls == 2 + 1 + 1 + 3 * 2  # the callback's own


def test_on_the_zoos_garments_cfg_until_the_crossing_and_the_condition_afterwards():
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    noise = random(3, 1, 28, 28, dtype=torch.float32)
    options = {"noise": noise, "conditions": (torch.tensor([9, 0, 4]), torch.full((3,), 10)), "steps": 6}
    options |= {"model": model, "scheduler": scheduler}
    cfg, cfg_latents, _ = traced(ClassifierFreeGuidance(3.0), **options)
    full = adaptive(2.0)
    assert torch.equal(run(full, **options).sample, cfg.sample)
    threshold = ag.choose_threshold(full.similarities, 0.25, per_sample=False)
    guider = adaptive(threshold)
    out, latents, predictions = traced(guider, **options)
    k = int(guider.crossing_steps.max()) + 1
    assert 1 <= k <= 3
    assert out.num_calls == 6 + k
    assert all(torch.equal(latents[i], cfg_latents[i]) for i in range(k + 1))
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for i in range(k, 6):
            e_c = model(latents[i], scheduler.timesteps[i].expand(3), class_labels=options["conditions"][0]).sample
            torch.testing.assert_close(predictions[i], e_c)


@pytest.mark.parametrize("threshold", [-1.0, -5.0])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_lowest_threshold_guides_the_first_step_only(threshold, per_sample):
    guider = adaptive(threshold, "eps", per_sample=per_sample)
    out, latents, predictions = traced(guider)
    _, cfg_latents, _ = traced(ClassifierFreeGuidance(3.0))
    assert torch.equal(latents[1], cfg_latents[1])
    assert not torch.equal(latents[2], cfg_latents[2])
    scheduler = ddim()
    scheduler.set_timesteps(T)
    toy = Toy(scheduler)
    for x, t, prediction in zip(latents[1:], scheduler.timesteps[1:], predictions[1:], strict=False):
        assert torch.equal(prediction, toy(x, t.expand(5), LABELS))
    assert out.num_calls == T + 1
    assert guider.crossing_steps.tolist() == [0] * 5


@pytest.mark.parametrize("threshold", [-1.0, 0.9, 2.0])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_scale_one_is_conditional_whatever_the_threshold(threshold, per_sample):
    out = run(AdaptiveGuidance(1.0, threshold, per_sample=per_sample))
    assert torch.equal(out.sample, run(None).sample)
    assert out.num_calls == T


@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_calls_are_twice_the_guided_and_once_the_other_steps_and_grow_with_the_threshold(per_sample):
    gammas, before = cfg_gammas(), 0.0
    patterns = set()
    for threshold in thresholds():
        guider = adaptive(threshold, per_sample=per_sample)
        out = run(guider)
        crossing = guider.crossing_steps
        k = torch.where(crossing < 0, T, crossing + 1)
        k = k if per_sample else k.amax().expand(5)
        expected = float((2 * k + (T - k)).double().mean())
        assert out.num_calls == pytest.approx(expected, abs=1e-12)
        assert guider.num_function_evaluations == pytest.approx(expected, abs=1e-12)
        predicted = ag.calls_at(gammas, threshold, per_sample=per_sample)
        assert predicted.tolist() == (T + k).tolist()
        assert out.num_calls >= before
        before = out.num_calls
        patterns.add(tuple(k.tolist()))
    assert len(patterns) >= (10 if per_sample else 5)  # the samples do cross at different steps


def conditional_from(latents, step):
    """DDIM on the condition alone, written out."""
    scheduler = ddim()
    scheduler.set_timesteps(T)
    toy = Toy(scheduler)
    for t in scheduler.timesteps[step:]:
        latents = scheduler.step(toy(latents, t.expand(len(latents)), LABELS), t, latents).prev_sample
    return latents


def test_before_the_crossing_cfg_exactly_and_afterwards_conditional_from_there():
    _, cfg_latents, _ = traced(ClassifierFreeGuidance(3.0))
    for threshold in thresholds()[1:-1:4]:
        guider = adaptive(threshold)
        out, latents, _ = traced(guider)
        last = int(guider.crossing_steps.max()) if bool((guider.crossing_steps >= 0).all()) else T - 1
        for i in range(last + 2):
            assert torch.equal(latents[i], cfg_latents[i])
        torch.testing.assert_close(out.sample, conditional_from(latents[last + 1], last + 1), rtol=1e-12, atol=1e-12)


def test_per_sample_each_sample_stops_at_its_own_crossing():
    _, cfg_latents, _ = traced(ClassifierFreeGuidance(3.0))
    guider = adaptive(thresholds()[14], per_sample=True)
    out, latents, _ = traced(guider)
    k = torch.where(guider.crossing_steps < 0, T, guider.crossing_steps + 1).tolist()
    assert len(set(k)) >= 3
    for b in range(5):
        for i in range(k[b] + 1):
            torch.testing.assert_close(latents[i][b], cfg_latents[i][b], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.sample[b], conditional_from(latents[k[b]], k[b])[b], rtol=1e-12, atol=1e-12)


def test_per_sample_a_batch_is_as_its_samples_one_by_one():
    threshold = thresholds()[14]
    guider = adaptive(threshold, per_sample=True)
    whole = run(guider)
    for b in range(5):
        single = adaptive(threshold)
        part = slice(b, b + 1)
        one = run(single, noise=NOISE[part], conditions=[c[part] for c in CONDITIONS])
        torch.testing.assert_close(one.sample, whole.sample[part], rtol=1e-12, atol=1e-12)
        assert single.crossing_steps[0] == guider.crossing_steps[b]


def test_measured_gamma_is_of_each_sample_alone():
    whole = cfg_gammas()
    for b in range(5):
        part = slice(b, b + 1)
        alone = cfg_gammas(noise=NOISE[part], conditions=[c[part] for c in CONDITIONS])
        torch.testing.assert_close(alone, whole[:, part], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_equal_predictions_cross_at_step_0_and_are_cfg(per_sample, tiny_sd):
    guider = adaptive(1.0, "eps", per_sample=per_sample)
    out = run(guider, conditions=(LABELS, LABELS))
    assert guider.crossing_steps.tolist() == [0] * 5
    assert torch.equal(out.sample, run(ClassifierFreeGuidance(3.0), conditions=(LABELS, LABELS)).sample)
    model, conditions = tiny_sd
    text = conditions(2, 1)[0]
    guider = adaptive(1.0, "eps", per_sample=per_sample)
    guide.sample(model, ddim(), guider, random(2, 4, 8, 8), (text, text), num_inference_steps=2)
    assert guider.crossing_steps.tolist() == [0, 0]


def test_the_chosen_space_is_measured():
    """In a toy whose pictures stay apart: constant in x0, and elsewhere as the latents say."""
    pictures = torch.zeros(NULL + 1, *SHAPE, dtype=torch.float64)
    pictures.flatten(1)[:, 0], pictures.flatten(1)[:, 1] = 0.9, (1 - 0.81) ** 0.5
    pictures[NULL] = 0
    pictures[NULL].flatten()[0] = 1
    scheduler = ddim()
    toy = Toy(scheduler, merge=False, pictures=pictures)
    _, latents, _ = traced(ClassifierFreeGuidance(3.0), model=toy)
    scheduler.set_timesteps(T)
    alphas, sigmas = noise_levels(scheduler)
    gammas = {space: cfg_gammas(space, model=toy) for space in ag.SPACES}
    torch.testing.assert_close(gammas["x0"], torch.full((T, 5), 0.9, dtype=torch.float64))
    for i, (a, s) in enumerate(zip(alphas[:-1].tolist(), sigmas[:-1].tolist(), strict=True)):
        e_c, e_u = ((latents[i] - a * pictures[c]) / s for c in CONDITIONS)
        cosine = torch.nn.functional.cosine_similarity
        torch.testing.assert_close(gammas["eps"][i], cosine(e_c.flatten(1), e_u.flatten(1)))
        d_c, d_u = latents[i] - e_c, latents[i] - e_u
        torch.testing.assert_close(gammas["x_minus_eps"][i], cosine(d_c.flatten(1), d_u.flatten(1)))
    assert len({round(float(gammas[space][3, 0]), 3) for space in ag.SPACES}) == 3


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("space", ag.SPACES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_velocities_and_pictures_are_compared_as_noise_predictions_are(kind, space, per_sample):
    scheduler = ddim(prediction_type=kind)
    expected = cfg_gammas(space)
    guider = adaptive(2.0, space, per_sample=per_sample)
    run(guider, scheduler=scheduler, model=Toy(scheduler, kind=kind))
    torch.testing.assert_close(torch.stack(guider.similarities), expected, rtol=1e-8, atol=1e-8)


def test_flow_predictions_are_compared_as_noise_predictions_are():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pictures = random(2, *SHAPE, seed=5)

    def flow(x, t, class_labels):
        s = (t / 1000).double().reshape(-1, 1, 1, 1)
        return (x - pictures[class_labels]) / s  # eps - x0 = (x - x0) / s

    labels = (torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long))
    expected = ag.cosine_similarity(pictures[:1], pictures[1:])
    found = cfg_gammas("x0", model=flow, scheduler=scheduler, noise=random(3, *SHAPE), conditions=labels)
    torch.testing.assert_close(found, expected.expand(T, 3), rtol=1e-5, atol=1e-5)
    found = cfg_gammas("eps", model=flow, scheduler=scheduler, noise=random(3, *SHAPE), conditions=labels)
    torch.testing.assert_close(found[0], torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_min_guided_steps_keeps_the_first_steps_guided():
    for least in (1, 3, T):
        guider = adaptive(-1.0, min_guided_steps=least)
        assert run(guider).num_calls == T + least
        assert guider.crossing_steps.tolist() == [least - 1] * 5
        assert ag.calls_at(cfg_gammas(), -1.0, min_guided_steps=least).tolist() == [T + least] * 5


def test_start_and_stop_are_those_of_cfg():
    for start, stop in ((0.25, 1.0), (0.0, 0.5)):
        cfg = run(ClassifierFreeGuidance(3.0, start=start, stop=stop))
        out = run(adaptive(2.0, start=start, stop=stop))
        assert torch.equal(out.sample, cfg.sample)
        assert out.num_calls == cfg.num_calls < 2 * T
    guider = adaptive(-1.0, start=0.25)
    assert run(guider).num_calls == T + 1
    assert guider.crossing_steps.tolist() == [2] * 5


def test_guidance_rescale_is_that_of_cfg():
    cfg = run(ClassifierFreeGuidance(3.0, guidance_rescale=0.7)).sample
    assert torch.equal(run(adaptive(2.0, guidance_rescale=0.7)).sample, cfg)
    assert not torch.equal(cfg, run(ClassifierFreeGuidance(3.0)).sample)


@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_a_second_run_is_as_with_a_fresh_guider(per_sample):
    threshold = thresholds()[14]
    guider = adaptive(threshold, per_sample=per_sample)
    other = random(3, *SHAPE, seed=8)
    for noise, conditions in ((NOISE, CONDITIONS), (other, [c[:3] for c in CONDITIONS]), (NOISE, CONDITIONS)):
        fresh = adaptive(threshold, per_sample=per_sample)
        again, new = (run(g, noise=noise, conditions=conditions) for g in (guider, fresh))
        assert torch.equal(again.sample, new.sample)
        assert again.num_calls == new.num_calls
        assert guider.crossing_steps.tolist() == fresh.crossing_steps.tolist()
        assert len(guider.similarities) == len(fresh.similarities)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one batch"])
def test_multistep_solvers_switch_deterministically(together):
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.register_to_config(final_sigmas_type="zero")
    model = Toy(scheduler)
    threshold = 0.95
    one, two = (
        run(adaptive(threshold), model=model, scheduler=scheduler, batch_branches=together).sample for _ in (0, 1)
    )
    assert torch.equal(one, two)
    assert bool(one.isfinite().all())


def test_second_order_solvers_decide_once_a_step():
    """Heun asks twice a step: guided in both or in none of the two."""
    scheduler = diffusers.HeunDiscreteScheduler()
    model = Toy(scheduler)
    scheduler.set_timesteps(T)
    expected = len(scheduler.timesteps)
    seen = set()
    for threshold in (-1.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99):
        conditional = []
        guider = adaptive(threshold)
        run(
            guider,
            model=lambda x, t, class_labels: model(x, t.long(), class_labels),
            scheduler=scheduler,
            callback=lambda step, p, _, kept=conditional: kept.append(torch.equal(p, step.predict(0))),
        )
        assert len(conditional) == expected
        first = conditional.index(True) if True in conditional else expected
        assert all(conditional[first:])
        assert first % 2 == 0 or first == expected
        seen.add(first)
    assert len(seen) >= 3


def test_second_order_solvers_finish_a_step_that_crosses_in_its_first_half():
    guider = adaptive(0.5, "eps")
    guider.set_scheduler(diffusers.HeunDiscreteScheduler())
    asked = []
    for i, similar in enumerate([-1.0, -1.0, 1.0, -1.0, -1.0, -1.0]):
        guider.set_state(i, 6, torch.tensor(6 - i))
        asked.append(guider.num_conditions)
        guider.forward(torch.ones(1, 3), torch.full((1, 3), similar) if asked[-1] == 2 else None)
    assert asked == [2, 2, 2, 2, 1, 1]
    assert guider.crossing_steps.tolist() == [2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: adaptive(thresholds()[14]),
        lambda: adaptive(thresholds()[14], per_sample=True),
        lambda: LinearAdaptiveGuidance(3.0).fit([affine_trajectory()]),
    ],
    ids=["whole batch", "per sample", "linear"],
)
def test_an_interrupted_run_leaves_nothing_behind(make):
    class Interrupted(Exception):
        pass

    def interrupt(step, prediction, after):
        if step.index == 5:
            raise Interrupted

    guider = make()
    with pytest.raises(Interrupted):
        run(guider, noise=NOISE[:2], conditions=[c[:2] for c in CONDITIONS], callback=interrupt)
    assert torch.equal(run(guider).sample, run(make()).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_dtype_is_kept_and_gamma_is_float32(dtype, per_sample):
    guider = AdaptiveGuidance(3.0, 0.0, space="x0", per_sample=per_sample)
    scheduler = ddim()
    toy = Toy(scheduler)
    out = run(
        guider, model=lambda x, t, class_labels: toy(x.double(), t, class_labels).to(dtype), noise=NOISE.to(dtype)
    )
    assert out.sample.dtype == dtype
    assert guider.similarities[0].dtype == torch.float32
    assert bool(out.sample.isfinite().all())


def test_nan_never_counts_as_crossed():
    guider = adaptive(0.5, "eps")
    guider.set_state(0, 2, torch.tensor(1))
    guider.forward(torch.full((1, 3), float("nan")), torch.ones(1, 3))
    guider.set_state(1, 2, torch.tensor(0))
    assert guider.num_conditions == 2


# ---- other guiders inside


AUXILIARY = (*CONDITIONS, torch.tensor([5, 5, 6, 6, 5]))


@pytest.mark.parametrize("per_sample", [False, True], ids=["whole batch", "per sample"])
def test_perp_neg_can_be_adaptive(per_sample):
    def perp():
        return PerpNegGuidance(3.0, weights=[-1.0])

    plain, latents, _ = traced(perp(), conditions=AUXILIARY)
    never = run(AdaptiveGuidance(threshold=2, inner=perp(), space="x0", per_sample=per_sample), conditions=AUXILIARY)
    assert torch.equal(never.sample, plain.sample)
    assert never.num_calls == 3 * T
    gammas = cfg_gammas_of(latents)
    threshold = float(gammas.unique()[16:18].mean())
    guider = AdaptiveGuidance(threshold=threshold, inner=perp(), space="x0", per_sample=per_sample)
    out = run(guider, conditions=AUXILIARY)
    k = torch.where(guider.crossing_steps < 0, T, guider.crossing_steps + 1)
    assert (k.unique() > 1).any()
    assert k.tolist() == (ag.calls_at(gammas, threshold) - T).tolist()
    k = k if per_sample else k.amax().expand(5)
    assert out.num_calls == pytest.approx(float((3 * k + (T - k)).double().mean()))


def cfg_gammas_of(latents):
    """The smallest cosine, in x0, between the prompt's prediction and the others', at these latents."""
    scheduler = ddim()
    scheduler.set_timesteps(T)
    toy = Toy(scheduler)
    sigmas = noise_levels(scheduler)[1]
    rows = []
    for s in sigmas[:T].tolist():
        c, u, n = (toy.target(labels, s) for labels in AUXILIARY)
        rows.append(torch.minimum(ag.cosine_similarity(c, u), ag.cosine_similarity(c, n)))
    return torch.stack(rows)


def test_other_guiders_of_diffusers_can_be_adaptive():
    for inner in (ClassifierFreeZeroStarGuidance(3.0), AdaptiveProjectedGuidance(3.0, None, eta=0.5)):
        plain = run(copy.deepcopy(inner)).sample
        for per_sample in (False, True):
            guider = AdaptiveGuidance(threshold=2, inner=inner, per_sample=per_sample)
            assert torch.equal(run(guider).sample, plain)


class AsksItself(ClassifierFreeGuidance):
    def predict(self, step):
        return step.predict(0)


@pytest.mark.parametrize(
    ("inner", "per_sample", "reason"),
    [
        (lambda: CFGPlusPlusGuidance(0.6), False, r"CFGPlusPlusGuidance: CFG\+\+ renoises with the unconditional"),
        (lambda: AdaptiveGuidance(), False, "adaptive already"),
        (lambda: LinearAdaptiveGuidance(), False, "adaptive already"),
        (lambda: AsksItself(), False, "asks the network itself"),
        (lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]), False, "changed network"),
        (lambda: AdaptiveProjectedGuidance(3.0, 0.5), True, "momentum"),
        (lambda: PerpNegGuidance(3.0, [[-1.0, -2.0]]), True, "one for each image"),
    ],
    ids=["CFG++", "adaptive", "linear", "asks itself", "skips layers", "momentum", "weights"],
)
def test_guiders_that_cannot_be_switched_off_are_refused_with_a_reason(inner, per_sample, reason):
    with pytest.raises(ValueError, match=reason):
        AdaptiveGuidance(inner=inner(), per_sample=per_sample)


def test_options_go_to_one_of_the_two():
    with pytest.raises(ValueError, match="those of inner"):
        AdaptiveGuidance(3.0, inner=PerpNegGuidance(3.0))
    with pytest.raises(TypeError, match="inner must be a guider"):
        AdaptiveGuidance(inner=torch.nn.Identity())


# ---- LinearAdaptiveGuidance


class Affine:
    """Predictions p_t x + m and r_t x + n: the unconditional one is a fixed linear combination of past ones."""

    def __init__(self):
        self.m, self.n = random(1, *SHAPE, seed=20), random(1, *SHAPE, seed=21)

    def __call__(self, x, t, class_labels):
        angle = t.double().reshape(-1, 1, 1, 1) / 100
        conditional = 0.6 * x + 0.3 * torch.sin(angle) * x + self.m
        unconditional = 0.5 * x + 0.2 * torch.cos(angle) * x + self.n
        return torch.where(class_labels.reshape(-1, 1, 1, 1) == NULL, unconditional, conditional)


def affine_trajectory(seed=3):
    recorder = TrajectoryRecorder(3.0)
    run(recorder, model=Affine(), noise=random(5, *SHAPE, seed=seed))
    return recorder.trajectory


def gaussian(steps=5, batch=40, seed=0):
    return tuple(random(steps, batch, 3, 4, seed=seed + i) for i in (0, 1))


def test_recorder_is_cfg_and_keeps_its_predictions():
    recorder = TrajectoryRecorder(3.0)
    out, latents, _ = traced(recorder)
    cfg = run(ClassifierFreeGuidance(3.0))
    assert torch.equal(out.sample, cfg.sample)
    e_c, e_u = recorder.trajectory
    scheduler = ddim()
    scheduler.set_timesteps(T)
    toy = Toy(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        assert torch.equal(e_c[i], toy(latents[i], t.expand(5), LABELS))
        assert torch.equal(e_u[i], toy(latents[i], t.expand(5), CONDITIONS[1]))
    run(recorder, noise=NOISE[:2], conditions=[c[:2] for c in CONDITIONS])
    assert recorder.trajectory[0].shape == (T, 2, *SHAPE)
    with pytest.raises(ValueError, match="guided at every step"):
        run(TrajectoryRecorder(3.0, stop=0.5))
    with pytest.raises(ValueError, match="nothing was recorded"):
        _ = TrajectoryRecorder(3.0).trajectory


def test_coefficients_are_those_of_least_squares_on_the_pixels():
    e_c, e_u = gaussian()
    b = ag.fit_linear(ag.gram_matrix(e_c, e_u), ridge=0)
    for i in range(5):
        X = torch.stack([*e_c[: i + 1], *e_u[:i]]).flatten(1).T.numpy()
        expected = np.linalg.lstsq(X, e_u[i].flatten().numpy(), rcond=None)[0]
        np.testing.assert_allclose(torch.cat([b[i, : i + 1, 0], b[i, :i, 1]]), expected, rtol=1e-10, atol=1e-10)
        assert not bool(b[i, i + 1 :].any())
        assert float(b[i, i, 1]) == 0


def test_ridge_is_relative_to_the_mean_square():
    e_c, e_u = gaussian()
    for scale in (1.0, 100.0):
        G = ag.gram_matrix(scale * e_c, scale * e_u)
        b = ag.fit_linear(G, ridge=0.1)
        corner = G[:5, :5] + 0.1 * G[:5, :5].diagonal().mean() * torch.eye(5)
        torch.testing.assert_close(b[2].flatten()[:5], torch.linalg.solve(corner, G[:5, 5]))


def test_streaming_equals_the_fit_at_once():
    e_c, e_u = gaussian()
    once = LinearAdaptiveGuidance().fit([(e_c, e_u)])
    listed = LinearAdaptiveGuidance().fit((c, u) for c, u in zip(e_c.split(7, 1), e_u.split(7, 1), strict=True))
    parts = LinearAdaptiveGuidance()
    for c, u in zip(e_c.split(11, 1), e_u.split(11, 1), strict=True):
        parts.partial_fit(c, u)
    for other in (listed, parts):
        torch.testing.assert_close(other.coef_, once.coef_, rtol=1e-10, atol=1e-10)
    assert listed.fit([(e_c, e_u)]).gram_.equal(once.gram_)  # fit forgets


def test_blocks_of_pixels_add_up(monkeypatch):
    e_c, e_u = gaussian()
    whole = ag.gram_matrix(e_c, e_u)
    v = torch.stack([e_c, e_u], 1).reshape(10, -1)
    torch.testing.assert_close(whole, v @ v.T, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("shoestring.guide._linear_adaptive.BLOCK", 37)
    torch.testing.assert_close(ag.gram_matrix(e_c, e_u), whole, rtol=1e-12, atol=1e-12)


def test_a_linear_recursion_is_fitted_exactly():
    guider = LinearAdaptiveGuidance(3.0, ridge=0).fit([affine_trajectory()])
    assert float(guider.residual_[1:].max()) < 1e-6  # a difference of squares
    e_c, e_u = affine_trajectory(seed=9)  # other samples of the same recursion
    for i in range(1, T):
        history = torch.stack([e_c[: i + 1], e_u[: i + 1]], 1)
        torch.testing.assert_close(
            ag.estimate_unconditional(guider.coef_[i, : i + 1], history), e_u[i], rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("guided_steps", ["alternate", [True] + [False] * (T - 1)], ids=["alternate", "first only"])
def test_on_a_linear_recursion_sampling_equals_cfg(guided_steps):
    guider = LinearAdaptiveGuidance(3.0, guided_steps, ridge=0).fit([affine_trajectory()])
    noise = random(5, *SHAPE, seed=11)
    out = run(guider, model=Affine(), noise=noise)
    cfg = run(ClassifierFreeGuidance(3.0), model=Affine(), noise=noise)
    assert float((out.sample - cfg.sample).abs().max()) < 1e-8
    assert out.num_calls == T + (2 if guided_steps == "alternate" else 1)


def test_residual_is_the_distance_to_the_estimate():
    e_c, e_u = gaussian()
    guider = LinearAdaptiveGuidance(ridge=0.01).fit([(e_c, e_u)])
    for i in range(5):
        history = torch.stack([e_c[: i + 1], e_u[: i + 1]], 1)
        off = ag.estimate_unconditional(guider.coef_[i, : i + 1], history) - e_u[i]
        torch.testing.assert_close(guider.residual_[i], off.norm() / e_u[i].norm(), rtol=1e-8, atol=1e-8)


def test_all_guided_is_cfg_to_the_bit_and_needs_no_fit():
    out = run(LinearAdaptiveGuidance(3.0, [True] * T))
    assert torch.equal(out.sample, run(ClassifierFreeGuidance(3.0)).sample)
    assert out.num_calls == 2 * T


def test_estimates_stand_in_for_what_was_not_computed():
    """Written out: later regressors are estimates, and each estimated step is guided by its own."""
    e_c, e_u = affine_trajectory()
    guider = LinearAdaptiveGuidance(3.0, [True, False, False, True, False, True, False, False]).fit([(e_c, e_u)])
    b = guider.coef_
    noise = random(5, *SHAPE, seed=13)
    scheduler = ddim()
    scheduler.set_timesteps(T)
    x, model, cs, us = noise, Affine(), [], []
    for i, t in enumerate(scheduler.timesteps):
        cs.append(model(x, t.expand(5), LABELS))
        if i in (0, 3, 5):
            us.append(model(x, t.expand(5), CONDITIONS[1]))
        else:
            us.append(sum(b[i, j, 0] * cs[j] for j in range(i + 1)) + sum(b[i, j, 1] * us[j] for j in range(i)))
        x = scheduler.step(us[i] + 3 * (cs[i] - us[i]), t, x).prev_sample
    torch.testing.assert_close(run(guider, model=model, noise=noise).sample, x, rtol=1e-9, atol=1e-9)


def test_twenty_steps_take_twenty_five_calls():
    for half in ("estimate", "conditional"):
        schedule = ag.linear_schedule(20, second_half=half)
        assert schedule[:10] == ["cfg", "estimate"] * 5
        assert schedule[10:] == [half] * 10
        assert sum(2 if what == "cfg" else 1 for what in schedule) == 25
    recorder = TrajectoryRecorder(3.0)
    run(recorder, steps=20)
    guider = LinearAdaptiveGuidance(3.0, second_half="conditional").fit([recorder.trajectory])
    kept = []
    out = run(guider, steps=20, callback=lambda step, p, _: kept.append(torch.equal(p, step.predict(0))))
    assert out.num_calls == 25 + 20  # the callback's own
    assert kept == [False] * 10 + [True] * 10


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one batch"])
def test_linear_a_second_run_is_as_with_a_fresh_guider(together):
    guider = LinearAdaptiveGuidance(3.0).fit([affine_trajectory()])
    for noise in (NOISE, random(5, *SHAPE, seed=8)):
        fresh = LinearAdaptiveGuidance(3.0).fit([affine_trajectory()])
        assert torch.equal(
            run(guider, noise=noise, batch_branches=together).sample,
            run(fresh, noise=noise, batch_branches=together).sample,
        )


def test_linear_scale_one_and_disabled_are_conditional():
    for guider in (LinearAdaptiveGuidance(1.0), LinearAdaptiveGuidance(3.0, enabled=False)):
        out = run(guider)
        assert torch.equal(out.sample, run(None).sample)
        assert out.num_calls == T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_keeps_half_precision_and_sums_in_float32(dtype):
    guider = LinearAdaptiveGuidance(3.0).fit([affine_trajectory()])
    model = Affine()
    out = run(
        guider, model=lambda x, t, class_labels: model(x.double(), t, class_labels).to(dtype), noise=NOISE.to(dtype)
    )
    assert out.sample.dtype == dtype
    c, u = random(2, 3, dtype=torch.float32).to(dtype), random(2, 3, seed=1, dtype=torch.float32).to(dtype)
    guider.set_state(0, T, torch.tensor(5))
    guider.forward(c, u)
    assert guider._history.dtype == torch.float32


# ---- pipelines of diffusers


def denoise_block(guider, unet, text, steps, noise):
    """The loop of SDXL's modular pipeline, with its own denoiser block."""
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    (cond, uncond), calls = text, []

    def counted(*args, **kwargs):
        calls.append(1)
        return unet(*args, **kwargs)

    components = SimpleNamespace(guider=guider, unet=counted)
    block = StableDiffusionXLLoopDenoiser()
    state = SimpleNamespace(
        prompt_embeds=cond["encoder_hidden_states"],
        negative_prompt_embeds=uncond["encoder_hidden_states"],
        pooled_prompt_embeds=cond["added_cond_kwargs"]["text_embeds"],
        negative_pooled_prompt_embeds=uncond["added_cond_kwargs"]["text_embeds"],
        add_time_ids=cond["added_cond_kwargs"]["time_ids"],
        negative_add_time_ids=uncond["added_cond_kwargs"]["time_ids"],
        num_inference_steps=steps,
        timestep_cond=None,
        cross_attention_kwargs=None,
        latents=noise,
    )
    for i, t in enumerate(scheduler.timesteps):
        state.scaled_latents = scheduler.scale_model_input(state.latents, t)
        components, state = block(components, state, i, t)
        state.latents = scheduler.step(state.noise_pred, t, state.latents).prev_sample
    return state.latents, len(calls)


def test_modular_pipelines_run_it_and_save_the_calls(tiny_sdxl_unet):
    unet, conditions = tiny_sdxl_unet
    text, noise = conditions(2), random(2, 4, 8, 8)
    recorder = TrajectoryRecorder(3.0)
    guide.sample(unet, ddim(), recorder, noise, text, num_inference_steps=4)
    linear = LinearAdaptiveGuidance(3.0).fit([recorder.trajectory])
    for guider, expected in (
        (AdaptiveGuidance(3.0, 2.0), 8),
        (AdaptiveGuidance(3.0, -1.0), 5),
        (AdaptiveGuidance(3.0, -1.0, min_guided_steps=2), 6),
        (linear, 5),
    ):
        ours = guide.sample(unet, ddim(), guider, noise, text, num_inference_steps=4)
        for _ in (0, 1):
            assert guider.num_conditions == 2  # else the pipeline would encode no negative prompt for the next run
            latents, calls = denoise_block(guider, unet, text, 4, noise)
            torch.testing.assert_close(latents, ours.sample, rtol=1e-10, atol=1e-10)
            assert calls == expected == ours.num_calls


def test_modular_pipelines_are_told_what_needs_the_latents(tiny_sdxl_unet):
    unet, conditions = tiny_sdxl_unet
    for guider in (AdaptiveGuidance(3.0, space="x0"), AdaptiveGuidance(3.0, per_sample=True)):
        with pytest.raises(ValueError, match=r"needs the latents: use shoestring\.guide\.sample or"):
            denoise_block(guider, unet, conditions(2), 4, random(2, 4, 8, 8))


@pytest.fixture(scope="module")
def t2i():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, steps=4):
    noise = random(2, 4, 16, 16, dtype=torch.float32)
    prompts = ["a large red bag", "a small blue shirt"]
    return pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, latents=noise, output_type="latent").images


def state_of(pipe):
    return (
        {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()},
        dict(pipe.scheduler.config),
        {name: type(one) for name, one in pipe.unet.attn_processors.items()},
        {*vars(pipe.unet)},
        {*vars(pipe.scheduler)},
        {*vars(pipe)},
    )


def test_in_a_classic_pipeline_and_nothing_of_it_is_left_changed(t2i):
    with guide.apply(t2i, ClassifierFreeGuidance(3.0)):
        cfg = pictures(t2i)
    before = state_of(t2i)
    with guide.apply(t2i, AdaptiveGuidance(3.0, 2.0)) as calls:
        assert torch.equal(pictures(t2i), cfg)
        assert calls.rows == 2 * 2 * 4
    for per_sample in (False, True):
        with guide.apply(t2i, AdaptiveGuidance(3.0, -1.0, per_sample=per_sample, min_guided_steps=2)) as calls:
            assert not torch.equal(pictures(t2i), cfg)
            assert calls.rows == 2 * (4 + 2)
    recorder = TrajectoryRecorder(3.0)
    with guide.apply(t2i, recorder):
        pictures(t2i)
    with guide.apply(t2i, LinearAdaptiveGuidance(3.0).fit([recorder.trajectory])) as calls:
        pictures(t2i)
        assert calls.rows == 2 * 5
    with pytest.raises(ValueError, match="fitted for 4 steps, got num_inference_steps=3"), \
        guide.apply(t2i, LinearAdaptiveGuidance(3.0).fit([recorder.trajectory])):  # fmt: skip
        pictures(t2i, steps=3)
    after = state_of(t2i)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())
    assert before[1:] == after[1:]


# ---- files


@pytest.mark.parametrize("guider", [AdaptiveGuidance, LinearAdaptiveGuidance], ids=["adaptive", "linear"])
def test_a_copy_keeps_what_was_given_by_position(guider):
    assert guider(3.0).new().guidance_scale == 3.0


def test_configuration_is_saved_and_loaded(tmp_path):
    guider = AdaptiveGuidance(4.0, 0.98, 0.1, "x0", True, 3, start=0.1, stop=0.9)
    guider.save_pretrained(tmp_path)
    loaded = AdaptiveGuidance.from_pretrained(tmp_path)
    plain = {name: value for name, value in guider.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in plain} == plain
    assert (loaded.threshold, loaded.space, loaded.per_sample, loaded.min_guided_steps) == (0.98, "x0", True, 3)
    assert loaded.inner.guidance_scale == 4.0
    assert torch.equal(run(loaded).sample, run(guider).sample)


def test_an_inner_guider_is_saved_and_loaded(tmp_path):
    guider = AdaptiveGuidance(threshold=0.97, space="x0", inner=PerpNegGuidance(3.0, [-1.5]))
    guider.save_pretrained(tmp_path)
    for loaded in (AdaptiveGuidance.from_pretrained(tmp_path), guider.new()):
        assert isinstance(loaded.inner, PerpNegGuidance)
        assert loaded.inner is not guider.inner
        assert (loaded.inner.guidance_scale, loaded.inner.weights, loaded.threshold) == (3.0, [-1.5], 0.97)
        assert torch.equal(run(loaded, conditions=AUXILIARY).sample, run(guider, conditions=AUXILIARY).sample)
    path = tmp_path / "guider_config.json"
    config = json.loads(path.read_text())
    for module, name in (("os", "system"), ("shoestring.guide._ssim", "ssim")):
        config["inner"] |= {"_module": module, "_class_name": name}
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"inner must be .*{name}"):
            AdaptiveGuidance.from_pretrained(tmp_path)


def test_coefficients_are_saved_and_loaded(tmp_path):
    e_c, e_u = affine_trajectory()
    guider = LinearAdaptiveGuidance(3.0, [True, True] + [False] * 6, ridge=1e-5).fit([(e_c, e_u)])
    guider.save_pretrained(tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"guider_config.json", "guider_coefficients.safetensors"}
    loaded = LinearAdaptiveGuidance.from_pretrained(tmp_path / "new")
    assert torch.equal(run(loaded).sample, run(guider).sample)
    assert loaded.guided_steps == guider.guided_steps
    assert loaded.ridge == 1e-5
    torch.testing.assert_close(loaded.residual_, guider.residual_)
    more = affine_trajectory(seed=30)
    torch.testing.assert_close(
        loaded.partial_fit(*more).coef_, LinearAdaptiveGuidance(ridge=1e-5).fit([(e_c, e_u), more]).coef_
    )
    LinearAdaptiveGuidance(3.0).save_pretrained(tmp_path / "new")  # no coefficients of the one before are left
    assert LinearAdaptiveGuidance.from_pretrained(tmp_path / "new").coef_ is None


def test_damaged_coefficients_are_named(tmp_path):
    LinearAdaptiveGuidance(3.0).fit([gaussian()]).save_pretrained(tmp_path)
    path = tmp_path / "guider_coefficients.safetensors"
    whole = path.read_bytes()
    for damage, message in ((whole[:100], "holds no coefficients"), (b"", "holds no coefficients")):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            LinearAdaptiveGuidance.from_pretrained(tmp_path)
    from safetensors.torch import save_file

    for held, message in (
        ({"coef": torch.zeros(3, 3, 2)}, "holds no coefficients"),
        ({"coef": torch.zeros(3, 3, 2), "gram": torch.zeros(4, 4)}, r"got \(4, 4\)"),
        ({"coef": torch.full((2, 2, 2), float("nan")), "gram": torch.zeros(4, 4)}, "finite"),
    ):
        save_file(held, path)
        with pytest.raises(ValueError, match=message):
            LinearAdaptiveGuidance.from_pretrained(tmp_path)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"threshold": "0.9"}, "threshold must be a finite number, got '0.9'"),
        ({"threshold": float("inf")}, "threshold must be a finite number"),
        ({"space": "v"}, "space must be one of eps, x_minus_eps, x0, got 'v'"),
        ({"min_guided_steps": 0}, "min_guided_steps must be a whole number >= 1, got 0"),
        ({"min_guided_steps": 1.5}, "min_guided_steps must be"),
        ({"start": 1.5}, "start"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveGuidance(**options)


def test_a_missing_unconditional_prediction_is_named():
    for guider in (
        AdaptiveGuidance(3.0),
        AdaptiveGuidance(3.0, per_sample=True),
        LinearAdaptiveGuidance(3.0, [True] * T),
    ):
        with pytest.raises(ValueError, match="more than the 1 conditions"):
            run(guider, conditions=(LABELS,))
    for guider in (AdaptiveGuidance(3.0), LinearAdaptiveGuidance(3.0, [True] * T)):
        with pytest.raises(ValueError, match="pred_uncond is missing"):
            guider.forward(torch.ones(1, 3))


def test_bad_linear_input_is_named():
    e_c, e_u = gaussian()
    for options, message in (
        ({"guided_steps": "often"}, "guided_steps must be"),
        ({"second_half": "none"}, "second_half must be"),
        ({"ridge": -1.0}, "ridge must be a finite number >= 0, got -1.0"),
        ({"guidance_scale": "3"}, "guidance_scale must be"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearAdaptiveGuidance(**options)
    with pytest.raises(ValueError, match="not fitted: call fit or from_pretrained"):
        run(LinearAdaptiveGuidance(3.0))
    guider = LinearAdaptiveGuidance(3.0).fit([(e_c, e_u)])
    held = guider.coef_.clone()
    for pair, message in (
        ((e_c, e_u[:4]), "one shape"),
        ((e_c[0, 0], e_u[0, 0]), "one shape"),
        ((e_c * float("nan"), e_u), "NaN"),
        ((e_c[:3], e_u[:3]), "one number of steps, got 5 and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            guider.partial_fit(*pair)
        assert torch.equal(guider.coef_, held)
    with pytest.raises(ValueError, match="at least one"):
        guider.fit([])
    assert torch.equal(guider.coef_, held)
    with pytest.raises(ValueError, match=f"fitted for 5 steps, got num_inference_steps={T}"):
        run(guider)
    with pytest.raises(ValueError, match="an entry for each of 8 steps, got 3"):
        run(LinearAdaptiveGuidance(3.0, [True] * 3))
    with pytest.raises(ValueError, match=r"gram must be of shape \(2T, 2T\)"):
        ag.fit_linear(torch.zeros(3, 3))
