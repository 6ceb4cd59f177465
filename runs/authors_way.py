"""results/authors-way.json: our pruners against the same methods as their authors wrote them, same tensors, same run.

    OMP_NUM_THREADS=2 python runs/authors_way.py --repeats 9     # 576 visual tokens, a 0.5B model; 10 minutes
    python runs/authors_way.py --tiny --out .lab/try/tiny.json   # 16 tokens, seconds

Ours is what gripvlm runs, with its checks; the authors' way is runs/authors_methods.py, written after the papers'
descriptions. FastV and SparseVLM are timed from the picture's rows to the first token's logits, and to their last cut;
VisionZip from pixels to the rows that the language model gets; DivPrune and CDPruner from rows to the choice. The same
work without pruning, under sdpa, is timed beside the first three, and for the first two the limit: the same rows
dropped at the same layers with the choice made beforehand, so that what is above it is the pruner's own.

Each turn runs every way once, in one order and then in the other, after a turn that warms up; a ratio is ours to theirs
within a turn, below 1 where ours takes less; median, low and high are the median and the quartiles. Both ways must keep
the same tokens: fewer than 95 % in common is an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "runs")]

import authors_methods as authors  # noqa: E402
from pruner_speed import image  # noqa: E402

from gripvlm.api import encode, prune_inputs, pruned_run  # noqa: E402
from gripvlm.bench.shapes import architecture, random_model  # noqa: E402
from gripvlm.bench.shapes import random_prompts  # noqa: E402
from gripvlm.eval import environment  # noqa: E402
from gripvlm.eval.environment import command_line  # noqa: E402
from gripvlm.pruners import LLMPruner, get_pruner  # noqa: E402
from gripvlm.pruners.input.visionzip import VisionZip  # noqa: E402
from gripvlm.types import VisualTokens
from gripvlm.utils.timing import device_time  # noqa: E402

METHODS = ("fastv", "sparsevlm", "sparsevlm-1.0", "visionzip", "divprune", "cdpruner")
ALIKE = 0.95
WHOLE, CUT = "whole", "to the last cut"
Way: TypeAlias = Callable[[Callable[[str], None]], list[Tensor]]
"""mark -> kept rows, one tensor an image and cut; it calls mark(part) where a part of the work has ended."""


@dataclass(frozen=True)
class Shape:
    """What is measured: a key of `ARCHITECTURES`, rows to keep at the input and on average in the language model."""

    name: str
    keep: int
    inside: int
    fastv: str = "fastv"
    text: int = 33  # tokens of the prompt that are not visual, the first of which is no word


SHAPES = {
    "llava-0.5b": Shape("llava-0.5b", 64, 192),
    "llava-1.5-7b": Shape("llava-1.5-7b", 64, 192),
    "tiny": Shape("tiny", 6, 10, "fastv:layer=1", 9),
}


@dataclass(frozen=True)
class Case:
    """One method at one batch size.

    Attributes:
        work: what is timed, in words.
        ways: "ours", "authors" and, where there is such work, "unpruned" and "limit".
        parts: of which times are reported; `WHOLE` is all of it.
        turns: for one of `--repeats`; short work is repeated more often.
    """

    method: str
    work: str
    batch: int
    n: int
    keep: int
    ways: Mapping[str, Way]
    parts: tuple[str, ...] = (WHOLE,)
    turns: int = 1


# --- the cases --------------------------------------------------------------------------------------


class Inside:
    """FastV and SparseVLM: the prefill of one prompt whose picture is encoded already."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.encoded = encode(model, inputs)
        self.features = self.encoded.samples[0][0].features
        self.full = prune_inputs(model, inputs, "keep_all", encoded=self.encoded)
        self.layers = len(model.get_decoder().layers)

    def plan(self, pruner: LLMPruner, keep: int) -> dict[int, int]:
        """layer -> count, where rows are lost."""
        n, found = self.features.shape[0], {}
        for layer, count in sorted(pruner.schedule(n, keep, self.layers).items()):
            if count < min([n, *found.values()]):
                found[layer] = count
        return found

    def run(self, arguments: Mapping[str, Any], last: int, mark: Callable[[str], None]) -> None:
        hook = lambda *_: mark(CUT)  # noqa: E731
        handle = self.model.get_decoder().layers[last].register_forward_pre_hook(hook)  # after those that drop
        try:
            self.model(**arguments, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()

    def case(self, name: str, spec: str, keep: int, cuts: Callable[[LLMPruner, dict[int, int]], Any]) -> Case:
        """`cuts` makes the authors' cuts and says which layers attend eagerly."""
        pruner = get_pruner(spec)
        assert isinstance(pruner, LLMPruner)
        plan = self.plan(pruner, keep)
        last = max(plan)

        def ours(mark: Callable[[str], None]) -> list[Tensor]:
            with pruned_run(self.model, self.inputs, pruner, keep, encoded=self.encoded) as (arguments, record):
                self.run(arguments, last, mark)
            return [record.selections[0][0].layers[cut] for cut in plan]

        def theirs(mark: Callable[[str], None]) -> list[Tensor]:
            made, eager = cuts(pruner, plan)
            reached = lambda: mark(CUT)  # noqa: E731
            return authors.prefill(self.model, self.inputs["input_ids"], self.features, made, eager, reached).rows

        def unpruned(mark: Callable[[str], None]) -> list[Tensor]:
            self.run(self.full, last, mark)
            return []

        kept = theirs(lambda part: None)
        before = [torch.arange(len(self.features), device=self.features.device), *kept]
        picks = [torch.isin(rows, left).nonzero().flatten() for rows, left in zip(before, kept, strict=False)]
        fixed = {cut: authors.known(pick) for cut, pick in zip(plan, picks, strict=True)}

        def limit(mark: Callable[[str], None]) -> list[Tensor]:
            reached = lambda: mark(CUT)  # noqa: E731
            return authors.prefill(self.model, self.inputs["input_ids"], self.features, fixed, (), reached).rows

        ways = {"ours": ours, "authors": theirs, "unpruned": unpruned, "limit": limit}
        return Case(name, "prefill", 1, len(self.features), keep, ways, (CUT, WHOLE))

    def fastv(self, spec: str, keep: int) -> Case:
        return self.case(
            "fastv", spec, keep, lambda _, plan: ({c: authors.fastv(k) for c, k in plan.items()}, range(self.layers))
        )

    def sparsevlm(self, keep: int, rank: bool) -> Case:
        words = self.inputs["input_ids"][0, len(self.features) + 1 :]

        def cuts(pruner: Any, plan: dict[int, int]) -> Any:
            left: list[Tensor] = []
            question = self.model.get_input_embeddings()(words)
            before = dict(zip(plan, [len(self.features), *plan.values()], strict=False))
            made = {
                cut: authors.sparsevlm(self.features, question, pruner.parts(before[cut], count), left, rank)
                for cut, count in plan.items()
            }
            return made, {cut - 1 for cut in plan}

        return self.case("sparsevlm-1.0" if rank else "sparsevlm", "sparsevlm", keep, cuts)


def visionzip(model: Any, inputs: Mapping[str, Any], keep: int) -> Case:
    """From pixels to the rows that the language model gets."""
    pruner, pixels = VisionZip(), inputs["pixel_values"]
    n = encode(model, inputs).samples[0][0].features.shape[0]

    def ours(mark: Callable[[str], None]) -> list[Tensor]:
        _, record = prune_inputs(model, inputs, pruner, keep, return_record=True)
        return [selection.indices for sample in record.selections for selection in sample]

    def theirs(mark: Callable[[str], None]) -> list[Tensor]:
        return authors.visionzip(model, pixels, *pruner.counts(keep))[0]

    def unpruned(mark: Callable[[str], None]) -> list[Tensor]:
        encode(model, inputs)
        return []

    ways = {"ours": ours, "authors": theirs, "unpruned": unpruned}
    return Case("visionzip", "encoding and choice", len(pixels), n, keep, ways)


def at_input(name: str, images: Sequence[VisualTokens], theirs: Callable[[], list[Tensor]]) -> Case:
    """From the picture's rows to the choice."""
    pruner = get_pruner(name)
    ways: dict[str, Way] = {
        "ours": lambda mark: [selection.indices for selection in pruner.select_batch(images)],
        "authors": lambda mark: theirs(),
    }
    return Case(name, "choice", len(images), images[0].n, images[0].keep, ways, turns=5)


def cases(model: Any, shape: Shape, batches: Sequence[int]) -> list[Case]:
    """All that is measured of one shape."""
    inputs = random_prompts(model, architecture(shape.name), 1, shape.text, 0)
    inside = Inside(model, inputs)
    found = [inside.fastv(shape.fastv, shape.inside)]
    found += [inside.sparsevlm(shape.inside, rank) for rank in (False, True)]
    found.append(visionzip(model, inputs, shape.keep))
    n, width = inside.features.shape
    for batch in batches:
        images = [replace(image(i, n, width, [], model.device), keep=shape.keep) for i in range(batch)]

        def diverse(images: list[VisualTokens] = images) -> list[Tensor]:
            return [authors.divprune(one.features, one.keep) for one in images]

        def conditional(images: list[VisualTokens] = images) -> list[Tensor]:
            features, questions = [one.features for one in images], [one.question for one in images]
            return list(authors.cdpruner(torch.stack(features), torch.stack(questions), images[0].keep))

        found += [at_input("divprune", images, diverse), at_input("cdpruner", images, conditional)]
    return found


# --- timing -----------------------------------------------------------------------------------------


def timed(way: Way, device: torch.device) -> tuple[dict[str, float], list[Tensor]]:
    """Seconds to the end of each part, and what was kept."""
    ends: dict[str, float] = {}
    began = device_time(device)
    kept = way(lambda part: ends.update({part: device_time(device)}))
    ends[WHOLE] = device_time(device)
    return {part: end - began for part, end in ends.items()}, kept


def in_common(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, int]:
    """{"kept", "same"}: rows that ours keeps, all images and cuts together, and those of them that theirs keeps.

    Raises:
        ValueError: they keep other numbers of rows, or share fewer than 95 % of those of one image and cut.
    """
    kept = same = 0
    for mine, other in zip(ours, theirs, strict=True):
        both = int(torch.isin(mine, other).sum())
        if mine.numel() != other.numel() or both < ALIKE * mine.numel():
            raise ValueError(f"ours keeps {mine.tolist()}, the authors' way {other.tolist()}: {both} in common")
        kept, same = kept + mine.numel(), same + both
    return {"kept": kept, "same": same}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: float(f"{value:.4g}") for name, value in (("median", middle), ("low", low), ("high", high))}


@torch.no_grad()
def measured(case: Case, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each part of a case; the first turn warms up."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in case.ways}
    for turn in range(repeats * case.turns + 1):
        kept: dict[str, list[Tensor]] = {}
        for name in case.ways if turn % 2 else reversed(case.ways):
            seconds, kept[name] = timed(case.ways[name], device)
            if turn:
                times[name].append(seconds)
        same = in_common(kept["ours"], kept["authors"])
    about = {"method": case.method, "batch": case.batch, "n": case.n, "keep": case.keep}
    rows = []
    for part in case.parts:
        of = {name: [seconds[part] for seconds in turns] for name, turns in times.items()}

        def ratio(above: str, below: str, of: Mapping[str, list[float]] = of) -> dict[str, float] | None:
            return quartiles([a / b for a, b in zip(of[above], of[below], strict=True)]) if below in of else None

        row = about | {"work": case.work if part == WHOLE else f"{case.work} {part}", "turns": len(of["ours"])}
        row |= {f"{name}_seconds": quartiles(seconds) for name, seconds in of.items()}
        row |= {"ratio": ratio("ours", "authors"), "same_tokens": same}
        for below in ("unpruned", "limit"):
            row |= {f"{name}_of_{below}": ratio(name, below) for name in ("ours", "authors")}
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = SHAPES["tiny" if options.tiny else options.shape]
    model = random_model(shape.name, torch.device(options.device), getattr(torch, options.dtype), "sdpa")
    rows = []
    with torch.no_grad():
        todo = [case for case in cases(model, shape, options.batches) if case.method in options.methods]
    for case in todo:
        rows += measured(case, options.repeats, model.device)
        for row in rows[-len(case.parts) :]:
            print(f"{row['method']}, {row['work']}, batch {row['batch']}: ours to theirs {row['ratio']}", flush=True)
    return {
        "schema": "gripvlm.authors_way/1",
        "command": command_line(),
        "environment": environment(),
        "model": {
            "architecture": f"{shape.name}, random weights",
            "note": architecture(shape.name).note,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": options.dtype,
            "device": str(model.device),
        },
        "shape": {"text": shape.text, "keep_at_input": shape.keep, "keep_inside_on_average": shape.inside},
        "repeats": options.repeats,
        "seed": 0,
        "ratio": "seconds of ours to those of the authors' way, within a turn",
        "rows": rows,
    }


def parser() -> argparse.ArgumentParser:
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=sorted(SHAPES), default="llava-0.5b")
    options.add_argument("--tiny", action="store_true", help="the same as --shape tiny")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options.add_argument("--batches", type=numbers, default=[1, 8], help="images at a time, of divprune and cdpruner")
    options.add_argument("--repeats", type=int, default=7, help="turns that count, 2 or more")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options.add_argument("--threads", type=int, default=0, help="of torch; by default its own choice")
    options.add_argument("--out", type=Path, default=ROOT / "results" / "authors-way.json")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.repeats < 2:
        raise SystemExit(f"--repeats {options.repeats}: quartiles need 2 or more")
    result = measure(options)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
