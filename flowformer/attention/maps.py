"""What attention modules attend to: rows of weights, and flows, of a module or of all modules in a model.

See :mod:`flowformer.ops.maps` for what a weight is, and what it costs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.attention.aft import AFTFull, AFTLocal, AFTSimple
from flowformer.attention.aft_conv import AFTConv
from flowformer.attention.base import Attention
from flowformer.attention.flow import FlowAttention
from flowformer.attention.linear import LinearAttention
from flowformer.attention.mobile import MobileAttention
from flowformer.attention.softmax import SoftmaxAttention
from flowformer.ops import maps
from flowformer.ops.aft import rows as aft
from flowformer.ops.maps import FlowMaps, Rows

# Each takes (module, q, k, rows, causal and masks).
_ROWS: Mapping[type[Attention], Callable[..., Tensor]] = {
    FlowAttention: lambda m, q, k, rows, **a: maps.flow_rows(q, k, rows, preset=m.preset, **m.overrides, **a),
    LinearAttention: lambda m, q, k, rows, **a: maps.linear_rows(q, k, rows, eps=m.eps, **a),
    MobileAttention: lambda m, q, k, rows, **a: maps.mobile_rows(q, k, rows, **m.overrides, **a),
    SoftmaxAttention: lambda m, q, k, rows, **a: maps.softmax_rows(q, k, rows, **a),
    AFTFull: lambda m, q, k, rows, **a: aft.aft_full_rows(q, k, rows, m.position_bias, heads=m.num_heads, **a),
    AFTLocal: lambda m, q, k, rows, **a: aft.aft_local_rows(
        q, k, rows, m.position_bias, m.window, hard=m.hard, heads=m.num_heads, **a
    ),
    AFTSimple: lambda m, q, k, rows, **a: aft.aft_simple_rows(q, k, rows, heads=m.num_heads, **a),
    AFTConv: lambda m, q, k, rows, **a: aft.aft_conv_rows(q, k, rows, m.filters, hard=m.hard, **a),
}
_FLOWS: Mapping[type[Attention], Callable[..., FlowMaps]] = {
    FlowAttention: lambda m, q, k, **a: maps.flow_maps(q, k, preset=m.preset, **m.overrides, **a),
    MobileAttention: lambda m, q, k, **a: maps.mobile_maps(q, k, **m.overrides, **a),
}


@torch.no_grad()
def attention_rows(
    module: Attention,
    x: Tensor,
    rows: Rows,
    context: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """What some queries of a module take from each source: the factor of its value in the query's output.

    The sum of values under these weights, head by head, is what the output projection sees; for AFT, what its gate
    sees. Cost is rows x S x channels, never L x S.

    Args:
        module: One of the library's attention modules.
        x: As the module takes it.
        rows: Places of queries, the same in every sequence; those of an image are counted row by row.
        context: As the module takes it, like all that follow.
        key_padding_mask: Padding of the context, or of x without one.
        query_padding_mask: Padding of x, where there is a context.
        cu_seqlens: Boundaries of sequences packed into a batch of size 1.

    Returns:
        Weights (batch, heads, rows, S), float64 without gradients; S = height width for an image. AFT-full, -local and
        -simple weigh each channel by itself, and a head here is the mean over ``head_dim`` of them. Of a packed batch,
        (N, heads, rows, longest sequence). Zeros from and to padding.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    found = _find(_ROWS, module)
    if found is None:
        raise TypeError(f"want one of {', '.join(sorted(kind.__name__ for kind in _ROWS))}, got {_name(module)}")
    x, key_padding_mask = _unpack(x, key_padding_mask, cu_seqlens)
    q, k, masks = _project(module, x, context, key_padding_mask, query_padding_mask)
    return found(module, q, k, rows, causal=module.causal, **masks)


@torch.no_grad()
def flow_maps(
    module: Attention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> FlowMaps:
    """The flows within a module of Flow- or Mobile-Attention, in time and memory linear in length.

    Args:
        module: The module.
        x: As in :func:`attention_rows`, like all that follow.
        context: Likewise.
        key_padding_mask: Likewise.
        query_padding_mask: Likewise.
        cu_seqlens: Likewise.

    Returns:
        Each (batch, heads, L) or (batch, heads, S), float64 without gradients; zeros at padding.

    Raises:
        TypeError, ValueError: for a module without flows, or input that is not as said above.
    """
    found = _find(_FLOWS, module)
    if found is None:
        raise TypeError(f"only {' and '.join(kind.__name__ for kind in _FLOWS)} have flows, got {_name(module)}")
    x, key_padding_mask = _unpack(x, key_padding_mask, cu_seqlens)
    q, k, masks = _project(module, x, context, key_padding_mask, query_padding_mask)
    return found(module, q, k, causal=module.causal, **masks)


def has_flows(module: nn.Module) -> bool:
    """Whether :func:`flow_maps` has something to say of a module."""
    return _find(_FLOWS, module) is not None


class LayerMaps(NamedTuple):
    """What one attention module of a model did with an input.

    Attributes:
        module: The module.
        rows: Places of the queries.
        weights: As of :func:`attention_rows`.
        flows: As of :func:`flow_maps`; ``None`` where they were not asked for, or there are none.
    """

    module: Attention
    rows: tuple[int, ...]
    weights: Tensor
    flows: FlowMaps | None


def model_maps(
    model: nn.Module,
    *inputs: Any,
    rows: Sequence[int] | Callable[[str, int], Sequence[int]],
    flows: bool = False,
    **arguments: Any,
) -> dict[str, LayerMaps]:
    """Run a model, and see what each of its attention modules attends to.

    Any model that holds modules of the library will do. It is run as it is: in evaluation mode, if that is wanted.

    Args:
        model: The model.
        *inputs: What it is called with.
        rows: Places of queries, for all modules; or a function of a module's name and the number of its queries, where
            modules see other numbers of tokens.
        flows: See flows as well, in modules that have them.
        **arguments: What it is called with by name.

    Returns:
        By name of the module, in the order of their calls. Of a module that is called twice, what it did last.

    Raises:
        TypeError, ValueError: as :func:`attention_rows`; for a model without such modules; for one that goes on from a
            state, so that its past is not to be seen.
    """
    found: dict[str, LayerMaps] = {}
    named = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not named:
        raise ValueError(f"{type(model).__name__} holds no attention module of this library")
    with ExitStack() as hooks, torch.no_grad():
        for name, module in named.items():
            watch = _watch(name, rows, flows, found)
            hooks.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        model(*inputs, **arguments)
    return found


def _watch(
    name: str, rows: Sequence[int] | Callable[[str, int], Sequence[int]], flows: bool, found: dict[str, LayerMaps]
) -> Callable[..., None]:
    """A hook that adds what a module is about to do to ``found``."""
    signature = inspect.signature(Attention.forward)

    def hook(module: Attention, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        given = signature.bind(module, *inputs, **arguments).arguments
        if given.get("initial_state") is not None:
            raise ValueError(f"{name} goes on from a state: give the model the whole sequence at once")
        wanted = ("x", "context", "key_padding_mask", "query_padding_mask", "cu_seqlens")
        given = {key: given[key] for key in wanted if key in given}
        x = given.pop("x")
        places = tuple(rows(name, _queries(x, given.get("cu_seqlens"))) if callable(rows) else rows)
        weights = attention_rows(module, x, places, **given)
        seen = flow_maps(module, x, **given) if flows and has_flows(module) else None
        found[name] = LayerMaps(module, places, weights, seen)

    return hook


def _queries(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[1:-1].numel() if cu_seqlens is None else int(cu_seqlens.diff().max())


def _find(table: Mapping[type[Attention], Any], module: Any) -> Any:
    """The entry of a module's class, or of one that it derives from."""
    return next((table[kind] for kind in type(module).__mro__ if kind in table), None)


def _name(module: Any) -> str:
    return type(module).__name__


def _project(
    module: Attention,
    x: Tensor,
    context: Tensor | None,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Queries, keys and masks as the module's operation is given them."""
    module._check(x, context, query_padding_mask)
    source = x if context is None else context
    q, k = module.split(module.q_proj(x)), module.split(module.k_proj(source))
    if module.self_only:
        return q, k, {"key_padding_mask": key_padding_mask}
    if context is not None and key_padding_mask is not None and query_padding_mask is None:
        query_padding_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return q, k, {"key_padding_mask": key_padding_mask, "query_padding_mask": query_padding_mask}


def _unpack(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A packed batch (1, total, dim) as a padded one, and its mask."""
    if cu_seqlens is None:
        return x, mask
    if mask is not None:
        raise ValueError("a packed batch has no padding: give cu_seqlens or key_padding_mask, not both")
    lengths = cu_seqlens.diff().long()
    parts = x.squeeze(0).split(lengths.tolist())
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths.unsqueeze(1)
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True), mask
