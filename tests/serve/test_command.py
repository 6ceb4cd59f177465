"""What `gripvlm serve` refuses before it serves."""

from __future__ import annotations

import sys

import pytest

from gripvlm.cli import main


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--keep", "most"], "'most' is no budget"),
        (["--pruners", "nonsense"], "unknown pruner 'nonsense'"),
        (["--pruners", "tome"], "works inside the vision tower"),
        (["--api-key", " "], "--api-key is empty: type a key"),
        (["--target-ms", "0"], "pass a number above 0"),
        (["--target-ms", "100", "--ladder", "10%,50%"], "fractions that go down, such as 50%,25%,10%"),
        (["--max-megapixels", "inf"], "max_megapixels=inf: pass a number of 0.01 or more"),
        (["--max-batch", "0"], "--max-batch"),
        (["--port", "70000"], "--port"),
        (["--allow-folder", "nowhere"], "--allow-folder"),
    ],
    ids=str,
)
def test_options_that_are_wrong(options, says, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: pytest.fail("it served"))
    assert main(["serve", *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert 'pip install "gripvlm[serve]"' in " ".join(capsys.readouterr().err.split())


def test_others_are_warned_of_a_server_without_a_key(capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: None)
    monkeypatch.delenv("GRIPVLM_API_KEY", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 0
    assert "Anyone who reaches 0.0.0.0:8000 may use this server" in capsys.readouterr().err
    monkeypatch.setenv("GRIPVLM_API_KEY", "one two")
    assert main(["serve", "--host", "0.0.0.0"]) == 0
    assert "Anyone" not in capsys.readouterr().err
