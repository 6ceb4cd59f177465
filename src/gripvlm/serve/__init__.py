"""`gripvlm serve`: a small OpenAI-compatible server over transformers, for one machine. Needs `gripvlm[serve]`."""
