"""Everything that knows transformers, and nothing about pruning methods."""

from gripvlm.models.encoded import Encoded, Item, Span
from gripvlm.models.families import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Encoded", "Family", "Item", "Span", "family_of"]
