"""What torch.optim's own optimizers can do, every optimizer of this room can: one matrix for all.

Entered into torch's own records of optimizers (`torch.testing._internal.common_optimizers`), of which its error inputs
and its crossing of configurations with ``foreach`` and ``fused`` are used. torch does not ship the tests that read
these records, so they are written here.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from shoestring.loop import fit
from shoestring.train.flat_mtl import FlatMTL
from shoestring.train.frugal import FRUGAL
from shoestring.train.gradient_noise import GradientNoise
from shoestring.train.lion import Lion

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Two linear layers, and a parameter that no batch reaches."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) / 3).to(dtype))

        self.up, self.bias, self.down, self.scale = weights(12, 8), weights(12), weights(3, 12), weights()
        self.unused, self.empty = weights(2, 2), weights(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.T + self.bias) @ self.down.T * self.scale + self.empty.sum()


def batch(step: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), x[:, :3].argmax(1)


def loss_of(model: nn.Module, given: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]).float(), given[1])


def sgd_with_noise(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    noise = {name: kwargs.pop(name) for name in ("eta", "gamma") if name in kwargs}
    optimizer = torch.optim.SGD(params, **{"lr": 1e-2, **kwargs})
    optimizer.noise = GradientNoise(optimizer, **noise)  # so that a test can find it
    return optimizer


def flat(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """One task; its head is the last layer."""
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    return FlatMTL(params[:2] + params[3:], [params[2:3]], torch.optim.Adam, **kwargs)


def split(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """FRUGAL with its matrices projected."""
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    matrices = [p for p in params if p.ndim == 2 and p.numel()]
    others = [p for p in params if not (p.ndim == 2 and p.numel())]
    groups = [{"params": matrices, "projected": True}, {"params": others, "projected": False}]
    return FRUGAL(groups, **{"update_gap": 4, **kwargs})


@dataclass
class Case:
    make: Callable[..., torch.optim.Optimizer]
    configs: dict[str, dict[str, Any]]  # one of them "default"
    lr: float = 1e-2
    impls: tuple[str, ...] = ()
    own_backward: bool = False  # step(closure) with a closure that returns losses without backward
    bad: list[tuple[dict[str, Any], type[Exception], str]] = field(default_factory=list)


CASES = {
    "Lion": Case(
        Lion,
        {
            "default": {},
            "tensor lr": {"lr": torch.tensor(0.002)},
            "decay": {"weight_decay": 0.1},
            "maximize": {"weight_decay": 0.1, "maximize": True},
            "betas": {"betas": (0.95, 0.98)},
            "caution": {"caution": True},
        },
        lr=3e-3,
        impls=("foreach", "fused"),
        bad=[
            ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1"),
            ({"lr": float("nan")}, ValueError, "lr must be >= 0, got nan"),
            ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1"),
            ({"betas": 0.9}, TypeError, "betas must be a pair"),
            ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
            ({"lr": "fast"}, TypeError, "lr must be a number"),
        ],
    ),
    "FRUGAL": Case(
        split,
        {
            "default": {},
            "tensor lr": {"lr": torch.tensor(0.002)},
            "columns": {"projection": "columns", "density": 0.3},
            "rows": {"projection": "rows", "weight_decay": 0.1},
            "randk": {"projection": "randk", "maximize": True},
            "svd": {"projection": "svd", "density": 0.5},
            "random": {"projection": "random", "density": 0.5, "reset_state": False},
            "lion": {"base": "lion"},
            "sgdm": {"base": "sgdm", "state_free": "sgd", "lr": 0.1},
            "blockwise": {"density": 0.5, "block_order": "ascending"},
        },
        bad=[
            ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1"),
            ({"density": 1.5}, ValueError, r"density must be in \[0, 1\], got 1.5"),
            ({"update_gap": 0}, ValueError, "update_gap must be >= 1, got 0"),
            ({"projection": "colums"}, ValueError, "projection must be one of .*got 'colums'"),
            ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\)"),
        ],
    ),
    "GradientNoise": Case(
        sgd_with_noise,
        {"default": {}, "momentum": {"momentum": 0.9, "eta": 0.3}, "foreach": {"foreach": True}},
        lr=0.1,
        bad=[
            ({"eta": -1.0}, ValueError, "eta must be >= 0, got -1"),
            ({"gamma": float("inf")}, ValueError, "gamma must be"),
        ],
    ),
    "FlatMTL": Case(
        flat,
        {
            "default": {"lr": 1e-2},
            "pcgrad": {"aggregator": "pcgrad", "rho": 0.05, "lr": 1e-2},
            "adaptive": {"adaptive": True, "rho": 0.5, "lr": 1e-2},
        },
        own_backward=True,
        bad=[
            ({"rho": -0.1}, ValueError, "rho must be >= 0, got -0.1"),
            ({"aggregator": "median"}, ValueError, "aggregator must be"),
        ],
    ),
}
CONFIGS = [(name, config) for name, case in CASES.items() for config in case.configs]
by_config = pytest.mark.parametrize(("name", "config"), CONFIGS)
by_name = pytest.mark.parametrize("name", CASES)


def info(name: str) -> OptimizerInfo:
    case = CASES[name]
    inputs = [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in case.configs.items()]
    return OptimizerInfo(
        case.make,
        optim_inputs_func=lambda device, dtype=None: inputs,
        supported_impls=case.impls,
        supports_fused_on=("cpu",) if "fused" in case.impls else (),
        optim_error_inputs_func=get_error_inputs_for_all_optims,
    )


def advance(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, given: Batch) -> float:
    optimizer.zero_grad()
    if CASES[name].own_backward:
        return float(optimizer.step(lambda: [loss_of(model, given)])[0])
    loss = loss_of(model, given)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def trained(name: str, kwargs: dict[str, Any], steps: int = 10) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = CASES[name].make(list(model.parameters()), **copy.deepcopy(kwargs))
    for step in range(steps):
        advance(name, model, optimizer, batch(step))
    return model, optimizer


def tensors_of(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{path}/{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from tensors_of(value, f"{path}/{i}")


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# Learning ---------------------------------------------------------------------------------------------------


@by_name
def test_loss_falls_in_every_configuration_that_torch_crosses(name: str) -> None:
    for given in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, info(name)):
        model = Net()
        kwargs = copy.deepcopy(given.kwargs)
        up = kwargs.get("maximize", False)
        optimizer = CASES[name].make(list(model.parameters()), **{"lr": CASES[name].lr, **kwargs})
        with torch.no_grad():
            before = float(loss_of(model, batch(-1)))
        for step in range(60):
            advance(name, model, optimizer, batch(step))
        with torch.no_grad():
            after = float(loss_of(model, batch(-1)))
        assert (after > before) if up else (after < before - 0.05), f"{given.desc}: {before} to {after}"
        assert torch.equal(model.unused, Net().unused)


@by_name
def test_errors_that_torch_expects_of_every_optimizer(name: str) -> None:
    if name in ("FlatMTL", "FRUGAL"):  # made from groups of their own by the functions above
        pytest.skip("its parameters are not one list")
    for error in info(name).optim_error_inputs_func("cpu", torch.float64):
        given = error.optimizer_error_input
        params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with pytest.raises(error.error_type, match=error.error_regex):
                CASES[name].make(params, **given.kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [(name, *bad) for name, case in CASES.items() for bad in case.bad],
    ids=[f"{name}-{next(iter(bad[0]))}-{i}" for name, case in CASES.items() for i, bad in enumerate(case.bad)],
)
def test_bad_hyper_parameters(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    more = {"lr": 1e-2} if name == "FlatMTL" else {}
    with pytest.raises(error, match=message):
        CASES[name].make(list(Net().parameters()), **{**more, **kwargs})


@pytest.mark.parametrize("impl", ["foreach", "fused"])
@pytest.mark.parametrize("config", CASES["Lion"].configs)
def test_foreach_and_fused_equal_the_plain_loop(config: str, impl: str) -> None:
    kwargs = CASES["Lion"].configs[config]
    plain, _ = trained("Lion", {**kwargs, "foreach": False, "fused": False})
    other, _ = trained("Lion", {**kwargs, impl: True})
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Lion", "FRUGAL"])
def test_maximize_is_a_step_along_negated_gradients(name: str) -> None:
    ends = []
    for sign in (1, -1):
        model = Net()
        optimizer = CASES[name].make(list(model.parameters()), maximize=sign == -1)
        for step in range(6):
            optimizer.zero_grad()
            (sign * loss_of(model, batch(step))).backward()
            optimizer.step()
        ends.append(model)
    for p, q in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# State ------------------------------------------------------------------------------------------------------


@by_config
def test_state_dict_goes_on_bit_for_bit(name: str, config: str) -> None:
    """Saved in the middle, also through a file of tensors and JSON, into a new optimizer over new parameters."""
    kwargs = CASES[name].configs[config]
    model, optimizer = trained(name, kwargs, steps=7)
    other = Net()
    other.load_state_dict(model.state_dict())
    renewed = CASES[name].make(list(other.parameters()), **copy.deepcopy(kwargs))
    renewed.load_state_dict(through_a_file(optimizer.state_dict()))
    if name == "GradientNoise":
        renewed.noise.load_state_dict(through_a_file(optimizer.noise.state_dict()))
    for step in range(7, 15):
        for net, opt in ((model, optimizer), (other, renewed)):
            advance(name, net, opt, batch(step))
    assert same(model, other)
    for (path, a), (_, b) in zip(tensors_of(optimizer.state_dict()), tensors_of(renewed.state_dict()), strict=True):
        assert torch.equal(a, b), path


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """safetensors for the tensors, JSON for the rest; torch.load(weights_only=True) agrees."""
    held = {path: tensor.contiguous() for path, tensor in tensors_of(state)}
    tensors = load(save(held)) if held else {}

    def skeleton(value: Any, path: str = "") -> Any:
        if isinstance(value, Tensor):
            return {"tensor": path}
        if isinstance(value, dict):
            return {"items": [[key, skeleton(v, f"{path}/{key}")] for key, v in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [skeleton(v, f"{path}/{i}") for i, v in enumerate(value)]}
        return value

    def rebuild(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "items":
            return {key: rebuild(v) for key, v in content}
        return {"list": list, "tuple": tuple}[kind](rebuild(v) for v in content)

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    return rebuild(json.loads(json.dumps(skeleton(state))))


@by_name
def test_deepcopy_goes_its_own_way(name: str) -> None:
    model, optimizer = trained(name, CASES[name].configs["default"], steps=3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    advance(name, model, optimizer, batch(3))
    assert not same(model, twin)
    if name != "GradientNoise":  # its hook stays with the optimizer it was attached to: see its docstring
        advance(name, twin, twin_optimizer, batch(3))
        assert same(model, twin)


@pytest.mark.parametrize("name", ["Lion", "FRUGAL"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_from_disk_keeps_dtype_and_bits(name: str, dtype: torch.dtype) -> None:
    model = Net(dtype)
    optimizer = CASES[name].make(list(model.parameters()))
    for step in range(6):
        advance(name, model, optimizer, batch(step, dtype))
    saved = optimizer.state_dict()
    renewed = CASES[name].make(list(Net(dtype).parameters()))
    renewed.load_state_dict(through_a_file(saved))
    again = renewed.state_dict()
    for (path, a), (path_b, b) in zip(tensors_of(saved), tensors_of(again), strict=True):
        assert path == path_b
        assert a.dtype == b.dtype
        assert torch.equal(a, b), path
    averages = [t for path, t in tensors_of(again["state"]) if path.endswith(("exp_avg", "exp_avg_sq"))]
    assert averages
    assert all(t.dtype == dtype for t in averages)


def test_a_state_of_an_older_version_gets_the_defaults() -> None:
    model, optimizer = trained("Lion", {}, steps=2)
    state = copy.deepcopy(optimizer.state_dict())  # torch hands out, and takes in, the tensors themselves
    for group in state["param_groups"]:
        for later in ("foreach", "fused", "maximize", "caution"):
            group.pop(later)
    other = Net()
    other.load_state_dict(model.state_dict())
    renewed = Lion(other.parameters())
    renewed.load_state_dict(state)
    for net, opt in ((model, optimizer), (other, renewed)):
        advance("Lion", net, opt, batch(5))
    assert same(model, other)


# Param groups, closures, schedulers, scalers ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["Lion", "GradientNoise"])
def test_groups_have_rates_of_their_own(name: str) -> None:
    model = Net()
    still, moving = [model.up, model.bias], [model.down, model.scale]
    groups = [{"params": still, "lr": 0.0}, {"params": moving}]
    optimizer = CASES[name].make(groups, lr=0.01)
    advance(name, model, optimizer, batch(0))
    start = Net()
    assert torch.equal(model.up, start.up)
    assert torch.equal(model.bias, start.bias)
    assert not torch.equal(model.down, start.down)
    optimizer.add_param_group({"params": [model.unused], "lr": 0.5})
    optimizer.zero_grad()
    (loss_of(model, batch(1)) + model.unused.sum()).backward()
    optimizer.step()
    assert not torch.equal(model.unused, start.unused)


def test_frugal_groups_have_rates_of_their_own() -> None:
    model = Net()
    groups = [
        {"params": [model.up], "projected": True, "lr": 0.0},
        {"params": [model.down], "projected": True},
        {"params": [model.bias, model.scale], "projected": False, "lr": 0.0},
    ]
    optimizer = FRUGAL(groups, lr=0.01, update_gap=2)
    for step in range(5):
        advance("FRUGAL", model, optimizer, batch(step))
    start = Net()
    assert torch.equal(model.up, start.up)
    assert torch.equal(model.bias, start.bias)
    assert not torch.equal(model.down, start.down)


@pytest.mark.parametrize("name", ["Lion", "FRUGAL", "GradientNoise"])
def test_a_closure_is_called_once_and_its_loss_returned(name: str) -> None:
    plain, with_closure = Net(), Net()
    a, b = (CASES[name].make(list(net.parameters())) for net in (plain, with_closure))
    for step in range(5):
        loss = advance(name, plain, a, batch(step))
        calls = []

        def closure(step: int = step, calls: list[int] = calls) -> Tensor:
            assert torch.is_grad_enabled()
            calls.append(step)
            b.zero_grad()
            loss = loss_of(with_closure, batch(step))
            loss.backward()
            return loss

        assert float(b.step(closure)) == loss
        assert calls == [step]
    assert same(plain, with_closure)


@by_name
@pytest.mark.parametrize("kind", ["cosine", "one cycle", "lambda"])
def test_learning_rate_schedulers(name: str, kind: str) -> None:
    """A schedule equals the same rates set by hand."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        if kind == "cosine":
            return CosineAnnealingLR(optimizer, 6)
        if kind == "one cycle":
            return OneCycleLR(optimizer, 0.02, 7, cycle_momentum=False)
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))

    kwargs = {"lr": 0.01, **CASES[name].configs["default"]}
    model, by_hand = Net(), Net()
    a, b = (CASES[name].make(list(net.parameters()), **kwargs) for net in (model, by_hand))
    scheduler = schedule(a)
    for step in range(6):
        for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
            group_b["lr"] = group_a["lr"]
        for net, opt in ((model, a), (by_hand, b)):
            advance(name, net, opt, batch(step))
        scheduler.step()
    assert same(model, by_hand)
    assert a.param_groups[0]["lr"] != kwargs["lr"]


@pytest.mark.parametrize("name", ["Lion", "FRUGAL", "GradientNoise"])
def test_a_gradient_scaler_changes_nothing_and_skips_overflow(name: str) -> None:
    plain, scaled = Net(torch.float32), Net(torch.float32)
    a, b = (CASES[name].make(list(net.parameters())) for net in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        given = batch(step, torch.float32)
        advance(name, plain, a, given)
        b.zero_grad()
        scaler.scale(loss_of(scaled, given)).backward()
        scaler.step(b)
        scaler.update()
    assert same(plain, scaled)  # 1024 is a power of two
    before = [p.clone() for p in scaled.parameters()]
    held = copy.deepcopy(b.state_dict())
    b.zero_grad()
    scaler.scale(loss_of(scaled, batch(9, torch.float32))).backward()
    scaled.up.grad[0, 0] = torch.inf
    scaler.step(b)
    assert all(torch.equal(p, q) for p, q in zip(before, scaled.parameters(), strict=True))
    for (path, x), (_, y) in zip(tensors_of(held), tensors_of(b.state_dict()), strict=True):
        assert torch.equal(x, y), path


@pytest.mark.parametrize("name", ["Lion", "FRUGAL", "GradientNoise"])
def test_sparse_gradients_are_refused(name: str) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = CASES[name].make(list(table.parameters()))
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("name", ["Lion", "FRUGAL"])
def test_dtypes_and_layouts_may_be_mixed_in_a_group(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float64]
    mixed = [nn.Parameter(v.to(d)) for v, d in zip(values, dtypes, strict=True)]
    mixed[3] = nn.Parameter(values[3].T.contiguous().T)  # not contiguous
    alone = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in mixed]
    alone[3] = nn.Parameter(values[3].contiguous())
    kwargs = {"projection": "columns"} if name == "FRUGAL" else {}
    together = CASES[name].make(mixed, **kwargs)
    # FRUGAL draws columns a tensor, in order: one optimizer over contiguous tensors draws the same ones
    apart = CASES[name].make(alone, **kwargs)
    for step in range(4):
        noise = torch.Generator().manual_seed(step)
        for p, q in zip(mixed, alone, strict=True):
            grad = torch.randn(6, 4, generator=noise, dtype=torch.float64)
            p.grad, q.grad = grad.to(p.dtype).clone(), grad.to(q.dtype).clone()
        together.step()
        apart.step()
    for p, q, dtype in zip(mixed, alone, dtypes, strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["Lion", "FRUGAL"])
def test_nan_stays_in_its_coordinate(name: str) -> None:
    """The policy of torch's own optimizers: what is not a number is not hidden, and spreads no further."""
    model, optimizer = trained(name, {"projection": "columns"} if name == "FRUGAL" else {}, steps=1)
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    model.up.grad[2, 3] = torch.nan
    optimizer.step()
    assert torch.isnan(model.up[2, 3])
    assert sum(int(torch.isnan(p).sum()) for p in model.parameters()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Lion", "FRUGAL", "GradientNoise"])
def test_a_compiled_step_equals_the_eager_one(name: str) -> None:
    torch._dynamo.reset()
    eager, compiled = Net(), Net()
    a, b = (CASES[name].make(list(net.parameters())) for net in (eager, compiled))
    step_b = torch.compile(b.step)
    for step in range(5):
        advance(name, eager, a, batch(step))
        b.zero_grad()
        loss_of(compiled, batch(step)).backward()
        step_b()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


# Hosts ------------------------------------------------------------------------------------------------------


@by_config
def test_in_the_loop_a_resumed_run_equals_the_undisturbed(name: str, config: str, tmp_path) -> None:
    """`loop.fit` with a checkpoint, stopped after 5 of 9 steps."""
    batches = [batch(step) for step in range(9)]

    def run(folder: str, last: int) -> nn.Module:
        model = Net()
        model.unused.requires_grad_(False)
        optimizer = CASES[name].make(list(model.parameters()), **copy.deepcopy(CASES[name].configs[config]))
        more = {"callbacks": [optimizer.noise]} if name == "GradientNoise" else {}

        def step(net: nn.Module, given: Batch) -> Any:
            if not CASES[name].own_backward:
                return loss_of(net, given)
            losses = optimizer.step(lambda: [loss_of(net, given)])
            return None, {"loss of the task": losses[0].detach()}

        fit(model, batches, step, optimizer, max_steps=last, checkpoint=tmp_path / folder, progress=False, **more)
        return model

    run("resumed", 5)
    assert same(run("resumed", 9), run("undisturbed", 9))


@pytest.mark.parametrize("name", ["Lion", "FRUGAL", "GradientNoise"])
def test_in_a_trainer_a_run_equals_the_one_by_hand(name: str, tmp_path) -> None:
    """`transformers.Trainer` with ``optimizers=(ours, schedule)``."""
    from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

    rows = [{"x": x, "labels": y} for x, y in zip(*batch(0, torch.float32), strict=True)]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(torch.float32)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.net, (x, labels))}

    def make(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = CASES[name].make(list(model.parameters()))
        return optimizer, get_linear_schedule_with_warmup(optimizer, 1, 6)

    by_hand = Wrapped()
    optimizer, schedule = make(by_hand)
    for _ in range(3):
        for half in (rows[:8], rows[8:]):
            optimizer.zero_grad()
            by_hand(torch.stack([row["x"] for row in half]), torch.stack([row["labels"] for row in half]))[
                "loss"
            ].backward()
            optimizer.step()
            schedule.step()
    trained = Wrapped()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=3, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(trained, arguments, train_dataset=rows, optimizers=make(trained)).train()
    assert same(trained, by_hand)
