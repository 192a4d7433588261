"""The built-in strategies. Each is one small file; all are registered through the entry points of pyproject.toml."""
