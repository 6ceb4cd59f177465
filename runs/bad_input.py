"""Tries what users and pruners hand in wrongly, on tiny models, and writes docs/bad-input.md from what came back.

    python runs/bad_input.py            # some seconds, CPU; tests/cli/test_bad_input.py asserts every row

Each case is run as a user would type it. "refused" rows show the error's class and its whole text; "works" rows
show what was checked instead.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "runs")]

import bad_training  # noqa: E402

import gripvlm  # noqa: E402
from gripvlm.models.compat import cache_argument, cache_of  # noqa: E402
from gripvlm.pruners import Pruner, Selection  # noqa: E402
from tiny_families import TINY, build, make  # noqa: E402
from tiny_models import tiny_llama  # noqa: E402

PAGE = ROOT / "docs" / "bad-input.md"
ESCAPED = "\\|"  # in a cell of a table
SHORT = {"max_new_tokens": 2, "do_sample": False}


class Case(NamedTuple):
    """One row: what was wrong, what was typed, the call, and what must come back (a pattern; "works: ..." if fine)."""

    wrong: str
    typed: str
    call: Callable[[], Any]
    says: str


@dataclass(frozen=True)
class Says(Pruner):
    """Returns what it is told to."""

    name: ClassVar[str] = "mine"
    answer: Any = None

    def select(self, tokens: Any) -> Any:
        return self.answer(tokens)


def llava() -> Any:
    return build("llava")


def inputs(images: int = 1) -> dict[str, Any]:
    return make(TINY["llava"], [images], [7]).inputs


def pruned(pruner: Any = "random", keep: Any = 4, model: Any = None, given: Any = None, **options: Any) -> Any:
    return gripvlm.prune_inputs(
        llava() if model is None else model, inputs() if given is None else given, pruner, keep, **options
    )


def generated(model: Any, given: dict[str, Any], pruner: Any = "random", keep: Any = 4, **options: Any) -> Any:
    with gripvlm.prune(model, pruner, keep) as record:
        ids = model.generate(**given, **SHORT, **options)
    return ids, record


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def text_prompt() -> str:
    """A prompt without images inside the block is the untouched model's."""
    model, given = llava(), inputs(0)
    ids, record = generated(model, given)
    assert torch.equal(ids, model.generate(**given, **SHORT))
    assert record.selections == [[]]
    return "passes through untouched, with empty selections"


def exception_inside() -> str:
    model, before = llava(), dict(vars(llava()))
    for pruner in ("random", "fastv:layer=1"):
        try:
            with gripvlm.prune(model, pruner, 0.75):
                raise KeyError("the caller's own")
        except KeyError:
            pass
    assert vars(model) == before
    return "the exception comes through and the model is as before"


def failing_generate() -> str:
    model = llava()
    with contextlib.suppress(gripvlm.GripError):
        generated(model, inputs(), "fastv:layer=1", 0.75, cache_implementation="static")
    assert "generate" not in vars(model)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)
    return "the error comes through, no hook and no wrapper is left"


def nested() -> None:
    with gripvlm.prune(llava(), "random", 4), gripvlm.prune(llava(), "fastv", 0.75):
        raise AssertionError("the inner block opened")


def chat(pictures: bool = False, inside: bool = True) -> Any:
    """A second turn on the cache of a pruned call."""
    model, given = llava(), inputs()
    with gripvlm.prune(model, "random", 4):
        first = model.generate(**given, **SHORT, return_dict_in_generate=True)
    more = given["input_ids"][:, 3:] if pictures else torch.tensor([[11, 12]])
    turn = {"input_ids": torch.cat((first.sequences, more), 1), cache_argument(model): cache_of(first)}
    if not inside:
        return model.generate(**turn, **SHORT)
    return generated(model, turn)


def in_block(name: str = "forward", **arguments: Any) -> Any:
    model = llava()
    with gripvlm.prune(model, "random", 4), torch.no_grad():
        return model.generate(inputs()) if name == "generate" else model(**arguments)


def two_threads() -> str:
    """Two models at once, one pruned at the input and one inside: each gives what it gives alone."""
    models = [build("llava", seed=seed) for seed in (1, 2)]
    ways = [("random", 4), ("fastv:layer=1", 0.75)]
    expected = [generated(m, inputs(), *way)[0] for m, way in zip(models, ways, strict=True)]
    got: dict[int, Any] = {}
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        got[index] = [generated(models[index], inputs(), *ways[index])[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[index]) for index in (0, 1) for one in got[index])
    return "each answers as it does alone"


def meta_model() -> Any:
    with torch.device("meta"):
        return type(llava())(llava().config)


def quantised() -> str:
    """Dynamic int8 of the language model's linear layers, whose scales look at all tokens of a call."""
    import copy

    model = copy.deepcopy(llava())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = model.get_decoder()
        torch.ao.quantization.quantize_dynamic(decoder, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        assert "quantized" in type(decoder.layers[0].mlp.up_proj).__module__
        assert generated(model, inputs())[1].kept == 4
        whole, _ = generated(model, inputs(), keep=1.0)
        assert torch.equal(whole, model.generate(**inputs(), **SHORT))
        generated(model, inputs(), "fastv:layer=1", 0.75)
    return (
        "runs, at the input and inside; with keep=1.0 the text is the quantised model's own (dynamic int8 takes its "
        "scales from all tokens of a call, so dropping equals masking only up to quantisation)"
    )


def text_only() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama())


def other_model() -> Any:
    model = meta_model()
    type(model.config).model_type, kept = "qwen3_vl_next", type(model.config).model_type
    try:
        return pruned(model=model)
    finally:
        type(model.config).model_type = kept


def corrupt_file() -> Any:
    from gripvlm.tasks import open_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cat.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
        try:
            return open_image(path)
        except gripvlm.GripError as error:
            raise type(error)(str(error).replace(folder + "/", "")) from None


def empty_question() -> Any:
    from gripvlm.cli.ask import ask_command as ask

    return ask(Path("cat.png"), " ")


@dataclass(frozen=True)
class Asks(Pruner):
    """Reads the question."""

    name: ClassVar[str] = "asks"
    needs: ClassVar[frozenset[str]] = frozenset({"question"})

    def select(self, tokens: Any) -> Selection:
        assert tokens.question.shape[0] == 0
        return Selection(torch.arange(tokens.keep), tokens.n)


def no_words() -> str:
    given = inputs()
    bare = {"input_ids": given["input_ids"][:, given["input_ids"][0] == 98], "pixel_values": given["pixel_values"]}
    pruned(Asks(), given=bare)
    pruned(Asks(), question=[])
    generated(llava(), bare, "fastv:layer=1", 0.75)
    return "pruners that read the question get an embedding of no tokens, [0, d]"


def ascending(tokens: Any) -> torch.Tensor:
    return torch.arange(tokens.keep)


CASES = [
    Case("no image, functional form", "prune_inputs(model, {input_ids}, ...)",
         lambda: pruned(given=inputs(0)), "InputError: no image: inputs have no pixel_values"),
    Case("no image, inside the block", "with prune(...): model.generate(input_ids=...)", text_prompt, "works: passes"),
    Case("placeholders, but no pixels", "model.generate(input_ids=...) with <image> in it",
         lambda: generated(llava(), without(inputs(), "pixel_values")),
         "InputError: the prompts have 16 image placeholder tokens, but the call has no pixels"),
    Case("more images than placeholders", "two images, <image> once",
         lambda: pruned(given=inputs() | {"pixel_values": inputs(2)["pixel_values"]}),
         "InputError: 1 of 2 images have no placeholder tokens"),
    Case("fewer images than placeholders", "one image, <image> twice",
         lambda: pruned(given=inputs(2) | {"pixel_values": inputs()["pixel_values"]}),
         "InputError: sample 0 has 32 image placeholder tokens"),
    *(
        Case("keep out of range", f"keep={keep!r}", lambda keep=keep: pruned(keep=keep), "BudgetError: " + says)
        for keep, says in (
            (0, "keep=0 keeps nothing"),
            (-3, "keep=-3 keeps nothing"),
            (17, "keep=17, but image 0 of sample 0 has only 16 visual tokens: pass keep='<=17' to keep all of"),
            (1.5, "keep=1.5 is a fraction above 1"),
            (float("nan"), "keep=nan is no number"),
            ("half", "'half' is no budget: use a count \\(64\\), a fraction \\(0.1\\)"),
            (True, "keep=True is a bool"),
            (None, "pruner 'random' needs a budget: pass keep=64"),
        )
    ),
    Case("less than the first layers cost", "prune(model, 'fastv', keep=4)",
         lambda: generated(llava(), inputs(), "fastv", 4), "BudgetError: 4 of 16 visual tokens .*pass keep=9 or more"),
    Case("an unknown pruner", "'divprun'", lambda: pruned("divprun"),
         "PrunerError: unknown pruner 'divprun': did you mean 'divprune'"),
    Case("an unknown option", "'random:sed=3'", lambda: pruned("random:sed=3"),
         r"PrunerError: pruner 'random' has no option 'sed': did you mean 'seed'\?"),
    Case("an unknown model", "model_type 'qwen3_vl_next'", other_model,
         r"UnsupportedModelError: model type 'qwen3_vl_next' is not supported.*nearest is qwen3_vl.*docs/families\.md"),
    Case("a text-only model", "LlamaForCausalLM", lambda: pruned(model=text_only()),
         "UnsupportedModelError: model type 'llama', which looks like a text-only model, is not supported"),
    Case("no model", "'llava-hf/llava-1.5-7b-hf'", lambda: pruned(model="llava-hf/llava-1.5-7b-hf"),
         "UnsupportedModelError: got a str: pass a transformers model"),
    Case("a corrupt image", "ask --image cat.png", corrupt_file, "cat.png"),
    Case("pixels that are NaN", "pixel_values * nan",
         lambda: pruned(given=inputs() | {"pixel_values": inputs()["pixel_values"] * torch.nan}),
         "InputError: the vision encoder made NaN of image 0 of sample 0"),
    Case("an empty question", "ask --question ' '", empty_question, "GripError: the question is empty: type"),
    Case("no text in the prompt", "question=[] or a prompt of one image", no_words, "works: pruners that read"),
    Case("the question as text", "question='what is it?'", lambda: pruned(Asks(), question="what is it?"),
         "InputError: question is text, which only the tokenizer can read: pass question=tokenizer"),
    Case("a pruner that scores NaN", "Selection(..., scores=nan)",
         lambda: pruned(Says(lambda t: Selection(ascending(t), t.n, torch.full((t.n,), torch.nan)))),
         "PrunerError: pruner 'mine' on image 0 of sample 0: 16 of 16 scores are NaN"),
    Case("a pruner that returns the wrong shape", "Selection(indices [5], n)",
         lambda: pruned(Says(lambda t: Selection(torch.arange(5), t.n))),
         "PrunerError: pruner 'mine' on image 0 of sample 0: returned 5 indices, but the budget is exactly 4 of 16"),
    Case("a pruner that returns no Selection", "a tensor", lambda: pruned(Says(ascending)),
         r"PrunerError: .*select\(\) returned a Tensor, expected a Selection"),
    Case("a pruner on another device", "indices on 'meta'",
         lambda: pruned(Says(lambda t: Selection(ascending(t).to("meta"), t.n))),
         "PrunerError: .*indices are on the meta device, which holds no data: make them on cpu"),
    Case("a pruner that raises", "1 / 0 in select", lambda: pruned(Says(lambda t: 1 / 0)), "ZeroDivisionError: div"),
    Case("an exception inside the block", "raise KeyError", exception_inside, "works: the exception comes through"),
    Case("a generate that fails", "cache_implementation='static' with fastv", failing_generate, "works: the error"),
    Case("nested blocks", "prune(model, ...) twice", nested,
         "GripError: this model is already inside a gripvlm.prune block"),
    Case("a second turn on a pruned cache", "outside the block", lambda: chat(inside=False),
         "InputError: this cache holds 4 of a prompt's 16 visual tokens"),
    Case("a second turn on a pruned cache", "with another picture", lambda: chat(pictures=True),
         "InputError: a further picture on a pruned cache"),
    Case("encoded elsewhere, inside the block", "model(**prune_inputs(...))", lambda: in_block(**pruned()),
         "InputError: mm_encoder_outputs do not say"),
    Case("a dict for generate", "model.generate(inputs)", lambda: in_block("generate"),
         "InputError: generate was given a dict"),
    Case("two models in two threads", "a block each, at once", two_threads, "works: each answers"),
    Case("a model on the meta device", "torch.device('meta')", lambda: pruned(model=meta_model()),
         "InputError: the model is on the meta device, which holds no weights"),
    Case("a quantised model", "torch.ao dynamic int8", quantised, "works: runs, at the input and inside"),
    *(Case(*row) for row in bad_training.CASES),
]  # fmt: skip


def outcome(case: Case) -> str:
    """What comes back: "works: ..." or "ErrorClass: its text"."""
    try:
        answer = case.call()
    except Exception as error:  # noqa: BLE001  whatever comes back is the answer
        return f"{type(error).__name__}: {error}"
    return f"works: {answer}"


def line(case: Case, got: str) -> str:
    """The row of the page; lists of all names, which grow, are left out."""
    short = re.sub(r"(known are|supported are) \w+(, (?!or )\w+)*", r"\1 ...", " ".join(got.split()))
    return f"| {case.wrong} | `{case.typed}` | {short.replace('|', ESCAPED)} |"


def main() -> None:
    rows = []
    for case in CASES:
        got = outcome(case)
        if not re.search(case.says, got, re.S):
            raise SystemExit(f"{case.wrong}: expected {case.says!r}, got {got!r}")
        rows.append(line(case, got))
    PAGE.write_text(
        "# Bad input, and what comes back\n\n"
        "Written by `python runs/bad_input.py` from what came back, on tiny random models; `tests/cli/test_bad_input.py` "
        "asserts every row.\n\n| what is wrong | what was typed | what came back |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n",
        encoding="utf-8",
    )
    print(f"{len(rows)} cases: {PAGE}")


if __name__ == "__main__":
    main()
