"""Compiled kernels: one package per backend, described by its module ``backend``."""
