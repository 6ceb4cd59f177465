"""Long work shows that it lives: a bar on a terminal, else a plain line every 30 seconds."""

from __future__ import annotations

import io
import re
import threading

import pytest

from gripvlm import Budget
from gripvlm.bench import bench
from gripvlm.eval import evaluate, make_inputs
from gripvlm.grip.train import train
from gripvlm.pruners import get_pruner
from gripvlm.tasks import LabTask
from gripvlm.utils import progress
from gripvlm.utils.progress import EVERY, Progress, duration
from tiny_lab import tiny_lab, write_sample
from tiny_train import asked, tiny_config, tiny_vlm


class Clock:
    """Time that passes when it is waited for; after some waits the work is over."""

    def __init__(self, waits: int = 0) -> None:
        self.now, self.waits, self.waited = 0.0, waits, []

    def monotonic(self) -> float:
        return self.now

    def set(self) -> None:
        self.waits = 0

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        self.now += timeout
        self.waits -= 1
        return self.waits < 0


class Stream(io.StringIO):
    """Standard error, which may be a terminal."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal, self.flushes = terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        self.flushes += 1


def stderr(monkeypatch, terminal: bool = False) -> Stream:
    stream = Stream(terminal)
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_a_line_every_30_seconds_with_done_rate_and_remaining(monkeypatch):
    stream = stderr(monkeypatch)
    clock = Clock(waits=2)
    monkeypatch.setattr(progress, "time", clock)
    bar = Progress("answers", 480)
    bar._end = clock
    bar.about("lab/science")
    bar.advance(120)
    with bar:
        bar._thread.join()
    assert clock.waited == [EVERY] * 3 == [30.0] * 3
    assert stream.getvalue().splitlines() == [
        "120 of 480 answers (25 %), 4.0 a second, 1 min 30 s left: lab/science",
        "120 of 480 answers (25 %), 2.0 a second, 3 min 0 s left: lab/science",
    ]
    assert stream.flushes >= 2


def test_work_of_an_earlier_run_does_not_count_for_the_rate(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    bar = Progress("steps", 100, 40)
    clock.now = 60.0
    assert bar.line() == "40 of 100 steps (40 %), none yet in 1 min 0 s"
    bar.advance(20, reused=True)
    assert bar.line() == "60 of 100 steps (60 %), none yet in 1 min 0 s"
    bar.advance(20)
    assert bar.line() == "80 of 100 steps (80 %), 20 a minute, 1 min 0 s left"


def test_a_step_that_hangs_is_still_reported(monkeypatch):
    stream = stderr(monkeypatch)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    seen = threading.Event()
    stream.write = lambda text: seen.set()
    with Progress("answers", 9):
        assert seen.wait(10)


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_show_is_false(monkeypatch, terminal):
    stream = stderr(monkeypatch, terminal)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    with Progress("answers", 3, show=False) as bar:
        bar.advance(3)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    stream = stderr(monkeypatch, terminal=True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "EVERY", 0.001)
    with Progress("answers", 8) as bar:
        bar.about("[odd] name")
        bar.advance(4)
        bar._bar.refresh()
    assert "4/8" in stream.getvalue()
    assert "[odd] name" in stream.getvalue()
    assert " left: " not in stream.getvalue()


def test_the_thread_ends_with_the_block_also_after_an_error():
    with pytest.raises(KeyboardInterrupt), Progress("answers", 8):
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "gripvlm progress"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(12.3, "12 a second"), (1.0, "1.0 a second"), (0.5, "30 a minute")])
def test_rates(value, text):
    assert progress._rate(value) == text
    assert progress._rate(0.001) == "3.6 an hour"


def test_eval_bench_and_train_say_how_far_they_are(monkeypatch, capsys, tmp_path):
    """The three that are long, where standard error is no terminal."""
    monkeypatch.setattr(progress, "EVERY", 0.02)
    model, processor = tiny_lab()
    task = LabTask("text", write_sample(tmp_path / "sample", pictures=5))
    evaluate(model, processor, task, ["norm"], [0.5], progress=True)
    assert re.search(r"\d+ of 30 answers \(\d+ %\), .*: lab/text\n", capsys.readouterr().err)

    def prompts(batch, length):
        return make_inputs(model, processor, ["is there a cat?"] * batch, [task.samples[0].images] * batch)

    bench(model, prompts, [("norm", get_pruner("norm"))], [Budget(0.5)], new=2, repeats=2, progress=True)
    assert re.search(r"\d+ of 9 prompts \(\d+ %\), .*: batch 1, prompt 64\n", capsys.readouterr().err)
    train(tiny_config(output_dir=str(tmp_path / "grip")), *tiny_vlm(), asked(8), quiet=False)
    assert re.search(r"\d+ of \d+ steps of distill \(\d+ %\), .*\n", capsys.readouterr().err)
