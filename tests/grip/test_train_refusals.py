"""What training and scorers refuse before anything long begins, and the lab under every pruner."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gripvlm
from gripvlm import lab
from gripvlm.errors import TrainError
from gripvlm.eval import make_inputs
from gripvlm.grip.pruner import place_of
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerError
from gripvlm.grip.train import Engine, train, write_toml
from gripvlm.grip.train.run import check_settings
from gripvlm.tasks import TaskError, get_tasks
from places import TESTS
from tiny_train import asked, tiny_config, tiny_vlm, write_jsonl


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
def test_another_tower_or_projector_is_refused(vlm, part):
    model, _ = vlm
    base, other = ModelFingerprint.of(model), copy.deepcopy(model)
    base.check(copy.deepcopy(model).to(torch.bfloat16))
    for name, weight in other.named_parameters():
        if part in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=float(weight.detach().std()), generator=torch.Generator().manual_seed(9))
    with pytest.raises(ScorerError, match="other weights"):
        base.check(other)


def test_the_shipped_scorers_are_the_lab_models():
    model, _ = lab.load()
    for name in ("lab", "lab-blind", "lab-small"):
        scorer = Scorer.from_pretrained(place_of(name))
        scorer.base.check(model)
        assert scorer.base.weights
        assert "/" not in str(scorer.notes["config"].get("start", ""))


def test_the_shipped_scorers_have_names():
    by_name = {gripvlm.Grip.from_pretrained(name).weights for name in ("lab", "lab-blind", "lab-small")}
    assert by_name == {gripvlm.get_pruner(f"grip{of}").weights for of in ("", ":scorer=lab-blind", ":scorer=lab-small")}
    assert len(by_name) == 3


def test_the_test_split_is_no_training_data():
    with pytest.raises(TrainError, match=r"lab_vlm\.dataset"):
        check_settings(tiny_config(data="lab/text"))


def test_mistakes_show_before_the_model_is_loaded(tmp_path):
    file = write_jsonl(tmp_path / "d", 4)
    check_settings(tiny_config(data=str(file), output_dir=str(tmp_path / "r")))
    with pytest.raises(TrainError, match="unknown reward"):
        check_settings(tiny_config(data=str(file), reward_funcs="nonsense"))
    (tmp_path / "d" / "2.png").unlink()
    with pytest.raises(TrainError, match=r"2\.png.*no such file \(and 1 more samples\).*--on-bad-sample skip"):
        check_settings(tiny_config(data=str(file)))
    check_settings(tiny_config(data=str(file), on_bad_sample="skip", output_dir=str(tmp_path / "r")))


def test_a_stopped_warm_up_is_not_skipped(vlm, tmp_path):
    write_toml(tiny_config(stage="distill"), tmp_path / "config.toml")
    (tmp_path / "distill.ckpt").touch()
    with pytest.raises(TrainError, match="stopped before its end"):
        train(tiny_config(output_dir=str(tmp_path), stage="grpo"), *vlm, asked(8))


def test_sizes_of_another_scorer_are_refused(vlm, tmp_path):
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    train(tiny_config(output_dir=first, stage="distill", distill_steps=1), *vlm, asked(8))
    with pytest.raises(TrainError, match=r"width = 32, but the scorer in .* has 16"):
        train(tiny_config(output_dir=second, stage="grpo", init_from=first, width=32), *vlm, asked(8))


def test_a_folder_without_its_settings_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(TrainError, match=r"holds config\.json but no config\.toml"):
        check_settings(tiny_config(output_dir=str(tmp_path)))


def test_out_of_memory_says_what_to_lower(vlm, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "_forward", full)
    with pytest.raises(TrainError, match="grpo ran out of memory: use a smaller --max-tokens-per-forward"):
        train(tiny_config(output_dir=str(tmp_path), stage="grpo"), *vlm, asked(8))


def test_task_score_needs_answers(vlm, tmp_path):
    file = write_jsonl(tmp_path, 8)
    file.write_text("".join(line.split(', "answer"')[0] + "}\n" for line in file.read_text().splitlines()))
    with pytest.raises(TrainError, match="has no answer to compare with: use the reward agreement"):
        train(
            tiny_config(data=str(file), output_dir=str(tmp_path / "r"), stage="grpo", reward_funcs="task_score"), *vlm
        )


def test_evidence_outside_its_raster_is_refused(tmp_path):
    file = write_jsonl(tmp_path, 1)
    marked = file.read_text().replace('{"image"', '\n{"evidence": [16], "evidence_grid": [4, 4], "image"', 1)
    file.write_text(marked)
    with pytest.raises(TaskError, match=r"marks patch 16, but evidence_grid .* has patches 0 to 15"):
        get_tasks(f"jsonl:{file}")[0].samples  # noqa: B018


def test_processes_that_would_idle_are_refused(tmp_path):
    code = (
        "from tiny_train import *\nfrom gripvlm.grip.train import train\n"
        f"train(tiny_config(output_dir={str(tmp_path / 'r')!r}, gradient_accumulation_steps=1), *tiny_vlm(), asked(8))"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = str(TESTS)
    source = str(Path(gripvlm.__file__).parents[1])
    done = subprocess.run(
        [*command, str(tmp_path / "run.py")],
        capture_output=True,
        text=True,
        timeout=900,
        env={"PYTHONPATH": f"{source}:{here}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode
    assert "type --gradient-accumulation-steps 2, or a multiple" in done.stderr


def test_the_end_of_a_turn_is_the_templates_own(vlm):
    model, processor = vlm
    model = copy.deepcopy(model)
    end = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [7, end]
    assert Engine(model, processor).ends == [7, end]
    closing = processor.tokenizer("</s>", add_special_tokens=False)["input_ids"]
    assert Engine(model, processor).end == ([end] if closing == [end] else [7])


# What the lab's 3 vision blocks and 5 language layers need to be told.
TOLD = {"hiprune": "hiprune:middle=1", "vscan_vision": "vscan_vision:shallow=0", "vscan": "vscan:shallow=0"}
TOLD |= {"fastv": "fastv:layer=1", "dart": "dart:layer=1", "ptp": "ptp:layer=1"}
WRAPPERS = {"gumbel", "mmr", "repeats", "restore", "spread", "split", "ensemble", "top_p", "tower"}


@pytest.mark.parametrize("name", sorted({row.name for row in gripvlm.list_pruners()} - WRAPPERS - {"given"}))
def test_every_pruner_runs_on_the_lab(name):
    model, processor = lab.load()
    sample = get_tasks("lab/text")[0].samples[0]
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    keep = 1.0 if name in ("full", "keep_all") else 154
    with gripvlm.prune(model, TOLD.get(name, name), keep=keep) as record:
        model.generate(**inputs, max_new_tokens=1)
    assert record.total == 256
    assert abs(record.paid - (256 if keep == 1.0 else 154)) <= 0.5
