r"""The Attention Free Transformer (AFT): full, local, simple, conv.

Source: Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103). Every channel by itself is a weighted
mean of values, gated by its query. Weights come from keys and from a position bias w, which all channels share:

    y_t = sigmoid(q_t) * sum_j exp(k_j + w_tj) v_j / sum_j exp(k_j + w_tj)

Causal: j <= t. The forms differ in w.

* full: a table (T, T), or the product u v^T of two factors (T, d').
* local: w where \|t - j\| < s, and 0 elsewhere: what is far away still counts, by its key alone. With ``hard``, w is
  minus infinity elsewhere, and what is far away does not count (an ablation).
* simple: w = 0. The causal form is the mean so far, its state one mean and one log-sum for each channel.
* conv: w by distance, a filter for each head, in one and two dimensions: :mod:`flowformer.mechanisms.aft.conv`.

Time for T tokens and D channels: full T^2 D in matrix products, local and conv T s D, simple T D. Memory besides w is
T D. :mod:`flowformer.mechanisms.aft.means` has the arithmetic, which cannot overflow. Positions count real tokens:
padding before or between them does not move them.
"""

from flowformer.mechanisms.aft.conv import AFTConvState, aft_conv, aft_conv_step, init_aft_conv_state
from flowformer.mechanisms.aft.conv_module import AFTConv
from flowformer.mechanisms.aft.full import AFTFullState, aft_full, aft_full_step, init_aft_full_state
from flowformer.mechanisms.aft.local import AFTLocalState, aft_local, aft_local_step, init_aft_local_state
from flowformer.mechanisms.aft.modules import AFTFull, AFTLocal, AFTSimple
from flowformer.mechanisms.aft.simple import AFTSimpleState, aft_simple, aft_simple_step, init_aft_simple_state

__all__ = [
    "AFTConv",
    "AFTConvState",
    "AFTFull",
    "AFTFullState",
    "AFTLocal",
    "AFTLocalState",
    "AFTSimple",
    "AFTSimpleState",
    "aft_conv",
    "aft_conv_step",
    "aft_full",
    "aft_full_step",
    "aft_local",
    "aft_local_step",
    "aft_simple",
    "aft_simple_step",
    "init_aft_conv_state",
    "init_aft_full_state",
    "init_aft_local_state",
    "init_aft_simple_state",
]
