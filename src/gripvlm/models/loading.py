"""Models by what a user types: `lab`, `lab-dense`, a local folder, or a hub id."""

from __future__ import annotations

import os
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gripvlm.errors import GripError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

# torch and transformers are imported inside functions: the CLI checks its arguments before it waits for these imports.

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ModelError(GripError):
    """A model cannot be loaded."""


def quiet() -> None:
    """Silences transformers while it loads: advice on back ends, progress bars for local weights."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def load_model(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    max_memory: float = 0.0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """(model, processor), in eval mode.

    Args:
        name: `lab`, `lab-dense`, a folder, or a hub id.
        device: as PyTorch names it; by default the first accelerator there is.
        dtype: of the weights, one of `DTYPES`; by default float32 on a CPU, elsewhere as they were saved.
        attention: as transformers' `attn_implementation`, such as sdpa; by default its own choice.
        max_memory: GiB of weights on the device; layers beyond it come from the machine's memory, and those beyond that
            from the files on disk, when they run. 0: all are on the device.

    Raises:
        GripError: `lab-dense` is not in this installation.
        ModelError: no such folder or hub id, no network, files that are no VLM, no such device or dtype.
        UnsupportedModelError: a family that gripvlm doesn't prune; raised before weights are loaded.
    """
    place = chosen_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    from gripvlm import lab

    if name in lab.FOLDERS:
        import torch

        if max_memory:
            raise ModelError(f"max_memory = {max_memory:g}: {name} is small, leave that setting out")
        model, processor = lab.load(name)
        if attention is not None:
            try:
                model.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                raise ModelError(f"attn_implementation {attention!r} cannot be used: {_short(error)}") from error
        return model.to(place, None if dtype in (None, "auto") else getattr(torch, dtype)).eval(), processor
    from safetensors import SafetensorError

    source = _checked_name(name)
    try:
        # Half precision is slow on most CPUs.
        dtype = dtype or ("float32" if place.type == "cpu" else "auto")
        model, processor = _load(source, dtype, attention, _spread(place, max_memory))
    except GripError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(_advice(name, source, error)) from error
    return (model if max_memory else model.to(place)).eval(), processor


def _spread(place: torch.device, max_memory: float) -> dict[str, Any]:
    """from_pretrained's arguments for so many GiB of weights on the device, and the others elsewhere."""
    if not max_memory:
        return {}
    from accelerate.utils import get_max_memory

    limits = {place.type if place.type in ("cpu", "mps") else place.index or 0: int(max_memory * 2**30)}
    # What no entry has room for goes to the disk.
    limits = limits if "cpu" in limits else limits | {"cpu": get_max_memory()["cpu"]}
    return {"device_map": "sequential", "max_memory": limits}


def load_sizes(name: str, dtype: str) -> tuple[Any, Any]:
    """(model, processor) where the model has shapes but, unless it is the lab's, no weights: it is on the device meta.

    Raises:
        as `load_model`.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from gripvlm import lab

    if name in lab.FOLDERS:
        model, processor = lab.load(name)
        return model.to(None if dtype == "auto" else getattr(torch, dtype)), processor
    source = _checked_name(name)
    try:
        config, processor = _described(source)
        stored = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config).to(
                stored if dtype == "auto" else getattr(torch, dtype)
            )
    except GripError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(_advice(name, source, error)) from error
    return model, processor


def model_type(name: str) -> str:
    """The type of a model by its name or, without any file of it, the type itself, such as qwen3_vl.

    Raises:
        ModelError: no such folder or hub id, or no network.
        UnsupportedModelError: a family that gripvlm doesn't prune.
    """
    from gripvlm import lab
    from gripvlm.models.families import FAMILIES, not_supported

    if name in lab.FOLDERS:
        return "llava"
    if name in FAMILIES:
        return name
    source = _checked_name(name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_advice(name, source, error)) from error
    if config.model_type not in FAMILIES:
        raise not_supported(config)
    return config.model_type


def _load(source: str | Path, dtype: str, attention: str | None, spread: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText

    _, processor = _described(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, attn_implementation=attention, **spread)
    return model, processor


def _described(source: str | Path) -> tuple[Any, Any]:
    """(configuration, processor)."""
    from transformers import AutoConfig, AutoProcessor

    import gripvlm.lab  # noqa: F401  (a folder may hold the lab's own tower)
    from gripvlm.models.families import FAMILIES, not_supported

    # The configuration and the processor first: they are small, and most mistakes show in them.
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in FAMILIES:
        raise not_supported(config)
    processor = AutoProcessor.from_pretrained(source)
    if not hasattr(processor, "image_processor"):
        raise ValueError("its processor has no image processor.")
    return config, processor


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the first accelerator there is, or the CPU.

    Raises:
        ModelError: not a device of PyTorch, or one that cannot be used.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device {name!r} is not a device of PyTorch: type cpu, cuda, cuda:1, mps or xpu") from error
    # torch takes a device by name that the machine does not have; only using it shows.
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {name} cannot be used: {_short(error)}") from error
    return device


def training_dtype(device: str | None) -> str:
    """bfloat16 on an accelerator that computes in it, else float32: float16 is too small for some gradients."""
    import torch

    place = chosen_device(device)
    if place.type == "cpu" or (place.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)):
        return "float32"
    return "bfloat16"


def _checked_name(name: str) -> str | Path:
    """A folder that exists, or what may be a hub id."""
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"the folder {name} has no config.json: use the folder that save_pretrained wrote")
        return folder
    if folder.is_file():
        raise ModelError(f"{name} is a file: use the folder it lies in")
    if name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") != 1 or " " in name:
        raise ModelError(
            f"no model {name!r}: use 'lab', 'lab-dense', a folder that exists, or a hub id such as "
            "llava-hf/llava-1.5-7b-hf"
        )
    return name


def _advice(name: str, source: str | Path, error: BaseException) -> str:
    if isinstance(source, Path):
        return (
            f"the model in the folder {name} cannot be loaded: {_short(error)} Save the whole of it there with "
            "model.save_pretrained(folder) and processor.save_pretrained(folder), or copy what is missing there."
        )
    return (
        f"{name!r} is no folder here and could not be loaded from the Hub: {_short(error, lines=1)} Check the spelling "
        "and the network (a gated model needs `hf auth login`), or use a local folder or 'lab'."
    )


def _short(error: BaseException, lines: int | None = None) -> str:
    """An error in one line, of its first `lines` or all."""
    text = "\n".join(str(error).splitlines()[:lines])
    return textwrap.shorten(text or type(error).__name__, 240, placeholder="...")
