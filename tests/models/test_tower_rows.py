"""What pruners are given of the vision tower: attention, keys and states, brought to the language model's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import gripvlm
from gripvlm.errors import InputError, PrunerError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.models.vision_rules import pooled
from gripvlm.pruners import ScorePruner
from gripvlm.types import VisualTokens
from tiny_families import TINY, build, make

NAMES = sorted(name for name in TINY if FAMILIES[name].vision)
CLS = {"llava", "llava_next", "internvl", "qianfan_ocr", "vipllava"}


@dataclass(frozen=True)
class Looks(ScorePruner):
    """Ranks by attention received in the tower's last block, and remembers what it saw."""

    name: ClassVar[str] = "looks"
    needs: ClassVar[frozenset[str]] = frozenset({"vision_attention", "patches"})

    vision_layers: tuple[int, ...] = (-1, 0)
    seen: tuple = ()

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.vision[-1].received.mean(0)


def seen(name: str, images=(1, 2, 0), words=(7, 9, 5), attention: str = "sdpa") -> tuple:
    model, batch = build(name, attention), make(TINY[name], list(images), list(words))
    with torch.no_grad():
        return gripvlm.encode(model, batch.inputs, [Looks()]), batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_its_attention_keys_and_states(name, attention):
    encoded, batch = seen(name, attention=attention)
    width = build(name).config.vision_config.hidden_size
    for items, sizes in zip(encoded.samples, batch.sizes, strict=True):
        for item, n in zip(items, sizes, strict=True):
            assert set(item.vision) == {-1, 0}
            for rows in item.vision.values():
                assert rows.received.shape == (2, n)
                assert rows.keys.shape[0] == n
                assert (rows.cls is not None) == (name in CLS)
                assert rows.cls is None or rows.cls.shape == (2, n)
                assert float(rows.received.sum()) > 0
            assert item.patches.shape[0] == n
            assert item.patches.shape[1] in (width, 32)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_batch_or_on_the_attention_implementation(name):
    together, _ = seen(name)
    eager, _ = seen(name, attention="eager")
    for sample in range(2):
        model = build(name)
        with torch.no_grad():
            alone = gripvlm.encode(model, make(TINY[name], [1, 2, 0], [7, 9, 5], only=sample).inputs, [Looks()])
        for other in (together, eager):
            for a, b in zip(alone.samples[0], other.samples[sample], strict=True):
                torch.testing.assert_close(a.vision[-1].received, b.vision[-1].received, atol=2e-5, rtol=2e-4)
                torch.testing.assert_close(a.vision[0].keys, b.vision[0].keys, atol=2e-5, rtol=2e-4)
                torch.testing.assert_close(a.patches, b.patches, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_traced_to_the_patches_it_is_made_of(name, monkeypatch):
    """A patch changed behind the tower's last block changes one row of features; its states must be that row's."""
    from gripvlm.models.hooks.attention import blocks_of

    model, batch = build(name), make(TINY[name], [1], [7])
    # The tiny VipLLaVA's features are of two layers, the second of which is -2.
    number = -2 if name == "vipllava" else getattr(model.config, "vision_feature_layer", -1)
    block = blocks_of(model.get_encoder("image"))[number]
    with torch.no_grad():
        plain = gripvlm.encode(model, batch.inputs, [Looks()]).samples[0]
    tried, forward = set(), block.forward
    by_attention = FAMILIES[name].vision is pooled  # which may pass a patch over
    for patch in range(16) if by_attention else (1, 6, 9, 14):

        def shifted(*args, patch=patch, **kwargs):
            output = forward(*args, **kwargs)
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            flat = hidden if hidden.ndim == 2 else hidden[-1]
            flat[patch % len(flat)] += torch.linspace(-5, 5, flat.shape[-1])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with monkeypatch.context() as patched, torch.no_grad():  # hooks would run behind transformers' own
            patched.setattr(block, "forward", shifted)
            changed = gripvlm.encode(model, batch.inputs, [Looks()]).samples[0]
        for a, b in zip(plain, changed, strict=True):
            features = (a.features - b.features).abs().amax(-1) > 1e-4
            states = (a.patches - b.patches).abs().amax(-1) > 1e-4
            if by_attention:
                assert not bool((features & ~states).any()), (name, patch)
                states = features
            assert torch.equal(features, states), (name, patch)
            tried |= set(states.nonzero().flatten().tolist())
    assert len(tried) >= 2


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "mistral3", "llava_next"])
def test_rows_are_means_of_the_weights_that_eager_attention_makes(name):
    """By hand from `output_attentions`: CLS row, and the mean over queries, in float64."""
    encoded, batch = seen(name, images=(1,), words=(7,))
    model = build(name, "eager")
    pixels = {n: batch.inputs[n] for n in ("pixel_values", "image_sizes") if n in batch.inputs}
    if name == "llava_next":
        pixels = {"pixel_values": batch.inputs["pixel_values"][0]}
    with torch.no_grad():
        weights = model.get_encoder("image")(**pixels, output_attentions=True).attentions[-1].double()
    (item,) = encoded.samples[0]
    rows, n = item.vision[-1], item.features.shape[0]
    received = weights.mean(2)  # [tiles, H, L]
    if name == "llava":
        expected = received[0, :, 1:]
    elif name == "internvl":
        expected = received[0, :, 1:].reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
        cls = weights[0, :, 0, 1:].reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
        torch.testing.assert_close(rows.cls.double(), cls, atol=1e-6, rtol=1e-4)
    elif name == "gemma3":
        expected = received[0].reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    elif name == "mistral3":
        h, w = item.grid
        expected = received[0].reshape(2, h, 2, w, 2).mean((2, 4)).flatten(1)
    else:  # the base tile's 2 x 2 patches come first, newline rows have none behind them
        torch.testing.assert_close(rows.received[:, :4].double(), received[0, :, 1:], atol=1e-6, rtol=1e-4)
        assert float(rows.received[:, -1].abs().max()) == 0
        assert n > 8
        return
    torch.testing.assert_close(rows.received.double(), expected, atol=1e-6, rtol=1e-4)


@dataclass(frozen=True)
class Weighs(Looks):
    """Reads what patches give to one another too."""

    needs: ClassVar[frozenset[str]] = frozenset({"vision_attention", "vision_given"})


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next", "gemma3"])
def test_attention_among_patches_leaves_the_cls_token_out(name):
    """Against the inner part of eager weights, row sums and column sums, in float64."""
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    plain = gripvlm.encode(model, batch.inputs, [Looks()])
    assert plain.samples[0][0].vision[-1].given is None
    encoded = gripvlm.encode(model, batch.inputs, [Weighs()])
    rows = encoded.samples[0][0].vision[-1]
    if name == "gemma3":
        assert rows.given is rows.patch_received is None
        return
    pixels = batch.inputs["pixel_values"][:1] if name != "llava_next" else batch.inputs["pixel_values"][0]
    with torch.no_grad():
        weights = build(name, "eager").get_encoder("image")(pixels, output_attentions=True).attentions[-1].double()
    inner = weights[0, :, 1:, 1:]
    took, gave = inner.mean(1), inner.mean(2)
    if name == "internvl":
        took, gave = (weight.reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1) for weight in (took, gave))
    n = took.shape[1]
    torch.testing.assert_close(rows.patch_received[:, :n].double(), took, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(rows.given[:, :n].double(), gave, atol=1e-6, rtol=1e-4)
    assert name != "llava_next" or float(rows.given[:, -1].abs().max()) == 0  # a newline row
    with pytest.raises(InputError, match=r"pruners=\['fopru'\]"):
        gripvlm.prune_inputs(model, batch.inputs, "fopru", 4, encoded=plain)


@pytest.mark.parametrize("name", sorted({"qwen2_5_vl", "qwen3_vl", "kimi_k25"} & set(TINY)))
def test_images_and_videos_of_one_prompt_keep_their_own(name):
    model = build(name)
    with torch.no_grad():
        both = gripvlm.encode(model, make(TINY[name], ["ivv"], [9]).inputs, [Looks()])
        again = gripvlm.encode(model, make(TINY[name], ["ivv", "v"], [9, 7]).inputs, [Looks()])
    for a, b in zip(both.samples[0], again.samples[0], strict=True):
        assert a.vision[-1].received.shape[1] == a.features.shape[0]
        torch.testing.assert_close(a.vision[-1].received, b.vision[-1].received, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3"])
def test_a_pruner_that_looks_prunes_like_any_other(name):
    model, batch = build(name), make(TINY[name], [1, 2, 0], [7, 9, 5])
    with gripvlm.prune(model, Looks(), keep=5) as record:
        ids = model.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    encoded, _ = seen(name)
    for items, selections in zip(encoded.samples, record.selections, strict=True):
        for item, selection in zip(items, selections, strict=True):
            best = item.vision[-1].received.mean(0).topk(5).indices.sort().values
            assert selection.indices.tolist() == best.tolist()
    reused = gripvlm.prune_inputs(model, batch.inputs, Looks(), keep=5, encoded=encoded)
    again = model.generate(**reused, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids[:, -3:], again[:, -3:])


def test_what_is_refused_and_what_it_says():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    bare = gripvlm.encode(model, inputs)
    with pytest.raises(InputError, match=r"encoded without what pruner 'looks' reads.*pruners=\[pruner\]"):
        gripvlm.prune_inputs(model, inputs, Looks(), keep=4, encoded=bare)
    for name in sorted({"gemma4", "gemma4_unified", "lfm2_vl"} & set(TINY)):
        with (
            pytest.raises(UnsupportedModelError, match=rf"needs patches and vision_attention.* {name}'s rows.*llava"),
            gripvlm.prune(build(name), Looks(), keep=4),
        ):
            pytest.fail("the block opened")
    with pytest.raises(InputError, match="no layer -4"):
        gripvlm.prune_inputs(model, inputs, Looks(vision_layers=(-4,)), keep=4)
    with pytest.raises(PrunerError, match=r"names no layers: give it vision_layers"):
        gripvlm.prune_inputs(model, inputs, Looks(vision_layers=()), keep=4)


def test_the_labs_tower_is_read_from_its_own_last_blocks():
    """Its stem has numbered parts too, which are no blocks."""
    from tiny_lab import tiny_lab

    model, _ = tiny_lab()
    tower = model.get_encoder("image")
    pixels = torch.rand(1, 3, 128, 128)
    with capture_attention(tower, [-1, 0], [0]) as seen:
        tower(pixels)
    assert sorted(seen) == [0, 1]
    assert seen[1][0].shape[-1] == 257
