"""gripvlm as a model of lmms-eval, and our metrics and prompts beside lmms-eval's own.

Needs an environment with lmms-eval: `make test-lmms` builds it and runs this file.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gripvlm.errors import GripError
from gripvlm.eval import evaluate
from gripvlm.lab import SAMPLE
from gripvlm.tasks import JsonlTask, get_tasks
from gripvlm.tasks.benchmarks import AI2D, MME, OCRBench, ScienceQA
from gripvlm.tasks.metrics import mme_answer
from gripvlm.tasks.vqa_answer import _CONTRACTIONS, _WITHOUT, vqa_accuracy, vqa_normalise
from tiny_benchmarks import AI2D_ROWS, OCRBENCH_ROWS, SCIENCEQA_ROWS, TEXTVQA_ROWS, mme_rows, pope_rows, write_all

pytestmark = pytest.mark.lmms
pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-lmms")

UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"])] if doc["image"] else []

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"accuracy": float(results[0].strip().lower() == doc["answer"].lower())}
"""

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
task: gripvlm_lab
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false, until: ["\\n\\n"]}}
process_results: !function utils.results
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task of lmms-eval: twelve of the lab's questions about what there is."""
    folder = tmp_path_factory.mktemp("task")
    rows = [json.loads(line) for line in (SAMPLE / "questions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["family"] == "existence"][:12]
    for row in rows:
        row["image"] = str(SAMPLE / "images" / row["image"])
    lines = [json.dumps({key: row[key] for key in ("image", "question", "answer")}) + "\n" for row in rows]
    (folder / "questions.jsonl").write_text("".join(lines))
    (folder / "utils.py").write_text(UTILS)
    (folder / "gripvlm_lab.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return folder


def lmms_eval(task: Path, out: Path, model_args: str) -> tuple[dict, list[str], str]:
    """(results, answers in the order of the questions, what was printed) of one command."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "gripvlm", "--model_args", model_args, "--tasks"]
    command += ["gripvlm_lab", "--include_path", str(task), "--batch_size", "5", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output_path", str(out), "--log_samples"], capture_output=True, text=True, timeout=600
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_*.jsonl")
    records = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda record: record["doc_id"])
    return json.loads(results.read_text()), [record["filtered_resps"] for record in records], printed


@pytest.mark.slow
def test_the_command_gives_what_our_own_runner_gives(task, tmp_path):
    from gripvlm import lab

    found, answers, printed = lmms_eval(task, tmp_path / "theirs", "pretrained=lab,pruner=grid,keep=64")
    questions, out = JsonlTask(task / "questions.jsonl"), tmp_path / "ours.json"
    ours = evaluate(*lab.load(), questions, ["grid"], [64], blind=False, out=out)
    row = next(row for row in ours["rows"] if row["pruner"] == "grid")
    assert row["tokens"] == 64
    assert "grid kept 25.0 % of the visual tokens of 12 prompts" in printed
    assert found["results"]["gripvlm_lab"]["accuracy,none"] == pytest.approx(row["score"])
    lines = map(json.loads, out.with_name(ours["samples"]).read_text().splitlines())
    said = {record["id"]: record["prediction"] for record in lines if record.get("pruner") == "grid"}
    assert answers == [said[sample.id] for sample in questions.samples]


@pytest.fixture(scope="module")
def grip_vlm():
    from lmms_eval.models import get_model

    return get_model("gripvlm")


@pytest.fixture(scope="module")
def lm(grip_vlm):
    return grip_vlm.create_from_arg_string(
        "pretrained=lab,pruner=grid,keep=10%,dtype=float32", {"batch_size": 2, "device": "cpu"}
    )


def request(lm, text, pictures, **settings):
    """A request as lmms-eval makes it."""
    docs = lm.task_dict.setdefault("t", {}).setdefault("test", {})
    number = len(docs)
    docs[number] = pictures
    return SimpleNamespace(args=(text, settings, lambda doc: doc, number, "t", "test"), task_name="t")


def test_answers_come_back_in_order_whatever_is_batched(lm):
    pictures = [Image.open(path) for path in sorted((SAMPLE / "images").iterdir())[:3]]
    plan = [("is there a bus?", pictures[:1], 4), ("is there a cat?", [], 4), ("what is there?", pictures[1:2], 6)]
    plan += [("is there a truck?", pictures[2:], 4), ("is there a bus?", pictures[1:], 4)]
    requests = [request(lm, text, shown, max_new_tokens=length) for text, shown, length in plan]
    together = lm.generate_until(requests)
    assert together == [lm.generate_until([one])[0] for one in requests]
    assert lm.kept / lm.seen == pytest.approx(26 / 256)  # 10 % of 256, rounded


def test_stop_words_cut_the_answer(lm):
    picture = Image.open(min((SAMPLE / "images").iterdir()))
    (whole,) = lm.generate_until([request(lm, "is there a bus?", [picture], max_new_tokens=6)])
    (cut,) = lm.generate_until([request(lm, "is there a bus?", [picture], max_new_tokens=6, until=[whole[1:]])])
    assert cut == whole[:1]


def test_what_it_cannot_do_is_refused(lm, grip_vlm):
    with pytest.raises(SystemExit, match="t asks for the log-likelihood"):
        lm.loglikelihood([request(lm, "q", [])])
    with pytest.raises(SystemExit, match="several rounds"):
        lm.generate_until_multi_round([request(lm, "q", [])])
    with pytest.raises(SystemExit, match="shows a str in question"):
        lm.generate_until([request(lm, "q", ["video.mp4"])])
    for given_, complaint in (
        ({}, "pretrained=lab"),
        ({"pretrained": "lab", "keeps": 3}, "'keeps', which gripvlm does not know"),
        ({"pretrained": "lab", "pruner": "gird", "keep": 3}, "grid"),
        ({"pretrained": "lab", "pruner": "grid"}, "needs a budget"),
        ({"pretrained": "lab", "pruner": "grid", "keep": 3, "dtype": "int8"}, "use one of auto, float32"),
        ({"pretrained": "lab", "batch_size": "auto"}, "type a number"),
    ):
        with pytest.raises(GripError, match=complaint):
            grip_vlm(**given_)


LIKE_FILELOCK_4_3 = """
import builtins

plain = builtins.__import__

def hiding(name, names=None, *rest, **more):
    if name == "filelock._api" and (names or {}).get("__name__") == "lmms_eval.evaluator":
        raise ModuleNotFoundError(f"No module named {name!r}")
    return plain(name, names, *rest, **more)

builtins.__import__ = hiding
"""


def run(task, out, model_args, **environment):
    command = [sys.executable, "-m", "lmms_eval", "--model", "gripvlm", "--model_args", model_args]
    command += ["--tasks", "gripvlm_lab", "--include_path", str(task), "--device", "cpu", "--output_path", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)


@pytest.mark.slow
def test_a_run_without_a_result_does_not_exit_with_0(task, tmp_path):
    """lmms-eval takes exceptions for an answer: it logs them and exits with 0."""
    done = run(task, tmp_path / "a", "pretrained=lab,pruner=gird,keep=64")
    assert done.returncode == 1
    assert "gripvlm: " in done.stderr
    assert "grid" in done.stderr
    (tmp_path / "sitecustomize.py").write_text(LIKE_FILELOCK_4_3)
    done = run(task, tmp_path / "b", "pretrained=lab,pruner=grid,keep=64", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert 'pip install "filelock<4.3"' in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def utils(name: str):
    return importlib.import_module(f"lmms_eval.tasks.{name}.utils")


@given(st.text(alphabet="abten no'.,-/\n35?A()s", max_size=24))
@example("the Coca-Cola company, two bottles. 3.5")
@example("a. b . c.5")
@settings(max_examples=400, deadline=None)
def test_vqa_normalisation_is_theirs(text):
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    assert vqa_normalise(text) == EvalAIAnswerProcessor()(text)


def test_the_contractions_are_theirs():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs = EvalAIAnswerProcessor.CONTRACTIONS
    reached = {key: word for key, word in theirs.items() if key == key.lower() and key != word}
    assert reached == _WITHOUT
    assert len(_CONTRACTIONS) == 92


@given(st.lists(st.sampled_from(["cat", "a cat", "dog", "Two", "2"]), min_size=10, max_size=10), st.sampled_from("cd2"))
@settings(max_examples=50, deadline=None)
def test_vqa_accuracy_is_theirs(answers, first):
    said = {"c": "The cat.", "d": "dog", "2": "two"}[first]
    theirs = utils("textvqa").textvqa_process_results({"answers": list(answers), "question_id": 1}, [said])
    assert vqa_accuracy(said, answers) == pytest.approx(theirs["exact_match"])


@given(st.text(alphabet="yesno. ,It", max_size=8))
def test_mme_reads_answers_as_they_do(said):
    theirs = utils("mme").parse_pred_ans(said)
    assert (mme_answer(said) or "other") == theirs


def test_numbers_of_whole_benchmarks_are_theirs(tmp_path):
    write_all(tmp_path)
    mme = get_tasks(f"mme:path={tmp_path / 'mme'}")[0]
    said = [("yes", "no", "Yes.", "n", "maybe")[(7 * i) % 5] for i in range(len(mme.samples))]
    rows = mme_rows(MME.PERCEPTION + MME.COGNITION)
    theirs: dict[str, list] = {"mme_perception_score": [], "mme_cognition_score": []}
    for row, prediction in zip(rows, said, strict=True):
        for key, value in utils("mme").mme_process_results(row, [prediction]).items():
            theirs[key].append(value)
    records = [
        {"id": sample.id, "score": mme.score(prediction, sample)}
        for sample, prediction in zip(mme.samples, said, strict=True)
    ]
    found = mme.summary(records)
    for name in ("perception", "cognition"):
        assert found[name] == pytest.approx(utils("mme").mme_aggregate_results(theirs[f"mme_{name}_score"]))

    pope, module = get_tasks(f"pope:path={tmp_path / 'pope'}")[0], utils("pope")
    said = [("yes", "no")[i % 3 == 1] for i in range(30)]  # bare words, which both read alike
    results = [module.pope_process_results(row, [one]) for row, one in zip(pope_rows(), said, strict=True)]
    found = pope.summary([{"id": s.id, "prediction": one} for s, one in zip(pope.samples, said, strict=True)])
    for ours, name in (("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        records = [result[f"pope_{name}"] for result in results]
        assert found[ours] == pytest.approx(getattr(module, f"pope_aggregate_{name}")(records))


@pytest.mark.parametrize("said", ["B", "b", "B. a stone", "A", "a stone", "C.", "", "B.x", "Better"])
def test_options_are_read_as_they_do(said, tmp_path):
    write_all(tmp_path)
    science: ScienceQA = get_tasks(f"scienceqa:path={tmp_path / 'scienceqa'}")[0]
    for row, sample in zip(SCIENCEQA_ROWS, science.samples, strict=True):
        theirs = utils("scienceqa").sqa_process_results(row, [said])["exact_match"]
        assert science.score(said, sample) == theirs
    ai2d: AI2D = get_tasks(f"ai2d:path={tmp_path / 'ai2d'}")[0]
    (read,) = utils("ai2d").MultiChoiceRegexFilter().apply([[said]], [AI2D_ROWS[0]])
    assert ai2d.score(said, ai2d.samples[0]) == float(read.strip(" .").lower() == "b")


@pytest.mark.parametrize("said", ["The CENTRE.", "centr", "4 may", "X=a+b", "x=a+b", "X = a\n+ b", "\uff23entre"])
def test_ocrbench_is_scored_as_they_do(said, tmp_path):
    write_all(tmp_path)
    ocr: OCRBench = get_tasks(f"ocrbench:path={tmp_path / 'ocrbench'}")[0]
    for row, sample in zip(OCRBENCH_ROWS, ocr.samples, strict=True):
        theirs = utils("ocrbench").ocrbench_process_results(row, [said])["ocrbench_accuracy"]["score"]
        assert ocr.score(said, sample) == theirs


def test_prompts_are_theirs(tmp_path):
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML with lmms-eval's !function left alone."""

    Loader.add_constructor("!function", lambda loader, node: None)
    write_all(tmp_path)
    places = {
        "pope": ("pope.yaml", pope_rows()[0]),
        "scienceqa": ("scienceqa_img.yaml", SCIENCEQA_ROWS[0]),
        "ai2d": ("ai2d.yaml", AI2D_ROWS[0]),
        "mme": ("mme.yaml", mme_rows(MME.PERCEPTION)[0]),
        "ocrbench": ("ocrbench.yaml", OCRBENCH_ROWS[0]),
        "textvqa": ("_default_template_textvqa_yaml", TEXTVQA_ROWS[0]),
    }
    short = {"scienceqa": "sqa"}
    for one in get_tasks(f"benchmarks:path={tmp_path}"):
        file, row = places[one.name]
        module = utils(one.name)
        folder = Path(module.__file__).parent
        theirs = yaml.load((folder / file).read_text(), Loader)
        ask = getattr(module, f"{short.get(one.name, one.name)}_doc_to_text")
        assert one.prompt(one.samples[0]) == ask(row, theirs["lmms_eval_specific_kwargs"]["default"])
        assert (one.source.repo, one.source.config) == (theirs["dataset_path"], theirs.get("dataset_name"))
