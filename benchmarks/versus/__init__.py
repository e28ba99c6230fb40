"""This trainer beside another one, on the same work."""
