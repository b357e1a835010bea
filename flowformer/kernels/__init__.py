"""Compiled kernels, one package for each backend; each names itself in a module ``backend``."""
