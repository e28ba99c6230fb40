"""Metrics: where they go (`sinks`) and how phases are timed (`timers`)."""
