"""Pruners that drop inside the language model, with their variants at the input."""
