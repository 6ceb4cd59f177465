"""What several test files start from: one tiny model, and a ragged batch for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tiny_models import llava_inputs, tiny_llava
from touching import touches

OPTIONAL = ("slow", "browser", "demo")


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what touches transformers; tests of `OPTIONAL` run where -m asks for them, a GPU's on one."""
    for item in items:
        if touches(item.path):
            item.add_marker("transformers")
        for name in OPTIONAL:
            if item.get_closest_marker(name) and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"pytest -m {name} runs it"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def full_precision() -> Iterator[None]:
    """float32 products and convolutions in float32, not TF32."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.fixture(scope="module")
def model() -> Any:
    """One tiny LLaVA a file."""
    return tiny_llava()


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Two prompts, with one image and with two."""
    return llava_inputs([1, 2], [7, 9])


@pytest.fixture(scope="module")
def engine():
    """A tiny llava, ready to score subsets."""
    from gripvlm.grip.train import Engine
    from tiny_train import tiny_vlm

    return Engine(*tiny_vlm())


@pytest.fixture(scope="module")
def batch(engine):
    """Two questions about each of two pictures."""
    from tiny_train import asked

    task = asked(pictures=2, each=2)
    return engine.prepare([(task, sample) for sample in task.samples])
