"""learn: a stream of (features, labels), new classes at any time -> a classifier.

Every learner here is a scikit-learn classifier whose ``partial_fit`` takes labels it has never met, and that ``save``
writes as one safetensors file. The prompts of OVOR are modules for a vision transformer.
"""

from shoestring.learn.dkvb import DiscreteKeyValueBottleneck, DKVBClassifier
from shoestring.learn.fetril import FeTrIL
from shoestring.learn.g_acil import GACIL, AnalyticHead
from shoestring.learn.ovor import PrefixPromptViT, VirtualOutlierRegularizer
from shoestring.learn.teen import TEEN, calibrate_prototypes

__all__ = [
    "GACIL",
    "TEEN",
    "AnalyticHead",
    "DKVBClassifier",
    "DiscreteKeyValueBottleneck",
    "FeTrIL",
    "PrefixPromptViT",
    "VirtualOutlierRegularizer",
    "calibrate_prototypes",
]
