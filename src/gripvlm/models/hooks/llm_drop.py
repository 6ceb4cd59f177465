"""Dropping visual tokens after layer k of the language model: fewer tokens from there on, in every later layer.

Hooks on this model's own decoder layers, for this block's calls only (`calls.py`), hand each layer from k on
fewer hidden states, positions and mask columns. Its cache is shorter there, so decoding builds its mask for the first
layer and each later layer is given the columns it has kept. Nothing is copied from transformers and `generate` stays
as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import GripError, InputError, UnsupportedModelError
from gripvlm.models.families import family_of
from gripvlm.models.hooks.calls import After, Before, hooked, is_open
from gripvlm.models.hooks.stages import Change, Dropped, Held, Stage
from gripvlm.models.renamed import cache_in
from gripvlm.models.text import full_mask, visual_places

__all__ = [
    "checked_dynamic",
    "checked_keys",
    "checked_layers",
    "drop_in_layers",
    "ids_of",
    "no_labels",
]

Choose: TypeAlias = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Change]]
"""(hidden [B, L, d], visual [B, L] bool) -> [B, L] bool, the visual tokens that go on; text always does.

It may also return (that, change): `change(hidden)` are the states to go on with, where dropped tokens are merged into
kept ones. Asked once a prompt: where backward runs a layer again (gradient checkpointing), only `change` is."""


@contextmanager
def drop_in_layers(
    model: Any, choose: Mapping[int, Choose], forget: int | None = None, held: Held | None = None
) -> Iterator[Dropped]:
    """Inside the block, this model's language model drops visual tokens before some of its layers.

        with drop_in_layers(model, {2: lambda hidden, visual: visual & mine}) as dropped:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args:
        model: a supported model, under sdpa or eager attention, whose layers all see the whole prompt.
        choose: layer k >= 1 -> a function of what enters that layer. Counts may differ by sample;
            shorter samples are padded on the left and the padding is masked.
        forget: a layer >= 1. Before the first decoded token, the caches of this layer and those after it lose what
            the last layer has not kept, so that decoded tokens see no more of the prompt there. None: each layer's
            cache keeps what the layer saw.
        held: what the caches hold of a prompt that has run before, for a further turn on them; nothing is dropped then.

    Yields:
        A `Dropped`, filled at each prefill.

    Logits of a direct `forward` are those of the tokens left at the end.

    Raises:
        UnsupportedModelError: a family or an attention implementation for which this is not right.
        InputError: when the model runs: a prompt in chunks, right padding,
            labels, a cache that is not dynamic, a prompt beyond a sliding window, a choice of the wrong shape, or
            `forget` without a cache.
        GripError: a block for this model is already open.
    """
    checked_layers(model)
    decoder = model.get_decoder()
    layers = decoder.layers
    places = [*choose, *([] if held is None else held.stages)]
    forget = forget if held is None else held.forget
    places += [] if forget is None else [forget]
    if wrong := [k for k in places if not 1 <= k < len(layers)]:
        raise InputError(f"no layer {wrong[0]} to drop before: type 1 to {len(layers) - 1}")
    key = ("drops", id(decoder))
    if is_open(key):
        raise GripError("this model already drops inside its layers: leave that block first")
    dropper = _Dropper(model, decoder, dict(choose), forget)
    if held is not None:
        dropper.resume(held)
    root = model.base_model  # a LoRA wrapper calls the model's forward past its hooks
    before: dict[Any, Before] = {model: no_labels, root: dropper.begin}
    before |= {layer: dropper.before(i) for i, layer in enumerate(layers) if places and i >= min(places)}
    after: dict[Any, After] = {root: dropper.end}
    if hasattr(decoder, "_deepstack_process"):
        before[decoder] = dropper.take_planes
        after |= {layer: dropper.add_plane(i) for i, layer in enumerate(layers)}
    with hooked(before, after, key):
        yield dropper.dropped


def checked_keys(model: Any, wants: str) -> None:
    """Raises an UnsupportedModelError, beginning with `wants`, where attention takes no mask with a value a key."""
    implementation = model.get_decoder().config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"{wants}, which {implementation} does not take: load the model with attn_implementation='sdpa'"
        )


def checked_layers(model: Any) -> None:
    """Raises an UnsupportedModelError where dropping inside the language model's layers is not right."""
    family = family_of(model)
    if not family.layers:
        raise UnsupportedModelError(
            f"dropping inside {family.model_type}'s layers is not supported: its layers share or carry "
            "state that still holds the dropped tokens; drop at the input with gripvlm.api"
        )
    checked_keys(model, "dropping inside layers needs masks key by key")


def ids_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The prompt's ids among what a base model is run on: some families hand them on by place."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) else None


def no_labels(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises an InputError for labels: logits are those of the tokens left at the end."""
    if kwargs.get("labels") is not None:
        raise InputError("labels do not fit the shorter logits of dropping inside layers: leave them out")


class _Dropper:
    """The hooks of one block and what they must remember between them."""

    def __init__(self, model: Any, decoder: Any, choose: dict[int, Choose], forget: int | None) -> None:
        self.model, self.decoder, self.choose, self.forget = model, decoder, choose, forget
        self.dropped = Dropped(held=self.held)
        self.stages: dict[int, Stage] = {}
        self.now: Stage | None = None
        self.visual = self.mask = torch.empty(0)
        self.later, self.later_whole = (
            torch.empty(0),
            True,
        )  # [B, n] which tokens after the prompt are real; whether all
        self.planes: tuple[Tensor, ...] = ()  # DeepStack's, for the layers that add one each
        self.seen = torch.empty(0)  # [B, L] whose rows those planes are
        self.running, self.prefill, self.total = False, True, 0
        self.boolean = True  # whether masks are, as under sdpa; eager adds them

    def held(self) -> Held:
        stages = {layer: replace(stage, change=None) for layer, stage in self.stages.items()}
        return Held(self.mask, stages, self.boolean, self.forget)

    def resume(self, held: Held) -> None:
        """Goes on where another block's prompt ended."""
        self.mask, self.stages, self.boolean = held.mask, dict(held.stages), held.boolean

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model: is this a prompt, and one for which dropping is right?"""
        ids = ids_of(args, kwargs)
        if ids is None:
            raise InputError("dropping inside layers needs input_ids, not inputs_embeds: call model(input_ids=...)")
        cache = cache_in(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        self.now = None
        self.prefill = past == 0
        self.total = past + ids.shape[1]
        if not self.prefill:
            self._continue(past, ids, kwargs.get("attention_mask"))
        checked_dynamic(cache)
        if self.forget is not None and kwargs.get("use_cache") is False:
            raise InputError("dropping from the cache needs one: leave use_cache=False out")
        kinds = getattr(self.decoder.config, "layer_types", None) or []
        window = getattr(self.decoder.config, "sliding_window", None) if "sliding_attention" in kinds else None
        if window is not None and self.total > window:
            raise InputError(
                f"{self.total} tokens exceed the sliding window of {window}, which is counted from the first layer: "
                "drop at the input with gripvlm.api"
            )
        self.running, self.planes = True, ()
        if not self.prefill:
            if past == self.mask.shape[1]:  # nothing was decoded on this cache
                self._shorten(cache)
            return
        self.mask = full_mask(self.model, {**kwargs, "input_ids": ids}).bool()
        if not bool(self.mask[:, -1].all()):
            raise InputError("dropping inside layers needs padding on the left: set tokenizer.padding_side='left'")
        self.visual = visual_places(self.model, ids)
        self.stages, self.dropped.stages = {}, {}
        self.dropped.order = self.dropped.real = None

    def _continue(self, past: int, ids: Tensor, mask: Any) -> None:
        """Notes which of the tokens after the prompt are real; `mask` is the whole model's, of the shortened prompt."""
        length = self.mask.shape[-1]
        if past < length or self.mask.ndim != 2:
            raise InputError(
                "the cache holds a prompt that did not run here: run the whole prompt at once, without a cache"
            )
        if ids.shape[1] > 1 and bool(visual_places(self.model, ids).any()):
            raise InputError(
                "several tokens on top of a cache, pictures among them (prefill_chunk_size, or a further turn with a "
                "picture): run the whole prompt at once"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.later = mask[:, length:].bool()
            self.later_whole = bool(self.later.all())
        else:
            self.later = self.mask.new_ones(self.mask.shape[0], self.total - length)
            self.later_whole = True

    def end(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """After the whole model: a layer that runs from now on is run again by backward."""
        self.running = False

    def before(self, index: int) -> Callable[..., Any]:
        """The hook before layer `index`."""

        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0]
            if self.prefill and index in self.choose:
                if self.running:
                    self._choose(index, hidden)
                elif index not in self.stages:
                    raise InputError("the language model's layers run without their model: call model(**arguments)")
                hidden = self.stages[index].of(hidden)
            stage = self._seen(index)
            if stage is None:
                return args, kwargs
            self.now = stage
            kwargs = dict(kwargs)
            kwargs["attention_mask"] = self._narrow(kwargs.get("attention_mask"), stage, hidden)
            if self.prefill:
                kwargs["position_embeddings"] = tuple(
                    _take(one, stage.order, -2) for one in kwargs["position_embeddings"]
                )
                if kwargs.get("position_ids") is not None:
                    kwargs["position_ids"] = _take(kwargs["position_ids"], stage.order, -1)
            return (hidden, *args[1:]), kwargs

        return hook

    def _seen(self, index: int) -> Stage | None:
        """What layer `index` sees of the prompt at present; None for all of it."""
        if not self.prefill and self.forget is not None and index >= self.forget:
            return self.stages[max(self.stages)]
        return self.stages.get(max((k for k in self.stages if k <= index), default=-1))

    def _shorten(self, cache: Any) -> None:
        """Takes what the last layer has not kept from the caches that are to forget it."""
        if self.forget is None or not self.stages:
            return
        batch, full = self.mask.shape
        last = self.stages[max(self.stages)]
        for index in range(self.forget, max(self.stages)):
            stage = self.stages.get(max((k for k in self.stages if k <= index), default=-1))
            before = torch.arange(full, device=last.order.device).expand(batch, -1) if stage is None else stage.order
            held, layer = before.shape[1], cache.layers[index]
            if not isinstance(layer.keys, Tensor) or layer.keys.shape[-2] != held:
                raise InputError(
                    f"a {type(layer).__name__} cannot be shortened after the prompt: use the default dynamic cache"
                )
            slot = torch.zeros(batch, full, dtype=torch.long, device=before.device)
            slot.scatter_(1, before, torch.arange(held, device=before.device).expand(batch, -1))
            left = slot.gather(1, last.order)  # padding is one of the dropped, which this layer still had
            layer.keys, layer.values = (
                states.gather(2, left[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )

    def _choose(self, index: int, hidden: Tensor) -> None:
        """Asks what is left from layer `index` on, and notes the stage."""
        if self.now is None:
            everyone = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            self.now = Stage(everyone, self.mask, everyone)
        order, real = self.now.order, self.now.real
        visual = self.visual.gather(-1, order) & real
        asked, change = self.choose[index](hidden, visual), None
        if isinstance(asked, tuple):
            asked, change = asked
        if not isinstance(asked, Tensor) or asked.shape != visual.shape or asked.dtype != torch.bool:
            got = f"{asked.dtype} {tuple(asked.shape)}" if isinstance(asked, Tensor) else type(asked).__name__
            raise InputError(f"the choice before layer {index} must be bool {tuple(visual.shape)}, got {got}")
        keep = real & (asked.to(hidden.device) | ~visual)
        length = int(keep.sum(-1).max())
        left = torch.sort(keep.int(), dim=-1, stable=True).indices[:, -length:]  # kept ones in order, at the end
        stage = Stage(order.gather(-1, left), keep.gather(-1, left), left, change)
        self.stages[index] = stage
        self.dropped.order, self.dropped.real = stage.order, stage.real
        seen = torch.zeros_like(self.mask)
        self.dropped.stages[index] = seen.scatter(-1, stage.order, stage.real)

    def _narrow(self, mask: Tensor | None, stage: Stage, hidden: Tensor) -> Tensor | None:
        """[B, 1, q, l (+ decoded)]: the mask of one layer for the tokens that are left before it.

        A prompt's mask is what transformers made, its rows and columns taken. A later token sees
        everything real up to itself; transformers' mask is of no use there, being as long as some other layer.
        """
        batch, full = self.mask.shape
        if not self.prefill:
            new = hidden.shape[1]
            if new == 1 and self.later_whole and stage.whole:
                return None
            sees = torch.cat((stage.real, self.later), -1)[:, None, None]
            past = sees.shape[-1] - new
            before = torch.ones(new, past + new, dtype=torch.bool, device=sees.device).tril(past)
            itself = torch.eye(new, dtype=torch.bool, device=sees.device)  # padding too: its softmax must be defined
            sees = (sees & before) | torch.nn.functional.pad(itself, (past, 0))
            return sees if self.boolean else _additive(sees, hidden)
        if mask is None:
            if stage.whole:
                return None
            mask = torch.ones(batch, 1, full, full, dtype=torch.bool, device=hidden.device).tril()
        self.boolean = mask.dtype == torch.bool
        mask = mask.expand(batch, *mask.shape[1:])
        mask = mask.gather(2, stage.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, stage.order[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        sees = stage.real[:, None, None] | torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        # padding sees itself, so that its softmax is defined
        return mask & sees if self.boolean else torch.minimum(mask, _additive(sees, mask))

    def take_planes(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: keeps DeepStack's planes from it, since it knows nothing of dropped tokens."""
        planes, seen = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if planes is None or seen is None:
            return None
        self.planes, self.seen = tuple(planes), seen
        return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def add_plane(self, index: int) -> After:
        """The hook after layer `index`: each token that is left gets its own row of the layer's plane, if any."""

        def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not self.prefill or index >= len(self.planes):
                return None
            visual, plane, stage = self.seen, self.planes[index], self._seen(index)
            if stage is not None:
                row = (visual.flatten().cumsum(0) - 1).view(visual.shape)
                left = visual.gather(-1, stage.order) & stage.real
                visual, plane = left, plane[row.gather(-1, stage.order)[left]]
            return self.decoder._deepstack_process(output, visual, plane)

        return hook


def checked_dynamic(cache: Any) -> None:
    """Raises an InputError for a cache whose layers all have one length from the start."""
    if cache is not None and any("Static" in type(layer).__name__ for layer in cache.layers):
        raise InputError("a static cache has one length for all layers: use the default dynamic cache")


def _additive(sees: Tensor, like: Tensor) -> Tensor:
    """0 where a key is seen, the smallest number elsewhere."""
    return torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill(~sees, torch.finfo(like.dtype).min)


def _take(value: Tensor, order: Tensor, axis: int) -> Tensor:
    """Entries `order` [B, l] along `axis` of a tensor whose batch is the axis before (1 serves all)."""
    lead = value.shape[:axis]  # ends with the batch
    value = value.expand(*lead[:-1], order.shape[0], *value.shape[axis:])
    index = order.view(*(1 for _ in lead[:-1]), *order.shape, *(1 for _ in range(-axis - 1)))
    return value.gather(axis, index.expand(*lead[:-1], *order.shape, *(value.shape[axis + 1 :] if axis < -1 else ())))
