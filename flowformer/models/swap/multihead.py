"""``torch.nn.MultiheadAttention`` with a mechanism of this library: the same weights and arguments.

The masks of PyTorch are translated here: in ``key_padding_mask`` True is padding, in the rest of this library True is a
real token.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from flowformer.core.checks import check_dtype, check_flag, check_integer, check_number, describe
from flowformer.core.masks import fill
from flowformer.core.precision import FLOAT_DTYPES, is_autocasting
from flowformer.core.tracing import is_traced
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import create_attention, find_attention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class DropInMultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with another mechanism instead of softmax attention.

    Constructor, forward, layouts and names of weights are those of :class:`torch.nn.MultiheadAttention`, so a state
    dict of one loads into the other. Parameters of the mechanism itself, such as the position biases of AFT, come in
    addition, under ``attention.``.

    Padding: where ``query`` is the same tensor as ``key`` or ``value``, the call is self-attention and
    ``key_padding_mask`` marks padded queries too; their outputs are zeros. Otherwise it is cross-attention, and padded
    queries are marked by ``query_padding_mask``, which PyTorch's module does not have: there a padded query has no
    influence on others, while in Flow-Attention queries are part of the flow.

    The fused inference path of ``nn.TransformerEncoderLayer``, which computes softmax attention from the weights
    without calling this module, is switched off by ``_qkv_same_embed_dim = False``. ``nn.TransformerEncoder`` then
    warns, when it is built, that it uses no nested tensors (not with ``enable_nested_tensor=False``). One that was
    built before uses them, and the results are the same.

    Args:
        embed_dim: Channels of queries and outputs.
        num_heads: Heads; divides ``embed_dim``.
        dropout: Probability of dropping an output channel, after the output projection. PyTorch drops attention weights
            instead, of which a mechanism in linear time has none.
        bias: Whether the projections have biases.
        add_bias_kv: Refused.
        add_zero_attn: Refused.
        kdim: Channels of keys; ``embed_dim`` if absent.
        vdim: Channels of values; ``embed_dim`` if absent.
        batch_first: Layout (batch, length, channels) instead of (length, batch, channels).
        device: Of the parameters.
        dtype: Of the parameters.
        mechanism: One of :func:`flowformer.list_attentions`, with four projections of ``embed_dim`` channels: all but
            ``"aft_conv"``.
        **options: Options of the mechanism's module, and ``max_length`` where it learns positions, or takes it where
            causal (then calls of both forms are of at most so many tokens); ``conv``, ``output_norm`` and
            ``output_gate`` are refused, for which PyTorch's module has no weights.

    Raises:
        TypeError: for an option that the mechanism does not have.
        ValueError: for sizes that do not fit, or what the mechanism cannot do.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: str,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        for label, flag in (
            ("bias", bias), ("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn), ("batch_first", batch_first)
        ):  # fmt: skip
            check_flag(f"{name}: {label}", flag)
        for label, width in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if width is not None or label in ("embed_dim", "num_heads"):
                check_integer(f"{name}: {label}", width)
        check_number(f"{name}: dropout", dropout, 0)
        if dropout > 1:
            raise ValueError(f"{name}: dropout is a probability from 0 to 1, got {dropout}")
        if dtype is not None:
            check_dtype(f"{name}: dtype", dtype)
        for label, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None and width < 1:
                raise ValueError(f"{name}: {label} must be at least 1, got {width}")
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{name}: num_heads must divide embed_dim, got embed_dim {embed_dim}, num_heads {num_heads}"
            )
        for label, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise ValueError(
                    f"{name}: {label}=True adds a key without a query, which only softmax attention supports"
                )
        for label in ("conv", "output_norm", "output_gate"):
            if options.get(label):
                raise ValueError(
                    f"{name}: {label}={options[label]!r} is not supported: torch.nn.MultiheadAttention has four "
                    "projections and nothing else; flowformer.create_attention builds a module with it"
                )
        if "causal" in options:
            raise TypeError(f"{name}: causal is not an option: pass is_causal=True or a causal attn_mask in the call")
        super().__init__(
            embed_dim, num_heads, dropout=dropout, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._qkv_same_embed_dim = False  # else TransformerEncoderLayer computes softmax attention by itself
        self.mechanism, self.options = mechanism, options
        attention = self._build_attention()
        if attention.state_dict():
            self.attention = attention
        else:  # no submodule: nothing to save, and nothing that is called as a module
            self.__dict__["attention"] = attention

    def _build_attention(self) -> Attention:
        """The mechanism's module without its projections."""
        dim, weight = self.embed_dim, self.out_proj.weight
        # Any call may be causal: a causal module that needs to know the longest sequence is told it.
        causal = find_attention(self.mechanism).module.bounds_causal
        build = partial(create_attention, self.mechanism, dim, self.num_heads, causal=causal, **self.options)
        with torch.device("meta"):  # draws no random numbers
            attention = build()
        found = [getattr(attention, projection, None) for projection in _PROJECTIONS]
        widths = [None if layer is None else tuple(layer.weight.shape) for layer in found]
        if type(attention).forward is not Attention.forward or any(width != (dim, dim) for width in widths):
            raise ValueError(
                f"{type(self).__name__}: {self.mechanism} attention does not have the four projections of "
                f"torch.nn.MultiheadAttention, {dim} to {dim} channels: got "
                f"{dict(zip(_PROJECTIONS, widths, strict=True))}"
            )
        if _strip(attention).state_dict():
            with weight.device:
                attention = _strip(build())
        return attention.to(weight.dtype)

    def reset_parameters(self) -> None:
        """Re-initialize the weights, like ``torch.nn.MultiheadAttention``."""
        self.out_proj.reset_parameters()
        self._reset_parameters()
        if self.attention.state_dict():
            self.attention.load_state_dict(self._build_attention().state_dict())

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) with ``batch_first``, or (L, embed_dim) without a batch. Nested
                tensors, with ``batch_first``, if all three are.
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,). Boolean, True = padding; or floating point, 0 and -inf.
            need_weights: Return the weights too. They cost L x S, and carry no gradients.
            attn_mask: The causal mask, (L, L) or (N heads, L, L): boolean, True = hidden, or floating point, 0 and
                -inf. A mask that hides nothing is as good as none; all others are refused. To check it costs L x L:
                ``is_causal=True`` without a mask is cheaper. A graph (``torch.compile``) cannot check it, and trusts
                ``is_causal``.
            average_attn_weights: Average the weights over heads.
            is_causal: Causal attention; ``attn_mask`` may be absent, and must be the causal mask if it is given.
            query_padding_mask: Padding of the query, as ``key_padding_mask``; in cross-attention only.

        Returns:
            The output in the layout of ``query``, zeros at padded queries; and the weights, (N, L, S), or
            (N, heads, L, S) if they are not averaged, without N for input without a batch; ``None`` if they are not
            needed. A weight is what a query takes of a value: rows of Flow-Attention do not add up to 1.

        Raises:
            TypeError, ValueError: for invalid input.
        """
        self._check_tensors(query=query, key=key, value=value)
        if query.is_nested or key.is_nested or value.is_nested:
            masks = (key_padding_mask, query_padding_mask)
            return self._forward_nested(
                query, key, value, masks, need_weights=need_weights, attn_mask=attn_mask,
                average_attn_weights=average_attn_weights, is_causal=is_causal,
            )  # fmt: skip
        self._check(query, key, value)
        rank, itself = query.ndim, _is_same(query, key) or _is_same(query, value)
        q, k = (self._batch(x, rank) for x in (query, key))
        causal = self._is_causal(attn_mask, is_causal, q, k)
        keys = self._real("key_padding_mask", key_padding_mask, k, rank)
        queries = self._real("query_padding_mask", query_padding_mask, q, rank)
        queries, masks = self._pair_masks(itself, causal, queries, keys, q, k)
        hidden = self._hide(query, key, value, queries, keys)
        q, k, v = (self.attention.split(self._batch(x, rank)) for x in self._project(*hidden))
        given = {"causal": causal, **masks, **self.attention.arguments()}
        learned = self.attention.learned(self._batch(hidden[0], rank))
        out = self.attention.mechanism.operation(q, k, v, *learned, **given)
        out = self.out_proj(self.attention.join(out))
        out = dropout(out, self.dropout, self.training)
        out = fill(out, queries)
        weights = self._weigh(q, k, learned, given) if need_weights else None
        return self._unbatch(out, query.ndim), self._finish(weights, query, average_attn_weights)

    def extra_repr(self) -> str:
        """Return sizes and the mechanism, for printing."""
        shown = ("embed_dim", "num_heads", "kdim", "vdim", "dropout", "batch_first", "mechanism")
        values = {name: getattr(self, name) for name in shown} | self.options
        return ", ".join(f"{name}={value!r}" for name, value in values.items())

    def adopt(self, module: nn.MultiheadAttention) -> None:
        """Share the parameters of a ``torch.nn.MultiheadAttention`` of equal sizes; an unsupported bias is left out."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(module, name))
        for name in ("weight", "bias"):
            if getattr(self.out_proj, name) is not None:
                setattr(self.out_proj, name, getattr(module.out_proj, name))
        self.train(module.training)

    # ----------------------------------------------------------------------------------------------------------- layout

    def _check_tensors(self, **tensors: Any) -> None:
        """Refuse what is no tensor of the weights' dtype and device; under autocast, dtypes may differ."""
        name, weight = type(self).__name__, self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        for label, x in tensors.items():
            if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name}: {label} must be a tensor of floating-point numbers, got {describe(x)}")
            if x.device != weight.device:
                raise ValueError(f"{name}: {label} must be on {weight.device} like the weights, got {describe(x)}")
            if x.dtype != weight.dtype and not is_autocasting(x.device):
                wanted = str(weight.dtype).removeprefix("torch.")
                raise TypeError(f"{name}: {label} must be {wanted} like the weights, got {describe(x)}")

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = type(self).__name__
        shown = f"got query {describe(query)}, key {describe(key)}, value {describe(value)}"
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ValueError(f"{name}: query, key and value must all have 3 axes, or 2 without a batch, {shown}")
        widths = tuple(x.shape[-1] for x in (query, key, value))
        if widths != (self.embed_dim, self.kdim, self.vdim):
            wanted = (self.embed_dim, self.kdim, self.vdim)
            raise ValueError(f"{name}: query, key and value must have {wanted} channels, {shown}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"{name}: key and value must agree in batch and length, {shown}")
        axis = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[axis] != key.shape[axis]:
            raise ValueError(f"{name}: query and key must agree in batch (axis {axis}), {shown}")

    def _hide(
        self, query: Tensor, key: Tensor, value: Tensor, queries: Tensor | None, keys: Tensor | None
    ) -> list[Tensor]:
        """The inputs with zeros at padding, whatever stood there: gradients of weights are products with the inputs."""
        if queries is None and keys is None:
            return [query, key, value]
        filled: dict[tuple[int, int], Tensor] = {}  # one tensor that is several of the three stays one
        for x, real in ((query, queries), (key, keys), (value, keys)):
            if (id(x), id(real)) not in filled:
                real_of_x = real if real is None else real[0] if x.ndim == 2 else real if self.batch_first else real.T
                filled[id(x), id(real)] = fill(x, real_of_x)
        return [filled[id(x), id(real)] for x, real in ((query, queries), (key, keys), (value, keys))]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        joint, bias = self.in_proj_weight, self.in_proj_bias
        if joint is not None and query is key and key is value:
            return linear(query, joint, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if joint is None else joint.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(linear(x, cast(Tensor, w), b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _batch(self, x: Tensor, rank: int) -> Tensor:
        """Input of any layout as (batch, length, channels)."""
        if rank == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _unbatch(self, x: Tensor, rank: int) -> Tensor:
        """The other way round."""
        if rank == 2:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    @torch.no_grad()
    def _weigh(self, q: Tensor, k: Tensor, learned: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        """Weights (N, heads, L, S) of all queries, for queries and keys as the operation takes them."""
        rows = self.attention.mechanism.rows
        if rows is None:
            raise ValueError(
                f"{type(self).__name__}: {self.mechanism} attention has no weights to return: pass need_weights=False"
            )
        return rows(q, k, range(q.shape[1]), *learned, heads=self.num_heads, **given)

    def _finish(self, weights: Tensor | None, query: Tensor, average: bool) -> Tensor | None:
        """Weights (N, heads, L, S) as PyTorch returns them."""
        if weights is None:
            return None
        weights = (weights.mean(1) if average else weights).to(query.dtype)
        return weights.squeeze(0) if query.ndim == 2 else weights

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, masks: tuple[Tensor | None, ...], **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Nested tensors by way of padded ones; weights stay padded."""
        name = type(self).__name__
        if not (query.is_nested and key.is_nested and value.is_nested and self.batch_first):
            raise ValueError(f"{name}: query, key and value must all be nested tensors, with batch_first=True")
        if any(mask is not None for mask in masks):
            raise ValueError(f"{name}: nested tensors have no padding: padding masks are not supported with them")
        dense = {id(x): _pad(x) for x in (query, key, value)}
        (q, queries), (k, keys), (v, _) = dense[id(query)], dense[id(key)], dense[id(value)]
        other = None if query is key or query is value else queries
        out, weights = self.forward(q, k, v, keys, query_padding_mask=other, **arguments)
        return _nest(out, queries, query), weights

    # ------------------------------------------------------------------------------------------------------------ masks

    def _real(self, label: str, mask: Tensor | None, x: Tensor, rank: int) -> Tensor | None:
        """A padding mask of PyTorch as one of this library: (batch, length) boolean, True = real token."""
        if mask is None:
            return None
        name, shape = type(self).__name__, tuple(x.shape[1:2] if rank == 2 else x.shape[:2])
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            raise ValueError(f"{name}: {label} must have shape {shape}, got {describe(mask)}")
        hidden = self._hidden(label, mask)
        return ~(hidden.unsqueeze(0) if rank == 2 else hidden)

    def _hidden(self, label: str, mask: Tensor) -> Tensor:
        """Where a mask of PyTorch hides; what only adds to scores is refused."""
        if mask.dtype == torch.bool:
            return mask
        name = type(self).__name__
        if not mask.is_floating_point():
            raise TypeError(f"{name}: {label} must be boolean (True = hidden) or floating point, got {describe(mask)}")
        hidden = mask == -torch.inf
        binary = (hidden | (mask == 0)).all()
        if is_traced():  # a graph cannot look at numbers
            torch._assert_async(binary, f"{label} must contain only 0 and -inf")  # pyright: ignore[reportPrivateImportUsage]
        elif not binary:
            raise ValueError(
                f"{name}: {label} must contain only 0 and -inf: there are no scores to which others could be added"
            )
        return hidden

    def _is_causal(self, attn_mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> bool:
        """Whether a call is causal; a mask that is neither causal nor empty is refused."""
        name, length, source = type(self).__name__, q.shape[1], k.shape[1]
        limits = self.attention.mechanism.cannot
        if is_causal and "causal" in limits:
            raise ValueError(f"{name}: {self.mechanism} attention has no causal form, since {limits['causal']}")
        if is_causal and length != source:
            raise ValueError(f"{name}: causal attention requires as many queries as keys, got {length} and {source}")
        if attn_mask is None or (is_causal and is_traced()):
            return is_causal
        shapes = ((length, source), (len(q) * self.num_heads, length, source))
        if not isinstance(attn_mask, Tensor) or tuple(attn_mask.shape) not in shapes:
            raise ValueError(f"{name}: attn_mask must have shape {shapes[0]} or {shapes[1]}, got {describe(attn_mask)}")
        hidden = self._hidden("attn_mask", attn_mask)
        if length == source and (hidden == hidden.new_ones(length, length).triu(1)).all():
            return self._is_causal(None, True, q, k)
        if is_causal or hidden.any():
            raise ValueError(
                f"{name}: attn_mask must be the causal mask (everything above the diagonal hidden) or hide nothing: "
                f"{self.mechanism} attention has no matrix of scores that a mask could be applied to"
            )
        return False

    def _pair_masks(
        self, itself: bool, causal: bool, queries: Tensor | None, keys: Tensor | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """Real queries, and the masks as the operation takes them."""
        name, limits = type(self).__name__, self.attention.mechanism.cannot
        if itself:
            if queries is not None:
                raise ValueError(
                    f"{name}: query_padding_mask is for cross-attention: in self-attention, pass key_padding_mask"
                )
            return keys, {"mask": keys}
        if "cross" in limits:
            raise ValueError(
                f"{name}: {self.mechanism} attention is self-attention, since {limits['cross']}: query and key must be "
                "the same tensor"
            )
        if queries is None and keys is None:
            return None, {}
        if causal:
            raise ValueError(f"{name}: in causal attention with padding, query and key must be the same tensor")
        if queries is None and q.shape == k.shape and not is_traced():
            warnings.warn(
                f"{name}: query and key are of one length but not the same tensor, so this is cross-attention, where "
                "key_padding_mask does not hide queries. For self-attention pass one tensor as both; for "
                "cross-attention with padded queries pass query_padding_mask",
                stacklevel=3,
            )
        # Both are given, for one alone could be that of self-attention.
        every = [torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) for x in (q, k)]
        queries, keys = (every[0] if queries is None else queries), (every[1] if keys is None else keys)
        return queries, {"mask": queries, "context_mask": keys}


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or the same view of one: ``x.transpose(0, 1)`` written twice."""
    return one is other or (not is_traced() and one.is_set_to(other))


def _strip(attention: Attention) -> Attention:
    for projection in (*_PROJECTIONS, "dropout"):
        delattr(attention, projection)
    return attention


def _pad(x: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as a padded one (batch, length, channels), and where it is padding."""
    lengths = torch.tensor([len(row) for row in x.unbind()], device=x.device)
    dense = torch.nested.to_padded_tensor(x, 0.0)
    return dense, torch.arange(dense.shape[1], device=x.device) >= lengths.unsqueeze(1)


def _nest(x: Tensor, padding: Tensor, like: Tensor) -> Tensor:
    """A padded tensor (batch, length, channels) as a nested one of the layout and lengths of another."""
    if like.layout == torch.jagged:
        offsets = cast(Any, like).offsets()  # the same object, or the two could not be added
        return torch.nested.nested_tensor_from_jagged(x[~padding], offsets)
    rows = [row[: int(count)] for row, count in zip(x, (~padding).sum(1), strict=True)]
    return torch.nested.as_nested_tensor(rows)
