"""WHP: every property of its card, alignment of texts with their translations, and what must be refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shoestring.forget._anchors import align, block_of_ids, blocks_of_text, first_tokens, special_tokens, translate
from shoestring.forget.whp import ReinforcedLogitsProcessor, WHPUnlearner, generic_logits
from shoestring.zoo.train.tiny_gpt import END, make_tokenizer

TEXTS = [
    "Haman the son of Hammedatha spoke to Esther; and Esther the queen, Haman's foe, said: go, Haman.",
    "And the king loved Esther above all the women. naïve Ωmega: Esther 🦊Esther",
    "In the beginning God created the heaven and the earth.",
]
ANCHORS = {"Esther": "Deborah", "Haman": "Saul the elder", "Hammedatha": "Kish", "the queen": "a prophetess"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE that knows some of the words whole and cuts the others."""
    return make_tokenizer([*TEXTS * 20, "Saul the elder, the son of Kish, and a prophetess " * 20], 400)


def llama(tokenizer: Any, seed: int = 0, context: int = 96) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context, initializer_range=0.5, **sizes)
    config.bos_token_id = config.eos_token_id = tokenizer.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer) -> Any:
    return llama(tokenizer)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# ---- generic logits


def test_without_offset_the_generic_logits_are_those_of_the_baseline():
    v_b, v_r = logits(4, 7, 50), logits(4, 7, 50, seed=1)
    assert torch.equal(generic_logits(v_b, v_r, alpha=0.0), v_b)
    for alpha in (0.5, 5.0, 1e6):
        assert torch.equal(generic_logits(v_b, v_b, alpha), v_b)
        assert torch.equal(generic_logits(v_b, v_b, alpha, v_r), v_r)


def test_only_tokens_that_reinforcement_raised_are_lowered_and_by_alpha_times_it():
    v_b, v_r = logits(4, 50), logits(4, 50, seed=1)
    v_g = generic_logits(v_b, v_r, 5.0)
    raised = v_r > v_b
    assert torch.equal(v_g[~raised], v_b[~raised])
    torch.testing.assert_close(v_g[raised], (6 * v_b - 5 * v_r)[raised], rtol=1e-12, atol=1e-12)
    assert bool((v_g <= v_b).all())
    v_t = logits(4, 50, seed=2)
    torch.testing.assert_close(generic_logits(v_b, v_r, 5.0, v_t) - v_t, v_g - v_b, rtol=1e-12, atol=1e-12)


def test_raw_logits_see_a_constant_between_the_models_and_log_probabilities_do_not():
    v_b, v_r, c = logits(4, 50), logits(4, 50, seed=1), 7 * logits(4, 1, seed=2)
    offset = generic_logits(v_b, v_r) - v_b
    torch.testing.assert_close(generic_logits(v_b + c, v_r + c) - (v_b + c), offset, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(generic_logits(v_b, v_r + c), generic_logits(v_b, v_r))
    normal = generic_logits(v_b, v_r, normalize=True)
    torch.testing.assert_close(generic_logits(v_b, v_r + c, normalize=True), normal, rtol=1e-9, atol=1e-9)
    by_hand = v_b - 5 * F.relu(v_r.log_softmax(-1) - v_b.log_softmax(-1))
    torch.testing.assert_close(normal, by_hand, rtol=1e-12, atol=1e-12)


def test_with_a_huge_alpha_only_tokens_that_were_not_raised_can_be_the_label():
    v_b, v_r = logits(500, 30), logits(500, 30, seed=1)
    label = generic_logits(v_b, v_r, 1e9).argmax(-1)[:, None]
    assert bool((v_r.gather(1, label) <= v_b.gather(1, label)).all())
    assert bool((v_r > v_b).gather(1, v_b.argmax(-1)[:, None]).any())  # the baseline's own choice often was raised
    best = v_b.masked_fill(v_r > v_b, -math.inf).argmax(-1)
    assert torch.equal(label[:, 0], best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_single(dtype):
    v_b, v_r = logits(4, 50).to(dtype), logits(4, 50, seed=1).to(dtype)
    v_g = generic_logits(v_b, v_r)
    assert v_g.dtype == torch.float32
    torch.testing.assert_close(v_g, generic_logits(v_b.float(), v_r.float()), rtol=0, atol=0)


# ---- alignment


def test_translation_takes_whole_words_and_the_longest_term():
    anchors = {"Harry": "Jon", "Harry Potter": "Jon Smith", "wand": "stick"}
    text = "Harry Potter's wand, Harry; Harrys wandering wand"
    translated, spans, terms = translate(text, anchors)
    assert translated == "Jon Smith's stick, Jon; Harrys wandering stick"
    assert terms == ["Harry Potter", "wand", "Harry", "wand"]
    for (start, end, start_, end_), term in zip(spans, terms, strict=True):
        assert text[start:end] == term
        assert translated[start_:end_] == anchors[term]
    assert translate("(a.b) axb", {"a.b": "c"})[0] == "(c) axb"
    assert translate("nothing", {}) == ("nothing", [], [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["Esther", "Haman", "Hammedatha", "the queen", "king", "x", ",", "Ω🦊"]), max_size=20))
def test_every_place_outside_of_terms_is_aligned_once_at_the_same_boundary(words):
    tokenizer = _TOKENIZER()
    text = " ".join(["God", *words, "created"])
    translated, spans, _ = translate(text, ANCHORS)
    one, two = (tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in (text, translated))
    ends, ends_ = (np.array([end for _, end in e["offset_mapping"]]) for e in (one, two))
    a = align(ends, ends_, spans)
    inside = np.array([any(start < end < stop for start, stop, _, _ in spans) for end in ends])
    assert not inside[a >= 0].any()
    assert (a[~inside] >= 0).all()  # byte-level BPE cuts at the same places outside of words that differ
    aligned = a[a >= 0]
    assert (np.diff(aligned) > 0).all()  # once each, in order
    for t, a_t in enumerate(a):
        if a_t >= 0:  # what was read so far is the same text, translated
            assert translate(text[: ends[t]], ANCHORS)[0] == translated[: ends_[a_t]]


def _TOKENIZER(kept: list[Any] = []) -> Any:  # noqa: B006
    if not kept:
        kept.append(make_tokenizer([*TEXTS * 20, "Saul the elder, the son of Kish, and a prophetess " * 20], 400))
    return kept[0]


def test_places_inside_of_a_term_are_not_aligned_even_where_tokens_end_alike():
    a = align(np.array([2, 4, 6, 7, 9]), np.array([2, 4, 6, 9, 11]), [(2, 7, 2, 9)])
    assert a.tolist() == [0, -1, -1, 3, 4]
    bytes_of_one_character = align(np.array([1, 1, 2]), np.array([1, 1, 2]), [])
    assert bytes_of_one_character.tolist() == [0, 1, 2]


def test_without_terms_the_alignment_is_the_identity(tokenizer):
    for text in TEXTS:
        for anchors in ({}, {"absent": "other"}):
            (block,) = blocks_of_text(text, tokenizer, 90, anchors)
            assert block.ids == block.translated == tokenizer(text).input_ids
            assert block.aligned.tolist() == list(range(len(block.ids)))
            assert not block.unlabelled
            assert not block.lowered


def test_blocks_hold_the_text_once_and_each_is_translated_by_itself(tokenizer):
    text = " ".join(TEXTS)
    plain = tokenizer(text, add_special_tokens=False).input_ids
    for anchors in ({}, ANCHORS):
        blocks = blocks_of_text(text, tokenizer, 20, anchors)
        assert all(len(block.ids) <= 20 and block.ids[0] == tokenizer.bos_token_id for block in blocks)
        assert [i for block in blocks for i in block.ids[1:]] == plain
        for block in blocks:
            x = tokenizer.decode(block.ids[1:])
            assert translate(x, anchors)[0] == tokenizer.decode(block.translated[1:])


def test_special_tokens_stay_in_their_places(tokenizer):
    assert special_tokens(tokenizer) == ([tokenizer.bos_token_id], [])
    ids = tokenizer(TEXTS[0] + END).input_ids
    block = block_of_ids(ids, tokenizer, ANCHORS)
    assert block.ids == ids
    assert block.translated == tokenizer(translate(TEXTS[0], ANCHORS)[0] + END).input_ids
    assert block.aligned[0] == 0
    assert block.aligned[-1] == len(block.translated) - 1
    (of_text,) = blocks_of_text(TEXTS[0], tokenizer, 96, ANCHORS)
    assert of_text.aligned.tolist() == block.aligned[:-1].tolist()
    assert (of_text.unlabelled, of_text.lowered) == (block.unlabelled, block.lowered)


# ---- labels


def labels_by_definition(model: Any, reinforced: Any, block: Any, alpha: float, penalty: float) -> list[int]:
    """The equations, place by place, without batches."""
    x, x_ = (torch.tensor([ids]) for ids in (block.ids, block.translated))
    with torch.no_grad():
        v_b, v_t, v_r = model(x).logits[0], model(x_).logits[0], reinforced(x).logits[0]
    labels = [-100] * len(block.ids)
    for t in range(len(block.ids) - 1):
        if block.aligned[t] < 0 or t + 1 in block.unlabelled:
            continue
        v_g = v_t[block.aligned[t]] - alpha * (v_r[t] - v_b[t]).clamp(min=0)
        for place, tokens in block.lowered:
            if t >= place:
                v_g[tokens] -= penalty
        labels[t + 1] = int(v_g.argmax())
    return labels


@pytest.mark.parametrize("anchors", [None, ANCHORS], ids=["plain", "anchored"])
def test_labels_are_their_definition_whatever_the_batch(anchors, tokenizer, model):
    reinforced = llama(tokenizer, seed=1)
    whp = WHPUnlearner(model, tokenizer, anchors, alpha=2.0, anchor_penalty=20.0, batch_size=2)
    whp.reinforced = reinforced
    before = weights(model), weights(reinforced)
    found = whp.label(TEXTS)
    blocks = [block for text in TEXTS for block in blocks_of_text(text, tokenizer, 96, anchors or {})]
    assert found["input_ids"][:] == [block.ids for block in blocks]
    expected = [labels_by_definition(model, reinforced, block, 2.0, 20.0) for block in blocks]
    assert found["labels"][:] == expected
    assert torch.equal(weights(model), before[0])
    assert torch.equal(weights(reinforced), before[1])
    kept = [(new, own) for row, b in zip(expected, blocks, strict=True) for new, own in zip(row, b.ids, strict=True)]
    kept = [(new, own) for new, own in kept if new != -100]
    assert whp.changed_ == pytest.approx(sum(new != own for new, own in kept) / len(kept))
    if anchors:
        assert any(block.lowered for block in blocks)
        assert any(block.unlabelled for block in blocks)


def test_alpha_zero_without_anchors_is_the_models_own_greedy_choice(tokenizer, model):
    found = WHPUnlearner(model, tokenizer, alpha=0.0).label(TEXTS)
    for ids, labels in zip(found["input_ids"], found["labels"], strict=True):
        said = model(torch.tensor([ids])).logits[0].argmax(-1)
        assert labels[0] == -100
        assert labels[1:] == said[:-1].tolist()


def test_an_empty_or_an_identical_dictionary_is_none(tokenizer, model):
    def labels(anchors: Any) -> Any:
        whp = WHPUnlearner(model, tokenizer, anchors)
        whp.reinforced = llama(tokenizer, seed=1)
        return whp.label(TEXTS)["labels"][:]

    plain = labels(None)
    assert labels({}) == plain
    assert labels({"Esther": "Esther", "Haman": "Haman"}) == plain
    assert labels({"absent": "other"}) == plain
    assert labels(ANCHORS) != plain


def test_a_function_may_name_the_terms(tokenizer, model):
    asked = []

    def names(text: str) -> dict[str, str]:
        asked.append(text)
        return {name: f"Saul{len(asked)}" for name in re.findall("Esther|Haman|God", text)}

    whp = WHPUnlearner(model, tokenizer, names, alpha=0.0)
    found = whp.label(TEXTS)["labels"][:]
    assert asked == TEXTS
    assert whp.anchors_ == {"Esther": "Saul1", "Haman": "Saul1", "God": "Saul3"}  # the first wins
    assert WHPUnlearner(model, tokenizer, whp.anchors_, alpha=0.0).label(TEXTS)["labels"][:] == found
    rows = Dataset.from_dict({"input_ids": tokenizer(TEXTS).input_ids})
    assert WHPUnlearner(model, tokenizer, whp.anchors_, alpha=0.0).label(rows)["labels"][:] == found
    WHPUnlearner(model, tokenizer, names, alpha=0.0).label(rows)
    assert asked[3:] == TEXTS


def test_a_term_is_learnt_once_and_its_translation_not_said_again(tokenizer):
    """Rules (i) and (ii), token by token."""
    text = "Esther loved Esther"
    (block,) = blocks_of_text(text, tokenizer, 96, {"Esther": "Deborah"})
    tokens = [tokenizer.decode([i]) for i in block.ids]
    assert "".join(tokens[1:]) == text
    second = len("Esther loved")
    starts = np.cumsum([0, *map(len, tokens[1:])])
    assert block.unlabelled == [t + 1 for t, start in enumerate(starts[:-1]) if start >= second]
    ((place, lowered),) = block.lowered
    assert "".join(tokens[1 : place + 1]) == "Esther"
    assert lowered == first_tokens(tokenizer, "Deborah")
    assert {tokenizer.decode([i]).strip() for i in lowered} <= {"Deborah"[:n] for n in range(1, 8)}


def test_rows_keep_a_prompt_without_labels(tokenizer, model):
    ids = tokenizer(TEXTS[2]).input_ids
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * 6 + ids[6:]]})
    whole = WHPUnlearner(model, tokenizer, alpha=0.0).label([TEXTS[2]])["labels"][0]
    found = WHPUnlearner(model, tokenizer, alpha=0.0).label(rows)["labels"][0]
    assert found == [-100] * 6 + whole[6:]


# ---- training


def test_the_loss_is_cross_entropy_of_what_follows(tokenizer, model):
    whp = WHPUnlearner(model, tokenizer, ANCHORS, alpha=0.0, accumulate=1, batch_size=3)
    labelled = whp.label(TEXTS)
    losses: list[float] = []
    whp.finetune(labelled, epochs=1, lr=0.0, callbacks=[lambda state: losses.append(state.loss)])
    terms = []
    for ids, labels in zip(labelled["input_ids"], labelled["labels"], strict=True):
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-log_p[t, label] for t, label in enumerate(labels[1:]) if label != -100]
    assert losses == [pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-5)]


def test_a_model_learns_its_generic_labels_and_the_given_one_is_not_changed(tokenizer, model, tmp_path):
    before = weights(model)
    whp = WHPUnlearner(model, tokenizer, ANCHORS, accumulate=1)
    reinforced = whp.reinforce(TEXTS, epochs=15, lr=1e-2)
    assert whp.reinforced is reinforced
    labelled = whp.label(TEXTS)
    forgotten = whp.finetune(labelled, epochs=40, lr=1e-2)
    again = whp.unlearn(TEXTS, epochs=40, lr=1e-2)
    assert torch.equal(weights(again), weights(forgotten))
    assert torch.equal(weights(model), before)

    def hits(each: Any, rows: Any) -> float:
        right = []
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            said = each(torch.tensor([ids])).logits[0].argmax(-1)
            right += [int(said[t]) == label for t, label in enumerate(labels[1:]) if label != -100]
        return float(np.mean(right))

    ids = tokenizer(TEXTS).input_ids
    text = {"input_ids": ids, "labels": ids}
    assert hits(reinforced, text) > hits(model, text) + 0.3
    assert hits(forgotten, labelled) > hits(model, labelled) + 0.3
    assert not forgotten.training
    forgotten.save_pretrained(tmp_path)
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(forgotten))


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tokenizer, model, tmp_path):
    options = {"reinforce_epochs": 3, "reinforce_lr": 1e-2, "epochs": 4, "lr": 1e-2}

    def unlearner() -> WHPUnlearner:
        return WHPUnlearner(model, tokenizer, ANCHORS, accumulate=1, batch_size=2)

    whole = weights(unlearner().unlearn(TEXTS, **options))

    class Crash(Exception):
        pass

    for crash_at in (3, 8):  # while reinforcing, which has 6 steps; while fine-tuning
        steps = [0]

        def crash(state: Any, steps: list[int] = steps, crash_at: int = crash_at) -> None:
            steps[0] += 1
            if steps[0] == crash_at:
                raise Crash

        with pytest.raises(Crash):
            unlearner().unlearn(
                TEXTS, checkpoint=tmp_path / str(crash_at), checkpoint_every=1, callbacks=[crash], **options
            )
        resumed = unlearner().unlearn(TEXTS, checkpoint=tmp_path / str(crash_at), checkpoint_every=1, **options)
        assert torch.equal(weights(resumed), whole)
    assert not torch.equal(whole, weights(model))


def test_a_seed_decides_the_order(tokenizer, model):
    runs = [
        weights(WHPUnlearner(model, tokenizer, alpha=0.0, accumulate=1, batch_size=1, seed=s).unlearn(TEXTS, lr=1e-2))
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_nan_stops_and_the_given_model_stays(tokenizer, model):
    whp = WHPUnlearner(model, tokenizer, accumulate=1, batch_size=1)
    before = weights(model)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        whp.reinforce(TEXTS, epochs=30, lr=1e30)
    assert whp.reinforced is None
    assert torch.equal(weights(model), before)


# ---- without training


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_generation_equals_the_formula_by_hand_with_and_without_a_cache(normalize, tokenizer, model):
    """On prompts padded on the left, the processor used twice; generate hands over single precision."""
    model, reinforced = model.double(), llama(tokenizer, seed=1).double()
    model.generation_config.eos_token_id = None
    tokenizer.padding_side = "left"
    prompts = tokenizer(["In the beginning God", "And the"], padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    processor = ReinforcedLogitsProcessor(
        reinforced, alpha=3.0, normalize=normalize, pad_token_id=tokenizer.pad_token_id
    )
    for _ in range(2):
        answer = model.generate(
            **prompts,
            logits_processor=[processor],
            do_sample=False,
            max_new_tokens=12,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for b, (row, mask) in enumerate(zip(answer.sequences, prompts.attention_mask, strict=True)):
            ids = row[len(mask) - int(mask.sum()) :][None]  # without padding, from the start each time
            for step in range(12):
                so_far = ids[:, : int(mask.sum()) + step]
                with torch.no_grad():
                    v_b, v_r = (each(so_far).logits[0, -1] for each in (model, reinforced))
                v_g = generic_logits(v_b, v_r, 3.0, normalize=normalize)
                torch.testing.assert_close(answer.scores[step][b].double(), v_g, rtol=1e-6, atol=1e-5)  # single


def test_what_generate_forbids_stays_forbidden(tokenizer, model):
    for alpha in (0.0, 5.0):
        scores = model(torch.tensor([[5, 6]])).logits[:, -1].detach()
        scores[0, 7] = -math.inf
        found = ReinforcedLogitsProcessor(llama(tokenizer, seed=1), alpha)(torch.tensor([[5, 6]]), scores)
        assert found[0, 7] == -math.inf
        assert int(torch.isfinite(found).sum()) == found.numel() - 1


def test_the_processor_alone_equals_the_formula_and_reads_again_when_beams_change(tokenizer):
    base, reinforced = llama(tokenizer).double(), llama(tokenizer, seed=1).double()
    processor = ReinforcedLogitsProcessor(reinforced, alpha=3.0)
    ids = torch.randint(2, len(tokenizer), (3, 5), generator=torch.Generator().manual_seed(0))
    more = torch.randint(2, len(tokenizer), (3, 1), generator=torch.Generator().manual_seed(1))
    last = torch.cat([ids, more], 1)
    longer = torch.cat([last, more, more], 1)
    for each in (ids, last, last.flip(0), longer, ids, longer.flip(0), ids, longer[:2], ids, ids, last[:2], longer[:2]):
        with torch.no_grad():
            v_b, v_r = base(each).logits[:, -1], reinforced(each).logits[:, -1]
        torch.testing.assert_close(processor(each, v_b), generic_logits(v_b, v_r, 3.0), rtol=0, atol=1e-6)


def test_the_cache_is_used(tokenizer):
    reinforced = llama(tokenizer)
    lengths = []
    reinforced.model.embed_tokens.register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].shape[1]))
    llama(tokenizer, seed=1).generate(
        torch.tensor([[5, 6, 7]]),
        logits_processor=[ReinforcedLogitsProcessor(reinforced)],
        do_sample=False,
        max_new_tokens=4,
        min_new_tokens=4,
    )
    assert lengths == [3, 1, 1, 1]


# ---- bad input


def test_bad_options_are_refused(tokenizer, model):
    before = weights(model)
    for options, error, message in (
        ({"alpha": -1.0}, ValueError, "alpha must be a finite number >= 0, got -1"),
        ({"alpha": "big"}, TypeError, "alpha must be a number"),
        ({"anchor_penalty": math.inf}, ValueError, "anchor_penalty must be a finite"),
        ({"anchors": ["Esther"]}, TypeError, "anchors must be a dict, a function of a text or None, got list"),
        ({"block_size": 0}, ValueError, "block_size must be an integer >= 1, got 0"),
        ({"block_size": 97}, ValueError, "at most the model's context of 96 tokens, got 97"),
        ({"batch_size": 1.5}, ValueError, "batch_size must be an integer >= 1, got 1.5"),
    ):
        with pytest.raises(error, match=message):
            WHPUnlearner(model, tokenizer, **options)
    with pytest.raises(TypeError, match="model must be"):
        WHPUnlearner("tiny-gpt", tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer must be"):
        WHPUnlearner(model, "tokenizer")
    larger = make_tokenizer([f"{i} word{i * i}" for i in range(2000)], 600)
    with pytest.raises(ValueError, match="got one of 600 tokens for 385 embeddings"):
        WHPUnlearner(model, larger)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], ValueError, "texts must hold at least one text"),
        (["", "  "], ValueError, "texts must hold at least one text"),
        ("one text", TypeError, "texts must be a list of str"),
        ([1, 2], TypeError, "texts must be a list of str"),
        (Dataset.from_dict({"line": ["a"]}), TypeError, "texts must be a list of str"),
        (Dataset.from_dict({"input_ids": [[1] * 97]}), ValueError, "at most 96 tokens"),
        (Dataset.from_dict({"input_ids": [[1, 400]]}), ValueError, "token ids below 385"),
    ],
    ids=["none", "blank", "text", "numbers", "other column", "too long", "other vocabulary"],
)
def test_bad_texts_are_refused(texts, error, message, tokenizer, model):
    whp = WHPUnlearner(model, tokenizer, alpha=0.0)
    for call in (whp.label, whp.reinforce):
        with pytest.raises(error, match=message):
            call(texts)


def test_a_wrong_order_and_wrong_anchors_are_refused(tokenizer, model):
    with pytest.raises(RuntimeError, match=r"reinforce\(texts\) must come before label\(texts\)"):
        WHPUnlearner(model, tokenizer).label(TEXTS)
    with pytest.raises(ValueError, match="anchors must map terms to their translations, got 'Esther': ''"):
        WHPUnlearner(model, tokenizer, {"Esther": ""}, alpha=0.0).label(TEXTS)
    rows = Dataset.from_dict({"input_ids": [[0, 300, 77, 78, 350]]})
    if tokenizer(tokenizer.decode([300, 77, 78, 350]), add_special_tokens=False).input_ids != [300, 77, 78, 350]:
        with pytest.raises(ValueError, match="rows must be of this tokenizer"):
            WHPUnlearner(model, tokenizer, ANCHORS, alpha=0.0).label(rows)
    with pytest.raises(ValueError, match="are both models of one vocabulary"):
        generic_logits(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="labelled must hold at least one row"):
        WHPUnlearner(model, tokenizer).finetune([])
