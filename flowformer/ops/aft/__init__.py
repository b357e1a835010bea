r"""The Attention Free Transformer (AFT): full, local, simple, conv.

Source: Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103). Every channel by itself is a weighted
mean of values, gated by its query. Weights come from keys and from a position bias w, which all channels share:

    y_t = sigmoid(q_t) * sum_j exp(k_j + w_tj) v_j / sum_j exp(k_j + w_tj)

Causal: j <= t. The forms differ in w.

* full: a table (T, T), or the product u v^T of two factors (T, d').
* local: w where \|t - j\| < s, and 0 elsewhere: what is far away still counts, by its key alone. With ``hard``, w is
  minus infinity elsewhere, and what is far away does not count (an ablation).
* simple: w = 0. The causal form is the mean so far, its state one mean and one log-sum for each channel.
* conv: w by distance, a filter for each head, in one and two dimensions: :mod:`flowformer.ops.aft.conv`.

Time for T tokens and D channels: full T^2 D in matrix products, local and conv T s D, simple T D. Memory besides w is
T D. :mod:`flowformer.ops.aft.means` has the arithmetic, which cannot overflow. Positions count real tokens: padding
before or between them does not move them.
"""
