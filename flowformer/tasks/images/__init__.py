"""Benchmarks of images: classification and density."""
