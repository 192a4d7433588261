"""Built-in placements."""
