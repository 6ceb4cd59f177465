"""results/grip-speed.json: rollouts a second against a plain loop, and what the scorer costs.

    python runs/grip_speed.py

Ratios of times taken in alternation in one run, on the lab VLM: a group of G subsets a question by the training
engine, against one `prune_inputs` with its own encoding and one forward for each subset. FLOPs for the scorer's share
of a 7B model's prefill are counted, not timed.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from gripvlm import lab
from gripvlm.evaluate import environment, make_inputs
from gripvlm.evaluate.environment import command_line
from gripvlm.prune import prune_inputs
from gripvlm.pruners.given import Given
from gripvlm.scorer import Scorer, ScorerConfig
from gripvlm.tasks import get_tasks
from gripvlm.train import Engine

GROUP, REPEATS = 16, 7


def main() -> None:
    model, processor = lab.load()
    engine = Engine(model, processor)
    task = get_tasks("lab/text")[0]
    by_image: dict[str, list] = {}
    for sample in task.samples:
        by_image.setdefault(sample.image_id, []).append((task, sample))
    questions = [pair for pairs in by_image.values() for pair in pairs][:16]
    rows = [i for i in range(len(questions)) for _ in range(GROUP)]
    found = {}
    for k in (6, 26, 64):
        random = torch.Generator().manual_seed(k)
        kept = [[torch.randperm(256, generator=random)[:k].sort().values] for _ in rows]

        def together(kept: list = kept) -> torch.Tensor:
            batch = engine.prepare(questions)
            return engine.run(batch, rows, kept).log_probs.sum(-1)

        @torch.no_grad()
        def one_by_one(count: int, kept: list = kept, k: int = k) -> torch.Tensor:
            out = []
            for row in range(count):
                sample = questions[rows[row]][1]
                ids = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"] + engine.end
                inputs = make_inputs(model, processor, [sample.question], [sample.image])
                inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([ids])), 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                scores = torch.zeros(256).index_fill(0, kept[row][0], 1.0)
                arguments = prune_inputs(model, inputs, Given([[scores]]), k)
                logits = model(**arguments, use_cache=False).logits[0, -len(ids) - 1 : -1]
                out.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())
            return torch.stack(out)

        some = 2 * GROUP
        a, b = together()[:some], one_by_one(some)
        assert torch.allclose(a, b, atol=1e-3), (a - b).abs().max()
        times: dict[str, list[float]] = {"engine": [], "loop": []}
        for _ in range(REPEATS):
            start = time.perf_counter()
            together()
            middle = time.perf_counter()
            one_by_one(some)
            times["engine"].append(len(rows) / (middle - start))
            times["loop"].append(some / (time.perf_counter() - middle))
        ratios = [a / b for a, b in zip(times["engine"], times["loop"], strict=True)]
        found[str(k)] = {
            "rollouts_per_second": {name: statistics.median(values) for name, values in times.items()},
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        print(k, found[str(k)])
    # LLaVA-1.5-7B: 6.74e9 weights outside the embeddings' lookup, 576 visual and 64 text tokens
    scorer = Scorer(ScorerConfig(4096))
    share = scorer.flops(576, 32) / (2 * 6.48e9 * (576 + 64))
    result = {
        "schema": "gripvlm.grip_speed/1",
        "command": command_line(),
        "environment": environment(),
        "group": GROUP,
        "questions": len(questions),
        "repeats": REPEATS,
        "by_kept": found,
        "scorer_share_of_7b_prefill_flops": share,
        "scorer_parameters_at_4096": scorer.parameters_count,
    }
    target = Path(__file__).parent.parent / "results" / "grip-speed.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"scorer's share of a 7B prefill: {100 * share:.2f} %")


if __name__ == "__main__":
    main()
