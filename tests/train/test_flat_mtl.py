"""FlatMTL: every property of its card, to its tolerance, its hosts, and what must be refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoestring.loop import fit
from shoestring.train.aggregators import (
    aggregate_cagrad,
    aggregate_imtl,
    aggregate_mean,
    aggregate_mgda,
    aggregate_pcgrad,
)
from shoestring.train.flat_mtl import FlatMTL, flat_direction, perturbation

RULES = {
    "mean": aggregate_mean,
    "pcgrad": aggregate_pcgrad,
    "cagrad": aggregate_cagrad,
    "mgda": aggregate_mgda,
    "imtl": aggregate_imtl,
}
by_rule = pytest.mark.parametrize("rule", RULES)
SGD, Adam = torch.optim.SGD, torch.optim.Adam


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A trunk and m heads; task i regresses column i of x, so that tasks conflict a little."""

    def __init__(self, m: int = 2, dtype: torch.dtype = torch.float64, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.norm, self.mid = nn.Linear(6, 9), norm or nn.Identity(), nn.Linear(9, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(m))
        with torch.no_grad():
            for seed, p in enumerate(self.parameters()):
                p.copy_(random(*p.shape, seed=seed) / 2)
        self.to(dtype)
        self.trunk_parameters = [*self.up.parameters(), *self.norm.parameters(), *self.mid.parameters()]
        self.head_parameters = [list(head.parameters()) for head in self.heads]

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mid(torch.tanh(self.norm(self.up(x)))))

    def losses(self, step: int = 0) -> list[Tensor]:
        x = random(12, 6, seed=100 + step).to(self.up.weight.dtype)
        z = self.features(x)
        return [(head(z)[:, 0] - x[:, i] ** 2).square().mean() for i, head in enumerate(self.heads)]

    def flat(self, base: Any = Adam, aggregator: Any = "mean", lr: float = 0.01, **options: Any) -> FlatMTL:
        return FlatMTL(self.trunk_parameters, self.head_parameters, base, aggregator, lr=lr, **options)


def vector(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def gradient(loss: Tensor, params: list[Tensor], **options: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, retain_graph=True, **options)])


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Seen:
    """An aggregator that keeps what it was given: G, then h."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, G: Tensor) -> Tensor:
        self.given.append(G.clone())
        return G.mean(0)


# ---- the mathematics


def test_perturbation_is_its_equations() -> None:
    w, g = random(11, seed=1), random(11, seed=2)
    split = lambda t: list(t.split([4, 0, 7]))  # noqa: E731
    torch.testing.assert_close(vector(perturbation(split(w), split(g), 0.3)), 0.3 * g / g.norm())
    expected = 0.3 * w**2 * g / (w.abs() * g).norm()
    torch.testing.assert_close(vector(perturbation(split(w), split(g), 0.3, adaptive=True)), expected)
    rho = torch.tensor([0.1] * 4 + [0.5] * 7, dtype=torch.float64)
    torch.testing.assert_close(vector(perturbation(split(w), split(g), [0.1, 9.0, 0.5])), rho * g / g.norm())
    assert not vector(perturbation(split(w), split(0 * g), 0.3)).any()
    assert perturbation([], [], 0.3) == []


def test_perturbation_has_norm_rho() -> None:
    for seed in range(20):
        w, g = random(50, seed=seed).float(), (10.0 ** (seed / 2 - 4)) * random(50, seed=seed + 99).float()
        w[:5] = 0
        (eps,) = perturbation([w], [g], 0.05)
        assert float(eps.double().norm()) == pytest.approx(0.05, abs=1e-6)
        (eps,) = perturbation([w], [g], 2.0, adaptive=True)
        assert float((eps / w.abs())[5:].double().norm()) == pytest.approx(2.0, abs=1e-5)
        assert not eps[:5].any()


def test_direction_is_of_losses_and_of_flatness_apart() -> None:
    G, S = random(3, 8, seed=1), random(3, 8, seed=2)
    before = S.clone()
    for rule in RULES.values():
        torch.testing.assert_close(flat_direction(G, S, rule), rule(G) + rule(S - G))
        torch.testing.assert_close(flat_direction(G, S, rule, decompose=False), rule(S))
    assert torch.equal(S, before)
    flat_direction(G, S, overwrite_s=True)
    assert torch.equal(S, before - G)


# ---- a step is the algorithm


@by_rule
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_step_is_the_algorithm_by_hand(rule: str, separate: bool, adaptive: bool) -> None:
    """Written out on a copy of the network, without any of our functions but the rule."""
    rho = 0.5 if adaptive else 0.05
    net = Net(3)
    twin = copy.deepcopy(net)
    optimizer = net.flat(SGD, rule, rho=rho, adaptive=adaptive, separate_norms=separate)
    losses = optimizer.step(net.losses)

    theta = list(twin.trunk_parameters)
    G, S, T = [], [], []
    for i, phi in enumerate(twin.head_parameters):
        other = copy.deepcopy(twin)
        parts = [[*other.trunk_parameters], [*other.head_parameters[i]]]
        loss = other.losses()[i]
        G.append(gradient(loss, parts[0]))
        grads = [torch.autograd.grad(loss, part, retain_graph=True) for part in parts]
        pairs = [list(zip(p, g, strict=True)) for p, g in zip(parts, grads, strict=True)]
        for group in pairs if separate else [pairs[0] + pairs[1]]:
            norm = vector([p.abs() * g if adaptive else g for p, g in group]).norm()
            with torch.no_grad():
                for p, g in group:
                    p += rho * (p**2 * g if adaptive else g) / norm
        loss = other.losses()[i]
        S.append(gradient(loss, parts[0]))
        T.append(gradient(loss, parts[1]))
        assert float(optimizer.sharpness[i]) == pytest.approx(float(loss.detach() - losses[i]), rel=1e-9)
        torch.testing.assert_close(losses[i], twin.losses()[i].detach())
        torch.testing.assert_close(vector(net.head_parameters[i]), vector(phi) - 0.01 * T[i], rtol=0, atol=1e-12)
    G, S = torch.stack(G), torch.stack(S)
    agg = RULES[rule]
    if rule == "pcgrad":
        generator = torch.Generator().manual_seed(0)
        d = agg(G, generator) + agg(S - G, generator)
    else:
        d = agg(G) + agg(S - G)
    torch.testing.assert_close(vector(net.trunk_parameters), vector(theta) - 0.01 * d, rtol=0, atol=1e-10)


@by_rule
def test_rho_zero_is_the_base_rule_bit_for_bit(rule: str) -> None:
    """Also with dropout: it is not drawn twice."""
    net = Net(3, torch.float32, norm=nn.Dropout(0.3))
    by_hand = copy.deepcopy(net)
    optimizer = net.flat(Adam, rule, rho=0.0)
    base = Adam(by_hand.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    for step in range(10):
        optimizer.step(lambda step=step: net.losses(step))
        assert optimizer.sharpness is None
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    for step in range(10):
        losses = by_hand.losses(step)
        G = torch.stack([gradient(loss, by_hand.trunk_parameters) for loss in losses])
        d = aggregate_pcgrad(G, order) if rule == "pcgrad" else RULES[rule](G)
        sizes = [p.numel() for p in by_hand.trunk_parameters]
        for p, g in zip(by_hand.trunk_parameters, d.split(sizes), strict=True):
            p.grad = g.view(p.shape).clone()
        for loss, head in zip(losses, by_hand.head_parameters, strict=True):
            for p, g in zip(head, torch.autograd.grad(loss, head, retain_graph=True), strict=True):
                p.grad = g
        base.step()
    assert equal(net, by_hand)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    "aggregator", ["mean", lambda G: torch.tensor([0.2, 0.5, 0.3]).to(G) @ G], ids=["mean", "fixed"]
)
def test_decomposing_changes_nothing_for_a_linear_rule(aggregator: Any) -> None:
    nets = [Net(3), Net(3)]
    for net, decompose in zip(nets, (True, False), strict=True):
        optimizer = net.flat(SGD, aggregator, rho=0.05, decompose=decompose)
        for step in range(5):
            optimizer.step(lambda net=net, step=step: net.losses(step))
    torch.testing.assert_close(vector(nets[0].parameters()), vector(nets[1].parameters()), rtol=0, atol=1e-12)
    ablated = Net(3)
    ablated.flat(SGD, "mgda", rho=0.05, decompose=False).step(ablated.losses)
    other = Net(3)
    other.flat(SGD, "mgda", rho=0.05).step(other.losses)
    assert not torch.allclose(ablated.up.weight, other.up.weight, rtol=0, atol=1e-9)


@by_rule
@pytest.mark.parametrize("separate", [True, False])
def test_one_task_is_sam(rule: str, separate: bool) -> None:
    """As it is usually written, over ten steps; CAGrad up to its factor, which the shared learning rate takes back."""
    net, sam = Net(1), Net(1)
    factor = 1.4 / 1.16 if rule == "cagrad" else 1.0
    groups = [{"params": net.trunk_parameters, "lr": 0.05 / factor}]
    optimizer = FlatMTL(groups, net.head_parameters, SGD, rule, rho=0.05, separate_norms=separate, lr=0.05)
    base = SGD(sam.parameters(), lr=0.05)
    parts = [sam.trunk_parameters, sam.head_parameters[0]]
    for step in range(10):
        optimizer.step(lambda step=step: net.losses(step))
        base.zero_grad()
        sam.losses(step)[0].backward()
        kept = [p.detach().clone() for p in sam.parameters()]
        for part in parts if separate else [parts[0] + parts[1]]:
            norm = torch.stack([p.grad.norm() for p in part]).norm() + 1e-12
            with torch.no_grad():
                for p in part:
                    p.add_(p.grad * (0.05 / norm))
        base.zero_grad()
        sam.losses(step)[0].backward()
        with torch.no_grad():
            for p, old in zip(sam.parameters(), kept, strict=True):
                p.copy_(old)
        base.step()
    torch.testing.assert_close(vector(net.parameters()), vector(sam.parameters()), rtol=0, atol=1e-11)


def test_on_a_quadratic_h_is_exact() -> None:
    """L_i = 1/2 (theta - a_i)^T A_i (theta - a_i): h_i = rho A_i g_i / ||g_i||."""
    theta = nn.Parameter(random(5))
    roots, centres = random(2, 5, 5, seed=1), random(2, 5, seed=2)
    A = roots @ roots.mT
    seen = Seen()
    optimizer = FlatMTL([theta], [[], []], SGD, seen, rho=0.7, lr=0.0)
    optimizer.step(lambda: [0.5 * (theta - a) @ M @ (theta - a) for M, a in zip(A, centres, strict=True)])
    G, h = seen.given
    g = torch.stack([M @ (theta.detach() - a) for M, a in zip(A, centres, strict=True)])
    torch.testing.assert_close(G, g, rtol=1e-12, atol=1e-12)
    expected = torch.stack([0.7 * M @ g_i / g_i.norm() for M, g_i in zip(A, g, strict=True)])
    torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-10)


def test_h_tends_to_rho_times_the_gradient_of_the_norm() -> None:
    """Heads are left where they are, ``rho`` 0 in their groups; the error falls with rho."""
    errors = []
    for rho in (1e-3, 1e-4):
        net, seen = Net(2), Seen()
        heads = [[{"params": head, "rho": 0.0}] for head in net.head_parameters]
        FlatMTL(net.trunk_parameters, heads, SGD, seen, rho=rho, lr=0.0).step(net.losses)
        h = seen.given[1]
        rows = []
        for loss in net.losses():
            norm = gradient(loss, net.trunk_parameters, create_graph=True).norm()
            rows.append(gradient(norm, net.trunk_parameters))
        expected = torch.stack(rows)
        errors.append(float((h / rho - expected).norm() / expected.norm()))
    assert errors[0] < 2e-2
    assert errors[1] < 0.2 * errors[0]


def test_a_linear_loss_is_flat() -> None:
    """The null test: h is 0, the direction that of the rule alone, and the loss rises by rho ||g||."""
    theta = nn.Parameter(random(6))
    slopes = random(3, 6, seed=1)
    optimizer = FlatMTL([theta], [[], [], []], SGD, "mgda", rho=0.25, lr=1.0)
    before = theta.detach().clone()
    optimizer.step(lambda: slopes @ theta)
    torch.testing.assert_close(before - theta.detach(), aggregate_mgda(slopes), rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.sharpness, 0.25 * slopes.norm(dim=1), rtol=0, atol=1e-12)


def test_scaling_a_loss_scales_its_rows_and_not_its_perturbation() -> None:
    seen, moved = [Seen(), Seen()], []
    for factor, rows in zip((1.0, 40.0), seen, strict=True):
        net = Net(2)
        calls: list[Tensor] = []

        def closure(net: Net = net, factor: float = factor, calls: list[Tensor] = calls) -> list[Tensor]:
            calls.append(vector(net.parameters()))
            first, second = net.losses()
            return [factor * first, second]

        net.flat(SGD, rows, rho=0.05).step(closure)
        moved.append(calls)
    torch.testing.assert_close(moved[0][1], moved[1][1], rtol=0, atol=1e-12)
    for plain, scaled in zip(seen[0].given, seen[1].given, strict=True):
        torch.testing.assert_close(scaled[0], 40 * plain[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scaled[1], plain[1], rtol=1e-9, atol=1e-12)


def test_adaptive_does_not_see_rescaled_layers() -> None:
    """A ReLU network with layers scaled by c and 1 / c: the same function, the same worst losses near by."""

    def rise(c: float, adaptive: bool) -> Tensor:
        first, second = nn.Parameter(c * random(8, 5, seed=1)), nn.Parameter(random(4, 8, seed=2) / c)
        heads = [[nn.Parameter(random(4, seed=seed))] for seed in (3, 4)]
        optimizer = FlatMTL([first, second], heads, SGD, rho=0.3, adaptive=adaptive, lr=0.0)
        x = random(20, 5, seed=5)
        optimizer.step(lambda: [(((first @ x.T).relu().T @ second.T @ h[0]) - 1).square().mean() for h in heads])
        return optimizer.sharpness

    torch.testing.assert_close(rise(10.0, adaptive=True), rise(1.0, adaptive=True), rtol=1e-9, atol=0)
    assert not torch.allclose(rise(10.0, adaptive=False), rise(1.0, adaptive=False), rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_task_moves_the_trunk_and_its_own_head_only_and_all_come_back(dtype: torch.dtype) -> None:
    net = Net(3, dtype)
    start = [p.detach().clone() for p in net.parameters()]
    calls: list[list[Tensor]] = []

    def closure() -> list[Tensor]:
        assert torch.is_grad_enabled()
        calls.append([p.detach().clone() for p in net.parameters()])
        return net.losses()

    net.flat(Adam, "pcgrad", rho=0.5).set_gradients(closure)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), start, strict=True))
    assert len(calls) == 4
    assert all(torch.equal(p, q) for p, q in zip(calls[0], start, strict=True))
    trunk = len(net.trunk_parameters)
    for i in range(3):
        moved = [not torch.equal(p, q) for p, q in zip(calls[1 + i], start, strict=True)]
        assert all(moved[:trunk])
        assert [any(moved[trunk + 2 * j : trunk + 2 * j + 2]) for j in range(3)] == [j == i for j in range(3)]
        far = vector([p.double() - q.double() for p, q in zip(calls[1 + i][:trunk], start, strict=False)]).norm()
        assert float(far) == pytest.approx(0.5, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_heads_get_the_gradient_of_their_own_task() -> None:
    """The second loss uses the first head too; the first head does not learn from it."""
    net = Net(2)

    def closure() -> list[Tensor]:
        first, second = net.losses()
        return [first, second + 100 * net.heads[0].weight.square().sum()]

    net.flat(SGD, rho=1e-9).set_gradients(closure)
    expected = torch.autograd.grad(net.losses()[0], net.heads[0].weight)[0]
    torch.testing.assert_close(net.heads[0].weight.grad, expected, rtol=1e-6, atol=1e-8)


def test_closures_of_single_tasks_give_the_same_step() -> None:
    nets = [Net(3, torch.float32), Net(3, torch.float32)]
    calls = []

    def alone(net: Net, i: int) -> Tensor:
        calls.append(i)
        return net.losses()[i]

    whole, single = (net.flat(Adam, "cagrad") for net in nets)
    for _ in range(3):
        whole.step(nets[0].losses)
        single.step(nets[1].losses, [lambda i=i: alone(nets[1], i) for i in range(3)])
    assert equal(*nets)
    assert calls == [0, 1, 2] * 3


# ---- what forward passes leave behind


class Exotic(nn.Module):
    """Counts its calls in a buffer, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(9))
        self.register_buffer("never", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


def norms() -> dict[str, nn.Module]:
    return {
        "default": nn.BatchNorm1d(9),
        "momentum None": nn.BatchNorm1d(9, momentum=None),
        "no affine": nn.BatchNorm1d(9, affine=False),
        "no statistics": nn.BatchNorm1d(9, track_running_stats=False),
        "exotic": Exotic(),
    }


@pytest.mark.parametrize("kind", norms())
def test_buffers_change_once_a_step_and_at_the_unperturbed_weights(kind: str) -> None:
    net = Net(2, norm=norms()[kind])
    twin = copy.deepcopy(net)
    optimizer = net.flat(Adam, "pcgrad", rho=0.5)
    for step in range(4):
        twin.load_state_dict({**twin.state_dict(), **dict(net.named_parameters())})
        twin.losses(step)  # one forward pass, at the weights before the step
        optimizer.step(lambda step=step: net.losses(step))
        for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name
    assert dict(net.named_buffers()).keys() == dict(twin.named_buffers()).keys()


def test_modules_that_only_a_perturbed_pass_calls_are_put_back() -> None:
    net, extra = Net(2), nn.BatchNorm1d(6).double()

    def alone() -> Tensor:
        extra(random(12, 6))
        return net.losses()[0]

    net.flat().step(net.losses, [alone, alone_of(net, 1)])
    assert int(extra.num_batches_tracked) == 0
    assert not extra.running_mean.any()


def alone_of(net: Net, i: int) -> Callable[[], Tensor]:
    return lambda: net.losses()[i]


def test_no_hook_stays() -> None:
    from torch.nn.modules import module

    net = Net(2)
    net.flat().step(net.losses)
    with pytest.raises(RuntimeError, match="on purpose"):
        net.flat().step(fails_at(net, call=2))
    assert not module._global_forward_pre_hooks


@pytest.mark.parametrize("restore", [True, False])
def test_dropout_masks_are_the_same_if_asked_for(restore: bool) -> None:
    net = Net(2, norm=nn.Dropout(0.5))
    masks: list[Tensor] = []
    net.norm.register_forward_hook(lambda module, args, out: masks.append((out == 0).clone()))
    torch.manual_seed(0)
    net.flat(restore_rng=restore).step(net.losses)
    after = torch.get_rng_state()
    assert [torch.equal(mask, masks[0]) for mask in masks[1:]] == [restore, restore]
    torch.manual_seed(0)
    net.losses()
    assert torch.equal(after, torch.get_rng_state()) == restore  # one pass, seen from outside


# ---- parameters


def test_frozen_and_unreached_parameters_are_passed_by() -> None:
    """Weight decay and momentum do not touch them either; a parameter that one task reaches gets that task's share."""
    net = Net(2)
    unused, half = nn.Parameter(random(3)), nn.Parameter(random(4))
    net.up.bias.requires_grad_(False)
    shared = [*net.trunk_parameters, unused, half]
    optimizer = FlatMTL(shared, net.head_parameters, torch.optim.AdamW, rho=0.05, lr=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in (net.up.bias, unused, half)]
    for _ in range(3):
        optimizer.step(lambda: [net.losses()[0] + half.square().sum(), net.losses()[1]])
    assert torch.equal(net.up.bias, before[0])
    assert torch.equal(unused, before[1])
    assert unused.grad is None
    assert net.up.bias.grad is None
    assert not torch.equal(half, before[2])
    optimizer.step(net.losses)  # now nothing reaches it
    assert half.grad is None
    net.up.bias.requires_grad_(True)
    optimizer.step(net.losses)
    assert not torch.equal(net.up.bias, before[0])


def test_a_task_that_stops_reaching_a_parameter_leaves_no_old_gradient() -> None:
    net = Net(2)
    extra = nn.Parameter(random(4))
    optimizer = FlatMTL([*net.trunk_parameters, extra], net.head_parameters, SGD, rho=0.0, lr=0.0)
    optimizer.step(lambda: [loss + extra.sum() for loss in net.losses()])
    optimizer.step(lambda: [net.losses()[0], net.losses()[1] + extra.sum()])
    torch.testing.assert_close(extra.grad, torch.full_like(extra, 0.5))


def test_precisions_and_layouts_may_be_mixed() -> None:
    net = Net(2, torch.float32)
    plain = copy.deepcopy(net)
    net.heads[1].bfloat16()
    with torch.no_grad():
        net.mid.weight.data = net.mid.weight.data.T.contiguous().T
    head = net.heads[1]
    net.heads[1] = nn.Sequential(Cast(), head)  # its input in bfloat16
    optimizer = FlatMTL(net.trunk_parameters, [net.heads[0].parameters(), head.parameters()], SGD, rho=0.05, lr=0.1)
    optimizer.step(lambda: [loss.float() for loss in net.losses()])
    plain.flat(SGD, rho=0.05, lr=0.1).step(plain.losses)
    assert head.weight.grad.dtype == torch.bfloat16
    assert net.mid.weight.grad.stride() == net.mid.weight.stride()
    torch.testing.assert_close(net.mid.weight, plain.mid.weight, rtol=0, atol=5e-3)


class Cast(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.bfloat16()


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_around_the_step_sees_the_perturbed_weights(inside: bool) -> None:
    """Autocast keeps half-precision copies of weights: a stale one would make h zero. Rules stay in full precision."""
    net, seen = Net(2, torch.float32), Seen()
    optimizer = net.flat(SGD, seen, rho=0.5, lr=0.0)

    def closure() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            return [loss.float() for loss in net.losses()]

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        optimizer.step(closure)
    full, exact = Seen(), Net(2, torch.float32)
    exact.flat(SGD, full, rho=0.5, lr=0.0).step(exact.losses)
    assert float((seen.given[1] - full.given[1]).norm() / full.given[1].norm()) < 0.1
    G = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        d = optimizer_of(G, "mgda")
    assert torch.equal(d, aggregate_mgda(G))


def optimizer_of(slopes: Tensor, rule: str) -> Tensor:
    """The step of size one with linear losses."""
    theta = nn.Parameter(torch.zeros(slopes.shape[1]))
    FlatMTL([theta], [[]] * len(slopes), SGD, rule, rho=0.0, lr=1.0).step(lambda: list((slopes * theta).sum(1)))
    return -theta.detach()


def test_rho_has_a_default_for_each_of_its_scales() -> None:
    net = Net(1)
    assert net.flat().param_groups[0]["rho"] == 0.03
    assert net.flat(adaptive=True).param_groups[0]["rho"] == 2.0


# ---- an optimizer


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_dict_goes_on_bit_for_bit_with_the_order_of_projections() -> None:
    """Four tasks, so that the order matters."""
    net = Net(4, torch.float32)
    optimizer = net.flat(Adam, "pcgrad", rho=0.05, generator=torch.Generator().manual_seed(5))
    for step in range(4):
        optimizer.step(lambda step=step: net.losses(step))
    other = copy.deepcopy(net)
    renewed = other.flat(Adam, "pcgrad", rho=0.9, lr=77.0)
    renewed.load_state_dict(through_a_file(optimizer.state_dict()))
    forgetful = copy.deepcopy(net)
    third = forgetful.flat(Adam, "pcgrad")
    third.load_state_dict({k: v for k, v in through_a_file(optimizer.state_dict()).items() if k != "generator"})
    for step in range(4, 10):
        for model, opt in ((net, optimizer), (other, renewed), (forgetful, third)):
            opt.step(lambda step=step, model=model: model.losses(step))
    assert equal(net, other)
    assert not equal(net, forgetful)
    assert renewed.param_groups is renewed.base.param_groups
    assert renewed.state is renewed.base.state


def test_the_state_of_a_plain_optimizer_can_be_taken_over() -> None:
    net = Net(2)
    plain = Adam([{"params": net.trunk_parameters}, *({"params": head} for head in net.head_parameters)], lr=0.02)
    sum(net.losses()).backward()
    plain.step()
    optimizer = net.flat(Adam, rho=0.05)
    optimizer.load_state_dict(plain.state_dict())
    assert [(g["task"], g["rho"], g["lr"]) for g in optimizer.param_groups] == [
        (None, 0.05, 0.02),
        (0, 0.05, 0.02),
        (1, 0.05, 0.02),
    ]
    optimizer.step(net.losses)
    assert int(optimizer.state[net.up.weight]["step"]) == 2


def test_groups_have_their_own_rates_and_radii() -> None:
    net = Net(2)
    shared = [{"params": net.up.parameters(), "rho": 0.2, "lr": 0.0}, {"params": net.mid.parameters()}]
    optimizer = FlatMTL(shared, net.head_parameters, SGD, rho=0.05, lr=0.1)
    before = [vector(net.up.parameters()), vector(net.mid.parameters())]
    calls: list[list[Tensor]] = []

    def closure() -> list[Tensor]:
        calls.append([vector(net.up.parameters()), vector(net.mid.parameters())])
        return net.losses()

    g = [gradient(net.losses()[0], list(part.parameters())) for part in (net.up, net.mid)]
    norm = vector(g).norm()
    optimizer.step(closure)
    torch.testing.assert_close(calls[1][0], before[0] + 0.2 * g[0] / norm, rtol=0, atol=1e-12)
    torch.testing.assert_close(calls[1][1], before[1] + 0.05 * g[1] / norm, rtol=0, atol=1e-12)
    assert torch.equal(vector(net.up.parameters()), before[0])
    assert not torch.equal(vector(net.mid.parameters()), before[1])


def test_added_parameters_are_shared_or_join_a_head() -> None:
    net = Net(2)
    late, own = nn.Parameter(random(3)), nn.Parameter(random(2))
    optimizer = net.flat(SGD, rho=0.05, lr=0.1)
    optimizer.step(net.losses)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    optimizer.add_param_group({"params": [own], "task": 1})

    def closure() -> list[Tensor]:
        first, second = net.losses()
        return [first + late.sum(), second + own.sum()]

    before = late.detach().clone(), own.detach().clone()
    optimizer.step(closure)
    torch.testing.assert_close(late.detach(), before[0] - 0.5 * 0.5)  # half of its gradient: the mean over tasks
    torch.testing.assert_close(own.detach(), before[1] - 0.1)
    assert len(optimizer.base.param_groups) == 5
    for task in (2, -1, "0"):
        with pytest.raises(ValueError, match="task of a param group must be None or a number below 2"):
            optimizer.add_param_group({"params": [nn.Parameter(random(1))], "task": task})


def test_zero_grad_and_schedulers_reach_the_base_optimizer() -> None:
    net = Net(2)
    optimizer = net.flat(SGD, lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(net.losses)
    scheduler.step()
    before = net.heads[0].bias.detach().clone()
    optimizer.step(net.losses)
    torch.testing.assert_close(net.heads[0].bias.detach(), before - 0.2 * net.heads[0].bias.grad)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_copies_go_their_own_way() -> None:
    net = Net(4)
    optimizer = net.flat(Adam, "pcgrad", rho=0.05)
    optimizer.step(net.losses)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    optimizer.step(net.losses)
    assert not equal(net, twin)
    twin_optimizer.step(twin.losses)
    assert equal(net, twin)
    assert twin_optimizer.param_groups is twin_optimizer.base.param_groups


# ---- rules of others


def test_any_function_of_the_gradients_is_a_rule() -> None:
    nets = [Net(3), Net(3)]
    nets[0].flat(SGD, "mgda", rho=0.05).step(nets[0].losses)
    nets[1].flat(SGD, aggregate_mgda, rho=0.05).step(nets[1].losses)
    assert equal(*nets)


def test_aggregators_of_torchjd_drop_in() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    nets = [Net(3), Net(3)]
    nets[0].flat(SGD, "imtl", rho=0.05).step(nets[0].losses)
    nets[1].flat(SGD, aggregation.IMTLG(), rho=0.05).step(nets[1].losses)
    torch.testing.assert_close(vector(nets[0].parameters()), vector(nets[1].parameters()), rtol=0, atol=1e-9)


# ---- hosts


def test_in_the_loop_it_equals_steps_by_hand() -> None:
    nets = [Net(2), Net(2)]
    optimizers = [net.flat(Adam, "cagrad", rho=0.05) for net in nets]

    def step(net: nn.Module, batch: int) -> Any:
        return None, {"loss": optimizers[0].step(lambda: net.losses(batch)).mean()}

    history = fit(nets[0], [0, 1, 2], step, optimizers[0], epochs=2, log_every=1, progress=False)
    losses = [optimizers[1].step(lambda b=b: nets[1].losses(b)).mean().item() for _ in range(2) for b in range(3)]
    assert equal(*nets)
    assert [record["loss"] for record in history] == losses


def test_in_transformers_trainer_it_equals_steps_by_hand(tmp_path: Any) -> None:
    """The five lines of the docstring, with the Trainer's own schedule and clipping."""
    from transformers import Trainer, TrainingArguments

    nets = [Net(2, torch.float32), Net(2, torch.float32)]
    flats = [net.flat(Adam, "pcgrad", rho=0.05) for net in nets]

    class FlatTrainer(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            inputs = self._prepare_inputs(inputs)
            return flats[0].set_gradients(lambda: nets[0].losses(int(inputs["step"][0]))).mean()

    options = {"max_steps": 4, "per_device_train_batch_size": 1, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), lr_scheduler_type="linear", max_grad_norm=0.5, disable_tqdm=True, **options)
    rows = [{"step": 0}] * 4
    args.remove_unused_columns = False
    FlatTrainer(nets[0], args, train_dataset=rows, optimizers=(flats[0].base, None)).train()
    for number in range(4):
        flats[1].set_gradients(lambda: nets[1].losses(0))
        nn.utils.clip_grad_norm_(nets[1].parameters(), 0.5)
        for group in flats[1].param_groups:
            group["lr"] = 0.01 * (4 - number) / 4
        flats[1].base.step()
    torch.testing.assert_close(vector(nets[0].parameters()), vector(nets[1].parameters()), rtol=0, atol=1e-6)
    assert not equal(nets[0], Net(2, torch.float32))


# ---- bad input


def fails_at(net: Net, call: int, how: str = "raise") -> Callable[[], list[Tensor]]:
    """A closure that fails the given time it is called, 0 being the pass at the weights."""
    calls = [0]

    def closure() -> list[Tensor]:
        losses = net.losses()
        calls[0] += 1
        if calls[0] - 1 < call:
            return losses
        if how == "raise":
            raise RuntimeError("on purpose")
        if how == "nan loss":
            return [losses[0], losses[1] * torch.nan]
        if how == "infinite loss":
            return [losses[0] + torch.inf, losses[1]]
        if how == "nan gradient":  # of a finite loss
            return [loss + (0 * net.up.weight.sum()).abs().sqrt() for loss in losses]
        if how == "too few":
            return losses[:1]
        if how == "too many":
            return [*losses, losses[0]]
        if how == "no gradient":
            return [loss.detach() for loss in losses]
        if how == "foreign":
            return [nn.Parameter(torch.ones(())) * 2 for _ in losses]
        if how == "vectors":
            return [loss.expand(3) for loss in losses]
        if how == "numbers":
            return [float(loss.detach()) for loss in losses]
        assert how == "sparse"
        table = net.sparse.weight
        return [loss + nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum() for loss in losses]

    return closure


FAILURES = {
    "raise": (RuntimeError, "on purpose"),
    "nan loss": (FloatingPointError, "the loss.* of task 1 is nan"),
    "infinite loss": (FloatingPointError, "the loss.* of task 0 is inf"),
    "nan gradient": (FloatingPointError, "the gradient norm.* is nan"),
    "too few": (ValueError, "closure must return 2 losses, one a task, got 1"),
    "too many": (ValueError, "closure must return 2 losses, one a task, got 3"),
    "no gradient": (ValueError, "losses of closure must have a gradient, number 0 has none"),
    "foreign": (ValueError, r"loss of task [01] depends on no parameter of shared_params and task_params\[[01]\]"),
    "vectors": (ValueError, r"losses of closure must be scalar tensors, got shape \(3,\) for number 0"),
    "numbers": (ValueError, "losses of closure must be scalar tensors, got"),
    "sparse": (RuntimeError, "does not support sparse gradients"),
}


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("how", FAILURES)
def test_after_an_error_everything_is_as_before(how: str, call: int) -> None:
    """Weights, running statistics, gradients, optimizer state and draws of PCGrad; and the next step works."""
    if call == 2 and how == "infinite loss":
        pytest.skip("the third pass is of task 1, its first loss counts for nothing")
    if call == 1 and how == "nan loss":
        call = 2
    net = Net(2, norm=nn.BatchNorm1d(9))
    net.sparse = nn.Embedding(4, 3).double()
    shared = [*net.trunk_parameters, net.sparse.weight]
    optimizer = FlatMTL(shared, net.head_parameters, Adam, "pcgrad", rho=0.3, lr=0.01)
    optimizer.step(net.losses)
    twin = copy.deepcopy((net, optimizer))
    grads = [p.grad for p in net.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    error, message = FAILURES[how]
    with pytest.raises(error, match=message):
        optimizer.step(fails_at(net, call, how))
    for (name, a), b in zip(net.state_dict().items(), twin[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for p, grad, value in zip(net.parameters(), grads, values, strict=True):
        assert p.grad is grad
        assert value is None or torch.equal(grad, value)
    optimizer.step(net.losses)
    twin[1].step(twin[0].losses)
    for (name, a), b in zip(net.state_dict().items(), twin[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda G: G, ValueError, r"aggregator must return a tensor of shape \(133,\), got \(2, 133\)"),
        (lambda G: 0.0, ValueError, r"aggregator must return a tensor of shape \(133,\), got float"),
        (lambda G: G.mean(0) * torch.nan, FloatingPointError, "aggregator returned NaN or infinity"),
    ],
    ids=["matrix", "number", "nan"],
)
def test_a_rule_with_a_bad_answer_is_refused(answer: Any, error: type[Exception], message: str) -> None:
    net = Net(2)
    with pytest.raises(error, match=message):
        net.flat(SGD, answer).step(net.losses)
    assert equal(net, Net(2))
    assert all(p.grad is None for p in net.parameters())


def test_a_parameter_of_two_tasks_is_named() -> None:
    net = Net(2)
    with pytest.raises(ValueError, match=r"number 0 of task_params\[1\], of shape \(1, 7\), is in task_params\[0\]"):
        FlatMTL(net.trunk_parameters, [net.head_parameters[0], net.head_parameters[0]], SGD)
    with pytest.raises(ValueError, match=r"number 1 of task_params\[0\], of shape \(9,\), is in shared_params already"):
        FlatMTL(net.trunk_parameters, [[net.heads[0].weight, net.up.bias], []], SGD)
    with pytest.raises(ValueError, match=r"number 1 of shared_params, of shape \(9,\), is in shared_params already"):
        FlatMTL([net.up.bias, net.up.bias], [[]], SGD)
    named = [(f"heads.{name}", p) for name, p in net.heads[0].named_parameters()]
    with pytest.raises(ValueError, match=r"parameter heads.weight of task_params\[0\], of shape \(1, 7\)"):
        FlatMTL([("w", net.heads[0].weight)], [named], SGD)
    optimizer = net.flat()
    with pytest.raises(ValueError, match=r"of task_params\[0\], of shape \(9,\), is in shared_params"):
        optimizer.add_param_group({"params": [net.up.bias], "task": 0})


def test_named_parameters_keep_their_names() -> None:
    net = Net(1)
    optimizer = FlatMTL(net.up.named_parameters(), [net.heads[0].named_parameters()], SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.step(net.losses)
    assert not equal(net, Net(1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, r"rho must be >= 0, got -0\.1"),
        ({"rho": float("nan")}, ValueError, "rho must be >= 0, got nan"),
        ({"rho": "large"}, TypeError, "rho must be a number"),
        ({"aggregator": "median"}, ValueError, "aggregator must be one of mean, pcgrad.* got 'median'"),
        ({"base": "adam"}, TypeError, "base_optimizer must be a class"),
        ({"base": lambda groups, lr: groups}, TypeError, "base_optimizer must return a torch.optim.Optimizer"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"momentun": 0.9}, TypeError, "momentun"),
    ],
    ids=["negative", "nan", "text", "aggregator", "base text", "base list", "lr", "base option"],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Net(2).flat(**options)


def test_bad_parameters_are_refused() -> None:
    net = Net(2)
    with pytest.raises(TypeError, match="base_optimizer must be a class"):
        net.flat(SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="task_params must hold the parameters of at least one task"):
        FlatMTL(net.parameters(), [], SGD)
    with pytest.raises(ValueError, match="empty parameter list"):
        FlatMTL([], [[], []], SGD)
    with pytest.raises(TypeError, match="shared_params must be an iterable of parameters"):
        FlatMTL(net.up.weight, [[]], SGD)
    with pytest.raises(TypeError, match=r"number 0 of task_params\[0\] is complex"):
        FlatMTL([net.up.weight], [[nn.Parameter(torch.zeros(2, dtype=torch.complex64))]], SGD)


def test_a_step_without_closure_says_what_to_do() -> None:
    net = Net(2)
    optimizer = net.flat()
    with pytest.raises(TypeError, match=r"needs a closure.*optimizer\.base"):
        optimizer.step()
    with pytest.raises(ValueError, match="task_closures must hold 2 closures, one a task, got 1"):
        optimizer.step(net.losses, [net.losses])
    with pytest.raises(ValueError, match="closure must return 1 losses, one a task, got 2"):
        optimizer.step(net.losses, [net.losses, net.losses])
    assert equal(net, Net(2))
