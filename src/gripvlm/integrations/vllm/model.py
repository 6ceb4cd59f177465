"""The side of vLLM that runs the model: it encodes pictures, lets the pruner choose, and puts positions right.

`PruningModel` is mixed into a model class of vLLM. Positions need no hook of vLLM's runners: text behind a picture is
numbered as if the picture were whole, which is known from sizes alone; where a kept row was in its picture travels
beside it, in further columns of the encoder's output, and `forward` adds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from gripvlm.engine.by_raster import select_batch
from gripvlm.engine.outputs import DeferredChecks, check_features, checked_selections
from gripvlm.engine.pruner_checks import checked_needs
from gripvlm.integrations.vllm.choices import Picture, Settings, Shown
from gripvlm.integrations.vllm.layouts import SERVED
from gripvlm.integrations.vllm.processing import FIELD
from gripvlm.models.content_keys import content_keys
from gripvlm.models.drop import selected_rows
from gripvlm.models.encoded import Item
from gripvlm.models.families import FAMILIES
from gripvlm.serve.encodings import EncodingCache
from gripvlm.types import Selection, VisualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PruningModel"]

AXES = 3
PLACE = 2 * AXES
"""Columns for a row's place: three coordinates in two bytes each, as bfloat16 is exact up to 256 only."""


class PruningModel:
    """Over a model class of vLLM, which then defines `encode` and `words`."""

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.start_pruning(vllm_config)

    def start_pruning(self, vllm_config: Any) -> None:
        """Reads the settings, and makes what `forward` will read."""
        self.settings = Settings.of(self.config)
        self.family, self.layout = FAMILIES[self.config.model_type], SERVED[self.config.model_type]
        # Of all pruners together, as what is encoded for one is kept for the others.
        self.tower_request = checked_needs(self.family, self.settings.made.values())
        self.encodings: EncodingCache[str, Item] = EncodingCache(int(self.settings.cache_mb * 1e6))
        self.most_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        tokens, device = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.device_config.device
        # Both at one address for good, so that a captured CUDA graph reads what each step has written.
        self.places = torch.zeros(AXES, tokens + 256, dtype=torch.int64, device=device)
        self._placed = torch.zeros_like(self.places)

    def encode(self, inputs: Mapping[str, Any], counts: list[int]) -> list[Item]:
        """Runs the vision encoder.

        Args:
            inputs: what the processor made of some pictures.
            counts: their visual tokens.
        """
        raise NotImplementedError

    def items(
        self, inputs: Mapping[str, Any], features: Sequence[Tensor], planes: Sequence[Sequence[Tensor]] = ()
    ) -> list[Item]:
        """Encoded pictures.

        Args:
            inputs: as for `encode`.
            features: [n, d] of each picture.
            planes: DeepStack's planes, [n, d] of each picture.
        """
        counts = [rows.shape[0] for rows in features]
        grids = self.family.grid(cast("PreTrainedModel", self), inputs, "image", counts)
        keys = content_keys(inputs, "image", len(counts)) if self.tower_request.keys else [0] * len(counts)
        return [
            Item("image", rows, tuple(plane[i] for plane in planes), grids[i], keys[i])
            for i, rows in enumerate(features)
        ]

    def words(self, ids: Tensor) -> Tensor:
        """[t, d] embeddings of token ids [t]."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Also lets the pruners look at the model, which a trained one must belong to."""
        loaded = super().load_weights(weights)  # type: ignore[misc]
        # They may be loaded again while the engine runs; what other weights encoded is worth nothing then.
        self.encodings.clear()
        for pruner in self.settings.made.values():
            pruner.check(_Loaded(self))
        return loaded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        placed = self.placed(positions)
        return super().forward(input_ids, placed, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    # --- pictures -------------------------------------------------------------------------------

    def embed_multimodal(self, **inputs: Any) -> list[Tensor]:
        """What takes the place of each item's placeholders: its kept rows, and where they were.

        Returns:
            [k, d + 6] for each item.
        """
        if FIELD not in inputs:
            return []
        shown = [Shown.unpacked(packed) for packed in inputs.pop(FIELD)]
        pictures = [picture for one in shown for picture in one.pictures]
        items = self._encoded(pictures, inputs)
        checks = DeferredChecks()
        rows = iter(self._pruned(shown, pictures, items, checks))
        made = [self._laid_out(one, [next(rows) for _ in one.pictures]) for one in shown]
        checks.raise_if_failed()
        return made

    def _encoded(self, pictures: Sequence[Picture], inputs: Mapping[str, Any]) -> list[Item]:
        """Each picture encoded, unpruned: kept from before, or run now."""

        def missing() -> Item:
            raise AssertionError("it was there a moment ago")

        found = {p.key: self.encodings.get(p.key, missing) for p in pictures if p.key in self.encodings}
        wanted = {picture.key: index for index, picture in enumerate(pictures) if picture.key not in found}
        parts = _by_picture(inputs, len(pictures))
        for chosen in self._micro_batches(pictures, list(wanted.values())):
            part = {name: parts[name].take(chosen) for name in parts}
            for index, item in zip(chosen, self.encode(part, [pictures[i].n for i in chosen]), strict=True):
                found[pictures[index].key] = item
        # All are used from `found`: those that come last may already have pushed out the first.
        for key in wanted:
            self.encodings.get(key, partial(found.__getitem__, key))
        return [found[picture.key] for picture in pictures]

    def _micro_batches(self, pictures: Sequence[Picture], chosen: list[int]) -> Iterator[list[int]]:
        """Pictures that the encoder runs at a time.

        vLLM counts kept tokens against its budget for the encoder, which then would get far more of the others.
        """
        batch: list[int] = []
        for index in chosen:
            if batch and sum(pictures[i].n for i in (*batch, index)) > self.most_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _pruned(
        self, shown: Sequence[Shown], pictures: Sequence[Picture], items: Sequence[Item], checks: DeferredChecks
    ) -> list[_Rows]:
        """The kept rows of each picture."""
        sample = [number for number, one in enumerate(shown) for _ in one.pictures]
        kept: dict[int, _Rows] = {}
        for spec in dict.fromkeys(picture.pruner for picture in pictures):
            own = [index for index, picture in enumerate(pictures) if picture.pruner == spec]
            tokens = [self._tokens(pictures[i], items[i], sample[i]) for i in own]
            check_features(tokens, checks)
            selections = self._select(spec, tokens, checks)
            for index, rows in zip(own, _rows([items[i] for i in own], selections), strict=True):
                kept[index] = rows
        return [kept[index] for index in range(len(pictures))]

    def _tokens(self, picture: Picture, item: Item, sample: int) -> VisualTokens:
        question = None
        if picture.question is not None:
            question = self.words(torch.tensor(picture.question, dtype=torch.int64, device=item.features.device))
        return item.tokens(picture.count, question, sample, picture.index)

    def _select(self, spec: str, tokens: list[VisualTokens], checks: DeferredChecks) -> list[Selection]:
        pruner = self.settings.made[spec]
        with checks.explaining_errors():
            answers = select_batch(pruner, tokens, checks)
        return checked_selections(pruner, answers, tokens, checks)

    def _laid_out(self, shown: Shown, kept: Sequence[_Rows]) -> Tensor:
        """[K, d + 6]: an item's rows in prompt order, and their places, counted from the item's first position."""
        rows, places, start = [], [], 0
        for picture, own, text in zip(shown.pictures, kept, (*shown.texts, ()), strict=True):
            rows.append(own.rows)
            places.append(self._coordinates(own.indices, own.grid) + start)
            start += picture.extent
            if text:
                embedded = self.words(torch.tensor(text, dtype=torch.int64, device=own.rows.device))
                # A model with DeepStack adds planes to pictures alone.
                wide = embedded.new_zeros(len(text), own.rows.shape[1])
                wide[:, : embedded.shape[1]] = embedded
                rows.append(wide)
                places.append(torch.arange(start, start + len(text), device=own.rows.device).expand(AXES, -1))
                start += len(text)
        place = torch.cat(places, dim=1)
        return torch.cat((torch.cat(rows), torch.cat((place // 256, place % 256)).T.to(rows[0].dtype)), dim=1)

    def _coordinates(self, indices: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """[3, k] the place of rows in their picture: (0, row, column) under M-RoPE, else the row's number."""
        if not self.layout.mrope:
            return indices.expand(AXES, -1)
        assert grid is not None  # such a picture is a raster
        return torch.stack((torch.zeros_like(indices), indices // grid[1], indices % grid[1]))

    # --- positions ------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """[3, L] positions of a prompt in which all rows of an item stand at its first; what decoding adds to a
        token's number."""
        parts, done, position = [], 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            parts += [torch.arange(offset - done) + position, torch.full((length,), position + offset - done)]
            position += offset - done + Shown.unpacked(feature.data[FIELD].data).extent
            done = offset + length
        parts.append(torch.arange(len(input_tokens) - done) + position)
        return torch.cat(parts).expand(AXES, -1).contiguous(), position - done

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """[T, d] what enters the first layer in this step; notes the places of kept rows for `forward`."""
        self.places.zero_()
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            place = torch.cat([rows[:, -PLACE:] for rows in multimodal_embeddings]).long().T
            columns = is_multimodal.nonzero().flatten().to(self.places.device)
            self.places[:, columns] = place[:AXES] * 256 + place[AXES:]
            multimodal_embeddings = [rows[:, :-PLACE] for rows in multimodal_embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)  # type: ignore[misc]

    def placed(self, positions: Tensor) -> Tensor:
        """Positions [3, T] of this step, those of kept rows where they were in their picture; until the next step."""
        tokens = positions.shape[1]
        return torch.add(positions, self.places[:, :tokens], out=self._placed[:, :tokens])


class _Rows(NamedTuple):
    """A picture's kept rows [k, d] (DeepStack's planes beside them), which they were [k], and its grid."""

    rows: Tensor
    indices: Tensor
    grid: tuple[int, int] | None


def _rows(items: Sequence[Item], selections: Sequence[Selection]) -> list[_Rows]:
    planes = [selected_rows([item.features for item in items], selections)]
    for layer in range(len(items[0].deepstack)):
        planes.append(selected_rows([item.deepstack[layer] for item in items], selections))
    split = torch.cat(planes, dim=1).split([selection.k for selection in selections])
    return [_Rows(rows, s.indices, item.grid) for rows, s, item in zip(split, selections, items, strict=True)]


class _Parts(NamedTuple):
    """A field of vLLM's batch by picture; rows are joined again where they were."""

    pieces: Sequence[Any]
    joined: bool

    def take(self, chosen: Sequence[int]) -> Any:
        pieces = [self.pieces[i] for i in chosen]
        return torch.cat(pieces) if self.joined else pieces


def _by_picture(inputs: Mapping[str, Any], count: int) -> dict[str, _Parts]:
    """The fields of a batch by picture: pixels have a row for each picture or each patch, all others one a picture."""
    rows = {name: _flat(value).reshape(count, -1) for name, value in inputs.items() if name != "pixel_values"}
    parts = {name: _Parts(value.split(1), True) for name, value in rows.items()}
    pixels = inputs["pixel_values"]
    if isinstance(pixels, Tensor):
        patches = rows["num_image_patches"] if "num_image_patches" in rows else rows["image_grid_thw"].prod(-1)
        parts["pixel_values"] = _Parts(pixels.split(patches.flatten().tolist()), True)
    else:
        parts["pixel_values"] = _Parts(pixels, False)
    return parts


def _flat(value: Tensor | Sequence[Tensor]) -> Tensor:
    """A field that came as a tensor, or as one for each item, which may hold several pictures."""
    return value.flatten() if isinstance(value, Tensor) else torch.cat([one.flatten() for one in value])


class _Table:
    """The embedding table as `Pruner.check` reads it; vLLM's own may be padded, and spread over devices."""

    def __init__(self, model: PruningModel) -> None:
        text = model.config.get_text_config()
        self._model, self.shape, self.device = model, (text.vocab_size, text.hidden_size), model.places.device

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self._model.words(ids.to(self.device))


class _Loaded:
    """A model of vLLM for `Pruner.check`: its configuration and its embeddings.

    vLLM's other weights have other names and shapes than those of transformers, so they are not compared.
    """

    def __init__(self, model: PruningModel) -> None:
        self.config, self._embeddings = model.config, SimpleNamespace(weight=_Table(model))

    def get_input_embeddings(self) -> Any:
        return self._embeddings

    def get_decoder(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())
