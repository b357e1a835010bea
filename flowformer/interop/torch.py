"""``FlowMultiheadAttention``: Flow-Attention as a drop-in replacement for ``torch.nn.MultiheadAttention``.

In ``torch.nn.TransformerEncoderLayer``, ``TransformerDecoderLayer`` and ``Transformer`` it takes the place of
``self_attn`` and ``multihead_attn``; :func:`flowformer.swap_attention` replaces them in a model that is there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flowformer.models.swap.multihead import DropInMultiheadAttention


class FlowMultiheadAttention(DropInMultiheadAttention):
    """Flow-Attention with the constructor, forward, masks, layouts and weights of ``torch.nn.MultiheadAttention``.

    :class:`flowformer.models.swap.DropInMultiheadAttention` describes masks and padding, and does the same for
    other mechanisms.

    In cross-attention all queries compete for the keys, later ones too: as ``multihead_attn`` of a causal decoder, give
    ``competition=None, allocation=False``, which keeps queries apart, or leave softmax attention there.

    Args:
        embed_dim: Channels of queries and outputs.
        num_heads: Heads; divides ``embed_dim``.
        dropout: Probability of dropping an output channel, after the output projection; there are no attention weights
            to drop, as PyTorch does.
        bias: Whether the projections have biases.
        add_bias_kv: Refused.
        add_zero_attn: Refused.
        kdim: Channels of keys; ``embed_dim`` if absent.
        vdim: Channels of values; ``embed_dim`` if absent.
        batch_first: Layout (batch, length, channels) instead of (length, batch, channels).
        device: Of the parameters.
        dtype: Of the parameters.
        preset: The variant of the published code to follow, as in :class:`flowformer.FlowAttention`.
        **overrides: Options of :class:`flowformer.ops.FlowOptions` that depart from the preset.

    Raises:
        TypeError, ValueError: for sizes that do not fit, an unknown preset or option, or what is refused.

    Example:
        >>> import torch
        >>> from flowformer import FlowMultiheadAttention
        >>> attention = FlowMultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 1000, 64)
        >>> padding = torch.arange(1000) >= torch.tensor([[1000], [700]])  # True = padding, as in PyTorch
        >>> output, weights = attention(x, x, x, key_padding_mask=padding, need_weights=False)
        >>> output.shape
        torch.Size([2, 1000, 64])
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
        preset: str = "core",
        **overrides: Any,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype,
            mechanism="flow", preset=preset, **overrides,
        )  # fmt: skip

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, preset: str = "core", **overrides: Any
    ) -> FlowMultiheadAttention:
        """Build Flow-Attention with a copy of the weights of a ``torch.nn.MultiheadAttention``.

        Args:
            module: The module, which is left as it is. Its probability of dropout is taken over.
            preset: As in the constructor.
            **overrides: Likewise.

        Raises:
            TypeError: if ``module`` is not a ``torch.nn.MultiheadAttention``.
            ValueError: if it appends keys (``add_bias_kv``, ``add_zero_attn``); for an unknown preset.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(f"from_torch: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
        built = cls(
            module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
            module.bias_k is not None, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            device="meta", preset=preset, **overrides,
        )  # fmt: skip
        built.adopt(copy.deepcopy(module))
        return built

    def to_torch(self) -> nn.MultiheadAttention:
        """Build a ``torch.nn.MultiheadAttention`` with a copy of these weights."""
        weight = self.out_proj.weight
        module = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, self.in_proj_bias is not None, kdim=self.kdim, vdim=self.vdim,
            batch_first=self.batch_first, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        module.load_state_dict(self.state_dict())
        return module.train(self.training)
