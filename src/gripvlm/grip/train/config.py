"""One configuration for every stage: a dataclass that is also the command line's flags and a TOML file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from gripvlm.errors import TrainError
from gripvlm.utils import disk

STAGES = ("all", "distill", "grpo", "visionselector")

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    stages: tuple[str, ...] = STAGES[1:],
    only: tuple[str, tuple[str, ...] | range] | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        help: its meaning, in one line.
        choices: the values that are allowed; none for any.
        at_least, above, below: the range of numbers that are allowed.
        stages: those that read it.
        only: (another setting, its values) where this one is read; by default always.
    """
    known = {"help": help, "choices": choices, "at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={**known, "stages": stages, "only": only})


# Those that one stage alone reads, and those of the two that may follow it.
distill_setting, grpo_setting = partial(setting, stages=("distill",)), partial(setting, stages=("grpo",))
later_setting = partial(setting, stages=("grpo", "visionselector"))
_OFF_POLICY = ("num_iterations", range(2, 2**63))
_IN_TOWER = ("tower_block", range(1, 2**63))


RENAMED = {
    "out": "output_dir",
    "start": "init_from",
    "steps": "max_steps",
    "images": "per_device_train_batch_size",
    "questions": "questions_per_image",
    "accumulate": "gradient_accumulation_steps",
    "rows": "max_tokens_per_forward (tokens, not rows)",
    "rollout_batch_size": "max_tokens_per_forward (tokens, not rows)",
    "warmup_steps": "distill_steps",
    "warmup_learning_rate": "distill_learning_rate",
    "val_data": "eval_data",
    "val_share": "eval_share",
    "val_questions": "eval_questions",
    "val_keeps": "eval_keeps",
    "val_every": "eval_steps",
    "val_reward": "eval_reward",
    "reward": "reward_funcs",
    "save_minutes": "save_steps (steps, not minutes)",
    "log_with": "report_to",
    "own_answers": "pseudo_labels",
    "on_bad": "on_bad_sample",
}
"""Settings of the first edition: the nearest name of today is another setting, so that a guess would mislead."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Names follow transformers' TrainingArguments and TRL's GRPOConfig.

    Raises:
        TrainError: a value of another type or outside its range, or settings that contradict each other.
    """

    # what
    model: str = setting("lab", "lab, lab-dense, a local folder, or a Hugging Face hub id; stays frozen")
    data: str = setting("", "training questions: PATH.jsonl ({image, question, answer?, choices?} a line) or tasks")
    output_dir: str = setting(
        "grip", "folder of the run: scorer, settings, metrics, checkpoint; the same command resumes"
    )
    stage: str = setting("all", "all (distill, then GRPO), distill, grpo, or the rival visionselector", STAGES)
    init_from: str = setting("", "scorer to start from; default: a new one, or the distilled one in --output-dir")
    eval_data: str = setting("", "validation questions; default: --eval-share of --data's images")
    eval_share: float = setting(
        0.05,
        "share of images held out for validation where --eval-data is not given",
        above=0,
        below=1,
        only=("eval_data", ("",)),
    )
    eval_questions: int = setting(256, "validation questions at most", at_least=1)
    seed: int = setting(0, "of everything random", at_least=0)
    device: str = setting("", "such as cpu or cuda:0; default: an accelerator if there is one")
    dtype: str = setting(
        "",
        "of the model: default bfloat16 on an accelerator that has it, else float32; auto: as it was saved",
        ("", "auto", "float32", "bfloat16", "float16"),
    )
    attn_implementation: str = setting("", "as transformers', such as sdpa; default: its own choice")
    max_memory: float = setting(
        0.0,
        "GiB of the model's weights on the device; its other layers wait in the machine's memory, or on its disk, and "
        "come when they run; 0: all are there",
        at_least=0,
    )
    on_bad_sample: str = setting("stop", "what a picture that cannot be read or an empty answer does", ("stop", "skip"))
    # the scorer
    width: int = setting(128, "channels of the scorer's transformer", at_least=1)
    blocks: int = setting(3, "its blocks", at_least=1)
    heads: int = setting(4, "its attention heads", at_least=1)
    question: bool = setting(True, "whether the scorer reads the question")
    budget: bool = setting(True, "whether the scorer is given the budget")
    joint: bool = setting(True, "one budget for all pictures and tiles of a question, which compete for it")
    rounds: int = setting(
        16, "in which tokens are chosen, losing by being like those kept before; 1 keeps the k highest", at_least=1
    )
    tower_block: int = setting(
        -1,
        "block of the vision tower before which a first stage of the scorer chooses, 1 or more; -1: none",
        at_least=-1,
    )
    # batches and budgets
    per_device_train_batch_size: int = setting(4, "pictures a micro-batch", at_least=1)
    questions_per_image: int = setting(4, "questions a picture at most", at_least=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches a step, over all processes", at_least=1)
    max_tokens_per_forward: int = setting(
        0, "rows of the frozen model times the longest; memory goes with it; 0: 16384, on a CPU 2048", at_least=0
    )
    bf16: bool = setting(False, "the frozen model under bfloat16 autocast, for models loaded in float32")
    gradient_checkpointing: bool = setting(
        True,
        "gradients through the model (gradient teachers, visionselector) compute layers twice, and store less",
        stages=("distill", "visionselector"),
        only=("teacher", ("gradient", "gradient_at_k")),
    )
    budgets: str = setting(
        "log_uniform", "how a group's budget is drawn, log-uniformly or from --keep-choices", ("log_uniform", "choices")
    )
    keep_choices: str = setting("", "shares of tokens that budgets = choices draws from, such as 0.25,0.06,0.015")
    keep_low: float = setting(0.015, "smallest share of tokens drawn", above=0, only=("budgets", ("log_uniform",)))
    keep_high: float = setting(0.5, "largest share of tokens drawn", above=0, only=("budgets", ("log_uniform",)))
    tower_low: float = setting(
        0.2, "smallest share of tokens drawn for the tower; that of validation", above=0, only=_IN_TOWER
    )
    tower_high: float = setting(0.6, "largest share of tokens drawn for the tower", above=0, only=_IN_TOWER)
    # optimiser
    max_steps: int = later_setting(1000, "steps of GRPO, or of visionselector", at_least=0)
    learning_rate: float = later_setting(3e-4, "of these; after 3 % of linear warm-up a cosine to a tenth", above=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)
    weight_decay: float = setting(0.0, "of AdamW", at_least=0)
    ema_decay: float = setting(
        0.98, "of the running average of the weights, which is the result; 0 for the last step's", at_least=0, below=1
    )
    # the supervised stage
    distill_steps: int = distill_setting(400, "steps of distilling; 0 leaves it out", at_least=0)
    distill_learning_rate: float = distill_setting(1e-3, "of distilling", above=0)
    teacher: str = distill_setting("gradient", "gradient, gradient_at_k, attention, or module:function of your own")
    # GRPO
    num_generations: int = grpo_setting(16, "G, subsets a question", at_least=2)
    reward_funcs: str = setting(
        "probability",
        "what is maximised, one or several with commas: log_prob, probability, agreement (no labels), exact_match, "
        "task_score or module:function of your own",
    )
    reward_weights: str = setting("", "of the reward_funcs, such as 1,0.5; default: 1 each")
    pseudo_labels: bool = setting(False, "force the unpruned model's own answers and not the data's")
    beta: float = grpo_setting(0.0, "weight of the KL to the scorer that GRPO started from", at_least=0)
    importance_sampling_level: str = grpo_setting(
        "sequence", "ratios of whole subsets, per token, or of each token", ("sequence", "token"), only=_OFF_POLICY
    )
    epsilon: float = grpo_setting(
        0.2,
        "clipping of a token's ratio; that of k tokens is clipped to the power of 1 / sqrt(k)",
        at_least=0,
        below=1,
        only=_OFF_POLICY,
    )
    epsilon_high: float = grpo_setting(0.0, "upper clipping; 0 means epsilon", at_least=0, only=_OFF_POLICY)
    importance_sampling_cap: float = grpo_setting(
        2.0, "a token's ratio is at most this, also where clipping sets no limit", above=1, only=_OFF_POLICY
    )
    num_iterations: int = grpo_setting(1, "optimiser steps a group of rollouts; 1 is strictly on-policy", at_least=1)
    scale_rewards: str = grpo_setting(
        "batch", "advantages are divided by this standard deviation", ("group", "batch", "budget", "none")
    )
    entropy_coef: float = grpo_setting(0.0, "weight of the policy's entropy per token", at_least=0)
    temperature: float = grpo_setting(1.0, "divides the logits when subsets are drawn", above=0)
    # VisionSelector
    constraint_weight: float = setting(
        2.0,
        "weight, at the last step, of the loss that makes its soft masks hard; 0.1 at the first",
        at_least=0,
        stages=("visionselector",),
    )
    # running
    save_steps: int = setting(100, "steps between checkpoints; Ctrl-C writes one as well", at_least=1)
    eval_steps: int = setting(100, "steps between validations", at_least=1)
    eval_reward: str = setting("", "what validation measures, if not --reward-funcs; as there")
    eval_keeps: str = setting("0.25,0.125,0.06,0.03,0.015", "budgets of the validation")
    report_to: str = setting("", "also log to a tracker", ("", "tensorboard", "trackio", "wandb"))
    run_name: str = setting("", "of the run in the tracker; default: --output-dir")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            # TOML and users write 1 for 1.0. type(), not isinstance: a bool is an int as well.
            if hints[each.name] is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, each.name, value)
            if type(value) is not hints[each.name]:
                raise TrainError(f"{each.name} = {value!r}: use {_KINDS[hints[each.name]]}")
            if wrong := _outside(value, each.metadata):
                raise TrainError(f"{each.name} = {value!r}: use {wrong}")
        if self.width % self.heads:
            raise TrainError(f"width = {self.width}, heads = {self.heads}: use a width that is a multiple of the heads")
        if self.budgets == "log_uniform" and not self.keep_low <= self.keep_high <= 1:
            raise TrainError(
                f"keep_low = {self.keep_low}, keep_high = {self.keep_high}: use shares in (0, 1], the low one at most "
                "the high one"
            )
        if self.tower_block == 0:
            raise TrainError("tower_block = 0: nothing has been seen ahead of the first block; use 1 or more, or -1")
        if not self.tower_low <= self.tower_high <= 1:
            raise TrainError(
                f"tower_low = {self.tower_low}, tower_high = {self.tower_high}: use shares in (0, 1], the low one at "
                "most the high one"
            )
        parse_shares(self.eval_keeps, "eval_keeps")
        if self.budgets == "choices":
            if not self.keep_choices:
                raise TrainError("budgets = 'choices' has nothing to choose from: set keep_choices, such as 0.25,0.06")
            parse_shares(self.keep_choices, "keep_choices")
        elif self.keep_choices:
            raise TrainError(f"keep_choices are drawn by budgets = 'choices' only, not {self.budgets!r}")

    def without_effect(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the settings `names` that nothing in this run reads, with the reason."""
        stages = {"distill", "grpo"} if self.stage == "all" else {self.stage}
        idle = {}
        for name in names:
            if not stages & {*stages_of(name)}:
                idle[name] = f"in {self.stage} (only {' and '.join(stages_of(name))} would read it)"
            elif only := self.__dataclass_fields__[name].metadata["only"]:
                other, values = only
                if (value := getattr(self, other)) not in values:
                    wanted = f"{values.start} or more" if isinstance(values, range) else " or ".join(values) or "none"
                    idle[name] = f"with {other} {value} (it would with {wanted})"
        return idle

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _outside(value: Any, allowed: Any) -> str:
    """What a setting may be, where `value` is not that; "" where it is."""
    if allowed["choices"]:
        named = ", ".join(repr(choice) for choice in allowed["choices"] if choice)
        return "" if value in allowed["choices"] else f"one of {named}"
    if isinstance(value, str | bool):
        return ""
    limit = min(allowed["below"], 2**63) if isinstance(value, int) else allowed["below"]  # counts and seeds are int64
    if allowed["at_least"] <= value and allowed["above"] < value < limit:  # NaN is neither
        return ""
    lower = f"above {allowed['above']:g}" if allowed["above"] > -math.inf else f"{allowed['at_least']:g} or more"
    return f"a number {lower}" + (f" and below {allowed['below']:g}" if allowed["below"] < math.inf else "")


def parse_shares(text: str, name: str) -> list[float]:
    """The shares of tokens in the setting `name`, each once.

    Raises:
        TrainError: none, or one outside (0, 1].
    """
    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise TrainError(f"{name} = {text!r}: use fractions in (0, 1], such as 0.25,0.1")
    return list(dict.fromkeys(shares))


def split_names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_weights(text: str, names: Sequence[object]) -> list[float]:
    """The weights of the rewards `names`; 1 each for "".

    Raises:
        TrainError: not one finite number for each.
    """
    try:
        weights = [float(part) for part in split_names(text)] if text else [1.0] * len(names)
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise TrainError(
            f"reward_weights = {text!r}: use one number for each of {len(names)} reward_funcs, such as 1,0.5"
        )
    return weights


def stages_of(name: str, kind: type[TrainConfig] = TrainConfig) -> tuple[str, ...]:
    """The stages that a setting has an effect in."""
    stages: tuple[str, ...] = kind.__dataclass_fields__[name].metadata["stages"]
    return stages


def help_of(name: str, kind: type[TrainConfig] = TrainConfig) -> str:
    """What a setting means, in one line."""
    metadata = kind.__dataclass_fields__[name].metadata
    choices = [choice for choice in metadata["choices"] if choice and choice not in metadata["help"]]
    return metadata["help"] + (f": {', '.join(choices)}" if choices else "")


def read_toml(path: str | Path, kind: type[TrainConfig] = TrainConfig) -> dict[str, Any]:
    """The settings in a TOML file, by the names of `kind`'s fields.

    Raises:
        TrainError: no such file, not TOML, or an unknown setting.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    try:
        settings = tomllib.loads(disk.read_text(path))
    except FileNotFoundError:
        raise TrainError(f"no config file {str(path)!r}: check the path") from None
    except (ValueError, RecursionError) as error:
        raise TrainError(f"{str(path)!r} is not TOML: {error}") from None
    for name in settings:
        if name not in kind.__dataclass_fields__:
            near = difflib.get_close_matches(name, kind.__dataclass_fields__, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "`gripvlm train --help` lists them"
            hint = f"it is now {RENAMED[name]}" if name in RENAMED else hint
            raise TrainError(f"{path} has no setting {name!r}: {hint}")
    return settings


def write_toml(config: TrainConfig, path: Path) -> None:
    """All settings, one a line, with their meaning; `read_toml` reads them back."""
    lines = []
    for name, value in config.to_dict().items():
        # JSON's text, numbers and truth values are TOML's too.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}  # {help_of(name, type(config))}")
    disk.write(path, "\n".join(lines) + "\n")
