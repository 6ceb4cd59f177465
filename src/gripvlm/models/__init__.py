"""Everything that knows transformers, and nothing about pruning methods."""

from gripvlm.models.families import FAMILIES, Family, family_of
from gripvlm.models.seam import Encoded, Item, Span

__all__ = ["FAMILIES", "Encoded", "Family", "Item", "Span", "family_of"]
