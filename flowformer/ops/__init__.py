"""The mathematics: pure functions of tensors, without parameters and without modules.

Layout is (batch, length, heads, channels); a decoding step takes (batch, heads, channels).
"""

from flowformer.ops.backend import Explanation, explain
from flowformer.ops.flow import FlowState, flow_attention, flow_attention_step, init_flow_state
from flowformer.ops.flow_presets import PRESETS, FlowOptions, flow_options
from flowformer.ops.linear import LinearState, init_linear_state, linear_attention, linear_attention_step
from flowformer.ops.softmax import SoftmaxState, init_softmax_state, softmax_attention, softmax_attention_step

__all__ = [
    "PRESETS",
    "Explanation",
    "FlowOptions",
    "FlowState",
    "LinearState",
    "SoftmaxState",
    "explain",
    "flow_attention",
    "flow_attention_step",
    "flow_options",
    "init_flow_state",
    "init_linear_state",
    "init_softmax_state",
    "linear_attention",
    "linear_attention_step",
    "softmax_attention",
    "softmax_attention_step",
]
