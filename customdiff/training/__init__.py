"""Stage train: batches, objective, trainer and checkpoints."""
