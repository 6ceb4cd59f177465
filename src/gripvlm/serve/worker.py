"""`Worker`: the one thread that owns the model. It takes waiting jobs in batches, prunes and decodes them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchFeature

from gripvlm.api import encode
from gripvlm.budget import Budget
from gripvlm.engine.pipeline import prune_batch
from gripvlm.engine.request import PruneRequest
from gripvlm.errors import GripError
from gripvlm.models.adapter import PER_TOKEN, padding_of
from gripvlm.models.drop import Shortened, drop
from gripvlm.models.encoded import Encoded
from gripvlm.models.prompts import EncodedPrompts, Prompts
from gripvlm.models.wrapped import device_of
from gripvlm.pruners.baselines.keep_all import KeepAll
from gripvlm.serve.chat import Refusal
from gripvlm.serve.controller import Controller, Step
from gripvlm.serve.decoding import Detokenizer, Rows, Sampler, end_tokens
from gripvlm.serve.encodings import EncodingCache
from gripvlm.serve.prompts import Prompt
from gripvlm.serve.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.serve.metrics import Metrics

__all__ = ["Answer", "Job", "Worker"]

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """How a job ended.

    Attributes:
        reason: "stop" or "length".
        tokens: that were decoded.
        prompt: tokens of the prompt that the language model paid for.
        visual, kept: visual tokens before pruning, and those paid for.
        keep: the budget; None without pictures.
    """

    reason: str
    tokens: int
    prompt: float
    visual: int
    kept: float
    keep: Budget | None


@dataclass(eq=False)
class Job:
    """A request on its way through the worker.

    Attributes:
        prompt: what to answer.
        send: called from the worker's thread with each piece of text, and at the end once with an `Answer` or an
            exception.
        arrived: when the last byte of the request was there, on `time.perf_counter`'s clock: how fast a client sends
            is not the server's doing.
        read: when its prompt was ready, and it could have begun.
        cancelled: whether its client has left.
        began: whether it has its first token.
        ended: whether its result was sent.
        keep, paid: the budget, and the visual tokens paid for, once they are known.
    """

    prompt: Prompt
    send: Callable[[str | Answer | Exception], None]
    arrived: float = field(default_factory=time.perf_counter)
    read: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    began: bool = False
    ended: bool = False
    keep: Budget | None = None
    paid: float = 0.0

    def end(self, result: Answer | Exception) -> None:
        """Sends the result, once."""
        if not self.ended:
            self.ended = True
            self.send(result)


class Worker:
    """Answers jobs, a batch at a time.

    A batch holds jobs with one pruner; each keeps its own budget. Their pictures are encoded one prompt after the
    other, so that nothing of a picture depends on the others in the batch. If a batch fails before its first token,
    its jobs run one by one, so that one of them does not cost the others their answers. Whatever ends the thread, all
    jobs that it had taken on are told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        requests: Mapping[str, PruneRequest],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._model, self._tokenizer, self._requests, self._settings = model, tokenizer, requests, settings
        self._metrics = metrics
        self._ends = end_tokens(model)
        self._device = device_of(model)
        self.controller = None if settings.ladder is None else Controller(settings.ladder)
        self.encodings: EncodingCache[bytes, Encoded] = EncodingCache(settings.limits.cache_bytes)
        self._waiting: deque[Job] = deque()
        self._batch: list[Job] = []
        self._condition = threading.Condition()
        self._closing = False
        self._refuses: Callable[[], Refusal] | None = None
        self._thread = threading.Thread(target=self._work, name="gripvlm-serve", daemon=True)
        self.running = 0
        self.batch_seconds = 1.0
        """How long a batch takes, a mean in which the latest count most."""

    # --- called from other threads ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def status(self) -> str:
        """ "ok", "stopping", or "failed" where the thread ends by itself."""
        if self._closing:
            return "stopping"
        # Not the thread alone: it tells its jobs before it ends, and whoever asks next must not hear that all is well.
        return "failed" if self._refuses is _failed or not self._thread.is_alive() else "ok"

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            Refusal: the worker takes no more.
        """
        with self._condition:
            if self._refuses is not None:
                raise self._refuses()
            self._waiting.append(job)
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue, or out of its batch before the next token, as its client has left."""
        with self._condition:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            if not job.began and self.controller is not None:
                self._stepped(self.controller.gave_up(job.arrived, time.perf_counter()))
        self._metrics.cancelled()

    def close(self, seconds: float = 10.0) -> None:
        """Refuses what waits, and ends the thread after the running batch, for which it waits so long."""
        self._closing = True
        self._refuse(stopping)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _refuse(self, why: Callable[[], Refusal]) -> None:
        """Refuses all that comes from now on, and what waits; the first reason stays."""
        with self._condition:
            self._refuses = self._refuses or why
            waiting, self._waiting = list(self._waiting), deque()
            self._condition.notify()
        for job in waiting:
            job.end(self._refuses())

    # --- in the thread ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._batch = batch
                started = time.perf_counter()
                self.running = len(batch)
                self._run(batch)
                self.running, self._batch = 0, []
                self.batch_seconds += 0.3 * (time.perf_counter() - started - self.batch_seconds)
        except BaseException:
            # What is no `Exception` ends the thread: no client may then wait for an answer that never comes.
            logger.critical("the worker has failed", exc_info=True)
            self.running = 0
            self._refuse(_failed)
            for job in self._batch:
                job.end(_failed())

    def _next_batch(self) -> list[Job]:
        """Waits; the oldest job and those that may run with it, none once the worker takes no more."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._refuses is not None)
            same = [job for job in self._waiting if job.prompt.pruner == self._waiting[0].prompt.pruner]
            jobs = same[: self._settings.limits.max_batch]
            for job in jobs:
                self._waiting.remove(job)
            return jobs

    def _run(self, jobs: Sequence[Job]) -> None:
        decoding = False
        try:
            with ExitStack() as stack:
                rows = self._prefill(jobs, stack)
                decoding = True
                self._decode(jobs, rows)
                return
        except Exception as error:  # noqa: BLE001  whatever it was, the next batch may be fine
            if decoding or len(jobs) == 1:
                for job in jobs:
                    job.end(error)
                return
            logger.warning("a batch of %d failed (%s); its requests run one by one", len(jobs), error)
        # Outside of the handler, so that the error no longer holds what the batch had on the device.
        for job in jobs:
            if not job.cancelled:
                self._run([job])

    def _prefill(self, jobs: Sequence[Job], stack: ExitStack) -> Rows:
        """Encodes, prunes and runs the prompts of a batch; hooks stay open until `stack` closes."""
        started = time.perf_counter()
        inputs = collated(self._model, [job.prompt.inputs for job in jobs])
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        text = [int(job.prompt.ids.shape[1]) - job.prompt.visual for job in jobs]
        name, above = jobs[0].prompt.pruner, [0] * len(jobs)
        if name is None:
            shortened, fixed, kept = self._without_pictures(inputs), False, [0.0] * len(jobs)
            encoded_at = started
        else:
            encodings = [self._encoded(job.prompt) for job in jobs]
            encoded_at = time.perf_counter()
            budgets = [job.prompt.keep or self._default_keep(name) for job in jobs]
            for job, budget in zip(jobs, budgets, strict=True):
                job.keep = budget
            questions = [list(job.prompt.question) for job in jobs]
            request = replace(self._requests[name], budgets=budgets, question=questions)
            batch = prune_batch(request, inputs, together(encodings))
            stack.enter_context(batch.running())
            shortened, fixed = batch.shortened, batch.run is not None
        rows = Rows(self._model, shortened, fixed)
        if name is not None:
            # Before the first token is said: on an accelerator nothing has waited for the checks so far.
            batch.checks.raise_if_failed()
            selections = batch.selections if batch.run is None else batch.run.selections()
            kept = [sum(selection.paid for selection in images) for images in selections]
            if request.pruner.may_exceed:
                above = [
                    sum(each.k - budget.count(each.n) for each in images)
                    for images, budget in zip(selections, budgets, strict=True)
                ]
        for job, words, visual, more in zip(jobs, text, kept, above, strict=True):
            job.paid = visual
            self._metrics.pruned(job.prompt.visual, visual, words, more)
        rows.logits.argmax(-1).tolist()  # waits for the device, so that the times are those of the work
        done = time.perf_counter()
        for job in jobs:
            self._metrics.phase("read", job.read - job.arrived)
            self._metrics.phase("queue", started - job.read)
            self._metrics.phase("tower", encoded_at - started)
            self._metrics.phase("prefill", done - encoded_at)
            self._metrics.first_token(done - job.arrived)
            with self._condition:
                job.began = True
                if self.controller is not None and not job.cancelled:  # those that left were counted then
                    self._stepped(self.controller.observe(job.arrived, done))
        return rows

    def _stepped(self, way: Step | None) -> None:
        """Counts a step of the controller, and says so in the log."""
        if way is not None and self.controller is not None:
            self._metrics.stepped(way)
            logger.info("the controller went %s: keep is now %s", way, self.controller.keep.short)

    def _encoded(self, prompt: Prompt) -> Encoded:
        def run() -> Encoded:
            inputs = BatchFeature(prompt.inputs).to(self._device, dtype=self._model.dtype)
            return encode(self._model, inputs, [request.pruner for request in self._requests.values()])

        hits = self.encodings.hits
        encoded = self.encodings.get(prompt.key, run)
        self._metrics.encoded("hit" if self.encodings.hits > hits else "miss")
        return encoded

    def _default_keep(self, pruner: str) -> Budget:
        if isinstance(self._requests[pruner].pruner, KeepAll):
            return Budget(1.0)
        return self._settings.keep if self.controller is None else self.controller.keep

    def _without_pictures(self, inputs: Mapping[str, Any]) -> Shortened:
        prompts = Prompts.of(self._model, inputs)
        none: list[Any] = [[] for _ in prompts.ids]
        images = EncodedPrompts(prompts, Encoded(self._model.config.model_type, tuple(() for _ in none), {}), none)
        shortened = drop(images, none)
        shortened.arguments.pop("mm_encoder_outputs")
        return shortened

    def _decode(self, jobs: Sequence[Job], rows: Rows) -> None:
        started = time.perf_counter()
        config = self._model.generation_config
        active = [(job, Detokenizer(self._tokenizer, job.prompt.stops), Sampler(job.prompt, config)) for job in jobs]
        while active:
            tokens = rows.logits.argmax(-1).tolist()
            kept = []
            for row, (job, text, sample) in enumerate(active):
                try:
                    if not sample.greedy:
                        tokens[row] = sample(text.ids, rows.logits[row])
                    if self._goes_on(job, text, tokens[row], started):
                        kept.append(row)
                except Exception as error:  # noqa: BLE001  it costs this row its answer, and no other
                    job.end(error)
            if len(kept) < len(active):
                active = [active[row] for row in kept]
                if not active:
                    return
                rows.leave(kept)
            self.running = len(active)
            rows.step([tokens[row] for row in kept])

    def _goes_on(self, job: Job, text: Detokenizer, token: int, started: float) -> bool:
        """Takes a token of a job and sends its text; whether there is a next one."""
        if job.cancelled:
            self._metrics.decoded(len(text.ids))
            job.end(Refusal("the client left", status=499, kind="cancelled"))
            return False
        ended = token in self._ends
        if not ended and (piece := text.push(token)):
            job.send(piece)
        if not ended and not text.stopped and len(text.ids) < job.prompt.max_tokens:
            return True
        if rest := text.end():
            job.send(rest)
        words = int(job.prompt.ids.shape[1]) - job.prompt.visual
        reason = "stop" if ended or text.stopped else "length"
        self._metrics.decoded(len(text.ids))
        self._metrics.phase("decode", time.perf_counter() - started)
        job.end(Answer(reason, len(text.ids), words + job.paid, job.prompt.visual, job.paid, job.keep))
        return False


def stopping() -> Refusal:
    return Refusal("the server is stopping: try again later", 503, kind="server_error", retry_after=5)


def _failed() -> Refusal:
    return Refusal("the server has failed and must be restarted; its log says why", 503, kind="server_error")


def collated(model: PreTrainedModel, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The per-token inputs of prompts [1, L_i] as one batch, padded on the left."""
    names = [name for name in PER_TOKEN if isinstance(prompts[0].get(name), Tensor)]
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    return {
        name: torch.cat(
            [
                torch.nn.functional.pad(p[name], (width - p[name].shape[1], 0), value=padding_of(model, name))
                for p in prompts
            ]
        )
        for name in names
    }


def together(encodings: Sequence[Encoded]) -> Encoded:
    """Several encodings of one prompt each, as one of all."""
    return replace(encodings[0], samples=tuple(sample for encoded in encodings for sample in encoded.samples))


def requests_of(model: PreTrainedModel, settings: Settings) -> dict[str, PruneRequest]:
    """Spec -> the checked request of each pruner that is served.

    Raises:
        GripError: a pruner that does not serve this model, or works inside the vision tower or ahead of it.
    """
    requests = {}
    for spec in settings.pruners:
        request = PruneRequest.of(model, spec, 1.0, positions=settings.positions)
        if request.needs.changes_tower:
            raise GripError(
                f"pruner {spec!r} works inside the vision tower or ahead of it, so pictures that are encoded once for "
                "all requests do not serve it: use a pruner that drops at the input"
            )
        requests[spec] = request
    return requests
