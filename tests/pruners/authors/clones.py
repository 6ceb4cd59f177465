"""Runs functions of methods' authors from clones of their repositories, without the models that stand around them."""

from __future__ import annotations
import __future__

import ast
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Ascending", "Clone", "Torch", "on_cpu", "run_llama"]


class Clone:
    """One repository at one commit; `take` runs pieces of a file of it."""

    def __init__(self, folder: Path, repository: str, commit: str) -> None:
        names = (repository.replace("/", "+") + "/repo", repository.split("/")[1], repository)
        found = [folder / name for name in names if (folder / name).exists()]
        if not found:
            sys.exit(
                f"no clone of {repository} in {folder}: git clone https://github.com/{repository} {folder}/{names[1]}"
            )
        self.path, self.commit = found[0], commit

    def text(self, path: str) -> str:
        command = ["git", "-C", str(self.path), "show", f"{self.commit}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def take(self, path: str, *names: str, **around: Any) -> dict[str, Any]:
        """Functions and methods ("Class.name") of a file, in one namespace with torch and `around`."""
        space: dict[str, Any] = {"torch": torch, "F": F, "math": math, "os": os, **around}
        tree = ast.parse(self.text(path))
        for name in names:
            *outer, last = name.split(".")
            body = tree.body
            for part in outer:
                body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
            node = next(node for node in body if getattr(node, "name", None) == last)
            node.decorator_list = []
            module = ast.Module([node], [])
            exec(compile(module, path, "exec", __future__.annotations.compiler_flag), space)
        return space


def on_cpu(value: Any) -> Any:
    """Something whose .cuda() is itself."""
    return SimpleNamespace(cuda=lambda: value)


class Clock:
    """Stands for a GPU's events."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class Torch:
    """torch without a GPU's clock."""

    cuda = SimpleNamespace(Event=Clock, synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Ascending(set):
    """A set that is gone through in ascending order."""

    def __iter__(self) -> Any:
        return iter(sorted(super().__iter__()))


def run_llama(forward: Any, prompt: Tensor, layer: Callable[..., Any], count: int, **attributes: Any) -> None:
    """An authors' `LlamaModel.forward` over layers that `layer(number, hidden, **arguments)` stands for."""

    def make(number: int) -> Any:
        return lambda hidden=None, *_, **rest: layer(
            number, rest.pop("hidden_states") if hidden is None else hidden, **rest
        )

    config = SimpleNamespace(
        output_attentions=False, output_hidden_states=False, use_cache=False, use_return_dict=False
    )
    layers = []
    for number in range(count):
        one = type("Layer", (), {"__call__": staticmethod(make(number))})()
        one.mlp = SimpleNamespace(up_proj=SimpleNamespace(out_features=1))
        one.self_attn = SimpleNamespace(layer_idx=number)
        layers.append(one)
    config.__dict__.update(attributes.pop("config", {}))
    given = {
        "layers": layers,
        "num_layers": count,
        "config": config,
        "gradient_checkpointing": False,
        "training": False,
    }
    given |= {"_use_flash_attention_2": True, "_use_sdpa": False, "norm": lambda states: states}
    counters = {"init_token_total_shape": 1, "generate_process_count": 0, "all_FLOPs": 0, "total_cuda_time": 0}
    given |= {**counters, "num_forward": 0, "num_token_pool": 0}
    asked = attributes.pop("asked", {})
    model = SimpleNamespace(**{**given, **attributes})
    for name in ("get_retained_image_token", "dual_attention_filter"):
        if name in forward:
            setattr(model, name, lambda *args, _name=name, **rest: forward[_name](model, *args, **rest))
    forward["forward"](model, inputs_embeds=prompt[None], use_cache=False, return_dict=False, **asked)
