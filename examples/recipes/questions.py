"""Training questions from The Cauldron (arXiv 2405.02246), as a folder that `gripvlm train --data` takes.

The Cauldron has the training sets of fifty data sets in one schema: a row has `images`, and `texts`, a list of turns
with `user` and `assistant`. Taken are rows with one picture and turns with a short answer.

Pictures that the benchmarks test on are left out, as far as small grey copies can tell: those whose pixels differ from
a test picture's by less than `NEAR` levels of 255 (root mean square) count as the same. This finds other sizes, formats
and qualities of a picture. It does not find crops.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gripvlm.errors import GripError
from gripvlm.tasks import TaskError, get_tasks, open_image
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress

__all__ = ["NEAR", "REPO", "prepare"]

REPO = "HuggingFaceM4/the_cauldron"

WORDS = 10
"""Longer answers are left out: their probability says little about a picture's tokens."""

MAX_PIXELS = 1280 * 28 * 28
"""Larger pictures are stored smaller: Qwen2.5-VL makes 16,384 tokens of the largest that it takes, here 1,280."""

SIDE = 32
NEAR = 4.0

BUFFER = 1000
"""Rows among which the next one is drawn: the hub's files are read as a stream, not downloaded whole."""


def prepare(folder: Path, wanted: Mapping[str, int], seed: int, cauldron: Path | None, benchmarks: str) -> Path:
    """The path of questions.jsonl, after writing it and its pictures; what is there already is not made again.

    Args:
        folder: made for one choice of the other arguments.
        wanted: name of a part of The Cauldron -> how many of its questions.
        seed: of their draw.
        cauldron: a local copy, with a folder of Parquet files for each part; None for the hub.
        benchmarks: tasks whose pictures are left out, as `gripvlm eval --tasks` takes them.

    Raises:
        GripError: the folder was made for something else.
        TaskError: data that cannot be read, or without what the schema has.
    """
    asked = {"questions": dict(wanted), "seed": seed, "cauldron": str(cauldron or REPO), "benchmarks": benchmarks}
    about, file = folder / "made.json", folder / "questions.jsonl"
    state = json.loads(disk.read_text(about)) if about.exists() else {"asked": asked, "made": {}}
    if state["asked"] != asked:
        unlike = ", ".join(
            f"{k} was {state['asked'][k]!r}, now {asked[k]!r}" for k in asked if state["asked"][k] != asked[k]
        )
        raise GripError(f"{folder} was made for other questions ({unlike}): use another --work, or remove that folder")
    if file.exists():
        return file
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    left = [name for name in wanted if name not in state["made"]]
    tested = small_copies(benchmarks) if left else None
    for name in left:
        state["made"][name] = write_part(folder, name, wanted[name], rows_of(name, seed, cauldron), tested)
        disk.write(about, json.dumps(state, indent=1) + "\n")
    for name, made in state["made"].items():
        left_out = f"left out {made['like test pictures']} pictures like test pictures, {made['unreadable']} unreadable"
        print(f"{name}: {made['questions']} of {wanted[name]} questions; {left_out}", file=sys.stderr)
    disk.write(file, "".join(disk.read_text(folder / f"{name}.jsonl") for name in wanted))
    return file


def small_copy(image: Image.Image) -> np.ndarray:
    """[SIDE * SIDE] grey levels."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()


def small_copies(tasks: str) -> np.ndarray:
    """[pictures, SIDE * SIDE] of all pictures that the tasks ask about."""
    shown = {(task.name, sample.image_id): sample for task in get_tasks(tasks) for sample in task.samples}
    copies = []
    with Progress("test pictures", len(shown)) as progress:
        for sample in shown.values():
            copies += [small_copy(image) for image in sample.images]
            progress.advance()
    return np.stack(copies)


def rows_of(name: str, seed: int, cauldron: Path | None) -> Iterable[dict[str, Any]]:
    """Rows of one part in a random order, pictures still encoded."""
    import datasets

    files = [] if cauldron is None else sorted(map(str, (cauldron / name).glob("*.parquet")))
    if cauldron is not None and not files:
        raise TaskError(
            f"no Parquet file in {cauldron / name}: type hf download --repo-type dataset {REPO} --include '{name}/*' "
            f"--local-dir {cauldron}, or leave --cauldron out"
        )
    where = {"path": "parquet", "data_files": files} if files else {"path": REPO, "name": name}
    try:
        table = datasets.load_dataset(**where, split="train", streaming=True)
        yield from table.decode(False).shuffle(seed=seed, buffer_size=BUFFER)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TaskError(
            f"the part {name} of {cauldron or REPO} cannot be read: {first} (the same command goes on from the parts "
            "that are there; on a machine without network copy them here and type --cauldron FOLDER)"
        ) from error


def write_part(
    folder: Path, name: str, wanted: int, rows: Iterable[Mapping[str, Any]], tested: np.ndarray
) -> dict[str, int]:
    """Writes name.jsonl and its pictures; returns what was made and left out.

    Raises:
        TaskError: rows of another schema, or not one question in them.
    """
    lines: list[str] = []
    made = {"questions": 0, "pictures": 0, "like test pictures": 0, "unreadable": 0}
    with Progress("questions", wanted) as progress:
        progress.about(name)
        for number, row in enumerate(rows):
            if lacking := {"images", "texts"} - row.keys():
                raise TaskError(f"{name}: rows have {', '.join(row)}, but no {' and no '.join(sorted(lacking))}")
            turns = short_turns(row["texts"])[: wanted - len(lines)]
            if not turns or len(row["images"]) != 1:
                continue
            try:
                image = open_image(row["images"][0]["bytes"] or b"", f"the picture of row {number} in {name}")
            except TaskError:
                made["unreadable"] += 1
                continue
            if np.square(tested - small_copy(image)).mean(1).min() < NEAR**2:
                made["like test pictures"] += 1
                continue
            file = f"pictures/{name}-{number:06d}.jpg"
            within(image).save(folder / file, quality=95)
            for turn, (question, answer) in enumerate(turns):
                line = {"id": f"{name}-{number}-{turn}", "image": file, "family": name}
                lines.append(json.dumps(line | {"question": question, "answer": answer}, ensure_ascii=False) + "\n")
            made["pictures"] += 1
            progress.advance(len(turns))
            if len(lines) == wanted:
                break
    if not lines:
        raise TaskError(f"{name} has no question with one picture and an answer of {WORDS} words at most: {made}")
    made["questions"] = len(lines)
    disk.write(folder / f"{name}.jsonl", "".join(lines))
    return made


def short_turns(texts: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(question, answer) of the turns with a short answer, each question once.

    Answers lose what the benchmarks' answers don't have: "Answer: " in front, and a full stop.
    """
    turns: dict[str, str] = {}
    for turn in texts:
        question = turn["user"].strip()
        answer = turn["assistant"].strip().removeprefix("Answer:").strip().removesuffix(".")
        if question and 0 < len(answer.split()) <= WORDS:
            turns.setdefault(question, answer)
    return list(turns.items())


def within(image: Image.Image) -> Image.Image:
    """The picture with at most MAX_PIXELS."""
    shrink = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if shrink >= 1:
        return image
    size = (max(1, math.floor(image.width * shrink)), max(1, math.floor(image.height * shrink)))
    return image.resize(size, Image.Resampling.BICUBIC)
