"""Grip: the learned pruner, a trained scorer's k highest tokens."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.grip.fingerprint import ScorerError, compared
from gripvlm.grip.scorer import SCORER_FILES, Scorer, coordinates
from gripvlm.pruners.base import ScorePruner, top_k_of_each
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto, padded

__all__ = ["SHIPPED", "SHIPPED_NAMES", "Grip", "Learned", "ScorerInputs", "place_of"]

SHIPPED = Path(__file__).parents[1] / "lab" / "data" / "grip"
"""Scorers for the lab VLM that come with the package, one folder each: `question`, `blind` and `small`."""

_passed: WeakKeyDictionary[Any, tuple[Any, ...]] = (
    WeakKeyDictionary()
)  # model -> what it was last found to be right for

_copies: WeakKeyDictionary[Scorer, dict[Any, tuple[Any, Scorer]]] = WeakKeyDictionary()
"""Scorer -> (device, type) -> what its weights were, and the scorer in that form."""

_lock = threading.RLock()  # of what is kept here for all threads

KEPT = 8
"""Scorers of folders that stay in memory."""

TOGETHER = 32
"""Images in one run of the scorer."""


SHIPPED_NAMES = {"lab": "question", "lab-blind": "blind", "lab-small": "small"}


def place_of(name: str | Path) -> str | Path:
    """The folder of a shipped scorer, or the name itself."""
    return SHIPPED / SHIPPED_NAMES[str(name)] if str(name) in SHIPPED_NAMES else name


@dataclass(eq=False)
class ScorerInputs:
    """All images of a batch, padded for the scorer: I images of at most n tokens, questions of at most t."""

    features: Tensor  # [I, n, d]
    places: Tensor  # [I, n, 2]
    valid: Tensor  # [I, n]
    question: Tensor | None  # [I, t, d]
    asked: Tensor | None  # [I, t]
    owner: Tensor  # [I] the sample each image belongs to
    sizes: Tensor  # [I] tokens of each image
    even: tuple[bool, bool]  # whether all images, and all questions, are of one length, so that masks say nothing

    def score(self, scorer: Scorer, kept: Tensor) -> Tensor:
        """[I, n] logits when `kept` [I] tokens will be left, -inf at padding."""
        logits: Tensor = scorer(*self._read(kept))
        return logits.masked_fill(~self.valid, -torch.inf)

    def _read(self, kept: Tensor) -> tuple[Any, ...]:
        """What the scorer takes; masks only where they say something."""
        valid, asked = (None if even else m for even, m in zip(self.even, (self.valid, self.asked), strict=True))
        return self.features, self.places, kept / self.sizes, valid, self.question, asked

    @classmethod
    def of(cls, images: Sequence[VisualTokens], question: bool, owner: Sequence[int] | None = None) -> ScorerInputs:
        """Pads the images; `owner` says which sample each belongs to (by default its own)."""
        device = images[0].features.device
        features = padded([tokens.features.detach() for tokens in images])
        kinds = {(tokens.n, tokens.grid): _coordinates(tokens.n, tokens.grid, device) for tokens in images}
        one = next(iter(kinds.values()))
        places = one.expand(len(images), -1, -1)
        if len(kinds) > 1:
            places = padded([kinds[tokens.n, tokens.grid] for tokens in images])
        sizes = onto([tokens.n for tokens in images], device)
        words, asked, lengths = None, None, {0}
        if question:
            texts = [features.new_zeros(0, features.shape[-1]) if t.question is None else t.question for t in images]
            lengths = {len(text) for text in texts}
            words = padded([text.detach() for text in texts])
            asked = torch.arange(words.shape[1], device=device) < onto([len(text) for text in texts], device)[:, None]
        return cls(
            features,
            places,
            torch.arange(features.shape[1], device=device) < sizes[:, None],
            words,
            asked,
            onto(list(range(len(images)) if owner is None else owner), device),
            sizes,
            (len({tokens.n for tokens in images}) == 1, len(lengths) == 1),
        )


@lru_cache(maxsize=64)
def _coordinates(n: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
    """`coordinates`, kept: a model's images are of few sizes."""
    with torch.inference_mode(False):
        return coordinates(n, grid, device)


def _loaded(name: str) -> tuple[Scorer, str]:
    """A scorer and its digest; that of a folder is read anew when its files were written to, or its weights."""
    place = place_of(name)
    if place == name and "/" not in name and not Path(name).expanduser().is_dir():
        near = difflib.get_close_matches(name, SHIPPED_NAMES, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ScorerError(
            f"no scorer {name!r}: {hint}type one of {', '.join(SHIPPED_NAMES)} (for the lab's model), a folder that "
            "exists, or a hub id such as user/grip-llava"
        )
    files = [Path(place).expanduser() / file for file in SCORER_FILES]
    if not all(file.is_file() for file in files):  # a hub id, or an error that says what is missing
        scorer = Scorer.from_pretrained(place)
        return scorer, scorer.digest()
    written = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    with _lock:
        known = _scorers.pop(str(place), None)
        if known is None or known.written != written or known.stamps != _stamps(known.scorer):
            with torch.inference_mode(False):
                scorer = Scorer.from_pretrained(place)
            known = _Known(scorer, scorer.digest(), written, _stamps(scorer))
        _scorers[str(place)] = known  # the latest is the last
        while len(_scorers) > KEPT:
            del _scorers[next(iter(_scorers))]
    return known.scorer, known.digest


class _Known(NamedTuple):
    """A scorer of a folder, when its files were written, and its weights as they were read."""

    scorer: Scorer
    digest: str
    written: list[tuple[int, int]]
    stamps: list[tuple[int, int]]


_scorers: dict[str, _Known] = {}  # folder -> what was read of it


def _stamps(scorer: Scorer) -> list[tuple[int, int]]:
    return [_stamp(weight) for weight in scorer.parameters()]


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is written to or replaced; what was made in inference mode keeps no count of writes."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@dataclass(frozen=True, eq=False)
class Learned(ScorePruner):
    """score = scorer(features, place, question, k / n): a trained scorer, however it was trained.

    Attributes:
        scorer: a name for `Scorer.from_pretrained`.
        dtype: what the scorer computes in: "float32", "bfloat16", or "auto", bfloat16 where the features are and
            float32 elsewhere.
        weights: a short hash of the scorer's weights, for results files.
    """

    trained: ClassVar[bool] = True

    scorer: str
    dtype: str = field(default="auto", kw_only=True)
    module: Scorer | None = field(default=None, repr=False)
    weights: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise PrunerError(f"{self.name}: dtype={self.dtype!r}: type dtype=float32, dtype=bfloat16 or dtype=auto")
        if self.module is None:
            module, weights = _loaded(self.scorer)
            object.__setattr__(self, "module", module)
        else:
            weights = self._scorer.digest()
        object.__setattr__(self, "weights", weights)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "question"} if self._scorer.config.question else {"features"})

    @property
    def _scorer(self) -> Scorer:
        assert self.module is not None
        return self.module

    def check(self, model: Any) -> None:
        """Refuses a model that the scorer was not trained for."""
        if self._scorer.base is None:
            raise PrunerError(f"this {self.name} scorer was never trained: train one with `gripvlm train`")
        base, table = self._scorer.base, model.get_input_embeddings().weight
        mine = (base.model_type, base.sketch, tuple(base.weights.items()))
        with _lock:
            known = _passed.get(model)
            if known is None or known[:2] != (mine, id(table)) or known[3] != [_stamp(weight) for weight in known[2]]:
                base.check(model)  # milliseconds: once, and when weights that it compares were written to
                weights = compared(model)
                _passed[model] = (mine, id(table), weights, [_stamp(weight) for weight in weights])

    def score(self, tokens: VisualTokens) -> Tensor:
        return self._scores([tokens])[0, : tokens.n]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        found = []
        for start in range(0, len(images), TOGETHER):
            part = images[start : start + TOGETHER]
            scores = self._scores(part)
            chosen = top_k_of_each(scores, [tokens.keep for tokens in part])
            for tokens, row, indices in zip(part, scores, chosen, strict=True):
                found.append(Selection(indices, tokens.n, row[: tokens.n], sound=True))
        return found

    @torch.no_grad()
    def _scores(self, images: Sequence[VisualTokens]) -> Tensor:
        """[I, n] logits of all images from one run of the scorer, -inf at padding."""
        seen = ScorerInputs.of(images, self._scorer.config.question)
        kept = onto([tokens.keep for tokens in images], seen.sizes.device)
        return seen.score(self._serving(seen.features), kept)

    def _serving(self, features: Tensor) -> Scorer:
        """The scorer on the features' device, in the type it computes in."""
        half = features.dtype == torch.bfloat16 if self.dtype == "auto" else self.dtype == "bfloat16"
        scorer, dtype = self._scorer, torch.bfloat16 if half else torch.float32
        weight = scorer.score.weight
        if (weight.device, weight.dtype) == (features.device, dtype):
            return scorer
        with _lock:
            forms, state = _copies.setdefault(scorer, {}), _stamps(scorer)
            kept = forms.get((features.device, dtype))
            if kept is None or kept[0] != state:
                with torch.inference_mode(False):
                    kept = forms[features.device, dtype] = (state, copy.deepcopy(scorer).to(features.device, dtype))
        return kept[1]


@dataclass(frozen=True, eq=False)
class Grip(Learned):
    """score = scorer(features, place, question, k / n): Huang et al., "GRIP-VLM", arXiv 2605.13375.

        grip = gripvlm.Grip.from_pretrained("folder-or-hub-id")
        with gripvlm.prune(model, grip, keep=0.1): ...

    Inference takes the mode of the policy that was trained, the k highest logits. The paper publishes an abstract
    only; scorer and training are ours (`gripvlm.grip.scorer`, `gripvlm.grip.train`).

    Attributes:
        scorer: a name for `Scorer.from_pretrained`, or one that comes with the package for its lab VLM: `lab`,
            `lab-blind` (without the question), `lab-small` (a fifth of the arithmetic).
        weights: a short hash of the scorer's weights, for results files.
    """

    name: ClassVar[str] = "grip"
    source: ClassVar[str] = "Huang et al. 2026, arXiv 2605.13375"

    scorer: str = "lab"

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: str = "auto", **hub: Any) -> Grip:
        """A trained scorer: one of the package (above), a folder or a hub id; `hub` as for `Scorer.from_pretrained`."""
        return cls(str(name), Scorer.from_pretrained(place_of(str(name)), **hub), dtype=dtype)
