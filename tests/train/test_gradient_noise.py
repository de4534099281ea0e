"""Gradient noise: its law, where it enters, what it leaves alone, and that an interrupted run goes on bit for bit."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from scipy import stats
from torch import Tensor, nn

from shoestring.loop import fit
from shoestring.train import gradient_noise as module
from shoestring.train.gradient_noise import GradientNoise, add_gradient_noise_, noise_std, walk_variance


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same at every call; with dropout, which draws from the global generator."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, generator=seeded(100 + step))
    return x, x[:, :3].argmax(1)


def backward(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def zeros(*shape: int, dtype: torch.dtype = torch.float32, grad: float | None = 0.0) -> Tensor:
    w = torch.zeros(shape, dtype=dtype, requires_grad=True)
    if grad is not None:
        w.grad = torch.full_like(w, grad)
    return w


def sgd(params: Any, lr: float = 1.0, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params if isinstance(params, list) else [params], lr=lr, **kwargs)


def through_json_and_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    tensors = load(save({str(i): s for i, s in enumerate(state["generators"])}))
    rest = json.loads(json.dumps({k: v for k, v in state.items() if k != "generators"}))
    return {**rest, "generators": [tensors[str(i)] for i in range(len(tensors))]}


# The law ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.55, 1.0])
def test_std_is_the_formula(eta: float, gamma: float) -> None:
    for t in (0, 1, 2, 1000, 10**6):
        assert noise_std(t, eta, gamma) == pytest.approx((eta / (1 + t) ** gamma) ** 0.5, rel=1e-14)
        ratio = noise_std(t, eta, gamma) ** 2 / noise_std(0, eta, gamma) ** 2
        assert ratio == pytest.approx((1 + t) ** -gamma, rel=1e-13)


def test_defaults_are_the_papers() -> None:
    """Of the pure function and of the hook: variance 0.01 in the first step, exponent 0.55."""
    assert noise_std(0) == pytest.approx(0.1)
    assert noise_std(99) ** 2 == pytest.approx(0.01 / 100**0.55)
    noise = GradientNoise(sgd(zeros(2)))
    assert (noise.eta, noise.gamma, noise.t, noise.std) == (0.01, 0.55, 0, noise_std(0))


@pytest.mark.parametrize(
    "shapes",
    [[(1000, 1000)], [(10,)] * 500 + [(995, 1000)], [(1100, 1000)], [(7,), (1049, 1000), (3,)]],
    ids=["one", "many small", "larger than a slab", "between small ones"],
)
def test_variance_of_the_first_step_is_eta(shapes: list[tuple[int, ...]]) -> None:
    """Chi-square: sum (g / sigma)^2 over 1e6 coordinates, within 1 % (7 standard deviations) of their number."""
    ws = [zeros(*shape) for shape in shapes]
    optimizer = sgd(ws)
    GradientNoise(optimizer, eta=0.3, generator=seeded(1))
    optimizer.step()
    g = torch.cat([w.grad.flatten() for w in ws]).double()
    assert float((g**2).sum() / 0.3) == pytest.approx(len(g), rel=0.01)
    assert abs(float(g.mean())) < 4 * math.sqrt(0.3 / len(g))
    assert stats.kstest(g[::20].numpy() / math.sqrt(0.3), "norm").pvalue > 1e-3


def test_variance_at_step_t_follows_the_schedule() -> None:
    w = zeros(200_000)
    optimizer = sgd(w)
    noise = GradientNoise(optimizer, eta=1.0, generator=seeded(2))
    for t in range(12):
        w.grad = torch.zeros_like(w)
        assert (noise.t, noise.std) == (t, noise_std(t, 1.0))
        optimizer.step()
        assert float(w.grad.double().var()) == pytest.approx((1 + t) ** -0.55, rel=0.02)


def test_coordinates_and_steps_are_independent() -> None:
    """Of equal shapes in one step, and of one tensor in two steps."""
    a, b = zeros(300, 300), zeros(300, 300)
    optimizer = sgd([a, b])
    GradientNoise(optimizer, eta=1.0, gamma=0.0)
    optimizer.step()
    first = a.grad.flatten().clone()
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimizer.step()
    drawn = torch.stack([first, a.grad.flatten(), b.grad.flatten(), first.roll(1), first.roll(300)])
    correlations = torch.corrcoef(drawn) - torch.eye(5)
    assert float(correlations.abs().max()) < 5 / 300


def test_many_gradients_share_a_bounded_memory_and_are_still_independent() -> None:
    ws = [zeros(n, 1000) for n in (700, 700, 1100, 300, 700)]
    optimizer = sgd(ws)
    noise = GradientNoise(optimizer, eta=1.0)
    optimizer.step()
    drawn = torch.stack([w.grad.flatten()[:300_000] for w in ws])
    assert float((torch.corrcoef(drawn) - torch.eye(5)).abs().max()) < 5 / 300_000**0.5
    ((_, slabs),) = noise._kept.values()
    assert sum({flat.data_ptr(): flat.untyped_storage().nbytes() for _, flat, _ in slabs}.values()) <= 4 * 2**20


def test_gradients_that_come_and_go_get_the_draws_of_those_present() -> None:
    """As unfreezing, or a branch that is not taken in every step, makes them."""
    ws, by_hand = [zeros(3, 4), zeros(5), zeros(2, 6)], [zeros(3, 4), zeros(5), zeros(2, 6)]
    optimizer = sgd(ws)
    GradientNoise(optimizer, eta=0.3, generator=seeded(20))
    generator = seeded(20)
    for step, present in enumerate([(0, 1), (1, 2), (0, 1, 2), (2,), ()]):
        for i in range(3):
            for w in (ws[i], by_hand[i]):
                w.grad = torch.ones_like(w) if i in present else None
        optimizer.step()
        add_gradient_noise_(by_hand, step, 0.3, 0.55, generator)
        for w, v in zip(ws, by_hand, strict=True):
            assert (w.grad is None and v.grad is None) or torch.equal(w.grad, v.grad)


def test_mean_of_the_noisy_gradient_is_the_gradient() -> None:
    g = torch.randn(50, generator=seeded(3))
    w = zeros(4000, 50)
    w.grad = g.expand(4000, 50).clone()
    add_gradient_noise_([w], 0, 1.0, 0.55, seeded(4))
    error = (w.grad.mean(0) - g) * math.sqrt(4000)  # 50 standard normal numbers
    assert float(error.abs().max()) < 4.5
    assert 0.5 < float((error**2).mean()) < 1.7


def test_sgd_from_zero_gradient_walks_as_the_closed_form_says() -> None:
    """Var(w) = lr^2 eta sum_t (1 + t)^-gamma, about lr^2 eta T^0.45 / 0.45."""
    w = zeros(100_000)
    optimizer = sgd(w, lr=0.1)
    GradientNoise(optimizer, eta=0.3, generator=seeded(5))
    for _ in range(60):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    expected = 0.1**2 * 0.3 * sum((1 + t) ** -0.55 for t in range(60))
    assert walk_variance(60, 0.1, 0.3) == pytest.approx(expected, rel=1e-12)
    assert float(w.detach().double().var()) == pytest.approx(expected, rel=0.02)
    assert walk_variance(100_000, 0.1, 0.3) == pytest.approx(0.003 * 100_000**0.45 / 0.45, rel=0.01)


# Where it enters --------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hooked_optimizer_equals_noise_added_by_hand(name: str) -> None:
    """Before the optimizer, so that lr, momentum and moments act on it; one draw from the generator a step."""
    hooked, by_hand = net(), net()
    a, b = (OPTIMIZERS[name](m.parameters()) for m in (hooked, by_hand))
    GradientNoise(a, eta=0.3, generator=seeded(6))
    generator = seeded(6)
    torch.manual_seed(1)
    train(hooked, a, range(6))
    torch.manual_seed(1)
    for step in range(6):
        b.zero_grad()
        backward(by_hand, step)
        add_gradient_noise_(by_hand.parameters(), step, 0.3, 0.55, generator)
        b.step()
    assert same(hooked, by_hand)


def test_small_gradients_get_the_draws_of_one_flat_tensor() -> None:
    """The documented stream: float32, in the order of the parameters."""
    ws = [zeros(3, 5), zeros(17), zeros(2, 2, 2)]
    add_gradient_noise_(ws, 3, 0.3, 0.55, seeded(7))
    flat = torch.empty(40).normal_(0, noise_std(3, 0.3), generator=seeded(7))
    assert torch.equal(torch.cat([w.grad.flatten() for w in ws]), flat)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eta_zero_is_the_bare_optimizer_bit_for_bit(name: str) -> None:
    bare, hooked = net(), net()
    a, b = (OPTIMIZERS[name](m.parameters()) for m in (bare, hooked))
    generator = seeded(8)
    noise = GradientNoise(b, eta=0.0, generator=generator)
    before = generator.get_state()
    torch.manual_seed(1)
    train(bare, a, range(5))
    torch.manual_seed(1)
    train(hooked, b, range(5))
    assert same(bare, hooked)
    assert torch.equal(generator.get_state(), before)
    assert (noise.t, noise.std) == (5, 0.0)


def test_the_global_generators_are_untouched() -> None:
    """Dropout and data order are those of the run without noise."""
    model = net()
    optimizer = sgd(list(model.parameters()))
    GradientNoise(optimizer, eta=1.0)
    backward(model, 0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_accumulated_gradients_get_one_draw_a_step() -> None:
    once, twice = zeros(1000, grad=None), zeros(1000, grad=None)
    for w, calls in ((once, 1), (twice, 4)):
        optimizer = sgd(w)
        GradientNoise(optimizer, eta=0.3, generator=seeded(9))
        for _ in range(calls):
            (w.sum() / calls).backward()
        optimizer.step()
    assert torch.equal(once, twice)


def test_noise_comes_after_clipping() -> None:
    """Its norm, here sqrt(1e4 * 0.3) = 55, is not bounded by the clip at 1."""
    w = zeros(10_000, grad=3.0)
    optimizer = sgd(w)
    GradientNoise(optimizer, eta=0.3)
    torch.nn.utils.clip_grad_norm_([w], 1.0)
    optimizer.step()
    assert float(w.grad.norm()) == pytest.approx(math.sqrt(1e4 * 0.3 + 1), rel=0.05)


def test_in_the_loop_noise_comes_after_its_clipping() -> None:
    w = nn.Linear(100, 100, bias=False)
    seen = []
    optimizer = sgd(list(w.parameters()), lr=1e-3)
    GradientNoise(optimizer, eta=0.3)
    optimizer.register_step_post_hook(lambda *_: seen.append(float(w.weight.grad.norm())))
    fit(w, [torch.ones(2, 100)], lambda m, x: 100 * m(x).sum(), optimizer, clip_grad_norm=1.0, progress=False)
    assert seen[0] == pytest.approx(math.sqrt(1e4 * 0.3 + 1), rel=0.05)


def test_learning_rate_schedules_scale_the_noise_and_do_not_anneal_it() -> None:
    w = zeros(50_000)
    optimizer = sgd(w, lr=1.0)
    noise = GradientNoise(optimizer, eta=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for t in range(4):
        before = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        scheduler.step()
        assert float((w.detach() - before).std()) == pytest.approx(0.5**t * noise_std(t, 1.0), rel=0.02)
    assert noise.t == 4


def test_remove_leaves_the_bare_optimizer() -> None:
    model, bare = net(), net()
    optimizer = sgd(list(model.parameters()))
    noise = GradientNoise(optimizer, eta=1.0)
    noise.remove()
    noise.remove()
    for m, o in ((model, optimizer), (bare, sgd(list(bare.parameters())))):
        torch.manual_seed(1)
        train(m, o, range(3))
    assert same(model, bare)
    assert noise.t == 0


# What it leaves alone ---------------------------------------------------------------------------------------


def test_parameters_without_gradient_or_frozen_are_untouched() -> None:
    none, frozen, trained = zeros(100, grad=None), zeros(100), zeros(100)
    frozen.requires_grad_(False)
    optimizer = sgd([none, frozen, trained])
    GradientNoise(optimizer, eta=1.0)
    optimizer.step()
    assert none.grad is None
    assert not none.any()
    assert not frozen.grad.any()
    assert not frozen.any()
    assert trained.all()
    add_gradient_noise_([none, frozen], 0, 1.0, 0.55, seeded(0))
    assert none.grad is None
    assert not frozen.grad.any()


def test_params_names_those_that_get_noise_in_any_group() -> None:
    ws = [zeros(100) for _ in range(4)]
    optimizer = torch.optim.SGD([{"params": ws[:2]}, {"params": ws[2:], "lr": 0.5}], lr=1.0)
    GradientNoise(optimizer, eta=1.0, params=(w for w in (ws[1], ws[3])))
    for _ in range(2):
        optimizer.step()
    assert [bool(w.any()) for w in ws] == [False, True, False, True]


def test_groups_added_later_get_noise() -> None:
    first, later = zeros(100), zeros(100)
    optimizer = sgd(first)
    GradientNoise(optimizer, eta=1.0)
    optimizer.step()
    optimizer.add_param_group({"params": [later]})
    optimizer.step()
    assert later.all()


def test_nan_and_infinity_stay_where_they_are() -> None:
    w = zeros(64)
    w.grad[3], w.grad[5] = math.nan, -math.inf
    optimizer = sgd(w)
    GradientNoise(optimizer, eta=0.3)
    optimizer.step()
    assert torch.isnan(w.grad).nonzero().flatten().tolist() == [3]
    assert torch.isinf(w.grad).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("odd", [True, False], ids=["sparse first", "sparse last"])
def test_sparse_gradients_are_refused_before_anything_changes(odd: bool) -> None:
    table, dense = nn.Embedding(5, 3, sparse=True), zeros(4)
    table(torch.tensor([1])).sum().backward()
    params = [table.weight, dense] if odd else [dense, table.weight]
    optimizer = sgd(params)
    generator = seeded(0)
    noise = GradientNoise(optimizer, eta=0.3, generator=generator)
    state, before = generator.get_state(), table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        add_gradient_noise_(params, 0, 0.3, 0.55, generator)
    assert noise.t == 0
    assert torch.equal(generator.get_state(), state)
    assert not dense.any()
    assert not dense.grad.any()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_gradient_is_kept_and_noise_is_rounded_once(dtype: torch.dtype) -> None:
    """The same numbers for every dtype: N(0, sigma^2) in float32, plus g, then rounded."""
    g = torch.randn(40, 50, generator=seeded(10), dtype=torch.float64).to(dtype)
    w = zeros(40, 50, dtype=dtype)
    w.grad = g.clone()
    add_gradient_noise_([w], 0, 0.3, 0.55, seeded(11))
    xi = torch.empty(40, 50).normal_(0, 0.3**0.5, generator=seeded(11))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert w.grad.dtype == dtype
    assert torch.equal(w.grad, (g.to(wide) + xi).to(dtype))


def test_mixed_dtypes_layouts_and_empty_tensors_in_one_group() -> None:
    """The noise of each is that of the same shapes, all float32 and contiguous."""
    shapes = [(6, 8), (0, 3), (4, 4), (), (5, 7)]
    plain = [zeros(*shape) for shape in shapes]
    mixed = [zeros(*shape, dtype=torch.float64) for shape in shapes]
    mixed[2] = zeros(4, 4)
    mixed[4].grad = torch.zeros(7, 5, dtype=torch.float64).T
    for ws in (plain, mixed):
        optimizer = sgd(ws)
        GradientNoise(optimizer, eta=0.3, generator=seeded(12))
        optimizer.step()
        optimizer.step()
    for p, q in zip(plain, mixed, strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad.double(), rtol=1e-6, atol=1e-7)
    assert not mixed[4].grad.is_contiguous()


def test_complex_gradients_are_pairs_of_coordinates() -> None:
    w = zeros(100_000, dtype=torch.complex64)
    optimizer = sgd(w)
    GradientNoise(optimizer, eta=0.3)
    optimizer.step()
    for part in (w.grad.real, w.grad.imag):
        assert float(part.double().var()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([w.grad.real, w.grad.imag]))[0, 1])) < 0.02


# Closures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [True, False], ids=["keyword", "positional"])
def test_a_closure_gets_the_noise_after_its_backward(keyword: bool) -> None:
    plain, closed = net(), net()
    a, b = (sgd(list(m.parameters()), lr=0.1) for m in (plain, closed))
    noise = [GradientNoise(o, eta=0.3, generator=seeded(13)) for o in (a, b)]
    torch.manual_seed(1)
    train(plain, a, range(4))
    torch.manual_seed(1)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            b.zero_grad()
            return backward(closed, step)

        loss = b.step(closure=closure) if keyword else b.step(closure)
        assert float(loss.detach()) > 0
    assert same(plain, closed)
    assert noise[1].t == 4


class TwoCalls(torch.optim.Optimizer):
    """Calls its closure twice, as SAM does."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], Any]) -> None:
        self.grads = []
        for _ in range(2):
            closure()
            self.grads.append(self.param_groups[0]["params"][0].grad)


def test_a_closure_called_twice_is_one_step() -> None:
    """Fresh noise at each call, both at the std of this step."""
    w = zeros(100_000)
    optimizer = TwoCalls([w])
    noise = GradientNoise(optimizer, eta=1.0, gamma=2.0)

    def closure() -> None:
        w.grad = torch.zeros_like(w)

    for t in range(2):
        assert noise.t == t
        optimizer.step(closure)
        first, second = optimizer.grads
        assert float(first.std()) == pytest.approx(1 / (1 + t), rel=0.02)
        assert float(second.std()) == pytest.approx(1 / (1 + t), rel=0.02)
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02


def test_lbfgs_is_refused() -> None:
    optimizer = torch.optim.LBFGS([zeros(3)])
    with pytest.raises(ValueError, match="optimizer must not be LBFGS"):
        GradientNoise(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


# State ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_restored_at_step_k_is_the_same_trajectory(name: str) -> None:
    """Through JSON and safetensors, into a new model, optimizer and noise with other options."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    noise = GradientNoise(optimizer, eta=0.3, gamma=0.6, generator=seeded(14))
    train(model, optimizer, range(5))
    other = net()
    other.load_state_dict(model.state_dict())
    renewed = OPTIMIZERS[name](other.parameters())
    renewed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    renewed_noise = GradientNoise(renewed)
    renewed_noise.load_state_dict(through_json_and_safetensors(noise.state_dict()))
    assert (renewed_noise.t, renewed_noise.std) == (5, noise_std(5, 0.3, 0.6))
    again = through_json_and_safetensors(renewed_noise.state_dict())  # saved before its first step
    assert torch.equal(again["generators"][0], noise.state_dict()["generators"][0])
    for m, o in ((model, optimizer), (other, renewed)):
        torch.manual_seed(2)
        train(m, o, range(5, 10))
    assert same(model, other)


def test_a_state_is_a_copy() -> None:
    w = zeros(100)
    optimizer = sgd(w)
    noise = GradientNoise(optimizer, eta=0.3)
    optimizer.step()
    state = noise.state_dict()
    held = copy.deepcopy(state)
    optimizer.step()
    after = w.grad.clone()
    assert torch.equal(state["generators"][0], held["generators"][0])
    noise.load_state_dict(state)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.grad, first = torch.zeros_like(w), w.grad
    noise.load_state_dict(held)
    optimizer.step()
    assert torch.equal(first, w.grad)
    assert not torch.equal(first, after)


def test_two_optimizers_have_counters_and_generators_of_their_own() -> None:
    a, b, alone = zeros(50), zeros(50), zeros(50)
    optimizers = [sgd(w) for w in (a, b, alone)]
    noise = [GradientNoise(o, eta=0.3, generator=seeded(s)) for o, s in zip(optimizers, (1, 2, 1), strict=True)]
    for i in range(6):
        optimizers[0].step()
        if i % 2:
            optimizers[1].step()
        optimizers[2].step()
    assert [n.t for n in noise] == [6, 3, 6]
    assert torch.equal(a, alone)
    assert not torch.equal(a, b)


def test_the_default_seed_is_the_same_everywhere_and_a_generator_is_used_as_it_is() -> None:
    """Every replica of DDP adds the same noise whatever its global seed."""
    ends = []
    for seed, generator in ((1, None), (2, None), (3, seeded(0)), (4, seeded(5))):
        torch.manual_seed(seed)
        w = zeros(50)
        optimizer = sgd(w)
        GradientNoise(optimizer, generator=generator)
        optimizer.step()
        ends.append(w)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3])


def test_every_device_has_a_generator_in_order_of_its_appearance() -> None:
    """Here on the names of devices alone: this machine has one."""
    noise = GradientNoise(sgd(zeros(2)), generator=seeded(7))
    cpu, other = torch.device("cpu"), torch.device("cpu", 1)
    assert noise._generator(cpu).initial_seed() == 7
    assert noise._generator(other).initial_seed() == 8
    torch.randn(3, generator=noise._generator(other))
    state = noise.state_dict()
    renewed = GradientNoise(sgd(zeros(2)))
    renewed.load_state_dict(state)
    assert torch.equal(renewed._generator(cpu).get_state(), state["generators"][0])
    assert torch.equal(renewed._generator(other).get_state(), state["generators"][1])


@pytest.mark.parametrize("stop", [3, 4, 8])
def test_in_the_loop_an_interrupted_run_goes_on_bit_for_bit(stop: int, tmp_path: Any) -> None:
    """The noise as a callback of `loop.fit`, with dropout, momentum, clipping and a schedule; epochs of 4 steps."""
    batches = [batch(i) for i in range(4)]

    def run(folder: str, steps: int) -> tuple[nn.Module, list[dict[str, float]]]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        noise = GradientNoise(optimizer, eta=0.3, generator=seeded(15))
        history = fit(
            model,
            batches,
            lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
            optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
            clip_grad_norm=1.0,
            callbacks=[noise],
            max_steps=steps,
            checkpoint=tmp_path / folder,
            progress=False,
        )
        assert noise.t == steps
        return model, history

    run("resumed", stop)
    torch.manual_seed(99)
    resumed, history = run("resumed", 11)
    undisturbed, expected = run("undisturbed", 11)
    assert same(resumed, undisturbed)
    assert history[-1] == expected[-1]


def test_a_copied_optimizer_has_no_noise() -> None:
    """As the docstring says: torch drops hooks of copies."""
    w = zeros(5)
    optimizer = sgd(w)
    GradientNoise(optimizer, eta=0.3)
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"][0]
    copied.grad = torch.zeros(5)
    twin.step()
    assert not copied.any()


# Hosts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
def test_a_gradient_scaler_neither_scales_the_noise_nor_counts_skipped_steps(fused: bool, unscale: bool) -> None:
    plain, scaled = net(), net()
    a = torch.optim.Adam(plain.parameters(), lr=0.01)
    b = torch.optim.Adam(scaled.parameters(), lr=0.01, fused=fused)
    noise = [GradientNoise(o, eta=0.3, generator=seeded(16)) for o in (a, b)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rng = torch.get_rng_state()
    train(plain, a, range(5))
    torch.set_rng_state(rng)
    for step in range(6):
        b.zero_grad()
        overflow = step == 2
        real = step - (step > 2)
        before, state = [p.clone() for p in scaled.parameters()], torch.get_rng_state()
        x, y = batch(real)
        scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
        if overflow:
            torch.set_rng_state(state)
            scaled[0].weight.grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(b)
        scaler.step(b)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, q) for p, q in zip(before, scaled.parameters(), strict=True))
            assert noise[1].t == 2
    assert noise[1].t == noise[0].t == 5
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_accelerate_with_accumulation(before: bool) -> None:
    """Attached to torch's optimizer or to accelerate's wrapper of it; a draw an update, not a batch."""
    by_hand, model = net(), net()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (by_hand, model))
    GradientNoise(a, eta=0.3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if before:
        noise = GradientNoise(b, eta=0.3)
    prepared, wrapper = accelerator.prepare(model, b)
    if not before:
        noise = GradientNoise(wrapper, eta=0.3)
    rng = torch.get_rng_state()
    for step in range(4):
        backward(by_hand, step)
        if step % 2:
            for p in by_hand.parameters():
                p.grad /= 2
            a.step()
            a.zero_grad()
    torch.set_rng_state(rng)
    for step in range(4):
        with accelerator.accumulate(prepared):
            x, y = batch(step)
            accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
            wrapper.step()
            wrapper.zero_grad()
    assert noise.t == 2
    for p, q in zip(by_hand.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = torch.randn(6, generator=seeded(i))
        return {"x": x, "labels": x[:3].argmax()}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_run(folder: Any, callback: Any, resume: bool = False, steps: int = 10, **options: Any) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        optim="sgd",
        save_steps=4,
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(Classifier(), arguments, train_dataset=Rows(), callbacks=[callback] if callback else [])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return trainer, callback


@pytest.mark.parametrize("restore", [False, True], ids=["default", "restore_callback_states"])
def test_a_transformers_trainer_gets_the_noise_and_resumes_bit_for_bit(tmp_path: Any, restore: bool) -> None:
    make = module.GradientNoiseCallback
    trainer, callback = trainer_run(tmp_path, make(eta=0.3, seed=17))
    assert callback.noise.t == 10
    bare, _ = trainer_run(tmp_path / "bare", None)
    assert not same(trainer.model, bare.model)
    silent, _ = trainer_run(tmp_path / "silent", make(eta=0.0))
    assert same(silent.model, bare.model)
    torch.manual_seed(123)
    resumed, _ = trainer_run(tmp_path, make(eta=0.01), resume=True, restore_callback_states_from_checkpoint=restore)
    assert same(trainer.model, resumed.model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # taken off where training ended


def test_a_transformers_trainer_adds_what_the_equation_says(tmp_path: Any) -> None:
    """Clipped to nearly nothing, the gradients of the third step are the third draw."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Look(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            groups = kwargs["optimizer"].param_groups  # those with weight decay first
            self.grads = torch.cat([p.grad.flatten() for group in groups for p in group["params"]])

    look = Look()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        max_grad_norm=1e-6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    callback = module.GradientNoiseCallback(eta=0.3, seed=18)
    Trainer(Classifier(), arguments, train_dataset=Rows(), callbacks=[callback, look]).train()
    generator = seeded(18)
    n = len(look.grads)
    drawn = [torch.empty(n).normal_(0, noise_std(t, 0.3), generator=generator) for t in range(3)]
    torch.testing.assert_close(look.grads, drawn[2], rtol=0, atol=1e-5)


def test_transformers_is_not_imported_with_the_module() -> None:
    code = "import sys, shoestring.train.gradient_noise; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sharded_gradient_gets_noise_on_the_shard_of_this_process(tmp_path: Any) -> None:
    """A DTensor, as FSDP2 leaves it; one process."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w = nn.Parameter(distribute_tensor(torch.zeros(40), mesh, [Shard(0)]))
        w.grad = distribute_tensor(torch.zeros(40), mesh, [Shard(0)])
        optimizer = sgd([w])
        GradientNoise(optimizer, eta=0.3, generator=seeded(19))
        optimizer.step()
        expected = torch.empty(40).normal_(0, 0.3**0.5, generator=seeded(19))
        assert torch.equal(w.grad.full_tensor(), expected)
        assert torch.equal(w.detach().full_tensor(), -expected)
    finally:
        dist.destroy_process_group()


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"eta": -0.1}, ValueError, "eta must be >= 0, got -0.1"),
        ({"eta": math.nan}, ValueError, "eta must be >= 0, got nan"),
        ({"eta": "0.3"}, TypeError, "eta must be a number, got '0.3'"),
        ({"gamma": -1.0}, ValueError, "gamma must be >= 0, got -1"),
        ({"gamma": math.inf}, ValueError, "gamma must be >= 0, got inf"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
        ({"params": torch.zeros(2)}, TypeError, "params must be an iterable of tensors"),
        ({"params": [torch.zeros(2, 5)]}, ValueError, r"one of shape \(2, 5\) that is not"),
        ({"params": ["weight"]}, ValueError, "params must be parameters of the optimizer, got 'weight'"),
    ],
    ids=["eta<0", "eta nan", "eta str", "gamma<0", "gamma inf", "generator", "tensor", "foreign", "name"],
)
def test_bad_options(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = sgd(zeros(2))
    with pytest.raises(error, match=message):
        GradientNoise(optimizer, **kwargs)
    assert not optimizer._optimizer_step_pre_hooks


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Linear"):
        GradientNoise(nn.Linear(2, 2))  # type: ignore[arg-type]
    for call in (noise_std, lambda step: walk_variance(step, 0.1)):
        with pytest.raises(ValueError, match="must be >= 0, got -1"):
            call(-1)
        with pytest.raises(TypeError, match=r"must be an integer, got 1\.5"):
            call(1.5)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        module.GradientNoiseCallback(seed=-1)
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        module.Missing  # noqa: B018
    w = zeros(3)
    with pytest.raises(ValueError, match="eta must be >= 0"):
        add_gradient_noise_([w], 0, -1.0, 0.55, seeded(0))
    assert not w.grad.any()


def test_gradients_on_two_devices_need_two_generators() -> None:
    here = zeros(3)
    there = torch.zeros(3, device="meta", requires_grad=True)
    there.grad = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match="generator must be on the one device of all gradients, cpu, meta, got cpu"):
        add_gradient_noise_([here, there], 0, 0.3, 0.55, seeded(0))
    assert not here.grad.any()


@pytest.mark.parametrize(
    ("change", "error"),
    [({"t": -1}, ValueError), ({"t": 0.5}, TypeError), ({"eta": -1.0}, ValueError), ({"gamma": None}, TypeError)],
    ids=["t<0", "t fraction", "eta", "gamma"],
)
def test_a_bad_state_changes_nothing(change: dict[str, Any], error: type[Exception]) -> None:
    w = zeros(10)
    optimizer = sgd(w)
    noise = GradientNoise(optimizer, eta=0.3)
    optimizer.step()
    before = noise.state_dict()
    other = {**before, "t": 7, "generators": [seeded(5).get_state()], **change}
    with pytest.raises(error):
        noise.load_state_dict(other)
    with pytest.raises(ValueError, match="state_dict must be one of GradientNoise, with generators"):
        noise.load_state_dict({k: v for k, v in before.items() if k != "generators"})
    after = noise.state_dict()
    assert (after["t"], after["eta"]) == (1, 0.3)
    assert torch.equal(after["generators"][0], before["generators"][0])
