"""The embedded lab: a small trained VLM, its scene generator, its recipe and its weights.

What is measured on it is lab evidence, never a statement about a 7B model.
"""
