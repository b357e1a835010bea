"""Training with Lightning: fit, evaluate, resume."""
