"""Ways to get more from a rollout, on top of `gripvlm.grip.train.grpo`: each is a setting, off by default.

    python -m experiments.grip_claim.exploring --data questions.jsonl --probes 4 --output-dir runs/probes

They live here, not in the package, until a study shows which of them help. Few draws with reuse under a trust region
needs nothing from here: `gripvlm train grpo --num-generations 4 --num-iterations 4`.
"""
