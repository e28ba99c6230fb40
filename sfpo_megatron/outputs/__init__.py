"""What a finished run shows: a table and a plot, both from its metrics.jsonl alone."""
