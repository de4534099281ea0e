"""Transductive clustering against its limit and its peers, in one run.

1. Five-way tasks a second, 80 points of 512 features, in batches of 100 (`transduce_tasks`, from raw features to
   labels), for each form. The limit is on the default.
2. The same tasks one by one: `transduce`, scikit-learn's KMeans from the support means and its LabelSpreading, on the
   same normalised rows.

One thread everywhere. The tasks are hard (about 60 % of the queries come out right): easy ones take two iterations.

    python benchmarks/transductive_clustering.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from sklearn.cluster import KMeans
from sklearn.semi_supervised import LabelSpreading
from threadpoolctl import threadpool_limits

from shoestring.classify.transductive_clustering import centre_and_normalise, transduce, transduce_tasks

FORMS: dict[str, dict[str, object]] = {
    "SLK-Means (default)": {},
    "K-means": {"laplacian": 0.0},
    "SLK-MS": {"prototype": "mode"},
    "K-modes": {"prototype": "mode", "laplacian": 0.0},
    "soft SLK-Means": {"assignment": "soft"},
}
WAY, QUERIES, WIDTH = 5, 15, 512


def draw(n_tasks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classes of differing spread around random means: support (T, 5, d), labels (T, 5), query (T, 75, d), answers."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(n_tasks, WAY, WIDTH, generator=generator)
    answers = torch.arange(WAY).repeat_interleave(QUERIES)
    spread = 3.5 + torch.rand(n_tasks, WAY, 1, generator=generator)
    support = means + spread * torch.randn(n_tasks, WAY, WIDTH, generator=generator)
    noise = torch.randn(n_tasks, WAY * QUERIES, WIDTH, generator=generator)
    return support, torch.arange(WAY).expand(n_tasks, WAY), means[:, answers] + spread[:, answers] * noise, answers


def main(n_tasks: int, repeats: int, recorded: bool) -> None:
    support, labels, query, answers = draw(n_tasks)

    def batched(options: dict[str, object]) -> torch.Tensor:
        return torch.cat(
            [
                transduce_tasks(s, l, q, **options)
                for s, l, q in zip(support.split(100), labels.split(100), query.split(100), strict=True)
            ]
        )

    print(f"{n_tasks} five-way one-shot tasks, {WAY * (1 + QUERIES)} points of {WIDTH} float32 features, one thread")
    seconds = race(repeats, **{name: partial(batched, options) for name, options in FORMS.items()})
    for name, options in FORMS.items():
        share = (batched(options) == answers).float().mean()
        print(f"    {name:<22} {n_tasks / seconds[name]:7.0f} tasks/s   {100 * share:.1f} % right")
    report("five-way tasks a second, batched, default / 100", n_tasks / seconds["SLK-Means (default)"] / 100, 1.0, True)

    few = min(100, n_tasks)
    rows = centre_and_normalise(torch.cat([support, query], 1)[:few]).numpy()
    y = np.concatenate([np.arange(WAY), np.full(WAY * QUERIES, -1)])
    arrays = [part[:few].numpy() for part in (support, labels, query)]
    peers: dict[str, Callable[[], object]] = {
        "batched, default": lambda: transduce_tasks(support[:few], labels[:few], query[:few]),
        "batched, K-means": lambda: transduce_tasks(support[:few], labels[:few], query[:few], laplacian=0.0),
        "one by one, default": lambda: [transduce(s, l, q) for s, l, q in zip(*arrays, strict=True)],
        "sklearn KMeans": lambda: [KMeans(WAY, init=x[:WAY], n_init=1).fit(x) for x in rows],
        "sklearn LabelSpreading": lambda: [LabelSpreading().fit(x, y) for x in rows],
    }
    seconds = race(repeats, **peers)
    for name in peers:
        print(f"    {name:<22} {few / seconds[name]:7.0f} tasks/s")
    for ours in ("batched, default", "batched, K-means"):
        for peer in ("sklearn KMeans", "sklearn LabelSpreading"):
            print(f"  {f'{ours}: time of {peer} / ours (no limit)':<78} {seconds[peer] / seconds[ours]:7.2f}")
    if recorded:
        measured = {name: round(few / s) for name, s in seconds.items()}
        record("transductive_clustering", {"ratios": RATIOS, "tasks_per_second": measured})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tasks: a look, not a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        main(*((50, 1, False) if arguments.quick else (400, 5, True)))
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
