"""Routing attention: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.routing.module import RoutingAttention
from flowformer.mechanisms.routing.operation import routing_attention
from flowformer.mechanisms.routing.state import RoutingState, init_routing_state, routing_attention_step

__all__ = [
    "RoutingAttention",
    "RoutingState",
    "init_routing_state",
    "routing_attention",
    "routing_attention_step",
]
