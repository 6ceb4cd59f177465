"""Checks an installed release: `make test-wheel` calls it with the Python of an environment that has nothing else.

The package comes from that environment and not from this checkout; its commands run; README's Python runs, on the lab's
model and, as far as it prunes a model, on a tiny Qwen3-VL.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main() -> None:
    import gripvlm

    if not Path(gripvlm.__file__).resolve().is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"gripvlm comes from {gripvlm.__file__}, not from the environment {sys.prefix}")
    if gripvlm.__version__ != version("gripvlm"):
        sys.exit(f"the package says {gripvlm.__version__}, its metadata {version('gripvlm')}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command in (["list"], ["env"], ["quickstart", "--limit", "2"]):
            typed = [str(Path(sys.executable).parent / "gripvlm"), *command]
            run = subprocess.run(typed, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"gripvlm {' '.join(command)} fails:\n{run.stdout[-1000:]}{run.stderr}")
        blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
        names = _of_the_lab()
        for number, block in enumerate(blocks):
            exec(compile(block, f"README.md, block {number}", "exec"), names)
        _of_a_tiny_qwen(blocks[0])
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"gripvlm {gripvlm.__version__} on Python {python}: 3 commands, {len(blocks)} blocks of README's Python run")


def _of_the_lab() -> dict[str, object]:
    """What README's examples take for granted: a model and its inputs."""
    from gripvlm import lab
    from gripvlm.eval import make_inputs
    from gripvlm.tasks import get_tasks

    model, processor = lab.load()
    (task,) = get_tasks("lab/existence")
    sample = task.samples[0]
    return {"model": model, "inputs": make_inputs(model, processor, [task.prompt(sample)], [sample.images])}


def _of_a_tiny_qwen(block: str) -> None:
    from tiny_families import TINY, build, make

    names = {"model": build("qwen3_vl"), "inputs": dict(make(TINY["qwen3_vl"], [1], [7]).inputs)}
    exec(compile(block, "README.md, block 0", "exec"), names)


if __name__ == "__main__":
    main()
