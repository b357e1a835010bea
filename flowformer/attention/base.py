"""What every attention module shares: projections, heads, padding, and the protocol of states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowformer.ops.masking import describe


class Attention(nn.Module, ABC):
    """Attention of one or more heads around an operation of :mod:`flowformer.ops`.

    Queries, keys and values are linear projections of the input, split as the operation wants them; its outputs are
    joined and projected once more, and dropout follows.

    A mechanism is a subclass with :meth:`attend`, :meth:`attend_step` and :meth:`fresh_state`. One whose operation has
    no axis of heads overrides :meth:`split` and :meth:`join` too, one with narrower keys :attr:`key_width`.

    Attributes:
        learns_positions: Whether the module has parameters for each position, and so an argument ``max_length``, which
            :func:`flowformer.create_attention` then hands on.
        self_only: Why the module takes no context; ``""`` where it does.
        axes: The axes of an input before its channels.

    Args:
        dim: Channels of input and output.
        num_heads: Heads; divides ``dim`` unless ``head_dim`` is given.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Probability of dropping an output channel, after the output projection.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.

    Raises:
        ValueError: for sizes that do not fit.
    """

    learns_positions: ClassVar[bool] = False
    self_only: ClassVar[str] = ""
    axes: str = "batch, length"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or (head_dim is not None and head_dim < 1):
            raise ValueError(f"dim, num_heads and head_dim must be positive, got {dim}, {num_heads}, {head_dim}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim {dim} and num_heads {num_heads}; or give head_dim")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=bias)
        self.k_proj = nn.Linear(dim, self.key_width, bias=bias)
        self.v_proj = nn.Linear(dim, inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    @property
    def key_width(self) -> int:
        """Channels that keys are projected to."""
        return self.num_heads * self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys or values (..., width) as the operation takes them: (..., heads, channels)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def join(self, out: Tensor) -> Tensor:
        """The operation's output (..., heads, channels) as the output projection takes it: (..., width)."""
        return out.flatten(-2)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
        """Call the operation on what :meth:`split` makes of (batch, length, width)."""

    @abstractmethod
    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Call the operation's step on what :meth:`split` makes of (batch, width)."""

    @abstractmethod
    def fresh_state(self, *sizes: int, dtype: torch.dtype, device: torch.device) -> Any:
        """The operation's state before the first token, for sizes (batch, heads, key channels, value channels)."""

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Attend from ``x`` to ``context``, or to itself.

        Args:
            x: (batch, L, dim).
            context: (batch, S, dim); ``x`` if absent. Not for causal modules, nor for those that are ``self_only``.
            key_padding_mask: (batch, S) boolean, True = real token of the context, or of x without one.
            query_padding_mask: (batch, L) boolean, True = real token of x; with ``context`` only.
            cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1; without ``context``.
            initial_state: State to continue from (causal modules).
            return_state: Return the state after the last token as well (causal modules).

        Returns:
            (batch, L, dim), zeros at padded positions; with ``return_state`` also the state.

        Raises:
            TypeError, ValueError: for input that is not as said above.
        """
        self._check(x, context, query_padding_mask)
        source = x if context is None else context
        if context is None:
            query_padding_mask = None
        elif query_padding_mask is None and key_padding_mask is not None:
            # Said outright, lest the operation take equal lengths for self-attention.
            query_padding_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(source)), self.split(self.v_proj(source))
        arguments: dict[str, Any] = {"key_padding_mask": key_padding_mask, "query_padding_mask": query_padding_mask}
        if cu_seqlens is not None:
            arguments["cu_seqlens"] = cu_seqlens
        if initial_state is not None or return_state:
            arguments.update(initial_state=initial_state, return_state=return_state)
        out = self.attend(q, k, v, **arguments)
        out, state = out if return_state else (out, None)
        out = self.dropout(self.out_proj(self.join(out)))
        real = key_padding_mask if context is None else query_padding_mask
        if real is not None:
            out = out.masked_fill(~real.unsqueeze(-1), 0)
        return (out, state) if return_state else out

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token, for a batch of ``batch_size`` sequences."""
        self._check_causal("init_state")
        weight = self.q_proj.weight
        sizes = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return self.fresh_state(*sizes, dtype=weight.dtype, device=weight.device)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x (batch, dim) and the state before it, to output (batch, dim) and the state after it."""
        self._check_causal("step")
        if x.ndim != 2 or x.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__}.step: x must be (batch, {self.dim}), got {describe(x)}")
        q, k, v = (self.split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out, state = self.attend_step(q, k, v, state)
        return self.dropout(self.out_proj(self.join(out))), state

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"

    def _check(self, x: Tensor, context: Tensor | None, query_padding_mask: Tensor | None) -> None:
        name, rank = type(self).__name__, self.axes.count(",") + 2
        if context is not None and self.self_only:
            raise ValueError(f"{name}: no context, {self.self_only}")
        for label, tensor in (("x", x), ("context", context)):
            if tensor is not None and (tensor.ndim != rank or tensor.shape[-1] != self.dim):
                raise ValueError(f"{name}: {label} must be ({self.axes}, {self.dim}), got {describe(tensor)}")
        if context is not None and self.causal:
            raise ValueError(f"{name}: a causal module attends to itself; build it with causal=False to give a context")
        if context is None and query_padding_mask is not None:
            raise ValueError(
                f"{name}: query_padding_mask goes with a context; in self-attention key_padding_mask says both"
            )

    def _check_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(
                f"{type(self).__name__}.{what}: only a causal module has a state; build it with causal=True"
            )


def cast_state(state: Any, kind: type, dtype: torch.dtype) -> Any:
    """A state of ``kind`` that is kept in the dtype of inputs, in the one that autocast has given them meanwhile."""
    if not isinstance(state, kind):
        return state  # the operation says what is wrong
    cast = (part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in state)
    return kind(*cast)
