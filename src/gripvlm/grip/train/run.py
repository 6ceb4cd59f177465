"""`train`: from a frozen model and questions to a scorer, in a folder that records how."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from gripvlm.errors import TrainError
from gripvlm.eval import environment
from gripvlm.grip.pruner import Grip, place_of
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig, has_scorer
from gripvlm.grip.train.config import STAGES, TrainConfig, read_toml, stages_of, write_toml
from gripvlm.grip.train.data import Question, QuestionStream, check_apart, check_pictures, load_questions, split
from gripvlm.grip.train.distill import Distill, get_teacher
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.rewards import get_reward
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.trainer import Evaluator, Stage, Trainer
from gripvlm.tasks import Task
from gripvlm.utils import disk

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that the scorer itself has.
_SIZES = ("width", "blocks", "heads", "question", "budget", "joint", "rounds", "diversity")
# What may differ between a run and its continuation.
_FREE = {"output_dir", "device", "report_to", "rollout_batch_size", "on_bad_sample", "save_steps", "eval_steps"}
_CONFIG = "config.toml"


def train(
    config: TrainConfig,
    model: PreTrainedModel,
    processor: Any,
    data: Task | Sequence[Task] | None = None,
    validation: Task | Sequence[Task] | None = None,
    *,
    quiet: bool = True,
) -> Grip:
    """Trains a scorer for a frozen model.

        grip = train(TrainConfig(data="my/questions.jsonl", output_dir="grip"), model, processor)

    Args:
        config: every setting; `config.output_dir` is the run's folder, and the same call resumes from its checkpoint.
        model, processor: a supported transformers model, which is frozen, and its processor.
        data, validation: tasks, instead of what `config.data` and `config.eval_data` name.
        quiet: no progress bar.

    Returns:
        The trained pruner. Its scorer is saved in `config.output_dir`.

    Raises:
        TrainError: bad settings, data or rewards, with what to change.
        BusyError: another process trains in `config.output_dir`.
        Interrupted: Ctrl-C; a checkpoint is written.
    """
    return train_on(check_settings(config, data, validation), config, model, processor, quiet=quiet)


def train_on(
    questions: tuple[list[Question], list[Question]],
    config: TrainConfig,
    model: PreTrainedModel,
    processor: Any,
    *,
    quiet: bool,
) -> Grip:
    """`train` with the training and validation questions that `check_settings` returned."""
    folder = Path(config.output_dir).expanduser()
    accelerator = make_accelerator(config, model.device)
    engine = Engine(model, processor, config.rollout_batch_size, bf16=config.bf16)
    # The other processes write nothing.
    with disk.one_writer(folder, folder=True) if accelerator.is_main_process else nullcontext():
        _check_folder(config, folder)  # another run may have been there since `check_settings`
        # A new scorer alone draws from the global generator.
        torch.manual_seed(config.seed)
        scorer, done = _initial_scorer(config, folder, model)
        accelerator.wait_for_everyone()  # all have checked the folder
        for name in _stages_left(config, done):
            stage = (Distill if name == "distill" else Grpo)(config, scorer, engine)
            if accelerator.is_main_process:  # only now, as the stage has refused settings that do not fit the model
                record_run(config)
            scorer = run_stage(stage, questions, accelerator, quiet=quiet)
        if accelerator.is_main_process:
            scorer.save_pretrained(folder)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return Grip(str(folder), scorer.eval())


def run_stage(
    stage: Stage, questions: tuple[list[Question], list[Question]], accelerator: Accelerator, *, quiet: bool = True
) -> Scorer:
    """Trains the stage's scorer on (training, validation) questions; saves it in a folder of the stage's name.

    A stage of another package is trained so too: anything with a `Stage`'s attributes and `losses`.
    """
    config, engine = stage.config, stage.engine
    # Evenly spaced: files often hold their questions by kind.
    held_out = questions[1][:: max(1, len(questions[1]) // config.eval_questions)][: config.eval_questions]
    evaluator = Evaluator(engine, held_out, get_reward(config.eval_reward or config.reward), config)
    stream = QuestionStream(questions[0], config.per_device_train_batch_size, config.questions_per_image, config.seed)
    try:
        scorer = Trainer(stage, stream, evaluator, accelerator, quiet).train()
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"{stage.name} ran out of memory: use a smaller --rollout-batch-size; if that is not enough, a smaller "
            "--per-device-train-batch-size or --questions-per-image, with another --output-dir"
        ) from error
    sizes = {field: getattr(scorer.config, field) for field in _SIZES}  # as they are, not as the settings say
    scorer.notes = {"stage": stage.name, "steps": stage.max_steps, "config": config.to_dict() | sizes}
    if left_out := len(stream.skipped) + len(evaluator.skipped):
        scorer.notes["left_out"] = left_out
    if accelerator.is_main_process:
        scorer.save_pretrained(Path(config.output_dir).expanduser() / stage.name)
    return scorer


def record_run(config: TrainConfig) -> None:
    """Makes the run's folder and writes down what runs there."""
    folder = Path(config.output_dir).expanduser()
    write_toml(config, folder / _CONFIG)
    disk.write(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")


def make_accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    """The processes that `accelerate launch` or torchrun started, or this one alone, with the run's trackers.

    Raises:
        TrainError: accelerate or the tracker is not installed, or micro-batches that do not divide among processes.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise TrainError("training needs accelerate: type pip install 'gripvlm[train]'") from None
    folder = Path(config.output_dir).expanduser()
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=config.report_to or None, project_dir=folder)
    if config.gradient_accumulation_steps % accelerator.num_processes:
        raise TrainError(
            f"gradient_accumulation_steps = {config.gradient_accumulation_steps} micro-batches a step do not divide "
            f"among {accelerator.num_processes} processes: type --gradient-accumulation-steps "
            f"{accelerator.num_processes}, or a multiple"
        )
    if config.report_to:
        accelerator.init_trackers("gripvlm")
        if accelerator.is_main_process and not accelerator.trackers:
            raise TrainError(f"report_to = {config.report_to!r} is not installed: type pip install {config.report_to}")
    return accelerator


def launched_device(name: str) -> str:
    """The device of this process: `name`, or the one of its rank where several processes share a machine's GPUs."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name or not launched or not torch.accelerator.is_available():
        return name
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', '0')}"  # type: ignore[union-attr]


def check_settings(
    config: TrainConfig,
    data: Task | Sequence[Task] | None = None,
    validation: Task | Sequence[Task] | None = None,
) -> tuple[list[Question], list[Question]]:
    """The training and the validation questions, once everything that can be known without the model is right.

    Args:
        data, validation: as `train` takes them.

    Raises:
        TrainError, TaskError, ScorerError: what to change.
    """
    for name in (config.reward, config.eval_reward or config.reward):
        get_reward(name)
    get_teacher(config.teacher)
    _check_folder(config, Path(config.output_dir).expanduser())
    if config.init_from:
        _check_sizes(Scorer.from_pretrained(place_of(config.init_from)), config.init_from, config)
    questions = load_questions(config.data if data is None else data)
    if validation is not None or config.eval_data:
        held_out = load_questions(config.eval_data if validation is None else validation)
    else:
        questions, held_out = split(questions, config.eval_share)
    check_apart(questions, held_out)
    if config.on_bad_sample == "stop":
        check_pictures([*questions, *held_out])
    return questions, held_out


def _stages_left(config: TrainConfig, done: str) -> list[str]:
    """What is left to do, in order, where `done` is the last stage that is finished ("" for none)."""
    if config.stage != "all":
        return [config.stage]
    stages = ["distill", "grpo"] if config.distill_steps else ["grpo"]
    return stages[stages.index(done) + 1 :] if done in stages else stages


def _initial_scorer(config: TrainConfig, folder: Path, model: PreTrainedModel) -> tuple[Scorer, str]:
    """The scorer to begin with, and the last stage that is finished ("" for none)."""
    # The last finished stage first: its scorer is the best so far.
    finished = [name for name in ("grpo", "distill") if has_scorer(folder / name)]
    if config.stage == "all" and finished:
        return _loaded(folder / finished[0], config, model), finished[0]
    source: str | Path = config.init_from
    if config.stage == "grpo" and not source:
        if "distill" in finished:
            source = folder / "distill"
        elif (folder / "distill.ckpt").exists():
            raise TrainError(
                f"distilling in {folder} was stopped before its end: finish it with `gripvlm train distill` and the "
                "same settings, or name a scorer with --init-from"
            )
    if source:
        return _loaded(source, config, model), ""
    base = ModelFingerprint.of(model)
    sizes = {name: getattr(config, name) for name in _SIZES}
    sizes["diversity"] = config.diversity and config.rounds > 1
    return Scorer(ScorerConfig(base.features, **sizes), base).to(model.device), ""


def _loaded(name: str | Path, config: TrainConfig, model: PreTrainedModel) -> Scorer:
    """A scorer to continue from, if it is this model's and of the sizes that the settings ask for."""
    scorer = Scorer.from_pretrained(place_of(name))
    if scorer.base is not None:
        scorer.base.check(model)
    _check_sizes(scorer, name, config)
    scorer.base = ModelFingerprint.of(model)
    return scorer.to(model.device)


def _check_sizes(scorer: Scorer, name: str | Path, config: TrainConfig) -> None:
    """Refuses a scorer of other sizes than the settings ask for; sizes left at their defaults ask for nothing."""
    for field in _SIZES:
        wanted, actual = getattr(config, field), getattr(scorer.config, field)
        if wanted not in (actual, TrainConfig.__dataclass_fields__[field].default):
            raise TrainError(f"{field} = {wanted!r}, but the scorer in {name} has {actual!r}: leave that setting out")


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuses the folder of another run.

    A setting binds once a stage that reads it has a checkpoint: what failed before can be mended in the same folder.
    """
    file, kind = folder / _CONFIG, type(config)
    if not file.exists():
        patterns = ("*.ckpt", "model.safetensors", "config.json")
        if left := [path.name for pattern in patterns for path in folder.glob(pattern)]:
            raise TrainError(f"{folder} holds {', '.join(sorted(left))} but no {_CONFIG}: use another --output-dir")
        return
    begun = {path.stem for path in folder.glob("*.ckpt")} | {name for name in STAGES if (folder / name).exists()}
    if not begun:
        return
    try:
        before, now = kind(**read_toml(file, kind)).to_dict(), config.to_dict()
    except TrainError as error:
        raise TrainError(f"{folder} holds a run that cannot be resumed ({error}): use another --output-dir") from error
    if begun == {"distill"} and config.stage == "grpo":
        bound = {"model", *_SIZES}  # it starts from what that stage made, on whatever questions
    elif begun == {"distill"}:
        bound = {name for name in now if "distill" in stages_of(name, kind)} - {"stage"}
    else:
        bound = set(now)
    unlike = [name for name in now if name in bound - _FREE and before[name] != now[name]]
    if unlike:
        changes = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in unlike[:4])
        raise TrainError(f"{folder} holds another run ({changes}): use another --output-dir, or those settings")
