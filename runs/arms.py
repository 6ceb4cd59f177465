"""The arms of the study of training methods: what each is, which are compared with which, which are drawn."""

from __future__ import annotations

TOLD = {
    "warmup": "supervised warm-up only (gradient teacher); every arm below starts here, except where it says not",
    "warmup_by_reward": "the same, its step judged by the answer's probability, not by its logarithm",
    "warmup_longer": "warm-up, gone on with for longer than GRPO takes",
    "grpo": "GRPO, Plackett-Luce: the recipe",
    "conditional": "GRPO, conditional Bernoulli",
    "no_warmup": "GRPO from a random scorer, 600 steps (warm-up and GRPO have 640 together)",
    "label_free": "GRPO towards the unpruned model's own answers; no labels after the warm-up",
    "soft": "relaxed: soft top-k, temperature annealed, for the answer's log-probability",
    "soft_probability": "the same for its probability, as GRPO",
    "straight": "relaxed: straight-through top-k under Gumbel noise that fades, log-probability",
    "perturbed": "relaxed: perturbed top-k, log-probability",
    "dynamicvit": "relaxed: DynamicViT-style gates",
    "diffprune": "relaxed: DiffPrune-style denoised gates",
    "soft_slower": "`soft` at a third of the learning rate",
    "soft_faster": "`soft` at three times the learning rate",
    "soft_sharper": "`soft` from a fifth of the temperature",
    "straight_slower": "`straight` at a third of the learning rate",
    "diffprune_slower": "`diffprune` at a third of the learning rate",
    "diffprune_faster": "`diffprune` at three times the learning rate",
    "diffprune_probability": "`diffprune` for the answer's probability, as GRPO",
    "three_budgets": "GRPO, trained at 25, 6 and 1.5 % only",
    "only_12": "GRPO, trained at 12.5 % only",
    "only_3": "GRPO, trained at 3 % only",
    "averaged": "GRPO, with a running average of the weights (decay 0.98)",
    "antithetic": "GRPO, subsets in antithetic pairs",
    "band": "GRPO, exploring only 8 ranks on either side of k",
    "by_budget": "GRPO, advantages scaled by the spread at about the same budget",
    "sums": "GRPO, gradients summed over a subset's tokens (`dr_grpo`), not averaged",
    "sums_by_budget": "GRPO, both of these",
    "twice_by_budget": "GRPO, two optimiser steps a batch and advantages scaled by budget",
    "four_times": "GRPO, four optimiser steps a batch of rollouts",
    "faster": "GRPO, twice the learning rate",
    "twice": "GRPO, two optimiser steps a batch of rollouts",
    "fours": "GRPO, four times as many questions with 4 subsets each",
    "warmup_blind": "supervised warm-up of a scorer that does not read the question",
    "blind_plain": "GRPO from there, not reading the question either, 600 steps",
    "blind_budget": "the same with advantages scaled by budget",
    "blind_by_budget": "the same with advantages scaled by budget and two optimiser steps a batch",
    "value": "GRPO, conditional Bernoulli, a learnt value of each token as control variate; with a fault",
    "value_apart": "the same without the fault: the critic trains only itself",
    "self_critical": "GRPO, compared with the greedy subset (15 subsets and that one)",
    "told_6": "`grpo`, its scorer always told 6 %",
    "warmup_no_budget": "warm-up without the budget as input",
    "no_budget": "GRPO without the budget as input, from that",
}

MAIN = (
    "warmup",
    "grpo",
    "conditional",
    "no_warmup",
    "label_free",
    "soft",
    "soft_probability",
    "straight",
    "perturbed",
    "diffprune",
)
"""Arms that are shown family by family."""
OTHERS = ("mmr(norm)", "cdpruner", "divprune", "norm", "grid", "random")
"""Pruners that are not ours."""
PLOTTED = ("full", "oracle", "warmup", "grpo", "diffprune", "mmr(norm)", "cdpruner", "grid", "random")


TOLD |= {
    f"{arm}_last": f"`{arm}` at its last step"
    for arm in (
        *("conditional", "label_free", "soft", "soft_slower", "soft_probability", "straight", "perturbed"),
        *("diffprune", "diffprune_faster"),
    )
}

UNASKED = (
    *(("blind_by_budget", other) for other in ("warmup_blind", "blind_plain", "full", *OTHERS[:3])),
    ("blind_plain", "warmup_blind"),
    ("blind_budget", "blind_plain"),
    ("blind_by_budget", "blind_budget"),
)
BUDGET = (("grpo", "told_6"), ("grpo", "no_budget"), ("warmup", "warmup_no_budget"))
CALMER = {
    **dict.fromkeys(("averaged", "antithetic", "band", "self_critical"), "grpo"),
    **dict.fromkeys(("twice", "four_times", "faster", "fours"), "grpo"),
    **dict.fromkeys(("by_budget", "sums", "sums_by_budget", "twice_by_budget"), "grpo"),
    "value": "conditional",
    "value_apart": "conditional",
}
"""Idea -> the plain arm it is compared with."""
