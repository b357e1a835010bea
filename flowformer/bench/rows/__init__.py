"""What is timed: each module here enters operations and contenders, and is found without being named anywhere.

Contenders of attention mechanisms are made from the mechanisms' registry (:mod:`flowformer.mechanisms.registry`); what
they are compared with is entered by hand. A mechanism that takes learned tensors or options when it is timed has a few
lines in :mod:`flowformer.bench.rows.variants`.
"""
