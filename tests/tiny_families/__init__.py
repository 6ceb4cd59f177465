"""A tiny random model and its inputs for every family gripvlm supports: `TINY`, by model type."""

from __future__ import annotations

from tiny_families.base import Batch, Picture, Tiny, build, make
from tiny_families.blocks import BLOCKS
from tiny_families.mrope import MROPE
from tiny_families.plain import PLAIN
from tiny_families.tiles import TILES

__all__ = ["TINY", "Batch", "Picture", "Tiny", "build", "make"]

TINY: dict[str, Tiny] = {tiny.model_type: tiny for tiny in (*PLAIN, *TILES, *BLOCKS, *MROPE)}
