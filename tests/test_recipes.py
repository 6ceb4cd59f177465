"""The recipes of examples/recipes, end to end: tiny models of the three types, files of the public ones' schemas."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image
from vllm_models import save_tiny_qwen

import tiny_benchmarks
from gripvlm import Grip
from gripvlm.budget import Budget
from gripvlm.eval import read_results
from gripvlm.grip.train import TrainConfig, read_toml
from places import ROOT
from recipes import questions, run
from tiny_train import picture, stopping, tiny_vlm

SMALL = "--width 16 --blocks 1 --distill-steps 2 --max-steps 2 --num-generations 2 --per-device-train-batch-size 2"
SMALL += " --questions-per-image 2 --eval-questions 2 --eval-keeps 0.5 --eval-share 0.3 --device cpu --dtype float32"
PARTS = ("ai2d", "chartqa", "docvqa", "scienceqa", "textvqa", "vqav2")


def turn(user: str, assistant: str) -> dict[str, str]:
    return {"user": user, "assistant": assistant, "source": "made up"}


def rows_of(part: str) -> list[dict]:
    """Rows as The Cauldron's: eight that can be used, one that a benchmark tests on, some that cannot be used."""
    asked = [turn("is there a cat?\nGive a very brief answer.", "Yes."), turn("Choices:\nA. cat\nB. dog", "Answer: B")]
    long = turn("what is it?", "It is a long and winding description of all that the picture shows.")
    seed = 100 * PARTS.index(part)
    rows = [{"images": [picture(seed + i, 48)], "texts": [*asked, long]} for i in range(8)]
    tested = tiny_benchmarks.picture(5).resize((64, 48))
    rows += [{"images": [tested], "texts": [turn("is it tested?", "yes")]}]
    rows += [{"images": [picture(seed + 90), picture(seed + 91)], "texts": [turn("are they two?", "yes")]}]
    rows += [{"images": [picture(seed + 92)], "texts": [long]}]
    return rows


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps five seconds after each stream that it has read in threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with The Cauldron's parts and the six benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    for part in PARTS:
        (folder / "cauldron" / part).mkdir(parents=True)
        datasets.Dataset.from_list(rows_of(part)).to_parquet(
            folder / "cauldron" / part / "train-00000-of-00001.parquet"
        )
    tiny_benchmarks.write_all(folder / "six")
    return folder


@pytest.fixture
def prepared(data, tmp_path):
    """`prepare` of two parts, into tmp_path."""

    def make(wanted: int = 12, **changes):
        options = {"seed": 0, "cauldron": data / "cauldron", "benchmarks": f"benchmarks:path={data / 'six'}"} | changes
        return questions.prepare(tmp_path / "made", {"ai2d": wanted, "vqav2": wanted}, **options)

    return make


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_there_is_a_recipe_for_each_model_with_settings_that_train_takes():
    assert run.RECIPES == ["llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-4b"]
    told = json.loads((ROOT / "experiments/dry_run/results/recipes.json").read_text())["recipes"]
    for name in run.RECIPES:
        file = run.HERE / f"{name}.toml"
        settings, expected = read_toml(file), told[name]
        assert settings == expected["settings"], "run python -m experiments.dry_run.measure recipes"
        hours = sum(expected["hours"].values())
        assert f"expects {expected['peak'] / 2**30:.1f} GiB and {hours:.1f} h at 250 TFLOP/s" in file.read_text()
        assert TrainConfig(**settings).model == settings["model"]
        assert not TrainConfig(**settings).without_effect(settings)
    assert sorted(run.wanted_questions(None)) == list(PARTS)


def test_questions_are_short_ones_about_one_picture_that_no_benchmark_has(prepared):
    file = prepared(1000)
    rows = lines_of(file)
    assert len(rows) == 2 * 8 * 2
    assert {row["answer"] for row in rows} == {"Yes", "B"}
    assert {row["family"] for row in rows} == {"ai2d", "vqav2"}
    for row in rows:
        with Image.open(file.parent / row["image"]) as image:
            assert image.size == (48, 48)
    made = json.loads((file.parent / "made.json").read_text())["made"]
    assert made["ai2d"] == {"questions": 16, "pictures": 8, "like test pictures": 1, "unreadable": 0}


def test_so_many_as_asked_for_and_drawn_by_the_seed(prepared, tmp_path):
    first = prepared(5).read_text()
    assert [row["family"] for row in map(json.loads, first.splitlines())] == ["ai2d"] * 5 + ["vqav2"] * 5
    for seed, same in ((0, True), (1, False)):
        shutil.rmtree(tmp_path / "made")
        assert (prepared(5, seed=seed).read_text() == first) is same


def test_a_resaved_smaller_test_picture_is_known_and_another_is_not(tmp_path):
    # As smooth as photographs are.
    tests = [picture(seed, 16).resize((64, 64), Image.Resampling.BICUBIC) for seed in range(3)]
    for number, image in enumerate(tests):
        image.save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "question": "what is it?", "answer": "noise"} for n in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    known = questions.small_copies(f"jsonl:{tmp_path / 't.jsonl'}")
    tests[1].resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / "again.jpg", quality=70)

    def far(image: Image.Image) -> float:
        return float(((known - questions.small_copy(image)) ** 2).mean(1).min() ** 0.5)

    with Image.open(tmp_path / "again.jpg") as again:
        assert far(again) < questions.NEAR
    assert far(picture(9, 64)) > 3 * questions.NEAR


def test_large_pictures_are_stored_smaller():
    stored = questions.within(Image.new("RGB", (4000, 1000)))
    assert stored.width * stored.height <= questions.MAX_PIXELS < 1.01 * stored.width * stored.height
    assert stored.width / stored.height == pytest.approx(4, rel=0.01)


def test_questions_go_on_from_the_parts_that_are_there(prepared, tmp_path, monkeypatch):
    whole = prepared().read_text()
    shutil.rmtree(tmp_path / "made")
    write_part = questions.write_part

    def stopped(folder, name, *rest):
        if name == "vqav2":
            raise KeyboardInterrupt
        return write_part(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(questions, "write_part", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared()
    real = questions.rows_of
    with monkeypatch.context() as patch:
        patch.setattr(
            questions, "rows_of", lambda name, *rest: pytest.fail(name) if name == "ai2d" else real(name, *rest)
        )
        assert prepared().read_text() == whole
        monkeypatch.setattr(questions, "small_copies", pytest.fail)
        assert prepared().read_text() == whole  # all of it is there


def test_mistakes_are_one_paragraph(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in tiny_vlm():
        part.save_pretrained("model")
    given = ["llava-1.5-7b", "--model", "./model", "--cauldron", str(data / "cauldron")]
    given += ["--benchmarks", str(data / "six"), "--questions", "2"]
    (tmp_path / "wrong" / "vqav2").mkdir(parents=True)
    datasets.Dataset.from_list([{"image": picture(0), "question": "a?"}]).to_parquet("wrong/vqav2/x.parquet")
    for flags, said in (
        (["--questions", "0"], "--questions 0: type a number, 1 or more"),
        (["--cauldron", "empty"], "no Parquet file in empty/vqav2: type hf download"),
        (["--cauldron", "wrong"], "vqav2: rows have image, question, but no images and no texts"),
        (["--benchmarks", "nowhere"], "no folder or file 'nowhere/pope'"),
        (["--model", "./nowhere"], "no model './nowhere'"),
        (["--max-stepz", "3"], "No such option: --max-stepz"),
        (["--questions", "3"], "was made for other questions (questions was"),
    ):
        assert run.main([*given, *flags]) == 2, flags
        told = capsys.readouterr().err.strip()
        assert said in " ".join(told.split()), told
        assert "\n\n" not in told


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub that keeps files in a folder: there is no network in tests."""
    folder = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert private
            assert exist_ok
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(run, "HfApi", Api)
    monkeypatch.setattr("gripvlm.grip.scorer.hf_hub_download", lambda name, file, **where: str(folder / name / file))
    return folder


NEEDS_TORCHVISION = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="Qwen's processors need torchvision"),
]


@pytest.mark.parametrize(
    "recipe",
    [
        "llava-1.5-7b",
        # pytest -m slow tests/test_recipes.py; beside a CPU build of torch with -p torchvision_operators and
        # PYTHONPATH=tests, so that PyPI's torchvision can be imported
        *(pytest.param(name, marks=NEEDS_TORCHVISION) for name in ("qwen2.5-vl-7b", "qwen3-vl-4b")),
    ],
)
def test_from_questions_to_the_hub(recipe, data, tmp_path, monkeypatch, capsys, hub):
    monkeypatch.chdir(tmp_path)
    if recipe.startswith("llava"):
        for part in tiny_vlm():
            part.save_pretrained("model")
    else:
        save_tiny_qwen(Path("model"), "qwen2_5_vl" if "2.5" in recipe else "qwen3_vl")
    given = [recipe, "--model", "./model", "--cauldron", str(data / "cauldron"), "--benchmarks", str(data / "six")]
    given += ["--questions", "6", "--limit", "1", *SMALL.split(), "--push", "me/grip", "--private"]

    assert run.main([*given, "--dry-run", "--tflops", "250"]) == 0
    assert "hours at 250 TFLOP/s, as given" in capsys.readouterr().out
    assert not Path("runs", recipe).exists()

    with monkeypatch.context() as patch:
        stopping(patch, 1)
        assert run.main(given) == 130
    assert "The same command resumes" in " ".join(capsys.readouterr().err.split())
    assert run.main(given) == 0
    assert "pushed: https://hub/me/grip" in capsys.readouterr().out
    scorer = Path("runs", recipe, "scorer")
    steps = [(line["stage"], line["step"]) for line in lines_of(scorer / "metrics.jsonl") if "loss" in line]
    assert steps == [("distill", 1), ("distill", 2), ("grpo", 1), ("grpo", 2)]

    rows = read_results(Path("runs", recipe, "benchmarks.json")).rows
    assert {row["task"] for row in rows} == {"pope", "scienceqa", "ai2d", "mme", "ocrbench", "textvqa"}
    assert {Budget.of(row["keep"]).short for row in rows if row["pruner"].startswith("grip")} == set(
        run.KEEPS.split(",")
    )

    pushed = Grip.from_pretrained("me/grip").module
    assert pushed.digest() == Grip.from_pretrained(scorer).module.digest()
    card = (hub / "me/grip" / "README.md").read_text()
    assert "base_model: ./model" in card
    assert "6 of vqav2" in card
    assert card.count("**this scorer**") == 3
    assert "pope" in card

    # Once more: nothing is trained or asked again.
    monkeypatch.setattr("gripvlm.grip.train.trainer.Trainer._step", pytest.fail)
    monkeypatch.setattr("gripvlm.eval.runner.answer", pytest.fail)
    assert run.main(given) == 0
