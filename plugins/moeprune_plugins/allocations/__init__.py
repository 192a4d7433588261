"""Built-in allocations."""
