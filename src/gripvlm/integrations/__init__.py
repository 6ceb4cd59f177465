"""gripvlm inside other programs; nothing here is imported unless such a program does it."""

from __future__ import annotations

from typing import Any

__all__ = ["lmms_eval_manifest"]


def lmms_eval_manifest() -> Any:
    """The model `gripvlm` for the entry-point group `lmms_eval.models` (lmms-eval 0.7 and later)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="gripvlm", simple_class_path="gripvlm.integrations.lmms_eval.GripVLM")
