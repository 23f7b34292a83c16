"""Training: the state and its step, the loop, checkpoints, logs, traces and signals."""
