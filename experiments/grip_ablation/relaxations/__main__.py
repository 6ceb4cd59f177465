"""Trains one relaxation: `python -m experiments.grip_ablation.relaxations --help`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from typing import Any, get_type_hints

import torch
from transformers import PreTrainedModel

from gripvlm.errors import GripError, Interrupted
from gripvlm.grip.pruner import place_of
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.grip.train import Stage
from gripvlm.grip.train.config import help_of, read_toml
from gripvlm.grip.train.run import check_settings, make_accelerator, make_engine, record_run, run_stage
from gripvlm.models.loading import load_model
from gripvlm.tasks import Task

from .conditional_grpo import ConditionalGrpo
from .config import RelaxedConfig
from .diffprune import DiffPrune
from .dynamicvit import DynamicViT
from .masks import Relaxed

STAGES: dict[str, type[Stage]] = {
    "dynamicvit": DynamicViT,
    "diffprune": DiffPrune,
    "conditional_bernoulli": ConditionalGrpo,
}
"""Relaxations with a loss of their own; the others are masks of `Relaxed`."""


def train_relaxed(config: RelaxedConfig, model: PreTrainedModel, processor: Any, data: Task | None = None) -> Scorer:
    """Trains a scorer through `config.relaxation`; the same call resumes."""
    questions = check_settings(config, data)
    torch.manual_seed(config.seed)
    base = ModelFingerprint.of(model)
    sizes = ScorerConfig(base.features, config.width, config.blocks, config.heads, config.question, config.budget)
    scorer = Scorer.from_pretrained(place_of(config.init_from)) if config.init_from else Scorer(sizes, base)
    engine = make_engine(config, model, processor)
    stage = STAGES.get(config.relaxation, Relaxed)(config, scorer.to(model.device), engine)
    record_run(config)
    scorer = run_stage(stage, questions, make_accelerator(config, model.device), quiet=False)
    scorer.save_pretrained(config.output_dir)
    return scorer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="TOML file of settings; flags win over it")
    hints = get_type_hints(RelaxedConfig)
    for field in dataclasses.fields(RelaxedConfig):
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(flag, **how, help=help_of(field.name, RelaxedConfig).replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    file = given.pop("config")
    settings = read_toml(file, RelaxedConfig) if file else {}
    try:
        config = RelaxedConfig(**settings | {name: value for name, value in given.items() if value is not None})
        train_relaxed(config, *load_model(config.model, config.device or None))
    except GripError as error:
        sys.exit(f"Error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
