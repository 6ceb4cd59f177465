"""A tiny, untrained model of the lab's architecture, with the lab's words, and a sample of questions in its format."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from gripvlm import lab
from gripvlm.lab.tower import LabVisionConfig
from tiny_models import TOWER

FAMILIES = ("existence", "perception", "science", "diagram", "reading", "text")


def lab_processor() -> LlavaProcessor:
    """The lab's own, without its model."""
    return AutoProcessor.from_pretrained(lab.MODEL)


@lru_cache(maxsize=1)
def tiny_lab() -> tuple[Any, Any]:
    """(model, processor): 256 visual tokens, two layers, answers that depend on what is kept."""
    torch.manual_seed(0)
    vision = LabVisionConfig(
        **TOWER,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=128,
        patch_size=8,
        stem_channels=[8, 16],
        projection_dim=32,
    )
    config = AutoConfig.from_pretrained(lab.MODEL)
    config.vision_config = vision
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    config.text_config.update({"hidden_size": 32, "num_hidden_layers": 2, **heads})
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / weight.shape[1] ** 0.5)
        model.get_input_embeddings().weight.normal_(generator=generator)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(std=0.5, generator=generator)
    return model.eval(), lab_processor()


def write_sample(folder: Path, pictures: int = 4) -> Path:
    """A lab sample: for each noisy picture two questions of each family."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pictures):
        name = f"{i:04d}.png"
        coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((128, 128), Image.Resampling.NEAREST).save(folder / "images" / name)
        for family in FAMILIES:
            for j in range(2):
                row = {"id": f"{i}-{family}-{j}", "image": name, "family": family, "kind": "made up"}
                row |= {"choices": [], "pair": None, "evidence": [17 * i + 3, 17 * i + 4, 200 + j]}
                row |= {"question": f"is there a {('cat', 'dog')[j]}?", "answer": ("yes", "no")[j]}
                if family == "perception":
                    row["pair"] = f"{i}-0"
                elif family == "science":
                    row |= {
                        "question": "what eats the leaf? choose: cat, dog.",
                        "answer": "cat",
                        "choices": ["cat", "dog"],
                    }
                elif family != "existence":
                    row |= {"question": "read the word.", "answer": f"ab{i}"}
                rows.append(row)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
