"""experiments/grip_claim: runs are crossed, methods tuned alike, and tables say what runs gave."""

from __future__ import annotations

import json

import pytest

from experiments import results, run
from experiments.grip_claim import analyze, seeing, tune
from gripvlm.eval import answer, make_inputs
from gripvlm.tasks import JsonlTask
from tiny_train import tiny_vlm, write_jsonl


def test_run_n_starts_from_warm_up_n_mod_3_with_seed_n_div_3(tmp_path, monkeypatch):
    commands = []

    def trained(command, **options):
        commands.append(command)
        folder = tmp_path / "grip_claim" / command[command.index("--output-dir") + 1].rpartition("/")[2]
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(run.subprocess, "run", trained)
    for number in (7, 4):
        run.train("grip_claim", "simple", number, tmp_path)
    flag = lambda name, of: str(of[of.index(name) + 1])  # noqa: E731
    assert [flag("--output-dir", each).rpartition("/")[2] for each in commands] == ["distill-1", "simple-7", "simple-4"]
    assert [flag("--seed", each) for each in commands] == ["1", "2", "1"]
    assert {flag("--init-from", each).rpartition("/")[2] for each in commands[1:]} == {"distill-1"}
    assert not any("--warm-ups" in command for command in commands)


def test_every_method_is_tuned_six_times(monkeypatch, tmp_path):
    assert {len(changes) for changes in tune.plan()["changes"].values()} == {3}
    assert set(analyze.PLANNED) | {analyze.OURS} <= tune.plan()["changes"].keys()
    told = []

    def trained(study, variant, seed, work, changes, name):
        told.append(changes)
        return len(told)

    def about(folder, study, variant):
        best = told[folder - 1].get("learning_rate") == 3e-4
        return {
            "val": {0: {"objective": 0.9}, 200: {"objective": 0.5 + best}},
            "minutes": 1,
            "rollouts": 0,
            "tokens": 5,
        }

    monkeypatch.setattr(tune, "train", trained)
    monkeypatch.setattr(tune, "summary", about)
    runs = tune.tune("simple", tmp_path, rates_only=False)
    assert [each["changes"] for each in runs[:3]] == [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)]
    assert [each["changes"] for each in runs[3:]] == [
        {"learning_rate": 3e-4} | change for change in tune.plan()["changes"]["simple"]
    ]
    assert {each["max_steps"] for each in told} == {60}
    assert len(tune.tune("simple", tmp_path, rates_only=True)) == 3
    assert "distill_learning_rate" in tune.tune("imitation", tmp_path, rates_only=True)[0]["changes"]


def test_questions_that_are_answered_blind_are_left_out(tmp_path):
    model, processor = tiny_vlm()
    file = write_jsonl(tmp_path / "a", pictures=2)
    task = JsonlTask(file)
    inputs = make_inputs(model, processor, [task.prompt(task.samples[1])], None)
    said = answer(model, processor, inputs, None, max_new_tokens=task.max_new_tokens).predictions[0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["answer"] = said
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said.strip()
    left = seeing.not_blind(model, processor, file)
    assert left == [rows[0], *rows[2:]]
    seeing.write(left, file, tmp_path / "b" / "c")
    moved = JsonlTask(tmp_path / "b" / "c" / "questions.jsonl")
    assert [len(sample.images) for sample in moved.samples] == [1, 1, 1]


def made_up(variant: str, seed: int, value: int) -> results.Result:
    """A run whose answers have a probability of `value` thousandths at the four budgets, 0 at the others."""
    by_budget = {b: f"{value} {value}" if b in analyze.STATISTIC.split(",") else "0 0" for b in results.BUDGETS}
    val = {"0": {"objective": 0.4}, "200": {"objective": 0.45}, "400": {"objective": value / 1000}}
    content = {"variant": variant, "seed": seed, "probability": {"half": by_budget}, "scores": {}}
    content["scores"] = {budget: {"mean": 0.5} for budget in results.BUDGETS}
    content["training"] = {"val": val, "steps": 400, "rollouts": 4000 if variant == "probes" else 8000}
    return results.Result(content, {"half": ["0-0", "1-0"]})


def test_tables_say_what_runs_gave(monkeypatch):
    base = [600 + 10 * (n % 4) for n in range(12)]
    runs = {
        "grpo": [made_up("grpo", n, base[n]) for n in range(12)],
        "simple": [made_up("simple", n, base[n] - 20 - 4 * (n % 2)) for n in range(12)],
        "probes": [made_up("probes", n, base[n]) for n in range(3)],
    }
    monkeypatch.setattr(analyze, "results", lambda: runs)
    assert analyze.statistic(runs["grpo"][1]) == pytest.approx(0.61)
    row = next(line for line in analyze.contrasts().splitlines() if "`simple`" in line)
    assert "| 12 | +2.2 [+2.1, +2.3] |" in row
    assert "| 0.000 |" in row
    assert "probes" not in analyze.contrasts()
    assert "| `probes` | 3 | 4000 | 0.6100 | 3 | 50.0 % |" in analyze.rollouts()
    assert "| `grpo` | 12 | 61.5 | 50.0 |" in analyze.scores()
