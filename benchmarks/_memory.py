"""Peak memory of a piece of work, by a process of its own (Linux)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Highest resident size of this process since it began, or since `forget_peak`. (ru_maxrss is inherited.)"""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """From here on `peak_mb` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(script: str, *arguments: object) -> Any:
    """What ``python SCRIPT --peak ARGUMENTS`` prints, read as JSON."""
    command = [sys.executable, script, "--peak", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def added_mb(script: str, forms: tuple[str, ...], size: int) -> dict[str, float]:
    """MB that each form of the work adds at its peak, in a process of its own, printed too."""
    added = {form: in_a_process(script, form, size) for form in forms}
    print(f"memory added, batch {size}: {', '.join(f'{form} {mb:.0f} MB' for form, mb in added.items())}")
    return added
