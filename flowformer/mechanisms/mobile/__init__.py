"""Mobile-Attention (Yao et al., ICML 2024): Flow-Attention whose flow is conserved among the heads of a token.

The equations are in :mod:`flowformer.mechanisms.mobile.operation`.
"""

from flowformer.mechanisms.mobile.module import MobileAttention
from flowformer.mechanisms.mobile.operation import (
    MobileState,
    init_mobile_state,
    mobile_attention,
    mobile_attention_step,
)
from flowformer.mechanisms.mobile.options import MobileOptions, mobile_options

__all__ = [
    "MobileAttention",
    "MobileOptions",
    "MobileState",
    "init_mobile_state",
    "mobile_attention",
    "mobile_attention_step",
    "mobile_options",
]
