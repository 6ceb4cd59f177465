"""What differs between model families, as data: one row each.

To add a family: write its row here, describe a tiny random model in `tests/tiny_families/`, and run
`pytest tests/models/test_families.py`, which tries every row; docs/families.md shows it with an example.
Nothing else in gripvlm names a model.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gripvlm.errors import UnsupportedModelError
from gripvlm.models.grids import (
    Grid,
    GridRule,
    from_coordinates,
    from_patches,
    from_pixels,
    from_shapes,
    square,
    unknown,
)
from gripvlm.models.tower_rows import VisionRule, by_grid, by_tile, in_one_row, packed
from gripvlm.models.versions import installed, mention_newer

__all__ = ["FAMILIES", "REFUSED", "Family", "Grid", "chunkable", "family_of", "takes"]

DOCS = "docs/families.md"


def shuffled(model: Any, inputs: Mapping[str, Any]) -> int:
    """Rows of one tile where `scale_factor` squared patches become one row (pixel shuffle)."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = model.config.vision_config.patch_size
    return (height // patch) * (width // patch) // model.config.scale_factor**2


def causal_images(model: Any) -> bool:
    """Whether this checkpoint's image tokens see only those before them, as the smaller Gemma 4's do."""
    return getattr(model.config.get_text_config(), "use_bidirectional_attention", None) is None


@dataclass(frozen=True)
class Family:
    """How gripvlm handles one `config.model_type`.

    Attributes:
        model_type: as in the model's `config.json`.
        grid: the rule for (h, w) of each visual item.
        item: what one entry of the encoder's output is, for error messages and docs.
        modalities: what its encoders take; `config.<modality>_token_id` is the placeholder.
        joined: where the encoder joins all items of a prompt, the rule for the rows of one.
        extras: further fields of the encoder's output that `forward` reads, handed on as they are.
        equals: what pruning equals. "masking": the full model with the dropped keys masked at the
            same positions. "deletion": the model that never saw the dropped rows, prefilled or
            decoded alike; recurrent and convolutional layers mix neighbours, so for them a masked
            token is not a deleted one.
        beams: False where transformers itself gives the wrong images to the beams of a prompt with
            several.
        chunks: False where image tokens see each other in both directions, so that transformers itself
            is wrong where it prefills an image in two chunks; or a function of the model that says so.
        layers: False where dropping inside the language model's layers is not right: states or keys
            that other layers go on to use still hold the dropped tokens.
        vision: the rule for which patches of the vision tower become which row, None where that is not
            known; attention of the tower and patch states need it.
        merges: whether the tower's tokens may get fewer between its blocks: a plain ViT that sees images one by
            one, and a projector that works token by token.
        since: the first transformers in which it works.
        note: what a user should know, one line.
    """

    model_type: str
    grid: GridRule
    item: str = "image"
    modalities: tuple[str, ...] = ("image",)
    joined: Callable[[Any, Mapping[str, Any]], int] | None = None
    extras: tuple[str, ...] = ()
    equals: str = "masking"
    beams: bool = True
    chunks: bool | Callable[[Any], bool] = True
    layers: bool = True
    vision: VisionRule | None = None
    merges: bool = False
    since: tuple[int, int] = (5, 19)
    note: str = ""


def chunkable(family: Family, model: Any) -> bool:
    """Whether transformers may prefill this model's prompts in chunks."""
    return family.chunks(model) if callable(family.chunks) else family.chunks


_BOTH = ("image", "video")
_ROWS = (
    Family("gemma3", square, chunks=False, vision=by_tile, note="sliding layers count their window over kept tokens"),
    Family(
        "gemma4",
        from_coordinates,
        chunks=causal_images,
        layers=False,
        note="sliding layers count their window over kept tokens",
    ),
    Family(
        "glm4v", from_patches, beams=False, vision=by_grid, note="images only; no beams over several images a prompt"
    ),
    Family("idefics3", square, item="tile", joined=shuffled, vision=by_tile, note="a budget counts per tile"),
    Family("internvl", square, item="tile", vision=by_tile, note="a budget counts per tile, mostly of 256 tokens"),
    Family(
        "lfm2_vl",
        from_shapes,
        item="tile",
        equals="deletion",
        layers=False,
        note="convolutions: masking is not deletion",
    ),
    Family("llava", from_pixels, vision=by_tile, merges=True, note="LLaVA-1.5, BakLLaVA, and gripvlm's own lab model"),
    Family("llava_next", unknown, vision=packed, note="tiles joined, with newline rows that count as visual tokens"),
    Family("llava_onevision", unknown, vision=packed, note="images only; newline rows count as visual tokens"),
    Family("mistral3", from_pixels, vision=in_one_row, note="row breaks are text and stay"),
    Family(
        "ovis2",
        square,
        item="tile",
        extras=("visual_indicator_features",),
        vision=by_tile,
        note="a budget counts per tile",
    ),
    Family(
        "paligemma",
        square,
        chunks=False,
        vision=by_tile,
        merges=True,
        note="the whole prompt attends in both directions",
    ),
    Family("qwen2_5_vl", from_patches, modalities=_BOTH, vision=by_grid, note="M-RoPE"),
    Family("qwen2_vl", from_patches, modalities=_BOTH, vision=by_grid, note="M-RoPE"),
    Family(
        "qwen3_5",
        from_patches,
        equals="deletion",
        layers=False,
        since=(5, 21),
        vision=by_grid,
        note="linear attention: masking is not deletion",
    ),
    Family(
        "qwen3_vl", from_patches, modalities=_BOTH, vision=by_grid, note="M-RoPE; DeepStack planes lose the same rows"
    ),
    Family(
        "qwen3_vl_moe",
        from_patches,
        modalities=_BOTH,
        vision=by_grid,
        note="M-RoPE; DeepStack planes lose the same rows",
    ),
    Family(
        "smolvlm", square, item="tile", joined=shuffled, since=(5, 21), vision=by_tile, note="a budget counts per tile"
    ),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}

_QUERIES = "its Q-Former already reduces an image to 32 tokens"
REFUSED: dict[str, str] = {
    "blip-2": _QUERIES,
    "fuyu": "it has no vision encoder whose output could be pruned",
    "granite4_vision": "its visual tokens enter at several layers only, not in the sequence",
    "instructblip": _QUERIES,
    "llama4": "its forward projects the encoder's rows itself, after the point where rows are dropped",
    "mllama": "its visual tokens are read by cross-attention and are never in the sequence",
}
"""model type -> why pruning at the input is not right or not worth it, whatever the row."""


def family_of(model: Any) -> Family:
    """The row of this model.

    Raises:
        UnsupportedModelError: no row for its `config.model_type`, or a transformers too old to take
            visual features that are encoded beforehand.
    """
    config: Any = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or not hasattr(config, "model_type"):
        raise UnsupportedModelError(
            f"got a {type(model).__name__}: pass a transformers model that generates, as from "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    mention_newer()
    name = config.model_type
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=2, cutoff=0.5)
        hint = f" (the nearest is {' or '.join(near)})" if near else ""
        kind = "" if hasattr(config, "vision_config") or name in REFUSED else ", which looks like a text-only model,"
        why = f", because {REFUSED[name]}" if name in REFUSED else ""
        raise UnsupportedModelError(
            f"model type {name!r}{kind} is not supported{why}: supported are "
            f"{', '.join(sorted(FAMILIES))}{hint}. "
            f"Adding one is a row in gripvlm/models/families.py; {DOCS} says how"
        )
    if "mm_encoder_outputs" not in takes(model.forward):
        raise UnsupportedModelError(
            f"this {type(model).__name__} takes no mm_encoder_outputs: gripvlm needs "
            "transformers>=5.19 (pip install -U transformers)"
        )
    family = FAMILIES[name]
    if installed() < family.since:
        wanted, have = (".".join(map(str, version)) for version in (family.since, installed()))
        raise UnsupportedModelError(
            f"{name} needs transformers>={wanted}, installed is {have}: pip install -U transformers"
        )
    return family


def takes(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters; those of a class's method are read once."""
    plain = getattr(function, "__func__", None)
    return frozenset(inspect.signature(function).parameters) if plain is None else _parameters(plain)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) - {"self"}
