"""A learner kept in a folder: one safetensors file, and a card that says what it is and what it was taught."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shoestring import __version__
from shoestring._files import atomic_path
from shoestring.learn.g_acil import GACIL, read_metadata

MODEL = "model.safetensors"


def open_state(folder: Path, **same: Any) -> tuple[GACIL, dict[str, Any]]:
    """The learner of a folder and what was noted beside it; arguments and errors as `read_notes`."""
    extra = read_notes(folder, **same)
    return GACIL.load(folder / MODEL), extra


def read_notes(folder: Path, **same: Any) -> dict[str, Any]:
    """What was noted beside the learner of a folder, without loading it.

    Parameters
    ----------
    folder : where `write_state` wrote
    same : what must agree with the notes or the model's parameters, e.g. ``backbone="minilm"``; None agrees with all

    Raises
    ------
    FileNotFoundError
        If there is no state in the folder.
    ValueError
        If the state is of another backbone, buffer or gamma, or its file is damaged.
    """
    if not (folder / MODEL).exists():
        raise FileNotFoundError(f"no learner in {folder}: `shoestring learn DATA --state {folder}` makes one")
    meta = read_metadata(folder / MODEL)
    for name, wanted in same.items():
        have = meta["extra"].get(name, meta["params"].get(name))
        if wanted is not None and wanted != have:
            raise ValueError(f"{folder} was learnt with {name} = {have!r}, not {wanted!r}; give another --state")
    return meta["extra"]


def write_state(folder: Path, model: GACIL, extra: dict[str, Any]) -> None:
    """Replace the folder's learner and its card, the learner first."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / MODEL, extra=extra)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(_card(model, extra))


def note(extra: dict[str, Any], what: str, **more: Any) -> None:
    """Add an entry to the history that the card shows."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    extra.setdefault("history", []).append({"date": now, "what": what, **more})


def _card(model: GACIL, extra: dict[str, Any]) -> str:
    counts = dict(zip(model.classes_.tolist(), model.class_count_.tolist(), strict=True))
    history = "\n".join(
        f"- {entry['date']}: {entry['what']}"
        + "".join(f", {k} {v}" for k, v in entry.items() if k not in ("date", "what"))
        for entry in extra.get("history", [])
    )
    return f"""# A classifier taught with shoestring {__version__}

- Method: G-ACIL (arXiv 2403.15706), `{MODEL}`
- Backbone: {extra.get("backbone") or "none, features were given"}
- Rows learnt and not forgotten: {model.n_samples_seen_:,}; no row is kept
- Classes ({len(counts)}): {", ".join(f"{name} ({count:g})" for name, count in counts.items()) or "none"}

What happened to it:

{history}

```python
from shoestring.learn import GACIL

model = GACIL.load("{MODEL}")
```
"""
