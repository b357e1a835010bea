"""Random feature attention: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.rfa.module import RFAAttention
from flowformer.mechanisms.rfa.operation import RFAState, init_rfa_state, rfa_attention, rfa_attention_step

__all__ = ["RFAAttention", "RFAState", "init_rfa_state", "rfa_attention", "rfa_attention_step"]
