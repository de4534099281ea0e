r"""Deep Regression Unlearning.

Ayush K. Tarun, Vikram S. Chundawat, Murari Mandal, Mohan Kankanhalli. ICML 2023, arXiv 2210.08196.

Idea
----
A regressor has no classes to confuse, so it needs a target for what it is to forget. Blindspot takes the answers, and
the attention maps, of a second network that was trained briefly and never saw these rows; Gaussian-amnesiac learning
takes one random target a row. In both cases training simply goes on for an epoch or a few.

Equations
---------
D_f is to be forgotten, D_r stays, u_i = 1 for a row of D_f, l is the loss that the regressor f was trained with.
Blindspot: b has f's architecture, fresh weights and a few epochs on D_r alone. Then, in shuffled batches of both sets::

    L = c L_forget + (1 - c) L_retain,       c = (rows of D_f in the batch) / B
    L_retain = mean over retain rows of l(f(x), y)
    L_forget = mean over forget rows of l(f(x), b(x)) + beta sum_k mean[(A(h_k^f) - A(h_k^b))^2]
    A(h) = v / ||v||_2,   v = mean over channels of h^2,  a number for every position

For a loss that is a mean over rows L without the attention is (1/B) sum_i [u_i l(f, b) + (1 - u_i) l(f, y)], as the
paper writes it. Gaussian-amnesiac: mu and sd of all targets; every target of D_f is replaced, once, by a draw from
N(mu, sd^2); training goes on with l on all rows.

Measures (pure functions below): Wasserstein distance between the predictions of the unlearned model and of one that was
retrained without D_f ("gold"); an attack that tells members from others by their loss; and the anamnesis index

    AIN = (steps until f_unlearned is within 1 + alpha of the original's loss on D_f) / (the same of gold)

alpha = 0.05; 1 is ideal, near 0 says that the knowledge was only hidden, above 1 that more was lost than never learnt.

What to expect
--------------
* It works where the rows that stay cannot answer for those that go: a range of targets. Of rows at random a retrained
  model knows as much as before from their neighbours; nothing should, and nothing does, change much.
* Blindspot needs inputs of D_f but not its targets; Gaussian needs neither truth. Both need targets of D_r.
* A Gaussian target can be out of range (a negative age); over several epochs the network learns this noise by heart.

Code and paper
--------------
From this project's card, which was made from the official repository ayu987/deep-regression-unlearning; this could not
be read again here, and the paper's text was not.

* The code's scheduler is never stepped and the last epoch is kept; for the Gaussian form the best epoch on validation
  rows. Here the last epoch is kept in both (of one epoch they are the same).
* The code's attention maps are of the outputs that its network returns, one for every block of convolutions. Here
  forward hooks take them from any module, by default from all convolutions; no convolution, no attention term.
* The code keeps the student in train mode, so that statistics of batch norm move with the mixed batches, and b in eval
  mode. So do we; set norms to eval in a model that is in train mode, and they stay so.
* ``l1_loss`` of (B, 1) and (B,) broadcasts to (B, B) in silence; here targets take the shape of the predictions, and
  what does not fit is an error.
* The code averages means of batches when it evaluates, so a short last batch weighs too much. Here rows are averaged.
* AIN counts optimizer steps and looks before the first one too, so 0 is possible; whether the code does is unknown.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from shoestring._models import check_model
from shoestring.forget._loaders import (
    activations,
    call,
    check_positive,
    inputs_of,
    normal,
    targets_of,
    wide,
)
from shoestring.forget._regression_rows import fresh, select, shuffled, survey
from shoestring.loop import State, fit

__all__ = [
    "anamnesis_index",
    "attention_map",
    "attention_transfer_loss",
    "blindspot_loss",
    "blindspot_unlearn",
    "gaussian_amnesiac_unlearn",
    "gaussian_targets",
    "loss_membership_attack",
    "prediction_wasserstein",
    "relearning_steps",
    "train_blindspot",
]

Loss = Callable[[Tensor, Tensor], Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# ---- the mathematics


def attention_map(h: Tensor, channel_dim: int = 1) -> Tensor:
    """A(h): mean square over channels at every position, scaled to length 1 in every row.

    Parameters
    ----------
    h : tensor of shape (B, C, ...)
        Half precisions are squared in float32.
    channel_dim : int, default=1
        -1 for (B, T, D) of a transformer.

    Returns
    -------
    tensor of shape (B, P)
        P places in a row of length 1; of zeros where all of h is 0.

    Raises
    ------
    ValueError
        If there is no position beside rows and channels: the map would be 1 whatever h is.

    Examples
    --------
    >>> attention_map(torch.tensor([[[3.0, 0.0, 0.0, 4.0]]]).sqrt())
    tensor([[0.6000, 0.0000, 0.0000, 0.8000]])
    """
    if h.ndim < 3:
        raise ValueError(f"attention needs activations of shape (B, C, positions), got {tuple(h.shape)}")
    v = wide(h).square().mean(channel_dim).flatten(1)  # (B, positions)
    return F.normalize(v, dim=1)


def attention_transfer_loss(hs_student: Sequence[Tensor], hs_teacher: Sequence[Tensor], channel_dim: int = 1) -> Tensor:
    """``sum_k mean[(A(h_k^student) - A(h_k^teacher))^2]``, the mean over rows and positions; without beta.

    Parameters
    ----------
    hs_student, hs_teacher : sequences of tensors (B, C_k, ...)
        Channels may differ between the two, positions may not.

    Examples
    --------
    >>> h = torch.rand(2, 3, 4, 4)
    >>> attention_transfer_loss([h], [-2 * h]) < 1e-12  # neither sign nor size counts
    tensor(True)
    """
    if not hs_student or len(hs_student) != len(hs_teacher):
        raise ValueError(f"there must be as many student as teacher maps, got {len(hs_student)} and {len(hs_teacher)}")
    pairs = zip(hs_student, hs_teacher, strict=True)
    maps = [(attention_map(h_s, channel_dim), attention_map(h_t, channel_dim)) for h_s, h_t in pairs]
    if odd := [(a.shape, b.shape) for a, b in maps if a.shape != b.shape]:
        raise ValueError(f"maps must have equal rows and positions, got {tuple(odd[0][0])} and {tuple(odd[0][1])}")
    return torch.stack([(a - b).square().mean() for a, b in maps]).sum()


def blindspot_loss(
    output: Tensor,
    target: Tensor,
    u: Tensor,
    blindspot_output: Tensor,
    hs: Sequence[Tensor] = (),
    blindspot_hs: Sequence[Tensor] = (),
    *,
    attention_weight: float = 50.0,
    channel_dim: int = 1,
    loss_fn: Loss = F.l1_loss,
) -> Tensor:
    """L of a batch of B rows, of which some are to be forgotten, some stay.

    Parameters
    ----------
    output, target : tensors of shape (B,) or (B, outputs)
        Predictions of the student, and targets; those of forget rows are not used.
    u : bool tensor of shape (B,)
        True for rows to forget.
    blindspot_output : tensor of shape (u.sum(), ...)
        Predictions of the blindspot model for the forget rows alone.
    hs, blindspot_hs : sequences of tensors (u.sum(), C, ...)
        Activations of both for the forget rows alone; none, no attention term.
    attention_weight : float, default=50.0, the official beta
    loss_fn : callable, default=F.l1_loss
        Of predictions and targets, averaged over rows.

    Examples
    --------
    >>> output, target, u = (
    ...     torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ...     torch.zeros(4),
    ...     torch.tensor([True, False, False, False]),
    ... )
    >>> blindspot_loss(output, target, u, torch.tensor([11.0]))  # 1/4 of 10 + 3/4 of 3
    tensor(4.7500)
    """
    keep = ~u
    target = _as(target, output, "target")
    count = int(u.sum())
    c = count / len(u)
    if count == 0:
        return loss_fn(output, target)
    L_forget = loss_fn(output[u], _as(blindspot_output, output[u], "blindspot_output"))
    if hs:
        L_forget = L_forget + attention_weight * attention_transfer_loss(hs, blindspot_hs, channel_dim)
    if count == len(u):
        return L_forget
    L_retain = loss_fn(output[keep], target[keep])
    return c * L_forget + (1 - c) * L_retain


def gaussian_targets(targets: Tensor, mean: Any, std: Any, generator: torch.Generator) -> Tensor:
    """A draw from N(mean, std^2) for every target of shape (n, ...); mean and std broadcast, std >= 0.

    Examples
    --------
    >>> gaussian_targets(torch.zeros(2, 1), 3.0, 0.0, torch.Generator().manual_seed(0))
    tensor([[3.],
            [3.]])
    """
    targets = targets if targets.is_floating_point() else targets.float()
    noise = normal(targets.shape, wide(targets), generator)
    return (mean + std * noise).to(targets.dtype)


# ---- the methods


def blindspot_unlearn(
    model: nn.Module,
    retain_loader: DataLoader[Any],
    forget_loader: DataLoader[Any],
    *,
    blindspot: nn.Module | None = None,
    init_fn: Callable[[], nn.Module] | None = None,
    proxy_epochs: int = 2,
    epochs: int = 1,
    lr: float = 1e-3,
    proxy_lr: float = 1e-2,
    attention_weight: float = 50.0,
    layers: Sequence[str] | None = None,
    channel_dim: int = 1,
    loss_fn: Loss = F.l1_loss,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = False,
) -> nn.Module:
    """Make a regressor answer as a network would that never saw the rows of `forget_loader`.

    Parameters
    ----------
    model : nn.Module
        Trained; takes x, or the items of a dict, and returns predictions, or an output with ``logits``. It is not
        changed unless `inplace`.
    retain_loader, forget_loader : DataLoader over a map-style dataset
        Batches (x, y), or dicts with "labels". Their datasets are read in an order of this function's own.
    blindspot : nn.Module, optional
        A trained blindspot model; it is copied and not changed. By default `train_blindspot` makes one.
    init_fn, proxy_epochs, proxy_lr
        For `train_blindspot`. Official: 2 epochs at 1e-2 for images (100 for the model itself), 10 for an LSTM.
    epochs, lr : default 1 and 1e-3
        Adam's. Official: 1 epoch for images, 5 for an LSTM.
    attention_weight : float, default=50.0
        beta, official; 0 for no attention term.
    layers : sequence of str, optional
        Modules whose outputs' attention is compared; by default all convolutions of the model.
    channel_dim : int, default=1
        Of these outputs: -1 for (B, T, D).
    loss_fn : callable, default=F.l1_loss
        What the model was trained with, averaged over rows. The official code: l1 for images, mse for text.
    batch_size : int, optional
        Of the mixed batches; by default that of `retain_loader`. Official: 256.
    generator : torch.Generator, optional
        For order and fresh weights; by default a new one with seed 0.
    inplace : bool, default=False
    checkpoint : path, optional
        Folder from which an interrupted run goes on, given the same call and generator.
    progress : bool or None, default=False
        As in `shoestring.loop.fit`.

    Returns
    -------
    nn.Module
        The student, in the mode that `model` is in; with `inplace` the model itself.

    Raises
    ------
    TypeError, ValueError
        Bad options or loaders, an empty one, targets that do not fit the predictions, layers that are none.
    FloatingPointError
        If the loss is NaN or infinite; on the CPU before that step is taken.

    Warns
    -----
    UserWarning
        If rows are in both loaders, with their number.

    Notes
    -----
    Cost, in passes over rows: ``proxy_epochs`` of D_r, ``epochs`` of both with one forward pass of D_f through b, one
    reading of all rows to look for overlaps. Memory: a second model, and activations of `layers`.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.rand(64, 3)
    >>> rows = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    >>> low, high = (torch.utils.data.Subset(rows, part) for part in (range(16), range(16, 64)))
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> unlearned = blindspot_unlearn(model, DataLoader(high, 16), DataLoader(low, 16))
    >>> torch.equal(unlearned[0].weight, model[0].weight)
    False
    """
    _check(model, retain_loader, forget_loader, epochs, lr=lr, proxy_lr=proxy_lr)
    if attention_weight != 0:
        check_positive(attention_weight=attention_weight)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    survey(retain_loader, forget_loader)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    layers = convolutions if layers is None else list(layers)
    layers = layers if attention_weight else []
    folder = None if checkpoint is None else Path(checkpoint)
    with activations(model, layers, "layers"):
        pass  # unknown names are refused before anything is trained
    if blindspot is None:
        blindspot = train_blindspot(
            model,
            retain_loader,
            init_fn=init_fn,
            epochs=proxy_epochs,
            lr=proxy_lr,
            loss_fn=loss_fn,
            batch_size=batch_size,
            generator=generator,
            checkpoint=folder and folder / "blindspot",
            progress=progress,
        )
    else:
        check_model(blindspot)
        blindspot = copy.deepcopy(blindspot)
    b = blindspot.eval().requires_grad_(False)
    student = model if inplace else copy.deepcopy(model)
    rows = shuffled([forget_loader, retain_loader], batch_size, generator)
    n_f = len(forget_loader.dataset)  # type: ignore[arg-type]

    with activations(student, layers, "layers") as h_f, activations(b, layers, "layers") as h_b:

        def step(student: nn.Module, numbered: tuple[Tensor, Any]) -> Tensor:
            numbers, batch = numbered
            inputs, u = inputs_of(batch), numbers < n_f
            output = call(student, inputs)
            hs: list[Tensor] = []
            blindspot_hs: list[Tensor] = []
            blindspot_output = output[:0]
            if bool(u.any()):
                with torch.no_grad():
                    blindspot_output = call(b.to(u.device), select(inputs, u))
                hs, blindspot_hs = [h_f[name][u] for name in layers], [h_b[name] for name in layers]
            options: dict[str, Any] = {"attention_weight": attention_weight, "channel_dim": channel_dim}
            target = targets_of(batch, "retain_loader")
            return blindspot_loss(output, target, u, blindspot_output, hs, blindspot_hs, **options, loss_fn=loss_fn)

        _train(student, rows, step, lr, epochs, folder and folder / "unlearning", progress)
    return student


def train_blindspot(
    model: nn.Module,
    retain_loader: DataLoader[Any],
    *,
    init_fn: Callable[[], nn.Module] | None = None,
    epochs: int = 2,
    lr: float = 1e-2,
    loss_fn: Loss = F.l1_loss,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = False,
) -> nn.Module:
    """The blindspot model b: the architecture of `model`, fresh weights, a few epochs of Adam on the retain rows.

    Parameters
    ----------
    model : nn.Module
        Of it only the architecture is used: the configuration of a ``PreTrainedModel``, else a copy in which every
        module is reset by its own ``reset_parameters``.
    init_fn : callable, optional
        ``init_fn() -> nn.Module`` with fresh weights instead, for models that have neither.

    The others, and errors, are those of `blindspot_unlearn`.

    Examples
    --------
    >>> rows = torch.utils.data.TensorDataset(torch.rand(32, 3), torch.rand(32, 1))
    >>> type(train_blindspot(nn.Linear(3, 1), DataLoader(rows, 8))).__name__
    'Linear'
    """
    _check(model, retain_loader, None, epochs, proxy_lr=lr)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    b = fresh(model, init_fn, generator).train()
    rows = shuffled([retain_loader], batch_size, generator)
    _train(b, rows, partial(_plain_step, loss_fn), lr, epochs, checkpoint, progress)
    return b


def gaussian_amnesiac_unlearn(
    model: nn.Module,
    retain_loader: DataLoader[Any],
    forget_loader: DataLoader[Any],
    *,
    mean: float | Tensor | None = None,
    std: float | Tensor | None = None,
    epochs: int = 1,
    lr: float = 1e-3,
    loss_fn: Loss = F.l1_loss,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = False,
) -> nn.Module:
    """Go on training with a random target for every row of `forget_loader`, drawn once.

    Parameters
    ----------
    mean, std : float or tensor of the shape of a target, optional
        By default of all targets, those to forget included, as in the official code; std with n - 1.

    The others, and errors, are those of `blindspot_unlearn`. Cost: `epochs` passes over all rows, and one reading.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.rand(64, 3)
    >>> rows = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    >>> low, high = (torch.utils.data.Subset(rows, part) for part in (range(16), range(16, 64)))
    >>> unlearned = gaussian_amnesiac_unlearn(nn.Linear(3, 1), DataLoader(high, 16), DataLoader(low, 16))
    """
    _check(model, retain_loader, forget_loader, epochs, lr=lr)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    forgotten, kept = survey(retain_loader, forget_loader)
    both = torch.cat([forgotten, kept])
    both = wide(both) if both.is_floating_point() else both.float()
    mean = both.mean(0) if mean is None else mean
    std = both.std(0) if std is None else std
    if not bool((torch.as_tensor(std) >= 0).all()):
        raise ValueError(f"std must be >= 0, got {std}")
    drawn = gaussian_targets(forgotten, mean, std, generator)  # (n_f, ...)
    student = model if inplace else copy.deepcopy(model)

    def step(student: nn.Module, numbered: tuple[Tensor, Any]) -> Tensor:
        numbers, batch = numbered
        y = targets_of(batch, "retain_loader")
        u = (numbers < len(drawn)).reshape(-1, *[1] * (y.ndim - 1))
        y = torch.where(u, drawn.to(y.device)[numbers.clamp(max=len(drawn) - 1)], y)
        output = call(student, inputs_of(batch))
        return loss_fn(output, _as(y, output, "target"))

    rows = shuffled([forget_loader, retain_loader], batch_size, generator)
    _train(student, rows, step, lr, epochs, checkpoint, progress)
    return student


# ---- the measures


def prediction_wasserstein(predictions: ArrayLike, gold_predictions: ArrayLike) -> float:
    """Wasserstein-1 distance between the predictions of two models for the rows to forget, as distributions.

    Parameters
    ----------
    predictions, gold_predictions : array-like of n and of m numbers

    Examples
    --------
    >>> prediction_wasserstein([1.0, 2.0, 3.0], [5.0, 4.0, 3.0])
    2.0
    """
    from scipy.stats import wasserstein_distance  # here because it takes about a second to import

    return float(wasserstein_distance(*(_numbers(p) for p in (predictions, gold_predictions))))


def loss_membership_attack(member_losses: ArrayLike, other_losses: ArrayLike, forget_losses: ArrayLike) -> float:
    """Share of the rows to forget that an attacker takes for members, by their loss alone.

    The attacker is the official one, scikit-learn's ``SVC(C=3, kernel="rbf", gamma="auto")``, which learns from losses
    of retained training rows and of test rows. Give it equally many of both, or it favours the larger. Its time grows
    with the square of their number: a few thousand.

    Parameters
    ----------
    member_losses, other_losses, forget_losses : array-like of numbers, one a row
        Losses of one and the same model.

    Examples
    --------
    >>> loss_membership_attack([0.0, 0.1, 0.2], [1.0, 1.1, 1.2], [0.1, 0.15, 1.05, 1.15])
    0.5
    """
    from sklearn.svm import SVC

    members, others, forget = (_numbers(losses) for losses in (member_losses, other_losses, forget_losses))
    X, y = np.concatenate([members, others])[:, None], np.repeat([1, 0], [len(members), len(others)])
    attacker = SVC(C=3, kernel="rbf", gamma="auto").fit(X, y)
    return float(attacker.predict(forget[:, None]).mean())


def relearning_steps(
    model: nn.Module,
    train_loader: DataLoader[Any],
    forget_loader: DataLoader[Any],
    target_loss: float,
    *,
    lr: float = 1e-3,
    max_epochs: int = 10,
    loss_fn: Loss = F.l1_loss,
    batch_size: int | None = None,
    seed: int = 0,
) -> int:
    """Steps of Adam on all training rows until the mean loss on held-out rows of the forgotten kind is `target_loss`.

    The model is copied. The order of rows depends on `seed` alone, so that two models relearn on the same batches.

    Parameters
    ----------
    train_loader : DataLoader over a map-style dataset, the rows to forget among them
    forget_loader : DataLoader or list of batches
        Read after every step.
    max_epochs : int, default=10, the official cap
        Steps of so many epochs are the answer if the loss is not reached.

    Returns
    -------
    int
        0 if the loss is low enough from the start.

    Examples
    --------
    >>> rows = DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1), torch.ones(8, 1)), 4)
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 0.0)
    >>> relearning_steps(model, rows, rows, 0.45, lr=0.1, loss_fn=nn.functional.l1_loss)  # six times 0.1
    6
    """
    _check(model, train_loader, None, max_epochs, lr=lr)
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    rows = shuffled([train_loader], batch_size, generator)
    if _mean_loss(student, forget_loader, loss_fn) <= target_loss:
        return 0
    taken = 0

    def look(state: State) -> bool:
        nonlocal taken
        taken = state.step
        return _mean_loss(student, forget_loader, loss_fn) <= target_loss

    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    step = partial(_plain_step, loss_fn)
    fit(student, rows, step, optimizer, epochs=max_epochs, callbacks=[look], progress=False)
    return taken


def anamnesis_index(
    original: nn.Module,
    unlearned: nn.Module,
    gold: nn.Module,
    train_loader: DataLoader[Any],
    forget_loader: DataLoader[Any],
    *,
    alpha: float = 0.05,
    loss_fn: Loss = F.l1_loss,
    **options: Any,
) -> float:
    """AIN: how long the unlearned model takes to relearn, over how long the retrained one takes to learn.

    Parameters
    ----------
    original, unlearned, gold : nn.Module
        As trained on all rows; after forgetting; trained without the rows to forget. None is changed.
    train_loader, forget_loader, **options
        As in `relearning_steps`.
    alpha : float, default=0.05
        Relearnt is a loss of at most 1 + alpha of the original's.

    Returns
    -------
    float
        1 if both need no step; infinity if only gold needs none.

    Examples
    --------
    >>> rows = DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1), torch.ones(8, 1)), 4)
    >>> far, near, knows = (nn.Linear(1, 1, bias=False) for _ in range(3))
    >>> for model, weight in ((far, 0.0), (near, 0.75), (knows, 0.95)):
    ...     _ = nn.init.constant_(model.weight, weight)
    >>> anamnesis_index(knows, near, far, rows, rows, lr=0.1)  # 2 steps and 10
    0.2
    """
    check_positive(alpha=alpha)
    check_model(original)
    goal = (1 + alpha) * _mean_loss(original, forget_loader, loss_fn)
    taken, of_gold = (
        relearning_steps(model, train_loader, forget_loader, goal, loss_fn=loss_fn, **options)
        for model in (unlearned, gold)
    )
    if of_gold == 0:
        return 1.0 if taken == 0 else float("inf")
    return taken / of_gold


# ---- helpers


def _as(target: Tensor, output: Tensor, name: str) -> Tensor:
    """The target in the shape of the predictions: (B,) and (B, 1) are the same, anything else is an error."""
    if target.shape == output.shape:
        return target
    if target.numel() == output.numel() and target.shape[:1] == output.shape[:1]:
        return target.reshape(output.shape)
    raise ValueError(
        f"{name} must be of the shape of the predictions, {tuple(output.shape)}, got {tuple(target.shape)}"
    )


def _check(model: Any, retain: Any, forget: Any, epochs: int, **positive: float) -> None:
    check_model(model)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs must be a whole number >= 1, got {epochs!r}")
    check_positive(**positive)
    for name, loader in (("retain_loader", retain), ("forget_loader", forget)):
        if loader is None and name == "forget_loader":
            continue
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TypeError(f"{name} must be a DataLoader over a map-style dataset, got {type(loader).__name__}")
        if len(loader.dataset) == 0:  # type: ignore[arg-type]
            raise ValueError(f"{name} is empty")


def _plain_step(loss_fn: Loss, model: nn.Module, numbered: tuple[Tensor, Any]) -> Tensor:
    batch = numbered[1]
    output = call(model, inputs_of(batch))
    return loss_fn(output, _as(targets_of(batch, "retain_loader"), output, "target"))


def _train(
    model: nn.Module,
    rows: DataLoader[Any],
    step: Callable[[Any, Any], Tensor],
    lr: float,
    epochs: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool | None,
) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    fit(model, rows, step, optimizer, epochs=epochs, checkpoint=checkpoint, progress=progress)


@torch.no_grad()
def _mean_loss(model: nn.Module, loader: Any, loss_fn: Loss) -> float:
    """Mean over rows, in eval mode; the modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    try:
        for batch in loader:
            inputs = inputs_of(batch)
            inputs = {k: v.to(device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
            output = call(model, inputs)
            y = _as(targets_of(batch, "forget_loader").to(device), output, "target")
            total, count = total + float(loss_fn(output, y)) * len(output), count + len(output)
    finally:
        for module, mode in modes:
            module.training = mode
    if not count:
        raise ValueError("forget_loader yields no batches")
    return total / count


def _numbers(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64).ravel()
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers, at least one, got {array.size}, {(~np.isfinite(array)).sum()} bad")
    return array
