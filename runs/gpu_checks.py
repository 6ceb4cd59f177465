"""Ten minutes of one GPU: tests of exactness, what pruning buys at 7B, one step of every training stage.

    python runs/gpu_checks.py --out OUT                                               one GPU of 80 GB or more
    python runs/gpu_checks.py --out OUT --device cpu --fit 0 --models tiny,tiny-qwen --train tiny    a try

Needs transformers>=5.19 and pytest beside torch; nothing is downloaded, all weights are random. A machine with an older
transformers and no network takes a packed one along:

    python runs/gpu_checks.py --pack transformers==5.24.0            where pip has a network: writes .whl/site.tar.xz
    mkdir site && tar -xJf .whl/site.tar.xz -C site && PYTHONPATH=$PWD/site python runs/gpu_checks.py --out OUT

Parts (`--parts tests,fit`: only those) run one after the other, each in a process of its own that is stopped when its
time is over, and write as they go: tests.json, bench-MODEL.json (`gripvlm bench`'s file), fit-MODEL.json (the largest
batch), train.json, run.json (parts, seconds, commit, versions, hardware), log.txt. What is lacking at the end lacks
because of time or of an error that the log shows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRUNERS, KEEPS = ("divprune", "grip"), ("50%", "22%", "11%", "5%")
SECONDS = {"tests": 100, "bench": 125, "fit": 65, "train": 75}
"""Of each part, start included; `bench` and `fit` once a model."""
GRACE = 20
"""Seconds between asking a part to stop and ending it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".lab" / "gpu", help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the models that are measured and trained for")
    parser.add_argument("--tests", default="tests/gpu/test_gpu_*.py", help="their files, as a pattern")
    parser.add_argument("--models", default="llava-1.5-7b,qwen2.5-vl-7b", help="shapes of gripvlm bench")
    parser.add_argument("--train", default="llava-1.5-7b", help="the LLaVA shape that is trained for, tiny, or nothing")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--fit", type=int, default=1024, help="largest batch tried; 0 tries none")
    parser.add_argument("--memory", type=float, default=0, help="GiB of the device that fit may use; 0: all")
    parser.add_argument("--parts", default="tests,bench,fit,train", help="those that run, in this order")
    parser.add_argument("--seconds", type=float, default=560, help="of everything")
    parser.add_argument("--commit", default="", help="where there is no git: the commit that this tree is")
    parser.add_argument("--part", default="", help="only this one, in this process")
    parser.add_argument(
        "--pack", default="", help="only write .whl/site.tar.xz with this package, such as NAME==VERSION"
    )
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.pack:
        pack(options.pack)
    elif options.part:
        one_part(options)
    else:
        sys.exit(all_parts(options))


def pack(package: str) -> None:
    """A pure Python package as one .tar.xz, a quarter of its wheel's size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            folder,
            package,
        ]
        subprocess.run(command, check=True)
        file = ROOT / ".whl" / "site.tar.xz"
        file.parent.mkdir(exist_ok=True)
        with tarfile.open(file, "w:xz", preset=9) as tar:
            for path in sorted(Path(folder).iterdir()):
                tar.add(path, path.name)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


# --- all parts --------------------------------------------------------------------------------------------------------


def all_parts(options: argparse.Namespace) -> int:
    """Runs every part in its own process; 0 where all were finished and no test failed."""
    began, out = time.monotonic(), options.out
    out.mkdir(parents=True, exist_ok=True)
    groups = groups_of(options)
    done: list[dict[str, Any]] = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for group in groups:
            left = options.seconds - (time.monotonic() - began) - GRACE
            limit = min(left, SECONDS[group[0].partition(":")[0]])
            running = [Running(name, options, limit, log) for name in group] if limit > 5 else []
            done += [one.ended() for one in running] or [{"part": name, "code": None, "seconds": 0} for name in group]
            merge_tests(out)
            write(out / "run.json", about(options) | {"seconds": time.monotonic() - began, "parts": done})
    commit_of(options)
    for one in done:
        print(f"{one['part']:<40} {one['seconds']:6.1f} s   {'ok' if one['code'] == 0 else one['code']}")
    return int(any(one["code"] != 0 for one in done))


def groups_of(options: argparse.Namespace) -> list[list[str]]:
    """Names of the parts that were asked for; those of one group run at once."""
    asked, models = options.parts.split(","), [model for model in options.models.split(",") if model]
    if wrong := set(asked) - set(SECONDS):
        sys.exit(f"--parts knows {', '.join(SECONDS)}, not {', '.join(sorted(wrong))}")
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(options.tests)) if options.tests else []
    groups = {
        "tests": [[f"tests:{file}" for file in files]],  # a test that breaks the device breaks its process only
        "bench": [[f"bench:{model}"] for model in models],
        "fit": [[f"fit:{model}"] for model in models if options.fit],
        "train": [["train"]] if options.train else [],
    }
    return [group for kind in asked for group in groups[kind] if group]


class Running:
    """One part in a process of its own, its output on the screen and in the log."""

    def __init__(self, name: str, options: argparse.Namespace, limit: float, log: Any) -> None:
        self.name, self.limit, self.began = name, limit, time.monotonic()
        given = [f"--{key}={value}" for key, value in vars(options).items() if key not in ("part", "pack", "seconds")]
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, f"--seconds={limit}", *given]
        paths = [os.environ.get("PYTHONPATH", ""), str(ROOT / "src"), str(ROOT / "tests")]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            errors="replace",
        )
        self.reader = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self.reader.start()

    def _copy(self, log: Any) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = f"[{self.name.rpartition('/')[2]}] {line}"
            sys.stdout.write(text)
            sys.stdout.flush()
            log.write(text)
            log.flush()

    def ended(self) -> dict[str, Any]:
        """Waits for it, and stops it when its time is over."""
        for signal_, patience in (
            (signal.SIGINT, self.limit - (time.monotonic() - self.began)),
            (signal.SIGKILL, GRACE - 5),
        ):
            try:
                self.process.wait(max(patience, 0.1))
                break
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal_)
        code = self.process.wait()
        self.reader.join(5)
        return {"part": self.name, "code": code, "seconds": time.monotonic() - self.began}


def about(options: argparse.Namespace) -> dict[str, Any]:
    """The settings; versions and hardware come from the parts, which import torch."""
    return {"schema": "gripvlm.gpu_checks/1", "options": {k: str(v) for k, v in vars(options).items()}}


def merge_tests(out: Path) -> None:
    """tests.json from the lines that the test processes wrote."""
    lines = [json.loads(line) for path in sorted(out.glob("tests-*.jsonl")) for line in path.read_text().splitlines()]
    if lines:
        first = [line for line in lines if "environment" in line]
        tests = [line for line in lines if "test" in line]
        counts = {kind: sum(one["outcome"] == kind for one in tests) for kind in ("passed", "failed", "skipped")}
        write(out / "tests.json", {"schema": "gripvlm.gpu_tests/1", **first[0], **counts, "tests": tests})
        for path in out.glob("tests-*.jsonl"):
            path.unlink()


def commit_of(options: argparse.Namespace) -> None:
    """Writes the commit that was told into every result."""
    for path in options.out.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if options.commit and "environment" in found:
            found["environment"]["git"] = {"commit": options.commit, "dirty": None}
            write(path, found)


def write(path: Path, what: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


# --- one part ---------------------------------------------------------------------------------------------------------


def one_part(options: argparse.Namespace) -> None:
    kind, _, name = options.part.partition(":")
    ends = time.monotonic() + options.seconds
    if kind == "tests":
        sys.exit(run_tests(options.out, name))
    import torch
    import transformers

    from gripvlm.models.loading import quiet

    quiet()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if options.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        print(f"{torch.cuda.get_device_name()}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if kind == "bench":
        measure(options, name, ends)
    elif kind == "fit":
        look(options, name, ends)
    else:
        from gpu_train import train_steps

        sys.exit(train_steps(options, ends, partial(write, options.out / "train.json")))


def run_tests(out: Path, file: str) -> int:
    """The tests of one file that are marked `gpu`; a line of JSON a test, as it ends."""
    import pytest

    from gripvlm.eval import environment

    journal = out / f"tests-{Path(file).stem}.jsonl"
    journal.write_text(json.dumps({"environment": environment()}) + "\n", encoding="utf-8")

    class Journal:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
                line |= {"measured": dict(report.user_properties), "why": str(report.longrepr or "")[-3000:]}
                with journal.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")

    return int(
        pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfE", file], plugins=[Journal()])
    )


def built(options: argparse.Namespace, name: str) -> Any:
    import torch

    from gripvlm.bench import random_model

    began = time.monotonic()
    model = random_model(name, torch.device(options.device), getattr(torch, options.dtype))
    print(f"{name}: built in {time.monotonic() - began:.1f} s")
    return model


def measure(options: argparse.Namespace, name: str, ends: float) -> None:
    """`gripvlm bench` of one shape: times of all batches."""
    from gripvlm.bench import architecture, bench
    from gripvlm.bench.shapes import random_pruner
    from gripvlm.budget import Budget

    model = built(options, name)
    work = partial(
        bench,
        model,
        partial(prompts_of, model, architecture(name)),
        [(spec, random_pruner(spec, model)) for spec in PRUNERS],
        [Budget.parse(keep) for keep in KEEPS],
        batches=[int(batch) for batch in options.batches.split(",")],
        new=options.new,
        repeats=options.repeats,
        out=options.out / f"bench-{name}.json",
        about={"name": f"random:{name}", "weights": "random", "picture": 672},
    )
    result = within(ends - time.monotonic() - 5, work)
    if result is None:
        sys.exit("nothing was measured")


def look(options: argparse.Namespace, name: str, ends: float) -> None:
    """The largest batch of one shape, unpruned and pruned; a row as it is found."""
    import torch

    from gripvlm.bench import architecture
    from gripvlm.bench.fit import fits
    from gripvlm.bench.measure import FULL, Setting
    from gripvlm.bench.shapes import random_pruner
    from gripvlm.budget import Budget
    from gripvlm.eval import environment

    model = built(options, name)
    if options.memory:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / total)
    result: dict[str, Any] = {"schema": "gripvlm.gpu_fit/1", "environment": environment(), "model": f"random:{name}"}
    result |= {"dtype": options.dtype, "memory_gib": options.memory or None, "new": options.new, "picture": 672}
    result |= {"finished": False, "fits": [], "tried": []}
    file = options.out / f"fit-{name}.json"

    def told(what: str) -> None:
        print(what)
        result["tried"].append(what)

    def search() -> bool:
        settings = [FULL, Setting("pruned", Budget.parse("11%"), random_pruner("norm", model), "norm")]
        prompts = partial(prompts_of, model, architecture(name))
        for row in fits(model, prompts, settings, [64], options.new, options.fit, told):
            result["fits"].append(row)
            write(file, result)
        return True

    result["finished"] = bool(within(ends - time.monotonic() - 3, search))
    write(file, result)
    sys.exit(0 if result["finished"] else "time was over before all was found")


def prompts_of(model: Any, shape: Any, batch: int, length: int) -> Any:
    from gripvlm.bench import random_prompts

    return random_prompts(model, shape, batch, length, 672)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `bench` returns, or had when the time was over; None where it had nothing."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        return work()
    except KeyboardInterrupt as stop:
        print(f"time is over: {stop}")
        return getattr(stop, "result", None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
