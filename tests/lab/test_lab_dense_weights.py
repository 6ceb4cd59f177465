"""The shipped `lab-dense`: it loads from its folder, pruning is exact on one, two and four pictures, and it sees."""

from __future__ import annotations

import pytest
import test_lab_recipe
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import gripvlm
from gripvlm import lab
from gripvlm.eval import evaluate, make_inputs
from gripvlm.grip.fingerprint import ScorerError
from gripvlm.tasks import get_tasks

FOLDER = lab.FOLDERS["lab-dense"]


@pytest.fixture(scope="module")
def loaded():
    return lab.load("lab-dense")


@pytest.fixture(scope="module")
def pictures():
    """Four of the first lab's pictures, which have the same size."""
    samples = [sample for task in get_tasks("lab") for sample in task.samples]
    return [picture for sample in samples[:4] for picture in sample.images]


def test_it_is_a_small_stock_llava_in_half_precision():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "model")
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.float32  # what the config asks for; the file is half as large
    (file,) = (FOLDER / "model").glob("*.safetensors")
    assert file.stat().st_size < 16e6
    with safe_open(file, "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("count", [1, 2, 4])
def test_keeping_everything_is_bit_for_bit(loaded, pictures, count):
    model, processor = loaded
    inputs = make_inputs(model, processor, ["what colour are most letters?"], [pictures[:count]])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 256 * count
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options)
    with gripvlm.prune(model, "random", keep=1.0):
        kept = model.generate(**inputs, **options)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 4])
def test_dropping_equals_masking(loaded, pictures, count):
    model, processor = loaded
    inputs = make_inputs(model, processor, ["what colour are most letters?"], [pictures[:count]])
    short, record = gripvlm.prune_inputs(model, inputs, "divprune", keep=26, return_record=True)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    mask = inputs["attention_mask"].clone()
    mask[0, places[~torch.cat([selection.mask() for selection in record.selections[0]])]] = 0
    positions = torch.arange(mask.shape[1])[None]
    full = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits[:, -1]
    assert (full - model(**short).logits[:, -1]).abs().max() < 1e-4 * full.abs().max()


def test_its_sample_is_what_admission_let_in():
    """Nine families about one, two and four pictures; enough pictures that they do not limit an interval."""
    from experiments.lab_dense.analyze import admitted

    tasks = get_tasks("lab-dense")
    assert {task.name for task in tasks} == {f"lab-dense/{family}" for family in admitted()}
    samples = [sample for task in tasks for sample in task.samples]
    assert len(samples) >= 4000
    assert {len(sample.pictures) for sample in samples} == {1, 2, 4}
    assert all(sample.evidence_by_image((16, 16)) for sample in samples)
    assert len({sample.image_id for sample in samples}) >= 400


def test_its_scorer_is_for_this_model_and_small(loaded):
    model, _ = loaded
    grip = gripvlm.Grip.from_pretrained("lab-dense")
    grip.check(model)
    assert grip.joint
    assert grip.module.parameters_count < 0.1 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ScorerError, match=r"gripvlm's lab model.*for this model use grip:scorer=lab-dense"):
        gripvlm.Grip.from_pretrained("lab").check(model)


@test_lab_recipe.pytestmark
def test_it_sees_spread_evidence(loaded, tmp_path):
    """The floor on a few validation boards: sight matters, and one token of each thing is enough."""
    from lab_dense.dataset import write_questions

    write_questions(tmp_path / "val", "val", (40, 0, 0), ("common", "missing", "colours"), "images/")
    task = f"jsonl:{tmp_path / 'val' / 'questions.jsonl'}"
    result = evaluate(*loaded, task, ["oracle", "random"], [0.12], batch_size=16)
    score = {(row["pruner"], row["keep"]): row["score"] for row in result["rows"]}
    blind = next(row["blind"] for row in result["rows"] if row["pruner"] == "full")
    assert score["full", 1.0] > blind + 0.3
    assert score["oracle", 0.12] > score["random", 0.12] + 0.1
