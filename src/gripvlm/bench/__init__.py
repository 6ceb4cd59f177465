"""What pruning buys on one machine: times, memory and FLOPs of a model with and without it, in one run."""

from gripvlm.bench.architectures import ARCHITECTURES, Architecture, random_model
from gripvlm.bench.prompts import random_prompts, real_prompts
from gripvlm.bench.runner import Interrupted, bench
from gripvlm.bench.words import sentences

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Interrupted",
    "bench",
    "random_model",
    "random_prompts",
    "real_prompts",
    "sentences",
]
