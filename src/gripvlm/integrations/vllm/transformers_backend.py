"""Pruning over vLLM's Transformers backend: transformers' own tower, projector and layers, with vLLM's attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from gripvlm.integrations.vllm.model import PruningModel
from gripvlm.integrations.vllm.processing import PruningInfo, PruningProcessor
from gripvlm.models.encoded import Item
from gripvlm.models.tower_rows import capture_tower, split_by_item

__all__ = ["GripTransformers"]


class _Info(PruningInfo, MultiModalProcessingInfo):
    pass


class _Processor(PruningProcessor, MultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=MultiModalDummyInputsBuilder)
class GripTransformers(PruningModel, TransformersMultiModalForCausalLM):
    """Any family of `layouts.SERVED` whose `backend` is true. Pruners may read its vision tower."""

    def words(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def encode(self, inputs: Mapping[str, Any], counts: list[int]) -> list[Item]:
        request = self.tower_request
        reads = bool(request.layers or request.patches)
        with capture_tower(self.model, request) if reads else nullcontext() as capture:
            features = self._process_image_input(**inputs)
        items = self.items(inputs, features)
        if capture is None:
            return items
        tower = split_by_item(self.family.vision, capture, inputs, {"image": counts})["image"]
        return [
            replace(item, vision=vision, patches=patches) for item, (vision, patches) in zip(items, tower, strict=True)
        ]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # One row of positions where they are renumbered: vLLM has numbered the tokens itself.
        if positions.ndim == 2:
            positions = self.placed(positions)
        if self.layout.mrope or positions.ndim == 1:
            # Past PruningModel's forward, which places them always.
            return super(PruningModel, self).forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        # The layers know no M-RoPE: past vLLM's own forward, which would pass all three rows on.
        return super(MultiModalMixin, self).forward(input_ids, positions[0], intermediate_tensors, inputs_embeds)
