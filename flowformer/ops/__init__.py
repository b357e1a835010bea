"""The mathematics: pure functions of tensors, without parameters and without modules.

Layout is (batch, length, heads, channels); a decoding step takes (batch, heads, channels).
"""

from flowformer.ops.aft.conv import AFTConvState, aft_conv, aft_conv_step, init_aft_conv_state
from flowformer.ops.aft.full import AFTFullState, aft_full, aft_full_step, init_aft_full_state
from flowformer.ops.aft.local import AFTLocalState, aft_local, aft_local_step, init_aft_local_state
from flowformer.ops.aft.simple import AFTSimpleState, aft_simple, aft_simple_step, init_aft_simple_state
from flowformer.ops.backend import Explanation, explain
from flowformer.ops.flow import FlowState, flow_attention, flow_attention_step, init_flow_state
from flowformer.ops.flow_presets import PRESETS, FlowOptions, flow_options
from flowformer.ops.linear import LinearState, init_linear_state, linear_attention, linear_attention_step
from flowformer.ops.mobile import (
    MobileOptions,
    MobileState,
    init_mobile_state,
    mobile_attention,
    mobile_attention_step,
    mobile_options,
)
from flowformer.ops.softmax import SoftmaxState, init_softmax_state, softmax_attention, softmax_attention_step

__all__ = [
    "PRESETS",
    "AFTConvState",
    "AFTFullState",
    "AFTLocalState",
    "AFTSimpleState",
    "Explanation",
    "FlowOptions",
    "FlowState",
    "LinearState",
    "MobileOptions",
    "MobileState",
    "SoftmaxState",
    "aft_conv",
    "aft_conv_step",
    "aft_full",
    "aft_full_step",
    "aft_local",
    "aft_local_step",
    "aft_simple",
    "aft_simple_step",
    "explain",
    "flow_attention",
    "flow_attention_step",
    "flow_options",
    "init_aft_conv_state",
    "init_aft_full_state",
    "init_aft_local_state",
    "init_aft_simple_state",
    "init_flow_state",
    "init_linear_state",
    "init_mobile_state",
    "init_softmax_state",
    "linear_attention",
    "linear_attention_step",
    "mobile_attention",
    "mobile_attention_step",
    "mobile_options",
    "softmax_attention",
    "softmax_attention_step",
]
