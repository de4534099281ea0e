"""Change or use a trained model without what you do not have.

Old data, labels, gradients, a second model, a retraining budget: for each thing that may be missing there is a
published method. Each is one file in a room named by a verb (``shoestring.learn``, ``shoestring.forget``, ...)
and a citizen of the library it plugs into. Importing ``shoestring`` imports none of them.
"""

__version__ = "0.1.0"
