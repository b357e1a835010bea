r"""A depthwise convolution of the values, which low-rank mechanisms add to their output.

    out_i = attention(q, k, v)_i + sum_t w_t v_{i + t - c/2}

with a filter w of c taps for each head, the same for all of its channels (Xiong et al., 2021, "Nystromformer"; Lu et
al., 2021, "SOFT", where it is two-dimensional). Outside of the sequence values are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from flowformer.core.checks import check_dense, check_integer, describe


def check_value_conv(name: str, width: Any) -> None:
    """Raise unless a width is 0, for no convolution, or odd.

    Raises:
        TypeError: for what is no whole number.
        ValueError: for another width.
    """
    check_integer(name, width)
    if width < 0 or (width and width % 2 == 0):
        raise ValueError(f"{name} must be odd, or 0 for none, got {width}")


def check_filters(op: str, filters: Any, width: int, heads: int, like: Tensor, axes: int = 1) -> Tensor | None:
    """Return the filters in the dtype of ``like``, ``None`` where there are none.

    Args:
        op: Name of the operation, for messages.
        filters: (heads, width), or (heads, width, width) along two ``axes``; ``None`` without a convolution.
        width: Taps along an axis; 0 for no convolution.
        heads: Heads.
        like: Values.
        axes: 1 for sequences, 2 for images.

    Raises:
        TypeError, ValueError: for anything else.
    """
    check_value_conv(f"{op}: value_conv", width)
    if not width and filters is None:
        return None
    shape = (heads, *(width,) * axes) if width else None
    wanted = f"{op}: filters must be absent without value_conv" if shape is None else f"{op}: filters must be {shape}"
    check_dense(f"{op}: filters", filters)
    if not isinstance(filters, Tensor) or not filters.is_floating_point():
        raise TypeError(f"{wanted}, of floating-point dtype, got {describe(filters)}")
    if filters.shape != shape or filters.device != like.device:
        raise ValueError(f"{wanted} on {like.device} like v, got {describe(filters)}")
    return filters.to(like.dtype)


def convolve_values(v: Tensor, filters: Tensor) -> Tensor:
    """Convolve values (batch, heads, length, channels) by filters (heads, width), to the same shape."""
    return conv2d(v, filters[:, None, :, None], padding=(filters.shape[1] // 2, 0), groups=v.shape[1])


def filter_rows(filters: Tensor, places: Tensor, length: int) -> Tensor:
    """Return the rows of the convolution as a matrix, (heads, rows, length): the filter of each head by distance."""
    tap = torch.arange(length, device=places.device) - places.unsqueeze(1) + filters.shape[1] // 2
    reached = (tap >= 0) & (tap < filters.shape[1])
    return filters[:, tap.clamp(0, filters.shape[1] - 1)].masked_fill(~reached, 0)
