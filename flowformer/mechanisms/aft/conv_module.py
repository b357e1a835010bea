"""AFT-conv module: the Attention Free Transformer with convolutional position biases.

Source: Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103). The bias of two positions depends on how
one lies to the other, and is 0 beyond the reach of the filter: tokens there are still seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import check_flag
from flowformer.mechanisms.aft.conv import LAYOUT, aft_conv, aft_conv_step, init_aft_conv_state
from flowformer.mechanisms.aft.modules import AFT, SOURCE
from flowformer.mechanisms.aft.weights import conv_rows, conv_truth
from flowformer.mechanisms.registry import register

# Added to the variance of a filter, for a filter of one tap has none. Fresh taps have variance 1.
EPS = 1e-6


def _state(batch: int, heads: int, key: int, value: int, filters: Tensor, hard: bool = False, **like: Any) -> Any:
    return init_aft_conv_state(batch, heads, heads * value, *filters.shape[1:], **like)


@register(
    "aft_conv",
    operation=aft_conv,
    truth=conv_truth,
    rows=conv_rows,
    step=aft_conv_step,
    init_state=_state,
    source=SOURCE,
    cost="L kernel V",
    layout=LAYOUT,
    cannot={"permutation": "its biases depend on distance"},
)
class AFTConv(AFT):
    """AFT-conv: one filter of position biases per head, for sequences or images. See :mod:`flowformer.mechanisms.aft`.

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
        device: Of the parameters.
        dtype: Of the parameters.
        **options: ``bias``, ``dropout``, ``head_dim``, ``conv`` (for sequences), ``output_norm`` and ``output_gate``,
            as in :class:`flowformer.mechanisms.Attention`.

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

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | Sequence[int] = 11,
        causal: bool = False,
        hard: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype, **options)
        self.kernel_size = _check_kernel_size(kernel_size, causal)
        check_flag("hard", hard)
        self.hard = hard
        if len(self.kernel_size) == 2:
            self.axes = "batch, height, width"
            if self.conv:
                raise ValueError(
                    f"AFTConv: conv={self.conv} is along a sequence, and kernel_size {self.kernel_size} is for images: "
                    "build it with conv=0"
                )
        factory = {"device": device, "dtype": dtype}
        self.kernel = nn.Parameter(torch.empty(num_heads, *self.kernel_size, **factory))
        self.gamma = nn.Parameter(torch.empty(num_heads, **factory))
        self.beta = nn.Parameter(torch.empty(num_heads, **factory))
        self._reset_filters()

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        self._reset_filters()

    def _reset_filters(self) -> None:
        nn.init.normal_(self.kernel)
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    @property
    def key_width(self) -> int:
        """Channels of the keys: one per head."""
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

    def learned(self, x: Tensor | None = None) -> tuple[Tensor]:
        """The filters, as the operation takes them."""
        return (self.filters,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"hard": self.hard}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}, hard={self.hard}"


def _check_kernel_size(kernel_size: int | Sequence[int], causal: bool) -> tuple[int, ...]:
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,)
    if len(sizes) not in (1, 2) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"AFTConv: kernel_size must be a positive number or a pair of them, got {kernel_size}")
    if causal and len(sizes) == 2:
        raise ValueError(f"AFTConv: images have no causal form: kernel_size must be a single number, got {kernel_size}")
    if not causal and not all(size % 2 for size in sizes):
        raise ValueError(f"AFTConv: kernel_size must be odd, got {kernel_size}")
    return sizes
