"""Benchmarks by kind of data: data sets, batches, loss, metric, published numbers, licence.

Each kind has a package: :mod:`~flowformer.tasks.series`, :mod:`~flowformer.tasks.images`,
:mod:`~flowformer.tasks.text`. What all of them share is here.
"""
