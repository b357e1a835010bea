"""Time-series benchmarks: the UEA archive, and your own files."""
