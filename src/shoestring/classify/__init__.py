"""classify: features or a table with few labels, no labels or no gradients -> class scores.

Every method here is a scikit-learn estimator.
"""

from shoestring.classify.gbnn import GBNNClassifier, GBNNRegressor, boost_head
from shoestring.classify.latent_label_shift import LatentLabelShift
from shoestring.classify.loki import FrechetMeanClassifier, LokiHead, label_distances, locus, next_class
from shoestring.classify.transductive_clustering import ConstrainedPrototypeClustering, transduce, transduce_tasks
from shoestring.classify.wide_deep import (
    HermiteActivation,
    HilbertKernelClassifier,
    InfinitelyDeepNTKClassifier,
    ntk_kernel,
    taxonomy,
)

__all__ = [
    "ConstrainedPrototypeClustering",
    "FrechetMeanClassifier",
    "GBNNClassifier",
    "GBNNRegressor",
    "HermiteActivation",
    "HilbertKernelClassifier",
    "InfinitelyDeepNTKClassifier",
    "LatentLabelShift",
    "LokiHead",
    "boost_head",
    "label_distances",
    "locus",
    "next_class",
    "ntk_kernel",
    "taxonomy",
    "transduce",
    "transduce_tasks",
]
