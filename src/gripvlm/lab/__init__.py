"""The embedded lab: a small trained VLM, its scene generator, its recipe and its weights.

What is measured on it is lab evidence, never a statement about a 7B model. Importing this package registers the
lab's vision tower with transformers' Auto classes, so that
`AutoModelForImageTextToText.from_pretrained(gripvlm.lab.MODEL)` works.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gripvlm.lab import tower as _tower  # noqa: F401  (registers the tower with AutoConfig and AutoModel)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

DATA = Path(__file__).parent / "data"
MODEL = DATA / "model"
SAMPLE = DATA / "sample"


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The lab VLM (float32, eval mode) and its processor, from the package's own folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (MODEL / "config.json").exists():
        raise FileNotFoundError(f"{MODEL} holds no lab model. Train one: bash runs/train_lab.sh")
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32")
    return model.eval(), AutoProcessor.from_pretrained(MODEL)
