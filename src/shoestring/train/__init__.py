"""train: a model and batches -> a trained model, cheaper or better.

What a method here is, is what it replaces: a ``torch.optim.Optimizer``, a hook on any optimizer, a layer, a loss.
"""

from shoestring.train.aggregators import (
    aggregate_cagrad,
    aggregate_imtl,
    aggregate_mean,
    aggregate_mgda,
    aggregate_pcgrad,
)
from shoestring.train.flat_mtl import FlatMTL
from shoestring.train.frugal import FRUGAL, frugal_param_groups
from shoestring.train.gradient_noise import GradientNoise
from shoestring.train.lion import Lion
from shoestring.train.tract import TrActConv2d, TrActLinear, tract_, untract
from shoestring.train.z_loss import SphericalLinear, ZLoss

__all__ = [
    "FRUGAL",
    "FlatMTL",
    "GradientNoise",
    "Lion",
    "SphericalLinear",
    "TrActConv2d",
    "TrActLinear",
    "ZLoss",
    "aggregate_cagrad",
    "aggregate_imtl",
    "aggregate_mean",
    "aggregate_mgda",
    "aggregate_pcgrad",
    "frugal_param_groups",
    "tract_",
    "untract",
]
