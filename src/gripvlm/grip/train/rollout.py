"""Rollouts: encode an image once, try many subsets of its tokens, score each with the frozen model.

One prefill of the frozen model scores many subsets side by side: the answer is teacher-forced, so a rollout needs no
decoding unless its reward does. Rows of like length run together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import jinja2
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gripvlm.api import encode, prune_inputs, visual_tokens
from gripvlm.engine.pipeline import drop
from gripvlm.errors import GripError, InputError, TrainError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.train.data import Question, pictures_of
from gripvlm.models import adapter
from gripvlm.models.encoded import Encoded
from gripvlm.models.prompts import Prompts
from gripvlm.models.wrapped import unwrapped
from gripvlm.tasks import Sample, Task, TaskError
from gripvlm.types import Selection, VisualTokens

BAD_QUESTION = (InputError, TaskError, TrainError)
"""What `Engine.prepare` raises for a question that cannot be used."""

PSEUDO_LABEL_TOKENS = 16
"""The longest answer of the model's own that is forced."""

Subsets: TypeAlias = Sequence[Sequence[Tensor]]
"""[rows] lists over the row's images of the indices [k] of the tokens that stay, ascending."""


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
        full_logits: what `Engine.full_logits` computed, once it was called.
    """

    tasks: list[Task]
    samples: list[Sample]
    answers: list[list[int]]
    prompts: dict[str, Any]
    inputs: dict[str, Any]
    encoded: Encoded
    tokens: list[list[VisualTokens]]
    full_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def longest(self) -> int:
        """T, tokens of the longest answer."""
        return max(map(len, self.answers))

    @cached_property
    def text_lengths(self) -> list[int]:
        """[B] tokens of each question and answer that are not visual."""
        lengths = self.inputs["attention_mask"].sum(-1).tolist()
        return [length - sum(t.n for t in tokens) for length, tokens in zip(lengths, self.tokens, strict=True)]

    @property
    def everything(self) -> Subsets:
        """The subset with every token of every image."""
        return [[torch.arange(t.n, device=t.features.device) for t in tokens] for tokens in self.tokens]

    @property
    def answer_lengths(self) -> Tensor:
        """[B] tokens of each forced answer."""
        return (self.inputs["labels"] >= 0).sum(-1)

    def by_question(self, per_image: Iterable[Tensor]) -> list[list[Tensor]]:
        """[B] lists over each question's images, of one tensor an image."""
        values = iter(per_image)
        return [[next(values) for _ in tokens] for tokens in self.tokens]

    @cached_property
    def owner(self) -> list[int]:
        """[I] the question that each image belongs to."""
        return [i for i, sample in enumerate(self.tokens) for _ in sample]

    @cached_property
    def sizes(self) -> Tensor:
        """[I] tokens of each image."""
        return torch.tensor([t.n for sample in self.tokens for t in sample], device=self.inputs["input_ids"].device)

    def for_scorer(self, question: bool, joint: bool = False) -> ScorerInputs:
        """Everything the scorer reads, padded; `joint`: the images of a question are one sequence."""
        images = [tokens for sample in self.tokens for tokens in sample]
        return ScorerInputs.of(images, question, self.owner, joint)


@dataclass(eq=False)
class Rollout:
    """How the frozen model scores R forced answers, each after a question with some of its visual tokens.

    Attributes:
        engine, batch: the model that scored, and the questions.
        rows: [R] the question of the batch that each row is about.
        subsets: [R] lists over images of the indices that stay.
        log_probs: [R, T] of the forced answer's tokens, 0 at padding (answers end at the right).
        mask: [R, T] True at the answer's tokens.
        hit: [R, T] whether a token is the model's first choice.
        targets: [R, T] the forced tokens, 0 at padding.
    """

    engine: Engine
    batch: Batch
    rows: Sequence[int]
    subsets: Subsets
    log_probs: Tensor
    mask: Tensor
    hit: Tensor
    targets: Tensor
    stored_logits: Tensor | None = None

    @property
    def tasks(self) -> list[Task]:
        return [self.batch.tasks[row] for row in self.rows]

    @property
    def samples(self) -> list[Sample]:
        return [self.batch.samples[row] for row in self.rows]

    @property
    def logits(self) -> Tensor:
        """[R, T, V] that predicted the forced tokens, if `Engine.run` was called to keep them."""
        if self.stored_logits is None:
            raise RuntimeError("these rollouts kept no logits: call Engine.run(..., logits=True)")
        return self.stored_logits

    @property
    def full_logits(self) -> Tensor:
        """[R, T, V] as `logits`, from the unpruned model; computed once a batch."""
        return self.engine.full_logits(self.batch)[torch.tensor(self.rows, device=self.mask.device)]

    @property
    def exact(self) -> Tensor:
        """[R] 1.0 where every token of the answer is the model's first choice."""
        return (self.hit | ~self.mask).all(-1).float()

    def decode(self) -> list[str]:
        """[R] answers, decoded greedily; costs a generation."""
        return self.engine.decode(self.batch, self.rows, self.subsets)


def error_about(sample: Sample, error: GripError) -> str:
    """What is wrong with a question, with its id and what to do."""
    text = str(error)
    named = text if repr(sample.id) in text else f"sample {sample.id!r}: {text}"
    return named if "--on-bad-sample" in text else f"{named}: mend it, or type --on-bad-sample skip"


class Engine:
    """A frozen model and its processor, made ready to score subsets.

    Args:
        model, processor: a supported transformers model and its processor. The model is frozen.
        rollout_batch_size: subsets in one forward.
        bf16: run rollouts under bfloat16 autocast. On the lab this adds a noise of 0.006 to a mean log-probability
            whose spread within a group is 0.2 to 0.4.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, rollout_batch_size: int = 64, bf16: bool = False
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.processor, self.rollout_batch_size, self.bf16 = processor, rollout_batch_size, bf16
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # Logits at the answer alone, where the model can: a token has as many as the vocabulary, 30 to 150 thousand.
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
            if closing := [token for token in ids if token in self.ends]:
                return closing[-1:]
        return self.ends[:1]

    # --- inputs -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(
        self, questions: Sequence[Question], *, pseudo_labels: bool = False, whole_prompt: bool = False
    ) -> Batch:
        """Reads, tokenises and encodes; the same pictures once, however many questions are about them.

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
        tasks, samples = [task for task, _ in questions], [sample for _, sample in questions]
        texts = [task.prompt(sample) for task, sample in questions]
        names = [pictures_of(task, sample) for task, sample in questions]
        pictures = list(dict.fromkeys(names))
        firsts = [names.index(name) for name in pictures]  # a question about each
        images = dict(zip(pictures, (_images_of(samples[i]) for i in firsts), strict=True))
        once = make_inputs(self.model, self.processor, [texts[i] for i in firsts], list(images.values()))
        # Pixels go through the tower once; what follows only repeats the rows of its output.
        encoded = encode(self.model, once).take([pictures.index(name) for name in names])
        # Prompts of all questions. The processor also prepares their pixels again, which are not used.
        if len(pictures) < len(samples):
            once = make_inputs(self.model, self.processor, texts, [images[name] for name in names])
        prompts = {k: v for k, v in once.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        question = None if whole_prompt else question_ids(self.processor, texts)
        tokens = visual_tokens(self.model, prompts, question=question, encoded=encoded)
        batch = Batch(tasks, samples, [], prompts, {}, encoded, tokens)
        batch.answers = self._answers(batch, pseudo_labels)
        batch.inputs = self._with_answers(prompts, batch.answers)
        return batch

    def _answers(self, batch: Batch, pseudo_labels: bool) -> list[list[int]]:
        """[B] token ids to force."""
        texts = [sample.answer if sample.answer.strip() else "" for sample in batch.samples]
        answers = [self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        unlabelled = [pseudo_labels or not sample.answer for sample in batch.samples]
        for sample, answer, generate in zip(batch.samples, answers, unlabelled, strict=True):
            if not (answer or generate):
                raise TrainError(
                    f"the answer of sample {sample.id!r} tokenises to nothing: mend it, or type --on-bad-sample skip"
                )
        answers = [answer + self.end for answer in answers]
        # The batch is generated whole, also where one answer is lacking: rows are cheap beside the call.
        if any(unlabelled):
            arguments = prune_inputs(self.model, batch.prompts, "keep_all", encoded=batch.encoded)
            length = batch.prompts["input_ids"].shape[1]
            generated = self.model.generate(**arguments, max_new_tokens=PSEUDO_LABEL_TOKENS, do_sample=False)
            for i, row in enumerate(generated[:, length:].tolist()):
                if unlabelled[i]:  # up to its end; one that was cut off has none
                    ends = [j for j, token in enumerate(row) if token in self.ends]
                    answers[i] = row[: ends[0] + 1] if ends else row
        return answers

    def _with_answers(self, prompts: dict[str, Any], answers: list[list[int]]) -> dict[str, Any]:
        """Prompts and answers in one row each, padded on the left; labels on the answers."""
        ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
        forced = [torch.tensor(answer, device=ids.device) for answer in answers]

        def joined(prompt_rows: Tensor, ends: Sequence[Tensor], fill: int) -> Tensor:
            rows = [torch.cat((row[real], end)) for row, real, end in zip(prompt_rows, mask, ends, strict=True)]
            # On the left, so that answers end in the last column and one slice holds all of them.
            return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left")

        pad_id = int(ids[~mask][0]) if not bool(mask.all()) else int(self.tokenizer.pad_token_id or 0)
        inputs = {
            "input_ids": joined(ids, forced, pad_id),
            "attention_mask": joined(torch.ones_like(ids), [torch.ones_like(answer) for answer in forced], 0),
            "labels": joined(torch.full_like(ids, -100), forced, -100),
        }
        if "mm_token_type_ids" in prompts:
            text = [torch.zeros_like(answer) for answer in forced]
            inputs["mm_token_type_ids"] = joined(prompts["mm_token_type_ids"], text, 0)
        return inputs

    # --- rollouts ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, batch: Batch, rows: Sequence[int], subsets: Subsets, *, logits: bool = True) -> Rollout:
        """Scores the forced answers with only the tokens of `subsets` left.

        Args:
            rows: [R] which sample of the batch each row is about.
            subsets: [R] lists over that sample's images of indices [k], ascending.
            logits: keep them, R x T x vocabulary float32 numbers: gigabytes for a large model and long answers.
        """
        device = batch.inputs["input_ids"].device
        targets = batch.inputs["labels"][:, -batch.longest :][torch.tensor(rows, device=device)]
        mask, targets = targets >= 0, targets.clamp(min=0)
        stored: Tensor | None = None
        log_probs, hit = torch.zeros(mask.shape, device=device), torch.zeros_like(mask)
        for part in self._parts(batch, rows, subsets):
            out = self._forward(batch, [rows[r] for r in part], [subsets[r] for r in part])
            index = torch.tensor(part, device=device)
            if logits:
                stored = out.new_empty(len(rows), *out.shape[1:]) if stored is None else stored
                stored[index] = out
            # All that most rewards read; the logits of this part may go then.
            hit[index] = out.argmax(-1) == targets[index]
            log_probs[index] = out.log_softmax(-1).gather(-1, targets[index, :, None]).squeeze(-1)
        return Rollout(self, batch, rows, subsets, log_probs.masked_fill(~mask, 0.0), mask, hit, targets, stored)

    @torch.no_grad()
    def full_logits(self, batch: Batch) -> Tensor:
        """[B, T, V] logits of the unpruned model at the forced answers; computed once a batch."""
        if batch.full_logits is None:
            batch.full_logits = self._forward(batch, range(len(batch)), batch.everything)
        return batch.full_logits

    @torch.no_grad()
    def decode(self, batch: Batch, rows: Sequence[int], subsets: Subsets) -> list[str]:
        """[R] greedy answers to the questions `rows` with only the tokens of `subsets` left."""
        texts = [""] * len(rows)
        longest = max(task.max_new_tokens for task in batch.tasks)
        for part in self._parts(batch, rows, subsets):
            arguments = self.pruned(batch, batch.prompts, [rows[r] for r in part], [subsets[r] for r in part])
            length = arguments["input_ids"].shape[1]
            new = self.model.generate(**arguments, max_new_tokens=longest, do_sample=False)[:, length:]
            for r, text in zip(part, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[r] = text.strip()
        return texts

    def _parts(self, batch: Batch, rows: Sequence[int], subsets: Subsets) -> list[list[int]]:
        """Indices of rows in parts of `rollout_batch_size`: sorted by length, so that little of a part is padding."""
        lengths = [batch.text_lengths[row] + sum(map(len, subset)) for row, subset in zip(rows, subsets, strict=True)]
        order = sorted(range(len(rows)), key=lambda r: lengths[r])
        return [
            order[start : start + self.rollout_batch_size] for start in range(0, len(order), self.rollout_batch_size)
        ]

    def pruned(self, batch: Batch, inputs: dict[str, Any], rows: Sequence[int], subsets: Subsets) -> dict[str, Any]:
        """Arguments for the model's forward: `rows` of `inputs` with only the tokens of `subsets` left."""
        index = torch.tensor(rows, device=inputs["input_ids"].device)
        repeated = {name: value[index] for name, value in inputs.items()}
        selections = [
            [Selection(indices, tokens.n) for indices, tokens in zip(subset, batch.tokens[row], strict=True)]
            for row, subset in zip(rows, subsets, strict=True)
        ]
        prompts = Prompts.of(unwrapped(self.model), repeated)
        return drop(prompts.with_images(batch.encoded.take(rows)), selections).arguments

    def _forward(self, batch: Batch, rows: Sequence[int], subsets: Subsets) -> Tensor:
        """[R, T, V] float32 logits that predict the last T tokens of each row, 0 before its first."""
        width = batch.longest
        arguments = self.pruned(batch, batch.inputs, rows, subsets)
        arguments.pop("labels")
        # One more than the answers: the row before a token predicts it.
        short = {"logits_to_keep": width + 1} if self._short else {}
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(**arguments, **short, use_cache=False).logits[:, -width - 1 : -1].float()
        return pad(logits, (0, 0, width - logits.shape[1], 0))  # all may be shorter than an answer elsewhere

    def whole(self, batch: Batch) -> dict[str, Any]:
        """Arguments for the model's forward over questions and answers with every visual token."""
        arguments = self.pruned(batch, batch.inputs, range(len(batch)), batch.everything)
        arguments.pop("labels")
        return arguments

    def image_positions(self, batch: Batch) -> list[tuple[int, Tensor]]:
        """(sample, positions of its placeholders in `whole`) of every image, in order."""
        spans = adapter.locate(self.model, batch.inputs["input_ids"], batch.encoded)
        return [(i, span.positions) for i, sample in enumerate(spans) for span in sample]

    def forced_log_probs(self, batch: Batch, arguments: dict[str, Any]) -> Tensor:
        """[B, T] log-probabilities of the forced answers that end the prompts of `arguments`, 0 at padding."""
        width = batch.longest
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(**arguments, use_cache=False).logits[:, -width - 1 : -1].float()
        targets = batch.inputs["labels"][:, -width:]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return log_probs.masked_fill(targets < 0, 0.0)


def _images_of(sample: Sample) -> list[Image.Image]:
    """The sample's pictures, read.

    Raises:
        TaskError: one cannot be read; with the sample's id.
    """
    try:
        return sample.images
    except TaskError as error:
        raise TaskError(error_about(sample, error)) from error
