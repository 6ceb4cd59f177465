"""What must hold of a vLLM engine that prunes; checked when it starts, in every process."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from gripvlm.errors import InputError, PrunerError
from gripvlm.integrations.vllm.choices import Settings
from gripvlm.integrations.vllm.layouts import SERVED, architecture

__all__ = ["EngineConfig"]


class EngineConfig(VerifyAndUpdateConfig):
    """vLLM calls it for our architectures."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuses what cannot be served, and has vLLM keep the positions of kept tokens.

        Raises:
            GripError: it says what, and what to do.
        """
        model, multimodal = vllm_config.model_config, vllm_config.model_config.multimodal_config
        config = model.hf_config
        settings = Settings.of(config)
        architecture(config, list(settings.made.values()))
        if vllm_config.use_v2_model_runner:
            raise InputError(
                "vLLM's second model runner, the default on GPUs, has not been tried with gripvlm, and it is what puts "
                "positions in place: set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise InputError("positions of kept tokens reach the first pipeline stage only: use --tensor-parallel-size")
        if vllm_config.parallel_config.prefill_context_parallel_size > 1:
            raise InputError("positions of kept tokens are those of a whole prompt: leave prefill context parallel out")
        if vllm_config.parallel_config.use_ubatching:
            raise InputError("positions of kept tokens are those of a whole step: leave --enable-dbo out")
        if vllm_config.speculative_config is not None:
            raise InputError("speculative decoding does not know the positions of kept tokens: leave it out")
        if multimodal.is_multimodal_pruning_enabled():
            raise InputError("vLLM's own pruning of videos is on as well: leave --video-pruning-rate out")
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            raise InputError("CUDA graphs of the vision encoder pass pruning by: leave cudagraph_mm_encoder out")
        if vllm_config.lora_config is not None and vllm_config.lora_config.enable_tower_connector_lora:
            raise InputError(
                "encoded pictures are kept whatever the adapter of a request: leave --enable-tower-connector-lora out"
            )
        sharing = [pruner.name for pruner in settings.made.values() if pruner.joint]
        if sharing and multimodal.mm_processor_cache_gb > 0:
            raise PrunerError(
                f"pruner {sharing[0]!r} shares a budget among the pictures of a prompt, which vLLM's cache of "
                "preprocessed pictures cannot hold: start with --mm-processor-cache-gb 0"
            )
        _set_positions(config, settings)


def _set_positions(config: Any, settings: Settings) -> None:
    text, renumbered = config.get_text_config(), settings.positions == "renumbered"
    if SERVED[config.model_type].mrope:
        if renumbered:
            raise InputError(
                "positions='renumbered' is not defined for models with M-RoPE, whose positions are coordinates in the "
                "image: leave positions='original'"
            )
        return
    if renumbered:
        return
    # vLLM numbers tokens itself, without gaps, unless a model has M-RoPE: then it asks the model. So this model is
    # said to have it, with three equal coordinates; its layers never see more than one of them.
    half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
    third = half // 3
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [half - 2 * third, third, third]}
