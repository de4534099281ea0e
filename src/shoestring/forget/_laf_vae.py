"""The small VAE of feature vectors that `shoestring.forget.laf` trains twice; see there for the paper."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shoestring.forget._loaders import normal, seeded
from shoestring.loop import fit

VAE_LR, VAE_BATCH = 1e-3, 32  # the official code's


def vae_loss(e_out: Tensor, e: Tensor, mu: Tensor, log_var: Tensor, kl_weight: float = 0.025) -> Tensor:
    """Squared error and weighted KL to the standard normal, both summed over a row and averaged over the batch.

    Parameters
    ----------
    e_out, e : tensor of shape (B, d)
    mu, log_var : tensor of shape (B, k)
    kl_weight : float, default=0.025, the official code's

    Examples
    --------
    >>> e, z = torch.zeros(4, 3), torch.zeros(4, 2)
    >>> vae_loss(e + 1, e, z, z)
    tensor(3.)
    """
    kl = -0.5 * (log_var + 1 - mu.square() - log_var.exp()).sum()
    return ((e_out - e).square().sum() + kl_weight * kl) / len(e)


class RepresentationVAE(nn.Module):
    """A small VAE of feature vectors; float32, weights of torch's own initialisation.

    Parameters
    ----------
    dim : int
        d, the width of the features.
    latent_dim : int, default=8
        k; the official code takes 8 for its small network, 16 for ResNet-18.
    hidden : pair of int, default=(128, 32)
    output_activation : {"sigmoid", None}, default="sigmoid"
        "sigmoid" as in the official code: reconstructions lie in (0, 1). None: no activation, and features are
        standardised inside by ``mean`` and ``std`` (buffers, 0 and 1 until `fit_representation_vae` sets them).

    Examples
    --------
    >>> vae = RepresentationVAE(6, latent_dim=2)
    >>> e_out, mu, log_var = vae(torch.zeros(5, 6), torch.Generator().manual_seed(0))
    >>> e_out.shape, mu.shape
    (torch.Size([5, 6]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        dim: int,
        latent_dim: int = 8,
        hidden: tuple[int, int] = (128, 32),
        output_activation: str | None = "sigmoid",
    ) -> None:
        super().__init__()
        check_activation(output_activation)
        wider, narrower = hidden
        self.output_activation = output_activation
        self.encoder = nn.Sequential(nn.Linear(dim, wider), nn.ReLU(), nn.Linear(wider, narrower), nn.ReLU())
        self.mu, self.log_var = nn.Linear(narrower, latent_dim), nn.Linear(narrower, latent_dim)
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, narrower), nn.ReLU(), nn.Linear(narrower, wider), nn.ReLU(), nn.Linear(wider, dim))
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def scaled(self, e: Tensor) -> Tensor:
        """The features as the VAE compares them: themselves, or standardised if there is no sigmoid."""
        return e.float() if self.output_activation else (e.float() - self.mean) / self.std

    def forward(self, e: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mu and log sigma^2 of features (B, d) that come as `scaled` gives them."""
        x = self.encoder(e)
        mu, log_var = self.mu(x), self.log_var(x)  # (B, k)
        z = mu + (0.5 * log_var).exp() * normal(mu.shape, mu, generator)
        e_out = self.decoder(z)  # (B, d)
        return (e_out.sigmoid() if self.output_activation else e_out), mu, log_var


def fit_representation_vae(
    features: Tensor,
    *,
    latent_dim: int = 8,
    epochs: int = 10,
    kl_weight: float = 0.025,
    output_activation: str | None = "sigmoid",
    generator: torch.Generator,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = False,
) -> RepresentationVAE:
    """Train a `RepresentationVAE` by Adam (lr 1e-3, batches of 32, as the official code) and freeze it.

    Parameters
    ----------
    features : tensor of shape (N, d)
    latent_dim, epochs, kl_weight, output_activation
        As in `LabelAgnosticForgetting`.
    generator : torch.Generator
        For first weights, order and noise.
    checkpoint, progress
        As in `shoestring.loop.fit`.

    Raises
    ------
    FloatingPointError
        If the loss is NaN or infinite.
    """
    features = features.detach().float()
    with seeded(generator):
        vae = RepresentationVAE(features.shape[1], latent_dim, output_activation=output_activation)
    vae = vae.to(features.device)
    if output_activation is None:
        vae.mean.copy_(features.mean(0))
        std = features.std(0, correction=0)
        vae.std.copy_(torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)))  # a dead unit is not blown up
    e = vae.scaled(features)

    def step(vae: nn.Module, rows: Tensor) -> Tensor:
        x = e[rows.to(e.device)]
        e_out, mu, log_var = vae(x, generator)
        return vae_loss(e_out, x, mu, log_var, kl_weight)

    fit(
        vae,
        _Shuffled(len(e), VAE_BATCH, generator),
        step,
        torch.optim.Adam(vae.parameters(), lr=VAE_LR),
        epochs=epochs,
        generators=[generator],
        checkpoint=checkpoint,
        progress=progress,
    )
    return vae.eval().requires_grad_(False)


def check_activation(output_activation: str | None) -> None:
    if output_activation not in ("sigmoid", None):
        raise ValueError(f"output_activation must be 'sigmoid' or None, got {output_activation!r}")


class _Shuffled:
    """Row numbers in a new order every epoch."""

    def __init__(self, length: int, batch: int, generator: torch.Generator) -> None:
        self.length, self.batch, self.generator = length, batch, generator

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.length, generator=self.generator, device=self.generator.device)
        return iter(order.split(self.batch))

    def __len__(self) -> int:
        return -(-self.length // self.batch)
