"""Claims: each paper's own claim, measured again on real data, on the machine of whoever asks.

A claim is one module ``shoestring.claims.<room>.<method>`` with

* ``CLAIM``: what the paper says, in a sentence, with its figure;
* ``RULE``: in words, when we say ``holds``, ``partly`` or ``not at this scale``, written before the run;
* ``run(fast, progress, seeds=None) -> Result``: method and baselines on the same data, seeds and budget;
* ``verdict(rows) -> str``: RULE as code; the recorder calls it, so that no run decides for itself.

``fast`` is the form the test suite runs (under 10 s, fewer rows); its verdict counts for nothing. ``progress(done,
text)`` takes the share done, 0 to 1. Results are JSON files, one a method; those this project recorded are shipped in
``claims/results``.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from shoestring._files import atomic_path
from shoestring.catalogue import PIECES, card, list_methods

__all__ = [
    "RESULTS",
    "VERDICTS",
    "Progress",
    "Result",
    "Row",
    "load_result",
    "measurable",
    "measure",
    "recorded",
    "save_result",
    "title",
]

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("holds", "partly", "not at this scale")
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, of which method, over which seeds.

    Attributes
    ----------
    method : name of the method or baseline
    metric : what the figure is, e.g. "A_Last"
    value, spread : mean and standard deviation over the seeds (spread 0 for one seed)
    unit : "" for a share or a ratio, else e.g. "%", "s"
    seeds : the single figures, one a seed
    setting : under which of several settings, "" if there is one
    paper : the paper's own figure for the same quantity (on its own data), or None
    """

    method: str
    metric: str
    value: float
    spread: float = 0.0
    unit: str = ""
    seeds: tuple[float, ...] = ()
    setting: str = ""
    paper: float | None = None

    @classmethod
    def of(cls, method: str, metric: str, figures: Sequence[float], **more: Any) -> Row:
        """A row from the figures of several seeds.

        Examples
        --------
        >>> Row.of("ridge", "accuracy", [0.25, 0.75])
        Row(method='ridge', metric='accuracy', value=0.5, spread=0.25, ...)
        """
        values = np.asarray(figures, dtype=float)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"figures of {method}, {metric}: expected finite numbers, got {list(figures)}")
        spread = float(values.std()) if np.ptp(values) else 0.0  # not the rounding error of equal figures
        return cls(method, metric, float(values.mean()), spread, seeds=tuple(values.tolist()), **more)


@dataclass
class Result:
    """What a claim's run brings back. `measure` fills in the rest: verdict, seconds, versions, machine, date."""

    slug: str
    claim: str
    rule: str
    rows: list[Row]
    data: str
    note: str = ""
    fast: bool = False
    verdict: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    def value(self, method: str, metric: str, setting: str = "") -> float:
        """The mean figure of one row."""
        return find(self.rows, method, metric, setting).value


def find(rows: Sequence[Row], method: str, metric: str, setting: str = "") -> Row:
    """The one row of this method, metric and setting.

    Raises
    ------
    LookupError
        If there is none, or more than one.
    """
    found = [row for row in rows if (row.method, row.metric, row.setting) == (method, metric, setting)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows of {method!r}, {metric!r}, {setting!r}; expected one")
    return found[0]


def measurable(room: str | None = None) -> list[str]:
    """Everything whose claim can be run: the methods that are ready, and `PIECES`; those of one room, or all."""
    pieces = [name for name, (_, module) in PIECES.items() if room in (None, module.split(".")[2])]
    return [slug for slug in list_methods(room=room) if card(slug).status != "planned"] + pieces


def title(slug: str) -> str:
    """What a claim is about: the title of the paper, or of the piece."""
    return PIECES[slug][0] if slug in PIECES else card(slug).title


def claim_module(slug: str) -> str:
    """Dotted path of the module that measures it.

    Raises
    ------
    ValueError
        If the slug is unknown or the method has no claim yet.
    """
    if slug in PIECES:
        return PIECES[slug][1]
    row = card(slug)
    if row.status == "planned":
        raise ValueError(
            f"{slug} is planned: there is no claim to measure yet; see `shoestring list --room {row.room}`"
        )
    return row.claim_module


def measure(slug: str, *, fast: bool = False, progress: Progress | None = None, seeds: int | None = None) -> Result:
    """Run the claim of a method and complete its result.

    Parameters
    ----------
    slug : str
        One of `measurable`.
    fast : bool, default=False
        The short form.
    progress : callable, optional
        Called with the share done and a word on what is being done.
    seeds : int, optional
        How many seeds, >= 1; by default what the claim says.

    Raises
    ------
    ValueError
        If the slug is unknown or the method has no claim yet.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {seeds}")
    module = import_module(claim_module(slug))
    start = time.perf_counter()
    result: Result = module.run(fast, progress or (lambda done, text: None), seeds)
    result.seconds = round(time.perf_counter() - start, 1)
    result.verdict = module.verdict(result.rows)
    if result.verdict not in VERDICTS:
        raise ValueError(f"the verdict of {slug} must be one of {VERDICTS}, got {result.verdict!r}")
    result.fast = fast
    result.versions, result.machine = versions(), machine()
    result.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return result


def save_result(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Write ``<folder>/<slug>.json``, atomically; the folder is made if need be."""
    path = Path(folder) / f"{result.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
    return path


def load_result(path: str | os.PathLike[str]) -> Result:
    """Read what `save_result` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no file, or it is no result.
    """
    try:
        raw = json.loads(Path(path).read_text())
        rows = [Row(**{**row, "seeds": tuple(row["seeds"])}) for row in raw.pop("rows")]
        return Result(rows=rows, **raw)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a recorded result: {error}") from None


def recorded(slug: str) -> Result | None:
    """The result shipped with this version, or None."""
    path = RESULTS / f"{slug if slug in PIECES else card(slug).slug}.json"
    return load_result(path) if path.exists() else None


def versions() -> dict[str, str]:
    """Of Python, of this library and of what decides its figures."""
    from shoestring import __version__

    found = {"python": platform.python_version(), "shoestring": __version__}
    for name in ("torch", "numpy", "scipy", "scikit-learn", "datasets", "transformers", "diffusers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and memory; no host name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
