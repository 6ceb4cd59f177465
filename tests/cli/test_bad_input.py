"""What users and pruners hand in wrongly, as they would type it, and what comes back."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import gripvlm
from gripvlm.cli.ask import ask_command as ask
from gripvlm.errors import BudgetError, GripError, InputError, PrunerError, TrainError, UnsupportedModelError
from gripvlm.grip.train import TrainConfig, read_toml, train, write_toml
from gripvlm.grip.train.run import check_settings
from gripvlm.models.compat import cache_argument, cache_of
from gripvlm.pruners import Pruner, Selection
from gripvlm.tasks import TaskError, open_image
from tiny_families import TINY, build, make
from tiny_models import tiny_llama
from tiny_train import tiny_config, tiny_vlm, write_jsonl

pytestmark = pytest.mark.transformers

SHORT = {"max_new_tokens": 2, "do_sample": False}
DO = "(?:type|pass|use)"  # a flag is typed, an argument is passed


@dataclass(frozen=True)
class Returns(Pruner):
    """Returns what `answer` makes of the tokens."""

    name: ClassVar[str] = "mine"
    answer: Any = None

    def select(self, tokens: Any) -> Any:
        return self.answer(tokens)


@dataclass(frozen=True)
class ReadsQuestion(Pruner):
    name: ClassVar[str] = "asks"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})

    def select(self, tokens: Any) -> Selection:
        assert tokens.question.shape[0] == 0
        return Selection(torch.arange(tokens.keep), tokens.n)


def llava() -> Any:
    return build("llava")


def inputs(images: int = 1) -> dict[str, Any]:
    return make(TINY["llava"], [images], [7]).inputs


def pruned(pruner: Any = "random", keep: Any = 4, model: Any = None, given: Any = None, **options: Any) -> Any:
    model, given = llava() if model is None else model, inputs() if given is None else given
    return gripvlm.prune_inputs(model, given, pruner, keep, **options)


def generated(model: Any, given: dict[str, Any], pruner: Any = "random", keep: Any = 4, **options: Any) -> Any:
    with gripvlm.prune(model, pruner, keep) as record:
        ids = model.generate(**given, **SHORT, **options)
    return ids, record


def second_turn(pictures: bool = False, inside: bool = True) -> Any:
    """A second turn on the cache of a pruned call."""
    model, given = llava(), inputs()
    with gripvlm.prune(model, "random", 4):
        first = model.generate(**given, **SHORT, return_dict_in_generate=True)
    more = given["input_ids"][:, 3:] if pictures else torch.tensor([[11, 12]])
    turn = {"input_ids": torch.cat((first.sequences, more), 1), cache_argument(model): cache_of(first)}
    return generated(model, turn) if inside else model.generate(**turn, **SHORT)


def without_pixels() -> Any:
    return generated(llava(), {key: value for key, value in inputs().items() if key != "pixel_values"})


def nested() -> None:
    with gripvlm.prune(llava(), "random", 4), gripvlm.prune(llava(), "fastv", 0.75):
        raise AssertionError("the inner block opened")


def encoded_elsewhere() -> Any:
    model = llava()
    with gripvlm.prune(model, "random", 4), torch.no_grad():
        return model(**pruned())


def dict_for_generate() -> Any:
    model = llava()
    with gripvlm.prune(model, "random", 4):
        return model.generate(inputs())


def meta_model() -> Any:
    with torch.device("meta"):
        return type(llava())(llava().config)


def text_only() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama())


def unknown_model() -> Any:
    model = meta_model()
    type(model.config).model_type, name = "qwen3_vl_next", type(model.config).model_type
    try:
        return pruned(model=model)
    finally:
        type(model.config).model_type = name


def first_tokens(tokens: Any) -> torch.Tensor:
    return torch.arange(tokens.keep)


def returning(answer: Callable[[Any], Any]) -> Any:
    return pruned(Returns(answer))


def nan_scores(tokens: Any) -> Selection:
    return Selection(first_tokens(tokens), tokens.n, torch.full((tokens.n,), torch.nan))


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("no image, functional form", lambda: pruned(given=inputs(0)),
     InputError, "no image: inputs have no pixel_values"),
    ("placeholders, but no pixels", without_pixels,
     InputError, "the prompts have 16 image placeholder tokens, but the call has no pixels"),
    ("two images, <image> once", lambda: pruned(given=inputs() | {"pixel_values": inputs(2)["pixel_values"]}),
     InputError, "1 of 2 images have no placeholder tokens"),
    ("one image, <image> twice", lambda: pruned(given=inputs(2) | {"pixel_values": inputs()["pixel_values"]}),
     InputError, "sample 0 has 32 image placeholder tokens"),
    ("keep=0", lambda: pruned(keep=0), BudgetError, "keep=0 keeps nothing"),
    ("keep=-3", lambda: pruned(keep=-3), BudgetError, "keep=-3 keeps nothing"),
    ("keep=17 of 16", lambda: pruned(keep=17),
     BudgetError, f"keep=17, but image 0 of sample 0 has only 16 visual tokens: {DO} keep='<=17' to keep all of"),
    ("keep=1.5", lambda: pruned(keep=1.5), BudgetError, "keep=1.5 is a fraction above 1"),
    ("keep=nan", lambda: pruned(keep=float("nan")), BudgetError, "keep=nan is no number"),
    ("keep='half'", lambda: pruned(keep="half"),
     BudgetError, rf"'half' is no budget: {DO} a count \(64\), a fraction \(0.1\)"),
    ("keep=True", lambda: pruned(keep=True), BudgetError, "keep=True is a bool"),
    ("keep=None", lambda: pruned(keep=None), BudgetError, f"pruner 'random' needs a budget: {DO} keep=64"),
    ("keep=4 with fastv", lambda: generated(llava(), inputs(), "fastv", 4),
     BudgetError, f"4 of 16 visual tokens .*{DO} keep=9 or more"),
    ("an unknown pruner", lambda: pruned("divprun"),
     PrunerError, "unknown pruner 'divprun': did you mean 'divprune'"),
    ("an unknown option", lambda: pruned("random:sed=3"),
     PrunerError, r"pruner 'random' has no option 'sed': did you mean 'seed'\?"),
    ("an unknown model", unknown_model, UnsupportedModelError,
     r"model type 'qwen3_vl_next' is not supported.*nearest is qwen3_vl.*docs/add-a-model\.md"),
    ("a text-only model", lambda: pruned(model=text_only()),
     UnsupportedModelError, "model type 'llama', which looks like a text-only model, is not supported"),
    ("a name for a model", lambda: pruned(model="llava-hf/llava-1.5-7b-hf"),
     UnsupportedModelError, "got a str: pass a transformers model"),
    ("pixels that are NaN", lambda: pruned(given=inputs() | {"pixel_values": inputs()["pixel_values"] * torch.nan}),
     InputError, "the vision encoder made NaN of image 0 of sample 0"),
    ("an empty question", lambda: ask([Path("cat.png")], " "), GripError, f"the question is empty: {DO}"),
    ("the question as text", lambda: pruned(ReadsQuestion(), question="what is it?"),
     InputError, f"question is text, which only the tokenizer can read: {DO} question=tokenizer"),
    ("a pruner that scores NaN", lambda: returning(nan_scores),
     PrunerError, "pruner 'mine' on image 0 of sample 0: 16 of 16 scores are NaN"),
    ("a pruner that returns the wrong count", lambda: returning(lambda t: Selection(torch.arange(5), t.n)),
     PrunerError, "pruner 'mine' on image 0 of sample 0: returned 5 indices, but the budget is exactly 4 of 16"),
    ("a pruner that returns a tensor", lambda: returning(first_tokens),
     PrunerError, r".*select\(\) returned a Tensor, expected a Selection"),
    ("a pruner on another device", lambda: returning(lambda t: Selection(first_tokens(t).to("meta"), t.n)),
     PrunerError, ".*indices are on the meta device, which holds no data: make them on cpu"),
    ("a pruner that raises", lambda: returning(lambda t: 1 / 0), ZeroDivisionError, "div"),
    ("nested blocks", nested, GripError, "this model is already inside a gripvlm.prune block"),
    ("a second turn outside the block", lambda: second_turn(inside=False),
     InputError, "this cache holds 4 of a prompt's 16 visual tokens"),
    ("a second turn with another picture", lambda: second_turn(pictures=True),
     InputError, "a further picture on a pruned cache"),
    ("encoded elsewhere, inside the block", encoded_elsewhere, InputError, "mm_encoder_outputs do not say"),
    ("a dict for generate", dict_for_generate, InputError, "generate was given a dict"),
    ("a model on the meta device", lambda: pruned(model=meta_model()),
     InputError, "the model is on the meta device, which holds no weights"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=name) for name, *row in CALLS])
def test_a_wrong_call_is_refused(call, error, message):
    with pytest.raises(error, match=f"(?s)^{message}"):
        call()


def test_a_corrupt_image_is_named(tmp_path):
    file = tmp_path / "cat.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(GripError, match=r"cat\.png"):
        open_image(file)


def test_a_prompt_without_images_passes_through():
    model, given = llava(), inputs(0)
    ids, record = generated(model, given)
    assert torch.equal(ids, model.generate(**given, **SHORT))
    assert record.selections == [[]]


def test_a_prompt_without_text_gives_an_empty_question():
    given = inputs()
    bare = {"input_ids": given["input_ids"][:, given["input_ids"][0] == 98], "pixel_values": given["pixel_values"]}
    pruned(ReadsQuestion(), given=bare)
    pruned(ReadsQuestion(), question=[])
    generated(llava(), bare, "fastv:layer=1", 0.75)


@pytest.mark.parametrize("pruner", ["random", "fastv:layer=1"])
def test_an_exception_inside_the_block_comes_through(pruner):
    model, before = llava(), dict(vars(llava()))
    with pytest.raises(KeyError, match="the caller's own"), gripvlm.prune(model, pruner, 0.75):
        raise KeyError("the caller's own")
    assert vars(model) == before


def test_a_generate_that_fails_leaves_nothing_behind():
    model = llava()
    with contextlib.suppress(GripError):
        generated(model, inputs(), "fastv:layer=1", 0.75, cache_implementation="static")
    assert "generate" not in vars(model)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


def test_two_models_in_two_threads_answer_as_alone():
    """One is pruned at the input, the other inside."""
    models = [build("llava", seed=seed) for seed in (1, 2)]
    ways = [("random", 4), ("fastv:layer=1", 0.75)]
    expected = [generated(model, inputs(), *way)[0] for model, way in zip(models, ways, strict=True)]
    answers: dict[int, list[torch.Tensor]] = {}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        answers[index] = [generated(models[index], inputs(), *ways[index])[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ids, expected[index]) for index in (0, 1) for ids in answers[index])


def test_a_quantised_model_runs():
    """Dynamic int8 takes its scales from all tokens of a call: dropping equals masking up to quantisation only."""
    model = copy.deepcopy(llava())
    decoder = model.get_decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(decoder, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        assert "quantized" in type(decoder.layers[0].mlp.up_proj).__module__
        assert generated(model, inputs())[1].kept == 4
        whole, _ = generated(model, inputs(), keep=1.0)
        assert torch.equal(whole, model.generate(**inputs(), **SHORT))
        generated(model, inputs(), "fastv:layer=1", 0.75)


vlm = cache(tiny_vlm)


def nan_reward(rollout: Any) -> torch.Tensor:
    return torch.full_like(rollout.log_probs[:, 0], torch.nan)


def failing_reward(rollout: Any) -> torch.Tensor:
    raise ZeroDivisionError("division by zero")


def trained(folder: Path, wrong: str = "", **settings: Any) -> str:
    """Trains on eight tiny pictures, of which one row may be changed; what the log says."""
    file = write_jsonl(folder, 8)
    if wrong == "picture":
        (folder / "2.png").write_bytes(b"no picture")
    if wrong == "answer":
        file.write_text(file.read_text().replace('"answer": "yes"', '"answer": "  "'))
    if wrong == "row":
        file.write_text(file.read_text() + '{"image": "0.png"}\n')
    train(tiny_config(data=str(file), output_dir=str(folder / "grip"), **settings), *vlm())
    return (folder / "grip" / "metrics.jsonl").read_text()


def another_run(folder: Path) -> None:
    file = write_jsonl(folder, 4)
    (folder / "grip").mkdir()
    write_toml(tiny_config(data=str(file), output_dir="grip"), folder / "grip" / "config.toml")
    (folder / "grip" / "distill.ckpt").touch()
    check_settings(tiny_config(data=str(file), output_dir=str(folder / "grip"), seed=3))


def toml(folder: Path, text: str) -> None:
    (folder / "c.toml").write_text(text)
    read_toml(folder / "c.toml")


TRAINING: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("no data", lambda folder: check_settings(TrainConfig()), TrainError, ".*--data"),
    ("the test split", lambda folder: check_settings(TrainConfig(data="lab")), TrainError, r".*lab.*\.dataset"),
    ("a picture that is none", lambda folder: trained(folder, "picture"),
     TrainError, r"sample '.*': .*2\.png.*--on-bad"),
    ("an answer of nothing", lambda folder: trained(folder, "answer"),
     TrainError, "the answer of sample '.*' tokenises to nothing.*--on-bad"),
    ("a row without a question", lambda folder: trained(folder, "row"), TaskError, ".*question"),
    ("a reward that is NaN", lambda folder: trained(folder, reward_funcs="test_bad_input:nan_reward", distill_steps=0),
     TrainError, "reward 'nan_reward' is nan for sample"),
    ("a reward that raises",
     lambda folder: trained(folder, reward_funcs="test_bad_input:failing_reward", distill_steps=0),
     TrainError, "reward 'failing_reward' raised ZeroDivisionError"),
    ("an unknown reward", lambda folder: check_settings(TrainConfig(data="x", reward_funcs="corect")),
     TrainError, "unknown reward 'corect'"),
    ("an unknown setting", lambda folder: toml(folder, "learning_rat = 1"),
     TrainError, ".*c.toml has no setting .learning_rat.: did you mean learning_rate"),
    ("a setting of the wrong kind", lambda folder: TrainConfig(max_steps="many"), TrainError, "max_steps = 'many'"),
    ("settings that need another", lambda folder: TrainConfig(budgets="choices"),
     TrainError, "budgets = 'choices' has nothing to choose from: set keep_choices"),
    ("the folder of another run", another_run, TrainError, ".*holds another run .*seed was 0, now 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row, id=name) for name, *row in TRAINING])
def test_wrong_training_is_refused(call, error, message, tmp_path):
    with pytest.raises(error, match=f"(?s)^{message}"):
        call(tmp_path)


def test_a_picture_that_is_none_may_be_skipped(tmp_path):
    assert '"skipped"' in trained(tmp_path, "picture", on_bad_sample="skip", max_steps=2, distill_steps=2)
