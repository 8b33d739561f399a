"""What is trained: the losses, the module that computes them for a batch, the EMA teacher, self-critical training."""
