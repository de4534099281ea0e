"""NPO against DPO written independently, and its step against fine-tuning, as ratios in one run; tiny-gpt and Esther.

1. Loss and gradient, float64: NPO's against those of a DPO in plain autograd, whose winner is taken out, over all
   weights and at three distances from the reference. Limit: 1e-6.
2. Time of a step (loss, backward, AdamW): against fine-tuning on the same batch by transformers' own loss, plus one
   forward pass of the reference. Limit: 1.1. With the reference cached, against fine-tuning alone. Limit: 1.1.
3. The same of whole runs: `NPOTrainer.train` against `Trainer.train` plus as many forward passes. Limit: 1.1.

    python benchmarks/npo.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from shoestring import zoo
from shoestring.forget._token_rows import pad_rows
from shoestring.forget.npo import NPOTrainer, npo_loss, sequence_nll
from shoestring.zoo.train import tiny_gpt

SAME, SLOWER = 1e-6, 1.1


def esther(count: int) -> list[dict[str, Any]]:
    """Tokenized documents of the book that the model knows by heart."""
    texts = [text for source, text in tiny_gpt.documents("train") if source == tiny_gpt.MEMORISED][:count]
    ids = zoo.load("tiny-gpt", "tokenizer")(texts, truncation=True, max_length=tiny_gpt.CONTEXT).input_ids
    return [{"input_ids": row} for row in ids]


def dpo_loss(policy: dict[str, Tensor], reference: dict[str, Tensor], beta: float) -> Tensor:
    """Direct preference optimization on log-probabilities of the preferred and the other answer, as in its paper."""
    margin = (policy["preferred"] - reference["preferred"]) - (policy["other"] - reference["other"])
    return -torch.log(torch.sigmoid(beta * margin)).mean()


def log_probability(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each sequence, by gathering from log-softmax; (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = torch.log_softmax(logits, -1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (log_p * batch["attention_mask"][:, 1:]).sum(1)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def equality(count: int) -> None:
    model, batch = zoo.load("tiny-gpt").double(), pad_rows(esther(count))
    with torch.no_grad():
        start = log_probability(model, batch)
    draw = torch.Generator().manual_seed(0)
    for distance in (0.0, 1e-3, 3e-3):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p in moved.parameters():
                p += distance * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        logits = moved(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ours = npo_loss(sequence_nll(logits, batch["labels"]), -start, beta=0.01)
        nothing = torch.zeros_like(start)
        theirs = dpo_loss(
            {"preferred": nothing, "other": log_probability(moved, batch)},
            {"preferred": nothing, "other": start},
            beta=0.01,
        )
        theirs = 2 / 0.01 * theirs
        a, b = gradient(moved, ours), gradient(moved, theirs)
        what = f"weights moved by {distance:g}"
        report(f"{what}: loss, |NPO - DPO| / DPO", float(((ours - theirs) / theirs).abs().detach()), SAME)
        report(f"{what}: gradient, |NPO - DPO| / |DPO|", float((a - b).norm() / b.norm()), SAME)


def options(folder: str, **more: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    return TrainingArguments(folder, learning_rate=1e-5, **quiet, **more)


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps(count: int, repeats: int, folder: str) -> None:
    rows = esther(count)
    batch = pad_rows(rows)
    models = {name: zoo.load("tiny-gpt").train() for name in ("plain", "live", "cached", "reference")}
    live = NPOTrainer(models["live"], options(folder), forget_dataset=rows, beta=0.01)
    cached = NPOTrainer(models["cached"], options(folder), forget_dataset=rows, beta=0.01, cache_reference=True)
    with_nll = {"forget": {**batch, "ref_nll": cached.train_dataset.ref_nll}}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    models["reference"].eval()

    @torch.no_grad()
    def forward() -> None:
        models["reference"](**inputs)

    work = {
        "plain": step_of(models["plain"], lambda: models["plain"](**batch).loss),
        "forward": forward,
        "live": step_of(models["live"], lambda: live.compute_loss(models["live"], {"forget": batch})),
        "cached": step_of(models["cached"], lambda: cached.compute_loss(models["cached"], with_nll)),
    }
    for call in work.values():
        call()
    s = race(repeats, **work)
    print(f"{count} documents: {', '.join(f'{name} {1000 * seconds:.0f} ms' for name, seconds in s.items())}")
    report("step, NPO / (fine-tuning + forward pass)", s["live"] / (s["plain"] + s["forward"]), SLOWER)
    report("step, NPO with cached reference / fine-tuning", s["cached"] / s["plain"], SLOWER)


def runs(count: int, long: int, repeats: int, folder: str) -> None:
    rows = esther(count)
    batch = pad_rows(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    arguments = options(folder, max_steps=long, per_device_train_batch_size=count)
    model, tuned, reference = (zoo.load("tiny-gpt") for _ in range(3))
    plain = Trainer(tuned, arguments, pad_rows, rows)
    npo = NPOTrainer(model, arguments, forget_dataset=rows, beta=0.01)
    for trainer in (plain, npo):
        trainer.remove_callback(PrinterCallback)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(long):
            reference(**inputs)

    s = race(repeats, plain=plain.train, forward=forward, npo=npo.train)
    print(f"{long} steps of {count} documents: {', '.join(f'{name} {seconds:.2f} s' for name, seconds in s.items())}")
    report("run, NPOTrainer / (Trainer + forward passes)", s["npo"] / (s["plain"] + s["forward"]), SLOWER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            equality(2)
            steps(4, 3, folder)
            runs(4, 3, 1, folder)
        else:
            equality(4)
            steps(8, 13, folder)
            runs(8, 5, 3, folder)
            record("npo", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
