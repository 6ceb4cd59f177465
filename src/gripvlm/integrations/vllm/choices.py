"""What a server offers, what a request chooses, and how a choice travels to the model; knows nothing of vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gripvlm.budget import Budget
from gripvlm.engine.request import checked_budget, checked_positions, checked_pruner
from gripvlm.errors import InputError, PrunerError
from gripvlm.pruners import Pruner
from gripvlm.pruners.baselines.keep_all import KeepAll

__all__ = ["REQUEST", "Picture", "Settings", "Shown"]

REQUEST = ("keep", "pruner", "question")
"""What a request may put into `mm_processor_kwargs`."""


@dataclass(frozen=True)
class Settings:
    """What a server offers. It travels as `gripvlm` in the model's config.

    Attributes:
        pruners: specs that requests may name; the first is used where they name none.
        keep: for requests that name none; None for the pruner's own.
        positions: "original" or "renumbered".
        cache_mb: megabytes of encoded pictures that are kept, unpruned, for further questions.
    """

    pruners: tuple[str, ...]
    keep: str | None = None
    positions: str = "original"
    cache_mb: float = 256

    def __post_init__(self) -> None:
        checked_positions(self.positions)
        if not self.cache_mb >= 0:
            raise InputError(f"cache_mb={self.cache_mb}: pass megabytes, 0 or more")
        self.budget({})

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Those in a model's config.

        Raises:
            InputError: there are none.
        """
        given = getattr(config, "gripvlm", None)
        if not isinstance(given, Mapping):
            raise InputError(
                "this model was not started for pruning: start it with `gripvlm vllm serve`, or with "
                "vllm.LLM(**gripvlm.integrations.vllm.engine_args(model, pruner, keep))"
            )
        return cls(**{**given, "pruners": tuple(given["pruners"])})

    @property
    def plain(self) -> dict[str, Any]:
        """As it stands in the config."""
        return asdict(self) | {"pruners": list(self.pruners)}

    @cached_property
    def made(self) -> dict[str, Pruner]:
        """Spec -> pruner."""
        return {spec: checked_pruner(spec) for spec in self.pruners}

    def pruner(self, asked: Mapping[str, Any]) -> str:
        """The spec that a request asks for.

        Raises:
            PrunerError: it is not served.
        """
        spec = asked.get("pruner", self.pruners[0])
        if spec not in self.pruners:
            raise PrunerError(f"pruner {str(spec)[:80]!r} is not served: use one of {', '.join(self.pruners)}")
        return spec

    def budget(self, asked: Mapping[str, Any]) -> Budget:
        """The budget of each picture of a request.

        Raises:
            GripError: not a budget, or one that the pruner cannot meet.
        """
        pruner, keep = self.made[self.pruner(asked)], asked.get("keep")  # null: as if it were left out
        if isinstance(pruner, KeepAll):
            if keep is not None and Budget.of(keep) != Budget(1.0):
                raise pruner.refused(f"keep={keep}")
            return Budget(1.0)
        return checked_budget(pruner, self.keep if keep is None else keep)


@dataclass(frozen=True)
class Picture:
    """What is to be done with one picture of a request.

    Attributes:
        key: of its pixels and their preprocessing, whatever is kept of it.
        index: its place among the prompt's pictures.
        pruner: a spec.
        keep: a budget.
        question: token ids; None where the pruner does not read it.
        n: its visual tokens; 0 while it is not preprocessed.
        extent: by how much the position ids advance over all of it.
    """

    key: str
    index: int
    pruner: str
    keep: str
    question: tuple[int, ...] | None = None
    n: int = 0
    extent: int = 0

    @property
    def digest(self) -> str:
        """A hash of everything that decides which of its tokens are kept: vLLM's caches go by it."""
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=32).hexdigest()

    @property
    def count(self) -> int:
        """k of n; checked when the request came in."""
        return Budget(self.keep).count(self.n, f"picture {self.index}")


PLACES = 256 * 256
"""Places that fit into two bytes (`PruningModel`)."""


@dataclass(frozen=True)
class Shown:
    """One multi-modal item of vLLM: a picture, or all pictures of a prompt and the text between them.

    Attributes:
        pictures: in prompt order.
        texts: token ids between one picture and the next.
    """

    pictures: tuple[Picture, ...]
    texts: tuple[tuple[int, ...], ...] = ()

    @property
    def extent(self) -> int:
        """By how much the position ids advance over the unpruned pictures and the text."""
        return sum(picture.extent for picture in self.pictures) + sum(map(len, self.texts))

    @property
    def digest(self) -> str:
        """As a picture's."""
        if not self.texts:
            return self.pictures[0].digest
        parts = json.dumps([[picture.digest for picture in self.pictures], self.texts])
        return hashlib.blake2b(parts.encode(), digest_size=32).hexdigest()

    def packed(self) -> Tensor:
        """[bytes] uint8: vLLM carries tensors, and casts those of floats.

        Raises:
            InputError: rows further from the first than a place can say.
        """
        if self.extent > PLACES:
            what = "a picture takes" if len(self.pictures) == 1 else "pictures that share a budget take"
            raise InputError(f"{what} {self.extent} positions, and at most {PLACES} can be served: send smaller ones")
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Shown:
        content = json.loads(bytes(packed.tolist()))
        pictures = tuple(Picture(**one | {"question": _ids(one["question"])}) for one in content["pictures"])
        return cls(pictures, tuple(tuple(text) for text in content["texts"]))


def _ids(question: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if question is None else tuple(question)
