"""The Python of the pages of docs/ runs: the blocks of a page one after the other, in one namespace.

README's runs in tests/cli/test_readme.py, that of docs/methods.md in tests/pruners/test_methods_page.py.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

import gripvlm
from gripvlm import lab
from gripvlm.eval import make_inputs
from gripvlm.grip.train import Callback, train
from gripvlm.tasks import get_tasks
from places import ROOT
from tiny_train import tiny_config, tiny_scorer, tiny_vlm, write_jsonl

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {page.name: BLOCK.findall(page.read_text(encoding="utf-8")) for page in sorted(ROOT.glob("docs/*.md"))}
PAGES = {name: blocks for name, blocks in PAGES.items() if blocks and name != "methods.md"}


def of_the_lab(folder):
    """What most pages assume: a model and the inputs of two prompts."""
    model, processor = lab.load()
    (task,) = get_tasks("lab/existence")
    samples = task.samples[:2]
    texts = [task.prompt(sample) for sample in samples]
    inputs = make_inputs(model, processor, texts, [sample.images for sample in samples])
    return {"__name__": "page", "gripvlm": gripvlm, "model": model, "processor": processor, "inputs": inputs}


def of_training(folder):
    """A tiny model, a scorer for it in a folder, and settings for a run of one step each."""
    model, processor = tiny_vlm()
    tiny_scorer(model).save_pretrained(folder / "my-scorer")
    data = write_jsonl(folder / "data")
    config = tiny_config(output_dir="run", data=str(data), distill_steps=1, max_steps=1, reward_funcs="probability")
    (task,) = get_tasks(f"jsonl:{data}")
    inputs = make_inputs(model, processor, [task.prompt(task.samples[0])], [task.samples[0].images])
    return {
        **{"__name__": "page", "gripvlm": gripvlm, "model": model, "processor": processor, "inputs": inputs},
        **{"config": config, "train": train, "Callback": Callback},
    }


def of_the_lab_uncompiled(folder):
    """Compiling takes half a minute: here names and arguments are tried; test_static_shapes.py compiles."""
    return of_the_lab(folder) | {"torch": SimpleNamespace(compile=lambda function, **options: function)}


NAMES = {"grip.md": of_training, "speed.md": of_the_lab_uncompiled}
"""Page -> what its examples take for granted, where that is more than a model and inputs."""


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})
    names = NAMES.get(page, of_the_lab)(tmp_path)
    for number, block in enumerate(PAGES[page]):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), names)
    if page == "prune.md":
        assert names["ids"].shape[0] == len(names["record"].selections) == 2
    if page == "grip.md":
        assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_pages_have_examples():
    assert {"prune.md", "grip.md", "lab.md", "speed.md"} <= PAGES.keys()
