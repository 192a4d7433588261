"""Load balancing: the contract of balancing terms, and load metrics."""
