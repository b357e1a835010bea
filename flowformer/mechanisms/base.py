"""Base class of attention modules: projections, heads, padding and states."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from flowformer.core.checks import (
    apply,
    check_flag,
    check_fresh_state,
    check_mask,
    check_optional_sizes,
    check_probability,
    check_sizes,
    check_tokens_of,
)
from flowformer.core.masks import fill
from flowformer.core.precision import dtype_and_device
from flowformer.mechanisms.registry import Mechanism


class Attention(nn.Module, ABC):
    """Base class of multi-head attention modules around an operation of :mod:`flowformer.ops`.

    Queries, keys and values are linear projections of the input, split as the operation takes them; its outputs are
    joined and projected once more, and dropout follows.

    A mechanism is a subclass entered in the registry, see :func:`flowformer.mechanisms.registry.register`. One with
    options or learned tensors overrides :meth:`arguments` or :meth:`learned`; one whose operation has no axis of heads
    :meth:`split` and :meth:`join`, one with narrower keys :attr:`key_width`.

    Attributes:
        mechanism: The row of the registry.
        learns_positions: Whether the module has parameters for each position, and so an argument ``max_length``, which
            :func:`flowformer.create_attention` passes on.
        further_options: Names of options that the constructor takes as ``**overrides``.
        axes: The axes of an input before its channels.

    Args:
        dim: Channels of input and output.
        num_heads: Heads; divides ``dim`` unless ``head_dim`` is given.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Probability of dropping an output channel, after the output projection.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: for sizes that do not fit, or ``causal`` where the mechanism has no causal form.
    """

    mechanism: ClassVar[Mechanism]
    learns_positions: ClassVar[bool] = False
    further_options: ClassVar[tuple[str, ...]] = ()
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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        check_optional_sizes(head_dim=head_dim)
        for label, value in (("causal", causal), ("bias", bias)):
            check_flag(label, value)
        check_probability("dropout", dropout)
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"num_heads must divide dim unless head_dim is given, got dim {dim} and num_heads {num_heads}"
            )
        if causal and not self.mechanism.can("causal"):
            name, reason = type(self).__name__, self.mechanism.cannot["causal"]
            raise ValueError(f"{name} has no causal form, since {reason}: build it with causal=False")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner, factory = self.num_heads * self.head_dim, {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.k_proj = nn.Linear(dim, self.key_width, bias=bias, **factory)
        self.v_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.reset_parameters()

    # ------------------------------------------------------------------------ what a mechanism may override

    @property
    def key_width(self) -> int:
        """Channels of the projected keys."""
        return self.num_heads * self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """Split queries, keys or values (..., width) into heads: (..., heads, channels)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def join(self, out: Tensor) -> Tensor:
        """Join the heads of the operation's output: (..., heads, channels) to (..., width)."""
        return out.flatten(-2)

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the learned tensors, which the operation takes after v, and the step after the state.

        Some depend on the inputs x, (batch, L, dim) or of a step (batch, dim); without them, all that a state needs.
        """
        return ()

    def arguments(self) -> dict[str, Any]:
        """Return the options of the operation, and of its step, state, reference and rows."""
        return {}

    # ----------------------------------------------------------------------------------------------- use

    @overload
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, initial_state: Any = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, initial_state: Any = None,
        return_state: Literal[True],
    ) -> tuple[Tensor, Any]: ...  # fmt: skip
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Any]:
        """Attend from ``x`` to ``context``, or to itself.

        Args:
            x: (batch, L, dim).
            context: (batch, S, dim) for cross-attention. Absent, or ``x`` itself without a ``context_mask``, for
                self-attention. Not for causal modules, nor for mechanisms without cross-attention.
            mask: (batch, L) boolean, True = real token of x.
            context_mask: (batch, S) boolean, True = real token of the context; absent where all are real.
            cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1; without ``context``.
            initial_state: State to continue from (causal modules).
            return_state: Return the state after the last token as well (causal modules).

        Returns:
            (batch, L, dim), zeros at padded positions; with ``return_state`` also the state.

        Raises:
            TypeError, ValueError: for invalid arguments.
        """
        x, source, masks = self.resolve(x, context, mask, context_mask)
        q, k, v = self._project(x, source)
        given: dict[str, Any] = {"causal": self.causal, **masks, **self.arguments()}
        if cu_seqlens is not None:
            given["cu_seqlens"] = cu_seqlens
        if initial_state is not None or return_state:
            given.update(initial_state=self._cast(initial_state, q.dtype), return_state=return_state)
        out = self.mechanism.operation(q, k, v, *self.learned(x), **given)
        out, state = out if return_state else (out, None)
        out = fill(self.dropout(self.out_proj(self.join(out))), mask)
        return (out, state) if return_state else out

    def resolve(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Return the inputs of queries, and of keys and values, zeros at padding; and the masks for the operation.

        Padding is filled before the projections: the gradient of a weight is a product with the inputs, and zero times
        NaN is NaN.

        Raises:
            TypeError, ValueError: for inputs that do not fit.
        """
        if context is x and context_mask is None:
            context = None
        self._check(x, context, mask, context_mask)
        source = context if context is None else fill(context, context_mask)
        if context is not None and context_mask is None and mask is not None:
            # The operation takes equal lengths without a context_mask for self-attention.
            context_mask = torch.ones(context.shape[:-1], dtype=torch.bool, device=context.device)
        x = fill(x, mask)
        return x, x if source is None else source, {"mask": mask, "context_mask": context_mask}

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, split."""
        pairs = ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        q, k, v = (self.split(apply(f"{type(self).__name__}: inputs", layer, given)) for layer, given in pairs)
        return q, k, v

    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token, for a batch of ``batch_size`` sequences."""
        self._check_state("init_state")
        assert self.mechanism.init_state is not None  # there is a state
        check_fresh_state(f"{type(self).__name__}.init_state", batch_size)
        sizes = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        return self.mechanism.init_state(*sizes, *self.learned(), **dtype_and_device(self), **self.arguments())

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token: x (batch, dim) and the state before it, to output (batch, dim) and the state after it."""
        self._check_state("step")
        assert self.mechanism.step is not None  # there is a state
        check_tokens_of(f"{type(self).__name__}.step: x", x, "batch", self.dim)
        q, k, v = self._project(x, x)
        out, state = self.mechanism.step(q, k, v, self._cast(state, q.dtype), *self.learned(x), **self.arguments())
        return self.dropout(self.out_proj(self.join(out))), state

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"

    def _cast(self, state: Any, dtype: torch.dtype) -> Any:
        """Cast a state that is kept in the dtype of inputs, which autocast may have changed."""
        if self.mechanism.can("fixed state") or not isinstance(state, tuple) or not hasattr(state, "_fields"):
            return state  # the operation raises the error
        cast = (part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in state)
        return type(state)(*cast)

    def _check(self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None) -> None:
        name, reason = type(self).__name__, self.mechanism.layout.self_only
        if context is not None and reason:
            raise ValueError(f"{name}: context is not supported, since {reason}")
        check_tokens_of(f"{name}: x", x, self.axes, self.dim)
        if mask is not None:
            check_mask(f"{name}: mask", mask, x.shape[:-1], x.device)
        if context is None:
            if context_mask is not None:
                raise ValueError(f"{name}: context_mask requires context; in self-attention, pass mask")
            return
        check_tokens_of(f"{name}: context", context, self.axes, self.dim)
        if self.causal:
            raise ValueError(f"{name}: a causal module does not support context; build it with causal=False")
        if context_mask is not None:
            check_mask(f"{name}: context_mask", context_mask, context.shape[:-1], context.device)

    def _check_state(self, what: str) -> None:
        name = type(self).__name__
        if not self.causal:
            raise ValueError(f"{name}.{what}: only a causal module has a state; build it with causal=True")
        if not self.mechanism.can("state"):
            raise ValueError(f"{name}.{what}: no state is available, since {self.mechanism.cannot['state']}")
