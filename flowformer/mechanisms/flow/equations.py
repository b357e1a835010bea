"""What the forms of Flow-Attention share: features, competition and allocation of given flows, and checks.

Shapes are (batch, heads, ...) but for inputs, which are (batch, length, heads, channels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import Masks, check_dense, describe
from flowformer.core.masks import fill
from flowformer.core.precision import FLOAT_DTYPES, no_autocast, sum_dtype
from flowformer.mechanisms.decay import check_given
from flowformer.mechanisms.flow.options import RELU_FLOOR, FlowOptions, KernelOptions
from flowformer.mechanisms.flow.state import FlowState
from flowformer.mechanisms.linear.operation import elu_plus_one


class Learned(NamedTuple):
    """Learned tensors of Flow-Attention, each or none of them.

    Attributes:
        log_decay: (heads,), or (batch, length, heads); see :mod:`flowformer.core.decay`.
        temperatures: Of competition, of allocation, and the offset of allocation, (3, heads).
        feature_weights: W of queries and of keys for ``feature_map="learned"``, (2, heads, K, K).
    """

    log_decay: Tensor | None = None
    temperatures: Tensor | None = None
    feature_weights: Tensor | None = None


def resolve(op: str, learned: Learned, q: Tensor, options: FlowOptions, *, step: bool = False) -> Learned:
    """Check learned tensors beside q, and return them with the default of a fixed decay.

    Raises:
        TypeError, ValueError: for tensors that do not fit, are needed and absent, or not used.
    """
    log_decay, temperatures, weights = learned
    heads, channels = q.shape[-2:]
    if log_decay is not None or options.decay is not None:
        log_decay = check_given(op, log_decay, options.decay, q, step=step)
    _check(op, "temperatures", temperatures, options.temperature, (3, heads), q)
    needed = options.feature_map == "learned"
    _check(op, "feature_weights", weights, needed, (2, heads, channels, channels), q)
    return Learned(log_decay, temperatures, weights)


def _check(op: str, name: str, tensor: Any, wanted: bool, shape: tuple[int, ...], q: Tensor) -> None:
    check_dense(f"{op}: {name}", tensor)
    if (tensor is not None) != wanted or (wanted and not isinstance(tensor, Tensor)):
        what = f"a tensor {shape}" if wanted else "None without the option for it"
        raise TypeError(f"{op}: {name} must be {what}, got {describe(tensor)}")
    if wanted and tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {describe(tensor)}")
    if wanted and (tensor.shape != shape or tensor.device != q.device):
        raise ValueError(f"{op}: {name} must be {shape} on {q.device}, got {describe(tensor)}")


def features(x: Tensor, mask: Tensor | None, feature_map: str, weights: Tensor | None = None) -> Tensor:
    """Return phi(x) for x (batch, length, heads, K); zero at padding, which excludes it from all flows."""
    # Padding is filled twice: before, since the derivative of sigmoid at NaN is NaN, and after, since phi(0) > 0.
    x = fill(x, mask).to(sum_dtype(x.dtype))
    if weights is not None:
        x = torch.einsum("blhk,hkf->blhf", x, weights.to(x.dtype))
    return fill(phi(x, feature_map), mask)


def query_and_key(
    q: Tensor, k: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, learned: Learned, options: FlowOptions
) -> tuple[Tensor, Tensor]:
    """Return the features of queries and keys, (batch, length, heads, features)."""
    weights = (None, None) if learned.feature_weights is None else learned.feature_weights
    of_q, of_k = weights
    return features(q, query_mask, options.feature_map, of_q), features(k, key_mask, options.feature_map, of_k)


def phi(x: Tensor, feature_map: str) -> Tensor:
    """Return the feature map of x (..., K); see :class:`FlowOptions`."""
    if feature_map == "sigmoid":
        return x.sigmoid()
    if feature_map == "relu":
        return x.relu() + RELU_FLOOR
    if feature_map == "elu":
        return elu_plus_one(x)
    return x.shape[-1] * torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def beside(factor: Tensor, flow: Tensor) -> Tensor:
    """Give a factor of each head (heads,) the axes of flows (batch, heads, ...)."""
    return factor.to(flow.dtype).view(-1, *(1,) * (flow.ndim - 2))


def contend(conserved: Tensor, temperatures: Tensor | None, options: FlowOptions | KernelOptions) -> Tensor:
    """Return the logits of competition of conserved outgoing flows: with a temperature t, t (O^ - 1)."""
    if temperatures is not None:
        conserved = beside(temperatures[0], conserved) * (conserved - 1)
    return conserved if options.clamp is None else conserved.clamp(-options.clamp, options.clamp)


def allocate(conserved: Tensor, temperatures: Tensor | None) -> Tensor:
    """Return the gate of conserved incoming flows: sigmoid(I^), or with a temperature b and an offset a b (I^ - 1) + a.

    Both start as published, with a = b = 1.
    """
    if temperatures is not None:
        conserved = beside(temperatures[1], conserved) * (conserved - 1) + beside(temperatures[2], conserved)
    return conserved.sigmoid()


def open_flow(flow: Tensor, mask: Tensor | None, others: Tensor | None = None) -> Tensor:
    """Set the flow of padding, next to nothing, to 1: it is divided by, and nothing may come of that.

    The same where ``others``, the mask of the other side, has no token: without eps, such a flow is nothing at all.
    """
    if mask is not None:
        shape = (mask.shape[0], 1, *flow.shape[2:])  # (batch, heads, length) or (batch, heads, chunks, chunk)
        flow = flow.masked_fill(~mask.view(shape), 1.0)
    return flow if others is None else flow.masked_fill(~others.any(-1).view(-1, 1, 1), 1.0)


def refusals(learned: Learned) -> Mapping[str, str]:
    """Why backends cannot compute with these tensors, by the name of the backend."""
    return {} if learned.temperatures is None else {"native": "the native kernels have no learned temperatures"}


FEATURE_MAPS = {"sigmoid": 0, "relu": 1, "elu": 2, "given": 3}  # of kernels; given: q and k are features already


def features_first(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, learned: Learned, options: FlowOptions
) -> tuple[Tensor, Tensor, Tensor, KernelOptions]:
    """Compute the feature maps that kernels do not have: q, k, v and options for the kernels."""
    if options.feature_map in FEATURE_MAPS:
        return q, k, v, options.values()
    with no_autocast(q.device):
        Q, K = query_and_key(q, k, masks.query, masks.key, learned, options)
    return Q, K, v.to(Q.dtype), options.values()._replace(feature_map="given")


def single(learned: Tensor | None) -> Tensor | None:
    """Return log-decays or temperatures in float32, as kernels take them."""
    return None if learned is None else learned.float()


def state_of(state: FlowState, learned: Learned) -> Sequence[Tensor]:
    """Return the state before a sequence, for kernels; without decay, a count is no function of any input."""
    return state if learned.log_decay is not None else (state.tokens.detach(), *state[1:])
