"""Lion: every property of its card, exchange of states with its peers, and what must be refused."""

from __future__ import annotations

import copy
import warnings

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from lion_pytorch.cautious_lion import Lion as CautiousLion
from torch import Tensor, nn

from shoestring.train import lion
from shoestring.train.lion import Lion, lion_step_, lion_update

PATHS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "default": {}, "fused": {"fused": True}}
SHAPES = ((7, 5), (11,), (), (0, 3), (1,), (2, 3, 4))
every_path = pytest.mark.parametrize("path", PATHS)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, i, dtype)) for i, shape in enumerate(shapes)]


def give_gradients(params, step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(params):
        p.grad = normal(p.shape, 1000 * (step + 1) + i, p.dtype) * scale


def walk(optimizer, params, steps, first: int = 0, scale: float = 1.0) -> list[list[Tensor]]:
    """The steps that the parameters took, one list a step."""
    moves = []
    for step in range(first, first + steps):
        give_gradients(params, step, scale)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moves.append([p.detach() - b for p, b in zip(params, before, strict=True)])
    return moves


def by_definition(p, gradients, lr, beta1, beta2, wd) -> tuple[Tensor, Tensor]:
    """The three lines of the paper, as its algorithm box has them: decay inside the update."""
    m = torch.zeros_like(p)
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g
        p = p - lr * (torch.sign(c) + wd * p)
        m = beta2 * m + (1 - beta2) * g
    return p, m


# ---- the update rule


@every_path
@pytest.mark.parametrize(
    ("betas", "wd"), [((0.9, 0.99), 0.0), ((0.95, 0.98), 0.3), ((0.0, 0.5), 0.1), ((0.3, 0.0), 0.0)]
)
def test_iterates_are_those_of_the_paper(path, betas, wd):
    params = parameters()
    expected = [p.detach().clone() for p in params]
    optimizer = Lion(params, lr=0.01, betas=betas, weight_decay=wd, **PATHS[path])
    walk(optimizer, params, 12)
    for i, (p, start) in enumerate(zip(params, expected, strict=True)):
        p_end, m_end = by_definition(start, [normal(p.shape, 1000 * (s + 1) + i) for s in range(12)], 0.01, *betas, wd)
        torch.testing.assert_close(p.detach(), p_end, rtol=0, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m_end, rtol=0, atol=1e-12)


def test_blocks_of_large_tensors_are_the_whole(monkeypatch):
    """Tensors of several blocks, the last one partly full, beside small ones that share a block."""
    monkeypatch.setattr(lion, "BLOCK", 32)
    shapes = ((1000,), (3,), (33, 5), (2, 2), (64, 64), (9,))
    whole, cut = parameters(shapes=shapes), parameters(shapes=shapes)
    cut[4] = nn.Parameter(cut[4].detach().T.contiguous().T)  # cannot be cut
    walk(Lion(whole, 0.01, weight_decay=0.1, foreach=False), whole, 5)
    walk(Lion(cut, 0.01, weight_decay=0.1), cut, 5)
    for p, q in zip(whole, cut, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@every_path
def test_step_is_exactly_lr_everywhere(path):
    params = [nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2)]
    optimizer = Lion(params, lr=2.0**-10, **PATHS[path])
    for step in range(8):
        give_gradients(params, step)
        for p in params:
            p.grad[:7] = 0.0  # never a gradient: rest
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, b in zip(params, before, strict=True):
            move = (p - b).abs()
            assert (move[:7] == 0).all()
            assert (move[7:] == 2.0**-10).all()  # sums of multiples of lr are exact


@every_path
def test_step_ignores_the_scale_of_the_gradient(path):
    """Bit for bit for a power of two; a factor that is none scales every interpolation up to rounding."""
    ends = {}
    for scale in (1.0, 2.0**-30, 2.0**40, 3.7):
        params = parameters()
        walk(Lion(params, 0.01, weight_decay=0.1, **PATHS[path]), params, 10, scale=scale)
        ends[scale] = params
    for scale in (2.0**-30, 2.0**40, 3.7):
        assert all(torch.equal(p, q) for p, q in zip(ends[1.0], ends[scale], strict=True)), scale


@every_path
def test_without_momentum_it_is_sign_sgd(path):
    params = parameters()
    for step, moves in enumerate(walk(Lion(params, 0.25, betas=(0.0, 0.0), **PATHS[path]), params, 4)):
        for i, move in enumerate(moves):
            sign = normal(move.shape, 1000 * (step + 1) + i).sign()
            torch.testing.assert_close(move, -0.25 * sign, rtol=0, atol=1e-12)


@every_path
def test_beta1_zero_ignores_the_momentum_however_large(path):
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Lion([p], 0.5, betas=(0.0, 0.99), **PATHS[path])
    p.grad = torch.full((3,), 1e30, dtype=torch.float64)
    optimizer.step()
    p.grad = torch.tensor([-1e-30, 1e-30, 0.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [0.0, -1.0, -0.5]


@every_path
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.0), (0.999, 0.9)])
def test_first_step_is_the_sign_of_the_gradient(path, betas):
    params = parameters()
    (moves,) = walk(Lion(params, 0.25, betas=betas, **PATHS[path]), params, 1)
    for p, move in zip(params, moves, strict=True):
        torch.testing.assert_close(move, -0.25 * p.grad.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("b", [0.5, 0.9, 0.99])
@every_path
def test_equal_betas_are_sign_sgd_on_the_momentum_after_its_update(path, b):
    """The paper's Ablation_b."""
    params = parameters()
    optimizer = Lion(params, 0.25, betas=(b, b), **PATHS[path])
    for step in range(10):
        for p, move in zip(params, walk(optimizer, params, 1, first=step)[0], strict=True):
            torch.testing.assert_close(move, -0.25 * optimizer.state[p]["exp_avg"].sign(), rtol=0, atol=1e-12)


@every_path
def test_the_program_of_two_slots_is_lion(path):
    """As found by the search: m = interp(g, v, .9); v = interp(g, m, 1.1); step sign(m)."""
    params = parameters()
    p = [q.detach().clone() for q in params]
    v = [torch.zeros_like(q) for q in p]
    optimizer = Lion(params, 0.01, betas=(0.9, 0.99), **PATHS[path])
    for step in range(50):
        walk(optimizer, params, 1, first=step)
        for i, q in enumerate(params):
            m = (1 - 0.9) * q.grad + 0.9 * v[i]
            v[i] = (1 - 1.1) * q.grad + 1.1 * m
            p[i] = p[i] - 0.01 * m.sign()
            torch.testing.assert_close(q.detach(), p[i], rtol=0, atol=1e-12)
            torch.testing.assert_close(optimizer.state[q]["exp_avg"], v[i], rtol=0, atol=1e-12)


@every_path
def test_decay_alone_is_a_power(path):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = Lion(params, 0.1, weight_decay=0.3, **PATHS[path])
    walk(optimizer, params, 20, scale=0.0)
    for p, p_0 in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), (1 - 0.1 * 0.3) ** 20 * p_0, rtol=1e-12, atol=0)


def test_momentum_moves_after_the_step_and_by_the_gradient():
    """m = 1, g = -1/2, beta1 .5, beta2 .1: c > 0, but m' < 0; either of the usual mistakes turns the sign."""
    p, m = lion_update(*torch.tensor([0.0, -0.5, 1.0], dtype=torch.float64), lr=1.0, betas=(0.5, 0.1))
    assert p == -1.0
    torch.testing.assert_close(m, torch.tensor(0.1 - 0.45, dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_coordinate_without_gradient_drifts_while_it_has_momentum():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Lion([p], 0.125)
    p.grad = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    optimizer.step()
    p.grad = torch.zeros(2, dtype=torch.float64)
    for _ in range(1000):
        optimizer.step()
    assert p.tolist() == [-125.125, 0.0]


@every_path
def test_caution_rests_where_the_step_is_against_the_gradient(path):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Lion([p], 0.25, caution=True, **PATHS[path])
    optimizer.state[p]["exp_avg"] = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    p.grad = torch.tensor([1.0, -1.0, 0.0, -1.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [-0.5, 0.0, 0.0, 0.5]  # two of four move, by lr / (2 / 4)


def test_caution_equals_that_of_lion_pytorch():
    ours, theirs = parameters(shapes=((7, 5), (40,))), parameters(shapes=((7, 5), (40,)))
    walk(Lion(ours, 0.01, weight_decay=0.1, caution=True), ours, 15)
    walk(CautiousLion(theirs, 0.01, weight_decay=0.1, cautious_factor=0.0), theirs, 15)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_lion_step_is_lion_update():
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    p, g, m = ([normal(shape, 10 * k + i) for i, shape in enumerate(SHAPES)] for k in range(3))
    for caution in (False, True):
        expected = [lion_update(*triple, **options, caution=caution) for triple in zip(p, g, m, strict=True)]
        downhill = [[t.clone() for t in tensors] for tensors in (p, g, m)]
        uphill = [[t.clone() for t in tensors] for tensors in (p, [-t for t in g], m)]
        lion_step_(*downhill, **options, caution=caution)
        lion_step_(*uphill, **options, caution=caution, maximize=True)
        for lists in (downhill, uphill):
            for i, (p_new, m_new) in enumerate(expected):
                torch.testing.assert_close(lists[0][i], p_new, rtol=0, atol=1e-12)
                torch.testing.assert_close(lists[2][i], m_new, rtol=0, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(downhill[1], g, strict=True))  # gradients are left alone


def test_lion_step_refuses_lists_that_differ_in_length():
    with pytest.raises(ValueError, match="zip"):
        lion_step_([torch.zeros(2)], [], [torch.zeros(2)], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)


# ---- state


@every_path
def test_state_is_one_tensor_a_parameter_half_of_adamw(path):
    params = parameters(torch.float32, shapes=((30, 40), (50,)))
    ours, adamw = Lion(params, **PATHS[path]), torch.optim.AdamW(params)
    give_gradients(params, 0)
    ours.step()
    adamw.step()
    assert all(list(ours.state[p]) == ["exp_avg"] for p in params)

    def size(optimizer):
        return sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.numel() > 1)

    assert size(ours) * 2 == size(adamw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex128])
@every_path
def test_state_keeps_dtype_shape_and_bits_through_a_state_dict(path, dtype):
    params = [nn.Parameter(normal((4, 6), 0).to(dtype).T)]
    optimizer = Lion(params, 0.01, **PATHS[path])
    walk(optimizer, params, 3)
    held = optimizer.state_dict()
    renewed = [nn.Parameter(params[0].detach().clone())]
    other = Lion(renewed, 0.01, **PATHS[path])
    other.load_state_dict(copy.deepcopy(held))
    state, again = optimizer.state[params[0]]["exp_avg"], other.state[renewed[0]]["exp_avg"]
    assert state.dtype == again.dtype == dtype
    assert state.shape == params[0].shape
    assert torch.equal(state, again)
    walk(optimizer, params, 4, first=3)
    walk(other, renewed, 4, first=3)
    assert torch.equal(params[0], renewed[0])


def peers_of(params):
    return {
        "lion-pytorch": lion_pytorch.Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.2),
        "pytorch_optimizer": pytorch_optimizer.Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=0.2),
    }


@pytest.mark.parametrize("peer", ["lion-pytorch", "pytorch_optimizer"])
def test_a_run_of_a_peer_goes_on_here(peer):
    theirs, ours = parameters(), parameters()
    first = peers_of(theirs)[peer]
    walk(first, theirs, 6)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    optimizer = Lion(ours, lr=0.5)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    walk(first, theirs, 20, first=6)
    walk(optimizer, ours, 20, first=6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("peer", ["lion-pytorch", "pytorch_optimizer"])
def test_a_run_from_here_goes_on_with_a_peer(peer):
    ours, theirs = parameters(), parameters()
    optimizer = Lion(ours, lr=0.01, betas=(0.9, 0.99), weight_decay=0.2)
    walk(optimizer, ours, 6)
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            p.copy_(q)
    second = peers_of(theirs)[peer]
    state = copy.deepcopy(optimizer.state_dict())
    if peer == "pytorch_optimizer":  # it does not fill in the settings that only it has
        state["param_groups"] = [second.state_dict()["param_groups"][0] | state["param_groups"][0]]
    second.load_state_dict(state)
    walk(optimizer, ours, 20, first=6)
    walk(second, theirs, 20, first=6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_state_with_the_keys_of_timm_goes_on_here():
    """timm itself cannot be installed here: its keys, and its arithmetic by `by_definition`."""
    (p,) = parameters(shapes=((7, 5),))
    gradients = [normal(p.shape, 1000 * (step + 1)) for step in range(9)]
    group = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.2, "caution": False, "foreach": None}
    group |= {"maximize": False, "initial_lr": 0.01, "params": [0]}
    middle, m = by_definition(p.detach(), gradients[:4], 0.01, 0.9, 0.99, 0.2)
    with torch.no_grad():
        p.copy_(middle)
    optimizer = Lion([p])
    optimizer.load_state_dict({"state": {0: {"exp_avg": m.clone()}}, "param_groups": [group]})
    walk(optimizer, [p], 5, first=4)
    whole, _ = by_definition(parameters(shapes=((7, 5),))[0].detach(), gradients, 0.01, 0.9, 0.99, 0.2)
    torch.testing.assert_close(p.detach(), whole, rtol=0, atol=1e-12)


def test_a_loaded_group_without_a_setting_keeps_the_constructed_one():
    """lion-pytorch saves no `maximize`: loading its state must not turn the direction."""
    (p,) = parameters(shapes=((3,),))
    first = lion_pytorch.Lion([p], lr=0.5)
    walk(first, [p], 1)
    optimizer = Lion([p], maximize=True)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizer.state.clear()
    (move,) = walk(optimizer, [p], 1, first=1)
    assert torch.equal(move[0].sign(), p.grad.sign())


# ---- dtypes, NaN, bad input


@every_path
def test_complex_parameters_are_pairs_of_real_ones(path):
    z = nn.Parameter(torch.complex(normal((5,), 0), normal((5,), 1)))
    xy = nn.Parameter(torch.view_as_real(z.detach()).clone())
    of_complex, of_real = (Lion([p], 0.01, weight_decay=0.1, **PATHS[path]) for p in (z, xy))
    for step in range(5):
        z.grad = torch.complex(normal((5,), 2 * step), normal((5,), 2 * step + 1))
        xy.grad = torch.view_as_real(z.grad).clone()
        of_complex.step()
        of_real.step()
    assert torch.equal(torch.view_as_real(z.detach()), xy)


@every_path
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_coordinate_and_no_other(path, bad):
    params = parameters()
    optimizer = Lion(params, 0.01, **PATHS[path])
    give_gradients(params, 0)
    params[0].grad[2, 3] = bad
    optimizer.step()
    assert params[0][2, 3].isnan()
    assert sum(int(p.isnan().sum()) for p in params) == 1


@every_path
def test_a_tensor_rate_is_the_rate(path):
    a, b, c = parameters(), parameters(), parameters()
    walk(Lion(a, 0.01, weight_decay=0.1, **PATHS[path]), a, 5)
    walk(Lion(b, torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1, **PATHS[path]), b, 5)
    walk(Lion(c, torch.tensor([0.01], dtype=torch.float64), weight_decay=0.1, **PATHS[path]), c, 5)
    for p, q, r in zip(a, b, c, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        torch.testing.assert_close(p, r, rtol=0, atol=1e-12)


def test_a_sparse_gradient_of_any_group_leaves_everything_as_it_was():
    table, (p,) = nn.Embedding(5, 3, sparse=True), parameters(torch.float32, shapes=((3,),))
    optimizer = Lion([{"params": [p]}, {"params": table.parameters()}])
    (table(torch.tensor([1])).sum() + p.sum()).backward()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1"),
        ({"betas": (0.9, 1.5)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.5"),
        ({"betas": (0.9,)}, TypeError, "betas must be a pair"),
        ({"weight_decay": -0.5}, ValueError, "weight_decay must be >= 0, got -0.5"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ],
    ids=["lr", "betas", "pair", "decay", "both"],
)
def test_bad_settings_of_a_group(group, error, message):
    params = parameters(shapes=((3,), (4,)))
    with pytest.raises(error, match=message):
        Lion([{"params": params, **group}])
    with pytest.raises(error, match=message):
        Lion(params, **group)
    optimizer = Lion(params[:1])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params[1:], **group})
    assert len(optimizer.param_groups) == 1


# ---- fused


NO_NATIVE: dict[torch.dtype, str] = {}  # so that torch.compile does it


@pytest.fixture
def fresh_kernels():
    lion._kernel.cache_clear()
    lion._compiled_step.cache_clear()
    yield
    lion._kernel.cache_clear()
    lion._compiled_step.cache_clear()


@pytest.mark.parametrize("native", [True, False], ids=["loop", "torch.compile"])
def test_fused_without_a_compiler_warns_once_and_goes_on(monkeypatch, fresh_kernels, native):
    def no_compiler(*args, **kwargs):
        raise OSError("no compiler")

    if native:
        monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", no_compiler)
    else:
        monkeypatch.setattr(lion, "NATIVE", NO_NATIVE)
        monkeypatch.setattr(lion, "SMALL", 2048)
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    fused, plain = parameters(shapes=((64, 64), (3,))), parameters(shapes=((64, 64), (3,)))
    optimizer = Lion(fused, 0.01, fused=True)
    with pytest.warns(UserWarning, match="goes on unfused.*no compiler"):
        walk(optimizer, fused, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(optimizer, fused, 4, first=1)
    walk(Lion(plain, 0.01, foreach=False), plain, 5)
    for p, q in zip(fused, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch, fresh_kernels):
    monkeypatch.setattr(lion, "KERNEL", lion.KERNEL.replace("+ (c - c)", ""))  # hides NaN
    (p,) = parameters(torch.float32, shapes=((3,),))
    with pytest.warns(UserWarning, match="goes on unfused.*wrong result"):
        walk(Lion([p], fused=True), [p], 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_the_update_rule_bit_for_bit(monkeypatch, dtype, threads):
    """Shapes of all kinds shared among threads, a rate that changes, NaN, infinity, `maximize`."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(lion, "GRAIN", 8)
    monkeypatch.setattr(lion, "lion_step_", None)  # nothing goes that way
    shapes = [(50 + i, 6) for i in range(9)] + [(1,), (3,), (), (0, 2), (257,), (2, 3, 4)]
    fused, plain = parameters(dtype, shapes), parameters(dtype, shapes)
    for maximize in (False, True):
        a = Lion(fused, 0.01, weight_decay=0.1, maximize=maximize, fused=True)
        b = Lion(plain, 0.01, weight_decay=0.1, maximize=maximize, foreach=False)
        for step in range(4):
            for optimizer, params in ((a, fused), (b, plain)):
                optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
                give_gradients(params, step)
                params[4].grad[1, 2], params[5].grad[0, 0] = torch.nan, -torch.inf
                params[6].grad[3] = 0.0
                optimizer.step()
        for p, q in zip(fused, plain, strict=True):
            assert torch.equal(p.nan_to_num(123.0), q.nan_to_num(123.0))
            assert torch.equal(a.state[p]["exp_avg"].nan_to_num(), b.state[q]["exp_avg"].nan_to_num())
    assert sum(int(p.isnan().sum()) for p in fused) == 2


def test_what_the_kernel_cannot_walk_through_goes_the_other_way():
    """Parameters, gradients and momenta that are not contiguous; a momentum of another shape is refused."""
    fused, plain = parameters(shapes=((7, 5), (4, 6), (3, 9))), parameters(shapes=((7, 5), (4, 6), (3, 9)))
    fused[0] = nn.Parameter(fused[0].detach().T.contiguous().T)
    a, b = Lion(fused, 0.01, fused=True), Lion(plain, 0.01, foreach=False)
    a.state[fused[2]]["exp_avg"] = torch.zeros(9, 3, dtype=torch.float64).T
    for step in range(3):
        for optimizer, params in ((a, fused), (b, plain)):
            give_gradients(params, step)
            fused[1].grad = fused[1].grad.T.contiguous().T if fused[1].grad is not None else None
            optimizer.step()
    for p, q in zip(fused, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    a.state[fused[0]]["exp_avg"] = a.state[fused[1]]["exp_avg"] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="size"):
        a.step()


def test_autograd_sees_that_the_kernel_changed_a_parameter():
    (p,) = parameters(shapes=((4,),))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    Lion([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
def test_compiled_bundles_equal_plain_and_compile_once(monkeypatch, fresh_kernels):
    """Tensors of many shapes in several bundles, a rate that changes, NaN, and `maximize`: one compilation."""
    from torch._dynamo.utils import counters

    shapes = [(50 + i, 60) for i in range(9)] + [(64, 64)] * 9 + [(3,), (), (0, 2), (70, 50)]
    fused, plain = parameters(torch.float32, shapes), parameters(torch.float32, shapes)
    for params in (fused, plain):
        params[-1] = nn.Parameter(params[-1].detach().T)  # not contiguous
    monkeypatch.setattr(lion, "NATIVE", NO_NATIVE)
    monkeypatch.setattr(lion, "BUNDLE", 4)  # a short compilation
    monkeypatch.setattr(lion, "SMALL", 2048)
    torch._dynamo.reset()
    counters.clear()
    for maximize in (False, True):
        a = Lion(fused, 0.01, weight_decay=0.1, maximize=maximize, fused=True)
        b = Lion(plain, 0.01, weight_decay=0.1, maximize=maximize, foreach=False)
        for step in range(4):
            for optimizer, params in ((a, fused), (b, plain)):
                optimizer.param_groups[0]["lr"] = torch.tensor(0.005) if step == 3 else 0.01 / (step + 1)
                give_gradients(params, step)
                params[4].grad[1, 2] = torch.nan
                optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    for p, q in zip(fused, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, equal_nan=True)
    assert fused[4][1, 2].isnan()
    assert sum(int(p.isnan().sum()) for p in fused) == 1
