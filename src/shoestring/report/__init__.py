"""Pages and pictures made from results: one self-contained HTML file, no network, no script."""

from shoestring.report.page import Section, curves, write_page

__all__ = ["Section", "curves", "write_page"]
