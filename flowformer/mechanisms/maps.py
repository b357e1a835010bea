"""Attention maps: rows of weights, and flows, of a module or of all attention modules of a model.

See :mod:`flowformer.mechanisms.weights` for what a weight is. Rows of softmax and AFT add up to 1, those of linear
attention nearly so. Those of Flow- and Mobile-Attention do not: allocation is part of them, and in Mobile-Attention the
number of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import find_attention, list_attentions
from flowformer.mechanisms.weights import FlowMaps, Places


@torch.no_grad()
def attention_rows(
    module: Attention,
    x: Tensor,
    rows: Places,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the attention weights of some queries of a module: the factor of each value in the query's output.

    The sum of values under these weights, head by head, is what the output projection sees; for AFT, what its gate
    sees. In a module with ``conv``, queries, keys and values are those after the convolution; ``output_norm`` and
    ``output_gate`` come after the sum, and do not show in the weights. Cost is rows x S x channels, never L x S.

    Args:
        module: One of the library's attention modules.
        x: As the module takes it.
        rows: Places of queries, the same in every sequence; those of an image are counted row by row.
        context: As the module takes it, like all that follow.
        mask: Padding of x.
        context_mask: Padding of the context.
        cu_seqlens: Boundaries of sequences packed into a batch of size 1.

    Returns:
        Weights (batch, heads, rows, S), float64 without gradients; S = height width for an image. AFT-full, -local and
        -simple weigh each channel by itself, and a head here is the mean over ``head_dim`` of them. Of a packed batch,
        (N, heads, rows, longest sequence). Zeros from and to padding.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    row = _row(module)
    if row is None or row.rows is None:
        kinds = sorted(find_attention(name).module.__name__ for name in list_attentions() if find_attention(name).rows)
        raise TypeError(f"module must be one of {', '.join(kinds)}, got {type(module).__name__}")
    x, mask = _unpack(x, mask, cu_seqlens)
    q, k, masks = _project(module, x, context, mask, context_mask)
    return row.rows(
        q, k, rows, *module.learned(x), causal=module.causal, heads=module.num_heads, **masks, **module.arguments()
    )


@torch.no_grad()
def flow_maps(
    module: Attention,
    x: Tensor,
    context: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> FlowMaps:
    """Return the flows of a Flow-Attention or Mobile-Attention module, in time and memory linear in length.

    Args:
        module: The module.
        x: As in :func:`attention_rows`, like all that follow.
        context: Likewise.
        mask: Likewise.
        context_mask: Likewise.
        cu_seqlens: Likewise.

    Returns:
        Each (batch, heads, L) or (batch, heads, S), float64 without gradients; zeros at padding.

    Raises:
        TypeError, ValueError: for a module without flows, or arguments of another form.
    """
    row = _row(module)
    if row is None or row.flows is None:
        kinds = [find_attention(name).module.__name__ for name in list_attentions() if find_attention(name).flows]
        raise TypeError(f"only {' and '.join(kinds)} have flows, got {type(module).__name__}")
    x, mask = _unpack(x, mask, cu_seqlens)
    q, k, masks = _project(module, x, context, mask, context_mask)
    return row.flows(q, k, *module.learned(x), causal=module.causal, **masks, **module.arguments())


def has_flows(module: nn.Module) -> bool:
    """Return whether :func:`flow_maps` supports a module."""
    row = _row(module)
    return row is not None and row.flows is not None


class LayerMaps(NamedTuple):
    """Attention maps of one attention module for an input.

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
    """Run a model and return the attention maps of all its attention modules.

    Works for any model that holds modules of the library. It is run as it is: call ``model.eval()`` before.

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
        TypeError, ValueError: as :func:`attention_rows`; for a model without such modules; for one that continues
            from a state, whose past is not known.
    """
    found: dict[str, LayerMaps] = {}
    named = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not named:
        raise ValueError(f"{type(model).__name__} contains no attention module of this library")
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
            raise ValueError(f"{name} continues from a state: pass the whole sequence to the model at once")
        wanted = ("x", "context", "mask", "context_mask", "cu_seqlens")
        given = {key: given[key] for key in wanted if key in given}
        x = given.pop("x")
        places = tuple(rows(name, _queries(x, given.get("cu_seqlens"))) if callable(rows) else rows)
        weights = attention_rows(module, x, places, **given)
        seen = flow_maps(module, x, **given) if flows and has_flows(module) else None
        found[name] = LayerMaps(module, places, weights, seen)

    return hook


def _queries(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[1:-1].numel() if cu_seqlens is None else int(cu_seqlens.diff().max())


def _row(module: Any) -> Any:
    """The module's row of the registry, or ``None``."""
    return getattr(module, "mechanism", None) if isinstance(module, Attention) else None


def _project(
    module: Attention, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Queries, keys and masks as the module's operation is given them."""
    x, source, masks = module.resolve(x, context, mask, context_mask)
    q, k, _, _ = module.project(x, source, masks)
    return q, k, masks


def _unpack(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A packed batch (1, total, dim) as a padded one, and its mask."""
    if cu_seqlens is None:
        return x, mask
    if mask is not None:
        raise ValueError("a packed batch has no padding: pass cu_seqlens or mask, not both")
    lengths = cu_seqlens.diff().long()
    parts = x.squeeze(0).split(lengths.tolist())
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths.unsqueeze(1)
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True), mask
