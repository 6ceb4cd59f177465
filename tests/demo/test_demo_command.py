"""`gripvlm demo` on the command line: what is missing or wrong is said before a model is loaded."""

from __future__ import annotations

import sys

import pytest

from gripvlm.cli import main


def refused(capsys, *words: str) -> str:
    assert main(["demo", *words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_without_gradio_it_names_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "gripvlm.demo.page", raising=False)
    message = refused(capsys)
    assert 'gradio is not installed, which the page needs: pip install "gripvlm[demo]"' in message
    assert "--static FOLDER" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "64"), "--keep 64: the slider counts in percent, so type a share such as 10%"),
        (("--keep", "<=10%"), "the slider counts in percent"),
        (("--static", "{file}/page"), "is a file and not a folder: type a folder"),
        (("--static", "{folder}", "--pruners", "divprun"), "did you mean"),
        (("--static", "{folder}", "--tasks", "labb"), "labb"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, words, message):
    file = tmp_path / "file"
    file.write_text("")
    assert message in refused(capsys, *(word.format(file=file, folder=tmp_path) for word in words))
