"""The shipped `lab-dense`: it loads from its folder, pruning is exact on one, two and four pictures, and it sees.

Named test_lab_dense_weights.py once its files are in the package; until then pytest does not collect it.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import gripvlm
from gripvlm import lab
from gripvlm.eval import evaluate, make_inputs
from gripvlm.tasks import get_tasks

FOLDER = lab.FOLDERS["lab-dense"]


@pytest.fixture(scope="module")
def loaded():
    return lab.load("lab-dense")


@pytest.fixture(scope="module")
def samples():
    return [sample for task in get_tasks("lab-dense") for sample in task.samples]


def asked_about(samples, count):
    return next(sample for sample in samples if len(sample.pictures) == count)


def test_it_is_a_small_stock_llava_in_half_precision():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "model")
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.float32  # what the config asks for; the file is half as large
    (file,) = (FOLDER / "model").glob("*.safetensors")
    assert file.stat().st_size < 16e6
    with safe_open(file, "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_its_sample_asks_about_one_two_and_four_pictures(samples):
    assert {len(sample.pictures) for sample in samples} >= {1, 2, 4}
    assert all(image.size == (128, 128) for image in asked_about(samples, 4).images)
    assert all(path.is_file() for sample in samples for path in sample.pictures)
    # enough clusters for intervals: questions about several pictures must not link them all
    assert len({sample.image_id for sample in samples}) >= 20


@pytest.mark.parametrize("count", [1, 2, 4])
def test_keeping_everything_is_bit_for_bit(loaded, samples, count):
    model, processor = loaded
    sample = asked_about(samples, count)
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 256 * count
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    with gripvlm.prune(model, "random", keep=1.0):
        kept = model.generate(**inputs, **options)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 4])
def test_dropping_equals_masking(loaded, samples, count):
    model, processor = loaded
    sample = asked_about(samples, count)
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    short, record = gripvlm.prune_inputs(model, inputs, "divprune", keep=26, return_record=True)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    mask = inputs["attention_mask"].clone()
    mask[0, places[~torch.cat([selection.mask() for selection in record.selections[0]])]] = 0
    positions = torch.arange(mask.shape[1])[None]
    full = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits[:, -1]
    assert (full - model(**short).logits[:, -1]).abs().max() < 1e-4 * full.abs().max()


def test_its_scorer_is_its_own(loaded):
    pruner = gripvlm.get_pruner("grip:scorer=lab-dense")
    pruner.check(loaded[0])
    with pytest.raises(gripvlm.GripError):
        gripvlm.get_pruner("grip").check(loaded[0])


def test_what_it_scores(loaded):
    """The floor on a slice: sight matters, and evidence matters more than chance."""
    result = evaluate(*loaded, "lab-dense", ["oracle", "random"], [0.1], limit=16, batch_size=8)
    score = {(row["pruner"], row["keep"]): row["score"] for row in result["means"]}
    blinds = [row["blind"] for row in result["rows"] if row["pruner"] == "full"]
    assert score["full", 1.0] > sum(blinds) / len(blinds) + 0.2
    assert score["oracle", 0.1] > score["random", 0.1]
