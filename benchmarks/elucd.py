"""EluCD: what the guider itself takes of a step, and its cost against a gradient through the diffusion network.

1. Time in the guider outside network, classifier and decoder calls, as a share of a step of `shoestring.guide.sample`.
   The sampler clocks the guider and the network; here the forward passes of classifier and decoder are clocked by
   modules around them, the backward passes by a clock around `torch.autograd.grad`, and both are taken off.
2. A run against ordinary classifier guidance at the same denoised estimate, whose gradient goes by the chain rule
   through the diffusion network to x_t; same classifier, same steps, all weights frozen. EluCD's schedule ends at 0, so
   it does not ask the classifier in the last of the steps.

    python benchmarks/elucd.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from _clocked import CLOCK, clocked
from _race import FAILED, RATIOS, race, report
from _record import record
from torch import Tensor, nn

from shoestring import guide, zoo
from shoestring.guide._levels import to_x0
from shoestring.guide.elucd import ClassifierGuidance, classifier_log_prob, smooth_activations

SHARE, THROUGH = 0.02, 0.6  # issue 8; the brief


class ThroughNetwork(ClassifierGuidance):
    """eps - sqrt(1 - a) d log p(y | x0hat(x_t)) / d x_t, of schedulers that show the network x_t itself."""

    def predict(self, step: Any) -> Tensor:
        y = self.targets(step)
        with torch.enable_grad():
            x = step.sample.detach().requires_grad_()
            prediction = step.network(x, step.timestep, step.conditions[0])
            x0 = to_x0(prediction, x, step.alpha, step.sigma, step.kind)
            seen = self.clipped(x0 if self.decode is None else self.decode(x0))
            log_p = classifier_log_prob(self.logits(seen, y), y)
            g = torch.autograd.grad(log_p.sum(), x)[0]
        return prediction.detach() - step.sigma * g


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def settings(batch: int) -> dict[str, dict[str, Any]]:
    """Of each: network, scheduler, latents, conditions; classifier, labels and decoder."""
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    pipe = zoo.load("tiny-t2i")
    for part in (model, pipe.unet, pipe.vae):
        part.requires_grad_(False)
    told = pipe.encode_prompt(["a large bag"] * batch, "cpu", 1, False)[0]
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels

    def decode(z: Tensor) -> Tensor:
        picture: Tensor = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
        return picture

    return {
        "tiny-class-ddpm": {
            "run": (model, scheduler, noise(batch, 1, 28, 28), [torch.full((batch,), 10)]),
            "classifier": zoo.load("tiny-resnet"),
            "decode": None,
        },
        "tiny-t2i with its decoder": {
            "run": (pipe.unet, pipe.scheduler, noise(batch, channels, size, size), [told]),
            "classifier": zoo.load("judge-colour"),
            "decode": decode,
        },
    }


def share(what: str, setting: dict[str, Any], steps: int, repeats: int) -> None:
    network = smooth_activations(setting["classifier"])
    decode = setting["decode"]
    guider = ClassifierGuidance(
        clocked(network), 3, softplus_beta=None, decode=None if decode is None else clocked(decode)
    )
    plain, shares = torch.autograd.grad, []
    torch.autograd.grad = clocked(plain)
    try:
        for _ in range(repeats):
            CLOCK["seconds"] = 0.0
            out = guide.sample(*setting["run"][:2], guider, *setting["run"][2:], num_inference_steps=steps)
            shares.append((out.seconds_guider - CLOCK["seconds"]) / out.seconds)
            asked = CLOCK["seconds"] / out.seconds
    finally:
        torch.autograd.grad = plain
    own = statistics.median(shares)
    print(f"{what}: {100 * own:.2f} % of a step in the guider, {100 * asked:.1f} % in the classifier (and decoder)")
    report(f"{what}: time in the guider / time of a step", own, SHARE)


def through(what: str, setting: dict[str, Any], steps: int, repeats: int) -> None:
    network: nn.Module = smooth_activations(setting["classifier"])
    options = {"softplus_beta": None, "decode": setting["decode"]}

    def sampled(guider: Any) -> Callable[[], Any]:
        return lambda: guide.sample(*setting["run"][:2], guider, *setting["run"][2:], num_inference_steps=steps)

    work = {
        "ours": sampled(ClassifierGuidance(network, 3, **options)),
        "through": sampled(ThroughNetwork(network, 3, **options)),
        "unguided": sampled(None),
    }
    for call in work.values():
        call()
    s = race(repeats, **work)
    print(f"{what}: {', '.join(f'{name} {1000 * seconds / steps:.1f} ms a step' for name, seconds in s.items())}")
    report(f"{what}: EluCD / gradient through the network", s["ours"] / s["through"], THROUGH)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    arguments = parser.parse_args()
    batch, steps, repeats = (32, 4, 3) if arguments.quick else (32, 8, 7)
    all_settings = settings(batch)
    for what, setting in all_settings.items():
        share(f"{what}, batch {batch}", setting, steps, repeats)
    through(f"tiny-class-ddpm, batch {batch}", all_settings["tiny-class-ddpm"], steps, repeats)
    if not arguments.quick:
        record("elucd", {"ratios": RATIOS})
    sys.exit(f"over the limit: {', '.join(FAILED)}" if FAILED else 0)
