"""Text benchmarks: language modelling of corpora and your own text, and toy problems."""
