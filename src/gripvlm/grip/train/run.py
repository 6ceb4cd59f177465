"""`train`: from a frozen model and questions to a scorer, in a folder that records how."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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
from gripvlm.grip.train.distill import Distill, get_teacher, gradient, gradient_at_k
from gripvlm.grip.train.evaluator import Evaluator
from gripvlm.grip.train.frozen import frozen
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.journal import Callback
from gripvlm.grip.train.processes import Processes
from gripvlm.grip.train.rewards import Reward, Rewards, name_of
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.stage import Stage
from gripvlm.grip.train.trainer import Trainer
from gripvlm.grip.train.two_stages import TwoStageGrpo
from gripvlm.grip.train.visionselector import VisionSelector
from gripvlm.models.families import family_of
from gripvlm.models.hooks.tower_replay import checked_replay
from gripvlm.models.wrapped import device_of
from gripvlm.tasks import Task
from gripvlm.utils import disk

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that the scorer itself has.
_SIZES = ("width", "blocks", "heads", "question", "budget", "joint", "rounds", "tower_block")
# What may differ between a run and its continuation.
_FREE = {"output_dir", "device", "report_to", "run_name", "max_tokens_per_forward", "gradient_checkpointing"}
_FREE |= {"max_memory", "on_bad_sample", "save_steps", "eval_steps"}
_CONFIG = "config.toml"


def train(
    config: TrainConfig,
    model: PreTrainedModel,
    processor: Any,
    data: Task | Sequence[Task] | None = None,
    validation: Task | Sequence[Task] | None = None,
    *,
    reward_funcs: Sequence[str | Reward] | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
) -> Grip:
    """Trains a scorer for a frozen model.

        grip = train(TrainConfig(data="my/questions.jsonl", output_dir="grip"), model, processor)

    Args:
        config: every setting; `config.output_dir` is the run's folder, and the same call resumes from its checkpoint.
        model, processor: a supported transformers model, which is frozen, and its processor.
        data, validation: tasks, instead of what `config.data` and `config.eval_data` name.
        reward_funcs: rewards, instead of what `config.reward_funcs` names: names, functions of a `Rollout`, or
            functions of `completions` as TRL's.
        callbacks: told of steps, validations and checkpoints.
        quiet: no progress bar.

    Returns:
        The trained pruner. Its scorer is saved in `config.output_dir`.

    Raises:
        TrainError: bad settings, data or rewards, with what to change.
        BusyError: another process trains in `config.output_dir`.
        Interrupted: Ctrl-C; a checkpoint is written.
    """
    reward = None
    if reward_funcs is not None:
        reward = Rewards(reward_funcs, config.reward_weights)
        named = ",".join(
            each if isinstance(each, str) else f"{each.__module__}:{name_of(each)}" for each in reward_funcs
        )
        config = replace(config, reward_funcs=named)
    questions = check_settings(config, data, validation, reward)
    return train_on(questions, config, model, processor, quiet=quiet, reward=reward, callbacks=callbacks)


def train_on(
    questions: tuple[list[Question], list[Question]],
    config: TrainConfig,
    model: PreTrainedModel,
    processor: Any,
    *,
    quiet: bool,
    reward: Rewards | None = None,
    callbacks: Sequence[Callback] = (),
) -> Grip:
    """`train` with the training and validation questions that `check_settings` returned."""
    check_model(config, model)
    folder = Path(config.output_dir).expanduser()
    accelerator = make_accelerator(config, device_of(model))
    processes = Processes(accelerator)
    processes.agree("settings", {name: value for name, value in config.to_dict().items() if name not in _FREE})
    # The other processes write nothing.
    with frozen(model), ExitStack() as held:
        first = processes.first
        processes.together(lambda: held.enter_context(disk.one_writer(folder, folder=True)) if first else None)
        scorer, done = _first_scorer(processes, config, folder, model)
        # That of --init-from where the settings name none.
        staged = replace(config, tower_block=scorer.config.tower_block)
        engine = processes.together(partial(make_engine, staged, model, processor))
        grpo = TwoStageGrpo if scorer.config.tower_features else Grpo
        for name in _stages_left(config, done):
            make: Any = {"distill": Distill, "visionselector": VisionSelector}.get(name, partial(grpo, reward=reward))
            stage = processes.together(partial(make, config, scorer, engine))
            # Only now, as the stage has refused settings that do not fit the model.
            processes.together(lambda: record_run(config) if first else None)
            # Trackers count the steps of a run of both stages through.
            before = config.distill_steps if (config.stage, name) == ("all", "grpo") else 0
            scorer = run_stage(
                *(stage, questions, accelerator), quiet=quiet, reward=reward, callbacks=callbacks, first_step=before
            )
        processes.together(lambda: scorer.save_pretrained(folder) if first else None)
        accelerator.end_training()
    return Grip(str(folder), scorer.eval())


def make_engine(config: TrainConfig, model: PreTrainedModel, processor: Any) -> Engine:
    """The model and its processor, with the settings that concern them."""
    options = config.max_tokens_per_forward, config.bf16, config.gradient_checkpointing
    return Engine(model, processor, *options, tower_block=config.tower_block)


def check_model(config: TrainConfig, model: PreTrainedModel) -> None:
    """Refuses settings that the model contradicts.

    Raises:
        TrainError: it has another dtype or attention implementation, or computes on several devices.
        InputError: it has no weights.
    """
    name = str(model.dtype).removeprefix("torch.")
    if config.dtype not in ("", "auto", name):
        raise TrainError(f"dtype = {config.dtype!r}, but the model is {name}: load it so, or leave that setting out")
    _check_half(config, name)
    attention = getattr(model.config, "_attn_implementation", None)
    if config.attn_implementation not in ("", attention):
        raise TrainError(
            f"attn_implementation = {config.attn_implementation!r}, but the model has {attention!r}: load it so, or "
            "leave that setting out"
        )
    if config.bf16 and name != "float32":
        raise TrainError(f"bf16 is for models in float32, and this one is {name}: leave bf16 out")
    # Not where weights lie: accelerate's hooks bring those that are elsewhere when they are needed.
    owners = [part for part in model.modules() if next(part.parameters(recurse=False), None) is not None]
    if len(places := {str(device_of(part)) for part in owners}) > 1:
        raise TrainError(
            f"the model computes on {', '.join(sorted(places))}: training needs it on one device. Where it does not "
            'fit, --max-memory leaves layers in the machine\'s memory, as a device_map of one device and "cpu" does'
        )


def _check_half(config: TrainConfig, dtype: str) -> None:
    if dtype == "float16" and config.stage == "visionselector":
        raise TrainError("float16 is too small for the gradients of visionselector: use --dtype bfloat16 or float32")
    if dtype == "float16" and config.stage != "grpo" and get_teacher(config.teacher) in (gradient, gradient_at_k):
        raise TrainError(
            f"float16 is too small for the gradients of the teacher {config.teacher}: use --dtype bfloat16 or float32, "
            "or --teacher attention"
        )


def run_stage(
    stage: Stage,
    questions: tuple[list[Question], list[Question]],
    accelerator: Accelerator,
    *,
    quiet: bool = True,
    reward: Rewards | None = None,
    callbacks: Sequence[Callback] = (),
    first_step: int = 0,
) -> Scorer:
    """Trains the stage's scorer on (training, validation) questions; saves it in a folder of the stage's name.

    A stage of another package is trained so too: anything with a `Stage`'s attributes and methods.

    Args:
        reward: what validation measures, instead of the settings' reward.
        callbacks, first_step: as `Trainer` takes them.
    """
    config, engine = stage.config, stage.engine
    # Evenly spaced: files often hold their questions by kind.
    held_out = questions[1][:: max(1, len(questions[1]) // config.eval_questions)][: config.eval_questions]
    if config.eval_reward:
        reward = Rewards.named(config.eval_reward)
    reward = reward or Rewards.named(config.reward_funcs, config.reward_weights)
    evaluator = Evaluator(engine, held_out, reward, config)
    stream = QuestionStream(questions[0], config.per_device_train_batch_size, config.questions_per_image, config.seed)
    scorer = Trainer(stage, stream, evaluator, accelerator, quiet, callbacks, first_step).train()
    sizes = {field: getattr(scorer.config, field) for field in _SIZES}  # as they are, not as the settings say
    scorer.notes = {"stage": stage.name, "steps": stage.max_steps, "config": config.to_dict() | sizes}
    if left_out := len(stream.skipped) + len(evaluator.skipped):
        scorer.notes["left_out"] = left_out
    folder, processes = Path(config.output_dir).expanduser() / stage.name, Processes(accelerator)
    processes.together(lambda: scorer.save_pretrained(folder) if processes.first else None)
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
        Processes(accelerator).together(partial(_start_tracker, accelerator, config))
    return accelerator


def _start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    named = {"name": config.run_name or Path(config.output_dir).expanduser().resolve().name}
    of_tracker = {"wandb": named, "trackio": named}  # TensorBoard calls a run by its folder, the output_dir
    accelerator.init_trackers("gripvlm", config=config.to_dict(), init_kwargs=of_tracker)
    if accelerator.is_main_process and not accelerator.trackers:
        raise TrainError(f"report_to = {config.report_to!r} is not installed: type pip install {config.report_to}")


def first_process() -> bool:
    """Whether this process has the run's folder: as torchrun and accelerate say, before anything is connected."""
    return os.environ.get("RANK", "0") == "0"


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
    reward: Rewards | None = None,
    typed: Sequence[str] = (),
) -> tuple[list[Question], list[Question]]:
    """The training and the validation questions, once everything that can be known without the model is right.

    Args:
        data, validation: as `train` takes them.
        reward: instead of the one that the settings name.
        typed: settings that were asked for, also where they are what they would have been.

    Raises:
        TrainError, TaskError, ScorerError: what to change.
    """
    if reward is None:
        Rewards.named(config.reward_funcs, config.reward_weights)
    if config.eval_reward:
        Rewards.named(config.eval_reward)
    get_teacher(config.teacher)
    _check_half(config, config.dtype)
    if first_process():
        _check_folder(config, Path(config.output_dir).expanduser())
    if config.init_from:
        _check_sizes(Scorer.from_pretrained(place_of(config.init_from)), config.init_from, config, typed)
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


def _first_scorer(
    processes: Processes, config: TrainConfig, folder: Path, model: PreTrainedModel
) -> tuple[Scorer, str]:
    """`_initial_scorer` of the first process, in all of them: only its disk is asked."""

    def begin() -> tuple[Scorer, str] | None:
        if not processes.first:
            return None
        _check_folder(config, folder)  # another run may have been there since `check_settings`
        # A new scorer alone draws from the global generator.
        torch.manual_seed(config.seed)
        return _initial_scorer(config, folder, model)

    found = processes.together(begin)
    about: Any = None if found is None else (found[0].config, found[0].base, found[1])
    sizes, base, done = processes.broadcast(about)
    scorer = found[0] if found else Scorer(sizes, base).to(device_of(model))
    processes.together(lambda: base.check(model))
    processes.copy_first(scorer.state_dict().values())
    return scorer, done


def _initial_scorer(config: TrainConfig, folder: Path, model: PreTrainedModel) -> tuple[Scorer, str]:
    """The scorer to begin with, and the last stage that is finished ("" for none)."""
    # The last finished stage first: its scorer is the best so far.
    finished = [name for name in ("grpo", "distill") if has_scorer(folder / name)]
    if config.stage == "all" and finished:
        return _loaded(folder / finished[0], config, model), finished[0]
    source: str | Path = config.init_from
    if config.stage in ("grpo", "visionselector") and not source:
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
    scorer = Scorer(new_scorer(config, base.features, tower_width(config, model)), base)
    return scorer.to(device_of(model)), ""


def new_scorer(config: TrainConfig, features: int, tower_features: int = 0) -> ScorerConfig:
    """The sizes of a new scorer for features of so many channels, and hidden states inside the tower of so many."""
    return ScorerConfig(features, tower_features=tower_features, **{name: getattr(config, name) for name in _SIZES})


def tower_width(config: TrainConfig, model: PreTrainedModel) -> int:
    """The width of the vision tower's hidden states, 0 where no stage of the scorer reads them.

    Raises:
        UnsupportedModelError, InputError: the tower cannot have such a stage.
    """
    if config.tower_block < 0:
        return 0
    checked_replay(model, family_of(model), config.tower_block)
    width: int = model.config.vision_config.hidden_size
    return width


def _loaded(name: str | Path, config: TrainConfig, model: PreTrainedModel) -> Scorer:
    """A scorer to continue from, if it is this model's and of the sizes that the settings ask for."""
    scorer = Scorer.from_pretrained(place_of(name))
    if scorer.base is not None:
        scorer.base.check(model)
    _check_sizes(scorer, name, config)
    if config.tower_block >= 0 and not scorer.config.tower_features:
        scorer = scorer.with_tower(config.tower_block, tower_width(config, model))
    scorer.base = ModelFingerprint.of(model)
    return scorer.to(device_of(model))


def _check_sizes(scorer: Scorer, name: str | Path, config: TrainConfig, typed: Sequence[str] = ()) -> None:
    """Refuses a scorer of other sizes than the settings ask for.

    Those at their defaults ask for nothing, unless they are `typed`.
    """
    for field in _SIZES:
        wanted, actual = getattr(config, field), getattr(scorer.config, field)
        if field == "tower_block" and actual < 0:
            continue  # it gets that stage
        asked = field in typed or wanted != TrainConfig.__dataclass_fields__[field].default
        if asked and wanted != actual:
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
    if begun == {"distill"} and config.stage in ("grpo", "visionselector"):
        bound = {"model", *_SIZES}  # it starts from what that stage made, on whatever questions
    elif begun == {"distill"}:
        bound = {name for name in now if "distill" in stages_of(name, kind)} - {"stage"}
    else:
        bound = set(now)
    unlike = [name for name in now if name in bound - _FREE and before[name] != now[name]]
    if unlike:
        changes = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in unlike[:4])
        raise TrainError(f"{folder} holds another run ({changes}): use another --output-dir, or those settings")
