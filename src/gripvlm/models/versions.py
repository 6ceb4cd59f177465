"""Which transformers gripvlm is for: the oldest it runs on, the newest it was tested with, and the one that runs."""

from __future__ import annotations

import logging
from functools import cache

__all__ = ["NEWEST_TESTED", "OLDEST", "installed", "mention_newer", "newer_than_tested"]

OLDEST = "5.19.0"
"""As in pyproject.toml; `make test-transformers` runs the tests on it."""

NEWEST_TESTED = "5.24.0"
"""As in locks/gripvlm.txt, which `make test` installs. There is no ceiling: see `mention_newer`."""


def installed() -> tuple[int, int]:
    """Major and minor version of the transformers that runs."""
    import transformers  # imported here so that `import gripvlm` does not import transformers

    return _minor(transformers.__version__)


def newer_than_tested() -> str | None:
    """One line about a transformers that is newer than any that gripvlm was tested with, by major or minor version."""
    if installed() <= _minor(NEWEST_TESTED):
        return None
    import transformers

    return (
        f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest that this gripvlm was "
        "tested with: if something fails, type pip install -U gripvlm, or "
        f'pip install "transformers=={NEWEST_TESTED}"'
    )


@cache
def mention_newer() -> None:
    """Logs that line as a warning, once a process."""
    if (line := newer_than_tested()) is not None:
        logging.getLogger("gripvlm").warning(line)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
