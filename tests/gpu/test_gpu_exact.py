"""On a GPU as on a CPU: keeping everything changes no bit, and dropping is masking, in float32 and in bfloat16."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import gripvlm
from gripvlm.models.text import visual_places
from on_device import GPU, cut, rounded, tiny
from tiny_families.reference import full_positions

FAMILIES = ("gemma3", "internvl", "llava", "llava_next", "mistral3", "paligemma", "qwen2_5_vl", "qwen3_vl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT32 = 2e-5
"""The largest difference of logits in float32, as a share of the largest logit."""
BFLOAT16 = 1.5
"""In bfloat16 pruned logits may be this many times as far from float32 as masked ones are, in the root mean square."""

pytestmark = pytest.mark.usefixtures("full_precision")


def flash(attention: str, dtype: str) -> None:
    if attention == "flash_attention_2":
        if find_spec("flash_attn") is None:
            pytest.skip("flash-attn is not installed")
        if dtype == "float32":
            pytest.skip("FlashAttention has no float32")


@torch.no_grad()
def untouched(model: Any, inputs: dict[str, Any]) -> None:
    real = inputs["attention_mask"].bool()
    plain = model(**inputs, position_ids=full_positions(model, inputs)).logits[real]
    assert bool(plain.isfinite().all())
    for pruner in ("keep_all", "norm"):
        kept = model(**gripvlm.prune_inputs(model, inputs, pruner, 1.0)).logits[real]
        assert torch.equal(kept, plain), pruner


def masked(model: Any, inputs: dict[str, Any], selections: Any) -> dict[str, Any]:
    """The full inputs with the dropped placeholders hidden, everything at its own position."""
    mask = inputs["attention_mask"].clone()
    for row, places, sample in zip(mask, visual_places(model, inputs["input_ids"]), selections, strict=True):
        row[places] = torch.cat([selection.mask() for selection in sample]).to(row)
    return {**inputs, "attention_mask": mask, "position_ids": full_positions(model, inputs)}


@torch.no_grad()
def as_masked(model: Any, inputs: dict[str, Any], record: Any) -> float:
    """Asserts that dropping is masking; the difference over what is allowed."""
    arguments, seen = gripvlm.prune_inputs(model, inputs, "norm", 0.4, return_record=True)
    assert 0 < seen.kept < seen.total
    dropped = model(**arguments).logits[arguments["attention_mask"].bool()]
    hidden = masked(model, inputs, seen.selections)
    real = hidden["attention_mask"].bool()
    full = model(**hidden).logits[real]
    if model.dtype == torch.float32:
        off = float((dropped - full).abs().max() / full.abs().max())
        record("difference, as a share of the largest logit", off)
        assert off <= FLOAT32
        return off / FLOAT32
    exact = rounded(copy.deepcopy(model), torch.float32)
    floats = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in hidden.items()}
    truth = exact(**floats).logits[real]
    mine, theirs = (float((x.float() - truth).square().mean().sqrt() / truth.std()) for x in (dropped, full))
    record("pruned, root mean square from float32 over the logits' deviation", mine)
    record("masked, the same", theirs)
    assert theirs < 0.1  # else the bound says nothing
    assert mine <= BFLOAT16 * theirs
    return mine / (BFLOAT16 * theirs)


SOME = [("cpu", family, "sdpa", dtype) for family in ("llava", "qwen2_5_vl", "gemma3") for dtype in DTYPES]
EVERY = [
    pytest.param("cuda", family, attention, dtype, marks=pytest.mark.gpu)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    for dtype in DTYPES
]


@pytest.mark.parametrize(
    ("device", "family", "attention", "dtype"), [*SOME, ("cpu", "llava", "eager", "float32"), *EVERY]
)
def test_tiny_models(device, family, attention, dtype, record_property):
    model, inputs = tiny(family, device, DTYPES[dtype], attention)
    untouched(model, inputs)
    as_masked(model, inputs, record_property)


SHAPES = [
    ("cpu", "tiny", "sdpa", "float32"),
    ("cpu", "tiny-qwen", "eager", "bfloat16"),
    *[
        pytest.param("cuda", name, attention, dtype, marks=pytest.mark.gpu)
        for name in ("llava-1.5-7b", "qwen2.5-vl-7b")
        for attention in ("sdpa", "eager", "flash_attention_2")
        for dtype in DTYPES
    ],
]


@pytest.mark.parametrize(("device", "name", "attention", "dtype"), SHAPES)
def test_published_widths(device, name, attention, dtype, record_property):
    """Two layers of them: kernels choose by width, and these are the widths that are used."""
    flash(attention, dtype)
    model, inputs = cut(name, device, DTYPES[dtype], attention)
    untouched(model, inputs)
    as_masked(model, inputs, record_property)


@pytest.mark.parametrize("device", [GPU])
def test_float32_is_float32_here(device):
    """What the bound on float32 stands on."""
    a = torch.randn(512, 512, device=device)
    off = float((a @ a - (a.double() @ a.double())).abs().max())
    assert off < 1e-3
