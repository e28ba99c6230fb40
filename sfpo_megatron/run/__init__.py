"""The run around the loop: opening, engines, learner, checkpoints, metrics, ending."""
