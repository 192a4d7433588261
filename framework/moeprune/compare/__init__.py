"""Many variants of one model, compared fairly: runs them, gathers the results, writes tables, plots and a report."""
