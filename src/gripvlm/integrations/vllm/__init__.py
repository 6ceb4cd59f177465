"""Image-token pruning inside vLLM, as a plug-in that vLLM finds by its entry point; docs/serving.md.

    llm = vllm.LLM(**engine_args("llava-hf/llava-1.5-7b-hf", "divprune", "25%"))

Nothing of vLLM is imported before vLLM itself calls `register`. Tested with the versions in locks/vllm.txt
(`make test-vllm`); of vLLM's internals it uses those that `processing.py` and `model.py` override.
"""

from __future__ import annotations

from gripvlm.integrations.vllm.launch import engine_args

__all__ = ["engine_args", "register"]


def register() -> None:
    """The entry point `vllm.general_plugins`: makes our model classes known, in every process of vLLM."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import gripvlm.lab  # noqa: F401  (registers the lab's vision tower with AutoModel)
    from gripvlm.integrations.vllm.engine_config import EngineConfig
    from gripvlm.integrations.vllm.layouts import CLASSES

    known = ModelRegistry.get_supported_archs()
    for name, place in CLASSES.items():
        # As text: imported late, so that forked workers may still start CUDA.
        if name not in known:
            ModelRegistry.register_model(name, place)
        MODELS_CONFIG_MAP[name] = EngineConfig
