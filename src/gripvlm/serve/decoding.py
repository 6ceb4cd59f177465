"""Decoding a batch token by token: rows leave when they are done, and each chooses its tokens in its own way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from gripvlm.models.compat import cache_argument, cache_of, takes
from gripvlm.models.text import padding_token
from gripvlm.serve.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.models.drop import Shortened

__all__ = ["Detokenizer", "Rows", "Sampler", "end_tokens"]

logger = logging.getLogger(__name__)

_PENALTIES: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
    "repetition_penalty": (1.0, RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": (0, NoRepeatNGramLogitsProcessor),
    "suppress_tokens": ((), lambda tokens: SuppressTokensLogitsProcessor(list(tokens), "cpu")),
}
"""Settings of a model's generation config that also shape its likeliest answer -> what changes nothing, and how to
apply it."""

_IGNORED = ("num_beams", "bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")


class Rows:
    """R prompts on one key-value cache.

    Args:
        shortened: the prompts; the model has not run yet.
        fixed: whether rows that are done must stay in the cache, since hooks inside the language model know its rows.
    """

    def __init__(self, model: PreTrainedModel, shortened: Shortened, fixed: bool) -> None:
        self._model, self._fixed = model, fixed
        self._mask, self._following = shortened.arguments["attention_mask"], shortened.following
        arguments = shortened.arguments | {"use_cache": True}
        if "logits_to_keep" in takes(model.forward):
            arguments["logits_to_keep"] = 1
        output = model(**arguments)
        self._cache = cache_of(output)
        self._padding = padding_token(model)
        self._live = list(range(len(self._mask)))
        self.logits: Tensor = output.logits[:, -1]
        """[R, V] of the token that comes next, of the rows that are left."""

    def leave(self, kept: Sequence[int]) -> None:
        """Leaves only these of the rows, in this order."""
        index = torch.tensor(kept, device=self._mask.device)
        self.logits = self.logits[index]
        if self._fixed:
            self._live = [self._live[row] for row in kept]
            return
        # Under this name each kind of layer has it, those with linear attention too.
        self._cache.reorder_cache(index)
        self._mask, self._following = self._mask[index], self._following[..., index]
        self._live = list(range(len(kept)))

    def step(self, tokens: Sequence[int]) -> None:
        """Runs the model on one token of each row."""
        ids = torch.full((len(self._mask), 1), self._padding)
        ids[self._live, 0] = torch.tensor(tokens)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        output = self._model(
            input_ids=ids.to(self._mask.device),
            attention_mask=self._mask,
            position_ids=self._following[..., None],
            use_cache=True,
            **{cache_argument(self._model): self._cache},
        )
        self._following = self._following + 1
        self.logits = output.logits[:, -1][self._live]


class Sampler:
    """Draws, or chooses, the next token of one row."""

    def __init__(self, prompt: Prompt, config: Any) -> None:
        self._prompt = prompt
        self._processors = LogitsProcessorList()
        for name, (neutral, make) in _PENALTIES.items():
            value = getattr(config, name, None)
            if value not in (None, neutral) and value != list(neutral if isinstance(neutral, tuple) else ()):
                self._processors.append(make(value))
        self._random: torch.Generator | None = None
        if prompt.temperature > 0:
            self._processors.append(TemperatureLogitsWarper(prompt.temperature))
            if prompt.top_p < 1:
                self._processors.append(TopPLogitsWarper(prompt.top_p))
            self._random = torch.Generator()
            if prompt.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(prompt.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the token with the highest logit, which is found for all such rows at once."""
        return not self._processors

    def __call__(self, said: Sequence[int], logits: Tensor) -> int:
        """The token to say after `said`.

        Args:
            logits: [V]
        """
        # On the host, so that a seed draws the same on every device, and in any batch.
        scores = logits[None].float().cpu()
        scores = self._processors(
            torch.cat((self._prompt.ids, torch.tensor([list(said)], dtype=torch.long)), -1), scores
        )
        if self._random is None:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end an answer. Warns of settings beside them that this decoding does not have."""
    for name in _IGNORED:
        if getattr(model.generation_config, name, None) not in (None, 1, []):
            logger.warning("the model's generation config sets %s, which the server does not apply", name)
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


class Detokenizer:
    """Token ids that come one by one, as text that can be sent.

    A letter may be several tokens, and a stop text may begin where it is not yet known whether it goes on: what may
    still change is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self.ids: list[int] = []
        self._held = ""
        self._start = self._read = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain."""
        self.ids.append(token)
        return self._certain(self._decoded(final=False), final=False)

    def end(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._certain(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        """The text of the tokens since the last time, which depends on the tokens before."""
        decode = self._tokenizer.decode
        before = decode(self.ids[self._start : self._read], skip_special_tokens=True)
        after = decode(self.ids[self._start :], skip_special_tokens=True)
        if not final and after.endswith("\ufffd"):  # half a letter
            return ""
        self._start, self._read = self._read, len(self.ids)
        return after[len(before) :]

    def _certain(self, new: str, final: bool) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that a stop text begins with.
        ends = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        hold = 0 if final else max(ends, default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
