"""Training: memory replay back-propagation, the training loop, optimizer, checkpoints and run folder."""
