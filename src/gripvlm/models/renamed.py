"""Names that transformers changed between the versions that gripvlm supports: each is read here, under any of them.

`tests/models/test_renamed.py` walks the signatures of every supported family, so that the next change fails there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gripvlm.errors import UnsupportedModelError
from gripvlm.models.families import takes

__all__ = ["CACHE", "cache_argument", "cache_in", "cache_of"]

CACHE = ("cache", "past_key_values")
"""The key-value cache, as an argument and as an output field: newest name first. `cache` since transformers 5.24."""


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among a call's keyword arguments, None where there is none."""
    return next((arguments[name] for name in CACHE if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The key-value cache that a model or `generate` returned, None where there is none."""
    if isinstance(output, tuple):  # return_dict=False
        return next((part for part in output if callable(getattr(part, "get_seq_length", None))), None)
    return next((found for name in CACHE if (found := getattr(output, name, None)) is not None), None)


def cache_argument(model: Any) -> str:
    """The name under which this model's `forward` takes a cache.

    Raises:
        UnsupportedModelError: it takes none under a name that gripvlm knows.
    """
    known = takes(model.forward)
    for name in CACHE:
        if name in known:
            return name
    raise UnsupportedModelError(
        f"the forward of {type(model).__name__} takes no cache under a name that gripvlm knows ({', '.join(CACHE)}): "
        "this transformers is newer than gripvlm; pip install -U gripvlm, or an older transformers"
    )
