"""What pruning buys on one machine: times, memory and FLOPs of a model with and without it, in one run."""

from gripvlm.bench.runner import BenchInterrupted, bench
from gripvlm.bench.shapes import architecture, random_model, random_prompts, random_pruner, real_prompts

__all__ = [
    "BenchInterrupted",
    "architecture",
    "bench",
    "random_model",
    "random_prompts",
    "random_pruner",
    "real_prompts",
]
