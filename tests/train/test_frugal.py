"""FRUGAL: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoestring.train.frugal import FRUGAL, choose_blocks, draw_subspace, frugal_param_groups, project, split_gradient

PARTIAL = ("columns", "rows", "randk", "svd", "random")


def run(shapes, steps=12, reference=None, skip=(), **kwargs):
    generator = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    opt = reference(ps) if reference else FRUGAL([{"params": ps, "projected": True}], **kwargs)
    for step in range(steps):
        for p in ps:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = None if step in skip else grad
        opt.step()
    return ps, opt


@pytest.mark.parametrize("projection", ["blockwise", "columns", "rows", "randk"])
def test_density_one_without_reset_is_adamw(projection):
    kwargs = {"lr": 1e-2, "weight_decay": 0.1}
    ours, _ = run([(5, 6), (3, 4)], density=1.0, reset_state=False, update_gap=3, projection=projection, **kwargs)
    theirs, _ = run([(5, 6), (3, 4)], reference=lambda ps: torch.optim.AdamW(ps, **kwargs))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_full_rank_basis_with_sgd_is_sgd(projection):
    ours, _ = run([(5, 6)], lr=0.1, density=1.0, projection=projection, steps=0)
    generator = torch.Generator().manual_seed(1)
    p, q = (nn.Parameter(ours[0].detach().clone()) for _ in range(2))
    opt = FRUGAL([{"params": [p], "projected": True}], 0.1, density=1.0, projection=projection, base="sgdm", momentum=0)
    for _ in range(4):
        p.grad = torch.randn(5, 6, generator=generator, dtype=torch.float64)
        q.data -= 0.1 * p.grad
        opt.step()
    torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", ["blockwise", *PARTIAL])
def test_density_zero_is_sign_sgd_and_holds_nothing(projection):
    start, _ = run([(5, 6)], steps=0)
    ours, opt = run([(5, 6)], steps=1, lr=0.1, density=0.0, state_free_lr_scale=0.5, projection=projection)
    torch.testing.assert_close(ours[0], start[0] - 0.05 * ours[0].grad.sign(), rtol=0, atol=1e-15)
    assert opt.state_bytes() == 0


@pytest.mark.parametrize("projection", PARTIAL)
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_parts_add_up_to_the_gradient(shape, projection):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = draw_subspace(g, 0.25, projection, torch.Generator().manual_seed(1))
    g_full, g_free = split_gradient(g, S, projection)
    again = project(g_free, S, projection)
    if projection in ("svd", "random"):
        torch.testing.assert_close(S @ S.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
        back = g_full @ S if shape[0] >= shape[1] else S.T @ g_full
        torch.testing.assert_close(back + g_free, g, rtol=0, atol=1e-12)
        assert again.abs().max() < 1e-12
    else:
        assert torch.equal(again, torch.zeros_like(again))
        assert torch.equal(g_full.sort().values, project(g, S, projection).sort().values)
        assert int((g_free != g).sum()) == S.numel() * {"columns": shape[0], "rows": shape[1], "randk": 1}[projection]


def test_inactive_blocks_hold_nothing_and_rule_none_leaves_them():
    start, _ = run([(4, 6)] * 8, steps=0)
    ours, opt = run([(4, 6)] * 8, steps=5, state_free="none")
    active = set(opt.param_groups[0]["active"])
    assert len(active) == 2
    for i, (p, q) in enumerate(zip(ours, start, strict=True)):
        assert (p in opt.state) == (i in active)
        assert torch.equal(p, q) == (i not in active)
    assert opt.state_bytes() == 2 * 2 * 24 * 8 + 2 * 4
    zero, _ = run([(4, 6)] * 8, steps=5, state_free_lr_scale=0.0)
    assert all(torch.equal(p, q) for p, q in zip(ours, zero, strict=True))


@pytest.mark.parametrize("projection", ["blockwise", "columns", "rows", "randk"])
def test_first_step_after_a_reset_is_the_sign_step(projection):
    before, _ = run([(6, 8)] * 4, steps=4, update_gap=4, lr=0.1, projection=projection)
    after, _ = run([(6, 8)] * 4, steps=5, update_gap=4, lr=0.1, projection=projection)
    for p, q in zip(before, after, strict=True):
        torch.testing.assert_close(q, p - 0.1 * q.grad.sign(), rtol=0, atol=1e-5)


def test_subspace_changes_every_T_steps_and_a_late_gradient_does_no_harm():
    def index(steps, skip=()):
        ps, opt = run([(4, 40)], steps=steps, update_gap=3, projection="columns", skip=skip)
        return opt.state[ps[0]]["index"], opt.state[ps[0]]["step"].item()

    assert torch.equal(index(1)[0], index(3)[0])
    assert not torch.equal(index(3)[0], index(4)[0])
    assert torch.equal(index(4)[0], index(5, skip=(3,))[0])
    assert index(3)[1] == 3
    assert index(4)[1] == index(5, skip=(3,))[1] == 1


def test_blocks_are_counted_by_their_entries():
    assert choose_blocks([4] * 8, 0.25, [5, 1, 2, 3, 4, 0, 6, 7]) == [5, 1]
    assert choose_blocks([16, 4, 4, 4], 0.25, [1, 0, 3, 2]) == [1]
    assert choose_blocks([5, 5], 0.01, [1, 0]) == [1]


def test_svd_of_nan_names_the_parameter_and_changes_nothing():
    ps = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    opt = FRUGAL([{"params": ps, "projected": True, "param_names": ["a", "b"]}], projection="svd", weight_decay=0.1)
    ps[0].grad, ps[1].grad = torch.ones(4, 4), torch.full((4, 4), torch.nan)
    with pytest.raises(FloatingPointError, match="gradient of b"):
        opt.step()
    assert all(torch.equal(p, torch.ones(4, 4)) for p in ps)
    assert not opt.state


def test_vectors_and_complex_numbers_are_refused():
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        FRUGAL([{"params": [nn.Parameter(torch.ones(3))], "projected": True}])
    with pytest.raises(ValueError, match="complex"):
        FRUGAL([{"params": [nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], "projected": True}])


def test_tied_head_stays_regular():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"e": nn.Embedding(5, 8), "layers": nn.ModuleList([layer]), "head": nn.Linear(8, 5)})
    model["head"].weight = model["e"].weight
    proj, regular = frugal_param_groups(model, ["linear1", "head"])
    assert proj["param_names"] == ["layers.0.linear1.weight"]
    assert any(p is model["e"].weight for p in regular["params"])


@pytest.mark.parametrize("projection", ["blockwise", *PARTIAL])
@pytest.mark.parametrize("base", ["adamw", "lion", "sgdm"])
def test_state_bytes_is_what_is_reachable_from_the_state(projection, base):
    """Every storage of every tensor in `state`, however deep; and what the card says of its size."""
    ps = [nn.Parameter(torch.randn(16, 8)) for _ in range(4)]
    other = nn.Parameter(torch.randn(10))
    groups = [{"params": ps, "projected": True}, {"params": [other], "projected": False}]
    opt = FRUGAL(groups, density=0.25, update_gap=3, projection=projection, base=base)
    for _ in range(4):
        for p in (*ps, other):
            p.grad = torch.randn_like(p)
        opt.step()

    def storages(value):
        if isinstance(value, torch.Tensor):
            return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return {k: v for item in inner for k, v in storages(item).items()}

    assert opt.state_bytes() == sum(storages(dict(opt.state)).values())
    assert opt.state_bytes() == opt.state_bytes(projected=True) + opt.state_bytes(projected=False)
    buffers = 2 if base == "adamw" else 1
    moments = [
        v for p in ps for k, v in opt.state.get(p, {}).items() if k in ("exp_avg", "exp_avg_sq", "momentum_buffer")
    ]
    assert sum(v.numel() for v in moments) == buffers * 0.25 * 4 * 16 * 8
    if projection == "blockwise":
        assert sum(bool([v for v in opt.state.get(p, {}).values() if torch.is_tensor(v) and v.ndim]) for p in ps) == 1


def test_base_lion_is_lion_on_the_active_columns():
    start, _ = run([(4, 8)], steps=0)
    ours, opt = run([(4, 8)], steps=1, lr=0.1, betas=(0.9, 0.99), base="lion", projection="columns", state_free="none")
    (p,) = ours
    moved = (p != start[0]).any(0)
    assert int(moved.sum()) == 2  # a quarter of 8
    torch.testing.assert_close(p[:, moved], start[0][:, moved] - 0.1 * p.grad[:, moved].sign(), rtol=0, atol=1e-15)
    (average,) = [v for k, v in opt.state[p].items() if k == "exp_avg"]
    torch.testing.assert_close(average, 0.01 * p.grad[:, moved], rtol=0, atol=1e-15)


def test_columns_are_input_features_also_where_the_matrix_is_transposed():
    for transposed in (False, True):
        p = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        group = {"params": [p], "projected": True, "transposed": transposed}
        opt = FRUGAL([group], 0.1, density=0.25, projection="columns", state_free="none")
        p.grad = torch.ones_like(p)
        opt.step()
        moved = p.detach() != 0
        assert (moved.all(0).sum(), moved.all(1).sum()) == ((0, 2) if transposed else (2, 0))


def test_the_seed_decides_and_only_the_seed():
    def columns(generator):
        p = nn.Parameter(torch.zeros(4, 32))
        opt = FRUGAL([{"params": [p], "projected": True}], projection="columns", state_free="none", generator=generator)
        p.grad = torch.ones_like(p)
        before = torch.get_rng_state()
        opt.step()
        assert torch.equal(torch.get_rng_state(), before)
        return (p.detach() != 0).any(0)

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(columns(seeded(1)), columns(seeded(1)))
    assert torch.equal(columns(None), columns(None))
    assert not torch.equal(columns(seeded(1)), columns(seeded(2)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_groups_of_transformers_models_and_a_step(kind):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))
        linear = {
            f"transformer.h.{i}.{n}.weight"
            for i in (0, 1)
            for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
    else:
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        names = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
        linear = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in names}
    groups = frugal_param_groups(model)
    projected = {name for group in groups if group["projected"] for name in group["param_names"]}
    assert projected == linear
    assert all(group.get("transposed", False) == (kind == "gpt2") for group in groups if group["projected"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    only = frugal_param_groups(model, ["mlp"])
    assert {n for g in only if g["projected"] for n in g["param_names"]} == {n for n in linear if "mlp" in n}
    opt = FRUGAL(groups, lr=1e-2, update_gap=2)
    tokens = torch.arange(10)[None]
    losses = []
    for _ in range(6):
        opt.zero_grad()
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        opt.step()
    assert losses[-1].item() < losses[0].item()


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_full_rank_leaves_nothing_to_the_sign_step(projection):
    """g - P^T P g is round-off then; its sign would move every weight by lr."""
    start, _ = run([(5, 6)], steps=0)
    ours, _ = run([(5, 6)], steps=3, lr=0.1, density=1.0, projection=projection, base="sgdm", momentum=0.0)
    plain, _ = run([(5, 6)], steps=3, reference=lambda ps: torch.optim.SGD(ps, 0.1))
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-12)
    assert not torch.equal(ours[0], start[0])
