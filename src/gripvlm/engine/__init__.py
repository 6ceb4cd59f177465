"""Runs any pruner on any model: no method and no family is named here."""
