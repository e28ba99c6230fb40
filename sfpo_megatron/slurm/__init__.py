"""Renders sbatch scripts from a config and watches the walltime."""
