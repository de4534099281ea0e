"""shoestring predict: labels for rows, by a learner kept in a folder."""

from __future__ import annotations

from typing import Any

import typer

from shoestring.cli import _console, _rows


def run(
    data: _rows.Data,
    state: _rows.State,
    split: _rows.Split = "all",
    label: _rows.Label = None,
    content: _rows.Content = None,
    out: _rows.Out = None,
    on: _rows.On = None,
    address: _rows.Address = None,
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Label the rows of DATA with what `shoestring learn` taught: name, label, probability.

    Where DATA has labels, the accuracy is told as well (on stderr, so that the CSV stays clean).

    \b
    Examples:
      shoestring predict new-photos/ --state pets
      shoestring predict new-photos/ --state pets --out labels.csv
      shoestring predict new-photos/ --state pets --on ray
      shoestring predict fashion --split "test[:100]" --state garments --json
    """
    _rows.check_on(on, address)
    kept = _rows.open_state(state)
    model = kept.model
    rows = _rows.Rows(
        data, split, content=content, label=label, need_label=False, backbone=kept.notes.get("backbone") or None,
        strict=strict, device=device,
    )  # fmt: skip
    kept.check(backbone=rows.backbone_name or "")
    found: list[dict[str, Any]] = []
    right = asked = 0

    def add(names: list[str], labels: Any, probabilities: Any, given: Any) -> None:
        nonlocal right, asked
        for name, answer, p in zip(names, labels.tolist(), probabilities.tolist(), strict=True):
            found.append({"name": name, "label": answer, "probability": round(p, 4)})
        if given is not None:
            asked += len(given)
            right += sum(a == b for a, b in zip(labels.tolist(), given.tolist(), strict=True))

    with _console.progress(f"predicting {data}") as report:
        if on == "ray":
            from shoestring import scale

            source = scale.Source(data, split, content, label, rows.backbone_name, device)
            scored = scale.predict(source, model, address=address, progress=report)
            rows.skipped += scored.skipped
            add(scored.row_names, scored.labels, scored.probabilities, scored.given)
        else:
            for part in rows.chunks(256, report):
                proba = model.predict_proba(part.X)
                add(part.names, model.classes_[proba.argmax(1)], proba.max(1), part.y)
    rows.print_skipped()
    if not found:
        raise ValueError(f"{data}: not one row could be read")
    accuracy = right / asked if asked else None
    if as_json:
        _console.print_json({"accuracy": accuracy, "skipped": [n for n, _ in rows.skipped], "rows": found})
        return
    _rows.write_labels(found, out)
    if accuracy is not None:
        typer.echo(f"accuracy {accuracy:.3f} on {asked:,} labelled rows", err=True)
