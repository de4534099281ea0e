"""shoestring classify: label the rows of a table that have no label."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoestring.cli import _classify, _console, _rows


def run(
    data: _rows.Data,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="SLUG",
            show_default=False,
            help=", ".join(_classify.SLUGS),
            autocompletion=_console.completer(_classify.SLUGS),
        ),
    ],
    split: _rows.Split = "all",
    label: _rows.Label = None,
    content: _rows.Content = None,
    drop: _classify.Drop = None,
    shots: _classify.Shots = None,
    held_out: _classify.HeldOut = 0.25,
    unlabelled: _classify.Unlabelled = None,
    domains: _classify.Domains = None,
    classes: _classify.Classes = None,
    distances: _classify.Distances = None,
    ordered: _classify.Ordered = False,
    backbone: _classify.Backbone = None,
    seed: _classify.Seed = 0,
    out: _rows.Out = None,
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Label the rows of DATA that have none, with one method of the room: name, label, probability.

    DATA is a table (numbers, and text of few values, one column each), features, or images or texts, which go through a
    frozen encoder. Rows with an empty label are labelled. If every row has one, a share of the labels is hidden, and
    the accuracy on it is told on stderr.

    \b
    Examples:
      shoestring classify customers.csv --label segment --drop id --method gbnn
      shoestring classify photos.npz --method transductive-clustering --shots 5
      shoestring classify ages.csv --label age --ordered --method loki
      shoestring classify visits.csv --domains clinic --classes 4 --method latent-label-shift
    """
    import numpy as np

    if method not in _classify.SLUGS:
        raise _console.UsageError(
            f"--method must be one of {', '.join(_classify.SLUGS)}, got {method!r}"
            f"{_console.did_you_mean(method, _classify.SLUGS)}"
        )
    problem = _classify.read(
        data, split, label=label, content=content, drop=drop, domains=domains, unlabelled=unlabelled,
        distances=distances, ordered=ordered, classes=classes, backbone=backbone, strict=strict, device=device,
    )  # fmt: skip
    if shots is not None or problem.given.all():
        problem = _classify.hide(problem, shots, held_out, seed)
    reason = _classify.unfit(method, problem)
    if reason:
        raise ValueError(f"{method} {reason}")
    found, probability = _classify.answers(method, problem, seed)
    hidden = np.flatnonzero(~problem.shown)
    rows: list[dict[str, Any]] = [
        {"name": problem.names[i], "label": answer, "probability": p}
        for i, answer, p in zip(
            hidden,
            found.tolist(),
            [""] * len(hidden) if probability is None else probability.round(4).tolist(),
            strict=True,
        )
    ]
    scored = problem.given[hidden]
    accuracy = float((found == problem.y[hidden])[scored].mean()) if scored.any() else None
    if as_json:
        _console.print_json(
            {"method": method, "labels_shown": int(problem.shown.sum()), "accuracy": accuracy, "rows": rows}
        )
        return
    _rows.write_labels(rows, out)
    typer.echo(f"{len(rows):,} rows labelled from {int(problem.shown.sum()):,} labels", err=True)
    if accuracy is not None:
        typer.echo(f"accuracy {accuracy:.3f} on the {int(scored.sum()):,} rows whose labels were hidden", err=True)
