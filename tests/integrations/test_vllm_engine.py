"""vLLM with the plug-in beside `gripvlm.prune_inputs` and transformers: the same tokens with the same probabilities.

Needs an environment with vLLM: `make test-vllm` builds it and runs this file, in one process, on the CPU.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm_models import noise, save_tiny_qwen
from vllm_served import Asked, Served, ask, serve

from gripvlm import lab
from gripvlm.errors import GripError
from gripvlm.integrations.vllm.choices import Picture
from gripvlm.pruners.registry import register_pruner

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]


def sample() -> list[tuple[Image.Image, str]]:
    """Some of the lab's questions, each about another picture."""
    lines = (lab.SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[::241]]
    return [(Image.open(lab.SAMPLE / "images" / row["image"]).convert("RGB"), row["question"]) for row in rows]


def mixed(pictures: list[Image.Image], text: str = "What is this?") -> list[Asked]:
    """Budgets of every form, and prompts with one, two and three pictures."""
    a, b, c = pictures
    return [
        ask([a], text, keep=8),
        ask([b], "Describe.", keep=0.25),
        ask([a], text, keep="<=400"),
        ask([b, c], "Compare the two pictures please.", keep="50%"),
        ask([c], "Long question " * 6, keep=1.0),
        ask([c], "Describe.", keep=1),
        ask([a, b, c], "Three.", keep=5),
        ask([a, a], "Twice the same.", keep=5),
    ]


# --- the lab: transformers' layers, positions without M-RoPE ----------------------------------------------------------


@pytest.fixture(scope="module")
def in_lab():
    pruners = ["divprune", "grip", "cdpruner", "pool", "visionzip", "random:seed=1", "full"]
    # Chunks of 64 tokens cut pictures in the middle, and more than one picture exceeds the encoder's batch.
    yield from serve("lab", pruners, "25%", max_num_batched_tokens=64)


def test_budgets_pruners_and_questions_in_one_batch(in_lab):
    """Question-free and question-aware ones, merges, and one that reads the tower's attention."""
    (a, one), (b, two), *_ = sample()
    requests = [
        ask([a], one),
        ask([b], two, keep=26),
        ask([a], two, keep="10%", pruner="grip"),
        ask([a], one, keep=1, pruner="grip"),
        ask([b], one, keep=0.5, pruner="cdpruner"),
        ask([a], two, keep=16, pruner="pool"),
        ask([b], two, keep=32, pruner="visionzip"),
        ask([b], two, keep="<=400", pruner="random:seed=1"),
        ask([a], one, keep=64, pruner="random:seed=1"),
        ask([a], one, pruner="full"),
        ask([a], one, keep=40, pruner="grip", question=two),
    ]
    in_lab.check(requests)
    # From vLLM's caches.
    again = in_lab.check(requests)
    assert all(answer.num_cached_tokens for answer in again if len(answer.prompt_token_ids) > 32)
    in_lab.llm.reset_prefix_cache()
    in_lab.check(requests[:4][::-1])


def test_a_second_question_runs_no_tower(in_lab):
    (_, one), (_, two), (picture, _), *_ = sample()
    before = in_lab.inner.encodings.misses
    in_lab.check([ask([picture], one, keep=9, pruner="grip")])
    assert in_lab.inner.encodings.misses == before + 1
    in_lab.check([ask([picture], two, keep=9, pruner="grip"), ask([picture], one, keep=7)])
    assert in_lab.inner.encodings.misses == before + 1


def test_what_decides_a_selection_is_in_the_hash(in_lab):
    (a, one), *_ = sample()
    in_lab.answer(ask([a], one, keep=64, pruner="divprune", question="unread"))
    for options in ({"pruner": "pool"}, {"pruner": "random:seed=1"}, {"keep": 65}):
        other = in_lab.answer(ask([a], one, **{"keep": 64, "pruner": "divprune"} | options))[0]
        assert other.num_cached_tokens == 0, options
    # A pruner that does not read the question keeps the same, and finds it.
    same = in_lab.answer(ask([a], "how many cars are there?", keep=64, pruner="divprune"))[0]
    assert same.num_cached_tokens == 64


WRONG = {
    "keep=0": ({"keep": 0}, "keep=0 keeps nothing"),
    "keep=257": ({"keep": 257}, "keep=257, but picture 0 has only 256 visual tokens"),
    "a list": ({"keep": [1]}, "keep=\\[1\\] is a list"),
    "another pruner": ({"pruner": "norm"}, "pruner 'norm' is not served: use one of divprune, grip"),
    "a pruner that is none": ({"pruner": 3}, "pruner '3' is not served"),
    "full with a budget": ({"pruner": "full", "keep": 3}, "keeps every visual token"),
    "ids": ({"question": [1, 2]}, "question=\\[1, 2\\]: pass a text"),
    "the processor's own": ({"do_resize": False}, "mm_processor_kwargs has 'do_resize': use keep, pruner, question"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_refused_and_the_engine_goes_on(in_lab, options, message):
    (a, one), *_ = sample()
    with pytest.raises(ValueError, match=message):
        in_lab.answer(ask([a], one, **options))
    assert in_lab.answer(ask([a], one))


def test_text_alone(in_lab):
    answers = in_lab.llm.generate([{"prompt": "is there a car? answer:"}], in_lab.settings, use_tqdm=False)
    model, processor = in_lab.reference
    inputs = processor(text=["is there a car? answer:"], return_tensors="pt")
    ids = model.generate(
        **inputs, max_new_tokens=len(answers[0].outputs[0].token_ids), do_sample=False, eos_token_id=None
    )
    assert list(answers[0].outputs[0].token_ids) == ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_renumbered_positions():
    for served in serve("lab", ["divprune", "grip"], "25%", positions="renumbered"):
        (a, one), (b, two), *_ = sample()
        served.check([ask([a], one), ask([b], two, keep=26, pruner="grip"), ask([a], two, keep=1), ask([b], one)])


# --- several pictures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense():
    register_pruner("shared_norm", "vllm_models:SharedNorm")
    yield from serve("lab-dense", ["divprune", "cdpruner", "shared_norm"], "25%", max_num_batched_tokens=128)


def test_several_pictures(dense):
    pictures = [picture for picture, _ in sample()[:3]]
    requests = mixed(pictures)
    for one, pruner in zip(requests, ("divprune", "cdpruner", "cdpruner", "divprune") * 2, strict=True):
        one.options["pruner"] = pruner
    dense.check(requests)


def test_pictures_that_share_a_budget(dense):
    """How many tokens each keeps is the pruner's choice, so the text between them moves."""
    a, b, c = (picture for picture, _ in sample()[:3])
    requests = [
        ask([a, b], "is there a car?", pruner="shared_norm", keep=20),
        ask([c], "is there a car?", pruner="shared_norm", keep=20),
        ask([c, b, a], "how many cars are there?", pruner="shared_norm", keep="10%"),
        ask([a, b], "is there a car?", pruner="divprune", keep=20),
    ]
    counts = [[selection.k for selection in dense.pruned(one)[1].selections[0]] for one in requests]
    assert sum(counts[0]) == 40
    assert counts[0] != [20, 20], "the pictures share nothing: choose others"
    dense.check(requests)
    dense.check(requests[::-1])


# --- Qwen: vLLM's own classes, and the Transformers backend for M-RoPE ------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [noise(140, 196, 0), noise(224, 168, 1), noise(84, 112, 2)]


@pytest.mark.parametrize(
    ("family", "pruners", "name"),
    [
        ("qwen2_5_vl", ["divprune", "cdpruner", "dart_input"], "GripQwen2_5_VL"),
        ("qwen2_5_vl", ["fopru", "divprune"], "GripTransformers"),
        ("qwen3_vl", ["divprune", "pool"], "GripQwen3_VL"),
    ],
)
def test_qwen(tmp_path, pictures, family, pruners, name):
    """Positions of kept rows are coordinates; in Qwen3-VL planes of DeepStack are dropped and merged with them."""
    folder = str(save_tiny_qwen(tmp_path, family))
    for served in serve(folder, pruners, 0.5, max_num_batched_tokens=64):
        assert type(served.inner).__name__ == name
        requests = mixed(pictures)
        for number, one in enumerate(requests):
            one.options["pruner"] = pruners[number % len(pruners)]
        served.check(requests)
        served.check(requests[::-1])


def test_a_count_above_the_picture_is_refused_before_vllm_caches_it():
    """Where another picture of the prompt is too small, a cached one would be known here, and not to the engine."""
    from gripvlm.integrations.vllm.processing import FIELD, PruningProcessor

    class Processor:
        config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
        info = SimpleNamespace(get_hf_config=lambda: Processor.config)

        def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> dict[str, Any]:
            return {"image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 4]])}

    class Pruning(PruningProcessor, Processor):
        info = Processor.info

    def processed(keep: str) -> dict[str, Any]:
        pictures = [Picture(key, index, "divprune", keep) for index, key in enumerate("ab")]
        return Pruning()._apply_hf_processor_main(None, {FIELD: pictures})

    assert len(processed("4")[FIELD]) == 2
    with pytest.raises(GripError, match="keep=5, but picture 1 has only 4 visual tokens"):
        processed("5")


def test_positions_are_always_at_one_address():
    """A piece of a model that vLLM has captured as a CUDA graph reads them there, whatever it is called with."""
    from gripvlm.integrations.vllm.model import PruningModel

    model = PruningModel.__new__(PruningModel)  # without a model of vLLM under it
    model.config = SimpleNamespace(model_type="llava", gripvlm={"pruners": ["divprune"], "keep": "25%"})
    limits = SimpleNamespace(max_num_encoder_input_tokens=64, max_num_batched_tokens=64)
    model.start_pruning(SimpleNamespace(scheduler_config=limits, device_config=SimpleNamespace(device="cpu")))
    positions = torch.arange(4).expand(3, -1)
    captured = model.placed(positions)
    model.places[:, 2] = 5
    assert model.placed(positions).tolist() == [[0, 1, 7, 3]] * 3
    assert captured.tolist() == [[0, 1, 7, 3]] * 3


# --- refused at the start ---------------------------------------------------------------------------------------------


def engine_config(positions: str = "original", **changes: Any) -> Any:
    """As much of vLLM's configuration as is looked at."""
    ours = {"pruners": ["divprune"], "keep": "25%", "positions": positions}
    text = SimpleNamespace(head_dim=32, rope_parameters={})
    config = SimpleNamespace(model_type="qwen2_5_vl", gripvlm=ours, get_text_config=lambda: text)
    found = {
        "pipeline_parallel_size": 1,
        "use_v2_model_runner": False,
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
        "lora_config": None,
        "speculative_config": None,
        "is_multimodal_pruning_enabled": lambda: False,
        "cudagraph_mm_encoder": False,
        "mm_processor_cache_gb": 4,
    } | changes
    everything = SimpleNamespace(hf_config=config, **found)
    everything.model_config = everything.multimodal_config = everything
    everything.parallel_config = everything.compilation_config = everything
    return everything


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": ({"pipeline_parallel_size": 2}, "reach the first pipeline stage only"),
    "second runner": ({"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
    "parts of a prompt": ({"prefill_context_parallel_size": 2}, "leave prefill context parallel out"),
    "LoRA": ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "kept whatever the adapter"),
    "halves": ({"use_ubatching": True}, "leave --enable-dbo out"),
    "speculation": ({"speculative_config": "eagle"}, "speculative decoding does not know the positions"),
    "EVS": ({"is_multimodal_pruning_enabled": lambda: True}, "vLLM's own pruning of videos is on as well"),
    "graphs": ({"cudagraph_mm_encoder": True}, "CUDA graphs of the vision encoder pass pruning by"),
    "M-RoPE": ({"positions": "renumbered"}, "not defined for models with M-RoPE"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_engines_that_are_refused(changes, message):
    from gripvlm.integrations.vllm.engine_config import EngineConfig

    EngineConfig.verify_and_update_config(engine_config())
    with pytest.raises(GripError, match=message):
        EngineConfig.verify_and_update_config(engine_config(**changes))


def test_pictures_that_share_a_budget_need_vllms_cache_off():
    register_pruner("shared_norm", "vllm_models:SharedNorm")
    with pytest.raises(ValueError, match=r"shares a budget .* start with --mm-processor-cache-gb 0"):
        Served("lab-dense", "shared_norm", "25%", mm_processor_cache_gb=1)
