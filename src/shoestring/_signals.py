"""Ctrl-C that waits for the end of a step that must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back a KeyboardInterrupt until the block has ended.

    Outside the main thread, where Python delivers no signals, and where no Python handler is installed, it does
    nothing.

    Examples
    --------
    >>> with uninterrupted():
    ...     total = sum(range(10))
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
