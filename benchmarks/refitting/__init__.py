"""Pieces of benchmarks/refit.py."""
