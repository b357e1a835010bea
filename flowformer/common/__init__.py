"""Shared by all parts of the library: errors, files, names, registries, machine information."""
