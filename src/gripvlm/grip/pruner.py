"""Grip: the learned pruner, a trained scorer's k highest tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.grip.fingerprint import ScorerError
from gripvlm.grip.scorer import SCORER_FILES, Scorer, coordinates, has_scorer
from gripvlm.pruners.base import ScorePruner, top_k_of_each
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto, padded
from gripvlm.utils.spec import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED = Path(__file__).parents[1] / "lab" / "data"

SHIPPED_NAMES = {
    "lab": "grip/question",
    "lab-blind": "grip/blind",
    "lab-small": "grip/small",
    "lab-dense": "dense/grip/question",
}
"""Scorers that come with the package, for the models `lab` and `lab-dense`: name -> folder in `SHIPPED`."""

MAX_BATCH = 32
"""Images in one run of the scorer."""


def place_of(name: str | Path) -> str | Path:
    """The folder of a shipped scorer, or the name itself.

    Raises:
        ScorerError: a shipped scorer that is not in this installation.
    """
    if str(name) not in SHIPPED_NAMES:
        return name
    folder = SHIPPED / SHIPPED_NAMES[str(name)]
    if not has_scorer(folder):
        raise ScorerError(
            f"the scorer {name} is not in this installation ({folder} has no config.json): install a gripvlm that has "
            "it, or train one with `gripvlm train`"
        )
    return folder


@dataclass(eq=False)
class ScorerInputs:
    """All images of a batch, padded for the scorer: I images of at most n tokens, questions of at most t."""

    features: Tensor  # [I, n, d]
    places: Tensor  # [I, n, 2]
    valid: Tensor  # [I, n]
    question: Tensor | None  # [I, t, d]
    question_mask: Tensor | None  # [I, t]
    owner: Tensor  # [I] the sample each image belongs to
    sizes: Tensor  # [I] tokens of each image
    even: tuple[bool, bool]  # whether all images, and all questions, are of one length

    def score(self, scorer: Scorer, counts: Tensor) -> Tensor:
        """[I, n] logits when `counts` [I] tokens will be left, -inf at padding."""
        # A mask that hides nothing is left out: attention has faster kernels without one.
        valid = None if self.even[0] else self.valid
        question_mask = None if self.even[1] else self.question_mask
        logits: Tensor = scorer(self.features, self.places, counts / self.sizes, valid, self.question, question_mask)
        return logits.masked_fill(~self.valid, -torch.inf)

    @classmethod
    def of(cls, images: Sequence[VisualTokens], question: bool, owner: Sequence[int] | None = None) -> ScorerInputs:
        """Pads the images; `owner` says which sample each belongs to (by default its own)."""
        device = images[0].features.device
        # Detached: what a pruner chooses has no gradient, and padding a view must not keep the encoder's graph alive.
        features = padded([tokens.features.detach() for tokens in images])
        shapes = {(tokens.n, tokens.grid): _coordinates(tokens.n, tokens.grid, device) for tokens in images}
        if len(shapes) == 1:
            places = next(iter(shapes.values())).expand(len(images), -1, -1)
        else:
            places = padded([shapes[tokens.n, tokens.grid] for tokens in images])
        sizes = onto([tokens.n for tokens in images], device)
        words, words_mask, lengths = None, None, {0}
        if question:
            empty = features.new_zeros(0, features.shape[-1])
            texts = [empty if tokens.question is None else tokens.question.detach() for tokens in images]
            lengths = {len(text) for text in texts}
            words = padded(texts)
            ends = onto([len(text) for text in texts], device)
            words_mask = torch.arange(words.shape[1], device=device) < ends[:, None]
        return cls(
            features=features,
            places=places,
            valid=torch.arange(features.shape[1], device=device) < sizes[:, None],
            question=words,
            question_mask=words_mask,
            owner=onto(list(range(len(images)) if owner is None else owner), device),
            sizes=sizes,
            even=(len({tokens.n for tokens in images}) == 1, len(lengths) == 1),
        )


@lru_cache(maxsize=64)
def _coordinates(n: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor:
    """`coordinates`, cached: a model's images are of few sizes."""
    with torch.inference_mode(False):
        return coordinates(n, grid, device)


class _Loaded:
    """A scorer, its copies on other devices, and the models that it was already checked against.

    Pruners of one name share it, so that a call by name costs no more than one by object. The scorer's weights, and
    those of a model that has been compared, are taken not to change.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.digest = scorer, scorer.digest()
        self._copies: dict[tuple[torch.device, torch.dtype], Scorer] = {}
        # Weakly: a pruner must not keep a model in memory.
        self._compared: WeakSet[PreTrainedModel] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Loaded, (self.scorer,)  # copies and models stay behind

    def to(self, device: torch.device, dtype: torch.dtype) -> Scorer:
        """The scorer itself where it is there already, else a copy."""
        weight = self.scorer.score.weight
        if (weight.device, weight.dtype) == (device, dtype):
            return self.scorer
        if (device, dtype) not in self._copies:
            # Outside inference mode, whose tensors could not be used by a later call that records gradients.
            with torch.inference_mode(False):
                self._copies[device, dtype] = copy.deepcopy(self.scorer).to(device, dtype)
        return self._copies[device, dtype]

    def check(self, model: PreTrainedModel) -> None:
        """Compares the model with the scorer's own, once: it takes milliseconds.

        Raises:
            ScorerError: it is another model.
        """
        if model not in self._compared:
            assert self.scorer.base is not None
            self.scorer.base.check(model)
            self._compared.add(model)


def _load(name: str) -> _Loaded:
    """The scorer of a name; pruners of one folder share it until its files are written to."""
    place = place_of(name)
    if place == name and "/" not in name and not Path(name).expanduser().is_dir():
        raise ScorerError(
            f"no scorer {name!r}: {did_you_mean(name, SHIPPED_NAMES, count=1)}pass one of {', '.join(SHIPPED_NAMES)} "
            "(for the labs' models), a folder that exists, or a hub id such as user/grip-llava"
        )
    files = [Path(place).expanduser() / file for file in SCORER_FILES]
    # A hub id, or an error that names the missing file.
    if not all(file.is_file() for file in files):
        return _Loaded(Scorer.from_pretrained(place))
    return _read(str(place), tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=8)
def _read(place: str, written: tuple[tuple[int, int], ...]) -> _Loaded:
    """The scorer of a folder whose files were last written to then."""
    with torch.inference_mode(False):
        return _Loaded(Scorer.from_pretrained(place))


@dataclass(eq=False)
class Grip(ScorePruner):
    """score = scorer(features, place, question, k / n): Huang et al., "GRIP-VLM", arXiv 2605.13375.

        grip = gripvlm.Grip.from_pretrained("folder-or-hub-id")
        with gripvlm.prune(model, grip, keep=0.1): ...

    Inference takes the mode of the policy that was trained, the k highest logits. The paper publishes an abstract
    only; scorer and training are ours (`gripvlm.grip.scorer`, `gripvlm.grip.train`).

    Attributes:
        scorer: a name for `Scorer.from_pretrained`, or one that comes with the package: for its model `lab` the
            scorers `lab`, `lab-blind` (without the question) and `lab-small` (a fifth of the arithmetic), for its model
            `lab-dense` the scorer `lab-dense`.
        dtype: what the scorer computes in: "float32", "bfloat16", or "auto", bfloat16 where the features are and
            float32 elsewhere.
        module: the scorer itself; by default that of the name. Its weights are taken not to change from here on: make
            another `Grip` after a training step, or copies on other devices and in bfloat16 stay as they were.
        weights: a short hash of the scorer's weights, for results files.
    """

    name = "grip"
    source = "Huang et al. 2026, arXiv 2605.13375"
    trained: ClassVar[bool] = True

    scorer: str = "lab"
    dtype: str = field(default="auto", kw_only=True)
    module: Scorer | None = field(default=None, repr=False)
    weights: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise PrunerError(f"{self.name}: dtype={self.dtype!r}: pass dtype=float32, dtype=bfloat16 or dtype=auto")
        self._loaded = _load(self.scorer) if self.module is None else _Loaded(self.module)
        self.module, self.weights = self._loaded.scorer, self._loaded.digest

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: str = "auto", **hub: Any) -> Grip:
        """A trained scorer: one of the package (above), a folder or a hub id; `hub` as for `Scorer.from_pretrained`."""
        return cls(str(name), Scorer.from_pretrained(place_of(str(name)), **hub), dtype=dtype)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "question"} if self._loaded.scorer.config.question else {"features"})

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that the scorer was not trained for."""
        if self._loaded.scorer.base is None:
            raise PrunerError(f"this {self.name} scorer was never trained: train one with `gripvlm train`")
        self._loaded.check(model)

    def score(self, tokens: VisualTokens) -> Tensor:
        return self._scores([tokens])[0, : tokens.n]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        selections = []
        # In parts: attention among n tokens of many images at once would not fit.
        for start in range(0, len(images), MAX_BATCH):
            part = images[start : start + MAX_BATCH]
            scores = self._scores(part)
            chosen = top_k_of_each(scores, [tokens.keep for tokens in part])
            for tokens, row, indices in zip(part, scores, chosen, strict=True):
                selections.append(Selection(indices, tokens.n, row[: tokens.n], sound=True))
        return selections

    @torch.no_grad()
    def _scores(self, images: Sequence[VisualTokens]) -> Tensor:
        """[I, n] logits of all images from one run of the scorer, -inf at padding."""
        inputs = ScorerInputs.of(images, self._loaded.scorer.config.question)
        counts = onto([tokens.keep for tokens in images], inputs.features.device)
        return inputs.score(self.scorer_for(inputs.features), counts)

    def scorer_for(self, features: Tensor) -> Scorer:
        """The scorer on the features' device, in the type it computes in."""
        half = features.dtype == torch.bfloat16 if self.dtype == "auto" else self.dtype == "bfloat16"
        return self._loaded.to(features.device, torch.bfloat16 if half else torch.float32)
