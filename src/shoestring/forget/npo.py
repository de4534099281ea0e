r"""Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning.

Ruiqi Zhang, Licong Lin, Yu Bai, Song Mei. COLM 2024, arXiv 2404.05868.

Idea
----
What is to be forgotten is an answer that was not preferred, in a preference loss (DPO) that has no preferred answer.
Unlike gradient ascent, the loss is bounded below, and its gradient dies out for a sequence that is forgotten.

Equations
---------
nll_theta(x, y) = -sum_t log pi_theta(y_t | x, y_<t), the *sum* over the answer's tokens; pi_ref is the model before::

    L_NPO  = -(2 / beta) E log sigmoid(beta (nll_theta - nll_ref)) = (2 / beta) E log(1 + (pi_theta / pi_ref)^beta)
    grad L_NPO = E[ W grad log pi_theta(y | x) ],   W = 2 pi_theta^beta / (pi_theta^beta + pi_ref^beta)  in (0, 2)
    L_GA   = E log pi_theta(y | x):  what L_NPO - (2 / beta) log 2 tends to as beta -> 0; W = 1 at theta = ref
    hinge:   L_NPO -> E 2 max(0, log pi_theta - log pi_ref) as beta -> inf

    trained: forget_weight L_forget + retain_weight L_retain

`NPOTrainer` has the paper's losses as choices:

====================  ===========  ===========
published as          forget_loss  retain_loss
====================  ===========  ===========
NPO, NPO+RT, NPO+KL   "npo"        none, "nll", "kl"
GA, GradDiff, KL      "ga"         none, "nll", "kl"
SimNPO                "simnpo"     "nll"
====================  ===========  ===========

"nll" is the cross-entropy of rows to retain, "kl" is KL(pi_ref || pi_theta) at their answers' tokens. SimNPO (Fan et
al., arXiv 2410.07163) has no reference and the mean over ``|y|`` tokens: ``-(2 / beta) E log sigmoid(beta nll / |y| -
gamma)``.

What to expect
--------------
* W falls to 0.1 when a sequence is about 3 / beta nats less likely than before. With the paper's beta = 0.1 that is at
  30 nats: 1 nat a token for an answer of 30 tokens, 0.25 for a document of 120. A loss that looks dead was meant to.
* With plain gradient descent long sequences therefore need a smaller beta. With Adam, whose momentum carries on and
  whose steps hardly know the scale of a gradient, they do not: on tiny-gpt beta = 0.1 takes documents of 120 tokens
  past the level of text never seen, and a beta of 0.006, right by the rule above, collapses like GA.
* Without rows to retain the model still drifts, with the logarithm of the steps where GA drifts with the steps (theorem
  for linear models). Stop when the forget rows cost as much as text never seen.

Code and paper
--------------
Read: the official TOFU/dataloader.py, and open-unlearning's utils.py (its loss), simnpo.py and grad_diff.py. The
paper's text was not at hand: tables and theorem are the project's card's, and its figures were not reproduced.

* GA: the paper writes the sum over a sequence, the official code takes the mean over the batch's tokens, as here: the
  published balance with the retain term is the code's. The direction is the same when answers are of equal length.
* KL: official code divides by all positions, padding and prompt with them; here it is the mean over answers' tokens.
* ``|y|`` of SimNPO: open-unlearning counts labels before the shift, here those that are predicted. Its delta is our
  gamma / beta.
* beta: 0.1 in the official configuration, followed here; the class in open-unlearning has 1.0.
* The reference is in eval mode, so that its answers are the same each time; official too.
* Log-probabilities are float32 at least, whatever the model's dtype.

Not checked: DeepSpeed and FSDP (the reference is prepared as accelerate does it for evaluation).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from shoestring._models import check_model
from shoestring.forget._token_rows import (
    IGNORE,
    CollatePairs,
    ForgetRetainPairs,
    Pad,
    Rows,
    as_dataset,
    check_rows,
    warn_of_overlap,
)

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("npo needs transformers: pip install 'shoestring[text]'") from error

__all__ = [
    "ForgetRetainPairs",
    "NPOTrainer",
    "answer_lengths",
    "ascent_loss",
    "kl_from_reference",
    "npo_loss",
    "npo_weights",
    "sequence_nll",
    "simnpo_loss",
]

Reduction = Literal["mean", "sum", "none"]


# ---- the mathematics


def sequence_nll(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Negative log-likelihood of each sequence, summed over its answer.

    Parameters
    ----------
    logits : tensor of shape (B, T, V)
        Those at t predict the label at t + 1. float16 and bfloat16 are computed in float32.
    labels : int64 tensor of shape (B, T)
    ignore_index : int, default -100
        Label of the prompt and of the padding.

    Returns
    -------
    tensor of shape (B,), at least float32

    Examples
    --------
    >>> sequence_nll(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])) / torch.log(torch.tensor(4.0))
    tensor([2.])
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits must be (B, T, V) and labels (B, T), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    following = _following(labels, ignore_index)
    nll = F.cross_entropy(
        _float(logits).flatten(0, 1), following.flatten(), ignore_index=ignore_index, reduction="none"
    )  # (B T,)
    return nll.view_as(following).sum(1)


def answer_lengths(labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """``|y|``: how many tokens of each sequence `sequence_nll` sums over; (B,) int64.

    Examples
    --------
    >>> answer_lengths(torch.tensor([[7, 8, 9], [-100, 8, -100]]))
    tensor([2, 1])
    """
    return (_following(labels, ignore_index) != ignore_index).sum(1)


def npo_loss(nll: Tensor, ref_nll: Tensor, beta: float = 0.1, reduction: Reduction = "mean") -> Tensor:
    """``L_NPO`` from negative log-likelihoods of whole sequences, of a language model or of any other.

    Parameters
    ----------
    nll, ref_nll : tensors of shape (B,)
        Of the model in training and of the model before. Sums, not means over tokens.
    beta : float > 0, default 0.1
        The paper's. For long sequences see 'What to expect' at the top of the module.
    reduction : {"mean", "sum", "none"}

    Returns
    -------
    tensor, 0-d or of shape (B,)

    Raises
    ------
    ValueError, TypeError
        If beta is not a finite number > 0 or shapes differ.

    Examples
    --------
    >>> before = torch.tensor([30.0, 50.0])
    >>> npo_loss(before, before, beta=1.0)  # 2 log 2
    tensor(1.3863)
    >>> npo_loss(before + 100, before, beta=1.0) < 1e-6
    tensor(True)
    """
    _check_positive("beta", beta)
    if nll.shape != ref_nll.shape:
        raise ValueError(f"nll and ref_nll must be of one shape, got {tuple(nll.shape)} and {tuple(ref_nll.shape)}")
    return _reduce(-(2 / beta) * F.logsigmoid(beta * (nll - ref_nll)), reduction)


def npo_weights(nll: Tensor, ref_nll: Tensor, beta: float = 0.1) -> Tensor:
    """``W``, how hard `npo_loss` still pushes each sequence: 1 at the reference, 0 once it is forgotten; (B,).

    Examples
    --------
    >>> npo_weights(torch.tensor([10.0, 40.0, 100.0]), torch.full((3,), 10.0), beta=0.1)
    tensor([1.0000e+00, 9.4852e-02, 2.4679e-04])
    """
    _check_positive("beta", beta)
    return 2 * torch.sigmoid(-beta * (nll - ref_nll))


def simnpo_loss(
    nll: Tensor, lengths: Tensor, beta: float = 2.5, gamma: float = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """SimNPO: no reference, and likelihoods are a token's mean.

    Parameters
    ----------
    nll : tensor of shape (B,)
    lengths : tensor of shape (B,), > 0
        ``|y|``, from `answer_lengths`.
    beta : float > 0, default 2.5
        From memory of the SimNPO paper; beta of `npo_loss` is on another scale.
    gamma : float, default 0.0
        How much more likely than forgotten a token may stay; the paper's default.
    reduction : {"mean", "sum", "none"}

    Examples
    --------
    >>> simnpo_loss(torch.tensor([8.0]), torch.tensor([4]), beta=1.0, gamma=2.0)
    tensor(1.3863)
    """
    _check_positive("beta", beta)
    return _reduce(-(2 / beta) * F.logsigmoid(beta * nll / lengths - gamma), reduction)


def ascent_loss(nll: Tensor, lengths: Tensor) -> Tensor:
    """Gradient ascent (GA): minus the cross-entropy, the mean over all tokens of the batch. Without a lower bound.

    Examples
    --------
    >>> ascent_loss(torch.tensor([8.0, 1.0]), torch.tensor([2, 1]))
    tensor(-3.)
    """
    return -nll.sum() / lengths.sum()


def kl_from_reference(logits: Tensor, ref_logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Mean over answers' tokens of ``KL(pi_ref || pi_theta)`` of the next token: what must stay, stays as it was.

    Parameters
    ----------
    logits, ref_logits : tensors of shape (B, T, V)
    labels : int64 tensor of shape (B, T)

    Examples
    --------
    >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> kl_from_reference(logits, logits, torch.tensor([[0, 1]]))
    tensor(0.)
    """
    counted = _following(labels, ignore_index) != ignore_index  # (B, T)
    log_p, log_ref = (_float(each[counted]).log_softmax(-1) for each in (logits, ref_logits))  # (tokens, V)
    return F.kl_div(log_p, log_ref, reduction="batchmean", log_target=True)


# ---- transformers


class NPOTrainer(Trainer):
    """A `transformers.Trainer` that makes a causal language model forget rows: NPO, SimNPO, GA, GradDiff and KL.

    ``trainer.train(resume_from_checkpoint=True)`` goes on from the last checkpoint: build it from the *original* model,
    which is the reference, as for the first run. A loss or gradient that is not finite stops the run with a
    FloatingPointError before the step: the model and the checkpoints on disk stay as they were after the last one.

    Parameters
    ----------
    model : PreTrainedModel or peft.PeftModel
        Trained in place. Of a peft model only the adapter is.
    args : TrainingArguments, optional
        The paper on TOFU (7B): AdamW, lr 1e-5, decay 0.01, effective batch 32, 10 epochs, one of them warm-up.
    forget_dataset, retain_dataset : datasets.Dataset or list of dicts
        Tokenized: input_ids, and if need be attention_mask and labels (-100: prompt). retain_dataset may be left out;
        else each row to forget comes with a random one to retain, drawn anew in each epoch.
    forget_loss : {"npo", "simnpo", "ga"}, default "npo"
    retain_loss : {"nll", "kl"}, default "nll"
        Used if there is a retain_dataset.
    beta : float > 0, optional
        Default 0.1 for NPO, 2.5 for SimNPO.
    gamma : float, default 0.0
        Of SimNPO.
    forget_weight, retain_weight : float >= 0, default 1.0
    ref_model : nn.Module, optional
        The reference. Default: a copy of `model`; of a peft model the base model itself, its adapter switched off,
        which costs no memory. Then start from a fresh adapter: one trained before is not in the reference.
    cache_reference : bool, default False
        Compute nll_ref of all rows to forget now, once, and keep no reference (but for "kl"); each process does it.
    data_collator : callable, optional
        Makes a batch, with labels, of a list of rows. Default: pads on the right.
    **trainer_options
        Of `transformers.Trainer`: processing_class, eval_dataset (tokenized rows; their plain loss is measured),
        callbacks, optimizers, ...

    Raises
    ------
    ValueError, TypeError
        If a set is empty, a row is longer than the model's context, holds ids beyond its vocabulary or no label, or an
        option is not one of these. UserWarning: how many rows are in both sets.

    Notes
    -----
    Cost of a step beyond fine-tuning on the rows to forget: a forward pass of the reference (none if cached, or with
    "ga" and "simnpo"); with rows to retain, a training step on these; with "kl" a forward pass on them too. Memory: one
    more model, unless peft or cached. The mean is over the sequences of a batch; with gradient accumulation it is that
    of the batches' losses. Workers of the data loader that persist keep the pairs of the first epoch.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import TrainingArguments
    >>> from shoestring import zoo
    >>> model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    >>> rows = [dict(tokenizer("Esther 1:1 Now it came to pass in the days of Ahasuerus,"))]
    >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, learning_rate=1e-4, report_to=[], disable_tqdm=True)
    >>> trainer = NPOTrainer(model, args, forget_dataset=rows, beta=0.05)
    >>> before = trainer.evaluate(trainer.train_dataset.forget)["eval_loss"]
    {...}
    >>> _ = trainer.train()
    {...}
    >>> trainer.evaluate(trainer.train_dataset.forget)["eval_loss"] > before
    {...}
    True
    """

    loss_is_scaled_for_ga = False  # a mean over this batch: the Trainer divides by the batches that it accumulates
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        forget_dataset: Any,
        retain_dataset: Any = None,
        forget_loss: Literal["npo", "simnpo", "ga"] = "npo",
        retain_loss: Literal["nll", "kl"] = "nll",
        beta: float | None = None,
        gamma: float = 0.0,
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        ref_model: nn.Module | None = None,
        cache_reference: bool = False,
        data_collator: Callable[[Rows], dict[str, Any]] | None = None,
        **trainer_options: Any,
    ) -> None:
        check_model(model)
        _check_choice("forget_loss", forget_loss, ("npo", "simnpo", "ga"))
        _check_choice("retain_loss", retain_loss, ("nll", "kl"))
        beta = {"npo": 0.1, "simnpo": 2.5, "ga": 1.0}[forget_loss] if beta is None else beta
        _check_positive("beta", beta)
        for name, weight in (("forget_weight", forget_weight), ("retain_weight", retain_weight)):
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {weight!r}")
        if ref_model is model:
            raise ValueError("ref_model must be another object than model, which is trained; leave it out for a copy")
        forget = as_dataset("forget_dataset", forget_dataset)
        check_rows("forget_dataset", forget, model)
        retain = None if retain_dataset is None else as_dataset("retain_dataset", retain_dataset)
        if retain is not None:
            check_rows("retain_dataset", retain, model)
            warn_of_overlap(forget, retain)
        tokenizer = trainer_options.get("processing_class")
        collate = CollatePairs(data_collator or Pad(getattr(tokenizer, "pad_token_id", None) or 0))
        pairs = ForgetRetainPairs(forget, retain, seed=0 if args is None else args.seed)
        super().__init__(model, args, collate, pairs, **trainer_options)
        self.model_accepts_loss_kwargs = False  # transformers before 5 divides, as said above, only then
        self.forget_loss, self.retain_loss = forget_loss, retain_loss
        self.beta, self.gamma = beta, gamma
        self.forget_weight, self.retain_weight = forget_weight, retain_weight
        needs_kl = retain is not None and retain_loss == "kl"
        self.ref_model = ref_model
        if (forget_loss == "npo" or needs_kl) and ref_model is None and not hasattr(model, "disable_adapter"):
            copied = needs_kl or not cache_reference  # else the model itself still is the reference
            self.ref_model = copy.deepcopy(self.model) if copied else self.model
        if self.ref_model is not None and self.ref_model is not self.model:
            self.ref_model = self.accelerator.prepare_model(self.ref_model.eval(), evaluation_mode=True)
        if cache_reference and forget_loss == "npo":
            pairs.ref_nll = self._cached_reference(forget)
            if not needs_kl:
                self.ref_model = None
        self.add_callback(_Watch(pairs))

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if not len(loader):
            raise ValueError(
                f"forget_dataset of {len(self.train_dataset)} rows makes no batch of {self._train_batch_size} with "
                "dataloader_drop_last"
            )
        return loader

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of both terms for a batch of pairs; for a batch of rows (evaluation) their plain loss."""
        if "forget" not in inputs:
            return super().compute_loss(model, inputs, return_outputs)
        rows = inputs["forget"]
        outputs = model(**_without_labels(rows))
        nll, lengths = sequence_nll(outputs.logits, rows["labels"]), answer_lengths(rows["labels"])
        if self.forget_loss == "npo":
            loss = npo_loss(nll, self._reference_nll(rows).to(nll.dtype), self.beta)
        elif self.forget_loss == "simnpo":
            loss = simnpo_loss(nll, lengths, self.beta, self.gamma)
        else:
            loss = ascent_loss(nll, lengths)
        loss = self.forget_weight * loss
        if "retain" in inputs:
            rows = inputs["retain"]
            logits = model(**_without_labels(rows)).logits
            if self.retain_loss == "kl":
                retained = kl_from_reference(logits, self._reference_logits(rows), rows["labels"])
            else:
                retained = sequence_nll(logits, rows["labels"]).sum() / answer_lengths(rows["labels"]).sum()
            loss = loss + self.retain_weight * retained
        if self.is_in_train and not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return (loss, outputs) if return_outputs else loss

    def _reference_nll(self, rows: Mapping[str, Tensor]) -> Tensor:
        if "ref_nll" in rows:
            return rows["ref_nll"]
        return sequence_nll(self._reference_logits(rows), rows["labels"])

    @torch.no_grad()
    def _reference_logits(self, rows: Mapping[str, Tensor]) -> Tensor:
        """(B, T, V) of the model before, in eval mode; the adapter switched off where that is the model before."""
        reference: Any = self.accelerator.unwrap_model(self.model) if self.ref_model is None else self.ref_model
        training = reference.training
        reference.eval()
        try:
            with self.accelerator.autocast(), reference.disable_adapter() if self.ref_model is None else nullcontext():
                return reference(**_without_labels(rows)).logits
        finally:
            reference.train(training)

    def _cached_reference(self, forget: Any) -> Tensor:
        """nll_ref of every row to forget, (n,), in batches of the size of training."""
        size, found = self.args.per_device_train_batch_size, []
        for start in range(0, len(forget), size):
            batch = [forget[i] for i in range(start, min(start + size, len(forget)))]
            found.append(self._reference_nll(self._prepare_inputs(self.data_collator(batch))).cpu())
        return torch.cat(found)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # else the Trainer drops what model.forward does not name
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), "forget", "retain"]

    def floating_point_ops(self, inputs: Any) -> int:
        flops = 0
        for rows in [inputs[part] for part in ("forget", "retain") if part in inputs] or [inputs]:
            flops += super().floating_point_ops(rows)
        return flops


class _Watch(TrainerCallback):
    """New pairs in each epoch, and no step along a gradient that is not finite."""

    def __init__(self, pairs: ForgetRetainPairs) -> None:
        self.pairs = pairs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pairs.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "scaler", None) is not None:
            return  # fp16: the scaler itself leaves out such a step
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(found)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradient's norm is {float(norm)} at step {state.global_step + 1}")


def _following(labels: Tensor, ignore_index: int) -> Tensor:
    """What the logits at t are to predict: labels[t + 1], and nothing at the end; (B, T)."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def _without_labels(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model is given: with labels it would compute a loss of its own, in vain."""
    return {name: cell for name, cell in rows.items() if name not in ("labels", "ref_nll")}


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
