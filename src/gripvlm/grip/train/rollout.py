"""Rollouts: encode an image once, try many subsets of its tokens, ask the frozen model what it makes of each.

One prefill of the frozen model answers for many subsets side by side: the answer is teacher-forced, so a
rollout needs no decoding unless its reward does. Rows of like length run together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from gripvlm.api import encode, prune_inputs, visual_tokens
from gripvlm.engine.pipeline import drop
from gripvlm.errors import GripError, InputError, TrainError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.train.data import picture_of
from gripvlm.grip.train.prefix import Prefix, shared_length
from gripvlm.models import adapter as seam
from gripvlm.models.encoded import Encoded
from gripvlm.models.prompts import Prompts
from gripvlm.models.wrapped import unwrapped
from gripvlm.tasks import Sample, Task, TaskError
from gripvlm.types import Selection, VisualTokens

__all__ = ["BAD_QUESTION", "Batch", "Engine", "Rollout", "about"]

BAD_QUESTION = (InputError, TaskError, TrainError)
"""What `Engine.prepare` raises for a question that cannot be used."""

Kept = Sequence[Sequence[Tensor]]
"""[rows] lists over the row's images of kept indices [k], ascending."""


@dataclass(eq=False)
class Batch:
    """B questions about encoded images, with the answers that will be forced.

    Attributes:
        tasks, samples: [B].
        answers: [B] token ids, the end token last (unless the model's own answer was cut off).
        prompts: inputs of the questions alone, left-padded, for decoding.
        inputs: inputs of question and answer, left-padded, with labels [B, L] on the answers.
        encoded: the images.
        tokens: [B] lists of `VisualTokens`, one an image.
        full: logits of the unpruned model, once they were asked for.
        shared: tokens that all prompts begin with, 0 where sharing them is not exact or does not pay.
        prefix: the model's keys and values of those, once they were needed.
    """

    tasks: list[Task]
    samples: list[Sample]
    answers: list[list[int]]
    prompts: dict[str, Any]
    inputs: dict[str, Any]
    encoded: Encoded
    tokens: list[list[VisualTokens]]
    full: Tensor | None = None
    shared: int = 0
    prefix: Prefix | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def longest(self) -> int:
        """T, tokens of the longest answer."""
        return max(map(len, self.answers))

    @cached_property
    def words(self) -> list[int]:
        """[B] tokens of each question and answer that are not visual."""
        lengths = self.inputs["attention_mask"].sum(-1).tolist()
        return [length - sum(t.n for t in tokens) for length, tokens in zip(lengths, self.tokens, strict=True)]

    @property
    def everything(self) -> Kept:
        """The subset that keeps every token of every image."""
        return [[torch.arange(t.n, device=t.features.device) for t in tokens] for tokens in self.tokens]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each forced answer."""
        return (self.inputs["labels"] >= 0).sum(-1)

    def for_scorer(self, question: bool) -> ScorerInputs:
        """Everything the scorer reads, padded."""
        images = [tokens for mine in self.tokens for tokens in mine]
        return ScorerInputs.of(images, question, [i for i, mine in enumerate(self.tokens) for _ in mine])


@dataclass(eq=False)
class Rollout:
    """What the frozen model made of R rows, each a question with some of its visual tokens.

    Attributes:
        tasks, samples: [R].
        log_probs: [R, T] of the forced answer's tokens, 0 where there is none (answers end at the right).
        mask: [R, T] where there is one.
        hit: [R, T] whether a token is the model's first choice.
        targets: [R, T] the forced tokens, 0 where there is none.
        logits: [R, T, V] that predicted them, if `Engine.run` was asked to keep them.
        full_logits: [R, T, V] as `logits`, from the unpruned model; computed once a batch, when first read.
        kept: [R] lists over images of kept indices.
        decode: () -> [R] answers, decoded greedily; costs a generation.
    """

    tasks: list[Task]
    samples: list[Sample]
    log_probs: Tensor
    mask: Tensor
    hit: Tensor
    targets: Tensor
    kept: Kept
    decode: Callable[[], list[str]]
    full: Callable[[], Tensor]
    all_logits: Tensor | None

    @property
    def logits(self) -> Tensor:
        if self.all_logits is None:
            raise RuntimeError("these rollouts kept no logits: call Engine.run(..., logits=True)")
        return self.all_logits

    @property
    def full_logits(self) -> Tensor:
        return self.full()

    @property
    def exact(self) -> Tensor:
        """[R] 1.0 where every token of the answer is the model's first choice."""
        return (self.hit | ~self.mask).all(-1).float()


def about(sample: Sample, error: GripError) -> str:
    """What is wrong with a question, with its id and what to do."""
    said = str(error)
    named = said if repr(sample.id) in said else f"sample {sample.id!r}: {said}"
    return named if "--on-bad" in said else f"{named}: mend it, or type --on-bad skip"


class Engine:
    """A frozen model and its processor, made ready to score subsets.

    Args:
        model, processor: a supported transformers model and its processor. The model is frozen.
        rows: subsets in one forward.
        answer_tokens: the longest answer of the model's own.
        bf16: run rollouts under bfloat16 autocast. On the lab this adds a noise of 0.006 to a mean log-probability
            whose spread within a group is 0.2 to 0.4.

    Attributes:
        subsets: rows that `run` has scored so far.
    """

    def __init__(self, model: Any, processor: Any, rows: int = 64, answer_tokens: int = 16, bf16: bool = False) -> None:
        self.model, self.processor, self.rows = model.eval().requires_grad_(False), processor, rows
        self.answer_tokens, self.bf16, self.subsets = answer_tokens, bf16, 0
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends: list[int] = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        self.end = self._end_of_turn()

    def _end_of_turn(self) -> list[int]:
        """The token that ends an answer: of the model's end tokens the one its chat template closes a turn with."""
        if len(self.ends) > 1 and getattr(self.processor, "chat_template", None):
            turns = [("user", "a"), ("assistant", "b")]
            chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            try:
                text = self.processor.apply_chat_template(chat, tokenize=False)
            except (TypeError, ValueError, KeyError, jinja2.TemplateError):
                return self.ends[:1]  # a template of other shape: the first, as generate lists them
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if found := [token for token in ids if token in self.ends]:
                return found[-1:]
        return self.ends[:1]

    # --- inputs -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, questions: Sequence[tuple[Task, Sample]], *, own: bool = False, whole: bool = False) -> Batch:
        """Reads, tokenises and encodes; each picture once, however many questions are about it.

        Args:
            questions: (task, sample) pairs, those about one picture side by side.
            own: force the unpruned model's own greedy answers; also done for samples without an answer.
            whole: the scorer reads the whole prompt's text, as inside `gripvlm.prune`, and not the bare question.

        Raises:
            TrainError: with the sample's id: an answer without tokens.
            TaskError: with the sample's id: a picture that cannot be read.
            InputError: a question that holds the placeholder of a picture.
        """
        tasks, samples = [task for task, _ in questions], [sample for _, sample in questions]
        pictures: dict[str, tuple[int, Image.Image]] = {}
        first: list[int] = []
        names = [picture_of(task, sample) for task, sample in questions]
        for i, (name, sample) in enumerate(zip(names, samples, strict=True)):
            if name in pictures:
                continue
            try:
                pictures[name] = (len(first), sample.image)
            except TaskError as error:
                raise TaskError(about(sample, error)) from error
            first.append(i)
        index = [pictures[name][0] for name in names]
        images = [pictures[name][1] for name in names]
        texts = [task.prompt(sample) for task, sample in questions]
        once = make_inputs(self.model, self.processor, [texts[i] for i in first], [images[i] for i in first])
        encoded = encode(self.model, once).take(index)
        prompts = once if len(first) == len(samples) else make_inputs(self.model, self.processor, texts, images)
        prompts = {k: v for k, v in prompts.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        asked = None if whole else question_ids(self.processor, texts)
        tokens = visual_tokens(self.model, prompts, question=asked, encoded=encoded)
        answers = self._answers(tasks, samples, prompts, encoded, own)
        inputs = self._with_answers(prompts, answers)
        spans = seam.locate(self.model, inputs["input_ids"], encoded)
        shared = shared_length(self.model, inputs["input_ids"], inputs["attention_mask"], spans)
        return Batch(tasks, samples, answers, prompts, inputs, encoded, tokens, shared=shared)

    def _answers(
        self, tasks: list[Task], samples: list[Sample], prompts: dict[str, Any], encoded: Encoded, own: bool
    ) -> list[list[int]]:
        """[B] token ids to force."""
        texts = [sample.answer if sample.answer.strip() else "" for sample in samples]
        answers = [self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        lacking = [own or not sample.answer for sample in samples]
        if empty := [s.id for s, answer, no in zip(samples, answers, lacking, strict=True) if not (answer or no)]:
            raise TrainError(f"the answer of sample {empty[0]!r} tokenises to nothing: mend it, or type --on-bad skip")
        answers = [answer + self.end for answer in answers]
        if any(lacking):
            arguments = prune_inputs(self.model, prompts, "keep_all", encoded=encoded)
            length = prompts["input_ids"].shape[1]
            said = self.model.generate(**arguments, max_new_tokens=self.answer_tokens, do_sample=False)[:, length:]
            for i, row in enumerate(said.tolist()):
                if lacking[i]:  # up to its end; one that was cut off has none
                    ended = [j for j, token in enumerate(row) if token in self.ends]
                    answers[i] = row[: ended[0] + 1] if ended else row
        return answers

    def _with_answers(self, prompts: dict[str, Any], answers: list[list[int]]) -> dict[str, Any]:
        """Prompts and answers in one row each, padded on the left; labels on the answers."""
        ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
        device = ids.device
        rows = [torch.cat((row[real], torch.tensor(a, device=device))) for row, real, a in zip(ids, mask, answers)]  # noqa: B905
        length = max(map(len, rows))
        inputs = {
            "input_ids": ids.new_zeros(len(rows), length),
            "attention_mask": ids.new_zeros(len(rows), length),
            "labels": ids.new_full((len(rows), length), -100),
        }
        if "mm_token_type_ids" in prompts:
            inputs["mm_token_type_ids"] = ids.new_zeros(len(rows), length)
        pad = int(ids[~mask][0]) if not bool(mask.all()) else int(self.tokenizer.pad_token_id or 0)
        inputs["input_ids"].fill_(pad)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            inputs["input_ids"][i, length - len(row) :] = row
            inputs["attention_mask"][i, length - len(row) :] = 1
            inputs["labels"][i, length - len(answer) :] = row[len(row) - len(answer) :]
            if "mm_token_type_ids" in prompts:
                kinds = prompts["mm_token_type_ids"][i][mask[i]]
                inputs["mm_token_type_ids"][i, length - len(row) : length - len(answer)] = kinds
        return inputs

    # --- rollouts ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, batch: Batch, rows: Sequence[int], kept: Kept, *, logits: bool = True) -> Rollout:
        """Forces the answers with only `kept` tokens left.

        Args:
            rows: [R] which sample of the batch each row is about.
            kept: [R] lists over that sample's images of indices [k], ascending.
            logits: keep them, R x T x vocabulary float32 numbers: gigabytes for a large model and long answers.
        """
        width = batch.longest
        order = sorted(range(len(rows)), key=lambda r: batch.words[rows[r]] + sum(len(indices) for indices in kept[r]))
        device = batch.inputs["input_ids"].device
        targets = batch.inputs["labels"][:, -width:][torch.tensor(rows, device=device)]
        mask, targets = targets >= 0, targets.clamp(min=0)
        every: Tensor | None = None
        log_probs, hit = torch.zeros(mask.shape, device=device), torch.zeros_like(mask)
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            out = self._forward(batch, [rows[r] for r in part], [kept[r] for r in part], width)
            index = torch.tensor(part, device=device)
            if logits:
                every = out.new_empty(len(rows), *out.shape[1:]) if every is None else every
                every[index] = out
            hit[index] = out.argmax(-1) == targets[index]
            log_probs[index] = out.log_softmax(-1).gather(-1, targets[index, :, None]).squeeze(-1)
        self.subsets += len(rows)

        def decode() -> list[str]:
            return self._decode(batch, rows, kept, order)

        return Rollout(
            tasks=[batch.tasks[b] for b in rows],
            samples=[batch.samples[b] for b in rows],
            log_probs=log_probs.masked_fill(~mask, 0.0),
            mask=mask,
            hit=hit,
            targets=targets,
            kept=kept,
            decode=decode,
            full=lambda: self.full_logits(batch)[torch.tensor(rows, device=device)],
            all_logits=every,
        )

    @torch.no_grad()
    def full_logits(self, batch: Batch) -> Tensor:
        """[B, T, V] logits of the unpruned model at the forced answers, kept with the batch."""
        if batch.full is None:
            batch.full = self._forward(batch, range(len(batch)), batch.everything, batch.longest)
        return batch.full

    def pruned(self, batch: Batch, inputs: dict[str, Any], rows: Sequence[int], kept: Kept) -> dict[str, Any]:
        """Arguments for the model's forward: `rows` of `inputs` with only `kept` tokens left."""
        index = torch.tensor(rows, device=inputs["input_ids"].device)
        repeated = {name: value[index] for name, value in inputs.items()}
        selections = [
            [Selection(indices, tokens.n) for indices, tokens in zip(kept[r], batch.tokens[row], strict=True)]
            for r, row in enumerate(rows)
        ]
        prompts = Prompts.of(unwrapped(self.model), repeated)
        return drop(prompts.with_images(batch.encoded.take(rows)), selections).arguments

    def _forward(self, batch: Batch, rows: Sequence[int], kept: Kept, width: int) -> Tensor:
        """[R, width, V] float32 logits that predict the last `width` tokens of each row, 0 before its first."""
        arguments = self.pruned(batch, batch.inputs, rows, kept)
        arguments.pop("labels")
        short = {"logits_to_keep": width + 1} if self._short else {}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            if batch.shared and batch.prefix is None:
                batch.prefix = Prefix.of(self.model, arguments, batch.shared)
            arguments = {**arguments, "use_cache": False} if batch.prefix is None else batch.prefix.without(arguments)
            logits = self.model(**arguments, **short).logits[:, -width - 1 : -1].float()
        return pad(logits, (0, 0, width - logits.shape[1], 0))  # all may be shorter than an answer elsewhere

    def whole(self, batch: Batch) -> dict[str, Any]:
        """Arguments for the model's forward over questions and answers with every visual token."""
        arguments = self.pruned(batch, batch.inputs, range(len(batch)), batch.everything)
        arguments.pop("labels")
        return arguments

    def places(self, batch: Batch) -> list[tuple[int, Tensor]]:
        """(sample, positions of its placeholders in `whole`) of every image, in order."""
        spans = seam.locate(self.model, batch.inputs["input_ids"], batch.encoded)
        return [(i, span.positions) for i, mine in enumerate(spans) for span in mine]

    def _decode(self, batch: Batch, rows: Sequence[int], kept: Kept, order: list[int]) -> list[str]:
        said = [""] * len(rows)
        longest = max(task.max_new_tokens for task in batch.tasks)
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            arguments = self.pruned(batch, batch.prompts, [rows[r] for r in part], [kept[r] for r in part])
            length = arguments["input_ids"].shape[1]
            new = self.model.generate(**arguments, max_new_tokens=longest, do_sample=False)[:, length:]
            for r, text in zip(part, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                said[r] = text.strip()
        return said
