"""A clock around what a guider asks besides the diffusion network: classifier, decoder, and their gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

CLOCK = {"seconds": 0.0}


def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose seconds are added to CLOCK."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            CLOCK["seconds"] += time.perf_counter() - began

    return timed
