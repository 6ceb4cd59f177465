"""Pruners that change what another pruner chooses."""
