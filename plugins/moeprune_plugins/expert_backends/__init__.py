"""Built-in ways to compute experts that need more than torch."""
