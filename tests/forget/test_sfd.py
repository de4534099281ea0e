"""SFD: the losses on Gaussians whose scores are known, which network learns what, and one-step samples."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from shoestring.forget.sfd import (
    ScoreForgettingDistiller,
    denoised,
    one_step_generate,
    score_matching_loss,
    sid_generator_loss,
    time_of_noise,
)

from .conftest import class_unet, rng, text_unet

pytestmark = pytest.mark.usefixtures("seeded")
SCHEDULER = DDPMScheduler()
ALPHAS = pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2, 3.0])


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    alphabar = SCHEDULER.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    return alphabar**0.5, (1 - alphabar) ** 0.5


class Gaussians(nn.Module):
    """Exact noise of classes N(mu_c, I): eps(x, t, c) = b (x - a mu_c)."""

    def __init__(self, means: list[float]) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64).view(-1, 1, 1, 1) * torch.ones(1, 1, 2, 2))
        self.asked: list[Tensor] = []
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.asked.append(class_labels)
        self.times.append(t)
        a, b = levels(t)
        return SimpleNamespace(sample=b * (x - a * self.means[class_labels]))


class PointMass(nn.Module):
    def __init__(self, mu: Tensor) -> None:
        super().__init__()
        self.mu = nn.Parameter(mu)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        a, b = levels(t)
        return SimpleNamespace(sample=(x - a * self.mu) / b)


def distiller_of(unet: nn.Module, **options) -> ScoreForgettingDistiller:
    return ScoreForgettingDistiller(unet, SCHEDULER, **({"forget": 0, "override": 1} | options))


def gaussian_distiller(means: list[float], **options) -> ScoreForgettingDistiller:
    options = {"retain": list(range(1, len(means))), "shape": (1, 2, 2)} | options
    return distiller_of(Gaussians(means), **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


# ---- properties of the card


@ALPHAS
def test_equal_networks_asked_the_same_give_no_loss_and_no_gradient(alpha):
    distiller = distiller_of(class_unet().double(), alpha=alpha, forget_weight=0.0)
    terms = distiller.generator_loss(3, rng())
    terms["loss"].backward()
    assert terms["loss"] == 0
    assert all(float(gradient.abs().max()) < 1e-10 for gradient in gradients(distiller.generator))


@pytest.mark.parametrize("override", [1, 0], ids=["another class", "the forgotten class itself"])
def test_forget_term_starts_at_zero_only_without_another_class(override):
    distiller = distiller_of(class_unet().double(), override=override, forget_weight=1.0)
    terms = distiller.generator_loss(3, rng())
    terms["loss"].backward()
    largest = max(float(gradient.abs().max()) for gradient in gradients(distiller.generator))
    assert (terms["generator_forget"] == 0) == (override == 0)
    assert largest < 1e-10 if override == 0 else largest > 1e-2


def test_alpha_one_is_the_short_form():
    x_g, P, S = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    w = (P - x_g).abs().mean((1, 2, 3), keepdim=True)
    short = ((P - S) * (S - x_g) / w).sum((1, 2, 3)).mean()
    assert abs(sid_generator_loss(x_g, P, S, alpha=1.0) - short) < 1e-12


def test_generator_loss_is_its_definition_and_its_weight_has_no_gradient():
    x_g, P, S = (torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    total = 0.0
    for x, p, s in zip(*(part.detach().flatten(1).tolist() for part in (x_g, P, S)), strict=True):
        w = sum(abs(i - j) for i, j in zip(p, x, strict=True)) / 6
        total += sum((i - k) * ((i - j) - 1.2 * (i - k)) / w for j, i, k in zip(x, p, s, strict=True)) / 2
    loss = sid_generator_loss(x_g, P, S)
    assert loss.item() == pytest.approx(total)
    w = (P - x_g).abs().mean((1, 2, 3), keepdim=True).detach()
    wanted = -(P - S) / w / 2
    torch.testing.assert_close(torch.autograd.grad(loss, x_g)[0], wanted.detach())


def test_weight_is_bounded_where_the_generator_is_what_the_teacher_thinks():
    x = torch.zeros(1, 1, 2, 2)
    S = torch.full_like(x, 1e-3)
    assert float(sid_generator_loss(x, x, S, alpha=1.0)) == pytest.approx(-4 * 1e-6 / 1e-5)


def test_without_forget_weights_it_is_plain_distillation():
    """Written again here from the paper, with two optimizers; in float64, as Adam divides by tiny gradients."""
    unet, B = class_unet().double(), 3
    options = {"forget_weight": 0.0, "score_forget_weight": 0.0, "lr_score": 1e-3, "lr_generator": 2e-3}
    found = distiller_of(unet, forget=2, ema_decay=0.0, **options)
    found.fit(3, B, generator=rng(5))

    p, s, g = unet, copy.deepcopy(unet), copy.deepcopy(unet)
    adam_s = torch.optim.Adam(s.parameters(), 1e-3, betas=(0.0, 0.999))
    adam_g = torch.optim.Adam(g.parameters(), 2e-3, betas=(0.0, 0.999))
    generator = rng(5)

    def begin() -> tuple[Tensor, Tensor]:
        labels = torch.tensor([0, 1, 3])[torch.randint(3, (B,), generator=generator)]
        z = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
        alphabar = SCHEDULER.alphas_cumprod[440].double()
        x = (1 - alphabar) ** 0.5 * z
        eps = g(x, torch.full((B,), 440), class_labels=labels).sample
        return labels, (x - (1 - alphabar) ** 0.5 * eps) / alphabar**0.5

    def noised(x_g: Tensor) -> tuple[Tensor, ...]:
        t = torch.randint(38, 712, (B,), generator=generator)
        eps = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
        a = SCHEDULER.alphas_cumprod[t].double().view(-1, 1, 1, 1) ** 0.5
        b = (1 - a**2) ** 0.5
        return t, eps, a, b, a * x_g + b * eps

    for _ in range(3):
        labels, x_g = begin()
        t, eps, _, _, x_t = noised(x_g.detach())
        adam_s.zero_grad()
        (eps - s(x_t, t, class_labels=labels).sample).square().sum((1, 2, 3)).mean().backward()
        nn.utils.clip_grad_value_(s.parameters(), 1.0)
        adam_s.step()
        labels, x_g = begin()
        t, _, a, b, x_t = noised(x_g)
        P, S = ((x_t - b * net(x_t, t, class_labels=labels).sample) / a for net in (p, s))
        w = (P - x_g).detach().abs().mean((1, 2, 3), keepdim=True)
        adam_g.zero_grad()
        ((P - S) * ((P - x_g) - 1.2 * (P - S)) / w).sum((1, 2, 3)).mean().backward()
        nn.utils.clip_grad_value_(g.parameters(), 1.0)
        adam_g.step()
    moved = max((a - b).abs().max().item() for a, b in zip(g.parameters(), unet.parameters(), strict=True))
    assert moved > 1e-3
    for one, other in ((found.score, s), (found.generator, g)):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def test_forgetting_towards_itself_is_a_retain_term():
    unet, start = class_unet(), (class_unet(), class_unet())
    itself = distiller_of(unet, forget=2, override=2, start=start, forget_weight=1.0)
    with pytest.warns(UserWarning, match="1 of 1 conditions"):
        retained = distiller_of(unet, forget=2, retain=[2], start=start, forget_weight=0.0)
    found = itself.generator_loss(4, rng())["generator_forget"]
    generator = rng()
    retained.generator_loss(4, generator)
    assert found == retained.generator_loss(4, generator)["generator_retain"] != 0
    found = distiller_of(unet, forget=2, start=start, score_forget_weight=1.0).score_loss(4, rng())["score_forget"]
    retained.score_forget_weight, generator = 0.0, rng()
    retained.score_loss(4, generator)
    assert found == retained.score_loss(4, generator)["score_retain"] != 0


def test_one_step_of_a_point_mass_is_the_point():
    mu = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    for scale in (0.0, 1.0, 30.0):
        z = scale * torch.randn(5, 2, 3, 3, dtype=torch.float64)
        for t_init in (None, 40, 900):
            made = one_step_generate(PointMass(mu), SCHEDULER, z, 0, t_init)
            torch.testing.assert_close(made, mu.expand_as(z), rtol=0, atol=1e-10)


def test_teacher_never_changes_and_each_step_has_one_network_to_train():
    unet = class_unet()
    before = weights(unet)
    distiller = distiller_of(unet, forget_weight=1.0, lr_score=1e-2, lr_generator=1e-2, start=(class_unet(), unet))
    distiller.score_loss(2, rng())["loss"].backward()
    assert all(gradient is None for gradient in gradients(distiller.generator) + gradients(unet))
    assert any(gradient.abs().max() > 0 for gradient in gradients(distiller.score))
    distiller.score.zero_grad()
    distiller.generator_loss(2, rng())["loss"].backward()
    assert all(gradient is None for gradient in gradients(distiller.score) + gradients(unet))
    assert any(gradient.abs().max() > 0 for gradient in gradients(distiller.generator))
    distiller.generator.zero_grad()
    distiller.fit(2, 2, generator=rng())
    assert distiller.teacher is unet
    assert equal(weights(unet), before)
    assert all(gradient is None for gradient in gradients(unet))
    assert all(parameter.requires_grad for net in (unet, distiller.score) for parameter in net.parameters())
    for net in (distiller.score, distiller.generator, distiller.generator_):
        assert not equal(weights(net), before)


@ALPHAS
def test_gradient_on_gaussians_is_the_closed_form(alpha):
    """-b^4 (mu - m) / w at every sample, whatever alpha: towards mu, and nothing at m = mu."""
    mu, m, n = 1.7, -0.4, 6
    t = torch.randint(38, 712, (n,))
    a, b = levels(t)
    x_g = (m + torch.randn(n, 1, 2, 2, dtype=torch.float64)).requires_grad_()
    for mean in (m, mu):
        x_t = a * x_g + b * torch.randn(n, 1, 2, 2, dtype=torch.float64)
        P, S = (denoised(x_t, b * (x_t - a * centre), a, b) for centre in (mu, mean))
        (gradient,) = torch.autograd.grad(sid_generator_loss(x_g, P, S, alpha), x_g)
        w = (P - x_g).detach().abs().mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(gradient, (-(b**4) * (mu - mean) / w / n).expand_as(gradient), rtol=1e-7, atol=1e-9)


def mixture_noise(x: Tensor, a: Tensor, b: Tensor, centre: Tensor) -> Tensor:
    """Exact noise of a mixture of two Gaussians of deviation 0.3, 0.7 at centre - 1 and 0.3 at centre + 1."""
    places = torch.stack([centre - 1, centre + 1])[:, None]  # (2, 1, d)
    variance = a**2 * 0.09 + b**2
    off = x[None] - a * places  # (2, B, d)
    shares = (torch.tensor([0.7, 0.3]).log()[:, None] - off.square().sum(2) / (2 * variance.squeeze(1))).softmax(0)
    return b * (shares[..., None] * off / variance).sum(0)


@pytest.mark.parametrize("start", [-2.0, 3.0], ids=["from below", "from above"])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_mixture_moves_onto_the_safe_class(start, alpha):
    """Teacher and fake score are exact mixtures; the generator is a mixture whose place is learned."""
    safe, place = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.full((2,), start, dtype=torch.float64)
    generator, places = rng(1), []
    for step in range(160):
        m = place.clone().requires_grad_()
        side = torch.where(torch.rand(256, 1, generator=generator) < 0.7, -1.0, 1.0)
        x_g = m + side + 0.3 * torch.randn(256, 2, generator=generator, dtype=torch.float64)
        t = torch.randint(38, 712, (256,), generator=generator)
        a, b = (level.view(-1, 1) for level in levels(t))
        x_t = a * x_g + b * torch.randn(256, 2, generator=generator, dtype=torch.float64)
        P, S = (denoised(x_t, mixture_noise(x_t, a, b, centre), a, b) for centre in (safe, place))
        (gradient,) = torch.autograd.grad(sid_generator_loss(x_g, P, S, alpha), m)
        place = place - (0.1 if step < 120 else 0.02) * gradient
        places.append(place)
    assert (places[0] - place).sign().eq((torch.full((2,), start) - safe).sign()).all()
    torch.testing.assert_close(place, safe, rtol=0, atol=0.1)


def test_forgotten_class_ends_at_the_safe_one_and_the_others_stay():
    """The whole method on N(mu_c, I): g(z, c) has mean b^2 mu_g, so that is what must come to the teacher's mean."""
    means = [-2.0, 1.0, 2.0]
    distiller = gaussian_distiller(
        means, forget_weight=1.0, score_forget_weight=1.0, lr_score=0.05, lr_generator=0.02, ema_decay=0.98
    )
    learned = distiller.fit(400, 64, generator=rng())
    b_2 = float(1 - SCHEDULER.alphas_cumprod[440])
    found = [b_2 * learned.means[c].mean().item() for c in range(3)]
    assert found == pytest.approx([1.0, 1.0, 2.0], abs=0.15)
    samples = distiller.sample(0, rng(), n=2000)
    assert float(samples.mean()) == pytest.approx(1.0, abs=0.15)
    assert distiller.teacher.means[0].mean().item() == -2.0


def test_no_data_can_be_given():
    for method in (ScoreForgettingDistiller.__init__, ScoreForgettingDistiller.fit):
        names = set(inspect.signature(method).parameters)
        assert not names & {"data", "dataset", "loader", "images", "batches", "x", "X"}
    distiller_of(class_unet()).fit(1, 1)  # runs without


# ---- what the networks are asked


def test_teacher_is_asked_about_the_safe_class_at_samples_of_the_forgotten_one():
    distiller = gaussian_distiller([0.0, 1.0, 2.0, 3.0], forget=[0, 3], override=[1, 2], retain=[2])
    distiller.generator_loss(50, rng())
    asked = {name: getattr(distiller, name).asked for name in ("generator", "score", "teacher")}
    assert all(set(labels[0].tolist()) == {2} for labels in asked.values())
    assert set(asked["generator"][1].tolist()) == {0, 3}
    assert torch.equal(asked["generator"][1], asked["score"][1])
    assert torch.equal(asked["teacher"][1], torch.where(asked["score"][1] == 0, 1, 2))


def test_without_an_override_any_retained_class_is_the_safe_one():
    distiller = gaussian_distiller([0.0, 1.0, 2.0, 3.0], override=None, retain=[1, 3])
    distiller.generator_loss(400, rng())
    counts = torch.bincount(distiller.teacher.asked[1], minlength=4).tolist()
    assert counts[0] == counts[2] == 0
    assert min(counts[1], counts[3]) > 150


def test_retained_are_all_classes_but_the_forgotten_and_null():
    assert distiller_of(class_unet(6), forget=[1, 4], null=5).retain.tolist() == [0, 2, 3]
    assert distiller_of(class_unet(6), forget=1, retain=[0, 5]).retain.tolist() == [0, 5]


def test_times_are_drawn_from_t_min_to_below_t_max():
    distiller = gaussian_distiller([0.0, 1.0], t_min=100, t_max=103, t_init=500)
    distiller.score_loss(300, rng())
    distiller.generator_loss(300, rng())
    for net in (distiller.score, distiller.teacher):
        assert {int(t) for times in net.times for t in times} == {100, 101, 102}
    assert {int(t) for times in distiller.generator.times for t in times} == {500}


def test_default_times_are_the_official_ones_on_the_official_schedules():
    distiller = distiller_of(class_unet())
    assert (distiller.t_init, distiller.t_min, distiller.t_max) == (440, 38, 712)
    stable = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert time_of_noise(stable, 2.5) == 625


def test_guidance_is_of_teacher_and_score():
    """In a Gaussian, guidance moves the mean: mu_0 + s (mu_c - mu_0)."""
    means, s = [0.0, 1.0, 5.0, -1.0], 2.0
    guided = gaussian_distiller(means, null=3, guidance_scale=s, forget_weight=1.0, retain=[2])
    moved = gaussian_distiller([-1 + s * (m + 1) for m in means], forget_weight=1.0, retain=[2])
    moved.generator = guided.generator
    found, wanted = guided.generator_loss(5, rng()), moved.generator_loss(5, rng())
    torch.testing.assert_close(found["generator_forget"], wanted["generator_forget"])
    torch.testing.assert_close(guided.score_loss(5, rng())["loss"], moved.score_loss(5, rng())["loss"])
    assert found["generator_forget"] != gaussian_distiller(means, forget_weight=1.0).generator_loss(5, rng())["loss"]


def test_prompts_of_a_text_conditioned_network():
    unet, retain = text_unet(), torch.randn(3, 5, 6)
    distiller = ScoreForgettingDistiller(
        unet, SCHEDULER, torch.randn(2, 5, 6), torch.randn(5, 6), retain=retain, null=torch.randn(5, 6),
        guidance_scale=1.5, lr_generator=1e-3, lr_score=1e-3,
    )  # fmt: skip
    distiller.fit(1, 2, generator=rng())
    assert {"score_forget", "generator_forget"} <= distiller.history_[-1].keys()
    made = distiller.sample(retain[0], rng(), n=3)
    assert made.shape == (3, 2, 8, 8)
    assert not torch.equal(made, distiller.sample(retain[1], rng(), n=3))


# ---- training


def test_scores_are_summed_over_pixels_and_averaged_over_samples():
    eps, s = torch.randn(2, 3, 1, 4, 4)
    assert float(score_matching_loss(eps, s)) == pytest.approx(float((eps - s).square().mean()) * 16, rel=1e-5)


def test_gradients_are_clipped_entry_by_entry():
    found = []

    def look(optimizer, *_) -> None:
        entries = [
            p.grad.abs().max() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        found.append(float(max(entries)))

    handle = register_optimizer_step_post_hook(look)
    try:
        for clip in (1e-3, None):
            distiller_of(class_unet(), grad_clip_value=clip, forget_weight=1.0).fit(1, 2, generator=rng())
    finally:
        handle.remove()
    assert found[0] == found[1] == pytest.approx(1e-3)
    assert min(found[2:]) > 1e-2


def test_product_is_the_average_of_the_generator():
    distiller = distiller_of(class_unet(), lr_generator=1e-2, ema_decay=0.4, forget_weight=1.0)
    means = [parameter.detach().clone() for parameter in distiller.generator.parameters()]

    def follow(state) -> None:
        if state.step % 2 == 0:
            n = state.step // 2
            d = min(0.4, (1 + n) / (10 + n))
            for mean, value in zip(means, distiller.generator.parameters(), strict=True):
                mean.mul_(d).add_(value.detach(), alpha=1 - d)

    distiller.fit(8, 2, generator=rng(), callbacks=[follow])
    for mean, value in zip(means, distiller.generator_.parameters(), strict=True):
        torch.testing.assert_close(value, mean)
    assert not equal(weights(distiller.generator), weights(distiller.generator_))


def test_modes_follow_the_turns():
    unet = UNet2DModel(
        8, 1, 1, num_class_embeds=3, norm_num_groups=4, layers_per_block=1, block_out_channels=(8,), dropout=0.5,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    distiller = distiller_of(unet)
    assert distiller.teacher is not unet  # it came in train mode
    seen = []
    distiller.fit(
        1, 1, callbacks=[lambda state: seen.append((distiller.score.training, distiller.generator.training)) or None]
    )
    assert seen == [(True, False), (False, True)]
    assert not any(module.training for net in (distiller.teacher, distiller.generator_) for module in net.modules())


def test_start_of_a_second_stage_is_taken():
    score, generator = class_unet(), class_unet()
    distiller = distiller_of(class_unet(), start=(score, generator))
    assert equal(weights(distiller.score), weights(score))
    assert equal(weights(distiller.generator), weights(generator))
    assert equal(weights(distiller.generator_), weights(generator))
    before = weights(generator)
    distiller.fit(1, 1)
    assert equal(weights(generator), before)


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    unet = class_unet()
    state = torch.get_rng_state()
    found = [weights(distiller_of(unet, lr_generator=1e-3).fit(2, 2, generator=rng(seed))) for seed in (3, 3, 4)]
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])
    distiller_of(unet).fit(1, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_step_is_the_predicted_image_of_a_scheduler():
    unet, z = class_unet(), torch.randn(3, 1, 8, 8)
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(1000)
    with torch.no_grad():
        x = (1 - ddim.alphas_cumprod[440]) ** 0.5 * z
        eps = unet(x, 440, class_labels=torch.tensor([0, 1, 2])).sample
        made = one_step_generate(unet, SCHEDULER, z, [0, 1, 2])
    torch.testing.assert_close(made, ddim.step(eps, 440, x).pred_original_sample)


def test_saved_generator_is_read_by_diffusers_alone(tmp_path):
    distiller = distiller_of(class_unet(), lr_generator=1e-2)
    distiller.fit(1, 2).save_pretrained(tmp_path)
    read = UNet2DModel.from_pretrained(tmp_path)
    z = torch.randn((4, 1, 8, 8), generator=rng(1))
    with torch.no_grad():
        assert torch.equal(one_step_generate(read, SCHEDULER, z, 2), distiller.sample(2, rng(1), n=4))


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    unet, options = class_unet(), {"lr_generator": 1e-3, "lr_score": 1e-3, "forget_weight": 1.0}
    whole = distiller_of(unet, **options)
    whole.fit(3, 2, generator=rng())
    distiller_of(unet, **options).fit(3, 2, generator=rng(), checkpoint=tmp_path, max_steps=3)  # between two turns
    resumed = distiller_of(unet, **options)
    resumed.fit(3, 2, generator=rng(), checkpoint=tmp_path)
    for name in ("score", "generator", "generator_"):
        assert equal(weights(getattr(resumed, name)), weights(getattr(whole, name)))


def test_half_precision_has_its_losses_in_single_precision():
    unet = class_unet().to(torch.bfloat16)
    distiller = distiller_of(unet, forget_weight=1.0)
    assert distiller.score_loss(2, rng())["loss"].dtype == torch.float32
    assert distiller.generator_loss(2, rng())["loss"].dtype == torch.float32
    assert next(distiller.fit(1, 2).parameters()).dtype == torch.bfloat16


# ---- what is refused


def test_loss_that_is_not_finite_stops_and_leaves_the_last_good_weights():
    distiller = gaussian_distiller([0.0, 1.0], lr_generator=1e-2, lr_score=1e-2)
    kept = []

    def spoil(state) -> None:
        kept.append((weights(distiller.generator), weights(distiller.score)))
        if state.step == 3:
            with torch.no_grad():
                distiller.teacher.means.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="step 4"):
        distiller.fit(5, 2, callbacks=[spoil])
    assert equal(weights(distiller.generator), kept[2][0])
    assert equal(weights(distiller.score), kept[2][1])
    assert all(parameter.isfinite().all() for parameter in distiller.generator_.parameters())


def test_overlap_of_forget_and_retain_is_told_with_its_count():
    with pytest.warns(UserWarning, match="2 of 3 conditions of retain are in forget"):
        distiller_of(class_unet(), forget=[0, 1], override=3, retain=[0, 1, 2])
    prompts = torch.randn(3, 5, 6)
    with pytest.warns(UserWarning, match="1 of 3 conditions"):
        ScoreForgettingDistiller(text_unet(), SCHEDULER, prompts[1], retain=prompts)


BAD = {
    "nothing to forget": ({"forget": []}, ValueError, "forget must not be empty"),
    "nothing to retain": ({"retain": []}, ValueError, "retain must not be empty"),
    "every class forgotten": ({"forget": [0, 1, 2, 3]}, ValueError, "retain must not be empty"),
    "a class that is none": ({"forget": 9}, ValueError, "from 0 to 3"),
    "hidden states for classes": ({"forget": torch.zeros(3, 6)}, ValueError, "no cross-attention"),
    "two overrides for one": ({"override": [1, 2]}, ValueError, "override must be one condition or 1"),
    "guidance without null": ({"guidance_scale": 2.0}, ValueError, "null must be given"),
    "two null conditions": ({"null": [2, 3]}, ValueError, "null must be one condition"),
    "times out of order": ({"t_min": 500, "t_max": 500}, ValueError, "in order"),
    "a time beyond the last": ({"t_init": 1000}, ValueError, "below 1000"),
    "an average that never moves": ({"ema_decay": 1.0}, ValueError, "ema_decay must be < 1"),
    "a negative weight": ({"forget_weight": -1.0}, ValueError, "forget_weight must be"),
    "alpha that is no number": ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    "clipping to nothing": ({"grad_clip_value": 0.0}, ValueError, "grad_clip_value must be"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_changes(options, error, message):
    unet = class_unet()
    before = weights(unet)
    with pytest.raises(error, match=message):
        distiller_of(unet, **options)
    assert equal(weights(unet), before)


def test_calls_that_cannot_be():
    unet = class_unet()
    distiller = distiller_of(unet)
    with pytest.raises(ValueError, match="n_iters must be an integer >= 1, got 0"):
        distiller.fit(0)
    with pytest.raises(ValueError, match="batch_size must be"):
        distiller.fit(1, 0)
    with pytest.raises(ValueError, match="one or 3"):
        one_step_generate(unet, SCHEDULER, torch.zeros(3, 1, 8, 8), [0, 1])
    with pytest.raises(ValueError, match="retain must be given"):
        ScoreForgettingDistiller(text_unet(), SCHEDULER, torch.zeros(3, 6))
    with pytest.raises(ValueError, match="one shape"):
        sid_generator_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        ScoreForgettingDistiller(None, SCHEDULER, 0)
