"""Linear attention (Katharopoulos et al., 2020, "Transformers are RNNs").

The equations are in :mod:`flowformer.mechanisms.linear.operation`.
"""

from flowformer.mechanisms.linear.operation import (
    LinearAttention,
    LinearState,
    init_linear_state,
    linear_attention,
    linear_attention_step,
)

__all__ = ["LinearAttention", "LinearState", "init_linear_state", "linear_attention", "linear_attention_step"]
