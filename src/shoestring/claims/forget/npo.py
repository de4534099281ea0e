"""NPO against gradient ascent, with and without rows to retain: a language model forgets the book of Esther."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.claims.forget import _esther

CLAIM = (
    "Gradient ascent forgets and then collapses, NPO exponentially more slowly; with a loss on rows to retain, NPO has "
    "a better trade-off than ascent with or without one (TOFU Forget10, from memory: utility of GA, GradDiff and KL is "
    "about 0 where they forget, of NPO+RT above 0.5)."
)
RULE = (
    "Utility is the perplexity of other books, on documents never seen. partly: after all steps at the higher rate "
    "NPO's is below GA's for every seed, with Esther at least at the perplexity of text never seen in both. holds: "
    "besides, each arm at its own best rate and stopped where Esther has just that perplexity, NPO+RT's is below GA's "
    "and below GradDiff's in the mean over seeds. Otherwise: not at this scale."
)
ARMS: dict[str, tuple[str, str | None]] = {
    "GradDiff": ("ga", "nll"),
    "NPO+RT": ("npo", "nll"),
    "GA": ("ga", None),
    "NPO": ("npo", None),
}
RATES = (4e-4, 8e-4)
STEPS, EVERY, BATCH = 12, 4, 3
OTHERS, ESTHER = "perplexity of other books", "perplexity of Esther"
STOPPED = "stopped as if never seen"

Look = tuple[float, float, float]  # perplexities: Esther, other books of validation and of test


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    steps = EVERY if fast else STEPS
    rates = RATES[1:] if fast else RATES
    runs = [(arm, rate, seed, steps) for arm in ARMS for rate in rates for seed in range(seeds)]
    found = dict(zip(runs, run_all(train, runs, progress, "runs", processes=1 if fast else None), strict=True))
    level = _never_seen()
    start = found[runs[0]][0][0]
    rows = [Row.of("original", ESTHER, [start[0]]), Row.of("original", OTHERS, [start[2]])]
    rows.append(Row.of("Esther never seen", ESTHER, [level]))
    chosen = {}
    for arm in ARMS:
        for rate in rates:
            ends = [found[arm, rate, seed, steps] for seed in range(seeds)]
            setting = f"rate {rate:g}, {steps} steps"
            rows.append(Row.of(arm, ESTHER, [looks[-1][0] for looks, _ in ends], setting=setting))
            rows.append(Row.of(arm, OTHERS, [looks[-1][2] for looks, _ in ends], setting=setting))
            rows.append(
                Row.of(arm, "exact continuations of Esther", [100 * s for _, s in ends], unit="%", setting=setting)
            )
        stops = {rate: stopped(found[arm, rate, 0, steps][0], level) for rate in rates}
        chosen[arm] = min(rates, key=lambda rate: (stops[rate][0] < 0.99 * level, stops[rate][1]))
        best = [stopped(found[arm, chosen[arm], seed, steps][0], level) for seed in range(seeds)]
        rows.append(Row.of(arm, ESTHER, [look[0] for look in best], setting=STOPPED))
        rows.append(Row.of(arm, OTHERS, [look[2] for look in best], setting=STOPPED))
    progress(1.0, "done")
    return Result(
        slug="npo",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data=_esther.DATA,
        note=f"NPOTrainer in every arm: AdamW, constant rate, {BATCH} rows a step, {steps} steps; beta 0.1 and both "
        "weights 1, the paper's. Training again takes 33 minutes; its stand-in is the perplexity of documents of "
        f"Esther that were never seen, {level:.1f}. A look every {EVERY} steps; where Esther reaches that level lies "
        "between two looks, by interpolating logarithms. Rate of the stopped runs: lowest perplexity there of "
        f"validation documents, seed 0, of {', '.join(f'{r:g}' for r in rates)}: "
        + ", ".join(f"{arm} {rate:g}" for arm, rate in chosen.items())
        + ". A seed is an order of the rows and of their partners. Seen before the rule was written: the card's "
        "expectations, and ten runs of seed 42 at 2e-4 and 6e-4 (GA had 5e7 for Esther and 4e5 for the others after 12 "
        "steps of 6e-4, NPO 207 and 52; with beta 0.006, chosen for the length of the documents, NPO went the way of "
        "GA). These set steps and rates; NPO+RT with beta 0.1 was not among them. Seen after it: one run an arm at the "
        "lower rate with batches of 4, from which nothing was changed but, for time, the batch.",
    )


def verdict(rows: Sequence[Row]) -> str:
    def of(arm: str, metric: str, setting: str) -> Row:
        return find(rows, arm, metric, setting)

    level = find(rows, "Esther never seen", ESTHER).value
    last = [row.setting for row in rows if row.method == "GA" and row.setting.startswith("rate")][-1]
    forgot = all(min(of(arm, ESTHER, last).seeds) >= level for arm in ("GA", "NPO"))
    slower = all(n < g for n, g in zip(of("NPO", OTHERS, last).seeds, of("GA", OTHERS, last).seeds, strict=True))
    if not (forgot and slower):
        return "not at this scale"
    stop = {arm: of(arm, OTHERS, STOPPED).value for arm in ARMS}
    reached = min(of("NPO+RT", ESTHER, STOPPED).seeds) >= 0.99 * level
    return "holds" if reached and stop["NPO+RT"] < min(stop["GA"], stop["GradDiff"]) else "partly"


def stopped(looks: Sequence[Look], level: float) -> Look:
    """The perplexities where Esther's first reaches the level, between two looks; the last look if it never does."""
    for before, after in pairwise(looks):
        if after[0] >= level:
            share = (math.log(level) - math.log(before[0])) / (math.log(after[0]) - math.log(before[0]))
            e, v, t = (
                math.exp((1 - share) * math.log(b) + share * math.log(a)) for b, a in zip(before, after, strict=True)
            )
            return e, v, t
    return looks[-1]


def train(arm: str, rate: float, seed: int, steps: int) -> tuple[list[Look], float]:
    """What was seen at every look, and the share of exact continuations at the end."""
    from shoestring import zoo
    from shoestring.forget.npo import NPOTrainer

    model = zoo.load("tiny-gpt")
    forget_loss, retain_loss = ARMS[arm]
    thin = 1 if steps == STEPS else 3
    looked_at = (("known", 12 * thin), ("validation", 50 * thin), ("test", 25 * thin))
    known, valid, test = (_esther.documents(*which) for which in looked_at)

    def look() -> Look:
        esther, validation, tested = (_esther.perplexity(model, texts) for texts in (known, valid, test))
        return esther, validation, tested

    options = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": BATCH // thin, "seed": seed}
    with _esther.quiet_arguments(**options) as arguments:
        trainer = NPOTrainer(
            model,
            arguments,
            forget_dataset=_esther.rows(_esther.documents("known")),
            retain_dataset=_esther.rows(_esther.documents("retain", 20 * thin)) if retain_loss else None,
            forget_loss=forget_loss,  # type: ignore[arg-type]
            retain_loss=retain_loss or "nll",  # type: ignore[arg-type]
        )
        looks = _esther.looks_while_training(trainer, look, EVERY)
    return looks, _esther.continued(model, _esther.documents("known", 4 * thin))  # type: ignore[return-value]


def _never_seen() -> float:
    from shoestring import zoo

    return _esther.perplexity(zoo.load("tiny-gpt"), _esther.documents("unseen"))
