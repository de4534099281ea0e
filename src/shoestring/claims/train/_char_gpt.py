"""A GPT over the characters of the King James Bible: the language-model task of this room's claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from shoestring import data
from shoestring.loop import fit

HELD_OUT = 50_000  # characters at the end of the text


class CharGPT(nn.Module):
    """Pre-norm transformer decoder with learnt positions; logits (B, T, vocabulary) of the next character."""

    def __init__(self, vocabulary: int, width: int = 64, depth: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():  # as GPT-2 begins
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position[: tokens.shape[1]]  # (B, T, width)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, width / heads)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.down(nn.functional.gelu(self.up(self.norm_2(h))))


@cache
def characters() -> tuple[Tensor, Tensor, int]:
    """Training text and held-out text as (n,) int64 of character numbers, and the size of the vocabulary."""
    text = "\n".join(data.load("kjv")["text"][:])
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([letters[letter] for letter in text])
    return tokens[:-HELD_OUT], tokens[-HELD_OUT:], len(letters)


def windows(tokens: Tensor, batch: int, context: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of random windows: inputs and the characters one further, (batch, context) each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        cut = tokens[starts + torch.arange(context + 1)]
        yield cut[:, :-1], cut[:, 1:]


def train(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    steps: int,
    seed: int,
    batch: int = 16,
    context: int = 64,
    width: int = 64,
    depth: int = 2,
    warmup: int = 40,
) -> tuple[float, torch.optim.Optimizer]:
    """Held-out loss in nats a character after `steps` steps (warm-up, then cosine to 0), and the optimizer.

    Everything random follows `seed`: initial weights and windows are the same for every optimizer.
    """
    training, held_out, vocabulary = characters()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = CharGPT(vocabulary, width, depth, context=context)
    optimizer = make_optimizer(model)

    def rate(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup)
        return rising * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = windows(training, batch, context, steps, seed + 1000)
    fit(model, batches, _step, optimizer, scheduler=scheduler, max_steps=steps, log_every=50, progress=False)
    return held_out_loss(model, held_out, context), optimizer


def _step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, context: int) -> float:
    """Mean nats a character over the windows of `tokens`, side by side."""
    whole = (len(tokens) - 1) // context * context
    inputs, targets = tokens[:whole].view(-1, context), tokens[1 : whole + 1].view(-1, context)
    losses = [_step(model, pair) * len(pair[0]) for pair in zip(inputs.split(128), targets.split(128), strict=True)]
    return float(sum(losses) / len(inputs))
