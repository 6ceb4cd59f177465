"""`downsample`: the rasters by hand, the same answers as a picture that the user resized, and honest refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vllm_models import noise

from eval_cases import Letters, run
from gripvlm.api import encode
from gripvlm.budget import Budget
from gripvlm.errors import BudgetError
from gripvlm.eval import make_inputs, samples_path
from gripvlm.eval.downsample import downsampled
from gripvlm.lab.tower import LabVisionEmbeddings
from gripvlm.models.compat import takes
from gripvlm.models.smaller import interpolated_positions, raster_within, row_pixels, smaller_picture
from tiny_families import TINY, build
from tiny_families.base import BOS, IMAGE, modality_types, pad
from tiny_lab import tiny_lab
from tiny_models import tiny_llava


@pytest.mark.parametrize(
    ("grid", "k", "raster"),
    [
        ((16, 16), 256, (16, 16)),
        ((16, 16), 255, (15, 16)),  # 15 x 17 would be longer than before
        ((16, 16), 64, (8, 8)),
        ((16, 16), 32, (5, 6)),
        ((16, 16), 15, (3, 5)),
        ((16, 16), 1, (1, 1)),
        ((4, 8), 8, (2, 4)),
        ((8, 4), 9, (4, 2)),
        ((1, 10), 3, (1, 3)),
    ],
)
def test_rasters(grid, k, raster):
    assert raster_within(grid, k) == raster


def test_rows_are_those_of_a_picture_that_was_resized_by_hand(tmp_path):
    """Fewer tokens, the same budget's limit, answers of the smaller picture, and no mask of the full one."""
    out = tmp_path / "r.json"
    result = run(out, tasks=[Letters()], pruners=["downsample", "grid"], keeps=[40, 1.0])
    rows = {(row["pruner"], row["keep"]): row for row in result["rows"]}
    assert rows["downsample", 40]["tokens"] == 36  # 6 x 6
    assert rows["downsample", 40]["keep_fraction"] == 36 / 256
    assert rows["downsample", 40]["seconds_vision"] > 0
    records = [json.loads(line) for line in samples_path(out).read_text().splitlines()[2:]]
    answers = {(one["pruner"], one["keep"], one["id"]): one for one in records}

    model, processor = tiny_lab()
    for sample in Letters().samples[:3]:
        small = sample.images[0].resize((48, 48), Image.Resampling.BICUBIC)
        inputs = make_inputs(model, processor, [sample.question], [small], do_resize=False)
        assert inputs["pixel_values"].shape[-2:] == (48, 48)
        with interpolated_positions(model), torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        small_answer = answers["downsample", "40", sample.id]
        assert small_answer["prediction"] == said.strip()
        assert "kept" not in small_answer
        assert (small_answer["k"], small_answer["n"]) == (36, 256)
    # the whole picture is the unpruned model's
    same = [
        answers["downsample", "1.0", s.id]["prediction"] == answers["full", "1.0", s.id]["prediction"]
        for s in Letters().samples
    ]
    assert all(same)


class NativeProcessor:
    """A family's own image processor, and prompts of nothing but pictures: its other parts need torchvision."""

    chat_template, image_token = None, "<image>"

    def __init__(self, model, image_processor):
        self.model, self.image_processor = model, image_processor
        self.side = row_pixels(model)

    def __call__(self, text, images, do_resize=True, **_):
        flat = [picture for own in images for picture in own]
        made = self.image_processor(flat, do_resize=do_resize, return_tensors="pt")
        if "image_grid_thw" in made:
            patch = self.model.config.vision_config.patch_size
            sizes = [(h * patch, w * patch) for _, h, w in made["image_grid_thw"].tolist()]
        else:
            sizes = made["image_sizes"].tolist()
        counts = iter([(h // self.side) * (w // self.side) for h, w in sizes])
        rows = [[BOS, *(IMAGE for _ in own for _ in range(next(counts))), 7] for own in images]
        ids = pad(rows, "left")
        if "mm_token_type_ids" in takes(self.model.forward):
            ids |= modality_types(ids["input_ids"])
        made.update(ids)
        return made


NATIVE = {
    "qwen2_5_vl": lambda **sizes: Qwen2VLImageProcessorPil(**sizes, min_pixels=64, max_pixels=64 * 64),
    "glm4v": lambda **sizes: Glm4vImageProcessorPil(**sizes, size={"shortest_edge": 64, "longest_edge": 64 * 64 * 2}),
    "mistral3": lambda patch_size, **_: PixtralImageProcessorPil(
        patch_size={"height": patch_size, "width": patch_size}, size={"longest_edge": 64}
    ),
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_tower_with_native_resolution_gets_the_smaller_picture(name):
    """Each picture of a batch by itself; and at its full budget the raster that it had."""
    model = build(name)
    side, patch = row_pixels(model), model.config.vision_config.patch_size
    processor = NativeProcessor(model, NATIVE[name](patch_size=patch, merge_size=side // patch))
    pictures = [[noise(4 * side, 8 * side, 0)], [noise(8 * side, 4 * side, 1), noise(4 * side, 4 * side, 2)]]
    texts = ["what?", "which?"]
    full = encode(model, make_inputs(model, processor, texts, pictures, do_resize=False))
    assert grids(full) == [(4, 8), (8, 4), (4, 4)]
    _, small = downsampled(model, processor, texts, pictures, full, Budget(7))
    assert grids(small) == [(2, 3), (3, 2), (2, 3)]
    _, small = downsampled(model, processor, texts, pictures, full, Budget(0.25))
    assert grids(small) == [(2, 4), (4, 2), (2, 2)]
    _, same = downsampled(model, processor, texts, pictures, full, Budget(1.0))
    for mine, whole in zip(items(same), items(full), strict=True):
        assert torch.equal(mine.features, whole.features)


def items(encoded):
    return [item for own in encoded.samples for item in own]


def grids(encoded):
    return [item.grid for item in items(encoded)]


@pytest.mark.parametrize(("name", "side"), [("llava", 8), ("mistral3", 8), ("qwen2_5_vl", 8), ("kimi_k25", 8)])
def test_the_square_of_a_row(name, side):
    """Patches of 4 pixels, 2 x 2 of which make a row, under each of the names that configs have for it; or of 8."""
    if name not in TINY:
        pytest.skip("transformers is too old for it")
    assert row_pixels(build(name)) == side


def test_learnt_positions_are_interpolated_only_inside():
    model = tiny_llava()
    with torch.no_grad(), interpolated_positions(model):
        rows = model.model.get_image_features(torch.zeros(1, 3, 16, 24)).pooler_output
    assert rows[0].shape[0] == 2 * 3
    with pytest.raises(ValueError, match="doesn't match model"):
        model.model.get_image_features(torch.zeros(1, 3, 16, 24))


def test_the_labs_positions_keep_their_places():
    """At the raster of training nothing changes; at half of it each patch has the mean place of four."""
    embeddings = LabVisionEmbeddings(tiny_lab()[0].config.vision_config)
    torch.nn.init.normal_(embeddings.position_embedding)
    with torch.no_grad():
        assert torch.allclose(embeddings._positions(torch.Size((16, 16))), embeddings.position_embedding, atol=1e-6)
        rows = torch.arange(16.0)[:, None].expand(16, 16).flatten()
        embeddings.position_embedding.data[1:] = rows[:, None]
        halved = embeddings._positions(torch.Size((8, 8)))[1:].unflatten(0, (8, 8))
    assert torch.allclose(halved[2:-2, 0, 0], torch.arange(0.5, 16, 2)[2:-2])


def test_what_a_processor_would_crop_is_cropped_first():
    processor = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    picture = Image.new("RGB", (200, 100), "red")
    picture.paste("blue", (50, 0, 150, 100))
    small = smaller_picture(tiny_llava(), processor, picture, (2, 3))
    assert small.size == (24, 16)
    assert small.getcolors() == [(24 * 16, (0, 0, 255))]


@pytest.mark.parametrize("name", ["internvl", "gemma3"])
def test_families_of_tiles_or_fixed_counts_are_refused(name):
    with pytest.raises(BudgetError, match=f"a smaller picture does not give {name} fewer tokens"):
        smaller_picture(build(name), SimpleNamespace(), Image.new("RGB", (64, 64)), (2, 2))


def test_a_processor_with_a_size_of_its_own_is_refused():
    model, processor = tiny_lab()
    texts, pictures = ["what?"], [[Image.new("RGB", (128, 128))]]
    full = encode(model, make_inputs(model, processor, texts, pictures))

    class Stubborn:
        image_processor = processor.image_processor
        tokenizer, chat_template, image_token = processor.tokenizer, processor.chat_template, processor.image_token
        apply_chat_template = processor.apply_chat_template

        def __call__(self, *, do_resize, **arguments):
            return processor(**arguments)

    with pytest.raises(BudgetError, match=r"rasters \[\(16, 16\)\] of pictures made for \[\(4, 4\)\]"):
        downsampled(model, Stubborn(), texts, pictures, full, Budget(16))
