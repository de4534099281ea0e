"""Z-loss and spherical layer: every property of the card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from shoestring.loop import fit
from shoestring.train import _spherical
from shoestring.train._spherical import (
    Factors,
    factorize,
    materialize,
    out_of_range,
    output_statistics,
    stabilize,
    unfactorize,
)
from shoestring.train.z_loss import (
    SphericalLinear,
    ZLoss,
    log_spherical_softmax_from_stats,
    log_taylor_softmax_from_stats,
    squared_error_from_stats,
    z_loss,
    z_loss_from_stats,
)

LOSSES = ("z", "mse", "taylor", "spherical")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_and_targets(n: int = 40, D: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    return torch.randn(n, D, generator=g, dtype=torch.float64), torch.randint(D, (n,), generator=g)


def by_definition(o: torch.Tensor, c: int, a: float, b: float) -> float:
    """The paper's formula in plain Python, one row."""
    row = o.tolist()
    mu = sum(row) / len(row)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in row) / len(row))
    return math.log1p(math.exp(a * (b - (row[c] - mu) / sigma))) / a


def dense_loss(name: str, O: torch.Tensor, target: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """(m, K) losses from all scores, each written as its own definition."""
    D = O.shape[1]
    chosen = O.gather(1, target)
    if name == "z":
        z = (chosen - O.mean(1, keepdim=True)) / O.std(1, correction=0, keepdim=True)
        return torch.log1p(torch.exp(a * (b - z))) / a
    if name == "mse":
        return (O[:, None] - F.one_hot(target, D)).square().sum(2)
    numerator = 1 + O + O**2 / 2 if name == "taylor" else O**2 + 1e-3
    return -torch.log(numerator.gather(1, target) / numerator.sum(1, keepdim=True))


def state(layer: SphericalLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layer64(D: int = 200, d: int = 16, **options) -> SphericalLinear:
    options = {"lr": 0.2, "bias": False, "eps": 0.0, **options}
    return SphericalLinear(d, D, generator=generator(), dtype=torch.float64, **options)


def batch(D: int = 200, d: int = 16, m: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    h = torch.randn(m, d, generator=g, dtype=torch.float64).requires_grad_()
    return h, torch.randint(min(D, 5), (m,), generator=g)  # five targets for eight examples: some are repeated


def invariants(layer: SphericalLinear) -> float:
    """The largest relative error of Q = W^T W, w_bar = W^T 1 and U U^-1 = I."""
    W = materialize(layer.factors).double()
    eye = torch.eye(len(layer.U), dtype=torch.float64)
    pairs = ((layer.Q, W.T @ W), (layer.w_bar, W.sum(0)), (layer.U @ layer.U_inv, eye))
    return max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in pairs)


# ---- the loss


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.3, 2.0), (5.0, -1.0)])
def test_loss_is_its_definition(a, b):
    o, target = scores_and_targets()
    losses = z_loss(o, target, a, b, 0.0, reduction="none")
    expected = [by_definition(row, int(c), a, b) for row, c in zip(o, target, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ZLoss(a, b, 0.0)(o, target), losses.mean(), rtol=1e-15, atol=0)
    torch.testing.assert_close(ZLoss(a, b, 0.0, "sum")(o, target), losses.sum(), rtol=1e-15, atol=0)
    from_stats = z_loss_from_stats(
        o.gather(1, target[:, None])[:, 0], o.sum(1), o.square().sum(1), o.shape[1], a, b, 0.0
    )
    torch.testing.assert_close(from_stats, losses, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES[1:])
def test_other_losses_are_their_definitions(name):
    o, target = scores_and_targets()
    functions = (squared_error_from_stats, log_taylor_softmax_from_stats, log_spherical_softmax_from_stats)
    function = functions[LOSSES.index(name) - 1]
    got = function(o.gather(1, target[:, None])[:, 0], o.sum(1), o.square().sum(1), o.shape[1])
    torch.testing.assert_close(got, dense_loss(name, o, target[:, None], 0, 0)[:, 0], rtol=1e-12, atol=1e-12)


def test_shift_and_scale_do_not_change_the_loss():
    o, target = scores_and_targets()
    loss = z_loss(o, target, 2.0, 1.5, 0.0, "none")
    for scale, shift in ((3.7, 0.0), (1.0, -8.0), (0.01, 5.0)):
        moved = z_loss(scale * o + shift, target, 2.0, 1.5, 0.0, "none")
        torch.testing.assert_close(moved, loss, rtol=1e-12, atol=1e-13)


def test_gradient_is_orthogonal_to_ones_and_to_the_scores():
    o, target = scores_and_targets()
    o.requires_grad_()
    z_loss(o, target, 2.0, 1.5, 0.0, "sum").backward()
    assert o.grad.norm(dim=1).min() > 1e-3
    assert o.grad.sum(1).abs().max() < 1e-14
    assert (o.grad * o).sum(1).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x: z_loss(x, target, 2.0, 1.5), o)


def test_gradient_from_stats_is_the_cards_formula():
    o, target = scores_and_targets()
    a, b, D = 2.0, 1.5, o.shape[1]
    stats = [t.clone().requires_grad_() for t in (o.gather(1, target[:, None])[:, 0], o.sum(1), o.square().sum(1))]
    z_loss_from_stats(*stats, D, a, b).sum().backward()
    mu, sigma = o.mean(1), o.std(1, correction=0)
    z = (stats[0] - mu) / sigma
    p = torch.sigmoid(a * (b - z))
    expected = (-p / sigma, p * (1 / sigma - z * mu / sigma**2) / D, p * z / (2 * D * sigma**2))
    for stat, gradient in zip(stats, expected, strict=True):
        torch.testing.assert_close(stat.grad, gradient.detach(), rtol=1e-9, atol=1e-12)


def test_extreme_values():
    a, b, D = 0.5, 3.0, 101
    one_hot = F.one_hot(torch.tensor([7]), D).double()
    least = math.log1p(math.exp(a * (b - math.sqrt(D - 1)))) / a
    assert z_loss(one_hot, torch.tensor([7]), a, b, 0.0).item() == pytest.approx(least, rel=1e-11)
    at_the_mean = torch.tensor([[0.0, 1.0, -1.0, 2.0, -2.0]], dtype=torch.float64)
    assert z_loss(at_the_mean, torch.tensor([0]), a, b).item() == pytest.approx(math.log1p(math.exp(a * b)) / a)
    far = z_loss(at_the_mean, torch.tensor([0]), 1.0, 21.0).item()  # softplus is not linear yet, as torch takes it
    assert far == pytest.approx(math.log1p(math.exp(21.0)), rel=1e-13)
    hinge = z_loss(at_the_mean, torch.tensor([3]), 1e6, 3.0).item()
    assert hinge == pytest.approx(3.0 - 2.0 / math.sqrt(2.0), rel=1e-6)


def test_equal_scores_have_no_gradient_and_the_loss_of_the_mean():
    for value in (0.0, 0.1, 1e4):
        o = torch.full((2, 7), value, requires_grad=True)
        loss = z_loss(o, torch.tensor([0, 3]), 2.0, 1.0)
        loss.backward()
        assert loss.item() == pytest.approx(math.log1p(math.exp(2.0)) / 2, rel=1e-6)
        assert o.grad.abs().max() == 0


def test_two_classes_have_no_gradient_and_are_refused():
    stats = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 1.0, 5.0)]  # scores 2 and -1
    o = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    z_loss_from_stats(o[0], o.sum(), o.square().sum(), 2, eps=0.0).backward()
    assert o.grad.abs().max() < 1e-15
    assert z_loss_from_stats(*stats, 2).item() == pytest.approx(math.log1p(math.exp(-1)))
    with pytest.raises(ValueError, match=r"num_classes must be an integer >= 3: .* got 2"):
        z_loss(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"num_classes must be an integer >= 3"):
        SphericalLinear(4, 2)


def test_float32_scores_far_from_zero_do_not_cancel():
    o = torch.randn(20, 1000, generator=generator()).round(decimals=2) * 64  # multiples of 0.64, about
    o, target = o.round(), torch.arange(20)
    shifted = o + 2.0**22  # exact in float32: whole numbers below 2^24
    assert torch.equal((shifted - 2.0**22), o)
    exact = z_loss(o.double(), target, 1.0, 2.0, reduction="none")
    torch.testing.assert_close(z_loss(shifted, target, 1.0, 2.0, reduction="none").double(), exact, rtol=1e-2, atol=0)
    naive = shifted.square().mean(1) - shifted.mean(1) ** 2
    assert (naive.clamp(min=0).sqrt() / o.std(1, correction=0) - 1).abs().max() > 0.5  # the trap: what is avoided


def test_layer_scores_far_from_zero_do_not_cancel():
    layer = SphericalLinear(8, 500, b=2.0, bias=False, generator=generator())
    with torch.no_grad():
        layer.V[:, 0] += 1e4
        layer.unfactorize()
    h = torch.randn(16, 8, generator=generator(1))
    target = torch.arange(16)
    exact = z_loss(h.double() @ layer.weight.double().T, target, 1.0, 2.0)
    assert layer(h, target).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    o, target = scores_and_targets(D=300)
    o = o.to(dtype)
    loss = ZLoss(1.0, 2.0)(o, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(z_loss(o.double(), target, 1.0, 2.0).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ZLoss(1.0, 2.0)(o, target), loss)


def test_any_leading_shape():
    o, target = scores_and_targets()
    losses = z_loss(o.view(4, 2, 5, 12), target.view(4, 2, 5), reduction="none")
    assert torch.equal(losses.flatten(), z_loss(o, target, reduction="none"))
    assert z_loss(o[0], target[0]).item() == pytest.approx(losses.flatten()[0].item(), rel=1e-15)


# ---- the factored layer is dense SGD


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("name", LOSSES)
def test_thirty_steps_equal_dense_sgd(name, m, targets):
    D, d, a, b = 200, 16, 0.7, 4.0
    # The curvature of the spherical softmax at o_c = 0 is 2 / eps: large steps there make any rounding grow.
    lr, decay = {"z": 0.3, "mse": 0.05, "taylor": 0.3, "spherical": 0.02}[name], 0.01
    layer = layer64(D, d, loss=name, a=a, b=b, lr=lr, weight_decay=decay, stabilize_every=7)
    W = nn.Parameter(layer.weight.clone())
    sgd = torch.optim.SGD([W], lr=lr, weight_decay=decay)
    for seed in range(30):
        h, _ = batch(D, d, m, seed)
        target = torch.randint(20, (m, targets), generator=generator(seed))  # repeated, also within a row
        copy_h = h.detach().clone().requires_grad_()
        loss = layer(h, target[:, 0] if targets == 1 else target)
        loss.backward()
        dense = dense_loss(name, copy_h @ W.T, target, a, b).mean()
        sgd.zero_grad()
        dense.backward()
        sgd.step()
        scale = W.detach().abs().max()
        assert abs(loss.item() - dense.item()) <= 1e-12 * max(1, abs(dense.item()))
        assert (h.grad - copy_h.grad).abs().max() <= 1e-12 * max(1, copy_h.grad.abs().max())
        assert (layer.weight - W.detach()).abs().max() <= 1e-12 * max(1, scale)
        assert invariants(layer) <= 1e-12
    assert (layer.weight - layer64(D, d).weight).abs().max() > 1e-3  # it moved


def test_bias_is_that_of_nn_linear_under_sgd():
    linear = nn.Linear(16, 200, dtype=torch.float64)
    layer = SphericalLinear.from_linear(linear, b=4.0, lr=0.3)
    sgd = torch.optim.SGD(linear.parameters(), lr=0.3)
    for seed in range(10):
        h, target = batch(seed=seed)
        layer(h, target).backward()
        sgd.zero_grad()
        z_loss(linear(h.detach()), target, 1.0, 4.0).backward()
        sgd.step()
    torch.testing.assert_close(layer.weight, linear.weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.bias, linear.bias.detach(), rtol=0, atol=1e-12)


def test_callable_loss_and_reductions():
    h, target = batch()

    def huber_like(o_target, s, q, D):
        return torch.sqrt(1 + q - 2 * o_target + s / D)

    results = []
    for reduction in ("mean", "sum", "none"):
        layer = layer64(loss=huber_like, reduction=reduction, lr=0.8 if reduction == "mean" else 0.1)  # 8 examples
        before = layer.weight
        loss = layer(h, target)
        loss.sum().backward()
        results.append((loss.sum().item(), layer.weight - before))
        W = before.clone().requires_grad_()
        O = h.detach() @ W.T
        expected = huber_like(O.gather(1, target[:, None])[:, 0], O.sum(1), O.square().sum(1), 200).sum()
        expected.backward()
        torch.testing.assert_close(layer.weight, before - 0.1 * W.grad, rtol=0, atol=1e-13)
    assert results[1][0] == pytest.approx(8 * results[0][0])
    with pytest.raises(ValueError, match=r"loss must return shape \(8, 1\), got \(\)"):
        layer64(loss=lambda o, s, q, D: q.sum())(h, target)


def test_leading_shapes_are_flattened():
    h, target = batch(m=12)
    one, other = layer64(b=3.0), layer64(b=3.0)
    one(h, target).backward()
    many = h.detach().view(3, 4, 16).requires_grad_()
    other(many, target.view(3, 4)).backward()
    assert torch.equal(one.V, other.V)
    assert torch.equal(h.grad, many.grad.view(12, 16))


def test_singular_step_is_still_sgd():
    """eta with I - eta H^T T = 0 in one direction: W loses it, and Woodbury's inverse does not exist."""
    layer = layer64(loss="mse", reduction="sum", stabilize_every=10**6)
    h = torch.zeros(1, 16, dtype=torch.float64)
    h[0, 3] = 1.0
    for lr in (0.5, 0.5 * (1 - 1e-9), 300.0):  # 1 - 2 lr |h|^2 = 0, nearly 0, -599
        layer.lr = lr
        W = layer.weight.clone().requires_grad_()
        dense_loss("mse", h @ W.T, torch.tensor([[2]]), 0, 0).sum().backward()
        layer(h, torch.tensor([2])).backward()
        torch.testing.assert_close(layer.weight, W.detach() - lr * W.grad, rtol=1e-11, atol=1e-11)
        assert invariants(layer) < 1e-11


def test_many_directions_at_once_unfactorize():
    layer = layer64(loss="mse", lr=8.0 / 16, reduction="sum", stabilize_every=10**6)
    h = torch.eye(16, dtype=torch.float64) * torch.linspace(0.99, 1.01, 16, dtype=torch.float64)
    W = layer.weight.clone().requires_grad_()
    target = torch.arange(16)[:, None]
    dense_loss("mse", h @ W.T, target, 0, 0).sum().backward()
    layer(h, target).backward()
    torch.testing.assert_close(layer.weight, W.detach() - 0.5 * W.grad, rtol=0, atol=1e-12)
    assert torch.equal(layer.U, torch.eye(16, dtype=torch.float64))
    assert invariants(layer) < 1e-12


def scrambled(values: list[float], D: int = 300, dtype: torch.dtype = torch.float64) -> Factors:
    """Factors of which U has these singular values."""
    d, g = len(values), generator()
    f = factorize(torch.randn(D, d, generator=g, dtype=dtype))
    P, R = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0] for _ in range(2))
    f.U.copy_(P * torch.tensor(values, dtype=torch.float64) @ R)
    f.U_inv.copy_(torch.linalg.inv(f.U) + 0.01)  # drifted
    f.omega.copy_(torch.randn(d, generator=g, dtype=torch.float64))
    return f


def test_stabilisation_leaves_W_and_brings_singular_values_into_range(monkeypatch):
    monkeypatch.setattr(_spherical, "ROWS", 128)  # several blocks
    f = scrambled([1e-3, 0.3, 0.6, 0.9, 1.0, 1.1, 1.5, 1.9, 2.5, 0.7, 0.8, 1.2])
    W, Q = materialize(f), f.Q.clone()
    assert stabilize(f) == 3
    assert (materialize(f) - W).abs().max() < 1e-10
    values = torch.linalg.svdvals(f.U)
    assert values.min() >= 0.5
    assert values.max() <= 2.0
    assert float((values > 1.8).sum()) == 1  # what was in range stays
    torch.testing.assert_close(f.U @ f.U_inv, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(f.Q, Q)
    assert torch.linalg.norm(f.omega) > 0
    f = scrambled([0.01, 0.1, 0.2, 1.0, 3.0, 1.0])  # over a third: multiplied out
    W = materialize(f)
    assert stabilize(f) == 4
    assert (materialize(f) - W).abs().max() < 1e-10
    assert torch.equal(f.U, torch.eye(6, dtype=torch.float64))
    assert torch.linalg.norm(f.omega) == 0


def test_norms_notice_what_left_the_range():
    assert not out_of_range(factorize(torch.randn(50, 9)))
    for value in (0.1, 7.0, 1e-9):
        f = scrambled([value] + 8 * [1.0])
        f.U_inv.copy_(torch.linalg.inv(f.U))
        assert out_of_range(f)
    f.U_inv.fill_(math.nan)
    assert out_of_range(f)


def test_unfactorize_and_statistics():
    f = scrambled([0.7, 0.9, 1.3, 1.8])
    W, h = materialize(f), torch.randn(5, 4, generator=generator(3), dtype=torch.float64)
    target = torch.tensor([[0, 299], [7, 7], [1, 2], [3, 4], [5, 6]])
    O = h @ W.T
    true = Factors(*f[:4], W.T @ W, W.sum(0))
    o_target, s, q, Hhat = output_statistics(true, h, target)
    torch.testing.assert_close(o_target, O.gather(1, target), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(s, O.sum(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(q, O.square().sum(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(Hhat, O @ W, rtol=1e-11, atol=1e-9)
    unfactorize(f)
    torch.testing.assert_close(f.V, W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["z", "mse"])
def test_float32_drift_against_the_dense_update_in_float64(name):
    """700 steps of a moving target; the benchmark has 10,000."""
    D, d, m = 500, 16, 16
    lr = 2.0 if name == "z" else 0.2
    layer = SphericalLinear(d, D, name, lr, b=4.0, bias=False, generator=generator(), dtype=torch.float32)
    W = layer.weight.double().requires_grad_()
    first, teacher = W.detach().clone(), torch.randn(D, d, generator=generator(9), dtype=torch.float64)
    g = generator(1)
    for _ in range(700):
        h = torch.randn(m, d, generator=g)
        target = (h.double() @ teacher.T).argmax(1)
        layer(h, target).backward()
        loss = dense_loss(name, h.double() @ W.T, target[:, None], 1.0, 4.0).mean()
        W = (W - lr * torch.autograd.grad(loss, W)[0]).detach().requires_grad_()
    W = W.detach()
    assert (W - first).norm() > 0.3 * first.norm()
    assert (layer.weight.double() - W).norm() < 1e-5 * W.norm()
    assert invariants(layer) < 1e-5
    values = torch.linalg.svdvals(layer.U)
    assert values.min() > 0.1
    assert values.max() < 10


def test_a_step_makes_no_temporary_of_D_rows():
    layer = SphericalLinear(64, 200_000, generator=generator())  # V: 52 MB
    g = generator()

    def step() -> None:
        layer(torch.randn(32, 64, generator=g), torch.randint(200_000, (32,), generator=g)).backward()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    sizes = [abs(event.self_cpu_memory_usage) for event in profile.events()]
    assert max(sizes) < 2**20
    address = layer.V.data_ptr()
    tracemalloc.start()
    step()
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert layer.V.data_ptr() == address


# ---- what backward does, and when


def test_scaled_loss_takes_a_scaled_step():
    h, target = batch()
    one, other = layer64(lr=0.3), layer64(lr=0.1)
    one(h, target).backward()
    (3 * other(h, target)).backward()
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-14)


def test_second_backward_is_refused():
    h, target = batch()
    layer = layer64()
    loss = layer(h, target)
    loss.backward(retain_graph=True)
    after = state(layer)
    with pytest.raises(RuntimeError, match="weights of this SphericalLinear have changed since the forward"):
        loss.backward()
    assert same(state(layer), after)


def test_two_forwards_before_a_backward_are_refused_and_micro_batches_in_turn_are_steps():
    h, target = batch()
    layer = layer64()
    both = layer(h[:4], target[:4]) + layer(h[4:], target[4:])
    with pytest.raises(RuntimeError, match="concatenate batches"):
        both.backward()
    layer, dense = layer64(), layer64().weight.requires_grad_()
    for part in (slice(0, 4), slice(4, 8)):
        (layer(h[part], target[part]) / 2).backward()
        loss = dense_loss("z", h[part] @ dense.T, target[part, None], 1.0, 0.0).mean() / 2
        dense = (dense - 0.2 * torch.autograd.grad(loss, dense)[0]).detach().requires_grad_()
    torch.testing.assert_close(layer.weight, dense.detach(), rtol=0, atol=1e-14)


def test_weights_loaded_between_forward_and_backward_are_noticed():
    h, target = batch()
    layer = layer64()
    loss = layer(h, target)
    layer.load_state_dict(state(layer))
    with pytest.raises(RuntimeError, match="have changed since the forward"):
        loss.backward()


def test_nothing_is_updated_in_evaluation_or_without_gradient():
    h, target = batch()
    layer = layer64(b=3.0)
    before = state(layer)
    with torch.no_grad():
        assert not layer(h, target).requires_grad
    layer.eval()
    loss = layer(h, target)
    loss.backward()
    assert same(state(layer), before)
    gradient, h.grad = h.grad, None
    z_loss(h @ layer.weight.T, target, 1.0, 3.0).backward()
    torch.testing.assert_close(gradient, h.grad, rtol=0, atol=1e-12)
    layer.lr = 0.0
    layer.train()(h, target).backward()
    assert torch.equal(layer.V, before["V"])


def test_learns_from_features_that_need_no_gradient():
    h, target = batch()
    layer = layer64()
    before = layer.weight
    layer(h.detach(), target).backward()
    assert (layer.weight - before).abs().max() > 1e-4


def test_trains_behind_a_body_in_the_loop_with_a_schedule():
    body, layer = nn.Linear(6, 16), SphericalLinear(16, 50, b=2.0, lr=0.5, generator=generator())
    model = nn.ModuleDict({"body": body, "head": layer})
    assert {id(p) for p in model.parameters()} == {id(p) for p in body.parameters()}
    g = generator()
    data = [(torch.randn(32, 6, generator=g), torch.randint(50, (32,), generator=g))] * 60
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def follow(run) -> None:
        layer.lr = scheduler.get_last_lr()[0]

    def step(model, pair):
        return model["head"](model["body"](pair[0]), pair[1])

    history = fit(model, data, step, optimizer, scheduler=scheduler, callbacks=[follow], progress=False)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert layer.lr == pytest.approx(0.5 * 0.99**60)
    assert int(layer.updates) == 60


# ---- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_goes_on_bit_for_bit_from_safetensors(dtype, tmp_path):
    def trained(layer, seeds):
        for seed in seeds:
            h, target = batch(seed=seed)
            layer(h.detach().to(dtype), target).backward()
        return layer

    options = {"lr": 1.0, "b": 3.0, "stabilize_every": 4, "dtype": dtype}
    whole = trained(SphericalLinear(16, 200, generator=generator(), **options), range(11))
    first = trained(SphericalLinear(16, 200, generator=generator(), **options), range(6))
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    second = SphericalLinear(16, 200, **options)
    second.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert same(trained(second, range(6, 11)).state_dict(), whole.state_dict())
    copied = copy.deepcopy(first)
    assert same(trained(copied, range(6, 11)).state_dict(), whole.state_dict())
    assert not same(first.state_dict(), copied.state_dict())


def test_small_state_stays_float64_when_the_layer_is_cast():
    layer = layer64()
    h, target = batch()
    layer(h, target).backward()
    Q = layer.Q.clone()
    layer.float()
    assert layer.V.dtype == torch.float32
    assert layer.Q.dtype == layer.U_inv.dtype == torch.float64
    assert torch.equal(layer.Q, Q)
    layer(h.detach().float(), target).backward()
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch.bfloat16"):
        layer.bfloat16()(h.detach(), target)
    assert layer.eval()(h.detach(), target).isfinite()


def test_same_seed_same_weights_and_half_precision_input():
    one, other = (SphericalLinear(16, 200, generator=generator(3)) for _ in range(2))
    assert torch.equal(one.V, other.V)
    assert one.V.abs().max() <= 0.25
    h, target = batch()
    h = h.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = one(h, target)
        loss.backward()
    other(h.detach().float(), target).backward()
    assert loss.dtype == torch.float32
    assert h.grad.dtype == torch.bfloat16
    assert torch.equal(one.V, other.V)


def test_to_linear_and_back_and_topk():
    layer = layer64(bias=True, b=3.0)
    for seed in range(5):
        layer(*batch(seed=seed)).backward()
    linear = layer.to_linear()
    h, _ = batch(seed=9)
    torch.testing.assert_close(linear(h), layer.scores(h), rtol=0, atol=1e-13)
    torch.testing.assert_close(linear.weight.detach(), layer.weight, rtol=0, atol=0)
    again = SphericalLinear.from_linear(linear, "taylor", 0.3)
    torch.testing.assert_close(again.scores(h), layer.scores(h), rtol=0, atol=1e-13)
    assert invariants(again) < 1e-13
    before = linear.weight.detach().clone()
    again(*batch()).backward()
    assert torch.equal(linear.weight.detach(), before)  # a copy
    expected = linear(h).topk(7)
    for rows in (3, 64, 10**6):
        found = layer.topk(h.view(2, 4, 16), 7, rows=rows)
        assert torch.equal(found.indices.view(8, 7), expected.indices)
        torch.testing.assert_close(found.values.view(8, 7), expected.values, rtol=0, atol=1e-13)


# ---- what is refused


def test_what_is_not_finite_is_refused_and_nothing_has_changed():
    h, target = batch()
    layer = layer64()
    layer(h, target).backward()
    before = state(layer)
    body = nn.Linear(16, 16, dtype=torch.float64)
    for bad in (math.nan, math.inf):
        spoilt = body(h.detach())
        spoilt = spoilt + torch.zeros_like(spoilt).index_fill(0, torch.tensor([2]), bad)
        with pytest.raises(FloatingPointError, match="the layer was left as it was"):
            layer(spoilt, target).backward()
        with pytest.raises(FloatingPointError, match="not finite"):
            (layer(body(h.detach()), target) * bad).backward()
    layer.lr = 1e306
    with pytest.raises(FloatingPointError, match=r"lr=1e\+306"):
        layer(body(h.detach()) * 1e-3, target).backward()
    assert same(state(layer), before)
    assert body.weight.grad is None
    layer.lr = 0.2
    layer(h, target).backward()
    assert invariants(layer) < 1e-12


@pytest.mark.parametrize("make", [lambda: z_loss, lambda: layer64(12, 12)], ids=["loss", "layer"])
def test_bad_targets_are_named(make):
    call, (o, target) = make(), scores_and_targets()
    before = state(call) if isinstance(call, SphericalLinear) else None
    for label in (12, -1, -100):
        with pytest.raises(ValueError, match=rf"target must hold labels from 0 to 11, got {label}"):
            call(o, target.index_fill(0, torch.tensor([3]), label))
    for wrong in (target.double(), target > 3):
        with pytest.raises(TypeError, match="target must hold integers, got torch"):
            call(o, wrong)
    with pytest.raises(ValueError, match=r"target must be of shape \(40,\).*got \(39,\)"):
        call(o, target[1:])
    with pytest.raises(ValueError, match="target must be on cpu, got meta"):
        call(o, target.to("meta"))
    assert before is None or same(state(call), before)
    torch.testing.assert_close(call(o, target.int()), call(o, target))


def test_bad_input_is_named():
    layer, (h, target) = layer64(), batch()
    with pytest.raises(ValueError, match=r"h must be of shape \(..., 16\), got \(8, 15\)"):
        layer(h[:, 1:], target)
    with pytest.raises(TypeError, match=r"h must be a floating-point tensor, got torch\.int64"):
        layer(h.long(), target)
    with pytest.raises(ValueError, match="h must be on cpu, where the layer is, got meta"):
        layer(h.to("meta"), target)
    with pytest.raises(ValueError, match=r"k must be in \[1, 200\], got 0"):
        layer.topk(h, 0)
    with pytest.raises(ValueError, match=r"lr must be >= 0, got -0.1"):
        layer.lr = -0.1
    assert layer.lr == 0.2
    with pytest.raises(ValueError, match="logits must be a floating-point tensor"):
        z_loss(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"a": 0.0}, ValueError, "a must be > 0, got 0.0"),
        ({"a": -1.0}, ValueError, "a must be >= 0, got -1.0"),
        ({"a": math.nan}, ValueError, "a must be"),
        ({"b": math.inf}, ValueError, "b must be"),
        ({"b": math.nan}, ValueError, "b must be"),
        ({"eps": -1e-3}, ValueError, "eps must be >= 0"),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ],
    ids=["a0", "a-1", "anan", "binf", "bnan", "eps", "reduction"],
)
def test_bad_options_of_the_loss(options, error, message):
    for make in (ZLoss, lambda **bad: SphericalLinear(4, 10, **bad)):
        with pytest.raises(error, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be >= 0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be >= 0, got -1.0"),
        ({"weight_decay": 1.0, "lr": 1.0}, ValueError, "lr must be < 1 / weight_decay"),
        ({"loss": "hinge"}, ValueError, "loss must be 'z', 'mse', 'taylor', 'spherical' or a callable, got 'hinge'"),
        ({"loss": None}, ValueError, "loss must be"),
        ({"stabilize_every": 0}, ValueError, "stabilize_every must be an integer >= 1, got 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 or torch.float64"),
        ({"momentum": 0.9}, TypeError, "momentum"),
        ({"in_features": 0}, ValueError, "in_features must be an integer >= 1, got 0"),
        ({"num_classes": 0, "loss": "mse"}, ValueError, "num_classes must be an integer >= 1, got 0"),
    ],
    ids=["lr", "lrnan", "lrstr", "wd", "lrwd", "loss", "lossnone", "period", "half", "momentum", "d", "D"],
)
def test_bad_options_of_the_layer(options, error, message):
    with pytest.raises(error, match=message):
        SphericalLinear(**{"in_features": 4, "num_classes": 10, **options})
