"""Short depthwise convolution over queries, keys and values, and the state of a module that has one.

Each channel of a projection is mixed with the same channel of its neighbours, so that attention compares short runs of
tokens and not single ones:

    y_t = z_t + silu(b + sum_j w_j z_(t - left + j)),    j = 0 .. width - 1

with ``left = width - 1`` where causal, so that the last tap is the token itself, and ``left = (width - 1) // 2``
otherwise. Neighbours are real tokens of the same sequence: padding is skipped, and zeros stand beyond both ends.

Sources: Fu et al., "Hungry Hungry Hippos", 2023 (arXiv 2212.14052), a shift of few tokens before a state space model;
Gu & Dao, "Mamba", 2023 (arXiv 2312.00752), a causal depthwise convolution of width 4 with SiLU. The residual path is
ours: with small filters the module starts near attention without the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.core.checks import check_flag, check_integer, describe
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.tracing import is_traced

__all__ = ["ModuleState", "ShortConv"]

WIDTHS = (2, 16)  # least and most taps


# Of queries, keys and values: the tokens before the next, as in :class:`ModuleState`.
Recent = tuple[Tensor, Tensor, Tensor]


class ModuleState(NamedTuple):
    """State of a causal attention module with a short convolution, after the tokens so far.

    Attributes:
        q: The last ``conv - 1`` projected queries, (batch, conv - 1, channels); zeros before the first token.
        k: The last projected keys, likewise.
        v: The last projected values, likewise.
        inner: The state of the operation, such as a :class:`flowformer.ops.FlowState`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inner: Any


def check_width(conv: Any) -> None:
    """Raise unless ``conv`` is a width of a short convolution, or 0 for none.

    Raises:
        TypeError: for anything but a whole number.
        ValueError: for another width.
    """
    check_integer("conv", conv)
    least, most = WIDTHS
    if conv and not least <= conv <= most:
        raise ValueError(f"conv must be 0 for no convolution, or a width from {least} to {most}, got {conv}")


class ShortConv(nn.Module):
    """Short depthwise convolution of tokens, with SiLU and a residual path.

    Args:
        channels: Channels of the tokens; each has a filter and a bias of its own.
        width: Taps of a filter, 2 to 16.
        causal: Look at the last ``width`` tokens; else the taps are centred.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        weight: Filters, (channels, width), the tap of the earliest token first.
        bias: (channels,).

    Raises:
        TypeError, ValueError: for a width that is not one.
    """

    def __init__(
        self, channels: int, width: int, *, causal: bool, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_width(width)
        check_flag("causal", causal)
        self.channels, self.width, self.causal = channels, width, causal
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw filters and biases uniformly from +-1 / sqrt(width), as a depthwise ``torch.nn.Conv1d`` has them."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def left(self) -> int:
        """How many tokens before a token its output depends on."""
        return self.width - 1 if self.causal else (self.width - 1) // 2

    def init_recent(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what stands before the first token: zeros (batch, width - 1, channels)."""
        return torch.zeros(batch_size, self.width - 1, self.channels, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, recent: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix each token with its neighbours.

        Args:
            x: (batch, length, channels), finite at padding.
            mask: (batch, length) boolean, True = real token.
            cu_seqlens: (N + 1,) checked boundaries of N sequences packed into a batch of size 1; without ``mask``.
            recent: The ``width - 1`` tokens before the first, (batch or N, width - 1, channels), where causal; zeros if
                absent.

        Returns:
            (batch, length, channels), undefined at padding but finite; and where causal the last ``width - 1`` real
            tokens, for ``recent`` of the tokens that follow, else ``None``.
        """
        recent = recent if recent is None else recent.to(x.dtype)
        if cu_seqlens is not None:
            return self._forward_packed(x, cu_seqlens, recent)
        if mask is None:
            line = self._line_up(x, recent)
            return self._mix(line), line[:, -(self.width - 1) :].clone() if self.causal else None
        (closed,), real, places = close_up([x], mask)
        line = self._line_up(fill(closed, real), recent)
        return spread(self._mix(line), places, x.shape[1]), self._last(line, mask.sum(1)) if self.causal else None

    def step(self, x: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        """Process one token: x (batch, channels) and the tokens before it, to output and the tokens before the next."""
        line, compute = torch.cat([recent.to(x.dtype), x.unsqueeze(1)], 1), sum_dtype(x.dtype)
        with no_autocast(x.device):
            # One product and one sum: what a step costs is the number of operations, not of elements.
            sums = (line.to(compute) * self.weight.to(compute).T).sum(1) + self.bias.to(compute)
            return (x + nn.functional.silu(sums)).to(x.dtype), line[:, 1:]

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"{self.channels}, width={self.width}, causal={self.causal}"

    def _line_up(self, x: Tensor, recent: Tensor | None) -> Tensor:
        """Tokens between what stands before and after them: (batch, length + width - 1, channels)."""
        before = x.new_zeros(x.shape[0], self.left, x.shape[2]) if recent is None else recent
        after = x.new_zeros(x.shape[0], self.width - 1 - self.left, x.shape[2])
        return torch.cat([before, x] if self.causal else [before, x, after], 1)

    def _last(self, line: Tensor, counts: Tensor) -> Tensor:
        """The last ``width - 1`` tokens of each row of a line that holds so many, and ``counts`` (batch,) more."""
        places = counts.unsqueeze(1) + torch.arange(self.width - 1, device=line.device)
        return line.gather(1, places.unsqueeze(2).expand(-1, -1, line.shape[2]))

    def _forward_packed(self, x: Tensor, cu_seqlens: Tensor, recent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All sequences in one line, ``width - 1`` places before each and after the last."""
        gap, count = self.width - 1, cu_seqlens.numel() - 1
        start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        token = torch.arange(x.shape[1], device=x.device)
        places = token + gap * (torch.searchsorted(end, token, right=True) + 1)
        line = x.new_zeros(x.shape[1] + gap * (count + 1), x.shape[2]).index_copy(0, places, x[0])
        gaps = gap * torch.arange(count, device=x.device).unsqueeze(1) + torch.arange(gap, device=x.device)
        if recent is not None:
            line = line.index_copy(0, (start.unsqueeze(1) + gaps).flatten(), recent.flatten(0, 1))
        out = self._mix(line.unsqueeze(0))[0].index_select(0, places - self.left).unsqueeze(0)
        last = (end.unsqueeze(1) + gaps).flatten()
        return out, line.index_select(0, last).unflatten(0, (count, gap)) if self.causal else None

    def _mix(self, line: Tensor) -> Tensor:
        """Outputs (batch, length, channels) of a line of (batch, length + width - 1, channels)."""
        compute = sum_dtype(line.dtype)
        with no_autocast(line.device):
            line, dtype = line.to(compute), line.dtype
            length = line.shape[1] - self.width + 1
            sums = _convolve(line, self.weight.to(compute), self.bias.to(compute))
            return (line[:, self.left : self.left + length] + nn.functional.silu(sums)).to(dtype)


def _convolve(line: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve a line (batch, length + width - 1, channels) by filters (channels, width)."""
    width = weight.shape[1]
    length = line.shape[1] - width + 1
    if not is_traced() and line.dtype == torch.float32 and line.is_cpu and torch.backends.mkldnn.is_available():
        # Images of one row with channels last, which oneDNN reads without a copy: 2 to 5 times as fast as below.
        rows = line.unsqueeze(1).permute(0, 3, 1, 2)
        out = nn.functional.conv2d(rows, weight[:, None, None], bias, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1).squeeze(1)
    out = bias
    for tap in range(width):
        out = torch.addcmul(out, line[:, tap : tap + length], weight[:, tap])
    return out


Convs = tuple[ShortConv, ShortConv, ShortConv]


def convolve(
    convs: Convs,
    tensors: Recent,
    masks: Mapping[str, Tensor | None],
    cu_seqlens: Tensor | None = None,
    recent: Recent | None = None,
) -> tuple[Recent, Recent | None]:
    """Convolve queries, keys and values, each by its own filters.

    Args:
        convs: The convolutions.
        tensors: Queries, keys and values, (batch, length, channels).
        masks: ``mask`` of the queries, and ``context_mask`` of keys and values; absent, that of the queries.
        cu_seqlens: Checked boundaries of a packed batch.
        recent: What stands before them.

    Returns:
        Queries, keys and values; and of causal convolutions what stands before the next.
    """
    mask, keys = masks["mask"], masks["context_mask"]
    keys = mask if keys is None else keys
    given = zip(convs, tensors, (mask, keys, keys), recent or (None, None, None), strict=True)
    (q, last_q), (k, last_k), (v, last_v) = (conv(x, real, cu_seqlens, before) for conv, x, real, before in given)
    return (q, k, v), (last_q, last_k, last_v) if convs[0].causal else None


def convolve_step(convs: Convs, tensors: Recent, recent: Recent) -> tuple[Recent, Recent]:
    """As :func:`convolve`, for one token: queries, keys and values are (batch, channels)."""
    (q, last_q), (k, last_k), (v, last_v) = (
        conv.step(x, before) for conv, x, before in zip(convs, tensors, recent, strict=True)
    )
    return (q, k, v), (last_q, last_k, last_v)


def check_recent(name: str, state: Any, convs: Convs, batch_size: int, device: torch.device) -> None:
    """Raise unless a state is a :class:`ModuleState` for modules of such convolutions.

    Raises:
        TypeError: for another type.
        ValueError: for another shape, dtype or device of the recent tokens; the operation checks its own state.
    """
    if type(state) is not ModuleState:
        raise TypeError(f"{name} must be a ModuleState, got {describe(state)}")
    for label, part, conv in zip("qkv", state, convs, strict=False):
        shape = (batch_size, conv.width - 1, conv.channels)
        wrong = not isinstance(part, Tensor) or part.shape != shape or part.device != device
        if wrong or not part.is_floating_point():
            raise ValueError(f"{name}.{label} must be {shape} of floating point on {device}, got {describe(part)}")
