"""From a chat to a checked prompt, away from the model: what is wrong with a request is found here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from gripvlm.budget import Budget
from gripvlm.engine.request import PruneRequest
from gripvlm.eval.answering import processed, prompt_text
from gripvlm.models.text import VISUAL, placeholder, visual_places
from gripvlm.pruners import LLMPruner
from gripvlm.pruners.baselines.keep_all import KeepAll
from gripvlm.serve.chat import ChatRequest, Message, PicturePart, Refusal, TextPart
from gripvlm.serve.pictures import read_picture
from gripvlm.serve.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Preparer", "Prompt"]

COLDEST = 1e-5
"""Lower temperatures are 0, as in vLLM: logits divided by them would be infinite."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request, ready for the model.

    Attributes:
        inputs: what the processor returned for this one prompt, on the host.
        key: of its pictures, by their pixels; empty without any.
        pruner: the spec; None without pictures.
        keep: the request's own budget, if it has one.
        question: token ids of the user turn that holds the pictures (the last one that does).
        visual: visual tokens before pruning.
        max_tokens: of the longest answer.
        temperature: 0 for the likeliest token.
        top_p, seed, stops: as in OpenAI's format.
    """

    inputs: Mapping[str, Any]
    key: bytes
    pruner: str | None
    keep: Budget | None
    question: Sequence[int]
    visual: int
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()

    @property
    def ids(self) -> Tensor:
        """[1, L]"""
        return self.inputs["input_ids"]


class Preparer:
    """Makes prompts for one model. May be called from several threads."""

    def __init__(
        self, model: PreTrainedModel, processor: Any, requests: Mapping[str, PruneRequest], settings: Settings
    ) -> None:
        self._model, self._processor, self._settings = model, processor, settings
        self._requests = requests
        self._tokenizer = getattr(processor, "tokenizer", processor)
        config = model.config
        self._placeholders = {
            placeholder(model, name) for name in VISUAL if getattr(config, f"{name}_token_id", None) is not None
        }
        made_for = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._max_len = settings.limits.max_model_len or made_for or 1 << 30
        # No token stands for more letters than it is written with, so a longer text cannot fit.
        self._max_letters = self._max_len * max(map(len, self._tokenizer.get_vocab()))
        # Fast tokenizers change their own state in a call, and fail where two calls meet.
        self._lock = threading.Lock()

    def __call__(self, chat: ChatRequest) -> Prompt:
        """The prompt of a chat.

        Raises:
            GripError: the request is wrong; the message says how.
        """
        limits = self._settings.limits
        keep = self._checked_keep(chat)
        asked = chat.max_completion_tokens or chat.max_tokens
        if asked is not None and asked > limits.max_tokens:
            raise Refusal(f"max_tokens is {asked}, allowed are {limits.max_tokens}: ask for a shorter answer")
        temperature = chat.temperature or 0.0
        self._check_letters(chat.messages)
        pictures = self._pictures(chat.messages)
        with self._lock:
            inputs, question = self._inputs(chat.messages, pictures)
        length, visual = inputs["input_ids"].shape[1], int(visual_places(self._model, inputs["input_ids"]).sum())
        room = self._max_len - length
        if room < (asked or 1):
            raise Refusal(
                f"the prompt has {length} tokens ({visual} of them visual, before pruning) and asks for {asked or 1} "
                f"more, allowed are {self._max_len} in all: make it shorter, or its pictures smaller",
                code="context_length_exceeded",
            )
        if keep is not None and pictures:
            self._check_count(chat, keep, visual, len(pictures))
        return Prompt(
            inputs=inputs,
            key=b"".join(map(_key, pictures)),
            pruner=(chat.pruner or self._settings.pruners[0]) if pictures else None,
            keep=keep,
            question=question,
            visual=visual,
            max_tokens=asked or min(limits.max_tokens, room),
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            stops=chat.stops,
        )

    def _check_letters(self, messages: Sequence[Message]) -> None:
        """Refuses a text before it is cut into tokens: megabytes of it would hold all others up."""
        letters = sum(len(part.text) for message in messages for part in message.parts if isinstance(part, TextPart))
        if letters > self._max_letters:
            raise Refusal(
                f"the prompt has {letters} letters, more than {self._max_len} tokens can hold: make it shorter",
                code="context_length_exceeded",
            )

    def _check_count(self, chat: ChatRequest, keep: Budget, visual: int, pictures: int) -> None:
        """Refuses a budget that the pictures, or the pruner's schedule for them, cannot meet, where sizes say so."""
        count = keep.count(visual, f"this prompt with {pictures} picture{'s' if pictures > 1 else ''}")
        pruner = self._requests[chat.pruner or self._settings.pruners[0]].pruner
        # How the tokens of several pictures are divided, only the vision encoder's output tells.
        if pictures == 1 and isinstance(pruner, LLMPruner):
            pruner.schedule(visual, count, len(self._model.get_decoder().layers))

    def _checked_keep(self, chat: ChatRequest) -> Budget | None:
        name = chat.pruner or self._settings.pruners[0]
        if name not in self._requests:
            raise Refusal(f"pruner {name[:80]!r} is not served: use one of {', '.join(self._requests)}")
        keep = None if chat.keep is None else Budget(chat.keep)
        pruner = self._requests[name].pruner
        if keep is not None and isinstance(pruner, KeepAll) and keep != Budget(1.0):
            raise pruner.refused(f"keep={keep.plain}")
        return keep

    def _pictures(self, messages: Sequence[Message]) -> list[Image.Image]:
        parts = [(message.role, part) for message in messages for part in message.parts]
        found = [(role, part) for role, part in parts if isinstance(part, PicturePart)]
        limits = self._settings.limits
        if len(found) > limits.max_pictures:
            raise Refusal(f"the request has {len(found)} pictures, allowed are {limits.max_pictures}: send fewer")
        if any(role != "user" for role, _ in found):
            raise Refusal("only messages of the role user may hold pictures: move them there")
        return [read_picture(part.image_url.url, self._settings, f"picture {i}") for i, (_, part) in enumerate(found)]

    def _inputs(self, messages: Sequence[Message], pictures: list[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """What the processor makes of the prompt, and the ids of its question."""
        question: list[int] = []
        for message in messages:
            texts = [part.text for part in message.parts if isinstance(part, TextPart)]
            ids = self._ids(" ".join(texts))
            # Templates may put texts side by side, where two halves make a whole.
            if self._placeholders & {*ids, *self._ids("".join(texts))}:
                raise Refusal("a text holds the model's own placeholder of a picture: leave it out")
            if any(isinstance(part, PicturePart) for part in message.parts):
                question = ids
        try:
            text = self._text(messages, len(pictures))
            made = processed(self._processor, [text], [pictures] if pictures else None)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, Refusal):
                raise
            # Processors and templates refuse in many ways: pictures too narrow, roles that do not alternate.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise Refusal(f"the model's processor cannot read this chat: {reason}") from error
        return dict(made), question

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, messages: Sequence[Message], pictures: int) -> str:
        if getattr(self._processor, "chat_template", None):
            try:
                return self._processor.apply_chat_template(
                    [_for_template(message) for message in messages], add_generation_prompt=True, tokenize=False
                )
            except TemplateError as error:
                raise Refusal(f"the model's chat template refuses these messages: {error}") from None
        if len(messages) > 1:
            raise Refusal("this model has no chat template: send one message of the role user")
        return prompt_text(
            self._processor, " ".join(p.text for p in messages[0].parts if isinstance(p, TextPart)), pictures
        )


def _for_template(message: Message) -> dict[str, Any]:
    """A message as templates read it; a text alone stays a text, as some know no other."""
    if isinstance(message.content, str):
        content: Any = message.content
        if message.role == "user":
            content = [{"type": "text", "text": content}]
    else:
        content = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.content
        ]
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _key(picture: Image.Image) -> bytes:
    """32 bytes that only this picture has.

    `VisualTokens.key` is of some thousand values of an image: enough to draw numbers by, not to tell pictures apart.
    """
    key = hashlib.blake2b(b"%d x %d " % picture.size, digest_size=32)
    key.update(picture.tobytes())
    return key.digest()
