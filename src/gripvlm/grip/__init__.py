"""The learned pruner: its scorer, its policies, its training."""
