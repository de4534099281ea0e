"""All but One: the reconstructed loss at its fixed points, what is trained and what is not, and purification."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from shoestring import zoo
from shoestring.forget._diffusion import predict_noise
from shoestring.forget.all_but_one import (
    GuidanceTermEraser,
    States,
    ddim_step,
    guidance_target,
    guidance_term_loss,
    purify,
)

from .conftest import class_unet, rng, text_unet

BLOCKS = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8,)}
pytestmark = pytest.mark.usefixtures("seeded")
SCHEDULER = DDIMScheduler(beta_end=0.012, clip_sample=False, timestep_spacing="trailing")


class Table(nn.Module):
    """A prediction of its own, free, for each of four conditions; `slope` times x on top."""

    def __init__(self, slope: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.rows, self.slope = nn.Parameter(torch.randn(4, 1, 3, 3, dtype=dtype)), slope

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.rows[class_labels] + self.slope * x)


def eraser_of(unet: nn.Module, **options) -> GuidanceTermEraser:
    options = {"erase": 0, "alternative": 1, "null": 3, "trainable": "all", "sampling_steps": 5} | options
    return GuidanceTermEraser(unet, SCHEDULER, **options)


def some_states(unet: nn.Module, n: int = 3) -> tuple[Tensor, Tensor]:
    shape = (1, 3, 3) if isinstance(unet, Table) else (unet.config.in_channels, 8, 8)
    return torch.randn(n, *shape, dtype=next(unet.parameters()).dtype), torch.tensor([900, 400, 30])[:n]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- properties of the card


@pytest.mark.parametrize("eta", [0.0, 0.7, 3.0])
def test_concept_as_its_own_alternative_has_no_loss_and_no_gradient(eta):
    unet = class_unet().double()
    with pytest.warns(UserWarning, match="1 of 1 concepts"):
        eraser = eraser_of(unet, alternative=0, eta=eta)
    terms = eraser.loss(*some_states(unet))
    terms["loss"].backward()
    assert terms["loss"] < 1e-24
    assert max(p.grad.abs().max() for p in eraser.unet_.parameters()) < 1e-11


def test_loss_of_the_unchanged_model_is_the_distance_of_the_two_predictions():
    unet = class_unet().double()
    x_t, t = some_states(unet)
    terms = eraser_of(unet, preserve_weight=5.0).loss(x_t, t)
    with torch.no_grad():
        e, a, u = (unet(x_t, t, class_labels=torch.full((3,), c)).sample for c in (0, 1, 3))
    torch.testing.assert_close(terms["guidance"], (e - a).square().mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["guidance"], ((e - u) - (a - u)).square().mean(), rtol=1e-10, atol=0)
    assert terms["unconditional"] < 1e-24
    torch.testing.assert_close(terms["loss"], terms["guidance"])


def test_without_loss_the_concept_is_the_alternative_at_every_guidance_scale():
    table = Table()
    eraser = eraser_of(table, shape=(1, 3, 3))
    e, a, u = 0, 1, 3
    with torch.no_grad():
        eraser.unet_.rows[e] = table.rows[a]
    assert eraser.loss(*some_states(table))["loss"] < 1e-28

    def guided(rows: Tensor, c: int, s: float) -> Tensor:
        return rows[u] + s * (rows[c] - rows[u])

    moved = copy.deepcopy(eraser.unet_)  # a minimum of conditional targets (ESD): right at s = 1, u free
    with torch.no_grad():
        moved.rows[u] += 0.5
    for s in (0.0, 1.0, 3.0, 7.5):
        wanted = guided(table.rows, a, s)
        assert (guided(eraser.unet_.rows, e, s) - wanted).abs().max() < 7e-15
        assert ((guided(moved.rows, e, s) - wanted).abs().max() > 0.1) == (s != 1.0)


@pytest.mark.parametrize("detach", [True, False])
def test_guidance_loss_leaves_the_unconditional_prediction_alone(detach):
    e, u, target, u0 = torch.randn(4, 2, 1, 3, 3, requires_grad=True).unbind()
    terms = guidance_term_loss(e, u, target.detach(), u0.detach(), detach_uncond=detach)
    gradient = torch.autograd.grad(terms[1], u, allow_unused=True, retain_graph=True)[0]
    assert (gradient is None) == detach
    if not detach:
        torch.testing.assert_close(gradient, -torch.autograd.grad(terms[1], e)[0])


@pytest.mark.parametrize("preserve_weight", [1.0, 1e8])
def test_free_rows_end_at_the_closed_form(preserve_weight):
    """The null row stays to the bit, the erased row becomes the alternative's, the others are not touched."""
    table = Table(slope=0.1)
    eraser = eraser_of(table, shape=(1, 3, 3), preserve_weight=preserve_weight, lr=0.05, steps=600, batch_size=8)
    trained = eraser.fit(rng())
    torch.testing.assert_close(trained.rows[0], table.rows[1], rtol=0, atol=1e-6)
    assert torch.equal(trained.rows[1:], table.rows[1:])
    assert eraser.history_[-1]["unconditional"] == 0


def test_without_an_alternative_guidance_ends_at_zero_or_beyond():
    for eta in (0.0, 2.0):
        table = Table()
        trained = eraser_of(table, alternative=None, eta=eta, shape=(1, 3, 3), lr=0.05, steps=600).fit(rng())
        e, u = table.rows[0], table.rows[3]
        torch.testing.assert_close(trained.rows[0], u - eta * (e - u), rtol=0, atol=1e-5)


def test_only_the_chosen_modules_change():
    unet = text_unet()
    before = weights(unet)
    eraser = GuidanceTermEraser(
        unet, SCHEDULER, erase=torch.randn(3, 6), alternative=torch.randn(3, 6), null=torch.randn(1, 3, 6),
        lr=1e-2, steps=3, batch_size=2, sampling_steps=3, trajectories=2,
    )  # fmt: skip
    learning = []

    def look(state) -> None:
        learning.append({name for name, p in state.model.named_parameters() if p.grad is not None})

    trained = eraser.fit(rng(), callbacks=[look])
    assert learning == [{name for name, _ in unet.named_parameters() if "attn2" in name}] * 3
    assert trained is eraser.unet_
    assert eraser.frozen is unet
    assert equal(weights(unet), before)
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "attn2" in name}
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_purification_by_the_untouched_model_gives_the_image_back():
    unet, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    from shoestring.zoo.train._fashion import garments

    images, labels = garments("test[:3]")
    errors = [
        (purify(unet, unet, scheduler, images, labels, num_inference_steps=n) - images).square().mean().sqrt()
        for n in (10, 40)
    ]
    assert errors[1] < 0.1  # of pixels in [-1, 1]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_purification_moves_along_the_difference_of_the_two_models(scale):
    """With predictions that do not depend on x, DDIM is the straight line x / a = x_0 + (b / a) eps."""
    old, new = Table(), Table()
    x_0 = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    found = purify(old, new, SCHEDULER, x_0, 0, null=3, guidance_scale=scale, num_inference_steps=7)
    alphabar = SCHEDULER.alphas_cumprod[999].double()
    guided = new.rows[3] + scale * (new.rows[0] - new.rows[3])
    wanted = x_0 + ((1 - alphabar) / alphabar).sqrt() * (old.rows[0] - guided)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-9)


# ---- the formulas


def test_target_without_alternative_is_that_of_esd():
    e, u = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(u + guidance_target(u, e, u, eta=1.5), u - 1.5 * (e - u))


def test_target_is_linear_in_eta():
    e, a, u = torch.randn(3, 5, 1, 3, 3, dtype=torch.float64)
    g_e, g_a = e - u, a - u
    torch.testing.assert_close(guidance_target(a, e, u), g_a)
    torch.testing.assert_close(guidance_target(a, e, u, eta=2.0), g_a - 2 * (g_e - g_a))


def test_loss_is_a_mean_over_all_entries():
    e, u, g, u0 = torch.randn(4, 2, 3, 4, 4, dtype=torch.float64)
    loss, guidance, unconditional = guidance_term_loss(e, u, g, u0, preserve_weight=0.3)
    n = e.numel()
    wanted = (
        sum(
            (float(x) - float(y) - float(z)) ** 2 for x, y, z in zip(*(part.ravel() for part in (e, u, g)), strict=True)
        )
        / n
    )
    assert float(guidance) == pytest.approx(wanted)
    assert float(unconditional) == pytest.approx(((u - u0) ** 2).sum().item() / n)
    assert float(loss) == pytest.approx(float(guidance) + 0.3 * float(unconditional))
    with pytest.raises(ValueError, match="one shape"):
        guidance_term_loss(e, u[:1], g, u0)


def test_a_ddim_step_undoes_itself_and_is_that_of_diffusers():
    x, eps = torch.randn(2, 2, 1, 4, 4)
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(10)
    low, high = SCHEDULER.alphas_cumprod[799], SCHEDULER.alphas_cumprod[699]
    stepped = ddim_step(x, eps, low, high)
    torch.testing.assert_close(stepped, scheduler.step(eps, 799, x).prev_sample)
    torch.testing.assert_close(ddim_step(stepped, eps, high, low), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_is_the_same_whatever_the_network_predicts(kind):
    """A network of each kind that knows the same noise."""
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    table = Table(slope=0.2)

    class Other(Table):
        def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
            eps = table(x, t, class_labels).sample
            alphabar = scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
            x_0 = (x - (1 - alphabar) ** 0.5 * eps) / alphabar**0.5
            v = alphabar**0.5 * eps - (1 - alphabar) ** 0.5 * x_0
            return SimpleNamespace(sample={"epsilon": eps, "v_prediction": v, "sample": x_0}[kind])

    x_t, t = some_states(table)
    labels = torch.tensor([0, 1, 3])
    found = predict_noise(Other(), scheduler, x_t, t, labels)
    torch.testing.assert_close(found, table(x_t, t, labels).sample, rtol=1e-6, atol=1e-6)


# ---- the pool of states


def test_states_are_those_of_guided_ddim_by_diffusers():
    unet = class_unet()
    states = eraser_of(unet, erase=[2, 0], alternative=None, guidance_scale=2.5, trajectories=3).draw_states(rng(4))
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(5)
    assert states.t.tolist() == scheduler.timesteps.tolist() * 3
    row = states.row[::5]
    assert torch.equal(states.row, row.repeat_interleave(5))
    labels = torch.tensor([2, 0])[row]
    x = states.x_t[::5]
    for k, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(states.x_t[k::5], x, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            u = unet(x, t, class_labels=torch.full_like(labels, 3)).sample
            e = unet(x, t, class_labels=labels).sample
        x = scheduler.step(u + 2.5 * (e - u), t, x).prev_sample


def test_states_carry_what_the_loss_needs_of_the_frozen_model():
    unet = class_unet().double()
    eraser = eraser_of(unet, erase=[0, 2], alternative=[1, 0], eta=0.5, trajectories=4)
    states = eraser.draw_states(rng())
    assert set(states.row.tolist()) == {0, 1}
    labels = torch.tensor([[0, 1], [2, 0]])[states.row]
    with torch.no_grad():
        e, a, u = (
            unet(states.x_t, states.t, class_labels=c).sample
            for c in (labels[:, 0], labels[:, 1], torch.full_like(states.t, 3))
        )
    torch.testing.assert_close(states.frozen_null, u)
    torch.testing.assert_close(states.target, (a - u) - 0.5 * (e - a))
    fresh = eraser.loss(states.x_t, states.t, states.row)
    told = guidance_term_loss(e, u, states.target, states.frozen_null)
    torch.testing.assert_close(fresh["loss"], told[0])


def test_order_of_the_states():
    eraser = eraser_of(class_unet(), steps=9, batch_size=2, trajectories=3, timestep_sampling="sequential")
    states = eraser.draw_states(rng())
    taken = [states.t[rows].tolist() for rows in eraser._order(15, rng())]
    grid = states.t[:5].tolist()
    assert taken == [[t, t] for t in grid] + [[t] for t in grid[:4]]  # two trajectories, then the third
    eraser.timestep_sampling = "random"
    rows = torch.cat(eraser._order(15, rng()))
    assert sorted(rows[:15].tolist()) == list(range(15))
    assert rows[:15].tolist() != list(range(15))


# ---- training


def test_hidden_states_of_several_prompts_move_towards_their_own_alternatives():
    unet = text_unet()
    erase, alternative, null = 10 * torch.randn(2, 3, 6), 10 * torch.randn(2, 3, 6), 10 * torch.randn(3, 6)
    eraser = GuidanceTermEraser(
        unet, SCHEDULER, erase=erase, alternative=alternative, null=null, lr=3e-3, steps=60, batch_size=8,
        sampling_steps=8, trajectories=6,
    )  # fmt: skip
    states = eraser.draw_states(rng())
    start = float(eraser.loss(states.x_t, states.t, states.row)["guidance"])
    eraser.fit(rng(), states=states)
    end = float(eraser.loss(states.x_t, states.t, states.row)["guidance"])
    swapped = float(eraser.loss(states.x_t, states.t, 1 - states.row)["guidance"])
    assert end < 0.5 * start
    assert end < 0.9 * swapped


def test_preservation_holds_the_unconditional_prediction():
    drift = []
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        eraser = eraser_of(class_unet(), preserve_weight=weight, lr=3e-3, steps=40, batch_size=4, trajectories=8)
        eraser.fit(rng())
        drift.append(eraser.history_[-1]["unconditional"])
    assert drift[1] < 0.5 * drift[0]


def test_same_seed_same_weights():
    found = [weights(eraser_of(unet, steps=2, lr=1e-3).fit(rng(seed))) for unet in [class_unet()] for seed in (3, 3, 4)]
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_global_generator_is_left_alone():
    unet = class_unet()
    before = torch.get_rng_state()
    eraser_of(unet, steps=1).fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_inplace_trains_the_network_given():
    unet = class_unet()
    before = weights(unet)
    eraser = eraser_of(unet, inplace=True, steps=2, lr=1e-2)
    assert eraser.fit(rng()) is unet
    assert not equal(weights(unet), before)
    assert equal(weights(eraser.frozen), before)


def test_network_in_train_mode_is_frozen_as_a_copy_in_eval_mode():
    unet = class_unet().train()
    eraser = eraser_of(unet)
    assert eraser.frozen is not unet
    assert not any(module.training for module in eraser.frozen.modules())
    assert all(module.training for module in unet.modules())


def test_saved_network_is_read_by_diffusers_alone(tmp_path):
    trained = eraser_of(class_unet(), steps=1, lr=1e-2).fit(rng())
    trained.save_pretrained(tmp_path)
    assert equal(weights(UNet2DModel.from_pretrained(tmp_path)), weights(trained))


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    unet = class_unet()
    whole = weights(eraser_of(unet, steps=4, lr=1e-2).fit(rng()))
    eraser_of(unet, steps=4, lr=1e-2).fit(rng(), max_steps=2, checkpoint=tmp_path)
    resumed = eraser_of(unet, steps=4, lr=1e-2)
    assert equal(weights(resumed.fit(rng(), checkpoint=tmp_path)), whole)
    assert resumed.history_[-1]["step"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_has_its_loss_in_single_precision(dtype):
    unet = class_unet().to(dtype)
    x_t, t = some_states(unet)
    terms = eraser_of(unet).loss(x_t, t)
    assert terms["loss"].dtype == torch.float32
    single = eraser_of(unet.float()).loss(x_t.float(), t)
    torch.testing.assert_close(terms["loss"], single["loss"], rtol=0.1, atol=1e-3)
    assert eraser_of(unet.to(dtype)).draw_states(rng()).x_t.dtype == dtype


# ---- what is refused


def test_loss_that_is_not_finite_stops_and_leaves_the_last_good_weights():
    eraser = eraser_of(class_unet(), steps=6, lr=1e-3)
    states = eraser.draw_states(rng())
    order = torch.cat(eraser._order(len(states.t), rng(7)))
    target = states.target.clone()
    target[order[2]] = float("nan")
    before = []

    def remember(state) -> None:
        before.append(weights(state.model))

    with pytest.raises(FloatingPointError, match="step 3"):
        eraser.fit(rng(7), states=states._replace(target=target), callbacks=[remember])
    assert len(before) == 2
    assert equal(weights(eraser.unet_), before[-1])
    assert all(torch.isfinite(tensor).all() for tensor in eraser.unet_.state_dict().values())


BAD = {
    "nothing to erase": ({"erase": []}, ValueError, "erase must not be empty"),
    "no hidden states": ({"erase": torch.zeros(0, 3, 6)}, ValueError, "erase must not be empty"),
    "hidden states for a network of classes": ({"erase": torch.zeros(3, 6)}, ValueError, "no cross-attention"),
    "a label that is none": ({"erase": 4}, ValueError, "from 0 to 3"),
    "a negative label": ({"alternative": -1}, ValueError, "alternative must hold labels"),
    "a word": ({"erase": "pig"}, TypeError, "class labels or encoder_hidden_states"),
    "truth for a label": ({"erase": True}, TypeError, "class labels or encoder_hidden_states"),
    "two null conditions": ({"null": [2, 3]}, ValueError, "null must be one condition, got 2"),
    "two alternatives for three": ({"erase": [0, 1, 2], "alternative": [1, 2]}, ValueError, "one condition or 3"),
    "a negative weight": ({"preserve_weight": -1.0}, ValueError, "preserve_weight must be"),
    "an infinite eta": ({"eta": float("inf")}, ValueError, "eta must be"),
    "no steps": ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
    "cross-attention of a network without": ({"trainable": "attn2"}, ValueError, "no cross-attention"),
    "an unknown order": ({"timestep_sampling": "sorted"}, ValueError, "timestep_sampling must be"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_changes(options, error, message):
    unet = class_unet()
    before = weights(unet)
    with pytest.raises(error, match=message):
        eraser_of(unet, **options)
    assert equal(weights(unet), before)


def test_conditions_of_a_network_of_prompts():
    unet, good = text_unet(), torch.randn(3, 6)
    for erase, message in (
        (0, "knows no classes"),
        (torch.randn(3, 5), "width 6"),
        (torch.randn(6), r"\(L, D\) or \(K, L, D\)"),
        (torch.full((3, 6), float("nan")), "finite"),
        (torch.randn(4, 6), "kind and size"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidanceTermEraser(unet, SCHEDULER, erase=erase, null=good)


def test_models_and_schedulers_that_cannot_be():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        eraser_of("unet")
    with pytest.raises(TypeError, match="scheduler must be"):
        GuidanceTermEraser(class_unet(), "ddim", erase=0, null=3)
    broken = class_unet()
    with torch.no_grad():
        broken.conv_in.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in conv_in"):
        eraser_of(broken)
    with pytest.raises(ValueError, match="shape must be given"):
        eraser_of(Table())
    sides = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    two_out = UNet2DModel(8, 1, 2, num_class_embeds=4, **sides, **BLOCKS)
    with pytest.raises(ValueError, match="as many output as input channels"):
        eraser_of(two_out)
    with pytest.raises(ValueError, match="states must not be empty"):
        eraser_of(class_unet()).fit(states=States(*(torch.zeros(0) for _ in range(5))))
    with pytest.raises(ValueError, match="null must be given"):
        purify(class_unet(), class_unet(), DDPMScheduler(), torch.zeros(1, 1, 8, 8), 0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="one or 1"):
        purify(class_unet(), class_unet(), DDPMScheduler(), torch.zeros(1, 1, 8, 8), [0, 1])
