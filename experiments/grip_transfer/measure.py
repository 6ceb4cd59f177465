"""What a scorer of the first lab is worth on `lab-dense`. Writes results/transfer.json.

    PYTHONPATH=examples python -m experiments.grip_transfer.measure     # half an hour on one core; resumes

Questions to train on and the warm-up are those of grip_claim. The first lab's scorer is `lab-small`, of the same size.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from experiments.grip_claim import validation
from experiments.grip_claim.validation import BATCH, BUDGETS
from experiments.grip_transfer.start import Pairs, Start, transferred
from experiments.results import ROOT, STUDIES, write_json
from experiments.run import train
from gripvlm import lab
from gripvlm.eval import environment
from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs, place_of
from gripvlm.grip.rounds import greedy
from gripvlm.grip.scorer import ModelFingerprint, Scorer
from gripvlm.grip.train import Batch, Engine
from gripvlm.tasks import get_tasks

STUDY, SOURCE, ROUNDS = "grip_claim", "lab-small", 16
STARTS: tuple[Start, ...] = ("kept", "aligned", "new", "random")
STEPS, SEEDS = (20, 60), 1
"""Of the warm-up, which has 200; 0 steps are measured too. From "kept" none is trained: it needs features alike."""
PAIRED = 128
"""Training pictures that the entry is aligned on. No answer is read."""
GUIDE = "lab-small in its own model"


def pairs(work: Path) -> Pairs:
    """Patches and words of training questions, as both models see them."""
    (task,) = get_tasks([f"jsonl:{work / 'dense-train/questions.jsonl'}"])
    samples = task.take(PAIRED, 0)
    found = Pairs()
    engines = [Engine(*lab.load(name)) for name in ("lab-dense", "lab")]
    for start in range(0, len(samples), BATCH):
        questions = [(task, sample) for sample in samples[start : start + BATCH]]
        target, source = (engine.prepare(questions) for engine in engines)
        for ours, theirs in zip(target.tokens, source.tokens, strict=True):
            for tokens, same in zip(ours, theirs, strict=True):
                found.add(tokens.features, same.features)
    words, others = (vocabulary(*lab.load(name)) for name in ("lab-dense", "lab"))
    known = sorted(words.keys() & others.keys())
    # As many words as patches, so that both count alike.
    times = max(1, sum(map(len, found.target)) // len(known))
    target, source = (torch.stack([each[word] for word in known]).repeat(times, 1) for each in (words, others))
    found.add(target, source)
    return found


def vocabulary(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Word piece -> its embedding [d]."""
    table = model.get_input_embeddings().weight.detach()
    return {word: table[index] for word, index in processor.tokenizer.get_vocab().items()}


def starts(work: Path) -> dict[str, Path]:
    """Start -> the folder of its scorer, named as those of experiments.run."""
    source = Scorer.from_pretrained(place_of(SOURCE))
    base = ModelFingerprint.of(lab.load("lab-dense")[0])
    aligned = pairs(work)
    found = {}
    for start in STARTS:
        torch.manual_seed(0)
        found[start] = work / STUDY / f"transfer_{start}-0"
        transferred(source, base, ROUNDS, start, aligned).save_pretrained(found[start])
    return found


def trained(work: Path) -> dict[tuple[str, int, int], Path]:
    """(start, steps, seed) -> the folder of its scorer."""
    found = {(start, 0, 0): folder for start, folder in starts(work).items()}
    for steps in STEPS:
        for seed in range(SEEDS):
            for start in STARTS[1:]:
                # One start, so that a run's number is its seed.
                changes = {
                    "distill_steps": steps,
                    "eval_questions": 16,
                    "init_from": f"transfer_{start}",
                    "warm_ups": 1,
                }
                found[start, steps, seed] = train(STUDY, "distill", seed, work, changes, f"transfer_{start}_{steps}")
    for seed in range(SEEDS):
        found["random", 200, seed] = train(STUDY, "distill", seed, work)
    return found


class Guide:
    """The first lab's scorer, reading its own model's features; tokens lose by being like kept ones of the target."""

    def __init__(self) -> None:
        self.engine = Engine(*lab.load("lab"))
        self.scorer = Scorer.from_pretrained(place_of(SOURCE)).eval()

    def choose(self, batch: Batch, inputs: ScorerInputs, counts: torch.Tensor, like: Scorer) -> torch.Tensor:
        """[S, K] of sequences that are the images of a question together."""
        own = self.engine.prepare(list(zip(batch.tasks, batch.samples, strict=True)))
        images = own.for_scorer(question=True)
        share = (counts / inputs.sizes)[torch.tensor(own.owner)]
        logits = images.score(self.scorer, share * images.sizes)
        rows = [row[:size] for row, size in zip(logits, images.sizes.tolist(), strict=True)]
        joined = [torch.cat(question) for question in own.by_question(rows)]
        padded = torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=-torch.inf)
        return greedy(padded, counts, int(counts.max()), inputs.penalty(like, counts))


@torch.no_grad()
def measure(folders: dict[tuple[str, int, int], Path], limit: int) -> list[dict[str, Any]]:
    """For each scorer, by budget the probability of the right answer to each test question."""
    scorers = {name: Scorer.from_pretrained(folder).eval() for name, folder in folders.items()}
    guide, like = Guide(), scorers["new", 0, 0]
    found: dict[tuple[str, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    engine = Engine(*lab.load("lab-dense"))
    families, pictures = [], []
    for task in get_tasks(["lab-dense"]):
        samples = task.take(limit, 0)
        families += [task.name.rpartition("/")[2]] * len(samples)
        pictures += [sample.id.partition("-")[0] for sample in samples]
        for start in range(0, len(samples), BATCH):
            batch = engine.prepare([(task, sample) for sample in samples[start : start + BATCH]])
            inputs = batch.for_scorer(question=True, joint=True)
            for budget in BUDGETS:
                counts = validation.counts_of(batch, inputs, budget)
                chosen = {(GUIDE, 0, 0): guide.choose(batch, inputs, counts, like)}
                for name, scorer in scorers.items():
                    logits = inputs.score(scorer, counts)
                    chosen[name] = greedy(logits, counts, int(counts.max()), inputs.penalty(scorer, counts))
                for name, picks in chosen.items():
                    member = samples_to_mask(picks, inputs.valid.shape[1])
                    values = validation.probability(engine, batch, inputs, member)
                    found[name][budget] += [round(value, 3) for value in values]
        print(f"{len(families)} questions", file=sys.stderr)
    return [
        {"start": start, "steps": steps, "seed": seed, "probability": values}
        for (start, steps, seed), values in found.items()
    ] + [{"families": families, "pictures": pictures}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".lab" / "grip", help="grip_claim's questions and scorers")
    parser.add_argument("--limit", type=int, default=30, help="test questions a family")
    given = parser.parse_args()
    *rows, last = measure(trained(given.work), given.limit)
    command = f"python -m experiments.grip_transfer.measure --limit {given.limit}"
    about = {"study": "grip_transfer", "command": command, **environment(), "source": SOURCE, **last}
    write_json(STUDIES / "grip_transfer/results/transfer.json", about | {"rows": rows})


if __name__ == "__main__":
    main()
