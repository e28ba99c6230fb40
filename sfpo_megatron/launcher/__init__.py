"""Starts the ranks of a run, and what happens inside one around it."""
