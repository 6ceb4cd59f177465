"""Where and when a number was measured: versions, hardware, the commit of gripvlm's own checkout, the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import gripvlm

__all__ = ["command_line", "environment", "git_state", "hardware", "utc", "versions"]

_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of Python, gripvlm and the packages it uses."""
    own = {"python": platform.python_version(), "gripvlm": gripvlm.__version__}
    return own | {name: version(name) for name in _PACKAGES}


def hardware(device: torch.device | None = None) -> dict[str, Any]:
    """The processor, its cores and threads, the memory in GiB, and the accelerator if there is one."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        # A container or a scheduler may give this process fewer cores than the machine has.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    facts["device"] = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return facts


@lru_cache(maxsize=1)
def git_state() -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that gripvlm runs from, None where it is installed."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        # A checkout that holds an installed gripvlm, in its virtual environment, is some other project's.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """This process's command, as one would type it."""
    program, *arguments = sys.argv or ["python"]
    path = Path(program)
    # For `python -m gripvlm` this is the path of a file, which is not what a user types.
    if path.name == "__main__.py":
        words = ["python", "-m", path.parent.name, *arguments]
    else:
        words = [path.name or "python", *arguments]
    # The bytes of a file name may be no UTF-8, and JSON could not hold them.
    return shlex.join(words).encode("utf-8", "backslashreplace").decode()


def utc() -> str:
    """Now, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Everything above in one dict: what `gripvlm env` prints."""
    return {"versions": versions(), "hardware": hardware(), "git": git_state()}


def _processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
