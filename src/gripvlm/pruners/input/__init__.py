"""Pruners that drop before the language model."""
