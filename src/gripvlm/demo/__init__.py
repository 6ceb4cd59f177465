"""Several methods side by side on one question: a page to play with, and a gallery in one HTML file."""

from gripvlm.demo.compare import Answered, Asker, Comparison

__all__ = ["Answered", "Asker", "Comparison"]
