"""nm-decay: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from shoestring.compress.nm_decay import (
    NMDecay,
    decay,
    decayed_weight,
    frames,
    nm_mask,
    sparsify_nm,
    to_semi_structured,
)
from shoestring.loop import fit

BATCHES = [(x, y) for x, y in zip(
    torch.randn(6, 16, 32, generator=torch.Generator().manual_seed(1)),
    torch.randint(4, (6, 16), generator=torch.Generator().manual_seed(2)),
    strict=True,
)]  # fmt: skip


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def step_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, controller, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        step_of(model, batch).backward()
        optimizer.step()
        controller.step()


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mask_by_sorting(w: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = w.reshape(-1, m)
    return torch.zeros_like(groups).scatter_(1, groups.abs().argsort(1)[:, m - n :], 1).view_as(w).bool()


# ---- masks


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (1, 16), (5, 16), (1, 32), (4, 4)])
def test_mask_keeps_the_n_largest_of_every_group(n, m):
    w = weights(0, 6, 64)
    assert torch.equal(nm_mask(w, n, m), mask_by_sorting(w, n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8)])
def test_exactly_n_even_with_ties(n, m):
    for w in (torch.zeros(3, 16), torch.ones(3, 16), torch.tensor([[0.0, 1.0] * 8])):
        assert bool((nm_mask(w, n, m).unflatten(1, (-1, m)).sum(-1) == n).all())


def test_mask_is_idempotent_and_ignores_scale_and_signs():
    w = weights(1, 5, 48)
    mask = nm_mask(w, 3, 16)
    signs = weights(2, 5, 48).sign()
    assert torch.equal(nm_mask(w * mask, 3, 16), mask)
    assert torch.equal(nm_mask(7.3 * w, 3, 16), mask)
    assert torch.equal(nm_mask(signs * w, 3, 16), mask)


def test_n_equal_to_m_keeps_all():
    assert bool(nm_mask(weights(3, 4, 8), 8, 8).all())


def test_groups_run_along_dim():
    w = weights(4, 8, 12)
    assert torch.equal(nm_mask(w, 1, 4, dim=0), mask_by_sorting(w.T.contiguous(), 1, 4).T)
    conv = weights(5, 6, 8, 3, 3)
    by_channels_last = mask_by_sorting(conv.permute(0, 2, 3, 1).contiguous(), 2, 4).permute(0, 3, 1, 2)
    assert torch.equal(nm_mask(conv, 2, 4, dim=1), by_channels_last)


# ---- decay and frames


def test_exponential_decay_multiplies():
    for t1, t2 in ((3, 5), (0, 7), (100, 250)):
        assert decay(t1 + t2, "exp", 0.013) == pytest.approx(
            decay(t1, "exp", 0.013) * decay(t2, "exp", 0.013), rel=1e-12
        )
    assert decay(10, "exp", 0.1) == pytest.approx(1 / math.e)


def test_linear_decay_reaches_zero_at_one_over_beta():
    assert decay(128, "linear", 1 / 128) == 0.0
    assert decay(64, "linear", 1 / 128) == 0.5
    assert decay(127, "linear", 1 / 128) > 0
    assert decay(500, "linear", 1 / 128) == 0.0


def test_frames_are_the_papers():
    assert frames(1, 16, "stepwise") == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert frames(2, 4, "stepwise") == [(3, 4), (2, 4)]
    assert frames(3, 8, "stepwise") == [(7, 8), (4, 8), (3, 8)]  # M/N no power of two: N:M is added
    assert frames(1, 8, "geometric") == [(8, 64), (4, 32), (2, 16), (1, 8)]
    assert frames(2, 4, "densify") == [(2, 32), (2, 16), (2, 8), (2, 4)]


@pytest.mark.parametrize("m", range(2, 33))
def test_stepwise_never_loosens_and_ends_at_n_of_m(m):
    for n in range(1, m):
        found = frames(n, m, "stepwise")
        assert found[-1] == (n, m)
        kept = [a for a, _ in found]
        assert kept == sorted(kept, reverse=True)
        assert all(n <= a < m and b == m for a, b in found)


@pytest.mark.parametrize("schedule", ["exp", "linear"])
def test_phases_and_the_chosen_beta(schedule):
    recipe = NMDecay(1, 4, schedule=schedule, total_steps=200, dense_frac=0.25, finetune_frac=0.2)
    D = [recipe.at(step)[2] for step in range(220)]
    assert D[:51] == [1.0] * 51  # dense, and t = 0
    assert D[51] < 1
    assert all(a > b for a, b in pairwise(D[50:160]))
    assert D[159] > 0
    assert D[160:] == [0.0] * 60  # exactly the 40 steps of fine-tuning, and after
    beta = math.log(100) / 110 if schedule == "exp" else 0.99 / 110
    assert decay(110, schedule, beta) == pytest.approx(1e-2)
    assert D[105] == pytest.approx(decay(55, schedule, beta))
    assert NMDecay(1, 4, schedule=schedule, beta=0.02, total_steps=200).at(7)[2] == decay(7, schedule, 0.02)


def test_structure_spends_equal_frames_and_then_fine_tunes():
    recipe = NMDecay(1, 16, mode="structure", total_steps=120, dense_frac=1 / 12, finetune_frac=1 / 12)
    steps = [recipe.at(step) for step in range(120)]
    assert steps[:10] == [(1, 16, 1.0)] * 10
    assert steps[10:] == [(n, 16, 0.0) for n in (15, 8, 4, 2) for _ in range(20)] + [(1, 16, 0.0)] * 30


# ---- forward and backward


def test_full_decay_factor_is_dense_bit_for_bit():
    plain, decayed = mlp(), mlp()
    sparsify_nm(decayed, NMDecay(1, 4, total_steps=10))  # D = 1 at step 0
    for mode in ("ste", "decayed"):
        other = mlp()
        sparsify_nm(other, NMDecay(1, 4, total_steps=10, grad_mode=mode))
        losses = [step_of(model, BATCHES[0]) for model in (plain, other)]
        assert torch.equal(*losses)
        plain.zero_grad()
        for loss in losses:
            loss.backward()
        assert torch.equal(plain[0].weight.grad, other[0].parametrizations.weight.original.grad)


def test_zero_decay_factor_is_the_hard_mask():
    W = weights(6, 4, 8)
    mask = nm_mask(W, 1, 4)
    for mode in ("ste", "decayed"):
        assert torch.equal(decayed_weight(W, mask, 0.0, grad_mode=mode), W * mask)


def test_backward_straight_through_and_decayed():
    W, G = weights(7, 4, 8).requires_grad_(), weights(8, 4, 8)
    mask = nm_mask(W, 2, 4)
    for D in (0.0, 0.3, 1.0):
        (ste,) = torch.autograd.grad(decayed_weight(W, mask, D), W, G)
        (faded,) = torch.autograd.grad(decayed_weight(W, mask, D, grad_mode="decayed"), W, G)
        assert torch.equal(ste, G)
        torch.testing.assert_close(faded, G * (mask.double() + (1 - mask.double()) * D), rtol=1e-15, atol=0)
        torch.testing.assert_close(decayed_weight(W, mask, D), W * (mask.double() + (1 - mask.double()) * D))
    (faded,) = torch.autograd.grad(decayed_weight(W, mask, 0.0, grad_mode="decayed"), W, G)
    assert bool((faded[~mask] == 0).all())


def test_decayed_mode_passes_gradcheck():
    W = weights(9, 4, 8).requires_grad_()
    mask = nm_mask(W, 1, 4)
    assert torch.autograd.gradcheck(lambda W: decayed_weight(W, mask, 0.37, grad_mode="decayed"), W)


def test_sr_ste_adds_the_pull_on_pruned_weights_and_is_ste_at_zero():
    W, G = weights(10, 4, 8).requires_grad_(), weights(11, 4, 8)
    mask = nm_mask(W, 1, 4)
    (pulled,) = torch.autograd.grad(decayed_weight(W, mask, 0.0, lambda_=0.01), W, G)
    torch.testing.assert_close(pulled, (G + 0.01 * (1 - mask.double()) * W).detach(), rtol=1e-14, atol=0)
    (ste,) = torch.autograd.grad(decayed_weight(W, mask, 0.0, lambda_=0.0), W, G)
    assert torch.equal(ste, G)


def test_masks_follow_the_current_weights():
    model = mlp()
    controller = sparsify_nm(model, NMDecay(1, 4, mode="hard", total_steps=10))
    with torch.no_grad():
        controller.original("0").copy_(weights(12, 32, 32, dtype=torch.float32))
    controller.step()
    W = controller.original("0").detach()
    assert torch.equal(model[0].weight, W * mask_by_sorting(W, 1, 4))


def test_masks_are_refreshed_every_k_steps_and_where_the_pattern_changes():
    model = mlp()
    recipe = NMDecay(1, 4, mode="structure", total_steps=12, finetune_frac=0.0, refresh_every=3)
    controller = sparsify_nm(model, recipe)
    changed = []
    for i in range(12):
        before = controller.parametrization("0").mask.clone()
        with torch.no_grad():
            controller.original("0").copy_(weights(20 + i, 32, 32, dtype=torch.float32))
        controller.step()
        changed.append(not torch.equal(before, controller.parametrization("0").mask))
    assert [i + 1 for i, c in enumerate(changed) if c] == [3, 4, 6, 8, 9, 12]  # frames begin at 4 and 8


# ---- the whole recipe


RECIPES = {
    "exponential": {},
    "linear": {"schedule": "linear"},
    "decayed gradient": {"grad_mode": "decayed"},
    "stepwise": {"mode": "structure"},
    "geometric": {"mode": "structure", "schedule": "geometric"},
    "densify": {"mode": "structure", "schedule": "densify"},
    "hard": {"mode": "hard", "lambda_": 2e-4},
    "stale masks": {"refresh_every": 4},
}


@pytest.mark.parametrize("kind", list(RECIPES))
def test_finalized_weights_are_n_of_m_and_the_plain_model_computes_the_same(kind):
    model, plain = mlp(), mlp()
    order = [name for name, _ in plain.named_parameters()]
    size = sum(p.numel() for p in plain.parameters())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    controller = sparsify_nm(model, NMDecay(1, 4, total_steps=6, finetune_frac=0.34, **RECIPES[kind]), ["0", "2"])
    assert sum(p.numel() for p in model.parameters()) == size
    train(model, optimizer, controller, BATCHES)
    expected = model(BATCHES[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert controller.finalize() is model
    assert torch.equal(model(BATCHES[0][0]), expected)
    for layer in (model[0], model[2]):
        assert type(layer) is nn.Linear
        assert bool((layer.weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 1).all())
    assert bool((model[4].weight != 0).all())
    assert [name for name, _ in model.named_parameters()] == order
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(BATCHES[0][0]), expected)
    step_of(model, BATCHES[0]).backward()
    old = model[0].weight.clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, old)  # the optimizer still holds the model's parameters


def test_convolutions_along_input_channels_and_outputs():
    for dim, axis in ((-1, 1), (0, 0)):
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1, groups=2))
        controller = sparsify_nm(model, NMDecay(2, 8, mode="hard", total_steps=1, dim=dim))
        controller.step()
        controller.finalize()
        for layer in model:
            groups = layer.weight.unflatten(axis, (-1, 8))
            assert bool((groups.count_nonzero(axis + 1) == 2).all())


def test_transformers_conv1d_runs_along_its_inputs():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 8))  # weight (in = 8, out = 6)
    controller = sparsify_nm(model, NMDecay(1, 4, mode="hard", total_steps=1))
    controller.step()
    assert bool((controller.finalize()[0].weight.unflatten(0, (2, 4)).count_nonzero(1) == 1).all())


def test_two_recipes_on_two_groups_of_layers():
    model = mlp()
    controllers = [
        sparsify_nm(model, NMDecay(1, 16, mode="hard", total_steps=1), ["0"]),
        sparsify_nm(model, NMDecay(2, 4, mode="hard", total_steps=1), ["2"]),
    ]
    for controller in controllers:
        controller.step()
        controller.finalize()
    assert [int(model[i].weight.count_nonzero()) for i in (0, 2)] == [32 * 32 // 16, 16 * 32 // 2]


def test_early_finalize_warns_of_the_cut():
    for options in ({}, {"mode": "structure"}):
        controller = sparsify_nm(mlp(), NMDecay(1, 4, total_steps=100, **options))
        controller.step()
        with pytest.warns(UserWarning, match="after 1 of 100 steps"):
            model = controller.finalize()
        assert bool((model[0].weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 1).all())


@pytest.mark.parametrize("kind", ["exponential", "stepwise", "stale masks"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resume_is_bit_equal(kind, cut):
    def setup():
        model = mlp()
        recipe = NMDecay(1, 4, total_steps=6, dense_frac=0.34, finetune_frac=0.2, **RECIPES[kind])
        controller = sparsify_nm(model, recipe)
        return model, torch.optim.AdamW(model.parameters(), 0.01), controller

    first = setup()
    train(*first, BATCHES[:cut])
    saved = copy.deepcopy([part.state_dict() for part in first])
    train(*first, BATCHES[cut:])
    again = setup()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(*again, BATCHES[cut:])
    for a, b in zip(first[0].state_dict().values(), again[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_loop_fit_takes_it_as_scheduler_or_callback_and_resumes(tmp_path):
    def run(kind, folder=None, max_steps=None):
        model = mlp()
        controller = sparsify_nm(model, NMDecay(1, 4, total_steps=18))
        options = {"scheduler": controller} if kind == "scheduler" else {"callbacks": [controller]}
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        options |= {"epochs": 3, "max_steps": max_steps, "checkpoint": folder, "progress": False}
        fit(model, BATCHES, step_of, optimizer, **options)
        return controller

    finals = []
    for kind in ("scheduler", "callback"):
        finals.append(run(kind).finalize()[0].weight)
        run(kind, tmp_path / kind, max_steps=8)
        finals.append(run(kind, tmp_path / kind).finalize()[0].weight)
    assert all(torch.equal(finals[0], final) for final in finals[1:])
    assert int((finals[0] == 0).sum()) == finals[0].numel() * 3 // 4


def test_deep_copy_is_independent():
    model = mlp()
    controller = sparsify_nm(model, NMDecay(1, 4, mode="hard", total_steps=4))
    controller.step()
    alone = copy.deepcopy(model)
    twin, twin_controller = copy.deepcopy((model, controller))
    x = BATCHES[0][0]
    expected = model(x)
    assert twin_controller.finalize() is twin
    assert torch.equal(model(x), expected)
    assert torch.equal(alone(x), expected)
    controller.finalize()
    assert torch.equal(alone(x), expected)
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_low_precision_multiplies_in_float32(kind):
    model = mlp(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    controller = sparsify_nm(model, NMDecay(1, 4, beta=0.7, total_steps=100))
    controller.step()
    W = controller.original("0").detach()
    mask = nm_mask(W, 1, 4)  # bfloat16 has ties
    expected = torch.where(mask, W.float(), W.float() * math.exp(-0.7)).to(W.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(BATCHES[0][0].to(W.dtype)).sum().backward()
        assert torch.equal(model[0].weight, expected)
    assert controller.original("0").grad.dtype == W.dtype


def test_compile_does_not_recompile_while_decay_and_pattern_change():
    from torch._dynamo.testing import CompileCounter

    for options in ({"dense_frac": 0.34}, {"mode": "structure"}):
        torch._dynamo.reset()
        counter = CompileCounter()
        model = mlp()
        controller = sparsify_nm(model, NMDecay(1, 4, total_steps=6, lambda_=1e-3, **options))
        eager = copy.deepcopy((model, controller))
        compiled = torch.compile(model, backend=counter)
        train(compiled, torch.optim.SGD(model.parameters(), 0.1), controller, BATCHES)
        assert counter.frame_count == 1
        train(eager[0], torch.optim.SGD(eager[0].parameters(), 0.1), eager[1], BATCHES)
        torch.testing.assert_close(controller.original("0"), eager[1].original("0"))


def test_transformers_trainer_sparsifies_and_resumes(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, n_inner=32)
    rows = [{"input_ids": [i % 40, (7 * i) % 40, 3], "labels": [i % 40, (7 * i) % 40, 3]} for i in range(16)]

    def run(folder, resume=False):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        controller = sparsify_nm(model, NMDecay(1, 8, total_steps=12), r".*mlp\.c_(fc|proj)")
        arguments = TrainingArguments(
            str(folder), num_train_epochs=3, per_device_train_batch_size=4, save_steps=6, report_to=[], seed=0,
            learning_rate=1e-2, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[controller.callback()])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
        assert controller.steps == 12
        trainer.save_model(str(folder / "final"))
        return model

    first, again = run(tmp_path), run(tmp_path, resume=True)
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    weight = GPT2LMHeadModel.from_pretrained(tmp_path / "final").transformer.h[0].mlp.c_fc.weight
    assert torch.equal(weight, first.transformer.h[0].mlp.c_fc.weight)
    assert bool((weight.unflatten(0, (-1, 8)).count_nonzero(1) == 1).all())


# ---- what is refused


def refused():
    nan = mlp()
    with torch.no_grad():
        nan[2].weight[0, 0] = math.nan
    return {
        "NaN weight": (nan, {}, "NaN"),
        "meta device": (mlp().to("meta"), {}, "meta device"),
        "no module": ("model", {}, "torch.nn.Module"),
        "nothing prunable": (nn.Sequential(nn.Embedding(4, 4)), {}, "got none"),
        "m does not divide": (mlp(), {"m": 5}, "m=5 and 32 in 0"),
        "m of the widest frame does not divide": (
            mlp(), {"mode": "structure", "schedule": "geometric", "m": 8}, "m=64 and 32 in 0"
        ),
        "depthwise": (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), {}, "m=4 and 1 in 0"),
        "n zero": (mlp(), {"n": 0}, "n must be"),
        "n above m": (mlp(), {"n": 5}, "n must be"),
        "n no number": (mlp(), {"n": 1.0}, "n must be"),
        "structure without sparsity": (mlp(), {"n": 4, "mode": "structure"}, "n must be < m"),
        "unknown mode": (mlp(), {"mode": "soft"}, "mode must be one of"),
        "schedule of another mode": (mlp(), {"schedule": "stepwise"}, "schedule must be one of"),
        "unknown gradient": (mlp(), {"grad_mode": "A"}, "grad_mode must be one of"),
        "unknown dim": (mlp(), {"dim": 1}, "dim must be one of"),
        "beta zero": (mlp(), {"beta": 0.0}, "beta must be"),
        "beta without decay": (mlp(), {"beta": 0.1, "mode": "hard"}, "beta needs"),
        "fractions too large": (mlp(), {"dense_frac": 0.6, "finetune_frac": 0.4}, "finetune_frac"),
        "fraction one": (mlp(), {"finetune_frac": 1.0}, r"\[0, 1\), got 1.0"),
        "lambda below zero": (mlp(), {"lambda_": -1.0}, "lambda_ must be"),
        "lambda with autograd": (mlp(), {"lambda_": 1e-4, "grad_mode": "decayed"}, "lambda_ needs"),
        "no steps": (mlp(), {"total_steps": 0}, "total_steps must be"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(refused()))
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(case):
    model, options, message = refused()[case]
    names = list(model.state_dict()) if isinstance(model, nn.Module) else []
    with pytest.raises((TypeError, ValueError), match=message):
        sparsify_nm(model, NMDecay(**{"n": 1, "m": 4, "total_steps": 10} | options))
    assert names == (list(model.state_dict()) if isinstance(model, nn.Module) else [])


def test_misuse_is_refused():
    model = mlp()
    with pytest.raises(TypeError, match="NMDecay"):
        sparsify_nm(model, {"n": 1})
    controller = sparsify_nm(model, NMDecay(1, 4, mode="hard", total_steps=1))
    with pytest.raises(ValueError, match="parametrized one in 0"):
        sparsify_nm(model, NMDecay(1, 4, total_steps=1))
    with pytest.raises(ValueError, match="layers"):
        controller.load_state_dict({"steps": 3, "layers": ["0"]})
    assert controller.steps == 0
    controller.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        controller.finalize()
    with pytest.raises(ValueError, match="m must divide"):
        nm_mask(torch.ones(2, 6), 1, 4)
    for call in (lambda: decay(1, "cosine", 0.1), lambda: frames(1, 4, "exp")):
        with pytest.raises(ValueError, match="schedule must be"):
            call()
    with pytest.raises(ValueError, match="grad_mode"):
        decayed_weight(torch.ones(2), torch.ones(2, dtype=torch.bool), 0.5, grad_mode="B")


def test_semi_structured_conversion_is_refused_off_the_gpu_and_for_other_patterns():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match="2:4 sparse weights, got other ones in 0"):
        to_semi_structured(model)
    controller = sparsify_nm(model, NMDecay(2, 4, mode="hard", total_steps=1))
    controller.step()
    controller.finalize()
    with pytest.raises(ValueError, match="CUDA device, got cpu in 0"):
        to_semi_structured(model)
    with pytest.raises(ValueError, match=r"torch.nn.Linear, got Conv2d in 0"):
        to_semi_structured(nn.Sequential(nn.Conv2d(4, 4, 1)))
    assert type(model[0].weight) is nn.Parameter
