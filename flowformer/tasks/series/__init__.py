"""Benchmarks of time series: the UEA archive, and files of your own."""
