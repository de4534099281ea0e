"""WHP with and without its dictionary against gradient ascent: a language model forgets the book of Esther."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from shoestring.claims import Progress, Result, Row, find
from shoestring.claims._pool import run_all
from shoestring.claims.forget import _esther

CLAIM = (
    "Trained on generic labels, Llama-2-7b-chat no longer continues the Harry Potter books (familiarity 0.29 to 0.007) "
    "while its benchmarks stay almost as they were (ARC-challenge 0.440 to 0.414, PIQA 0.767 to 0.764; from memory)."
)
RULE = (
    "Share of documents of Esther that are continued to the letter for 10 tokens; perplexity of other books, on "
    "documents never seen. partly: with the dictionary, after all steps and for every seed, the share is at most half "
    "of the original's and the perplexity at most a fifth above the original's, while nine in ten of the continuations "
    "stay with the model's own greedy labels. holds: besides, stopped at the first look with at most a tenth of the "
    "continuations, the perplexity is below that of gradient ascent, stopped likewise, in the mean over seeds. "
    "Otherwise: not at this scale."
)
# Names of the book, and names of the same kind that the model knows from others.
NAMES = {
    "Esther": "Hannah",
    "Hadassah": "Hannah",
    "Mordecai": "Joseph",
    "Haman": "Saul",
    "Ahasuerus": "Solomon",
    "Vashti": "Michal",
    "Zeresh": "Leah",
    "Hegai": "Nathan",
    "Hammedatha": "Kish",
    "Agagite": "Hittite",
    "Shushan": "Jerusalem",
    "Jews": "Levites",
    "Jew": "Levite",
    "Purim": "Tabernacles",
}
GA, OWN, PLAIN, FULL = "gradient ascent", "own greedy labels", "WHP, no dictionary", "WHP, dictionary of names"
ARMS: dict[str, tuple[float, dict[str, str] | None] | None] = {
    FULL: (5.0, NAMES),
    PLAIN: (5.0, None),
    OWN: (0.0, None),
    GA: None,
}
RATES = (3e-4, 6e-4)
STEPS, EVERY, BATCH = 12, 4, 4
SHARE, OTHERS, ESTHER = "exact continuations of Esther", "perplexity of other books", "perplexity of Esther"
STOPPED = "stopped at a tenth of the continuations"

Look = tuple[float, float, float, float]  # share of exact continuations; perplexities: Esther, validation, test


def run(fast: bool, progress: Progress, seeds: int | None = None) -> Result:
    seeds = seeds or (1 if fast else 3)
    rates = RATES[1:] if fast else RATES
    processes = 1 if fast else None
    grid = [(arm, rate, 0, fast, None) for arm in ARMS for rate in (rates[-1:] if arm == OWN else rates)]
    first = run_all(train, grid, lambda d, t: progress(0.6 * d, t), "rates", processes=processes)
    found = {(arm, rate, 0): looks for (arm, rate, *_), (looks, _) in zip(grid, first, strict=True)}
    labels = {arm: given for (arm, *_), (_, given) in zip(grid, first, strict=True)}
    start = first[0][0][0]
    chosen = {
        arm: min((rate for a, rate, _ in found if a == arm), key=lambda rate: _order(found[arm, rate, 0]))
        for arm in ARMS
    }
    more = [(arm, rate, seed, fast, labels[arm]) for arm, rate in chosen.items() for seed in range(1, seeds)]
    if more:
        rest = run_all(train, more, lambda d, t: progress(0.6 + 0.4 * d, t), "seeds", processes=processes)
        found |= {(arm, rate, seed): looks for (arm, rate, seed, *_), (looks, _) in zip(more, rest, strict=True)}
    rows = [
        Row.of("original", SHARE, [100 * start[0]], unit="%"),
        Row.of("original", ESTHER, [start[1]]),
        Row.of("original", OTHERS, [start[3]]),
    ]
    for arm, rate in chosen.items():
        runs = [found[arm, rate, seed] for seed in range(seeds)]
        for setting, looks in (("after all steps", [r[-1] for r in runs]), (STOPPED, [stopped(r) for r in runs])):
            rows.append(Row.of(arm, SHARE, [100 * look[0] for look in looks], unit="%", setting=setting))
            rows.append(Row.of(arm, ESTHER, [look[1] for look in looks], setting=setting))
            rows.append(Row.of(arm, OTHERS, [look[3] for look in looks], setting=setting))
    progress(1.0, "done")
    return Result(
        slug="whp",
        claim=CLAIM,
        rule=RULE,
        rows=rows,
        data=_esther.DATA,
        note="Reinforced by one epoch at 3e-4 and batch 8 (the paper has three at 3e-6, of 7B weights); alpha 5; then "
        f"{STEPS} steps of {BATCH} documents, AdamW, a look every {EVERY}. The dictionary has {len(NAMES)} names, "
        "written by hand. Training again takes 33 minutes; documents of Esther that were never seen have a perplexity "
        "of 34.5. Rate: lowest perplexity of validation documents at that look, seed 0, of "
        f"{', '.join(f'{r:g}' for r in rates)}: "
        + ", ".join(f"{arm} {rate:g}" for arm, rate in chosen.items())
        + " (own labels: the higher one). A seed is an order of the documents. Seen before the rule was written: the "
        "card's expectations, one run of WHP without (Esther 1.42, continuations 50 %, others 18.9 to 19.4) and one "
        "with a dictionary (4.93, 0 %, 21.2), nine steps of eight documents at 3e-4, and the runs of GA that npo's "
        "claim names. Seen after it, with nothing changed: one run at 3e-4 of the dictionary and of GA.",
    )


def verdict(rows: Sequence[Row]) -> str:
    def of(arm: str, metric: str, setting: str = "after all steps") -> Row:
        return find(rows, arm, metric, setting)

    share, others = find(rows, "original", SHARE).value, find(rows, "original", OTHERS).value
    forgot = max(of(FULL, SHARE).seeds) <= share / 2 and max(of(FULL, OTHERS).seeds) <= 1.2 * others
    if not (forgot and min(of(OWN, SHARE).seeds) >= 0.9 * share):
        return "not at this scale"
    reached = max(of(FULL, SHARE, STOPPED).seeds) <= share / 10
    return "holds" if reached and of(FULL, OTHERS, STOPPED).value < of(GA, OTHERS, STOPPED).value else "partly"


def stopped(looks: Sequence[Look]) -> Look:
    """The first look with at most a tenth of the continuations; the last one if there is none."""
    return next((look for look in looks if look[0] <= looks[0][0] / 10), looks[-1])


def _order(looks: Sequence[Look]) -> tuple[float, float]:
    """The lower, the better a rate: by what is left above a tenth of the continuations, then by validation."""
    look = stopped(looks)
    return max(look[0] - looks[0][0] / 10, 0.0), look[2]


def train(
    arm: str, rate: float, seed: int, fast: bool, labelled: dict[str, Any] | None
) -> tuple[list[Look], dict[str, Any] | None]:
    """What was seen at every look, and the labels, to be handed to the next seed."""
    from datasets import Dataset

    from shoestring import zoo
    from shoestring.forget.npo import NPOTrainer
    from shoestring.forget.whp import WHPUnlearner

    thin, steps, every, batch = (6, 2, 2, 2) if fast else (1, STEPS, EVERY, BATCH)
    asked, known, valid, test = (
        _esther.documents(which, each * thin)
        for which, each in (("known", 6), ("known", 12), ("validation", 50), ("test", 25))
    )
    model = zoo.load("tiny-gpt")
    rows = _esther.rows(_esther.documents("known", 3 * thin if fast else 1))

    def look(model: Any) -> Look:
        esther, validation, tested = (_esther.perplexity(model, texts) for texts in (known, valid, test))
        return _esther.continued(model, asked), esther, validation, tested

    setting = ARMS[arm]
    if setting is None:
        options = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": batch, "seed": seed}
        with _esther.quiet_arguments(**options) as arguments:
            trainer = NPOTrainer(model, arguments, forget_dataset=rows, forget_loss="ga")
            seen = _esther.looks_while_training(trainer, lambda: look(model), every)
        return seen, None  # type: ignore[return-value]
    alpha, anchors = setting
    whp = WHPUnlearner(model, _esther.tokenizer(), anchors, alpha=alpha, accumulate=1, seed=seed)
    if labelled is None:
        whp.reinforced = _reinforced(fast) if alpha else None
        labelled = whp.label(Dataset.from_list(rows))[:]
    looks = [look(model)]

    def callback(state: Any) -> None:
        if state.step % every == 0:
            looks.append(look(state.model))
            state.model.train()

    whp.batch_size = batch
    whp.finetune(Dataset.from_dict(labelled), lr=rate, max_steps=steps, callbacks=[callback], progress=False)
    return looks, labelled


@cache
def _reinforced(fast: bool) -> Any:
    """The original after one more epoch of Esther; once in a process."""
    from datasets import Dataset

    from shoestring import zoo
    from shoestring.forget.whp import WHPUnlearner

    rows = Dataset.from_list(_esther.rows(_esther.documents("known", 18 if fast else 1)))
    whp = WHPUnlearner(zoo.load("tiny-gpt"), _esther.tokenizer(), accumulate=1)
    return whp.reinforce(rows, epochs=1, lr=3e-4, progress=False)
