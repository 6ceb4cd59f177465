"""Attention rows under sdpa against the weights that eager attention makes."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import gripvlm
from gripvlm.errors import InputError
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.models.vision_rules import merged_rows
from tiny_families import TINY, build, make

CLOSE = {"atol": 5e-6, "rtol": 1e-5}


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "paligemma", "mistral3"])
def test_rows_of_the_vision_tower_equal_eager_weights(name):
    """The CLS row where there is one (row 0), another row, and what each row receives."""
    inputs = make(TINY[name], [2], [7]).inputs
    pixels = {n: inputs[n] for n in ("pixel_values", "image_sizes") if n in inputs}
    eager, model = build(name, "eager").get_encoder("image"), build(name, "sdpa").get_encoder("image")
    with torch.no_grad():
        weights = eager(**pixels, output_attentions=True).attentions
        with capture_attention(model, [0, -1], [0, -2]) as rows, capture_attention(model, [1], "received") as received:
            model(**pixels)
    last = len(weights) - 1
    assert set(rows) == {0, last}
    torch.testing.assert_close(rows[0][0], weights[0][:, :, [0, -2]], **CLOSE)
    torch.testing.assert_close(rows[last][0], weights[last][:, :, [0, -2]], **CLOSE)
    torch.testing.assert_close(received[1][0], weights[1].mean(2), **CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "mistral3", "idefics3"])
def test_rows_of_the_language_model_equal_eager_weights(name):
    """The last tokens' rows in a left-padded batch, before any dropping and after."""
    batch = make(TINY[name], [1, 2], [7, 9]).inputs
    eager, model = build(name, "eager"), build(name, "sdpa")
    with torch.no_grad():
        for inputs in (batch, gripvlm.prune_inputs(model, batch, "random", keep=5)):
            weights = eager(**inputs, output_attentions=True).attentions
            with capture_attention(model.get_decoder(), [1, 2], [-1, -3]) as seen:
                logits = model(**inputs).logits
            for layer in (1, 2):
                (rows,) = seen[layer]
                torch.testing.assert_close(rows, weights[layer][:, :, [-1, -3]].float(), **CLOSE)
            assert torch.equal(model(**inputs).logits, logits)  # watching changes nothing


def test_decoding_makes_one_call_a_token():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with capture_attention(model.get_decoder(), [2], [-1]) as seen:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert [tuple(rows.shape) for rows in seen[2]] == [(1, 4, 1, length + step) for step in range(3)]
    assert all(torch.allclose(rows.sum(-1), torch.ones(1, 4, 1)) for rows in seen[2])


def test_windows_are_watched_call_by_call(monkeypatch):
    """Qwen's towers return no weights even under eager: the reference is taken inside eager attention."""
    inputs = make(TINY["qwen2_5_vl"], [2], [7]).inputs
    grids = {"grid_thw": inputs["image_grid_thw"]}
    plain, weights = modeling_qwen2_5_vl.eager_attention_forward, []

    def noting(*args, **kwargs):
        output = plain(*args, **kwargs)
        weights.append(output[1])
        return output

    monkeypatch.setattr(modeling_qwen2_5_vl, "eager_attention_forward", noting)
    with torch.no_grad():
        build("qwen2_5_vl", "eager").get_encoder("image")(inputs["pixel_values"], **grids)
        tower = build("qwen2_5_vl", "sdpa").get_encoder("image")
        with capture_attention(tower, [0, 1], "received") as seen:
            tower(inputs["pixel_values"], **grids)
    assert len(seen[1]) == 2  # layer 1 attends in the whole image: two images
    assert len(seen[0]) > 4  # layer 0 in windows
    for ours, reference in zip([*seen[0], *seen[1]], weights, strict=True):
        torch.testing.assert_close(ours, reference.mean(2), **CLOSE)


def test_windowed_towers_come_back_in_the_order_of_the_rows(monkeypatch):
    """Whole-image attention does not mind the tower's order, so rows must agree whatever the windows."""
    inputs = make(TINY["qwen2_5_vl"], [2], [7]).inputs
    grids = inputs["image_grid_thw"]
    tower = build("qwen2_5_vl").get_encoder("image")
    monkeypatch.setattr(tower, "fullatt_block_indexes", [0, 1])
    rows = {}
    for size in (16, 4096):  # 2 x 2 rows a window; one window
        monkeypatch.setattr(tower, "window_size", size)
        with torch.no_grad(), capture_attention(tower, [1], "received") as seen:
            tower(inputs["pixel_values"], grid_thw=grids)
        rows[size] = merged_rows(tower, seen[1], grids)
    assert [row.shape[-1] for row in rows[16]] == [h * w // 4 for _, h, w in grids.tolist()]
    for ours, reference in zip(rows[16], rows[4096], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)
        assert ours.std() > 1e-3 * ours.mean()
    with pytest.raises(InputError, match="one run each"):
        merged_rows(tower, seen[1] * 2, grids)


def test_nothing_is_left_behind_also_after_an_exception():
    before = AttentionInterface.get_interface
    model = build("llava")
    with capture_attention(model.get_decoder(), [0], [-1]):
        assert AttentionInterface.get_interface is not before
    with pytest.raises(KeyError), capture_attention(model.get_decoder(), [0], [-1]):
        raise KeyError
    assert AttentionInterface.get_interface is before


def test_two_models_in_two_threads_see_their_own():
    inputs = make(TINY["llava"], [1], [7]).inputs
    models = [build("llava", seed=seed) for seed in (1, 2)]
    expected, got, barrier = [], {}, threading.Barrier(2)
    before = AttentionInterface.get_interface
    for model in models:
        with torch.no_grad(), capture_attention(model.get_decoder(), [1], [-1]) as seen:
            model(**inputs)
            build("llava", seed=3)(**inputs)  # not watched
        expected.append(seen[1])

    def work(index: int) -> None:
        with torch.no_grad(), capture_attention(models[index].get_decoder(), [1], [-1]) as seen:
            barrier.wait(timeout=30)
            models[index](**inputs)
            barrier.wait(timeout=30)
        got[index] = seen[1]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(got[i]) == 1 and torch.equal(got[i][0], expected[i][0]) for i in (0, 1))
    assert AttentionInterface.get_interface is before


def test_what_is_refused_and_what_it_says():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    decoder = model.get_decoder()
    for layers, queries, says in (
        ([4], [0], "no layer 4 in this LlamaModel: it has 4, from 0 to 3"),
        ([-5], [0], "no layer -5"),
        ([0], "all", "give positions, such as"),
    ):
        with pytest.raises(InputError, match=says), capture_attention(decoder, layers, queries):
            pytest.fail("the block opened")
    with pytest.raises(InputError, match="no query 99 in a call over"), capture_attention(decoder, [0], [99]):
        model(**inputs)
