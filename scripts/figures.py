"""Fill the figures into README.md and docs/*.md from what was recorded; no figure there is typed by hand.

    python scripts/figures.py [--check]

A block ``<!-- begin: NAME -->`` to ``<!-- end: NAME -->`` is replaced by what the function of that name makes of the
catalogue, of benchmarks/recorded/*.json (`make bench`; `shoestring demo --json` for demo.json) and of
src/shoestring/claims/results/*.json (`make claims`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoestring import zoo
from shoestring.catalogue import ROOMS, card, list_methods
from shoestring.claims import Result, measurable, recorded

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- begin: (.+?) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def demo() -> str:
    told = _recorded("demo")
    gone = told["forgotten"]
    rows = [
        [name, *(f"{100 * m[k]:.1f}" for k in ("A_AUC", "A_Avg", "A_Last")), f"{m['seconds']:.1f}"]
        for name, m in told["methods"].items()
    ]
    rows.append(["Ridge, all data at once", "", "", f"{100 * told['joint_ridge_A_Last']:.1f}", ""])
    table = _table(["method", "A_AUC %", "A_Avg %", "A_Last %", "seconds"], rows)
    return f"""{table}
{told["images"]:,} real images, {told["images_per_second"]:.0f} a second through a frozen EfficientNet-Lite0 on
{told["machine"]["cores"]} cores; {told["seconds"]:.0f} s in all. A_AUC: mean accuracy along the stream, A_Avg: at the ends of
its five tasks, A_Last: at the end. Then it forgets the {gone["rows"]:,} rows of {gone["class"]!r} in {gone["seconds"]:.2f} s: the
weights differ from never having seen them by {gone["relative_difference_of_weights"]:.0e} (relative), and
{100 * gone["equal_answers"]:.2f} % of the answers are equal.
"""


def numbers() -> str:
    start, checks = _recorded("startup"), _recorded("conformance")
    counts = [*checks["estimators"].values()]
    passed, skipped = (sum(count.get(what, 0) for count in counts) for what in ("passed", "skipped"))
    failed = sum(count.get("failed", 0) + count.get("xfail", 0) for count in counts)
    return f"""`import shoestring` {start["import shoestring"]:.2f} s, `shoestring list` {start["shoestring list"]:.2f} s, one command
to the first result. scikit-learn {checks["scikit-learn"]}'s conformance checks over {len(counts)} estimators: {passed} passed,
{failed} failed, none expected to fail ({skipped} skipped: scikit-learn skips its array-API check unless asked).
"""


def methods() -> str:
    rows = []
    for slug in list_methods():
        row = card(slug)
        if row.status != "planned":
            result = recorded(slug)
            assert result is not None, slug
            rows.append([f"`{slug}`", row.summary, ", ".join(row.without), result.verdict, f"{result.seconds:.0f}"])
    planned = len(list_methods()) - len(rows)
    return (
        _table(["method", "does", "without", "its claim, measured here", "seconds"], rows)
        + f"\n{planned} more are planned, in rooms named {', '.join(ROOMS)}: "
        "[all of them](docs/methods.md), or `shoestring list`.\n"
    )


def all_methods() -> str:
    parts = []
    for room, flow in ROOMS.items():
        rows = [
            [f"`{slug}`", card(slug).summary, ", ".join(card(slug).without), card(slug).arxiv, _verdict(slug)]
            for slug in list_methods(room=room)
        ]
        header = ["method", "does", "without", "arXiv", "claim"]
        parts.append(f"## {room}\n\n{flow.replace('->', '→').capitalize()}.\n\n{_table(header, rows)}")
    return "\n".join(parts)


def claims() -> str:
    results = [result for slug in measurable() if (result := recorded(slug))]
    rows = [[f"`{r.slug}`", r.verdict, f"{r.seconds:.0f}", r.data, r.date[:10]] for r in results]
    return _table(["method", "verdict", "seconds", "data", "measured on"], rows)


def claim(slug: str) -> str:
    result = recorded(slug)
    assert result is not None, slug
    return (
        f"**The paper.** {result.claim}\n\n{_figures(result)}\n**Verdict: {result.verdict}.** {result.rule}\n\n"
        f"{result.data}; {result.seconds:.0f} s on {result.machine['cores']} cores. {result.note}\n"
    )


# Room: (method of the catalogue, setting, metric, the arm that is the method, arms it is compared with, setting of "dense").
COMPARED = {
    "compress": [
        (
            "udfc",
            f"{net}, weight decay: {how}",
            "accuracy",
            arm,
            ("plain", "merging"),
            f"{net}, weight decay",
        )
        for net in ("4 convolutions", "residual blocks")
        for how in ("20 %", "30 % and 6 bits")
        for arm in ("UDFC", "UDFC, non-negative")
    ]
    + [
        ("flap", ratio, "perplexity", arm, ("Wanda-sp", "magnitude-sp"), "")
        for ratio in ("20%", "50%")
        for arm in ("FLAP AL-AM", "FLAP UL-UM")
    ]
    + [
        (
            "pdp",
            f"{share} sparse",
            "accuracy",
            "PDP",
            ("gradual magnitude", "gradual, straight-through", "one-shot magnitude"),
            "",
        )
        for share in ("95%", "98%")
    ]
    + [
        ("nm-decay", pattern, "accuracy", "mask decay (B)", ("SR-STE", "one-shot magnitude"), "")
        for pattern in ("1:16", "1:32")
    ]
    + [
        ("sortednet", net, f"accuracy at {size}", "SortedNet, g = 1", ("trained alone", "ordinary, cut down"), net)
        for net in ("CNN, width", "MLP, width")
        for size in ("2/8", "4/8")
    ],
}


def compared(room: str) -> str:
    """The methods of a room beside what one would do otherwise, in one table."""
    rows = []
    for slug, setting, metric, arm, others, dense in COMPARED[room]:
        result = recorded(slug)
        assert result is not None, slug
        found = {(r.setting, r.method, r.metric): r for r in result.rows}
        own = found[setting, arm, metric]
        full = found.get((dense, "dense", metric)) or found.get((dense, "ordinary, cut down", "accuracy at 8/8"))
        assert full is not None, slug
        what = f"{setting}, {metric.split()[-1]}" if slug == "sortednet" else setting
        told = [f"{other} {found[setting, other, metric].value:.1f}" for other in others]
        unit = f"{metric.split()[0]} {own.unit}".strip()
        rows.append([f"`{slug}`", what, unit, f"{full.value:.1f}", f"{arm}: {own.value:.1f}", "; ".join(told)])
    header = ["method", "setting", "figure", "dense", "here", "instead"]
    return _table(header, rows)


def speed(name: str) -> str:
    told = _recorded(name)
    rows = [
        [r["what"], f"{r['ratio']:.2f}", r.get("limit", "").replace("<=", "≤").replace(">=", "≥")]
        for r in told["ratios"]
    ]
    where = f"{told['machine']['cores']} cores, {told['machine']['processor']}, {told['date']}"
    missed = [r["what"] for r in told["ratios"] if not r.get("ok", True)]
    return (
        f"Ratios of one run ({where}); `python benchmarks/{name}.py` prints them on yours.\n\n"
        + _table(["what", "ratio", "limit"], rows)
        + (f"\nOver the limit: {'; '.join(missed)}.\n" if missed else "")
    )


def models() -> str:
    """The zoo's cards."""
    cards = [zoo.card(name) for name in zoo.names()]
    rows = [
        [
            f"`{c['name']}`",
            c["what"],
            f"{c['parameters'] / 1e6:.2f} M, {c['bytes'] / 1e6:.1f} MB",
            f"{c['steps']:,}",
            f"{c['seconds'] / 60:.0f}",
            "; ".join(f"{name} {figure:.3g}" for name, figure in c["quality"].items()),
        ]
        for c in cards
    ]
    header = ["model", "what it is", "size", "steps", "minutes, one thread", "measured"]
    licences = "".join(f"- `{c['name']}`: {c['data']}. {c['licence']}.\n" for c in cards)
    return _table(header, rows) + f"\nData and their licences:\n\n{licences}"


def features() -> str:
    told = _recorded("features")
    pillow = told["with Pillow counted to the bare model"]
    rows = [[name, f"{ratio:.3f}", f"{pillow[name]:.3f}", "≤ 1.05"] for name, ratio in told["overhead"].items()]
    header = [
        "images, one core",
        "CPU / bare model over ready tensors",
        "Pillow's decoding in both",
        "limit (first)",
    ]
    missed = [name for name, ratio in told["overhead"].items() if ratio > 1.05]
    return _table(header, rows) + (f"\nOver the limit: {', '.join(missed)}.\n" if missed else "")


def batch_sizes() -> str:
    told = _recorded("features")
    speeds = told["images per second by batch size"]
    sizes = list(next(iter(speeds.values())))
    rows = [[name, *(str(by_size[size]) for size in sizes)] for name, by_size in speeds.items()]
    difference = told["largest difference of a feature"]
    return (
        _table(["images per second of CPU, by batch size", *sizes], rows)
        + f"\nLargest difference of a feature, folded against the package: {difference:.0e}, of values up to 5.\n"
    )


def scale() -> str:
    told = _recorded("scale")
    model = told["model"]
    rows = [[r["what"], f"{r['ratio']:.2f}", r["limit"].replace("<=", "≤")] for r in told["ratios"]]
    return (
        f"{told['rows']:,} garments through the default encoder into a G-ACIL of width 2,000, on {told['machine']['cores']} "
        f"cores: one process {told['one process s']:.0f} s, Ray {told['ray s']:.0f} s, of which {told['actors start s']:.0f} s "
        f"until its actors have imported torch and loaded the encoder. Ray itself takes "
        f"{told['ray and its first actors start s']:.0f} s the first time.\n\n"
        + _table(["what", "ratio", "limit"], rows)
        + f"\nOf one worker a row takes {told['ms a row of one worker']:.2f} ms; adding up two learners of "
        f"{told['MB a learner']:.0f} MB takes {told['s a merge']:.2f} s. From these, and not measured: {model['rows']:.0e} rows "
        f"on {model['workers']} such workers, in slices of 8,192, take {model['hours']:.0f} hours, nearly all of it in the "
        "encoder. Network and storage are not in it.\n"
    )


def loop() -> str:
    told = _recorded("loop")
    limit = f"≤ {told['limit']:.2f}"
    rows = [
        [
            r["model"],
            f"{r['ms a step by hand']:.2f}",
            f"{r['fit']:.3f}",
            f"{r['with a bar']:.3f}",
            limit if r["limited"] else "",
        ]
        for r in told["ratios"]
    ]
    header = ["model", "ms a step by hand", "fit / by hand", "with the bar", "limit"]
    return _table(header, rows) + f"\nA call of `fit` costs {told['ms a call']:.1f} ms before its first step.\n"


def _figures(result: Result) -> str:
    rows = [
        [
            r.setting,
            r.method,
            r.metric,
            f"{_number(r.value)} ± {_number(r.spread)}",
            r.unit,
            "" if r.paper is None else _number(r.paper),
        ]
        for r in result.rows
    ]
    return _table(["setting", "method", "metric", "mean ± s.d.", "unit", "paper, on its data"], rows)


def _number(x: float) -> str:
    """Two decimals, or two digits of what these would not show."""
    return f"{x:.2f}" if x == 0 or 0.01 <= abs(x) < 1e6 else f"{x:.2g}"


def _verdict(slug: str) -> str:
    result = recorded(slug) if card(slug).status != "planned" else None
    return result.verdict if result else "planned"


def _recorded(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/recorded" / f"{name}.json").read_text())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def fill(text: str) -> str:
    """The page with every block filled anew."""

    def block(match: re.Match[str]) -> str:
        name, _, argument = match[2].partition(" ")
        if match[2] == "all methods":
            made = all_methods()
        else:
            made = globals()[name](*([argument] if argument else []))
        return f"{match[1]}{made}{match[4]}"

    return BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = page.read_text()
        new = fill(old)
        if new != old:
            stale.append(page.name)
            if not check:
                page.write_text(new)
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `make docs`")
    print(
        f"figures: {', '.join(stale) or 'nothing'} {'is stale' if check else 'renewed'}"
        if stale
        else "figures: up to date"
    )


if __name__ == "__main__":
    main()
