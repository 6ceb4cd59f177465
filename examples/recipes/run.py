"""A Grip scorer for a published model: questions, training, six benchmarks, the hub.

    PYTHONPATH=examples python -m recipes.run llava-1.5-7b --work runs               # everything but the hub
    PYTHONPATH=examples python -m recipes.run llava-1.5-7b --work runs --dry-run     # memory and hours, no training
    PYTHONPATH=examples python -m recipes.run llava-1.5-7b --work runs --push me/grip-llava-1.5-7b

Interrupt it at any time: the same command goes on. Flags that are not listed here are those of `gripvlm train`, such as
`--seed 1`. Not run at 7B yet: tests run it on tiny models of the three types, with files of the same schema
(docs/recipes.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from gripvlm.budget import Budget
from gripvlm.cli import main as gripvlm
from gripvlm.errors import GripError
from gripvlm.eval import read_results
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import read_toml
from gripvlm.models.loading import model_type
from gripvlm.report.tables import by_setting
from gripvlm.utils import disk
from gripvlm.utils.terminal import filled
from recipes.questions import REPO, prepare

HERE = Path(__file__).parent
QUESTIONS = HERE / "questions.toml"
RECIPES = sorted(file.stem for file in HERE.glob("*.toml") if file != QUESTIONS)

KEEPS = "33.3%,22.2%,11.1%"
"""192, 128 and 64 of LLaVA-1.5's 576 tokens, the budgets of most papers."""

PRUNERS = "divprune,random"
"""What the scorer is measured beside; neither is trained."""


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        "recipes.run", None, first, rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("recipe", choices=RECIPES)
    made.add_argument("--work", type=Path, default=Path("runs"), help="folder of all that is written (default: runs)")
    made.add_argument("--model", help="a folder with the model, instead of the hub's")
    made.add_argument(
        "--device", help="of training and benchmarks, such as cuda:1; default: an accelerator if there is one"
    )
    made.add_argument("--cauldron", type=Path, help=f"a folder with {REPO}, instead of the hub's")
    made.add_argument("--benchmarks", type=Path, help="a folder with the six benchmarks (docs/benchmarks.md), likewise")
    made.add_argument("--questions", type=int, help="training questions of each part, instead of questions.toml's")
    made.add_argument("--limit", type=int, help="test questions of each benchmark; default: all")
    made.add_argument("--batch", type=int, default=8, help="test questions at a time (default: 8)")
    made.add_argument("--dry-run", action="store_true", help="make the questions; say what training will need")
    made.add_argument("--push", metavar="REPO", help="hub repository, made if it is not there, that gets the scorer")
    made.add_argument("--private", action="store_true", help="make that repository a private one")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code, as `gripvlm`'s: 0, 2 for an error of one paragraph, 130 for Ctrl-C."""
    given, flags = parser().parse_known_args(arguments)
    try:
        return run(given, flags)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    except (GripError, OSError) as error:
        print(filled(str(error), start="Error: "), file=sys.stderr)
        return 2


def run(given: argparse.Namespace, flags: list[str]) -> int:
    file = HERE / f"{given.recipe}.toml"
    model = given.model or read_toml(file)["model"]
    scorer, results = given.work / given.recipe / "scorer", given.work / given.recipe / "benchmarks.json"
    tasks = f"benchmarks:path={given.benchmarks}" if given.benchmarks else "benchmarks"

    wanted = wanted_questions(given.questions)
    model_type(model)  # a wrong name shows before the questions are made
    place = ["--device", given.device] if given.device else []
    questions = prepare(given.work / "questions", wanted, 0, given.cauldron, tasks)
    flags = ["--model", model, "--data", str(questions), "--output-dir", str(scorer), *place, *flags]
    if code := gripvlm(["train", "--config", str(file), *flags, *(["--dry-run"] if given.dry_run else [])]):
        return code
    if given.dry_run:
        return 0
    pruners = f"grip:scorer={scorer},{PRUNERS}"
    flags = ["--model", model, "--tasks", tasks, "--pruners", pruners, "--keep", KEEPS, "--batch", str(given.batch)]
    if given.limit is not None:
        flags += ["--limit", str(given.limit)]
    if code := gripvlm(["eval", *flags, *place, "--out", str(results)]):
        return code
    if given.push:
        print(f"pushed: {push(scorer, card(model, wanted, results), given.push, given.private)}")
    return 0


def wanted_questions(each: int | None) -> dict[str, int]:
    """Part of The Cauldron -> questions.

    Raises:
        GripError: fewer than one.
    """
    if each is not None and each < 1:
        raise GripError(f"--questions {each}: type a number, 1 or more")
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    counts: dict[str, int] = tomllib.loads(disk.read_text(QUESTIONS))
    return {name: each or count for name, count in counts.items()}


def card(model: str, questions: dict[str, int], results: Path) -> ModelCard:
    """The model card: how to use the scorer, what it was trained on, and its scores."""
    rows = read_results(results)
    tasks = list(dict.fromkeys(row["task"] for row in rows.rows))
    table = [f"| pruner | keep | {' | '.join(tasks)} |", f"|---|---|{'---:|' * len(tasks)}"]
    for (pruner, keep), by_task in by_setting(rows.rows).items():
        name = "**this scorer**" if pruner.startswith("grip") else pruner
        scores = [f"{100 * by_task[task]['score']:.1f}" if task in by_task else "-" for task in tasks]
        table.append(f"| {name} | {Budget.of(keep).short} | {' | '.join(scores)} |")
    counts = {row["task"]: str(row["n"]) for row in rows.rows}
    table.append(f"| questions | | {' | '.join(counts[task] for task in tasks)} |")
    about = ModelCardData(
        base_model=model, datasets=[REPO], library_name="gripvlm", tags=["visual-token-pruning", "gripvlm"]
    )
    trained = ", ".join(f"{count} of {name}" for name, count in questions.items())
    return ModelCard(f"""---
{about}
---

# A Grip scorer for {model}

It chooses which visual tokens of {model} stay.

```python
import gripvlm

grip = gripvlm.Grip.from_pretrained("this-repository")
with gripvlm.prune(model, grip, keep="11.1%"):
    model.generate(**inputs)
```

Trained with gripvlm {version("gripvlm")} on at most so many questions: {trained} (parts of {REPO};
its card has their licences). Pictures like one that the benchmarks below test on were left out. `config.json` has all
settings.

Scores in percent, by `gripvlm eval`; metrics and splits are in gripvlm's docs/benchmarks.md.

{chr(10).join(table)}
""")


def push(scorer: Path, about: ModelCard, repo: str, private: bool) -> str:
    """The address of the commit that has the scorer and its card.

    Raises:
        GripError: no network, or not signed in.
    """
    loaded = Scorer.from_pretrained(scorer)
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        about.save(Path(folder) / "README.md")
        api = HfApi()
        try:
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A Grip scorer"))
        except (OSError, HfHubHTTPError, ValueError) as error:
            raise GripError(
                f"{repo} did not take the scorer: {' '.join(str(error).split())} (type hf auth login, check the name, "
                f"and then the same command again; the scorer is in {scorer})"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
