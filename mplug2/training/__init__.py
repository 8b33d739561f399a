"""Training around the model: settings, optimizers, parallelism, run checkpoints, fault tolerance, logs, recipes."""
