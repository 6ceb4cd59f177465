"""Models inside a wrapper of torch or peft, or with weights that are elsewhere until they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.compat import takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `torch.compile`, peft's adapters or data-parallel wrappers; else the model itself.

    Adapters stay in place: they are layers of the model inside.

    Raises:
        UnsupportedModelError: a wrapper through which the model cannot be pruned; it says what to pass.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    # An unknown wrapper may change the model's inputs, so it is refused and not unwrapped.
    if not _takes_encoded_images(model):
        for name in ("module", "model", "base_model"):
            inner = getattr(model, name, None)
            if inner is not model and callable(getattr(inner, "generate", None)) and _takes_encoded_images(inner):
                raise UnsupportedModelError(
                    f"a {type(model).__name__} is around the {type(inner).__name__}: pass the model itself, its .{name}"
                )
    return model


def _takes_encoded_images(model: Any) -> bool:
    forward = getattr(model, "forward", None)
    return callable(forward) and "mm_encoder_outputs" in takes(forward)


def _inside(model: Any) -> Any:
    """The module inside a wrapper; None if `model` is not a wrapper."""
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedModelError(
            f"a DataParallel copies the model to {len(model.device_ids)} devices, where pruning does not reach it: "
            "pass model.module and run one process a device"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    # By name, as a torch may be built without torch.distributed.fsdp.
    if kind == "FullyShardedDataParallel":
        raise UnsupportedModelError(
            "a FullyShardedDataParallel cuts the weights over processes, so the vision encoder cannot run by itself: "
            "prune a model that is whole in each process (DistributedDataParallel, or no wrapper)"
        )
    if kind == "OptimizedModule":  # torch.compile; by name, as importing its class would import torch._dynamo
        return model._orig_mod
    if hasattr(model, "peft_config") and hasattr(type(model), "get_base_model"):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"this {kind} puts learned tokens ahead of the prompt, which pruning cannot count: use adapters inside "
                "the model, such as peft.LoraConfig"
            )
        return model.get_base_model()
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them when they are needed.

    A module without weights computes on the CPU.

    Raises:
        InputError: its weights are on the meta device, and nothing brings them to another.
    """
    weight = next(module.parameters(), None)
    if weight is None:
        return torch.device("cpu")
    if weight.device.type != "meta":
        return weight.device
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):  # of accelerate's SequentialHook: each
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise InputError("the model is on the meta device, which holds no weights: load it with from_pretrained(...)")
