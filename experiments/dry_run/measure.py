"""What `gripvlm train --dry-run` says: beside steps that were taken here, and for three published models.

    python -m experiments.dry_run.measure lab QUESTIONS.jsonl    steps of both stages on lab-dense: results/lab.json
    python -m experiments.dry_run.measure shape                  of a language model of 0.5B: results/shape.json
    python -m experiments.dry_run.measure recipes                the recipes of examples/recipes: results/recipes.json

The first two count processor time of one core and not the clock's, so that other work on the machine matters little;
questions for the lab are those of `python -m lab_dense.dataset` (docs/lab.md). `recipes` needs no weights: models are
on the device meta, in the published shapes, with the processors' published limits and a tokenizer of our own, trained
on this repository's pages, which makes about as many tokens of a text. Qwen's processors need torchvision.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from experiments.results import ROOT, STUDIES, write_json
from gripvlm import lab
from gripvlm.bench.shapes import architecture, random_model
from gripvlm.eval import environment
from gripvlm.grip.train import Callback, TrainConfig, dry_run, read_toml, train
from gripvlm.grip.train.data import load_questions
from gripvlm.grip.train.dry_run import Sizes, hours, memory, peak, speed_of
from gripvlm.grip.train.run import check_settings
from gripvlm.models.loading import load_sizes

RESULTS = STUDIES / "dry_run" / "results"
TFLOPS = 250
"""Of the accelerator that the recipes are told for: 80 % of what an A100 is sold with. Assumed, not measured."""

QWEN3 = {
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]},
    },
    "tie_word_embeddings": True,
}  # fmt: skip
"""Qwen/Qwen3-VL-4B-Instruct's published sizes; the two other shapes are those of `gripvlm bench`."""

QUESTIONS = (
    ("What is the man on the left holding?\nGive a very brief answer.", "Umbrella"),
    (
        "Question: Which of these eats grass?\nChoices:\nA. Fox.\nB. Hare.\nC. Owl.\nD. Oak.\nAnswer with the letter.",
        "B",
    ),
)
PICTURES = ((640, 480), (1000, 1003))
"""Pixels of a common photograph, and of the largest picture that the recipes store."""


class Clock(Callback):
    """Processor time at the end of each step."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def on_step_end(self, stage: str, step: int, metrics: Any) -> None:
        self.times.setdefault(stage, []).append(time.process_time())


def rows_of(model: Any, processor: Any, config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """Seconds of a step of each stage: as the estimate says, and as taken by all steps but the first."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder, device="cpu", distill_steps=steps, max_steps=steps)
        config = replace(config, eval_keeps="0.1", eval_steps=1000, save_steps=1000)
        sizes = Sizes.of(model, processor, check_settings(config)[0], config)
        speed = speed_of(model.device, model.dtype, sizes.hidden)
        told, clock = hours(sizes, config, speed), Clock()
        train(config, model, processor, callbacks=[clock])
    rows = []
    for stage, times in clock.times.items():
        row = {"share": config.keep_low, "stage": stage, "told": 3600 * told[stage] / steps}
        row |= {"taken": (times[-1] - times[0]) / (len(times) - 1), "steps": len(times) - 1, "tflops": speed / 1e12}
        print(row, flush=True)
        rows.append(row)
    return rows


def write(name: str, rows: list[dict[str, Any]]) -> None:
    about = {"command": f"python -m experiments.dry_run.measure {name}", "clock": "process_time"}
    write_json(RESULTS / f"{name}.json", about | environment() | {"rows": rows})


def lab_steps(data: str) -> None:
    model, processor = lab.load("lab-dense")
    rows = []
    for share in (0.06, 0.25):
        config = TrainConfig(model="lab-dense", data=data, keep_low=share, keep_high=share, eval_questions=4)
        rows += rows_of(model, processor, config, 5)
    write("lab", rows)


def shape_steps() -> None:
    """LLaVA-1.5's tower before a language model of 0.5B; a picture with two questions, four subsets of 80 tokens."""
    model = random_model("llava-0.5b", torch.device("cpu"), torch.float32)
    processor = llava_processor()
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        data = write_questions(Path(folder), [(336, 336)] * 6)
        config = TrainConfig(data=str(data), per_device_train_batch_size=1, questions_per_image=2, num_generations=4)
        config = replace(config, keep_low=0.139, keep_high=0.139, eval_questions=1, eval_share=0.4)
        write("shape", rows_of(model, processor, config, 3))


def stand_in(special: list[str]) -> Any:
    """A tokenizer of 20,000 byte pairs, trained on this repository's pages, with these special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=20000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(page) for page in sorted((ROOT / "docs").glob("*.md"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])


def llava_processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = stand_in(["<pad>", "</s>", "<image>"])
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    chat = (
        "USER: {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat, image_token="<image>",
    )  # fmt: skip


def write_questions(folder: Path, pictures: Sequence[tuple[int, int]]) -> Path:
    """A file with two questions about each picture of that width and height."""
    lines = []
    for number, size in enumerate(pictures):
        Image.new("RGB", size, (90, 120, 150)).save(folder / f"{number}.png")
        for question, answer in QUESTIONS:
            lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": answer}))
    (folder / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "q.jsonl"


def save_shape(recipe: str, folder: Path) -> None:
    """The configuration and the processor of a recipe's model, in a folder; no weights."""
    from transformers import (
        AutoConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    if recipe == "llava-1.5-7b":
        processor = llava_processor()
        marks = {"image_token_index": processor.tokenizer.convert_tokens_to_ids("<image>")}
    else:
        names = ("endoftext", "im_end", "im_start", "vision_start", "vision_end", "image_pad", "video_pad")
        tokenizer = stand_in([f"<|{name}|>" for name in names])
        chat = (
            "<|im_start|>user\n{% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        old = recipe == "qwen2.5-vl-7b"
        limits = {"min_pixels": 3136, "max_pixels": 12845056} if old else {"min_pixels": 65536, "max_pixels": 16777216}
        images = Qwen2VLImageProcessor(**limits, patch_size=14 if old else 16)
        kind, videos = (
            (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor) if old else (Qwen3VLProcessor, Qwen3VLVideoProcessor)
        )
        processor = kind(image_processor=images, tokenizer=tokenizer, video_processor=videos(), chat_template=chat)
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
        marks = {f"{name}_token_id": ids[f"{name}_pad"] for name in ("image", "video")}
        marks |= {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    if recipe == "qwen3-vl-4b":
        config = AutoConfig.for_model("qwen3_vl", **QWEN3 | marks)
    else:
        shape = architecture(recipe)
        config = AutoConfig.for_model(shape.model_type, **shape.config | marks)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def recipes() -> None:
    told = {}
    for file in sorted((ROOT / "examples" / "recipes").glob("*-*.toml")):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            save_shape(file.stem, folder)
            data = write_questions(folder, PICTURES)
            config = TrainConfig(**read_toml(file) | {"model": place, "data": str(data)})
            model, processor = load_sizes(place, config.dtype)
            sizes = Sizes.of(model, processor, load_questions(config.data), config)
        parts = memory(sizes, config)
        times = hours(sizes, config, 1e12 * TFLOPS)
        told[file.stem] = {"sizes": asdict(sizes), "memory": parts, "peak": peak(parts), "hours": times}
        told[file.stem] |= {"settings": read_toml(file)}
        print(file.stem, told[file.stem], flush=True)
    about = {"command": "python -m experiments.dry_run.measure recipes", "tflops": TFLOPS}
    write_json(RESULTS / "recipes.json", about | environment() | {"recipes": told})


if __name__ == "__main__":
    torch.set_num_threads(1)
    dry_run.time.monotonic = time.process_time  # type: ignore[assignment]  # the clock of the estimate too
    match sys.argv[1:]:
        case ["lab", questions]:
            lab_steps(questions)
        case ["shape"]:
            shape_steps()
        case ["recipes"]:
            recipes()
        case _:
            sys.exit(__doc__)
