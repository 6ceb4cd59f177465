"""The recipe that made the lab's vision-language model: scenes, questions, a tower, a reader (docs/lab.md)."""
