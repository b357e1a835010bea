"""Image benchmarks: classification and density."""
