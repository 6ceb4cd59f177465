"""Stage 1: the scorer imitates a teacher on the full input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gripvlm.errors import TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.budgets import draw_keeps
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.loop import Stage, Stats
from gripvlm.grip.train.rollout import Batch, Engine
from gripvlm.grip.train.teachers import make_teacher

__all__ = ["WarmUp"]


class WarmUp(Stage):
    """Loss: KL(teacher || softmax of the logits), mean over images, at budgets drawn as in GRPO.

    TwigVLM++ (arXiv 2503.14075) distils attention so. Data order: `Questions`. The teacher does not depend
    on the budget, unless it chooses sets; the scorer sees one nevertheless, so that its ranking is good at all
    of them when exploration starts.
    """

    name = "warmup"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine, config.warmup_steps, config.warmup_learning_rate)
        self.teacher = make_teacher(config.teacher, _layers(config.teacher_layers, engine), config.num_generations)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        seen = batch.for_scorer(self.scorer.config.question)
        kept = draw_keeps(self.config, seen.sizes, seen.owner, progress, random)
        wanted = nn.utils.rnn.pad_sequence(self.teacher(self.engine, batch, kept, random), batch_first=True)
        logits = seen.score(self.scorer, kept)
        log_probs = logits.log_softmax(-1).masked_fill(~seen.valid, 0.0)
        entropy = -(wanted * wanted.clamp(min=1e-12).log()).sum(-1)
        kl = -(wanted * log_probs).sum(-1) - entropy
        yield kl.mean(), {"kl_teacher": float(kl.detach().mean())}


def _layers(text: str, engine: Engine) -> list[int]:
    """Layer numbers as typed, each one that the language model has."""
    count = engine.model.config.get_text_config().num_hidden_layers
    parts = [part.strip() for part in text.split(",") if part.strip()]
    layers = [int(part) for part in parts if part.lstrip("-").isdecimal()]
    if len(layers) < len(parts) or not all(-count <= layer < count for layer in layers):
        raise TrainError(f"teacher_layers = {text!r}: type numbers from 0 to {count - 1}, such as {count - 1}")
    return layers
