"""What is installed is locked, what is named is tested, and a transformers newer than that is mentioned once."""

from __future__ import annotations

import logging
import re
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
import transformers
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from gripvlm.cli import main
from gripvlm.models import Family, family_of
from gripvlm.models.compat import NEWEST_TESTED, OLDEST, installed, mention_newer, newer_than_tested
from tiny_models import tiny_llava
from touching import HERE, touches

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = HERE.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = {name: ROOT / "locks" / f"{name}.txt" for name in ("gripvlm", "lmms")}
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
        wanted += named(*project["optional-dependencies"].values())
    else:
        wanted += named([variable("LMMS"), "pytest", "hypothesis"])
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
    """torch apart, whose version may be typed; .venv/lmms has a lock of its own."""
    lock = "lmms" if Path(sys.prefix).name == "lmms" else "gripvlm"
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
    assert newest == NEWEST_TESTED, "locks/gripvlm.txt has another transformers than gripvlm/models/versions.py"


@pytest.fixture
def version(monkeypatch):
    """Sets the version that transformers says it is."""
    mention_newer.cache_clear()
    yield lambda number: monkeypatch.setattr(transformers, "__version__", number)
    mention_newer.cache_clear()


@pytest.mark.parametrize("number", [OLDEST, NEWEST_TESTED, f"{NEWEST_TESTED.rpartition('.')[0]}.99"])
def test_a_tested_transformers_is_not_mentioned(number, version, caplog):
    version(number)
    family_of(tiny_llava())
    assert newer_than_tested() is None
    assert not caplog.records


@pytest.mark.parametrize("number", ["5.99.0.dev0", "6.0.0"])
def test_a_newer_transformers_is_mentioned_once_in_one_line(number, version, caplog):
    version(number)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            family_of(tiny_llava())
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("gripvlm", "WARNING")
    said = record.getMessage()
    assert said.startswith(
        f"transformers {number} is newer than {NEWEST_TESTED}, the newest that this gripvlm was tested"
    )
    assert f'pip install "transformers=={NEWEST_TESTED}"' in said
    assert "\n" not in said


def test_env_says_what_is_tested(version, capsys):
    assert main(["env"]) == 0
    usual = capsys.readouterr().out
    assert f"(tested: {OLDEST} to {NEWEST_TESTED})" in usual
    assert "device" in usual
    assert "is newer than" not in usual or installed() > tuple(map(int, NEWEST_TESTED.split(".")[:2]))
    version("6.0.0")
    assert main(["env"]) == 0
    assert f"transformers 6.0.0 is newer than {NEWEST_TESTED}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["families", "sizes", "zoo_models", "matrix", "layered", "static_shapes", "kill"])
def test_files_that_run_models_are_marked(name, request):
    """Also those that reach transformers through a module beside them, as test_kill does."""
    assert touches(HERE / f"test_{name}.py")
    assert touches(request.path)
    assert request.node.get_closest_marker("transformers")


@pytest.mark.parametrize("name", ["policy", "statistics", "zoo_features", "budget"])
def test_files_that_run_none_are_not(name):
    assert not touches(HERE / f"test_{name}.py")
