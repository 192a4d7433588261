"""Scoring with lm-eval: the contract of suites, the model class that lm-eval calls, and one function to run a suite."""
