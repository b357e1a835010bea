"""Flow-Attention (Wu et al., ICML 2022): attention in linear time by conservation of flow.

The equations are in :mod:`flowformer.mechanisms.flow.operation`.
"""

from flowformer.mechanisms.flow.module import FlowAttention
from flowformer.mechanisms.flow.operation import flow_attention
from flowformer.mechanisms.flow.options import PRESETS, FlowOptions, flow_options
from flowformer.mechanisms.flow.state import FlowState, init_flow_state
from flowformer.mechanisms.flow.step import flow_attention_step

__all__ = [
    "PRESETS",
    "FlowAttention",
    "FlowOptions",
    "FlowState",
    "flow_attention",
    "flow_attention_step",
    "flow_options",
    "init_flow_state",
]
