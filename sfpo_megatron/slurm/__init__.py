"""Slurm jobs: the script of a run from its config, and what the script asks of this package."""
