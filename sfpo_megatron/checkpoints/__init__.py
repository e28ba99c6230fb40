"""Checkpoint directories: what makes one whole, which are kept, which one a run continues from."""
