"""What can be known without the model is said before it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from gripvlm.cli import main
from gripvlm.grip.train import TrainConfig
from gripvlm.grip.train.config import help_of
from tiny_train import write_jsonl


@pytest.fixture(autouse=True)
def no_model(tmp_path, monkeypatch):
    """Nothing may be loaded here."""

    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("gripvlm.models.loading.load_model", load)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 12)).save("cat.png")
    write_jsonl(tmp_path, 4)
    for name in ("old.json", "old.samples.jsonl", "alone.json"):
        first = {"config": {"model": "lab", "limit": 7, "weights": "x", "arms": []}}
        record = dict.fromkeys(("task", "pruner", "keep", "id", "image_id", "prediction"), "x")
        seconds = dict.fromkeys(("vision", "pruner", "overhead", "prefill", "decode"), 0)
        record |= {"score": 1, "k": 1, "n": 1, "seconds": seconds}
        (tmp_path / name).write_text(f"{json.dumps(first)}\n{json.dumps(record)}\n" if "samples" in name else "{}")


ASK = ["ask", "--image", "cat.png", "--question", "what?"]
EVAL = ["eval", "--tasks", "jsonl:q.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([*ASK, "--pruner", "divprun"], "did you mean 'divprune'"),
        ([*ASK, "--keep", "=<64"], "'=<64' is no budget"),
        (["ask", "--image", "dog.png", "--question", "what?"], "no image 'dog.png'"),
        ([*ASK, "--overlay", "no/where.png"], "there is no folder no"),
        ([*EVAL, "--pruners", "grid,divprun"], "did you mean 'divprune'"),
        ([*EVAL, "--pruners", "random:sed=3"], "has no option 'sed'"),
        ([*EVAL, "--keep", "10%,many"], "'many' is no budget"),
        (["eval", "--tasks", "jsonl:none.jsonl"], "no file 'none.jsonl'"),
        (["eval", "--tasks", "lab/reeding"], "did you mean 'lab/reading'"),
        (
            [*EVAL, "--out", "alone.json"],
            "alone.json exists, but its alone.samples.jsonl does not: pass overwrite=True (--overwrite)",
        ),
        ([*EVAL, "--out", "old.json", "--limit", "3"], "old.samples.jsonl holds 1 answers of another run"),
        ([*EVAL, "--out", "old.json", "--limit", "3"], "limit: 7 then, 3 now"),
        ([*EVAL, "--seeds", "one"], "--seeds one: type whole numbers"),
        ([*EVAL, "--shard", "3/2", "--out", "new.json"], "use i/n"),
        (["bench", "--pruners", "divprun"], "did you mean 'divprune'"),
        (["bench", "--keep", "0"], "'0' is no budget"),
        (["bench", "--out", "alone.json"], "alone.json exists: type --overwrite"),
        (["train", "--data", "none.jsonl"], "no file 'none.jsonl'"),
        (
            ["train", "--data", "q.jsonl", "--eval-share", "0.0001"],
            "leaves none for validation; type another --eval-share",
        ),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(line, said, capsys):
    assert main(line) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "line", ["'ask', '-i', 'cat.png', '-q', 'a', '-k', 'x'", "'eval', '--keep', 'x'", "'bench', '--keep', 'x'"]
)
def test_a_bad_budget_is_said_before_anything_heavy_is_imported(line):
    code = f"import sys; from gripvlm.cli import main; main([{line}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "'x' is no budget" in done.stderr) == (0, True)


def test_the_help_of_train_has_every_default(capsys):
    assert main(["train", "--help"]) == 0
    said = " ".join(word for word in capsys.readouterr().out.split() if word not in ("│", "─"))
    for name, field in TrainConfig.__dataclass_fields__.items():
        if name == "stage":
            continue
        value = ("no", "yes")[field.default] if isinstance(field.default, bool) else field.default
        assert f"--{name.replace('_', '-')} " in said
        told = value == "" and "default" in help_of(name)  # the text says what happens without it
        assert (help_of(name) if told else f"{help_of(name)} (default: {'none' if value == '' else value})") in said
