"""The report: what every page must have, what is left out and why, and that it stands alone."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from html.parser import HTMLParser

import pytest

from eval_cases import run
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.errors import GripError
from gripvlm.eval import read_results, samples_path
from gripvlm.report import build, report
from gripvlm.report.build import code, methods_to_show, questions_to_show, text, verdict
from gripvlm.report.plots import styles_of
from gripvlm.report.points import Point, comparisons
from gripvlm.tasks import lab_tasks
from tiny_lab import tiny_lab, write_sample
from tiny_results import KEEPS, made_up


class Page(HTMLParser):
    """Tags, their attributes, and the text of table cells."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href", "xlink:href", "srcset") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("made") / "run.json")


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    """A page of made-up answers: (HTML, Markdown, folder)."""
    out = tmp_path_factory.mktemp("page")
    report([made], out)
    return (out / "index.html").read_text(), (out / "report.md").read_text(), out


def test_the_page_stands_alone(page):
    html = Page(page[0])
    assert not {"script", "link", "iframe", "object", "embed", "svg"} & set(html.tags)
    assert all(source.startswith(("#", "data:")) for source in html.sources)
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page[0])
    assert {source[1:] for source in html.sources if source.startswith("#")} <= set(html.ids)
    assert html.tags.count("h1") == 1
    assert 'name="viewport"' in page[0]
    assert "@media print" in page[0]


def test_every_plot_has_the_full_model_random_and_grid(page):
    html, _, out = page
    assert html.count('src="data:image/svg+xml;base64,') == 4  # mean, time, two tasks
    for name in ("mean", "time", "reading", "text"):
        labels = re.findall(r">([^<>]+)</text>", (out / "figures" / f"run-{name}.svg").read_text())
        assert {"full", "mine", "random", "grid", "no image"} <= set(labels)


def test_every_point_has_its_command_interval_and_hardware(page, made):
    html, words, _ = page
    head = read_results(made).header
    for method, arms in (("random", "random:seed=0,random:seed=1"), ("mine", "mine")):
        for keep in KEEPS:
            command = (
                f"gripvlm eval --model m --tasks lab/reading,lab/text --pruners {arms} --keep {keep} --seed 0 --batch 4"
            )
            assert command in html
            assert command in words
            assert f"{method} at {100 * keep:g} %: " in html
    assert head["hardware"]["processor"] in html
    assert head["git"]["commit"][:10] in html


def test_the_tables_say_what_the_results_say(page, made):
    results = read_results(made)
    row = next(row for row in results.means if row["pruner"] == "mine" and row["keep"] == 0.1)
    cell = f"{100 * row['score']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    assert re.search(rf"\| mine \| 10 % \| 9\.8 \| 25 \| {re.escape(cell)} \|", page[1])
    for part in (
        "Relative accuracy",
        "Differences from random",
        "Each seed's mean score",
        "On the frontier of score",
    ):
        assert part in page[0]
        assert part in page[1]
    starred = re.search(r"\| mine \| \+\S+\\\* \[", page[1])
    assert starred, "a difference this large is beyond chance"
    assert "Holm's correction for all 6 differences" in page[1]


def test_markdown_names_files_that_are_there(page):
    _, words, out = page
    named = re.findall(r"!\[.*?\]\((.*?)\)", words)
    assert len(named) == 4
    assert all((out / name).exists() for name in named)
    assert "<svg " in (out / named[0]).read_text()
    for table in re.findall(r"(?:^\|.*\n)+", words, re.M):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_without_answers_what_needs_them_is_left_out_and_said(tmp_path):
    bare = made_up(tmp_path / "bare.json", answers=False)
    report([bare], tmp_path / "page")
    html = (tmp_path / "page" / "index.html").read_text()
    assert "need every answer" in html
    assert "bare.samples.jsonl" in html
    assert "Relative accuracy:" not in html
    assert Page(html).tags.count("img") == 4


def test_old_results_say_why_there_are_no_pictures(page):
    assert "do not record which tokens were kept" in page[0]


def test_runs_of_the_same_questions_are_shown_together_without_their_times(made, tmp_path):
    more = made_up(tmp_path / "more.json", arms=(("extra", 0.7),))
    other = made_up(tmp_path / "other.json", weights="others")
    found = comparisons([read_results(path) for path in (made, more, other)])
    assert [one.name for one in found] == ["run and more", "other"]
    assert {p.method for p in found[0].points} == {"full", "random", "grid", "mine", "extra"}
    report([made, more], tmp_path / "page")
    html = (tmp_path / "page" / "index.html").read_text()
    assert "On the frontier of score and time" not in html
    assert "Each file's times are divided by its own full model's" in html


def test_times_are_ratios_to_the_full_model_of_their_own_file(made):
    (one,) = comparisons([read_results(made)])
    ratios = {p.keep: p.mean["ratio"] for p in one.points if p.method == "grid"}
    assert ratios == pytest.approx({keep: 0.5 + 0.5 * keep for keep in KEEPS})
    assert next(p.mean["ratio"] for p in one.points if p.full) == pytest.approx(1)


def test_a_baseline_that_was_not_measured_is_said_and_the_rest_is_shown(made, tmp_path):
    path = made_up(tmp_path / "r.json", arms=(("mine", 0.7), ("grid", 0.6)), model="another")
    bare = made_up(tmp_path / "bare.json", arms=(), model="a third")
    report([path, made, bare], tmp_path / "page")
    words = (tmp_path / "page" / "report.md").read_text()
    assert words.count("Baseline missing") == 2
    assert "Baseline missing: `random` was not measured here" in words
    assert "Baseline missing: `random` and `grid` were not measured here" in words
    assert "No method was measured beside the full model." in words
    assert "Left out: `random` was not measured here." in words
    assert "### Differences from random: run" in words
    assert ">mine</text>" in (tmp_path / "page" / "figures" / "r-mean.svg").read_text()
    with pytest.raises(GripError, match="no method 'odd' to compare with: use one of full, grid, mine, random"):
        report([made], tmp_path / "none", baseline="odd")
    assert not (tmp_path / "none").exists()


def test_the_best_methods_are_coloured_and_the_others_are_a_crowd(tmp_path):
    arms = (*((f"m{i}", 0.4 + 0.02 * i) for i in range(12)), ("random", 0.3), ("grid", 0.3))
    (one,) = comparisons([read_results(made_up(tmp_path / "r.json", arms=arms, pictures=30))])
    styles = styles_of(one.ranked)
    other = {name for name, style in styles.items() if style == styles["m0"]}
    assert len(styles) == 14
    assert len(other) == 6
    apart = {(style.marker, style.linestyle) for name, style in styles.items() if name not in other}
    assert len(apart) == 8, "told apart by colour alone"
    report([tmp_path / "r.json"], tmp_path / "page")
    labels = re.findall(r">([^<>]+)</text>", (tmp_path / "page" / "figures" / "r-mean.svg").read_text())
    assert labels.count("other methods") == 1
    assert "m0" not in labels


def test_budgets_that_one_method_alone_has_colour_nobody(tmp_path):
    """`many` is the worst at the common budgets, and has more of them than all others."""
    arms = (*((f"m{i}", 0.7 + 0.02 * i) for i in range(6)), ("random", 0.5), ("grid", 0.5))
    common = made_up(tmp_path / "r.json", arms=arms, keeps=(0.5, 0.1), pictures=20)
    more = made_up(tmp_path / "s.json", arms=(("many", 0.4),), keeps=(0.5, 0.4, 0.3, 0.2, 0.1), pictures=20)
    (one,) = comparisons([read_results(common), read_results(more)])
    styles = styles_of(one.ranked)
    assert [name for name in styles if styles[name] == styles["many"]] == ["many"], "the only grey one"


def test_few_pictures_give_a_page_without_intervals(tmp_path):
    report([made_up(tmp_path / "r.json", pictures=1)], tmp_path / "page")
    words = (tmp_path / "page" / "report.md").read_text()
    assert "nan" not in words
    assert re.search(r"\| mine \| 10 % \| 9\.8 \| 25 \| [\d.]+ \|", words)


def test_a_script_names_its_own_command(made, tmp_path):
    script = read_results(made_up(tmp_path / "r.json", command="grip_study.py warmup=folder"))
    assert Point("warmup", {"mean": {"keep": 0.1}}, {"warmup": 0.5}, script).command() == "grip_study.py warmup=folder"
    counted = read_results(made_up(tmp_path / "s.json", limit=30, command="python -m gripvlm eval --tasks lab"))
    point = Point("grid", {"mean": {"keep": 64}}, {"grid": 0.5}, counted)
    assert point.command().endswith("--pruners grid --keep 64 --limit 30 --seed 0 --batch 4")


def test_pictures_show_failures_first(tmp_path, monkeypatch, capsys):
    """A real run of the tiny model: its answers, its pictures, through the command line."""
    monkeypatch.setattr(lab, "load", lambda name: tiny_lab())
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", write_sample(tmp_path / "sample", pictures=6))
    out = tmp_path / "r.json"
    run(out, tasks="lab/existence", pruners=["random", "grid", "norm"], keeps=[0.1], model_name="lab", batch_size=6)
    content = json.loads(out.read_text())
    records = [json.loads(line) for line in samples_path(out).read_text().splitlines()]
    wanted = [r["id"] for r in records if r.get("pruner") == "full"][3]
    for record in records:  # the full model is right, norm is wrong at one question only
        if "score" in record:
            record["score"] = float(not (record["pruner"] in ("norm",) and record["id"] == wanted))
            record["score"] *= record["pruner"] != "grid"
    for row in [*content["rows"], *content["means"]]:
        scores = [r["score"] for r in records if r.get("pruner") == row["pruner"]]
        row["score"] = sum(scores) / len(scores)
    out.write_text(json.dumps(content))
    samples_path(out).write_text("".join(json.dumps(record) + "\n" for record in records))
    (one,) = comparisons([read_results(out)])
    shown = [next(p for p in one.points if p.method == name) for name in ("norm", "random", "grid")]
    chosen = questions_to_show(one, shown)
    assert (chosen[0].id, chosen[0].lost) == (wanted, True)
    assert [question.lost for question in chosen] == [True] + [False] * 3
    assert main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    html = (tmp_path / "page" / "index.html").read_text()
    assert html.count('src="data:image/jpeg;base64,') == 4 * 3
    assert html.index("(<strong>wrong</strong>)") < html.index("(<strong>right</strong>)")
    assert "26 of 256 tokens" in html
    assert len(list((tmp_path / "page" / "figures").glob("*.jpg"))) == 12
    assert main(["report", str(out), "--out", str(tmp_path / "bare"), "--no-pictures"]) == 0
    assert "data:image/jpeg" not in (tmp_path / "bare" / "index.html").read_text()
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", tmp_path / "gone")
    assert main(["report", str(out), "--out", str(tmp_path / "without")]) == 0
    assert "Pictures are left out: " in (tmp_path / "without" / "index.html").read_text()


def test_the_best_method_that_has_masks_is_drawn(tmp_path):
    """`mine` is the best and drops inside the language model."""
    out = made_up(
        tmp_path / "r.json", arms=(("random", 0.5), ("grid", 0.5), ("other", 0.6), ("mine", 0.75)), pictures=20
    )
    lines = [json.loads(line) for line in samples_path(out).read_text().splitlines()]
    for record in lines[1:]:
        record |= {"layers": [[256, 8]]} if record["pruner"] == "mine" else {"kept": []}
    samples_path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = comparisons([read_results(out)])
    assert max((p for p in one.points if p.keep == 0.1), key=lambda p: p.mean["score"]).method == "mine"
    assert [p.method for p in methods_to_show(one)] == ["other", "random", "grid"]


def test_a_score_between_is_partly_right():
    assert [verdict(score) for score in (1.0, 0.6, 0.0)] == ["right", "partly right, 0.6", "wrong"]


HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/a.png)",
    "a | b `c` ``d``",
    "[x](javascript:1) *b*",
    "_a_ \\ &lt;",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_what_files_say_is_never_markup(words):
    """In a table, as plain text, and as code: the reader sees the words themselves."""
    source = f"| {text(words)} |\n| --- |\n| {text(words)} |\n\n{text(words)}\n\n{code(words)}\n"
    body = build.Page([], "random", False).html(source, "t").split("<main>")[1]
    assert not set(re.findall(r"<(\w+)", body)) - {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "code"}
    assert unescape(body).count(words) == 4


def test_figures_of_one_name_do_not_replace_one_another():
    page = build.Page([], "random", False)
    names = [page._file(content, "a", name, "jpg") for content, name in ((b"1", "q/1"), (b"2", "q-1"), (b"1", "q 1"))]
    assert names == ["figures/a-q-1.jpg", "figures/a-q-1-2.jpg", "figures/a-q-1.jpg"]
    assert page.files == {"figures/a-q-1.jpg": b"1", "figures/a-q-1-2.jpg": b"2"}
    assert len(page._file(b"3", "q" * 300, "jpg")) < 200


def test_without_matplotlib_the_page_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report([made], tmp_path / "page")
    words = (tmp_path / "page" / "report.md").read_text()
    assert "Plots are left out: plots need matplotlib: pip install 'gripvlm\\[plot\\]'." in words
    assert "| mine | 10 % |" in words
    assert not (tmp_path / "page" / "figures").exists()


def test_other_json_files_are_left_out_and_said(made, tmp_path, capsys):
    other = tmp_path / "families.json"
    other.write_text('{"rows": []}')
    assert main(["report", str(made), str(other), "--out", str(tmp_path / "page")]) == 0
    assert "families.json is not a result of `gripvlm eval`: ignored" in " ".join(capsys.readouterr().err.split())
    assert main(["report", str(other), "--out", str(tmp_path / "none")]) == 2
    assert "none of these files" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_conclusion_stands_on_top(tmp_path):
    """The fewest tokens whose interval reaches the full model's score, beside chance at the same budget."""
    file = made_up(tmp_path / "r.json", arms=(("random", 0.5), ("grid", 0.6), ("mine", 1.0)))
    report([file], tmp_path / "page", pictures=False)
    words = (tmp_path / "page" / "report.md").read_text()
    means = json.loads(file.read_text())["means"]
    full = next(row for row in means if row["pruner"] == "full")
    reach = [row for row in means if row is not full and row["ci_high"] >= full["score"]]
    best = min(reach, key=lambda row: (row["keep_fraction"], -row["score"]))
    line = next(line for line in words.splitlines() if line.startswith("**In short**"))
    assert f"with all tokens {100 * full['score']:.1f} [" in line
    assert re.search(rf"reaches that: {best['pruner']} at 50 %, 128 tokens, {100 * best['score']:.1f} \[", line)
    luck = next(row for row in means if (row["pruner"], row["keep"]) == ("random", best["keep"]))
    assert f"`random` at this budget {100 * luck['score']:.1f} [" in line
    assert words.index("**In short**") < words.index("- model:")


def test_a_conclusion_says_where_nothing_is_enough(page):
    assert re.search(r"\*\*In short\*\*: with all tokens .*At none of the \d+ settings", page[1])
