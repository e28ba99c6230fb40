"""Evaluation of models on benchmarks: what is asked for, the records kept, the figures of them."""
