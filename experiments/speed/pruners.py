"""results/pruner-speed.json: the time of each pruner alone, as a ratio to a language model's prefill in the same run.

    python runs/pruner_speed.py                                  # n = 576 and 2,880, batch 1 and 16; hours on two cores
    python runs/pruner_speed.py --longest 300                    # leaves out prefills that would take over 300 s

The language model has random weights and the shape of Qwen2-0.5B (24 layers of width 896). Pruners get random tensors
of the shapes that a CLIP-L tower and this model would hand them: what it costs to note attention is not counted. Each
round times every pruner once, and the prefill of the same number of visual tokens (and 32 of text) once, in one order
and then in the other. A prefill that is left out is null in the result, with the reason, and so are its ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from gripvlm.eval import environment  # noqa: E402
from gripvlm.eval.environment import command_line  # noqa: E402
from gripvlm.grip.scorer import Scorer, ScorerConfig  # noqa: E402
from gripvlm.pruners import LLMPruner, Pruner, get_pruner  # noqa: E402
from gripvlm.pruners.baselines.given import Given  # noqa: E402
from gripvlm.pruners.registry import _BUILT_IN  # noqa: E402
from gripvlm.types import LLMTokens, VisionRows, VisualTokens
from gripvlm.utils.timing import device_time  # noqa: E402

TEXT = 32
TOWER = {"heads": 16, "head_dim": 64, "width": 1024}  # CLIP-L
AROUND = {"ensemble": "ensemble(norm,divprune)", "mmr": "mmr(norm)", "split": "split(norm)", "spread": "spread(norm)"}
LEFT_OUT = {
    "full": "keeps all",
    "keep_all": "keeps all",
    "relaxed": "the same network as grip",
    "tome": "merges inside the vision tower, which it makes faster",
}
SHARES = {"input": 1 / 9, "llm": 1 / 3}  # 64 of 576; inside the language model an average that every schedule reaches


def build(hidden: int, layers: int, device: str) -> Any:
    """A language model with random weights; 896 and 24 are Qwen2-0.5B's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = max(2, hidden // 64)
    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 4864 // 896,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return Qwen2ForCausalLM(config).eval().to(device)


def sides(n: int) -> tuple[int, int]:
    """The raster of n tokens that is nearest to a square."""
    h = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    return h, n // h


def image(number: int, n: int, hidden: int, layers: Sequence[int], device: str) -> VisualTokens:
    """Random tokens of one image, with everything that a pruner may ask for."""
    random = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device)

    def attention() -> Tensor:
        return noise(TOWER["heads"], n).softmax(-1)

    vision = {layer: VisionRows(attention(), attention(), noise(n, TOWER["head_dim"])) for layer in layers}
    return VisualTokens(
        noise(n, hidden),
        n,
        sides(n),
        noise(TEXT, hidden),
        number,
        0,
        number,
        vision,
        noise(n, TOWER["width"]),
    )


def inside(tokens: VisualTokens, heads: int, head_dim: int) -> dict[str, Tensor]:
    """What a layer shows of the image: see `LLMTokens`."""
    random = torch.Generator().manual_seed(tokens.sample + 1)
    seen = {
        "hidden": torch.randn(tokens.features.shape, generator=random),
        "last": torch.randn(heads, tokens.n, generator=random).softmax(-1),
        "question": torch.randn(heads, TEXT, tokens.n, generator=random).softmax(-1),
        "text": torch.randn(TEXT, tokens.features.shape[1], generator=random),
        "keys": torch.randn(tokens.n, head_dim, generator=random),
        "after": torch.ones(TEXT, dtype=torch.bool),
        "words": torch.randn(TEXT, tokens.features.shape[1], generator=random),
        "key_sizes": torch.rand(tokens.n, generator=random),
        "text_key_sizes": torch.rand(TEXT, generator=random),
    }
    return {name: value.to(tokens.features.device) for name, value in seen.items()}


def pruners(hidden: int, images: Sequence[VisualTokens]) -> dict[str, Pruner]:
    """spec -> pruner, for every built-in one that chooses."""
    found: dict[str, Pruner] = {}
    for name in sorted({*_BUILT_IN} - {*LEFT_OUT}):
        spec = AROUND.get(name, name)
        if name == "given":
            found[spec] = Given([[torch.randn(one.n, generator=torch.Generator().manual_seed(9))] for one in images])
        elif name == "grip":
            torch.manual_seed(0)
            found[spec] = get_pruner(spec, module=Scorer(ScorerConfig(hidden)).eval().to(images[0].features.device))
        else:
            found[spec] = get_pruner(spec)
    return found


def rms(states: Tensor) -> Tensor:
    """The language model's last norm."""
    return torch.nn.functional.rms_norm(states, states.shape[-1:])


def call(pruner: Pruner, images: Sequence[VisualTokens], layers: int, shown: Sequence[dict[str, Tensor]]) -> Callable:
    """One choice for all images: at the input, or at every layer of its schedule; () -> None."""
    keep = max(1, round(images[0].n * SHARES[pruner.stage]))
    asked = [replace(tokens, keep=keep) for tokens in images]

    def at_input() -> None:
        counts = [pruner.allocate_budget([tokens])[0] for tokens in asked]
        pruner.select_batch([replace(tokens, keep=k) for tokens, k in zip(asked, counts, strict=True)])

    def in_layers() -> None:
        assert isinstance(pruner, LLMPruner)
        for tokens, seen in zip(asked, shown, strict=True):
            plan = dict(pruner.schedule(tokens.n, keep, layers))
            rows = torch.arange(tokens.n, device=tokens.features.device)
            if 0 in plan:
                rows = pruner.select(replace(tokens, keep=plan.pop(0))).indices
            for layer, count in sorted(plan.items()):
                if count < rows.numel():
                    part = {name: _part(name, value, rows) for name, value in seen.items()}
                    answer = pruner.select_at_layer(layer, LLMTokens(layer, count, rows, tokens, norm=rms, **part))
                    rows = rows[answer.indices]  # type: ignore[union-attr]

    return in_layers if pruner.stage == "llm" else at_input


def _part(name: str, value: Tensor, rows: Tensor) -> Tensor:
    """What is left of it where these rows are."""
    if name in ("text", "after", "words", "text_key_sizes"):
        return value
    return value[rows] if name in ("hidden", "keys") else value[..., rows]


def timed(work: Callable[[], Any], device: torch.device) -> float:
    began = device_time(device)
    work()
    return device_time(device) - began


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]


@torch.no_grad()
def cell(model: Any, n: int, batch: int, repeats: int, why_not: str) -> dict[str, Any]:
    """One n and batch; `why_not` is the reason to leave the prefill out, or empty."""
    device, config = model.device, model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    layers = sorted({0, 5, 8, -2, -1})
    images = [image(number, n, hidden, layers, device) for number in range(batch)]
    shown = [inside(tokens, heads, hidden // heads) for tokens in images]
    prompt = torch.cat(
        [torch.stack([tokens.features for tokens in images]), torch.stack([t.question for t in images])], 1
    )  # type: ignore[misc]
    work: dict[str, Callable[[], Any]] = {
        spec: call(pruner, images, config.num_hidden_layers, shown) for spec, pruner in pruners(hidden, images).items()
    }
    stages = {spec: pruner.stage for spec, pruner in pruners(hidden, images).items()}
    if not why_not:
        work["prefill"] = lambda: model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name in work if turn % 2 else reversed(work):
            if turn or name != "prefill":  # the first round warms up
                seconds = timed(work[name], device)
                if turn:
                    times[name].append(seconds)
    whole = times.pop("prefill", None)
    found = {
        "n": n,
        "batch": batch,
        "prefill": {"seconds": spread(whole) if whole else None, **({"why": why_not} if why_not else {})},
        "pruners": {},
    }
    for spec, seconds in times.items():
        ratios = spread([a / statistics.median(whole) for a in seconds]) if whole else None
        keep = max(1, round(n * SHARES[stages[spec]]))
        found["pruners"][spec] = {"stage": stages[spec], "keep": keep, "seconds": spread(seconds), "ratio": ratios}
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model = build(options.hidden, options.layers, options.device)
    cells, longest = [], {}
    for n in options.sizes:
        for batch in options.batches:
            why, one = "", min(options.batches)
            if longest.get(n, 0.0) * batch / one > options.longest:
                why = f"batch {one} took {longest[n]:.0f} s, so this would pass --longest {options.longest:g}"
            began = time.perf_counter()
            cells.append(cell(model, n, batch, options.repeats, why))
            if cells[-1]["prefill"]["seconds"]:
                longest.setdefault(n, cells[-1]["prefill"]["seconds"][0])
            print(f"n {n} batch {batch}: {time.perf_counter() - began:.0f} s", cells[-1]["prefill"], flush=True)
    return {
        "schema": "gripvlm.pruner_speed/1",
        "command": command_line(),
        "environment": environment(),
        "model": {
            "architecture": "Qwen2, random weights",
            "hidden": options.hidden,
            "layers": options.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "text": TEXT,
        "repeats": options.repeats,
        "seed": 0,
        "left_out": LEFT_OUT,
        "cells": cells,
    }


def parser() -> argparse.ArgumentParser:
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sizes", type=numbers, default=[576, 2880], help="visual tokens an image")
    options.add_argument("--batches", type=numbers, default=[1, 16], help="images at a time")
    options.add_argument("--repeats", type=int, default=5, help="rounds that count")
    options.add_argument("--longest", type=float, default=math.inf, help="seconds of the longest prefill")
    options.add_argument("--hidden", type=int, default=896, help="width of the language model")
    options.add_argument("--layers", type=int, default=24, help="layers of the language model")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int, default=0, help="of torch; by default its own choice")
    options.add_argument("--out", type=Path, default=ROOT / "results" / "pruner-speed.json")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    result = measure(options)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
