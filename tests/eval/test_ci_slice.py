"""A small slice of the lab, measured anew and compared with what is committed.

If a change of answers is meant, run `bash experiments/ci_slice/run.sh`, commit its files, and say why.
"""

from __future__ import annotations

from gripvlm import lab
from gripvlm.eval import evaluate, read_results
from places import ROOT

SLICE = ROOT / "experiments" / "ci_slice" / "results" / "ci-slice.json"


def test_no_answer_is_lost(tmp_path):
    """180 questions, one answer of leeway a setting: other processors round differently, which may turn a near tie."""
    old = read_results(SLICE)
    header = old.header
    pruners = list(dict.fromkeys(row["pruner"] for row in old.rows))
    keeps = sorted({row["keep"] for row in old.rows if row["pruner"] != "full"})
    settings = {"limit": header["limit"], "seed": header["seed"], "batch_size": header["batch_size"], "blind": False}
    evaluate(*lab.load(), "lab", pruners, keeps, **settings, out=tmp_path / "new.json", model_name="lab")
    new = read_results(tmp_path / "new.json")
    assert new.questions == old.questions
    for row in old.rows:
        assert len(new.of(row["task"], row["pruner"], str(row["keep"]))) == row["n"]
    for pruner, keep in dict.fromkeys((row["pruner"], str(row["keep"])) for row in old.rows):
        keys = [key for key in old.records if key[1:3] == (pruner, keep)]
        assert len(keys) == 180
        lost = [key for key in keys if new.records[key]["score"] < old.records[key]["score"]]
        gained = [key for key in keys if new.records[key]["score"] > old.records[key]["score"]]
        assert len(lost) - len(gained) <= 1, f"{pruner} at {keep} lost {lost}"
