"""The shipped lab model: it loads from its folder, answers, and pruning is exact on it."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

import gripvlm
from gripvlm import lab
from gripvlm.eval import evaluate, make_inputs
from gripvlm.tasks import get_tasks

CORE_ONLY = """
import sys

for name in {art!r}:
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["gripvlm", "ask", "--model", "lab", "--image", {image!r}, "--question", "is there a fish?", "--keep", "10%",
            "--pruner", "divprune"]
from gripvlm.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def loaded():
    return lab.load()


@pytest.fixture(scope="module")
def batch(loaded):
    model, processor = loaded
    task = get_tasks("lab/reading")[0]
    samples = task.samples[:3]
    texts = [task.prompt(sample) for sample in samples]
    texts[1] = texts[1].replace("answer:", "choose: one, two, three. answer:")  # ragged: padding on the left
    return make_inputs(model, processor, texts, [sample.images for sample in samples])


def test_it_is_a_small_stock_llava_in_half_precision():
    model = AutoModelForImageTextToText.from_pretrained(lab.MODEL)
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.float32  # what the config asks for; the file is half as large
    assert 2e6 < sum(weight.numel() for weight in model.parameters()) < 8e6
    files = list(lab.MODEL.glob("*.safetensors"))
    assert files
    assert sum(file.stat().st_size for file in files) < 16e6
    header = files[0].read_bytes()
    length = int.from_bytes(header[:8], "little")
    kinds = {entry["dtype"] for name, entry in json.loads(header[8 : 8 + length]).items() if name != "__metadata__"}
    assert kinds == {"F16"}
    assert AutoProcessor.from_pretrained(lab.MODEL).chat_template


@torch.no_grad()
@pytest.mark.parametrize("bars", [True, False])
def test_loading_is_silent_and_leaves_the_bars_as_they_were(capfd, bars):
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[bars]()
    try:
        lab.load()
        assert logging.is_progress_bar_enabled() is bars
    finally:
        switch[before]()
    assert capfd.readouterr().err == ""


def test_its_tower_attends_like_clips(loaded):
    model, _ = loaded
    tower = model.model.vision_tower
    pixels = torch.rand(1, 3, 128, 128)
    states = tower(pixels).hidden_states
    assert states[-1].shape == (1, 257, model.config.vision_config.hidden_size)
    tower.set_attn_implementation("eager")
    try:
        _, rows = tower.encoder.layers[-1].self_attn(states[-2])
    finally:
        tower.set_attn_implementation("sdpa")
    assert rows.shape[-2:] == (257, 257)
    assert torch.allclose(rows[:, :, 0].sum(-1), torch.ones(1), atol=1e-5)  # the CLS token's row


def test_the_chat_template_makes_the_trained_prompt(loaded):
    _, processor = loaded
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a cat?"}]}]
    assert processor.apply_chat_template(turn) == "<image> is there a cat? answer:"


def test_keeping_everything_is_bit_for_bit(loaded, batch):
    model, _ = loaded
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**batch, **options)
    with gripvlm.prune(model, "random", keep=1.0):
        kept = model.generate(**batch, **options)
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@torch.no_grad()
def test_dropping_equals_masking(loaded, batch):
    model, _ = loaded
    short, record = gripvlm.prune_inputs(model, batch, "divprune", keep=26, return_record=True)
    mask = batch["attention_mask"].clone()
    for row, ids, mine in zip(mask, batch["input_ids"], record.selections, strict=True):
        places = (ids == model.config.image_token_id).nonzero().flatten()
        row[places[~mine[0].mask()]] = 0
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    full = model(**{**batch, "attention_mask": mask}, position_ids=positions).logits[:, -1]
    dropped = model(**short).logits[:, -1]
    assert (full - dropped).abs().max() < 1e-4 * full.abs().max()


def test_the_cache_is_shorter_and_the_prompt_whole(loaded, batch):
    model, _ = loaded
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**batch, **options)
    with gripvlm.prune(model, "grid", keep=26) as record:
        pruned = model.generate(**batch, **options)
    assert plain.past_key_values.get_seq_length() - pruned.past_key_values.get_seq_length() == 256 - 26
    assert torch.equal(pruned.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert [[s.k for s in mine] for mine in record.selections] == [[26]] * 3
    assert "generate" not in vars(model)


def test_what_it_scores(loaded):
    """The floor of the lab on a slice: sight matters, and evidence matters more than chance."""
    result = evaluate(*loaded, "lab", ["oracle", "random"], [0.1], limit=24, batch_size=16)
    score = {(row["pruner"], row["keep"]): row["score"] for row in result["means"]}
    blind = sum(row["blind"] for row in result["rows"] if row["pruner"] == "full") / 6
    assert score["full", 1.0] > blind + 0.3
    assert score["full", 1.0] > 0.65
    assert score["oracle", 0.1] > score["random", 0.1] + 0.1


def test_it_answers_without_the_art_packages():
    art = {"qtawesome", "manimgx_fonts", "skimage", "sklearn", "scipy", "matplotlib", "font_roboto"}
    image = str(sorted((lab.SAMPLE / "images").iterdir())[0])
    done = subprocess.run(
        [sys.executable, "-c", CORE_ONLY.format(art=art, image=image)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "26 of 256" in done.stdout
