"""Adds a result of a real model to the leaderboard, if it may be compared with others.

    gripvlm eval --model OWNER/NAME --tasks benchmarks --pruners random,grid,... --keep ... --out result.json
    python -m experiments.leaderboard.add result.json

The file is copied to `results/`, its answers packed beside it, and the table of REPORT.md is filled. Nothing is copied
where a rule of REPORT.md is broken.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

from experiments.tables import fill
from gripvlm.errors import GripError
from gripvlm.eval import Results, read_results, samples_path
from gripvlm.eval.results import write_result
from gripvlm.eval.variants import FULL, ORACLE
from gripvlm.tasks.benchmarks import BENCHMARKS

FOLDER = Path(__file__).parent / "results"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PRIVATE = re.compile(r"(/home|/root|/Users|/work|/tmp|/mnt)/[^\"' ]*")
CHANCE = ("random", "grid")
"""What a method must beat."""


def faults(results: Results) -> list[str]:
    """Rules of REPORT.md that the result breaks; that its scores follow from its answers `read_results` has checked."""
    head, found = results.header, []
    if not HUB_ID.fullmatch(head["model"]):
        found.append(f"the model is {head['model']!r}: use a hub id, such as llava-hf/llava-1.5-7b-hf")
    tasks = [text.rpartition(" (")[0] for text in head["tasks"]]
    if others := sorted({task.partition("/")[0] for task in tasks} - BENCHMARKS.keys()):
        found.append(f"tasks {', '.join(others)}: allowed are {', '.join(BENCHMARKS)}")
    if head["limit"] is not None or head.get("shard"):
        found.append("it has a part of the questions: run without --limit, and without --shard at the end")
    if results.missing:
        found.append(f"the answers are missing: put {results.missing.name} beside it")
    methods = {row["pruner"].partition(":seed=")[0] for row in results.rows}
    if missing := [name for name in (FULL, *CHANCE) if name not in methods]:
        found.append(f"{', '.join(missing)} not measured: use --pruners {','.join(CHANCE)},...")
    if not methods - {FULL, ORACLE, *CHANCE}:
        found.append("no method beside the baselines: name one or more")
    git = head["git"] or {}
    if git.get("dirty") or not (git.get("commit") or head["versions"].get("gripvlm")):
        found.append("the code was changed, or is unknown: run it from a clean commit or a release")
    if private := PRIVATE.search(json.dumps(results.content)):
        found.append(f"it names a folder of your machine, {private[0]}...: run the command in the folder of its files")
    return found


def add(path: Path, folder: Path = FOLDER) -> Path:
    """Copies a result and its answers into the folder.

    Raises:
        GripError: it breaks rules (all are named), or is there already.
    """
    results = read_results(path)
    if found := faults(results):
        raise GripError(f"{path} is not added: {'; '.join(found)}")
    head = results.header
    model = head["model"].replace("/", "--")
    target = folder / f"{model}.{head['weights'][:8]}.{head['finished'][:10]}.{path.stem}.json"
    if target.exists():
        raise GripError(f"{target} exists: this result is there already")
    folder.mkdir(parents=True, exist_ok=True)
    samples = path.with_name(results.content["samples"])
    plain = samples.read_bytes() if samples.exists() else gzip.decompress(Path(f"{samples}.gz").read_bytes())
    packed = samples_path(target)
    Path(f"{packed}.gz").write_bytes(gzip.compress(plain, mtime=0))
    write_result(target, {**results.content, "samples": packed.name})
    return target


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("type one file: python -m experiments.leaderboard.add result.json")
    from experiments.leaderboard.analyze import tables

    try:
        print(add(Path(sys.argv[1])))
    except GripError as error:
        sys.exit(f"Error: {error}")
    for page, filled in tables().items():
        fill(page, filled)


if __name__ == "__main__":
    main()
