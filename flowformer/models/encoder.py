"""The Transformer block and the encoder, shared by models of series and language."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import check_mask, check_probability, check_sizes, check_tokens_of
from flowformer.core.masks import fill
from flowformer.core.tracing import may_look
from flowformer.mechanisms import create_attention
from flowformer.mechanisms.dropout import Dropout

# "gelu_tanh" is the approximation that GPT-2 and the GPT-style module of thuml/Flowformer call "new gelu".
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


class EncoderBlock(nn.Module):
    """Transformer block: attention and a feed-forward network with residual connections, pre-norm or post-norm.

    Source: the encoder layer of thuml/Flowformer, Flowformer_TimeSeries; its 1 x 1 convolutions are linear layers.

    Args:
        dim: Channels.
        num_heads: Heads of the attention.
        ffn_dim: Channels inside the feed-forward network.
        dropout: Probability, on the attention's output and after both layers of the feed-forward network.
        attention: Name of the mechanism.
        attention_options: Options of the mechanism.
        max_length: Longest sequence, for mechanisms that need to know.
        causal: Output t depends on positions up to t only.
        norm_first: Normalise what attention and feed-forward network see (pre-norm), and not their sums (post-norm).
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"relu"``.
        activation_dropout: Probability after the first layer of the feed-forward network; ``dropout`` if absent.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for an unknown activation, and as :func:`flowformer.create_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        dropout: float = 0.0,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        causal: bool = False,
        norm_first: bool = False,
        activation: str = "gelu",
        activation_dropout: float | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, ffn_dim=ffn_dim)
        check_probability("dropout", dropout)
        if activation_dropout is not None:
            check_probability("activation_dropout", activation_dropout)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.norm_first = norm_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = create_attention(
            attention, dim, num_heads, causal=causal, max_length=max_length, **factory, **(attention_options or {})
        )
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.linear1 = nn.Linear(dim, ffn_dim, **factory)
        self.linear2 = nn.Linear(ffn_dim, dim, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.dropout = Dropout(dropout)
        self.activation_dropout = Dropout(dropout if activation_dropout is None else activation_dropout)
        self.activation = ACTIVATIONS[activation]()

    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_state: Literal[False] = False, **arguments: Any
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_state: Literal[True], **arguments: Any
    ) -> tuple[Tensor, Any]: ...

    @overload
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_state: bool, **arguments: Any
    ) -> Tensor | tuple[Tensor, Any]: ...

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, return_state: bool = False, **arguments: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Transform (batch, length, dim).

        Args:
            x: (batch, length, dim).
            mask: (batch, length) boolean, True = a real token.
            return_state: Return the attention's state after the last token as well (causal blocks).
            **arguments: Other arguments of the attention: ``cu_seqlens``, and in causal blocks ``initial_state``.

        Returns:
            (batch, length, dim), undefined at padding but finite; with ``return_state`` also the attention's state.

        Raises:
            TypeError, ValueError: for invalid arguments.
        """
        name = type(self).__name__
        check_tokens_of(f"{name}: x", x, "batch, length", self.attention.dim)
        if mask is not None:
            check_mask(f"{name}: mask", mask, x.shape[:2], x.device)
            # Norms, too, have gradients that are products with their inputs.
            x, arguments["mask"] = fill(x, mask), mask
        seen = self.norm1(x) if self.norm_first else x
        if not return_state:
            return self._add(x, self.attention(seen, **arguments))
        out, state = self.attention(seen, return_state=True, **arguments)
        return self._add(x, out), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token in a causal block: (batch, dim) and the state before it, to output and state after it."""
        check_tokens_of(f"{type(self).__name__}.step: x", x, "batch", self.attention.dim)
        out, state = self.attention.step(self.norm1(x) if self.norm_first else x, state)
        return self._add(x, out), state

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        if self.norm_first:
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self._feed_forward(x))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.activation_dropout(self.activation(self.linear1(x)))))


class Encoder(nn.Module):
    """A stack of blocks and a final norm, computed on real tokens only.

    A padded batch is packed before the first block and unpacked after the last, so that projections, feed-forward
    networks and norms see real tokens only. On a GPU, which would have to be waited for, and while a graph is traced
    (compile, export), where shapes must not depend on data, padding is masked instead; the results are the same.

    Args:
        blocks: The blocks.
        dim: Channels.
        device: Of the norm.
        dtype: Of the norm.
    """

    def __init__(
        self, blocks: list[EncoderBlock], dim: int, *, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode (batch, length, dim); ``mask`` (batch, length), True = real. Zeros at padding.

        Raises:
            TypeError, ValueError: for invalid arguments.
        """
        check_tokens_of(f"{type(self).__name__}: x", x, "batch, length", self.dim)
        if mask is None:
            return self._run(x)
        check_mask(f"{type(self).__name__}: mask", mask, x.shape[:2], x.device)
        if not may_look(x) or not mask.any():  # a packed batch has at least one token
            return fill(self._run(x, mask=mask), mask)
        if mask.all():
            return self._run(x)
        lengths = mask.sum(-1)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        real = mask.flatten().nonzero().squeeze(-1)
        packed = self._run(x.flatten(0, 1).index_select(0, real).unsqueeze(0), cu_seqlens=cu_seqlens).squeeze(0)
        return packed.new_zeros(x.shape).flatten(0, 1).index_copy(0, real, packed).view(x.shape)

    def _run(self, x: Tensor, **where: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **where)
        return self.norm(x)
