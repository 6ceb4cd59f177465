"""Grip scorers for three published models, from public questions to the hub (docs/recipes.md)."""
