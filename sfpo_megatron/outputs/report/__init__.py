"""The report of runs: one HTML file, from what runs have written. No torch, no numpy.

reading      RUN -> what its files say
curves       a run's train steps and evaluations in columns; zscores: its gate
arms         which runs are seeds of one setting, and their mean and range
target       what it took to reach an accuracy, and the ratios between arms
document     all of it as the JSON that the page draws
tables, page, assets/     the page; writing: its file
"""
