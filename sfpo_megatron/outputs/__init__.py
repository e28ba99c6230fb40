"""What a run writes: the paths in its directory, and its metrics as a table, a plot and a page."""
