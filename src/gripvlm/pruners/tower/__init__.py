"""Pruners that merge inside the vision tower."""
