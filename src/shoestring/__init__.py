"""Change or use a trained model without what you do not have.

Old data, labels, gradients, a second model, a retraining budget: for each thing that may be missing there is
a published method. Each is one file in a room named by a verb (``shoestring.learn``, ``shoestring.forget``,
...) and a citizen of the library it plugs into. Importing ``shoestring`` imports none of them: a room is
loaded when it is first used.

>>> import shoestring
>>> shoestring.list_methods(without=["labels", "gradients"], room="compress")
['udfc', 'flap']
"""

from types import ModuleType

from shoestring.catalogue import ROOMS, card, list_methods

__version__ = "0.1.0"
__all__ = ["__version__", "card", "list_methods"]

_LAZY = (*ROOMS, "backbones", "claims", "data", "loop", "metrics", "scale", "zoo")


def __getattr__(name: str) -> ModuleType:
    if name not in _LAZY:
        raise AttributeError(f"module 'shoestring' has no attribute {name!r}")
    from importlib import import_module

    try:
        return import_module(f"shoestring.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"shoestring.{name}":  # something that the module itself needs
            raise
        see = f"; see `shoestring list --room {name}`" if name in ROOMS else ""
        raise AttributeError(f"shoestring.{name} is planned, not written yet{see}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
