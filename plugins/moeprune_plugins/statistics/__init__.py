"""Built-in statistics."""
