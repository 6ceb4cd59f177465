"""Tasks whose samples are rows of a published data set; `hf:REPO` for any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError
from gripvlm.tasks.metrics import get_metric
from gripvlm.tasks.rows import Source, load_rows

__all__ = ["BY_LETTER", "HubTask", "TableTask", "commonest", "lettered"]

BY_LETTER = "\nAnswer with the option's letter from the given choices directly."


def commonest(answers: Sequence[str]) -> str:
    """The answer that was given most often, the first of those where several were."""
    return Counter(answers).most_common(1)[0][0]


def lettered(options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """("A. cat\\nB. dog", ("A", "B")) from the texts of the options."""
    letters = tuple(chr(ord("A") + i) for i in range(len(options)))
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)), letters


class TableTask(Task):
    """Rows of a data set, one question each.

    Subclasses name their `columns` and make a sample of a row.

    Attributes:
        columns: what a row must have besides `image`.
        suffix: what the prompt says after each question.
        source: where the rows come from.
        shared_pictures: several rows may show the same picture, and no column says which.
    """

    columns: tuple[str, ...] = ()
    image: str = "image"
    suffix: str = ""
    shared_pictures: bool = False

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, source.task

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The fields of a row's `Sample`, None where the row is none of this task's.

        By default `id` is the row's number, and `image_id` is the same for equal files.
        """
        raise NotImplementedError

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        rows = load_rows(self.source, self.image, self.columns)
        samples = []
        for index, row in enumerate(rows.texts()):
            # Where no column names the image, equal files are the same one: intervals are clustered by it.
            image_id = rows.fingerprint(index) if self.shared_pictures else f"row {index}"
            # Some data sets also hold questions without a picture: there is nothing to prune for them.
            fields = self.fields(index, row) if image_id else None
            if fields is not None:
                own = {"id": str(index), "pictures": (partial(rows.picture, index),), "image_id": image_id}
                samples.append(Sample(**own | fields))
        if not samples:
            raise TaskError(f"{self.name}: {self.source} has no questions for it: is this the right data set?")
        return tuple(samples)

    def prompt(self, sample: Sample) -> str:
        return sample.question + self.suffix

    def refused(self, index: int, why: str) -> TaskError:
        """The error for a row that is not as it should be."""
        return TaskError(f"{self.name}: row {index} of {self.source} {why}")


class HubTask(TableTask):
    """Any data set of questions about one picture each, `hf:REPO,split=...`; a folder where REPO begins with . ~ or /.

    Options: config, split; the columns image, question, answer and choices (by default "image", "question", "answer"
    and none); metric, one of `METRICS`. With choices the prompt lists them by letter and asks for the letter. An
    answer may be a text, a list of texts, or with choices their index, letter or text. Rows without a picture are
    left out; rows with the same picture are clustered.
    """

    max_new_tokens = 32
    shared_pictures = True

    def __init__(self, spec: str, repo: str, options: Mapping[str, str]) -> None:
        local = Path(repo).expanduser() if repo.startswith((".", "~", "/")) else None
        chosen = frozenset(options) & {"config", "split"}
        super().__init__(Source(f"hf:{repo}", repo, options.get("config"), options.get("split"), local, chosen))
        self.name = spec
        self.image, self.question, self.answer = (options.get(key, key) for key in ("image", "question", "answer"))
        self.choices = options.get("choices")
        self.columns = (self.question, self.answer, *([self.choices] if self.choices else []))
        if self.image in self.columns:
            raise TaskError(f"{spec}: the column {self.image!r} cannot be the picture and a text: name another, image=")
        self.metric = get_metric(options.get("metric", "letter" if self.choices else "choice"))
        self.suffix = BY_LETTER if self.choices else ""

    def score(self, prediction: str, sample: Sample) -> float:
        return self.metric(prediction, sample)

    def fields(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        question, given = row[self.question], row[self.answer]
        if not isinstance(question, str) or not question.strip():
            raise self.refused(index, f"has no text in {self.question!r}: name a column of texts, question=")
        answers = [str(answer) for answer in (given if isinstance(given, list) else [given]) if answer is not None]
        if not any(answer.strip() for answer in answers):
            raise self.refused(index, f"has no text in {self.answer!r}: name a column of texts, answer=")
        letters: tuple[str, ...] = ()
        if self.choices:
            options = row[self.choices]
            if not isinstance(options, list) or not options:
                raise self.refused(index, f"has no list in {self.choices!r}: name a column of lists, choices=")
            listed, letters = lettered([str(option) for option in options])
            question, answers = f"{question}\n{listed}", [self._letter(index, given, options, letters)]
        several = tuple(answers) if len(answers) > 1 else ()
        return {"question": question, "answer": commonest(answers), "choices": letters, "answers": several}

    def _letter(self, index: int, given: Any, options: Sequence[Any], letters: tuple[str, ...]) -> str:
        text, texts = str(given).strip(), [str(option).strip() for option in options]
        # The text of an option first: an option may itself be "B" or "1".
        if isinstance(given, str) and text in texts:
            return letters[texts.index(text)]
        if text.isdecimal() and int(text) < len(letters):
            return letters[int(text)]
        if text.upper() in letters:
            return text.upper()
        raise self.refused(index, f"has the answer {given!r}, which is no index, letter or text of {options!r}")
