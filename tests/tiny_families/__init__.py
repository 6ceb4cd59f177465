"""A tiny random model and its inputs for every family gripvlm supports here: `TINY`, by model type."""

from __future__ import annotations

from gripvlm.models.compat import installed
from gripvlm.models.families import FAMILIES
from tiny_families.base import Batch, Picture, Tiny, build, make
from tiny_families.blocks import BLOCKS
from tiny_families.mrope import MROPE
from tiny_families.patches import PATCHES
from tiny_families.plain import PLAIN
from tiny_families.single import SINGLE
from tiny_families.tiles import TILES
from tiny_families.views import VIEWS

__all__ = ["LATER", "TINY", "Batch", "Picture", "Tiny", "build", "make"]

EVERY = (*PLAIN, *SINGLE, *TILES, *VIEWS, *BLOCKS, *PATCHES, *MROPE)
TINY: dict[str, Tiny] = {t.model_type: t for t in EVERY if installed() >= FAMILIES[t.model_type].since}
LATER = sorted({t.model_type for t in EVERY} - set(TINY))
"""Families that the installed transformers is too old for; `tests/models/test_families.py` says so."""
