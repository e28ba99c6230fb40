"""Variants of `sfpo.SlowSnapshot`: where the copy lives, what happens to Adam's moments."""
