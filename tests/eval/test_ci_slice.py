"""A small slice of the lab, measured anew and compared with what is committed.

If a change of answers is meant, run `bash experiments/ci_slice/run.sh`, commit its files, and say why.
"""

from __future__ import annotations

import pytest
import torch

from gripvlm import lab
from gripvlm.eval import compare, evaluate, read_results
from places import ROOT

SLICE = ROOT / "experiments" / "ci_slice" / "results" / "ci-slice.json"
ONE_ANSWER = 1 / 180 + 1e-9  # other processors round differently, which may turn one answer of 180 that is a near tie
SLOWER = 3.0  # machines that are busy by turns


@pytest.fixture
def threads():
    """As many as when the slice was measured: times of another number are not judged."""
    before = torch.get_num_threads()
    torch.set_num_threads(read_results(SLICE).header["hardware"]["threads"])
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_no_answer_is_lost_and_nothing_got_slower(tmp_path):
    """Times are judged where the processor is the one that the slice was measured on."""
    old = read_results(SLICE)
    arms = list(dict.fromkeys(row["pruner"] for row in old.rows))
    keeps = sorted({row["keep"] for row in old.rows if row["pruner"] != "full"})
    model, processor = lab.load()
    head = old.header
    settings = {"limit": head["limit"], "seed": head["seed"], "batch_size": head["batch_size"], "blind": False}
    new = tmp_path / "new.json"
    evaluate(model, processor, "lab", arms, keeps, **settings, out=new, model_name="lab")
    verdict = compare(old, read_results(new), ONE_ANSWER, SLOWER)
    assert not verdict.regressions, "\n" + "\n".join(verdict.lines)
    assert len(old.records) == 180 * (len(arms) + 1)
