"""Training: state and masks, the loop, many devices, checkpoints and logs."""
