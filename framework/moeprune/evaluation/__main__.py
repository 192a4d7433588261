"""lm-eval's own command line, with `moeprune` among its models."""

from lm_eval.__main__ import cli_evaluate

from moeprune.evaluation import lm  # noqa: F401  (registers the model)

cli_evaluate()
