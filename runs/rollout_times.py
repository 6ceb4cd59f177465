"""A group's rollouts by the training engine, the least they could take, a whole training step, and a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gripvlm.api import prune_inputs
from gripvlm.bench.roofline import spread
from gripvlm.eval import make_inputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Engine, TrainConfig
from gripvlm.grip.train.grpo import Grpo
from gripvlm.models.compat import CACHE
from gripvlm.pruners.baselines.given import Given
from gripvlm.tasks import Sample, Task
from gripvlm.utils.timing import device_time

__all__ = ["Group"]


def _with_own_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments with a copy of its cache: a forward adds to it."""
    return {name: copy.deepcopy(value) if name in CACHE else value for name, value in arguments.items()}


class Group:
    """G random subsets of k tokens for each of Q questions, one picture of n tokens a question.

    Args:
        engine: with a frozen model.
        scorer: what a training step trains; its weights stay as they are.
        questions: (task, sample) pairs, those about one picture side by side.
        k: tokens kept.
        group: G, at least 2.
        looped: subsets that the plain loop does, R at most; the first ones.

    Attributes:
        n: tokens of a picture.
        rows, kept: [R] the question of each subset, and what it keeps.
        found: [R] log-probabilities of the answers, by the engine.
        calls: what the language model got for them.
    """

    def __init__(
        self, engine: Engine, scorer: Scorer, questions: list[tuple[Task, Sample]], k: int, group: int, looped: int
    ) -> None:
        self.engine, self.questions, self.k, self.looped = engine, questions, k, looped
        self.batch = engine.prepare(questions)
        self.n = self.batch.tokens[0][0].n
        random = torch.Generator().manual_seed(k)
        self.rows = [i for i in range(len(questions)) for _ in range(group)]
        self.kept = [[torch.randperm(self.n, generator=random)[:k].sort().values] for _ in self.rows]
        config = TrainConfig(budgets="fixed", keep_low=k / self.n, keep_high=1.0, num_generations=group)
        self.stage = Grpo(config, scorer, engine)
        self.calls, self.found = self._noted()

    def times(self, repeats: int) -> dict[str, Any]:
        """Subsets a second, and ratios turn by turn; the order of the four is reversed in every other turn."""
        work: dict[str, tuple[Callable[[], Any], int]] = {
            "rollouts": (self.rollouts, len(self.rows)),
            "limit": (self.limit, len(self.rows)),
            "step": (self.step, len(self.rows)),
            "loop": (self.loop, self.looped),
        }
        device = self.engine.model.device
        rates: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(-1, repeats):  # the first warms up
            calls = self._copied()
            for name in reversed(work) if turn % 2 else work:
                run, subsets = work[name]
                arguments = (calls,) if name == "limit" else ()
                start = device_time(device)
                run(*arguments)
                if turn >= 0:
                    rates[name].append(subsets / (device_time(device) - start))

        def over(one: str, other: str) -> dict[str, float] | None:
            return spread([a / b for a, b in zip(rates[one], rates[other], strict=True)])

        return {
            "subsets_per_second": {name: spread(values) for name, values in rates.items()},
            "share_of_limit": {name: over(name, "limit") for name in ("rollouts", "step")},
            "to_re_encoding": {name: over(name, "loop") for name in ("rollouts", "step")},
            "shared_prefix": self.batch.shared,
        }

    def rollouts(self) -> Tensor:
        """[R] log-probabilities by the engine: dropping, prompts, checks, forward; pictures are encoded."""
        return self.engine.run(self.batch, self.rows, self.kept, logits=False).log_probs.sum(-1)

    @torch.no_grad()
    def limit(self, calls: list[dict[str, Any]]) -> list[Tensor]:
        """Logits of the forced answers: the language model alone, on what the engine hands it, made beforehand.

        Rows, lengths, padding and micro-batches are the engine's own, and so are a shared prefix's keys and values.
        """
        model, width = self.engine.model, self.batch.longest
        head = model.get_output_embeddings()
        return [head(model.get_decoder()(**one).last_hidden_state[:, -width - 1 : -1]) for one in calls]

    def step(self) -> None:
        """What training does for these questions: read, encode, score, draw, roll out, the loss and its gradient."""
        batch = self.engine.prepare(self.questions)
        loss, _ = next(self.stage.losses(batch, 0.0, torch.Generator().manual_seed(self.k)))
        loss.backward()
        self.stage.scorer.zero_grad()

    @torch.no_grad()
    def loop(self) -> Tensor:
        """[looped] log-probabilities, every subset with its own prompt, encoding and forward."""
        engine, found = self.engine, []
        for row in range(self.looped):
            sample = self.questions[self.rows[row]][1]
            ids = engine.tokenizer(sample.answer, add_special_tokens=False)["input_ids"] + engine.end
            inputs = make_inputs(engine.model, engine.processor, [sample.question], [sample.image])
            inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([ids])), 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            scores = torch.zeros(self.n).index_fill(0, self.kept[row][0], 1.0)
            arguments = prune_inputs(engine.model, inputs, Given([[scores]]), self.k)
            short = {"logits_to_keep": len(ids) + 1}
            logits = engine.model(**arguments, **short, use_cache=False).logits[0, :-1]
            found.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())
        return torch.stack(found)

    def _noted(self) -> tuple[list[dict[str, Any]], Tensor]:
        """What the engine's rollouts hand to the language model, one a micro-batch, and what they find."""
        calls: list[dict[str, Any]] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            calls.append(_with_own_cache(kwargs))

        hook = self.engine.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            found = self.rollouts()
        finally:
            hook.remove()
        return calls[1:] if self.batch.shared else calls, found  # the first reads the shared prefix

    def _copied(self) -> list[dict[str, Any]]:
        """The calls, with caches of their own: a forward adds to them."""
        return [_with_own_cache(call) for call in self.calls]
