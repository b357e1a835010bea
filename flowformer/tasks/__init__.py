"""The benchmarks, one file each: data, metric, published numbers, licence."""
