"""`gripvlm recommend`: what it names for made-up results, and what it refuses."""

from __future__ import annotations

import pytest

from gripvlm.cli import main
from gripvlm.cli.commands import console
from gripvlm.cli.recommend import nearest, recommended, serves, show
from gripvlm.pruners import pruner_names

PLAIN = {"grid": False, "attention": False, "question": False, "trained": False}
NOTHING = {"grid": False, "attention": False, "size": False}
KNOWN = {
    "kinds": {
        "things": {
            "asks": "what is there",
            "questions": 7,
            "report": "first.md",
            "scores": {
                "0.5": {"good": 1.0, "looks": 1.0, "grip": 1.0, "grid": 0.97, "random": 0.9, "downsample": 0.98},
                "0.1": {"good": 0.96, "looks": 0.99, "grip": 0.98, "grid": 0.8, "random": 0.6, "downsample": 0.7},
            },
        },
        "text": {
            "asks": "words",
            "questions": 5,
            "report": "second.md",
            "scores": {
                "0.5": {"good": 0.96, "looks": 0.9, "grip": 0.99, "grid": 0.8, "random": 0.7, "downsample": 0.5},
                "0.1": {"good": 0.4, "looks": 0.5, "grip": 0.9, "grid": 0.3, "random": 0.2, "downsample": 0.1},
            },
        },
    },
    "pruners": {
        "good": PLAIN | {"prefill_share": 0.0016},
        "looks": PLAIN | {"attention": True, "note": "tuned by hand"},
        "grip": PLAIN | {"trained": True, "question": True},
        "grid": PLAIN | {"grid": True},
        "random": PLAIN,
        "downsample": PLAIN,
    },
}


def said(capsys, kind="any", asked=0.12, **lacks):
    show(console(), KNOWN, "my-model", "some_type", NOTHING | lacks, asked, kind)
    return " ".join(capsys.readouterr().out.split())


def test_the_best_of_all_kinds_first_and_references_beside_them(capsys):
    text = said(capsys)
    assert "my-model (some_type) at 12% of its visual tokens" in text
    assert "at 10%, the measured budget nearest to yours" in text
    assert "looks: 99 things 50 text; tuned by hand good: 96 things 40 text; 0.16% of a prefill" in text
    assert "have to beat downsample: 70 things 10 text random: 60 things 20 text grid: 80 things 30 text" in text
    assert "(downsample: the towers of the labs know one size of picture" in text
    assert "grip: 98 things 90 text; reads the question" in text
    assert "things: 95% of the score is kept untrained to 10% (looks), trained to 10% (grip)" in text
    assert "text: 95% of the score is kept untrained to 50% (good), trained to 50% (grip)" in text
    assert "lose more than 5% on: text." in text
    assert '--keep 12% --pruners "looks,good,downsample,random,grid"' in text


def test_a_kind_has_its_own_order(capsys):
    text = said(capsys, kind="text", asked=0.5)
    assert "good: 96 text; 0.16% of a prefill looks: 90 text; tuned by hand" in text
    assert "things" not in text
    assert "lose more than 5%" not in text


def test_what_the_model_lacks_is_left_out(capsys):
    text = said(capsys, attention=True, grid=True, size=True)
    assert "looks" not in text
    assert "(downsample: the size of a picture does not set how many tokens some_type makes of it)" in text
    assert '--pruners "good,random"' in text
    assert serves("looks", KNOWN["pruners"]["looks"], NOTHING)
    assert not serves("grid", KNOWN["pruners"]["grid"], NOTHING | {"grid": True})


def test_the_nearest_budget_by_its_logarithm():
    assert [nearest(["0.5", "0.125", "0.03"], asked) for asked in (1.0, 0.26, 0.24, 0.07, 0.06, 0.001)] == [
        *("0.5", "0.5", "0.125", "0.125", "0.03", "0.03")
    ]


def test_the_shipped_results_name_pruners_that_there_are(capsys):
    known, names = recommended(), pruner_names()
    for spec in known["pruners"]:
        assert spec.partition("(")[0] in (*names, "downsample")
    assert "gripvlm.eval.heads" in known["pruners"]["hawk"]["note"]
    for kind in known["kinds"].values():
        for scores in kind["scores"].values():
            assert {"grip", "grid", "random"} <= scores.keys() <= known["pruners"].keys()
        assert "downsample" in kind["scores"]["0.125"]
    assert main(["recommend", "--model", "llava_next", "--keep", "25%", "--kind", "crowded"]) == 0
    assert "grid:" in capsys.readouterr().out  # of several rasters, one after the other
    assert main(["recommend", "--model", "deepseek_ocr2", "--keep", "25%", "--kind", "crowded"]) == 0
    text = capsys.readouterr().out
    assert "deepseek_ocr2 (deepseek_ocr2) at 25% of its visual tokens" in text
    assert "grid:" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "64"], "--keep 64: type a share of the visual tokens, above 0 and up to 100%, such as 10%"),
        (["--keep", "0"], "--keep 0: type a share of the visual tokens, above 0 and up to 100%, such as 10%"),
        (["--kind", "texts"], "--kind texts: did you mean 'text'? type one of any, things, diagrams, text, crowded"),
        (["--model", "no such/model"], "no model 'no such/model': use 'lab'"),
        (["--model", "qwen9"], "a model's type, which needs neither files nor network: did you mean 'qwen3_5' or"),
        (["--model", "./x"], "a model's type, which needs neither files nor network: types are aya_vision, "),
    ],
)
def test_what_cannot_be_recommended(capsys, options, message):
    assert main(["recommend", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
