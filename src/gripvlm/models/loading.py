"""Models by what a user types: `lab`, a local folder, or a hub id."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from gripvlm.errors import GripError, UnsupportedModelError
from gripvlm.utils.strict_json import BadJSON, read

__all__ = ["DTYPES", "ModelError", "chosen_device", "load_model", "quiet"]

DTYPES = ("auto", "float32", "bfloat16", "float16")

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class ModelError(GripError):
    """A model cannot be loaded."""


def quiet() -> None:
    """Silences what transformers says while loading: advice on back ends, bars for local weights."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def load_model(
    name: str, device: str | None = None, dtype: str | None = None, attention: str | None = None
) -> tuple[Any, Any]:
    """(model, processor), in eval mode.

    Args:
        name: `lab`, a folder, or a hub id.
        device: as PyTorch names it; by default the first accelerator there is.
        dtype: of the weights, one of `DTYPES`; by default float32 on a CPU, elsewhere as they were saved.
        attention: as transformers' `attn_implementation`, such as sdpa; by default its own choice.

    Raises:
        ModelError: no such folder or hub id, no network, files that are no VLM, no such device or dtype.
        UnsupportedModelError: a family that gripvlm doesn't prune; said before weights are loaded.
    """
    import torch

    place = chosen_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: type one of {', '.join(DTYPES)}")
    if name == "lab":
        from gripvlm import lab

        model, processor = lab.load()
        if attention is not None:
            model.set_attn_implementation(attention)
        kind = None if dtype in (None, "auto") else getattr(torch, dtype)
        return model.to(place, kind).eval(), processor

    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    import gripvlm.lab  # noqa: F401  (a folder may hold the lab's own tower)
    from gripvlm.models import FAMILIES

    where = _checked_name(name)
    try:
        config = AutoConfig.from_pretrained(where)
        if config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"{name} is a model of type {config.model_type!r}; supported are {', '.join(sorted(FAMILIES))}"
            )
        processor = AutoProcessor.from_pretrained(where)
        if not hasattr(processor, "image_processor"):
            raise ModelError(_advice(name, where, ValueError("its processor has no image processor.")))
        kind = dtype or ("float32" if place.type == "cpu" else "auto")
        model = AutoModelForImageTextToText.from_pretrained(where, dtype=kind, attn_implementation=attention)
    except GripError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(_advice(name, where, error)) from error
    return model.to(place).eval(), processor


def chosen_device(name: str | None) -> Any:
    """The device of that name, or the first accelerator there is, or the CPU.

    Raises:
        ModelError: none that PyTorch knows, or one that cannot be used.
    """
    import torch

    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device {name!r} is none that PyTorch knows: type cpu, cuda, cuda:1, mps or xpu") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} cannot be used: {_first_line(error)}") from error
    return device


def _checked_name(name: str) -> str | Path:
    """A folder that exists, or what may be a hub id."""
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"the folder {name} has no config.json: type the folder that save_pretrained wrote")
        return folder
    if folder.is_file():
        raise ModelError(f"{name} is a file: type the folder it lies in")
    looks_local = name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") != 1 or " " in name
    if looks_local:
        raise ModelError(
            f"no model {name!r}: type 'lab', a folder that exists, or a hub id such as llava-hf/llava-1.5-7b-hf"
        )
    return name


def _advice(name: str, where: str | Path, error: BaseException) -> str:
    if isinstance(where, Path):
        if lacking := _lacking(where):
            return (
                f"the folder {name} has {' and '.join(lacking)}: save the whole model there, "
                "model.save_pretrained(folder) and processor.save_pretrained(folder), or copy the missing files from "
                "where it came from"
            )
        return f"the model in {name} cannot be loaded: {_first_line(error)}"
    return (
        f"{name!r} is no folder here and could not be loaded from the Hub: {_first_line(error)} "
        "Check the spelling and the network (a gated model needs `hf auth login`), or type a local folder or 'lab'."
    )


def _lacking(folder: Path) -> list[str]:
    """What a model folder is without, as one would say it; [] where all the usual files are there."""
    whole = folder / "processor_config.json"
    inside = whole.is_file() and "image_processor" in whole.read_text(encoding="utf-8", errors="replace")
    lacking = []
    try:
        read(folder / "config.json")
    except BadJSON:
        lacking.append("a config.json that is not JSON")
    if not inside and not (folder / "preprocessor_config.json").is_file():
        lacking.append("no image processor (preprocessor_config.json, or processor_config.json with one in it)")
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        lacking.append("no tokenizer (tokenizer.json)")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        lacking.append("no weights (model.safetensors)")
    return lacking


def _first_line(error: BaseException) -> str:
    """What an error says, without its later paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
