"""OpenAI's chat format: what is read of a request, and how answers and errors look."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gripvlm.errors import GripError

__all__ = ["ChatRequest", "Refusal", "chunk", "completion", "error_body", "parse"]

MANY = 1_000
"""Messages of a request, and parts of a message: an empty one costs no token, but time and memory."""


class Refusal(GripError):
    """A request that gets an error.

    Args:
        message: for the client.
        status: of the HTTP answer.
        code: OpenAI's short name of the error, None where it has none.
        kind: OpenAI's class of errors.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.kind = message, status, code, kind
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


class _Part(BaseModel):
    """Nothing is converted, and what is not known is refused: it might have changed the answer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Picture(_Part):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Part):
    type: Literal["text"]
    text: str


class PicturePart(_Part):
    type: Literal["image_url"]
    image_url: Picture


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str | Annotated[list[Annotated[TextPart | PicturePart, Field(discriminator="type")]], Field(max_length=MANY)]
    )
    name: str | None = None

    @property
    def parts(self) -> list[TextPart | PicturePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


Stop: TypeAlias = Annotated[str, Field(max_length=200)]


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Part):
    """The body of `POST /v1/chat/completions`.

    Fields that we do not have are there with the one value that changes nothing, since clients send them. `keep` and
    `pruner` are our own.
    """

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MANY)
    keep: int | float | str | None = None
    pruner: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


def parse(body: bytes) -> ChatRequest:
    """The request of a body, or a `Refusal` with the first few things that are wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in found[:5]]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise Refusal(f"{'; '.join(lines)}{more}. docs/serving.md lists the fields") from None


def completion(head: Mapping[str, Any], text: str, reason: str, usage: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an answer that is sent at once; `head` are the fields that all of an answer's parts have."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def chunk(
    head: Mapping[str, Any],
    delta: Mapping[str, Any] | None,
    reason: str | None = None,
    usage: Mapping[str, Any] | None = None,
) -> str:
    """A part of a streamed answer, as a server-sent event; without a delta the one that holds the usage."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
    body = {**head, "object": "chat.completion.chunk", "choices": choices}
    return f"data: {json.dumps(body if usage is None else {**body, 'usage': usage})}\n\n"


def error_body(refusal: Refusal) -> dict[str, Any]:
    return {"error": {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.code}}
