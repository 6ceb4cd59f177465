"""What Grip's scorer costs beside the prefill of a 7B language model: FLOPs, and times on one CPU core.

    python -m experiments.grip_cost.measure     writes results/cpu.json; under a minute

The 7B is LLaVA-1.5's language model. Its time is composed: one of each of its matrix products and one layer's attention
are timed at the prompt's length, and multiplied. FLOPs are counted by torch where it runs the scorer, and are two for
each multiplication and addition.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from experiments.results import STUDIES
from gripvlm.grip.pruner import Grip
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.types import VisualTokens

D, HIDDEN, LAYERS, HEADS, WORDS = 4096, 11008, 32, 32, 35
SCORERS = {
    "one round": {},
    "16 rounds": {"rounds": 16},
}
PROMPTS = {"576": [576], "2,880 as five images, each for itself": [576] * 5, "2,880 with one budget": [576] * 5}
SHARE = 0.125


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The least of some times, after one that does not count; of this process alone, whatever else runs."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def prefill_flops(length: int) -> int:
    """Of all layers; attention looks back only."""
    return LAYERS * (2 * length * (4 * D * D + 3 * D * HIDDEN) + 2 * length * length * D)


def prefill_seconds(length: int) -> float:
    x, square, wide = torch.randn(length, D), torch.randn(D, D), torch.randn(D, HIDDEN)
    q = torch.randn(1, HEADS, length, D // HEADS)
    attention = seconds(lambda: scaled_dot_product_attention(q, q, q, is_causal=True), 1)
    return LAYERS * (4 * seconds(lambda: x @ square, 1) + 3 * seconds(lambda: x @ wide, 1) + attention)


@torch.no_grad()
def scorer(images: list[int], joint: bool, **config: Any) -> tuple[int, float]:
    """FLOPs and seconds of one prompt's selection."""
    torch.manual_seed(0)
    grip = Grip("untrained", Scorer(ScorerConfig(D, joint=joint, **config)).eval())
    words = torch.randn(WORDS, D)
    tokens = [VisualTokens(torch.randn(n, D), int(SHARE * n), question=words, image=i) for i, n in enumerate(images)]
    # The plain implementation: torch counts no other's products on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        grip.select_batch(tokens)
    return counter.get_total_flops(), seconds(lambda: grip.select_batch(tokens), 3)


def main() -> None:
    torch.set_num_threads(1)
    lengths = {sum(images) + WORDS for images in PROMPTS.values()}
    full = {length: prefill_seconds(length) for length in sorted(lengths)}
    rows = []
    for prompt, images in PROMPTS.items():
        length = sum(images) + WORDS
        for name, config in SCORERS.items():
            flops, taken = scorer(images, "one budget" in prompt, **config)
            rows.append(
                {
                    "prompt": prompt,
                    "scorer": name,
                    "gflops": flops / 1e9,
                    "of_prefill_flops": flops / prefill_flops(length),
                    "of_pruned_prefill_flops": flops / prefill_flops(int(SHARE * sum(images)) + WORDS),
                    "seconds": taken,
                    "of_prefill_seconds": taken / full[length],
                }
            )
            print(json.dumps(rows[-1]))
    content = {
        "command": "python -m experiments.grip_cost.measure",
        "torch": torch.__version__,
        "threads": 1,
        "keep": SHARE,
        "prefill": {str(n): {"gflops": prefill_flops(n) / 1e9, "seconds": taken} for n, taken in full.items()},
        "rows": rows,
    }
    (STUDIES / "grip_cost/results/cpu.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
