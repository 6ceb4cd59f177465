"""What differs between the versions of transformers that gripvlm runs on: names, and which versions those are.

`tests/models/test_compat.py` walks the signatures of every supported family, so that the next rename fails there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from gripvlm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers is imported inside functions: `import gripvlm` must not wait for it.

OLDEST = "5.19.0"
"""As in pyproject.toml; `make test-transformers` runs the tests on it."""

NEWEST_TESTED = "5.24.0"
"""As in locks/gripvlm.txt, which `make test` installs. There is no ceiling: see `mention_newer`."""

CACHE = ("cache", "past_key_values")
"""The key-value cache, as an argument and as an output field: newest name first. `cache` since transformers 5.24."""


def installed() -> tuple[int, int]:
    """Major and minor version of the installed transformers."""
    import transformers

    return _minor(transformers.__version__)


def newer_than_tested() -> str | None:
    """A warning where the installed transformers is newer, by major or minor version, than the newest tested one."""
    import transformers

    if installed() <= _minor(NEWEST_TESTED):
        return None
    return (
        f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest that this gripvlm was "
        f'tested with: if something fails, type pip install -U gripvlm, or pip install "transformers=={NEWEST_TESTED}"'
    )


@cache
def mention_newer() -> None:
    """Logs that warning, once a process."""
    if (line := newer_than_tested()) is not None:
        logging.getLogger("gripvlm").warning(line)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def takes(function: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's parameters; those of a class's method are read once."""
    # A bound method is a new object at every access, so the result is cached for the function below it.
    plain = getattr(function, "__func__", None)
    return frozenset(inspect.signature(function).parameters) if plain is None else _parameters(plain)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) - {"self"}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among a call's keyword arguments, None where there is none."""
    return next((arguments[name] for name in CACHE if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The key-value cache that a model or `generate` returned, None where there is none."""
    if isinstance(output, tuple):  # return_dict=False
        return next((part for part in output if is_cache(part)), None)
    return next((value for name in CACHE if (value := getattr(output, name, None)) is not None), None)


def is_cache(value: Any) -> bool:
    """By its method, not by its class: class names differ between versions."""
    return callable(getattr(value, "get_seq_length", None))


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which this model's `forward` takes a cache.

    Raises:
        UnsupportedModelError: it takes none under a name that gripvlm knows.
    """
    names = takes(model.forward)
    for name in CACHE:
        if name in names:
            return name
    raise UnsupportedModelError(
        f"the forward of {type(model).__name__} takes no cache under a name that gripvlm knows ({', '.join(CACHE)}): "
        "this transformers is newer than gripvlm; pip install -U gripvlm, or an older transformers"
    )
