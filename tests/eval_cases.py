"""A task that an untrained model scores on, and small evaluations of it, for every test that needs one."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
from PIL import Image

from gripvlm.eval import evaluate
from gripvlm.tasks import Sample, Task
from tiny_lab import tiny_lab


class Letters(Task):
    """A task that any text scores on, so that an untrained model's rows differ."""

    name = "letters"
    max_new_tokens = 4
    evidence_grid = (16, 16)

    def __init__(self, name="letters", count=10):
        self.name, self.count = name, count

    @cached_property
    def samples(self):
        def picture(i):
            coarse = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            return Image.fromarray(coarse).resize((128, 128))

        return tuple(
            Sample(
                id=f"{self.name}{i}",
                pictures=(lambda i=i: picture(i // 2),),
                question=("read the word.", "is there a big red cat?")[i % 2],
                answer="abc",
                family="letters",
                evidence=(i, i + 1),
                image_id=str(i // 2),
            )
            for i in range(self.count)
        )

    def score(self, prediction, sample):
        return sum(map(ord, prediction)) % 3 / 2


PRUNERS, KEEPS = ["random:seed=3", "grid", "oracle"], [0.1, 40]


def run(out=None, **options):
    model, processor = tiny_lab()
    settings = {"batch_size": 4, "out": out, "model_name": "tiny", "command": "test"} | options
    tasks = settings.pop("tasks", [Letters(), Letters("others", 6)])
    return evaluate(model, processor, tasks, settings.pop("pruners", PRUNERS), settings.pop("keeps", KEEPS), **settings)


def untimed(rows):
    """Rows without their times."""
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def untimed_file(path):
    """The JSON of a run without times, dates, the commit and the sessions, which say that it was interrupted."""
    result = json.loads(path.read_text())
    for name in ("seconds", "finished", "sessions", "git"):
        del result["header"][name]
    return result | {part: untimed(result[part]) for part in ("rows", "means")}
