"""One batch of questions through a model: the prompts, the inputs, pruned generation, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gripvlm.api import Record, pruned_run
from gripvlm.budget import Keep
from gripvlm.errors import InputError
from gripvlm.models.encoded import Encoded
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import Pruner
from gripvlm.types import Selection
from gripvlm.utils.timing import device_time

__all__ = ["SECONDS", "BatchAnswers", "answer", "make_inputs", "processed", "prompt_text", "question_ids"]

SECONDS = ("vision", "pruner", "overhead", "prefill", "decode")
"""The parts of an answer's time, in their order."""


@dataclass
class BatchAnswers:
    """The answers to a batch of B questions.

    Attributes:
        predictions: [B] decoded answers without special tokens.
        selections: [B] lists of one `Selection` an image; empty lists for prompts without images.
        seconds: one for each of `SECONDS`, of the whole batch. Prefill ends when the first new token's logits are
            there, dropping inside the language model included; decode is all that follows.
        peak_memory: bytes on the accelerator at most, None where the device does not count them.
    """

    predictions: list[str]
    selections: list[list[Selection]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None


class _FirstTokenTime(LogitsProcessor):
    """Notes when the first new token's logits are there; changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.seconds is None:
            self.seconds = device_time(self.device)
        return scores


def prompt_text(processor: Any, question: str, image: int = 1) -> str:
    """The full prompt of a question about `image` images: the processor's chat template where it has one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return f"{getattr(processor, 'image_token', '<image>')}\n" * image + question


def make_inputs(
    model: PreTrainedModel,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]] | None,
    **options: Any,
) -> dict[str, Any]:
    """Model inputs of a batch, left-padded, on the model's device and in its dtype.

    Args:
        questions: [B] texts of the user's turn.
        images: [B], one for each question or a list of at least one; None for prompts without images.
        options: for the image processor, such as `do_resize=False`.

    Raises:
        InputError: a question holds the model's own image placeholder.
    """
    placeholder = getattr(processor, "image_token", None)
    for question in questions:
        if isinstance(placeholder, str) and placeholder and placeholder in question:
            raise InputError(
                f"the question {question!r} holds {placeholder}, the model's own placeholder of an image: leave it "
                "out, the image is put in front of the question without it"
            )
    by_question = [[item] if isinstance(item, Image.Image) else list(item) for item in images or [()] * len(questions)]
    texts = [prompt_text(processor, text, len(own)) for text, own in zip(questions, by_question, strict=True)]
    made = processed(processor, texts, None if images is None else by_question, **options)
    return dict(made.to(device_of(model)) if images is None else made.to(device_of(model), dtype=model.dtype))


def processed(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None, **image_options: Any
) -> Any:
    """What the processor makes of B full prompts, left-padded, and of the images of each; None for no images."""
    tokenizer = getattr(processor, "tokenizer", processor)
    begin = getattr(tokenizer, "bos_token", None)
    options = {
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
        # Some chat templates write the begin token themselves: twice would be another prompt.
        "add_special_tokens": not (begin and texts[0].startswith(begin)),
    }
    if images is None:
        return tokenizer(texts, return_token_type_ids=False, **options)
    return processor(text=texts, images=images, **options, **image_options)


def question_ids(processor: Any, questions: Sequence[str]) -> list[list[int]]:
    """[B] token ids of the bare questions, for pruners that read them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: Any,
    inputs: Mapping[str, Any],
    pruner: str | Pruner | None,
    keep: Keep | None = None,
    *,
    max_new_tokens: int,
    positions: str = "original",
    question: list[list[int]] | None = None,
    encoded: Encoded | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
) -> BatchAnswers:
    """Greedy answers with the visual tokens that `pruner` keeps; None for prompts without images.

    With `encoded`, the vision encoder's time is the one measured when it ran, unless the pruner ran it again.
    `logits_processor` see the logits of each step, after the model's own ones.

    Raises:
        GripError: as `gripvlm.prune_inputs`.
    """
    # The peak is the highest since the last reset, so each batch starts its own count.
    device = device_of(model)
    memory: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
    if hasattr(memory, "reset_peak_memory_stats"):
        memory.reset_peak_memory_stats(device)
    first_token, record = _FirstTokenTime(device), Record([[] for _ in inputs["input_ids"]])
    arguments: dict[str, Any] = dict(inputs)
    with ExitStack() as stack:
        if pruner is not None:
            run = pruned_run(model, inputs, pruner, keep, positions=positions, question=question, encoded=encoded)
            arguments, record = stack.enter_context(run)
        # Inside the block, where the input is encoded and pruned already: what follows is the language model alone.
        started = device_time(device)
        output = model.generate(
            **arguments,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([first_token, *logits_processor]),
        )
    seconds = dict.fromkeys(SECONDS, 0.0) | record.seconds
    # A pruner that works inside the vision tower runs the tower itself, and its record says how long that took.
    if encoded is not None and not seconds["vision"]:
        seconds["vision"] = encoded.seconds
    ended = device_time(device)
    # A model that ends before its first token has no decoding.
    prefilled = ended if first_token.seconds is None else first_token.seconds
    seconds |= {"prefill": prefilled - started, "decode": ended - prefilled}
    tokenizer = getattr(processor, "tokenizer", processor)
    new_tokens = output[:, arguments["input_ids"].shape[1] :]
    texts = [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    peak = memory.max_memory_allocated(device) if hasattr(memory, "max_memory_allocated") else None
    return BatchAnswers(texts, record.selections, seconds, peak)
