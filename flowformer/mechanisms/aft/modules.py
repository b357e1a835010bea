"""Modules of the Attention Free Transformer; AFT-conv is in :mod:`flowformer.mechanisms.aft.conv_module`.

Source: Zhai et al., "An Attention Free Transformer", 2021 (arXiv 2105.14103):

    y_t = sigmoid(q_t) * sum_t' exp(k_t' + w_tt') v_t' / sum_t' exp(k_t' + w_tt')

channel by channel, with a position bias w that is a number for each pair of positions. The four forms differ in w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import CHANNELS, LARGEST_SIZE, check_flag, check_integer, check_number, check_sizes
from flowformer.mechanisms.aft.full import aft_full, aft_full_step, init_aft_full_state
from flowformer.mechanisms.aft.local import LAYOUT as LOCAL_LAYOUT
from flowformer.mechanisms.aft.local import aft_local, aft_local_step, init_aft_local_state
from flowformer.mechanisms.aft.simple import aft_simple, aft_simple_step, init_aft_simple_state
from flowformer.mechanisms.aft.weights import full_weights, local_weights, simple_weights
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import rows_of, truth_of

SOURCE = "Zhai et al., An Attention Free Transformer, 2021"


class AFT(Attention):
    """Base class of AFT modules, whose operations take (batch, length, channels) without an axis of heads.

    Each channel is weighed on its own, so that full, local and simple have as many heads as channels. ``num_heads`` is
    taken so that AFT can stand wherever another mechanism does; with ``head_dim`` it sets the width of the projections,
    ``num_heads * head_dim``, and nothing else.
    """

    @property
    def norm_width(self) -> int:
        """All channels: there is no axis of heads."""
        return self.num_heads * self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """Return queries, keys or values (..., width) unchanged."""
        return x

    def join(self, out: Tensor) -> Tensor:
        """Return the operation's output (..., width) unchanged."""
        return out


def _simple_state(batch: int, heads: int, key: int, value: int, **like: Any) -> Any:
    return init_aft_simple_state(batch, heads * value, **like)


@register(
    "aft_simple",
    operation=aft_simple,
    truth=truth_of(simple_weights, gate=torch.sigmoid),
    rows=rows_of("aft_simple", simple_weights, CHANNELS),
    step=aft_simple_step,
    init_state=_simple_state,
    source=SOURCE,
    cost="L V",
    layout=CHANNELS,
)
class AFTSimple(AFT):
    """AFT-simple: no position biases, in linear time. See :mod:`flowformer.mechanisms.aft`.

    All tokens see one and the same weighted mean of the values (of those up to their own where causal), each through
    its own gate.

    Args:
        dim: Channels of input and output.
        num_heads: Divides ``dim`` unless ``head_dim`` is given; all of them together are the width of the projections.
            What AFT computes does not depend on it: it has as many heads as channels.
        **options: ``causal``, ``bias``, ``dropout``, ``head_dim``, ``conv``, ``output_norm``, ``output_gate``,
            ``device`` and ``dtype``, as in :class:`flowformer.mechanisms.Attention`.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from flowformer import AFTSimple
        >>> attention = AFTSimple(dim=64)
        >>> attention(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(self, dim: int, num_heads: int = 1, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)


class _PositionedAFT(AFT):
    """AFT with a position bias for each pair of positions: a free table, or the product of two factors.

    Attributes:
        query_positions: u, (max_length, position_dim); w = u v^T.
        key_positions: v, likewise.
        position_table: w itself, (max_length, max_length), where there are no factors.
    """

    learns_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None,
        position_dim: int | None,
        position_std: float,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        self.max_length, self.position_dim = self._check_positions(max_length, position_dim, position_std), position_dim
        self.position_std = position_std

        def new(channels: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.max_length, channels, device=device, dtype=dtype))

        if position_dim is None:
            self.position_table = new(self.max_length)
        else:
            self.query_positions, self.key_positions = new(position_dim), new(position_dim)
        self._reset_positions()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        self._reset_positions()

    def _reset_positions(self) -> None:
        (bias,) = self.learned()
        for part in (bias,) if isinstance(bias, Tensor) else bias:
            nn.init.normal_(part, std=self.position_std)

    def learned(self, x: Tensor | None = None) -> tuple[Tensor | tuple[Tensor, Tensor]]:
        """The position bias w as the operation takes it: the table, or its two factors."""
        return (self.position_table if self.position_dim is None else (self.query_positions, self.key_positions),)

    def _check_positions(self, max_length: int | None, position_dim: int | None, position_std: float) -> int:
        name = type(self).__name__
        for label, value in (("max_length", max_length), ("position_dim", position_dim)):
            if value is not None:
                check_integer(label, value)
        for label, value in (("max_length", max_length), ("position_dim", position_dim)):
            if value is not None and value > LARGEST_SIZE:
                raise ValueError(f"{name}: {label} must be at most {LARGEST_SIZE}, got {value}")
        check_number("position_std", position_std, at_most=100)
        if max_length is None:
            raise ValueError(
                f"{name}: max_length is required, the length of the longest sequence: there is a bias for each position"
            )
        if max_length < 1 or (position_dim is not None and position_dim < 1):
            raise ValueError(f"{name}: max_length and position_dim must be positive, got {max_length}, {position_dim}")
        if position_std < 0 or (position_std == 0 and position_dim is not None):
            raise ValueError(
                f"{name}: position_std must be positive (0 for a free table: factors of zeros have no gradients), "
                f"got {position_std}"
            )
        return max_length

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, max_length={self.max_length}, position_dim={self.position_dim}"


def _full_state(batch: int, heads: int, key: int, value: int, *bias: Any, **like: Any) -> Any:
    return init_aft_full_state(batch, heads * value, **like)


@register(
    "aft_full",
    operation=aft_full,
    truth=truth_of(full_weights, gate=torch.sigmoid),
    rows=rows_of("aft_full", full_weights, CHANNELS),
    step=aft_full_step,
    init_state=_full_state,
    source=SOURCE,
    cost="L^2 V",
    layout=CHANNELS,
    cannot={
        "linear time": "every pair of positions has a bias of its own",
        "fixed state": "it remembers every key and value",
        "permutation": "it learns a bias for each pair of positions",
    },
)
class AFTFull(_PositionedAFT):
    """AFT-full: a learned bias for each pair of positions, in quadratic time. See :mod:`flowformer.mechanisms.aft`.

    Args:
        dim: Channels of input and output.
        num_heads: Divides ``dim`` unless ``head_dim`` is given; all of them together are the width of the projections.
            What AFT computes does not depend on it: it has as many heads as channels.
        max_length: Longest sequence (T), queries or keys; must be given. Shorter ones use the first positions.
        position_dim: Channels (d') of the factors of the bias, w = u v^T with u and v (T, d'); the paper has 128 on
            ImageNet, 64 on CIFAR-10 and 256 on Enwik8, and found factors to do better than a free table (table 3).
            ``None`` is a free table (T, T).
        position_std: Standard deviation of fresh factors, or of a fresh table. The paper draws factors from
            "N(0, 10^-2)" without stating whether the second number is the variance; by convention it is, hence
            0.1, a bias of deviation 0.1^2 sqrt(d') = 0.11 at d' = 128. The initialization of a table is not given.
        **options: ``causal``, ``bias``, ``dropout``, ``head_dim``, ``conv``, ``output_norm``, ``output_gate``,
            ``device`` and ``dtype``, as in :class:`flowformer.mechanisms.Attention`.

    Raises:
        ValueError: for sizes that do not fit; when called, for a sequence longer than ``max_length``.

    Example:
        >>> import torch
        >>> from flowformer import AFTFull
        >>> attention = AFTFull(dim=64, max_length=1000)
        >>> attention(torch.randn(2, 800, 64)).shape
        torch.Size([2, 800, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        max_length: int | None = None,
        position_dim: int | None = 128,
        position_std: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            dim, num_heads, max_length=max_length, position_dim=position_dim, position_std=position_std, **options
        )


def _local_state(
    batch: int, heads: int, key: int, value: int, *bias: Any, window: int, hard: bool = False, **like: Any
) -> Any:
    return init_aft_local_state(batch, heads * value, window, **like)


@register(
    "aft_local",
    operation=aft_local,
    truth=truth_of(local_weights, gate=torch.sigmoid),
    rows=rows_of("aft_local", local_weights, LOCAL_LAYOUT),
    step=aft_local_step,
    init_state=_local_state,
    source=SOURCE,
    cost="L window V",
    layout=LOCAL_LAYOUT,
    cannot={"permutation": "it learns a bias for each pair of positions within a window"},
)
class AFTLocal(_PositionedAFT):
    """AFT-local: learned biases within a window, none outside, in linear time. See :mod:`flowformer.mechanisms.aft`.

    Tokens outside the window are still seen, with the bias 0: attention stays global.

    Args:
        dim: Channels of input and output.
        num_heads: Divides ``dim`` unless ``head_dim`` is given; all of them together are the width of the projections.
            What AFT computes does not depend on it: it has as many heads as channels.
        max_length: Longest sequence (T); must be given. Shorter ones use the first positions.
        window: The bias of t and t' is kept where abs(t - t') < window (s). The default, and that of ``position_dim``,
            is the paper's on Enwik8; on CIFAR-10 it has window 256 and ``position_dim`` 64.
        hard: Leave out what is outside the window altogether, as the paper does for comparison.
        position_dim: As in :class:`AFTFull`.
        position_std: As in :class:`AFTFull`.
        **options: ``causal``, ``bias``, ``dropout``, ``head_dim``, ``conv``, ``output_norm``, ``output_gate``,
            ``device`` and ``dtype``, as in :class:`flowformer.mechanisms.Attention`.

    Raises:
        ValueError: for sizes that do not fit; when called, for a sequence longer than ``max_length``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        max_length: int | None = None,
        window: int = 32,
        hard: bool = False,
        position_dim: int | None = 256,
        position_std: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            dim, num_heads, max_length=max_length, position_dim=position_dim, position_std=position_std, **options
        )
        check_sizes(window=window)
        check_flag("hard", hard)
        self.window, self.hard = window, hard

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"window": self.window, "hard": self.hard}

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, window={self.window}, hard={self.hard}"
