"""results/pruners.json: the time of each pruner alone, as a ratio to a language model's prefill in the same run.

    python -m experiments.speed.pruners                          # n = 576 and 2,880, batch 1 and 16; hours on two cores
    python -m experiments.speed.pruners --sizes 576 --batches 1

The language model has random weights and the shape of Qwen2-0.5B. Pruners get random tensors of the shapes that a CLIP-L
tower and this model would hand them: what it costs to capture attention is not counted. Each round times every pruner
once, and the prefill of as many visual tokens (and 32 of text) once, in one order and then in the other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gripvlm.eval.environment import command_line, environment
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.pruners import LLMPruner, Pruner, get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.registry import _BUILT_IN
from gripvlm.types import LLMTokens, VisionRows, VisualTokens
from gripvlm.utils.timing import device_time

TEXT = 32
HEADS, HEAD_DIM, WIDTH = 16, 64, 1024  # CLIP-L
VISION_LAYERS = (0, 5, 8, -2, -1)  # those that any pruner reads
WRAPPED = {"ensemble": "ensemble(norm,divprune)", "mmr": "mmr(norm)", "split": "split(norm)", "spread": "spread(norm)"}
LEFT_OUT = {"full": "keeps all", "keep_all": "keeps all", "relaxed": "the same network as grip"}
LEFT_OUT["tome"] = "merges inside the vision tower, which it makes faster"
SHARES = {"input": 1 / 9, "llm": 1 / 3}  # 64 of 576; in the LLM an average that every schedule reaches
TEXT_ROWS = ("text", "after", "words", "text_key_sizes")


def build(hidden: int, layers: int) -> Any:
    """A language model with random weights; 896 and 24 are Qwen2-0.5B's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads, inner = max(2, hidden // 64), hidden * 4864 // 896
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def image(number: int, n: int, hidden: int) -> VisualTokens:
    """Random tokens of one image, with everything that a pruner may ask for."""
    generator = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    vision = {
        layer: VisionRows(noise(HEADS, n).softmax(-1), noise(HEADS, n).softmax(-1), noise(n, HEAD_DIM))
        for layer in VISION_LAYERS
    }
    question, patches = noise(TEXT, hidden), noise(n, WIDTH)
    return VisualTokens(
        features=noise(n, hidden), keep=n, grid=(height, n // height), question=question, sample=number, image=0,
        key=number, vision=vision, patches=patches,
    )  # fmt: skip


def llm_state(tokens: VisualTokens, heads: int, head_dim: int) -> dict[str, Tensor]:
    """What a layer of the language model shows of the image: see `LLMTokens`."""
    generator = torch.Generator().manual_seed(tokens.sample + 1)
    hidden = tokens.features.shape[1]
    shapes = {"hidden": (tokens.n, hidden), "keys": (tokens.n, head_dim), "text": (TEXT, hidden), "words": (TEXT, hidden)}
    state = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    state["last"] = torch.randn(heads, tokens.n, generator=generator).softmax(-1)
    state["question"] = torch.randn(heads, TEXT, tokens.n, generator=generator).softmax(-1)
    state["key_sizes"] = torch.rand(tokens.n, generator=generator)
    state["text_key_sizes"] = torch.rand(TEXT, generator=generator)
    return state | {"after": torch.ones(TEXT, dtype=torch.bool)}


def pruners(hidden: int, images: Sequence[VisualTokens]) -> dict[str, Pruner]:
    """Every built-in pruner that chooses, by its spec."""
    found: dict[str, Pruner] = {}
    for name in sorted({*_BUILT_IN} - {*LEFT_OUT}):
        spec = WRAPPED.get(name, name)
        if name == "given":
            scores = [torch.randn(tokens.n, generator=torch.Generator().manual_seed(9)) for tokens in images]
            found[spec] = Given([[one] for one in scores])
        elif name == "grip":
            torch.manual_seed(0)
            found[spec] = get_pruner(spec, module=Scorer(ScorerConfig(hidden)).eval())
        else:
            found[spec] = get_pruner(spec)
    return found


def choose(pruner: Pruner, images: Sequence[VisualTokens]) -> None:
    """One choice for all images, at the input."""
    counts = [pruner.allocate_budget([tokens])[0] for tokens in images]
    pruner.select_batch([replace(tokens, keep=count) for tokens, count in zip(images, counts, strict=True)])


def choose_in_layers(pruner: LLMPruner, tokens: VisualTokens, state: dict[str, Tensor], layers: int) -> None:
    """One image, at every layer of the pruner's schedule."""
    plan, rows = dict(pruner.schedule(tokens.n, tokens.keep, layers)), torch.arange(tokens.n)
    if 0 in plan:
        rows = pruner.select(replace(tokens, keep=plan.pop(0))).indices
    for layer, count in sorted(plan.items()):
        if count < rows.numel():
            left = {}
            for name, value in state.items():
                on_rows = value[rows] if name in ("hidden", "keys") else value[..., rows] if name not in TEXT_ROWS else value
                left[name] = on_rows
            norm = lambda states: torch.nn.functional.rms_norm(states, states.shape[-1:])  # noqa: E731
            rows = rows[pruner.select_at_layer(layer, LLMTokens(layer, count, rows, tokens, norm=norm, **left)).indices]


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]


@torch.no_grad()
def cell(model: Any, n: int, batch: int, repeats: int) -> dict[str, Any]:
    """Every pruner and the prefill, for `batch` images of `n` tokens."""
    config = model.config
    heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    images = [image(number, n, hidden) for number in range(batch)]
    states = [llm_state(tokens, heads, hidden // heads) for tokens in images]
    prompt = torch.stack([torch.cat((tokens.features, tokens.question)) for tokens in images])
    chosen = pruners(hidden, images)
    keeps = {spec: max(1, round(n * SHARES[pruner.stage])) for spec, pruner in chosen.items()}

    def run(spec: str) -> None:
        if spec == "prefill":
            model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
            return
        pruner, some = chosen[spec], [replace(tokens, keep=keeps[spec]) for tokens in images]
        if isinstance(pruner, LLMPruner):
            for tokens, state in zip(some, states, strict=True):
                choose_in_layers(pruner, tokens, state, layers)
        else:
            choose(pruner, some)

    times: dict[str, list[float]] = {spec: [] for spec in (*chosen, "prefill")}
    for turn in range(repeats + 1):  # the first warms up
        for spec in times if turn % 2 else reversed(times):
            began = device_time(model.device)
            run(spec)
            if turn:
                times[spec].append(device_time(model.device) - began)
    whole = times.pop("prefill")
    found: dict[str, Any] = {"n": n, "batch": batch, "prefill": {"seconds": spread(whole)}, "pruners": {}}
    for spec, seconds in times.items():
        ratio = spread([value / statistics.median(whole) for value in seconds])
        row = {"stage": chosen[spec].stage, "keep": keeps[spec], "seconds": spread(seconds), "ratio": ratio}
        found["pruners"][spec] = row
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="576,2880", help="visual tokens an image")
    parser.add_argument("--batches", default="1,16", help="images at a time")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--hidden", type=int, default=896, help="width of the language model")
    parser.add_argument("--layers", type=int, default=24, help="layers of the language model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruners.json")
    options = parser.parse_args(arguments)
    model = build(options.hidden, options.layers)
    sizes, batches = ([*map(int, text.split(","))] for text in (options.sizes, options.batches))
    about = {"architecture": "Qwen2, random weights", "hidden": options.hidden, "layers": options.layers}
    about |= {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "float32", "device": "cpu"}
    result = {"schema": "gripvlm.pruner_speed/1", "command": command_line(), "environment": environment()}
    result |= {"model": about, "text": TEXT, "repeats": options.repeats, "seed": 0, "left_out": LEFT_OUT, "cells": []}
    for n in sizes:
        for batch in batches:
            result["cells"].append(cell(model, n, batch, options.repeats))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{n} tokens, batch {batch}: prefill {result['cells'][-1]['prefill']['seconds'][0]:.3g} s", flush=True)


if __name__ == "__main__":
    main()
