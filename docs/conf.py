"""Sphinx: Markdown pages beside the docstrings."""

from shoestring import __version__

project = "shoestring"
author = copyright = "the shoestring authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "shoestring"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository
