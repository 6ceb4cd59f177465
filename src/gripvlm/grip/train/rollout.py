"""Rollouts: encode an image once, try many subsets of its tokens, score each with the frozen model.

One prefill of the frozen model scores many subsets side by side: the answer is teacher-forced, so a rollout needs no
decoding unless its reward does. Rows of like length run together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gripvlm.api import encode, prune_inputs, visual_tokens
from gripvlm.engine.pipeline import drop
from gripvlm.errors import TrainError
from gripvlm.grip.train.batch import Batch, InTower, Subsets
from gripvlm.grip.train.data import Question
from gripvlm.grip.train.frozen import Around, checkpointed
from gripvlm.grip.train.reading import Read, Reader
from gripvlm.models import adapter
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import family_of
from gripvlm.models.hooks.tower_replay import TowerStates, checked_replay, record_states, replay
from gripvlm.models.prompts import Prompts
from gripvlm.models.tower_rows import TowerDropping, TowerRequest
from gripvlm.models.wrapped import device_of, unwrapped
from gripvlm.tasks import Sample, Task
from gripvlm.types import Selection, VisualTokens

__all__ = ["PSEUDO_LABEL_TOKENS", "Engine", "Rollout", "tokens_per_forward"]

PSEUDO_LABEL_TOKENS = 16
"""The longest answer of the model's own that is forced."""


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


def tokens_per_forward(device: torch.device) -> int:
    """Tokens that run together where no setting says how many.

    Few on a CPU, whose cache holds their activations; with many, moving these takes longer than the products. An
    accelerator needs many.
    """
    return 2048 if device.type == "cpu" else 16384


class Engine:
    """A frozen model and its processor, made ready to score subsets.

    Args:
        model, processor: a supported transformers model and its processor. The model is frozen.
        max_tokens_per_forward: rows times the longest of them, in one forward; a row that is longer runs alone. 0 for
            `tokens_per_forward`.
        bf16: run rollouts under bfloat16 autocast. On the lab this adds a noise of 0.006 to a mean log-probability
            whose spread within a group is 0.2 to 0.4.
        gradient_checkpointing: compute each layer again in the backward pass of soft masks, and store its input alone.
        tower_block: before which block of the vision tower tokens are dropped (`rerun`); -1 for none.

    Attributes:
        device: that the model computes on.
        rollouts: subsets that were scored so far.
        tokens: that the model has run on so far, without padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        max_tokens_per_forward: int = 0,
        bf16: bool = False,
        gradient_checkpointing: bool = True,
        tower_block: int = -1,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.device = device_of(model)
        self.max_tokens_per_forward = max_tokens_per_forward or tokens_per_forward(self.device)
        self.processor, self.bf16 = processor, bf16
        self.gradient_checkpointing, self.rollouts, self.tokens = gradient_checkpointing, 0, 0
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # Logits at the answer alone, where the model can: a token has as many as the vocabulary, 30 to 150 thousand.
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends: list[int] = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        self.end = self._end_of_turn()
        self.reader = Reader(model, processor, self.end)
        self.tower_block = tower_block
        if tower_block >= 0:
            checked_replay(self.model, family_of(self.model), tower_block)

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
        """`encode` of what the reader reads.

        Raises:
            as those do.
        """
        options = {"pseudo_labels": pseudo_labels, "whole_prompt": whole_prompt}
        return self.encode(self.reader.soon(questions, **options).result())

    @torch.no_grad()
    def encode(self, read: Read) -> Batch:
        """Questions with their pictures encoded, each once."""
        tower: InTower | None = None
        if self.tower_block >= 0:
            encoded, tower = self._encode_with_states(read)
        else:
            encoded = encode(self.model, read.pictures)
        encoded = encoded.take(read.shown)
        tokens = visual_tokens(self.model, read.prompts, question=read.question, encoded=encoded)
        tasks, samples = [task for task, _ in read.questions], [sample for _, sample in read.questions]
        answers = read.answers
        # The batch is generated whole, also where one answer is lacking: rows are cheap beside the call.
        if not all(answers):
            answers = [mine or own for mine, own in zip(answers, self._own_answers(read.prompts, encoded), strict=True)]
        inputs = self._with_answers(read.prompts, answers)
        return Batch(tasks, samples, answers, read.prompts, inputs, encoded, tokens, tower=tower)

    def _encode_with_states(self, read: Read) -> tuple[Encoded, InTower]:
        """The pictures encoded, each once, with what the vision tower's stage of the scorer reads.

        Raises:
            TrainError: a question about several pictures, or about one in tiles.
        """
        tokens: list[VisualTokens] = []

        def look(images: list[VisualTokens]) -> list[Tensor]:
            tokens.extend(images)
            return [torch.arange(image.n, device=image.device) for image in images]

        # The very tokens that a pruner gets there; as all are kept, the tower stays its own.
        dropping = TowerDropping(self.tower_block, lambda n: n, look, frozenset({"features"}))
        with record_states(self.model, self.tower_block) as seen:
            encoded = self._encoded(read.pictures, TowerRequest(dropping=dropping, keys=True))
        if any(len(items) != 1 for items in encoded.samples):
            raise TrainError(
                "a scorer with a stage inside the vision tower is trained on questions about one picture, in one "
                "piece: leave the others out of --data, or train without --tower-block"
            )
        return encoded, InTower(seen, tokens, read.shown, read.pictures["pixel_values"][:1])

    def _encoded(self, inputs: dict[str, Any], wanted: TowerRequest) -> Encoded:
        prompts = Prompts.of(unwrapped(self.model), inputs)
        return adapter.encode(prompts, family_of(unwrapped(self.model)), wanted)

    @torch.no_grad()
    def rerun(self, batch: Batch, rows: Sequence[int], kept: Sequence[Tensor]) -> Batch:
        """Questions of the batch, each with a picture of which the vision tower dropped all but some rows.

        Only the blocks behind `tower_block` run, from the states that `encode` stored.

        Args:
            rows: [R] questions.
            kept: [R] the rows that stay of each one's picture, ascending.

        Returns:
            R questions; their tokens have `tower_rows`, and zeros where rows were dropped.
        """
        assert batch.tower is not None
        assert batch.tower.seen.states is not None
        samples: dict[int, Any] = {}
        expanded, place = batch.take(rows), torch.tensor(batch.tower.shown, device=batch.tower.seen.states.device)
        outputs = batch.encoded.outputs
        ids = {name: batch.prompts[name] for name in ("input_ids", "attention_mask") if name in batch.prompts}
        # The tower drops as many rows of all pictures that it takes at once.
        for count in sorted({len(each) for each in kept}):
            part = [r for r, each in enumerate(kept) if len(each) == count]
            questions = torch.tensor([rows[r] for r in part], device=place.device)
            chosen = [kept[r] for r in part]
            dropping = _dropping_all_but(chosen, self.tower_block)
            seen = TowerStates(batch.tower.seen.states[place[questions]], batch.tower.seen.tuples)
            inputs: dict[str, Any] = {name: value[questions] for name, value in ids.items()}
            inputs["pixel_values"] = batch.tower.pixels.expand(len(part), *batch.tower.pixels.shape[1:])
            with replay(self.model, self.tower_block, seen):
                encoded = self._encoded(inputs, TowerRequest(dropping=dropping))
            samples |= dict(zip(part, encoded.samples, strict=True))
            outputs = encoded.outputs
        expanded.encoded = Encoded(batch.encoded.model_type, tuple(samples[r] for r in range(len(rows))), outputs)
        expanded.tokens = [
            [replace(own[0], features=items[0].features, tower_rows=items[0].tower_rows)]
            for own, items in zip(expanded.tokens, expanded.encoded.samples, strict=True)
        ]
        if batch.full_logits is not None:
            expanded.full_logits = batch.full_logits[torch.tensor(rows, device=batch.full_logits.device)]
        return expanded

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
        self.rollouts += len(rows)
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
        """[R] greedy answers to the questions `rows` with only the tokens of `subsets` left.

        Each ends after its own task's `max_new_tokens`, whatever else is in the batch.
        """
        texts = [""] * len(rows)
        limits = [batch.tasks[row].max_new_tokens for row in rows]
        longest = max(limits)
        for part in self.parts(batch, rows, subsets, longest):
            arguments = self.pruned(batch, batch.prompts, [rows[r] for r in part], [subsets[r] for r in part])
            length = arguments["input_ids"].shape[1]
            new = self.model.generate(**arguments, max_new_tokens=longest, do_sample=False)[:, length:].tolist()
            own = [ids[: limits[r]] for r, ids in zip(part, new, strict=True)]
            for r, text in zip(part, self.tokenizer.batch_decode(own, skip_special_tokens=True), strict=True):
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
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

    def forced_log_probs(self, batch: Batch, arguments: dict[str, Any], inside: Around = nullcontext) -> Tensor:
        """[B, T] log-probabilities of the forced answers that end the prompts of `arguments`, 0 at padding.

        Args:
            inside: makes the block in which layers run, also where backward runs them again.
        """
        width = batch.longest
        with inside(), checkpointed(self.model, self.gradient_checkpointing and torch.is_grad_enabled(), inside):
            logits = self._last_logits(arguments, width)
        targets = batch.inputs["labels"][:, -width:]
        log_probs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        return log_probs.masked_fill(targets < 0, 0.0)


def _dropping_all_but(kept: list[Tensor], block: int) -> TowerDropping:
    """All rows of each image but those of `kept`, as many of each, are dropped before the block."""
    return TowerDropping(block, lambda n: len(kept[0]), lambda images: kept, frozenset({"features"}))
