"""The command line: what it prints, and that every mistake is one readable paragraph and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from PIL import Image

import gripvlm
from gripvlm import lab
from gripvlm.cli import main, quickstart
from gripvlm.cli.commands import split_pruners
from gripvlm.eval import answer, runner
from gripvlm.grip import pruner as grip
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.tasks import lab_tasks
from places import ROOT
from tiny_lab import tiny_lab, write_sample


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """`lab` is the tiny untrained model with a sample of its own; the working folder is empty."""
    monkeypatch.setattr(lab, "load", lambda name: tiny_lab())
    monkeypatch.setattr(grip, "SHIPPED", tmp_path)
    model, _ = tiny_lab()
    Scorer(ScorerConfig(32, width=16, blocks=1), ModelFingerprint.of(model)).save_pretrained(
        tmp_path / "grip" / "question"
    )
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", write_sample(tmp_path / "sample", pictures=3))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read at import
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.new("RGB", (300, 120), (180, 60, 60)).save("cat.png")
    (tmp_path / "work" / "folder.png").mkdir()


ASK = ["ask", "--image", "cat.png", "--question", "is there a cat?"]


def test_ask_answers_and_says_what_it_cost(capsys):
    assert main([*ASK, "--pruner", "grid", "--keep", "10%", "--overlay", "o.png"]) == 0
    text = capsys.readouterr().out
    assert "26 of 256 visual tokens kept (10.2 %) by grid" in text
    assert all(name in text for name in ("vision", "pruner", "prefill", "decode"))
    assert Image.open("o.png").height > 300


def test_ask_about_several_pictures_draws_each(capsys):
    Image.new("RGB", (100, 100), (60, 60, 180)).save("dog.png")
    both = [*ASK, "--image", "dog.png", "--pruner", "grid", "--keep", "10%"]
    assert main([*both, "--overlay", "o.png"]) == 0
    assert "52 of 512 visual tokens kept (10.2 %) by grid" in capsys.readouterr().out
    sizes = [Image.open(f"o-picture-{number}.png").size for number in (1, 2)]
    assert sizes[0] != sizes[1]
    Path("dog.png").rename("o-picture-1.png")
    both[-5] = "o-picture-1.png"
    assert main([*both, "--overlay", "o.png"]) == 2
    assert "--overlay o-picture-1.png is the picture itself" in capsys.readouterr().err


@pytest.mark.parametrize(("keep", "said"), [("64", "64 of 256"), ("0.5", "128 of 256"), ("1", "1 of 256")])
def test_keep_is_a_count_a_fraction_or_a_percentage(capsys, keep, said):
    assert main([*ASK, "--pruner", "norm", "--keep", keep, "--max-new-tokens", "1"]) == 0
    assert said in capsys.readouterr().out


def test_full_needs_no_budget(capsys):
    assert main([*ASK, "--pruner", "full", "--max-new-tokens", "1"]) == 0
    assert "256 of 256 visual tokens kept (100.0 %) by full" in capsys.readouterr().out


def test_ask_says_what_every_layer_saw(capsys):
    assert main([*ASK, "--pruner", "fastv:layer=1", "--keep", "75%"]) == 0
    printed = capsys.readouterr().out
    assert "192 of 256 visual tokens kept (75.0 %) by fastv" in printed
    assert "the average over 2 layers, which see 256, 128" in printed


EVAL = ["eval", "--tasks", "lab/text,lab/existence", "--pruners", "grid,random:seed=2,oracle", "--keep", "10%,64"]


def test_eval_prints_a_table_and_writes_rows(capsys):
    assert main([*EVAL, "--limit", "2", "--out", "r/f.json"]) == 0
    printed = capsys.readouterr()
    assert "random:seed=2" in printed.out
    assert "mean" in printed.out
    with open("r/f.json") as file:
        result = json.load(file)
    assert len(result["rows"]) == 2 * (1 + 3 * 2)
    assert result["rows"][0]["model"] == "lab"


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(capsys, monkeypatch):
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(runner, "answer", stopping)
    assert main([*EVAL, "--limit", "2", "--out", "f.json"]) == 130
    printed = capsys.readouterr()
    assert "8 of 32 answers are in f.samples.jsonl; the same command resumes" in printed.err
    assert main([*EVAL, "--limit", "2", "--out", "f.json"]) == 0
    assert len(calls) == 6 + 1 + 16 - 4
    assert main([*EVAL, "--limit", "3", "--out", "f.json"]) == 2
    assert "limit: 2 then, 3 now" in " ".join(capsys.readouterr().err.split())
    assert main([*EVAL, "--limit", "3", "--out", "f.json", "--overwrite"]) == 0


def test_quickstart_shows_answers_tables_and_pictures(capsys):
    assert main(["quickstart", "--limit", "2", "--out", "shown"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^    all, 256 tokens +(right|WRONG)  ", text, re.MULTILINE)
    assert re.search(r"^    grip, 26 tokens +(right|WRONG)  ", text, re.MULTILINE)
    for name in ("full", "oracle", "random", "grid", "norm", "grip", "divprune"):
        assert re.search(rf"^ *{name} +\d+ \(\d+%\)", text, re.MULTILINE)
    assert "gripvlm.prune(model, 'divprune', keep=64)" in text
    for line in text.splitlines():
        if line.strip().startswith("shown/") and line.strip().endswith(".png"):
            assert Image.open(line.strip()).width >= 480
    assert text.count(".png\n") in (2, 4, 6)  # an untrained model's answers need not have every example
    said = " ".join(text.split())
    rows = json.loads((ROOT / "experiments/speed/results/cpu_llava-0.5b.json").read_text())["rows"]
    row = next(row for row in rows if (row["pruner"], row["keep"]) == ("grip", 0.125))
    assert f"With a language model of 0.5 B it adds {100 * row['to_full']['added']['median']:.1f} %" in said


def test_quickstart_shows_where_pruning_works_and_where_it_fails():
    """By rule, from scores: enough, one loses it, both lose it; a family that is new first."""

    class Measured:
        def of(self, task, name, keep):
            lost = {"full": "d", "grip": "cd", "divprune": "bcd"}[name]
            return {letter: {"score": float(letter not in lost)} for letter in "abcd"}

    def pair(task, letter):
        return SimpleNamespace(name=task), SimpleNamespace(id=letter)

    drawn = [pair("one", letter) for letter in "dabc"] + [pair("two", letter) for letter in "abcd"]
    found = quickstart.examples(drawn, Measured())
    assert [(one.task.name, one.sample.id) for one in found] == [("one", "a"), ("two", "b"), ("one", "c")]
    assert [one.why.split(":")[0] for one in found] == [
        "A tenth of the tokens is enough",
        "It depends on which tenth",
        "Where pruning fails",
    ]
    assert quickstart.examples(drawn[:1], Measured())[0].why == "The first question"


def test_list_and_env(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("divprune", "arXiv 2503.02175", "lab/reading", "oracle", "seed=0"))
    assert {"full", "keep_all", "given"} <= {line.split()[0] for line in text.splitlines() if line.strip()}
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "transformers", "cores", "python"))


@pytest.mark.parametrize("width", [60, 120])
def test_list_shows_what_was_measured_and_where_it_comes_from(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line for line in lines if line[:1].isalpha()}
    means = {
        (content["pruner"], float(keep)): scores["mean"]
        for file in (ROOT / "experiments/lab_grid/results").glob("*/*/seed0.json")
        for content in [json.loads(file.read_text())]
        for keep, scores in content["scores"].items()
    }
    assert f" {100 * means['divprune', 0.125]:.1f} (12.5%) " in rows["divprune"]
    assert f" {100 * means['fastv:layer=1', 0.3]:.1f} (30%) " in rows["fastv"]
    ratio = json.loads((ROOT / "experiments/speed/results/pruners.json").read_text())
    ratio = ratio["cells"][0]["pruners"]["divprune"]["ratio"][0]
    assert rows["divprune"].endswith(f" {100 * ratio:.2g}%")
    assert rows["keep_all"].split()[1:] == ["input", "no", "no", "-", "-"]
    assert rows["visionzip"].split()[1:4] == ["input", "yes", "no"]
    assert rows["cdpruner"].split()[1:4] == ["input", "no", "yes"]
    assert rows["mmr"].split()[1:4] == ["input", "inner", "inner"]
    assert rows["fastv"].split()[1:4] == ["LLM", "no", "yes"]
    said = " ".join(" ".join(lines).split())
    assert "options layer=2; score of fastv:layer=1" in said
    assert "trained for one model; options scorer=lab" in said
    assert f"On the lab's model (600 questions, all tokens: {100 * means['full', 1.0]:.1f})" in said
    assert f"nothing untrained is enough (best: cdpruner, {100 * means['cdpruner', 0.06]:.1f})" in said
    assert "From experiments/lab_grid/REPORT.md, experiments/speed/results/pruners.json" in said


def test_list_needs_no_torch_and_is_narrow_in_a_pipe():
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys; from gripvlm.cli import main; main(['list']); sys.exit(len({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_list_shows_other_packages_pruners_too(capsys, monkeypatch):
    def points(group):
        return [EntryPoint("mine", "gripvlm.pruners.baselines.random:Random", group)]

    monkeypatch.setattr("gripvlm.cli.listing.entry_points", points)
    monkeypatch.setattr("gripvlm.pruners.registry.entry_points", points)
    assert main(["list"]) == 0
    assert re.search(r"of other packages:\nmine: baseline; .*; options seed=0", capsys.readouterr().out)


def test_eval_of_all_says_what_it_leaves_out(capsys):
    assert main(["eval", "--tasks", "lab/text", "--pruners", "oracle,all", "--keep", "50%", "--limit", "1"]) == 0
    out, error = capsys.readouterr()
    assert all(name in out for name in ("oracle", "divprune", "visionzip", "random"))
    assert "not in all: given: needs scores of your own" in error


def test_a_finished_eval_says_that_nothing_is_measured_again(capsys):
    arguments = ["eval", "--tasks", "lab/text", "--pruners", "grid", "--limit", "2", "--out", "r/f.json"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    with open("r/f.json") as file:
        before = file.read()
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert first.err.startswith("loading PyTorch, the questions of lab/text and the model lab ...\n")
    assert "already" not in first.err
    assert "All 6 answers are in r/f.samples.jsonl already: nothing is measured again" in again.err
    assert "--overwrite" in again.err
    assert again.out == first.out
    with open("r/f.json") as file:
        assert file.read() == before


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gripvlm {gripvlm.__version__}\n"


def test_no_command_shows_help(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*ASK, "--pruner", "divprun"], "did you mean 'divprune'"),
        ([*ASK, "--keep", "0"], "keeps nothing"),
        ([*ASK, "--keep", "x"], "10%"),
        ([*ASK, "--keep", "300"], "only 256"),
        ([*ASK, "--pruner", "given"], "scores"),
        ([*ASK, "--overlay", "o.txt"], ".png"),
        ([*ASK, "--overlay", "some/missing/o.png"], "no folder some/missing: make it first"),
        ([*ASK, "--overlay", "folder.png"], "is a directory"),
        ([*ASK, "--overlay", "./cat.png"], "is the picture itself"),
        ([*ASK, "--pruner", "full", "--keep", "10%"], "'full' keeps every visual token, so --keep 10% cannot be met"),
        (
            [*ASK, "--pruner", "full", "--keep", "7"],
            "'full' keeps every visual token, so a budget of 7 of 256 cannot be met",
        ),
        ([*ASK, "--pruner", "oracle"], "Type `gripvlm eval --pruners oracle`"),
        ([*ASK, "--pruner", "blind"], "`gripvlm eval` measures it by itself"),
        ([*ASK, "--pruner", "grid,norm"], "type one name; `gripvlm eval --pruners grid,norm` compares"),
        ([*ASK, "--pruner", "random:seed=abc"], "use random:seed=0"),
        ([*ASK, "--pruner", "random:sead=3"], "did you mean 'seed'? its options are seed=0"),
        ([*ASK[:-1], "an <image> of what?"], "holds <image>"),
        ([*ASK, "--device", "gpu"], "type cpu, cuda"),
        ([*ASK, "--max-new-tokens", "0"], "equal to 1. Type `gripvlm ask --help`"),
        ([*ASK, "--positions", "odd"], "renumbered"),
        ([*ASK, "--model", "./nowhere"], "no model './nowhere'"),
        ([*ASK, "--model", "no-such-user/no-such-model"], "could not be loaded from the Hub"),
        (["recommend", "--model", "Qwen/Qwen3-VL-8B"], "needs neither files nor network: did you mean 'qwen3_vl'"),
        ([*ASK, "--model", "."], "no config.json"),
        ([*ASK, "--device", "cuda:77"], "cannot be used"),
        (["ask", "--image", "nowhere.png", "--question", "x"], "no image 'nowhere.png'"),
        (["ask", "--image", ".", "--question", "x"], "is a folder"),
        (["ask", "--image", "https://a.org/cat.png", "--question", "x"], "download the picture first"),
        ([*ASK, "--model", ""], "no model ''"),
        ([*ASK, "--model", "folder.png"], "no config.json"),
        (["ask", "--image", "cat.png"], "--question"),
        (["ask", "--image", "cat.png", "--question", " "], "the question is empty"),
        (["eval", "--tasks", "lab/read", "--out", "f.json"], "lab/reading"),
        (["eval", "--tasks", ","], "names nothing"),
        (["eval", "--tasks", "jsonl:none.jsonl"], "no file 'none.jsonl'"),
        (["eval", "--pruners", "grid,gridd"], "'grid'"),
        (["eval", "--keep", "1.5"], "above 1"),
        (["eval", "--limit", "0"], "--limit"),
        (["eval", "--out", "."], "is a directory"),
        (["eval", "--out", "results"], "such as results.json"),
        (["eval", "--out", "cat.png/f.json"], "cat.png is a file"),
        (["quickstart", "--out", "cat.png"], "cat.png is a file"),
        (["evall"], "evall"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(capsys, arguments, said):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert said in message
    assert re.match(r"(loading .* \.\.\. )?Error: ", message)
    assert "Traceback" not in message
    assert "\n\n" not in printed.err.strip()
    assert printed.out == ""


def test_debug_shows_where_it_came_from(capsys):
    assert main(["--debug", *ASK, "--pruner", "divprun"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_text_model_is_refused_before_its_weights_are_loaded(capsys):
    with open("config.json", "w") as file:
        json.dump({"model_type": "llama"}, file)
    assert main([*ASK, "--model", "."]) == 2
    assert "model type 'llama', which looks like a text-only model, is not supported: supported are" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_saved_folder_is_a_model(capsys):
    model, processor = tiny_lab()
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    assert main([*ASK, "--model", "saved", "--pruner", "pool", "--keep", "16"]) == 0
    printed = capsys.readouterr()
    assert "16 of 256" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("processor_config.json", "Can't load image processor"),
        ("tokenizer.json", "Couldn't instantiate the backend tokenizer"),
        ("model.safetensors", "no file named model.safetensors"),
    ],
)
def test_a_model_folder_that_is_not_whole_says_what_is_missing(capsys, missing, said):
    model, processor = tiny_lab()
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    Path("saved", missing).unlink()
    assert main([*ASK, "--model", "saved"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("Error: the model in the folder saved cannot be loaded: ")
    assert said in message
    assert "processor.save_pretrained(folder)" in message


@pytest.mark.parametrize(
    ("name", "said"), [("config.json", "is not a valid JSON file"), ("model.safetensors", "cannot be loaded")]
)
def test_a_file_that_is_cut_short_is_one_paragraph(capsys, name, said):
    model, processor = tiny_lab()
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    Path("saved", name).write_bytes(Path("saved", name).read_bytes()[:100])
    assert main([*ASK, "--model", "saved"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert message.startswith("Error: the ")
    assert said in message


def test_commas_inside_a_spec_separate_nothing():
    assert split_pruners("grid, random:seed=3,x=1 ,norm") == ["grid", "random:seed=3,x=1", "norm"]
