"""Files are old or new and have one writer, whatever ends a process; and nothing writes past `gripvlm.utils.disk`."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gripvlm
from gripvlm.errors import GripError
from gripvlm.eval import evaluate
from gripvlm.grip.train import train
from gripvlm.report import report
from gripvlm.tasks import LabTask
from gripvlm.utils import disk
from gripvlm.utils.disk import BusyError, one_writer
from tiny_lab import tiny_lab, write_sample
from tiny_results import made_up
from tiny_train import asked, tiny_config, tiny_vlm

PACKAGE = Path(gripvlm.__file__).parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="locks, pipes and signals as POSIX has them")
WRITES = {"write_text", "write_bytes", "save_file", "rename", "truncate"}


def holder(path: Path, folder: bool = False, then: str = "") -> subprocess.Popen:
    """A process that is in the block of `path`."""
    code = (
        f"import sys, os, time; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "from gripvlm.utils.disk import one_writer\n"
        f"with one_writer({str(path)!r}, {folder}):\n    {then or 'pass'}\n    print('in', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def small_eval(out):
    task = LabTask("text", write_sample(out.parent / "sample", pictures=1))
    return evaluate(*tiny_lab(), task, ["grid"], [0.1], out=out, model_name="tiny")


def small_training(out):
    return train(tiny_config(output_dir=str(out), stage="grpo", max_steps=1, eval_questions=2), *tiny_vlm(), asked(4))


@POSIX
@pytest.mark.parametrize(
    ("work", "name", "folder"),
    [
        (small_eval, "r.json", False),
        (small_training, "grip", True),
        (lambda out: report([made_up(out.parent / "m.json", pictures=3)], out, pictures=False), "page", True),
    ],
    ids=["eval", "train", "report"],
)
def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path, work, name, folder):
    out = tmp_path / name
    process = holder(out, folder)
    try:
        with pytest.raises(
            BusyError, match=rf"{name} is being written by another run \(process {process.pid} on .*--out"
        ):
            work(out)
        assert not out.is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [file.name for file in tmp_path.rglob("*lock")]  # what it left says nothing
    work(out)
    assert not [file.name for file in tmp_path.rglob("*lock")]


@POSIX
def test_a_child_that_lives_on_holds_no_lock(tmp_path):
    # The parent goes on when its child runs: until then the child has had no chance to let go of the lock.
    fork = "ends = os.pipe(); os.fork() or (os.write(ends[1], b'x'), time.sleep(60), os._exit(0)); os.read(ends[0], 1)"
    process = holder(tmp_path / "r.json", then=fork)
    with pytest.raises(BusyError), one_writer(tmp_path / "r.json"):
        pass
    process.kill()
    process.wait()
    with one_writer(tmp_path / "r.json"):
        assert (tmp_path / "r.json.lock").exists()


@POSIX
def test_of_many_that_want_in_one_is_in(tmp_path):
    inside, most, refused = [0], [0], [0]

    def work():
        for _ in range(100):
            try:
                with one_writer(tmp_path / "r.json"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0)
                    inside[0] -= 1
            except BusyError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert refused[0] < 800
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch):
    class Without:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError(errno.ENOLCK, "No locks available")

    for replaced, why in ((Without, "this disk has no locks: No locks available"), (None, "this system has no locks")):
        monkeypatch.setattr("gripvlm.utils.disk.fcntl", replaced)
        with pytest.warns(UserWarning, match=rf"r\.json is not locked \({why}\)"), one_writer(tmp_path / "r.json"):
            disk.write(tmp_path / "r.json", "{}")
        assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_nothing_is_left_of_a_block_in_which_nothing_was_written(tmp_path):
    with pytest.raises(GripError), one_writer(tmp_path / "a" / "b" / "r.json"):
        raise GripError("a mistake")
    assert list(tmp_path.iterdir()) == []


def test_a_file_keeps_its_mode_and_its_link(tmp_path):
    disk.write(tmp_path / "there", "old")
    (tmp_path / "there").chmod(0o640)
    (tmp_path / "link").symlink_to("there")
    disk.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    (tmp_path / "a.json.part").write_text("half of something longer")
    disk.write(tmp_path / "a.json", "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "whole"


def test_half_a_character_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(GripError, match="half of a character"):
        disk.write(tmp_path / "a", "\udcff")
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, a socket or a device, not a file"):
        disk.read_text(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        disk.read_text(tmp_path)


def test_every_write_goes_through_one_place():
    """Calls that would write to a disk by themselves; what packs into bytes (`save`, `savefig`) is not among them."""
    found = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - {Path(disk.__file__)}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = {ast.unparse(argument).strip("'") for argument in node.args}
            if (name in WRITES and texts) or (name == "open" and texts & {"w", "a", "x", "wb", "ab", "xb", "w+"}):
                found.append(f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}")
    assert found == []


@POSIX
def test_a_link_that_a_stranger_put_there_leads_nowhere(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "r.json.part").symlink_to("precious")
    with pytest.raises(OSError, match=r"r\.json"):
        disk.write(tmp_path / "r.json", "{}")
    (tmp_path / "s.json.lock").symlink_to("precious")
    with pytest.raises(OSError, match=r"s\.json"), one_writer(tmp_path / "s.json"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
