"""Encoded pictures that are kept: a second question about the same picture does not run the vision encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["EncodingCache"]

T = TypeVar("T")
Key = TypeVar("Key", bytes, str)


class EncodingCache(Generic[Key, T]):
    """The encodings used last, as many as fit into so many bytes.

    An entry is a picture, or all pictures of a prompt where what a processor makes of one depends on the others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[Key, tuple[T, int]] = OrderedDict()
        self.hits = self.misses = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def get(self, key: Key, encode: Callable[[], T]) -> T:
        """The encoding of this key: a kept one, or what `encode` returns."""
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key][0]
        self.misses += 1
        encoded = encode()
        size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(encoded))
        if size <= self._max_bytes:
            self._entries[key] = (encoded, size)
            self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][1]
        return encoded


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in fields(value)))
