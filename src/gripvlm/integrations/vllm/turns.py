"""Which words of a prompt are the question about a picture: the user's turn that holds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

__all__ = ["Turns"]

_WORDS = ("gripvlm-first", "gripvlm-answer", "gripvlm-second")
"""Texts that no chat template contains."""


class Turns:
    """Finds the turn of a picture in token ids, by what the model's chat template puts around one.

    Args:
        processor: its chat template is read.
        tokenizer: of the same model.
        placeholder: the token id that stands for a picture in a prompt.
    """

    def __init__(self, processor: Any, tokenizer: Any, placeholder: int) -> None:
        self._processor, self._tokenizer, self._placeholder = processor, tokenizer, placeholder
        self._mark = tokenizer.decode([placeholder])
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = {*tokenizer.all_special_tokens, *added} - {self._mark}
        self._head = lru_cache(maxsize=16)(self._render_head)

    def question(self, ids: Sequence[int], image: int) -> tuple[int, ...]:
        """The token ids of the question about the picture `image` of a prompt.

        That is the text of the user's turn that holds it, as `gripvlm serve` takes it. A prompt that is not in the
        form of the model's chat template is one turn.

        Args:
            ids: the prompt, one placeholder for each picture.
        """
        places = [place for place, token in enumerate(ids) if token == self._placeholder]
        before, after = self._text(ids[: places[image]]), self._text(ids[places[image] + 1 :])
        if self._around is not None:
            opening, between, closing = self._around
            start = before.rfind(between) + len(between) if between and between in before else 0
            if not start and opening and opening in before:
                start = before.index(opening) + len(opening)
            before, after = before[start:], after.partition(closing)[0]
        text = self._without_special(f"{before} {self._mark} {after}")
        # Templates may number the pictures of a turn: these words are not the user's.
        if (head := self._head(text.count(self._mark)).match(text)) is not None:
            text = text[head.end() :]
        text = text.replace(self._mark, " ").strip()
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _as_decoded(self, text: str) -> str:
        """A text as it looks after tokenization, which may change its spaces."""
        return self._text(self._tokenizer.encode(text, add_special_tokens=False)).strip()

    def _without_special(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, "")
        return text.strip()

    def _render(self, *turns: str, pictures: int = 0) -> str:
        """A chat of user, assistant, user ... as the template writes it, waiting for an answer."""
        messages = [
            {
                "role": ("user", "assistant")[number % 2],
                "content": [{"type": "image"}] * pictures * (not number) + [{"type": "text", "text": text}],
            }
            for number, text in enumerate(turns)
        ]
        template: Callable[..., str] = self._processor.apply_chat_template
        return template(messages, add_generation_prompt=True, tokenize=False)

    @cached_property
    def _around(self) -> tuple[str, str, str] | None:
        """What comes before the first user's text, between an answer and the next one's, and after a user's text."""
        if not getattr(self._processor, "chat_template", None):
            return None
        first, answer, second = _WORDS
        opening, _, end = self._render(first).partition(first)
        _, _, rest = self._render(*_WORDS).partition(first)
        reply, _, rest = rest.partition(answer)
        between, _, _ = rest.partition(second)
        closing = self._as_decoded(_common_start(end, reply))
        # Without an end to a turn there is no telling turns apart.
        return (self._as_decoded(opening), self._as_decoded(between), closing) if closing else None

    def _render_head(self, pictures: int) -> re.Pattern[str]:
        """What the template puts between the start of a turn and its text, where its pictures come first."""
        head = ""
        if self._around is not None:
            whole = self._as_decoded(self._render(_WORDS[0], pictures=pictures).partition(_WORDS[0])[0])
            head = self._without_special(whole.removeprefix(self._around[0]))
        return re.compile(r"\s*".join(map(re.escape, head.replace(self._mark, f" {self._mark} ").split())))


def _common_start(a: str, b: str) -> str:
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
