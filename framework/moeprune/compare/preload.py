"""Imported once by the process that all jobs are forked from, so that none of them waits for imports."""

import lm_eval
import lm_eval.tasks  # noqa: F401

import moeprune.evaluation.lm
import moeprune.training.cli  # noqa: F401
