"""The command `gripvlm bench`: what it writes, shows and refuses."""

from __future__ import annotations

import json

import pytest

from gripvlm.bench import runner as bench_runner
from gripvlm.bench.measure import Cell
from gripvlm.bench.roofline import Machine
from gripvlm.cli import main
from gripvlm.cli.bench import PHASES, show

COMMAND = ["bench", "--model", "random:tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_runner, "measured", lambda device, dtype: Machine(1e10, 1e10, 8, 8))


def test_the_command_writes_and_does_not_overwrite(tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--prompt", "8", "--new", "2", "--repeats", "1", "--pruners", "norm,grip", "--keep", "4,10%"]
    assert main([*COMMAND, *options, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "batch 1, 8 text tokens" in text
    assert "Share of the time, %" in text
    assert "Ratios of whole" in text
    rows = json.loads(out.read_text())["rows"]
    assert [row["kept"] for row in rows] == [16, 4, 2, 4, 4, 2, 2]
    assert json.loads(out.read_text())["model"]["images"] == 1
    before = out.read_text()
    assert main([*COMMAND, *options, "--out", str(out)]) == 2
    assert "exists: type --overwrite" in " ".join(capsys.readouterr().err.split())
    assert out.read_text() == before
    assert main([*COMMAND, *options[:-2], "--keep", "4", "--out", str(out), "--overwrite"]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 4
    assert main([*COMMAND, *options[:-2], "--keep", "4", "--images", "3", "--out", str(out), "--overwrite"]) == 0
    assert [row["kept"] for row in json.loads(out.read_text())["rows"]] == [48, 12, 12, 12]


def test_what_failed_and_what_fits_is_shown(capsys):
    """Rows made by hand: a CPU neither runs out of memory nor looks for a largest batch."""
    middle = {"median": 0.5, "low": 0.4, "high": 0.6}
    done = {"batch": 1, "prompt": 8, "kind": "pruned", "setting": "norm 0.5", "failed": None, "kept": 8.0}
    done |= {"seconds": dict.fromkeys(PHASES, middle) | {"prefill": {"median": 2.0}, "decode": middle}}
    done |= {
        "to_full": {"whole": middle, "added": {"median": 0.05}},
        "to_limit": None,
        "to_tower_limit": None,
        "kv_bytes": 2e6,
    }
    done |= {"peak_memory": 3e9, "roofline": {"vision": 0.5, "prefill": 0.25, "decode": 0.01}}
    failed = {"batch": 1, "prompt": 8, "setting": "full", "failed": "out of memory: tried to allocate 9 GiB"}
    fitted = {"prompt": 8, "setting": "norm 0.5", "fits": 21, "fails": 22, "to_full": 2.1}
    more = fitted | {"setting": "norm 0.1", "fits": 64, "fails": None, "to_full": None}
    show({"rows": [failed, done], "fits": [fitted, more]})
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "norm 0.5 0.500 0.40-0.60 - 5.0 % 2 3" in lines
    assert "norm 0.5 11 (50) 33 44 (25) 11 (1)" in lines
    assert "batch 1, 8 text tokens: full was not measured: out of memory: tried to allocate 9 GiB" in " ".join(
        text.split()
    )
    assert lines.index("norm 0.5 8 21 2.10") < lines.index("norm 0.1 8 64 or more -")


def test_ctrl_c_in_the_command_is_no_error_text(tmp_path, capsys, monkeypatch):
    def stopped(self, setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "timed", stopped)
    assert main([*COMMAND, "--pruners", "norm", "--keep", "4", "--new", "2", "--out", str(tmp_path / "b.json")]) == 130
    assert "Stopped. 0 of 3 rows are in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "random:llava-7b"], "unknown architecture 'random:llava-7b': did you mean 'llava-1.5-7b'?"),
        (["--model", "random:zzz"], "known are random:llava-0.5b (CLIP-L/14-336 and Qwen2-0.5B, 576 visual tokens); "),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--batch", "0"], "--batch 0: type whole numbers of 1 or more, separated by commas, such as 1,8"),
        (["--batch", "1,x"], "--batch 1,x: type whole numbers"),
        (["--prompt", ""], "--prompt : type whole numbers"),
        (["--keep", ","], "',' names nothing"),
        (["--keep", "1.5"], "is no budget"),
        (["--keep", "17"], "has only 16 visual tokens"),
        (["--pruners", "nrm"], "unknown pruner 'nrm': did you mean 'norm'"),
        (["--pruners", "oracle"], "Type `gripvlm eval --pruners oracle`"),
        (["--pruners", "grip:scorer=lab"], "this scorer was trained for"),
        (["--dtype", "int8"], "a random model takes float32, bfloat16 or float16"),
        (["--device", "nonsense"], "not a device of PyTorch"),
        (["--out", "bench.txt"], "type a name that ends in .json"),
        (["--new", "1"], "--new"),
    ],
)
def test_mistakes_are_one_paragraph_that_says_what_to_type(capsys, options, said):
    assert main([*COMMAND, *options]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert said in text
    assert "Traceback" not in text
