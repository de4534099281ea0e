r"""OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning.

Huang, Chen, Hsu. ICLR 2024. arXiv 2402.04129.

Idea
----
Two parts. OnePrompt: a frozen vision transformer learns task after task through one small set of prefix prompts,
without a pool of prompts and without a second pass to choose from it. Virtual outliers: rows drawn just outside the
features of a task tighten the head's regions for its classes, so that rows of other tasks fall outside.

Equations
---------
Prefix prompt P_l (L_l, width) of block l, halves P^K, P^V, in front of the keys and values, not projected::

    attention(Q, [P^K; K], [P^V; V])           L = 10, 10, 40, 40, 40 in blocks 0 to 4, drawn from U(0, 1)

Task t trains prompts and head by cross-entropy over its own classes only (local softmax), with a fresh Adam. Then, in
the last epochs, the head alone, with H the features of the task (n, d)::

    boundary  the 50 rows h_b of H/||H|| with the largest distance to their K-th neighbour, K = 50
    outliers  v = h_b + 0.1 eps,  eps ~ N(0, I), 600 each; kept are 40 a class, farthest from H (K-th neighbour)
    E(x)      = -logsumexp over the task's classes of logits(x)
    loss      = cross-entropy + 0.1 mean Huber(relu(E(h) - m_in)) + 0.1 mean Huber(relu(m_out - E(v)))

with m_in = -15, m_out = -3 (for the logits of a ViT-B).

Code and paper
--------------
* The official code computes boundary rows and then does not use them: its outliers are 0.1 eps around zero, the same
  600 noises fifty times. ``outliers="origin"`` draws around zero; the default is the paper's boundary.
* It compares unnormalised outliers with normalised features, so that "far" selects by length. Here noise is measured in
  the length of the row it is added to, and distances are between rows of length 1: outliers have the scale of features.
* The second step of the paper's text was not read; the boundary form is from NPOS, which it names, and the unused code.
* With the official defaults the regulariser is off (0 epochs); `fit_task` takes the epochs of both phases.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from shoestring.loop import Record

__all__ = [
    "PrefixPromptViT",
    "VirtualOutlierRegularizer",
    "energy_margin_loss",
    "fit_task",
    "kth_neighbour_distance",
    "prepend_prefix",
]

LENGTHS = {0: 10, 1: 10, 2: 40, 3: 40, 4: 40}  # the paper's


def prepend_prefix(prompt: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, N, width / heads) with the two halves of a prompt (L, width) in front of them."""
    B, heads, _, d = key.shape
    P_K, P_V = prompt.to(key.dtype).view(2, -1, heads, d).transpose(1, 2)[:, None].expand(2, B, heads, -1, d)
    return torch.cat([P_K, key], 2), torch.cat([P_V, value], 2)


class PrefixPromptViT(nn.Module):
    """A frozen vision transformer with prefix prompts; gives the features of its class token.

    Parameters
    ----------
    vit : nn.Module
        A transformers vision model (``ViTModel``, ``Dinov2Model``, ...; transformers 4.50 or newer) or a timm vision
        transformer. Its attention is led through the prompts in place; its weights are frozen.
    lengths : mapping of int to int, default {0: 10, 1: 10, 2: 40, 3: 40, 4: 40}
        Length of the prompt of each block (the paper's, for 12 blocks): even, half for keys and half for values. 0, or
        a block that is not named: no prompt.
    generator : torch.Generator, optional
        For the first values, U(0, 1); default: one with seed 0.

    Attributes
    ----------
    prompts : ParameterDict, block number -> (L, width); all that is trained

    Notes
    -----
    One pass a batch, and (N + L/2) / N of its attention. In mixed precision prompts are kept in float32.

    Raises
    ------
    TypeError
        If no attention of a known form is found.
    ValueError
        If a length is odd or negative, a block does not exist, or the model has prompts already.

    Examples
    --------
    >>> from transformers import ViTConfig, ViTModel
    >>> small = ViTConfig(
    ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32
    ... )
    >>> vit = PrefixPromptViT(ViTModel(small, add_pooling_layer=False), {0: 4, 1: 8})
    >>> vit(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 32])
    >>> sum(p.numel() for p in vit.parameters() if p.requires_grad)
    384
    """

    vit: Any

    def __init__(
        self, vit: nn.Module, lengths: Mapping[int, int] = LENGTHS, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        attentions = _attentions(vit)
        for block, length in lengths.items():
            if not 0 <= block < len(attentions):
                raise ValueError(f"lengths names block {block}, but there are {len(attentions)} blocks")
            if not isinstance(length, int) or length < 0 or length % 2:
                raise ValueError(f"lengths[{block}] must be an even int >= 0, got {length!r}")
        if any("prefix" in attention.__dict__ for attention in attentions):
            raise ValueError("vit has prefix prompts already")
        generator = generator or torch.Generator().manual_seed(0)
        self.vit = vit.requires_grad_(False)
        self.prompts = nn.ParameterDict()
        for block, length in lengths.items():
            if not length:
                continue
            attention = attentions[block]
            weight = (attention.qkv if hasattr(attention, "qkv") else attention.k_proj).weight
            prompt = torch.rand(length, weight.shape[1], generator=generator).to(weight.device)
            self.prompts[str(block)] = nn.Parameter(prompt)
            attention.__dict__["prefix"] = self.prompts[str(block)]  # beside the modules: not saved twice
            if hasattr(attention, "qkv"):
                attention.forward = _TimmForward(attention)
        if self.prompts and not hasattr(attentions[0], "qkv"):
            _lead_through_prefixes(vit)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, width) of the class token after the last norm, of images (B, channels, height, width)."""
        if hasattr(self.vit, "forward_features"):
            return self.vit.forward_features(images)[:, 0]
        return self.vit(pixel_values=images).last_hidden_state[:, 0]


def kth_neighbour_distance(rows: Tensor, among: Tensor, k: int) -> Tensor:
    """Squared distance (n,) of each row to its k-th nearest of `among`, itself counted where it is among them."""
    found = []
    for block in rows.split(max(1, (1 << 24) // max(1, len(among)))):
        squares = torch.cdist(block, among).square()
        found.append(squares.kthvalue(min(k, len(among)), 1).values)
    return torch.cat(found)


def energy_margin_loss(logits_in: Tensor, logits_out: Tensor, m_in: float = -15.0, m_out: float = -3.0) -> Tensor:
    """Mean Huber of what rows are above m_in, and of what outliers are below m_out, in energy.

    Parameters
    ----------
    logits_in, logits_out : (n, K) and (m, K)
        Over the task's classes.
    m_in, m_out : float, default=-15.0, -3.0
        The paper's, for the logits of a ViT-B. Another backbone needs its own: look at the energies.

    Examples
    --------
    >>> energy_margin_loss(torch.tensor([[20.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
    0.0
    """
    E_in, E_out = -logits_in.logsumexp(1), -logits_out.logsumexp(1)
    above, below = F.relu(E_in - m_in), F.relu(m_out - E_out)
    return F.huber_loss(above, torch.zeros_like(above)) + F.huber_loss(below, torch.zeros_like(below))


class VirtualOutlierRegularizer:
    """Outliers drawn around the boundary of a task's features, and the loss that keeps the head off them.

    Parameters
    ----------
    k : int, default=50
        K of the neighbour that measures how far out a row lies; at most the number of rows.
    n_boundary, n_candidates, per_class : int, default=50, 600, 40
        Boundary rows, outliers tried at each, outliers kept a class of the task.
    std : float, default=0.1
        Noise, in lengths of the row.
    weight : float, default=0.1
        Of the energy loss beside the cross-entropy.
    margin_in, margin_out : float, default=-15.0, -3.0
    outliers : {"boundary", "origin"}, default="boundary"
        The paper's, or the official code's.

    Examples
    --------
    >>> rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> VirtualOutlierRegularizer(n_candidates=10).sample(rows, n_classes=2).shape
    torch.Size([80, 16])
    """

    def __init__(
        self,
        *,
        k: int = 50,
        n_boundary: int = 50,
        n_candidates: int = 600,
        std: float = 0.1,
        per_class: int = 40,
        weight: float = 0.1,
        margin_in: float = -15.0,
        margin_out: float = -3.0,
        outliers: Literal["boundary", "origin"] = "boundary",
    ) -> None:
        counts = {"k": k, "n_boundary": n_boundary, "n_candidates": n_candidates, "per_class": per_class}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an int >= 1, got {count!r}")
        for name, value in {"std": std, "weight": weight}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not margin_in < margin_out:
            raise ValueError(f"margin_in must be < margin_out, got {margin_in} and {margin_out}")
        if outliers not in ("boundary", "origin"):
            raise ValueError(f"outliers must be 'boundary' or 'origin', got {outliers!r}")
        self.k, self.n_boundary, self.n_candidates, self.per_class = k, n_boundary, n_candidates, per_class
        self.std, self.weight, self.margin_in, self.margin_out = std, weight, margin_in, margin_out
        self.outliers = outliers

    @torch.no_grad()
    def sample(self, features: Tensor, n_classes: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Outliers (at most per_class n_classes, d) for the features (n, d) of a task; `generator`: by default seed 0.

        Raises
        ------
        ValueError
            If features are no (n, d) of finite numbers with n >= 1.
        """
        if features.ndim != 2 or not len(features) or not torch.isfinite(features).all():
            raise ValueError(f"features must be (n, d), finite, n >= 1, got shape {tuple(features.shape)}")
        generator = generator or torch.Generator().manual_seed(0)
        unit = F.normalize(features, dim=1)
        boundary = kth_neighbour_distance(unit, unit, self.k).topk(min(self.n_boundary, len(unit))).indices
        centres = features[boundary].repeat_interleave(self.n_candidates, 0)
        noise = torch.randn(centres.shape, generator=generator, dtype=features.dtype).to(features.device)
        if self.outliers == "origin":
            candidates = self.std * noise
        else:
            candidates = centres + self.std * centres.norm(dim=1, keepdim=True) * noise
        far = kth_neighbour_distance(F.normalize(candidates, dim=1), unit, self.k)
        return candidates[far.topk(min(self.per_class * n_classes, len(candidates))).indices]

    def loss(self, id_logits: Tensor, ood_logits: Tensor) -> Tensor:
        """weight times `energy_margin_loss`; logits over the task's classes, (n, K) and (m, K)."""
        return self.weight * energy_margin_loss(id_logits, ood_logits, self.margin_in, self.margin_out)


def fit_task(
    encoder: nn.Module,
    head: nn.Linear,
    X: Tensor,
    y: Tensor,
    *,
    epochs: int = 16,
    outlier_epochs: int = 4,
    regularizer: VirtualOutlierRegularizer | None = None,
    lr: float = 1e-3,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> list[Record]:
    """Learn one task: prompts and head, then the head alone against outliers.

    Parameters
    ----------
    encoder : nn.Module
        Images to features (B, d): a `PrefixPromptViT`, or ``nn.Identity()`` where X holds features already. Its
        parameters that require a gradient are trained in the first phase.
    head : nn.Linear
        d to all classes there will ever be. Rows of classes that are not in y do not change, to the bit.
    X, y : tensors (n, ...) and (n,) int64
        The task's images, and their classes.
    epochs, outlier_epochs : int, default=16, 4
        Of the two phases (the paper's 16 + 4 on CIFAR-100; 40 + 10 on ImageNet-R).
    regularizer : VirtualOutlierRegularizer, optional
        Default: the paper's. `outlier_epochs` of 0 leaves it out.
    lr, batch_size : default=1e-3, 128
        Of Adam, anew for every task; the rate falls as the paper's cosine, lr cos(99 pi e / (200 (E - 1))).
    generator : torch.Generator, optional
        For the order of rows and the outliers; default: one with seed 0.
    progress : bool, optional
        As in `shoestring.loop.fit`.

    Returns
    -------
    list of dict
        The history of both phases.
    """
    from shoestring.loop import fit  # accelerate takes a second to import, which the other learners need not wait for

    if y.ndim != 1 or y.dtype != torch.int64 or len(y) != len(X) or not len(y):
        raise ValueError(
            f"y must be (n,) int64 for the n >= 1 rows of X, got {y.dtype} {tuple(y.shape)}, {len(X)} rows"
        )
    if int(y.min()) < 0 or int(y.max()) >= head.out_features:
        raise ValueError(
            f"y must be in [0, {head.out_features}), the classes of head, got {int(y.min())}..{int(y.max())}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    regularizer = regularizer or VirtualOutlierRegularizer()
    classes, local = y.unique(return_inverse=True)  # softmax over these alone
    model = nn.ModuleDict({"encoder": encoder, "head": head})

    def run(step: Callable[..., Tensor], parameters: list[nn.Parameter], n: int, first: int = 0) -> list[Record]:
        if not n:
            return []
        optimizer = torch.optim.Adam(parameters, lr=lr)
        total = epochs + outlier_epochs

        def rate(e: int) -> float:
            return math.cos(99 * math.pi * (first + e) / (200 * max(1, total - 1)))

        history = []
        for e in range(n):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(e)
            batches = torch.randperm(len(y), generator=generator).split(batch_size)
            history += fit(model, list(batches), step, optimizer, progress=progress)
        return history

    def learn(model: Any, rows: Tensor) -> Tensor:
        logits = model["head"](model["encoder"](X[rows].to(head.weight.device)))[:, classes]
        return F.cross_entropy(logits, local[rows].to(logits.device))

    trained = [p for p in model.parameters() if p.requires_grad]
    history = run(learn, trained, epochs)
    if not outlier_epochs:
        return history
    was = encoder.training
    encoder.eval()
    with torch.no_grad():
        H = torch.cat([encoder(part.to(head.weight.device)) for part in X.split(batch_size)])
    encoder.train(was)

    def keep_off(model: Any, rows: Tensor) -> Tensor:
        share = outliers[
            torch.randint(len(outliers), (max(1, len(outliers) * len(rows) // len(y)),), generator=generator)
        ]
        inside, outside = model["head"](H[rows])[:, classes], model["head"](share)[:, classes]
        return F.cross_entropy(inside, local[rows].to(inside.device)) + regularizer.loss(inside, outside)

    outliers = regularizer.sample(H, len(classes), generator=generator)
    return history + run(keep_off, list(head.parameters()), outlier_epochs, first=epochs)


# ---- inside


def _attentions(vit: nn.Module) -> list[Any]:
    """The attention modules of all blocks, in their order: transformers' (q_proj, k_proj, v_proj) or timm's (qkv)."""
    found = [
        module
        for name, module in vit.named_modules()
        if all(hasattr(module, part) for part in ("k_proj", "v_proj", "head_dim"))
        or all(hasattr(module, part) for part in ("qkv", "proj", "num_heads"))
    ]
    if not found:
        raise TypeError(
            f"vit must be a vision transformer of transformers (4.50 or newer) or timm, got {type(vit).__name__} "
            "without an attention that has k_proj and v_proj, or qkv"
        )
    return found


def _lead_through_prefixes(vit: Any) -> None:
    """transformers: attention functions are found by name; ours puts the prefix in front and calls the model's own."""
    from transformers import AttentionInterface

    own = vit.config._attn_implementation
    if own not in ("eager", "sdpa"):
        raise ValueError(
            f"the attention of vit must be 'sdpa' or 'eager', got {own!r}: vit.set_attn_implementation('sdpa')"
        )
    AttentionInterface.register(f"shoestring_prefix_{own}", _prefix_sdpa if own == "sdpa" else _prefix_eager)
    vit.set_attn_implementation(f"shoestring_prefix_{own}")


def _prefix_sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _with_prefix(sdpa_attention_forward, module, query, key, value, mask, **more)


def _prefix_eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    own = sys.modules[type(module).__module__].eager_attention_forward
    return _with_prefix(own, module, query, key, value, mask, **more)


def _with_prefix(attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    prompt = module.__dict__.get("prefix")
    if prompt is not None:
        if mask is not None:
            raise ValueError("prefix prompts take no attention mask")
        key, value = prepend_prefix(prompt, key, value)
    return attention(module, query, key, value, mask, **more)


class _TimmForward:
    """What timm's ``Attention.forward`` does, with the prefix in front of keys and values."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        a: Any = self.attention
        if attn_mask is not None:
            raise ValueError("prefix prompts take no attention mask")
        B, N, width = x.shape
        q, k, v = a.qkv(x).view(B, N, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads)
        q, k = getattr(a, "q_norm", nn.Identity())(q), getattr(a, "k_norm", nn.Identity())(k)
        k, v = prepend_prefix(a.__dict__["prefix"], k, v)
        dropout = a.attn_drop.p if a.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).reshape(B, N, width)
        return a.proj_drop(a.proj(getattr(a, "norm", nn.Identity())(mixed)))
