"""Every model type of the installed transformers that reads images and writes text: ours, refused, or missing.

    python -m gripvlm.models.coverage     # the table as Markdown, as on the site's page "Every model type"

The tables of `families.py` decide; transformers is asked for names only.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from gripvlm.models.compat import installed
from gripvlm.models.families import FAMILIES, REFUSED, Family

__all__ = ["ModelType", "known_types", "model_types", "page"]


class ModelType(NamedTuple):
    """One `config.model_type`.

    Attributes:
        name: as in the model's `config.json`.
        status: "ours", "refused" or "missing".
        note: what gripvlm supports of it, or why it is refused.
    """

    name: str
    status: str
    note: str


def known_types() -> list[str]:
    """The types whose models read images and write text, by the installed transformers' own tables, sorted."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    # Models that hear, too, may be in this table only, beside models that hear and do not see.
    further = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return sorted(names | {name for name in further if _has_vision(CONFIG_MAPPING[name])})


def model_types() -> list[ModelType]:
    """Each of `known_types` with its status."""
    return [_model_type(name) for name in known_types()]


def page() -> str:
    """The list as a page in Markdown."""
    import transformers

    types = model_types()
    counts = Counter(one.status for one in types)
    rows = "\n".join(f"| `{one.name}` | {one.status} | {one.note} |" for one in types)
    return f"""# Every model type

transformers {transformers.__version__} knows {len(types)} types of models that read images and write text. gripvlm
prunes {counts["ours"]} of them, refuses {counts["refused"]} for the reason below, and lacks {counts["missing"]}, which
nobody has tried. For a type that is not ours, every call raises an error that says so.

| type | status | what is supported, or why not |
|---|---|---|
{rows}

*Equals masking*, *equals deletion*: what the tests of each type compare pruned runs with. *Tower*: pruners may read
the vision tower's attention. *Layers*: pruners may drop tokens inside the language model.
"""


def _model_type(name: str) -> ModelType:
    if (row := FAMILIES.get(name)) is not None:
        if installed() < row.since:
            return ModelType(name, "refused", f"needs transformers>={'.'.join(map(str, row.since))}")
        return ModelType(name, "ours", _supported(row))
    if name in REFUSED:
        return ModelType(name, "refused", REFUSED[name])
    return ModelType(name, "missing", "")


def _supported(row: Family) -> str:
    parts = ["images and videos" if "video" in row.modalities else "images", f"equals {row.equals}"]
    parts += [word for word, has in (("tower", row.vision is not None), ("layers", row.layers)) if has]
    return ", ".join(parts)


def _has_vision(config: Any) -> bool:
    """Whether a class of configurations has one for vision, or a part of it has."""
    parts = getattr(config, "sub_configs", {})
    return "vision_config" in parts or any(_has_vision(part) for part in parts.values())


if __name__ == "__main__":
    print(page(), end="")
