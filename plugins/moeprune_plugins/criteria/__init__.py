"""Built-in criteria."""
