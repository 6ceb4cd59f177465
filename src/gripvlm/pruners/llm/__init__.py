"""Pruners that drop inside the language model."""
