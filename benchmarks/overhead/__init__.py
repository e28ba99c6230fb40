"""The parts of `benchmarks/sfpo_overhead.py`."""
