"""forget: a trained model, and what to forget -> a model that acts as if it had not seen it.

`evaluate` says how far that is true, what else was lost, and whether it is gone or only hidden. (The name is the
function's; ``from shoestring.forget.evaluate import ...`` reaches the module.)
"""

from shoestring.forget.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
