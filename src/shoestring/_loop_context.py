"""What surrounds the training loop: checks of its arguments, accelerate, train mode, Ctrl-C, the progress bar."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from shoestring._batches import Reader


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_arguments(
    model: nn.Module, batches: Iterable[Any], step: Callable[[Any, Any], Any], optimizer: Any, scheduler: Any
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise TypeError(f"batches must be a DataLoader or another iterable, got {type(batches).__name__}")
    if hasattr(batches, "__len__") and Reader(batches).length() == 0:
        raise ValueError("batches is empty")
    if not callable(step):
        raise TypeError(f"step must be a function of model and batch, got {type(step).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(p) for p in model.parameters()}
    foreign = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if foreign:
        raise ValueError(
            f"optimizer has {len(foreign)} parameters that model has not, the first of shape {foreign[0]}: make it "
            "over model.parameters(), and put what else is trained into an nn.ModuleDict with the model"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must hold values, got parameters on the meta device")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must have a step method, got {type(scheduler).__name__}")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("ReduceLROnPlateau steps on a metric: step it in an epoch callback")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler must belong to optimizer, got one of another optimizer")


@contextmanager
def accelerator_for(given: Accelerator | None, mixed_precision: str | None, model: nn.Module) -> Iterator[Accelerator]:
    """The caller's Accelerator, or one that leaves accelerate's process-wide state as it was."""
    if mixed_precision not in (None, "no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision must be 'no', 'bf16' or 'fp16', got {mixed_precision!r}")
    launched = "ACCELERATE_USE_CPU" in os.environ or "LOCAL_RANK" in os.environ
    on_cpu = next(model.parameters()).device.type == "cpu"
    gpu = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    fresh, in_use = PartialState._shared_state == {}, AcceleratorState._shared_state != {}
    plugin = dict(GradientState().plugin_kwargs) if in_use else {}
    accelerator = given
    if accelerator is None:
        if in_use and mixed_precision not in (None, AcceleratorState().mixed_precision):
            raise ValueError(
                f"mixed_precision must be {AcceleratorState().mixed_precision!r} as in the Accelerator in use, got "
                f"{mixed_precision!r}"
            )
        on_cpu = on_cpu and not (launched and gpu)  # else a launcher decides the device
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=fresh and on_cpu)
    models, optimizers = list(accelerator._models), list(accelerator._optimizers)
    try:
        launched_processes = int(os.environ.get("WORLD_SIZE", 1))
        if launched_processes != accelerator.num_processes:
            raise ValueError(
                f"{launched_processes} processes were launched, but accelerate was set up before fit for "
                f"{accelerator.num_processes}: on CPUs, with PartialState(cpu=True)"
            )
        kind = accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(f"the loop runs in one process or under DDP, got {kind} from accelerate")
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError("gradient accumulation is asked for by accumulate=, not by accelerate")
        if mixed_precision not in (None, accelerator.mixed_precision):
            raise ValueError(f"mixed_precision must be that of accelerator, got {mixed_precision!r}")
        if given is not None or launched:
            model.to(accelerator.device)
        device = next(model.parameters()).device
        if accelerator.mixed_precision != "no" and device.type != accelerator.device.type:
            raise ValueError(f"model must be on {accelerator.device} for mixed precision, is on {device}")
        if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
            raise ValueError("mixed_precision 'fp16' needs a GPU, use 'bf16'")
        yield accelerator
    finally:
        if given is not None:  # it keeps what it has prepared, for ever
            accelerator._models, accelerator._optimizers = models, optimizers
        elif not in_use:
            AcceleratorState._reset_state(reset_partial_state=fresh and not launched)
        elif plugin:
            GradientState().plugin_kwargs = plugin


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def ctrl_c_held_back(held: list[int], enabled: bool) -> Iterator[None]:
    """Put the first Ctrl-C on the list `held` instead of raising it; the second is raised as always."""
    usual = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (enabled and in_main_thread and callable(usual)):
        yield
        return

    def hold_back(number: int, frame: Any) -> None:
        if held:
            usual(number, frame)
        held.append(number)

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:  # it came when the last step was done
        raise KeyboardInterrupt


@contextmanager
def progress_bar(
    done: int, total: float, shown: bool, status: Callable[[], tuple[int, float]]
) -> Iterator[Callable[[], None]]:
    """A function to call after every step; four times a second it redraws the bar from `status`: step and loss."""
    if not shown:
        yield lambda: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    # auto_refresh would draw from a thread of its own, which takes the interpreter lock in the middle of a step
    bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
    task = bar.add_task("", total=None if math.isinf(total) else total, completed=done)
    began = drawn = time.monotonic()

    def show(at_once: bool = False) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn < 0.25 and not at_once:
            return
        drawn = now
        step, loss = status()
        speed = (step - done) / max(now - began, 1e-9)
        bar.update(task, completed=step, description=f"loss {loss:.4g}  {speed:.3g} steps/s", refresh=True)

    with bar:
        try:
            yield show
        finally:
            show(at_once=True)
