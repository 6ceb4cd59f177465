"""gripvlm inside other people's programs. Nothing here is imported unless such a program asks for it."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_manifest"]


def lmms_eval_manifest() -> Any:
    """What lmms-eval's entry-point group `lmms_eval.models` is given: the model `gripvlm` (lmms-eval 0.7 and later)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="gripvlm", simple_class_path="gripvlm.integrations.lmms_eval.GripVLM")
