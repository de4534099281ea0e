"""Many short training runs on all cores: grids of learning rates, several seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from shoestring.claims import Progress

T = TypeVar("T")


def run_all(
    work: Callable[..., T],
    runs: Sequence[tuple[Any, ...]],
    progress: Progress,
    text: str,
    *,
    processes: int | None = None,
) -> list[T]:
    """``[work(*run) for run in runs]``, one thread a run, so that figures do not depend on the number of processes.

    Parameters
    ----------
    work : callable
        A function of a module; its arguments and its answer travel between processes.
    runs : sequence of tuple
        Longest runs first, for the cores to end together.
    progress, text
        Called after every run with the share done, 0 to 1, and `text` with the count.
    processes : int, optional
        Default: a process a core. 1: in this process, as the fast forms do.
    """
    processes = min(processes or os.cpu_count() or 1, len(runs))
    if processes <= 1:
        return _one_by_one(work, runs, progress, text)
    with ProcessPoolExecutor(processes, get_context("spawn"), _one_thread) as pool:
        futures = [pool.submit(work, *run) for run in runs]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()  # its error, at once
                progress(1 - len(pending) / len(runs), f"{text} {len(runs) - len(pending)}/{len(runs)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _one_by_one(work: Callable[..., T], runs: Sequence[tuple[Any, ...]], progress: Progress, text: str) -> list[T]:
    threads = torch.get_num_threads()
    answers = []
    try:
        torch.set_num_threads(1)
        for number, run in enumerate(runs, 1):
            answers.append(work(*run))
            progress(number / len(runs), f"{text} {number}/{len(runs)}")
    finally:
        torch.set_num_threads(threads)
    return answers


def _one_thread() -> None:
    torch.set_num_threads(1)
