"""Contenders and an operation for tests, imported by name: also by the processes that a benchmark starts."""

import torch

from flowformer import ops
from flowformer.bench.operations import forward, forward_truth, sequences
from flowformer.bench.registry import Call, Contender, Operation, add_contender, add_operation, reference

MEGABYTES = 64


def allocate(q, k, v, *, causal):
    return torch.ones(MEGABYTES * 2**20 // 4).view(1, -1, 1, 1)


def wrong(q, k, v, *, causal):
    out = ops.flow_attention(q, k, v, causal=causal, backend="torch")
    out[:, -1] *= 1.001  # one token of all, by little
    return out


def failing(q, k, v, *, causal):
    raise RuntimeError("no such kernel")


def shifted(q, k, v, *, causal):
    return ops.flow_attention(q, k, v, causal=causal, backend="torch")


add_operation(
    Operation(
        "toy", "for tests", "length", (8,), sequences,
        lambda function, inputs: Call(forward(function, inputs, causal=True).run),
        lambda truth, inputs: forward_truth(truth, inputs, causal=True),
        None, lambda shape: shape.batch * shape.length,
    )
)  # fmt: skip
for _name, _function, _truth, _more in (
    ("right", shifted, reference.flow_attention, {"ours": True}),
    ("also-right", shifted, reference.flow_attention, {}),
    ("wrong", wrong, reference.flow_attention, {}),
    ("failing", failing, reference.flow_attention, {}),
    ("allocate", allocate, None, {}),
    ("absent", shifted, None, {"unavailable": lambda inputs: "the moon is not up"}),
    ("hungry", shifted, None, {"needs_bytes": lambda shape: 1e18}),
):
    add_contender(Contender(_name, "toy", _function, _truth, "for tests", **_more))
