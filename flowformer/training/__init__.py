"""Training by Lightning: fit, evaluate, predict, resume."""
