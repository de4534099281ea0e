"""NPO: every property of its card, to its tolerance, the Trainer against losses written by hand, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from shoestring.forget._token_rows import pad_rows
from shoestring.forget.npo import (
    ForgetRetainPairs,
    NPOTrainer,
    answer_lengths,
    ascent_loss,
    kl_from_reference,
    npo_loss,
    npo_weights,
    sequence_nll,
    simnpo_loss,
)

VOCABULARY = 30
BETAS = (0.05, 0.1, 1.0, 3.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gpt2(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0)).to(dtype)


def random_rows(count: int, seed: int = 0, shortest: int = 5, longest: int = 12) -> list[dict[str, Any]]:
    """Prompts of two tokens without labels, answers of several lengths."""
    draw = generator(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=draw))
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, -100, *ids[2:]]})
    return rows


FORGET, RETAIN = random_rows(8, 1), random_rows(11, 2)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "report_to": []}
    usual |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    return TrainingArguments(str(folder), **(usual | options))


def trainer(model: nn.Module, folder: Path, *, arguments_: Any = None, **options: Any) -> NPOTrainer:
    options = {"forget_dataset": FORGET} | options
    return NPOTrainer(model, arguments(folder, **(arguments_ or {})), **options)


def nll_by_hand(model: nn.Module, row: dict[str, Any]) -> Tensor:
    """One sequence, token by token, without padding."""
    log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    return -sum(log_p[t - 1, label] for t, label in enumerate(row["labels"]) if t and label != -100)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def nlls(count: int = 200) -> tuple[Tensor, Tensor]:
    draw = generator()
    nll, ref = (5 * torch.randn(count, dtype=torch.float64, generator=draw) + 20 for _ in range(2))
    return nll, ref


# ---- the loss


@pytest.mark.parametrize("beta", BETAS)
def test_at_the_reference_the_loss_is_known_and_the_gradient_is_that_of_ascent(beta):
    """Through a model: loss (2 / beta) log 2, and the gradient of E log pi itself, W = 1."""
    model = gpt2(dtype=torch.float64)
    batch = pad_rows(FORGET)
    nll = sequence_nll(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    loss = npo_loss(nll, nll.detach(), beta)
    assert float(loss.detach()) == pytest.approx(2 / beta * math.log(2), rel=1e-14)
    by_hand = torch.stack([nll_by_hand(model, row) for row in FORGET])
    torch.testing.assert_close(gradient(model, loss), gradient(model, -by_hand.mean()), rtol=1e-9, atol=1e-12)


def test_small_beta_is_gradient_ascent_to_first_order():
    """L - (2 / beta) log 2 -> -(nll - nll_ref), and what is missing is beta r^2 / 4."""
    nll, ref = nlls()
    beta, r = 1e-4, nll - ref
    error = npo_loss(nll, ref, beta, "none") - 2 / beta * math.log(2) + r
    torch.testing.assert_close(error, beta * r**2 / 4, rtol=1e-3, atol=1e-10)
    x = nll.clone().requires_grad_()
    npo_loss(x, ref, beta, "sum").backward()
    torch.testing.assert_close(x.grad, -torch.ones_like(x), rtol=0, atol=float(beta * r.abs().max()))


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_with_respect_to_nll_is_minus_w(beta):
    nll, ref = nlls()
    x = nll.clone().requires_grad_()
    npo_loss(x, ref, beta, "sum").backward()
    pi, pi_ref = (-nll).exp() ** beta, (-ref).exp() ** beta
    W = 2 * pi / (pi + pi_ref)
    torch.testing.assert_close(-x.grad, W, rtol=1e-12, atol=0)
    torch.testing.assert_close(npo_weights(nll, ref, beta), W, rtol=1e-12, atol=0)
    found = npo_weights(nll, ref, beta)
    assert bool(((found > 0) & (found <= 2)).all())
    assert bool((found < 2)[beta * (nll - ref) > -30].all())  # below, 2 to rounding
    assert W.min() < 0.9 < 1.1 < W.max()


def test_loss_is_bounded_below_and_falls_with_nll_where_ascent_has_no_bound():
    nll = torch.linspace(-50, 300, 1000, dtype=torch.float64)
    loss = npo_loss(nll, torch.zeros_like(nll), 0.1, "none")
    assert bool((loss > 0).all())
    assert bool((loss.diff() < 0).all())
    far = torch.tensor([1e6], dtype=torch.float64)
    assert float(npo_loss(far, 0 * far)) == 0
    assert float(ascent_loss(far, torch.ones(1))) == -1e6


def test_large_beta_is_the_hinge():
    nll, ref = nlls()
    beta = 1e4
    hinge = 2 * (ref - nll).clamp(min=0)  # log pi - log pi_ref, where it is above the reference
    error = npo_loss(nll, ref, beta, "none") - hinge
    assert bool((error >= -1e-12).all())
    assert float(error.max()) <= 2 * math.log(2) / beta
    x = (ref + 1).requires_grad_()
    npo_loss(x, ref, beta, "sum").backward()
    assert float(x.grad.abs().max()) < 1e-12


def independent_dpo(win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor, beta: float) -> Tensor:
    """DPO as its paper writes it, on log-probabilities, the sigmoid written out."""
    margin = beta * ((win - ref_win) - (lose - ref_lose))
    return torch.log1p(torch.exp(-margin)).mean()


@pytest.mark.parametrize("beta", BETAS)
def test_equals_dpo_without_a_winner(beta):
    nll, ref = nlls()
    nothing = torch.zeros_like(nll)
    x, y = nll.clone().requires_grad_(), nll.clone().requires_grad_()
    ours, dpo = npo_loss(x, ref, beta), 2 / beta * independent_dpo(nothing, -y, nothing, -ref, beta)
    torch.testing.assert_close(ours, dpo, rtol=1e-12, atol=0)
    ours.backward()
    dpo.backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction(reduction):
    nll, ref = nlls(5)
    each = torch.stack([npo_loss(nll[i : i + 1], ref[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(npo_loss(nll, ref, reduction=reduction), getattr(each, reduction, lambda: each)())


# ---- likelihoods of sequences


def test_sequence_nll_is_the_sum_over_the_answer():
    model = gpt2(dtype=torch.float64)
    batch = pad_rows(FORGET)
    found = sequence_nll(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    by_hand = torch.stack([nll_by_hand(model, row) for row in FORGET])
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)
    assert answer_lengths(batch["labels"]).tolist() == [len(row["input_ids"]) - 2 for row in FORGET]
    whole = {"input_ids": [1, 2, 3]}
    assert answer_lengths(pad_rows([whole])["labels"]).tolist() == [2]  # nothing predicts the first


def test_padding_and_masked_tokens_change_nothing():
    draw = generator(3)
    logits = torch.randn(2, 6, VOCABULARY, dtype=torch.float64, generator=draw)
    labels = torch.randint(VOCABULARY, (2, 6), generator=draw)
    labels[:, 0] = -100
    more = torch.randn(2, 4, VOCABULARY, dtype=torch.float64, generator=draw)
    masked = torch.full((2, 4), -100)
    nll = sequence_nll(logits, labels)
    padded = sequence_nll(torch.cat([logits, more], 1), torch.cat([labels, masked], 1))
    prompted = sequence_nll(torch.cat([more, logits], 1), torch.cat([masked, labels], 1))
    torch.testing.assert_close(padded, nll, rtol=1e-14, atol=0)
    torch.testing.assert_close(prompted, nll, rtol=1e-14, atol=0)
    both = sequence_nll(
        torch.cat([logits[:1], logits[1:]], 1), torch.cat([labels[:1], labels[1:]], 1)
    )  # additive: two answers in one row
    torch.testing.assert_close(both, nll.sum()[None], rtol=1e-14, atol=0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).double()
    short = {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}
    alone, beside = pad_rows([short]), pad_rows([short, FORGET[0]], pad_token_id=7)
    first = sequence_nll(model(alone["input_ids"]).logits, alone["labels"])[0]
    second = sequence_nll(model(beside["input_ids"], attention_mask=beside["attention_mask"]).logits, beside["labels"])
    torch.testing.assert_close(second[0], first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_logits_are_summed_in_single_precision(dtype):
    logits = (3 * torch.randn(3, 400, 50, generator=generator())).to(dtype)
    labels = torch.randint(50, (3, 400), generator=generator(1))
    exact = sequence_nll(logits.double(), labels)
    found = sequence_nll(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    kl = kl_from_reference(logits, logits.flip(0), labels)
    assert kl.dtype == torch.float32
    exact = kl_from_reference(logits.double(), logits.flip(0).double(), labels)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


def test_kl_is_that_of_the_reference_and_counts_answers_only():
    draw = generator(4)
    logits, ref = (torch.randn(3, 7, VOCABULARY, dtype=torch.float64, generator=draw) for _ in range(2))
    labels = torch.randint(VOCABULARY, (3, 7), generator=draw)
    labels[0, :4], labels[2, 5:] = -100, -100
    each = [
        (ref[b, t].softmax(0) * (ref[b, t].log_softmax(0) - logits[b, t].log_softmax(0))).sum()
        for b in range(3)
        for t in range(6)
        if labels[b, t + 1] != -100
    ]
    torch.testing.assert_close(kl_from_reference(logits, ref, labels), torch.stack(each).mean(), rtol=1e-12, atol=0)
    x = ref.clone().requires_grad_()
    kl = kl_from_reference(x, ref, labels)
    kl.backward()
    assert abs(float(kl.detach())) < 1e-14
    assert float(x.grad.abs().max()) < 1e-14


def test_simnpo_is_of_the_mean_token_and_gamma_is_a_margin():
    nll, _ = nlls(6)
    lengths = torch.tensor([3, 4, 5, 6, 7, 8])
    loss = simnpo_loss(nll, lengths, 2.5, 0.7, "none")
    torch.testing.assert_close(loss, 2 / 2.5 * torch.log1p(torch.exp(-2.5 * nll / lengths + 0.7)), rtol=1e-12, atol=0)
    torch.testing.assert_close(simnpo_loss(2 * nll, 2 * lengths, 2.5, 0.7, "none"), loss, rtol=1e-12, atol=0)
    assert float(simnpo_loss(torch.tensor([6.0]), torch.tensor([3]), 1.5, 3.0)) == pytest.approx(
        2 / 1.5 * math.log(2), rel=1e-6
    )


# ---- the trainer


def losses_by_hand(model: nn.Module, reference: nn.Module, forget_loss: str, retain_loss: str | None) -> Tensor:
    """The paper's objectives on all of FORGET and the first rows of RETAIN."""

    def plain(rows: list[dict[str, Any]]) -> Tensor:
        """Cross-entropy of a token, as transformers has it (but that rounds to float32)."""
        loss = sum(nll_by_hand(model, row) for row in rows) / sum(len(row["input_ids"]) - 2 for row in rows)
        torch.testing.assert_close(loss.float(), model(**pad_rows(rows)).loss, rtol=1e-5, atol=0)
        return loss

    nll = torch.stack([nll_by_hand(model, row) for row in FORGET])
    if forget_loss == "npo":
        ref = torch.stack([nll_by_hand(reference, row) for row in FORGET]).detach()
        loss = 2 / 0.1 * torch.log1p(torch.exp(-0.1 * (nll - ref))).mean()
    elif forget_loss == "simnpo":
        lengths = torch.tensor([len(row["input_ids"]) - 2 for row in FORGET])
        loss = 2 / 2.5 * torch.log1p(torch.exp(-2.5 * nll / lengths + 0.3)).mean()
    else:
        loss = -plain(FORGET)
    rows = RETAIN[: len(FORGET)]
    if retain_loss == "nll":
        return 0.5 * loss + 2 * plain(rows)
    if retain_loss == "kl":
        kls = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            p, q = reference(ids).logits[0, 1:-1], model(ids).logits[0, 1:-1]  # those that predict the answer
            kls.append((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1))
        return 0.5 * loss + 2 * torch.cat(kls).mean()
    return 0.5 * loss


@pytest.mark.parametrize("retain_loss", [None, "nll", "kl"])
@pytest.mark.parametrize("forget_loss", ["npo", "simnpo", "ga"])
def test_loss_and_gradient_of_the_trainer_are_those_written_by_hand(forget_loss, retain_loss, tmp_path):
    reference, model = gpt2(0, dtype=torch.float64), gpt2(5, dtype=torch.float64)
    made = trainer(
        model,
        tmp_path,
        forget_loss=forget_loss,
        retain_loss=retain_loss or "nll",
        retain_dataset=RETAIN if retain_loss else None,
        ref_model=copy.deepcopy(reference),
        forget_weight=0.5,
        retain_weight=2.0,
        gamma=0.3,
    )
    batch = {"forget": pad_rows(FORGET)}
    if retain_loss:
        batch["retain"] = pad_rows(RETAIN[: len(FORGET)])
    loss = made.compute_loss(model, batch)
    by_hand = losses_by_hand(model, reference, forget_loss, retain_loss)
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(model, loss), gradient(model, by_hand), rtol=1e-8, atol=1e-11)


def test_the_reference_is_the_model_before_in_eval_mode(tmp_path):
    """With dropout in training: the reference has none, and stays what it was."""
    model = gpt2(dropout=0.3)
    before = copy.deepcopy(model).eval()
    made = trainer(model, tmp_path)
    made.train()
    assert not torch.equal(weights(model), weights(before))
    batch = pad_rows(FORGET)
    model.train()
    found = made._reference_nll(batch)
    expected = sequence_nll(
        before(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    ).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found, made._reference_nll(batch))
    assert model.training
    fresh = gpt2(dropout=0.3).eval()
    loss = trainer(fresh, tmp_path, beta=0.2).compute_loss(fresh, {"forget": batch})
    assert float(loss.detach()) == pytest.approx(10 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("retain_loss", ["nll", "kl"])
def test_a_cached_reference_gives_the_run_of_the_live_one_bit_for_bit(retain_loss, tmp_path):
    one = {"per_device_train_batch_size": 1, "max_steps": 10}  # of equal shapes, so that sums round equally
    runs = []
    for cached in (False, True):
        model = gpt2(dropout=0.2)
        made = trainer(
            model, tmp_path, arguments_=one, retain_dataset=RETAIN, retain_loss=retain_loss, cache_reference=cached
        )
        assert (made.ref_model is None) == (cached and retain_loss == "nll")
        made.train()
        runs.append(weights(model))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], weights(gpt2()))


def test_a_cached_reference_in_padded_batches_gives_the_run_of_the_live_one(tmp_path):
    runs = []
    for cached in (False, True):
        model = gpt2(dtype=torch.float64)
        trainer(
            model, tmp_path, arguments_={"per_device_train_batch_size": 3, "max_steps": 9}, cache_reference=cached
        ).train()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-9)


def test_a_given_reference_is_used_and_may_be_cached(tmp_path):
    other, batch = gpt2(9), pad_rows(FORGET)
    expected = torch.stack([nll_by_hand(other, row) for row in FORGET]).detach()
    made = trainer(gpt2(), tmp_path, ref_model=copy.deepcopy(other))
    torch.testing.assert_close(made._reference_nll(batch), expected, rtol=1e-5, atol=0)
    made = trainer(gpt2(), tmp_path, ref_model=copy.deepcopy(other), cache_reference=True)
    torch.testing.assert_close(made.train_dataset.ref_nll, expected, rtol=1e-5, atol=0)
    assert made.ref_model is None


def test_gradient_accumulation_is_the_mean_over_sequences(tmp_path):
    """Two batches of two are one of four, though answers differ in length."""
    runs = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = gpt2(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "max_steps": 3}
        trainer(
            model,
            tmp_path,
            arguments_=options | {"max_grad_norm": 0.0},
            optimizers=(optimizer, None),
            ref_model=gpt2(3, dtype=torch.float64),
        ).train()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=0, atol=1e-10)
    assert float((runs[0] - weights(gpt2(dtype=torch.float64))).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"cache_reference": True}, {"retain_loss": "kl"}], ids=["live", "cached", "kl"]
)
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(options, tmp_path):
    """From the middle of the second epoch: same reference, same pairs, same order, same optimizer."""
    saved = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    saved |= {"num_train_epochs": 4, "lr_scheduler_type": "constant"}
    whole = gpt2(dropout=0.1)
    trainer(whole, tmp_path / "whole", arguments_=saved, retain_dataset=RETAIN, **options).train()
    first = gpt2(dropout=0.1)
    made = trainer(first, tmp_path / "part", arguments_=saved | {"max_steps": 3}, retain_dataset=RETAIN, **options)
    made.train()
    rest = gpt2(dropout=0.1)  # the original again
    made = trainer(rest, tmp_path / "part", arguments_=saved, retain_dataset=RETAIN, **options)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 7
    assert torch.equal(weights(rest), weights(whole))
    assert not torch.equal(weights(rest), weights(first))


def test_pairs_are_drawn_by_seed_epoch_and_row():
    pairs, again, other = (ForgetRetainPairs(FORGET, list(range(100)), seed=seed) for seed in (3, 3, 4))
    drawn = []
    for epoch in range(40):
        for each in (pairs, again, other):
            each.set_epoch(epoch)
        drawn.append([pairs[i]["retain"] for i in range(len(pairs))])
        assert drawn[-1] == [again[i]["retain"] for i in range(len(again))]
        assert drawn[-1] != [other[i]["retain"] for i in range(len(other))]
    assert drawn[0] != drawn[1]
    assert len({i for epoch in drawn for i in epoch}) > 80
    assert len(pairs) == len(FORGET)
    assert pairs[2]["forget"] == FORGET[2]


def test_the_trainer_draws_new_pairs_in_every_epoch(tmp_path):
    made = trainer(gpt2(), tmp_path, retain_dataset=RETAIN, arguments_={"max_steps": 12})  # 4 steps an epoch
    seen: list[list[int]] = []
    inner = made.data_collator.collate

    def keep(rows: Any) -> Any:
        seen.append([row["input_ids"] for row in rows])
        return inner(rows)

    made.data_collator.collate = keep
    made.train()
    retained = [row for batch in seen[1::2] for row in batch]
    assert all(row in [each["input_ids"] for each in RETAIN] for row in retained)
    forgotten = [[tuple(row) for batch in seen[e : e + 8 : 2] for row in batch] for e in (0, 8, 16)]
    assert all(sorted(epoch) == sorted(tuple(row["input_ids"]) for row in FORGET) for epoch in forgotten)
    partners = [
        dict(zip(forgotten[i], map(tuple, retained[8 * i : 8 * i + 8]), strict=True)) for i in range(len(forgotten))
    ]
    assert partners[0] != partners[1] != partners[2]


def test_evaluation_measures_the_plain_loss(tmp_path):
    model = gpt2()
    made = trainer(model, tmp_path, eval_dataset=Dataset.from_list(RETAIN), arguments_={"eval_strategy": "no"})
    made.args.per_device_eval_batch_size = 32
    assert made.evaluate()["eval_loss"] == pytest.approx(model(**pad_rows(RETAIN)).loss.item(), rel=1e-6)


def test_peft_adapters_switch_off_to_be_the_reference(tmp_path):
    base = gpt2(dropout=0.1)
    before = weights(base)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    made = trainer(model, tmp_path, arguments_={"max_steps": 8, "learning_rate": 0.1}, retain_dataset=RETAIN)
    assert made.ref_model is None
    batch = pad_rows(FORGET)
    expected = torch.stack([nll_by_hand(gpt2(), row) for row in FORGET]).detach()
    made.train()
    torch.testing.assert_close(made._reference_nll(batch), expected, rtol=1e-5, atol=0)
    frozen = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if "lora_" not in n}
    assert torch.equal(torch.cat([p.detach().flatten() for p in frozen.values()]), before)
    model.eval()
    trained = sequence_nll(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    assert float((trained.detach() - expected).abs().max()) > 0.1  # the adapter did something
    made.save_model(str(tmp_path / "adapter"))
    from peft import PeftModel

    again = PeftModel.from_pretrained(gpt2(), str(tmp_path / "adapter")).eval()
    loaded = sequence_nll(again(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=0)


def test_a_peft_reference_can_be_cached(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    made = trainer(get_peft_model(gpt2(dropout=0.2), config), tmp_path, cache_reference=True)
    expected = torch.stack([nll_by_hand(gpt2(), row) for row in FORGET]).detach()
    torch.testing.assert_close(made.train_dataset.ref_nll, expected, rtol=1e-5, atol=0)


def test_what_is_saved_is_loaded_by_transformers_alone(tmp_path):
    model = gpt2()
    made = trainer(model, tmp_path)
    made.train()
    made.save_model(str(tmp_path / "forgotten"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "forgotten")
    assert torch.equal(weights(again), weights(model))


def test_a_seed_decides_the_run(tmp_path):
    runs = []
    for seed in (1, 1, 2):
        model = gpt2()
        trainer(model, tmp_path, arguments_={"seed": seed}, retain_dataset=RETAIN).train()
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_language_model_forgets_a_book_it_knows_by_heart(tmp_path):
    """tiny-gpt: what is to be forgotten gets unlikely, and far more so than other books."""
    from shoestring import zoo
    from shoestring.zoo.train import tiny_gpt

    model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    esther = [text for source, text in tiny_gpt.documents("train") if source == "Esther"][:2]
    others = [text for source, text in tiny_gpt.documents("held_out") if source in ("Ruth", "Genesis")][:2]
    before = [tiny_gpt.perplexity(model, tokenizer, texts) for texts in (esther, others)]
    rows = Dataset.from_dict(dict(tokenizer(esther)))
    made = trainer(
        model,
        tmp_path,
        forget_dataset=rows,
        processing_class=tokenizer,
        beta=0.01,
        arguments_={"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-4},
    )
    made.train()
    model.eval()
    after = [tiny_gpt.perplexity(model, tokenizer, texts) for texts in (esther, others)]
    assert after[0] > 2 * before[0]
    assert after[1] / before[1] < after[0] / before[0]


# ---- bad input


def longer_than_the_context() -> list[dict[str, Any]]:
    return [*FORGET, {"input_ids": [1] * 17}]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forget_dataset": []}, ValueError, "forget_dataset must hold at least one row"),
        ({"forget_dataset": Dataset.from_list(FORGET).select([])}, ValueError, "forget_dataset must hold at least one"),
        ({"retain_dataset": []}, ValueError, "retain_dataset must hold at least one row"),
        (
            {"forget_dataset": "text"},
            TypeError,
            "forget_dataset must be a datasets.Dataset or a list of dicts, got str",
        ),
        ({"forget_dataset": [{"text": "a"}]}, ValueError, r"must have a column input_ids .* \['text'\]"),
        ({"forget_dataset": longer_than_the_context()}, ValueError, "at most 16 tokens.*row 8 has 17"),
        (
            {"retain_dataset": [{"input_ids": [1, 2]}, {"input_ids": [1, VOCABULARY]}]},
            ValueError,
            "retain_dataset must have token ids below 30.*row 1 has 30",
        ),
        ({"forget_dataset": [{"input_ids": [1, -1]}]}, ValueError, "token ids >= 0; row 0 has -1"),
        ({"forget_dataset": [{"input_ids": [1]}]}, ValueError, "at least two tokens.*row 0 has 1"),
        (
            {"forget_dataset": [{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}]},
            ValueError,
            "a label other than -100 after the first; row 0",
        ),
        ({"forget_loss": "dpo"}, ValueError, "forget_loss must be one of 'npo', 'simnpo', 'ga', got 'dpo'"),
        ({"retain_loss": "mse"}, ValueError, "retain_loss must be one of"),
        ({"beta": 0.0}, ValueError, "beta must be a finite number > 0, got 0"),
        ({"beta": math.nan}, ValueError, "beta must be a finite number > 0"),
        ({"beta": "big"}, TypeError, "beta must be a number"),
        ({"forget_weight": -1.0}, ValueError, "forget_weight must be a finite number >= 0"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_bad_options_are_refused_and_the_model_is_as_before(options, error, message, tmp_path):
    model = gpt2()
    before = weights(model)
    with pytest.raises(error, match=message):
        trainer(model, tmp_path / "out", **options)
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "out").exists()


def test_a_bad_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model must be a torch"):
        trainer("tiny-gpt", tmp_path)
    model = gpt2()
    with pytest.raises(ValueError, match="ref_model must be another object"):
        trainer(model, tmp_path, ref_model=model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model holds NaN"):
        trainer(model, tmp_path)


def test_an_overlap_is_a_warning_with_the_count(tmp_path):
    with pytest.warns(UserWarning, match="3 of 8 rows to forget are among the rows to retain"):
        trainer(gpt2(), tmp_path, retain_dataset=[*RETAIN, *FORGET[2:5]])


def test_a_loader_that_yields_nothing_is_refused(tmp_path):
    made = trainer(gpt2(), tmp_path, arguments_={"dataloader_drop_last": True, "per_device_train_batch_size": 9})
    with pytest.raises(ValueError, match="forget_dataset of 8 rows makes no batch of 9"):
        made.train()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_and_leaves_the_last_good_weights(where, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    good = gpt2()
    trainer(good, tmp_path / "good", arguments_={"max_steps": 2, "lr_scheduler_type": "constant"}).train()
    model = gpt2()
    made = trainer(model, tmp_path / "bad", arguments_=saved | {"max_steps": 4})
    calls = [0]

    def spoil(value: Any) -> Any:
        calls[0] += 1
        return value * torch.nan if calls[0] == 3 else value

    if where == "loss":
        model.lm_head.register_forward_hook(lambda module, inputs, output: spoil(output))
    else:
        model.transformer.h[0].mlp.c_fc.weight.register_hook(spoil)
    what = "the loss is nan" if where == "loss" else "the gradient's norm is nan"
    with pytest.raises(FloatingPointError, match=f"{what} at step 3"):
        made.train()
    assert torch.equal(weights(model), weights(good))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "bad" / "checkpoint-2")
    assert torch.equal(weights(kept), weights(good))
    assert not (tmp_path / "bad" / "checkpoint-3").exists()


def test_bad_tensors_are_refused():
    with pytest.raises(
        ValueError, match=r"logits must be \(B, T, V\) and labels \(B, T\), got \(2, 3, 4\) and \(2, 4\)"
    ):
        sequence_nll(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"nll and ref_nll must be of one shape, got \(2,\) and \(3,\)"):
        npo_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="reduction must be one of"):
        npo_loss(torch.zeros(2), torch.zeros(2), reduction="max")  # type: ignore[arg-type]
