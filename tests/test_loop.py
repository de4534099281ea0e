from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from shoestring import _checkpoint
from shoestring.loop import State, fit

Records = list[dict[str, float]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """32 rows; each look at one adds noise from torch's, numpy's and Python's global generators, and is counted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(32, 6, generator=generator)
        self.y = torch.randint(3, (32,), generator=generator)
        self.looks: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.looks.append(i)
        noise = torch.randn(6) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return self.x[i] + 0.1 * noise, self.y[i]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Average:
    """A callback with a state of its own: the running sum of the losses."""

    def __init__(self) -> None:
        self.sum = torch.zeros((), dtype=torch.float64)

    def __call__(self, state: State) -> None:
        self.sum = self.sum + state.loss

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sum = state["sum"]


class Job:
    """One training run with everything in it that could go wrong when it is resumed. 3 epochs of 8 batches."""

    def __init__(self, shuffle: str = "generator", accumulate: int = 1) -> None:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        self.rows = Rows()
        self.model = net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=24)
        self.generator = torch.Generator().manual_seed(3)
        self.accumulate = accumulate
        self.average = Average()
        self.batches: Any = self.make_batches(shuffle)

    def make_batches(self, shuffle: str) -> Any:
        if shuffle == "generator":
            own = torch.Generator().manual_seed(5)
            return DataLoader(self.rows, batch_size=4, shuffle=True, generator=own)
        if shuffle == "global":
            return DataLoader(self.rows, batch_size=4, shuffle=True)
        if shuffle == "iterable":
            return Permuted(self.rows)
        return [(self.rows.x[i : i + 4], self.rows.y[i : i + 4]) for i in range(0, 32, 4)]

    def step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        x = batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.generator)
        x = x + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        loss = cross_entropy(model, (x, batch[1]))
        return loss, {"rows": len(x), "double": 2 * loss}

    def fit(self, **options: Any) -> Records:
        options = {"epochs": 3, "checkpoint_every": 3 if "checkpoint" in options else None, **options}
        callbacks = [self.average, *options.pop("callbacks", ())]
        return fit(
            self.model,
            self.batches,
            self.step,
            self.optimizer,
            scheduler=self.scheduler,
            accumulate=self.accumulate,
            clip_grad_norm=1.0,
            callbacks=callbacks,
            generators=[self.generator],
            log_every=4,
            **options,
        )

    def result(self, history: Records) -> tuple[Any, ...]:
        moments = {
            f"{i}.{name}": value
            for i, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        draws = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002
        own = torch.rand(3, generator=self.generator).tolist()
        loader = getattr(self.batches, "generator", None)
        order = None if loader is None else torch.rand(3, generator=loader).tolist()
        rest = (history, self.scheduler.get_last_lr(), self.average.sum.item(), draws, own, order)
        return values(self.model) | moments, json.dumps(rest)


class Permuted:
    """Not a DataLoader: a new order from torch's global generator every epoch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(32).split(4):
            rows = [self.rows[int(i)] for i in indices]
            yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def assert_same_result(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert_same(a[0], b[0])
    assert a[1] == b[1]


SHUFFLES = ["generator", "global", "iterable", "list"]


# The loop itself.


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_equals_the_loop_written_by_hand_and_draws_no_random_number(shuffle: str) -> None:
    job, hand = Job(shuffle), Job(shuffle)
    job = Job(shuffle)  # again, because each seeds the global generators
    history = job.fit()
    after = torch.get_rng_state()
    weights = values(job.model)

    hand = Job(shuffle)
    losses = []
    for _ in range(3):
        for batch in hand.batches:
            hand.optimizer.zero_grad()
            loss, _ = hand.step(hand.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(hand.model.parameters(), 1.0)
            hand.optimizer.step()
            hand.scheduler.step()
            losses.append(loss.item())
    assert_same(weights, values(hand.model))
    assert torch.equal(after, torch.get_rng_state())
    assert [record["step"] for record in history] == [4, 8, 12, 16, 20, 24]
    assert [record["epoch"] for record in history] == [0, 0, 1, 1, 2, 2]
    assert [record["loss"] for record in history] == [sum(losses[i : i + 4]) / 4 for i in range(0, 24, 4)]
    assert [record["double"] for record in history] == pytest.approx([2 * r["loss"] for r in history])
    assert {record["rows"] for record in history} == {4}
    assert history[0]["lr"] == pytest.approx(0.01 * (1 + math.cos(math.pi * 3 / 24)))  # of step 4, 3 after the first


def regression(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 2, generator=generator)


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def linear() -> tuple[nn.Linear, torch.optim.SGD]:
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("accumulate", [2, 3])  # groups of 2, 2 and 1 batches; of 3 and 2
def test_accumulated_batches_equal_one_large_batch_and_the_last_group_takes_the_mean_of_what_is_left(
    accumulate: int,
) -> None:
    x, y = regression(10)
    small = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)]
    rows = 2 * accumulate
    large = [(x[i : i + rows], y[i : i + rows]) for i in range(0, 10, rows)]
    model, optimizer = linear()
    history = fit(model, small, mse, optimizer, epochs=3, accumulate=accumulate, log_every=1)
    other, optimizer = linear()
    expected = fit(other, large, mse, optimizer, epochs=3, log_every=1)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)
    assert [r["step"] for r in history] == list(range(1, 3 * len(large) + 1))
    assert [r["loss"] for r in history] == pytest.approx([r["loss"] for r in expected])


def test_clip_grad_norm_bounds_the_norm_over_all_parameters() -> None:
    x, y = regression()
    norms: list[float] = []

    def look(state: State) -> None:
        gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    for limit in (None, 0.05):
        model, optimizer = linear()
        fit(model, [(x, 10 * y)], mse, optimizer, clip_grad_norm=limit, callbacks=[look])
    assert norms[0] > 1
    assert norms[1] == pytest.approx(0.05, rel=1e-4)


def test_gradients_from_before_do_not_enter_and_none_are_left() -> None:
    x, y = regression()
    model, optimizer = linear()
    fit(model, [(x, y)], mse, optimizer)
    other, optimizer = linear()
    other.weight.grad = torch.full_like(other.weight, 100.0)
    fit(other, [(x, y)], mse, optimizer)
    assert_same(values(model), values(other))
    assert other.weight.grad is None


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(None, None, 3), (2, None, 6), (None, 7, 7), (2, 4, 4), (2, 100, 6)]
)
def test_first_of_epochs_and_max_steps_ends_the_training(epochs: int | None, max_steps: int | None, steps: int) -> None:
    x, y = regression()
    model, optimizer = linear()
    history = fit(model, [(x, y)] * 3, mse, optimizer, epochs=epochs, max_steps=max_steps, log_every=1)
    assert [r["step"] for r in history] == list(range(1, steps + 1))


def test_every_mode_is_as_before_and_what_was_frozen_stays_in_eval_while_training() -> None:
    seen: list[list[bool]] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append([module.training for module in model.modules()])
        return cross_entropy(model, batch)

    rows = Rows()
    batches = [(rows.x, rows.y)]
    model = net()
    model[1].eval()
    before = [module.training for module in model.modules()]
    fit(model, batches, step, torch.optim.SGD(model.parameters(), lr=0.1))
    assert seen.pop() == before == [module.training for module in model.modules()]

    model.eval()  # as from_pretrained leaves it
    fit(model, batches, step, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(seen.pop())
    assert not any(module.training for module in model.modules())

    def fail(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(model, batches, fail, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(module.training for module in model.modules())


def test_step_gets_the_callers_own_model_and_nested_batches() -> None:
    model, optimizer = linear()
    x, y = regression()
    batch = {"inputs": [x, "a name"], "target": y}

    def step(got: nn.Module, got_batch: dict[str, Any]) -> Tensor:
        assert got is model
        assert got_batch["inputs"][1] == "a name"
        return mse(got, (got_batch["inputs"][0], got_batch["target"]))

    fit(model, [batch], step, optimizer)


@pytest.mark.parametrize("loss_known", [True, False])
def test_step_without_a_loss_updates_the_model_itself(loss_known: bool) -> None:
    x, y = regression(40)
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=30, line_search_fn="strong_wolfe")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mse(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        return (None, {"loss": loss}) if loss_known else None

    history = fit(model, [(x, y)], step, optimizer, epochs=2, scheduler=scheduler, log_every=1)
    ones = torch.cat([x, torch.ones(40, 1)], 1).double()
    best = torch.linalg.lstsq(ones, y.double()).solution
    torch.testing.assert_close(model.weight.detach().double(), best[:5].T, rtol=0, atol=1e-3)
    assert [r["lr"] for r in history] == pytest.approx([1, 0.1])
    assert all(("loss" in r) == loss_known for r in history)


def test_gradients_are_left_alone_between_steps_that_update_the_model_themselves() -> None:
    model, optimizer = linear()
    x, y = regression()
    sums: list[float] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:  # gathers gradients over steps
        mse(model, batch).backward()
        sums.append(float(next(model.parameters()).grad.abs().sum()))  # type: ignore[union-attr]

    fit(model, [(x, y)] * 3, step, optimizer)
    assert sums == pytest.approx([sums[0], 2 * sums[0], 3 * sums[0]])


# Callbacks, history, progress.


def test_callbacks_see_every_step_and_epoch_and_stop_the_training() -> None:
    x, y = regression()
    model, optimizer = linear()
    seen: list[tuple[int, int, float, float]] = []
    epochs: list[int] = []

    def look(state: State) -> bool:
        assert state.model is model
        assert state.optimizer is optimizer
        assert state.metrics["size"] == 12
        seen.append((state.step, state.epoch, state.loss, state.lr))
        return state.step == 5

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        return mse(model, batch), {"size": len(batch[0])}

    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    history = fit(
        model,
        [(x, y)] * 2,
        step,
        optimizer,
        scheduler=scheduler,
        epochs=100,
        log_every=1,
        callbacks=[look],
        epoch_callbacks=[lambda state: epochs.append(state.epoch)],
    )
    assert [(s, e) for s, e, _, _ in seen] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]
    assert [loss for _, _, loss, _ in seen] == [r["loss"] for r in history]
    assert [lr for *_, lr in seen] == [0.1 * 0.5**i for i in range(5)] == [r["lr"] for r in history]
    assert epochs == [0, 1]


def test_epoch_callbacks_stop_and_come_also_when_max_steps_ends_with_an_epoch() -> None:
    x, y = regression()
    model, optimizer = linear()
    epochs: list[int] = []
    fit(model, [(x, y)] * 2, mse, optimizer, max_steps=4, epoch_callbacks=[lambda s: epochs.append(s.epoch)])
    assert epochs == [0, 1]
    history = fit(model, [(x, y)] * 2, mse, optimizer, epochs=9, epoch_callbacks=[lambda s: np.bool_(s.epoch == 1)])
    assert history[-1]["step"] == 4


def test_callback_that_returns_something_else_is_an_error() -> None:
    model, optimizer = linear()
    with pytest.raises(TypeError, match=r"True to stop, or None, got 3"):
        fit(model, [regression()], mse, optimizer, callbacks=[lambda state: 3])  # type: ignore[list-item, return-value]


def test_records_do_not_cross_epochs_and_hold_means() -> None:
    model, optimizer = linear()
    x, y = regression()
    losses: list[float] = []
    history = fit(
        model,
        [(x, y)] * 5,
        mse,
        optimizer,
        epochs=2,
        log_every=3,
        callbacks=[lambda state: losses.append(state.loss)],
    )
    assert [(r["step"], r["epoch"]) for r in history] == [(3, 0), (5, 0), (6, 1), (9, 1), (10, 1)]
    means = [np.mean(losses[a:b]) for a, b in [(0, 3), (3, 5), (5, 6), (6, 9), (9, 10)]]
    assert [r["loss"] for r in history] == pytest.approx(means)


def test_metric_of_some_steps_only_is_averaged_over_those() -> None:
    model, optimizer = linear()
    count = iter(range(4))

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        i = next(count)
        return mse(model, batch), {"odd": i} if i % 2 else {}

    history = fit(model, [regression()] * 4, step, optimizer)
    assert history[0]["odd"] == 2  # of 1 and 3


def test_silent_without_a_terminal_and_on_stderr_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = linear()
    fit(model, [regression()] * 3, mse, optimizer)
    assert capsys.readouterr() == ("", "")
    fit(model, [regression()] * 3, mse, optimizer, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss" in err


# Mixed precision, and the state of accelerate.


def test_mixed_precision_is_around_the_step_and_leaves_no_trace() -> None:
    model, optimizer = linear()
    forward = model.forward
    kinds: list[torch.dtype] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        output = model(batch[0])
        kinds.append(output.dtype)
        return nn.functional.mse_loss(output.float(), batch[1]), {"size": 12, "first": output[0, 0]}

    history = fit(model, [regression()], step, optimizer, mixed_precision="bf16")
    assert history[0]["size"] == 12
    fit(model, [regression()], step, optimizer)
    fit(model, [regression()], step, optimizer, mixed_precision="no")
    assert kinds == [torch.bfloat16, torch.float32, torch.float32]
    assert model.forward == forward
    assert model(regression()[0]).dtype == torch.float32
    assert not AcceleratorState._shared_state
    assert not PartialState._shared_state
    for name, message in (("fp16", "needs a GPU"), ("half", "must be 'no', 'bf16' or 'fp16', got 'half'")):
        with pytest.raises(ValueError, match=message):
            fit(model, [regression()], step, optimizer, mixed_precision=name)
    assert not AcceleratorState._shared_state


def test_own_accelerator_is_used_and_kept_as_it_was() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        model, optimizer = linear()
        kinds: list[torch.dtype] = []

        def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            kinds.append(model(batch[0]).dtype)
            return mse(model, batch)

        fit(model, [regression()], step, optimizer, accelerator=accelerator)
        fit(model, [regression()], step, optimizer)  # the one in use decides
        assert kinds == [torch.bfloat16] * 2
        assert accelerator._models == []
        assert accelerator.mixed_precision == "bf16"
        with pytest.raises(ValueError, match="mixed_precision must be 'bf16'"):
            fit(model, [regression()], step, optimizer, mixed_precision="no")
        other = Accelerator(cpu=True, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="accumulate="):
            fit(model, [regression()], step, optimizer, accelerator=other)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_gradient_scaler_skips_overflows_with_the_scheduler_and_is_saved(tmp_path: Path) -> None:
    def run(scaled: bool, **options: Any) -> tuple[dict[str, Tensor], Records, float]:
        accelerator = Accelerator(cpu=True)
        if scaled:  # what mixed_precision="fp16" sets up on a GPU; the first steps overflow
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
        model, optimizer = linear()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        history = fit(
            model,
            [regression()] * 3,
            lambda model, batch: 16 * mse(model, batch),
            optimizer,
            scheduler=scheduler,
            accelerator=accelerator,
            log_every=1,
            **options,
        )
        return values(model), history, accelerator.scaler.get_scale() if scaled else 1.0

    try:
        expected, history, scale = run(True, epochs=4)
        lrs = [r["lr"] for r in history]
        skipped = lrs.count(0.1) - 1
        assert 1 <= skipped <= 8
        assert lrs[skipped:] == [0.1 * 0.5**i for i in range(12 - skipped)]
        plain, _, _ = run(False, max_steps=12 - skipped)
        torch.testing.assert_close(expected, plain)

        run(True, checkpoint=tmp_path, max_steps=skipped + 1)
        found, again, found_scale = run(True, checkpoint=tmp_path, epochs=4)
        assert_same(found, expected)
        assert (again, found_scale) == (history, scale)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_fit_inside_a_callback_of_fit() -> None:
    model, optimizer = linear()
    other, other_optimizer = linear()

    def inner(state: State) -> None:
        fit(other, [regression()], mse, other_optimizer)

    fit(model, [regression()] * 3, mse, optimizer, callbacks=[inner])
    assert_same(values(model), values(other))


# Resume.


class Killed(Exception):
    pass


def run_until(job: Job, folder: Path, how: str, at: int) -> None:
    """Break the job off in step `at`."""

    def interrupt(state: State) -> None:
        if state.step == at:
            if how == "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            elif how == "callback":
                raise KeyboardInterrupt
            else:
                raise Killed

    if how == "max_steps":
        job.fit(checkpoint=folder, max_steps=at)
        return
    with pytest.raises(Killed if how == "error" else KeyboardInterrupt):
        job.fit(checkpoint=folder, callbacks=[interrupt])


@pytest.mark.parametrize(
    ("how", "shuffle"),
    [
        *(("max_steps", shuffle) for shuffle in SHUFFLES),
        ("ctrl-c", "generator"),
        ("ctrl-c", "global"),
        ("callback", "generator"),
        ("error", "generator"),
        ("error", "iterable"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, how: str, shuffle: str, accumulate: int
) -> None:
    job = Job(shuffle, accumulate)
    expected = job.result(job.fit())
    steps = 3 * math.ceil(8 / accumulate)
    for at in sorted({1, 3, 7, 8, steps - 1}):
        folder = tmp_path / str(at)
        run_until(Job(shuffle, accumulate), folder, how, at)
        job = Job(shuffle, accumulate)
        if how != "error":
            written = sorted(folder.iterdir())[-1]
            assert written.name == f"step-{at:010d}.safetensors"
        if folder.exists():
            torch.manual_seed(99)  # the new process may have any seed
            random.seed(99)
        assert_same_result(job.result(job.fit(checkpoint=folder)), expected)


def test_many_interruptions_in_a_row_change_nothing(tmp_path: Path) -> None:
    job = Job()
    expected = job.result(job.fit())
    for at in (2, 3, 5, 8, 9, 16, 17, 23):
        run_until(Job(), tmp_path, "max_steps", at)
        assert len(list(tmp_path.iterdir())) <= 2
    job = Job()
    assert_same_result(job.result(job.fit(checkpoint=tmp_path)), expected)


def test_writing_checkpoints_changes_nothing(tmp_path: Path) -> None:
    job = Job()
    expected = job.result(job.fit())
    for every in (1, 5, None):
        job = Job()
        found = job.result(job.fit(checkpoint=tmp_path / str(every), checkpoint_every=every))
        assert_same_result(found, expected)


def test_killed_process_goes_on_where_the_last_checkpoint_was_written(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, os, signal, sys
            spec = importlib.util.spec_from_file_location("job", {__file__!r})
            job_module = importlib.util.module_from_spec(spec)
            sys.modules["job"] = job_module
            spec.loader.exec_module(job_module)
            def kill(state):
                if state.step == 13:
                    os.kill(os.getpid(), signal.SIGKILL)
            job_module.Job().fit(checkpoint=sys.argv[1], checkpoint_every=5, callbacks=[kill])
            """
        )
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".step-0000000005.0123456789abcdef.safetensors").write_bytes(b"half")  # of an earlier kill
    killed = subprocess.run([sys.executable, str(script), str(folder)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-0000000005.safetensors",
        "step-0000000010.safetensors",
    ]
    job = Job()
    expected = job.result(job.fit())
    job = Job()
    assert_same_result(job.result(job.fit(checkpoint=folder)), expected)


def test_rerun_of_a_finished_run_returns_at_once_and_more_epochs_go_on(tmp_path: Path) -> None:
    job = Job()
    expected = job.result(job.fit(checkpoint=tmp_path))
    job = Job()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same_result(job.result(job.fit(checkpoint=tmp_path)), expected)
    assert job.rows.looks == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    job = Job()
    expected = job.result(job.fit(epochs=5))
    job = Job()
    assert_same_result(job.result(job.fit(checkpoint=tmp_path, epochs=5)), expected)


def test_run_that_a_callback_stopped_stays_stopped(tmp_path: Path) -> None:
    stop: list[Callable[[State], bool]] = [lambda state: state.step == 10]
    job = Job()
    expected = job.result(job.fit(checkpoint=tmp_path, callbacks=stop))
    job = Job()
    assert_same_result(job.result(job.fit(checkpoint=tmp_path, callbacks=stop)), expected)
    assert expected[1].count('"step": 12') == 0


def test_batches_that_are_done_are_not_loaded_again(tmp_path: Path) -> None:
    run_until(Job(), tmp_path, "max_steps", 6)
    job = Job()
    job.fit(checkpoint=tmp_path, epochs=1)
    assert len(job.rows.looks) == 8  # two batches of four
    again = Job()
    again.fit(epochs=1)
    assert job.rows.looks == again.rows.looks[-8:]


def test_workers_find_the_same_order_after_a_resume(tmp_path: Path) -> None:
    x = torch.arange(32.0).reshape(32, 1)
    seen: list[float] = []

    def step(model: nn.Module, batch: list[Tensor]) -> Tensor:
        seen.extend(batch[0].flatten().tolist())
        return model(batch[0]).square().mean()

    def run(**options: Any) -> None:
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(x), 4, shuffle=True, num_workers=1, persistent_workers=True)
        model = nn.Linear(1, 1)
        fit(model, loader, step, torch.optim.SGD(model.parameters(), lr=1e-4), epochs=3, **options)

    run()
    expected = seen
    for at in (5, 8, 13):
        seen = []
        run(checkpoint=tmp_path / str(at), max_steps=at)
        run(checkpoint=tmp_path / str(at))
        assert seen == expected


def test_resume_false_starts_anew_and_replaces_the_old_run(tmp_path: Path) -> None:
    run_until(Job(), tmp_path, "max_steps", 20)
    job = Job()
    job.fit(checkpoint=tmp_path, resume=False, max_steps=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-0000000003.safetensors",
        "step-0000000004.safetensors",
    ]
    fresh = Job()
    fresh.fit(max_steps=4)
    assert_same(values(job.model), values(fresh.model))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint at all")
    else:  # one bit in the middle of the numbers
        position = len(data) - 2000
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "one bit"])
def test_broken_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    job = Job()
    expected = job.result(job.fit())
    run_until(Job(), tmp_path, "max_steps", 11)
    old, new = sorted(tmp_path.iterdir())
    damage(new, how)
    job = Job()
    with pytest.warns(UserWarning, match=new.name):
        assert_same_result(job.result(job.fit(checkpoint=tmp_path)), expected)

    old, new = sorted(tmp_path.iterdir())
    damage(old, how)
    damage(new, how)
    job = Job()
    before = values(job.model)
    with pytest.warns(UserWarning, match=old.name), pytest.raises(ValueError, match=new.name):
        job.fit(checkpoint=tmp_path)
    assert_same(values(job.model), before)


def test_checkpoint_of_another_run_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    x, y = regression()

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        before = values(model)
        try:
            fit(model, [(x, y)], mse, optimizer, checkpoint=tmp_path, **options)
        except ValueError:
            assert_same(values(model), before)
            assert not optimizer.state
            raise

    run(*linear())
    wide = nn.Linear(5, 2, bias=False)
    with pytest.raises(ValueError, match=r"another model: only one of the two has bias"):
        run(wide, torch.optim.SGD(wide.parameters(), lr=0.1))
    half = nn.Linear(5, 2).bfloat16()
    with pytest.raises(ValueError, match=r"weight is \(2, 5\) torch.float32 there, \(2, 5\) torch.bfloat16"):
        run(half, torch.optim.SGD(half.parameters(), lr=0.1))
    model, _ = linear()
    with pytest.raises(ValueError, match=r"optimizer in checkpoint .*step-0000000001.safetensors does not fit"):
        run(model, torch.optim.SGD([model.weight], lr=0.1))
    model, optimizer = linear()
    with pytest.raises(ValueError, match=r"states of \['optimizer'\], this run needs \['optimizer', 'scheduler'\]"):
        run(model, optimizer, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.raises(ValueError, match=r"0 random generators .* this run has 1"):
        run(*linear(), generators=[torch.Generator()])


def test_second_ctrl_c_does_not_wait_and_the_handler_is_put_back(tmp_path: Path) -> None:
    usual = signal.getsignal(signal.SIGINT)
    model, optimizer = linear()
    survived: list[int] = []

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        survived.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        survived.append(2)
        return mse(model, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(model, [regression()] * 3, step, optimizer, checkpoint=tmp_path)
    assert survived == [1]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is usual


def test_ctrl_c_ends_the_bar_and_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = linear()

    def interrupt(state: State) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, [regression()] * 3, mse, optimizer, callbacks=[interrupt], progress=True)
    assert "1/3" in capsys.readouterr().err


def test_runs_outside_the_main_thread(tmp_path: Path) -> None:
    model, optimizer = linear()
    thread = threading.Thread(target=lambda: fit(model, [regression()], mse, optimizer, epochs=3, checkpoint=tmp_path))
    thread.start()
    thread.join(30)
    other, optimizer = linear()
    fit(other, [regression()], mse, optimizer, epochs=3)
    assert_same(values(model), values(other))


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
    lambda p: torch.optim.NAdam(p, lr=0.01),
    lambda p: torch.optim.Rprop(p, lr=0.01),
    lambda p: torch.optim.Adafactor(p, lr=0.01),
    lambda p: torch.optim.ASGD(p, lr=0.01),
    lambda p: torch.optim.RMSprop([{"params": [q], "lr": 0.01 / (i + 1)} for i, q in enumerate(p)], centered=True),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_state_of_torchs_optimizers_survives(tmp_path: Path, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model, _ = linear()
        fit(model, [regression()] * 3, mse, make(model.parameters()), **options)
        return values(model)

    expected = run(epochs=4)
    run(checkpoint=tmp_path, max_steps=5)
    assert_same(run(checkpoint=tmp_path, epochs=4), expected)


def test_state_of_an_optimizer_with_closures_survives(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model, _ = linear()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, history_size=3)

        def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = mse(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)

        fit(model, [regression()] * 3, step, optimizer, **options)
        return values(model)

    expected = run(epochs=3)
    run(checkpoint=tmp_path, max_steps=5)
    assert_same(run(checkpoint=tmp_path, epochs=3), expected)


S = torch.optim.lr_scheduler
SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda o: S.OneCycleLR(o, 0.2, total_steps=12),
    lambda o: S.MultiStepLR(o, [2, 6, 6, 9]),
    lambda o: S.CosineAnnealingWarmRestarts(o, 3, 2),
    lambda o: S.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 4), S.ExponentialLR(o, 0.9)], [4]),
    lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 4), S.StepLR(o, 3)], optimizer=o),
    lambda o: S.CyclicLR(o, 0.01, 0.1, 4),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_state_of_torchs_schedulers_survives(tmp_path: Path, make: Callable[[torch.optim.Optimizer], Any]) -> None:
    def run(**options: Any) -> list[float]:
        model, optimizer = linear()
        scheduler = make(optimizer)
        history = fit(model, [regression()] * 3, mse, optimizer, scheduler=scheduler, log_every=1, **options)
        return [record["lr"] for record in history]

    expected = run(epochs=4)
    assert len(set(expected)) > 1
    run(checkpoint=tmp_path, max_steps=5)
    assert run(checkpoint=tmp_path, epochs=4) == expected


class Float32Momentum(torch.optim.Optimizer):
    """Momentum in float32 for parameters of any dtype, as memory-saving optimizers keep it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state.setdefault("momentum", torch.zeros_like(p, dtype=torch.float32)).mul_(0.9).add_(p.grad.float())
            p.sub_((0.1 * state["momentum"]).to(p.dtype))


def test_optimizer_state_keeps_its_own_dtype_beside_bfloat16_parameters(tmp_path: Path) -> None:
    x, y = regression()

    def run(**options: Any) -> tuple[dict[str, Tensor], Tensor]:
        model, _ = linear()
        model.bfloat16()
        optimizer = Float32Momentum(model.parameters())
        fit(model, [(x.bfloat16(), y.bfloat16())] * 3, mse, optimizer, **options)
        return values(model), optimizer.state[model.weight]["momentum"]

    expected, momentum = run(epochs=4)
    run(checkpoint=tmp_path, max_steps=5)
    found, again = run(checkpoint=tmp_path, epochs=4)
    assert again.dtype == torch.float32
    assert torch.equal(again, momentum)
    assert_same(found, expected)


def test_tied_weights_and_their_sharing_survive(tmp_path: Path) -> None:
    def run(**options: Any) -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict({"read": nn.Embedding(7, 4), "write": nn.Linear(4, 7, bias=False)})
        model["write"].weight = model["read"].weight
        tokens = torch.arange(7)

        def step(model: Any, batch: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model["write"](model["read"](batch)), batch)

        fit(model, [tokens] * 3, step, torch.optim.SGD(model.parameters(), lr=0.5), **options)
        return model

    expected = run(epochs=2)
    run(checkpoint=tmp_path, max_steps=4)
    found = run(checkpoint=tmp_path, epochs=2)
    assert found["write"].weight is found["read"].weight
    assert_same(values(found), values(expected))


def test_checkpoint_file_is_plain_safetensors_with_the_weights_by_name(tmp_path: Path) -> None:
    model, optimizer = linear()
    fit(model, [regression()], mse, optimizer, checkpoint=tmp_path)
    (path,) = tmp_path.iterdir()
    tensors = load_file(path)
    assert torch.equal(tensors["/model/weight"], model.weight)
    moment = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(tensors["/parts/optimizer/state/0/momentum_buffer"], moment)


def test_any_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128]
    tensors = [torch.randn(3, 2, generator=generator).to(kind) for kind in kinds]
    base = torch.arange(12.0).reshape(3, 4)
    tree = {
        "tensors": [*tensors, base.T, base[1:], base, torch.zeros(()), torch.zeros(0, 3), -tensors[-1].conj()],
        1: (0.1, -0.0, math.inf, None, True, 2**200, "text"),
        "1": {(1, 2): [], "a/b": torch.ones(1)},
        "a": {"b": torch.zeros(1)},
        "a/b": torch.full((1,), 2.0),
    }
    path = tmp_path / "x.safetensors"
    _checkpoint.write(path, tree)
    found = _checkpoint.read(path)
    for a, b in zip(tree["tensors"], found["tensors"], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert found[1] == tree[1]
    assert isinstance(found[1][4], bool)
    assert math.copysign(1, found[1][1]) == -1
    assert found["1"][(1, 2)] == []
    assert [found["1"]["a/b"].item(), found["a"]["b"].item(), found["a/b"].item()] == [1, 0, 2]
    assert list(found) == list(tree)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    for bad, message in [
        ({"a": [1, object()]}, "got object at /a/1"),
        ({"a": torch.eye(2).to_sparse()}, "sparse.* at /a"),
    ]:
        with pytest.raises(TypeError, match=message):
            _checkpoint.write(tmp_path / "x.safetensors", bad)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="absent"):
        _checkpoint.read(tmp_path / "absent.safetensors")


# Bad input.


def test_loss_that_is_not_finite_stops_before_the_parameters_are_touched(tmp_path: Path) -> None:
    x, y = regression()
    bad = x.clone()
    bad[0, 0] = math.nan
    batches = [(x, y), (x, y), (bad, y), (x, y)]
    model, optimizer = linear()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        fit(model, batches, mse, optimizer, checkpoint=tmp_path, checkpoint_every=1)
    good, good_optimizer = linear()
    fit(good, batches[:2], mse, good_optimizer)
    assert_same(values(model), values(good))
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "step-0000000002.safetensors"


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batches": []}, ValueError, "batches is empty"),
    ({"batches": iter([])}, ValueError, "batches is empty in epoch 0"),
    ({"batches": 3}, TypeError, "batches must be a DataLoader or another iterable, got int"),
    ({"batches": iter([1]), "epochs": 2}, ValueError, "iterator and has one epoch only, got epochs=2"),
    ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
    ({"epochs": 1.5}, ValueError, "epochs must be an integer >= 1, got 1.5"),
    ({"max_steps": -1}, ValueError, "max_steps must be an integer >= 1, got -1"),
    ({"accumulate": 0}, ValueError, "accumulate must be an integer >= 1, got 0"),
    ({"log_every": True}, ValueError, "log_every must be an integer >= 1, got True"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be"),
    ({"checkpoint_every": 2}, ValueError, "checkpoint_every needs checkpoint"),
    ({"checkpoint": __file__}, NotADirectoryError, "checkpoint must be a folder"),
    ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm must be > 0, got 0.0"),
    ({"clip_grad_norm": math.nan}, ValueError, "clip_grad_norm must be > 0, got nan"),
    ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function"),
    ({"step": None}, TypeError, "step must be a function"),
    ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
    ({"optimizer": linear()[1]}, ValueError, r"2 parameters that model has not, the first of shape \(2, 5\)"),
    ({"scheduler": 1}, TypeError, "scheduler must have a step method, got int"),
    ({"scheduler": S.ReduceLROnPlateau(linear()[1])}, TypeError, "epoch callback"),
    ({"scheduler": S.StepLR(linear()[1], 1)}, ValueError, "scheduler must belong to optimizer"),
    ({"step": lambda m, b: m(b[0])}, TypeError, r"loss as a 0-d tensor.* got shape \(12, 2\)"),
    ({"step": lambda m, b: 1.0}, TypeError, "got float"),
    ({"step": lambda m, b: (mse(m, b), 3)}, TypeError, "metrics as a dict, got int"),
    ({"step": lambda m, b: (mse(m, b), {"a": "x"})}, TypeError, "metric 'a' must be a number"),
    ({"step": lambda m, b: torch.zeros(())}, ValueError, "loss without a gradient"),
    ({"step": lambda m, b: None, "accumulate": 2}, ValueError, "excludes accumulate"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_is_named_and_nothing_has_changed(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, optimizer = linear()
    model.eval()
    before = values(model)
    arguments = {"model": model, "batches": [regression()], "step": mse, "optimizer": optimizer, **options}
    with pytest.raises(error, match=message):
        fit(**arguments)
    assert_same(values(model), before)
    assert not optimizer.state
    assert not model.training
    assert not AcceleratorState._shared_state


def test_model_on_the_meta_device_is_refused() -> None:
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        fit(model, [regression()], mse, torch.optim.SGD(model.parameters(), lr=0.1))


def test_iterator_is_good_for_one_epoch_and_says_when_it_runs_out() -> None:
    model, optimizer = linear()
    assert fit(model, iter([regression()] * 3), mse, optimizer)[-1]["step"] == 3
    with pytest.raises(ValueError, match="empty in epoch 1, after 3 steps"):
        fit(model, iter([regression()] * 3), mse, optimizer, max_steps=5)


def test_samplers_that_count_epochs_are_told(tmp_path: Path) -> None:
    class Counting(torch.utils.data.SequentialSampler):
        epochs: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = TensorDataset(*regression())
    for epochs, told in ((3, [0, 1, 2]), (5, [3, 4])):  # the second goes on from the first
        sampler = Counting(data)
        sampler.epochs = []
        model, optimizer = linear()
        fit(model, DataLoader(data, 4, sampler=sampler), mse, optimizer, epochs=epochs, checkpoint=tmp_path)
        assert sampler.epochs == told


# Several processes.


def test_processes_that_accelerate_does_not_know_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, optimizer = linear()
    try:
        with pytest.raises(ValueError, match="2 processes were launched, but accelerate was set up before fit for 1"):
            fit(model, [regression()], mse, optimizer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


DDP_SCRIPT = '''
import json, os, random, sys
import numpy as np
import torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from shoestring.loop import fit

folder = Path(sys.argv[1])


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 5, generator=generator), torch.randn(24, 2, generator=generator)


def parts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 8), "b": nn.Linear(8, 2)})
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(model, batch):  # the model itself has no forward
    x, y = batch
    return nn.functional.mse_loss(model["b"](torch.tanh(model["a"](x))), y), {"largest": float(x.max())}


def rank():
    return int(os.environ.get("RANK", 0))


def loader(kind):
    x, y = data()
    if kind == "list":
        return [{"x": x[i : i + 8], "y": y[i : i + 8], "names": list("abcdefgh")} for i in range(0, 24, 8)]
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def list_step(model, batch):
    assert len(batch["names"]) == len(batch["x"])
    return step(model, (batch["x"], batch["y"]))


def noisy(model, batch):  # every process draws its own
    x, y = batch
    noise = torch.randn_like(x) + random.random() + float(np.random.rand())
    return nn.functional.mse_loss(model["b"](nn.functional.dropout(model["a"](x + noise))), y)


def train(kind, **options):
    model, optimizer = parts()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    function = list_step if kind == "list" else step
    history = fit(model, loader(kind), function, optimizer, scheduler=scheduler, epochs=4, log_every=5, **options)
    return model, history


def resumed():
    """Interrupted and undisturbed training with random numbers of every process's own."""
    def run(**options):
        model, optimizer = parts()
        torch.manual_seed(10 + rank()); random.seed(10 + rank()); np.random.seed(10 + rank())
        history = fit(model, loader("loader"), noisy, optimizer, log_every=3, **options)
        return {k: v for k, v in model.state_dict().items()}, history
    expected, history = run(epochs=4)
    run(checkpoint=folder / "resumed", max_steps=5, checkpoint_every=2)
    found, again = run(checkpoint=folder / "resumed", epochs=4, checkpoint_every=2)
    return all(torch.equal(expected[k], found[k]) for k in expected) and history == again


def nan_error():
    model, optimizer = parts()
    def bad(model, batch):
        loss, _ = step(model, batch)
        return loss * (float("nan") if rank() == 1 else 1.0)
    try:
        fit(model, loader("loader"), bad, optimizer, epochs=2, log_every=1)
    except FloatingPointError as error:
        return str(error)


def main():
    results = {}
    for kind in ("loader", "list"):
        for accumulate in (1, 2):
            model, history = train(kind, accumulate=accumulate)
            results[f"{kind} {accumulate}"] = history
            save_file(model.state_dict(), folder / f"{kind} {accumulate} {rank()}.safetensors")
    _, history = train("loader", callbacks=[lambda state: rank() == 1 and state.step == 4])
    results["stopped at"] = history[-1]["step"]
    results["resumed"] = resumed()
    model, optimizer = parts()
    try:
        fit(model, loader("loader"), lambda model, batch: None, optimizer)
    except ValueError as error:
        results["manual"] = str(error)
    results["nan"] = nan_error()
    (folder / f"{rank()}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():  # else gloo's threads may abort the process at its end
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
'''


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DDP_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu means torchrun; with --cpu accelerate starts several processes through MPI only
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(script), str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, timeout=120, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]

    space: dict[str, Any] = {"__name__": "single"}
    sys.argv, argv = ["", str(tmp_path)], sys.argv
    try:
        exec(compile(DDP_SCRIPT, "single", "exec"), space)
    finally:
        sys.argv = argv
    for kind in ("loader", "list"):
        for accumulate in (1, 2):
            name = f"{kind} {accumulate}"
            model, history = space["train"](kind, accumulate=accumulate)
            first, second = (load_file(tmp_path / f"{name} {rank}.safetensors") for rank in (0, 1))
            assert_same(first, second)
            torch.testing.assert_close(first, dict(model.state_dict()), rtol=0, atol=1e-6)
            for result in results:
                assert [r["step"] for r in result[name]] == [r["step"] for r in history]
                assert [r["lr"] for r in result[name]] == pytest.approx([r["lr"] for r in history])
                assert [r["loss"] for r in result[name]] == pytest.approx([r["loss"] for r in history], rel=1e-5)
            # a metric of each process's share, averaged over both: not that of one of them
            assert results[0][name] == results[1][name]
    for result in results:
        assert result["stopped at"] == 4
        assert result["resumed"] is True
        assert "several processes" in result["manual"]
        assert result["nan"] == "the loss is nan at step 1"  # on both, though only one has it
    assert len(list((tmp_path / "resumed").iterdir())) == 2


def test_checkpoint_of_two_processes_is_resumed_by_one_with_a_warning(tmp_path: Path) -> None:
    job = Job()
    job.fit(checkpoint=tmp_path, max_steps=5)
    (*_, path) = sorted(tmp_path.iterdir())
    saved = _checkpoint.read(path)
    saved["random"] *= 2
    _checkpoint.write(path, saved)
    job = Job()
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        history = job.fit(checkpoint=tmp_path)
    assert history[-1]["step"] == 24


def test_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "loop.md"
    blocks = [part.split("```")[0] for part in page.read_text().split("```python\n")[1:]]
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), space)
    assert any((tmp_path / "runs").iterdir())
