"""Perp-Neg: the equations, the guider in our sampler, in diffusers' modular blocks and in a classic pipeline."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState

from shoestring import zoo
from shoestring.guide import apply, sample
from shoestring.guide._levels import from_epsilon, noise_levels
from shoestring.guide.perp_neg import PerpNegGuidance, perp_neg, perpendicular, sds_gradient, view_weights

SHAPE = (3, 4, 8, 8)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictions(number=1, dtype=torch.float64):
    """e_u, e_p and auxiliary predictions that overlap with e_p, of another size in every sample."""
    e_u, p = random(*SHAPE, seed=1, dtype=dtype), random(*SHAPE, seed=2, dtype=dtype)
    sizes = torch.tensor([0.1, 1.0, 30.0], dtype=dtype).reshape(3, 1, 1, 1)
    aux = [e_u + 0.7 * sizes * p + random(*SHAPE, seed=3 + i, dtype=dtype) for i in range(number)]
    return e_u, e_u + sizes * p, aux


def inner(a, b):
    return (a * b).sum((1, 2, 3))


def cfg(e_u, e_p, s):
    return e_u + s * (e_p - e_u)


# ---- the equations


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 4, 128, 128)], ids=["small", "SDXL"])
def test_what_is_subtracted_is_perpendicular_to_the_prompt_in_every_sample(dtype, bound, shape):
    p, noise = random(*shape, seed=2, dtype=dtype), random(*shape, seed=3, dtype=dtype)
    for overlap in (0.0, -1.5, 40.0):
        n = overlap * p + noise
        angle = (
            inner(perpendicular(n, p).double(), p.double()).abs()
            / (inner(n.double(), n.double()) * inner(p.double(), p.double())).sqrt()
        )
        assert (angle <= bound).all(), angle
        rest = (n - perpendicular(n, p)).double()  # the other part is along p: Cauchy-Schwarz is an equality
        along = inner(rest, p.double()) ** 2 / (inner(rest, rest) * inner(p.double(), p.double()))
        torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.2, 7.0])
@pytest.mark.parametrize("weight", [-1.0, -5.0, 2.0])
def test_a_negative_along_the_prompt_changes_nothing(factor, weight):
    e_u, e_p, _ = predictions()
    e_n = e_u + factor * (e_p - e_u)  # factor 1: the negative prompt is the prompt
    torch.testing.assert_close(perp_neg(e_u, e_p, [e_n], [weight], 7.5), cfg(e_u, e_p, 7.5), rtol=1e-10, atol=1e-10)


def test_an_empty_negative_changes_nothing():
    e_u, e_p, _ = predictions()
    torch.testing.assert_close(perp_neg(e_u, e_p, [e_u], [-3.0], 7.5), cfg(e_u, e_p, 7.5), rtol=1e-13, atol=1e-13)


def test_an_orthogonal_negative_is_plainly_subtracted():
    e_u, e_p, _ = predictions()
    p = e_p - e_u
    n = torch.zeros_like(p)
    n[:, 0], n[:, 1] = p[:, 1], -p[:, 0]  # turned by 90 degrees in the plane of two channels
    got = perp_neg(e_u, e_p, [e_u + n], [-1.5], 7.5)
    torch.testing.assert_close(got, e_u + 7.5 * (p - 1.5 * n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [[-1.0, -1.0], [-50.0, 3.0], [0.0, 100.0]])
def test_the_strength_of_the_prompt_is_never_changed(weights):
    e_u, e_p, aux = predictions(2)
    p, d = e_p - e_u, (perp_neg(e_u, e_p, aux, weights, 2.0) - e_u) / 2.0
    torch.testing.assert_close(inner(d, p), inner(p, p), rtol=1e-10, atol=0)
    plain = p + sum(w * (e - e_u) for w, e in zip(weights, aux, strict=True))
    assert ((inner(plain, p) / inner(p, p) - 1).abs() > 0.3).all()  # as it is in plain composition


def test_scales_and_weights_of_zero_and_one():
    e_u, e_p, aux = predictions(2)
    assert torch.equal(perp_neg(e_u, e_p, aux, [-2.0, 1.0], 0.0), e_u)
    torch.testing.assert_close(perp_neg(e_u, e_p, aux, [0.0, 0.0], 7.5), cfg(e_u, e_p, 7.5), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(perp_neg(e_u, e_p, [], [], 7.5), cfg(e_u, e_p, 7.5), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(perp_neg(e_u, e_p, aux, [0.0, 0.0], 1.0), e_p, rtol=1e-13, atol=1e-13)


def test_a_batch_equals_its_samples_one_by_one():
    e_u, e_p, aux = predictions(2)
    whole = perp_neg(e_u, e_p, aux, [-2.0, 1.0], 7.5)
    single = [perp_neg(e_u[i : i + 1], e_p[i : i + 1], [a[i : i + 1] for a in aux], [-2.0, 1.0], 7.5) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(single), rtol=1e-13, atol=1e-13)


def test_linear_in_every_weight_and_symmetric_in_the_prompts():
    e_u, e_p, aux = predictions(2)

    def guided(*weights):
        return perp_neg(e_u, e_p, aux, weights, 3.0)

    change = guided(-1.0, 0.5) - guided(0.0, 0.5)
    torch.testing.assert_close(guided(-4.0, 0.5) - guided(0.0, 0.5), 4 * change, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guided(-1.0, -2.0) - guided(0.0, -2.0), change, rtol=1e-9, atol=1e-9)
    swapped = perp_neg(e_u, e_p, aux[::-1], (0.5, -1.0), 3.0)
    torch.testing.assert_close(swapped, guided(-1.0, 0.5), rtol=1e-12, atol=1e-12)


def test_the_projection_does_not_depend_on_the_length_of_the_prompts_direction():
    p, n = random(*SHAPE, seed=2), random(*SHAPE, seed=3)
    for k in (0.01, -3.0, 1e4):
        torch.testing.assert_close(perpendicular(n, k * p), perpendicular(n, p), rtol=1e-10, atol=1e-10)


def test_a_prompt_without_direction_leaves_the_auxiliary_ones():
    e_u, e_p, aux = predictions(2)
    e_p = torch.cat([e_u[:1], e_p[1:]])  # p = 0 in the first sample only
    got = perp_neg(e_u, e_p, aux, [-2.0, 1.0], 7.5)
    assert got.isfinite().all()
    expected = e_u[0] + 7.5 * (-2.0 * (aux[0] - e_u)[0] + (aux[1] - e_u)[0])
    torch.testing.assert_close(got[0], expected, rtol=1e-12, atol=1e-12)


def test_eps_bounds_the_square_of_the_norm():
    p, n = torch.tensor([[1e-2, 0.0]], dtype=torch.float64), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(perpendicular(n, p), torch.tensor([[0.0, 1.0]], dtype=torch.float64))  # 1e-4 > eps
    got = perpendicular(n, p, eps=1e-3)
    torch.testing.assert_close(got, torch.tensor([[1 - 1e-4 / 1e-3, 1.0]], dtype=torch.float64))


def test_negative_weights_remove_and_positive_ones_add():
    e_u, e_p, aux = predictions()
    direction = perpendicular(aux[0] - e_u, e_p - e_u)
    for weight in (-1.0, 1.0):
        moved = perp_neg(e_u, e_p, aux, [weight], 2.0) - cfg(e_u, e_p, 2.0)
        assert (inner(moved, direction) * weight > 0).all()
        torch.testing.assert_close(moved, 2.0 * weight * direction, rtol=1e-9, atol=1e-9)


def test_auxiliary_prompts_that_say_the_same_count_twice():
    e_u, e_p, aux = predictions()
    twice = perp_neg(e_u, e_p, aux * 2, [-1.0, -1.0], 2.0)
    torch.testing.assert_close(twice, perp_neg(e_u, e_p, aux, [-2.0], 2.0), rtol=1e-12, atol=1e-12)


def test_a_weight_for_every_sample():
    e_u, e_p, aux = predictions(2)
    weights = [[-1.0, 0.0, 3.0], [0.5, -2.0, 0.0]]
    got = perp_neg(e_u, e_p, torch.stack(aux), torch.tensor(weights), 2.0)
    for i in range(3):
        own = perp_neg(e_u, e_p, aux, [row[i] for row in weights], 2.0)
        torch.testing.assert_close(got[i], own[i], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(perp_neg(e_u, e_p, aux, weights, 2.0), got, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow"])
def test_the_same_in_every_space_of_predictions(kind):
    e_u, e_p, aux = predictions(2)
    alpha, sigma = (0.4, 0.6) if kind == "flow" else (0.8, 0.6)
    x = random(*SHAPE, seed=9)

    def to(e):
        return from_epsilon(e, x, alpha, sigma, kind)

    guided = perp_neg(e_u, e_p, aux, [-2.0, 1.0], 7.5)
    there = perp_neg(to(e_u), to(e_p), [to(e) for e in aux], [-2.0, 1.0], 7.5)
    torch.testing.assert_close(there, to(guided), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision_is_summed_in_single_and_kept(dtype):
    e_u = torch.zeros(1, 4, 64, 64)
    e_p = random(1, 4, 64, 64, seed=1, dtype=torch.float32) * 3 + 1  # its squares sum to 1.6e5: no float16
    e_n = random(1, 4, 64, 64, seed=2, dtype=torch.float32) + e_p
    halves = [e.to(dtype) for e in (e_u, e_p, e_n)]
    got = perp_neg(halves[0], halves[1], halves[2:], [-1.0], 2.0)
    assert got.dtype == perpendicular(halves[2], halves[1]).dtype == dtype
    exact = perp_neg(*[e.double() for e in halves[:2]], [halves[2].double()], [-1.0], 2.0)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
    alone = perpendicular(halves[2], halves[1]).double()
    exact = perpendicular(halves[2].double(), halves[1].double())
    torch.testing.assert_close(alone, exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert perp_neg(e_u, e_p, [e_n], [-1.0], 2.0).dtype == torch.float32


def test_on_the_device_of_the_predictions_without_waiting_for_it():
    e_u, e_p, e_n = (torch.zeros(2, 4, 8, 8, device="meta") for _ in range(3))
    for weights in ([-1.0], [[-1.0, 0.0]], torch.tensor([-1.0])):
        got = perp_neg(e_u, e_p, [e_n], weights, 2.0)
        assert (got.device.type, got.shape) == ("meta", (2, 4, 8, 8))


def test_a_guider_of_large_eps_is_plain_composition():
    e_u, e_p, aux = predictions()
    got = PerpNegGuidance(3.0, -1.5, eps=1e30).forward(e_p, e_u, pred_aux_0=aux[0]).pred
    torch.testing.assert_close(got, e_u + 3.0 * ((e_p - e_u) - 1.5 * (aux[0] - e_u)), rtol=1e-12, atol=1e-12)


def test_score_distillation_stops_where_the_prediction_is_the_noise():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    e, noise = random(*SHAPE, seed=1), random(*SHAPE, seed=2)
    assert not sds_gradient(noise, noise, 0.3).any()
    steps = scheduler.timesteps[:3]
    got = sds_gradient(e, noise, scheduler.alphas_cumprod[steps])
    sigmas = noise_levels(scheduler)[1][:3]
    torch.testing.assert_close(got, sigmas.reshape(3, 1, 1, 1) ** 2 * (e - noise), rtol=1e-6, atol=1e-6)


# ---- views


def view_by_the_card(phi, nw=-2.0, fd=2.0, sd=10.0):
    """(shares of front, side, back), weight of front, weight of side."""
    if abs(phi) <= 90:
        r = 1 - abs(phi) / 90
        front = 0.0 if r > 0.8 else nw * math.exp(-fd * r)
        side = 0.0 if r < 0.2 else nw * math.exp(-sd * (1 - r))
        return (r, 1 - r, 0.0), front, side
    r = 1 - (abs(phi) - 90) / 90
    return (0.0, r, 1 - r), nw, 0.0 if r > 0.8 else nw / 2 * math.exp(-sd * r)


Z = [random(1, 5, 7, seed=seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("options", [{}, {"negative_w": -1.0, "front_decay_factor": 3.0, "side_decay_factor": 4.0}])
def test_views_are_those_of_the_official_code(options):
    angles = [-180, -137, -91, -90, -60, -17, -3, 0, 10, 45, 73, 89, 90, 107, 109, 150, 179.5]
    embeds, weights = view_weights(angles, *Z, **options)
    assert embeds.shape == (len(angles), 5, 7)
    card = dict(zip(("nw", "fd", "sd"), options.values(), strict=False))
    for b, phi in enumerate(angles):
        shares, front, side = view_by_the_card(phi, **card)
        expected = sum(share * z[0] for share, z in zip(shares, Z, strict=True))
        torch.testing.assert_close(embeds[b], expected, rtol=1e-12, atol=1e-12)
        assert weights[:, b].tolist() == pytest.approx([front, side], abs=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_view_is_continuous_at_the_side(sign):
    (before, there, after), _ = view_weights([sign * (90 - 1e-7), sign * 90, sign * (90 + 1e-7)], *Z)
    torch.testing.assert_close(there, Z[1][0], rtol=1e-13, atol=1e-13)
    for near in (before, after):
        torch.testing.assert_close(near, Z[1][0], rtol=1e-7, atol=1e-7)


def test_the_front_has_no_negative_front_and_a_full_negative_side():
    embeds, weights = view_weights(0, *Z, negative_w=-3.0)
    assert torch.equal(embeds[0], Z[0][0])
    assert weights.tolist() == [[0.0], [-3.0]]


def test_views_take_turns_shapes_and_half_precision():
    torch.testing.assert_close(view_weights([270.0, 360.0, -190.0], *Z), view_weights([-90.0, 0.0, 170.0], *Z))
    flat, _ = view_weights([30.0], *[z[0] for z in Z])
    torch.testing.assert_close(flat, view_weights([30.0], *Z)[0])
    pooled, _ = view_weights([30.0, 100.0], *[z[:, 0] for z in Z])
    torch.testing.assert_close(pooled, view_weights([30.0, 100.0], *Z)[0][:, 0])
    assert view_weights([30.0], *[z.half() for z in Z])[0].dtype == torch.float16


def test_views_guide_a_batch_of_cameras():
    embeds, weights = view_weights([0.0, 90.0, 180.0], *Z)
    e_u, e_p, aux = predictions(2)
    guider = PerpNegGuidance(2.0, weights.tolist())
    got = guider.forward(e_p, e_u, pred_aux_0=aux[0], pred_aux_1=aux[1]).pred
    torch.testing.assert_close(got, perp_neg(e_u, e_p, aux, weights, 2.0))
    assert len(embeds) == 3


# ---- the guider in our sampler


def by_hand(model, scheduler, latents, conditions, weights, s, steps):
    """DDIM with the equations as they stand, one sample at a time."""
    scheduler.set_timesteps(steps)
    samples = []
    for b in range(len(latents)):
        x = latents[b : b + 1]
        for t in scheduler.timesteps:
            e = []
            for condition in conditions:
                own = {}
                for key, value in condition.items():
                    own[key] = (
                        {k: v[b : b + 1] for k, v in value.items()} if isinstance(value, dict) else value[b : b + 1]
                    )
                e.append(model(x, t.expand(1), **own, return_dict=False)[0][:, : x.shape[1]])
            p = e[0] - e[1]
            d = p.clone()
            for w, e_i in zip(weights, e[2:], strict=True):
                n = e_i - e[1]
                d += w * (n - (n * p).sum() / (p * p).sum() * p)
            x = scheduler.step(e[1] + s * d, t, x).prev_sample
        samples.append(x)
    return torch.cat(samples)


def named(conditions):
    keys = {True: "encoder_hidden_states", False: "class_labels"}
    return [c if isinstance(c, dict) else {keys[c.is_floating_point()]: c} for c in conditions]


@pytest.fixture(params=["tiny_sd", "tiny_sdxl_unet", "tiny_dit"])
def network(request):
    return request.getfixturevalue(request.param)


def scheduler():
    return DDIMScheduler(clip_sample=False)


@torch.no_grad()
def test_samples_are_those_of_the_equations(network):
    model, conditions = network
    latents, told = random(2, 4, 8, 8, seed=5), conditions(2, 4)
    guider = PerpNegGuidance(3.0, [-1.5, 0.7])
    out = sample(model, scheduler(), guider, latents, told, num_inference_steps=3)
    expected = by_hand(model, scheduler(), latents, named(told), [-1.5, 0.7], 3.0, 3)
    torch.testing.assert_close(out.sample, expected, rtol=1e-9, atol=1e-9)
    assert out.num_calls == 4 * 3
    together = sample(model, scheduler(), guider, latents, told, num_inference_steps=3, batch_branches=True)
    torch.testing.assert_close(together.sample, expected, rtol=1e-9, atol=1e-9)


def test_the_prompt_as_its_own_negative_prompt_is_plain_guidance(network):
    model, conditions = network
    latents, (prompt, empty) = random(2, 4, 8, 8, seed=5), conditions(2)
    got = sample(
        model, scheduler(), PerpNegGuidance(3.0, -4.0), latents, (prompt, empty, prompt), num_inference_steps=3
    )
    plain = sample(model, scheduler(), ClassifierFreeGuidance(3.0), latents, (prompt, empty), num_inference_steps=3)
    torch.testing.assert_close(got.sample, plain.sample, rtol=1e-8, atol=1e-8)
    assert (got.num_calls, plain.num_calls) == (9, 6)


def test_predictions_of_any_kind_give_the_same_samples():
    def exact(kind):  # in double precision, which diffusers' levels are not
        steps = DDIMScheduler(clip_sample=False, prediction_type=kind)
        steps.alphas_cumprod, steps.final_alpha_cumprod = steps.alphas_cumprod.double(), torch.tensor(1.0).double()
        return steps

    steps = exact("epsilon")
    steps.set_timesteps(4)
    alphas, sigmas = noise_levels(steps)
    levels = {int(t): (float(a), float(s)) for t, a, s in zip(steps.timesteps, alphas, sigmas, strict=False)}

    def noise(x, t, encoder_hidden_states):
        c = encoder_hidden_states.reshape(len(x), 1, 1, -1)
        return 0.5 * x + x.roll(1, 1) * c + c.square()

    def velocity(x, t, encoder_hidden_states):
        alpha, sigma = levels[int(t.reshape(-1)[0])]
        return from_epsilon(noise(x, t, encoder_hidden_states), x, alpha, sigma, "v_prediction")

    latents, conditions = random(2, 3, 8, 8, seed=5), [random(2, 1, 8, seed=seed) for seed in range(3)]
    results = []
    for model, kind in ((noise, "epsilon"), (velocity, "v_prediction")):
        out = sample(model, exact(kind), PerpNegGuidance(2.0, -1.5), latents, conditions, num_inference_steps=4)
        results.append(out.sample)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 4 * 6),
        ({"weights": [-1.0, 0.0]}, 3 * 6),  # a weight of 0 is no network call
        ({"weights": [5e-5, -5e-5]}, 2 * 6),
        ({"enabled": False}, 6),
        ({"start": 0.5}, 3 + 4 * 3),
        ({"stop": 0.5}, 4 * 3 + 3),
        ({"guidance_scale": 1.0, "weights": [0.0, 0.0]}, 6),
        ({"guidance_scale": 1.0}, 4 * 6),
    ],
    ids=["all", "one weight 0", "weights 0", "disabled", "late", "early", "scale 1 and weights 0", "scale 1"],
)
def test_network_calls_are_those_that_are_needed(tiny_sd, options, calls):
    model, conditions = tiny_sd
    guider = PerpNegGuidance(**{"guidance_scale": 3.0, "weights": [-1.0, 0.5], **options})
    latents, told = random(1, 4, 8, 8, seed=5), conditions(1, 4)
    assert sample(model, scheduler(), guider, latents, told, num_inference_steps=6).num_calls == calls


def test_left_out_weights_keep_the_places_of_the_others(tiny_sd):
    model, conditions = tiny_sd
    latents, (prompt, empty, one, two) = random(1, 4, 8, 8, seed=5), conditions(1, 4)
    some = sample(
        model, scheduler(), PerpNegGuidance(3.0, [0.0, -2.0]), latents, (prompt, empty, one, two), num_inference_steps=2
    )
    only = sample(model, scheduler(), PerpNegGuidance(3.0, -2.0), latents, (prompt, empty, two), num_inference_steps=2)
    assert torch.equal(some.sample, only.sample)


def test_prompts_given_to_the_guider_are_those_given_as_conditions(tiny_sd):
    model, conditions = tiny_sd
    latents, (prompt, empty, one) = random(3, 4, 8, 8, seed=5), conditions(3, 3)
    one = one[:1]
    expected = sample(
        model, scheduler(), PerpNegGuidance(3.0), latents, (prompt, empty, one.expand(3, -1, -1)), num_inference_steps=2
    )
    guider = PerpNegGuidance(3.0)
    guider.set_auxiliary({"encoder_hidden_states": one.float()})  # cast to the main prompt's dtype
    got = sample(model, scheduler(), guider, latents, (prompt, empty), num_inference_steps=2)
    torch.testing.assert_close(got.sample, expected.sample, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="both with the conditions"):
        sample(model, scheduler(), guider, latents, (prompt, empty, prompt), num_inference_steps=2)
    guider.set_auxiliary()
    again = sample(model, scheduler(), guider, latents, (prompt, empty, one.expand(3, -1, -1)), num_inference_steps=2)
    assert torch.equal(again.sample, expected.sample)


def test_adaptive_guidance_around_perp_neg(tiny_sd):
    module = pytest.importorskip("shoestring.guide.adaptive_guidance")
    model, conditions = tiny_sd
    latents, told = random(1, 4, 8, 8, seed=5), conditions(1, 3)
    inner_one = PerpNegGuidance(3.0, -1.5)
    plain = sample(model, scheduler(), inner_one, latents, told, num_inference_steps=4)
    never = module.AdaptiveGuidance(inner=PerpNegGuidance(3.0, -1.5), threshold=2.0)
    assert torch.equal(sample(model, scheduler(), never, latents, told, num_inference_steps=4).sample, plain.sample)
    at_once = module.AdaptiveGuidance(inner=PerpNegGuidance(3.0, -1.5), threshold=-2.0)
    assert sample(model, scheduler(), at_once, latents, told, num_inference_steps=4).num_calls == 3 + 3


# ---- modular pipelines


def sdxl_state(conditions, latents):
    (prompt, empty) = conditions
    return BlockState(
        prompt_embeds=prompt["encoder_hidden_states"],
        negative_prompt_embeds=empty["encoder_hidden_states"],
        pooled_prompt_embeds=prompt["added_cond_kwargs"]["text_embeds"],
        negative_pooled_prompt_embeds=empty["added_cond_kwargs"]["text_embeds"],
        add_time_ids=prompt["added_cond_kwargs"]["time_ids"],
        negative_add_time_ids=empty["added_cond_kwargs"]["time_ids"],
        num_inference_steps=3,
        scaled_latents=latents,
        timestep_cond=None,
        cross_attention_kwargs=None,
    )


def test_the_denoiser_block_of_sdxl(tiny_sdxl_unet):
    """diffusers' own block, where only the prompt and the empty prompt arrive."""
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser

    model, conditions = tiny_sdxl_unet
    latents, told = random(2, 4, 8, 8, seed=5), conditions(2, 4)
    guider = PerpNegGuidance(3.0, [-1.5, 0.7])
    aux = [
        {"prompt_embeds": c["encoder_hidden_states"][:1], "text_embeds": c["added_cond_kwargs"]["text_embeds"][:1]}
        for c in told[2:]
    ]
    guider.set_auxiliary(*aux)
    components = SimpleNamespace(guider=guider, unet=model)
    _, state = StableDiffusionXLLoopDenoiser()(components, sdxl_state(told[:2], latents), 0, torch.tensor(500))
    with torch.no_grad():
        e = [model(latents, torch.tensor(500), **condition).sample for condition in told[:2]]
        for condition in aux:
            added = {
                "text_embeds": condition["text_embeds"].repeat(2, 1),
                "time_ids": told[0]["added_cond_kwargs"]["time_ids"],
            }
            states = condition["prompt_embeds"].repeat(2, 1, 1)
            e.append(model(latents, torch.tensor(500), encoder_hidden_states=states, added_cond_kwargs=added).sample)
    torch.testing.assert_close(state.noise_pred, perp_neg(e[1], e[0], e[2:], [-1.5, 0.7], 3.0), rtol=1e-9, atol=1e-9)
    assert guider.num_conditions == guider._count_prepared == 4


def test_block_states_with_shared_fields_and_lists_of_prompts():
    """As Z-Image and others have it: lists of states of different lengths, fields that all share."""
    prompt, empty, extra = ([random(length, 3, seed=length)] * 2 for length in (4, 5, 6))
    state = BlockState(prompt_embeds=prompt, negative_prompt_embeds=empty, size=[1, 2], mask=random(2))
    fields = {"cap_feats": ("prompt_embeds", "negative_prompt_embeds"), "size": "size", "mask": "mask", "no": "no"}
    guider = PerpNegGuidance(3.0)
    guider.set_auxiliary({"cap_feats": extra[:1]})
    batches = guider.prepare_inputs_from_block_state(state, fields)
    for batch, states in zip(batches, (prompt, empty, extra), strict=True):
        assert all(a is b for a, b in zip(batch.cap_feats, states, strict=True))
        assert (batch.size, batch.mask is state.mask, hasattr(batch, "no")) == ([1, 2], True, False)
        batch.noise_pred = torch.zeros(2, 3)
    assert not guider(batches)[0].any()


def test_all_but_the_empty_prompt_are_conditional():
    guider = PerpNegGuidance(weights=[-1.0, -1.0])
    guider.set_state(0, 4, torch.tensor(1))
    told = []
    for _ in range(4):
        guider.prepare_models(None)
        told.append(guider.is_conditional)
    assert told == [True, False, True, True]


# ---- the zoo, and a classic pipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_on_a_real_model_plain_composition_forgets_the_prompt_and_this_does_not(pipe):
    unet = zoo.load("tiny-t2i").unet.double()
    prompts = ["a red bag", "", "a red bag in the middle"]
    states = pipe.encode_prompt(prompts, "cpu", 1, False)[0].double()
    x = random(2, 4, 16, 16, seed=1)
    for t in (900, 500):
        e_p, e_u, e_n = (unet(x, t, encoder_hidden_states=z.expand(2, -1, -1)).sample for z in states)
        p = e_p - e_u
        kept = inner(perp_neg(e_u, e_p, [e_n], [-1.0], 1.0) - e_u, p) / inner(p, p)
        torch.testing.assert_close(kept, torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0)
        assert (inner(p - (e_n - e_u), p) / inner(p, p) < 0.7).all()


def test_a_classic_pipeline(pipe):
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}

    def picture(guider, auxiliary):
        with apply(pipe, guider, auxiliary=auxiliary) as calls:
            made = pipe(
                ["a small red bag"] * 2, num_inference_steps=3, guidance_scale=2.0, output_type="np",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        return made.images, calls.rows

    plain, rows = picture(ClassifierFreeGuidance(3.0), [])
    assert rows == 2 * 2 * 3
    same, rows = picture(PerpNegGuidance(3.0, -4.0), ["a small red bag"])
    assert rows == 2 * 3 * 3
    np.testing.assert_allclose(same, plain, atol=1e-4)
    other, rows = picture(PerpNegGuidance(3.0, [-1.0, 0.5]), ["a small red bag on the left", "a bag"])
    assert rows == 2 * 4 * 3
    assert np.abs(other - plain).max() > 0.05
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


# ---- configuration


def test_a_copy_keeps_what_was_given_by_position():
    copied = PerpNegGuidance(3.0, [-0.5]).new()
    assert (copied.guidance_scale, copied.weights) == (3.0, [-0.5])


def test_saved_and_loaded_by_diffusers(tmp_path):
    guider = PerpNegGuidance(3.0, [[-1.0, 0.5], -2.0], start=0.1)
    guider.set_auxiliary({"prompt_embeds": torch.zeros(1, 5, 7)})
    guider.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "guider_config.json").read_text())
    assert written["weights"] == [[-1.0, 0.5], -2.0]
    assert "auxiliary" not in written
    loaded = PerpNegGuidance.from_pretrained(tmp_path)
    assert (loaded.guidance_scale, loaded.weights, loaded.eps, loaded._start) == (3.0, [[-1.0, 0.5], -2.0], 1e-6, 0.1)
    e_u, e_p, aux = predictions(2)
    e_u, e_p, aux = e_u[:2], e_p[:2], {f"pred_aux_{i}": a[:2] for i, a in enumerate(aux)}
    assert torch.equal(loaded.forward(e_p, e_u, **aux).pred, guider.forward(e_p, e_u, **aux).pred)
    assert PerpNegGuidance(2.0).new(weights=-3.0).weights == [-3.0]


# ---- what must be refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"guidance_scale": "high"}, "guidance_scale must be finite"),
        ({"weights": [-1.0, math.inf]}, "weights must be finite"),
        ({"weights": torch.tensor([-1.0])}, "tolist"),
        ({"weights": True}, "weights must be finite"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"start": 1.5}, "start"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PerpNegGuidance(**options)


PAIR = (torch.zeros(2, 5, 8), torch.ones(2, 5, 8))
POOLED = (torch.zeros(2, 6), torch.ones(2, 6))


@pytest.mark.parametrize(
    ("data", "auxiliary", "error", "message"),
    [
        ({"e": PAIR}, (), ValueError, "needs an auxiliary prompt beside"),
        ({"e": PAIR[:1]}, (), ValueError, "e must be .*empty prompt"),
        ({"e": (PAIR[0], None)}, ({"e": PAIR[0]},), ValueError, "needs the empty prompt too"),
        ({"e": (*PAIR, PAIR[0], PAIR[0])}, (), ValueError, r"each of 2 auxiliary prompts, got \[-1.0\]"),
        ({"e": PAIR}, ({"e": torch.zeros(1, 5, 9)},), ValueError, r"wide as the main prompt's .*8\), got \(1, 5, 9\)"),
        ({"e": PAIR}, ({"e": torch.zeros(5, 8)},), ValueError, "wide as the main prompt's"),
        ({"e": PAIR}, ({"e": torch.zeros(3, 5, 8)},), ValueError, "1 or 2 rows, got 3"),
        ({"e": PAIR}, ({"f": torch.zeros(1, 5, 8)},), ValueError, r"has \['f'\], but the conditions here are \['e'\]"),
        ({"e": PAIR, "pooled": POOLED}, ({"e": PAIR[0]},), ValueError, r"lacks \['pooled'\]"),
        ({"e": PAIR}, (PAIR[0],), TypeError, "auxiliary prompt 0 must be a mapping"),
        ({"e": PAIR}, ({},), TypeError, "auxiliary prompt 0 must be a mapping"),
    ],
    ids=[
        "none", "no empty prompt", "empty prompt None", "two for one weight", "width", "axes", "rows", "unknown name",
        "no pooled text", "no mapping", "empty mapping",
    ],
)  # fmt: skip
def test_bad_prompts_are_refused_and_the_guider_stays_as_it_was(data, auxiliary, error, message):
    guider = PerpNegGuidance()
    good = {"e": torch.full((1, 5, 8), 2.0)}

    def run():
        guider.set_auxiliary(*auxiliary)
        guider.prepare_inputs(data)

    with pytest.raises(error, match=message):
        run()
    if error is TypeError:
        assert guider._auxiliary == ()
    guider.set_auxiliary(good)
    batches = guider.prepare_inputs({"e": PAIR})
    assert [float(batch.e.mean()) for batch in batches] == [0.0, 1.0, 2.0]


def test_arguments_without_a_prompt_in_them_may_be_left_out():
    guider = PerpNegGuidance()
    guider.set_auxiliary({"e": torch.full((1, 5, 8), 2.0)})
    sizes = torch.full((2, 6), 3.0)
    batches = guider.prepare_inputs({"e": PAIR, "time_ids": (sizes, sizes.clone()), "image_embeds": (None, None)})
    assert torch.equal(batches[2].time_ids, sizes)
    assert batches[2].image_embeds is None


def test_the_negative_prompt_in_both_places_is_told():
    guider = PerpNegGuidance()
    guider.set_auxiliary({"e": PAIR[1][:1]})
    with pytest.warns(UserWarning, match="auxiliary prompt 0 is the same as the unconditional one"):
        guider.prepare_inputs({"e": PAIR})
    guider.set_state(1, 4, torch.tensor(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guider.prepare_inputs({"e": PAIR})  # once a run
    guider.set_state(0, 4, torch.tensor(1))
    with pytest.warns(UserWarning, match="no effect"):
        guider.prepare_inputs({"e": PAIR})


def test_bad_tensors_are_refused():
    e_u, e_p, aux = predictions(2)
    with pytest.raises(ValueError, match="one shape"):
        perp_neg(e_u[:1], e_p, aux, [1.0, 1.0], 2.0)
    with pytest.raises(ValueError, match="each of 2 auxiliary prompts, got 1"):
        perp_neg(e_u, e_p, aux, [1.0], 2.0)
    with pytest.raises(ValueError, match=r"one number or 3, got shape \(2,\)"):
        perp_neg(e_u, e_p, aux, [[1.0, 1.0], [1.0, 1.0]], 2.0)
    with pytest.raises(ValueError, match="n and p must be of one shape"):
        perpendicular(e_u[:1], e_p)
    with pytest.raises(
        ValueError, match=r"auxiliary predictions must be \['pred_aux_0'\], as weights are given, got \[\]"
    ):
        PerpNegGuidance().forward(e_p, e_u)
    with pytest.raises(ValueError, match="front, side and back must be of one shape"):
        view_weights(0.0, Z[0], Z[1][:, :2], Z[2])
    with pytest.raises(ValueError, match="azimuth must be finite"):
        view_weights(math.nan, *Z)


def test_too_few_conditions_and_no_steps_are_refused_by_the_sampler(tiny_sd):
    model, conditions = tiny_sd
    latents = random(2, 4, 8, 8, seed=5)
    with pytest.raises(ValueError, match="needs an auxiliary prompt beside"):
        sample(model, scheduler(), PerpNegGuidance(), latents, conditions(2), num_inference_steps=2)
    with pytest.raises(ValueError, match="num_inference_steps"):
        sample(model, scheduler(), PerpNegGuidance(), latents, conditions(2, 3), num_inference_steps=0)
