"""The rules of `check.py`, one file a subject. No torch."""
