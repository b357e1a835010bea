"""Tensor functions shared by all attention mechanisms."""
