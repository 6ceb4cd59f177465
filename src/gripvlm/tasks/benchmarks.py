"""Six published benchmarks with their prompts and their metrics; docs/benchmarks.md has the table.

Data sets, prompts and rules of scoring are those of lmms-eval 0.7.3, so that numbers can be compared; where it and a
benchmark's own code differ, the class says which is followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, TaskError
from gripvlm.tasks.metrics import (
    contains,
    contains_verbatim,
    mme_says,
    option_letter,
    pope_says,
    yes_no_summary,
)
from gripvlm.tasks.rows import Source
from gripvlm.tasks.table_task import BY_LETTER, TableTask, commonest, lettered
from gripvlm.tasks.vqa_answer import vqa_accuracy

__all__ = ["AI2D", "BENCHMARKS", "MME", "POPE", "Benchmark", "OCRBench", "ScienceQA", "TextVQA", "benchmark"]

SHORT = "\nAnswer the question using a single word or phrase."


class Benchmark(TableTask):
    """One of the six, with where its questions are published.

    Attributes:
        repo, config, split: on the Hugging Face hub.
        parts: names after a slash that stand for some of the questions only, such as "random" in `pope/random`.
        part: the one this task is restricted to; "" for all.
    """

    repo: str = ""
    config: str | None = None
    split: str = "test"
    parts: tuple[str, ...] = ()

    def __init__(self, name: str, options: Mapping[str, str]) -> None:
        path = Path(options["path"]).expanduser() if "path" in options else None
        super().__init__(
            Source(
                task=name,
                repo=options.get("repo", self.repo),
                config=options.get("config", self.config),
                split=options.get("split", None if path and path.is_file() else self.split),
                path=path,
                chosen=frozenset(options) & {"config", "split"},
            )
        )
        self.part = name.partition("/")[2]
        self._spec = f"{name}:{','.join(f'{key}={value}' for key, value in options.items())}" if options else name
        self.held_out = "split" not in options
        if options.get("split", self.split) != self.split:
            self.name = f"{name}:split={options['split']}"

    @property
    def spec(self) -> str:
        return self._spec


class POPE(Benchmark):
    """Is this object in the picture? Yes or no; the absent ones drawn at random, from the popular or the likely.

    Source: arXiv 2305.10355. An answer is read as POPE's own code does (`pope_says`), which differs from lmms-eval:
    (1) there anything but the bare word is wrong, here what is not "no" is "yes"; (2) its pope_yes_ratio counts the
    true answers, here `yes_share` counts the model's, as POPE defines it.
    """

    repo, parts = "lmms-lab-encoder/POPE", ("random", "popular", "adversarial")
    columns = ("question_id", "question", "answer", "image_source", "category")
    suffix, max_new_tokens = SHORT, 128

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        category, answer = str(row["category"]), str(row["answer"]).strip().lower()
        if category not in self.parts or answer not in ("yes", "no"):
            raise self.refused(index, f"has the category {category!r} and the answer {answer!r}")
        if self.part not in ("", category):
            return None
        return Sample(
            id=f"{category}/{row['question_id']}",
            picture=picture,
            question=row["question"].strip(),
            answer=answer.capitalize(),
            family=category,
            image_id=str(row["image_source"]),
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return float(pope_says(prediction) == sample.answer.lower())

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """accuracy, f1, precision, recall, yes_share; with several categories also accuracy_ and f1_ of each."""
        by_id = {sample.id: sample for sample in self.samples}
        pairs = [(pope_says(record["prediction"]) == "yes", by_id[record["id"]]) for record in records]

        def of(chosen: list[tuple[bool, Sample]]) -> dict[str, float]:
            said, true = [yes for yes, _ in chosen], [sample.answer == "Yes" for _, sample in chosen]
            right = sum(a == b for a, b in zip(said, true, strict=True))
            return {"accuracy": right / len(chosen) if chosen else 0.0, **yes_no_summary(said, true)}

        found = of(pairs)
        categories = [one for one in self.parts if any(sample.family == one for _, sample in pairs)]
        for category in categories if len(categories) > 1 else []:
            mine = of([pair for pair in pairs if pair[1].family == category])
            found |= {f"{name}_{category}": mine[name] for name in ("accuracy", "f1")}
        return found


class ScienceQA(Benchmark):
    """School questions with two to five options, those that have a picture.

    Source: arXiv 2209.09513; the options are asked for by letter, as in LLaVA (`option_letter`).
    """

    repo, config = "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"
    columns = ("question", "choices", "answer", "hint")
    suffix, shared_pictures = BY_LETTER, True

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        if not image_id:
            return None
        options, letters = lettered(row["choices"])
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        return Sample(
            id=str(index),
            picture=picture,
            question=f"{hint}{row['question']}\n{options}",
            answer=letters[int(row["answer"])],
            choices=letters,
            family=str(row.get("subject") or ""),
            image_id=image_id,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return float(option_letter(prediction, len(sample.choices)) == sample.answer)


class AI2D(Benchmark):
    """Questions about diagrams from school books, four options asked for by letter (`option_letter`).

    Source: arXiv 1603.07396.
    """

    repo, columns = "lmms-lab-encoder/ai2d", ("question", "options", "answer")
    suffix, shared_pictures = BY_LETTER, True

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        options, letters = lettered(row["options"])
        return Sample(
            id=str(index),
            picture=picture,
            question=f"{row['question']}\n{options}",
            answer=letters[int(row["answer"])],
            choices=letters,
            image_id=image_id,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return float(option_letter(prediction, len(sample.choices)) == sample.answer)


class MME(Benchmark):
    """Two questions about each picture, one whose answer is yes and one whose answer is no, in 14 subtasks.

    A subtask's score is 100 x (accuracy + accuracy+), where accuracy+ is the share of pictures with both questions
    right; perception is the sum over ten subtasks (2000 at most), cognition over four (800 at most).

    Source: arXiv 2306.13394, section 2.2, and its calculation.py (`mme_says`).
    """

    PERCEPTION = (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    )
    COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

    repo, parts = "lmms-lab-encoder/MME", ("perception", "cognition")
    columns = ("question_id", "question", "answer", "category")
    suffix = SHORT

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        category, answer = str(row["category"]), str(row["answer"]).strip().rstrip(".").lower()
        if category not in self.PERCEPTION + self.COGNITION or answer not in ("yes", "no"):
            raise self.refused(index, f"has the category {category!r} and the answer {answer!r}")
        if self.part and (category in self.PERCEPTION) != (self.part == "perception"):
            return None
        return Sample(
            id=f"{category}/{row['question_id']}/{index}",
            picture=picture,
            question=row["question"].strip().replace(" Please answer yes or no.", ""),
            answer=answer.capitalize(),
            family=category,
            pair=str(row["question_id"]),
            image_id=f"{category}/{row['question_id']}",
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return float(mme_says(prediction) == sample.answer.lower())

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """accuracy_plus, each subtask's score by its name, perception and cognition; from whole pairs only.

        A total is there only where all of its subtasks are.
        """
        by_id = {sample.id: sample for sample in self.samples}
        pairs: dict[tuple[str, str], list[float]] = {}
        for record in records:
            sample = by_id[record["id"]]
            pairs.setdefault((sample.family, sample.image_id), []).append(record["score"])
        whole = {key: scores for key, scores in pairs.items() if len(scores) == 2}
        if not whole:
            return {}
        found = {"accuracy_plus": sum(sum(scores) == 2 for scores in whole.values()) / len(whole)}
        for subtask in self.PERCEPTION + self.COGNITION:
            if mine := [scores for (family, _), scores in whole.items() if family == subtask]:
                accuracy = sum(map(sum, mine)) / (2 * len(mine))
                found[subtask] = 100 * (accuracy + sum(sum(scores) == 2 for scores in mine) / len(mine))
        for total, subtasks in (("perception", self.PERCEPTION), ("cognition", self.COGNITION)):
            if all(subtask in found for subtask in subtasks):
                found[total] = sum(found[subtask] for subtask in subtasks)
        return found


class OCRBench(Benchmark):
    """Reading: words, scenes, documents, receipts, formulas. An answer is right where it contains an accepted one.

    Source: arXiv 2305.07895 (`contains`; for the formulas of HME100k `contains_verbatim`).
    """

    repo, max_new_tokens = "echo840/OCRBench", 128
    columns = ("dataset", "question", "question_type", "answer")
    shared_pictures = True

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        return Sample(
            id=f"{row['dataset']}/{index}",
            picture=picture,
            question=row["question"].strip(),
            answer=answers[0],
            family=str(row["question_type"]),
            image_id=image_id,
            answers=tuple(answers),
        )

    def score(self, prediction: str, sample: Sample) -> float:
        rule = contains_verbatim if sample.id.startswith("HME100k/") else contains
        return rule(prediction, sample.accepted)

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """final_score, 1000 x the mean (how many of the 1000 are right), and the accuracy of each kind of question."""
        families = {sample.id: sample.family for sample in self.samples}
        kinds: dict[str, list[float]] = {}
        for record in records:
            kinds.setdefault(families[record["id"]], []).append(record["score"])
        scores = [score for mine in kinds.values() for score in mine]
        if not scores:
            return {}
        return {"final_score": 1000 * sum(scores) / len(scores)} | {
            kind: sum(mine) / len(mine) for kind, mine in sorted(kinds.items())
        }


class TextVQA(Benchmark):
    """Questions whose answer is written in the picture, with ten people's answers each (`vqa_accuracy`).

    Source: arXiv 1904.08920; the prompt is lmms-eval's, without the OCR tokens that LLaVA's own script adds.
    """

    repo, split = "lmms-lab-encoder/textvqa", "validation"
    columns = ("image_id", "question_id", "question", "answers")
    suffix, max_new_tokens = SHORT, 32

    def sample(self, index: int, row: Mapping[str, Any], picture: partial, image_id: str) -> Sample | None:
        answers = [answer for answer in row["answers"] or [] if answer]
        if not answers:
            raise self.refused(index, "has no answers: the test split keeps them back, type split=validation")
        return Sample(
            id=str(row["question_id"]),
            picture=picture,
            question=row["question"].capitalize(),
            answer=commonest(answers),
            image_id=str(row["image_id"]),
            answers=tuple(answers),
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return vqa_accuracy(prediction, sample.accepted)


BENCHMARKS: Mapping[str, type[Benchmark]] = {
    "pope": POPE,
    "scienceqa": ScienceQA,
    "ai2d": AI2D,
    "mme": MME,
    "ocrbench": OCRBench,
    "textvqa": TextVQA,
}


def benchmark(name: str, options: Mapping[str, str]) -> Benchmark:
    """A benchmark, or part of one, by name: "pope", "pope/random"."""
    kind, slash, part = name.partition("/")
    found = BENCHMARKS[kind]
    if slash and part not in found.parts:
        can = " or ".join(f"{kind}/{one}" for one in found.parts) or kind
        raise TaskError(f"unknown task {name!r}: type {can}")
    return found(name, options)
