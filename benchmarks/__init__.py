"""Speed and memory against diffusers' reference script, and where a training step's time goes."""
