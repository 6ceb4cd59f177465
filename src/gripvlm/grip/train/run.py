"""`train`: from a frozen model and questions to a scorer, in a folder that tells how."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gripvlm.errors import TrainError
from gripvlm.eval import environment
from gripvlm.grip.pruner import Grip, Learned, place_of
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.grip.train.config import STAGES, TrainConfig, read_toml, reads, shares, write_toml
from gripvlm.grip.train.curve import draw_curve
from gripvlm.grip.train.data import Questions, check_pictures, load_questions, split
from gripvlm.grip.train.diffprune import DiffPrune
from gripvlm.grip.train.dynamicvit import DynamicViT
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.loop import Loop, Stage
from gripvlm.grip.train.processes import Processes
from gripvlm.grip.train.relaxed import Relaxed
from gripvlm.grip.train.rewards import get_reward
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.teachers import make_teacher
from gripvlm.grip.train.validation import Validator
from gripvlm.grip.train.warmup import WarmUp
from gripvlm.pruners.baselines import relaxed
from gripvlm.tasks import Sample, Task
from gripvlm.utils import disk

__all__ = ["check_settings", "train", "train_on"]

Asked: TypeAlias = list[tuple[Task, Sample]]

# Settings that the scorer itself has.
_SIZES = ("width", "blocks", "heads", "question", "budget")
# What may differ between a run and its continuation.
_FREE = {"out", "save_minutes", "val_every", "max_minutes", "log_with", "device", "rows", "patience", "on_bad"}
_PATHS = {"data", "val_data", "start"}
_CONFIG = "config.toml"
# Relaxations with a loss of their own.
_RELAXED: dict[str, type[Relaxed]] = {"dynamicvit": DynamicViT, "diffprune": DiffPrune}


def train(
    config: TrainConfig,
    model: Any,
    processor: Any,
    data: Task | Sequence[Task] | None = None,
    validation: Task | Sequence[Task] | None = None,
    *,
    quiet: bool = True,
) -> Learned:
    """Trains a scorer for a frozen model.

        grip = train(TrainConfig(data="my/questions.jsonl", out="grip"), model, processor)

    Args:
        config: every setting; `config.out` is the run's folder, and the same call goes on from its checkpoint.
        model, processor: a supported transformers model, which is frozen, and its processor.
        data, validation: tasks, instead of what `config.data` and `config.val_data` name.
        quiet: no progress bar.

    Returns:
        The trained pruner, a `Grip`, or, of the stage "relaxed", a `gripvlm.pruners.baselines.relaxed.Relaxed`. Its
        scorer is saved in `config.out`.

    Raises:
        TrainError: bad settings, data or rewards, with what to change.
        BusyError: another process trains in `config.out`.
        Interrupted: Ctrl-C; a checkpoint is written.
    """
    return train_on(*check_settings(config, data, validation), config, model, processor, quiet=quiet)


def train_on(questions: Asked, held: Asked, config: TrainConfig, model: Any, processor: Any, *, quiet: bool) -> Learned:
    """`train` with what `check_settings` returned."""
    folder = Path(config.out).expanduser()
    processes = Processes(config.log_with, folder, cpu=model.device.type == "cpu")
    if config.accumulate % processes.count:
        raise TrainError(
            f"accumulate = {config.accumulate} micro-batches a step do not divide among {processes.count} processes: "
            f"type --accumulate {processes.count}, or a multiple"
        )
    with disk.one_writer(folder, folder=True) if processes.rank == 0 else nullcontext():
        _check_folder(config, folder)  # another run may have been there since
        return _run(questions, held, config, model, processor, folder, processes, quiet)


def _run(
    questions: Asked,
    held: Asked,
    config: TrainConfig,
    model: Any,
    processor: Any,
    folder: Path,
    processes: Processes,
    quiet: bool,
) -> Learned:
    judge, keeps = get_reward(config.val_reward or config.reward), shares(config.val_keeps, "val_keeps")
    engine = Engine(model, processor, rows=config.rows, bf16=config.bf16)
    torch.manual_seed(config.seed)
    scorer, done = _start(config, folder, model)
    every = max(1, len(held) // config.val_questions)
    held = held[::every][: config.val_questions]
    processes.wait()  # all have checked the folder
    for name in _stages(config, done):
        stage = _stage(name, config, scorer, engine)
        if processes.rank == 0:
            _claim(config, folder)
        validator = Validator(engine, held, keeps, judge, config.own_answers, config.on_bad == "skip")
        stream = Questions(questions, config.images, config.questions, config.seed)
        try:
            scorer = Loop(stage, stream, validator, folder, processes, quiet).run()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"{name} ran out of memory: type a smaller --rows; if that is not enough, a smaller --images or "
                "--questions, with another --out"
            ) from error
        sizes = {field: getattr(scorer.config, field) for field in _SIZES}  # as they are, not as they were asked for
        scorer.notes = {"stage": name, "steps": stage.steps, "config": config.to_dict() | sizes}
        if left_out := len(stream.skipped) + len(validator.skipped):
            scorer.notes["left_out"] = left_out
        if processes.rank == 0:
            scorer.save_pretrained(folder / name)
    if processes.rank == 0:
        scorer.save_pretrained(folder)
        draw_curve(folder / "metrics.jsonl", folder / "curve.png")
    processes.wait()
    processes.end()
    return (relaxed.Relaxed if config.stage == "relaxed" else Grip)(str(folder), scorer.eval())


def check_settings(
    config: TrainConfig,
    data: Task | Sequence[Task] | None = None,
    validation: Task | Sequence[Task] | None = None,
    typed: Collection[str] = (),
) -> tuple[Asked, Asked]:
    """The training and the validation questions, once everything that can be known without the model is right.

    Args:
        data, validation: as `train` takes them.
        typed: the settings that were asked for even if they are the defaults.

    Raises:
        TrainError, TaskError, ScorerError: what to change.
    """
    for name in (config.reward, config.val_reward or config.reward):
        get_reward(name)
    make_teacher(config.teacher)
    _check_folder(config, Path(config.out).expanduser())
    if config.start:
        _check_sizes(Scorer.from_pretrained(place_of(config.start)), config.start, config, typed)
    questions = load_questions(config.data if data is None else data)
    if validation is not None or config.val_data:
        held = load_questions(config.val_data if validation is None else validation)
    else:
        questions, held = split(questions, config.val_share)
    _check_apart(questions, held)
    if config.on_bad == "stop":
        check_pictures([*questions, *held])
    return questions, held


def _check_apart(questions: Asked, held: Asked) -> None:
    """Refuses validation questions that are training questions: the same words about the same file."""

    def of(asked: Asked) -> list[tuple[str, str, str]]:
        return [(os.path.abspath(s.picture), s.question, s.id) for _, s in asked if isinstance(s.picture, Path)]

    known = {(picture, question) for picture, question, _ in of(questions)}
    if same := [name for picture, question, name in of(held) if (picture, question) in known]:
        raise TrainError(
            f"{len(same)} of {len(held)} validation questions are training questions too, such as {same[0]!r}: name "
            "others with --val-data, or leave it out, and --val-share of the pictures is held out"
        )


def _stages(config: TrainConfig, done: str) -> list[str]:
    """What is left to do, in order."""
    if config.stage != "all":
        return [config.stage]
    wanted = ["warmup", "grpo"] if config.warmup_steps else ["grpo"]
    if done == "grpo":  # it may have run out of time or patience, and there may be more now
        return ["grpo"] if (Path(config.out).expanduser() / "grpo.ckpt").exists() else []
    return wanted[wanted.index(done) + 1 :] if done in wanted else wanted


def _stage(name: str, config: TrainConfig, scorer: Scorer, engine: Engine) -> Stage:
    if name == "warmup":
        return WarmUp(config, scorer, engine)
    if name == "grpo":
        return Grpo(config, scorer, engine)
    return _RELAXED.get(config.relaxation, Relaxed)(config, scorer, engine)


def _start(config: TrainConfig, folder: Path, model: Any) -> tuple[Scorer, str]:
    """The scorer to begin with, and the last stage that is finished."""
    device = model.device
    base = ModelFingerprint.of(model)
    for name in ("grpo", "warmup") if config.stage == "all" else ():
        if (folder / name / "scorer.json").exists():
            return _loaded(folder / name, config, model, base), name
    own = config.stage in ("grpo", "relaxed") and not config.start
    if own and (folder / "warmup.ckpt").exists() and not (folder / "warmup" / "scorer.json").exists():
        raise TrainError(
            f"the warm-up in {folder} was stopped before its end: finish it with `gripvlm train warmup` and the same "
            "settings, or name a scorer with --start"
        )
    start = config.start or (str(folder / "warmup") if own else "")
    if start and (config.start or (Path(start) / "scorer.json").exists()):
        return _loaded(start, config, model, base), ""
    sizes = ScorerConfig(base.features, config.width, config.blocks, config.heads, config.question, config.budget)
    return Scorer(sizes, base).to(device), ""


def _loaded(name: str | Path, config: TrainConfig, model: Any, base: ModelFingerprint) -> Scorer:
    """A scorer to go on from, if it is this model's and of the sizes that were asked for."""
    scorer = Scorer.from_pretrained(place_of(name))
    if scorer.base is not None:
        scorer.base.check(model)
    _check_sizes(scorer, name, config)
    scorer.base = base
    return scorer.to(model.device)


def _check_sizes(scorer: Scorer, name: str | Path, config: TrainConfig, typed: Collection[str] = ()) -> None:
    """Refuses a scorer of other sizes than were asked for; sizes left at their defaults ask for nothing."""
    for field in _SIZES:
        asked, has = getattr(config, field), getattr(scorer.config, field)
        if asked != has and (field in typed or asked != TrainConfig.__dataclass_fields__[field].default):
            raise TrainError(f"{field} = {asked!r}, but the scorer in {name} has {has!r}: leave that setting out")


def _check_folder(config: TrainConfig, folder: Path) -> None:
    """Refuses the folder of another run; one that was stopped before its first checkpoint is none yet."""
    file = folder / _CONFIG
    begun = {name for name in STAGES if (folder / f"{name}.ckpt").exists() or (folder / name).exists()}
    if not file.exists():
        if left := [path.name for path in (*folder.glob("*.ckpt"), *folder.glob("scorer.*"))]:
            raise TrainError(f"{folder} holds {', '.join(sorted(left))} but no {_CONFIG}: type another --out")
        return
    if not begun:
        return
    try:
        before, now = TrainConfig(**read_toml(file)).to_dict(), config.to_dict()
    except TrainError as error:
        raise TrainError(f"{folder} holds a run that cannot be gone on with ({error}): type another --out") from error
    free = _FREE
    later = {name for name in now if "warmup" not in reads(name)} if begun == {"warmup"} else set()
    if config.stage != before["stage"] == "warmup":  # the next stage of the same folder
        free = _FREE | {"stage"} | later if config.stage == "all" else set(now) - {"model", *_SIZES}
    elif config.stage == before["stage"] == "all":
        free = _FREE | later
    if unlike := [name for name in now if name not in free and not _alike(name, before[name], now[name])]:
        told = ", ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in unlike[:4])
        raise TrainError(f"{folder} holds another run ({told}): type another --out, or those settings")


def _alike(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting are the same, or the same file."""
    return one == other or (name in _PATHS and bool(one and other) and os.path.abspath(one) == os.path.abspath(other))


def _claim(config: TrainConfig, folder: Path) -> None:
    """Makes the run's folder and writes down what runs there."""
    write_toml(config, folder / _CONFIG)
    disk.write(folder / "environment.json", json.dumps(environment(), indent=1) + "\n")
