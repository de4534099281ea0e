"""The checkpoints of a training run, and going on from one as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from shoestring._batches import Reader
from shoestring._checkpoint import random_state, read, set_random_state, write


class Keeper:
    """The checkpoints of one run in one folder: ``step-<number>.safetensors``, the last two of them.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist.
    model : nn.Module
    parts : mapping of str to object
        Optimizer, scheduler and whatever else has ``state_dict`` and ``load_state_dict``.
    generators : sequence of torch.Generator
        Saved beside the global ones of Python, numpy and torch.
    reader : Reader
        The batches, which are to come in the same order.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        parts: Mapping[str, Any],
        generators: Sequence[torch.Generator],
        reader: Reader,
        accelerator: Accelerator,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"checkpoint must be a folder, got the file {folder}")
        self.folder, self.model, self.parts, self.generators = folder, model, parts, generators
        self.reader, self.accelerator = reader, accelerator
        self.device = next(model.parameters()).device
        self.saved_at: tuple[int, int] | None = None  # step and epoch
        self._epoch_random: Any = None  # the random generators of this process where the epoch began
        self._restored: Any = None  # the same and where they were at the checkpoint, until the run goes on from it
        self._kept: list[Path] = []

    def save(self, run: Mapping[str, Any]) -> None:
        """Write a checkpoint with `run`, which has the keys step, epoch, done (batches of the epoch) and others."""
        now = random_state(self.device, self.generators)
        own = {"now": now, "epoch": self._epoch_random if run["done"] else now}
        random = gather_object([own])  # one of every process
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*.safetensors"):  # half written by a process that was killed
                left.unlink(missing_ok=True)
            path = self.folder / f"step-{run['step']:010d}.safetensors"
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            write(path, {"run": run, "random": random, "model": self.model.state_dict(), "parts": parts})
            self._kept = [*(kept for kept in self._kept if kept != path), path][-2:]
            for old in set(self._found()) - set(self._kept):
                old.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.saved_at = run["step"], run["epoch"]

    def restore(self) -> dict[str, Any] | None:
        """Load the newest checkpoint that can be read, return its `run`; None if there is none."""
        broken = None
        for path in self._found():
            try:
                saved = read(path)
            except ValueError as error:
                broken = broken or error
                warnings.warn(f"{error}. Trying the one before.", stacklevel=4)
                continue
            self._load(saved, path)
            self._restored = saved["random"][self.accelerator.process_index % len(saved["random"])]
            self._kept = [path]
            run: dict[str, Any] = saved["run"]
            self.saved_at = run["step"], run["epoch"]
            return run
        if broken:
            raise broken
        return None

    def begin_epoch(self, epoch: int, done: int, exhausted: bool) -> Iterator[Any]:
        """The batches of this epoch that are not done."""
        if self._restored is None:
            self._epoch_random = random_state(self.device, self.generators)
            return self.reader.epoch()
        # The order of the batches comes from the generators as they were at the epoch's start, all else goes on from
        # where they were at the checkpoint.
        start, now = (partial(self._put_back, self._restored[name]) for name in ("epoch", "now"))
        self._epoch_random, self._restored = self._restored["epoch"], None
        if exhausted:  # a sampler that was asked for more than it had may have drawn once more
            now()
            return iter(())
        start()
        # A new DataLoader draws a seed for its workers. Persistent workers had drawn it before their second epoch.
        drawn = epoch > 0 and getattr(self.reader.batches, "persistent_workers", False)
        return self.reader.rest_of_epoch(done, start if drawn else None, now if done else None)

    def end(self) -> None:
        """If the run was over when it was restored: leave the generators as it had left them."""
        if self._restored is not None:
            self._put_back(self._restored["now"])

    def _put_back(self, random: Mapping[str, Any]) -> None:
        set_random_state(random, self.device, self.generators)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), key=lambda path: path.name, reverse=True)

    def _load(self, saved: Mapping[str, Any], path: Path) -> None:
        """Put model and parts into the state of the checkpoint, or raise ValueError before anything has changed."""
        if set(saved["parts"]) != set(self.parts):
            raise ValueError(
                f"checkpoint {path} is of another run: it has the states of {sorted(saved['parts'])}, "
                f"this run needs {sorted(self.parts)}"
            )
        generators = len(saved["random"][0]["now"]["generators"])
        if generators != len(self.generators):
            raise ValueError(
                f"checkpoint {path} is of another run: it has {generators} random generators (of the DataLoader and "
                f"in generators), this run has {len(self.generators)}"
            )
        _check_model(self.model, saved["model"], path)
        for name, part in self.parts.items():
            try:
                part.load_state_dict(saved["parts"][name])
            except (ValueError, KeyError) as error:
                raise ValueError(f"the {name} in checkpoint {path} does not fit: {error}") from error
            if isinstance(part, torch.optim.Optimizer):
                _keep_dtypes(part, saved["parts"][name])
        self.model.load_state_dict(saved["model"])
        if len(saved["random"]) != self.accelerator.num_processes:
            warnings.warn(
                f"checkpoint {path} was written by {len(saved['random'])} processes and is resumed by "
                f"{self.accelerator.num_processes}: random draws in the step will be others",
                stacklevel=5,
            )


def _check_model(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Names, shapes and dtypes, all before anything is loaded: `load_state_dict` would load what fits, then raise."""
    own = model.state_dict()
    if names := sorted(set(own) ^ set(state)):
        raise ValueError(f"checkpoint {path} is of another model: only one of the two has {', '.join(names[:3])}")
    for name, value in own.items():
        if isinstance(value, Tensor) and (value.shape, value.dtype) != (state[name].shape, state[name].dtype):
            raise ValueError(
                f"checkpoint {path} is of another model: {name} is {tuple(state[name].shape)} {state[name].dtype} "
                f"there, {tuple(value.shape)} {value.dtype} here"
            )


def _keep_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put back the saved state's dtypes: torch casts it to that of the parameters (float32 moments to bfloat16)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state["state"].items():
        if not (isinstance(index, int) and index < len(parameters) and isinstance(saved, Mapping)):
            continue  # an optimizer with a layout and a load_state_dict of its own
        loaded = optimizer.state[parameters[index]]
        for name, value in saved.items():
            now = loaded.get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                loaded[name] = value.to(now.device)
