"""One configuration for every stage: a dataclass that is also the command line's flags and a TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from gripvlm.errors import TrainError
from gripvlm.utils import disk

__all__ = ["STAGES", "TrainConfig", "help_of", "read_toml", "reads", "shares", "write_toml"]

STAGES = ("all", "warmup", "grpo", "relaxed")


def _f(
    default: Any,
    help: str,
    *choices: str,
    of: tuple[str, ...] = ("warmup", "grpo", "relaxed"),
    only: tuple[str, tuple[str, ...] | range] | None = None,
) -> Any:
    """A setting; `of`: the stages that read it; `only`: they do so where another setting has one of these values."""
    return field(default=default, metadata={"help": help, "choices": choices, "stages": of, "only": only})


_AFTER, _WARMUP, _GRPO, _RELAXED = ("grpo", "relaxed"), ("warmup",), ("grpo",), ("relaxed",)
_RANGES = ("log_uniform", "uniform", "annealed")
_LOW, _HIGH = ("budgets", (*_RANGES, "fixed")), ("budgets", _RANGES)
_OFF_POLICY = ("num_iterations", range(2, 2**63))
_ANNEALED = ("relaxation", ("soft_topk", "straight_through", "perturbed", "diffprune"))


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Names follow TRL's GRPOConfig where they mean the same."""

    # what
    model: str = _f("lab", "lab, a local folder, or a Hugging Face hub id; stays frozen")
    data: str = _f("", "training questions: PATH.jsonl ({image, question, answer?, choices?} a line) or tasks")
    out: str = _f("grip", "folder of the run: scorer, config, metrics, checkpoint; the same command resumes")
    stage: str = _f("all", "all (warm-up, then GRPO), warmup, grpo or relaxed", *STAGES)
    start: str = _f("", "a scorer to start from; by default a new one, or what the stage before left in --out")
    val_data: str = _f("", "validation questions; by default --val-share of --data's images")
    val_share: float = _f(
        0.05, "share of images held out for validation where --val-data is not given", only=("val_data", ("",))
    )
    val_questions: int = _f(256, "validation questions at most")
    seed: int = _f(0, "of everything random")
    device: str = _f("", "such as cpu or cuda:0; by default an accelerator if there is one")
    on_bad: str = _f("stop", "what a picture that cannot be read or an empty answer does", "stop", "skip")
    # the scorer
    width: int = _f(128, "channels of the scorer's transformer")
    blocks: int = _f(3, "its blocks")
    heads: int = _f(4, "its attention heads")
    question: bool = _f(True, "whether the scorer reads the question")
    budget: bool = _f(True, "whether the scorer is told the budget")
    # batches and budgets
    images: int = _f(4, "pictures a micro-batch; the memory of warm-up and relaxations goes with it")
    questions: int = _f(4, "questions a picture at most")
    accumulate: int = _f(1, "micro-batches a step, over all processes")
    rows: int = _f(64, "subsets in one forward of the model; GRPO's memory goes with it")
    bf16: bool = _f(False, "the frozen model under bfloat16 autocast, for models that are loaded in float32")
    budgets: str = _f(
        "log_uniform", "how a group's budget is drawn", "log_uniform", "uniform", "annealed", "fixed", "choices"
    )
    keep_choices: str = _f("", "the shares of tokens that budgets = choices draws from, such as 0.25,0.06,0.015")
    keep_low: float = _f(0.015, "smallest share of tokens drawn (the only one for fixed)", only=_LOW)
    keep_high: float = _f(0.5, "largest share of tokens drawn", only=_HIGH)
    # optimiser
    steps: int = _f(1000, "of GRPO or the relaxed baseline", of=_AFTER)
    learning_rate: float = _f(
        3e-4, "of GRPO or the relaxed baseline; 3 % linear warm-up, then a cosine to a tenth", of=_AFTER
    )
    max_grad_norm: float = _f(1.0, "gradients are clipped to this norm")
    weight_decay: float = _f(0.0, "of AdamW")
    ema_decay: float = _f(0.0, "keep a running average of the weights with this decay, such as 0.98; 0 keeps the last")
    # warm-up
    warmup_steps: int = _f(400, "of the supervised warm-up; 0 leaves it out", of=_WARMUP)
    warmup_learning_rate: float = _f(1e-3, "of the supervised warm-up", of=_WARMUP)
    teacher: str = _f("gradient", "attention, gradient, best_of_n or pruner:NAME", of=_WARMUP)
    teacher_layers: str = _f(
        "",
        "layers of the attention teacher, such as 2,3; by default the second half",
        of=_WARMUP,
        only=("teacher", ("attention",)),
    )
    # GRPO
    policy: str = _f("plackett_luce", "distribution over subsets", "plackett_luce", "conditional_bernoulli", of=_GRPO)
    num_generations: int = _f(16, "G, subsets a question (of the teacher best_of_n too)", of=("warmup", "grpo"))
    reward: str = _f(
        "probability",
        "what is maximised: log_prob, probability, agreement (no labels), exact_match, task_score or module:function; "
        "also judges the steps of every stage",
    )
    own_answers: bool = _f(False, "force the unpruned model's own answers and not the data's")
    beta: float = _f(0.0, "weight of the KL divergence to the scorer that GRPO started from", of=_GRPO)
    epsilon: float = _f(0.2, "clipping of the ratio, per token of the subset", of=_GRPO, only=_OFF_POLICY)
    epsilon_high: float = _f(0.0, "upper clipping; 0 means epsilon", of=_GRPO, only=_OFF_POLICY)
    num_iterations: int = _f(1, "optimiser steps a group of rollouts; 1 is strictly on-policy", of=_GRPO)
    scale_rewards: str = _f(
        "batch", "advantages are divided by this standard deviation", "group", "batch", "budget", "none", of=_GRPO
    )
    loss_type: str = _f(
        "grpo", "grpo: mean over a subset's tokens; dr_grpo: their sum over the image's", "grpo", "dr_grpo", of=_GRPO
    )
    importance_sampling_level: str = _f("sequence", "of the ratio", "sequence", "token", of=_GRPO, only=_OFF_POLICY)
    entropy_coef: float = _f(0.0, "weight of the policy's entropy per token", of=_GRPO)
    temperature: float = _f(1.0, "divides the logits when subsets are drawn", of=_GRPO)
    antithetic: bool = _f(False, "subsets of a group come in antithetic pairs", of=_GRPO)
    band: int = _f(0, "explore only ranks within this distance of k; 0 explores all", of=_GRPO)
    baseline: str = _f("mean", "what rewards are compared with", "mean", "self_critical", of=_GRPO)
    credit: str = _f(
        "group", "group: one advantage a subset; value: a learnt value of each token", "group", "value", of=_GRPO
    )
    # relaxed baselines
    relaxation: str = _f(
        "soft_topk",
        "gradient baseline",
        "soft_topk",
        "straight_through",
        "perturbed",
        "dynamicvit",
        "diffprune",
        of=_RELAXED,
    )
    tau_start: float = _f(1.0, "temperature of the relaxation at the first step", of=_RELAXED)
    tau_end: float = _f(0.02, "temperature of the relaxation at the last step", of=_RELAXED, only=_ANNEALED)
    samples: int = _f(4, "noise samples of the perturbed relaxation", of=_RELAXED, only=("relaxation", ("perturbed",)))
    ratio_weight: float = _f(
        2.0, "weight of dynamicvit's loss on the share that it keeps", of=_RELAXED, only=("relaxation", ("dynamicvit",))
    )
    # running
    save_minutes: float = _f(5.0, "minutes between checkpoints; Ctrl-C writes one as well")
    val_every: int = _f(100, "steps between validations")
    val_reward: str = _f("", "judges which step is kept, if not --reward; as there")
    val_keeps: str = _f("0.25,0.125,0.06,0.03,0.015", "budgets of the validation")
    patience: int = _f(0, "stop after so many validations without a better one; 0 never")
    max_minutes: float = _f(0.0, "stop a stage after so long; 0 never")
    log_with: str = _f("", "also log to tensorboard or trackio, through accelerate", "", "tensorboard", "trackio")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if hints[one.name] is float and type(value) is int:
                object.__setattr__(self, one.name, float(value))
            elif type(value) is not hints[one.name]:
                raise TrainError(f"{one.name} = {value!r}: type {_KINDS[hints[one.name]]}")
            choices = one.metadata["choices"]
            if choices and value not in choices:
                raise TrainError(f"{one.name} = {value!r}: type one of {', '.join(map(repr, choices))}")
        for name in (
            "images",
            "questions",
            "accumulate",
            "rows",
            "num_iterations",
            "samples",
            "val_every",
            "val_questions",
        ):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} = {getattr(self, name)}: type 1 or more")
        if self.num_generations < 2:
            raise TrainError(f"num_generations = {self.num_generations}: a group needs 2 or more to compare")
        if self.width < 1 or self.heads < 1 or self.width % self.heads or self.blocks < 1:
            raise TrainError(
                f"width = {self.width}, heads = {self.heads}, blocks = {self.blocks}: type a width that is a multiple "
                "of the heads, and one block or more"
            )
        if self.antithetic and self.num_generations % 2:
            raise TrainError(f"num_generations = {self.num_generations} cannot be paired: type an even number")
        highest = self.keep_high if self.budgets in _RANGES else 1.0
        if self.budgets != "choices" and not 0 < self.keep_low <= highest <= 1:
            also = f", keep_high = {highest}: type shares in (0, 1], the low one at most the high one"
            raise TrainError(
                f"keep_low = {self.keep_low}{also if self.budgets in _RANGES else ': type a share in (0, 1]'}"
            )
        for name in ("tau_start", "tau_end", "temperature", "learning_rate", "warmup_learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainError(f"{name} = {getattr(self, name)}: type a number above 0")
        for name in (
            "steps",
            "warmup_steps",
            "band",
            "patience",
            "beta",
            "max_minutes",
            "save_minutes",
            "weight_decay",
            "epsilon",
            "epsilon_high",
            "entropy_coef",
            "ratio_weight",
            "seed",
        ):
            if not 0 <= getattr(self, name) < 2**63:
                raise TrainError(f"{name} = {getattr(self, name)}: type 0 or more")
        shares(self.val_keeps, "val_keeps")
        if self.budgets == "choices" and not self.keep_choices:
            raise TrainError(
                "budgets = 'choices' has nothing to choose from: type --keep-choices 0.25,0.06, for instance"
            )
        if self.keep_choices:
            shares(self.keep_choices, "keep_choices")
        if self.keep_choices and self.budgets != "choices":
            raise TrainError(f"keep_choices are drawn by budgets = 'choices' only, not {self.budgets!r}")
        if not 0 <= self.ema_decay < 1:
            raise TrainError(f"ema_decay = {self.ema_decay}: type 0, or a number below 1 such as 0.98")
        if not 0 < self.val_share < 1:
            raise TrainError(f"val_share = {self.val_share}: type a share between 0 and 1")
        if self.relaxation == "perturbed" and self.samples < 2:
            raise TrainError(f"samples = {self.samples}: the gradient of 'perturbed' compares 2 samples or more")
        if self.stage == "relaxed" and self.reward not in ("probability", "log_prob"):
            raise TrainError(f"reward = {self.reward!r} has no gradient: type --reward probability, or log_prob")
        if self.policy != "plackett_luce" and self.importance_sampling_level == "token":
            raise TrainError(f"{self.policy} has no steps: type --importance-sampling-level sequence")
        if self.policy != "conditional_bernoulli" and self.credit == "value":
            raise TrainError("credit 'value' needs exact inclusion probabilities: type --policy conditional_bernoulli")

    def without_effect(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the settings that nothing in this run reads, with why."""
        mine = {"warmup", "grpo"} if self.stage == "all" else {self.stage}
        found = {}
        for name in names:
            if not mine & {*reads(name)}:
                here = "warm-up and GRPO" if self.stage == "all" else self.stage
                found[name] = f"in {here} (only {' and '.join(reads(name))} would read it)"
            elif only := self.__dataclass_fields__[name].metadata["only"]:
                other, values = only
                if (has := getattr(self, other)) not in values:
                    wanted = f"{values.start} or more" if isinstance(values, range) else " or ".join(values) or "none"
                    found[name] = f"with {other} {has} (it would with {wanted})"
        if self.stage == "warmup" and self.teacher != "best_of_n" and "num_generations" in names:
            found["num_generations"] = f"in warmup with teacher {self.teacher} (it would with best_of_n)"
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def shares(text: str, name: str) -> list[float]:
    """The shares of tokens in the setting `name`, each once.

    Raises:
        TrainError: none, or one outside (0, 1].
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise TrainError(f"{name} = {text!r}: type fractions in (0, 1], such as 0.25,0.1")
    return list(dict.fromkeys(found))


def reads(name: str) -> tuple[str, ...]:
    """The stages that a setting has an effect in."""
    stages: tuple[str, ...] = TrainConfig.__dataclass_fields__[name].metadata["stages"]
    return stages


def help_of(name: str) -> str:
    """What a setting means, in one line."""
    metadata = TrainConfig.__dataclass_fields__[name].metadata
    choices = [choice for choice in metadata["choices"] if choice and choice not in metadata["help"]]
    return metadata["help"] + (f": {', '.join(choices)}" if choices else "")


def checked_names(names: dict[str, Any], where: str) -> dict[str, Any]:
    """The same dict, if all its keys are settings."""
    known = TrainConfig.__dataclass_fields__
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "`gripvlm train --help` lists them"
            raise TrainError(f"{where} has no setting {name!r}: {hint}")
    return names


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        TrainError: no such file, not TOML, or an unknown setting.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    try:
        found = tomllib.loads(disk.read_text(path))
    except FileNotFoundError:
        raise TrainError(f"no config file {str(path)!r}: check the path") from None
    except (ValueError, RecursionError) as error:
        raise TrainError(f"{str(path)!r} is not TOML: {error}") from None
    return checked_names(found, str(path))


def write_toml(config: TrainConfig, path: Path) -> None:
    """All settings, one a line, with their meaning; `read_toml` reads them back."""
    lines = []
    for name, value in config.to_dict().items():
        if isinstance(value, str):
            said = json.dumps(value, ensure_ascii=False)
        else:
            said = str(value).lower() if isinstance(value, bool) else repr(value)
        lines.append(f"{name} = {said}  # {help_of(name)}")
    disk.write(path, "\n".join(lines) + "\n")
