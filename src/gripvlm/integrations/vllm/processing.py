"""The side of vLLM that reads requests: it fixes how many tokens of each picture there will be, from sizes alone.

`PruningProcessor` is mixed into a model's own processor, which expands the prompt in full; then placeholders that will
have no row are cut out. A request that is wrong fails here, as a 400, before the engine has seen it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalFieldElem, MultiModalKwargsItem, PlaceholderRange
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.integrations.vllm.choices import REQUEST, Picture, Settings, Shown
from gripvlm.integrations.vllm.turns import Turns

__all__ = ["FIELD", "PruningInfo", "PruningProcessor"]

FIELD = "gripvlm_shown"
"""The field of vLLM's items that holds a packed `Shown`; among processor options, what each picture should become."""

Options = Mapping[str, Any]


class PruningInfo:
    """Over a model's ProcessingInfo: pictures only."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # Zero, and not left out: vLLM's classes look up what their processors take by modality.
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}


class PruningProcessor:
    """Over a model's multi-modal processor."""

    info: Any

    @cached_property
    def _settings(self) -> Settings:
        return Settings.of(self.info.get_hf_config())

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self.info.get_hf_processor(), self.info.get_tokenizer(), self._placeholder)

    @property
    def _placeholder(self) -> int:
        return int(self.info.get_hf_config().image_token_id)

    # --- a request ------------------------------------------------------------------------------

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """What vLLM's engine gets of a request.

        Raises:
            GripError: the request is wrong; the message says how.
        """
        pictures = self._pictures(inputs)
        options = {FIELD: pictures}
        inputs = replace(inputs, hf_processor_mm_kwargs=options)
        joint = len(pictures) > 1 and self._settings.made[pictures[0].pruner].joint
        if joint:
            # Its items become one, so each must be there with its data.
            inputs = replace(inputs, cache=None)
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        if pictures:
            self._shorten(result, pictures)
        if joint:
            self._join(result)
        return result

    def _pictures(self, inputs: ProcessorInputs) -> list[Picture]:
        """What the request wants of each of its pictures."""
        asked = dict(inputs.hf_processor_mm_kwargs)
        if unknown := sorted(asked.keys() - set(REQUEST)):
            raise InputError(
                f"mm_processor_kwargs has {', '.join(map(repr, unknown))}: use {', '.join(REQUEST)}; what else a "
                "processor takes is set for the whole server, with --mm-processor-kwargs"
            )
        pruner, keep = self._settings.pruner(asked), self._settings.budget(asked)
        if not isinstance(asked.get("question", ""), str):
            raise InputError(f"question={asked['question']!r:.80}: pass a text")
        items = inputs.mm_data_items.get("image")
        if not items:
            return []
        if isinstance(items, ImageEmbeddingItems):
            raise InputError("the request has embeddings of pictures, which are pruned no more: send the pictures")
        keys = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs={}))["image"]  # type: ignore[misc]
        reads = "question" in self._settings.made[pruner].needs
        return [
            Picture(key, index, pruner, str(keep), self._question(asked, inputs.prompt, index) if reads else None)
            for index, key in enumerate(keys)
        ]

    def _question(self, asked: Options, prompt: Sequence[int], index: int) -> tuple[int, ...]:
        given = asked.get("question")
        if given is None:
            found = sum(token == self._placeholder for token in prompt)
            if index >= found:
                raise InputError(f"the prompt has placeholders for {found} pictures, but more pictures came with it")
            return self._turns.question(prompt, index)
        return tuple(self.info.get_tokenizer().encode(given, add_special_tokens=False))

    # --- the model's own processor --------------------------------------------------------------

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        pictures = inputs.hf_processor_mm_kwargs[FIELD]
        return {"image": [picture.digest for picture in pictures]} if pictures else {}

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Options:
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        pairs = zip(options[FIELD], mm_is_cached.get("image", ()), strict=True)
        return {**options, FIELD: [picture for picture, cached in pairs if not cached]}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Options) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _own(hf_kwargs))  # type: ignore[misc]
        pictures = hf_kwargs[FIELD]
        if pictures:
            sizes = self._sizes(data)
            known = [replace(p, n=n, extent=extent) for p, (n, extent) in zip(pictures, sizes, strict=True)]
            for picture in known:
                # Refuses a budget before vLLM notes the picture in its cache: the engine would never get it.
                _ = picture.count
            data[FIELD] = [Shown((picture,)).packed() for picture in known]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Options) -> Any:
        packed = hf_inputs.pop(FIELD, None)
        fields = super()._get_mm_fields_config(hf_inputs, _own(hf_processor_mm_kwargs))  # type: ignore[misc]
        if packed is None:
            return fields
        hf_inputs[FIELD] = packed
        return {**fields, FIELD: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Options, out_mm_kwargs: Any) -> Any:
        return super()._get_prompt_updates(mm_items, _own(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]

    def _sizes(self, data: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(visual tokens, positions they take) of each picture, before pruning."""
        grids = data.get("image_grid_thw")
        if grids is not None:
            merge = self.info.get_hf_config().vision_config.spatial_merge_size
            # M-RoPE: text goes on behind the larger edge.
            return [(t * h * w // merge**2, max(h, w) // merge) for t, h, w in grids.tolist()]
        ids = data["image_replacement_ids"].split(data["image_replacement_sizes"].tolist())
        counts = [int((own == self._placeholder).sum()) for own in ids]
        return [(n, n) for n in counts]

    # --- fewer placeholders ---------------------------------------------------------------------

    def _shorten(self, result: Any, pictures: Sequence[Picture]) -> None:
        """Cuts out of the expanded prompt the placeholders that will have no row."""
        ids, kept, places = result["prompt_token_ids"], [], []
        end = 0
        for picture, place in zip(pictures, result["mm_placeholders"]["image"], strict=True):
            start, n = _run(place)
            k = replace(picture, n=n).count
            kept += ids[end : start + k]
            places.append(PlaceholderRange(offset=len(kept) - k, length=k))
            end = start + n
        result["prompt_token_ids"] = kept + ids[end:]
        result["mm_placeholders"] = {**result["mm_placeholders"], "image": places}

    def _join(self, result: Any) -> None:
        """Makes one item of a prompt's pictures and the text between them.

        How many tokens each picture keeps is not known before the pruner has chosen; only their sum is. So the model
        embeds the text between them too, wherever it then comes.
        """
        ids, places, items = (
            result["prompt_token_ids"],
            result["mm_placeholders"]["image"],
            result["mm_kwargs"]["image"],
        )
        ends = [place.offset + place.length for place in places]
        texts = tuple(tuple(ids[end : after.offset]) for end, after in zip(ends, places[1:], strict=False))
        shown = Shown(tuple(Shown.unpacked(item[FIELD].data).pictures[0] for item in items), texts)
        fields = {name: _joined([item[name] for item in items]) for name in items[0] if name != FIELD}
        fields[FIELD] = replace(items[0][FIELD], data=shown.packed())
        start = places[0].offset
        result["mm_kwargs"] = type(result["mm_kwargs"])({"image": [MultiModalKwargsItem(fields)]})
        result["mm_hashes"] = {"image": [shown.digest]}
        result["mm_placeholders"] = {"image": [PlaceholderRange(offset=start, length=ends[-1] - start)]}


def _own(options: Options) -> dict[str, Any]:
    """Options without ours, for the model's own processor."""
    return {name: value for name, value in options.items() if name != FIELD}


def _run(place: PlaceholderRange) -> tuple[int, int]:
    """(start, length) of a picture's placeholders in the expanded prompt.

    Raises:
        UnsupportedModelError: text stands between them.
    """
    if place.is_embed is None:
        return place.offset, place.length
    columns = place.is_embed.nonzero().flatten().tolist()
    if any(b - a != 1 for a, b in pairwise(columns)):
        raise UnsupportedModelError("text stands between the visual tokens of a picture: vLLM cannot prune this model")
    return place.offset + columns[0], len(columns)


def _joined(elements: Sequence[MultiModalFieldElem]) -> MultiModalFieldElem:
    """One field of several items as a field of one; rows one after the other."""
    data: list[Tensor] = [element.data for element in elements]
    if not all(isinstance(part, Tensor) and part.shape[1:] == data[0].shape[1:] for part in data):
        raise InputError("these pictures cannot share a budget, as their preprocessed sizes differ in form")
    # A field of one number, or one row, for each item has no axis for items.
    whole = torch.stack(data) if data[0].ndim == 0 else torch.cat(data)
    return replace(elements[0], data=whole)
