"""Fitness of programs, here or in processes that may be killed; one thread each, so that both find the same."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from joblib import wrap_non_picklable_objects
from threadpoolctl import threadpool_limits

Outcome = tuple[float, str]  # fitness, and why it is -inf ("" if the evaluation went well)


def evaluated(evaluate: Callable[[Any], float], program: Any) -> Outcome:
    """Fitness of a program; whatever goes wrong in `evaluate` becomes -inf and a reason."""
    try:
        fitness = float(evaluate(program))
    except (Exception, SystemExit) as error:
        return -math.inf, f"{type(error).__name__}: {error}"[:200]
    if math.isnan(fitness) or fitness == math.inf:
        return -math.inf, f"evaluate returned {fitness}"
    return fitness, ""


class Here:
    """Evaluates in this process, when the result is asked for."""

    def __init__(self, evaluate: Callable[[Any], float]) -> None:
        self._evaluate = evaluate
        self._waiting: dict[str, Any] = {}
        self._limits = threadpool_limits(1)
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def submit(self, key: str, program: Any) -> None:
        self._waiting[key] = program

    def result(self, key: str) -> Outcome:
        return evaluated(self._evaluate, self._waiting.pop(key))

    def close(self) -> None:
        self._limits.restore_original_limits()
        torch.set_num_threads(self._threads)


class Workers:
    """Evaluates in `n_jobs` processes. One that runs over the time limit is killed, one that dies is replaced."""

    def __init__(self, evaluate: Callable[[Any], float], n_jobs: int, time_limit: float | None) -> None:
        # cloudpickle, for functions of a notebook; only ever between this process and its own workers
        self._evaluate = wrap_non_picklable_objects(evaluate, keep_wrapper=False)
        self._context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        if self._context.get_start_method() == "forkserver":
            # imported once, for all workers; the last one is what the first step of an optimizer imports
            self._context.set_forkserver_preload([__name__, "shoestring.search.programs", "torch._dynamo"])
        self._time_limit = time_limit
        self._queue: deque[tuple[str, Any]] = deque()
        self._done: dict[str, Outcome] = {}
        self._workers: list[_Worker] = []
        try:
            for _ in range(n_jobs):
                self._workers.append(_Worker(self._context, self._evaluate))
        except BaseException:
            self.close()
            raise

    def submit(self, key: str, program: Any) -> None:
        self._queue.append((key, program))
        self._step(0.0)

    def result(self, key: str) -> Outcome:
        while key not in self._done:
            self._step(None)
        return self._done.pop(key)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _step(self, timeout: float | None) -> None:
        """Hand out work, wait for something to happen (or `timeout`), and take it in."""
        for worker in self._workers:
            if worker.ready and worker.key is None and self._queue:
                worker.key, program = self._queue.popleft()
                worker.begun = time.monotonic()
                worker.send(program)
        busy = [w for w in self._workers if w.key is not None]
        if timeout is None and self._time_limit is not None and busy:
            timeout = max(0.0, min(w.begun for w in busy) + self._time_limit - time.monotonic())
        happened = wait([w.pipe for w in self._workers], timeout)  # a pipe also ends with its process
        for i, worker in enumerate(self._workers):
            if worker.pipe in happened:
                self._receive(i, worker)
            elif (
                self._time_limit is not None
                and worker.key is not None
                and time.monotonic() - worker.begun >= self._time_limit
            ):
                self._replace(i, f"over the time limit of {self._time_limit:g} s")

    def _receive(self, i: int, worker: _Worker) -> None:
        try:
            message = worker.pipe.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            if not worker.ready:
                raise RuntimeError(
                    f"a worker ended before its first program (exit code {worker.process.exitcode}): a script that "
                    "uses n_jobs or time_limit must keep its work under `if __name__ == '__main__':`"
                ) from None
            self._replace(i, f"its process ended with exit code {worker.process.exitcode}")
            return
        if isinstance(message, str):
            raise RuntimeError(f"evaluate could not be sent to a worker: {message}")
        if worker.ready:
            self._done[worker.key] = message  # type: ignore[index]
            worker.key = None
        worker.ready = True

    def _replace(self, i: int, reason: str) -> None:
        worker = self._workers[i]
        if worker.key is not None:
            self._done[worker.key] = (-math.inf, reason)
        worker.kill()
        self._workers[i] = _Worker(self._context, self._evaluate)


class _Worker:
    def __init__(self, context: Any, evaluate: Any) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,))
        self.process.start()
        theirs.close()
        self.key: str | None = None
        self.begun = 0.0
        self.ready = False  # the clock starts when its imports are done
        self.send(evaluate)

    def send(self, what: Any) -> None:
        with suppress(ConnectionError):  # it is dead: `wait` will say so
            self.pipe.send(what)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends its workers
    torch.set_num_threads(1)
    with threadpool_limits(1):
        try:
            evaluate = pipe.recv()
        except Exception as error:  # what it needs cannot be imported here
            pipe.send(f"{type(error).__name__}: {error}")
            return
        pipe.send((0.0, ""))
        while True:
            try:
                program = pipe.recv()
            except EOFError:
                return
            pipe.send(evaluated(evaluate, program))
