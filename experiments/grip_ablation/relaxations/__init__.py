"""Opponents of GRPO on the same scorer, data and budgets: gradients through relaxed masks, and another policy.

    python -m experiments.grip_ablation.relaxations --data questions.jsonl --relaxation soft_topk --output-dir runs/soft

They are trained by the package's own `Trainer`; inference is the same hard top-k: `--pruners grip:scorer=runs/soft`.
"""
