"""The differences between model families, as data: a row for each family. No other module names a model.

To add a family: a row here, a tiny random model in `tests/tiny_families/`, and
`pytest tests/models/test_families.py -k NAME`; docs/add-a-model.md shows an example.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gripvlm.errors import UnsupportedModelError
from gripvlm.models.compat import installed, mention_newer, takes
from gripvlm.models.grids import (
    GridRule,
    RasterRule,
    frames,
    from_coordinates,
    from_patches,
    from_pixels,
    from_shapes,
    from_targets,
    in_lines,
    in_marked_lines,
    square,
    unknown,
)
from gripvlm.models.hooks.attention import feature_block
from gripvlm.models.vision_rules import VisionRule, by_grid, by_raster, by_tile, in_one_row, packed, pooled

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "MISSING", "REFUSED", "Family", "chunkable", "family_of", "not_supported"]


@dataclass(frozen=True)
class Family:
    """How gripvlm handles one `config.model_type`. Only `model_type` and `grid` have no default.

    Attributes:
        model_type: as in the model's `config.json`.
        grid: the rule for the height and width of each visual item, in rows (`models/grids.py`).
        vision: the rule for which patches of the vision tower become which row (`models/vision_rules.py`). None where
            it is not known: pruners that read the tower's attention or patches are then refused.
        modalities: what its encoders take; `config.<modality>_token_id` is the placeholder.
        joined: where the encoder joins all items of a prompt, the rule for the rows of one of them.
        tail: rows at the end of each item, such as a separator, that stay and are not counted.
        extras: further fields of the encoder's output that `forward` reads, passed on unchanged.
        equals: what pruning equals. "masking": the full model with the dropped keys masked at the same positions.
            "deletion": the model that never saw the dropped rows, in prefill and decoding alike. Recurrent and
            convolutional layers mix neighbours, so for them a masked token is not a deleted one.
        beams: False where transformers itself gives wrong images to the beams of a prompt with several images.
        chunks: False where image tokens see each other in both directions, so that transformers itself is wrong where
            it prefills an image in two chunks; or a function of the model that decides.
        layers: False where it is not known that tokens can be dropped inside the language model. `hooks/llm_drop.py`
            says before which of its layers.
        merges: True where tokens may be merged between the tower's blocks: a plain ViT that sees images one by one,
            and a projector that works token by token.
        drops: rows may be dropped between the tower's blocks: the modules of a model behind which what is left is
            filled up to all rows again (`models/hooks/tower_drop.py`). Or a text, why they may not.
        since: the first transformers in which it works.
        rasters: where an item may be several rasters or have newline rows, the rule for them (`models/grids.py`).
    """

    model_type: str
    grid: GridRule
    vision: VisionRule | None = None
    modalities: tuple[str, ...] = ("image",)
    joined: Callable[[PreTrainedModel, Mapping[str, Any]], int] | None = None
    tail: int = 0
    extras: tuple[str, ...] = ()
    equals: str = "masking"
    beams: bool = True
    chunks: bool | Callable[[PreTrainedModel], bool] = True
    layers: bool = True
    merges: bool = False
    drops: Callable[[PreTrainedModel], list[nn.Module]] | str = "nobody has tried it yet"
    since: tuple[int, int] = (5, 19)
    rasters: RasterRule | None = None

    @property
    def has_rasters(self) -> bool:
        """Whether pruners that need a grid can run on it."""
        return self.grid is not unknown or self.rasters is not None

    @property
    def takes_grids(self) -> bool:
        """Whether the tower takes packed patches with their grids; from a caller also their places, and then fewer."""
        return self.vision is by_grid


def chunkable(family: Family, model: PreTrainedModel) -> bool:
    """Whether transformers may prefill this model's prompts in chunks."""
    return family.chunks(model) if callable(family.chunks) else family.chunks


def rows_of_a_tile(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
    """Rows of one tile where `scale_factor` squared patches become one row (pixel shuffle)."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = model.config.vision_config.patch_size
    return (height // patch) * (width // patch) // model.config.scale_factor**2


def has_causal_images(model: PreTrainedModel) -> bool:
    """Whether this checkpoint's image tokens see only those before them, as the smaller Gemma 4's do."""
    return getattr(model.config.get_text_config(), "use_bidirectional_attention", None) is None


def projector(model: PreTrainedModel) -> list[nn.Module]:
    """A projector that works row by row."""
    return [model.base_model.multi_modal_projector]


def mergers(model: PreTrainedModel) -> list[nn.Module]:
    """What makes a row of each block of patches; Qwen3-VL has more of it, behind some of its blocks."""
    tower: Any = model.get_encoder("image")
    return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]


def last_block(model: PreTrainedModel) -> list[nn.Module]:
    """The last block, where rows are made of a whole raster of patches behind it."""
    return [feature_block(model)]


TILES = "its tiles are unpadded and broken into lines, so how many rows are left would depend on what is kept"
MASKED = "its blocks are given a mask of the patches that are padding"
BOTH = ("image", "video")

ROWS = (
    # Sliding layers count their window over the tokens that are left.
    Family("gemma3", square, by_tile, chunks=False, drops=last_block),
    # Where its last layers share keys, tokens can be dropped before these are made, and not later.
    Family("gemma4", from_coordinates, chunks=has_causal_images, drops=MASKED),
    # No tower: a patch is projected as it is.
    Family("gemma4_unified", from_coordinates, chunks=has_causal_images, drops="it has no vision tower"),
    # Images only; transformers interleaves several images of a prompt over its beams.
    Family("glm4v", from_patches, by_grid, beams=False, drops=mergers),
    Family("glm46v", from_patches, by_grid, beams=False, drops=mergers),
    Family("glmga", from_patches, by_grid, beams=False, drops=mergers),
    Family("glm4v_moe", from_patches, by_grid, beams=False, drops=mergers),
    Family("glm_ocr", from_patches, by_grid, beams=False, drops=mergers),
    # An item is a tile, so a budget counts per tile.
    Family("idefics3", square, by_tile, joined=rows_of_a_tile, drops=MASKED),
    Family("internvl", square, by_tile, drops=last_block),
    Family("qianfan_ocr", square, by_tile),
    Family("ovis2", square, by_tile, extras=("visual_indicator_features",), drops=last_block),
    # Before 5.21 its merger wanted whole tiles.
    Family("smolvlm", square, by_tile, joined=rows_of_a_tile, since=(5, 21), drops=MASKED),
    # Convolutions.
    Family("lfm2_vl", from_shapes, equals="deletion", drops=MASKED),
    # LLaVA-1.5, BakLLaVA, and gripvlm's own lab model.
    Family("llava", from_pixels, by_tile, merges=True, drops=projector),
    # Tiles are joined, with newline rows in between that count as visual tokens.
    Family("llava_next", unknown, packed, rasters=in_lines, drops=TILES),
    Family("llava_onevision", unknown, packed, rasters=in_lines, drops=TILES),
    # M-RoPE of three or four axes. Newline rows and a first and a last row count as visual tokens. Before 5.21 the rows
    # of all images were one tensor.
    Family("hunyuan_vl", unknown, by_raster(from_patches, marked=True), rasters=in_marked_lines, since=(5, 21)),
    # Linear attention. An item is the overview or a slice of an image.
    Family("minicpmv4_6", from_targets, by_raster(from_targets), equals="deletion"),
    Family("minicpmv4_7", from_targets, by_raster(from_targets), equals="deletion"),
    # Its row breaks are text, which stays.
    Family("mistral3", from_pixels, in_one_row, drops=MASKED),
    Family("aya_vision", square, by_tile),
    Family("cohere2_vision", square, by_tile),
    # Its tower is a convolutional network of timm's, without attention.
    Family("fast_vlm", square),
    # Its tower attends by window, with code of its own that shows no attention.
    Family("got_ocr2", square),
    # Towers of timm's. Videos: not tried.
    Family("perception_lm", square),
    # Several layers of the tower, so nothing may be merged between them.
    Family("vipllava", from_pixels, by_tile),
    # Learned queries, which are no raster; a row behind them separates views.
    Family("deepseek_ocr2", unknown, tail=1),
    # Its tower is a convolutional network of timm's; AltUp and shared keys, as in Gemma 4.
    Family("gemma3n", square, layers=False),
    # Positions count text, without M-RoPE. transformers 5.19 fails on several videos.
    Family("kimi_k25", from_patches, by_raster(from_patches), modalities=BOTH, since=(5, 24)),
    # Convolutions.
    Family("lfm3_vl", from_patches, equals="deletion", layers=False, since=(5, 24)),
    # Rows are added to their placeholders' embedding; all image tokens of a prompt attend in both directions.
    Family("molmo2", unknown, pooled, chunks=False, since=(5, 24)),
    Family("lighton_ocr", from_pixels, in_one_row, drops=MASKED),
    # The whole prompt attends in both directions.
    Family("paligemma", square, by_tile, chunks=False, merges=True, drops=projector),
    # M-RoPE; Qwen3-VL's DeepStack planes lose the same rows.
    # Before 5.21 its forward took no encoded images.
    Family("paddleocr_vl", from_patches, by_raster(from_patches), since=(5, 21)),
    Family("qwen2_vl", from_patches, by_grid, modalities=BOTH, rasters=frames, drops=mergers),
    Family("qwen2_5_vl", from_patches, by_grid, modalities=BOTH, rasters=frames, drops=mergers),
    Family("qwen3_vl", from_patches, by_grid, modalities=BOTH, rasters=frames, drops=mergers),
    Family("qwen3_vl_moe", from_patches, by_grid, modalities=BOTH, rasters=frames, drops=mergers),
    # Linear attention. Before 5.21 transformers encoded no images ahead of its prefill.
    Family("qwen3_5", from_patches, by_grid, equals="deletion", since=(5, 21), drops=mergers),
    Family("qwen3_5_moe", from_patches, by_grid, equals="deletion", since=(5, 21), drops=mergers),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in sorted(ROWS, key=lambda row: row.model_type)}

CROSS = "its visual tokens are read by cross-attention and are never in the sequence"
NOT_TAKEN = "its forward takes no encoded images (mm_encoder_outputs)"
QFORMER = "its Q-Former already reduces an image to 32 tokens"
OMNI = (
    "its positions are made from token ids, sounds and the seconds of videos together, and not from "
    "mm_token_type_ids, from which gripvlm makes them"
)
REFUSED: dict[str, str] = {
    "blip": CROSS,
    "blip-2": QFORMER,
    "evolla": "it reads proteins, not images",
    "florence2": NOT_TAKEN,
    "fuyu": "it has no vision encoder whose output could be pruned",
    "git": NOT_TAKEN,
    "granite4_vision": "its visual tokens enter at several layers only, not in the sequence",
    "idefics": CROSS,
    "instructblip": QFORMER,
    "instructblipvideo": QFORMER,
    "kosmos-2": NOT_TAKEN,
    "kosmos-2.5": NOT_TAKEN,
    "llama4": "its forward projects the encoder's rows itself, after the point where rows are dropped, and in "
    "transformers 5.24 it fails, whatever it is given",
    "mistral4": "it reads no images",
    "mllama": CROSS,
    "phi4_multimodal": NOT_TAKEN,
    "pi0": NOT_TAKEN,
    "pix2struct": CROSS,
    "pp_formulanet": CROSS,
    "qwen2_5_omni": OMNI,
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe": OMNI,
    "qwen3_omni_moe_thinker": OMNI,
    "t5gemma2": NOT_TAKEN,
    "udop": NOT_TAKEN,
    "vision-encoder-decoder": CROSS,
}
"""model type -> why pruning at the input is impossible or not useful for it."""

MISSING = frozenset(
    {
        "apertus1p5",
        "aria",
        "chameleon",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "diffusion_gemma",
        "dots3_note",
        "emu3",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "glm5_next",
        "granite_docling",
        "hy_v4_vl",
        "hyperclovax_vision_v2",
        "idefics2",
        "inkling2",
        "inkling2_loop",
        "inkling_mm_model",
        "janus",
        "llava_next_video",
        "minicpm_ocr",
        "minimax_m3_vl",
        "mistral_large4",
        "muse_glimmer",
        "muse_spark",
        "nemotron_h_omni",
        "pp_chart2table",
        "qwen4_exp",
        "shieldgemma2",
        "step3p7",
        "unlimited_ocr",
        "video_llama_3",
        "video_llava",
    }
)
"""Types of the newest tested transformers that nobody has tried: no row, and no reason to refuse them either."""


def family_of(model: PreTrainedModel) -> Family:
    """The row of this model.

    Raises:
        UnsupportedModelError: no row for its `config.model_type`, or a transformers too old for it.
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
        raise not_supported(config)
    # By the signature and not the version: a model's own code may be older than its transformers.
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


def not_supported(config: Any) -> UnsupportedModelError:
    """The error for a model whose `config.model_type` has no row, with the reason and similar names."""
    name = config.model_type
    near = difflib.get_close_matches(name, FAMILIES, n=2, cutoff=0.5)
    hint = f" (the nearest is {' or '.join(near)})" if near else ""
    kind = "" if hasattr(config, "vision_config") or name in REFUSED else ", which looks like a text-only model,"
    why = f", because {REFUSED[name]}" if name in REFUSED else ""
    return UnsupportedModelError(
        f"model type {name!r}{kind} is not supported{why}: supported are {', '.join(FAMILIES)}{hint}. "
        "Adding one is a row in gripvlm/models/families.py; docs/add-a-model.md says how"
    )
