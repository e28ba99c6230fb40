"""Variants of `sfpo.SlowSnapshot`: where the copy lives, what becomes of Adam's moments, and where
the reposition leads."""
