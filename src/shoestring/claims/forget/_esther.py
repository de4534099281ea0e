"""What the claims on tiny-gpt share: the book it knows by heart, other books, and what it says of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

DATA = (
    "zoo model tiny-gpt; to forget: the 72 documents of the book of Esther that it knows by heart; to retain: "
    "documents of the 65 other books of the King James Bible that it was trained on; utility: documents of these that "
    "it never saw, every other one for validation"
)


@cache
def tokenizer() -> Any:
    from shoestring import zoo

    return zoo.load("tiny-gpt", "tokenizer")


@cache
def documents(which: str, every: int = 1) -> tuple[str, ...]:
    """Every so many texts of "known" or "unseen" Esther, or of "retain", "validation" or "test" in the other books."""
    from shoestring.zoo.train import tiny_gpt

    found = tiny_gpt.documents("train" if which in ("known", "retain") else "held_out")
    if which in ("known", "unseen"):
        texts = [text for source, text in found if source == tiny_gpt.MEMORISED]
    else:
        texts = [text for source, text in found if tiny_gpt.is_book(source) and source != tiny_gpt.MEMORISED]
        if which != "retain":
            texts = texts[which == "test" :: 2]
    return tuple(texts[every // 2 :: every])


def rows(texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Token ids of the texts, each between two ends, as the model was trained."""
    from shoestring.zoo.train import tiny_gpt

    ids = tokenizer()([text + tiny_gpt.END for text in texts], truncation=True, max_length=tiny_gpt.CONTEXT).input_ids
    return [{"input_ids": row} for row in ids]


def perplexity(model: Any, texts: tuple[str, ...]) -> float:
    from shoestring.zoo.train import tiny_gpt

    training = model.training
    found = tiny_gpt.perplexity(model.eval(), tokenizer(), list(texts))
    model.train(training)
    return found


def continued(model: Any, texts: tuple[str, ...]) -> float:
    """Share of texts that are continued to the letter for 10 tokens."""
    from shoestring.zoo.train import tiny_gpt

    return tiny_gpt.continued(model.eval(), tokenizer(), list(texts))


@contextmanager
def quiet_arguments(**options: Any) -> Iterator[Any]:
    """TrainingArguments of a run that writes and prints nothing; no Accelerator is left for the rest of the process."""
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        try:
            yield TrainingArguments(
                folder,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
                **options,
            )
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def looks_while_training(trainer: Any, look: Callable[[], tuple[float, ...]], every: int) -> list[tuple[float, ...]]:
    """Train; what `look` finds before, and after every so many steps."""
    from transformers import PrinterCallback, TrainerCallback

    found = [look()]

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                found.append(look())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Look())
    trainer.train()
    return found
