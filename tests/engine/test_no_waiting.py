"""Runs tests/no_waiting.py in a process of its own: it gives torch a device in name only, which others would find."""

from __future__ import annotations

import subprocess
import sys

import pytest

from places import TESTS

pytestmark = pytest.mark.transformers


def test_nothing_waits_between_the_encoder_and_the_prefill():
    file = TESTS / "no_waiting.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
