r"""Has it forgotten, what else was lost, and is it gone or only hidden? One evaluation for every method of the room.

It works on losses, one for each sample, so it serves classifiers, regressors, language models and, through a function
of the caller's, diffusion models. Four models can take part: the *original*, the *unlearned* ones that are judged, one
that was *retrained* without the forget set (where somebody can afford one), and *references* for the membership attack.

The measures
------------
:math:`\ell_i(m)` is the loss of model m on sample i; F is the forget set, R the retain set, H are held-out samples of
the same kind that no model has seen.

* **forget quality**: p-value of the Kolmogorov-Smirnov test between :math:`\{\ell_i(m)\}_F` and
  :math:`\{\ell_i(\text{retrained})\}_F` (`shoestring.metrics.forget_quality`; TOFU, arXiv 2401.06121, which takes
  truth ratios where this takes losses). 1: not to be told from the retrained model.
* **retain utility**: mean loss on R, its change against the original and, for classifiers, the accuracy.
* **membership**, loss threshold (Yeom et al., arXiv 1709.01604)::

      AUC = P(l_i < l_j) + P(l_i = l_j) / 2,      i of F, j of H

  0.5: F cannot be told from what was never seen. Below 0.5 it can be told too, since it is *too* unlikely.
* **LiRA-lite** (Carlini et al., arXiv 2112.03570; offline, with few references): the same with a score that takes off
  how hard a sample is, measured on reference models that saw neither F nor H::

      s_i = phi_i(m) - mean_k phi_i(reference_k),    phi = log p / (1 - p),  p = exp(-l)

  The paper divides by the spread over references; with few of them it takes one spread for all samples, which moves
  neither the AUC nor the rate of true positives at a rate of false ones. So no spread is estimated here.
* **relearning time** (Golatkar et al., arXiv 1911.04933; the anamnesis of Chundawat et al., arXiv 2201.05629): steps of
  plain fine-tuning on F, AdamW, until the mean loss on F is back at the original's, within `tolerance`.
* **verbatim continuation**, for language models: share of texts whose first `prompt` tokens the model continues by the
  very `tokens` that follow there. Greedy decoding says exactly them if and only if each is the most likely one after
  the true ones before it, so one forward pass tells and nothing is generated.

The finding
-----------
In this order:

1. "unchanged": no loss on F differs from the original's.
2. "not forgotten": the mean loss on F is still within `tolerance` of the original's.
3. "only hides": relearning takes less than half of the steps that learning it for the first time takes. These are
   the steps of the retrained model; without one, the steps the unlearned model itself needs to bring as many held-out
   samples to the same loss. Without those either, a rule of thumb: the loss is back before every sample was read once.
4. "forgets": it takes at least half of those steps.
5. "undecided": relearning was switched off; or there was neither a retrained model nor held-out samples to compare
   with; or it ended at `relearn_steps` too soon to tell.

"forgets" is a statement about these measures. It is no proof, and none in law: see ``docs/forget.md``.

Nulls: the original judged as if it were unlearned is "unchanged", at a retain change of exactly 0, and relearns in 0
steps; the retrained model has forget quality 1, a membership AUC that differs from its own by 0, and a LiRA-lite AUC
of 1/2 where it is the reference. A loss does not depend on the number of processes: each takes whole batches.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from shoestring._loop_context import accelerator_for
from shoestring._models import check_model
from shoestring.forget._evaluation import Evaluation
from shoestring.forget._loaders import call, inputs_of, row_keys, targets_of
from shoestring.loop import State, fit
from shoestring.metrics import forget_quality

__all__ = [
    "Evaluation",
    "attack_auc",
    "classification_losses",
    "evaluate",
    "language_losses",
    "lira_scores",
    "only_hides",
    "overlap",
    "regression_losses",
    "relearning_steps",
    "sample_losses",
    "true_positive_rate",
    "verbatim",
]

Losses = Callable[[Any, Any], Tensor]
Kind = Literal["language", "classification", "regression"]
Figures = dict[str, NDArray[np.float64]]

# The measures, as functions of arrays.


def attack_auc(members: ArrayLike, others: ArrayLike) -> float:
    """Chance that a member has the lower loss than a non-member, ties counted half: the loss-threshold attack.

    Parameters
    ----------
    members, others : array-like of float, shapes (n,) and (m,)
        Losses. (Of scores that are higher for members, such as `lira_scores`, give the negatives.)

    Returns
    -------
    float
        0.5 where losses tell nothing, 1 where every member is below every other. O((n + m) log m).

    Raises
    ------
    ValueError
        Empty, not one-dimensional, NaN or infinite.

    Examples
    --------
    >>> attack_auc([1.0, 2.0], [2.0, 3.0])  # of four pairs three are in order and one is a tie
    0.875
    """
    a, b = _finite("members", members), np.sort(_finite("others", others))
    above = len(b) - np.searchsorted(b, a, side="right")
    ties = len(b) - np.searchsorted(b, a, side="left") - above
    return float((above + ties / 2).mean() / len(b))


def true_positive_rate(members: ArrayLike, others: ArrayLike, fpr: float = 0.01) -> float:
    """Share of members found by a threshold on scores that lets at most a share `fpr` of the others through.

    Parameters
    ----------
    members, others : array-like of float, shapes (n,) and (m,)
        Scores, higher for members. With fewer than 1 / fpr others none may pass.
    fpr : float, default 0.01
        In [0, 1).

    Raises
    ------
    ValueError
        As `attack_auc`, or fpr out of range.

    Examples
    --------
    >>> true_positive_rate([3.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    0.6666666666666666
    """
    a, b = _finite("members", members), np.sort(_finite("others", others))
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}")
    threshold = b[len(b) - 1 - math.floor(fpr * len(b) + 1e-9)]  # floor(fpr m) of the others are above
    return float((a > threshold).mean())


def lira_scores(losses: ArrayLike, references: ArrayLike, *, likelihood: bool = True) -> NDArray[np.float64]:
    """How much surer a model is of each sample than models that never saw it.

    Parameters
    ----------
    losses : array-like of float, shape (n,)
        Of the model under attack.
    references : array-like of float, shape (K, n)
        Of K models that saw none of the samples; the same samples in the same order.
    likelihood : bool, default True
        The loss is -log p, and phi = log p / (1 - p) (for a sequence p is that of a mean token). False: any loss,
        phi = -loss. Losses below 1e-7, the resolution of float32, count as 1e-7.

    Returns
    -------
    ndarray of float, shape (n,)
        phi(losses) - mean over k of phi(references[k]).

    Raises
    ------
    ValueError
        Shapes that do not fit, no reference, NaN or infinity, or negative losses with `likelihood`.

    Examples
    --------
    >>> lira_scores([0.1, 2.0], [[0.1, 2.0]]).tolist()  # no surer than the reference
    [0.0, 0.0]
    """
    own = _finite("losses", losses)
    theirs = np.asarray(references, dtype=np.float64)
    if theirs.ndim != 2 or not len(theirs) or theirs.shape[1] != len(own):
        raise ValueError(f"references must have shape (K, {len(own)}) with K >= 1, got {theirs.shape}")
    _finite("references", theirs.ravel())
    if not likelihood:
        return theirs.mean(0) - own
    if own.min() < 0 or theirs.min() < 0:
        raise ValueError("losses must be >= 0 to be -log p, got negative ones: pass likelihood=False")

    def phi(loss: NDArray[np.float64]) -> NDArray[np.float64]:
        loss = np.maximum(loss, 1e-7)
        return -loss - np.log(-np.expm1(-loss))  # log p - log(1 - p)

    return phi(own) - phi(theirs).mean(0)


def verbatim(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, prompt: int = 32, tokens: int = 10) -> Tensor:
    """Whether greedy decoding after the first `prompt` tokens says the `tokens` that follow in the text.

    Parameters
    ----------
    logits : Tensor, shape (B, T, V)
        Of one forward pass over the text itself.
    input_ids, attention_mask : Tensor of int, shape (B, T)
        Padding on either side.
    prompt, tokens : int, default 32 and 10

    Returns
    -------
    Tensor of float32, shape (B,)
        1 yes, 0 no, NaN where the text is shorter than both together.

    Examples
    --------
    >>> ids, mask = torch.tensor([[3, 1, 2, 0]]), torch.ones(1, 4)
    >>> logits = F.one_hot(torch.tensor([[1, 2, 3, 0]]), 4)  # says 1, 2, 3 where the text goes on with 1, 2, 0
    >>> verbatim(logits, ids, mask, prompt=1, tokens=2).item(), verbatim(logits, ids, mask, prompt=2, tokens=2).item()
    (1.0, 0.0)
    """
    place = attention_mask.long().cumsum(1)[:, 1:]  # of a target in its text, counted from 1
    asked = (place > prompt) & (place <= prompt + tokens) & attention_mask[:, 1:].bool()
    said = logits[:, :-1].argmax(-1) == input_ids[:, 1:]  # (B, T-1)
    exact = (said | ~asked).all(1).float()
    return exact.masked_fill(attention_mask.long().sum(1) < prompt + tokens, math.nan)


def only_hides(steps: int | None, first_time: int | None, most: int) -> bool | None:
    """Whether relearning takes less than half of the steps of learning for the first time; None: it cannot be told.

    Parameters
    ----------
    steps, first_time : int or None
        Of the two. None: not within `most` steps.
    most : int
        Where counting ended.

    Examples
    --------
    >>> only_hides(4, 60, most=100), only_hides(4, None, most=100)  # None is more than 100
    (True, True)
    >>> only_hides(40, 60, most=100), only_hides(None, 60, most=100)
    (False, False)
    >>> only_hides(60, None, most=100), only_hides(None, None, most=100)
    (None, None)
    """
    if first_time is None:
        return True if steps is not None and steps < most / 2 else None
    return steps is not None and steps < first_time / 2


# Losses of samples. A function of (model, batch) that returns (B,), with gradient, may take the place of these.


def language_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of a token, one a sequence (B,), in float32.

    `batch` has ``input_ids`` (B, T) and perhaps ``attention_mask`` and ``labels`` (-100: not counted).
    """
    return _language(model, batch)[0]


def classification_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy (B,) of ``batch = (x, y)``, y integer (B,), or of a dict with ``labels``."""
    return _classification(model, batch)[0]


def regression_losses(model: nn.Module, batch: Any) -> Tensor:
    """Squared error (B,), the mean over what is predicted for a sample, of ``batch = (x, y)`` or a dict."""
    y, predicted = targets_of(batch, "batches"), call(model, inputs_of(batch))
    if predicted.shape != y.shape:  # (B, 1) and (B,) would broadcast to (B, B)
        raise ValueError(f"predictions and y must have one shape, got {tuple(predicted.shape)} and {tuple(y.shape)}")
    return (predicted.float() - y.float()).square().reshape(len(y), -1).mean(1)


def _classification(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Losses (B,) and which answers are right (B,)."""
    y, logits = targets_of(batch, "batches"), call(model, inputs_of(batch))
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (B, C) and y (B,), got {tuple(logits.shape)} and {tuple(y.shape)}")
    return F.cross_entropy(logits.float(), y.long(), reduction="none"), (logits.argmax(1) == y).float()


def _language(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B,), logits (B, T, V) and mask (B, T)."""
    ids = batch["input_ids"]
    mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
    labels = batch["labels"] if "labels" in batch else ids  # noqa: SIM401 - tokenizers' batches have no get
    labels = labels.masked_fill(mask == 0, -100)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits
    counts = (labels != -100).sum(1)
    if bool((counts == 0).any()):
        raise ValueError("a sequence has nothing to predict: give two tokens at least, not all labels -100")
    nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(1) / counts, logits, mask


@torch.no_grad()
def sample_losses(model: nn.Module, batches: Iterable[Any], losses: Losses | Kind | None = None) -> NDArray[np.float64]:
    """The loss of every sample (n,), in the order of the batches, in eval mode and without gradient.

    Under ``accelerate launch`` each process takes every so-manieth batch and all get all losses: the same batches give
    the same figures, whatever the number of processes.

    Parameters
    ----------
    model : nn.Module
        Its modes are as before afterwards.
    batches : iterable
    losses : callable, str or None, default None
        As in `evaluate`.

    Raises
    ------
    ValueError
        No batches, or losses that are not one a sample.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> sample_losses(nn.Identity(), [(x, torch.tensor([[1.0], [5.0]]))])  # squared errors
    array([0., 9.])
    """
    found = list(batches)
    return _measured(model, found, _measure(losses, found, 32, 10), "batches")["loss"]


# Relearning


def relearning_steps(
    model: nn.Module,
    batches: Iterable[Any],
    target: float,
    losses: Losses | Kind | None = None,
    *,
    lr: float = 1e-4,
    most: int = 100,
) -> int | None:
    """Steps of plain fine-tuning until the mean loss on `batches` is at most `target`.

    The model is not touched: a float32 copy is trained (AdamW without decay, one batch a step in the order given,
    dropout off and batch-norm statistics as they are, so the count is not a matter of chance). After every step the
    loss of all batches is measured.

    Returns
    -------
    int or None
        0 if it is there already, None if it is not after `most` steps.

    Raises
    ------
    ValueError
        No batches, most < 1, lr <= 0.
    FloatingPointError
        A loss that is NaN: try a lower `lr`.

    Examples
    --------
    >>> batch = (torch.ones(1, 1), torch.ones(1, 1))
    >>> model = nn.Linear(1, 1, bias=False)
    >>> nn.init.constant_(model.weight, 0.0).item()
    0.0
    >>> relearning_steps(model, [batch], target=0.26, lr=0.1)  # from 0 towards 1 in steps of about 0.1
    5
    """
    if most < 1 or not lr > 0:
        raise ValueError(f"most must be >= 1 and lr > 0, got {most} and {lr}")
    found = list(batches)
    measure = _measure(losses, found, 32, 10)

    def reached(model: nn.Module) -> bool:
        return bool(_measured(model, found, measure, "batches")["loss"].mean() <= target)

    if reached(model):
        return 0
    learner = copy.deepcopy(model).float()
    for parameter in learner.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    learner.eval()
    learner.training = True  # of the outermost module only: `fit` leaves the others in eval
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, weight_decay=0.0)
    there = False

    def look(state: State) -> bool:
        nonlocal there
        there = reached(learner)
        return there

    def step(model: Any, batch: Any) -> Tensor:
        return measure(model, batch)["loss"].mean()

    history = fit(learner, found, step, optimizer, max_steps=most, callbacks=[look], progress=False)
    return int(history[-1]["step"]) if there else None


# The evaluation


def evaluate(
    models: nn.Module | Mapping[str, nn.Module],
    original: nn.Module,
    forget: Iterable[Any],
    *,
    retain: Iterable[Any] | None = None,
    holdout: Iterable[Any] | None = None,
    retrained: nn.Module | None = None,
    references: Sequence[nn.Module] = (),
    losses: Losses | Kind | None = None,
    prompt: int = 32,
    tokens: int = 10,
    relearn_steps: int = 100,
    relearn_lr: float = 1e-4,
    relearn_batches: int = 8,
    tolerance: float = 0.05,
    progress: Callable[[float, str], Any] | None = None,
) -> Evaluation:
    """Judge one unlearned model, or several by name, against the original and, if there is one, the retrained model.

    Parameters
    ----------
    models : nn.Module or mapping of str to nn.Module
        What is judged; a single one is called "unlearned". No model is changed.
    original : nn.Module
        Before unlearning.
    forget, retain, holdout : iterable of batches
        A DataLoader or a list, read once: all models see the same batches in the same order. `holdout` are samples like
        those of `forget` that no model has seen; without it there is no membership attack. The evaluation's own batch
        size is that of these batches.
    retrained : nn.Module, default None
        Trained without the forget set. It is the first reference of LiRA-lite, too.
    references : sequence of nn.Module, default ()
        More models that saw neither `forget` nor `holdout`.
    losses : callable, str or None, default None
        ``losses(model, batch) -> (B,)``, the loss of each sample, with gradient; it must give the same for the same
        sample every time (a diffusion model's noise and times belong into the batch). Or "language", "classification",
        "regression": see `language_losses` and so on. None: by the first batch, language for a mapping with
        ``input_ids`` and no label for the whole, else classification or regression by the dtype of y.
    prompt, tokens : int, default 32 and 10
        Of the verbatim continuation; texts shorter than both together are left out of it.
    relearn_steps, relearn_lr, relearn_batches : default 100, 1e-4, 8
        Most steps; AdamW's rate (take the one the method used); how many batches of `forget` are relearnt, the first
        ones (the loss of all of them is measured after every step). 0 steps: no relearning.
    tolerance : float, default 0.05
        Back at the original's loss L means at most ``L + tolerance |L|``.
    progress : callable, default None
        Called with the share done, ending at 1.0, and a word.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        An empty set, a name that is taken, arguments out of range, a model with NaN or on the meta device.
    TypeError
        Something that is no module.
    FloatingPointError
        A loss that is NaN or infinite; the message names model and set.

    Warns
    -----
    UserWarning
        If samples are in both `forget` and `retain`, with their number.

    Notes
    -----
    One forward pass of every model over every set, and for each model judged up to `relearn_steps` training steps on a
    float32 copy, each followed by a forward pass over `relearn_batches` batches.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 5)
    >>> batches = [(x[:32], (x[:32, 0] > 0).long()), (x[32:], (x[32:, 0] > 0).long())]
    >>> original, other = nn.Linear(5, 2), nn.Linear(5, 2)
    >>> found = evaluate({"as it was": original}, original, batches[:1], retain=batches[1:], retrained=other)
    >>> found.row("as it was")["finding"], found.row("as it was")["relearn_steps"]
    ('unchanged', 0)
    >>> found.row("retrained")["forget_quality"]
    1.0
    """
    judged = dict(models) if isinstance(models, Mapping) else {"unlearned": models}
    taken = [name for name in judged if name in ("original", "retrained")]
    if taken or not judged:
        raise ValueError(f"models must be named otherwise than original and retrained, got {[*judged]}")
    if relearn_steps < 0 or relearn_batches < 1 or not relearn_lr > 0 or tolerance < 0 or prompt < 1 or tokens < 1:
        raise ValueError(
            "relearn_steps and tolerance must be >= 0, relearn_batches, prompt and tokens >= 1, relearn_lr > 0, got "
            f"{relearn_steps}, {tolerance}, {relearn_batches}, {prompt}, {tokens}, {relearn_lr}"
        )
    everyone = {"original": original, **judged} | ({} if retrained is None else {"retrained": retrained})
    for model in [*everyone.values(), *references]:
        check_model(model)
    sets = {"forget": forget, "retain": retain, "holdout": holdout}
    batches = {name: list(given) for name, given in sets.items() if given is not None}
    for name, found in batches.items():
        if not found:
            raise ValueError(f"{name} yields nothing")
    if "retain" in batches and (common := overlap(batches["forget"], batches["retain"])):
        warnings.warn(f"forget and retain have {common} samples in common", UserWarning, stacklevel=2)
    measure = _measure(losses, batches["forget"], prompt, tokens)
    likelihood = _kind(losses, batches["forget"]) in ("language", "classification")
    report = _progress(progress, len(everyone) * (1 + (relearn_steps > 0)) + len(references))

    measured: dict[str, dict[str, Figures]] = {}  # model -> set -> name -> (n,)
    for name, model in everyone.items():
        report(f"losses of {name}")
        measured[name] = {s: _measured(model, found, measure, f"{s} under {name}") for s, found in batches.items()}
    before = measured["original"]
    behind = [{s: f["loss"] for s, f in measured["retrained"].items()}] if retrained is not None else []
    for k, model in enumerate(references):
        report(f"losses of reference {k}")
        seen = {s: batches[s] for s in ("forget", "holdout") if s in batches}
        behind.append(
            {s: _measured(model, found, measure, f"{s} under reference {k}")["loss"] for s, found in seen.items()}
        )
    rows = {name: _row(name, measured[name], before, behind, likelihood) for name in everyone}
    if retrained is not None:
        for name, row in rows.items():
            row["forget_quality"] = forget_quality(
                measured[name]["forget"]["loss"], measured["retrained"]["forget"]["loss"]
            )

    part = batches["forget"][:relearn_batches]
    goal = _back_at(_measured(original, part, measure, "forget under original")["loss"], tolerance)

    def relearn(model: nn.Module, on: list[Any]) -> int | None:
        return relearning_steps(model, on, goal, losses, lr=relearn_lr, most=relearn_steps)

    if relearn_steps:
        for name, model in everyone.items():
            report(f"relearning with {name}")
            rows[name]["relearn_steps"] = relearn(model, part)

    first_time: dict[str, tuple[int | None, str]] = {}
    for name, model in judged.items():
        after = measured[name]["forget"]["loss"]
        if np.array_equal(after, before["forget"]["loss"]):
            rows[name]["finding"] = "unchanged"
        elif after.mean() <= _back_at(before["forget"]["loss"], tolerance):
            rows[name]["finding"] = "not forgotten"
        elif not relearn_steps:
            rows[name]["finding"] = "undecided"
        else:
            steps = rows[name]["relearn_steps"]
            if retrained is not None:
                first_time[name] = (rows["retrained"]["relearn_steps"], "the retrained model")
            elif "holdout" in batches:
                first_time[name] = (relearn(model, batches["holdout"][:relearn_batches]), "itself, held-out samples")
            if name in first_time:
                hides = only_hides(steps, first_time[name][0], relearn_steps)
            else:
                hides = True if steps is not None and steps < len(part) else None
            rows[name]["finding"] = {True: "only hides", False: "forgets", None: "undecided"}[hides]
    report("done", end=True)
    settings: dict[str, Any] = {
        "samples": {name: len(figures["loss"]) for name, figures in before.items()},
        "references": len(behind),
        "relearn_steps": relearn_steps,
        "relearn_lr": relearn_lr,
        "relearn_batches": len(part),
        "tolerance": tolerance,
        "first_time": {name: list(value) for name, value in first_time.items()},
    }
    if "verbatim" in before["forget"]:
        settings |= {"prompt": prompt, "tokens": tokens}
    kept = {name: {s: figures["loss"] for s, figures in found.items()} for name, found in measured.items()}
    return Evaluation([*rows.values()], settings, kept)


def overlap(forget: Iterable[Any], retain: Iterable[Any]) -> int:
    """How many samples of `forget` are in `retain` as well, by their inputs; 0 for batches it cannot read."""
    kept = {mark for batch in retain for mark in _marks(batch)}
    return sum(mark in kept for batch in forget for mark in _marks(batch))


def _marks(batch: Any) -> Iterator[Any]:
    """Something that is equal for equal inputs, of each sample; padding does not count."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Mapping) and "input_ids" in inputs and "attention_mask" in inputs:
        for ids, mask in zip(inputs["input_ids"].cpu(), inputs["attention_mask"].cpu(), strict=True):
            yield tuple(ids[mask.bool()].tolist())
    else:
        yield from row_keys(inputs).tolist()


def _kind(losses: Losses | Kind | None, batches: Sequence[Any]) -> str:
    """Which of the built-in losses, "" for one of the caller's."""
    if callable(losses):
        return ""
    if losses is None:
        if not batches:
            raise ValueError("batches yields nothing")
        batch = batches[0]
        words = isinstance(batch, Mapping) and "input_ids" in batch
        if words and ("labels" not in batch or batch["labels"].ndim == 2):
            return "language"
        try:
            return "regression" if targets_of(batch, "batches").is_floating_point() else "classification"
        except ValueError as error:
            raise ValueError(f"{error}; or give losses, a function of model and batch") from None
    if losses not in ("language", "classification", "regression"):
        raise ValueError(f"losses must be a function, 'language', 'classification' or 'regression', got {losses!r}")
    return losses


def _measure(losses: Losses | Kind | None, batches: Sequence[Any], prompt: int, tokens: int) -> Any:
    """A function of (model, batch) that gives figures (B,) by name, among them the loss."""

    def language(model: Any, batch: Any) -> dict[str, Tensor]:
        loss, logits, mask = _language(model, batch)
        if torch.is_grad_enabled():
            return {"loss": loss}
        return {"loss": loss, "verbatim": verbatim(logits, batch["input_ids"], mask, prompt, tokens)}

    def classification(model: Any, batch: Any) -> dict[str, Tensor]:
        return dict(zip(("loss", "accuracy"), _classification(model, batch), strict=True))

    def regression(model: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": regression_losses(model, batch)}

    def given(model: Any, batch: Any) -> dict[str, Tensor]:
        assert callable(losses)
        return {"loss": losses(model, batch)}

    built_in = {"language": language, "classification": classification, "regression": regression}
    return built_in.get(_kind(losses, batches), given)


@torch.no_grad()
def _measured(model: nn.Module, batches: Sequence[Any], measure: Any, where: str) -> Figures:
    """Every figure of every sample, in order, from all processes."""
    if not batches:
        raise ValueError(f"{where} yields nothing")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with _eval_mode(model), accelerator_for(None, None, model) if launched else nullcontext() as accelerator:
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        found: list[tuple[int, dict[str, list[float]]]] = []
        for k in range(rank, len(batches), world):  # whole batches: the same sums on any number of processes
            figures = measure(model, send_to_device(batches[k], device))
            loss = figures["loss"]
            if not isinstance(loss, Tensor) or loss.ndim != 1 or not len(loss):
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"losses must give one number a sample, (B,) with B >= 1, got {got} on {where}")
            found.append((k, {name: value.double().cpu().tolist() for name, value in figures.items()}))
        if world > 1:
            found = gather_object(found)
    found.sort(key=lambda entry: entry[0])
    joined = {name: np.array([v for _, figures in found for v in figures[name]]) for name in found[0][1]}
    if not np.isfinite(joined["loss"]).all():
        bad = int((~np.isfinite(joined["loss"])).sum())
        raise FloatingPointError(f"{bad} of {len(joined['loss'])} losses are NaN or infinite on {where}")
    return joined


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _row(
    name: str, own: Mapping[str, Figures], before: Mapping[str, Figures], behind: Sequence[Figures], likelihood: bool
) -> dict[str, Any]:
    """What the losses alone tell of a model."""
    forget = own["forget"]
    row: dict[str, Any] = {"model": name, "forget_loss": float(forget["loss"].mean())}
    if "accuracy" in forget:
        row["forget_accuracy"] = float(forget["accuracy"].mean())
    if "retain" in own:
        row["retain_loss"] = float(own["retain"]["loss"].mean())
        row["retain_change"] = row["retain_loss"] - float(before["retain"]["loss"].mean())
        if "accuracy" in own["retain"]:
            row["retain_accuracy"] = float(own["retain"]["accuracy"].mean())
    if "holdout" in own:
        row["membership_auc"] = attack_auc(forget["loss"], own["holdout"]["loss"])
        if behind:
            members, others = (
                lira_scores(own[s]["loss"], np.stack([b[s] for b in behind]), likelihood=likelihood)
                for s in ("forget", "holdout")
            )
            row["lira_auc"] = attack_auc(-members, -others)
            row["lira_tpr"] = true_positive_rate(members, others)
    long_enough = ~np.isnan(forget["verbatim"]) if "verbatim" in forget else np.zeros(0, bool)
    if long_enough.any():
        row["verbatim"] = float(forget["verbatim"][long_enough].mean())
    return row


def _back_at(losses: NDArray[np.float64], tolerance: float) -> float:
    level = float(losses.mean())
    return level + tolerance * abs(level)


def _progress(progress: Callable[[float, str], Any] | None, jobs: int) -> Any:
    begun = 0

    def report(text: str, end: bool = False) -> None:
        nonlocal begun
        if progress is not None:
            progress(1.0 if end else begun / jobs, text)
        begun += 1

    return report


def _finite(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have shape (n,) with n >= 1, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite")
    return array
