"""guide: a diffusion sampler -> a steered sampler.

A guider is a `diffusers.guiders.BaseGuidance`. It runs in `sample` (any network, any scheduler), in a classic pipeline
inside `apply`, and in diffusers' modular pipelines, unless it needs the latents, which those withhold.
"""

from shoestring.guide._apply import apply
from shoestring.guide._sampler import SamplerOutput, Step, sample

__all__ = ["SamplerOutput", "Step", "apply", "sample"]
