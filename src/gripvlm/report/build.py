"""`gripvlm report`: results files into one Markdown page with its figures, and the same as one HTML file."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gripvlm import lab
from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.eval.records import unpack_masks
from gripvlm.eval.results import read_results
from gripvlm.eval.scores import differences_from, relative
from gripvlm.eval.stats import Estimate
from gripvlm.eval.variants import FULL, ORACLE
from gripvlm.report.overlay import layout_of_images, overlay
from gripvlm.report.plots import ALWAYS, draw, styles_of
from gripvlm.report.points import Comparison, Keep, Point, comparisons, frontier
from gripvlm.report.tables import MEAN, Row, short, unreached
from gripvlm.tasks import get_tasks
from gripvlm.utils import disk

LOST, WON = 6, 3  # questions with pictures: those that a method loses, and those that it wins
SIDE = 400  # pixels of a picture's longer side
NO_MASKS = (
    "these results do not record which tokens were kept (runs before this was recorded, or methods that drop inside "
    "the language model); run the evaluation again to see them"
)
logger = logging.getLogger(__name__)


def report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "Visual-token pruning: results",
    baseline: str = "random",
    pictures: bool = True,
) -> Path:
    """Writes `out/report.md` with its `out/figures/`, and the same as `out/index.html`, which needs no other file.

    Files of one model on the same questions are shown together; the others one after another.

    Args:
        paths: results files; where their samples files are missing, what needs every answer is left out, and the page
            says so.
        baseline: the method that differences are taken from.
        pictures: whether to draw what was kept for some questions.

    Returns:
        The HTML page.

    Raises:
        ResultsError: a file that cannot be read or is not what it should be; nothing is written.
        GripError: no file, the full model is not in one of them, or the baseline is in none (but for `random` and
            `grid`, which the page then names as not measured).
    """
    if not paths:
        raise GripError("no results to report: pass one or more files that `gripvlm eval --out` wrote")
    page = Page(comparisons([read_results(path) for path in paths]), baseline, pictures)
    methods = {point.method for comparison in page.comparisons for point in comparison.points}
    if baseline not in methods and baseline not in ALWAYS:
        raise GripError(f"no method {baseline!r} to compare with: use one of {', '.join(sorted(methods))}")
    # all is made before the first file is written: an error leaves an older page whole
    words = page.markdown(title)
    html = page.html(words, title)
    target = Path(out)
    with disk.one_writer(target, folder=True):
        for name, content in page.files.items():
            disk.write(target / name, content)
        disk.write(target / "report.md", words)
        disk.write(target / "index.html", html)
    return target / "index.html"


class Page:
    """What `report.md.jinja` asks for, and the files of the figures that it shows.

    Args:
        comparisons: in their order on the page.
        baseline: the method that differences are taken from.
        pictures: whether to draw what was kept for some questions.
    """

    def __init__(self, comparisons: Sequence[Comparison], baseline: str, pictures: bool) -> None:
        self.comparisons, self.baseline, self.pictures = comparisons, baseline, pictures
        self.files: dict[str, bytes] = {}

    def markdown(self, title: str) -> str:
        # Markdown is not HTML: the filters `text` and `code` escape what comes from files, not Jinja
        environment = _environment(autoescape=False)
        filters = (text, code, score, verdict, short, unreached)
        environment.filters |= {function.__name__: function for function in filters}
        environment.filters["budget"] = lambda keep: Budget.of(keep).words
        of_lab = any(results.header["model"] in lab.FOLDERS for c in self.comparisons for results in c.results)
        names = {"page": self, "title": title, "full": FULL, "frontier": frontier, "lab": of_lab}
        words = environment.get_template("report.md.jinja").render(names)
        # parts that are left out leave their blank lines behind
        return re.sub(r"\n{3,}", "\n\n", words).strip() + "\n"

    def html(self, words: str, title: str) -> str:
        """The Markdown as one page: styles and figures inside, no script, nothing fetched."""
        from markdown_it import MarkdownIt

        # no raw HTML: what a file says must never become a tag
        reader = MarkdownIt("commonmark", {"html": False}).enable("table")
        tokens = reader.parse(words)
        links = []
        for token, content in pairwise(tokens):
            if token.type == "heading_open":  # CommonMark gives headings no id to link to
                token.attrSet("id", re.sub(r"[^a-z0-9]+", "-", content.content.lower()).strip("-"))
                links += [(token.attrs["id"], content.content)] if token.tag == "h2" else []
            for image in (child for child in token.children or () if child.type == "image"):
                name = str(image.attrs["src"])
                kind = "svg+xml" if name.endswith(".svg") else "jpeg"
                image.attrSet("src", f"data:image/{kind};base64,{base64.b64encode(self.files[name]).decode()}")
        body = reader.renderer.render(tokens, reader.options, {})
        # a wide table scrolls in a frame of its own; content cannot hold a tag, since it is escaped
        body = body.replace("<table>", '<div class="sheet"><table>').replace("</table>", "</table></div>")
        template = _environment(autoescape=True).get_template("page.html.jinja")
        return template.render(title=title, links=links, body=body)

    def missing(self, comparison: Comparison) -> list[str]:
        """What every plot should show and these results have not."""
        present = {point.method.partition(":")[0] for point in comparison.points}
        return [name for name in ALWAYS if name not in present]

    def plots(self, comparison: Comparison) -> tuple[list[str], str]:
        """(paths of the plots: mean over tokens, mean over time, each task; why there are none, or empty)."""
        styles = styles_of(comparison.ranked)
        panels = [(MEAN, "keep_fraction", "mean"), (MEAN, "ratio", "time")]
        # a single task is the mean already
        panels += [(task, "keep_fraction", short(task)) for task in comparison.tasks if len(comparison.tasks) > 1]
        paths = []
        try:
            for task, cost, name in panels:
                svg = draw([point.rows[task] for point in comparison.points], styles, cost)
                paths.append(self._file(svg, comparison.name, name, "svg"))
        except GripError as error:  # no matplotlib: the tables do not need it
            logger.warning("the report has no plots: %s", error)
            return [], str(error)
        return paths, ""

    def relative(self, comparison: Comparison) -> list[tuple[str, list[str]]]:
        """Method and mean of score / full score at each budget; no rows where the full model scores 0 in a task."""
        assert comparison.scores is not None
        estimates = zip(comparison.scores.settings, relative(comparison.scores), strict=True)
        return _by_budget(comparison, {(s.method, s.keep): _cell(e) for s, e in estimates if e is not None})

    def differences(self, comparison: Comparison) -> tuple[int, list[tuple[str, list[str]]]]:
        """How many, and method and difference from the baseline at each budget; a star where Holm's p is below 0.05."""
        assert comparison.scores is not None
        cells = {}
        for difference in differences_from(comparison.scores, self.baseline):
            setting = comparison.scores.settings[difference.setting]
            star = "\\*" if difference.p_holm < 0.05 else ""
            cells[setting.method, setting.keep] = _cell(difference.mean, "+", star)
        return len(cells), _by_budget(comparison, cells)

    def gallery(self, comparison: Comparison) -> tuple[list[Point], list[Question], str]:
        """(methods, questions with pictures, why there are none or empty)."""
        if comparison.scores is None:
            return [], [], "there are no answers to choose from"
        methods = methods_to_show(comparison)
        questions = questions_to_show(comparison, methods) if methods else []
        if not questions:
            return [], [], "no question tells these methods from the full model" if methods else NO_MASKS
        try:
            specs, processor = comparison.results[0].task_specs, _processor(comparison.results[0].header["model"])
            names = dict.fromkeys(question.task for question in questions)
            tasks = {task.name: task for task in get_tasks([specs[name] for name in names])}
            samples = {(name, sample.id): sample for name, task in tasks.items() for sample in task.samples}
            for question in questions:
                question.sample = samples[question.task, question.id]
                for point in methods:
                    question.pictures += self._pictures(comparison, question, point, processor)
        except (GripError, OSError, KeyError) as error:  # the data set or the model is not on this machine
            return [], [], " ".join(str(error).split())
        return methods, questions, ""

    def _pictures(self, comparison: Comparison, question: Question, point: Point, processor: Any) -> Iterator[Picture]:
        """What the method kept of the question's images, a picture for each part of them."""
        images, answer = question.sample.images, point.answers(question.task)[question.id]
        items = unpack_masks(answer["kept"])
        sizes, grids = [image.size for image in images], [item.grid or item.rasters for item in items]
        for part in layout_of_images(processor, sizes, grids, [item.n for item in items]):
            drawn = overlay(images[part.image], part.of(items), part.geometry, caption="")
            # the HTML holds every picture: at full size it would be many megabytes
            drawn.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            drawn.save(buffer, "JPEG", quality=82)
            name = (comparison.name, short(question.task), question.id, point.method, part.name, "jpg")
            title = f"{point.method}, {answer['k']} of {answer['n']} tokens {part.name}".strip()
            yield Picture(title, self._file(buffer.getvalue(), *name), answer)

    def _file(self, content: bytes, *name: str) -> str:
        """Keeps a figure for the page's folder; its path as the page writes it."""
        *words, ending = name
        stem = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")[:150]
        path, number = f"figures/{stem}.{ending}", 1
        # results of the same name, or ids that differ in signs only, must not show one another's pictures
        while self.files.get(path, content) != content:
            number += 1
            path = f"figures/{stem}-{number}.{ending}"
        self.files[path] = content
        return path


def _environment(autoescape: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # StrictUndefined: a misspelt name in a template is an error, not an empty cell
    loader = PackageLoader("gripvlm", "report")
    return Environment(
        loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )


def _by_budget(comparison: Comparison, cells: dict[tuple[str, Keep], str]) -> list[tuple[str, list[str]]]:
    """Methods down, budgets across."""
    rows = [(method, [cells.get((method, keep), "") for keep in comparison.keeps]) for method in comparison.methods]
    # the baseline differs from nothing, and some methods lack a budget
    return [row for row in rows if any(row[1])]


def score(row: Row) -> str:
    """`83.6 [82.0, 85.1]`, in percent."""
    return _cell(Estimate(row["score"], row["ci_low"], row["ci_high"]))


def _cell(estimate: Estimate, sign: str = "", star: str = "") -> str:
    """In percent or points; the interval only where there is one."""
    value = f"{100 * estimate.value:{sign}.1f}{star}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"


def verdict(value: float) -> str:
    """VQA scores and the like are also between wrong and right."""
    return "right" if value >= 1 else "wrong" if value <= 0 else f"partly right, {value:.2g}"


def text(value: object) -> str:
    """What files say as plain words on one line: nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """A code span; its fence is longer than any run of back ticks in it."""
    line = re.sub(r"[\r\n]+", " ", str(value)).strip() or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


# --- pictures of kept tokens ------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """What one method kept of an image, or of a part of it."""

    title: str
    path: str
    answer: dict[str, Any]


@dataclass
class Question:
    """One question to show: whether the best method loses it, the full model's answer, its sample and pictures."""

    task: str
    id: str
    lost: bool
    full: dict[str, Any]
    sample: Any = None
    pictures: list[Picture] = field(default_factory=list)


def methods_to_show(comparison: Comparison) -> list[Point]:
    """At the budget nearest to a tenth: the most accurate whose answers say what was kept, then random and grid.

    Methods that drop inside the language model keep other tokens at each layer, of which there is no one picture.
    """

    def distance(point: Point) -> tuple[float, Any]:
        return abs(np.log(max(point.mean["keep_fraction"], 1e-9) / 0.1)), Budget.of(point.keep).order

    # on a log scale: 5 % is as far from a tenth as 20 %
    near = min(comparison.pruned, key=distance).keep
    points = [point for point in comparison.pruned if point.keep == near and _has_masks(comparison, point)]
    shown = {point.method: point for point in points}
    # the oracle is no method: it knows the evidence that the question is about
    others = [point for point in points if point.method not in (ORACLE, "random", "grid")]
    best = sorted(others, key=lambda point: -point.mean["score"])[:1]
    return [*best, *(shown[name] for name in ("random", "grid") if name in shown)]


def _has_masks(comparison: Comparison, point: Point) -> bool:
    return all("kept" in answer for task in comparison.tasks for answer in point.answers(task).values())


def questions_to_show(comparison: Comparison, methods: Sequence[Point]) -> list[Question]:
    """Questions that the first method loses, tasks in turn, then those that it wins and the last method does not."""
    lost, won = [], []
    for task in comparison.tasks:
        # one rule for all results: a person who picks the pictures picks those that please
        full, best, last = (point.answers(task) for point in (comparison.points[0], methods[0], methods[-1]))
        below = {name for name in best if best[name]["score"] < full[name]["score"]}
        right = {name for name in best if best[name]["score"] >= 1 and (len(methods) == 1 or last[name]["score"] < 1)}
        lost.append([Question(task, name, True, full[name]) for name in best if name in below])
        won.append([Question(task, name, False, full[name]) for name in best if name in right - below])
    return [*_in_turn(lost)[:LOST], *_in_turn(won)[:WON]]


def _in_turn(by_task: list[list[Question]]) -> list[Question]:
    return [question for turn in zip_longest(*by_task) for question in turn if question is not None]


def _processor(model: str) -> Any:
    if model in lab.FOLDERS:
        return lab.load(model)[1]
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise GripError(f"the processor of {model} cannot be loaded here ({str(error).splitlines()[0]})") from None
