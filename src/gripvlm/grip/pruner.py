"""Grip: the learned pruner, which keeps the best k tokens by a trained scorer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.grip.closeness import Closeness
from gripvlm.grip.fingerprint import ScorerError
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.rounds import Penalty, greedy
from gripvlm.grip.scorer import SCORER_FILES, Scorer, TowerStage, coordinates, has_scorer
from gripvlm.pruners.base import Pruner, ScorePruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import joined, onto, padded, per_entry
from gripvlm.utils.spec import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED = Path(__file__).parents[1] / "lab" / "data"

SHIPPED_NAMES = {
    "lab": "grip/question",
    "lab-blind": "grip/blind",
    "lab-small": "grip/small",
    "lab-dense": "dense/grip/question",
    "lab-dense-blind": "dense/grip/blind",
}
"""Scorers that come with the package, for the models `lab` and `lab-dense`: name -> folder in `SHIPPED`."""

MAX_BATCH = 32
"""Images in one run of the scorer."""

MAX_TOKENS = 1 << 15
"""Their tokens, if they are of several prompts: those of 4,096 channels take half a gigabyte to be compared."""


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
            f"the scorer {name} is not in this installation ({folder} has no config.json): install "
            "gripvlm from a clone (pip install -e .), or train one with `gripvlm train`"
        )
    return folder


@dataclass(eq=False)
class ScorerInputs:
    """Sequences of a batch, padded for the scorer: an image each, or (`joint`) all images of a prompt.

    S sequences of at most n tokens, questions of at most t.
    """

    features: Tensor  # [S, n, d]
    places: Tensor  # [S, n, 2] fractions of the image
    cells: Tensor  # [S, n, 2] the same in tokens
    valid: Tensor  # [S, n]
    question: Tensor | None  # [S, t, d]
    question_mask: Tensor | None  # [S, t]
    images: Tensor | None  # [S, n] the number of each token's image in its sequence; None where all have one image
    owner: Tensor  # [S] the sample each belongs to
    sizes: Tensor  # [S] tokens of each
    parts: list[list[int]]  # [S] lists of the tokens of each of its images
    even: tuple[bool, bool]  # whether all sequences, and all questions, are of one length

    def score(self, scorer: Scorer | TowerStage, counts: Tensor) -> Tensor:
        """The scorer's logits [S, n] when `counts` [S] tokens will be left, -inf at padding."""
        # A mask that hides nothing is left out: attention has faster kernels without one.
        valid = None if self.even[0] else self.valid
        question_mask = None if self.even[1] else self.question_mask
        share = counts / self.sizes
        logits = scorer(self.features, self.places, share, valid, self.question, question_mask, self.images)
        return logits.masked_fill(~self.valid, -torch.inf)

    def penalty(self, scorer: Scorer | TowerStage, counts: Tensor) -> Penalty:
        """What tokens lose by being like kept ones."""
        return scorer.penalty(counts / self.sizes, self.close)

    @cached_property
    def close(self) -> Closeness:
        """Of the tokens of each sequence."""
        return Closeness(self.features, self.cells, self.images)

    def choose(self, scorer: Scorer | TowerStage, counts: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """What the scorer keeps of each image, ascending, and the logits [S, n].

        With several images in a sequence this reads from the device how many tokens of each are kept.
        """
        k = onto(list(counts), self.features.device)
        logits = self.score(scorer, k)
        picks = greedy(logits, k, max(counts), self.penalty(scorer, k))
        member = samples_to_mask(picks, logits.shape[1])
        # A stable sort of kept and other places brings the kept ones to the front, in raster order.
        order = torch.sort(~member, dim=-1, stable=True).indices
        rows = [row[:count] for row, count in zip(order, counts, strict=True)]
        return self.by_image(rows), logits

    def totals(self, counts: Tensor) -> Tensor:
        """[S] sums over the images of each sequence of counts [I]."""
        if len(counts) == len(self.parts):
            return counts
        return torch.stack([part.sum() for part in counts.split([len(sizes) for sizes in self.parts])])

    def by_image(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Tokens of each sequence, ascending, as tokens of its images: [S] tensors -> one for each image."""
        if all(len(sizes) == 1 for sizes in self.parts):
            return list(rows)
        ends = [onto(np.cumsum(sizes), rows[0].device) for sizes in self.parts]
        # All counts in one read: each would wait for the device.
        upto = [torch.searchsorted(row.contiguous(), end) for row, end in zip(rows, ends, strict=True)]
        counts = iter(torch.cat(upto).tolist())
        found = []
        for row, sizes in zip(rows, self.parts, strict=True):
            begin = start = 0
            for size in sizes:
                end = next(counts)
                found.append(row[begin:end] - start)
                begin, start = end, start + size
        return found

    def values_by_image(self, rows: Tensor) -> list[Tensor]:
        """[n_i] for each image, of a number for each token [S, n]."""
        lines = zip(rows, self.parts, strict=True)
        return [part for line, sizes in lines for part in line[: sum(sizes)].split(sizes)]

    @classmethod
    def of(
        cls,
        images: Sequence[VisualTokens],
        question: bool,
        owner: Sequence[int] | None = None,
        joint: bool = False,
    ) -> ScorerInputs:
        """Pads the images; `owner` says which sample each belongs to (by default its own), ascending.

        Args:
            joint: the images of a sample are one sequence.
        """
        device = images[0].features.device
        owner = range(len(images)) if owner is None else owner
        sequences = [[tokens] for tokens in images]
        if joint:
            groups = itertools.groupby(zip(images, owner, strict=True), key=lambda pair: pair[1])
            sequences, owner = [], []
            for sample, pairs in groups:
                sequences.append([tokens for tokens, _ in pairs])
                owner.append(sample)
        # Detached: what a pruner chooses has no gradient, and padding a view must not keep the encoder's graph alive.
        features = padded([joined([tokens.features.detach() for tokens in sequence]) for sequence in sequences])
        lengths = [sum(tokens.n for tokens in sequence) for sequence in sequences]
        shapes = [tuple(_raster_of(tokens) for tokens in sequence) for sequence in sequences]
        made = {shape: _coordinates(shape, device) for shape in shapes}
        if any(tokens.part is not None for tokens in images):
            rows = [_rows_of(sequence) for sequence in sequences]
            tables = [[one[each] for one in made[shape]] for each, shape in zip(rows, shapes, strict=True)]
            places, cells, numbers = (padded([table[i] for table in tables]) for i in range(3))
        elif len(made) == 1:
            places, cells, numbers = (each.expand(len(shapes), *each.shape) for each in made[shapes[0]])
        else:
            places, cells, numbers = (padded([made[shape][i] for shape in shapes]) for i in range(3))
        sizes = onto(lengths, device)
        words, words_mask, spoken = None, None, {0}
        if question:
            empty = features.new_zeros(0, features.shape[-1])
            asked = [sequence[0].question for sequence in sequences]
            texts = [empty if text is None else text.detach() for text in asked]
            spoken = {len(text) for text in texts}
            words = padded(texts)
            ends = onto([len(text) for text in texts], device)
            words_mask = torch.arange(words.shape[1], device=device) < ends[:, None]
        return cls(
            features=features,
            places=places,
            cells=cells,
            valid=torch.arange(features.shape[1], device=device) < sizes[:, None],
            question=words,
            question_mask=words_mask,
            images=numbers if any(len(sequence) > 1 for sequence in sequences) else None,
            owner=onto(list(owner), device),
            sizes=sizes,
            parts=[[tokens.n for tokens in sequence] for sequence in sequences],
            even=(len(set(lengths)) == 1, len(spoken) == 1),
        )


def _raster_of(tokens: VisualTokens) -> tuple[int, tuple[int, int] | None]:
    """(rows, grid) of the whole image that the tokens are of."""
    return (tokens.n, tokens.grid) if tokens.part is None else (tokens.part.n, tokens.part.grid)


def _rows_of(sequence: Sequence[VisualTokens]) -> Tensor:
    """[n] which rows of its whole images a sequence of (parts of) images has."""
    found, start = [], 0
    for tokens in sequence:
        part = tokens.part
        rows = torch.arange(tokens.n, device=tokens.device) if part is None else part.rows.to(tokens.device)
        found.append(rows + start)
        start += _raster_of(tokens)[0]
    return joined(found)


@lru_cache(maxsize=64)
def _coordinates(
    shape: tuple[tuple[int, tuple[int, int] | None], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, 2] `coordinates`, [n, 2] the same in tokens, and [n] numbers of a sequence of images (n_i, grid).

    Cached: a model's are of few sizes.
    """
    with torch.inference_mode(False):
        places = [coordinates(n, grid, device) for n, grid in shape]
        cells = [place * onto(grid or (1, n), device) for place, (n, grid) in zip(places, shape, strict=True)]
        return joined(places), joined(cells), per_entry(range(len(shape)), places)


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


def _fits(name: str, model: PreTrainedModel) -> bool:
    """Whether a scorer that comes with the package was trained for the model."""
    try:
        _load(name).check(model)
    except ScorerError:
        return False
    return True


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

    Inference takes the most probable tokens of the policy that was trained: the k highest logits, or those of each
    round. The paper publishes an abstract only; scorer and training are ours (`gripvlm.grip.scorer`,
    `gripvlm.grip.train`). The scores of a selection are the logits of the first round.

    A scorer that was trained for it (`joint` in its config.json) has one budget for all images of a prompt, the sum of
    theirs; an image may then lose all of its tokens.

    Attributes:
        scorer: a name for `Scorer.from_pretrained`, or one that comes with the package: for its model `lab` the
            scorers `lab`, `lab-blind` (without the question) and `lab-small` (a fifth of the arithmetic), for its model
            `lab-dense` the scorers `lab-dense` and `lab-dense-blind`.
        dtype: what the scorer computes in: "float32", "bfloat16", or "auto", bfloat16 where the features are and
            float32 elsewhere.
        module: the scorer itself; by default that of the name. Its weights are taken not to change from here on: make
            another `Grip` after a training step, or copies on other devices and in bfloat16 stay as they were.
        weights: a short hash of the scorer's weights, for results files.
    """

    name = "grip"
    source = "Huang et al. 2026, arXiv 2605.13375"
    trained: ClassVar[bool] = True
    logits: ClassVar[bool] = True

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
        try:
            self._loaded.check(model)
        except ScorerError as error:
            for name, folder in SHIPPED_NAMES.items():
                if has_scorer(SHIPPED / folder) and _fits(name, model):
                    raise ScorerError(f"{error}; for this model use grip:scorer={name}") from None
            raise

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self._loaded.scorer.config.joint

    def in_tower(self, block: int) -> Pruner:
        """The stage inside the vision tower.

        Raises:
            PrunerError: the scorer has none, or one for another block.
        """
        trained = self._loaded.scorer.config.tower_block
        if trained < 0:
            raise PrunerError(
                f"pruner 'tower': the scorer {self.scorer} has no stage inside the vision tower: train one with "
                f"`gripvlm train --tower-block {block} --init-from {self.scorer}`, or use tower(norm,grip)"
            )
        if trained != block:
            raise PrunerError(
                f"pruner 'tower': the scorer {self.scorer} was trained to choose before block {trained} of the vision "
                f"tower, not {block}: pass block={trained}"
            )
        stage = object.__new__(_GripInTower)
        stage.__dict__.update(self.__dict__)  # weights and copies on other devices are shared
        return stage

    @torch.no_grad()
    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] the logits of the first round."""
        inputs = ScorerInputs.of([tokens], self._loaded.scorer.config.question)
        return inputs.score(self.scorer_for(inputs.features), onto([tokens.keep], tokens.device))[0]

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        selections: list[Selection] = []
        groups = [[tokens] for tokens in images]
        if self.joint:
            groups = [list(group) for _, group in itertools.groupby(images, key=lambda tokens: tokens.sample)]
        part: list[list[VisualTokens]] = []
        # In parts: attention among n tokens of many images at once would not fit.
        for group in groups:
            together = [tokens for prompt in (*part, group) for tokens in prompt]
            if part and (len(together) > MAX_BATCH or sum(tokens.n for tokens in together) > MAX_TOKENS):
                selections += self._select(part)
                part = []
            part.append(group)
        return selections + self._select(part) if part else selections

    @torch.no_grad()
    def _select(self, groups: Sequence[Sequence[VisualTokens]]) -> list[Selection]:
        """What is kept of each image of some sequences."""
        images = [tokens for group in groups for tokens in group]
        owner = [i for i, group in enumerate(groups) for _ in group]
        inputs = ScorerInputs.of(images, self._loaded.scorer.config.question, owner, self.joint)
        counts = [sum(tokens.keep for tokens in group) for group in groups]
        rows, logits = inputs.choose(self.scorer_for(inputs.features), counts)
        scores = inputs.values_by_image(logits)
        return [
            Selection(indices, tokens.n, own, sound=True)
            for tokens, indices, own in zip(images, rows, scores, strict=True)
        ]

    def scorer_for(self, features: Tensor) -> Scorer | TowerStage:
        """The scorer on the features' device, in the type it computes in."""
        half = features.dtype == torch.bfloat16 if self.dtype == "auto" else self.dtype == "bfloat16"
        return self._loaded.to(features.device, torch.bfloat16 if half else torch.float32)


class _GripInTower(Grip):
    """Grip's stage inside the vision tower: features are hidden states, and images do not share a budget."""

    joint = False

    def scorer_for(self, features: Tensor) -> TowerStage:
        scorer = super().scorer_for(features)
        assert isinstance(scorer, Scorer)
        return scorer.tower
