"""The model `gripvlm` of lmms-eval: any supported vision-language model, answering with pruned visual tokens.

    lmms-eval --model gripvlm --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=divprune,keep=64 --tasks pope

lmms-eval finds it by the entry point in pyproject.toml; tested with lmms-eval 0.7.3 and the rest of locks/lmms.txt
(`make test-lmms`). lmms-eval logs exceptions and exits with 0, so errors here are a SystemExit, which exits with 1.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import torch
from lmms_eval import evaluator
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm

from gripvlm.api import prune
from gripvlm.budget import Budget
from gripvlm.engine.request import checked_budget, checked_positions, checked_pruner
from gripvlm.errors import GripError, InputError
from gripvlm.eval.answering import make_inputs, question_ids
from gripvlm.models.loading import load_model, quiet

__all__ = ["GripVLM"]

_GENERATION = ("num_beams", "temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size")
_USED = {"until", "max_new_tokens", "do_sample", *_GENERATION}


class GripVLM(lmms):
    """What `--model_args` sets.

    Args:
        pretrained: lab, lab-dense, a local folder, or a Hugging Face hub id.
        pruner: a name or spec from `gripvlm list`; a spec with commas in quotes. By default nothing is pruned.
        keep: 64, 0.1 or 10%, as on gripvlm's own command line; at most 64 is ≤64, since lmms-eval splits at each =.
        positions: original or renumbered.
        dtype: auto, float32, bfloat16 or float16.
        device: as PyTorch names it; by default the first accelerator there is, or the process's own under accelerate.
        batch_size: prompts at a time.
        max_batch_size: not used; lmms-eval passes it to every model.
        attn_implementation: as in transformers.
        max_new_tokens: for tasks that name no length.

    Every process of `accelerate launch` holds the whole model and answers its share of the questions.

    Raises:
        GripError: a name or a value that is not known; raised before the model is loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        pruner: str = "full",
        keep: int | float | str | None = None,
        positions: str = "original",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = 1024,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise GripError(
                f"--model_args has {', '.join(map(repr, unknown))}, which gripvlm does not know: type pretrained, "
                "pruner, keep, positions, dtype, device, batch_size, attn_implementation or max_new_tokens; a pruner's "
                "options with commas go in quotes, pruner='random:seed=3,...'"
            )
        if not pretrained:
            raise GripError("no model: type --model_args pretrained=lab, a folder or a hub id")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise GripError(f"--batch_size {batch_size}: type a number, 1 or more")
        # Quotes keep lmms-eval from splitting a spec at its commas, and arrive here with it.
        self.pruner = checked_pruner(str(pruner).strip("'\""))
        # lmms-eval has made 64 an int and 0.1 a float; as text they are read as on our own command line.
        self.keep = checked_budget(self.pruner, None if keep is None else Budget(str(keep)))
        self.positions, self.max_new_tokens = positions, int(max_new_tokens)
        checked_positions(positions)
        self.batch_size = int(batch_size)
        quiet()
        # lmms-eval itself reads `device` under accelerate.
        self.model, self.processor = load_model(pretrained, self._place(device), dtype, attn_implementation)
        self.device, self.tokenizer = self.model.device, getattr(self.processor, "tokenizer", self.processor)
        # Again, now that the model is there: the pruner may need what it cannot supply.
        checked_pruner(self.pruner, self.model)
        self.kept = self.seen = 0.0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> GripVLM:
        """What lmms-eval calls with `--model_args`.

        Raises:
            SystemExit: a setting that is refused, or a filelock that lmms-eval itself cannot work with.
        """
        with _exit_on_error():
            _check_filelock()
            made: GripVLM = super().create_from_arg_string(arg_string, additional_config)
        return made

    def _place(self, device: str | None) -> str | None:
        """The device to load on; under accelerate each process has its own."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        if accelerator.num_processes == 1:
            return device
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        return str(accelerator.device)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refused: pruned prompts are answered, not scored."""
        _refuse(requests, "the log-likelihood of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused: a later round would have to prune again what an earlier one dropped."""
        _refuse(requests, "several rounds")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            SystemExit: a request that cannot be answered.
        """
        with _exit_on_error():
            return self._answers(requests)

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="gripvlm") as bar:
            for indices, settings in self._batches(requests):
                questions = {index: self._question(requests[index]) for index in indices}
                # The processor takes batches that all have images, or none.
                with_images = [index for index in indices if questions[index][1]]
                without = [index for index in indices if not questions[index][1]]
                for batch in filter(None, (with_images, without)):
                    texts, images = zip(*(questions[index] for index in batch), strict=True)
                    for index, text in zip(batch, self._answer(texts, images, settings), strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args[:2], text)
                bar.update(len(indices))
        if self.seen:
            share = f"{100 * self.kept / self.seen:.1f} %"
            logger.info(f"gripvlm: {self.pruner.name} kept {share} of the visual tokens of {len(requests)} prompts")
        return answers

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        """Indices of requests with the same generation settings, and these settings."""
        # One `generate` call has one set of settings for the whole batch.
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            settings = requests[indices[0]].args[1]
            if ignored := sorted(set(settings) - _USED):
                logger.warning(f"gripvlm does not use the task's generation settings {', '.join(ignored)}")
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size], settings

    def _question(self, request: Any) -> tuple[str, list[Image.Image]]:
        """The text and the images of a request."""
        text, _, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number]) or []
        for image in images:
            if not isinstance(image, Image.Image):
                raise InputError(
                    f"task {task!r} shows a {type(image).__name__} in question {number}; gripvlm prunes images: choose "
                    "a task of images"
                )
        return text, [image.convert("RGB") for image in images]

    def _answer(
        self, texts: Sequence[str], images: Sequence[list[Image.Image]], settings: Mapping[str, Any]
    ) -> list[str]:
        """One batch, all with images or all without; decoded and cut at the task's stop words."""
        inputs = make_inputs(self.model, self.processor, texts, images if images[0] else None)
        question = question_ids(self.processor, texts)
        pruning = prune(self.model, self.pruner, self.keep, positions=self.positions, question=question)
        with pruning as record, torch.no_grad():
            output = self.model.generate(**inputs, **self._settings(settings))
        for selection in itertools.chain.from_iterable(record.selections):
            self.kept += selection.paid
            self.seen += selection.n
        decoded = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        until = settings.get("until") or ()
        for stop in filter(None, [until] if isinstance(until, str) else until):
            decoded = [text.partition(stop)[0] for text in decoded]
        return [text.strip() for text in decoded]

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: greedy, unless the task samples with a temperature."""
        # Tasks say "greedy" in two ways: do_sample false, or a temperature of 0.
        sample = bool(settings.get("do_sample", True)) and bool(settings.get("temperature") or 0)
        # transformers warns at every call about settings of sampling that greedy decoding does not use.
        names = [name for name in _GENERATION if sample or name not in ("temperature", "top_p", "top_k")]
        length = int(settings.get("max_new_tokens") or self.max_new_tokens)
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        return given | {"max_new_tokens": length, "do_sample": sample}


def _refuse(requests: Sequence[Any], what: str) -> NoReturn:
    tasks = sorted({str(getattr(request, "task_name", "?")) for request in requests})
    raise SystemExit(
        f"gripvlm answers tasks of the type generate_until; {', '.join(tasks)} asks for {what}: choose its "
        "generate_until variant"
    )


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Ends the process with exit code 1 and one line for an error of gripvlm's."""
    try:
        yield
    except GripError as error:
        raise SystemExit(f"gripvlm: {error}") from error


def _check_filelock() -> None:
    """lmms-eval 0.7.3 uses, after the model is loaded, a private name that filelock 4.3 no longer has."""
    enable_reentrant_locks = getattr(evaluator, "_enable_reentrant_filelocks", lambda: None)
    try:
        enable_reentrant_locks()
    except ImportError as error:
        raise GripError(
            f"lmms-eval {version('lmms_eval')} does not work with filelock {version('filelock')} ({error}): type "
            'pip install "filelock<4.3"; make test-lmms installs versions that work together (locks/lmms.txt)'
        ) from error
