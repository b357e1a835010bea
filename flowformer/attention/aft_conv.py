"""AFT-conv as a module: the Attention Free Transformer whose position biases are filters.

Source: Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103). The bias of two positions depends on how
one lies to the other, and is 0 beyond the reach of the filter: tokens there are still seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowformer import ops
from flowformer.attention.aft import AFT

# Added to the variance of a filter, for a filter of one tap has none. Fresh taps have variance 1.
EPS = 1e-6


class AFTConv(AFT):
    """AFT-conv: one filter of biases for each head, over sequences or images. See :mod:`flowformer.ops.aft`.

    Queries and values are split into heads; keys have one channel for each head. Fresh filters are zero: the module
    starts as AFT-simple.

    Args:
        dim: Channels of input and output.
        num_heads: Heads: filters, and channels of the keys.
        kernel_size: Taps of a filter. A number is for sequences (batch, length, dim); a pair (rows, columns) for images
            (batch, height, width, dim) with masks (batch, height, width). Odd unless causal, for the filter is centred;
            causal, the last tap is the token itself. The paper has 11 and 15 squared on ImageNet (table 7); for
            sequences it has none, and 11 is our choice.
        causal: Output t depends on positions up to t only. For sequences.
        hard: Leave out what the filter does not reach altogether, as the paper does for comparison.
        bias: Whether the four projections have biases.
        dropout: Applied after the output projection.
        head_dim: Channels of a head in queries and values; ``dim // num_heads`` if absent.

    Attributes:
        kernel: What filters are made of, (num_heads, taps) or (num_heads, rows, columns). Its scale does not matter.
        gamma: Deviation of a filter, (num_heads,).
        beta: Mean of a filter, (num_heads,).

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from flowformer import AFTConv
        >>> attention = AFTConv(dim=64, num_heads=4, kernel_size=(11, 11))
        >>> attention(torch.randn(2, 14, 14, 64)).shape
        torch.Size([2, 14, 14, 64])
    """

    self_only = "for a filter wants queries and keys at the same positions"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | Sequence[int] = 11,
        causal: bool = False,
        hard: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias, dropout=dropout, head_dim=head_dim)
        self.kernel_size = _check_kernel_size(kernel_size, causal)
        self.hard = hard
        if len(self.kernel_size) == 2:
            self.axes = "batch, height, width"
        self.kernel = nn.Parameter(torch.empty(num_heads, *self.kernel_size))
        self.gamma = nn.Parameter(torch.empty(num_heads))
        self.beta = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh filters, which are zero; the projections are reset as modules of their own."""
        nn.init.normal_(self.kernel)
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    @property
    def key_width(self) -> int:
        """Channels that keys are projected to: one for each head."""
        return self.num_heads

    @property
    def filters(self) -> Tensor:
        """The biases w = gamma (kernel - mean) / std + beta, head by head, of the shape of ``kernel``.

        The mean and the standard deviation are those of the head's taps. Where gamma is 0, gamma and beta still have
        gradients, and with the first step of training the kernel has.
        """
        kernel = self.kernel.flatten(1)
        variance, mean = torch.var_mean(kernel, 1, correction=0, keepdim=True)
        filters = self.gamma.unsqueeze(1) * (kernel - mean) * (variance + EPS).rsqrt() + self.beta.unsqueeze(1)
        return filters.view_as(self.kernel)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on q and v (batch, length, width), k (batch, length, heads); or the same of images."""
        return ops.aft_conv(q, k, v, self.filters, hard=self.hard, causal=self.causal, **arguments)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, ops.AFTConvState]:
        """Call the operation's step on q and v (batch, width), k (batch, heads)."""
        return ops.aft_conv_step(q, k, v, state, self.filters, hard=self.hard)

    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> ops.AFTConvState:
        """The state before the first token."""
        batch, heads, _, channels = sizes
        return ops.init_aft_conv_state(batch, heads, heads * channels, *self.kernel_size, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, hard={self.hard}"


def _check_kernel_size(kernel_size: int | Sequence[int], causal: bool) -> tuple[int, ...]:
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,)
    if len(sizes) not in (1, 2) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"AFTConv: kernel_size must be a positive number or a pair of them, got {kernel_size}")
    if causal and len(sizes) == 2:
        raise ValueError(f"AFTConv: images have no causal form: kernel_size must be one number, got {kernel_size}")
    if not causal and not all(size % 2 for size in sizes):
        raise ValueError(f"AFTConv: kernel_size must be odd, for the filter to have a centre, got {kernel_size}")
    return sizes
