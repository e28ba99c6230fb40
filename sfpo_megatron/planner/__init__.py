"""Predicts memory, time and layout of a run before it starts. Torch-free."""
