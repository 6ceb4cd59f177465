"""Rollouts: encode an image once, try many subsets of its tokens, score each with the frozen model.

One prefill of the frozen model scores many subsets side by side: the answer is teacher-forced, so a rollout needs no
decoding unless its reward does. Rows of like length run together.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import jinja2
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gripvlm.api import encode, prune_inputs, visual_tokens
from gripvlm.engine.pipeline import drop
from gripvlm.errors import GripError, InputError, TrainError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.eval.answering import prompt_text
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

    def take(self, rows: Sequence[int]) -> Batch:
        """Those questions alone, in that order, padded to the longest of them."""
        index = torch.tensor(rows, device=self.inputs["input_ids"].device)
        longest = max(self.text_lengths[row] + sum(t.n for t in self.tokens[row]) for row in rows)
        return Batch(
            [self.tasks[row] for row in rows],
            [self.samples[row] for row in rows],
            [self.answers[row] for row in rows],
            {name: value[index] for name, value in self.prompts.items()},
            {name: value[index, -longest:] for name, value in self.inputs.items()},
            self.encoded.take(rows),
            [self.tokens[row] for row in rows],
        )


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
    decoded: list[str] | None = None

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
        """[R] answers, decoded greedily; costs a generation the first time."""
        if self.decoded is None:
            self.decoded = self.engine.decode(self.batch, self.rows, self.subsets)
        return self.decoded


def error_about(sample: Sample, error: GripError) -> str:
    """What is wrong with a question, with its id and what to do."""
    text = str(error)
    named = text if repr(sample.id) in text else f"sample {sample.id!r}: {text}"
    return named if "--on-bad-sample" in text else f"{named}: mend it, or type --on-bad-sample skip"


class Engine:
    """A frozen model and its processor, made ready to score subsets.

    Args:
        model, processor: a supported transformers model and its processor. The model is frozen.
        max_tokens_per_forward: rows times the longest of them, in one forward; a row that is longer runs alone.
        bf16: run rollouts under bfloat16 autocast. On the lab this adds a noise of 0.006 to a mean log-probability
            whose spread within a group is 0.2 to 0.4.
        gradient_checkpointing: compute each layer again in the backward pass of soft masks, and store its input alone.

    Attributes:
        tokens: that the model has run on so far, without padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        max_tokens_per_forward: int = 16384,
        bf16: bool = False,
        gradient_checkpointing: bool = True,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.processor, self.max_tokens_per_forward, self.bf16 = processor, max_tokens_per_forward, bf16
        self.gradient_checkpointing, self.tokens = gradient_checkpointing, 0
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # A copy for the thread that reads: a fast tokenizer must not be used by two threads at once.
        self._reading = copy.deepcopy(processor)
        self._thread = ThreadPoolExecutor(1, "gripvlm-read")
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

    def prepare(
        self, questions: Sequence[Question], *, pseudo_labels: bool = False, whole_prompt: bool = False
    ) -> Batch:
        """`encode` of `read`.

        Raises:
            as those do.
        """
        options = {"pseudo_labels": pseudo_labels, "whole_prompt": whole_prompt}
        return self.encode(self.read_soon(questions, **options).result())

    def read_soon(self, questions: Sequence[Question], **options: bool) -> Future[Read]:
        """`read` in the thread that reads, while the model is at work on other questions."""
        return self._thread.submit(self.read, list(questions), **options)

    @torch.no_grad()
    def read(self, questions: list[Question], *, pseudo_labels: bool = False, whole_prompt: bool = False) -> Read:
        """Reads and tokenises; the same pictures once, however many questions are about them.

        Not thread-safe: `read_soon` runs it.

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
        processor = self._reading
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
        question = None if whole_prompt else question_ids(processor, texts)
        return Read(questions, pictures, shown, prompts, answers, question)

    def _answer(self, sample: Sample, pseudo_labels: bool) -> list[int]:
        """The token ids to force; [] for the model's own.

        Raises:
            TrainError: an answer that is there, but has no tokens.
        """
        if pseudo_labels or not sample.answer:
            return []
        tokenizer = getattr(self._reading, "tokenizer", self._reading)
        ids: list[int] = (
            tokenizer(sample.answer, add_special_tokens=False)["input_ids"] if sample.answer.strip() else []
        )
        if not ids:
            raise TrainError(
                f"the answer of sample {sample.id!r} tokenises to nothing: mend it, or type --on-bad-sample skip"
            )
        return ids + self.end

    @torch.no_grad()
    def encode(self, read: Read) -> Batch:
        """Questions with their pictures encoded, each once."""
        encoded = encode(self.model, read.pictures).take(read.shown)
        tokens = visual_tokens(self.model, read.prompts, question=read.question, encoded=encoded)
        tasks, samples = [task for task, _ in read.questions], [sample for _, sample in read.questions]
        answers = read.answers
        # The batch is generated whole, also where one answer is lacking: rows are cheap beside the call.
        if not all(answers):
            answers = [mine or own for mine, own in zip(answers, self._own_answers(read.prompts, encoded), strict=True)]
        return Batch(tasks, samples, answers, read.prompts, self._with_answers(read.prompts, answers), encoded, tokens)

    def _own_answers(self, prompts: dict[str, Any], encoded: Encoded) -> list[list[int]]:
        """[B] token ids of the unpruned model's greedy answers, up to their end; those that were cut off have none."""
        arguments = prune_inputs(self.model, prompts, "keep_all", encoded=encoded)
        length = prompts["input_ids"].shape[1]
        generated = self.model.generate(**arguments, max_new_tokens=PSEUDO_LABEL_TOKENS, do_sample=False)
        answers = []
        for row in generated[:, length:].tolist():
            ends = [j for j, token in enumerate(row) if token in self.ends]
            answers.append(row[: ends[0] + 1] if ends else row)
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
        for part in self.parts(batch, rows, subsets):
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
            batch.full_logits = self.run(batch, range(len(batch)), batch.everything).logits
        return batch.full_logits

    @torch.no_grad()
    def decode(self, batch: Batch, rows: Sequence[int], subsets: Subsets) -> list[str]:
        """[R] greedy answers to the questions `rows` with only the tokens of `subsets` left."""
        texts = [""] * len(rows)
        longest = max(task.max_new_tokens for task in batch.tasks)
        for part in self.parts(batch, rows, subsets, longest):
            arguments = self.pruned(batch, batch.prompts, [rows[r] for r in part], [subsets[r] for r in part])
            length = arguments["input_ids"].shape[1]
            new = self.model.generate(**arguments, max_new_tokens=longest, do_sample=False)[:, length:]
            for r, text in zip(part, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[r] = text.strip()
        return texts

    def parts(self, batch: Batch, rows: Sequence[int], subsets: Subsets, more: int = 0) -> list[list[int]]:
        """Indices of `rows` in parts, one forward each: sorted by length, so that little of a part is padding.

        Args:
            more: tokens that each row will grow by.
        """
        lengths = [batch.text_lengths[row] + sum(map(len, subset)) for row, subset in zip(rows, subsets, strict=True)]
        self.tokens += sum(lengths)
        parts: list[list[int]] = []
        for r in sorted(range(len(rows)), key=lambda r: lengths[r]):
            if parts and (len(parts[-1]) + 1) * (lengths[r] + more) <= self.max_tokens_per_forward:
                parts[-1].append(r)
            else:
                parts.append([r])
        return parts

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
        logits = self._last_logits(arguments, width)
        return pad(logits, (0, 0, width - logits.shape[1], 0))  # all may be shorter than an answer elsewhere

    def _last_logits(self, arguments: dict[str, Any], width: int) -> Tensor:
        """[R, width or the length, V] float32 logits that predict the last tokens of each row."""
        # One more than the answers: the row before a token predicts it.
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(**arguments, **self.last(width + 1), use_cache=False).logits
        return logits[:, -width - 1 : -1].float()

    def last(self, width: int) -> dict[str, int]:
        """The model's argument for logits at the last `width` positions alone; {} where it has none."""
        return {"logits_to_keep": width} if self._short else {}

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
        with _checkpointed(self.model, self.gradient_checkpointing and torch.is_grad_enabled()):
            logits = self._last_logits(arguments, width)
        targets = batch.inputs["labels"][:, -width:]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return log_probs.masked_fill(targets < 0, 0.0)


class ReadAhead:
    """Reads the next questions while the model is at work on these. What is read depends on the questions alone."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._begun: tuple[tuple[Any, ...], Future[Read]] | None = None

    def begin(self, questions: Sequence[Question], **options: bool) -> None:
        """Begins to read."""
        self._begun = ((list(questions), options), self.engine.read_soon(questions, **options))

    def take(self, questions: Sequence[Question], **options: bool) -> Read:
        """These questions, as they were read meanwhile; read now where others were begun.

        Raises:
            as `Engine.read`.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == (list(questions), options):
            return begun[1].result()
        return self.engine.read_soon(questions, **options).result()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block after which the model's modules are in training mode, and its weights require gradients, as before."""
    training = {module: module.training for module in model.modules()}
    required = {weight: weight.requires_grad for weight in model.parameters()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for weight, wanted in required.items():
            weight.requires_grad_(wanted)


@contextmanager
def _checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Layers of the language model keep their input alone for a backward pass, and run again in it.

    transformers' own gradient checkpointing acts in training mode only, where dropout would act as well.
    """
    layers = list(model.get_decoder().layers) if wanted else []
    forwards = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, forwards, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")


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
