"""Many devices: the contract of placements, and how a model changes shape under a Lightning strategy."""
