"""Rows of a data set: from the Hugging Face hub, or from a folder or file, all through the `datasets` library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gripvlm.tasks.pictures import TaskError, open_image

__all__ = ["Rows", "Source", "load_rows"]

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        task: the task's name, for messages.
        repo: a hub id; not read where there is a path.
        config, split: as the hub names them; None for the only one.
        path: a folder or a file instead of the hub. A folder is what `hf download --repo-type dataset` or
            `save_to_disk` wrote, or one with Parquet, JSON Lines or Arrow files; a file is one of those.
        chosen: which of config and split were typed, and are not the task's own.
    """

    task: str
    repo: str
    config: str | None = None
    split: str | None = None
    path: Path | None = None
    chosen: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.path) if self.path else self.repo


class Rows:
    """The rows of one split. Pictures stay encoded until they are asked for.

    Args:
        table: a `datasets.Dataset`.
        image: the column with the pictures.
        source: where it came from.
    """

    def __init__(self, table: Any, image: str, source: Source) -> None:
        from datasets import Image as ImageFeature

        self.image, self.source = image, source
        # Undecoded: a run of thousands of questions would otherwise decode every image when the columns are read.
        feature = table.features.get(image)
        if isinstance(feature, ImageFeature):
            table = table.cast_column(image, ImageFeature(decode=False))
        # Some data sets hold lists of images, mostly of one.
        elif isinstance(getattr(feature, "feature", None), ImageFeature):
            table = table.cast_column(image, type(feature)(ImageFeature(decode=False)))
        self.table = table
        # JSON Lines name picture files, relative to the file or the folder that was given.
        self.folder = source.path.parent if source.path and source.path.is_file() else source.path or Path()

    def texts(self) -> list[dict[str, Any]]:
        """All columns but the pictures, row by row."""
        return self.table.remove_columns([self.image]).to_list()

    def picture(self, index: int) -> Image.Image:
        """The picture of a row, RGB and upright."""
        place = f"the picture of row {index} in {self.source}"
        value = self._encoded(index)
        if not value:
            raise TaskError(f"{place} is empty: leave that row out")
        return open_image(value if isinstance(value, bytes) else self.folder / value, place)

    def fingerprint(self, index: int) -> str:
        """A short hash of a row's encoded picture, "" for none: equal ones are the same picture."""
        value = self._encoded(index)
        content = value.encode() if isinstance(value, str) else value
        return hashlib.blake2b(content, digest_size=8).hexdigest() if content else ""

    def _encoded(self, index: int) -> bytes | str:
        """What the row holds of its picture: the bytes of a file, its path, or "" for none."""
        value = self.table[index][self.image]
        if isinstance(value, list):
            if len(value) > 1:
                raise TaskError(
                    f"row {index} of {self.source} has {len(value)} pictures in {self.image!r}; such tasks ask about "
                    "one: name a column with image=, leave such rows out, or use jsonl:, where a line may show several"
                )
            value = value[0] if value else None
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None or isinstance(value, (bytes, str)):
            return value or ""
        raise TaskError(
            f"{self.source}: column {self.image!r} holds a {type(value).__name__} in row {index}, no picture: name "
            "the column with image="
        )


def load_rows(source: Source, image: str, columns: tuple[str, ...]) -> Rows:
    """The rows that `source` names.

    Args:
        image: the column with the pictures.
        columns: the others that must be there.

    Raises:
        TaskError: `datasets` is not installed, there are no such data, with what can be typed instead, or a column is
            not there.
    """
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{source.task} reads its questions with the library `datasets`, which is not installed: type "
            "pip install 'gripvlm[bench]'"
        ) from None
    try:
        table = _from_path(datasets, source, source.path) if source.path else _from_hub(datasets, source)
    except TaskError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            "check the path, and name what it has with config= and split="
            if source.path
            else f"on a machine without network copy the data set here and type {source.task}:path=FOLDER, "
            "elsewhere check the spelling (a gated data set needs `hf auth login`)"
        )
        raise TaskError(f"{source.task}: {source} cannot be loaded: {first} ({advice})") from error
    if lacking := [name for name in (*columns, image) if name not in table.column_names]:
        raise TaskError(
            f"{source.task}: {source} has no column {', '.join(map(repr, lacking))}, only "
            f"{', '.join(table.column_names)}: is this the right data set?"
        )
    return Rows(table, image, source)


def _from_hub(datasets: Any, source: Source) -> Any:
    split = source.split or _only("split", source, datasets.get_dataset_split_names(source.repo, source.config))
    return datasets.load_dataset(source.repo, source.config, split=split)


def _from_path(datasets: Any, source: Source, path: Path) -> Any:
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise TaskError(f"{source.task}: {path} is no {', '.join(_FORMATS)} file: type the path of one")
        if source.chosen:
            raise TaskError(
                f"{source.task}: {path} is one file, which has no config and no split: leave out "
                f"{' and '.join(sorted(source.chosen))}"
            )
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    if not path.is_dir():
        raise TaskError(f"{source.task}: no folder or file {str(path)!r}: check the path")
    # `load_dataset` refuses what `save_to_disk` wrote.
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved_split(datasets.load_from_disk(str(path)), source)
    config = source.config
    # A copy without its card has one configuration without a name.
    if "config" not in source.chosen:
        there = datasets.get_dataset_config_names(str(path))
        config = config if config in there else _only("config", source, there)
    split = source.split or _only("split", source, datasets.get_dataset_split_names(str(path), config))
    return datasets.load_dataset(str(path), config, split=split)


def _saved_split(saved: Any, source: Source) -> Any:
    """One split of what `save_to_disk` wrote: several by name, or a single one."""
    if isinstance(saved, dict):
        split = source.split or _only("split", source, list(saved))
        if split not in saved:
            raise TaskError(
                f"{source.task}: {source.path} has no split {split!r}: type split= with one of {list(saved)}"
            )
        return saved[split]
    if saved.split is not None and source.split and str(saved.split) != source.split:
        raise TaskError(
            f"{source.task} is scored on the split {source.split!r}, but {source.path} is a saved "
            f"{str(saved.split)!r}: type split={saved.split} if you mean it"
        )
    return saved


def _only(what: str, source: Source, names: list[str]) -> str:
    """The only one, or by convention the config called "default"."""
    if len(names) == 1:
        return names[0]
    if what == "config" and "default" in names:
        return "default"
    raise TaskError(f"{source.task}: {source} has several: type {what}= with one of {', '.join(names)}")
