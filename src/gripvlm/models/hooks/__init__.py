"""What a call of a model watches or changes, for that call alone."""
