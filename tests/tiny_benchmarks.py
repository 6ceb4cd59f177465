"""Small data sets with the schemas of the published ones, written to a folder; questions and pictures are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def picture(shade: int) -> Image.Image:
    """A grey picture; equal shades are the same picture."""
    return Image.new("RGB", (16, 12), (shade, shade, shade))


def pope_rows() -> list[dict[str, Any]]:
    """For each category ten questions about two pictures, the first five with the answer yes."""
    return [
        {
            "id": str(10 * c + i),
            "question_id": str(i + 1),
            "question": f"Is there a thing {i} in the image?",
            "answer": "yes" if i < 5 else "no",
            "image_source": f"COCO_val2014_{i % 2}",
            "image": picture(i % 2),
            "category": category,
        }
        for c, category in enumerate(("adversarial", "popular", "random"))
        for i in range(10)
    ]


def mme_rows(categories: tuple[str, ...], pictures: int = 2) -> list[dict[str, Any]]:
    """For each subtask some pictures with two questions each."""
    return [
        {
            "question_id": f"{category}/{i:04d}.png",
            "image": picture(i),
            "question": f"Is this {category} {answer}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category in categories
        for i in range(pictures)
        for answer in ("Yes", "No")
    ]


SCIENCEQA_ROWS: list[dict[str, Any]] = [
    {
        "image": picture(1),
        "question": "Which is heavier?",
        "choices": ["a feather", "a stone", "neither"],
        "answer": 1,
        "hint": "Both are shown.",
        "subject": "natural science",
    },
    {
        "image": picture(2),
        "question": "Which is the capital?",
        "choices": ["Rome", "Oslo"],
        "answer": 0,
        "hint": "",
        "subject": "social science",
    },
]

AI2D_ROWS: list[dict[str, Any]] = [
    {"question": "What eats grass?", "options": ["fox", "hare", "owl", "oak"], "answer": "1", "image": picture(7)},
    {"question": "What eats hares?", "options": ["fox", "moss", "elm", "oak"], "answer": "0", "image": picture(7)},
]

OCRBENCH_ROWS: list[dict[str, Any]] = [
    {
        "dataset": "IIIT5K",
        "question": "what is written in the image?",
        "question_type": "Regular Text Recognition",
        "answer": ["CENTRE"],
        "image": picture(1),
    },
    {
        "dataset": "docVQA",
        "question": "What is the date?",
        "question_type": "Doc-oriented VQA",
        "answer": ["4 May", "May 4"],
        "image": picture(2),
    },
    {
        "dataset": "HME100k",
        "question": "Please write out the expression of the formula in the image using LaTeX format.",
        "question_type": "Handwritten Mathematical Expression Recognition",
        "answer": ["X = a + b"],
        "image": picture(3),
    },
]

TEXTVQA_ROWS: list[dict[str, Any]] = [
    {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "what is the brand of this camera?",
        "image": picture(5),
        "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", *["dakota"] * 6],
        "ocr_tokens": ["DAKOTA", "DIGITAL"],
    }
]


def write(rows: list[dict[str, Any]], file: Path) -> Path:
    """Rows as a Parquet file, pictures inside, as the hub has them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table(rows).to_parquet(str(file))
    return file


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows as a `datasets.Dataset`."""
    import datasets

    return datasets.Dataset.from_list(rows)


def write_all(folder: Path) -> Path:
    """The six, each in a folder of its name."""
    from gripvlm.tasks.benchmarks import MME

    write(pope_rows(), folder / "pope" / "data" / "test-00000-of-00001.parquet")
    write(SCIENCEQA_ROWS, folder / "scienceqa" / "data" / "test-00000-of-00001.parquet")
    write(AI2D_ROWS, folder / "ai2d" / "data" / "test-00000-of-00001.parquet")
    write(mme_rows(MME.PERCEPTION + MME.COGNITION), folder / "mme" / "data" / "test-00000-of-00001.parquet")
    write(OCRBENCH_ROWS, folder / "ocrbench" / "data" / "test-00000-of-00001.parquet")
    write(TEXTVQA_ROWS, folder / "textvqa" / "data" / "validation-00000-of-00001.parquet")
    return folder
