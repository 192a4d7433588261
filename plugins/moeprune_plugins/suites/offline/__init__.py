"""Offline lm-eval tasks built from the test split of the embedded corpus (see README.md)."""
