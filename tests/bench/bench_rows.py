"""Contenders and an operation for tests, imported by name: also by the processes that a benchmark starts."""

from functools import partial

import torch

from flowformer import ops
from flowformer.bench.registry import Contender, Operation, add_contender, add_operation
from flowformer.bench.rows.attention import bind, sequences, truth
from flowformer.bench.rows.forms import truth_of

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
        "toy", "for tests", "length", (8,), sequences, partial(bind, causal=True), partial(truth, causal=True),
        lambda shape: shape.batch * shape.length,
    )
)  # fmt: skip
for _name, _function, _truth, _more in (
    ("right", shifted, truth_of("flow"), {"ours": True}),
    ("also-right", shifted, truth_of("flow"), {}),
    ("wrong", wrong, truth_of("flow"), {}),
    ("failing", failing, truth_of("flow"), {}),
    ("allocate", allocate, None, {}),
    ("absent", shifted, None, {"unavailable": lambda inputs: "the moon is not up"}),
    ("hungry", shifted, None, {"needs_bytes": lambda shape: 1e18}),
):
    add_contender(Contender(_name, "toy", _function, _truth, "for tests", **_more))
