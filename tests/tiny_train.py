"""A tiny model, questions about noisy pictures, and everything that training needs of them."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.grip.train import Engine, TrainConfig
from gripvlm.grip.train.trainer import Trainer
from gripvlm.tasks import Sample, Task
from tiny_lab import lab_processor
from tiny_models import TOWER


def picture(seed: int, size: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST)


def tiny_vlm(
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    inner: int = 64,
    heads: int = 2,
    vocabulary: int = 0,
    image: int = 32,
) -> tuple[Any, Any]:
    """(model, processor): LLaVA of 4 x 4 visual tokens that speaks the lab's words, or of other sizes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = lab_processor().tokenizer
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256 if image == 32 else 2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        **TOWER, num_hidden_layers=2, num_attention_heads=2, image_size=image, patch_size=8, projection_dim=32
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image))
    generator = torch.Generator().manual_seed(7 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 1.6 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model.eval(), processor_of(model)


def processor_of(model: Any) -> LlavaProcessor:
    """A processor in the lab's words for any LLaVA whose vocabulary holds them, which is told their ids."""
    words, vision = lab_processor(), model.config.vision_config
    tokenizer = words.tokenizer
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(do_resize=True, size=size, do_center_crop=False, do_convert_rgb=True),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=words.chat_template,
    )


class Asked(Task):
    """Samples as given."""

    max_new_tokens = 5
    evidence_grid = (4, 4)

    def __init__(self, samples: list[Sample], name: str = "asked") -> None:
        self.name, self._samples = name, tuple(samples)

    @property
    def samples(self) -> tuple[Sample, ...]:  # type: ignore[override]
        return self._samples


ASKED = (("is there a cat?", "yes"), ("what is written next to the dog?", "ab"), ("is the dog red?", "no"))


def asked(pictures: int = 4, each: int = 2, name: str = "asked") -> Asked:
    """`each` questions about each of some pictures."""
    samples = []
    for p in range(pictures):
        marks = (p % 16, (p + 5) % 16)
        for q in range(each):
            made = partial(picture, p)
            samples.append(Sample(f"{p}-{q}", (made,), *ASKED[(p + q) % 3], image_id=f"{p}.png", evidence=marks))
    return Asked(samples, name)


def write_jsonl(folder: Path, pictures: int = 8) -> Path:
    """The same as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for p in range(pictures):
        picture(p).save(folder / f"{p}.png")
        for q in range(2):
            question, answer = ASKED[(p + q) % 3]
            rows.append({"image": f"{p}.png", "question": question, "answer": answer})
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SEVERAL = ((0,), (0, 1), (2, 1), (0, 1), (3, 4, 5, 6), (7,))
"""The pictures of each question of `write_several`: 0, 1 and 2 are one cluster, 3 to 6 another, 7 a third."""


def write_several(folder: Path) -> Path:
    """Questions about one picture or several, as files; each marks patch 5 of the first, 7 and 0 of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for q, shown in enumerate(SEVERAL):
        for p in shown:
            picture(p).save(folder / f"{p}.png")
        names, (question, answer), last = [f"{p}.png" for p in shown], ASKED[q % 3], 16 * (len(shown) - 1)
        row = {"id": f"q{q}", "image": names if len(names) > 1 else names[0], "question": question, "answer": answer}
        rows.append(row | {"evidence": [last + 7, 5, last], "evidence_grid": [4, 4]})
    file = folder / "several.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tiny_scorer(model: Any, seed: int = 0, **changes: Any) -> Scorer:
    """Two heads, one block; logits of about one unit."""
    torch.manual_seed(seed)
    base = ModelFingerprint.of(model)
    scorer = Scorer(ScorerConfig(base.features, **{"width": 16, "blocks": 1, "heads": 2, **changes}), base)
    with torch.no_grad():
        scorer.score.weight.normal_(std=0.3)
    return scorer


def tiny_config(**changes: Any) -> TrainConfig:
    """A run of seconds."""
    small: dict[str, Any] = {
        "width": 16,
        "blocks": 1,
        "heads": 2,
        "per_device_train_batch_size": 2,
        "questions_per_image": 2,
        "num_generations": 4,
        "keep_low": 0.1,
        "distill_steps": 3,
        "max_steps": 6,
        "eval_steps": 2,
        "eval_keeps": "0.5,0.125",
        "eval_questions": 4,
        "eval_share": 0.3,
    }
    return TrainConfig(**{**small, **changes})


@dataclass
class Counted:
    """Counts pictures that go through a model's vision tower."""

    model: Any
    pictures: int = 0

    def __enter__(self) -> Counted:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.pictures += (args[0] if args else kwargs["pixel_values"]).shape[0]

        tower = self.model.model.vision_tower
        self.handle = tower.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def engine_of(model: Any, processor: Any, **options: Any) -> Engine:
    return Engine(model, processor, **options)


def drawn(seed: int = 0) -> torch.Generator:
    """Random numbers."""
    return torch.Generator().manual_seed(seed)


def pairs(task: Task) -> list[tuple[Task, Sample]]:
    """As `Engine.prepare` takes them."""
    return [(task, sample) for sample in task.samples]


def stopping(monkeypatch, at: int, how=lambda: os.kill(os.getpid(), signal.SIGINT), stage: str = "grpo") -> None:
    """Calls `how` in the middle of step `at` of a stage."""
    before = Trainer._step

    def step(self):
        if self.stage.name == stage and self.state.step == at - 1:
            how()
        return before(self)

    monkeypatch.setattr(Trainer, "_step", step)
