"""Pages and pictures made from results: one self-contained HTML file, no network, no script."""

from shoestring.report.page import Section, bars, curves, write_page

__all__ = ["Section", "bars", "curves", "write_page"]
