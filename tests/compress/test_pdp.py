"""PDP: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from shoestring.compress.pdp import PDPPruner, global_targets, pdp_mask, pdp_threshold, pdp_weight
from shoestring.loop import fit

BATCHES = [(x, y) for x, y in zip(
    torch.randn(6, 16, 24, generator=torch.Generator().manual_seed(1)),
    torch.randint(4, (6, 16), generator=torch.Generator().manual_seed(2)),
    strict=True,
)]  # fmt: skip


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def convnet() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))


def step_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, pruner, batches) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        step_of(model, (x, y)).backward()
        optimizer.step()
        pruner.step()


def quick(model, sparsity=0.75, **options) -> PDPPruner:
    options = {"steps_per_epoch": 2, "warmup_epochs": 1, "ramp": 0.5} | options
    return PDPPruner(model, sparsity, **options)


def weights(generator_seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(generator_seed))


# ---- mask and threshold


def test_half_at_the_threshold_and_sigmoid_at_zero():
    m = pdp_mask(torch.tensor([0.3, -0.3, 0.0], dtype=torch.float64), 0.3, 0.05)
    torch.testing.assert_close(m, torch.tensor([0.5, 0.5, 1 / (1 + math.exp(0.09 / 0.05))], dtype=torch.float64))


def test_even_and_increasing_in_magnitude():
    w = torch.linspace(0, 1, 50, dtype=torch.float64)
    m = pdp_mask(w, 0.4, 0.1)
    assert torch.equal(m, pdp_mask(-w, 0.4, 0.1))
    assert bool((m.diff() > 0).all())


def test_mask_is_the_two_way_softmax_and_sums_to_one_with_its_complement():
    w, t, tau = weights(0, 100), 0.7, 0.3
    m, z = torch.softmax(torch.stack([w**2, torch.full_like(w, t**2)]) / tau, 0)
    torch.testing.assert_close(pdp_mask(w, t, tau), m, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(1 - pdp_mask(w, t, tau), z, rtol=1e-12, atol=1e-15)


def test_stable_where_the_exponentials_overflow():
    m = pdp_mask(torch.tensor([0.1, 3.0, 1e4]), 0.09, 1e-6)
    assert torch.equal(m, torch.ones(3))


@pytest.mark.parametrize("r", [0.0, 0.1, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("size", [5, 80, 1001])
def test_tiny_temperature_is_the_exact_hard_mask(r, size):
    w = weights(3, size)
    kept = max(1, round((1 - r) * size))
    m = pdp_mask(w, pdp_threshold(w, r), 1e-12)
    largest = torch.zeros(size, dtype=torch.float64)
    largest[w.abs().argsort(descending=True)[:kept]] = 1
    torch.testing.assert_close(m, largest, rtol=0, atol=1e-9)


def test_kept_count_is_rounded_to_nearest():
    w = weights(4, 80)  # (1 - 0.8) * 80 is 15.999999999999996
    assert int((w.abs() > pdp_threshold(w, 0.8)).sum()) == 16


def test_large_temperature_is_one_half():
    w = weights(5, 50)
    torch.testing.assert_close(pdp_mask(w, pdp_threshold(w, 0.5), 1e9), torch.full_like(w, 0.5), rtol=0, atol=1e-8)


def test_threshold_is_midway_between_the_two_neighbours():
    w = torch.tensor([0.1, -0.2, 0.5, -0.9, 3.0])
    assert pdp_threshold(w, 0.6).item() == pytest.approx((0.5 + 0.9) / 2)
    assert pdp_threshold(torch.tensor([2.0, -2.0, 2.0, 5.0]), 0.5).item() == 2.0  # a tie across the border
    groups = torch.tensor([[1.0, 2.0, 3.0, 8.0], [-4.0, 0.0, 6.0, 1.0]])
    assert pdp_threshold(groups, 0.75, dim=1).tolist() == [[5.5], [5.0]]


def test_gradient_is_mask_plus_boost():
    w = (0.4 * weights(6, 40)).requires_grad_()
    t, tau = pdp_threshold(w, 0.6), 0.05
    assert not t.requires_grad
    m = pdp_mask(w, t, tau)
    (gradient,) = torch.autograd.grad((m * w).sum(), w)
    torch.testing.assert_close(gradient, (m + 2 * w**2 / tau * m * (1 - m)).detach(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda w: pdp_mask(w, t, tau) * w, w)
    for temperature in (tau, torch.tensor(tau, dtype=torch.float64)):
        assert torch.equal(pdp_weight(w, t, temperature), m * w)
        (own,) = torch.autograd.grad(pdp_weight(w, t, temperature).sum(), w)
        torch.testing.assert_close(own, gradient, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda w, tau=temperature: pdp_weight(w, t, tau), w)


def test_scale_law():
    w, a, tau = weights(7, 60), 3.7, 0.02
    torch.testing.assert_close(
        pdp_mask(a * w, pdp_threshold(a * w, 0.7), tau * a * a), pdp_mask(w, pdp_threshold(w, 0.7), tau)
    )


def test_share_zero_is_the_identity_with_its_gradient():
    w = weights(8, 30).requires_grad_()
    m = pdp_mask(w, pdp_threshold(w, 0.0))
    assert torch.equal(m, torch.ones(30, dtype=torch.float64))
    for masked in (m * w, pdp_weight(w, pdp_threshold(w, 0.0))):
        assert torch.equal(masked, w)
        (gradient,) = torch.autograd.grad(masked.sum(), w)
        assert torch.equal(gradient, torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    w = (0.02 * weights(9, 200)).to(dtype)
    t = pdp_threshold(w, 0.5)
    assert t.dtype == torch.float32
    assert torch.equal(pdp_mask(w, t, 1e-5), pdp_mask(w.float(), t, 1e-5))


def test_global_targets_are_one_sort_and_add_up():
    tensors = [scale * weights(i, 40 + 17 * i, dtype=torch.float32) for i, scale in enumerate((1.0, 0.1, 0.5))]
    total = sum(t.numel() for t in tensors)
    for r in (0.0, 0.31, 0.9):
        shares = global_targets(tensors, r)
        cut = torch.cat(tensors).abs().sort().values[: round(r * total)]
        counts = [int((t.abs() <= cut[-1]).sum()) if len(cut) else 0 for t in tensors]
        assert [s * t.numel() for s, t in zip(shares, tensors, strict=True)] == pytest.approx(counts, abs=1e-9)
        assert sum(counts) == round(r * total)
    assert global_targets([torch.ones(6), torch.ones(4)], 0.8) == [1.0, 0.5]  # ties: still eight of ten


# ---- the pruner


def test_dense_until_epoch_s_bit_for_bit():
    plain, masked = mlp(), mlp()
    pruner = quick(masked, warmup_epochs=2, steps_per_epoch=3).attach()
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (plain, masked)]
    for x, y in BATCHES[:5]:
        for model, optimizer in zip((plain, masked), optimizers, strict=True):
            optimizer.zero_grad()
            step_of(model, (x, y)).backward()
            optimizer.step()
        pruner.step()
    assert pruner.targets is None
    assert pruner.sparsity() == 0
    for name in ("0", "2", "4"):
        assert torch.equal(plain.get_submodule(name).weight, masked.get_submodule(name).weight)


def test_targets_are_those_of_the_weights_at_epoch_s_and_stay():
    model = mlp()
    pruner = quick(model).attach()
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(0.6)
    pruner.step()
    pruner.step()
    expected = global_targets([pruner.original(name) for name in ("0", "2", "4")], 0.75)
    assert list(pruner.targets.values()) == expected
    assert expected != global_targets([m.weight for m in mlp() if isinstance(m, nn.Linear)], 0.75)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(1000)
    pruner.step()
    assert list(pruner.targets.values()) == expected


def test_layer_targets_weighted_by_size_are_the_overall_target():
    pruner = quick(mlp(), 0.6, warmup_epochs=0).attach()
    sizes = [pruner.original(name).numel() for name in pruner.layers]
    total = sum(share * size for share, size in zip(pruner.targets.values(), sizes, strict=True))
    assert total == pytest.approx(round(0.6 * sum(sizes)), abs=1e-9)
    assert len(set(pruner.targets.values())) == 3
    assert set(quick(mlp(), 0.6, warmup_epochs=0, scope="local").attach().targets.values()) == {0.6}


def test_ramp_is_the_papers():
    model = mlp()
    pruner = quick(model, 0.5, steps_per_epoch=2, warmup_epochs=2, ramp=0.3, scope="local").attach()
    found = []
    for _ in range(14):
        found.append(pruner.sparsity())
        pruner.step()
    expected = [0.5 * min(1, 0.3 * (e - 2 + 1)) if e >= 2 else 0 for e in range(7) for _ in range(2)]
    assert found == pytest.approx(expected, abs=0.01)  # whole weights of the layer of 64


def test_thresholds_follow_the_weights_every_k_steps_and_every_epoch():
    model = mlp()
    pruner = quick(model, warmup_epochs=0, steps_per_epoch=5, refresh_every=3, scope="local", ramp=1.0).attach()
    changed = []
    for _ in range(10):
        before = pruner.parametrization("0").t.clone()
        with torch.no_grad():
            pruner.original("0").mul_(1.1)
        pruner.step()
        changed.append(not torch.equal(before, pruner.parametrization("0").t))
    assert changed == [False, False, True, False, True, False, False, True, False, True]


def test_layer_below_all_others_keeps_one_weight_and_is_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match="left in 2: exclude"):
        pruner = quick(model, 0.9, warmup_epochs=0, ramp=1.0).attach()
    assert pruner.targets["2"] == 1
    assert torch.equal(pruner.finalize()[2].weight != 0, model[2].weight.abs() == model[2].weight.abs().max())
    assert int(model[2].weight.count_nonzero()) == 1


@pytest.mark.parametrize("pattern", ["unstructured", "n:m", "channel"])
def test_finalize_leaves_exact_zeros_and_the_plain_model(pattern):
    model, plain = convnet(), convnet()
    names, size = list(plain.state_dict()), sum(p.numel() for p in plain.parameters())
    order = [name for name, _ in plain.named_parameters()]
    kinds = {"n:m": {"n": 1, "m": 4}}.get(pattern, {})
    sparsity = None if pattern == "n:m" else 0.5
    pruner = PDPPruner(
        model,
        sparsity,
        steps_per_epoch=1,
        warmup_epochs=0,
        ramp=1.0,
        pattern=pattern,
        tau=1e-12,
        scope="local",
        **kinds,
    ).attach()
    assert sum(p.numel() for p in model.parameters()) == size
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    soft, expected = model(x), pruner.sparsity()
    assert pruner.finalize() is model
    torch.testing.assert_close(model(x), soft, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == order
    assert type(model[0]) is nn.Conv2d
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    layers = [m.weight for m in model if hasattr(m, "weight")]
    zeros = sum(int((w == 0).sum()) for w in layers) / sum(w.numel() for w in layers)
    assert zeros == pytest.approx(expected, abs=1e-12)
    assert zeros == pytest.approx(0.75 if pattern == "n:m" else 0.5, abs=1e-12)


def test_n_of_m_is_the_magnitude_mask_of_every_group():
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten())
    W = model[0].weight.detach().clone()
    pruner = PDPPruner(model, steps_per_epoch=1, warmup_epochs=0, ramp=1.0, pattern="n:m", n=2, m=4, tau=1e-12).attach()
    groups = W.permute(0, 2, 3, 1).reshape(-1, 4)  # along the input channels
    expected = torch.zeros_like(groups).scatter_(1, groups.abs().argsort(1)[:, 2:], 1)
    expected = expected.reshape(6, 3, 3, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(pruner.masks()["0"], expected)
    pruner.finalize()
    assert torch.equal(model[0].weight, W * expected)


def test_channel_masks_are_those_of_the_norms_and_constant_within_a_channel():
    model = convnet()
    pruner = quick(model, 0.5, warmup_epochs=0, ramp=1.0, pattern="channel", scope="local", tau=0.3).attach()
    for name, mask in pruner.masks().items():
        W = pruner.original(name).detach()
        c = W.flatten(1).norm(dim=1)
        m = pdp_mask(c, pdp_threshold(c, 0.5), 0.3)
        torch.testing.assert_close(mask, m.view(-1, *[1] * (W.ndim - 1)).expand_as(W))
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    norms = pruner.finalize()[0].weight.flatten(1).norm(dim=1)
    assert int((norms == 0).sum()) == 4


def test_relative_temperature_is_tau_times_the_squared_threshold():
    model = mlp()
    pruner = quick(model, warmup_epochs=0, ramp=1.0, scope="local", tau=0.1, tau_relative=True).attach()
    W = pruner.original("0").detach()
    t = pdp_threshold(W, 0.75)
    torch.testing.assert_close(pruner.masks()["0"], pdp_mask(W, t, 0.1 * t * t))
    dense = quick(mlp(), tau_relative=True).attach()  # t = -inf
    assert torch.equal(dense.masks()["0"], torch.ones(32, 24))


def test_transformers_conv1d_runs_along_its_inputs():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 8))  # weight (in = 8, out = 6)
    PDPPruner(model, steps_per_epoch=1, warmup_epochs=0, ramp=1.0, pattern="n:m", n=1, m=4).attach().finalize()
    assert bool((model[0].weight.unflatten(0, (2, 4)).count_nonzero(1) == 1).all())


def test_pruned_weights_can_return():
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    pruner = quick(model, 0.5, warmup_epochs=0, ramp=1.0, tau=0.05).attach()
    before = pruner.masks()["0"] < 0.5
    model(torch.randn(8, 20, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert bool((pruner.original("0").grad[before] != 0).all())


# ---- beside the training


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
def test_optimizer_goes_on_with_the_same_parameters(optimizer):
    model = mlp()
    own = {id(p) for p in model.parameters()}
    before = getattr(torch.optim, optimizer)(model.parameters(), 0.01)
    pruner = quick(model).attach()
    train(model, before, pruner, BATCHES)
    pruner.finalize()
    assert {id(p) for p in model.parameters()} == own
    step_of(model, BATCHES[0]).backward()
    old = model[0].weight.clone()
    before.step()
    assert not torch.equal(model[0].weight, old)


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_resume_is_bit_equal(cut):
    def setup():
        model = mlp()
        pruner = quick(model, tau=1e-2, refresh_every=2).attach()
        return model, torch.optim.Adam(model.parameters(), 0.01), pruner

    model, optimizer, pruner = setup()
    train(model, optimizer, pruner, BATCHES[:cut])
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
    train(model, optimizer, pruner, BATCHES[cut:])
    again = setup()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(*again, BATCHES[cut:])
    for a, b in zip(model.state_dict().values(), again[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(pruner.finalize()[0].weight, again[2].finalize()[0].weight)


def test_loop_fit_takes_it_as_scheduler_or_callback_and_resumes(tmp_path):
    def setup(kind):
        model = mlp()
        pruner = quick(model, steps_per_epoch=6, tau=1e-2).attach()
        options = {"scheduler": pruner} if kind == "scheduler" else {"callbacks": [pruner]}
        return model, torch.optim.Adam(model.parameters(), 0.01), pruner, options

    finals = []
    for kind in ("scheduler", "callback"):
        model, optimizer, pruner, options = setup(kind)
        fit(model, BATCHES, step_of, optimizer, epochs=3, progress=False, **options)
        finals.append(pruner.finalize()[2].weight)
        model, optimizer, pruner, options = setup(kind)
        options |= {"checkpoint": tmp_path / kind, "progress": False}
        fit(model, BATCHES, step_of, optimizer, max_steps=8, epochs=3, **options)
        model, optimizer, pruner, options = setup(kind)
        options |= {"checkpoint": tmp_path / kind, "progress": False}
        fit(model, BATCHES, step_of, optimizer, epochs=3, **options)
        assert pruner.steps == 18
        finals.append(pruner.finalize()[2].weight)
    assert all(torch.equal(finals[0], final) for final in finals[1:])
    assert int((finals[0] == 0).sum()) > 0


def test_deep_copy_is_independent():
    model = mlp()
    pruner = quick(model, warmup_epochs=0, ramp=1.0).attach()
    alone = copy.deepcopy(model)
    twin, twin_pruner = copy.deepcopy((model, pruner))
    x = BATCHES[0][0]
    soft = model(x)
    hard = twin_pruner.finalize()
    assert hard is twin
    assert int((twin[0].weight == 0).sum()) > 0
    assert torch.equal(model(x), soft)
    assert torch.equal(alone(x), soft)
    pruner.finalize()
    assert torch.equal(model(x), twin(x))
    assert torch.equal(alone(x), soft)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_low_precision_masks_in_float32(kind):
    model = mlp(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    pruner = quick(model, warmup_epochs=0, ramp=1.0, tau=1e-3).attach()
    W = pruner.original("0").detach().float()
    expected = pdp_mask(W, pruner.parametrization("0").t, 1e-3)
    x = BATCHES[0][0].to(W.dtype if kind == "autocast" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        model(x).sum().backward()
        effective = model[0].weight
    assert torch.equal(pruner.masks()["0"], expected)
    assert effective.dtype == pruner.original("0").dtype
    assert torch.equal(effective.detach(), (expected * W).to(effective.dtype))


def test_compile_does_not_recompile_while_thresholds_change():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = mlp()
    pruner = quick(model, warmup_epochs=1, tau=1e-2).attach()
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    eager = copy.deepcopy((model, pruner))
    train(compiled, optimizer, pruner, BATCHES)
    assert counter.frame_count == 1
    train(eager[0], torch.optim.SGD(eager[0].parameters(), 0.1), eager[1], BATCHES)
    torch.testing.assert_close(pruner.original("0"), eager[1].original("0"))


def test_transformers_trainer_prunes_saves_and_resumes(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=50, max_position_embeddings=8, num_labels=2)
    rows = [{"input_ids": [i % 50, (7 * i) % 50, 3], "labels": i % 2} for i in range(16)]

    def run(folder, resume=False):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        layers = r".*(intermediate|output)\.dense"
        pruner = quick(model, 0.5, steps_per_epoch=4, target_modules=layers, scope="local").attach()
        arguments = TrainingArguments(
            str(folder), num_train_epochs=3, per_device_train_batch_size=4, save_steps=6, report_to=[], seed=0,
            learning_rate=1e-2, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[pruner.callback()])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
        assert pruner.steps == 12
        trainer.save_model(str(folder / "final"))
        return model

    first, again = run(tmp_path), run(tmp_path, resume=True)
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "final")
    weight = loaded.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(weight, first.bert.encoder.layer[0].intermediate.dense.weight)
    assert int((weight == 0).sum()) == weight.numel() // 2


# ---- what is left alone, and what is refused


def test_tied_frozen_and_excluded_weights_are_left_alone():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "a": nn.Linear(4, 4)})
    model["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    model["b"] = nn.Linear(4, 4)
    model["head"].weight = model["embedding"].weight
    assert list(quick(model, exclude=["b"]).attach().layers) == ["a"]


def refused():
    nan = mlp()
    with torch.no_grad():
        nan[2].weight[0, 0] = math.nan
    parametrized = mlp()
    nn.utils.parametrizations.weight_norm(parametrized[2])
    return {
        "NaN weight": (nan, {}, "NaN"),
        "meta device": (mlp().to("meta"), {}, "meta device"),
        "no module": ("model", {}, "torch.nn.Module"),
        "nothing prunable": (nn.Sequential(nn.Embedding(4, 4), nn.ReLU()), {}, "got none"),
        "all excluded": (mlp(), {"exclude": ".*"}, "got none"),
        "unknown target": (mlp(), {"target_modules": ["0", "seven"]}, "seven"),
        "parametrized already": (parametrized, {}, "parametrized one in 2"),
        "m does not divide": (mlp(), {"sparsity": None, "pattern": "n:m", "n": 1, "m": 5}, "24 in 0"),
        "n above m": (mlp(), {"sparsity": None, "pattern": "n:m", "n": 5, "m": 4}, "n must be"),
        "n without its pattern": (mlp(), {"n": 2, "m": 4}, "pattern='n:m'"),
        "sparsity beside n and m": (mlp(), {"pattern": "n:m", "n": 2, "m": 4}, "sparsity"),
        "sparsity one": (mlp(), {"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
        "sparsity below zero": (mlp(), {"sparsity": -0.1}, r"\[0, 1\), got -0.1"),
        "sparsity NaN": (mlp(), {"sparsity": math.nan}, "sparsity"),
        "sparsity text": (mlp(), {"sparsity": "0.9"}, "sparsity"),
        "tau zero": (mlp(), {"tau": 0.0}, "tau must be > 0"),
        "ramp zero": (mlp(), {"ramp": 0}, "ramp must be > 0"),
        "unknown scope": (mlp(), {"scope": "layer"}, "scope must be one of"),
        "unknown pattern": (mlp(), {"pattern": "block"}, "pattern must be one of"),
        "no steps in an epoch": (mlp(), {"steps_per_epoch": 0}, "steps_per_epoch must be >= 1"),
        "no refresh": (mlp(), {"refresh_every": 0}, "refresh_every must be >= 1"),
    }


@pytest.mark.parametrize("case", list(refused()))
def test_bad_input_is_refused_and_leaves_the_model_as_it_was(case):
    model, options, message = refused()[case]
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises((TypeError, ValueError), match=message):
        quick(model, **options).attach()
    if isinstance(model, nn.Module):
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(b.is_meta or torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(
            after.values(), before.values(), strict=True
        ))  # fmt: skip


def test_misuse_is_refused():
    model = mlp()
    pruner = quick(model)
    with pytest.raises(RuntimeError, match="attach"):
        pruner.step()
    pruner.attach()
    with pytest.raises(RuntimeError, match="attach"):
        pruner.attach()
    state = {**pruner.state_dict(), "layers": ["x"], "steps": 9}
    with pytest.raises(ValueError, match="layers"):
        pruner.load_state_dict(state)
    assert pruner.steps == 0
    with pytest.warns(UserWarning, match="before the ramp has ended"):
        pruner.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.step()
    with pytest.raises(ValueError, match="tau"):
        pdp_mask(torch.ones(2), 0.5, 0.0)
    for r in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="r must be"):
            pdp_threshold(torch.ones(2), r)
    with pytest.raises(ValueError, match="none"):
        pdp_threshold(torch.ones(0), 0.5)
