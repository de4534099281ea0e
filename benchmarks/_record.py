"""Keep what a benchmark measured, for the figures in README and docs (scripts/figures.py)."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shoestring._files import atomic_path
from shoestring.claims import machine, versions

FOLDER = Path(__file__).parent / "recorded"


def record(name: str, figures: dict[str, Any]) -> None:
    """Write ``benchmarks/recorded/<name>.json``."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    whole = {**figures, "date": date, "machine": machine(), "versions": versions()}
    FOLDER.mkdir(exist_ok=True)
    with atomic_path(FOLDER / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
