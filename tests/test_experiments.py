"""experiments/: tables say what results hold, results say what they are, and new ones can be made."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest

from experiments import results, run, tables
from experiments.choosing import analyze as choosing
from experiments.grip_ablation.relaxations.config import RelaxedConfig
from experiments.grip_claim.exploring.config import ExploringConfig
from experiments.lab_grid import measured
from gripvlm import get_pruner
from gripvlm.eval import read_results
from gripvlm.grip.pruner import place_of
from gripvlm.grip.train import TrainConfig
from places import ROOT
from tiny_results import made_up

FILES = sorted(results.STUDIES.glob("*/results/**/seed*.json"))
STUDIES_OWN = {*RelaxedConfig.__dataclass_fields__, *ExploringConfig.__dataclass_fields__, *run.OWN}
"""Settings of the studies beside those of training."""


def test_every_table_says_what_the_results_hold():
    assert tables.out_of_date() == []


def test_gripvlm_list_shows_what_was_measured():
    shown = json.loads(measured.TARGET.read_text(encoding="utf-8"))
    assert shown == json.loads(json.dumps(measured.measured())), "run python -m experiments.lab_grid.measured"


def test_gripvlm_recommend_shows_what_was_measured():
    shown = json.loads(choosing.TARGET.read_text(encoding="utf-8"))
    assert shown == json.loads(json.dumps(choosing.recommended())), "run python -m experiments.choosing.analyze"


def test_the_scorers_that_ship_are_those_that_were_measured():
    for variant, spec in (("lab", "grip"), ("lab_blind", "grip:scorer=lab-blind")):
        content = results.read_json(f"grip_shipped/results/{variant}/seed0.json")
        assert content["pruner_config"]["weights"] == get_pruner(spec).weights


def test_a_result_is_in_its_place_and_its_scores_are_means_of_its_answers():
    assert len(FILES) > 150
    for file in FILES:
        content = json.loads(file.read_text())
        assert (content["variant"], f"seed{content['seed']}") == (file.parent.name, file.stem)
        assert content["study"] == file.relative_to(results.STUDIES).parts[0]
        assert {"command", "git", "hardware", "versions", "questions"} <= content["evaluation"].keys()
        for budget, scores in content["scores"].items():
            means = {family: np.mean([*map(int, bits[budget])]) for family, bits in content["correct"].items()}
            assert {family: scores[family] for family in means} == pytest.approx(means, abs=1e-6)
            assert scores["mean"] == pytest.approx(np.mean([*means.values()]), abs=1e-6)


def test_no_result_names_a_folder_of_the_machine_that_made_it():
    for file in (*results.STUDIES.rglob("*.json"), *results.STUDIES.rglob("*.csv")):
        text = file.read_text()
        assert not [folder for folder in ("/opt/", "/home/", "/root/", "/work/", "/tmp/") if folder in text], file


def test_every_variant_of_the_ablation_has_a_config_and_a_description():
    folder = results.STUDIES / "grip_ablation"
    configs = {file.stem for file in (folder / "configs").glob("*.toml")} - {"default"}
    assert configs == {file.parent.name.removesuffix(".last_step") for file in folder.glob("results/*/seed*.json")}
    assert all(file.read_text().startswith("# ") for file in results.STUDIES.glob("*/configs/*.toml"))


def test_every_config_names_settings_that_training_has():
    known = {field.name for field in fields(TrainConfig)} | STUDIES_OWN
    for file in results.STUDIES.glob("*/configs/*.toml"):
        if "[removed]" not in file.read_text():
            assert run.settings_of(file.parts[-3], file.stem).keys() <= known, file.name


def test_a_config_that_cannot_run_any_more_says_so():
    with pytest.raises(SystemExit, match=r"antithetic needs .*no longer has"):
        run.settings_of("grip_ablation", "antithetic")
    with pytest.raises(SystemExit, match=r"no variant 'grp' in grip_ablation: use one of .*grpo"):
        run.settings_of("grip_ablation", "grp")


def test_flags_are_what_the_command_line_takes():
    settings = {"num_iterations": 2, "question": False, "bf16": True}
    assert run.flags(settings) == ["--num-iterations", "2", "--no-question", "--bf16"]


def test_an_evaluation_is_split_into_one_file_a_pruner_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STUDIES", tmp_path)
    file = made_up(tmp_path / "r.json", pictures=5)
    results.split(file, tmp_path / "s" / "results", {"study": "s"})
    found = results.load("s/results")
    assert {name: len(seeds) for name, seeds in found.items()} == {"full": 1, "grid": 1, "mine": 1, "random": 2}
    rows = {(row["pruner"], row["keep"]): row["score"] for row in read_results(file).means}
    assert found["mine"][0].score("0.1") == pytest.approx(rows["mine", 0.1], abs=1e-6)
    assert results.average(found["random"], "0.5") == pytest.approx(
        (rows["random:seed=0", 0.5] + rows["random:seed=1", 0.5]) / 2, abs=1e-6
    )
    middle, low, high = results.over_pictures(found["mine"], "0.1", found["grid"])
    assert middle == pytest.approx(rows["mine", 0.1] - rows["grid", 0.1], abs=1e-6)
    assert low < middle < high


def test_a_trained_scorer_is_measured_and_its_result_kept(tmp_path, monkeypatch):
    """`run.measure` on a scorer that ships: one question a family."""
    monkeypatch.setattr(run, "STUDIES", tmp_path)
    monkeypatch.setattr(results, "STUDIES", tmp_path)
    (tmp_path / "s" / "configs").mkdir(parents=True)
    (tmp_path / "s" / "configs" / "default.toml").write_text("bf16 = true\n")
    (tmp_path / "s" / "configs" / "ours.toml").write_text('stage = "grpo"\n')
    scorer = tmp_path / "ours-1"
    shutil.copytree(place_of("lab"), scorer)
    (scorer / "metrics.jsonl").write_text('{"step": 0, "minutes": 0.1, "eval": {"objective": 0.5}}\n{"step": 2}\n')
    (scorer / "environment.json").write_text("{}")
    run.measure("s", "ours", 1, scorer, limit=1)
    content = json.loads((tmp_path / "s" / "results" / "ours" / "seed1.json").read_text())
    assert content["training"]["settings"] == {"bf16": True, "stage": "grpo"}
    assert (content["training"]["steps"], content["training"]["val"]) == (2, {"0": {"objective": 0.5}})
    assert [*content["scores"]] == [*results.BUDGETS]
    assert {len(bits) for by_budget in content["correct"].values() for bits in by_budget.values()} == {1}
    results.load.cache_clear()  # another test has a study of this name
    (ours,) = results.load("s/results")["ours"]
    found = results.probability(ours, "0.5,0.25")
    assert found.keys() == ours.correct("0.5").keys()
    assert all(0 <= values.item() <= 1 for values in found.values())
    assert np.mean([values.item() for values in found.values()]) > 0.3  # it is right about four of five


def test_a_table_is_filled_between_its_marks():
    page = "a\n<!-- table: x -->\nold\n<!-- /table -->\nb <!-- table: y -->\n<!-- /table -->\n"
    new = tables.filled(page, {"x": "| new |"})
    assert new == page.replace("\nold\n", "\n\n| new |\n\n")
    assert tables.filled(new, {"x": "| new |"}) == new
    with pytest.raises(ValueError, match="no <!-- table: --> for z, only"):
        tables.filled(page, {"z": ""})


def test_the_checkout_stays_small():
    """Answers, pages and pictures once made 40 MB of results."""
    size = sum(file.stat().st_size for file in (ROOT / "experiments").rglob("*") if file.is_file())
    assert size < 8 * 2**20
