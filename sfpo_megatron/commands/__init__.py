"""Commands of the command line that start no run: options, work and output of each in a file."""
