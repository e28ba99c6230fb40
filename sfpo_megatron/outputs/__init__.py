"""The directory of a run: paths, lock, stop requests, and its metrics as table, plot and page."""
