"""Coroutines are tested on asyncio, as uvicorn runs them."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
