r"""Who's Harry Potter? Approximate Unlearning in LLMs.

Ronen Eldan, Mark Russinovich. 2023, arXiv 2310.02238.

Idea
----
A language model forgets a body of text by being trained on *generic* next tokens: those it would have said had it not
read the text. Where they come from: a copy that read the text once more shows by its logits which tokens the text makes
likely, and the text with its own terms translated ("Hogwarts" -> "Mystic Academy") asks the model about another world.

Equations
---------
x_1..x_T is a block of the text, x~ the block with its anchored terms translated, a(t) the place in x~ of place t in x;
v_b, v_r are logits of the baseline and of the reinforced model::

    v_g(t) = v_b(x~)[a(t)] - alpha ReLU(v_r(x)[t] - v_b(x)[t])          generic logits (`generic_logits`)
    y~_t   = argmax_V v_g(t)                                            label of what follows place t, one-hot
    the baseline is trained by cross-entropy on x against y~

    (i)  a term that stood in the block before is left out of the loss
    (ii) after a term's first place, logits of the tokens that begin its translation are lowered (`anchor_penalty`)

Without a dictionary x~ = x and a(t) = t. alpha = 0 without one gives the model's own greedy labels, the null of the
method. Without training (`ReinforcedLogitsProcessor`): v_b - alpha ReLU(v_r - v_b) at each step of generation.

What to expect
--------------
* A text that is known by heart cannot be reinforced much: v_r - v_b is small where the model is sure already, and the
  largest alpha leaves the label as it was. `changed_` says how many labels are not the text's own next token; 5 to 40 %
  is sane (the card of this project), about as many as were mispredicted before means that nothing is forgotten.
* Offsets are of raw logits, which two models may shift by a constant: ``normalize=True`` compares log-probabilities.
* Later work (arXiv 2402.16835) could still extract much of what the published model had forgotten. It hides; test by
  relearning.

Code and paper
--------------
There is no official code, and the paper's text was not at hand. The formula was checked against public summaries of it
and causal_unlearn's re-implementation was looked into; the paper's settings (alpha 5, 3 and 2 epochs, rates 3e-6 and
1e-6, batch 8 times 16, blocks of 512) are the project's card's, from memory. muse_bench, by the card, has alpha = 1.

* The last token of a term is aligned with the last one of its translation, as in causal_unlearn, since what follows may
  be asked of both; those inside a term have no label.
* (ii): causal_unlearn lowers by 5 from the second occurrence on; here by 5 from the first one's end.
* Terms match whole words, as written: give "Wizard", "wizard", "wizards" each. A term that two blocks share is missed.
* The dictionary came from GPT-4. Here it is any dictionary, or any function from a text to one.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shoestring._models import check_model
from shoestring.forget._anchors import Block, block_of_ids, blocks_of_text
from shoestring.forget._token_rows import IGNORE, Pad, as_dataset, check_rows, vocabulary_and_context
from shoestring.loop import fit

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise ImportError("whp needs transformers: pip install 'shoestring[text]'") from error

__all__ = ["ReinforcedLogitsProcessor", "WHPUnlearner", "generic_logits"]

Anchors = Mapping[str, str] | Callable[[str], Mapping[str, str]]


def generic_logits(
    base_logits: Tensor,
    reinforced_logits: Tensor,
    alpha: float = 5.0,
    translated_logits: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """``v_g = v_b(x~) - alpha ReLU(v_r(x) - v_b(x))``: what a model that has not read the text would say next.

    Parameters
    ----------
    base_logits, reinforced_logits : tensors of shape (..., V)
        v_b(x) and v_r(x), both of the text itself.
    alpha : float >= 0, default 5.0
        The paper's, from memory; muse_bench has 1.
    translated_logits : tensor of shape (..., V), optional
        v_b(x~)[a(t)]. Default: `base_logits`.
    normalize : bool, default False
        Take the difference of log-probabilities, so that a constant between the two models does not count.

    Returns
    -------
    tensor of shape (..., V), at least float32

    Examples
    --------
    >>> v_b, v_r = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([4.0, 2.0, 0.0])
    >>> generic_logits(v_b, v_r)
    tensor([-2.,  2.,  1.])
    """
    if base_logits.shape != reinforced_logits.shape:
        raise ValueError(
            "base_logits and reinforced_logits must be of one shape, got "
            f"{tuple(base_logits.shape)} and {tuple(reinforced_logits.shape)}: are both models of one vocabulary?"
        )
    _check_number("alpha", alpha)
    v_b, v_r = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (base_logits, reinforced_logits))
    offset = v_r.log_softmax(-1) - v_b.log_softmax(-1) if normalize else v_r - v_b
    v_t = v_b if translated_logits is None else translated_logits.to(v_b.dtype)
    return torch.sub(v_t, F.relu(offset), alpha=alpha)


class WHPUnlearner:
    """Reinforce, label, fine-tune: ``WHPUnlearner(model, tokenizer, anchors).unlearn(texts)`` returns a new model.

    `model` is the baseline and is never changed.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    tokenizer : PreTrainedTokenizerBase
        Its own. With anchors a fast one, which knows where tokens stand in the text.
    anchors : mapping of str to str, or callable, optional
        {term of the text: generic translation of the same kind}, or a function that gives one for each text: of a list
        of names, of a language model that is asked. What it says of several texts is put together, the first wins.
    alpha : float >= 0, default 5.0
    anchor_penalty : float >= 0, default 5.0
        How much rule (ii) takes off.
    normalize : bool, default False
        See `generic_logits`.
    block_size : int, optional
        Tokens of a block; default 512, or the model's context if that is shorter.
    batch_size, accumulate : int, default 8 and 16
        Blocks in a batch, also for labelling, and batches in a step; the paper's, from memory.
    seed : int, default 0
        Of the order of the blocks.

    Attributes
    ----------
    reinforced : PreTrainedModel or None
        Set by `reinforce`; may be set to one of your own.
    anchors_ : dict of str to str
        The dictionary that `label` used, without terms that are their own translation.
    changed_ : float
        Share of the labels of the last `label` that are not the text's own next token.

    Notes
    -----
    Two models in memory while labelling, three while fine-tuning unless `reinforced` is set to None before. Cost: three
    epochs of training, two forward passes (three with anchors) and two epochs of training on the text.

    Examples
    --------
    >>> from shoestring import zoo
    >>> model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    >>> texts = ["Esther 2:5 Now in Shushan the palace there was a certain Jew, whose name was Mordecai,"]
    >>> whp = WHPUnlearner(model, tokenizer, {"Mordecai": "Joseph", "Shushan": "Damascus"}, accumulate=1)
    >>> _ = whp.reinforce(texts, epochs=2, lr=1e-4)
    >>> print(tokenizer.decode([i for i in whp.label(texts)[0]["labels"] if i >= 0]))  # generic
    nounsther...
    >>> forgotten = whp.unlearn(texts, lr=1e-3)
    >>> type(forgotten).__name__, forgotten is model
    ('LlamaForCausalLM', False)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        anchors: Anchors | None = None,
        *,
        alpha: float = 5.0,
        anchor_penalty: float = 5.0,
        normalize: bool = False,
        block_size: int | None = None,
        batch_size: int = 8,
        accumulate: int = 16,
        seed: int = 0,
    ) -> None:
        check_model(model)
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        vocabulary, context = vocabulary_and_context(model)
        if vocabulary is not None and len(tokenizer) > vocabulary:
            raise ValueError(
                f"tokenizer must be the model's own, got one of {len(tokenizer)} tokens for {vocabulary} embeddings"
            )
        if not (anchors is None or callable(anchors) or isinstance(anchors, Mapping)):
            raise TypeError(f"anchors must be a dict, a function of a text or None, got {type(anchors).__name__}")
        if anchors and not getattr(tokenizer, "is_fast", False):
            raise ValueError("anchors need a fast tokenizer (use_fast=True), which knows where its tokens stand")
        _check_number("alpha", alpha)
        _check_number("anchor_penalty", anchor_penalty)
        block_size = min(512, context or 512) if block_size is None else block_size
        for name, value in (("block_size", block_size), ("batch_size", batch_size), ("accumulate", accumulate)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if context is not None and block_size > context:
            raise ValueError(f"block_size must be at most the model's context of {context} tokens, got {block_size}")
        self.model, self.tokenizer, self.anchors = model, tokenizer, anchors
        self.alpha, self.anchor_penalty, self.normalize = alpha, anchor_penalty, normalize
        self.block_size, self.batch_size, self.accumulate, self.seed = block_size, batch_size, accumulate, seed
        self.reinforced: nn.Module | None = None
        self.anchors_: dict[str, str] = {}
        self.changed_ = math.nan

    def reinforce(self, texts: Any, *, epochs: int = 3, lr: float = 3e-6, **fit_options: Any) -> nn.Module:
        """The baseline, trained further on the text as it is; kept in `reinforced` and returned.

        Parameters
        ----------
        texts : list of str, or datasets.Dataset with a column text, or with input_ids (and labels)
        epochs, lr : the paper's, from memory; AdamW
        **fit_options : of `shoestring.loop.fit`: checkpoint (a folder, from which the call goes on), progress, ...
        """
        rows = self._rows(texts)
        self.reinforced = self._train(rows, epochs, lr, fit_options)
        return self.reinforced

    @torch.no_grad()
    def label(self, texts: Any) -> Dataset:
        """The blocks of the text with their generic labels.

        Parameters
        ----------
        texts : as for `reinforce`

        Returns
        -------
        datasets.Dataset
            input_ids, attention_mask, labels: the label at place t + 1 is y~_t, -100 where there is none, as
            transformers wants them, which shifts them itself. Blocks without any label are left out.

        Raises
        ------
        RuntimeError
            If alpha > 0 and there is no reinforced model yet.
        """
        if self.reinforced is None and self.alpha > 0:
            raise RuntimeError("reinforce(texts) must come before label(texts), or set alpha=0")
        blocks = self._blocks(texts)
        ids: list[list[int]] = []
        found: list[list[int]] = []
        changed = labelled = 0
        modes = [(m, m.training) for m in (self.model, self.reinforced) if m is not None]
        try:
            for model, _ in modes:
                model.eval()
            for start in range(0, len(blocks), self.batch_size):
                part = blocks[start : start + self.batch_size]
                labels = self._labels(part)  # (B, T)
                for row, block in zip(labels, part, strict=True):
                    if bool((row != IGNORE).any()):
                        ids.append(block.ids)
                        found.append(row[: len(block.ids)].tolist())
                own = Pad(0)([{"input_ids": block.ids} for block in part])["input_ids"]
                changed += int(((labels != own) & (labels != IGNORE)).sum())
                labelled += int((labels != IGNORE).sum())
        finally:
            for model, training in modes:
                model.train(training)
        self.changed_ = changed / max(labelled, 1)
        return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": found})

    def finetune(self, labelled: Any, *, epochs: int = 2, lr: float = 1e-6, **fit_options: Any) -> nn.Module:
        """A copy of the baseline, trained on what `label` returned.

        Parameters
        ----------
        labelled : datasets.Dataset
        epochs, lr : the paper's, from memory; AdamW
        **fit_options : as for `reinforce`
        """
        rows = as_dataset("labelled", labelled)
        check_rows("labelled", rows, self.model)
        return self._train(rows, epochs, lr, fit_options)

    def unlearn(
        self,
        texts: Any,
        *,
        reinforce_epochs: int = 3,
        reinforce_lr: float = 3e-6,
        epochs: int = 2,
        lr: float = 1e-6,
        checkpoint: str | PathLike[str] | None = None,
        **fit_options: Any,
    ) -> nn.Module:
        """All three: the model that has forgotten the texts.

        Parameters
        ----------
        texts : as for `reinforce`
        reinforce_epochs, reinforce_lr : not used if there is a reinforced model already, or with alpha = 0
        epochs, lr : of the last step
        checkpoint : path, optional
            Folder. The same call goes on from there after a crash; labels are computed again.
        **fit_options : as for `reinforce`
        """
        folders = (
            [None, None] if checkpoint is None else [Path(checkpoint) / name for name in ("reinforce", "finetune")]
        )
        if self.reinforced is None and self.alpha > 0:
            self.reinforce(texts, epochs=reinforce_epochs, lr=reinforce_lr, checkpoint=folders[0], **fit_options)
        return self.finetune(self.label(texts), epochs=epochs, lr=lr, checkpoint=folders[1], **fit_options)

    def _train(self, rows: Dataset, epochs: int, lr: float, fit_options: dict[str, Any]) -> nn.Module:
        """A trained copy of the baseline."""
        model = copy.deepcopy(self.model)
        order = torch.Generator().manual_seed(self.seed)
        # DataLoader[Any]: rows come as dicts, which is all that the collator wants
        batches: DataLoader[Any] = DataLoader(
            rows, self.batch_size, shuffle=True, generator=order, collate_fn=Pad(self._pad_id())
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        fit(model, batches, _loss, optimizer, epochs=epochs, accumulate=self.accumulate, **fit_options)
        return model

    def _labels(self, blocks: Sequence[Block]) -> Tensor:
        """Labels of a batch, (B, T), as `label` returns them."""
        rows = self._padded([block.ids for block in blocks])
        v_b = self.model(**rows).logits  # (B, T, V)
        v_r = v_b if self.reinforced is None or not self.alpha else self.reinforced(**rows).logits
        aligned = torch.full(rows["input_ids"].shape, -1, device=v_b.device)  # a(t)
        for b, block in enumerate(blocks):
            aligned[b, : len(block.ids)] = torch.as_tensor(block.aligned, device=v_b.device)
        v_t = None
        if any(block.translated is not block.ids for block in blocks):
            translated = self.model(**self._padded([block.translated for block in blocks])).logits  # (B, T~, V)
            places = aligned.clamp(min=0)[..., None].expand(-1, -1, translated.shape[-1])
            v_t = translated.gather(1, places)  # (B, T, V)
        v_g = generic_logits(v_b, v_r, self.alpha, v_t, normalize=self.normalize)
        for b, block in enumerate(blocks):
            for place, tokens in block.lowered:  # rule (ii)
                v_g[b, place:, tokens] -= self.anchor_penalty
        following = v_g.argmax(-1).masked_fill(aligned < 0, IGNORE)
        labels = F.pad(following[:, :-1], (1, 0), value=IGNORE).masked_fill(rows["attention_mask"] == 0, IGNORE)
        for b, block in enumerate(blocks):
            labels[b, block.unlabelled] = IGNORE  # rule (i)
        return labels.cpu()

    def _padded(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        batch = Pad(self._pad_id())([{"input_ids": row} for row in ids])
        device = next(self.model.parameters()).device
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    def _pad_id(self) -> int:
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def _rows(self, texts: Any) -> Dataset:
        """Blocks to be learnt as they are."""
        if isinstance(texts, Dataset) and "input_ids" in texts.column_names:
            rows = as_dataset("texts", texts)
        else:
            blocks = [b for text in _texts(texts) for b in blocks_of_text(text, self.tokenizer, self.block_size, {})]
            rows = as_dataset("texts", [{"input_ids": block.ids} for block in blocks])
        check_rows("texts", rows, self.model)
        return rows

    def _blocks(self, texts: Any) -> list[Block]:
        if isinstance(texts, Dataset) and "input_ids" in texts.column_names:
            check_rows("texts", as_dataset("texts", texts), self.model)
            ids = texts["input_ids"][:]
            decoded = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids] if self.anchors else []
            self.anchors_ = self._dictionary(decoded)
            blocks = [block_of_ids(row, self.tokenizer, self.anchors_) for row in ids]
            if "labels" in texts.column_names:  # a prompt has none, and gets none
                for block, own in zip(blocks, texts["labels"][:], strict=True):
                    block.unlabelled += [place for place, label in enumerate(own) if label == IGNORE]
            return blocks
        found = _texts(texts)
        self.anchors_ = self._dictionary(found)
        size = self.block_size
        blocks = [b for text in found for b in blocks_of_text(text, self.tokenizer, size, self.anchors_)]
        check_rows("texts", as_dataset("texts", [{"input_ids": block.ids} for block in blocks]), self.model)
        return blocks

    def _dictionary(self, texts: Sequence[str]) -> dict[str, str]:
        said: dict[str, str] = {}
        if callable(self.anchors):
            for text in texts:
                said = {**self.anchors(text), **said}
        elif self.anchors:
            said = dict(self.anchors)
        for term, translation in said.items():
            if not (isinstance(term, str) and term.strip() and isinstance(translation, str) and translation.strip()):
                raise ValueError(f"anchors must map terms to their translations, got {term!r}: {translation!r}")
        return {term: translation for term, translation in said.items() if term != translation}


class ReinforcedLogitsProcessor(LogitsProcessor):
    """The form without training: ``model.generate(..., logits_processor=[ReinforcedLogitsProcessor(reinforced)])``.

    The reinforced model reads along, with a key-value cache of its own, and v_b becomes v_b - alpha ReLU(v_r - v_b).

    Parameters
    ----------
    reinforced : PreTrainedModel
        Of the same vocabulary, in eval mode. Memory and time of generation double.
    alpha : float >= 0, default 5.0
    normalize : bool, default False
        See `generic_logits`. With beams, `generate` hands over log-probabilities: then take True.
    pad_token_id : int, optional
        Prompts in a batch are padded on the left with it; generate does not tell a processor which tokens count.

    Notes
    -----
    It must come first in the list, and without options like repetition_penalty, which `generate` applies before any
    list: what is done to v_b is taken for a difference. Tokens that are forbidden before it stay so. Beams are read
    again from the start whenever they change places.

    Examples
    --------
    >>> from shoestring import zoo
    >>> model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    >>> ids = tokenizer("Genesis 1:1 In the beginning", return_tensors="pt").input_ids
    >>> said = model.generate(
    ...     ids, logits_processor=[ReinforcedLogitsProcessor(model)], max_new_tokens=5, do_sample=False
    ... )
    >>> bool((said == model.generate(ids, max_new_tokens=5, do_sample=False)).all())  # v_r = v_b changes nothing
    True
    """

    def __init__(
        self, reinforced: nn.Module, alpha: float = 5.0, *, normalize: bool = False, pad_token_id: int | None = None
    ) -> None:
        check_model(reinforced)
        _check_number("alpha", alpha)
        self.reinforced, self.alpha, self.normalize, self.pad_token_id = reinforced, alpha, normalize, pad_token_id
        named = inspect.signature(reinforced.forward).parameters  # transformers 5.24 renamed it
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        self._seen: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) generic logits of the next token, from (B, T) token ids and (B, V) logits of the baseline."""
        device = next(self.reinforced.parameters()).device
        ids = input_ids.to(device)
        seen = 0 if self._seen is None else self._seen.shape[1]
        if self._seen is None or seen >= ids.shape[1] or not torch.equal(ids[:, :seen], self._seen):
            self._cache, seen = None, 0  # another prompt, or beams that changed places
        mask = torch.ones_like(ids)
        places: dict[str, Any] = {}
        if self.pad_token_id is not None:
            mask = ((ids != self.pad_token_id).cumsum(1) > 0).to(ids.dtype)  # padding on the left only
            places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]}
        places[self._cache_name] = self._cache
        output = self.reinforced(input_ids=ids[:, seen:], attention_mask=mask, use_cache=True, **places)
        self._seen, self._cache = ids.clone(), getattr(output, self._cache_name)
        v_r = output.logits[:, -1].to(scores.device)
        forbidden = scores == -math.inf
        v_b = torch.where(forbidden, v_r.to(scores.dtype), scores)  # no difference there
        return generic_logits(v_b, v_r, self.alpha, normalize=self.normalize).masked_fill(forbidden, -math.inf)


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _texts(texts: Any) -> list[str]:
    if isinstance(texts, Dataset) and "text" in texts.column_names:
        texts = texts["text"][:]
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of str, or a datasets.Dataset with a column text or input_ids")
    if not any(text.strip() for text in texts):
        raise ValueError("texts must hold at least one text, got none")
    return [text for text in texts if text.strip()]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
