"""The README's examples: its Python runs on the lab model, its commands parse."""

import re
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import gripvlm
from gripvlm import lab
from gripvlm.eval import make_inputs
from gripvlm.tasks import get_tasks
from places import ROOT
from tiny_families import TINY, build, make

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def names():
    """The names that the examples use: a model, inputs, gripvlm."""
    model, processor = lab.load()
    task = get_tasks("lab/existence")[0]
    samples = task.samples[:2]
    texts = [task.prompt(sample) for sample in samples]
    inputs = make_inputs(model, processor, texts, [sample.images for sample in samples])
    return {"model": model, "inputs": inputs, "gripvlm": gripvlm}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """The README registers a pruner, which other tests must not see."""
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(names, number):
    exec(compile(PYTHON[number], f"README.md, block {number}", "exec"), names)
    if number == 0:
        assert names["ids"].shape[0] == 2


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_the_three_lines_run_on_models_of_the_types_that_they_name(family):
    if family not in TINY:
        pytest.skip("the installed transformers is too old for it")
    assert "Qwen3-VL" in PYTHON[0]
    names = {"model": build(family), "inputs": dict(make(TINY[family], [1, 2], [7, 9]).inputs)}
    exec(compile(PYTHON[0], "README.md", "exec"), names)
    for selection in (selection for images in names["record"].selections for selection in images):
        assert selection.k == gripvlm.Budget(0.25).count(selection.n) < selection.n
    assert names["ids"].shape == (2, names["inputs"]["input_ids"].shape[1] + 32)


def test_the_pruner_of_the_readme_prunes(names):
    block = next(text for text in PYTHON if "class Contrast" in text)
    exec(compile(block, "README.md", "exec"), names)
    with gripvlm.prune(names["model"], "contrast", keep=7) as record:
        names["model"].generate(**names["inputs"], max_new_tokens=1)
    assert [[selection.k for selection in images] for images in record.selections] == [[7], [7]]
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10


def test_every_command_exists():
    from gripvlm.cli import app

    typed = [shlex.split(line, comments=True)[1:] for line in COMMANDS if line.startswith("gripvlm ")]
    assert {"quickstart", "ask", "train", "eval", "list", "env"} <= {words[0] for words in typed}
    for name, *words in typed:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
        known = {flag for option in get_command(app).commands[name].params for flag in option.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert f"\n{line.split()[1]}:" in makefile
