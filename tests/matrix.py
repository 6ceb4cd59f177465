"""Every pruner with every family: which pairs there are, and what each is given. The tests are in `test_matrix.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

import gripvlm
from gripvlm.engine.by_raster import select_batch
from gripvlm.engine.llm_stage import watched_layers
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import gather_tokens, question_embeddings
from gripvlm.engine.request import PruneRequest
from gripvlm.errors import BudgetError, InputError
from gripvlm.grip.fingerprint import ModelFingerprint
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.models import FAMILIES
from gripvlm.models.hooks.llm_drop import droppable_layers
from gripvlm.models.prompts import Prompts
from gripvlm.pruners import LLMPruner, Pruner, get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.registry import _BUILT_IN, _load
from gripvlm.types import LLMTokens, Selection, VisualTokens
from tiny_families import TINY, build, make
from tiny_families.reference import full_positions

NAMES = sorted(TINY)
IMAGES, WORDS = [1, 2], [7, 9]  # two samples of different length, one with two pictures
SHALLOW = {"hiprune": "hiprune:middle=0", "vscan": "vscan:shallow=0,window=2", "vscan_vision": "vscan_vision:shallow=0"}
"""Options where a default names a block that the tiny towers do not have."""
NO_FIRST_LAYER = ("gemma3n", "kimi_k25", "lfm2_vl", "lfm3_vl", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe")
"""Families whose first layer does not make queries and keys of the embeddings alone."""
WRAPPERS = ("ensemble", "gumbel", "mmr", "repeats", "restore", "split", "spread", "top_p")
"""Tried in `MORE`, or in test_repeats.py and test_wrappers.py."""
MORE = (
    "ensemble(norm,divprune)",
    "ensemble(fastervlm,grid):weights=(2,1)",
    "mmr(norm)",
    "mmr(fopru)",
    "restore(norm)",
    "split(norm)",
    "split(norm):by=spectrum",
    "spread(norm)",
    "spread(visionzip)",
)
"""Wrappers around a pruner, and options that change what is needed or shared out."""
EVERYTHING = ("full", "keep_all")
TOWER = ("tome", "tower")
"""They work inside the vision tower, before there is anything to choose from: pruners/test_tome.py,
models/test_tower_drop.py."""
SPECS = sorted(
    [SHALLOW.get(name, name) for name in _BUILT_IN if name not in (*WRAPPERS, *EVERYTHING, *TOWER)] + [*MORE]
)


@cache
def scorer(name: str) -> Scorer:
    """A random scorer that belongs to the family's tiny model."""
    model = build(name)
    torch.manual_seed(1)
    made = Scorer(ScorerConfig(model.get_input_embeddings().weight.shape[1], width=16, blocks=1, heads=2))
    made.base = ModelFingerprint.of(model)
    return made.eval()


def pruner_of(spec: str, name: str, only: int | None = None) -> Pruner:
    """The pruner of a spec, for this family's model; `only` one sample of the batch is to be pruned."""
    if spec == "given":
        noise = torch.Generator().manual_seed(3)
        scores = [[torch.randn(64, generator=noise) for _ in range(8)] for _ in IMAGES]
        return _Given(scores if only is None else [scores[only]])
    if getattr(_load(spec.partition(":")[0].partition("(")[0]), "trained", False):
        return get_pruner(spec, scorer=name, module=scorer(name))
    return get_pruner(spec)


class _Given(Given):
    """The first n of each image's scores: the families' images differ in n."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return super().score(tokens)[: tokens.n]


@cache
def needs_of(spec: str) -> tuple[frozenset[str], str]:
    """What a spec needs of its inputs, and where it drops rows; no weights are loaded."""
    made_by = _load(spec.partition(":")[0].partition("(")[0])
    if getattr(made_by, "trained", False):
        return frozenset({"features", "question"}), "input"
    found = _Given([]) if spec == "given" else get_pruner(spec)
    return found.needs, found.stage


def lacking(spec: str, name: str) -> list[str]:
    """What this family cannot supply of what the pruner needs."""
    family, (needs, stage) = FAMILIES[name], needs_of(spec)
    lacks = sorted(needs & {"vision_attention", "patches"}) if family.vision is None else []
    lacks += ["first_layer"] if "first_layer" in needs and name in NO_FIRST_LAYER else []
    lacks += ["grid"] if "grid" in needs and not family.has_rasters else []
    return lacks + (["layers"] if stage == "llm" and not family.layers else [])


@cache
def misplaced(spec: str, name: str) -> bool:
    """Whether the pruner, with its default options, drops before a layer of this model where none may, or where it
    cannot read attention: a model of recurrent layers."""
    if needs_of(spec)[1] != "llm" or lacking(spec, name):
        return False
    pruner, decoder = get_pruner(spec), build(name).get_decoder()
    layers = sorted({*pruner.schedule(64, 64, len(decoder.layers))} - {0})
    try:
        watched_layers(pruner, decoder, layers)
    except InputError:
        return True
    return not {*layers} <= {*droppable_layers(decoder)}


def pairs(stage: str) -> list[tuple[str, str]]:
    """(spec, family) that must work, of the pruners that drop rows at `stage`."""
    mine = [spec for spec in SPECS if needs_of(spec)[1] == stage]
    return [(spec, name) for spec in mine for name in NAMES if not lacking(spec, name) and not misplaced(spec, name)]


def decided_by_rounding(spec: str, name: str) -> bool:
    """Gemma 3n's rows all have the same norm, so what has the largest depends on the batch."""
    return name == "gemma3n" and "norm" in spec


def refused_pairs() -> list[tuple[str, str]]:
    """(spec, family) that cannot work."""
    return [(spec, name) for spec in SPECS for name in NAMES if lacking(spec, name)]


def misplaced_pairs() -> list[tuple[str, str]]:
    """(spec, family) that work with other layers than the default ones."""
    return [(spec, name) for spec in SPECS for name in NAMES if misplaced(spec, name)]


@dataclass(frozen=True, eq=False)
class Case:
    """A family's tiny model, a batch (or one sample of it) encoded once for all pruners, its unpruned logits."""

    name: str
    model: Any
    inputs: dict[str, Tensor]
    encoded: Any
    plain: Tensor
    sizes: list[list[int]]

    def unpruned(self, logits: Tensor) -> bool:
        """Whether these are the unpruned model's logits, bit for bit, at all tokens that are no padding."""
        real = self.inputs["attention_mask"].bool()
        return torch.equal(logits[real], self.plain[real])


@cache
def case(name: str, attention: str = "sdpa", only: int = -1) -> Case:
    """The batch of `IMAGES` and `WORDS` under an attention implementation."""
    model, batch = build(name, attention), make(TINY[name], IMAGES, WORDS, only=only)
    every = [pruner_of(spec, name) for spec in SPECS if not lacking(spec, name)]
    with torch.no_grad():
        encoded = gripvlm.encode(model, batch.inputs, every)
        plain = model(**batch.inputs, position_ids=full_positions(model, batch.inputs)).logits
    sizes = [[item.features.shape[0] for item in sample] for sample in encoded.samples]
    return Case(name, model, batch.inputs, encoded, plain, sizes if only < 0 else [sizes[0]])


def seen(here: Case, pruner: Pruner, encoded: Any = None) -> list[list[VisualTokens]]:
    """What the pruner sees of a batch, all rows in the budget."""
    with torch.no_grad():
        encoded = here.encoded if encoded is None else encoded
        request, prompts = PruneRequest.of(here.model, pruner, 1.0), Prompts.of(here.model, here.inputs)
        images = prompts.with_images(encoded)
        return gather_tokens(request, images, question_embeddings(request, prompts), DeferredChecks())


def few(most: int) -> list[int]:
    """The smallest budgets, the middle one and the largest."""
    return sorted({k for k in (1, 2, 3, most // 2, most - 1, most) if k >= 1})


def budgets(sizes: list[list[int]], k: int) -> list[list[int]]:
    """k of each image, or all of an image that has fewer."""
    return [[min(k, n) for n in sample] for sample in sizes]


def chosen(pruner: Pruner, images: list[list[VisualTokens]], k: int) -> list[list[tuple[VisualTokens, Selection]]]:
    """Each image with its budget of k, as `allocate_budget` moves it inside a prompt, and what is selected of it."""
    asked = []
    for sample in images:
        mine = [replace(tokens, keep=min(k, tokens.n)) for tokens in sample]
        counts = list(pruner.allocate_budget(mine, 1))
        assert sum(counts) == sum(tokens.keep for tokens in mine), (k, counts)
        asked.append([replace(tokens, keep=count) for tokens, count in zip(mine, counts, strict=True)])
    found = iter(select_batch(pruner, [tokens for sample in asked for tokens in sample], DeferredChecks()))
    return [[(tokens, next(found)) for tokens in sample] for sample in asked]


def sound(selection: Selection, n: int, k: int) -> None:
    """The invariants of one selection of k of n rows."""
    rows = selection.indices.tolist()
    assert len(rows) == k
    assert rows == sorted(set(rows))
    assert rows[0] >= 0
    assert rows[-1] < n
    assert selection.n == n
    if selection.scores is not None:
        assert selection.scores.shape == (n,)
        assert not bool(selection.scores.isnan().any())
    merge = selection.merge
    if merge is None:
        return
    assert merge.source.shape == merge.destination.shape == merge.weight.shape
    if k == n:  # nothing is dropped, so nothing is absorbed
        assert torch.equal(merge.source, merge.destination)
        assert bool((merge.weight == 1).all())
    assert 0 <= int(merge.source.min()) <= int(merge.source.max()) < n
    assert 0 <= int(merge.destination.min()) <= int(merge.destination.max()) < k
    assert bool((merge.weight >= 0).all())  # 0 where nothing looks, as at newline rows
    sums = torch.zeros(k, dtype=torch.float64).index_add_(0, merge.destination, merge.weight.double())
    into = merge.destination.unique()
    torch.testing.assert_close(sums[into], torch.ones(len(into), dtype=torch.float64), atol=1e-6, rtol=0)


def same(one: Selection, other: Selection) -> bool:
    """Whether the same rows are kept and absorb the same, bit for bit."""
    merges = [
        None if s.merge is None else (s.merge.source.tolist(), s.merge.destination.tolist(), s.merge.weight.tolist())
        for s in (one, other)
    ]
    return one.indices.tolist() == other.indices.tolist() and merges[0] == merges[1]


@dataclass(frozen=True, eq=False)
class Spy(LLMPruner):
    """A layer pruner that behaves as the one inside it, and remembers what it was shown."""

    name: ClassVar[str] = "spy"
    inner: LLMPruner
    shown: list[tuple[int, LLMTokens]]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def llm_needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.llm_needs

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.vision_layers

    def schedule(self, n: int, keep: int, layers: int) -> Any:
        return self.inner.schedule(n, keep, layers)

    def allocate_budget(self, images: Any, num_layers: int) -> Any:
        return self.inner.allocate_budget(images, num_layers)

    def select(self, tokens: VisualTokens) -> Selection:
        return self.inner.select(tokens)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Any:
        self.shown.append((layer, tokens))
        return self.inner.select_at_layer(layer, tokens)


def feasible(here: Case, pruner: LLMPruner) -> Iterator[int]:
    """The budgets k at which the pruner serves every image of the batch, as it shares them out."""
    layers, images = len(here.model.get_decoder().layers), seen(here, pruner)
    for k in range(1, max(max(sample) for sample in here.sizes) + 1):
        try:
            for sample in images:
                for n, count in zip(
                    [tokens.n for tokens in sample],
                    pruner.allocate_budget([replace(tokens, keep=min(k, tokens.n)) for tokens in sample], layers),
                    strict=True,
                ):
                    pruner.schedule(n, count, layers)
        except BudgetError:
            continue
        yield k
