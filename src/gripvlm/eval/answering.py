"""One batch of questions through a model: prompts, inputs, pruned generation, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from gripvlm.api import Record, pruned_run
from gripvlm.budget import Keep
from gripvlm.errors import InputError
from gripvlm.models.encoded import Encoded
from gripvlm.pruners import Pruner
from gripvlm.types import Selection
from gripvlm.utils.timing import device_time

__all__ = ["Outcome", "answer", "make_inputs", "prompt_text", "question_ids"]


@dataclass
class Outcome:
    """What a batch of B samples gave.

    Attributes:
        predictions: [B] decoded answers without special tokens.
        selections: [B] lists of one `Selection` an image; empty lists for a prompt without images.
        seconds: {"vision", "pruner", "overhead", "prefill", "decode"} of the whole batch. Prefill ends
            when the first new token's logits are there, dropping inside the language model included;
            decode is all that follows.
        peak_memory: bytes on the accelerator at most, None where the device doesn't know.
    """

    predictions: list[str]
    selections: list[list[Selection]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


class _Clock(LogitsProcessor):
    """Notes when the first new token's logits are there. Changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.first is None:
            self.first = device_time(self.device)
        return scores


def prompt_text(processor: Any, question: str, image: int = 1) -> str:
    """The full prompt of a question about so many images: the processor's chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return f"{getattr(processor, 'image_token', '<image>')}\n" * image + question


def make_inputs(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]] | None,
) -> dict[str, Any]:
    """Model inputs of a batch, left-padded, on the model's device and in its dtype.

    Args:
        questions: [B] texts of the user's turn.
        images: [B], one for each question or a list of at least one; None for prompts without images.

    Raises:
        InputError: a question holds the model's own placeholder of a picture.
    """
    mark = getattr(processor, "image_token", None)
    for question in questions:
        if isinstance(mark, str) and mark and mark in question:
            raise InputError(
                f"the question {question!r} holds {mark}, the model's own placeholder of a picture: leave it out, "
                "the picture is put in front of the question without it"
            )
    each = [[one] if isinstance(one, Image.Image) else list(one) for one in images or [()] * len(questions)]
    texts = [prompt_text(processor, text, len(mine)) for text, mine in zip(questions, each, strict=True)]
    tokenizer = getattr(processor, "tokenizer", processor)
    start = getattr(tokenizer, "bos_token", None)
    options = {
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
        "add_special_tokens": not (start and texts[0].startswith(start)),  # a template may have put it there
    }
    if images is None:
        inputs = tokenizer(texts, return_token_type_ids=False, **options)
    else:
        inputs = processor(text=texts, images=each, **options)
    return dict(inputs.to(model.device, dtype=model.dtype) if images is not None else inputs.to(model.device))


def question_ids(processor: Any, questions: Sequence[str]) -> list[list[int]]:
    """[B] token ids of the bare questions, for pruners that read them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions]


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    pruner: str | Pruner | None,
    keep: Keep | None = None,
    *,
    max_new_tokens: int,
    positions: str = "original",
    question: list[list[int]] | None = None,
    encoded: Encoded | None = None,
) -> Outcome:
    """Greedy answers with the visual tokens that `pruner` keeps; None for prompts without images.

    With `encoded` the vision encoder's time is the one measured when it ran, unless the pruner ran it anew.

    Raises:
        GripError: as `gripvlm.prune_inputs`.
    """
    device = model.device
    memory: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
    if hasattr(memory, "reset_peak_memory_stats"):
        memory.reset_peak_memory_stats(device)
    clock, record = _Clock(device), Record([[] for _ in inputs["input_ids"]])
    arguments: dict[str, Any] = dict(inputs)
    with ExitStack() as stack:
        if pruner is not None:
            run = pruned_run(model, inputs, pruner, keep, positions=positions, question=question, encoded=encoded)
            arguments, record = stack.enter_context(run)
        began = device_time(device)
        output = model.generate(
            **arguments,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([clock]),
        )
    seconds = dict.fromkeys(("vision", "pruner", "overhead"), 0.0) | record.seconds
    if encoded is not None and not seconds["vision"]:  # a pruner that merges in the tower runs it itself
        seconds["vision"] = encoded.seconds
    ended = device_time(device)
    first = ended if clock.first is None else clock.first
    seconds |= {"prefill": first - began, "decode": ended - first}
    new = output[:, arguments["input_ids"].shape[1] :]
    tokenizer = getattr(processor, "tokenizer", processor)
    peak = memory.max_memory_allocated(device) if hasattr(memory, "max_memory_allocated") else None
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return Outcome(texts, record.selections, seconds, peak)
