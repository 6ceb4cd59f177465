"""Baselines that read no paper's signal."""
