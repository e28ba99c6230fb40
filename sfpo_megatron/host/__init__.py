"""This machine, by the standard library alone: addresses, processes, memory, temporary files."""
