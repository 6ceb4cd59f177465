"""Questions and pictures from files to tensors, in a thread beside the model's work."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gripvlm.errors import GripError, InputError, TrainError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.eval.answering import prompt_text
from gripvlm.grip.train.data import Question, pictures_of
from gripvlm.tasks import Sample, TaskError

__all__ = ["BAD_QUESTION", "Read", "ReadAhead", "Reader", "error_about"]

BAD_QUESTION = (InputError, TaskError, TrainError)
"""What is raised for a question that cannot be used."""

_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(eq=False)
class Read:
    """B questions as token ids and pixels, on the model's device, before the vision encoder.

    Attributes:
        questions: [B] (task, sample) pairs.
        pictures: what the processor made of the first question about each of the pictures.
        shown: [B] the row of `pictures` that a question is about.
        prompts: inputs of the questions alone, left-padded.
        answers: [B] token ids to force, [] where the model's own answer will be.
        question: [B] token ids that the scorer reads; None for the whole prompt's text.
    """

    questions: list[Question]
    pictures: dict[str, Any]
    shown: list[int]
    prompts: dict[str, Any]
    answers: list[list[int]]
    question: list[list[int]] | None


class Reader:
    """Reads questions in one thread of its own.

    Args:
        model: whose inputs are made.
        end: token ids that end every answer.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, end: list[int]) -> None:
        self.model, self.end = model, end
        # A copy for the thread: a fast tokenizer must not be used by two threads at once.
        self.processor = copy.deepcopy(processor)
        self._thread = ThreadPoolExecutor(1, "gripvlm-read")

    def soon(self, questions: Sequence[Question], **options: bool) -> Future[Read]:
        """`read` in the thread, while the model is at work on other questions."""
        return self._thread.submit(self.read, list(questions), **options)

    @torch.no_grad()
    def read(self, questions: list[Question], *, pseudo_labels: bool = False, whole_prompt: bool = False) -> Read:
        """Reads and tokenises; the same pictures once, however many questions are about them.

        Not thread-safe: `soon` runs it.

        Args:
            questions: (task, sample) pairs, those about the same pictures side by side.
            pseudo_labels: force the unpruned model's own greedy answers; also done for samples without an answer.
            whole_prompt: the scorer reads the whole prompt's text, as inside `gripvlm.prune`, and not the bare
                question.

        Raises:
            TrainError: with the sample's id: an answer without tokens.
            TaskError: with the sample's id: a picture that cannot be read.
            InputError: a question that holds the placeholder of a picture.
        """
        processor = self.processor
        answers = [self._answer(sample, pseudo_labels) for _, sample in questions]
        texts = [task.prompt(sample) for task, sample in questions]
        names = [pictures_of(task, sample) for task, sample in questions]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        shown = [places[name] for name in names]
        firsts = [names.index(name) for name in places]  # a question about each
        images = [_images_of(questions[i][1]) for i in firsts]
        pictures = make_inputs(self.model, processor, [texts[i] for i in firsts], images)
        prompts = _prompts(processor, texts, shown, firsts, pictures, [len(own) for own in images])
        if prompts is None:  # the processor once more, for its ids alone
            prompts = make_inputs(self.model, processor, texts, [images[place] for place in shown])
        prompts = {name: prompts[name] for name in _PROMPT if name in prompts}
        question = None if whole_prompt else question_ids(processor, [sample.question for _, sample in questions])
        return Read(questions, pictures, shown, prompts, answers, question)

    def _answer(self, sample: Sample, pseudo_labels: bool) -> list[int]:
        """The token ids to force; [] for the model's own.

        Raises:
            TrainError: an answer that is there, but has no tokens.
        """
        if pseudo_labels or not sample.answer:
            return []
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids: list[int] = (
            tokenizer(sample.answer, add_special_tokens=False)["input_ids"] if sample.answer.strip() else []
        )
        if not ids:
            raise TrainError(
                f"the answer of sample {sample.id!r} tokenises to nothing: mend it, or type --on-bad-sample skip"
            )
        return ids + self.end


class ReadAhead:
    """Reads the next questions while the model is at work on these. What is read depends on the questions alone."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._begun: tuple[tuple[Any, ...], Future[Read]] | None = None

    def begin(self, questions: Sequence[Question], **options: bool) -> None:
        """Begins to read."""
        self._begun = ((list(questions), options), self.reader.soon(questions, **options))

    def take(self, questions: Sequence[Question], **options: bool) -> Read:
        """These questions, as they were read meanwhile; read now where others were begun.

        Raises:
            as `Reader.read`.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == (list(questions), options):
            return begun[1].result()
        return self.reader.soon(questions, **options).result()


def error_about(sample: Sample, error: GripError) -> str:
    """What is wrong with a question, with its id and what to do."""
    text = str(error)
    named = text if repr(sample.id) in text else f"sample {sample.id!r}: {text}"
    return named if "--on-bad-sample" in text else f"{named}: mend it, or type --on-bad-sample skip"


def _prompts(
    processor: Any,
    texts: list[str],
    shown: list[int],
    firsts: list[int],
    pictures: dict[str, Any],
    counts: list[int],
) -> dict[str, Tensor] | None:
    """Prompts [B, L] of all questions, left-padded, of which the processor has made one for each of the pictures.

    A question takes what stands up to its last placeholder from the first question about its pictures, and has its own
    text after it. None where that would not be what the processor makes.
    """
    if len(firsts) == len(texts):
        return pictures
    tokenizer = getattr(processor, "tokenizer", processor)
    placeholder = tokenizer.convert_tokens_to_ids(str(getattr(processor, "image_token", None)))
    whole = [prompt_text(processor, text, counts[place]) for text, place in zip(texts, shown, strict=True)]
    begin = getattr(tokenizer, "bos_token", None)
    special = not (begin and whole[0].startswith(begin))  # as `make_inputs`
    heads, tails = [], []
    for row in tokenizer(whole, add_special_tokens=special)["input_ids"]:
        if placeholder not in row:
            return None
        end = len(row) - row[::-1].index(placeholder)
        heads.append(row[:end])
        tails.append(row[end:])
    if any(heads[i] != heads[firsts[place]] for i, place in enumerate(shown)):
        return None
    made = {name: pictures[name] for name in _PROMPT if name in pictures}
    real = made["attention_mask"].bool()
    rows: dict[str, list[Tensor]] = {name: [] for name in made}
    for place, tail in zip(shown, tails, strict=True):
        first = tails[firsts[place]]
        ids = made["input_ids"][place][real[place]]
        head = len(ids) - len(first)
        if head <= 0 or ids[head:].tolist() != first:
            return None
        own = ids.new_tensor(tail)
        rows["input_ids"].append(torch.cat((ids[:head], own)))
        rows["attention_mask"].append(torch.ones_like(rows["input_ids"][-1]))
        if "mm_token_type_ids" in made:
            kinds = made["mm_token_type_ids"][place][real[place]][:head]
            rows["mm_token_type_ids"].append(torch.cat((kinds, torch.zeros_like(own))))
    fill = {"input_ids": int(tokenizer.pad_token_id or 0)}
    return {
        name: pad_sequence(each, batch_first=True, padding_value=fill.get(name, 0), padding_side="left")
        for name, each in rows.items()
    }


def _images_of(sample: Sample) -> list[Image.Image]:
    """The sample's pictures, read.

    Raises:
        TaskError: one cannot be read; with the sample's id.
    """
    try:
        return sample.images
    except TaskError as error:
        raise TaskError(error_about(sample, error)) from error
