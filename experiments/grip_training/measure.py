"""What was mended in training, measured: gradients; and what a step's time goes to.

    python -m experiments.grip_training.measure gradients
    python -m experiments.grip_training.measure tower       shares of a step's processor time

Each writes results/NAME.json. They run on a CPU with one thread. The questions are samples of the labs' test
splits, where nothing is trained on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from experiments.grip_ablation.relaxations.__main__ import stage_of
from experiments.grip_ablation.relaxations.config import RelaxedConfig
from experiments.grip_ablation.relaxations.masks import perturbed_top_k
from experiments.results import STUDIES, write_json
from gripvlm import lab
from gripvlm.eval import environment
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import place_of
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Engine, TrainConfig
from gripvlm.grip.train.distill import Distill
from gripvlm.grip.train.grpo import Draws, Grpo
from gripvlm.tasks import get_tasks

RESULTS = STUDIES / "grip_training" / "results"


def write(name: str, found: dict[str, Any]) -> None:
    about = {"command": f"python -m experiments.grip_training.measure {name}"}
    write_json(RESULTS / f"{name}.json", about | environment() | found)


# --- gradients ----------------------------------------------------------------------------------------------------

AT_LAST = {"tau_start": 0.02, "tau_end": 0.02, "floor": 1e-4, "noise_samples": 4}
"""Where the relaxations' settings of before ended: temperature and noise of 0.02, a floor of 1e-4, 4 samples."""


AUDIT = {"commit": "75c0cd3", "images": 6.9}
"""What an audit measured before the mends, with a scorer of then: another law of a prompt's images."""


def gradients() -> None:
    found: dict[str, Any] = {"audit": AUDIT, "images": {level: of_images(level) for level in ("sequence", "token")}}
    found["perturbed_cosine"] = {str(samples): cosine(samples) for samples in (4, 64, 512)}
    norms: dict[str, dict[str, list[float]]] = {}
    model, processor = lab.load("lab")
    engine = Engine(model, processor)
    questions = [(task, sample) for task in get_tasks("lab") for sample in task.samples[:32:8]]
    batches = [engine.prepare(questions[start : start + 8]) for start in range(0, len(questions), 8)]
    for name in ("soft_topk", "straight_through", "perturbed", "dynamicvit", "simple"):
        norms[name] = {}
        for when, settings in (("now", {}), ("before", AT_LAST)):
            config = RelaxedConfig(relaxation=name, **settings)  # type: ignore[arg-type]
            norms[name][when] = [norm_of(config, engine, batch) for batch in batches]
            print(name, when, norms[name][when], flush=True)
    write("gradients", found | {"norms": norms})


def norm_of(config: RelaxedConfig, engine: Engine, batch: Any) -> float:
    """Of the gradient of all weights of the lab's scorer, from one loss."""
    scorer = Scorer.from_pretrained(place_of("lab")).train()
    stage = stage_of(config, scorer, engine)
    loss, _ = next(stage.losses(batch, 0.5, torch.Generator().manual_seed(0)))
    loss.backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in scorer.parameters() if p.grad is not None]))


def of_images(level: str) -> float:
    """The sum of |gradient| over the logits of a prompt of eight equal images, over that of one image alone."""
    random = torch.Generator().manual_seed(0)
    row, sizes = torch.randn(256, generator=random), []
    samples = torch.stack([torch.randperm(256, generator=random)[:16] for _ in range(16)])
    advantage = torch.randn(1, 16, generator=random)
    config = TrainConfig(importance_sampling_level=level, num_iterations=2)
    for images in (1, 8):
        logits = row.expand(images, -1).clone().requires_grad_()
        policy, inputs = PlackettLuce(logits, 16), SimpleNamespace(owner=torch.zeros(images, dtype=torch.long))
        picks = samples.expand(images, -1, -1)
        old, total = policy.step_log_probs(picks).detach(), torch.tensor([16.0 * images])
        draws = Draws(inputs, policy.k, picks, old, None, total, None, {})  # type: ignore[arg-type]
        surrogate, _ = Grpo.surrogate(SimpleNamespace(config=config), policy, draws, advantage)  # type: ignore[arg-type]
        surrogate.sum().backward()
        assert logits.grad is not None
        sizes.append(float(logits.grad.abs().sum()))
    return sizes[1] / sizes[0]


def cosine(samples: int, n: int = 256, k: int = 16, repeats: int = 20) -> float:
    """Mean cosine of the perturbed top-k's gradient with its expectation, as 200,000 samples give it."""
    random = torch.Generator().manual_seed(0)
    scores, slope = torch.randn(1, n, generator=random), torch.randn(1, n, generator=random)

    def gradient(count: int) -> Tensor:
        leaf = scores.clone().requires_grad_()
        noise = torch.randn(count, 1, n, generator=random)
        (perturbed_top_k(leaf, torch.tensor([k]), 1.0, noise) * slope).sum().backward()
        assert leaf.grad is not None
        return leaf.grad[0]

    whole = torch.stack([gradient(10_000) for _ in range(20)]).mean(0)
    return sum(float(torch.cosine_similarity(gradient(samples), whole, dim=0)) for _ in range(repeats)) / repeats


# --- the tower's share of a step ----------------------------------------------------------------------------------


def tower() -> None:
    """A step of each stage on lab-dense, with the scorer that ships: 4 pictures with 4 questions."""
    model, processor = lab.load("lab-dense")
    engine, scorer = Engine(model, processor), Scorer.from_pretrained(place_of("lab-dense"))
    by_picture: dict[str, list[Any]] = {}
    for task in get_tasks("lab-dense"):
        for sample in task.samples:
            by_picture.setdefault(str(sample.image_id), []).append((task, sample))
    questions = [pair for each in by_picture.values() if len(each) >= 4 for pair in each[:4]][:16]
    found = {}
    for name, kind in (("distill", Distill), ("grpo", Grpo)):
        stage, spent = kind(TrainConfig(), scorer.train(), engine), {"tower": 0.0, "read": 0.0}
        seeing, began = model.model.vision_tower, time.process_time()
        with timed(spent, "tower", seeing, "forward"), timed(spent, "read", engine.reader, "read"):
            batch = engine.prepare(questions)
            loss, _ = next(stage.losses(batch, 0.0, torch.Generator().manual_seed(0)))
            loss.backward()
        found[name] = spent | {"step": time.process_time() - began}
        print(name, found[name], flush=True)
    write("tower", {"model": "lab-dense", "settings": {}, "shares": found})


@contextmanager
def timed(into: dict[str, float], name: str, owner: Any, method: str) -> Iterator[None]:
    """Adds the processor time of a method's calls."""
    own = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return own(*args, **kwargs)
        finally:
            into[name] += time.process_time() - began

    setattr(owner, method, call)
    try:
        yield
    finally:
        setattr(owner, method, own)


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["gradients" | "tower" as wanted]:
            {"gradients": gradients, "tower": tower}[wanted]()
        case _:
            sys.exit(__doc__)
