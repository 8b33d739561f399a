"""What is trained: losses as pure functions, `Objectives` (all losses of a batch), and two optional additions, an EMA
teacher and self-critical sequence training.
"""
