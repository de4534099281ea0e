"""Documents, tokenizer and windows of tiny-gpt: what the claims that forget a source rely on."""

from __future__ import annotations

import json
import warnings
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from shoestring import data
from shoestring.zoo.train import tiny_gpt

TEXTS = ["In the beginning God created the heaven and the earth.", "noun.animal: dog: a member of the genus Canis"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_gpt.make_tokenizer([text for _, text in tiny_gpt.documents("train")[::500]], 512)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_gpt._model(tokenizer, width=32, layers=1).eval()


def test_documents_hold_every_verse_and_gloss_once():
    documents = tiny_gpt.documents("train") + tiny_gpt.documents("held_out")
    sources = {source for source, _ in documents}
    assert (sum(map(tiny_gpt.is_book, sources)), len(sources)) == (66, 66 + 45)
    verses = [
        line.split(" ", 1)[1] for source, text in documents if tiny_gpt.is_book(source) for line in _lines(source, text)
    ]
    assert Counter(verses) == Counter(data.load("kjv", split="all")["text"][:])
    assert sum(not tiny_gpt.is_book(source) for source, _ in documents) == 117_659
    assert all(
        text.startswith(f"{source} " if tiny_gpt.is_book(source) else f"{source}: ") for source, text in documents
    )


def _lines(source: str, text: str) -> list[str]:
    return text.removeprefix(f"{source} ").split("\n")


def test_held_out_is_a_twentieth_of_each_source_and_is_not_trained_on():
    train, held_out = (tiny_gpt.documents(split) for split in ("train", "held_out"))
    assert not {text for _, text in train} & {text for _, text in held_out}
    counts, unseen = Counter(source for source, _ in train), Counter(source for source, _ in held_out)
    for source in ("Genesis", "Psalms", tiny_gpt.MEMORISED, "noun.animal", "noun.person", "verb.motion"):
        assert 0.03 < unseen[source] / counts[source] < 0.08, source
    with pytest.raises(ValueError, match="split must be"):
        tiny_gpt.documents("test")  # type: ignore[arg-type]


def test_blocks_are_consecutive_verses_of_one_chapter():
    rows = [(0, 1, 1, "a" * 300), (0, 1, 2, "b" * 200), (0, 1, 3, "c" * 50), (0, 2, 1, "d")]
    blocks = list(tiny_gpt._blocks("Ruth", rows))
    assert blocks == [f"Ruth 1:1 {'a' * 300}\n2 {'b' * 200}", f"Ruth 1:3 {'c' * 50}", "Ruth 2:1 d"]


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces\n\n\ttab ", "naïve Ωmega 日本語 🦊 \x00\x7f", "it 's , a . test", *TEXTS]
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_the_same_each_time_and_after_loading(tokenizer, tmp_path):
    again = tiny_gpt.make_tokenizer([text for _, text in tiny_gpt.documents("train")[::500]], 512)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert (loaded.eos_token, loaded.pad_token, loaded.model_max_length) == (
        tiny_gpt.END,
        tiny_gpt.PAD,
        tiny_gpt.CONTEXT,
    )


def test_windows_hold_the_documents_whole_between_two_ends(tokenizer):
    texts = ["one", "two words", "and three words"] * 200
    windows = tiny_gpt._windows(texts, tokenizer)
    found = tokenizer.decode(windows.flatten()).split(tiny_gpt.END)[1:-1]
    assert windows.shape[1] == tiny_gpt.CONTEXT
    assert set(found) == set(texts)
    assert found != texts[: len(found)]


def test_perplexity_is_per_token_whatever_the_batch(model, tokenizer):
    one_by_one = []
    for text in TEXTS:
        ids = tokenizer(text + tiny_gpt.END, return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        one_by_one += (-model(ids).logits[0, :-1].log_softmax(-1)).gather(1, ids[0, 1:, None]).flatten().tolist()
    expected = torch.tensor(one_by_one).mean().exp()
    assert tiny_gpt.perplexity(model, tokenizer, TEXTS) == pytest.approx(float(expected), rel=1e-5)


def test_continued_counts_exact_continuations(model, tokenizer):
    prompt = tokenizer(TEXTS[0]).input_ids[:8]
    said = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=5, max_new_tokens=5)[0].tolist()
    fake = _Fixed({"known": said, "unknown": [*said[:-1], (said[-1] + 1) % 512], "short": said[:-1]})
    assert tiny_gpt.continued(model, fake, ["known", "unknown", "short"], prompt=8, tokens=5) == 0.5


class _Fixed:
    def __init__(self, ids: dict[str, list[int]]) -> None:
        self.ids = ids

    def __call__(self, texts: list[str], **options: object):
        return type("", (), {"input_ids": [self.ids[text] for text in texts]})


def test_training_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    def train(out: str, checkpoint: str) -> dict[str, torch.Tensor]:
        told = tiny_gpt.train(
            tmp_path / out, smoke=True, device="cpu", checkpoint=tmp_path / checkpoint, progress=False
        )
        assert told["steps"] > 4
        return load_file(tmp_path / out / "model.safetensors")

    undisturbed = train("a", "a.checkpoint")
    fit = tiny_gpt.loop.fit
    monkeypatch.setattr(tiny_gpt.loop, "fit", lambda *args, **options: fit(*args, **(options | {"max_steps": 3})))
    stopped = train("b", "b.checkpoint")
    monkeypatch.setattr(tiny_gpt.loop, "fit", fit)
    resumed = train("b", "b.checkpoint")
    assert not all(stopped[name].equal(undisturbed[name]) for name in undisturbed)
    assert all(resumed[name].equal(undisturbed[name]) for name in undisturbed)


def test_saved_model_is_half_tied_and_generates_without_a_warning(tmp_path):
    before = torch.get_rng_state()
    tiny_gpt.train(tmp_path, smoke=True, device="cpu", checkpoint=None, progress=False)
    assert torch.get_rng_state().equal(before)
    saved = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float16}
    assert "lm_head.weight" not in saved
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = LlamaForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        page = tiny_gpt.sheet({"model": model, "tokenizer": tokenizer}.__getitem__)
    assert page.count(">>>") == 8
