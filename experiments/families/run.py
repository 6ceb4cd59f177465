"""Measures the invariants of docs/families.md on every family and writes the table there.

    python runs/family_table.py            # about a minute on one thread; any transformers version

Writes results/families-<transformers version>.json and, between the markers, docs/families.md from all
such files. The models are the tiny random ones of tests/tiny_families: float32 on the CPU, logits that
spread over about +-10, a batch of three prompts (one image, two images, none; left-padded), 5 rows kept
of each visual item by "random", 8 greedy tokens. Column 9 is "fastv" with keep=0.75 on average over the 4
layers, half of the tokens in the last two, against the full model whose later layers mask what was dropped.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import gripvlm  # noqa: E402
from gripvlm.eval.environment import command_line, environment  # noqa: E402
from gripvlm.models import FAMILIES  # noqa: E402
from test_layered import KEEP, stages_of  # noqa: E402
from test_layers import masking  # noqa: E402
from tiny_families import TINY, build, make  # noqa: E402
from tiny_families.reference import full_positions, kept, masked, teacher_forced  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: runs/family_table.py -->", "<!-- end of table -->"
IMAGES, WORDS = [1, 2, 0], [7, 9, 5]
TOKENS = 8
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MIX = ["v", "i", "viv"]


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference of two lists of logits."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def entries(cache: Any) -> int:
    """Tokens in the cache's longest layer."""
    return max(layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None)


def measure(name: str, attention: str) -> dict[str, Any]:
    """The invariants of one family under one attention implementation, by number as in the page."""
    tiny, model = TINY[name], build(name, attention)
    inputs = make(tiny, IMAGES, WORDS).inputs
    before = dict(vars(model))
    plain = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=1.0):
        everything = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=5) as record:
        pruned = model.generate(**inputs, **GREEDY)
        alone = [model.generate(**make(tiny, IMAGES, WORDS, only=b).inputs, **GREEDY) for b in range(3)]
    selections = gripvlm.prune_inputs(model, inputs, "random", keep=5, return_record=True)[1].selections
    arguments = gripvlm.prune_inputs(model, inputs, "random", keep=5)
    found: dict[str, Any] = {
        "keep_all": apart(everything.logits, plain.logits),
        "keep_all_same_text": torch.equal(everything.sequences, plain.sequences),
        "effect": apart(pruned.logits[:1], plain.logits[:1]),
        "equals": FAMILIES[name].equals,
    }
    if FAMILIES[name].equals == "masking":
        reference = model.generate(**masked(model, inputs, selections), **GREEDY)
        found["dropping"] = apart(pruned.logits, reference.logits)
        found["dropping_same_text"] = torch.equal(pruned.sequences, reference.sequences)
    else:
        new = pruned.sequences[:, -TOKENS:]
        found["dropping"] = apart(pruned.logits, teacher_forced(model, arguments, new))
        found["dropping_same_text"] = True  # one forward over the generated text: nothing is generated anew
    keep = kept(inputs["input_ids"], inputs["attention_mask"], selections)
    real = arguments["attention_mask"].bool()
    positions = full_positions(model, inputs)
    found["exact"] = torch.equal(arguments["input_ids"][real], inputs["input_ids"][keep]) and {
        s.k for sample in selections for s in sample
    } == {5}
    axes = slice(1, None) if positions.ndim == 3 else slice(None)
    ours = arguments["position_ids"][axes] if positions.ndim == 3 else arguments["position_ids"]
    theirs = positions[axes] if positions.ndim == 3 else positions
    found["positions"] = torch.equal(ours[..., real], theirs[..., keep])
    found["batch"] = max(
        apart([x[0] for x in one.logits], [x[b] for x in pruned.logits]) for b, one in enumerate(alone)
    )
    found["batch_same_text"] = all(
        torch.equal(one.sequences[0, -TOKENS:], pruned.sequences[b, -TOKENS:]) for b, one in enumerate(alone)
    )
    found["cache"] = [entries(plain.past_key_values), entries(pruned.past_key_values)]
    found["model_as_before"] = dict(vars(model)) == before
    found["selection"] = [[s.indices.tolist() for s in sample] for sample in record.selections]
    if FAMILIES[name].layers:
        with gripvlm.prune(model, "fastv", keep=KEEP) as record:
            ours = model.generate(**inputs, **GREEDY)
        full = build(name, "eager")
        with masking(full, stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)):
            theirs = full.generate(**inputs, **GREEDY)
        found["inside"] = apart(ours.logits, theirs.logits)
        found["inside_same_text"] = torch.equal(ours.sequences, theirs.sequences)
        found["layers"] = [s.counts for sample in record.selections for s in sample]
    if tiny.video:
        videos = make(tiny, MIX, [7, 9, 6]).inputs
        with gripvlm.prune(model, "random", keep=5) as record:
            ours = model.generate(**videos, **GREEDY)
        found["video"] = apart(ours.logits, model.generate(**masked(model, videos, record.selections), **GREEDY).logits)
    return found


def row(name: str, found: dict[str, dict[str, Any]]) -> str:
    """One line of the table: the worse of sdpa and eager."""
    both = found["sdpa"], found["eager"]

    def worst(key: str) -> str:
        return f"{max(one[key] for one in both):.1e}" if key in both[0] else ""

    def all_of(key: str) -> str:
        return "yes" if all(one[key] for one in both) else "NO"

    same = both[0]["selection"] == both[1]["selection"]
    full, fewer = both[0]["cache"]
    zero = "0" if max(one["keep_all"] for one in both) == 0 else worst("keep_all")
    cells = [
        name,
        zero + ("" if all_of("keep_all_same_text") == "yes" else ", text differs"),
        both[0]["equals"],
        worst("dropping") + ("" if all_of("dropping_same_text") == "yes" else ", text differs"),
        worst("video"),
        all_of("exact"),
        all_of("positions"),
        worst("batch") + ("" if all_of("batch_same_text") == "yes" else ", text differs"),
        f"{full} → {fewer}",
        all_of("model_as_before"),
        "yes" if same else "NO",
        "refused"
        if "inside" not in both[0]
        else worst("inside") + ("" if all_of("inside_same_text") == "yes" else ", text differs"),
    ]
    return f"| {' | '.join(cells)} |"


def _version(file: Path) -> list[int]:
    return [int(part) for part in file.stem.removeprefix("families-").split(".") if part.isdigit()]


def tables() -> str:
    """All results there are, one table a version, newest first."""
    parts = []
    files = sorted((ROOT / "results").glob("families-*.json"), key=_version, reverse=True)
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        used = result["environment"]["versions"]
        parts += [
            f"transformers {used['transformers']}, torch {used['torch']}, {result['dtype']} on "
            f"{result['environment']['hardware']['device']} (`results/{file.name}`):\n",
            "| family | 1 keep all | 2 equals | 2 largest difference | 2 with videos | 3 exact | 4 positions "
            "| 5 batch = singles | 6 cache | 7 as before | 8 same choice | 9 inside the layers |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(row(name, found) for name, found in sorted(result["families"].items())),
            "",
        ]
    return "\n".join(parts)


def main() -> None:
    started = time.perf_counter()
    families = {}
    for name in sorted(TINY):
        families[name] = {attention: measure(name, attention) for attention in ("sdpa", "eager")}
        print(row(name, families[name]), flush=True)
    result = {
        "command": "python runs/" + command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "dtype": "float32",
        "setting": {"images": IMAGES, "words": WORDS, "keep": 5, "pruner": "random", "tokens": TOKENS, "videos": MIX},
        "families": families,
        "seconds": round(time.perf_counter() - started, 1),
    }
    target = ROOT / "results" / f"families-{transformers.__version__}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
