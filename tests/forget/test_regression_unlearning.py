"""Regression unlearning: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from shoestring.forget._regression_rows import shuffled
from shoestring.forget.regression_unlearning import (
    anamnesis_index,
    attention_map,
    attention_transfer_loss,
    blindspot_loss,
    blindspot_unlearn,
    gaussian_amnesiac_unlearn,
    gaussian_targets,
    loss_membership_attack,
    prediction_wasserstein,
    relearning_steps,
    train_blindspot,
)

DIGITS = torch.as_tensor(load_digits().data, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
VALUES = torch.as_tensor(load_digits().target, dtype=torch.float32)[:, None]
ROWS = TensorDataset(DIGITS, VALUES)
LOW, HIGH = (torch.nonzero(part[:, 0])[:, 0].tolist() for part in (VALUES < 3, VALUES >= 3))
FORGET, RETAIN = DataLoader(Subset(ROWS, LOW[:40]), 20), DataLoader(Subset(ROWS, HIGH[:80]), 40)
METHODS = [blindspot_unlearn, gaussian_amnesiac_unlearn]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=gen(seed), dtype=dtype)


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def conv_net(seed=0):
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 1)),
        ),
        seed,
    )


def line(seed=0):
    return seeded(lambda: nn.Linear(3, 1), seed).double()


def weights(model):
    return [v.detach().clone() for v in model.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


U = torch.tensor([True, False, False, True, False, False, True, False])


# ---- the mathematics


@pytest.mark.parametrize("loss_fn", [F.l1_loss, F.mse_loss])
def test_batch_loss_is_the_mean_of_the_papers_loss_per_row(loss_fn):
    f, y, b = (randn(8, 1, seed=s) for s in range(3))
    loss = blindspot_loss(f, y, U, b[U], loss_fn=loss_fn)
    u = U.double()[:, None]
    per_row = u * loss_fn(f, b, reduction="none") + (1 - u) * loss_fn(f, y, reduction="none")
    torch.testing.assert_close(loss, per_row.mean(), rtol=0, atol=1e-12)


def test_attention_joins_the_forget_part_with_its_weight():
    f, y, b = (randn(8, 1, seed=s) for s in range(3))
    h, h_b = [randn(3, 4, 5, seed=4), randn(3, 2, 3, 3, seed=5)], [randn(3, 6, 5, seed=6), randn(3, 2, 3, 3, seed=7)]
    with_maps = blindspot_loss(f, y, U, b[U], h, h_b, attention_weight=50.0)
    without = blindspot_loss(f, y, U, b[U])
    expected = 3 / 8 * 50.0 * attention_transfer_loss(h, h_b)
    torch.testing.assert_close(with_maps - without, expected, rtol=0, atol=1e-12)


def test_attention_map_is_the_equation():
    h = randn(2, 3, 4, 5)
    v = (h**2).sum(1).reshape(2, 20)
    torch.testing.assert_close(attention_map(h), v / (v**2).sum(1, keepdim=True).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(attention_map(h.movedim(1, -1), channel_dim=-1), attention_map(h), rtol=0, atol=1e-12)


def test_attention_map_has_unit_rows_and_knows_neither_size_nor_sign_nor_order_of_channels():
    h = randn(4, 6, 5, 5)
    A = attention_map(h)
    torch.testing.assert_close(A.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    for other in (
        3.7 * h,
        1e-3 * h,
        -h,
        h * torch.tensor([1, -1, 1, -1, -1, 1.0])[:, None, None],
        h[:, [3, 1, 5, 0, 2, 4]],
    ):
        torch.testing.assert_close(attention_map(other), A, rtol=0, atol=1e-12)
    assert (attention_map(torch.roll(h, 1, -1)) - A).abs().max() > 0.05
    assert torch.equal(attention_map(0 * h), 0 * A)  # a dead layer, not NaN


def test_attention_transfer_is_zero_for_multiples_and_sums_means_over_layers():
    h, k = randn(2, 3, 4, 4), randn(2, 5, 6, seed=1)
    assert attention_transfer_loss([h, k], [-2.5 * h, 0.1 * k]) < 1e-24
    h2, k2 = randn(2, 3, 4, 4, seed=2), randn(2, 5, 6, seed=3)
    parts = [((attention_map(a) - attention_map(b)) ** 2).sum() / (2 * n) for a, b, n in ((h, h2, 16), (k, k2, 6))]
    torch.testing.assert_close(attention_transfer_loss([h, k], [h2, k2]), sum(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_squared_in_single(dtype):
    h = torch.full((2, 3, 4), 1000.0, dtype=dtype)
    torch.testing.assert_close(attention_map(h), torch.full((2, 4), 0.5))


def test_loss_of_a_student_that_is_the_blindspot_model_is_zero():
    b, h = randn(8, 1), [randn(8, 3, 4)]
    all_of_it = torch.ones(8, dtype=torch.bool)
    assert blindspot_loss(b, randn(8, 1, seed=1), all_of_it, b, h, h) == 0


@pytest.mark.parametrize("loss_fn", [F.l1_loss, F.mse_loss])
def test_forget_gradient_starts_at_zero_if_the_blindspot_model_is_the_student(loss_fn):
    model = line()
    x, y = randn(8, 3), randn(8, 1, seed=1)
    loss = blindspot_loss(model(x), y, U, model(x[U]).detach(), attention_weight=0.0, loss_fn=loss_fn)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    retain_only = torch.autograd.grad(5 / 8 * loss_fn(model(x[~U]), y[~U]), list(model.parameters()))
    for grad, expected in zip(grads, retain_only, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def descend(model, loss_of, steps=5):
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for i in range(steps):
        optimizer.zero_grad()
        loss_of(model, randn(8, 3, seed=i), randn(8, 1, seed=100 + i)).backward()
        optimizer.step()
    return weights(model)


def test_without_forget_rows_it_is_fine_tuning_step_for_step():
    none, empty = torch.zeros(8, dtype=torch.bool), torch.zeros(0, 1, dtype=torch.float64)
    ours = descend(line(), lambda m, x, y: blindspot_loss(m(x), y, none, empty, [empty], [empty]))
    assert same(ours, descend(line(), lambda m, x, y: F.l1_loss(m(x), y)))


def test_without_retain_rows_it_is_distillation_from_the_blindspot_model():
    every, b = torch.ones(8, dtype=torch.bool), line(9)
    ours = descend(line(), lambda m, x, y: blindspot_loss(m(x), y, every, b(x).detach()))
    assert same(ours, descend(line(), lambda m, x, y: F.l1_loss(m(x), b(x).detach())))


def test_flat_targets_mean_the_same_as_a_column_and_others_are_refused():
    f, y, b = (randn(8, 1, seed=s) for s in range(3))
    assert blindspot_loss(f, y[:, 0], U, b[U, 0]) == blindspot_loss(f, y, U, b[U])
    with pytest.raises(ValueError, match=r"target must be of the shape of the predictions, \(8, 1\), got \(8, 2\)"):
        blindspot_loss(f, randn(8, 2), U, b[U])
    with pytest.raises(ValueError, match="blindspot_output must be of the shape"):
        blindspot_loss(f, y, U, b)


def test_maps_without_positions_or_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"attention needs activations of shape .* got \(8, 4\)"):
        attention_map(randn(8, 4))
    with pytest.raises(ValueError, match="maps must have equal rows and positions"):
        attention_transfer_loss([randn(2, 3, 4)], [randn(2, 3, 5)])
    with pytest.raises(ValueError, match="as many student as teacher maps"):
        attention_transfer_loss([randn(2, 3, 4)], [])


def test_gaussian_targets_have_the_mean_and_deviation_asked_for():
    drawn = gaussian_targets(torch.zeros(200_000, 1), 7.0, 3.0, gen())
    assert drawn.shape == (200_000, 1)
    assert drawn.mean().item() == pytest.approx(7.0, abs=0.03)
    assert drawn.std().item() == pytest.approx(3.0, abs=0.02)
    assert torch.equal(drawn[:5], gaussian_targets(torch.zeros(200_000, 1), 7.0, 3.0, gen())[:5])
    two = gaussian_targets(torch.zeros(9, 2), torch.tensor([1.0, -1.0]), 0.0, gen())
    assert torch.equal(two, torch.tensor([1.0, -1.0]).expand(9, 2))
    assert gaussian_targets(torch.zeros(3, dtype=torch.int64), 0.5, 0.0, gen()).tolist() == [0.5] * 3
    assert gaussian_targets(torch.zeros(3, dtype=torch.float64), 0.0, 1.0, gen()).dtype == torch.float64


# ---- the measures


def test_wasserstein_of_equal_predictions_is_zero_and_of_a_shift_the_shift():
    p = randn(50).numpy()
    assert prediction_wasserstein(p, p) == 0
    assert prediction_wasserstein(p, np.random.default_rng(0).permutation(p)) == pytest.approx(0, abs=1e-12)
    assert prediction_wasserstein(p, p + 2.5) == pytest.approx(2.5, abs=1e-12)
    q = randn(50, seed=1)
    expected = np.abs(np.sort(p) - np.sort(q.numpy())).mean()
    assert prediction_wasserstein(p, q[:, None]) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="finite numbers"):
        prediction_wasserstein(p, [math.nan])


def test_the_attack_tells_members_only_where_losses_differ():
    rng = np.random.default_rng(0)
    low, high = rng.exponential(0.1, 300), 1 + rng.exponential(0.1, 300)
    assert loss_membership_attack(low, high, rng.exponential(0.1, 100)) > 0.95
    assert loss_membership_attack(low, high, 1 + rng.exponential(0.1, 100)) < 0.05
    both = np.concatenate([low[:100], high[:100]])
    assert loss_membership_attack(low, high, both) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="finite numbers, at least one, got 0"):
        loss_membership_attack(low, high, [])


def test_relearning_counts_adams_steps_and_changes_nothing():
    model = line().float()
    x = randn(32, 3, dtype=torch.float32)
    rows = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8)
    before = weights(model)
    steps = relearning_steps(model, rows, rows, 0.05, lr=0.05, loss_fn=F.mse_loss, max_epochs=50)
    assert same(weights(model), before)
    plain = copy.deepcopy(model)
    optimizer, taken = torch.optim.Adam(plain.parameters(), 0.05), 0
    batches = shuffled([rows], 8, gen())
    order = [batch for _ in range(50) for _, batch in batches]
    while F.mse_loss(plain(x), x.sum(1, keepdim=True)) > 0.05:
        a, y = order[taken]
        optimizer.zero_grad()
        F.mse_loss(plain(a), y).backward()
        optimizer.step()
        taken += 1
    assert steps == taken > 3
    assert relearning_steps(plain, rows, rows, 0.06, loss_fn=F.mse_loss) == 0
    assert relearning_steps(model, rows, rows, 0.0, loss_fn=F.mse_loss, max_epochs=2) == 8  # the cap


def test_anamnesis_index_is_one_for_gold_and_small_for_the_original():
    x = randn(64, 3, dtype=torch.float32)
    rows = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8)
    original, gold, near = (seeded(lambda: nn.Linear(3, 1), s) for s in range(3))
    with torch.no_grad():
        for model, error in ((original, 0.1), (near, 0.2)):
            model.weight.copy_(torch.full((1, 3), 1.0 - error))
            model.bias.zero_()
    options = {"lr": 0.02, "loss_fn": F.mse_loss}
    assert anamnesis_index(original, gold, gold, rows, rows, **options) == 1
    assert anamnesis_index(original, original, gold, rows, rows, **options) == 0
    assert 0 < anamnesis_index(original, near, gold, rows, rows, **options) < 0.5
    assert anamnesis_index(original, original, original, rows, rows, **options) == 1
    assert anamnesis_index(original, gold, original, rows, rows, **options) == math.inf
    with pytest.raises(ValueError, match="alpha must be"):
        anamnesis_index(original, gold, gold, rows, rows, alpha=0.0)


# ---- the rows


def test_every_row_comes_once_an_epoch_with_its_number():
    loader = shuffled([FORGET, RETAIN], None, gen())
    both = [ROWS[i] for i in (*LOW[:40], *HIGH[:80])]
    for _ in range(2):
        seen, mixed = [], 0
        for numbers, (x, y) in loader:
            assert len(numbers) <= 40
            mixed += 0 < int((numbers < 40).sum()) < len(numbers)
            seen += numbers.tolist()
            for number, image, value in zip(numbers.tolist(), x, y, strict=True):
                assert torch.equal(image, both[number][0])
                assert torch.equal(value, both[number][1])
        assert sorted(seen) == list(range(120))
        assert seen != list(range(120))
        assert mixed == 3


# ---- blindspot


def test_blindspot_is_the_algorithm_written_plainly():
    model, b = conv_net(), conv_net(5)
    before = weights(model), weights(b)
    unlearned = blindspot_unlearn(
        model, RETAIN, FORGET, blindspot=b, epochs=2, lr=1e-2, loss_fn=F.mse_loss, generator=gen(3)
    )
    assert same(weights(model), before[0])
    assert same(weights(b), before[1])
    assert b.training

    def forward(net, x):
        h1 = net[0](x)
        h2 = net[3](net[2](net[1](h1)))
        return net[5:](net[4](h2)), [h1, h2]

    def A(h):
        return F.normalize(h.pow(2).mean(1).flatten(1))

    student, frozen = conv_net(), copy.deepcopy(b).eval()
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    rows = shuffled([FORGET, RETAIN], None, gen(3))
    for _ in range(2):
        for numbers, (x, y) in rows:
            u = numbers < 40
            out, hs = forward(student, x)
            with torch.no_grad():
                out_b, hs_b = forward(frozen, x)
            per_row = torch.where(u[:, None], (out - out_b) ** 2, (out - y) ** 2)
            maps = sum((A(h)[u] - A(h_b)[u]).pow(2).mean() for h, h_b in zip(hs, hs_b, strict=True))
            optimizer.zero_grad()
            (per_row.mean() + u.float().mean() * 50.0 * maps).backward()
            optimizer.step()
    for ours, theirs in zip(weights(unlearned), weights(student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_and_weight_decide_what_is_attended_to():
    def run(**options):
        return weights(blindspot_unlearn(conv_net(), RETAIN, FORGET, blindspot=conv_net(5), **options))

    assert same(run(), run(layers=["0", "3"]))
    assert not same(run(), run(layers=["3"]))
    assert same(run(layers=[]), run(attention_weight=0))
    assert not same(run(), run(attention_weight=0))


def test_without_a_blindspot_model_one_is_trained_on_what_stays():
    state = torch.get_rng_state()
    model = conv_net()
    ours = blindspot_unlearn(model, RETAIN, FORGET, proxy_epochs=3, proxy_lr=0.02, generator=gen(2))
    generator = gen(2)
    b = train_blindspot(model, RETAIN, epochs=3, lr=0.02, generator=generator)
    by_hand = blindspot_unlearn(model, RETAIN, FORGET, blindspot=b, generator=generator)
    assert same(weights(ours), weights(by_hand))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_blindspot_model_starts_afresh_and_learns():
    model = conv_net()
    tiny = train_blindspot(model, RETAIN, epochs=1, lr=1e-12, generator=gen())
    assert not torch.allclose(tiny[0].weight, model[0].weight, atol=1e-2)
    assert tiny[0].weight.abs().max() <= 1 / 3  # torch's own initialisation: 1 / sqrt(fan in)
    assert same(weights(tiny), weights(train_blindspot(model, RETAIN, epochs=1, lr=1e-12, generator=gen())))
    learnt = train_blindspot(model, RETAIN, epochs=20, lr=1e-2)
    x, y = torch.stack([ROWS[i][0] for i in HIGH[:80]]), torch.stack([ROWS[i][1] for i in HIGH[:80]])
    assert F.l1_loss(learnt(x), y) < 0.7 * F.l1_loss(tiny(x), y)
    own = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    assert isinstance(train_blindspot(model, RETAIN, init_fn=lambda: own)[1], nn.Linear)


def test_bare_parameters_need_an_init_function():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.scale = nn.Linear(64, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * self.line(x.flatten(1))

    with pytest.raises(ValueError, match="init_fn is needed: nothing resets scale of Scale"):
        blindspot_unlearn(Scale(), RETAIN, FORGET)
    blindspot_unlearn(Scale(), RETAIN, FORGET, init_fn=Scale, proxy_epochs=1)


def test_batch_norm_moves_in_the_student_and_not_where_it_was_set_to_eval():
    model = conv_net().eval()
    unlearned = blindspot_unlearn(model, RETAIN, FORGET, blindspot=conv_net(5))
    assert not unlearned.training
    assert int(unlearned[1].num_batches_tracked) == 3
    model.train()[1].eval()
    unlearned = blindspot_unlearn(model, RETAIN, FORGET, blindspot=conv_net(5))
    assert int(unlearned[1].num_batches_tracked) == 0
    assert (unlearned.training, unlearned[1].training) == (True, False)


def test_a_range_is_forgotten_and_the_rest_stays():
    forget, retain = DataLoader(Subset(ROWS, LOW), 64), DataLoader(Subset(ROWS, HIGH), 64)
    everything = DataLoader(ROWS, 64)

    def net():
        return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)))

    def trained(loader):  # on the rows of a loader, from the same start
        return train_blindspot(net(), loader, init_fn=net, epochs=20, lr=1e-2)

    def error(model, rows):
        with torch.no_grad():
            return F.l1_loss(model(DIGITS[rows]), VALUES[rows]).item()

    original, gold = trained(everything), trained(retain)
    blind = blindspot_unlearn(original, retain, forget, proxy_epochs=4, epochs=3)
    gauss = gaussian_amnesiac_unlearn(original, retain, forget, epochs=3)
    assert error(original, LOW) < 0.8
    assert error(gold, LOW) > 2
    for unlearned in (blind, gauss):
        assert error(unlearned, LOW) > 2 * error(original, LOW)
        assert error(unlearned, HIGH) < error(original, HIGH) + 0.3
    with torch.no_grad():
        answers = [model(DIGITS[LOW]) for model in (original, blind, gold)]
    assert prediction_wasserstein(answers[1], answers[2]) < 0.5 * prediction_wasserstein(answers[0], answers[2])


# ---- gaussian


def seen_targets(**options):
    """Inputs' numbers and targets that the loss was given, epoch by epoch."""
    x = torch.eye(12)
    rows = TensorDataset(x, torch.arange(12.0)[:, None])
    seen = []

    def loss_fn(output, target):
        seen.append(target.detach().clone())
        return F.mse_loss(output, target)

    forget, retain = DataLoader(Subset(rows, range(4)), 12), DataLoader(Subset(rows, range(4, 12)), 12)
    model = gaussian_amnesiac_unlearn(seeded(lambda: nn.Linear(12, 1)), retain, forget, loss_fn=loss_fn, **options)
    return [sorted(target[:, 0].tolist()) for target in seen], model, x


def test_retain_targets_are_untouched_and_forget_targets_drawn_once_from_the_statistics_of_all():
    epochs, _, _ = seen_targets(epochs=3, generator=gen(4))
    assert epochs[0] == epochs[1] == epochs[2]
    drawn = [value for value in epochs[0] if value not in range(4, 12)]
    assert len(drawn) == 4
    assert len(epochs[0]) == 12
    all_of_them = torch.arange(12.0)[:, None]
    expected = gaussian_targets(all_of_them[:4], all_of_them.mean(), all_of_them.std(), gen(4))
    torch.testing.assert_close(torch.tensor(drawn), expected[:, 0].sort().values)
    assert seen_targets(generator=gen(5))[0][0] != epochs[0]


def test_without_deviation_the_forgotten_rows_are_answered_with_the_mean():
    epochs, model, x = seen_targets(mean=20.0, std=0.0, epochs=800, lr=0.1)
    assert epochs[0] == [*range(4, 12), *[20.0] * 4]
    answers = model(x)[:, 0]
    torch.testing.assert_close(answers[:4], torch.full((4,), 20.0), atol=0.05, rtol=0)
    torch.testing.assert_close(answers[4:], torch.arange(4.0, 12.0), atol=0.05, rtol=0)


# ---- both


@pytest.mark.parametrize("method", METHODS)
def test_the_given_model_is_not_changed_unless_asked(method):
    model, before = conv_net(), weights(conv_net())
    unlearned = method(model, RETAIN, FORGET)
    assert same(weights(model), before)
    assert not same(weights(unlearned), before)
    assert not model[0]._forward_hooks
    assert not unlearned[0]._forward_hooks
    twin = conv_net()
    assert method(twin, RETAIN, FORGET, inplace=True) is twin
    assert same(weights(twin), weights(unlearned))


@pytest.mark.parametrize("method", METHODS)
def test_seeds_decide_and_torchs_own_generator_is_left_alone(method):
    state = torch.get_rng_state()
    first, again, other = (weights(method(conv_net(), RETAIN, FORGET, generator=gen(s))) for s in (0, 0, 1))
    assert same(first, again)
    assert same(first, seeded(lambda: weights(method(conv_net(), RETAIN, FORGET)), 99))
    assert not same(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_models_of_transformers_take_dicts_and_load_again(method, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        max_position_embeddings=8,
    )
    model = seeded(lambda: BertForSequenceClassification(config)).eval()
    ids = torch.randint(30, (24, 8), generator=gen())
    rows = [{"input_ids": row, "labels": row.float().mean()} for row in ids]
    options = {"layers": ["bert.encoder.layer.0"], "channel_dim": -1} if method is blindspot_unlearn else {}
    unlearned = method(model, DataLoader(rows[:16], 8), DataLoader(rows[16:], 8), **options)
    with torch.no_grad():
        before, after = model(ids).logits, unlearned(ids).logits
    assert not torch.equal(before, after)
    unlearned.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(BertForSequenceClassification.from_pretrained(tmp_path)(ids).logits, after)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_models_keep_their_dtype(method):
    model = conv_net().bfloat16()
    forget, retain = (
        DataLoader(TensorDataset(DIGITS[rows].bfloat16(), VALUES[rows]), 20) for rows in (LOW[:20], HIGH[:40])
    )
    unlearned = method(model, retain, forget)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in unlearned.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_crashed_run_goes_on_to_the_same_weights(method, tmp_path):
    model = conv_net()
    whole = method(model, RETAIN, FORGET, epochs=3, generator=gen(1))
    calls, last = 0, {blindspot_unlearn: 4 + 6 + 3, gaussian_amnesiac_unlearn: 3 + 2}[method]  # in the second epoch

    def breaks(output, target):
        nonlocal calls
        calls += 1
        if calls == last:
            raise OSError("power cut")
        return F.l1_loss(output, target)

    options = {"epochs": 3, "loss_fn": breaks, "checkpoint": tmp_path}
    with pytest.raises(OSError, match="power cut"):
        method(model, RETAIN, FORGET, generator=gen(1), **options)
    calls = last
    resumed = method(model, RETAIN, FORGET, generator=gen(1), **options)
    assert calls - last == {blindspot_unlearn: 12, gaussian_amnesiac_unlearn: 6}[method]  # two epochs, no more
    assert same(weights(resumed), weights(whole))
    assert same(weights(model), weights(conv_net()))


# ---- what must be refused, or said


@pytest.mark.parametrize("method", METHODS)
def test_overlap_is_counted(method):
    both = DataLoader(Subset(ROWS, [*HIGH[:40], *LOW[:7]]), 40)
    with pytest.warns(UserWarning, match="7 of 40 rows of forget_loader are in retain_loader"):
        method(conv_net(), both, FORGET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(conv_net(), RETAIN, FORGET)


EMPTY = DataLoader(Subset(ROWS, []), 4)
WIDE = DataLoader(TensorDataset(DIGITS[:8], torch.zeros(8, 2)), 4)
UNLABELLED = DataLoader(TensorDataset(DIGITS[:8]), 4)
BAD_TARGETS = DataLoader(TensorDataset(DIGITS[:8], torch.full((8, 1), torch.nan)), 4)
BAD_INPUTS = DataLoader(TensorDataset(torch.full((8, 1, 8, 8), torch.nan), torch.zeros(8, 1)), 4)


@pytest.mark.filterwarnings("ignore:.* rows of forget_loader are in retain_loader")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("retain", "forget", "options", "error", "message"),
    [
        (RETAIN, EMPTY, {}, ValueError, "forget_loader is empty"),
        (EMPTY, FORGET, {}, ValueError, "retain_loader is empty"),
        ([(DIGITS, VALUES)], FORGET, {}, TypeError, "retain_loader must be a DataLoader over a map-style"),
        (RETAIN, FORGET, {"epochs": 0}, ValueError, "epochs must be a whole number >= 1, got 0"),
        (RETAIN, FORGET, {"lr": -1.0}, ValueError, "lr must be a finite number > 0"),
        (RETAIN, BAD_TARGETS, {}, ValueError, "targets of forget_loader must be finite"),
        (RETAIN, BAD_INPUTS, {}, FloatingPointError, "the loss is nan"),
        (UNLABELLED, FORGET, {}, ValueError, r"retain_loader must yield \(x, y\)"),
        (WIDE, WIDE, {}, ValueError, "target must be of the shape of the predictions"),
        (RETAIN, FORGET, {"lr": 1e30, "epochs": 3}, FloatingPointError, "the loss is"),
    ],
    ids=[
        *("nothing to forget", "nothing to keep", "a list", "no epochs", "negative rate", "NaN targets", "NaN inputs"),
        *("no targets", "two outputs", "a rate that blows up"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays_as_it_was(method, retain, forget, options, error, message):
    model, before = conv_net(), weights(conv_net())
    with pytest.raises(error, match=message):
        method(model, retain, forget, **options)
    assert same(weights(model), before)
    assert model.training
    assert not model[0]._forward_hooks


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="layers must name modules of the model, got 'conv9'"):
        blindspot_unlearn(conv_net(), RETAIN, FORGET, layers=["conv9"])
    with pytest.raises(ValueError, match="attention_weight must be"):
        blindspot_unlearn(conv_net(), RETAIN, FORGET, attention_weight=-1.0)
    with pytest.raises(ValueError, match="proxy_lr must be"):
        blindspot_unlearn(conv_net(), RETAIN, FORGET, proxy_lr=0.0)
    with pytest.raises(ValueError, match=r"attention needs activations of shape .* got \(\d+, 1\)"):
        blindspot_unlearn(conv_net(), RETAIN, FORGET, layers=["7"], blindspot=conv_net(1))
    with pytest.raises(ValueError, match="std must be >= 0"):
        gaussian_amnesiac_unlearn(conv_net(), RETAIN, FORGET, std=-1.0)
    broken = conv_net()
    with torch.no_grad():
        broken[0].weight[0] = torch.inf
    for model, blindspot in ((broken, None), (conv_net(), broken)):
        with pytest.raises(ValueError, match=r"NaN or infinity in 0\.weight"):
            blindspot_unlearn(model, RETAIN, FORGET, blindspot=blindspot)
