"""Pruning over vLLM's own class of Qwen3-VL: DeepStack's planes lose the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from gripvlm.integrations.vllm.model import PruningModel
from gripvlm.integrations.vllm.processing import PruningInfo, PruningProcessor
from gripvlm.models.encoded import Item

__all__ = ["GripQwen3_VL"]


class _Info(PruningInfo, Qwen3VLProcessingInfo):
    pass


class _Processor(PruningProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class GripQwen3_VL(PruningModel, Qwen3VLForConditionalGeneration):
    """Its tower is vLLM's, which pruners cannot read."""

    def words(self, ids: Tensor) -> Tensor:
        return self.language_model.embed_input_ids(ids)

    def encode(self, inputs: Mapping[str, Any], counts: list[int]) -> list[Item]:
        rows = self._process_image_input(self._parse_and_validate_image_input(**inputs))
        # vLLM's tower puts the planes beside the features.
        features, *planes = zip(*(own.split(self.visual_dim, dim=-1) for own in rows), strict=True)
        return self.items(inputs, features, planes)
