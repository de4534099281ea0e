"""The one training loop: `fit(model, batches, step, optimizer)`.

It repeats "loss of the next batch, backward, optimizer step" and adds what every training run needs: progress,
history, gradient accumulation and clipping, mixed precision, checkpoints from which an interrupted run goes on bit
for bit, and several processes under ``accelerate launch``. It draws no random number itself. See ``docs/loop.md``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from shoestring._batches import Reader
from shoestring._loop_context import (
    accelerator_for,
    check_arguments,
    check_counts,
    ctrl_c_held_back,
    progress_bar,
    train_mode,
)
from shoestring._resume import Keeper

Record = dict[str, float]


@dataclass
class State:
    """What a callback sees after a step. One object lives through the whole run: copy what you keep.

    Attributes
    ----------
    step : int
        Optimizer steps done, 1 after the first.
    epoch : int
        The pass over the batches, 0 in the first.
    model, optimizer
        The caller's own objects.
    metrics : mapping of str to float or 0-d tensor
        The loss and what the step function returned beside it.
    history : list of dict
        The records so far, as `fit` returns them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    _loss: Any = math.nan
    _lr: Any = math.nan

    @property
    def loss(self) -> float:
        """Loss of this step on this process; reading it waits for the GPU."""
        return float(self._loss)

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group in this step."""
        return float(self._lr)


Callback = Callable[[State], "bool | None"]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    step: Callable[[Any, Any], Any],
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    mixed_precision: str | None = None,
    callbacks: Sequence[Callback] = (),
    epoch_callbacks: Sequence[Callback] = (),
    generators: Sequence[torch.Generator] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    log_every: int = 10,
    progress: bool | None = None,
    accelerator: Accelerator | None = None,
) -> list[Record]:
    """Train `model` in place.

    Parameters
    ----------
    model : nn.Module
        Trained on the device it is on (under ``accelerate launch``, or with an `accelerator`, on the device which that
        gives to the process). Several models go into one ``nn.ModuleDict``. A model in eval mode is put into train
        mode; if it is in train mode already, submodules you have set to eval stay so. Afterwards every mode is as
        it was.
    batches : iterable
        A DataLoader, a list, or anything that can be iterated once per epoch. A batch is what `step` wants: tensors
        in tuples, lists, dicts; they are moved to the model's GPU. With several processes each gets its share of
        the rows of every batch.
    step : callable
        ``step(model, batch)`` returns the loss, a 0-d tensor, or ``(loss, metrics)`` with a dict of numbers or 0-d
        tensors. ``None`` instead of the loss says that the step has updated the parameters itself (closures,
        several backward passes, no gradient at all); the loop then calls no backward, zero_grad or step.
    optimizer : torch.optim.Optimizer
        Over parameters of `model` only: the others would be neither saved nor kept equal between processes.
    scheduler : object, default None
        Its ``step()`` is called after every optimizer step.
    epochs, max_steps : int, default None
        Passes over the batches and optimizer steps; training ends with the first to be reached. Neither: one epoch.
    accumulate : int, default 1
        Batches per optimizer step; the gradient is that of the mean of their losses. The last step of an epoch takes
        what is left.
    clip_grad_norm : float, default None
        Largest norm of the gradient of all parameters in the optimizer.
    mixed_precision : {"no", "bf16", "fp16"}, default None
        Autocast around `step`. None: what ``accelerate launch`` was told, else "no".
    callbacks, epoch_callbacks : sequence of callable, default ()
        Each is called with the `State` after every step, and after every epoch. It returns None, or True to stop. A
        callback with ``state_dict`` and ``load_state_dict`` is saved and restored with the checkpoint.
    generators : sequence of torch.Generator, default ()
        Generators from which `step` draws, saved with the checkpoint. Those of a DataLoader, and the global ones of
        Python, numpy and torch, always are.
    checkpoint : path, default None
        Folder for checkpoints, of which the last two are kept.
    checkpoint_every : int, default None
        Steps from one to the next. None: one at the end of every epoch. There is always one at the end, and one at
        Ctrl-C, which waits for the step under way (a second Ctrl-C does not).
    resume : bool, default True
        Go on from the newest checkpoint that can be read. False: start anew, the first checkpoint replaces the old.
    log_every : int, default 10
        Steps per record of the history, and between two looks at the loss of a GPU.
    progress : bool, default None
        Whether to show a bar on stderr. None: only on a terminal.
    accelerator : accelerate.Accelerator, default None
        Yours, with the options of yours, such as ``DistributedDataParallelKwargs(find_unused_parameters=True)``.

    Returns
    -------
    list of dict
        One record per `log_every` steps, and per rest of an epoch: ``step``, ``epoch``, ``lr`` (of its last step),
        and ``loss`` and every metric as the mean over its steps.

    Raises
    ------
    TypeError, ValueError
        Bad arguments, no batches, a loss that is no scalar or has no gradient, a checkpoint of another model or
        optimizer, or none that can be read.
    FloatingPointError
        If the loss is NaN or infinite; on the CPU before the parameters are touched. The last checkpoint stays.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 3)
    >>> model = nn.Linear(3, 1)
    >>> history = fit(
    ...     model,
    ...     [(x, x @ torch.tensor([[1.0], [2.0], [3.0]]))],
    ...     lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    ...     torch.optim.SGD(model.parameters(), lr=0.3),
    ...     epochs=50,
    ... )
    >>> [round(w, 3) for w in model.weight[0].tolist()]
    [1.0, 2.0, 3.0]
    >>> len(history), history[-1]["step"]
    (50, 50)
    """
    check_counts(epochs=epochs, max_steps=max_steps, checkpoint_every=checkpoint_every)
    check_counts(accumulate=accumulate, log_every=log_every)
    check_arguments(model, batches, step, optimizer, scheduler)
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm must be > 0, got {clip_grad_norm}")
    if checkpoint_every is not None and checkpoint is None:
        raise ValueError("checkpoint_every needs checkpoint, the folder to write to")
    epochs = 1 if epochs is None and max_steps is None else epochs
    if isinstance(batches, Iterator) and (epochs or 1) > 1:
        raise ValueError(f"batches is an iterator and has one epoch only, got epochs={epochs}: pass a list or loader")

    with accelerator_for(accelerator, mixed_precision, model) as accelerator:
        run = _Run(model, batches, step, optimizer, scheduler, accelerator, accumulate, clip_grad_norm, log_every)
        run.callbacks, run.epoch_callbacks = tuple(callbacks), tuple(epoch_callbacks)
        run.generators = list({id(g): g for g in (*generators, *run.reader.generators())}.values())
        if checkpoint is not None:
            run.keep_checkpoints(Path(checkpoint), checkpoint_every, resume)
        shown = accelerator.is_main_process and (sys.stderr.isatty() if progress is None else progress)
        steps = math.ceil(run.reader.length() / accumulate) if run.reader.length() < math.inf else math.inf
        total = min(max_steps or math.inf, (epochs or math.inf) * steps)
        with (
            train_mode(model),
            progress_bar(run.state.step, total, shown, run.status) as show,
            ctrl_c_held_back(run.interrupted, run.saves_when_interrupted),
        ):
            run.train(epochs or math.inf, max_steps or math.inf, show)
        optimizer.zero_grad()
        return run.state.history


class _Run:
    """What the loop keeps between two steps."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        step: Callable[[Any, Any], Any],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        accelerator: Accelerator,
        accumulate: int,
        clip_grad_norm: float | None,
        log_every: int,
    ) -> None:
        self.optimizer, self.scheduler, self.accelerator = optimizer, scheduler, accelerator
        self.accumulate, self.clip_grad_norm, self.log_every = accumulate, clip_grad_norm, log_every
        self.alone = accelerator.num_processes == 1
        self.device = next(model.parameters()).device
        self.on_cpu = self.device.type == "cpu"
        self.look_at_once = self.alone and self.on_cpu  # where reading the loss costs nothing
        # Step and model in one module: DDP and autocast see all of it, whichever methods of the model it calls.
        self.run_step = accelerator.prepare_model(_Step(model, step), device_placement=False)
        # The wrapped optimizer searches for packages at every step: only the gradient scaler needs it.
        self.update = optimizer if accelerator.scaler is None else accelerator.prepare_optimizer(optimizer, False)
        self.reader = Reader(batches, accelerator.process_index, accelerator.num_processes)
        self.callbacks: tuple[Callback, ...] = ()
        self.epoch_callbacks: tuple[Callback, ...] = ()
        self.generators: list[torch.Generator] = []
        self.state = State(model, optimizer)
        self.done = 0  # batches of this epoch
        self.exhausted = False  # there was no further batch when the last group was read
        self.stop = False  # a callback said so
        self.manual = False  # the last step updated the model itself
        self.pending: list[dict[str, Any]] = []  # steps that are not in the history yet
        self.interrupted: list[int] = []  # Ctrl-C, held back until the step is done
        self.keeper: Keeper | None = None
        self.checkpoint_every: int | None = None

    def train(self, last_epoch: float, last_step: float, show: Callable[[], None]) -> None:
        state = self.state
        while state.epoch < last_epoch and state.step < last_step and not self.stop:
            batches = self.begin_epoch()
            ended = False
            while state.step < last_step and not self.stop and not ended:
                if group := list(islice(batches, self.accumulate)):
                    self.exhausted = len(group) < self.accumulate
                    self.step_on(group)
                    show()
                    self.call(self.callbacks)
                    self.save_if(self.checkpoint_every and state.step % self.checkpoint_every == 0)
                else:
                    ended = True
            # Told to stop: after the last batch as well? Samplers may draw once more at the end, so look for it.
            if not ended and (self.done < self.reader.length() or next(batches, None) is not None):
                break
            if self.done == 0:
                raise ValueError(f"batches is empty in epoch {state.epoch}, after {state.step} steps")
            self.record()
            self.call(self.epoch_callbacks)
            state.epoch, self.done, self.exhausted = state.epoch + 1, 0, False
            self.save_if(not self.checkpoint_every)
        if self.keeper is not None:
            self.keeper.end()
            self.save_if(self.keeper.saved_at != (state.step, state.epoch))
        self.record()

    def begin_epoch(self) -> Iterator[Any]:
        self.reader.set_epoch(self.state.epoch)
        if self.keeper is None:
            return self.reader.epoch()
        return self.keeper.begin_epoch(self.state.epoch, self.done, self.exhausted)

    def step_on(self, group: list[Any]) -> None:
        """One optimizer step on the mean loss of the batches in `group`."""
        state, optimizer, scaler = self.state, self.optimizer, self.accelerator.scaler
        lr = optimizer.param_groups[0].get("lr", math.nan)
        lr = lr.clone() if isinstance(lr, Tensor) else lr
        if not self.manual:
            optimizer.zero_grad()
        results = []
        for i, batch in enumerate(group, 1):
            with nullcontext() if i == len(group) else self.accelerator.no_sync(self.run_step):
                if not self.on_cpu:
                    batch = send_to_device(batch, self.device, non_blocking=self.device.type == "cuda")
                loss, metrics = _loss_and_metrics(self.run_step(batch))
                if loss is not None:
                    if self.look_at_once:
                        _check_finite(loss.item(), state.step + 1)
                    share = loss if len(group) == 1 else loss / len(group)
                    (share if scaler is None else scaler.scale(share)).backward()
                    metrics["loss"] = loss.item() if self.look_at_once else loss.detach()
                results.append(metrics)
        self.manual = loss is None
        if self.manual:
            self.check_manual()
        else:
            if self.clip_grad_norm is not None:
                parameters = [p for param_group in optimizer.param_groups for p in param_group["params"]]
                self.accelerator.clip_grad_norm_(parameters, self.clip_grad_norm)
            self.update.step()
        if self.scheduler is not None and not getattr(self.update, "step_was_skipped", False):
            self.scheduler.step()
        state.step += 1
        self.done += len(group)
        state.metrics = _mean(results)
        state._loss, state._lr = state.metrics.get("loss", math.nan), lr
        self.pending.append({**state.metrics, "lr": lr})
        if state.step % self.log_every == 0:
            self.record()

    def check_manual(self) -> None:
        if self.accumulate > 1 or self.clip_grad_norm is not None or not self.alone:
            raise ValueError(
                "a step that returns no loss updates the model itself, which excludes accumulate, clip_grad_norm and "
                "several processes"
            )

    def record(self) -> None:
        """Add the mean of the pending steps to the history."""
        if self.pending:
            self.read_pending()
            means = {**_mean(self.pending), "lr": self.pending[-1]["lr"]}
            self.state.history.append({"step": self.state.step, "epoch": self.state.epoch, **means})
            self.pending.clear()

    def read_pending(self) -> None:
        """Turn the pending tensors into floats, of all processes: here the GPU is waited for."""
        numbers = [float(value) for entry in self.pending for value in entry.values()]
        if numbers and not self.alone:
            local = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            numbers = self.accelerator.reduce(local, "mean").tolist()
        values = iter(numbers)
        for entry in self.pending:
            entry.update({name: next(values) for name in entry})
        for step, entry in enumerate(self.pending, self.state.step + 1 - len(self.pending)):
            _check_finite(entry.get("loss", 0.0), step)

    def status(self) -> tuple[int, float]:
        """Step and loss for the progress bar, without waiting for a GPU."""
        losses = [self.state._loss, *(record.get("loss") for record in self.state.history[-1:])]
        return self.state.step, next((loss for loss in losses if isinstance(loss, float)), math.nan)

    def call(self, callbacks: Sequence[Callback]) -> None:
        if not callbacks:
            return
        try:
            answers = [callback(self.state) for callback in callbacks]
        except KeyboardInterrupt:
            if not self.saves_when_interrupted:
                raise
            self.interrupted.append(signal.SIGINT)
            return
        for callback, answer in zip(callbacks, answers, strict=True):
            if not (answer is None or isinstance(answer, bool | np.bool_)):
                raise TypeError(f"a callback returns True to stop, or None, got {answer!r} from {callback}")
        stop = any(answers)
        if not self.alone:  # one for all: the others would wait for a process that has stopped
            stop = bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.device), "sum") > 0)
        self.stop = self.stop or stop

    def keep_checkpoints(self, folder: Path, every: int | None, resume: bool) -> None:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.accelerator.scaler}
        parts |= {f"callback {i}": c for i, c in enumerate((*self.callbacks, *self.epoch_callbacks))}
        parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.checkpoint_every = every
        self.keeper = Keeper(folder, self.state.model, parts, self.generators, self.reader, self.accelerator)
        run = self.keeper.restore() if resume else None
        if run is not None:
            self.state.step, self.state.epoch, self.state.history = run["step"], run["epoch"], run["history"]
            self.done, self.exhausted, self.stop = run["done"], run["exhausted"], run["stop"]
            self.pending = run["pending"]

    @property
    def saves_when_interrupted(self) -> bool:
        return self.keeper is not None and self.alone  # several processes would be caught at different steps

    def save_if(self, due: object) -> None:
        if self.keeper is not None and (due or self.interrupted):
            self.read_pending()
            run = {"step": self.state.step, "epoch": self.state.epoch, "history": self.state.history}
            run |= {"done": self.done, "exhausted": self.exhausted, "stop": self.stop, "pending": self.pending}
            self.keeper.save(run)
        if self.interrupted:
            raise KeyboardInterrupt


class _Step(nn.Module):
    def __init__(self, model: nn.Module, step: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Any) -> Any:
        return self.step(self.model, batch)


def _loss_and_metrics(result: Any) -> tuple[Tensor | None, dict[str, Any]]:
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if loss is not None:
        if not isinstance(loss, Tensor) or loss.ndim:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"step must return the loss as a 0-d tensor, (loss, metrics), or None, got {got}")
        if not loss.requires_grad:
            raise ValueError("step returned a loss without a gradient: it does not depend on a trainable parameter")
    if not isinstance(metrics, Mapping):
        raise TypeError(f"step must return its metrics as a dict, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TypeError(f"metric {name!r} must be a number or a 0-d tensor, got {value!r}")
    return loss, {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}


def _mean(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(entries) == 1:
        return dict(entries[0])
    values: dict[str, list[Any]] = {}
    for entry in entries:
        for name, value in entry.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}")
