"""Dropping visual tokens before some layers of the language model: fewer tokens from there on, in every later layer.

`generate` and the model's code stay as they are. Hooks do the work, for one block's calls (`calls.py`):

1. Before the whole model: is this a prompt (nothing is cached yet) or decoding? Of a prompt, note its mask and which
   of its tokens are visual.
2. Before layer k, in a prompt: choose which tokens to keep, note them as a `Stage`, and gather their hidden states.
   Every later layer gets fewer positions and a smaller mask, so its cache is shorter.
3. Before the same layers, in decoding: transformers builds one mask, as long as the first layer's cache. Each later
   layer gets one as long as its own.
4. Before the first decoded token, if `evict_from` says so: shorten the caches of earlier layers too.

A layer that attends has no trace of a token that was dropped before it. So it is with recurrent layers (linear
attention, short convolutions): the state of each is its own, and is made of the tokens that enter it. What is right for
both is deletion from layer k on: layer k and those after it run as a model of their own that is given the states of the
tokens that are left.

Qwen3-VL adds planes of further visual features (DeepStack) to the outputs of its first layers, at the prompt's full
length. They are taken from the decoder and added here, by a call of the model's private `_deepstack_process`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import GripError, InputError, UnsupportedModelError
from gripvlm.models.compat import cache_in
from gripvlm.models.families import family_of
from gripvlm.models.hooks.calls import After, Before, call_hooks, is_open
from gripvlm.models.text import full_mask, visual_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MergeStates: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states [B, L, d] -> the same with dropped tokens merged into kept ones."""

Choose: TypeAlias = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, MergeStates]]
"""(hidden [B, L, d], visual [B, L] bool) -> [B, L] bool, the visual tokens to keep, alone or with a `MergeStates`.

Text always stays. Called once a prompt: where backward runs a layer again (gradient checkpointing), only the
`MergeStates` is."""


@dataclass
class Stage:
    """The tokens that are left from some layer on.

    Attributes:
        order: [B, l] their places in the prompt; padded on the left with places of dropped ones.
        real: [B, l] False for that padding and for the prompt's own.
        previous: [B, l] their places among the tokens that the layer before saw.
        merge: merges the hidden states before tokens are dropped; None without a merge.
    """

    order: Tensor
    real: Tensor
    previous: Tensor
    merge: MergeStates | None = None

    @functools.cached_property
    def unpadded(self) -> bool:
        """Read from the device once, not for every token and layer."""
        return bool(self.real.all())

    def gather(self, hidden: Tensor) -> Tensor:
        """[B, l, d]: the hidden states of the layer before, for the tokens that are left."""
        hidden = hidden if self.merge is None else self.merge(hidden)
        return hidden.gather(1, self.previous[..., None].expand(-1, -1, hidden.shape[-1]))

    def take(self, rows: Tensor | slice) -> Stage:
        """Of these rows of the batch, without the merge."""
        return Stage(self.order[rows], self.real[rows], self.previous[rows])


@dataclass
class DropState:
    """What is left of the latest prompt in each layer, and so in its cache: a further turn on the cache begins here.

    Attributes:
        stages: layer -> the tokens of the prompt that it and those after it see, ascending.
        mask: [B, L] bool, False at the prompt's padding.
        boolean: whether the model's masks are (sdpa), or are added (eager).
        evict_from: the layer from which on caches were shortened after the prompt.
    """

    stages: dict[int, Stage] = field(default_factory=dict)
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    boolean: bool = True
    evict_from: int | None = None

    @property
    def latest(self) -> Stage | None:
        """What is left at present; None while all tokens are."""
        return self.stages[max(self.stages)] if self.stages else None

    def in_layer(self, index: int) -> Stage | None:
        """The tokens of the prompt in layer `index` while the prompt runs; None for all tokens."""
        return self.stages.get(max((layer for layer in self.stages if layer <= index), default=-1))

    def take(self, rows: Tensor | slice = slice(None)) -> DropState:
        """Of these rows [R] of the batch, in this order; without merges, which only the prompt's own run needs."""
        return replace(self, mask=self.mask[rows], stages={k: stage.take(rows) for k, stage in self.stages.items()})


def attending(decoder: Any) -> list[bool]:
    """Which layers of a language model have keys of the tokens; the others carry a state instead."""
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    return [kind.endswith("attention") and kind != "linear_attention" for kind in kinds]


def droppable_layers(decoder: Any) -> range:
    """The layers before which tokens may be dropped: after the first that has keys, and not behind shared ones.

    transformers counts positions and masks by the first cache that has keys, which so must hold the whole prompt. Where
    the last layers have no keys of their own but read those of earlier ones, tokens must be gone before these are made.
    """
    first, last = attending(decoder).index(True) + 1, len(decoder.layers) - 1
    if shared := getattr(decoder.config, "num_kv_shared_layers", 0):
        own, readers = decoder.config.layer_types[:-shared], decoder.config.layer_types[-shared:]
        # The last layer of a kind that has keys of its own makes those that are read.
        last = min(len(own) - 1 - own[::-1].index(kind) for kind in readers)
    return range(first, last + 1)


def read_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], feature: str) -> tuple[Tensor, Any, int]:
    """The token ids [B, l] of a base model's call, its cache, and how many tokens that holds.

    Raises:
        InputError: naming the `feature` that cannot work: no ids, or a static cache.
    """
    ids, cache = kwargs.get("input_ids", args[0] if args else None), cache_in(kwargs)  # some families pass ids by place
    if not isinstance(ids, Tensor):
        raise InputError(f"{feature} needs input_ids, not inputs_embeds: call model(input_ids=...)")
    if cache is not None and any("Static" in type(layer).__name__ for layer in cache.layers):
        raise InputError("a static cache has one length for all layers: use the default dynamic cache")
    return ids, cache, 0 if cache is None else cache.get_seq_length()


@contextmanager
def drop_in_layers(
    model: PreTrainedModel,
    choose: Mapping[int, Choose],
    evict_from: int | None = None,
    held: DropState | None = None,
) -> Iterator[DropState]:
    """Inside the block, this model's language model drops visual tokens before some of its layers.

        with drop_in_layers(model, {2: lambda hidden, visual: visual & keep}) as state:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args:
        model: a supported model, under sdpa or eager attention, whose layers all see the whole prompt.
        choose: layer k >= 1 -> a function of what enters that layer. Counts may differ by sample; shorter samples are
            padded on the left and the padding is masked.
        evict_from: a layer >= 1. Before the first decoded token, the caches of this layer and those after it lose what
            the last layer has not kept, so that decoded tokens see no more of the prompt there. None: each layer's
            cache keeps what the layer saw.
        held: what the caches hold of an earlier prompt, for a further turn on them; nothing is dropped then.

    Yields:
        A `DropState`, filled at each prefill.

    Logits of a direct `forward` are those of the tokens left at the end.

    Raises:
        UnsupportedModelError: a family or an attention implementation for which this is not right, or `evict_from` with
            recurrent layers, whose state cannot forget.
        InputError: when the model runs: a prompt in chunks, right padding, labels, a cache that is not dynamic, a
            prompt beyond a sliding window, a choice of the wrong shape, or `evict_from` without a cache.
        GripError: a block for this model is already open.
    """
    checked_layers(model)
    decoder = model.get_decoder()
    layers = decoder.layers
    state = DropState(evict_from=evict_from) if held is None else replace(held, stages=dict(held.stages))
    changed = [*choose, *state.stages, *(() if state.evict_from is None else (state.evict_from,))]
    allowed, recurrent = droppable_layers(decoder), [not attends for attends in attending(decoder)]
    if wrong := [k for k in changed if k not in allowed]:
        raise InputError(f"no layer {wrong[0]} to drop before: use {_spoken(allowed, recurrent, len(layers))}")
    if state.evict_from is not None and any(recurrent[state.evict_from :]):
        raise UnsupportedModelError(
            f"the recurrent layers of {model.config.model_type} have no keys that could be dropped after the prompt: "
            "leave that stage of the pruner out (decode=False)"
        )
    # By the decoder: a model and its LoRA wrapper have one and the same.
    key = ("drops", id(decoder))
    if is_open(key):
        raise GripError("this model already drops inside its layers: leave that block first")
    dropper = _Dropper(model, choose, state)
    # The base model, as a LoRA wrapper calls the model's own forward past its hooks. Labels reach the model only.
    root = model.base_model
    before: dict[nn.Module, Before] = {model: no_labels, root: dropper.begin}
    after: dict[nn.Module, After] = {root: dropper.end}
    for index in range(min(changed, default=len(layers)), len(layers)):
        before[layers[index]] = functools.partial(dropper.before_layer, index)
    # Once they are taken from the decoder, planes must be added here in every layer, also ahead of those that drop.
    if hasattr(decoder, "_deepstack_process"):
        before[decoder] = dropper.take_planes
        after |= {layer: functools.partial(dropper.add_plane, index) for index, layer in enumerate(layers)}
    with call_hooks(before, after, key=key):
        yield state


def _spoken(allowed: range, recurrent: list[bool], layers: int) -> str:
    """`1 to 3`, and why no more, for errors."""
    if not allowed:
        return "a pruner that drops at the input, as the last layers of this model share the keys of its first ones"
    words = f"{allowed[0]} to {allowed[-1]}"
    if allowed[0] > 1:
        words += f" (layer {allowed[0] - 1} is the first one with keys, before it all are recurrent)"
    if allowed[-1] < layers - 1:
        words += f" (the layers after {allowed[-1]} read keys that are made there)"
    return words


def checked_keys(model: PreTrainedModel, wants: str) -> None:
    """Raises an UnsupportedModelError, beginning with `wants`, where attention takes no mask with a value a key."""
    implementation = model.get_decoder().config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"{wants}, which {implementation} does not take: load the model with attn_implementation='sdpa'"
        )


def checked_layers(model: PreTrainedModel) -> None:
    """Raises an UnsupportedModelError where dropping inside the language model's layers is not right."""
    family = family_of(model)
    if not family.layers:
        raise UnsupportedModelError(
            f"dropping inside {family.model_type}'s layers is not known to be right: drop at the input with gripvlm.api"
        )
    checked_keys(model, "dropping inside layers needs masks key by key")


def no_labels(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises an InputError for labels: logits are those of the tokens left at the end."""
    if kwargs.get("labels") is not None:
        raise InputError("labels do not fit the shorter logits of dropping inside layers: leave them out")


class _Dropper:
    """The hooks of one block, and the values that they share in addition to the state."""

    def __init__(self, model: PreTrainedModel, choose: Mapping[int, Choose], state: DropState) -> None:
        self.model, self.decoder, self.choose, self.state = model, model.get_decoder(), choose, state
        self.recurrent = [not attends for attends in attending(self.decoder)]
        self.prefill = True
        self.running = False  # whether the whole model is; if not, backward runs layers again
        self.visual = torch.empty(0)  # [B, L] of the prompt
        self.decoded = torch.empty(0)  # [B, n] which of the tokens after the prompt are real
        self.decoded_unpadded = True
        self.planes: tuple[Tensor, ...] = ()  # DeepStack's, for the layers that add one each
        self.plane_places = torch.empty(0)  # [B, L] bool, whose rows those planes are

    # --- the whole model ------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model: is this a prompt, and one for which dropping is right?"""
        state = self.state
        ids, cache, past = read_call(args, kwargs, "dropping inside layers")
        self.prefill = past == 0
        if not self.prefill:
            self._continue(ids, past, kwargs.get("attention_mask"))
        self._check_window(past + ids.shape[1])
        if state.evict_from is not None and kwargs.get("use_cache") is False:
            raise InputError("dropping from the cache needs one: leave use_cache=False out")
        self.running, self.planes = True, ()
        if self.prefill:
            self._start(ids, kwargs)
        elif past == state.mask.shape[1] and state.evict_from is not None and state.stages:
            self._evict(cache, state.evict_from)  # the first run on this cache since the prompt's

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the whole model: a layer that runs later is run again by backward, and must not select again."""
        self.running = False

    def _start(self, ids: Tensor, kwargs: dict[str, Any]) -> None:
        """A new prompt."""
        mask = full_mask(self.model, {**kwargs, "input_ids": ids}).bool()
        if not bool(mask[:, -1].all()):
            raise InputError("dropping inside layers needs padding on the left: set tokenizer.padding_side='left'")
        self.state.mask, self.state.stages = mask, {}
        self.visual = visual_places(self.model, ids)

    def _continue(self, ids: Tensor, past: int, mask: Any) -> None:
        """Notes which of the tokens after the prompt are real; `mask` is the whole model's, of the shortened prompt."""
        prompt = self.state.mask
        length = prompt.shape[-1]
        # Before any prompt the noted mask has no rows, ndim 1.
        if past < length or prompt.ndim != 2:
            raise InputError(
                "the cache holds a prompt that did not run here: run the whole prompt at once, without a cache"
            )
        if ids.shape[1] > 1 and bool(visual_places(self.model, ids).any()):
            raise InputError(
                "several tokens on top of a cache, pictures among them (prefill_chunk_size, or a further turn with a "
                "picture): run the whole prompt at once"
            )
        self.decoded, self.decoded_unpadded = prompt.new_ones(prompt.shape[0], past + ids.shape[1] - length), True
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.decoded = mask[:, length:].bool()
            self.decoded_unpadded = bool(self.decoded.all())

    def _check_window(self, total: int) -> None:
        # Within the window, sliding layers are full ones. Beyond it, their mask counts from tokens that may be gone.
        config = self.decoder.config
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
        window = getattr(config, "sliding_window", None) if sliding else None
        if window is not None and total > window:
            raise InputError(
                f"{total} tokens exceed the sliding window of {window}, which is counted from the first layer: "
                "drop at the input with gripvlm.api"
            )

    def _evict(self, cache: Any, evict_from: int) -> None:
        """Takes what the last layer has not kept from the caches of `evict_from` and the layers after it."""
        batch, full = self.state.mask.shape
        last = self.state.latest
        assert last is not None
        every = torch.arange(full, device=last.order.device).expand(batch, -1)
        # Layers from the last stage on have cached no more than they may keep.
        for index in range(evict_from, max(self.state.stages)):
            stage, layer = self.state.in_layer(index), cache.layers[index]
            order = every if stage is None else stage.order
            if not isinstance(layer.keys, Tensor) or layer.keys.shape[-2] != order.shape[1]:
                raise InputError(
                    f"a {type(layer).__name__} cannot be shortened after the prompt: use the default dynamic cache"
                )
            # slot: a place in the prompt -> the place in this cache that has its keys
            slot = torch.zeros(batch, full, dtype=torch.long, device=order.device)
            slot.scatter_(1, order, every[:, : order.shape[1]])
            left = slot.gather(1, last.order)  # padding is one of the dropped, which this layer still had
            # In place in transformers' own cache: `generate` holds on to it.
            layer.keys, layer.values = (
                states.gather(2, left[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )

    # --- each layer -----------------------------------------------------------------------------------------------

    def before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before layer `index`: hands it the tokens that are left, with a mask and positions to match."""
        hidden, state = args[0], self.state
        if self.prefill and index in self.choose:
            # Backward (gradient checkpointing) must use the stage of the first run, not select again.
            if self.running:
                self._choose(index, hidden)
            elif index not in state.stages:
                raise InputError("the language model's layers run without their model: call model(**arguments)")
            hidden = state.stages[index].gather(hidden)
        evicted = not self.prefill and state.evict_from is not None and index >= state.evict_from
        stage = state.latest if evicted else state.in_layer(index)
        if stage is None:
            return None
        mask = kwargs.get("attention_mask")
        if not self.recurrent[index]:
            mask = self._narrow(mask, stage, hidden)
        elif self.prefill:
            mask = None if stage.unpadded else stage.real  # in decoding it is of the new tokens alone, and right
        kwargs = {**kwargs, "attention_mask": mask}
        if self.prefill:
            full = self.state.mask.shape[1]

            def left(part: Any) -> Any:
                """Of [..., L, d] what belongs to the tokens that are left. Layers that share keys run, in `generate`,
                on the last token alone: what they get is short already."""
                return _take(part, stage.order, -2) if isinstance(part, Tensor) and part.shape[-2] == full else part

            # The decoder computes rotary embeddings once for all layers, at the prompt's full length, and so it does
            # what Gemma 4's layers get by place. In decoding it does so for the new token alone, whose position is
            # right in every layer.
            args = (hidden, *map(left, args[1:]))
            kwargs["position_embeddings"] = tuple(map(left, kwargs["position_embeddings"]))
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = _take(kwargs["position_ids"], stage.order, -1)
        return (hidden, *args[1:]), kwargs

    def _choose(self, index: int, hidden: Tensor) -> None:
        """Lets the caller choose which tokens to keep before layer `index`, and notes the stage."""
        latest = self.state.latest
        if latest is None:
            order = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            real = self.state.mask
        else:
            order, real = latest.order, latest.real
        visual = self.visual.gather(-1, order) & real
        answer, merge = self.choose[index](hidden, visual), None
        if isinstance(answer, tuple):
            answer, merge = answer
        if not isinstance(answer, Tensor) or answer.shape != visual.shape or answer.dtype != torch.bool:
            got = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise InputError(f"the choice before layer {index} must be bool {tuple(visual.shape)}, got {got}")
        keep = real & (answer.to(hidden.device) | ~visual)  # text stays, whatever the answer has at its places
        # The one wait for the device in each stage: the shapes of all later layers depend on it.
        length = int(keep.sum(-1).max())
        # A stable sort puts kept tokens at the end, in order, and dropped ones where padding belongs.
        previous = torch.sort(keep.int(), dim=-1, stable=True).indices[:, -length:]
        self.state.stages[index] = Stage(order.gather(-1, previous), keep.gather(-1, previous), previous, merge)

    def _narrow(self, mask: Tensor | None, stage: Stage, hidden: Tensor) -> Tensor | None:
        """[B, 1, q, l (+ decoded)]: the mask of one layer for the tokens that are left before it."""
        if not self.prefill:
            return self._decoding_mask(stage, hidden)
        batch, full = self.state.mask.shape
        if mask is None:
            if stage.unpadded:
                return None
            mask = torch.ones(batch, 1, full, full, dtype=torch.bool, device=hidden.device).tril()
        self.state.boolean = mask.dtype == torch.bool
        # Rows and columns of transformers' own mask, which is not causal where images attend in both directions.
        mask = mask.expand(batch, *mask.shape[1:])
        length, queries = stage.order.shape[1], hidden.shape[1]
        if mask.shape[2] == full:
            rows = stage.order[:, -queries:]
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, stage.order[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
        # Padding sees itself, so that its softmax is defined.
        itself = torch.eye(length, dtype=torch.bool, device=hidden.device)[-queries:]
        sees = stage.real[:, None, None] | itself
        # The minimum and not the sum: two smallest numbers add up to -inf, and a row of those to NaN.
        return mask & sees if self.state.boolean else torch.minimum(mask, _additive(sees, mask))

    def _decoding_mask(self, stage: Stage, hidden: Tensor) -> Tensor | None:
        """A later token sees everything real up to itself. transformers' own mask is as long as some other layer."""
        new = hidden.shape[1]
        # Without a mask, attention may take its fastest kernel, as the unpruned model does.
        if new == 1 and self.decoded_unpadded and stage.unpadded:
            return None
        sees = torch.cat((stage.real, self.decoded), -1)[:, None, None]
        past = sees.shape[-1] - new
        before = torch.ones(new, past + new, dtype=torch.bool, device=sees.device).tril(past)
        itself = torch.eye(new, dtype=torch.bool, device=sees.device)  # padding too: its softmax must be defined
        sees = (sees & before) | nn.functional.pad(itself, (past, 0))
        return sees if self.state.boolean else _additive(sees, hidden)

    # --- DeepStack ------------------------------------------------------------------------------------------------

    def take_planes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: keeps DeepStack's planes from it, since it adds them at the prompt's full length."""
        planes, places = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if planes is None or places is None:
            return None
        self.planes, self.plane_places = tuple(planes), places
        return args, {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}

    def add_plane(self, index: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After layer `index`: each token that is left gets its own row of the layer's plane, if it has one."""
        if not self.prefill or index >= len(self.planes):
            return None
        visual, plane, stage = self.plane_places, self.planes[index], self.state.in_layer(index)
        if stage is not None:
            # A plane [K, d] has one row for each visual token of the batch, in order.
            row = (visual.flatten().cumsum(0) - 1).view(visual.shape)
            left = visual.gather(-1, stage.order) & stage.real
            visual, plane = left, plane[row.gather(-1, stage.order)[left]]
        return self.decoder._deepstack_process(output, visual, plane)


def _additive(sees: Tensor, like: Tensor) -> Tensor:
    """0 where a key is seen, the smallest number elsewhere."""
    return torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill(~sees, torch.finfo(like.dtype).min)


def _take(value: Tensor, order: Tensor, axis: int) -> Tensor:
    """Entries `order` [B, l] along `axis` of a tensor whose batch is the axis before; a batch of 1 serves all rows."""
    batch = value.ndim + axis - 1  # M-RoPE has its axes ahead of the batch
    value = value.expand(*value.shape[:batch], order.shape[0], *value.shape[batch + 1 :])
    index = order if axis == -1 else order[..., None]
    return value.gather(axis, index.expand(*value.shape[:batch], *order.shape, *value.shape[batch + 2 :]))
