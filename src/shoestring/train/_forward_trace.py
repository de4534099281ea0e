"""Forward passes without a trace: what more than one look at the same batch must not change."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class ForwardTrace:
    """Several forward passes that leave behind what the first of them would have left.

    That is buffers, such as the running statistics of BatchNorm, and if asked for the state of torch's global random
    generators. An optimizer does not know its model: a hook on all modules finds those that are called, and copies
    their buffers before.

    Parameters
    ----------
    params : iterable of Tensor
        Their GPUs are those whose random generators count.
    restore_rng : bool
        Whether every pass gets the random numbers of the first.
    """

    def __init__(self, params: Iterable[Tensor], restore_rng: bool) -> None:
        self.owner = threading.get_ident()
        self.seen: set[nn.Module] = set()
        self.before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.after = self.before
        self.gpus = sorted({p.device.index for p in params if p.device.type == "cuda"})
        self.random: list[Tensor] = []
        if restore_rng:
            self.random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self.gpus)]

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        with self._watch():
            yield
        self.after = [(module, name, now, now.clone()) for module, name, now in self._now()]

    @contextmanager
    def another_pass(self) -> Iterator[None]:
        known = len(self.before)
        with self._watch(), torch.random.fork_rng(self.gpus) if self.random else nullcontext():
            if self.random:
                torch.set_rng_state(self.random[0])
                for gpu, state in zip(self.gpus, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, gpu)
            yield
        self.after += self.before[known:]  # of modules that the first pass did not call
        self._put_back(self.after)

    def undo(self) -> None:
        self._put_back(self.before)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        hook = register_module_forward_pre_hook(self._see)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, module: nn.Module, args: Any) -> None:
        if module in self.seen or threading.get_ident() != self.owner:
            return
        for part in module.modules():  # also of what is compiled, whose parts call no hooks
            if part not in self.seen:
                self.seen.add(part)
                buffers = [(name, buffer) for name, buffer in part._buffers.items() if buffer is not None]
                self.before += [(part, name, buffer, buffer.clone()) for name, buffer in buffers]

    def _now(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module, name, _, _ in self.before:
            buffer = module._buffers[name]
            if buffer is not None:
                yield module, name, buffer

    def _put_back(self, buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            module._buffers[name] = buffer
