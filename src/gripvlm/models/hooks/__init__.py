"""What a call of a model captures or changes, for that call alone."""
