"""learn: a stream of (features, labels), new classes at any time -> a classifier.

Every method here is a scikit-learn classifier whose ``partial_fit`` takes labels it has never met.
"""

from shoestring.learn.g_acil import GACIL, AnalyticHead

__all__ = ["GACIL", "AnalyticHead"]
