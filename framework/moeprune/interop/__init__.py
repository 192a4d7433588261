"""Existing checkpoints of the transformers library: pruning them in place, exporting, importing."""
