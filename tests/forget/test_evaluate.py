"""shoestring.forget.evaluate: every measure against its definition, its null, and models that hide or forget."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from shoestring import zoo
from shoestring.forget.evaluate import (
    attack_auc,
    classification_losses,
    evaluate,
    language_losses,
    lira_scores,
    only_hides,
    overlap,
    regression_losses,
    relearning_steps,
    sample_losses,
    true_positive_rate,
    verbatim,
)
from shoestring.metrics import forget_quality

LR, MOST = 1e-2, 200  # of relearning
RNG = np.random.default_rng(0)


# The measures, as functions of arrays.


def test_attack_auc_is_the_chance_of_the_lower_loss_with_ties_counted_half():
    a, b = RNG.integers(0, 6, 40).astype(float), RNG.integers(1, 8, 30).astype(float)
    by_hand = np.mean([[1.0 if i < j else 0.5 if i == j else 0.0 for j in b] for i in a])
    assert attack_auc(a, b) == pytest.approx(by_hand, abs=1e-12)
    truth, score = np.repeat([1, 0], [40, 30]), -np.concatenate([a, b])
    assert attack_auc(a, b) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert attack_auc(a, a) == 0.5
    assert (attack_auc([1.0], [2.0]), attack_auc([2.0], [1.0])) == (1.0, 0.0)


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 0.35])
def test_true_positive_rate_is_the_best_at_the_allowed_rate_of_false_ones(fpr):
    members, others = RNG.normal(1, 1, 200).round(1), RNG.normal(0, 1, 100).round(1)
    curve = roc_curve(np.repeat([1, 0], [200, 100]), np.concatenate([members, others]), drop_intermediate=False)
    assert true_positive_rate(members, others, fpr) == pytest.approx(curve[1][curve[0] <= fpr + 1e-9].max(), abs=1e-12)


def test_lira_scores_are_the_difference_of_log_odds():
    own, references = RNG.uniform(0.05, 4, 50), RNG.uniform(0.05, 4, (3, 50))
    odds = [np.log(np.exp(-loss) / (1 - np.exp(-loss))) for loss in (own, references)]
    np.testing.assert_allclose(lira_scores(own, references), odds[0] - odds[1].mean(0), atol=1e-10)
    np.testing.assert_array_equal(lira_scores(own, [own]), 0)
    np.testing.assert_array_equal(lira_scores([-1.0, 2.0], [[0.0, 4.0]], likelihood=False), [1.0, 2.0])
    assert np.isfinite(lira_scores([0.0, 1e-12, 700.0], [[700.0, 0.0, 0.0]])).all()


def test_lira_finds_members_that_differ_less_than_samples_differ_from_each_other():
    """Hard samples have a hundred times the loss of easy ones; a member's is only halved."""
    hardness = np.exp(RNG.uniform(-4, 1, 400))
    own, reference = hardness.copy(), hardness * np.exp(RNG.normal(0, 0.05, 400))
    own[:200] /= 2
    scores = lira_scores(own, [reference])
    assert attack_auc(own[:200], own[200:]) < 0.7
    assert attack_auc(-scores[:200], -scores[200:]) > 0.99
    assert true_positive_rate(scores[:200], scores[200:]) > 0.9


@pytest.mark.parametrize(
    ("steps", "first_time", "hides"),
    [
        (9, 20, True),
        (10, 20, False),
        (24, None, True),
        (25, None, None),
        (None, None, None),
        (None, 50, False),
        (3, 0, False),
    ],
    ids=str,
)
def test_only_hides_means_less_than_half_of_the_steps(steps, first_time, hides):
    """None is "more than 50": what follows from that is said, what does not is not."""
    assert only_hides(steps, first_time, most=50) is hides


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack_auc([], [1.0]), "members must have shape"),
        (lambda: attack_auc([1.0], [math.nan]), "others must be finite, got 1"),
        (lambda: true_positive_rate([1.0], [1.0], 1.0), "fpr must be in"),
        (lambda: lira_scores([1.0], [1.0]), r"references must have shape \(K, 1\)"),
        (lambda: lira_scores([1.0], np.empty((0, 1))), "K >= 1"),
        (lambda: lira_scores([-1.0], [[1.0]]), "likelihood=False"),
    ],
    ids=["empty", "nan", "fpr of one", "one-dimensional references", "no reference", "negative likelihood losses"],
)
def test_bad_arrays_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Losses of language models, on the model that knows Esther by heart.


@pytest.fixture(scope="module")
def gpt():
    return zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")


def texts(source: str, split: str = "train", count: int = 12) -> list[str]:
    from shoestring.zoo.train.tiny_gpt import documents

    return [text for book, text in documents(split) if book == source][:count]


def padded(tokenizer: Any, rows: list[str], side: str = "right", length: int = 120) -> dict[str, Tensor]:
    tokenizer.padding_side = side
    return dict(tokenizer(rows, padding=True, truncation=True, max_length=length, return_tensors="pt"))


def test_a_language_loss_is_that_of_the_text_alone(gpt):
    model, tokenizer = gpt
    rows = [*texts("Esther", count=3), "Genesis 1:1 In the beginning"]
    together = language_losses(model, padded(tokenizer, rows))
    for row, loss in zip(rows, together, strict=True):
        ids = tokenizer(row, return_tensors="pt", truncation=True, max_length=120).input_ids
        assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_labels_of_minus_100_do_not_count(gpt):
    model, tokenizer = gpt
    batch = padded(tokenizer, texts("Esther", count=1), length=40)
    labels = batch["input_ids"].clone()
    labels[:, :30] = -100
    token = F.cross_entropy(model(batch["input_ids"]).logits[0, :-1], batch["input_ids"][0, 1:], reduction="none")
    found = language_losses(model, batch | {"labels": labels})
    assert found.item() == pytest.approx(token[29:].mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="nothing to predict"):
        language_losses(model, batch | {"labels": torch.full_like(labels, -100)})


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_verbatim_is_what_greedy_decoding_says(gpt, side):
    model, tokenizer = gpt
    rows = [*texts("Esther"), *texts("Luke", count=4), "Luke 1:1 short"]
    batch = padded(tokenizer, rows, side)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = verbatim(logits, batch["input_ids"], batch["attention_mask"], prompt=20, tokens=6)
    said = []
    for row in rows[:-1]:
        ids = tokenizer(row, return_tensors="pt").input_ids[:, :26]
        out = model.generate(ids[:, :20], do_sample=False, min_new_tokens=6, max_new_tokens=6)
        said.append(float(torch.equal(out, ids)))
    assert found[:-1].tolist() == said
    assert 0 < sum(said) < len(said)
    assert math.isnan(found[-1])


@pytest.mark.parametrize("wrong", range(1, 9))
def test_verbatim_asks_for_the_tokens_behind_the_prompt_and_no_others(wrong):
    ids, mask = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.long)
    said = ids[:, 1:].clone()
    said[0, wrong - 1] = 0  # of token number `wrong`, counted from 0
    logits = F.one_hot(F.pad(said, (0, 1)), 9).float()
    assert verbatim(logits, ids, mask, prompt=3, tokens=4).item() == float(wrong not in (3, 4, 5, 6))
    assert verbatim(logits, ids, mask, prompt=5, tokens=4).item() == float(wrong < 5)
    assert math.isnan(verbatim(logits, ids, mask, prompt=6, tokens=4).item())


# A network that knows noisy labels by heart, beside one that never saw them.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 5e-3) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.eval()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    noisy = torch.randint(10, (128,), generator=torch.Generator().manual_seed(1))
    forget, holdout = (x[:64], noisy[:64]), (x[64:128], noisy[64:])
    retain, test = (x[128:928], y[128:928]), (x[928:], y[928:])
    original = trained(network(), torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]]), 250)
    retrained = trained(network(), *retain, 250)
    ascent = copy.deepcopy(original)
    optimizer = torch.optim.Adam(ascent.parameters(), lr=1e-3)
    while F.cross_entropy(ascent(forget[0]), forget[1]) < 3:
        optimizer.zero_grad()
        (-F.cross_entropy(ascent(forget[0]), forget[1])).backward()
        optimizer.step()

    def batches(rows, size=16):
        return [*zip(*(part.split(size) for part in rows), strict=True)]

    return {
        "original": original,
        "retrained": retrained,
        "ascent": ascent.eval(),
        "forget": batches(forget),
        "retain": batches(retain, 100),
        "holdout": batches(holdout),
        "test": batches(test, 100),
    }


def judge(case: dict[str, Any], models: Any, *, sets=("retain", "holdout"), **options: Any) -> Any:
    options = {"relearn_lr": LR, "relearn_steps": MOST} | options
    return evaluate(models, case["original"], case["forget"], **{name: case[name] for name in sets}, **options)


@pytest.fixture(scope="module")
def judged(case):
    models = {"as it was": case["original"], "trained anew": case["retrained"], "ascent": case["ascent"]}
    return judge(case, models, retrained=case["retrained"])


def test_the_unchanged_model_has_changed_by_nothing(judged):
    row, before = judged.row("as it was"), judged.row("original")
    assert row["finding"] == "unchanged"
    assert row["retain_change"] == before["retain_change"] == 0.0
    assert row["relearn_steps"] == before["relearn_steps"] == 0
    assert {**row, "model": "", "finding": ""} == {**before, "model": "", "finding": ""}
    assert row["membership_auc"] > 0.95  # and the attack sees what it knows by heart
    assert row["forget_quality"] < 1e-6


def test_the_retrained_model_has_full_marks(judged):
    row, gold = judged.row("trained anew"), judged.row("retrained")
    assert row["forget_quality"] == 1.0
    assert row["membership_auc"] == gold["membership_auc"] == pytest.approx(0.5, abs=0.15)
    assert (row["lira_auc"], row["lira_tpr"]) == (0.5, 0.0)
    assert row["relearn_steps"] == gold["relearn_steps"]
    assert row["finding"] == "forgets"
    assert {**row, "model": "", "finding": ""} == {**gold, "model": "", "finding": ""}


def test_forget_quality_is_that_of_the_metrics_room(case, judged):
    losses = [sample_losses(case[name], case["forget"]) for name in ("ascent", "retrained")]
    assert judged.row("ascent")["forget_quality"] == forget_quality(*losses)
    np.testing.assert_array_equal(judged.losses["ascent"]["forget"], losses[0])


def test_figures_are_those_of_the_model_in_eval_mode(case, judged):
    with torch.no_grad():
        found = [(case["ascent"](x), y) for x, y in case["retain"]]
    loss = torch.cat([F.cross_entropy(out, y, reduction="none") for out, y in found]).double().mean()
    right = torch.cat([out.argmax(1) == y for out, y in found]).double().mean()
    assert judged.row("ascent")["retain_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert judged.row("ascent")["retain_accuracy"] == pytest.approx(right.item(), rel=1e-12)
    training = copy.deepcopy(case["ascent"]).train()
    np.testing.assert_array_equal(sample_losses(training, case["retain"]), judged.losses["ascent"]["retain"])
    assert training.training


@pytest.mark.parametrize("known", ["retrained", "held-out"])
def test_gradient_ascent_only_hides_and_the_retrained_model_does_not(case, known):
    options: dict[str, Any] = {"retrained": case["retrained"]} if known == "retrained" else {}
    found = judge(case, {"ascent": case["ascent"], "anew": case["retrained"]}, **options)
    assert found.row("ascent")["forget_loss"] > 2 * found.row("original")["forget_loss"]
    assert found.row("ascent")["finding"] == "only hides"
    assert found.row("anew")["finding"] == "forgets"
    steps, whose = found.settings["first_time"]["ascent"]
    assert whose == {"retrained": "the retrained model", "held-out": "itself, held-out samples"}[known]
    if known == "held-out":
        expected = relearning_steps(case["ascent"], case["holdout"], goal(case), lr=LR, most=MOST)
        assert steps == expected != found.row("ascent")["relearn_steps"]


def goal(case: dict[str, Any]) -> float:
    return float(sample_losses(case["original"], case["forget"]).mean() * 1.05)


def test_without_a_comparison_only_what_is_back_within_a_pass_is_known_to_hide(case):
    nearly = copy.deepcopy(case["original"])
    with torch.no_grad():
        nearly[0].bias += 0.1
    models = {"nearly": nearly, "anew": case["retrained"]}
    found = judge(case, models, sets=("retain",), relearn_lr=1e-3, tolerance=0.15)
    assert 0 < found.row("nearly")["relearn_steps"] < 4
    assert found.row("nearly")["finding"] == "only hides"
    assert found.row("anew")["finding"] == "undecided"
    assert found.settings["first_time"] == {}


def test_a_step_that_changes_next_to_nothing_has_not_forgotten(case):
    model = copy.deepcopy(case["original"])
    with torch.no_grad():
        model[0].bias += 1e-5
    assert judge(case, model).row("unlearned")["finding"] == "not forgotten"
    assert judge(case, case["ascent"], relearn_steps=0).row("unlearned")["finding"] == "undecided"
    gold = case["retrained"]
    assert judge(case, gold, retrained=gold, relearn_steps=2).row("unlearned")["finding"] == "undecided"


def test_relearning_steps_are_those_of_a_loop_written_by_hand(case):
    batches = case["forget"]
    learner = copy.deepcopy(case["ascent"])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=2e-3, weight_decay=0.0)
    target, steps = 0.5, 0
    while np.mean(sample_losses(learner, batches)) > target:
        optimizer.zero_grad()
        F.cross_entropy(learner(batches[steps % 4][0]), batches[steps % 4][1]).backward()
        optimizer.step()
        steps += 1
    assert relearning_steps(case["ascent"], batches, target, lr=2e-3) == steps > 2
    assert relearning_steps(case["ascent"], batches, target, lr=2e-3, most=steps - 1) is None
    assert relearning_steps(case["ascent"], batches, 100.0) == 0


def test_no_model_and_no_global_generator_is_changed(case):
    models = {name: copy.deepcopy(case[name]) for name in ("original", "retrained", "ascent")}
    models["ascent"][0].weight.requires_grad_(False)
    models["ascent"].train()
    models["ascent"][2].eval()
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    random = torch.get_rng_state()
    original, retrained = models["original"], models["retrained"]
    found = evaluate(models["ascent"], original, case["forget"], retrained=retrained, relearn_steps=5)
    assert found.row("unlearned")["relearn_steps"] is None
    assert torch.equal(random, torch.get_rng_state())
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
    assert [module.training for module in models["ascent"].modules()] == [True, True, True, False, True]
    assert not models["ascent"][0].weight.requires_grad
    assert all(p.grad is None for p in models["ascent"].parameters() if not p.requires_grad)


def test_more_references_enter_the_attack(case):
    other = trained(network(), *map(torch.cat, zip(*case["test"], strict=True)), 60)
    found = judge(case, case["ascent"], retrained=case["retrained"], references=[other], relearn_steps=0)
    behind = (case["retrained"], other)
    members, others = (
        lira_scores(sample_losses(case["ascent"], case[s]), [sample_losses(m, case[s]) for m in behind])
        for s in ("forget", "holdout")
    )
    assert found.row("unlearned")["lira_auc"] == attack_auc(-members, -others)
    assert found.row("unlearned")["lira_tpr"] == true_positive_rate(members, others)
    assert found.settings["references"] == 2


# Other models.


def test_a_regressor_and_the_shape_that_would_broadcast():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, y = nn.Linear(3, 1), x[:, :1] * 2
    assert sample_losses(model, [(x, y)]) == pytest.approx((model(x) - y).square()[:, 0].tolist())
    with pytest.raises(ValueError, match=r"one shape, got \(8, 1\) and \(8,\)"):
        regression_losses(model, (x, y[:, 0]))
    with pytest.raises(ValueError, match=r"\(B, C\) and y"):
        classification_losses(model, (x, y))


def test_a_diffusion_model_by_a_loss_of_the_callers():
    from shoestring.zoo.train._fashion import garments

    unet, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    images, labels = garments("test")
    generator = torch.Generator().manual_seed(0)
    x, c = torch.as_tensor(images[:12]), torch.as_tensor(labels[:12])
    noise, t = torch.randn(x.shape, generator=generator), torch.randint(1000, (12,), generator=generator)
    batches = [tuple(part[i : i + 4] for part in (x, c, noise, t)) for i in (0, 4, 8)]

    def losses(model, batch):
        x, c, noise, t = batch
        predicted = model(scheduler.add_noise(x, noise, t), t, class_labels=c).sample
        return (predicted - noise).square().flatten(1).mean(1)

    with torch.no_grad():
        expected = torch.cat([losses(unet, batch) for batch in batches]).tolist()
    assert sample_losses(unet, batches, losses) == pytest.approx(expected)
    weaker = zoo.load("tiny-class-ddpm-weak")
    found = evaluate(weaker, unet, batches[:2], retain=batches[2:], losses=losses, relearn_steps=0)
    assert found.row("unlearned")["forget_loss"] == pytest.approx(sample_losses(weaker, batches[:2], losses).mean())
    kept = {"retain": batches[1:], "holdout": batches[1:]}
    same = evaluate(unet, unet, batches[:1], **kept, references=[weaker], losses=losses)
    assert same.row("unlearned")["finding"] == "unchanged"
    assert same.row("unlearned")["retain_change"] == 0.0
    assert 0 <= same.row("unlearned")["lira_auc"] <= 1


def test_a_language_model_in_bfloat16(gpt):
    model, tokenizer = gpt
    batches = [padded(tokenizer, texts("Esther", count=4), length=60)]
    half = copy.deepcopy(model).bfloat16()
    assert language_losses(half, batches[0]).dtype == torch.float32
    found = evaluate(half, half, batches, holdout=[padded(tokenizer, texts("Esther", "held_out"), length=60)])
    assert found.row("unlearned")["finding"] == "unchanged"
    assert found.row("unlearned")["membership_auc"] == 1.0  # it has read these fifty times
    assert found.row("unlearned")["verbatim"] > 0.7
    assert found.row("original")["forget_loss"] == pytest.approx(sample_losses(model, batches).mean(), rel=0.05)


# Bad input.


def test_what_is_to_be_forgotten_and_kept_is_counted(case, gpt):
    tokenizer = gpt[1]
    rows = texts("Esther", count=5)
    assert overlap([padded(tokenizer, rows, "left")], [padded(tokenizer, rows[1:3], length=200)]) == 2
    assert overlap(case["forget"], case["holdout"]) == 0
    assert overlap([{"anything": 3}], [{"anything": 3}]) == 0
    with pytest.warns(UserWarning, match="forget and retain have 16 samples in common"):
        evaluate(case["ascent"], case["original"], case["forget"], retain=case["forget"][2:3], relearn_steps=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"forget": []}, ValueError, "forget yields nothing"),
        ({"retain": iter(())}, ValueError, "retain yields nothing"),
        ({"holdout": []}, ValueError, "holdout yields nothing"),
        ({"forget": [(torch.empty(0, 64), torch.empty(0, dtype=torch.long))]}, ValueError, "B >= 1, got .* on forget"),
        ({"models": {}}, ValueError, "models must be named"),
        ({"models": {"retrained": nn.Linear(2, 2)}}, ValueError, "otherwise than original and retrained"),
        ({"models": "a path"}, TypeError, "must be a torch.nn.Module, got str"),
        ({"losses": "perplexity"}, ValueError, "losses must be a function"),
        ({"losses": lambda model, batch: model(batch[0]).sum()}, ValueError, r"one number a sample, .* got \(\)"),
        ({"losses": lambda model, batch: model(batch[0])[:, 0] / 0}, FloatingPointError, "64 of 64 .* on forget under"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be >= 0"),
        ({"relearn_lr": 0.0}, ValueError, "relearn_lr > 0"),
    ],
    ids=[
        "no forget batch",
        "an iterator that is spent",
        "no held-out batch",
        "a batch without rows",
        "no model",
        "a name that is taken",
        "no module",
        "unknown loss",
        "a mean instead of losses",
        "NaN",
        "negative tolerance",
        "no learning rate",
    ],
)
def test_bad_input_is_named(case, change, error, message):
    given = {"models": case["ascent"], "original": case["original"], "forget": case["forget"], "relearn_steps": 0}
    with pytest.raises(error, match=message):
        evaluate(**(given | change))


def test_a_model_with_nan_is_refused_before_anything_is_measured(case):
    broken = copy.deepcopy(case["ascent"])
    broken[0].bias.data[3] = math.nan
    with pytest.raises(ValueError, match=r"0\.bias"):
        judge(case, broken)


# What comes out.


def test_the_table_reads_the_same_everywhere(judged):
    told = json.loads(judged.to_json())
    assert told["rows"] == judged.rows
    assert told["settings"]["samples"] == {"forget": 64, "retain": 800, "holdout": 64}
    lines = judged.to_markdown().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["model", "---", *(r["model"] for r in judged.rows)]
    header = lines[0].strip("| ").split(" | ")
    cells = dict(zip(header, lines[4].strip("|").split("|"), strict=True))
    assert float(cells["forget loss"]) == pytest.approx(judged.rows[2]["forget_loss"], abs=6e-4)
    assert "verbatim" not in header
    assert str(judged).splitlines()[0].split("  ")[0] == "model"
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(judged.to_rich())
    assert "only hides" in console.export_text()
    with pytest.raises(ValueError, match="must be one of"):
        judged.row("nobody")


def test_steps_that_did_not_suffice_are_shown_as_more(case):
    found = judge(case, case["ascent"], retrained=case["retrained"], relearn_steps=2)
    assert found.row("retrained")["relearn_steps"] is None
    assert "> 2" in found.to_markdown()
    assert json.loads(found.to_json())["rows"][-1]["relearn_steps"] is None


def test_the_plot_has_a_point_a_model_where_its_losses_are(judged, case, tmp_path):
    svg = judged.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text() == svg == judged.plot()
    root = ElementTree.fromstring(svg)
    circles = [c for c in root.iter() if c.tag.endswith("circle")]
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in circles]
    losses = [(row["retain_loss"], row["forget_loss"]) for row in judged.rows]
    assert len(places) == len(losses) == 5
    (x0, y0), (x1, y1) = places[0], places[3]  # the original and the ascent give the scale
    (retain0, forget0), (retain1, forget1) = losses[0], losses[3]
    for (x, y), (retain, forget) in zip(places, losses, strict=True):
        assert x == pytest.approx(x0 + (retain - retain0) / (retain1 - retain0) * (x1 - x0), abs=0.2)
        assert y == pytest.approx(y0 + (forget - forget0) / (forget1 - forget0) * (y1 - y0), abs=0.2)
    assert y1 < y0  # more forgotten is further up
    named = judge(case, {"<b> & co": case["ascent"]}, relearn_steps=0).plot()
    assert "<b> & co" in [t.text for t in ElementTree.fromstring(named).iter()]
    with pytest.raises(ValueError, match="retain set"):
        judge(case, case["ascent"], sets=(), relearn_steps=0).plot()


def test_progress_rises_and_ends_at_one(case):
    seen: list[float] = []
    options: dict[str, Any] = {"retrained": case["retrained"], "relearn_steps": 3}
    judge(case, case["ascent"], progress=lambda done, text: seen.append(done), **options)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert max(seen[:-1]) < 1.0


SCRIPT = """
import json, os, sys, warnings
import torch
from torch import nn
from shoestring.forget.evaluate import evaluate

def judged():
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randint(3, (60,))
    models = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(3)]
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 60, 6)]
    forget, retain, holdout = batches[:3], batches[3:8], batches[8:]
    optimizer = torch.optim.Adam(models[0].parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(models[0](x[:48]), y[:48]).backward()
        optimizer.step()
    return evaluate(models[1], models[0], forget, retain=retain, holdout=holdout, retrained=models[2], relearn_lr=0.05)

if __name__ == "__main__":
    found = judged()
    losses = {name: {s: losses.tolist() for s, losses in sets.items()} for name, sets in found.losses.items()}
    open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps([found.to_dict(), losses]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path):
    (tmp_path / "judge.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone: dict[str, Any] = {"__name__": "alone"}
    exec(compile(SCRIPT, "judge", "exec"), alone)
    expected = alone["judged"]()
    children = []
    for rank in (0, 1):  # what accelerate launch sets
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        own |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        own |= {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(tmp_path / "judge.py"), str(tmp_path / "found")]
        children.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True))
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said[-3000:]
    for rank in (0, 1):
        told, losses = json.loads((tmp_path / f"found{rank}").read_text())
        for name, sets in expected.losses.items():
            assert {which: found.tolist() for which, found in sets.items()} == losses[name]
        for row, there in zip(expected.rows, told["rows"], strict=True):
            assert row == there  # to the bit: relearning counts steps, and everything else is whole batches
        assert told["settings"] == expected.settings
