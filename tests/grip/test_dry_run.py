"""What `gripvlm train --dry-run` says, against what a CPU takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import gripvlm
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.grip.train import Engine
from gripvlm.grip.train.dry_run import PADDING, Sizes, hours, memory, operations, peak
from places import TESTS
from tiny_train import asked, pairs, tiny_config, tiny_vlm, write_jsonl

# In a process of its own, where large blocks of memory go back to the system at once.
MEASURED = """
import dataclasses, gc, json, sys
import torch
from gripvlm.grip.train import Engine, TrainConfig
from gripvlm.grip.train.distill import get_teacher
from gripvlm.grip.train.dry_run import Sizes, memory
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.visionselector import VisionSelector
from tiny_train import asked, drawn, pairs, tiny_scorer, tiny_vlm
torch.set_num_threads(1)
sizes, tokens, checkpointing = json.loads(sys.argv[1])
model, processor = tiny_vlm(**sizes)
config = TrainConfig(
    per_device_train_batch_size=2, questions_per_image=2, num_generations=4, max_tokens_per_forward=tokens,
    gradient_checkpointing=checkpointing,
)
task = asked(2, each=2)
parts = memory(Sizes.of(model, processor, pairs(task), config), config)
engine = Engine(model, processor, tokens, gradient_checkpointing=checkpointing)
batch = engine.prepare(pairs(task))
names = "width", "blocks", "heads", "joint", "rounds"
stage = Grpo(config, tiny_scorer(model, **{name: getattr(config, name) for name in names}), engine)
engine.run(batch, [0], [[torch.arange(4)]])

def now(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

def peak_of(work):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = now("VmRSS")
    work()
    return now("VmHWM") - before

def step():
    for loss, _ in stage.losses(batch, 0.0, drawn()):
        loss.backward()

rival = dataclasses.replace(config, stage="visionselector")
selector = VisionSelector(rival, stage.scorer, engine)
parts["rival"] = memory(Sizes.of(model, processor, pairs(task), rival), rival)

def selected():
    for loss, _ in selector.losses(batch, 0.5, drawn()):
        loss.backward()

taken = {"teacher": peak_of(lambda: get_teacher("gradient")(engine, batch, None, drawn())), "grpo": peak_of(step)}
taken["visionselector"] = peak_of(selected)
told = {"visionselector": parts["rival"]["scorer"] + parts["rival"]["gradients"]}
told |= {"teacher": parts["teacher"], "grpo": max(parts[name] for name in ("scorer", "rollouts", "logits"))}
print(json.dumps([taken, told]))
"""
SMALL = {"hidden": 64, "layers": 4, "inner": 256, "heads": 8, "vocabulary": 2000, "image": 128}
LONG = SMALL | {"layers": 2, "image": 160}
WIDE = {"hidden": 256, "layers": 3, "inner": 1024, "heads": 8, "vocabulary": 16000, "image": 128}


@pytest.mark.slow  # on a busy machine the peak is another: pytest -m slow tests/grip/test_dry_run.py
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
@pytest.mark.parametrize(
    "told", [(SMALL, 16384, True), (LONG, 2048, False), (WIDE, 2048, True)], ids=["small", "long", "wide"]
)
def test_memory_is_what_a_cpu_takes(told, tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)
    paths = os.pathsep.join([str(TESTS), str(Path(gripvlm.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "measured.py"), json.dumps(told)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    taken, expected = json.loads(done.stdout.splitlines()[-1])
    for name, size in taken.items():
        assert expected[name] == pytest.approx(size, rel=0.35), (name, taken, expected)


def test_operations_are_those_of_the_model():
    model, processor = tiny_vlm(**SMALL)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of a CPU
    config = tiny_config(stage="grpo", keep_low=0.25, keep_high=0.25, eval_keeps="1", eval_questions=4)
    task = asked(4, each=1)
    sizes = Sizes.of(model, processor, pairs(task), config)
    engine = Engine(model, processor)
    batch = engine.prepare(pairs(task))
    with FlopCounterMode(display=False) as counted:
        engine.prepare(pairs(task))
        engine.run(batch, range(4), batch.everything)
    every = operations(sizes, config)["validation"] / (1 + config.max_steps / config.eval_steps)
    assert every == pytest.approx(PADDING * counted.get_total_flops(), rel=0.15)


def test_settings_move_the_estimate_as_they_move_the_run():
    model, processor = tiny_vlm()
    questions = pairs(asked(4))

    def told(**changes):
        config = tiny_config(**{"max_tokens_per_forward": 256, "num_generations": 16, **changes})
        sizes = Sizes.of(model, processor, questions, config)
        return memory(sizes, config), operations(sizes, config), hours(sizes, config, 1e9)

    def features(processes, **changes):
        config = tiny_config(**changes)
        return memory(Sizes.of(model, processor, questions, config), config, processes)["features"]

    parts, count, time = told()
    assert sum(parts.values()) > peak(parts) > parts["weights"] > 0
    assert told(max_tokens_per_forward=128)[0]["rollouts"] < parts["rollouts"]
    assert "teacher" not in told(stage="grpo")[0]
    assert told(teacher="gradient_at_k")[0] == parts
    # All micro-batches of a step are in memory at once, each in one process.
    assert features(1, gradient_accumulation_steps=4) == 4 * parts["features"]
    assert features(2, gradient_accumulation_steps=4) == 2 * parts["features"]
    assert told(gradient_checkpointing=False)[0]["teacher"] > parts["teacher"]
    # Rounds: as many as tokens are kept at most, here 2 of 16, and none in distilling.
    few = {"keep_low": 0.1, "keep_high": 0.125}
    assert told(rounds=16, **few)[0] == told(rounds=2, **few)[0]
    assert told(rounds=2, **few)[0]["scorer"] > told(rounds=1, **few)[0]["scorer"]
    assert told(rounds=16, stage="distill")[0]["scorer"] == told(rounds=1, stage="distill")[0]["scorer"]
    # Of weights that are not all on the device, so many and at least a layer; all where a backward pass needs them.
    half = {"max_memory": parts["weights"] / 2**31}
    assert told(**half)[0] == parts | {"weights": parts["weights"] // 2}
    assert 0 < told(max_memory=1e-9)[0]["weights"] < parts["weights"] / 4
    assert told(**half, gradient_checkpointing=False)[0]["weights"] == parts["weights"]
    assert told(**half, gradient_checkpointing=False, teacher="attention")[0]["weights"] == parts["weights"] // 2
    assert told(max_steps=12)[1]["grpo"] == 2 * count["grpo"]
    assert told(num_iterations=4)[1]["grpo"] > count["grpo"]
    assert time.keys() == {"distill", "grpo", "validation"}
    rival, work, _ = told(stage="visionselector", gradient_checkpointing=False)
    assert "rollouts" not in rival
    assert rival["gradients"] > told(stage="visionselector")[0]["gradients"]
    assert peak(rival) >= rival["gradients"] + rival["scorer"]
    assert work.keys() == {"visionselector", "validation"}
    assert all(value > 0 for value in time.values())


def test_the_command_says_it_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "load", lambda name: tiny_vlm())
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path, 8)
    flags = ["train", "--device", "cpu", "--data", "q.jsonl", "--eval-share", "0.3", "--dry-run"]
    assert main(flags) == 0
    told = capsys.readouterr().out
    for said in ("16 visual tokens", "weights", "optimiser", "teacher", "hours at", "validation", "together"):
        assert said in told
    assert not (tmp_path / "grip").exists()
    assert main([*flags, "--tflops", "250"]) == 0
    told = capsys.readouterr().out
    for said in ("memory of each process on an accelerator, bfloat16", "hours at 250 TFLOP/s, as given"):
        assert said in told


def test_a_model_of_a_folder_is_not_loaded_for_it(tmp_path, monkeypatch, capsys):
    model, processor = tiny_vlm()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")  # no weight of it is read
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path, 8)
    flags = ["--model", "m", "--device", "cpu", "--data", "q.jsonl", "--eval-share", "0.3", "--dtype", "bfloat16"]
    assert main(["train", *flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "on cpu, bfloat16" in told
    count = sum(weight.numel() for weight in model.parameters())
    assert f"{2 * count / 2**20:.1f} MiB" in told


def test_it_needs_questions(tmp_path, capsys):
    assert main(["train", "--dry-run", "--device", "cpu", "--output-dir", str(tmp_path / "r")]) == 2
    assert "no training data" in capsys.readouterr().err
