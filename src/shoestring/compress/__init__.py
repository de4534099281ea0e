"""compress: a trained model -> a smaller one, with little or no data.

In goes a ``torch.nn.Module`` (or a transformers model), out comes one with fewer or exactly-zero weights that its own
library runs, exports and saves. `save` and `load_into` keep any shrunk module as safetensors.
"""

from shoestring.compress._saved import load_into, save

__all__ = ["load_into", "save"]
