"""shoestring compare: every method of a room that fits the data, on the same rows, in one table and one plot."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from shoestring.cli import _classify, _compare_learn, _console, _rows


def run(
    room: Annotated[str, typer.Argument(metavar="ROOM", show_default=False, help="classify or learn.")],
    data: _rows.Data,
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
    tasks: Annotated[
        int | None,
        typer.Option("--tasks", min=1, metavar="N", help="learn: steps in which classes come.", show_default="5"),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="How many draws of labels, or orders of classes.")
    ] = 3,
    plot: Annotated[Path, typer.Option("--plot", metavar="PNG", help="Where the plot is written.")] = Path(
        "compare.png"
    ),
    strict: _rows.Strict = False,
    device: _rows.Device = "cpu",
    as_json: _console.Json = False,
) -> None:
    """Compare the methods of a room that fit what DATA has, beside references of scikit-learn.

    classify: in every draw some labels are hidden (--shots or --held-out); all methods see the same others and are
    scored on the hidden ones. Settings are fixed, defaults (gbnn: 100 units, the projected solver): nothing is tuned
    for anyone. What does not fit is named, with the reason.

    learn: classes come a few at a time (--tasks), in another order for each seed, and no learner sees a row again.
    After every task all classes so far are asked, on rows held out.

    \b
    Examples:
      shoestring compare learn photos/ --tasks 5
      shoestring compare classify customers.csv --label segment --drop id
      shoestring compare classify photos.npz --shots 5
      shoestring compare classify ages.csv --label age --ordered --shots 20 --seeds 5
    """
    import numpy as np

    from shoestring.report import bars

    if room not in ("classify", "learn"):
        raise _console.UsageError(f"room must be classify or learn, got {room!r}")
    if plot.suffix.lower() != ".png":
        raise _console.UsageError(f"--plot must end in .png, got {plot}")
    if room == "learn":
        given = {
            "--drop": drop, "--shots": shots, "--unlabelled": unlabelled, "--domains": domains, "--classes": classes,
            "--distances": distances, "--ordered": ordered,
        }  # fmt: skip
        for option, value in given.items():
            if value:
                raise _console.UsageError(f"{option} is for classify, not for learn")
        _compare_learn.compare(
            data, split, label=label, content=content, backbone=backbone, tasks=tasks or 5, held_out=held_out,
            seeds=seeds, plot=plot, strict=strict, device=device, as_json=as_json,
        )  # fmt: skip
        return
    if tasks is not None:
        raise _console.UsageError("--tasks is for learn, not for classify")
    problem = _classify.read(
        data, split, label=label, content=content, drop=drop, domains=domains, unlabelled=unlabelled,
        distances=distances, ordered=ordered, classes=classes, backbone=backbone, strict=strict, device=device,
    )  # fmt: skip
    if len(np.unique(problem.y[problem.given])) < 2:
        raise ValueError(f"{data} must have labels of two classes at least, to be scored by")
    draws = [_classify.hide(problem, shots, held_out, seed) for seed in range(seeds)]
    reasons = {slug: _classify.unfit(slug, draws[0]) for slug in _classify.SLUGS}
    names = [*(slug for slug in _classify.SLUGS if not reasons[slug]), *_classify.REFERENCES]
    figures: dict[str, dict[str, Any]] = {}
    with _console.progress("comparing") as report:
        for i, name in enumerate(names):
            results = []
            for seed, draw in enumerate(draws):
                report((i + seed / seeds) / len(names), f"{name}, draw {seed + 1} of {seeds}")
                results.append(_score(name, draw, seed))
            accuracies, seconds, said = zip(*results, strict=True)
            figures[name] = {
                "accuracy": float(np.mean(accuracies)),
                "spread": float(np.std(accuracies)),
                "draws": accuracies,
                "seconds": float(np.median(seconds)),
                "warnings": sorted(set().union(*said)),
            }
    figures = dict(sorted(figures.items(), key=lambda item: -item[1]["accuracy"]))
    bars(
        {name: (100 * f["accuracy"], 100 * f["spread"]) for name, f in figures.items()},
        x_label="accuracy on hidden labels, %",
        title=Path(data).name,
        stressed=_classify.SLUGS,
        png=plot,
    )
    left_out = {slug: reason for slug, reason in reasons.items() if reason}
    shown, scored_rows = int(draws[0].shown.sum()), int((draws[0].given & ~draws[0].shown).sum())
    if as_json:
        _console.print_json(
            {
                "labels_shown": shown,
                "rows_scored": scored_rows,
                "methods": figures,
                "do_not_fit": left_out,
                "plot": str(plot),
            }
        )
        return
    _console.say(f"{shown:,} labels shown, {scored_rows:,} rows scored, {seeds} draws.\n")
    _console.print_table(
        ["method", "accuracy %", "± s.d.", "seconds"],
        [
            [name, f"{100 * f['accuracy']:.1f}", f"{100 * f['spread']:.1f}", f"{f['seconds']:.2f}"]
            for name, f in figures.items()
        ],
        right=range(1, 4),
    )
    for name, f in figures.items():
        for text in f["warnings"]:
            _console.say(f"{name} warns: {text}")
    if left_out:
        _console.say("\n" + "\n".join(f"{slug} {reason}" for slug, reason in left_out.items()))
    _console.say(f"\nThe plot: {plot}")


def _score(name: str, draw: _classify.Problem, seed: int) -> tuple[float, float, set[str]]:
    """Accuracy on the hidden labels, seconds, and what was warned of."""
    hidden = ~draw.shown
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _ = _classify.answers(name, draw, seed)
    seconds = time.perf_counter() - start
    right = (found == draw.y[hidden])[draw.given[hidden]]
    return float(right.mean()), seconds, {str(warning.message).split("\n")[0] for warning in caught}
