r"""Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models.

Shaofei Shen, Chenhao Zhang, Yawen Zhao, Alina Bialkowski, Weitong Chen, Miao Xu. ICLR 2024, arXiv 2404.00506.

Idea
----
A classifier is a head on features, head(g(x)). Only g moves: features of what is to be forgotten leave the place where
they lie, as told by a small VAE trained on them, and turn away from those of a frozen copy; features of what stays are
held in both. No label is read, neither of what is forgotten nor of what stays.

Equations
---------
g_D is the extractor as it was, h a VAE of the features of all data, h_f one of the features to forget. For every pair
of batches (retain i = 1..B_r, forget j = 1..B_f), two steps of Adam on g, each with moments of its own::

    rho(m) = exp(m / (m + 1)),  in [1, e)
    L_UE = sum_i rho(||g(x_i) - h(g(x_i))||^2) - sum_j rho(||g(x_j) - h_f(g(x_j))||^2)                  step (a)
    s_i = 1 - cos(g(x_i), g_D(x_i)),   q_j = 1 - cos(g(x_j), g_D(x_j))
    L_RA = sum_i log(exp(s_i) / sum_j exp(q_j / tau)) = sum_i s_i - B_r logsumexp_j(q_j / tau)          step (b)

The VAEs, encoder d-128-32-(mu, log sigma^2 in R^k), decoder k-32-128-d, ReLU between::

    L_h = (sum ||e' - e||^2 + kl_weight sum KL) / B,   KL = -1/2 sum_k (log sigma_k^2 + 1 - mu_k^2 - sigma_k^2)

LAF+R is `repair` afterwards: cross-entropy on the head alone, with a few labelled batches of what stays.

Code and paper
--------------
Read: the official repository ShaofeiShen768/LAF (VUnlearning, Train, Model, hyper-parameters) and this project's card;
not the paper's text.

* The paper divides both exponents by tau, the code only that of the forget term. The code is followed: its
  hyper-parameters were chosen with it.
* The code trains h on all data, those to be forgotten included; the paper argues that these come close to the data
  that stay. The code is followed; ``retain_vae_on="retain"`` is the other.
* The code's decoder ends in a sigmoid, though its features are the unbounded outputs of a linear layer: what is
  negative or above 1 cannot be reconstructed, m is large and rho is flat. Adam makes up for small gradients, so this
  still works; it is the default. ``output_activation=None`` (ours) drops the sigmoid and standardises the features.
* The code's KL has log(sigma^2 + 1e-8); here log sigma^2 is what the encoder gives.
* The code draws z anew at every use of a VAE, also of a trained one; so do we, from `generator`. It sees each batch of
  the VAE's training through the classifier again; here the features are computed once, and kept.
* The code runs in eval mode: statistics of batch norm stay. So do we.
* At the start s = q = 0 and step (b) has no gradient but its rounding error: step (a) is what breaks the symmetry.
* The code's attack and noisy-label task are not reproduced.
* The official rates are for thousands of pairs of steps. For fifty to a hundred, 30 to 100 times these with a
  temperature of 5 to 20 were right here, on digits and garments; a smaller temperature costs the rest more.

Cost: for every pair of batches two forward and backward passes of both and one forward pass of both through the frozen
copy (a second set of weights in memory); before that one forward pass of all data and N d numbers for the features.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoestring._models import check_model
from shoestring.forget._laf_vae import RepresentationVAE, check_activation, fit_representation_vae, vae_loss
from shoestring.forget._loaders import (
    activations,
    call,
    check_finite,
    check_loader,
    check_positive,
    inputs_of,
    row_keys,
    targets_of,
    warn_of_overlap,
    wide,
)
from shoestring.loop import State, fit

__all__ = [
    "LabelAgnosticForgetting",
    "RepresentationVAE",
    "extractor_unlearning_loss",
    "fit_representation_vae",
    "repair",
    "representation_alignment_loss",
    "rho",
    "vae_loss",
]

# ---- the mathematics


def rho(m: Tensor) -> Tensor:
    """``exp(m / (m + 1))``: 1 at m = 0, rising, below e for every m >= 0.

    Examples
    --------
    >>> rho(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 1.6487])
    """
    return torch.exp(m / (m + 1))


def extractor_unlearning_loss(e_r: Tensor, h_e_r: Tensor, e_f: Tensor, h_f_e_f: Tensor) -> Tensor:
    """L_UE of step (a): features of what stays near their VAE's, those to forget away from theirs.

    Parameters
    ----------
    e_r, h_e_r : tensor of shape (B_r, d)
        Features of the rows that stay and what the VAE of all features makes of them.
    e_f, h_f_e_f : tensor of shape (B_f, d)
        Features of the rows to forget and what their own VAE makes of them.

    Returns
    -------
    tensor of shape (), between ``B_r - e B_f`` and ``e B_r - B_f``; float32 for half precisions

    Examples
    --------
    >>> e = torch.zeros(3, 2)
    >>> extractor_unlearning_loss(e, e, e[:1], e[:1])  # perfect reconstructions: B_r - B_f
    tensor(2.)
    """
    m_r = (wide(e_r) - wide(h_e_r)).square().sum(1)  # (B_r,)
    m_f = (wide(e_f) - wide(h_f_e_f)).square().sum(1)  # (B_f,)
    return rho(m_r).sum() - rho(m_f).sum()


def representation_alignment_loss(e_r: Tensor, e_r0: Tensor, e_f: Tensor, e_f0: Tensor, temperature: float) -> Tensor:
    """L_RA of step (b): features of what stays along those of the frozen copy, those to forget away from them.

    Parameters
    ----------
    e_r, e_r0 : tensor of shape (B_r, d)
        Features of the rows that stay, and of the same rows in the frozen copy.
    e_f, e_f0 : tensor of shape (B_f, d)
        The same of the rows to forget.
    temperature : tau > 0
        Only of the forget term, as in the official code: its gradient is divided by tau.

    Returns
    -------
    tensor of shape (); float32 for half precisions

    Examples
    --------
    >>> e = torch.eye(4)
    >>> representation_alignment_loss(e[:3], e[:3], e[:1], -e[:1], temperature=2.0)  # -3 (2 / tau)
    tensor(-3.)
    """
    s = 1 - F.cosine_similarity(wide(e_r), wide(e_r0), dim=1)  # (B_r,)
    q = 1 - F.cosine_similarity(wide(e_f), wide(e_f0), dim=1)  # (B_f,)
    return s.sum() - len(s) * torch.logsumexp(q / temperature, dim=0)


# ---- the method


class LabelAgnosticForgetting:
    """Make a classifier forget rows, without a label, by moving the layers before `feature_layer`.

    Parameters
    ----------
    feature_layer : str
        Name of the module whose output, flattened to (B, d), is the feature g(x): the last one before the head
        ("resnet.pooler", "fc1"). What comes after it stays as it is; so does what has no ``requires_grad``.
    latent_dim : int, default=8
        Of the VAEs; official: 8 for a small network, 16 for ResNet-18.
    vae_epochs : int, default=10
    epochs : int, default=20
        Official: 20 for a small network on (Fashion-)MNIST, 40 for ResNet-18. One epoch ends with the shorter loader.
    lr_extractor, lr_align : float, default=5e-5 and 1e-4
        Of steps (a) and (b); official for the small network. ResNet-18: 1e-5 and 4e-5, for classes 5e-5.
    temperature : float, default=20.0
        tau; official: 20 for classes, 5 for random rows of (Fashion-)MNIST.
    kl_weight : float, default=0.025
    output_activation : {"sigmoid", None}, default="sigmoid"
        Of the VAEs' decoders: the official one, or none on standardised features (see `RepresentationVAE`).
    retain_vae_on : {"all", "retain"}, default="all"
        What the first VAE is trained on: features of both loaders as in the official code, or of what stays.
    inplace : bool, default=False
        Change the given model instead of a copy. If an error stops it then, the weights are the last good ones.
    device : torch.device or str, optional
        Where to work; by default where the model is.
    generator : torch.Generator, optional
        For the VAEs' weights, order and noise; by default a new one with seed 0. Loaders have their own order.

    Attributes
    ----------
    model_ : nn.Module
        The model that has forgotten, in the mode it came in; save it by its own ``save_pretrained``.
    retain_vae_, forget_vae_ : RepresentationVAE
    history_ : list of dict
        As `shoestring.loop.fit` returns it: "loss" is L_UE, "alignment" L_RA.

    Notes
    -----
    Approximate: nothing is proved about what is left, and the weights may still know it. Measure it
    (`shoestring.forget.evaluate`), against a retrained model where one can be had.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> forget, retain = [torch.randn(16, 4)], [torch.randn(16, 4)]
    >>> laf = LabelAgnosticForgetting("1", vae_epochs=1, epochs=2).fit(model, forget, retain)
    >>> torch.equal(laf.model_[2].weight, model[2].weight), torch.equal(laf.model_[0].weight, model[0].weight)
    (True, False)
    """

    model_: nn.Module
    retain_vae_: RepresentationVAE
    forget_vae_: RepresentationVAE
    history_: list[dict[str, float]]

    def __init__(
        self,
        feature_layer: str,
        *,
        latent_dim: int = 8,
        vae_epochs: int = 10,
        epochs: int = 20,
        lr_extractor: float = 5e-5,
        lr_align: float = 1e-4,
        temperature: float = 20.0,
        kl_weight: float = 0.025,
        output_activation: str | None = "sigmoid",
        retain_vae_on: str = "all",
        inplace: bool = False,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.feature_layer = feature_layer
        self.latent_dim, self.vae_epochs, self.epochs = latent_dim, vae_epochs, epochs
        self.lr_extractor, self.lr_align, self.temperature = lr_extractor, lr_align, temperature
        self.kl_weight, self.output_activation, self.retain_vae_on = kl_weight, output_activation, retain_vae_on
        self.inplace, self.device, self.generator = inplace, device, generator

    def fit(
        self,
        model: nn.Module,
        forget_loader: Iterable[Any],
        retain_loader: Iterable[Any],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | None = False,
    ) -> LabelAgnosticForgetting:
        """Forget the rows of `forget_loader`.

        Parameters
        ----------
        model : nn.Module
            Takes x, or the items of a dict; not changed unless ``inplace``.
        forget_loader, retain_loader : DataLoader or list of batches
            Batches x, (x, y) or dicts; y and "labels" are not looked at. `retain_loader` may be a sample of what is to
            stay. Both are read once for the features, then once an epoch, in pairs.
        checkpoint : path, optional
            Folder from which an interrupted run goes on: the same call, with a `generator` and loaders in the same
            state as at first.
        progress : bool or None, default=False
            As in `shoestring.loop.fit`.

        Raises
        ------
        TypeError, ValueError
            Bad options; a loader that yields nothing; a model with NaN; a feature layer that is none, or with nothing
            trainable before it.
        FloatingPointError
            If a loss is NaN or infinite, before that step is taken.

        Warns
        -----
        UserWarning
            If rows are in both loaders, with their number.
        """
        self._check()
        check_model(model)
        check_loader("forget_loader", forget_loader)
        check_loader("retain_loader", retain_loader)
        generator = torch.Generator().manual_seed(0) if self.generator is None else self.generator
        folder = None if checkpoint is None else Path(checkpoint)
        student = model if self.inplace else copy.deepcopy(model)
        student = student if self.device is None else student.to(self.device)
        modes = [(module, module.training) for module in student.modules()]
        student.eval()
        try:
            with activations(student, [self.feature_layer], "feature_layer") as kept:
                e_f, keys_f, moved = self._features(student, kept, forget_loader, "forget_loader")
                e_r, keys_r, _ = self._features(student, kept, retain_loader, "retain_loader")
            warn_of_overlap(keys_f, keys_r)
            options: dict[str, Any] = {"latent_dim": self.latent_dim, "epochs": self.vae_epochs}
            options |= {"kl_weight": self.kl_weight, "output_activation": self.output_activation}
            options |= {"generator": generator, "progress": progress}
            known = torch.cat([e_f, e_r]) if self.retain_vae_on == "all" else e_r
            h = fit_representation_vae(known, checkpoint=folder and folder / "retain-vae", **options)
            h_f = fit_representation_vae(e_f, checkpoint=folder and folder / "forget-vae", **options)
            pairs = _Pairs(forget_loader, retain_loader)
            history = self._unlearn(
                student, h, h_f, moved, pairs, generator, folder and folder / "unlearning", progress
            )
        finally:
            for module, mode in modes:
                module.training = mode
        self.model_, self.retain_vae_, self.forget_vae_, self.history_ = student, h, h_f, history
        return self

    def _check(self) -> None:
        if not isinstance(self.feature_layer, str) or not self.feature_layer:
            raise ValueError(f"feature_layer must be the name of a module, got {self.feature_layer!r}")
        for name in ("latent_dim", "vae_epochs", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        check_positive(lr_extractor=self.lr_extractor, lr_align=self.lr_align, temperature=self.temperature)
        if self.kl_weight != 0:
            check_positive(kl_weight=self.kl_weight)
        check_activation(self.output_activation)
        if self.retain_vae_on not in ("all", "retain"):
            raise ValueError(f"retain_vae_on must be 'all' or 'retain', got {self.retain_vae_on!r}")

    def _features(
        self, model: nn.Module, kept: dict[str, Tensor], loader: Iterable[Any], name: str
    ) -> tuple[Tensor, np.ndarray, list[nn.Parameter]]:
        """Features (N, d) of a loader, a key for each of its rows, and the parameters that they depend on."""
        device = next(model.parameters()).device
        found: list[Tensor] = []
        keys: list[np.ndarray] = []
        moved: list[nn.Parameter] = []
        for batch in loader:
            inputs = inputs_of(batch)
            if not found:  # one pass with gradients tells the extractor from the head
                with torch.enable_grad():
                    e = _embed(model, kept, self.feature_layer, _to(inputs, device))
                    moved = _reached(e, model, self.feature_layer)
            else:
                with torch.no_grad():
                    e = _embed(model, kept, self.feature_layer, _to(inputs, device))
            found.append(e.detach())
            keys.append(row_keys(inputs))
        if not found:
            raise ValueError(f"{name} yields no batches")
        features = torch.cat(found)
        if not bool(features.isfinite().all()):
            raise ValueError(f"features of {name} must be finite, got NaN or infinity: look at its inputs")
        return features, np.concatenate(keys), moved

    def _unlearn(
        self,
        student: nn.Module,
        h: RepresentationVAE,
        h_f: RepresentationVAE,
        moved: list[nn.Parameter],
        pairs: _Pairs,
        generator: torch.Generator,
        checkpoint: Path | None,
        progress: bool | None,
    ) -> list[dict[str, float]]:
        layer, temperature = self.feature_layer, self.temperature
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
        extract, align = torch.optim.Adam(moved, lr=self.lr_extractor), torch.optim.Adam(moved, lr=self.lr_align)

        def reconstructed(vae: RepresentationVAE, e: Tensor) -> tuple[Tensor, Tensor]:
            x = vae.scaled(e)
            return x, vae(x, generator)[0]

        with activations(student, [layer], "feature_layer") as now, activations(teacher, [layer], "") as then:

            def step(parts: Any, batch: tuple[Any, Any]) -> tuple[None, dict[str, Tensor]]:
                student = parts["student"]
                forget, retain = (inputs_of(half) for half in batch)
                e_r, e_f = _embed_both(student, now, layer, retain, forget)
                L_UE = extractor_unlearning_loss(*reconstructed(h, e_r), *reconstructed(h_f, e_f))
                _descend(extract, L_UE, "unlearning loss")

                e_r, e_f = _embed_both(student, now, layer, retain, forget)
                with torch.no_grad():
                    e_r0, e_f0 = _embed_both(teacher, then, layer, retain, forget)
                L_RA = representation_alignment_loss(e_r, e_r0, e_f, e_f0, temperature)
                _descend(align, L_RA, "alignment loss")
                return None, {"loss": L_UE.detach(), "alignment": L_RA.detach()}

            # In a module of its own, which is in train mode, the student stays in eval mode: batch norm is frozen.
            return fit(
                nn.ModuleDict({"student": student}),
                pairs,
                step,
                extract,
                epochs=self.epochs,
                callbacks=[_Saved(align)],
                generators=[generator, *pairs.generators()],
                checkpoint=checkpoint,
                progress=progress,
            )


def repair(
    model: nn.Module,
    labelled_loader: Iterable[Any],
    *,
    head: str,
    epochs: int = 1,
    max_steps: int | None = None,
    lr: float = 1e-4,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = False,
) -> nn.Module:
    """LAF+R: train the head alone, by cross-entropy on a few labelled batches of what stays, in eval mode.

    Parameters
    ----------
    model : nn.Module
        `LabelAgnosticForgetting.model_`; not changed unless `inplace`.
    labelled_loader : DataLoader or list of batches
        (x, y), or dicts with "labels"; y of shape (B,), int64.
    head : str
        Name of the module to train ("fc2", "classifier").
    epochs, max_steps : int
        The official code takes as many batches as the forget loader has.
    lr : float, default=1e-4
        Adam's; ours, the rate of the original training. The official rate was not found.

    Returns
    -------
    nn.Module

    Raises
    ------
    TypeError, ValueError
        Bad options, no batches, batches without labels, a head that is none.
    FloatingPointError
        If the loss is NaN or infinite.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [(torch.randn(16, 4), torch.arange(16) % 3)]
    >>> repaired = repair(model, batches, head="2")
    >>> torch.equal(repaired[0].weight, model[0].weight), torch.equal(repaired[2].weight, model[2].weight)
    (True, False)
    """
    check_model(model)
    check_loader("labelled_loader", labelled_loader)
    check_positive(lr=lr)
    known = dict(model.named_modules())
    if head not in known:
        raise ValueError(f"head must name a module of the model, got {head!r}; there are {', '.join(known)[:500]}")
    student = model if inplace else copy.deepcopy(model)
    parameters = list(dict(student.named_modules())[head].parameters())
    if not parameters:
        raise ValueError(f"head must have parameters, got {head!r} with none")
    modes = [(module, module.training) for module in student.modules()]
    student.eval()

    def step(parts: Any, batch: Any) -> Tensor:
        scores = call(parts["student"], inputs_of(batch))
        return F.cross_entropy(wide(scores), targets_of(batch, "labelled_loader"))

    try:
        fit(
            nn.ModuleDict({"student": student}),
            labelled_loader,
            step,
            torch.optim.Adam(parameters, lr=lr),
            epochs=epochs,
            max_steps=max_steps,
            checkpoint=checkpoint,
            progress=progress,
        )
    finally:
        for module, mode in modes:
            module.training = mode
    student.zero_grad()
    return student


# ---- helpers


def _embed(model: nn.Module, kept: dict[str, Tensor], layer: str, inputs: Any) -> Tensor:
    """g(x) of shape (B, d): what the hook keeps of a forward pass."""
    kept.pop(layer, None)
    call(model, inputs)
    if layer not in kept:
        raise ValueError(f"feature_layer {layer!r} is not called in a forward pass of the model")
    return kept.pop(layer).flatten(1)


def _embed_both(
    model: nn.Module, kept: dict[str, Tensor], layer: str, retain: Any, forget: Any
) -> tuple[Tensor, Tensor]:
    """Features of both batches, by one forward pass if they fit together: in eval mode no row knows another."""
    if isinstance(retain, Tensor) and isinstance(forget, Tensor) and retain.shape[1:] == forget.shape[1:]:
        e = _embed(model, kept, layer, torch.cat([retain, forget]))
        return e[: len(retain)], e[len(retain) :]
    return _embed(model, kept, layer, retain), _embed(model, kept, layer, forget)


def _reached(e: Tensor, model: nn.Module, layer: str) -> list[nn.Parameter]:
    """The trainable parameters that the features depend on: those of the extractor."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads: Sequence[Tensor | None] = ()
    if e.requires_grad:
        grads = torch.autograd.grad(wide(e).sum(), parameters, allow_unused=True)
    found = [p for p, grad in zip(parameters, grads, strict=False) if grad is not None]
    if not found:
        raise ValueError(f"feature_layer {layer!r} has no trainable parameter before it: nothing could be moved")
    return found


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, what: str) -> None:
    check_finite(loss, what)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs.to(device)


class _Pairs:
    """Batches to forget beside batches to keep, until one of the two ends."""

    def __init__(self, forget: Iterable[Any], retain: Iterable[Any]) -> None:
        self.forget, self.retain = forget, retain

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return zip(self.forget, self.retain, strict=False)

    def __len__(self) -> int:
        return min(len(self.forget), len(self.retain))  # type: ignore[arg-type]

    def generators(self) -> list[torch.Generator]:
        """Those that decide the order of the two loaders."""
        found = [getattr(part, "generator", None) for half in (self.forget, self.retain) for part in _parts(half)]
        return [generator for generator in found if isinstance(generator, torch.Generator)]


def _parts(loader: Any) -> list[Any]:
    return [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]


class _Saved:
    """The second optimizer, for `fit` to save and restore beside the first."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def __call__(self, state: State) -> None:
        return None
