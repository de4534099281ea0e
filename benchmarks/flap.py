"""FLAP on a GPT-2 of 50 million random parameters, as ratios in one run.

1. Tokens a second after 30 % of the blocks are removed, reading and generating, against the dense model (the limit).
2. Parameters, to the unit.
3. Seconds of compression: against Wanda-sp as its authors run it (block by block, a pass before and one after pruning)
   and against the forward passes of the calibration alone.
4. Error of the logits on other tokens, against Wanda-sp and magnitude at the same number of parameters.

    python benchmarks/flap.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from _race import FAILED, RATIOS, clock, race, report
from _record import record
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from shoestring.compress.flap import ColumnStats, column_statistics, flap_prune

RATIO = 0.3
FASTER = 1.2  # issue 7
NO_SLOWER = 1.0  # than Wanda-sp, which reads everything twice
OVERHEAD = 1.5  # of statistics and surgery over the forward passes
NO_WORSE = 1.0  # error of the logits over that of a peer


def gpt(width: int, layers: int, heads: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=2000, n_positions=256, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def wanda_sp(model: GPT2LMHeadModel, ids: Tensor, batch: int = 8) -> GPT2LMHeadModel:
    """Wanda-sp plainly: masks, block by block, the pruned block's output feeding the next."""
    model = copy.deepcopy(model)
    core = model.transformer
    hidden = [core.wte(part) + core.wpe(torch.arange(part.shape[1])) for part in ids.split(batch)]
    for block in core.h:
        square: dict[Any, Tensor] = {}

        def keep(module: Any, args: tuple[Tensor, ...], square: dict[Any, Tensor] = square) -> None:
            square[module] = square.get(module, 0) + args[0].flatten(0, 1).pow(2).sum(0)

        hooks = [module.register_forward_pre_hook(keep) for module in (block.attn.c_proj, block.mlp.c_proj)]
        for part in hidden:
            block(part)
        for hook in hooks:
            hook.remove()
        for module, size in ((block.attn.c_proj, block.attn.head_dim), (block.mlp.c_proj, 1)):
            score = (module.weight.abs() * (square[module] / ids.numel()).sqrt()[:, None]).mean(1)
            score = score.view(-1, size).sum(1)
            lowest = score.argsort()[: int(RATIO * len(score))]
            module.weight.view(len(score), size, -1)[lowest] = 0
        hidden = [block(part) for part in hidden]
    return model


@torch.no_grad()
def forward(model: GPT2LMHeadModel, ids: Tensor) -> None:
    for part in ids.split(8):
        model.transformer(part, use_cache=False)


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def magnitude(W: Tensor, stats: ColumnStats) -> Tensor:
    return torch.linalg.vector_norm(W, dim=0)


def unit_parameters(model: GPT2LMHeadModel, small: GPT2LMHeadModel) -> int:
    """What the removed heads and neurons had, counted by hand: GPT-2 has all biases already."""
    width, size = model.config.n_embd, model.transformer.h[0].attn.head_dim
    gone = 0
    for block, dense in zip(small.transformer.h, model.transformer.h, strict=True):
        heads = (dense.attn.c_proj.nx - block.attn.c_proj.nx) // size
        neurons = dense.mlp.c_proj.nx - block.mlp.c_proj.nx
        gone += heads * (3 * size * (width + 1) + size * width) + neurons * (2 * width + 1)
    return gone


def main(width: int, layers: int, heads: int, sequences: int, repeats: int, tokens: int) -> None:
    model = gpt(width, layers, heads)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2000, (sequences, 128), generator=generator)
    other = torch.randint(2000, (8, 128), generator=generator)
    kept: dict[str, GPT2LMHeadModel] = {}
    print(f"GPT-2 of {model.num_parameters():,} random parameters, {ids.numel():,} tokens of calibration")

    forward(model, ids[:8])  # warm
    seconds = {
        "forward": clock(lambda: forward(model, ids)),
        "FLAP": clock(lambda: kept.__setitem__("FLAP", flap_prune(model, ids, RATIO))),
        "Wanda-sp": clock(lambda: wanda_sp(model, ids)),
        "magnitude": clock(lambda: flap_prune(model, ids[:1], RATIO, metric=magnitude, structure="UL-UM", bias=False)),
    }
    print("compression: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    small = kept["FLAP"]
    gone = model.num_parameters() - small.num_parameters()
    blocks = sum(p.numel() for block in model.transformer.h for p in block.parameters() if p.ndim == 2)
    print(f"{gone:,} parameters fewer, {gone / blocks:.1%} of the blocks' matrices")
    report("parameters that went - those of the units by hand", gone - unit_parameters(model, small), 0)
    report("parameters that those by hand have more", unit_parameters(model, small) - gone, 0)

    work = {"dense": lambda: logits(model, other), "small": lambda: logits(small, other)}
    s = race(repeats, **work)
    print(f"reading: {', '.join(f'{name} {other.numel() / value:,.0f} tokens/s' for name, value in s.items())}")
    report("tokens a second, reading, small / dense", s["dense"] / s["small"], FASTER, at_least=True)

    def generating(which: GPT2LMHeadModel) -> Tensor:
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        return which.generate(other[:4, :16], **options)

    s = race(max(3, repeats // 2), dense=lambda: generating(model), small=lambda: generating(small))
    print(f"generating: {', '.join(f'{name} {4 * tokens / value:,.0f} tokens/s' for name, value in s.items())}")
    report("tokens a second, generating, small / dense", s["dense"] / s["small"], FASTER, at_least=True)

    report("seconds, FLAP / Wanda-sp of two passes a block", seconds["FLAP"] / seconds["Wanda-sp"], NO_SLOWER)
    report("seconds, FLAP / forward passes of the calibration", seconds["FLAP"] / seconds["forward"], OVERHEAD)

    stats = column_statistics(model, ids)
    plain = {"structure": "UL-UM", "bias": False, "attn_power": 1}
    peers = {
        "Wanda-sp": flap_prune(model, stats, RATIO, metric="WIFN", **plain),
        "magnitude": flap_prune(model, stats, RATIO, metric=magnitude, **plain),
    }
    dense = logits(model, other)
    error = {
        name: float((logits(each, other) - dense).pow(2).mean()) for name, each in {"FLAP": small, **peers}.items()
    }
    print("squared error of the logits: " + ", ".join(f"{name} {value:.5f}" for name, value in error.items()))
    for name, peer in peers.items():
        report(f"parameters, FLAP / {name}", small.num_parameters() / peer.num_parameters(), 1.01)
        report(f"squared error of the logits, FLAP / {name}", error["FLAP"] / error[name], NO_WORSE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.quick:
        main(width=384, layers=4, heads=6, sequences=16, repeats=3, tokens=8)
    else:
        main(width=640, layers=10, heads=10, sequences=64, repeats=9, tokens=32)
        record("flap", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
