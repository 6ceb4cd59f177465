"""What of the vLLM plug-in does not need vLLM: choices, turns, layouts, and the command."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.cli import main
from gripvlm.errors import BudgetError, GripError, InputError, PrunerError, UnsupportedModelError
from gripvlm.integrations.vllm import engine_args, launch
from gripvlm.integrations.vllm.choices import Picture, Settings, Shown
from gripvlm.integrations.vllm.layouts import SERVED, architecture
from gripvlm.integrations.vllm.turns import Turns
from gripvlm.models.families import FAMILIES
from gripvlm.pruners.registry import get_pruner, register_pruner

# --- arguments --------------------------------------------------------------------------------------------------------


def test_engine_args():
    args = engine_args(
        "lab", ["grip", "divprune"], 26, max_model_len=512, hf_overrides={"max_position_embeddings": 512}
    )
    settings = {"pruners": ["grip", "divprune"], "keep": "26", "positions": "original", "cache_mb": 256}
    assert args == {
        "model": str(lab.MODEL),
        "hf_overrides": {"max_position_embeddings": 512, "architectures": ["GripTransformers"], "gripvlm": settings},
        "max_model_len": 512,
    }
    assert Settings.of(SimpleNamespace(**args["hf_overrides"])).plain == settings
    # Pictures that share a budget are one item of vLLM, which its cache cannot hold.
    register_pruner("shared_norm", "vllm_models:SharedNorm")
    assert engine_args("lab", "shared_norm", 26)["mm_processor_cache_gb"] == 0


BAD = {
    "keep": (lambda: engine_args("lab", "norm", 0), BudgetError, "keep=0 keeps nothing"),
    "no keep": (lambda: engine_args("lab", "norm"), BudgetError, "pruner 'norm' needs a budget"),
    "pruner": (lambda: engine_args("lab", "nrom", 8), PrunerError, "unknown pruner 'nrom': did you mean"),
    "an object": (lambda: engine_args("lab", get_pruner("norm"), 8), InputError, "pass a spec such as 'divprune'"),
    "positions": (lambda: engine_args("lab", "norm", 8, positions="new"), InputError, "pass 'original' or"),
    "cache": (lambda: engine_args("lab", "norm", 8, cache_mb=-1), InputError, "pass megabytes, 0 or more"),
    "llm": (lambda: engine_args("lab", "fastv", 0.5), PrunerError, "in vLLM all layers of a request have one length"),
    "tower": (lambda: engine_args("lab", "tome", 0.5), PrunerError, "inside the vision tower"),
    "pixels": (lambda: engine_args("lab", "repeats(norm)", 0.5), PrunerError, "ahead of the vision tower"),
    "split": (lambda: engine_args("lab", "split(norm)", 0.5), PrunerError, "'split' moves budget between the tiles"),
    "raised": (lambda: engine_args("lab", "top_p(grip)", 0.5), PrunerError, "'top_p' moves budget between the tiles"),
    "tiles": (lambda: engine_args("lab", "mmr(hired)", 0.5), PrunerError, "'mmr' moves budget between the tiles"),
    "first layer": (lambda: engine_args("lab", "mmr(hawk)", 0.5), PrunerError, "whose weights vLLM keeps in another"),
    "no model": (lambda: engine_args("./nowhere", "norm", 8), GripError, "the model ./nowhere cannot be read"),
    "function": (lambda: engine_args("lab", "norm", 8, hf_overrides=id), InputError, "hf_overrides is a function"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_served_is_refused_before_vllm_starts(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_served_or_refused_with_a_reason(family):
    config, pruners = SimpleNamespace(model_type=family), [get_pruner("divprune")]
    if family in SERVED:
        assert architecture(config, pruners) == (SERVED[family].native or "GripTransformers")
    else:
        with pytest.raises(UnsupportedModelError, match=f"{family} cannot be pruned inside vLLM, because"):
            architecture(config, pruners)


def test_a_pruner_that_reads_the_tower_needs_the_transformers_backend():
    reader = [get_pruner("fopru")]
    assert architecture(SimpleNamespace(model_type="qwen2_5_vl"), reader) == "GripTransformers"
    with pytest.raises(PrunerError, match="reads the vision tower, which vLLM's own class of qwen3_vl does not show"):
        architecture(SimpleNamespace(model_type="qwen3_vl"), reader)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_hands_vllm_its_arguments(monkeypatch):
    lines: list[list[str]] = []
    monkeypatch.setattr(launch, "version", lambda name: "0.32.0")
    monkeypatch.setattr(os, "execv", lambda program, line: lines.append(line))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    typed = ["vllm", "serve", "lab", "--pruners", "grip,divprune", "--keep", "10%", "--port", "8001"]
    assert main([*typed, "--dtype=float32", "--trust-request-mm-kwargs"]) == 0
    assert os.environ.pop("VLLM_USE_V2_MODEL_RUNNER") == "0"
    python, *rest = lines[0]
    assert python == sys.executable
    assert rest[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(lab.MODEL)]
    assert json.loads(rest[5])["gripvlm"]["pruners"] == ["grip", "divprune"]
    assert rest[6:] == ["--served-model-name", "lab", "--port", "8001", "--dtype=float32", "--trust-request-mm-kwargs"]


def test_what_says_where_a_model_is_also_says_it_to_us(monkeypatch):
    monkeypatch.setattr(launch, "version", lambda name: "0.32.0")
    monkeypatch.setattr(os, "execv", lambda program, line: None)
    read: dict[str, Any] = {}
    plain = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda place, **how: read.update(how) or plain(place))
    assert main(["vllm", "serve", "lab", "--revision=v2", "--trust_remote_code", "--port", "8001"]) == 0
    assert read == {"revision": "v2", "trust_remote_code": True}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--keep", "0"], "keep=0 keeps nothing"),
        (["--pruners", "fastv"], "drops tokens inside the language model"),
        (["--hf-overrides", "{}"], "--hf-overrides is set by gripvlm"),
        (["--hf_overrides.max_position_embeddings", "512"], "--hf-overrides is set by gripvlm"),
        (["--hf-over={}"], "--hf-over is set by gripvlm"),
    ],
)
def test_wrong_options_start_nothing(monkeypatch, capsys, typed, message):
    monkeypatch.setattr(launch, "version", lambda name: "0.32.0")
    monkeypatch.setattr(os, "execv", lambda program, line: pytest.fail("it started"))
    assert main(["vllm", "serve", "lab", *typed]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_vllm_the_command_says_what_to_install(monkeypatch, capsys):
    def missing(name):
        raise launch.PackageNotFoundError(name)

    monkeypatch.setattr(launch, "version", missing)
    assert main(["vllm", "serve", "lab"]) == 2
    assert 'pip install "gripvlm[vllm]"' in " ".join(capsys.readouterr().err.split())


# --- what travels to the model ----------------------------------------------------------------------------------------


def test_a_choice_travels_as_bytes():
    pictures = Picture("a", 0, "grip", "<=64", (5, 6), 256, 256), Picture("b", 1, "grip", "0.1", None, 35, 7)
    shown = Shown(pictures, ((1, 2, 3),))
    assert Shown.unpacked(shown.packed()) == shown
    assert shown.extent == 256 + 7 + 3
    assert [picture.count for picture in pictures] == [64, 4]


def test_a_budget_of_null_is_the_servers():
    settings = Settings(("divprune", "keep_all"), "25%", "original", 0)
    assert settings.budget({"keep": None}) == settings.budget({}) == Budget("25%")
    assert settings.budget({"keep": 9}) == Budget(9)
    assert settings.budget({"pruner": "keep_all", "keep": None}) == Budget(1.0)


def test_a_picture_whose_places_do_not_fit_is_refused():
    huge = Picture("k", 0, "norm", "25%", n=70_000, extent=70_000)
    with pytest.raises(InputError, match="a picture takes 70000 positions, and at most 65536 can be served"):
        Shown((huge,)).packed()


def test_everything_that_decides_a_selection_is_in_the_digest():
    base = {"key": "a", "index": 0, "pruner": "grip", "keep": "64", "question": (1, 2)}
    other = {"key": "b", "index": 1, "pruner": "grip:dtype=float32", "keep": "0.25", "question": (1, 3)}
    digests = {Picture(**base).digest} | {Picture(**base | {name: value}).digest for name, value in other.items()}
    assert len(digests) == 1 + len(other)
    pair = Picture(**base), Picture(**base | {"index": 1})
    assert Shown(pair, ((4,),)).digest != Shown(pair, ((5,),)).digest


# --- the question -----------------------------------------------------------------------------------------------------

QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(text: str, images: int = 1) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


CHATS = {
    "alone": ([picture("What is\nthis?")], ["What is\nthis?"]),
    "system": ([said("system", "Be short."), picture("What?")], ["What?"]),
    "two turns": ([picture("What?"), said("assistant", "A car."), said("user", "Which colour?")], ["What?"]),
    "two pictures": ([picture("Compare them.", 2)], ["Compare them."] * 2),
    "one in each turn": ([picture("What?"), said("assistant", "A car."), picture("And this?")], ["What?", "And this?"]),
    "text first": (
        [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]}],
        ["Look:"],
    ),
}


@pytest.mark.parametrize(("chat", "expected"), CHATS.values(), ids=CHATS)
def test_the_question_is_the_turn_that_holds_the_picture(chat, expected):
    from vllm_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = QWEN
    turns = Turns(tokenizer, tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    found = [turns.question(ids, image) for image in range(len(expected))]
    assert [tokenizer.decode(question) for question in found] == expected


@pytest.mark.parametrize(("name", "images"), [("lab", 1), ("lab-dense", 1), ("lab-dense", 3)])
def test_words_that_the_template_adds_are_no_question(name, images):
    """The dense lab's template numbers the pictures of a turn."""
    processor = AutoProcessor.from_pretrained(lab.FOLDERS[name] / "model")
    tokenizer = processor.tokenizer
    turns = Turns(processor, tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    text = processor.apply_chat_template(
        [picture("is there a car?", images)], add_generation_prompt=True, tokenize=False
    )
    for image in range(images):
        question = turns.question(tokenizer.encode(text), image)
        assert list(question) == tokenizer.encode("is there a car?", add_special_tokens=False)


def test_a_prompt_without_a_template_is_one_turn():
    from vllm_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    turns = Turns(tokenizer, tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    ids = tokenizer.encode("<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>")
    assert tokenizer.decode(turns.question(ids, 0)) == "What is this?"
