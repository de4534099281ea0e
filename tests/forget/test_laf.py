"""LAF: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from shoestring.forget.laf import (
    LabelAgnosticForgetting,
    RepresentationVAE,
    extractor_unlearning_loss,
    fit_representation_vae,
    repair,
    representation_alignment_loss,
    rho,
    vae_loss,
)

DIGITS = torch.as_tensor(load_digits().data, dtype=torch.float32) / 16
LABELS = torch.as_tensor(load_digits().target)
FORGET, RETAIN = LABELS == 3, LABELS != 3


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.Linear(24, 10))


def batches(rows, size=32, labels=LABELS):
    return list(zip(DIGITS[rows].split(size), labels[rows].split(size), strict=True))


def few(rows, n=3):
    return batches(rows)[:n]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SHORT = {"vae_epochs": 1, "epochs": 2}


# ---- the mathematics


def test_rho_starts_at_one_rises_and_stays_below_e():
    m = torch.linspace(0, 1000, 5001, dtype=torch.float64)
    r = rho(m)
    assert r[0] == 1
    assert (r.diff() > 0).all()
    assert (r < math.e).all()
    torch.testing.assert_close(rho(torch.tensor(3.0, dtype=torch.float64)).item(), math.exp(0.75))


def test_unlearning_loss_is_the_equation_and_lies_within_its_bounds():
    e_r, h_r, e_f, h_f = (100 * randn(b, 6, seed=s) for s, b in enumerate((5, 5, 3, 3)))
    loss = extractor_unlearning_loss(e_r, h_r, e_f, h_f)
    terms = [[math.exp(m / (m + 1)) for m in ((a - b) ** 2).sum(1).tolist()] for a, b in ((e_r, h_r), (e_f, h_f))]
    torch.testing.assert_close(loss.item(), sum(terms[0]) - sum(terms[1]), rtol=0, atol=1e-12)
    assert 5 - 3 * math.e < loss < 5 * math.e - 3
    assert extractor_unlearning_loss(e_r, e_r, e_f, e_f) == 5 - 3
    near, far = extractor_unlearning_loss(e_r, e_r, e_f, h_f), extractor_unlearning_loss(e_r, h_r, e_f, e_f)
    assert near < 2 < far


@pytest.mark.parametrize("tau", [0.5, 5.0, 20.0])
def test_alignment_at_the_teacher_is_minus_b_log_b_and_stationary(tau):
    e_r, e_f = randn(5, 6).requires_grad_(), randn(3, 6, seed=1).requires_grad_()
    loss = representation_alignment_loss(e_r, e_r.detach(), e_f, e_f.detach(), tau)
    torch.testing.assert_close(loss.item(), -5 * math.log(3), rtol=0, atol=1e-12)
    for grad in torch.autograd.grad(loss, (e_r, e_f)):
        assert grad.norm() < 1e-12


def test_alignment_is_the_equation_with_the_temperature_in_the_forget_term_only():
    e_r, r0, e_f, f0 = (randn(b, 6, seed=s) for s, b in enumerate((5, 5, 3, 3)))
    s = 1 - (e_r * r0).sum(1) / (e_r.norm(dim=1) * r0.norm(dim=1))
    q = 1 - (e_f * f0).sum(1) / (e_f.norm(dim=1) * f0.norm(dim=1))
    expected = torch.log(s.exp() / (q / 7.0).exp().sum()).sum()
    loss = representation_alignment_loss(e_r, r0, e_f, f0, 7.0)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    scaled = representation_alignment_loss(3 * e_r, 0.1 * r0, 5 * e_f, 7 * f0, 7.0)
    torch.testing.assert_close(scaled, loss, rtol=0, atol=1e-12)


def test_alignment_gradient_of_q_is_the_weighted_softmax():
    angle = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    e_f = torch.stack([angle.cos(), angle.sin()], 1)
    e_f0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    e_r = randn(5, 2)
    (grad,) = torch.autograd.grad(representation_alignment_loss(e_r, e_r, e_f, e_f0, 4.0), angle)
    q = 1 - angle.detach().cos()
    expected = -(5 / 4.0) * (q / 4.0).softmax(0) * angle.detach().sin()  # dq / d angle = sin
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_losses_are_sums_over_rows():
    e_r, r0, e_f, f0 = (randn(b, 6, seed=s) for s, b in enumerate((5, 5, 3, 3)))
    twice = [torch.cat([x, x]) for x in (e_r, r0, e_f, f0)]
    torch.testing.assert_close(
        extractor_unlearning_loss(*twice), 2 * extractor_unlearning_loss(e_r, r0, e_f, f0), rtol=0, atol=1e-12
    )
    once = representation_alignment_loss(e_r, r0, e_f, f0, 5.0)
    doubled = representation_alignment_loss(*twice, 5.0)
    torch.testing.assert_close(doubled, 2 * once - 2 * 5 * math.log(2), rtol=0, atol=1e-12)


def test_vae_loss_is_squared_error_plus_kl_of_torch_distributions():
    e, e_out, mu, log_var = (randn(b, d, seed=s) for s, (b, d) in enumerate(((4, 6), (4, 6), (4, 3), (4, 3))))
    posterior = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 4
    expected = ((e_out - e) ** 2).sum() / 4 + 0.025 * kl
    torch.testing.assert_close(vae_loss(e_out, e, mu, log_var), expected, rtol=0, atol=1e-12)
    zero = torch.zeros(4, 3, dtype=torch.float64)
    assert vae_loss(e, e, zero, zero, 1.0) == 0
    assert vae_loss(e, e, zero + 0.1, zero, 1.0) > 0
    assert vae_loss(e, e, zero, zero + 0.1, 1.0) > 0
    assert vae_loss(e, e, zero, zero - 0.1, 1.0) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_do_not_overflow(dtype):
    e = torch.full((2, 64), 200.0, dtype=dtype)  # the squared distance, 1e7, is beyond float16
    loss = extractor_unlearning_loss(e, -e, e, e)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 2 * math.e - 2, atol=1e-3, rtol=0)
    assert representation_alignment_loss(e, e, e, -e, 1.0).item() == pytest.approx(-2 * (2 + math.log(2)), abs=1e-3)


def test_the_maths_works_without_gradients():
    with torch.no_grad():
        e = torch.ones(2, 3)
        assert extractor_unlearning_loss(e, e, e, e) == 0
        assert not representation_alignment_loss(e, e, e, e, 1.0).requires_grad


# ---- the VAE


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_vae_learns_features_and_draws_from_its_generator(activation):
    e = torch.randn(256, 2, generator=gen()) @ torch.randn(2, 12, generator=gen(1)) * 3 + 5
    options = {"latent_dim": 2, "epochs": 40, "output_activation": activation}
    vae = fit_representation_vae(e, generator=gen(2), **options)
    x = vae.scaled(e)
    error = (vae(x, gen())[0] - x).square().mean()
    if activation is None:
        torch.testing.assert_close(x.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(12), atol=1e-4, rtol=0)
        assert error < 0.4  # the mean alone leaves 1
    else:
        assert torch.equal(x, e)
        assert vae(x, gen())[0].max() <= 1
    again = fit_representation_vae(e, generator=gen(2), **options)
    assert same(weights(vae), weights(again))
    assert torch.equal(vae(x, gen(3))[0], again(x, gen(3))[0])
    assert not torch.equal(vae(x, gen(3))[0], vae(x, gen(4))[0])  # z is drawn, in eval mode too
    assert not any(p.requires_grad for p in vae.parameters())


def test_vae_has_the_official_shape():
    vae = RepresentationVAE(256, 8)
    shapes = [tuple(p.shape) for p in vae.parameters() if p.ndim == 2]
    assert shapes == [(128, 256), (32, 128), (8, 32), (8, 32), (32, 8), (128, 32), (256, 128)]


def test_a_feature_that_never_changes_is_not_blown_up():
    e = torch.randn(64, 4, generator=gen())
    e[:, 1] = 2.0
    vae = fit_representation_vae(e, latent_dim=2, epochs=1, output_activation=None, generator=gen())
    assert torch.equal(vae.scaled(e)[:, 1], torch.zeros(64))
    assert vae.scaled(e + 1e-3)[:, 1].abs().max() < 2e-3


# ---- the method


def test_labels_are_never_read():
    model = network()
    shuffled = LABELS[torch.randperm(len(LABELS), generator=gen())]
    results = []
    for forget, retain in (
        (few(FORGET), few(RETAIN)),
        (batches(FORGET, labels=shuffled)[:3], batches(RETAIN, labels=shuffled)[:3]),
        ([x for x, _ in few(FORGET)], [x for x, _ in few(RETAIN)]),
    ):
        laf = LabelAgnosticForgetting("2", **SHORT, generator=gen(1)).fit(model, forget, retain)
        results.append(weights(laf.model_))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert not same(results[0], weights(model))


def test_only_the_layers_before_the_feature_move_and_the_given_model_does_not():
    model = network()
    model[0].bias.requires_grad_(False)
    before = weights(model)
    laf = LabelAgnosticForgetting("2", **SHORT).fit(model, few(FORGET), few(RETAIN))
    assert same(weights(model), before)
    moved = [not torch.equal(a, b) for a, b in zip(weights(laf.model_), before, strict=True)]
    assert moved == [True, False, True, True, False, False]
    assert all(p.grad is None for p in laf.model_.parameters())


def test_in_place_changes_the_model_itself_and_equally():
    model = network()
    laf = LabelAgnosticForgetting("2", **SHORT).fit(model, few(FORGET), few(RETAIN))
    twin = copy.deepcopy(model)
    inplace = LabelAgnosticForgetting("2", **SHORT, inplace=True).fit(twin, few(FORGET), few(RETAIN))
    assert inplace.model_ is twin
    assert same(weights(twin), weights(laf.model_))


@pytest.mark.parametrize("vae_rows", ["all", "retain"])
def test_it_is_the_official_algorithm_written_plainly(vae_rows):
    model = network()
    forget, retain = [x for x, _ in few(FORGET)], [x for x, _ in few(RETAIN)]
    options = {"latent_dim": 4, "lr_extractor": 1e-3, "lr_align": 2e-3, "temperature": 3.0, "retain_vae_on": vae_rows}
    laf = LabelAgnosticForgetting("2", **SHORT, **options, generator=gen(7)).fit(model, forget, retain)

    g, head, generator = copy.deepcopy(model[:3]), model[3], gen(7)
    teacher = copy.deepcopy(g)
    with torch.no_grad():
        e_f, e_r = g(torch.cat(forget)), g(torch.cat(retain))
    h_rows = torch.cat([e_f, e_r]) if vae_rows == "all" else e_r
    h, h_f = (fit_representation_vae(e, latent_dim=4, epochs=1, generator=generator) for e in (h_rows, e_f))
    first, second = torch.optim.Adam(g.parameters(), 1e-3), torch.optim.Adam(g.parameters(), 2e-3)
    cosine = nn.CosineEmbeddingLoss(reduction="none")
    for _ in range(2):
        for x_f, x_r in zip(forget, retain, strict=True):
            e_r, e_f = g(x_r), g(x_f)
            m_r = F.mse_loss(h(e_r, generator)[0], e_r, reduction="none").sum(1)
            m_f = F.mse_loss(h_f(e_f, generator)[0], e_f, reduction="none").sum(1)
            first.zero_grad()
            ((m_r / (m_r + 1)).exp().sum() - (m_f / (m_f + 1)).exp().sum()).backward()
            first.step()
            s = cosine(g(x_r), teacher(x_r).detach(), torch.ones(len(x_r)))
            q = cosine(g(x_f), teacher(x_f).detach(), torch.ones(len(x_f)))
            second.zero_grad()
            torch.log(s.exp() / (q / 3.0).exp().sum()).sum().backward()
            second.step()
    for ours, theirs in zip(weights(laf.model_), [*weights(g), *weights(head)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_class_is_forgotten_and_the_others_stay():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(DIGITS), LABELS).backward()
        optimizer.step()

    def accuracy(model, rows):
        return (model(DIGITS[rows]).argmax(1) == LABELS[rows]).float().mean().item()

    assert min(accuracy(model, FORGET), accuracy(model, RETAIN)) > 0.9
    options = {"lr_extractor": 5e-3, "lr_align": 1e-2, "temperature": 5.0}  # for 120 steps, the paper takes 3,750
    retain = DataLoader(TensorDataset(DIGITS[RETAIN]), 32, shuffle=True, generator=gen())
    laf = LabelAgnosticForgetting("2", **options).fit(model, batches(FORGET), retain)
    assert accuracy(laf.model_, FORGET) < 0.2
    assert accuracy(laf.model_, RETAIN) > 0.85


def test_seeds_decide_and_torchs_own_generator_is_left_alone():
    model, state = network(), torch.get_rng_state()

    def run(**options):
        return weights(LabelAgnosticForgetting("2", **SHORT, **options).fit(model, few(FORGET), few(RETAIN)).model_)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        first = run()
    assert same(first, run(generator=gen(0)))
    assert not same(run(), run(generator=gen(1)))
    assert torch.equal(torch.get_rng_state(), state)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
            self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.body(x.reshape(-1, 1, 8, 8)).flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_frozen_and_the_mode_comes_back(training):
    model = Normed().train(training)
    laf = LabelAgnosticForgetting("body", **SHORT).fit(model, few(FORGET), few(RETAIN))
    assert laf.model_.training is training
    assert torch.equal(laf.model_.body[1].running_mean, model.body[1].running_mean)
    assert int(laf.model_.body[1].num_batches_tracked) == 0
    assert not torch.equal(laf.model_.body[0].weight, model.body[0].weight)


def test_bfloat16_models_keep_their_dtype():
    model = network().bfloat16()
    forget, retain = [[x.bfloat16() for x, _ in few(rows)] for rows in (FORGET, RETAIN)]
    laf = LabelAgnosticForgetting("2", **SHORT, lr_align=1e-2).fit(model, forget, retain)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in laf.model_.parameters())
    assert not same(weights(laf.model_), weights(model))


def test_transformers_models_take_dicts_and_load_again(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        config = ResNetConfig(**sizes, layer_type="basic", num_labels=10)
        model = ResNetForImageClassification(config).eval()
    forget, retain = (
        [{"pixel_values": x.reshape(-1, 1, 8, 8).repeat(1, 1, 4, 4), "labels": y} for x, y in few(rows, 1)]
        for rows in (FORGET, RETAIN)
    )
    laf = LabelAgnosticForgetting("resnet.pooler", **SHORT).fit(model, forget, retain)
    assert same(list(laf.model_.classifier.parameters()), list(model.classifier.parameters()))
    before, after = (m(forget[0]["pixel_values"]).logits for m in (model, laf.model_))
    assert not torch.equal(before, after)
    laf.model_.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(forget[0]["pixel_values"]).logits, after)


class Breaks:
    """Batches that fail in the pass of the given number."""

    def __init__(self, batches, at):
        self.batches, self.at, self.passes = batches, at, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        yield self.batches[0]
        if self.passes == self.at:
            raise OSError("the disk is gone")
        yield from self.batches[1:]


def test_a_crashed_run_goes_on_to_the_same_weights(tmp_path):
    model, before = network(), weights(network())
    forget, retain = few(FORGET), few(RETAIN)
    options = {"vae_epochs": 1, "epochs": 3, "lr_align": 1e-2}
    whole = LabelAgnosticForgetting("2", **options, generator=gen(1)).fit(model, forget, retain)
    crashed = LabelAgnosticForgetting("2", **options, generator=gen(1))
    with pytest.raises(OSError, match="the disk is gone"):
        crashed.fit(model, forget, Breaks(retain, at=3), checkpoint=tmp_path)  # in the second epoch
    assert not hasattr(crashed, "model_")
    assert same(weights(model), before)
    resumed = LabelAgnosticForgetting("2", **options, generator=gen(1)).fit(model, forget, retain, checkpoint=tmp_path)
    assert same(weights(resumed.model_), weights(whole.model_))
    assert resumed.history_ == whole.history_


# ---- LAF+R


def test_repair_trains_the_head_alone():
    model, before = network(), weights(network())
    repaired = repair(model, few(RETAIN), head="3", epochs=5, lr=1e-2)
    assert same(weights(model), before)
    assert same(weights(repaired[:3]), before[:4])
    losses = [F.cross_entropy(m(DIGITS[RETAIN]), LABELS[RETAIN]) for m in (model, repaired)]
    assert losses[1] < losses[0] - 0.1
    assert repair(model, few(RETAIN), head="3", inplace=True) is model
    assert not same(weights(model), before)


def test_repair_is_adam_on_cross_entropy():
    model = network()
    repaired = repair(model, few(RETAIN), head="3", max_steps=2, lr=1e-2)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain[3].parameters(), 1e-2)
    for x, y in few(RETAIN)[:2]:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(repaired[3].weight, plain[3].weight, rtol=0, atol=1e-7)


# ---- what must be refused, or said


def test_overlap_is_counted():
    forget = few(FORGET, 2)
    retain = [*few(RETAIN, 2), (forget[0][0][:5], forget[0][1][:5])]
    with pytest.warns(UserWarning, match="5 of 64 rows of forget_loader are in retain_loader"):
        LabelAgnosticForgetting("2", **SHORT).fit(network(), forget, retain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LabelAgnosticForgetting("2", **SHORT).fit(network(), forget, few(RETAIN, 2))


@pytest.mark.parametrize(
    ("options", "forget", "retain", "error", "message"),
    [
        ({}, [], few(RETAIN), ValueError, "forget_loader yields no batches"),
        ({}, few(FORGET), [], ValueError, "retain_loader yields no batches"),
        ({}, iter(few(FORGET)), few(RETAIN), TypeError, "forget_loader is read several times"),
        ({}, few(FORGET), 3, TypeError, "retain_loader must be a DataLoader"),
        ({}, [torch.full((4, 64), torch.nan)], few(RETAIN), ValueError, "features of forget_loader must be finite"),
        ({"feature_layer": "features"}, few(FORGET), few(RETAIN), ValueError, "must name modules .* got 'features'"),
        ({"feature_layer": ""}, few(FORGET), few(RETAIN), ValueError, "feature_layer must be the name"),
        ({"latent_dim": 0}, few(FORGET), few(RETAIN), ValueError, "latent_dim must be a whole number >= 1, got 0"),
        ({"epochs": 1.5}, few(FORGET), few(RETAIN), ValueError, "epochs must be a whole number"),
        ({"temperature": 0.0}, few(FORGET), few(RETAIN), ValueError, "temperature must be a finite number > 0"),
        ({"lr_align": math.nan}, few(FORGET), few(RETAIN), ValueError, "lr_align must be a finite number"),
        ({"kl_weight": -1.0}, few(FORGET), few(RETAIN), ValueError, "kl_weight must be"),
        ({"output_activation": "tanh"}, few(FORGET), few(RETAIN), ValueError, "output_activation must be 'sigmoid'"),
        ({"retain_vae_on": "forget"}, few(FORGET), few(RETAIN), ValueError, "retain_vae_on must be 'all' or"),
        ({"lr_extractor": 1e30}, few(FORGET), few(RETAIN), FloatingPointError, "loss is"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays_as_it_was(options, forget, retain, error, message):
    model, before = network(), weights(network())
    laf = LabelAgnosticForgetting(**{"feature_layer": "2", **SHORT, **options})
    with pytest.raises(error, match=message):
        laf.fit(model, forget, retain)
    assert same(weights(model), before)
    assert model.training
    assert not model[2]._forward_hooks
    assert not hasattr(laf, "model_")


def test_bad_models_are_refused():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 0\.weight"):
        LabelAgnosticForgetting("2").fit(model, few(FORGET), few(RETAIN))
    frozen = network()
    frozen[:3].requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter before it"):
        LabelAgnosticForgetting("2").fit(frozen, few(FORGET), few(RETAIN))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        LabelAgnosticForgetting("2").fit("resnet", few(FORGET), few(RETAIN))


def test_bad_repairs_are_refused():
    model, before = network(), weights(network())
    for loader, options, error, message in (
        ([x for x, _ in few(RETAIN)], {"head": "3"}, ValueError, "labelled_loader must yield"),
        ([], {"head": "3"}, ValueError, "empty"),
        (few(RETAIN), {"head": "fc"}, ValueError, "head must name a module of the model, got 'fc'"),
        (few(RETAIN), {"head": "1"}, ValueError, "head must have parameters"),
        (few(RETAIN), {"head": "3", "lr": 0.0}, ValueError, "lr must be"),
    ):
        with pytest.raises(error, match=message):
            repair(model, loader, **options)
    assert same(weights(model), before)
