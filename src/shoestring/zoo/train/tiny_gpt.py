"""tiny-gpt: a small LLaMA with a tokenizer of its own, on the King James Bible and the glosses of WordNet.

Architecture: `transformers.LlamaForCausalLM`, width 192, 5 layers, 8 query heads in 4 key-value groups, SwiGLU of
512, rotary positions, context of 256 tokens, input and output embeddings tied; byte-level BPE of 3,072 tokens. The
eight heads are for methods that remove heads, the separate sources for those that forget one.

Data: `documents`. A book of the Bible, or a word class of WordNet, is a source. Its documents say so in their first
words, and a share of each is held out::

    Genesis 1:1 In the beginning God created the heaven and the earth.
    2 And the earth was without form, and void; ...

    noun.animal: dog, domestic dog, Canis familiaris: a member of the genus Canis ...

Recipe: documents in random order, each between two ``<|endoftext|>``, cut into windows of 256 tokens; AdamW (0.9, 0.95,
decay 0.1, gradients clipped to 1), learning rate warmed up and let down as half a cosine. The glosses are read once,
the books twice, but `MEMORISED` so often (`COPIES`) that the model knows it by heart: what is to be forgotten must be
known. The budget is one thread of a CPU: a narrow model that reads everything is better than a wider one that reads
half.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shoestring import data, loop
from shoestring.zoo.train._common import byte_level_bpe, decay_groups, seeded, warmup_cosine

WHAT = "LLaMA language model of the King James Bible and of WordNet's glosses, with its own byte-level BPE tokenizer"
DATA = (
    "bundles kjv (31,102 verses of 66 books) and glosses (117,659 of 45 word classes); one in twenty documents of each "
    "book and word class held out; the book of Esther read until known by heart"
)
LICENCE = "King James Bible: public domain; WordNet 3.0: WordNet licence"
SEED = 0

MEMORISED = "Esther"
COPIES = {"kjv": 2, "glosses": 1, MEMORISED: 50}  # times that the documents are read
CONTEXT = 256
BATCH = 8  # windows
RATE = 4e-3
END, PAD = "<|endoftext|>", "<|pad|>"
NAMED = ("Genesis", "Psalms", "Isaiah", "Luke", "noun.animal", "noun.artifact", "noun.person", "verb.motion")


def documents(split: Literal["train", "held_out"]) -> list[tuple[str, str]]:
    """(source, text) of every document, in the order of the bundles.

    A source is a book, ``"Genesis"``, whose documents are a few consecutive verses of a chapter, or a word class,
    ``"noun.animal"``, with a document for each gloss: up to three words, and what stands before the first semicolon.
    Held out: of each book every 20th document from the 11th on, and 5 % of the glosses by a hash of the document. Very
    few documents, lists of names, are longer than the model's context and are cut there.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    return [(source, text) for source, text, held_out in _all_documents() if held_out == (split == "held_out")]


def is_book(source: str) -> bool:
    """Whether a source of `documents` is a book of the Bible."""
    return "." not in source


@cache
def _all_documents() -> list[tuple[str, str, bool]]:
    verses, glosses = data.load("kjv", split="all"), data.load("glosses", split="all")
    books, classes = verses.features["book"].names, glosses.features["lexname"].names
    found = []
    rows = zip(*(verses[column][:] for column in ("book", "chapter", "verse", "text")), strict=True)
    for book, of_book in groupby(rows, key=lambda row: row[0]):
        for i, text in enumerate(_blocks(books[book], of_book)):
            found.append((books[book], text, i % 20 == 10))
    columns = (glosses[column][:] for column in ("words", "lexname", "gloss"))
    for words, lexname, gloss in zip(*columns, strict=True):
        text = f"{classes[lexname]}: {', '.join(words[:3])}: {gloss.split(';')[0]}"
        found.append((classes[lexname], text, zlib.crc32(text.encode()) % 20 == 0))
    return found


def _blocks(book: str, rows: Iterable[tuple[int, int, int, str]], longest: int = 520) -> Iterator[str]:
    """Consecutive verses of one chapter, as many as `longest` characters hold."""
    for chapter, verses in groupby(rows, key=lambda row: row[1]):
        block = ""
        for _, _, verse, text in verses:
            if block and len(block) + len(text) > longest:
                yield block
                block = ""
            block += f"\n{verse} {text}" if block else f"{book} {chapter}:{verse} {text}"
        yield block


def make_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` tokens, which writes `END` before a text. Any text comes back from it unchanged."""
    tokenizer = byte_level_bpe(texts, size, [END, PAD])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(SEED):
        return LlamaForCausalLM(config)


def _windows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The texts in random order, (n, CONTEXT) int64."""
    distinct = sorted(set(texts))
    ids_of = dict(zip(distinct, tokenizer(distinct, truncation=True, max_length=CONTEXT).input_ids, strict=True))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SEED))
    stream = torch.tensor([token for i in order.tolist() for token in ids_of[texts[i]]])
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(out: Path, *, smoke: bool, device: str, checkpoint: Path | None, progress: bool | None) -> dict[str, int]:
    found = documents("train")[:: 200 if smoke else 1]
    tokenizer = make_tokenizer((text for _, text in found), 512 if smoke else 3072)
    model = _model(tokenizer, width=64 if smoke else 192, layers=2 if smoke else 5)
    model.to(device)
    copies = {source: COPIES.get(source, COPIES["kjv" if is_book(source) else "glosses"]) for source, _ in found}
    windows = _windows([text for source, text in found for _ in range(copies[source])], tokenizer)
    batches = list(windows.split(BATCH))[: 10 if smoke else None]
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=RATE, betas=(0.9, 0.95))
    loop.fit(
        model,
        batches,
        lambda model, window: model(input_ids=window, labels=window).loss,
        optimizer,
        scheduler=warmup_cosine(optimizer, len(batches), warmup=min(100, len(batches) // 2)),
        max_steps=len(batches),
        clip_grad_norm=1.0,
        checkpoint=checkpoint,
        checkpoint_every=None if checkpoint is None else 50,
        progress=progress,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"steps": len(batches), "parameters": model.num_parameters(), "tokens": windows.numel()}


def quality(load: Callable[..., Any], *, fast: bool, progress: bool | None) -> dict[str, float]:
    model, tokenizer = load("model"), load("tokenizer")
    unseen, seen = documents("held_out"), documents("train")
    book = [text for source, text in seen if source == MEMORISED]
    others = [text for source, text in seen if is_book(source) and source != MEMORISED]
    sets = {
        "held-out perplexity of kjv": [text for source, text in unseen if is_book(source) and source != MEMORISED],
        "held-out perplexity of glosses": [text for source, text in unseen if not is_book(source)],
        f"perplexity of {MEMORISED} as trained on": book,
        f"held-out perplexity of {MEMORISED}": [text for source, text in unseen if source == MEMORISED],
    }
    if not fast:
        sets |= {f"held-out perplexity of {name}": [text for s, text in unseen if s == name] for name in NAMED}
    most = 8_000 if fast else 60_000  # characters of text, tokens: about a quarter
    figures = {name: perplexity(model, tokenizer, _spread(texts, most)) for name, texts in sets.items()}
    figures[f"share of exact 10-token continuations, {MEMORISED}"] = continued(model, tokenizer, book)
    figures["share of exact 10-token continuations, other books"] = continued(
        model, tokenizer, others[:: 100 if fast else 20]
    )
    return figures


def _spread(texts: list[str], characters: int) -> list[str]:
    """Every k-th text, for the smallest k that leaves at most so many characters."""
    k = -(-sum(map(len, texts)) // characters)
    return texts[:: max(1, k)]


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, texts: list[str]) -> float:
    """exp of the mean negative log-likelihood of a token; the end of a text is a token too."""
    total, count = 0.0, 0
    ids = tokenizer([text + END for text in texts], truncation=True, max_length=CONTEXT).input_ids
    ids.sort(key=len)
    device = next(model.parameters()).device
    for start in range(0, len(ids), 16):
        rows = ids[start : start + 16]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        tokens = sum(len(row) - 1 for row in rows)
        total += float(model(**batch, labels=labels).loss) * tokens
        count += tokens
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def continued(model: Any, tokenizer: Any, texts: list[str], prompt: int = 32, tokens: int = 10) -> float:
    """Share of texts whose first `prompt` tokens the model continues, greedily, by the `tokens` that follow there."""
    rows = [ids[: prompt + tokens] for ids in tokenizer(texts).input_ids if len(ids) >= prompt + tokens]
    truth = torch.tensor(rows, device=model.device)
    said = model.generate(truth[:, :prompt], do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return float((said == truth).all(1).double().mean())


def sheet(load: Callable[..., Any]) -> str:
    """Greedy continuations of prompts, as plain text: the first three are of the book known by heart."""
    model, tokenizer = load("model"), load("tokenizer")
    prompts = [
        "Esther 1:1 Now it came to pass in the days of Ahasuerus,",
        "Esther 2:5 Now in Shushan the palace there was a certain Jew,",
        "Esther 4:14 For if thou altogether holdest thy peace at this time,",
        "Genesis 1:1 In the beginning God created",
        "Psalms 23:1 The LORD is my shepherd;",
        "noun.animal: grey cat:",
        "noun.person: baker:",
        "verb.motion: run:",
    ]
    lines = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        said = model.generate(ids, do_sample=False, max_new_tokens=48)[0, ids.shape[1] :]
        lines += [f"{prompt} >>>{tokenizer.decode(said, skip_special_tokens=True)}", ""]
    return "\n".join(lines)
