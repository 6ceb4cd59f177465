"""One batch of prompts under one setting: a run, timed or counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from gripvlm.api import encode, prune_inputs, pruned_run
from gripvlm.bench.roofline import Counts, flop_counter
from gripvlm.budget import Budget
from gripvlm.engine.record import Record
from gripvlm.errors import BudgetError
from gripvlm.models.adapter import encoder_arguments
from gripvlm.models.compat import cache_of
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import family_of
from gripvlm.models.hooks.tower_drop import drop_in_tower
from gripvlm.models.prompts import Prompts
from gripvlm.models.smaller import interpolated_positions
from gripvlm.models.tower_rows import TowerDropping
from gripvlm.pruners import Pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.types import VisualTokens
from gripvlm.utils.timing import device_time


@dataclass(frozen=True)
class Setting:
    """What a run does with the visual tokens.

    Attributes:
        kind: "full", all of them; "limit", a prompt that had so few from the start; "tower_limit", the same behind a
            vision tower that had few patches from its first block on; "pruned"; "downsample", smaller pictures.
        keep: the budget; None for full.
        pruner, spec: of "pruned", and how it was typed; a spec of "downsample" too.
        tower_keep: rows that the tower has: of "tower_limit", and of a pruner that drops inside the tower.
    """

    kind: str
    keep: Budget | None = None
    pruner: Pruner | None = None
    spec: str = ""
    tower_keep: Budget | None = None

    @property
    def name(self) -> str:
        if self.kind == "tower_limit":
            return f"limit {self.keep}, tower {self.tower_keep}"
        return self.kind if self.keep is None else f"{self.spec or self.kind} {self.keep}"

    @property
    def columns(self) -> dict[str, Any]:
        """What rows know it by."""
        keep = None if self.keep is None else self.keep.plain
        tower = None if self.tower_keep is None else self.tower_keep.plain
        columns = {"kind": self.kind, "setting": self.name, "pruner": self.spec or None}
        return columns | {"keep": keep, "tower_keep": tower}


FULL = Setting("full")


class _FirstToken(LogitsProcessor):
    """Reads a meter when the first new token's logits are there; forbids tokens that end or that stand for images."""

    def __init__(self, read: Callable[[], float], forbidden: Tensor) -> None:
        self.read, self.forbidden = read, forbidden
        self.first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.first is None:
            self.first = self.read()
        return scores.index_fill(-1, self.forbidden, -torch.inf)  # type: ignore[return-value]


class _Run(NamedTuple):
    """What a meter read at the beginning of a run and after each of its phases."""

    began: float
    encoded: float  # of a pruned run `began`: its encoder runs inside the block, and the record knows its time
    ready: float
    first: float
    ended: float
    record: Record | None
    cache: Any


class Cell:
    """B prompts of one length, ready to be run under any setting.

    Args:
        model: a supported transformers model.
        inputs: of the B prompts, one image a prompt or more.
        keeps: budgets that limits are wanted for; one that these images do not have fails when it is run.
        new: tokens to generate, at least 2.
        smaller: budget -> inputs of the same prompts with smaller pictures, or why there are none.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        keeps: Sequence[Budget],
        new: int,
        smaller: Mapping[Budget, Mapping[str, Any] | BudgetError] = MappingProxyType({}),
    ) -> None:
        self.model, self.inputs, self.new, self.smaller = model, dict(inputs), new, smaller
        self.prompts, self.family = Prompts.of(model, self.inputs), family_of(model)
        self.forbidden = forbidden(model)
        # limits are made here, before any clock starts: they stand for a model that got so few tokens for nothing
        encoded = encode(model, inputs)
        # tokens of each image, in order
        self.sizes = [item.features.shape[0] for sample in encoded.samples for item in sample]
        self.received: dict[Budget | None, dict[str, Any]] = {
            None: prune_inputs(model, inputs, "keep_all", encoded=encoded)
        }
        self.unreached: dict[Budget, BudgetError] = {}
        for keep in keeps:
            try:
                self.received[keep] = _received(model, inputs, encoded, keep, self.received[None])
            except BudgetError as error:
                self.unreached[keep] = error

    def _smaller(self, keep: Budget | None) -> Mapping[str, Any]:
        """Inputs with smaller pictures.

        Raises:
            BudgetError: there are none.
        """
        assert keep is not None
        found = self.smaller[keep]
        if isinstance(found, BudgetError):
            raise found
        return found

    def timed(self, setting: Setting) -> tuple[dict[str, float], int | None]:
        """Seconds of each of `PHASES`, and bytes of accelerator memory at most (None where the device can't say)."""
        device = self.model.device
        memory: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
        # the peak of this run, not of the largest one before
        if hasattr(memory, "reset_peak_memory_stats"):
            memory.reset_peak_memory_stats(device)
        # waits until the device is done, so that a phase holds its own work only
        run = self._run(setting, lambda: device_time(device))
        seconds = dict.fromkeys(("vision", "pruner", "overhead"), 0.0)
        seconds |= {"vision": run.encoded - run.began} if run.record is None else run.record.seconds
        seconds["other"] = run.ready - run.began - sum(seconds.values())
        seconds |= {"prefill": run.first - run.ready, "first_token": run.first - run.began}
        seconds |= {"decode": run.ended - run.first, "whole": run.ended - run.began}
        peak = memory.max_memory_allocated(device) if hasattr(memory, "max_memory_allocated") else None
        return seconds, peak

    def counted(self, setting: Setting) -> Counts:
        """FLOPs, cache and tokens of one run. Counting costs the host a moment for each operation, so ask it of one
        prompt (`Counts.times`): a vision encoder that works window by window has hundreds of thousands of them a batch.
        """
        # the encoder is counted by itself too: a pruned run has it in one block with the pruner
        with flop_counter() as meter, torch.no_grad():
            self._encoder(setting)
            vision = meter.get_total_flops()
        with flop_counter() as meter:
            run = self._run(setting, meter.get_total_flops)
        total = sum(self.sizes)
        kept = float(total if setting.keep is None else sum(setting.keep.count(n) for n in self.sizes))
        tower = float(total)
        if setting.tower_keep is not None:
            tower = float(sum(setting.tower_keep.count(n) for n in self.sizes))
        if run.record is not None:  # complete only when the block has ended
            kept = run.record.paid
        flops = {"vision": vision, "pruning": run.ready - vision, "prefill": run.first - run.ready}
        flops |= {"decode": run.ended - run.first, "whole": run.ended}
        return Counts({part: int(value) for part, value in flops.items()}, _cache_bytes(run.cache), kept, total, tower)

    @torch.no_grad()
    def _run(self, setting: Setting, read: Callable[[], float]) -> _Run:
        """One run from pixels to the last token, a meter read after each of its phases."""
        with ExitStack() as stack:
            began, record = read(), None
            if setting.kind == "downsample":
                small = self._smaller(setting.keep)
                with interpolated_positions(self.model):
                    pruned = pruned_run(self.model, small, "keep_all")
                    arguments, record = stack.enter_context(pruned)
                encoded = began
            elif setting.pruner is None:
                self._encoder(setting)
                encoded = read()
                arguments = self._arguments(setting)
            else:
                pruned = pruned_run(self.model, self.inputs, setting.pruner, setting.keep)
                arguments, record = stack.enter_context(pruned)
                encoded = began
            ready = read()
            first, output = generated(self.model, arguments, self.new, self.forbidden, read)
            return _Run(began, encoded, ready, first, read(), record, cache_of(output))

    def _arguments(self, setting: Setting) -> dict[str, Any]:
        """Of the unpruned model, or of one that received so few tokens."""
        if setting.keep in self.unreached:
            raise self.unreached[setting.keep]
        return dict(self.received[setting.keep])

    def _encoder(self, setting: Setting) -> None:
        """The vision encoder and projector as the model itself runs them: on smaller pictures, or on fewer patches for
        a limit of the tower."""
        small = setting.kind == "downsample"
        inputs = self._smaller(setting.keep) if small else self.inputs
        # families take different arguments of what their processors return
        function = self.model.base_model.get_image_features
        takes = inspect.signature(function).parameters
        with ExitStack() as stack:
            if small:
                stack.enter_context(interpolated_positions(self.model))
            if setting.kind == "tower_limit" and setting.tower_keep is not None:
                stack.enter_context(drop_in_tower(self.prompts, self.family, _first_rows(setting.tower_keep)))
            function(**{n: inputs[n] for n in encoder_arguments(self.model, inputs) if n in takes})


def generated(
    model: Any, arguments: Mapping[str, Any], new: int, forbidden: Tensor, read: Callable[[], float] = lambda: 0.0
) -> tuple[float, Any]:
    """Exactly `new` tokens: `read()` when the first one's logits were there, and what `generate` returned."""
    meter = _FirstToken(read, forbidden)
    output = model.generate(
        **arguments,
        max_new_tokens=new,
        # a model's own generation config may ask for sampling or beams
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([meter]),
        return_dict_in_generate=True,
    )
    assert meter.first is not None
    return meter.first, output


def forbidden(model: Any) -> Tensor:
    """Token ids that would end an answer or stand for an image."""
    # random weights choose any token, and an answer that ended early would be a shorter measurement
    ends = model.generation_config.eos_token_id
    ids = {*(ends if isinstance(ends, list) else [ends])}
    ids |= {getattr(model.config, f"{name}_token_id", None) for name in ("image", "video")}
    return torch.tensor(sorted(i for i in ids if i is not None), dtype=torch.long, device=model.device)


def _first_rows(keep: Budget) -> TowerDropping:
    """The first rows of each image, from the tower's first block on; choosing them costs nothing."""

    def select(images: list[VisualTokens]) -> list[Tensor]:
        return [torch.arange(tokens.keep, device=tokens.device) for tokens in images]

    return TowerDropping(0, lambda n: keep.count(n, "each image (tower_keep)"), select, frozenset())


def _received(
    model: Any, inputs: Mapping[str, Any], encoded: Encoded, keep: Budget, full: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of prompts that have only so many visual tokens, the first of each image, and no gaps in positions."""
    # falling scores: the first tokens of an image are the best
    scores = [[-torch.arange(float(item.features.shape[0])) for item in sample] for sample in encoded.samples]
    # M-RoPE positions are coordinates in the image and stay; they cost the same
    positions = "renumbered" if full["position_ids"].ndim == 2 else "original"
    arguments: dict[str, Any] = prune_inputs(model, inputs, Given(scores), keep, positions=positions, encoded=encoded)
    return arguments


def _cache_bytes(cache: Any) -> int:
    """Bytes of all keys, values and other states that a cache holds."""
    # by address: layers may share a tensor, which is in memory once
    held = {
        (value.data_ptr(), value.nbytes)
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return sum(size for _, size in held)
