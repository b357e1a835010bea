"""Benchmarks of text: language models of corpora, of your own text, and of toy problems."""
