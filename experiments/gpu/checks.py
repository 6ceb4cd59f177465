"""Ten minutes of one GPU: tests of exactness, of waiting, of training; what pruning buys at 7B.

    python experiments/gpu/checks.py --out OUT                                one GPU of 80 GB or more
    python experiments/gpu/checks.py --out OUT --device cpu --models tiny     a try

Needs transformers>=5.19 and pytest beside torch; nothing is downloaded, all weights are random. A machine with an older
transformers and no network takes a packed one along:

    python experiments/gpu/checks.py --pack transformers==5.24.0     where pip has a network: writes .whl/site.tar.xz
    mkdir site && tar -xJf .whl/site.tar.xz -C site && PYTHONPATH=$PWD/site python experiments/gpu/checks.py --out OUT

Each part is a process of its own that is interrupted when its time is over: tests-*.xml, bench-MODEL.json.
run.json has what ended how, log.txt all output. For the largest batch: gripvlm bench --fit 1024.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"tests": 100, "bench": 185}
"""Of each process, start included."""
GRACE = 20
"""Seconds between interrupting a process and killing it."""


def pack(package: str) -> None:
    """A pure Python package as one .tar.xz, a quarter of its wheel's size."""
    file = ROOT / ".whl" / "site.tar.xz"
    file.parent.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target"]
    with tempfile.TemporaryDirectory() as folder, tarfile.open(file, "w:xz", preset=9) as tar:
        subprocess.run([*pip, folder, package], check=True)
        for path in sorted(Path(folder).iterdir()):
            tar.add(path, path.name)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Part -> its command, in the order in which they run."""
    out, found = options.out, {}
    for file in sorted(ROOT.glob(options.tests)) if options.tests else []:
        report = f"--junitxml={out / f'tests-{file.stem}.xml'}"  # a file that breaks the device breaks its process only
        found[f"tests:{file.stem}"] = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", report, str(file)]
    for model in filter(None, options.models.split(",")):
        bench = ["gripvlm", "bench", "--model", f"random:{model}", "--device", options.device, "--dtype", "bfloat16"]
        bench += ["--pruners", "divprune,grip", "--keep", "50%,22%,11%,5%", "--batch", options.batches, "--new", "8"]
        bench += ["--repeats", str(options.repeats), "--overwrite", "--out", str(out / f"bench-{model}.json")]
        found[f"bench:{model}"] = bench
    return found


def run(command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Runs one part; interrupts it when its time is over, and kills it where that does not help."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT / "src")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    began = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        for patience, next_signal in ((seconds, signal.SIGINT), (GRACE, signal.SIGKILL)):
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, next_signal)
    return {"code": process.wait(), "seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".lab" / "gpu", help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tests", default="tests/gpu/test_gpu_*.py", help="their files, as a pattern")
    parser.add_argument("--models", default="llava-1.5-7b,qwen2.5-vl-7b", help="shapes of gripvlm bench")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=560, help="of everything")
    parser.add_argument("--commit", default="", help="where there is no git: the commit that this tree is")
    parser.add_argument("--pack", default="", help="only write .whl/site.tar.xz with this package")
    options = parser.parse_args()
    if options.pack:
        return pack(options.pack)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    began, parts = time.monotonic(), {}
    for name, command in commands(options).items():
        left = options.seconds - (time.monotonic() - began) - GRACE
        limit = min(left, SECONDS[name.partition(":")[0]])
        parts[name] = run(command, limit, options.out / "log.txt") if limit > 5 else {"code": None, "seconds": 0.0}
        print(f"{name:<40} {parts[name]['seconds']:6.1f} s   code {parts[name]['code']}", flush=True)
        about = {"schema": "gripvlm.gpu_checks/2", "commit": options.commit, "parts": parts}
        (options.out / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    sys.exit(int(any(part["code"] != 0 for part in parts.values())))


if __name__ == "__main__":
    main()
