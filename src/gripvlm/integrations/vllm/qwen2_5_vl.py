"""Pruning over vLLM's own class of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from gripvlm.integrations.vllm.model import PruningModel
from gripvlm.integrations.vllm.processing import PruningInfo, PruningProcessor
from gripvlm.models.encoded import Item

__all__ = ["GripQwen2_5_VL"]


class _Info(PruningInfo, Qwen2_5_VLProcessingInfo):
    pass


class _Processor(PruningProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class GripQwen2_5_VL(PruningModel, Qwen2_5_VLForConditionalGeneration):
    """Its tower is vLLM's, which pruners cannot read."""

    def words(self, ids: Tensor) -> Tensor:
        return self.language_model.embed_input_ids(ids)

    def encode(self, inputs: Mapping[str, Any], counts: list[int]) -> list[Item]:
        return self.items(inputs, self._process_image_input(self._parse_and_validate_image_input(**inputs)))
