"""All code that depends on the models of transformers; no code here depends on a pruning method."""

from gripvlm.models.encoded import Encoded, Item, Span
from gripvlm.models.families import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Encoded", "Family", "Item", "Span", "family_of"]
