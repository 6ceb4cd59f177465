"""The model `gripvlm` of lmms-eval: any supported vision-language model, answering with pruned visual tokens.

    lmms-eval --model gripvlm --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=divprune,keep=64 --tasks pope

lmms-eval finds it by the entry point in pyproject.toml; written against and tested with lmms-eval 0.7.3 and the rest of
locks/lmms.txt (`make test-lmms`). lmms-eval logs an exception and exits with 0, so what stops a run here is a
SystemExit, which exits with 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

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

_SETTINGS = ("num_beams", "temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size")
_READ = {"until", "max_new_tokens", "do_sample", *_SETTINGS}


class GripVLM(lmms):
    """What `--model_args` sets.

    Args:
        pretrained: lab, a local folder, or a Hugging Face hub id.
        pruner: a name or spec from `gripvlm list`; a spec with commas in quotes. By default nothing is pruned.
        keep: 64, 0.1 or 10%, as on gripvlm's own command line; at most so many as ≤64, since lmms-eval splits at
            each =.
        positions: original or renumbered.
        dtype: auto, float32, bfloat16 or float16.
        device: as PyTorch names it; by default the first accelerator there is, or the process's own under accelerate.
        batch_size: prompts at a time.
        max_batch_size: not read; lmms-eval hands it to every model.
        attn_implementation: as in transformers.
        max_new_tokens: for tasks that name no length.

    Every process of `accelerate launch` holds the whole model and answers its share of the questions.

    Raises:
        GripError: a name or a value that is not known; said before the model is loaded.
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
        self.pruner = checked_pruner(str(pruner).strip("'\""))
        self.keep = checked_budget(self.pruner, None if keep is None else Budget(str(keep)))
        self.positions, self.max_new_tokens = positions, int(max_new_tokens)
        checked_positions(positions)
        self.batch_size = int(batch_size)
        quiet()
        self._model, self.processor = load_model(pretrained, self._place(device), dtype, attn_implementation)
        checked_pruner(self.pruner, self._model)
        self.kept = self.seen = 0.0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> GripVLM:
        """What lmms-eval calls with `--model_args`.

        Raises:
            SystemExit: a setting that is refused, or a filelock that lmms-eval itself cannot work with.
        """
        with _stops():
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

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refused: pruned prompts are answered, not scored."""
        raise self._refused(requests, "the log-likelihood of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused: a later round would have to prune anew what an earlier one dropped."""
        raise self._refused(requests, "several rounds")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            SystemExit: a request that cannot be answered.
        """
        with _stops():
            return self._answers(requests)

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="gripvlm") as bar:
            for places, settings in self._batches(requests):
                read = {place: self._read(requests[place]) for place in places}
                shown = [place for place in places if read[place][1]]
                for mine in (shown, [place for place in places if place not in shown]):
                    texts, images = [read[place][0] for place in mine], [read[place][1] for place in mine]
                    said = self._answer(texts, images, settings) if mine else []
                    for place, answer in zip(mine, said, strict=True):
                        answers[place] = answer
                        self.cache_hook.add_partial("generate_until", requests[place].args[:2], answer)
                bar.update(len(places))
        if self.seen:
            share = f"{100 * self.kept / self.seen:.1f} %"
            logger.info(f"gripvlm: {self.pruner.name} kept {share} of the visual tokens of {len(requests)} prompts")
        return answers

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
        """Places of requests with the same generation settings, and these."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        for places in groups.values():
            settings = requests[places[0]].args[1]
            if ignored := sorted(set(settings) - _READ):
                logger.warning(f"gripvlm does not use the task's generation settings {', '.join(ignored)}")
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size], settings

    def _read(self, request: Any) -> tuple[str, list[Image.Image]]:
        """The text and the pictures of a request."""
        text, _, visual, number, task, split = request.args
        pictures = visual(self.task_dict[task][split][number]) or []
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise InputError(
                    f"task {task!r} shows a {type(picture).__name__} in question {number}; gripvlm prunes pictures: "
                    "choose a task of pictures"
                )
        return text, [picture.convert("RGB") for picture in pictures]

    def _answer(
        self, texts: Sequence[str], images: Sequence[list[Image.Image]], settings: Mapping[str, Any]
    ) -> list[str]:
        """One batch, all with pictures or all without; decoded and cut at the task's stop words."""
        inputs = make_inputs(self.model, self.processor, texts, images if images[0] else None)
        question = question_ids(self.processor, texts)
        pruning = prune(self.model, self.pruner, self.keep, positions=self.positions, question=question)
        with pruning as record, torch.no_grad():
            output = self.model.generate(**inputs, **self._settings(settings))
        selections = [one for mine in record.selections for one in mine]
        self.kept += sum(one.paid for one in selections)
        self.seen += sum(one.n for one in selections)
        said = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, settings.get("until") or ()).strip() for text in said]

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` is told: greedy, unless the task samples with a temperature."""
        sample = bool(settings.get("do_sample", True)) and bool(settings.get("temperature") or 0)
        given = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        if not sample:
            given = {name: value for name, value in given.items() if name not in ("temperature", "top_p", "top_k")}
        return given | {
            "max_new_tokens": int(settings.get("max_new_tokens") or self.max_new_tokens),
            "do_sample": sample,
        }

    def _refused(self, requests: Sequence[Any], what: str) -> SystemExit:
        tasks = sorted({str(getattr(request, "task_name", "?")) for request in requests})
        return SystemExit(
            f"gripvlm answers tasks of the type generate_until; {', '.join(tasks)} asks for {what}: choose its "
            "generate_until variant"
        )


@contextmanager
def _stops() -> Iterator[None]:
    """Ends the process with exit code 1 and one line where gripvlm refuses something."""
    try:
        yield
    except GripError as error:
        raise SystemExit(f"gripvlm: {error}") from error


def _check_filelock() -> None:
    """lmms-eval 0.7.3 reaches into filelock, after the model is loaded, for what filelock 4.3 no longer has."""
    reach = getattr(evaluator, "_enable_reentrant_filelocks", lambda: None)
    try:
        reach()
    except ImportError as error:
        raise GripError(
            f"lmms-eval {version('lmms_eval')} does not work with filelock {version('filelock')} ({error}): type "
            'pip install "filelock<4.3"; make test-lmms installs versions that work together (locks/lmms.txt)'
        ) from error


def _cut(text: str, until: str | Iterable[str]) -> str:
    """The text before the first of the stop words."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.partition(stop)[0] if stop else text
    return text
