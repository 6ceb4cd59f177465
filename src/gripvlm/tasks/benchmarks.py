"""Six published benchmarks with their prompts and their metrics; docs/benchmarks.md has the table.

Data sets, prompts and rules of scoring are those of lmms-eval 0.7.3, so that numbers can be compared; where it and a
benchmark's own code differ, the class says which is followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, TaskError
from gripvlm.tasks.metrics import (
    contains,
    contains_verbatim,
    mme_answer,
    option_letter,
    pair_accuracy,
    pope_answer,
    yes_no_summary,
)
from gripvlm.tasks.rows import Source
from gripvlm.tasks.table_task import BY_LETTER, TableTask, commonest, lettered
from gripvlm.tasks.vqa_answer import vqa_accuracy

__all__ = ["BENCHMARKS", "benchmark"]

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
        # A single file has no splits, so that the task's own must not be looked for in it.
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
        self.spec = f"{name}:{','.join(f'{key}={value}' for key, value in options.items())}" if options else name
        # Who names the split means it, for training on it too.
        self.held_out = "split" not in options
        # Scores of another split must not be taken for the published one's.
        if options.get("split", self.split) != self.split:
            self.name = f"{name}:split={options['split']}"

    def yes_or_no(self, index: int, row: Mapping[str, Any], categories: Sequence[str]) -> tuple[str, str]:
        """(category, "Yes" or "No") of a row.

        Raises:
            TaskError: they are something else.
        """
        category, answer = str(row["category"]), str(row["answer"]).strip().rstrip(".").capitalize()
        if category not in categories or answer not in ("Yes", "No"):
            raise self.refused(index, f"has the category {category!r} and the answer {str(row['answer'])!r}")
        return category, answer


class POPE(Benchmark):
    """Is this object in the picture? Yes or no; the absent ones drawn at random, from the popular or the likely.

    Source: arXiv 2305.10355. An answer is read as POPE's own code does (`pope_answer`), which differs from lmms-eval:
    (1) there anything but the bare word is wrong, here what is not "no" is "yes"; (2) its pope_yes_ratio counts the
    true answers, here `yes_share` counts the model's, as POPE defines it.
    """

    repo, parts = "lmms-lab-encoder/POPE", ("random", "popular", "adversarial")
    columns = ("question_id", "question", "answer", "image_source", "category")
    suffix, max_new_tokens = SHORT, 128

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        category, answer = self.yes_or_no(index, row, self.parts)
        if self.part not in ("", category):
            return None
        return {
            # Question numbers start again in each category.
            "id": f"{category}/{row['question_id']}",
            "question": row["question"].strip(),
            "answer": answer,
            "family": category,
            "image_id": str(row["image_source"]),
        }

    def score(self, prediction: str, sample: Sample) -> float:
        return float(pope_answer(prediction) == sample.answer.lower())

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """accuracy, f1, precision, recall, yes_share; with several categories also accuracy_ and f1_ of each."""
        answered = [(pope_answer(r["prediction"]) == "yes", sample) for r, sample in self.with_samples(records)]
        summary = _pope_summary(answered)
        categories = [part for part in self.parts if any(sample.family == part for _, sample in answered)]
        for category in categories if len(categories) > 1 else []:
            part = _pope_summary([(yes, sample) for yes, sample in answered if sample.family == category])
            summary |= {f"{name}_{category}": part[name] for name in ("accuracy", "f1")}
        return summary


def _pope_summary(answered: list[tuple[bool, Sample]]) -> dict[str, float]:
    """Of samples with whether the answer was yes."""
    predicted, true = [yes for yes, _ in answered], [sample.answer == "Yes" for _, sample in answered]
    right = sum(a == b for a, b in zip(predicted, true, strict=True))
    return {"accuracy": right / len(answered) if answered else 0.0, **yes_no_summary(predicted, true)}


class _ByLetter(Benchmark):
    """Options are listed with letters, and the answer is one of them (`option_letter`)."""

    suffix, shared_pictures = BY_LETTER, True

    def lettered(self, question: str, options: Sequence[str], answer: int) -> dict[str, Any]:
        """The fields of a sample that every such row has."""
        listed, letters = lettered(options)
        return {"question": f"{question}\n{listed}", "answer": letters[answer], "choices": letters}

    def score(self, prediction: str, sample: Sample) -> float:
        return float(option_letter(prediction, len(sample.choices)) == sample.answer)


class ScienceQA(_ByLetter):
    """School questions with two to five options, those that have a picture.

    Source: arXiv 2209.09513; the options are asked for by letter, as in LLaVA (`option_letter`).
    """

    repo, config = "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"
    columns = ("question", "choices", "answer", "hint")

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        fields = self.lettered(f"{hint}{row['question']}", row["choices"], int(row["answer"]))
        return fields | {"family": str(row.get("subject") or "")}


class AI2D(_ByLetter):
    """Questions about diagrams from school books, four options asked for by letter (`option_letter`).

    Source: arXiv 1603.07396.
    """

    repo, columns = "lmms-lab-encoder/ai2d", ("question", "options", "answer")

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.lettered(row["question"], row["options"], int(row["answer"]))


class MME(Benchmark):
    """Two questions about each picture, one whose answer is yes and one whose answer is no, in 14 subtasks.

    A subtask's score is 100 x (accuracy + accuracy+), where accuracy+ is the share of pictures with both questions
    right; perception is the sum over ten subtasks (2000 at most), cognition over four (800 at most).

    Source: arXiv 2306.13394, section 2.2, and its calculation.py (`mme_answer`).
    """

    PERCEPTION: tuple[str, ...] = ("existence", "count", "position", "color", "posters", "celebrity", "scene")
    PERCEPTION += ("landmark", "artwork", "OCR")
    COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

    repo, parts = "lmms-lab-encoder/MME", ("perception", "cognition")
    columns = ("question_id", "question", "answer", "category")
    suffix = SHORT

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        category, answer = self.yes_or_no(index, row, self.PERCEPTION + self.COGNITION)
        if self.part and (category in self.PERCEPTION) != (self.part == "perception"):
            return None
        return {
            # `question_id` names the picture: both questions of a pair have the same.
            "id": f"{category}/{row['question_id']}/{index}",
            "question": row["question"].strip().replace(" Please answer yes or no.", ""),
            "answer": answer,
            "family": category,
            "pair": str(row["question_id"]),
            "image_id": f"{category}/{row['question_id']}",
        }

    def score(self, prediction: str, sample: Sample) -> float:
        return float(mme_answer(prediction) == sample.answer.lower())

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """accuracy_plus, each subtask's score by its name, perception and cognition; from whole pairs only.

        A total is there only where all of its subtasks are.
        """
        by_image: dict[tuple[str, str], list[float]] = {}
        for record, sample in self.with_samples(records):
            by_image.setdefault((sample.family, sample.image_id), []).append(record["score"])
        # Half a pair says nothing about accuracy+, so it does not count for the accuracy beside it either.
        pairs = [(subtask, pair) for (subtask, _), pair in by_image.items() if len(pair) == 2]
        summary = pair_accuracy([pair for _, pair in pairs])
        for subtask in self.PERCEPTION + self.COGNITION:
            own = [pair for name, pair in pairs if name == subtask]
            if own:
                accuracy = sum(map(sum, own)) / (2 * len(own))
                summary[subtask] = 100 * (accuracy + pair_accuracy(own)["accuracy_plus"])
        for total, subtasks in (("perception", self.PERCEPTION), ("cognition", self.COGNITION)):
            if all(subtask in summary for subtask in subtasks):
                summary[total] = sum(summary[subtask] for subtask in subtasks)
        return summary


class OCRBench(Benchmark):
    """Reading: words, scenes, documents, receipts, formulas. An answer is right where it contains an accepted one.

    Source: arXiv 2305.07895 (`contains`; for the formulas of HME100k `contains_verbatim`).
    """

    repo, max_new_tokens = "echo840/OCRBench", 128
    columns = ("dataset", "question", "question_type", "answer")
    shared_pictures = True

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        answers = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
        return {
            "id": f"{row['dataset']}/{index}",
            "question": row["question"].strip(),
            "answer": answers[0],
            "family": str(row["question_type"]),
            "answers": tuple(answers),
        }

    def score(self, prediction: str, sample: Sample) -> float:
        rule = contains_verbatim if sample.id.startswith("HME100k/") else contains
        return rule(prediction, sample.accepted)

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """final_score, 1000 x the mean (how many of the 1000 are right), and the accuracy of each kind of question."""
        by_kind: dict[str, list[float]] = {}
        scores = []
        for record, sample in self.with_samples(records):
            by_kind.setdefault(sample.family, []).append(record["score"])
            scores.append(record["score"])
        if not scores:
            return {}
        accuracies = {kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())}
        return {"final_score": 1000 * sum(scores) / len(scores)} | accuracies


class TextVQA(Benchmark):
    """Questions whose answer is written in the picture, with ten people's answers each (`vqa_accuracy`).

    Source: arXiv 1904.08920; the prompt is lmms-eval's, without the OCR tokens that LLaVA's own script adds.
    """

    repo, split = "lmms-lab-encoder/textvqa", "validation"
    columns = ("image_id", "question_id", "question", "answers")
    suffix, max_new_tokens = SHORT, 32

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        answers = [answer for answer in row["answers"] or [] if answer]
        if not answers:
            raise self.refused(index, "has no answers: the test split keeps them back, type split=validation")
        return {
            "id": str(row["question_id"]),
            # As lmms-eval writes them: the data set has them in lower case.
            "question": row["question"].capitalize(),
            "answer": commonest(answers),
            "image_id": str(row["image_id"]),
            "answers": tuple(answers),
        }

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
    cls = BENCHMARKS[kind]
    if slash and part not in cls.parts:
        allowed = " or ".join(f"{kind}/{part}" for part in cls.parts) or kind
        raise TaskError(f"unknown task {name!r}: type {allowed}")
    return cls(name, options)
