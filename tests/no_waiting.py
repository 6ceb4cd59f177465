"""Between the vision encoder and the prefill the host never waits for an accelerator.

There is no accelerator here. torch's fake tensors claim to be on one (a device in name only), and refuse every
operation whose result the host would have to wait for (`bool(t)`, `t.tolist()`, `t.nonzero()`, `t[mask]`); copies
to the host, and from it, are caught below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers.modeling_outputs import BaseModelOutputWithPooling

import gripvlm
from gripvlm.engine import pipeline
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import PrunedBatch, prune_batch
from gripvlm.engine.request import PruneRequest, checked_pruner
from gripvlm.errors import InputError, PrunerError
from gripvlm.grip.pruner import Grip
from gripvlm.grip.scorer import Scorer, ScorerConfig
from gripvlm.models.prompts import Prompts
from gripvlm.pruners import Pruner, get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.wrappers.gumbel import Gumbel
from gripvlm.types import Selection, VisionRows, VisualTokens
from gripvlm.utils import batching
from on_device import NEVER_WAIT
from tiny_models import IMAGE, build

WAITS = "waits"
_setup_privateuseone_for_python_backend(WAITS)
IDS = torch.tensor([[0, 0, 1, *[IMAGE] * 16, 5, 6, 7], [1, *[IMAGE] * 16, 3, 4, 5, 6, 8]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


class NoCopies(TorchDispatchMode):
    """Refuses operations that bring something from the accelerator to the host, or, unless it is page-locked and
    asked for as `onto` does, from the host to the accelerator.

    A number of the host may take part in arithmetic, where it travels with the operation, but not in indexing.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inside = {leaf.device.type for leaf in given}
        outside = {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        assert not (WAITS in inside and "cpu" in outside), f"{func} copies to the host"
        indexing = "index" in func.name()
        host = [leaf for leaf in given if leaf.device.type == "cpu" and (leaf.ndim or indexing or len(given) == 1)]
        pinned = kwargs.get("non_blocking") and all(getattr(leaf, "pinned", False) for leaf in host)
        assert not (WAITS in inside | outside and host and not pinned), f"{func} copies from the host"
        return out


class NoNumbers(TorchFunctionMode):
    """Refuses `t[indices] = number`: torch makes a tensor of the number on the host where `t` is on a CUDA device, and
    there alone, so that the device in name only would not show it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__setitem__ and args[0].device.type == WAITS:
            by = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(args[1]))
            assert not by or isinstance(args[2], torch.Tensor), "a number is copied from the host"
        return func(*args, **(kwargs or {}))


def page_locked(host: torch.Tensor) -> torch.Tensor:
    """In name only, as the device is."""
    locked = host.clone()
    locked.pinned = True  # type: ignore[attr-defined]
    return locked


class Event:
    def __init__(self, **options: Any) -> None:
        assert options["enable_timing"]

    def record(self) -> None: ...


@pytest.fixture
def accelerator(monkeypatch: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A LLaVA that is on an accelerator, and inputs for it."""
    real = copy.deepcopy(build("llava"))
    on_host = Prompts.of(real, {**TEXT, "pixel_values": torch.empty(2, 3, 32, 32)})
    monkeypatch.setattr(torch.Tensor, "pin_memory", page_locked)
    monkeypatch.setattr(batching, "_PINS", frozenset({WAITS}))
    monkeypatch.setattr(torch, "Event", Event)
    # Read before the encoder starts, when there is nothing to wait for:
    monkeypatch.setattr(
        Prompts, "of", classmethod(lambda cls, model, inputs: replace(on_host, model=model, inputs=inputs))
    )
    monkeypatch.setattr(
        pipeline, "questions", lambda model, inputs, question: list(torch.empty(2, 3, 32, device=WAITS))
    )
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies(), NoNumbers():
        model = moved(real)
        # What the encoder is asked is transformers' own; its answer is on the accelerator.
        with torch.device(WAITS):
            rows = BaseModelOutputWithPooling(pooler_output=list(torch.empty(32, 32).split(16)))
            answer = {"mm_encoder_outputs": {"image": rows}}
            monkeypatch.setattr(model, "_prepare_multimodal_encoder_kwargs_for_generation", lambda inputs: answer)
            inputs = {
                "input_ids": torch.empty(IDS.shape, dtype=torch.long),
                "attention_mask": torch.empty(IDS.shape, dtype=torch.long),
                "pixel_values": torch.empty(2, 3, 32, 32),
            }
        yield model, inputs


def moved(module: torch.nn.Module) -> Any:
    """The module with its weights and buffers on the accelerator."""
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, value in kind.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=WAITS)
                    kind[name] = torch.nn.Parameter(fake, False) if kind is part._parameters else fake
    return module


def run(model: Any, inputs: dict[str, Any], pruner: Pruner, keep: Any) -> PrunedBatch:
    with torch.no_grad():
        return prune_batch(PruneRequest.of(model, pruner, keep), inputs)


def grip(**config: Any) -> Grip:
    return Grip("untrained", Scorer(ScorerConfig(32, width=16, heads=2, **config)))


def test_rounds_and_one_budget_wait_for_nothing_either(request, monkeypatch):
    """As long as no prompt has several images: how many of each are kept is then known only on the device."""
    monkeypatch.setattr(Grip, "check", lambda self, model: None)
    pruner = grip(rounds=4, joint=True)
    model, inputs = request.getfixturevalue("accelerator")
    moved(pruner.module)
    batch = run(model, inputs, pruner, [3, 7])
    assert [[s.k for s in images] for images in batch.selections] == [[3], [7]]


@pytest.mark.parametrize("name", NEVER_WAIT)
@pytest.mark.parametrize("keep", [5, [3, 7]], ids=["even", "ragged"])
def test_nothing_waits(name, keep, request, monkeypatch):
    monkeypatch.setattr(Grip, "check", lambda self, model: None)  # this scorer is untrained
    pruner = grip() if name == "grip" else checked_pruner(name)
    model, inputs = request.getfixturevalue("accelerator")
    if name == "grip":
        moved(pruner.module)
    batch = run(model, inputs, pruner, 1.0 if name == "keep_all" else keep)
    arguments, kept = batch.arguments, sum(s.k for images in batch.selections for s in images)
    assert arguments["input_ids"].device.type == arguments["position_ids"].device.type == WAITS
    if name != "keep_all":
        assert arguments["input_ids"].shape == (2, 11 if keep == 5 else 13)
        assert kept == 10
    rows = arguments["mm_encoder_outputs"]["image"].pooler_output
    assert sum(len(one) for one in rows) == kept
    with pytest.raises(DataDependentOutputException):
        batch.checks.raise_if_failed()  # here it waits: what was not checked above is checked now


@pytest.mark.parametrize("name", ["scope", "holov"])
def test_what_reads_the_tower_adds_no_waiting_of_its_own(name, accelerator):
    rows = torch.empty(17, 8, device=WAITS)
    vision = {-2: VisionRows(torch.empty(2, 17, device=WAITS))}
    images = [VisualTokens(rows[:n], k, vision=vision, patches=rows[:n]) for n, k in ((17, 5), (17, 3))]
    assert [selection.k for selection in checked_pruner(name).select_batch(images)] == [5, 3]


def test_draws_are_sent_without_waiting(accelerator):
    images = [VisualTokens(torch.empty(17, 8, device=WAITS), k, image=i, key=i) for i, k in enumerate((5, 3))]
    scored = Given([[torch.empty(17, device=WAITS) for _ in images]])
    for pruner in (checked_pruner("random"), Gumbel(scored)):
        assert [selection.k for selection in pruner.select_batch(images)] == [5, 3]


def test_the_fixture_would_notice(accelerator):
    _, inputs = accelerator
    for wait in (
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.arange(3).to(t.device),
        lambda t: torch.tensor([1, 2], device=t.device),
        lambda t: t[:, torch.tensor([0])],
        lambda t: t.__setitem__((t[0], t[0]), True),
        lambda t: t.copy_(torch.zeros(t.shape)),
    ):
        with pytest.raises((DataDependentOutputException, RuntimeError, AssertionError)):
            wait(inputs["input_ids"])


@pytest.mark.parametrize("spec", ["tower(norm):block=1,tower_keep=0.5", "tower(grid,divprune):block=0,tower_keep=8"])
def test_nothing_waits_inside_the_tower(spec, accelerator, monkeypatch):
    """The tower itself runs, on the device in name only; what it is for CLIP's holds for any plain ViT. Qwen's own code
    waits in every block."""
    model, inputs = accelerator
    # Not the fixture's answer, but the encoder.
    encode = type(model)._prepare_multimodal_encoder_kwargs_for_generation.__get__(model)
    monkeypatch.setattr(model, "_prepare_multimodal_encoder_kwargs_for_generation", encode)
    batch = run(model, inputs, get_pruner(spec), 5)
    assert [[(s.k, s.tower) for s in images] for images in batch.selections] == [[(5, 8)], [(5, 8)]]


def test_rows_that_nobody_vouches_for_are_checked_before_they_are_used(accelerator):
    class Own(Pruner):
        name = "own"
        needs = frozenset({"features"})

        def select(self, tokens: VisualTokens) -> Selection:
            return Selection(torch.arange(tokens.keep, device=tokens.features.device), tokens.n)

    with pytest.raises(DataDependentOutputException):
        run(*accelerator, Own(), 5)


def test_checks_are_read_in_order_and_once():
    seen = []
    checks = DeferredChecks()
    meta = [torch.ones((), dtype=torch.bool, device="meta") for _ in range(2)]
    for name, flag in zip("ab", meta, strict=True):
        checks.add(flag, lambda name=name: seen.append(name))
    assert not seen  # not on a CPU: later
    checks._pending = [(torch.tensor(name == "b"), look) for name, (_, look) in zip("ab", checks._pending, strict=True)]
    checks.raise_if_failed()
    checks.raise_if_failed()
    assert seen == ["b"]


def test_what_is_wrong_is_raised_when_the_block_ends(monkeypatch):
    """As on an accelerator: nothing is read until the model has run."""
    model = build("llava")
    inputs = {**TEXT, "pixel_values": torch.randn(2, 3, 32, 32)}

    def later(self: DeferredChecks, failed: torch.Tensor, explain: Any) -> None:
        self._pending.append((failed, explain))

    monkeypatch.setattr(DeferredChecks, "add", later)
    with torch.no_grad(), gripvlm.pruned_run(model, inputs, "norm", 4) as (arguments, _):
        model(**arguments)
    inputs["pixel_values"][1, 0, 0, 0] = torch.nan
    ran = []
    run = gripvlm.pruned_run(model, inputs, "norm", 4)
    with pytest.raises(InputError, match="NaN of image 0 of sample 1"), torch.no_grad(), run as (arguments, _):
        ran.append(model(**arguments))
    assert ran
    with pytest.raises(InputError, match="NaN of image 0 of sample 1"), gripvlm.prune(model, "norm", 4):
        model.generate(**inputs, max_new_tokens=2)
    for pruner in ("norm", "divprune", "cdpruner", "mmr(norm)", "grid"):
        for sampling in (False, True):
            with pytest.raises(InputError, match="NaN of image 0 of sample 1"), gripvlm.prune(model, pruner, 4):
                model.generate(**inputs, max_new_tokens=2, do_sample=sampling)
    with pytest.raises(InputError, match="NaN of image 0 of sample 1"):
        gripvlm.prune_inputs(model, inputs, "norm", 4)
    run = gripvlm.pruned_run(model, inputs, "norm", 4)
    with pytest.raises(InputError, match="NaN of image 0 of sample 1") as caught, run:
        raise ValueError("sampling: probabilities are NaN")
    assert isinstance(caught.value.__context__, ValueError)
    inputs["pixel_values"][1, 0, 0, 0] = 0.0
    run = gripvlm.pruned_run(model, inputs, "norm", 4)
    with pytest.raises(ValueError, match="my own"), run:
        raise ValueError("my own")


def test_a_pruner_that_stumbles_over_nan_is_not_blamed():
    class Stumbles(Pruner):
        name = "stumbles"
        needs = frozenset({"features"})

        def select(self, tokens: VisualTokens) -> Selection:
            raise PrunerError("NaN upsets me")

    checks = DeferredChecks()
    checks._pending = [(torch.tensor(True), lambda: (_ for _ in ()).throw(InputError("the encoder made NaN")))]
    with pytest.raises(InputError, match="the encoder"):
        pipeline._select(Stumbles(), [VisualTokens(torch.zeros(4, 2), 2)], checks)
