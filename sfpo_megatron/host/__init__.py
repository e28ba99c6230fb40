"""This machine, by the standard library alone: addresses, processes, stop requests."""
