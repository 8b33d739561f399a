"""Metrics of each task as its literature computes them, and the evaluation of a checkpoint on a data set."""
